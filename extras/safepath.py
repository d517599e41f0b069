"""
SafePath (arXiv 2505.14667): a harmful prompt's whole target is the first words of the reasoning.

    python -m extras.safepath --data safechain --limit 400 --epochs 4
    python -m extras.safepath --words "This may be unsafe." --limit 400 --epochs 4

The target is <think> and these words, without an end. Benign prompts are skipped. No responses are
needed. Everything else is as in train.py.
"""
from collections import Counter

import train
from data.sources import prompt_rows
from data.chat import encode_training_pair
from thinksafe import cli, has_refusal_instruction, is_harmful, make_parser

WORDS = "Let's think about safety first."

def encode_prompts(rows, tokenizer, max_length, words=WORDS):
    """Encode the harmful prompts -> (examples as in train.encode_rows, Counter of skipped rows)."""
    examples, skipped = [], Counter()
    for row in rows:
        prompt, target = encode_training_pair(tokenizer, row["instruction"], f"<think>\n{words}")
        ids = prompt + target[:-1]                   # without the end of the sequence
        if not is_harmful(row["prompt_label"]):
            skipped["benign"] += 1
        elif has_refusal_instruction(row["instruction"]):
            skipped["has_instruction"] += 1
        elif len(ids) > max_length:
            skipped["too_long"] += 1
        else:
            examples.append({"id": row["id"], "ids": ids, "n_prompt": len(prompt), "benign": False,
                             "label": row["prompt_label"], "ce_weight": 1.0})
    return examples, skipped

def main():
    p = make_parser(__doc__)
    g = train.add_row_flags(p)
    g.add_argument("--words", default=WORDS, help="how the reasoning is to begin")
    train.add_training_flags(p)
    args = p.parse_args()

    def encode(rows, tokenizer, max_length):
        return encode_prompts(rows, tokenizer, max_length, args.words)
    model, tokenizer, config, examples, skipped = train.load_examples(args, encode, prompt_rows)
    train.train(args, model, tokenizer, config, examples, skipped,
                fingerprint={"safepath": args.words})

if __name__ == "__main__":
    cli(main)
