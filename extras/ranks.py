"""
train.py by several processes: the rows of each step spread over the GPUs of a machine.

    torchrun --nproc_per_node 4 -m extras.ranks FLAGS OF train.py

Each process (rank) holds the whole model and takes part of the rows of each pass. Gradients and
losses are summed, so the result is that of one process but for rounding and dropout masks.
--pack-tokens counts the tokens of all ranks together: give more than to one process. Rank 0 writes
OUT. When one rank stops, torchrun ends all. The same command then goes on from the last checkpoint,
also with another number of ranks, or train.py does. Without torchrun this is train.py.
"""
import contextlib
import os
from datetime import timedelta

import torch
import torch.distributed as dist

import train
from thinksafe import InputError, cli, spread

train_alone, load_checkpoint = train.train, train.load_checkpoint

class Nothing:
    """Does nothing, whatever is asked of it."""
    def __call__(self, *args, **options):
        return self

    def __getattr__(self, name):
        return self

@contextlib.contextmanager
def other_ranks():
    """In this block ranks wait for each other. Raises InputError when one of them has stopped."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        raise InputError("another rank has stopped or was never met; the same command goes on from "
                         f"the last checkpoint ({str(e).split('. ')[0]})")

def train_together(args, model, tokenizer, config, examples, skipped, loss, fingerprint):
    """Do as train.train does, as one of several ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    recomputes = False                               # known to all ranks

    def sum_over_ranks(values):
        """Return the sums of values (4,). When another rank has run out of memory, this one counts
        as such too: train.fit then begins the step anew on both, and recomputes activations."""
        nonlocal recomputes
        ran_out = model.activation_checkpointing and not recomputes
        while True:
            total = torch.cat((values, values.new_tensor([ran_out])))
            with other_ranks():
                dist.all_reduce(total)
            if not total[-1]:
                return total[:-1]
            recomputes = True
            if not ran_out:
                raise torch.OutOfMemoryError("on another rank")
            ran_out = False                          # again, for those that now begin anew

    def part_of_loss(pack):
        """Return the Losses of all ranks' examples, with the gradient of this rank's."""
        torch.manual_seed(int(torch.randint(2**62, (world,))[rank]))     # fit seeds all ranks alike
        part = spread(pack, train.length, world)[rank]
        losses = torch.stack(loss(part or pack[:1])) * bool(part)        # all need a gradient
        total = sum_over_ranks(losses.detach())
        return train.Losses(losses[0] - losses[0].detach() + total[0], *total[1:])

    def sum_gradients(step, batch):
        sum_over_ranks(torch.zeros(4, device=model.device))              # nobody ran out of memory
        for parameter in model.parameters():
            if parameter.requires_grad:
                with other_ranks():
                    dist.all_reduce(parameter.grad)
        return {}
    train_alone(args, model, tokenizer, config, examples, skipped, part_of_loss,
                fingerprint=fingerprint, extra_loss=sum_gradients)

def load_together(path, trainable, optimizer, fingerprint):
    """Do as train.load_checkpoint does, before any rank writes. Raises InputError unless all ranks
    have found the same."""
    metrics = load_checkpoint(path, trainable, optimizer, fingerprint)
    found = [None] * dist.get_world_size()
    with other_ranks():
        dist.all_gather_object(found, (len(metrics), fingerprint))
    if found.count(found[0]) < len(found):
        raise InputError(f"rank {dist.get_rank()}: the ranks have other models, rows, flags or "
                         f"checkpoints; all must see the same {path.parent}")
    return metrics

def main():
    if not dist.is_torchelastic_launched():
        return train.main()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    with other_ranks():
        dist.init_process_group(timeout=timedelta(minutes=30))
    train.train, train.load_checkpoint = train_together, load_together
    speaks = contextlib.ExitStack()
    if dist.get_rank():                              # rank 0 writes and speaks, of errors all do
        for name in ("Stage", "RowWriter", "write_rows", "save_checkpoint", "write_model"):
            setattr(train, name, Nothing())
        nowhere = speaks.enter_context(open(os.devnull, "w"))
        speaks.enter_context(contextlib.redirect_stdout(nowhere))
        speaks.enter_context(contextlib.redirect_stderr(nowhere))
    with speaks:
        train.main()
        with other_ranks():
            dist.barrier()                           # a rank that leaves early can abort the others
    dist.destroy_process_group()

if __name__ == "__main__":
    cli(main)
