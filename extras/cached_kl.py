"""
train.py --kl, with the frozen student's hidden states computed once and kept on disk.

    python -m extras.cached_kl                # OUT/reference.bin, of up to 100 GB
    python -m extras.cached_kl --gb 20

Benign rows have the KL to the frozen student as their loss. train.py runs the frozen student again
in every epoch. Here this is done once. A file that is already there is used again if the same model
made it from the same rows. Everything else is as in train.py.

The hidden state h (D,) of a target token is kept, not g = softmax(h W^T) W: at the same size the
gradient of the KL is several times more exact. On a GPU g is kept beside it, which spares a quarter
of the loss's matrix products, unless the head is trained.
"""
import functools
import json
import os

import torch

import train
from data.chat import template_hash
from data.rows import atomic_path, content_id, write_atomic
from thinksafe import InputError, bounded, cli, make_parser, progress, split_packs

from linear_ce_kl import linear_ce_kl

def with_head_mean(reference, head):
    """Return f(examples) -> (N, 2D): what `reference` says, h (N, D), and softmax(h W^T) W for the
    head W (V, D), which is the gradient of a cross-entropy but for the target's row of W."""
    def f(examples):
        hidden = reference(examples).detach().requires_grad_()
        targets = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        with torch.enable_grad():
            loss = linear_ce_kl(hidden, head, targets).sum()
        mean = torch.autograd.grad(loss, hidden)[0] + head[0]
        return torch.cat((hidden.detach(), mean), 1)
    return f

def cached_reference(out, reference, examples, pack_tokens, max_gb, fingerprint):
    """Compute once what `reference` says of the examples that have a KL.

    Returns f(examples), which reads the hidden states (N, D) in OUT/reference.bin.

    Args:
        reference: f(examples) -> hidden states (N, D), as in train.packed_loss.
        fingerprint: what the hidden states depend on beside the examples. OUT/reference.json keeps
            it.

    Raises InputError for more than max_gb GB or than the disk has, and for a file of another model
    or of other rows."""
    examples = [example for example in examples if example["kl_weight"]]
    if not examples:
        return reference
    rows, n_tokens = [], 0
    for example in examples:
        rows.append([example["ids"], example["n_prompt"]])
        example["cached"] = slice(n_tokens, n_tokens + train.n_targets(example))
        n_tokens = example["cached"].stop
    fingerprint = {**fingerprint, "rows": content_id(json.dumps(rows))}
    first = reference(examples[:1])
    shape, dtype = (n_tokens, first.shape[1]), first.dtype
    n_bytes = n_tokens * first.shape[1] * first.element_size()
    if n_bytes > max_gb * 1e9:
        raise InputError(f"--gb: {n_bytes / 1e9:.2f} GB are needed, {max_gb:g} allowed; allow more,"
                         " or use train.py --kl")
    path, record = out / "reference.bin", out / "reference.json"

    def open_file(path):
        size = n_tokens * first.shape[1]
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)  # (N, D)
    if path.exists() and record.exists():
        if record.read_text("utf-8") != json.dumps(fingerprint):
            raise InputError(f"{path} was made by another model or from other rows; delete it to "
                             "make it again")
        if path.stat().st_size != n_bytes:
            raise InputError(f"{path}: damaged; delete it to make it again")
    else:
        out.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)               # written last: the file counts only with it
        try:
            with atomic_path(path) as beside, progress("reference", len(rows), "row") as advance:
                with open(beside, "wb") as f:        # a disk that is too small says so at once
                    if hasattr(os, "posix_fallocate"):       # a Mac has none
                        os.posix_fallocate(f.fileno(), 0, n_bytes)
                    f.truncate(n_bytes)
                hidden = open_file(beside)
                for pack in split_packs(examples, train.length, pack_tokens):
                    where = slice(pack[0]["cached"].start, pack[-1]["cached"].stop)
                    hidden[where] = reference(pack).cpu()
                    advance(len(pack), sum(map(train.length, pack)))
        except OSError as e:
            raise InputError(f"{path}: cannot be written ({e.strerror}); make room, or use "
                             "train.py --kl")
        write_atomic(record, json.dumps(fingerprint))
    hidden = open_file(path)
    return lambda examples: torch.cat([hidden[example["cached"]] for example in examples])

def main():
    p = make_parser(__doc__)
    g = train.add_row_flags(p)
    g.add_argument("--strip-cot", choices=("harmful", "all"),
                   help="train these rows to answer after an empty reasoning")
    g.add_argument("--gb", type=bounded(float, 0), default=100.0,
                   help="largest size of OUT/reference.bin, GB")
    train.add_training_flags(p)
    args = p.parse_args()
    encode = functools.partial(train.encode_rows, strip_cot=args.strip_cot, kl=True)
    model, tokenizer, config, examples, skipped = train.load_examples(args, encode)
    frozen = train.frozen_student(args, model)
    reference = train.frozen_reference(frozen)
    if args.device == "cuda" and not args.full:
        reference = with_head_mean(reference, frozen.head)
    reference = cached_reference(
        args.out, reference, examples, args.pack_tokens, args.gb,
        {"model": model.hash, "dtype": str(model.head.dtype),
         "template": template_hash(tokenizer), "mixed": model.mixed})
    loss = functools.partial(train.packed_loss, model, reference=reference,
                             ref_head=frozen.head if args.full else None)
    train.train(args, model, tokenizer, config, examples, skipped, loss,
                fingerprint={"kl": True, "strip_cot": args.strip_cot, "cached_reference": True})

if __name__ == "__main__":
    cli(main)
