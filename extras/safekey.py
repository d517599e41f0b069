"""
SafeKey (arXiv 2505.16186): two more losses on the key sentence, the first verdict on the prompt.

    python -m extras.safekey --data FILE --epochs 5
    python -m extras.safekey --data safekey --epochs 5      # the authors' rows

The key sentence is where the row's columns summary_end_idx and next_sentence_end_idx say, which
count characters of the response. In rows without them it is the second sentence of the reasoning.
What stands before it is the model's understanding of the prompt.

Query-mask modeling: cross-entropy of the key sentence when nothing attends to the prompt.
Dual-path head: two linear heads tell harmful prompts from hidden states of the understanding.
Each has the weight 0.2, in the last two epochs. Everything else is as in train.py.
"""
import bisect
import math
import re

import torch
import torch.nn.functional as F

import train
from data.chat import decode_continuation, normalize_think_tags, think_prefix
from data.rows import content_id
from thinksafe import InputError, cli, make_parser, pack_ids, split_packs

from linear_ce_kl import linear_ce_kl

WEIGHT, EPOCHS = 0.2, 2                     # of each loss; in so many of the last epochs
SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")

def key_sentence(row, response, ids, tokenizer):
    """Find the key sentence in the ids of a response -> (start, end), or None.

    response: the text of ids, which may lack the <think> that row["response"] has. Raises
    InputError for columns that are no places in the response."""
    if "summary_end_idx" in row:
        ends = [row["summary_end_idx"], row.get("next_sentence_end_idx")]
        length = len(row["response"])
        if not all(type(end) is int for end in ends) or not 0 < ends[0] < ends[1] <= length:
            raise InputError(f"row {row['id']}: summary_end_idx {ends[0]!r}, next_sentence_end_idx "
                             f"{ends[1]!r} are no places in its response of {length} characters; "
                             "mend them, or leave both columns out")
        ends = [end - (length - len(response)) for end in ends]
    else:
        reasoning = response.partition("</think>")[0]
        ends = [match.end() for match in SENTENCE_END.finditer(reasoning)][:2]
    if len(ends) < 2:
        return None
    ends[0] = len(response[:ends[0]].rstrip())       # a word's first token has the space before it

    def text_length(n):
        text = decode_continuation(tokenizer, ids[:n])
        return len(text if response.startswith(" ") else text.removeprefix(" "))
    start, end = (bisect.bisect_left(range(len(ids) + 1), end, key=text_length) for end in ends)
    return (start, end) if 0 < start < end <= len(ids) else None

def encode_rows(rows, tokenizer, max_length):
    """Encode as train.encode_rows does. Examples with a key sentence also have "key": (start, end)
    of the sentence in their ids."""
    numbered = [{**row, "id": number} for number, row in enumerate(rows)]
    examples, skipped = train.encode_rows(numbered, tokenizer, max_length)
    for example in examples:
        row, n_prompt = rows[example["id"]], example["n_prompt"]
        example["id"] = row["id"]
        response = normalize_think_tags(row["response"], tokenizer)
        response = response.removeprefix(think_prefix(tokenizer))
        key = key_sentence(row, response, example["ids"][n_prompt:-1], tokenizer)
        if key:
            example["key"] = n_prompt + key[0], n_prompt + key[1]
    return examples, skipped

def safekey_losses(model, heads, examples):
    """Return SafeKey's two losses on examples with a "key": scalars, the first summed over the
    tokens of the key sentences, the second over the examples.

    heads: two linear layers (D -> 1). One reads the mean hidden state of the understanding, the
    other that of all up to the end of the understanding."""
    # The prompt is left out instead of masked. This is the same, as rotary positions count only by
    # their differences.
    blind = []
    for example in examples:
        n_prompt, (start, end) = example["n_prompt"], example["key"]
        blind.append({"ids": example["ids"][n_prompt:end], "n_prompt": start - n_prompt})
    hidden, targets = train.target_hidden_states(model, blind)
    masked_key = linear_ce_kl(hidden, model.head.to(hidden.dtype), targets).sum()

    up_to_key = [example["ids"][:example["key"][0]] for example in examples]
    tokens, cu = pack_ids(up_to_key, model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.mixed):
        hidden = model(tokens, cu)                                               # (T, D)
    whole = [h.float() for h in hidden.split(cu.diff().tolist())]
    understanding = [h[example["n_prompt"]:] for h, example in zip(whole, examples)]
    harmful = torch.tensor([[not example["benign"]] for example in examples], device=hidden.device)
    harm_head = 0
    for head, states in zip(heads, (understanding, whole)):
        logits = head(torch.stack([h.mean(0) for h in states]))                  # (B, 1)
        loss = F.binary_cross_entropy_with_logits(logits, harmful.float(), reduction="sum")
        harm_head = harm_head + loss / 2
    return masked_key, harm_head

def make_extra_loss(args, model, heads, first_step):
    """Return the extra_loss(step, batch) of train.train: see train.fit."""
    def extra_loss(step, batch):
        keyed = [example for example in batch if "key" in example]
        if step < first_step or not keyed:
            return {}
        n_key = sum(example["key"][1] - example["key"][0] for example in keyed)
        sums = torch.zeros(2, device=args.device)
        for pack in split_packs(keyed, train.length, args.pack_tokens):
            losses = torch.stack(safekey_losses(model, heads, pack))
            losses = losses / losses.new_tensor([n_key, len(keyed)])
            (WEIGHT * losses.sum()).backward()
            sums += losses.detach()
        return {"extra": WEIGHT * sums.sum(), "masked_key": sums[0], "harm_head": sums[1]}
    return extra_loss

def main():
    p = make_parser(__doc__)
    train.add_row_flags(p)
    train.add_training_flags(p)
    args = p.parse_args()
    model, tokenizer, config, examples, skipped = train.load_examples(args, encode_rows)
    keys = [example.get("key") for example in examples]
    if not any(keys):
        raise InputError(f"{args.data or args.out}: no row whose reasoning has two sentences")
    print(f"safekey: {len(keys) - keys.count(None)} rows with a key sentence")
    heads = torch.nn.ModuleList(torch.nn.Linear(model.config.hidden_size, 1) for _ in range(2))
    heads.to(args.device)
    first_step = (config["epochs"] - EPOCHS) * math.ceil(len(examples) / config["batch_size"])
    train.train(args, model, tokenizer, config, examples, skipped,
                fingerprint={"safekey": content_id(str(keys))},
                extra_parameters={f"safekey.{name}": w for name, w in heads.named_parameters()},
                extra_loss=make_extra_loss(args, model, heads, first_step))

if __name__ == "__main__":
    cli(main)
