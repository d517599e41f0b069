"""
train.py by several processes: the rows of each step spread over the GPUs of a machine.

    torchrun --nproc_per_node 4 -m extras.ranks FLAGS OF train.py

Each process (rank) holds the whole model, and runs train.py on its part of each pass. Gradients and
losses are summed, so the result is that of one process, but for dropout masks and rounding. Rank 0
writes OUT. When one rank stops, torchrun ends all, and the same command goes on from the last
checkpoint, as does train.py. Without torchrun this is train.py.
"""
import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import train
from thinksafe import InputError, cli

def train_together(args, model, *parts, **options):
    """Run train.train as one rank of several: the same arguments. train.main gives no extra_loss,
    which here sums the gradients."""
    rank, world = dist.get_rank(), dist.get_world_size()
    *parts, loss = parts                             # tokenizer, config, examples, skipped; loss
    args.pack_tokens *= world

    def part_of_loss(pack):
        """Return the Losses of all rows, with the gradient of this rank's."""
        if model.activation_checkpointing:           # only here: the others wait for other sums
            raise InputError(f"rank {rank}: out of GPU memory; use fewer --pack-tokens, or train.py"
                             " on one GPU, which would recompute activations now")
        seeds = torch.randint(2**62, (world,))       # of dropout: fit seeds all ranks alike
        torch.manual_seed(int(seeds[rank]))
        rows = sorted(pack, key=train.length)[rank::world]
        losses = torch.stack(loss(rows or pack[:1])) * bool(rows)        # every rank needs a graph
        total = losses.detach().clone()
        dist.all_reduce(total)
        return train.Losses(losses[0] - losses[0].detach() + total[0], *total[1:])

    def sum_gradients(step, batch):
        for parameter in model.parameters():
            if parameter.requires_grad:
                dist.all_reduce(parameter.grad)
        return {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(".tmp", ".rank.", args.out.parent) as scratch:
        if rank:                                     # what rank 0 has, and nobody looks at later
            for name in ("run.json", "metrics.jsonl", "checkpoint.pt"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(args.out / name, scratch)
            args.out = Path(scratch)
        dist.barrier()
        train.train(args, model, *parts, part_of_loss, extra_loss=sum_gradients, **options)
        dist.barrier()                               # a rank that leaves early can abort the others

def main():
    if not dist.is_torchelastic_launched():
        return train.main()                          # one process: as train.py
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        if dist.get_rank():                          # rank 0 alone speaks, of errors all do
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        train.main(train_together)

if __name__ == "__main__":
    cli(main)
