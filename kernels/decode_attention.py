"""
Attention of one new token per sequence over a paged key-value cache, of 16 or of 8 bits.

    python kernels/decode_attention.py          # checks itself against fp64 and times itself against what is installed

A sequence's keys and values lie in pages that its row of `table` lists in order, so memory holds what is in use
and no more. Decoding reads all of it for every token and computes almost nothing: the floor is bytes over
bandwidth. Hence:

* One program per (sequence, kv head, chunk of tokens). The G query heads that share a kv head are the rows of one
  small matrix product (padded to 16, what a tensor core wants), so that keys and values are read once.
* A long sequence is cut into chunks that run side by side; a second kernel joins them by their log sums.
  Chunks beyond a sequence's end leave at once, so short and long sequences share a launch.
* 8 bits: a token's key of one head is int8 with one fp32 scale, its value likewise. The scales multiply scores
  and probabilities, not keys and values.

The launch depends on the number of sequences and on `reach` only, so it can be part of a CUDA graph.
Prior art, for the ideas: FlashAttention 2 and flash-decoding (chunks, joined by log sums), vLLM (pages).
"""
import json
import math
import os
import statistics
from importlib.util import find_spec

import torch
import torch.nn.functional as F

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                                  # read when the kernel is decorated

try:
    import triton
    import triton.language as tl
except ImportError:                                                       # CPU builds of torch come without
    triton = None

INTERPRET = False       # send CPU tensors through the kernel (needs TRITON_INTERPRET=1): tests and the check below


def quantise(x):
    """x (..., d) -> int8 of its shape and fp32 scales (...): x is about int8 * scale, off by at most scale / 2."""
    x = x.float()
    scale = x.abs().amax(-1).clamp(min=1e-12) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale


def _plain(q, k, v, table, length, reach, k_scale, v_scale):
    """The definition: pages are gathered."""
    reach = min(reach, k.shape[1] * table.shape[1])

    def gather(x):                                                        # -> (n, reach, Hkv, ...)
        return x[table[:, :-(-reach // x.shape[1])].long()].flatten(1, 2)[:, :reach]
    k, v = (gather(x) if s is None else gather(x).to(q.dtype) * gather(s)[..., None].to(q.dtype)
            for x, s in ((k, k_scale), (v, v_scale)))
    mask = (torch.arange(reach, device=q.device) < length[:, None])[:, None, None]                    # (n, 1, 1, reach)
    # The G query heads of a kv head stand where SDPA expects query positions: no copy of k and v per head.
    heads = q.unflatten(1, (k.shape[2], -1))                                                          # (n, Hkv, G, d)
    return F.scaled_dot_product_attention(heads, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask).flatten(1, 2)


if triton is not None:
    @triton.jit
    def _chunk_kernel(q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, length_ptr, part_ptr, lse_ptr, scale,
                      table_stride, size, HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, d: tl.constexpr,
                      DP: tl.constexpr, PAGE: tl.constexpr, INT8: tl.constexpr):
        """Grid (n, HKV, chunks): softmax-weighted mean of a chunk's `size` values -> part (n, HKV, chunks, G, d) fp32 and
        the log2 of its sum of exponentials -> lse (n, HKV, chunks, G), -inf for a chunk beyond the sequence."""
        row, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        out = ((row * HKV + head) * tl.num_programs(2) + chunk).to(tl.int64)
        length = tl.load(length_ptr + row).to(tl.int32)
        gs, ds, ts = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, PAGE)
        best = tl.full((GP,), float("-inf"), tl.float32)
        total = tl.zeros((GP,), tl.float32)
        mean = tl.zeros((GP, DP), tl.float32)
        inside = (gs < G)[:, None] & (ds < d)[None, :]
        if chunk * size < length:
            q = tl.load(q_ptr + ((row * HKV + head) * G + gs[:, None]).to(tl.int64) * d + ds[None, :], mask=inside, other=0.0)
            end = tl.minimum(length, (chunk + 1) * size)
            for first in range(chunk * size, end, PAGE):
                page = tl.load(table_ptr + row.to(tl.int64) * table_stride + first // PAGE).to(tl.int64)
                token = (page * PAGE + ts) * HKV + head                                  # (PAGE,) rows of k and v
                there = first + ts < end
                read = there[:, None] & (ds < d)[None, :]
                k = tl.load(k_ptr + token[:, None] * d + ds[None, :], mask=read, other=0)
                v = tl.load(v_ptr + token[:, None] * d + ds[None, :], mask=read, other=0)
                s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
                if INT8:
                    s *= tl.load(k_scale_ptr + token, mask=there, other=0.0)[None, :]
                s = tl.where(there[None, :], s, float("-inf"))
                new = tl.maximum(best, tl.max(s, 1))
                p = tl.exp2(s - new[:, None])
                old = tl.exp2(best - new)
                total = total * old + tl.sum(p, 1)
                if INT8:
                    p *= tl.load(v_scale_ptr + token, mask=there, other=0.0)[None, :]
                mean = tl.dot(p.to(q.dtype), v.to(q.dtype), mean * old[:, None], input_precision="ieee")
                best = new
            tl.store(part_ptr + (out * G + gs[:, None]) * d + ds[None, :], mean / total[:, None], mask=inside)
        tl.store(lse_ptr + out * G + gs, tl.where(total == 0, float("-inf"), best + tl.log2(total)), mask=gs < G)      # nan stays

    @triton.jit
    def _join_kernel(part_ptr, lse_ptr, out_ptr, chunks, CHUNKS: tl.constexpr, G: tl.constexpr, d: tl.constexpr,
                     DP: tl.constexpr):
        """Grid (n * HKV, G): the chunks' means weighted by their sums -> out (n, HKV, G, d)."""
        head, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
        cs, ds = tl.arange(0, CHUNKS), tl.arange(0, DP)
        at = (head * chunks + cs) * G + g
        lse = tl.load(lse_ptr + at, mask=cs < chunks, other=float("-inf"))
        weight = tl.exp2(lse - tl.max(lse, 0))
        there = (weight > 0)[:, None] & (ds < d)[None, :]                 # the others were never written
        part = tl.load(part_ptr + at[:, None] * d + ds[None, :], mask=there, other=0.0)
        mean = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
        tl.store(out_ptr + (head * G + g) * d + ds, mean.to(out_ptr.dtype.element_ty), mask=ds < d)


def chunk_size(n, kv_heads, reach, page, processors):
    """Tokens of a chunk, a multiple of page: small enough for four programs per processor, at most 1024."""
    chunks = max(1, 4 * processors // (n * kv_heads), -(-reach // 1024))
    return -(-reach // (chunks * page)) * page


def _kernel(q, k, v, table, length, reach, k_scale, v_scale):
    n, H, d = q.shape
    _, page, kv_heads, _ = k.shape
    G, DP = H // kv_heads, triton.next_power_of_2(d)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    chunk = chunk_size(n, kv_heads, reach, page, processors)
    chunks = -(-reach // chunk)
    part = q.new_empty(n, kv_heads, chunks, G, d, dtype=torch.float32)
    lse = q.new_empty(n, kv_heads, chunks, G, dtype=torch.float32)
    out = torch.empty_like(q)
    int8 = k_scale is not None
    with torch.cuda.device_of(q):                                         # Triton launches on the current device
        _chunk_kernel[n, kv_heads, chunks](
            q.contiguous(), k, v, k_scale if int8 else q, v_scale if int8 else q, table, length, part, lse,
            math.log2(math.e) / math.sqrt(d), table.stride(0), chunk, kv_heads, G, max(16, triton.next_power_of_2(G)), d, DP,
            page, int8, num_warps=4, num_stages=3)
        _join_kernel[n * kv_heads, G](part, lse, out, chunks, triton.next_power_of_2(chunks), G, d, DP, num_warps=1)
    return out


def decode_attention(q, k, v, table, length, reach, k_scale=None, v_scale=None):
    """Attention of one query token per sequence -> (n, H, d) of q's dtype.

    q                 (n, H, d), scaled by 1/sqrt(d) here
    k, v              (pages, page, Hkv, d), contiguous: of q's dtype, or int8 with
    k_scale, v_scale  (pages, page, Hkv) fp32, see quantise
    table             (n, P) int32, the pages of each sequence in order
    length            (n,) int, tokens of each sequence that the query sees, at least 1
    reach             int, no length is above it"""
    kernel = triton is not None and (q.is_cuda or INTERPRET)
    return (_kernel if kernel else _plain)(q, k, v, table, length, reach, k_scale, v_scale)


# ---------------------------------------------------------------------------------------------------------------
# Check and bench.

def _clock(f):
    """Median seconds of a call, out of 5 replays of a CUDA graph of 10: the way it is used, without the time of launching."""
    f()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for _ in range(10):
            f()
    for _ in range(6):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e4)
    return statistics.median(times[1:])


def measure(n, heads, group, d, longest):
    """One shape -> errors against fp64 of the first sequences, and on a GPU times, ours and those of what is installed."""
    cuda = torch.cuda.is_available()
    dtype, device, page = (torch.bfloat16, "cuda", 64) if cuda else (torch.float32, "cpu", 16)
    gen = torch.Generator(device).manual_seed(0)
    length = torch.randint(longest // 4, longest + 1, (n,), generator=gen, device=device)
    per = -(-longest // page)
    table = torch.randperm(n * per, generator=gen, device=device).view(n, per).int()
    q = torch.randn(n, heads * group, d, generator=gen, device=device).to(dtype)
    k, v = (torch.randn(n * per, page, heads, d, generator=gen, device=device).to(dtype) for _ in range(2))
    row, few = {"n": n, "kv heads": heads, "group": group, "longest": longest}, min(2, n)
    for bits in (16, 8):
        (k_, k_s), (v_, v_s) = (quantise(k), quantise(v)) if bits == 8 else ((k, None), (v, None))

        def ours(n=n, k_=k_, v_=v_, k_s=k_s, v_s=v_s):
            return (_kernel if triton else _plain)(q[:n], k_, v_, table[:n], length[:n], longest, k_s, v_s)
        used = table[:few].long()                                       # their pages, as a cache of their own
        wide = [x[used].double() if s is None else x[used].double() * s[used][..., None] for x, s in ((k_, k_s), (v_, v_s))]
        own = torch.arange(few * per, device=device).view(few, per)
        truth = _plain(q[:few].double(), *(x.flatten(0, 1) for x in wide), own, length[:few], longest, None, None)
        row[f"error {bits} bits"] = ((ours(few).double() - truth).norm() / truth.norm()).item()
        if cuda:
            seconds = _clock(ours)
            read = int(length.sum()) * heads * 2 * (d * k_.element_size() + (4 if bits == 8 else 0))
            row |= {f"ms {bits} bits": seconds * 1e3, f"GB/s {bits} bits": read / seconds / 1e9}
    if cuda:
        x = torch.ones(2**29, device=device, dtype=torch.bfloat16)
        row["GB/s of a sum"] = x.nbytes / _clock(x.sum) / 1e9
        padded = [t[table.long()].flatten(1, 2) for t in (k, v)]                                # (n, per * page, Hkv, d)
        mask, heads_ = (torch.arange(per * page, device=device) < length[:, None])[:, None, None], q.unflatten(1, (heads, -1))
        row["ms SDPA"] = 1e3 * _clock(lambda: F.scaled_dot_product_attention(
            heads_, *(t.transpose(1, 2) for t in padded), attn_mask=mask))
        if find_spec("flash_attn"):
            from flash_attn import flash_attn_with_kvcache
            row["ms flash-attn"] = 1e3 * _clock(lambda: flash_attn_with_kvcache(q[:, None], *padded, cache_seqlens=length.int()))
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
    good = all(row[f"error {bits} bits"] < (1e-2 if cuda else 1e-5) for row in rows for bits in (16, 8))
    print("every error is within its bound" if good else "AN ERROR IS OUT OF ITS BOUND")
    print(json.dumps({"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
                      "triton": triton and triton.__version__, "good": good, "rows": rows}))
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
