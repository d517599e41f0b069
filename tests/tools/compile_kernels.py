"""
Compile the kernels that we would launch for cards that are not here, by Triton's own compiler.

    python tests/tools/compile_kernels.py [--only NAME] [ARCH ...]      # such as 75 90; default: all of CARDS

A line of JSON for each kernel and configuration: shared memory against what a block of that card can have, registers, and
bytes of spilled registers. Our own wrappers choose the configurations, for tensors that pretend to be on a card.
"""
import argparse
import contextlib
import functools
import glob
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import fused
import linear_ce_kl
import paged_attention
import sample_tokens
from kv_cache import default_block_size

# Shared memory that a block can ask for, bytes, and processors: CUDA C++ Programming Guide, technical specifications.
CARDS = {75: (65536, 40), 80: (166912, 108), 86: (101376, 82), 89: (101376, 128), 90: (232448, 132), 100: (232448, 148), 120: (101376, 170)}


class OnCard(torch.Tensor):
    """A tensor on a CPU that says that it is on a card."""
    is_cuda = True


def new(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype).as_subclass(OnCard)


def norm(dtype, D=1024):
    x, weight = new(2, D, dtype=dtype).requires_grad_(), new(D, dtype=dtype)
    fused.add_norm(x, new(2, D, dtype=dtype), weight, 1e-6)[1].sum().backward()
    fused.add_norm(x, None, weight, 1e-6)[1].sum().backward()


def rope(dtype, H=16, Hkv=8, d=128, weights=True):
    sizes, weight = (H * d, Hkv * d, Hkv * d), new(d, dtype=dtype) if weights else None
    qkv, angle = new(2, sum(sizes), dtype=dtype).requires_grad_(), new(2, 1, d, dtype=torch.float32)
    q, k, v = fused.norm_rope([qkv], sizes, [weight, weight], 1e-6, angle, angle)
    (q.sum() + k.sum() + v.sum()).backward()
    for int8 in (False, True):
        cache = new(2, 1, 4, 64, Hkv, d, dtype=torch.int8 if int8 else dtype)
        scales = new(2, 1, 4, 64, Hkv, dtype=torch.float32) if int8 else ([None], [None])
        store = fused.PagedWriter(*cache, *scales, new(2, dtype=torch.long))
        fused.norm_rope([qkv.detach()], sizes, [weight, weight], 1e-6, angle, angle, 0, store)


def silu(dtype, size=3072):
    fused.silu_mul([new(2, 2 * size, dtype=dtype).requires_grad_()]).sum().backward()


def attention(dtype, n=64, group=2, Hkv=8, d=128):
    block = default_block_size(torch.device("cuda"))
    q, table, lengths = new(n, group * Hkv, d, dtype=dtype), new(n, 4, dtype=torch.int32), new(n, dtype=torch.long)
    for kind in (dtype, torch.int8):
        kv = new(4, block, Hkv, d, dtype=kind)
        scale = new(4, block, Hkv, dtype=torch.float32) if kind == torch.int8 else None
        paged_attention.paged_attention(q, kv, kv, table, lengths, scale, scale)


def draws(dtype, V=151936, K=20):
    n = 2
    slots = sample_tokens.Slots(*(new(n, dtype=torch.long) for _ in range(3)), new(n, 18, dtype=torch.long), new(n, 17, dtype=torch.float64))
    sample_tokens.draw_tokens(new(n, V, dtype=dtype), slots, new(2, dtype=torch.long), 0.6, 0.95, K)


def loss(dtype, D=1024, modes=(True, False), heads=("none", "own", "same", "kept")):
    if dtype == torch.float16:
        return                                                      # goes without the kernel
    N, V = 256, 1024
    h, head, other, targets = new(N, D, dtype=dtype), new(V, D, dtype=dtype), new(V, D, dtype=dtype), new(N, dtype=torch.long)
    for mode in modes:
        for kind in heads:
            linear_ce_kl._launch(mode, head, other if kind == "own" else head, h, targets, None if kind == "none" else h, new(3, N, dtype=torch.float32), kind != "kept")


JOBS = {"norm": norm, "rope": rope, "rope_llama": functools.partial(rope, H=32, d=64, weights=False), "silu": silu, "attention": attention, "draws": draws,
        "loss": loss, "loss_fp32": lambda dtype: loss(torch.float32, modes=(True,)), "greedy": functools.partial(draws, K=1), "attention_4b": functools.partial(attention, group=4),
        "attention_qwen25": functools.partial(attention, group=7, Hkv=2), "attention_llama": functools.partial(attention, group=4, d=64),
        "loss_4b": functools.partial(loss, D=2560, heads=("none", "same")), "norm_4b": functools.partial(norm, D=2560),
        "loss_small": functools.partial(loss, modes=(True,), heads=("none", "same"))}


@contextlib.contextmanager
def pretend(arch):
    """In this context launches on tensors OnCard compile for a card of that architecture, and run nothing. Yields what was compiled:
    [(name of the kernel, its compiled form), ...]."""
    shared, processors = CARDS[arch]
    card = SimpleNamespace(shared_memory_per_block_optin=shared, multi_processor_count=processors)
    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kw):
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kw)))
    fake = SimpleNamespace(get_current_device=lambda: arch, get_current_stream=lambda device: 0, get_current_target=lambda: GPUTarget("cuda", arch, 32))
    driver.set_active(fake)
    with (mock.patch.object(JITFunction, "run", compile_only), mock.patch.object(torch.cuda, "device_of", lambda x: contextlib.nullcontext()),
          mock.patch.object(torch.cuda, "get_device_properties", lambda device: card),
          mock.patch.object(torch.cuda, "get_device_capability", lambda device: divmod(arch, 10))):
        yield compiled


def usage(kernel):
    """Registers and spilled bytes of a compiled kernel, as cuobjdump tells."""
    tool = glob.glob(f"{Path(triton.__file__).parent}/backends/nvidia/bin/cuobjdump")[0]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        said = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    found = dict(word.split(":") for word in said.split("Function")[1].split() if ":" in word[:-1])
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("archs", nargs="*", type=int, metavar="ARCH")
    p.add_argument("--only", nargs="+", choices=JOBS, default=list(JOBS))
    args = p.parse_args()
    for arch in args.archs or CARDS:
        seen = set()
        for name in args.only:
            dtype = "float16" if arch == 75 else "bfloat16"         # what thinksafe.default_dtype takes there
            with pretend(arch) as compiled:
                JOBS[name](getattr(torch, dtype))
            for kernel_name, kernel in compiled:
                if id(kernel) not in seen:
                    seen.add(id(kernel))
                    print(json.dumps({"triton": triton.__version__, "arch": arch, "job": name, "dtype": dtype, "kernel": kernel_name,
                                      "shared": kernel.metadata.shared, "limit": CARDS[arch][0], "warps": kernel.metadata.num_warps,
                                      **usage(kernel)}), flush=True)


if __name__ == "__main__":
    main()
