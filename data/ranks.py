"""
Several processes train one model: the ranks of torchrun.

    rank, world = join_ranks(args.device)
    with other_ranks():
        dist.all_reduce(x)
"""
import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from thinksafe import InputError

def read_ranks():
    """Return (rank, number of ranks, rank on this machine) as RANK, WORLD_SIZE and LOCAL_RANK say,
    (0, 1, 0) without them. Raises InputError for a variable that is no such number."""
    found = []
    for name, default, low in (("RANK", "0", 0), ("WORLD_SIZE", "1", 1), ("LOCAL_RANK", "0", 0)):
        text = os.environ.get(name) or default
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= low):
            raise InputError(f"{name}={text[:50]} in the environment is no whole number from {low};"
                             " unset it, or start with torchrun")
        found.append(int(text))
    rank, world, local_rank = found
    if world > 1 and rank >= world:
        raise InputError(f"RANK={rank} in the environment is not below WORLD_SIZE={world}; start "
                         "with torchrun")
    return rank, world, local_rank

def join_ranks(device):
    """Meet torchrun's other processes -> (rank, number of ranks), (0, 1) without torchrun. Only
    rank 0 prints to stdout. "cuda" is then this process's own GPU."""
    _, world, local_rank = read_ranks()
    if world > 1 and not dist.is_initialized():
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        with other_ranks():
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30))
        if dist.get_rank():
            sys.stdout = open(os.devnull, "w")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

@contextlib.contextmanager
def other_ranks():
    """In this block ranks wait for each other. Raises InputError when one of them has stopped."""
    try:
        yield
    except (RuntimeError, ValueError) as e:
        raise InputError("another rank has stopped or was never met; start with torchrun, the same "
                         f"command goes on from the last checkpoint ({str(e).split('. ')[0]})")
