"""
Check kernels/paged_attention.py against fp64, and time it against what is installed.

    python tests/bench_paged_attention.py               # shapes of Qwen3-0.6B and 4B on a GPU, a small check on a CPU

Without a GPU the kernel runs in Triton's interpreter and nothing is timed. The last line is JSON; the exit code is 1 if
an error is out of its bound.
"""
import json
import os
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent / "kernels"), str(TESTS / "tools")]
if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                # read when the kernel is decorated

from replay import replay_ms

from fused import quantize_kv
from paged_attention import _kernel, _plain, triton


def clock(f):
    """Median seconds of a call, of 5 replays of a CUDA graph of 10 calls: as it is used, without the time of launching."""
    f()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            f()
    return statistics.median(replay_ms(graph, 6)[1:]) / 1e4


def restored(x, scale):
    """Quantized or plain keys or values in fp64."""
    return x.double() if scale is None else x.double() * scale[..., None]


def measure(n, kv_heads, group, d, longest):
    """One shape -> its row: errors of the first sequences against fp64; on a GPU times, ours and of what is installed."""
    cuda = torch.cuda.is_available()
    dtype, device, block_size = (torch.bfloat16, "cuda", 64) if cuda else (torch.float32, "cpu", 16)
    gen = torch.Generator(device).manual_seed(0)
    lengths = torch.randint(longest // 4, longest + 1, (n,), generator=gen, device=device)
    per = -(-longest // block_size)                     # blocks of a sequence
    table = torch.randperm(n * per, generator=gen, device=device).view(n, per).int()
    q = torch.randn(n, kv_heads * group, d, generator=gen, device=device).to(dtype)
    k, v = (torch.randn(n * per, block_size, kv_heads, d, generator=gen, device=device).to(dtype) for _ in range(2))
    row = {"n": n, "kv heads": kv_heads, "group": group, "longest": longest}
    few = min(2, n)
    for bits, (k_, k_scale), (v_, v_scale) in ((16, (k, None), (v, None)), (8, quantize_kv(k), quantize_kv(v))):
        attend = _kernel if triton else _plain

        def ours(n=n, attend=attend, k_=k_, v_=v_, k_scale=k_scale, v_scale=v_scale):
            return attend(q[:n], k_, v_, table[:n], lengths[:n], k_scale, v_scale)
        used = table[:few].long()                       # their blocks, as a cache of their own
        wide = [restored(x[used], s if s is None else s[used]).flatten(0, 1) for x, s in ((k_, k_scale), (v_, v_scale))]
        own_table = torch.arange(few * per, device=device).view(few, per)
        truth = _plain(q[:few].double(), *wide, own_table, lengths[:few], None, None)
        row[f"error {bits} bits"] = ((ours(few).double() - truth).norm() / truth.norm()).item()
        if cuda:
            seconds = clock(ours)
            read = int(lengths.sum()) * kv_heads * 2 * (d * k_.element_size() + (4 if bits == 8 else 0))
            row |= {f"ms {bits} bits": seconds * 1e3, f"GB/s {bits} bits": read / seconds / 1e9}
    if cuda:
        x = torch.ones(2**29, device=device, dtype=torch.bfloat16)
        row["GB/s of a sum"] = x.nbytes / clock(x.sum) / 1e9
        padded = [t[table.long()].flatten(1, 2) for t in (k, v)]                        # (n, per * block_size, Hkv, d)
        mask = (torch.arange(per * block_size, device=device) < lengths[:, None])[:, None, None]
        grouped, heads_first = q.unflatten(1, (kv_heads, -1)), [t.transpose(1, 2) for t in padded]
        row["ms SDPA"] = 1e3 * clock(lambda: F.scaled_dot_product_attention(grouped, *heads_first, attn_mask=mask))
        if find_spec("flash_attn"):
            from flash_attn import flash_attn_with_kvcache
            row["ms flash-attn"] = 1e3 * clock(
                lambda: flash_attn_with_kvcache(q[:, None], *padded, cache_seqlens=lengths.int()))
    print("  ".join(f"{name} {x:.3g}" for name, x in row.items()), flush=True)
    return row


def main():
    cuda = torch.cuda.is_available()
    if not cuda:
        print("no GPU here: a small check", "in Triton's interpreter" if triton else "of the plain path, without Triton")
    # sequences, kv heads, query heads of each, d, longest: Qwen3-0.6B's and 4B's; many short ones, few long ones
    shapes = (((256, 8, 2, 128, 1024), (64, 8, 4, 128, 4096), (1, 8, 2, 128, 16384)) if cuda else
              ((6, 2, 2, 32, 90), (1, 2, 2, 32, 400)))
    rows = [measure(*shape) for shape in shapes]
    bound = 1e-2 if cuda else 1e-5
    good = all(row[f"error {bits} bits"] < bound for row in rows for bits in (16, 8))
    print("every error is within its bound" if good else "AN ERROR IS OUT OF ITS BOUND")
    print(json.dumps({"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
                      "triton": triton and triton.__version__, "good": good, "rows": rows}))
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
