"""
What train.py would do, without training: run it with train.py's flags.

    python -m extras.memory --out OUT
    python -m extras.memory --full --kl --pack-tokens 8192

It shows the configuration, a plan of the memory, and one example. The plan has the weights,
gradients and optimizer, the loss, and the activations, kept for the backward pass or recomputed
there. Nothing is written. It is an estimate in two places: gradients inside of a layer count as
half of what the layer kept (a fifth to a half was seen), and on a GPU the allocator leaves gaps:
a sixth is added to all that comes and goes (a tenth was seen, twice).
"""
import functools
import math
import os
import re
import sys
from pathlib import Path

import torch

import train
from data.chat import decode_text
from thinksafe import balance_packs, cli, escape_control_chars, make_parser

from linear_ce_kl import PLAIN_ROWS, GPU_BUFFER
from merged_linear import merge_linear_layers

MEMINFO = Path("/proc/meminfo")

def stored_bytes(tensors):
    """Return the bytes of the memory behind tensors; what they share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

def activation_bytes(model, examples):
    """Measure the bytes that a packed pass keeps for its backward pass -> (all, of one layer).

    Autograd is watched as it asks for them. Only the first two layers run: the second is like all
    that follow, the first may need no gradient of its input."""
    layers = model.layers
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def kept_by(n_layers):
        model.layers, kept = layers[:n_layers], []

        def keep(tensor):
            kept.append(tensor)
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            train.target_hidden_states(model, examples)
        return stored_bytes(t for t in kept if t.untyped_storage().data_ptr() not in weights)
    try:
        one, two = kept_by(1), kept_by(2)
    finally:
        model.layers = layers
    return one + (len(layers) - 1) * (two - one), two - one

def memory_plan(model, examples, sizes, optimizer, activations, kl=False):
    """Plan the bytes that training needs at its peak beside the weights -> {"state", "activations",
    "inputs", "loss"}, which are parts, and the sums "kept" and "recomputed".

    Args:
        examples: those of the largest pass, T tokens of which N are targets.
        sizes: number of elements of each trained tensor.
        activations: see `activation_bytes`.
        kl: whether there is a reference."""
    n_bytes, (kept, of_layer) = model.head.element_size(), activations
    D, V = model.config.hidden_size, model.config.vocab_size
    T, N = sum(map(train.length, examples)), sum(map(train.n_targets, examples))
    state = 0
    for n in sizes:
        # An fp32 gradient and two moments. In 8 bits a moment is a byte, and an fp32 scale for 256.
        in_8_bits = optimizer == "adamw8bit" and n >= 4096
        state += n * (4 + (2 + 8 / 256 if in_8_bits else 8))
    # Hidden states at the targets and their gradient, with a reference also its states, twice. Then
    # the blocks of logits of kernels/linear_ce_kl.py.
    loss = (4 if kl else 2) * N * D * n_bytes
    if model.device.type == "cuda":
        loss += GPU_BUFFER
    else:
        loss += 2 * min(N, PLAIN_ROWS) * V * 4 * (2 if kl else 1)
    if model.head.requires_grad:
        loss += 3 * V * D * 4  # the head's fp32 gradient, here and on the way to there
    inputs = len(model.layers) * T * D * n_bytes     # of the layers: all there is to recompute from
    gaps = 7 / 6 if model.device.type == "cuda" else 1
    plan = {"state": state, "activations": kept, "inputs": inputs, "loss": loss,
            "kept": state + gaps * (kept + max(loss, of_layer / 2)),
            "recomputed": state + gaps * (inputs + max(loss, 1.5 * of_layer))}
    return {part: int(size) for part, size in plan.items()}

def render_example(example, tokenizer):
    """Return an example's text. Each line begins with `prompt` or `trained`; control characters
    are escaped."""
    lines, n = [], example["n_prompt"]
    for part, ids in (("prompt ", example["ids"][:n]), ("trained", example["ids"][n:])):
        text = escape_control_chars(decode_text(tokenizer, ids))
        lines += [f"{part} | {line}" for line in text.split("\n")]
    return "\n".join(lines)

def print_plan(plan, weights, n_tokens, free):
    """Print the plan of a pass of n_tokens, and what nine tenths of the `free` bytes do for."""
    gb = {part: f"{size / 1e9:.3g}" for part, size in plan.items()}
    kept, recomputed = (f"{plan[part] / n_tokens / 1e3:.3g}" for part in ("activations", "inputs"))
    verdict = "kept" if plan["kept"] <= 0.9 * free else "recomputed"
    if math.isnan(free):
        verdict = "how much there is cannot be told here"
    print(f"memory in GB: weights {weights / 1e9:.3g}, gradients and optimizer {gb['state']}, loss "
          f"{gb['loss']}, activations of {n_tokens:,} tokens {gb['activations']} ({kept} kB each, "
          f"{recomputed} if recomputed); beside the weights {gb['kept']}, if recomputed "
          f"{gb['recomputed']}; free {free / 1e9:.3g}: {verdict}")
    if plan["recomputed"] > 0.9 * free:
        print("warning: this may not fit; fewer --pack-tokens need less, or --quantize nf4, or "
              "with --full --optimizer adamw8bit", file=sys.stderr)

def free_bytes(device):
    """Return how many bytes can still be allocated, nan where nothing tells."""
    if device.type == "cuda":                        # torch keeps freed memory to use again
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        found = re.search(r"MemAvailable: +(\d+)", MEMINFO.read_text("ascii", "replace"))
        return 1024 * int(found[1]) if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf(
            "SC_PAGE_SIZE")          # kernels before 3.14 do not say
    except (OSError, ValueError):    # no /proc: another system, or a sandbox
        return math.nan

def main():
    p = make_parser(__doc__)
    g = train.add_row_flags(p)
    g.add_argument("--kl", action="store_true", help="as for train.py")
    g.add_argument("--strip-cot", choices=("harmful", "all"), help="as for train.py")
    train.add_training_flags(p)
    args = p.parse_args()
    encode = functools.partial(train.encode_rows, strip_cot=args.strip_cot, kl=args.kl)
    model, tokenizer, config, examples, _ = train.load_examples(args, encode)
    shown = {"student": model.name, "device": args.device, **config,
             "pack_tokens": args.pack_tokens}
    print(escape_control_chars("\n".join(f"{key:16}{value}" for key, value in shown.items())))
    models = [model, train.frozen_student(args, model) if args.kl else model]    # may be the same
    packs = []
    for batch in train.make_batches(examples, config["batch_size"], config["epochs"], args.seed):
        packs += balance_packs(batch, train.length, args.pack_tokens)
    n_tokens, largest = max(((sum(map(train.length, pack)), pack) for pack in packs),
                            key=lambda pair: pair[0])
    model.train()
    merge_linear_layers(model)
    activations = activation_bytes(model, largest)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    plan = memory_plan(model, largest, sizes, args.optimizer, activations, args.kl)
    weights = stored_bytes(t for m in models for t in (*m.parameters(), *m.buffers()))
    print_plan(plan, weights, n_tokens, free_bytes(model.device))
    print(render_example(packs[0][0], tokenizer))

if __name__ == "__main__":
    cli(main)
