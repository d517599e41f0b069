"""
How strange the training set is to the student, before and after training.

    python -m extras.perplexity --out OUT        # after train.py; figures go into OUT/run.json

`python -m extras.compare` shows the perplexity before training beside the results of a method: the
paper's measure of whether data are the student's own words.
"""
import json
import math
import sys
from pathlib import Path

import torch

from data.sources import Unavailable, training_rows
from data.rows import content_id, write_atomic
from data.run_record import lock_folder, read_run
from thinksafe import (
    InputError, choose_dtype, cli, escape_control_chars, free_memory, load_model, lora_disabled,
    lora_layers, make_parser, split_packs)
from train import encode_rows, length, n_targets, target_hidden_states

from linear_ce_kl import linear_ce_kl

@torch.no_grad()
def perplexity(model, examples, max_rows=512):
    """Return {"perplexity", "low", "high", "rows", "tokens"} of the targets under the model.

    This is exp of the mean -log p of a token, over at most max_rows examples chosen by their ids.
    The 95% interval is the delta method's; examples are what was drawn."""
    examples = sorted(examples, key=lambda example: content_id(str(example["id"])))[:max_rows]
    nats, sizes = [], [n_targets(example) for example in examples]
    for pack in split_packs(examples, length, 8192):
        hidden, targets = target_hidden_states(model, pack)
        loss = linear_ce_kl(hidden, model.head, targets).double()                # (N,)
        nats += [part.sum().item() for part in loss.split([n_targets(e) for e in pack])]
    mean = sum(nats) / sum(sizes)
    half = 1.96 * math.hypot(*(x - mean * n for x, n in zip(nats, sizes))) / sum(sizes)
    low, middle, high = (math.exp(x) for x in (mean - half, mean, mean + half))
    return {"perplexity": middle, "low": low, "high": high, "rows": len(examples),
            "tokens": sum(sizes)}

def training_examples(out, model, tokenizer):
    """Return what train.py was or would be trained on in a folder, as examples.

    [] where the targets are not the rows' own responses (online methods, SafePath), or the rows
    cannot be had here."""
    train = read_run(out).get("train", {"arguments": {}, "fingerprint": {}})
    args, fingerprint = train["arguments"], train["fingerprint"]
    rows_file = Path(out) / "guarded.jsonl"
    if any(fingerprint.get(method) for method in ("online", "safepath", "primer")):
        return []
    if not args.get("data") and not rows_file.exists():
        return []
    try:
        rows = training_rows(args.get("data") or rows_file, args.get("label"),
                             args.get("prompt_column"))
    except Unavailable as e:
        print(escape_control_chars(f"no perplexity of the training set: {e}"), file=sys.stderr)
        return []
    max_length = fingerprint.get("max_length", model.config.max_position_embeddings)
    return encode_rows(rows, tokenizer, max_length, args.get("strip_cot"))[0]

def main():
    args = make_parser(__doc__).parse_args()
    run = read_run(args.out)
    if not run.get("train", {}).get("finished"):
        raise InputError(f"{args.out}: train.py has not finished there; run it first")
    lock = lock_folder(args.out)
    options = args.device, choose_dtype(args), args.quantize
    model, tokenizer = load_model(args.out / "model", *options)
    examples = training_examples(args.out, model, tokenizer)
    if not examples:
        raise InputError(f"{args.out}: its training had no fixed set of rows")
    model.prepack_weights()
    after = perplexity(model, examples)
    if not lora_layers(model):
        model = None
        free_memory()
        model, _ = load_model(run["train"]["model"], *options)
    with lora_disabled(model):
        before = perplexity(model, examples)
    run["train"]["perplexity"] = {"before": before, "after": after}
    write_atomic(args.out / "run.json", json.dumps(run, indent=1))
    lock.release()
    shown = [f"{x['perplexity']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in (before, after)]
    print(f"perplexity of the training set: {shown[0]} before, {shown[1]} after")

if __name__ == "__main__":
    cli(main)
