"""Attention of one new token per sequence over a paged key-value cache of 16 or 8 bits.

    out = paged_attention(q, k, v, block_table, context_lens)   # (n, H, d)

The keys and values of a sequence lie in blocks of tokens, listed in order by a row of block_table,
so memory holds little more than what is in use. Decoding reads all of it for every token and
computes almost nothing: the floor is bytes over bandwidth. Hence:

* One program per (sequence, kv head, chunk of tokens). The G query heads that share a kv head are
  the rows of one small matrix product, padded to the 16 that a tensor core wants. So keys and
  values are read once.
* A long sequence is cut into chunks that run side by side. A second kernel joins them by their log
  sums. Each sequence is cut by its own length: short and long ones share a launch.
* With 8 bits each key and each value of a token and head is int8 with one fp32 scale. The scales
  multiply scores and probabilities, not keys and values.

The launch depends on the number of sequences alone: it fits in a CUDA graph.
Prior art, for the ideas: FlashAttention 2 and flash-decoding (chunks), vLLM (blocks).
"""
import math

import torch
import torch.nn.functional as F

from fused import tl, triton, use_kernels

def grouped_attention(q, k, v, context_lens):
    """Attention of one query per sequence (n, H, d) to k and v (n, Hkv, longest, d)."""
    visible = torch.arange(k.shape[2], device=q.device) < context_lens[:, None, None, None]
    # The query heads of a kv head stand in the place of query positions: no copies of k and v.
    q = q.unflatten(1, (k.shape[1], -1))                                        # (n, Hkv, G, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).flatten(1, 2)

def _plain(q, k, v, block_table, context_lens, k_scale, v_scale):
    """The definition, by gathering the blocks of each sequence."""
    longest = int(context_lens.max())
    blocks = block_table[:, :-(-longest // k.shape[1])].long()

    def gather(cache, scale):
        x = cache[blocks].flatten(1, 2)[:, :longest]            # (n, longest, Hkv, d)
        if scale is not None:
            x = x.to(q.dtype) * scale[blocks].flatten(1, 2)[:, :longest, :, None].to(q.dtype)
        return x.transpose(1, 2)
    return grouped_attention(q, gather(k, k_scale), gather(v, v_scale), context_lens)

if triton is not None:
    @triton.jit
    def _chunk_kernel(
        q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, block_table_ptr, context_lens_ptr, part_ptr,
        lse_ptr, scale, table_stride, min_blocks, HKV: tl.constexpr, G: tl.constexpr,
        GP: tl.constexpr, d: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    ):
        """Attention over one chunk of a sequence, of min_blocks blocks or more where a sequence has
        more than that for each of its chunks; the grid is (n, HKV, chunks).

        Writes the softmax-weighted mean of the values to part (n, HKV, chunks, G, d) fp32 and log2
        of the sum of exponentials to lse (n, HKV, chunks, G), -inf past the end of the sequence.
        GP, DP: G and d padded to sizes that tl.dot takes."""
        row, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        out = ((row * HKV + head) * tl.num_programs(2) + chunk).to(tl.int64)
        length = tl.load(context_lens_ptr + row).to(tl.int32)
        gs, ds, ts = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, BLOCK)
        largest = tl.full((GP,), float("-inf"), tl.float32)
        total = tl.zeros((GP,), tl.float32)
        mean = tl.zeros((GP, DP), tl.float32)
        inside = (gs < G)[:, None] & (ds < d)[None, :]
        blocks = tl.cdiv(tl.cdiv(length, BLOCK), tl.num_programs(2))
        size = tl.maximum(blocks, min_blocks) * BLOCK                   # tokens of a chunk
        if chunk * size < length:
            q_rows = ((row * HKV + head) * G + gs[:, None]).to(tl.int64)
            q = tl.load(q_ptr + q_rows * d + ds[None, :], mask=inside, other=0.0)
            table_ptr = block_table_ptr + row.to(tl.int64) * table_stride
            end = tl.minimum(length, (chunk + 1) * size)
            for first in range(chunk * size, end, BLOCK):
                block = tl.load(table_ptr + first // BLOCK).to(tl.int64)
                token = (block * BLOCK + ts) * HKV + head               # (BLOCK,) rows of k and v
                is_token = first + ts < end
                read = is_token[:, None] & (ds < d)[None, :]
                k = tl.load(k_ptr + token[:, None] * d + ds[None, :], mask=read, other=0)
                v = tl.load(v_ptr + token[:, None] * d + ds[None, :], mask=read, other=0)
                s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
                if k_scale_ptr is not None:
                    s *= tl.load(k_scale_ptr + token, mask=is_token, other=0.0)[None, :]
                s = tl.where(is_token[None, :], s, float("-inf"))       # (GP, BLOCK), log2
                new_largest = tl.maximum(largest, tl.max(s, 1))
                p = tl.exp2(s - new_largest[:, None])
                rescale = tl.exp2(largest - new_largest)
                total = total * rescale + tl.sum(p, 1)
                if v_scale_ptr is not None:
                    p *= tl.load(v_scale_ptr + token, mask=is_token, other=0.0)[None, :]
                mean = tl.dot(p.to(q.dtype), v.to(q.dtype), mean * rescale[:, None],
                              input_precision="ieee")
                largest = new_largest
            part_ptrs = part_ptr + (out * G + gs[:, None]) * d + ds[None, :]
            tl.store(part_ptrs, mean / total[:, None], mask=inside)
        lse = tl.where(total == 0, float("-inf"), largest + tl.log2(total))     # nan stays nan
        tl.store(lse_ptr + out * G + gs, lse, mask=gs < G)

    @triton.jit
    def _join_kernel(
        part_ptr, lse_ptr, out_ptr, CHUNKS: tl.constexpr, G: tl.constexpr, d: tl.constexpr,
        DP: tl.constexpr,
    ):
        """Weight the means of the chunks by their sums: out (n, HKV, G, d); grid (n * HKV, G)."""
        head, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
        cs, ds = tl.arange(0, CHUNKS), tl.arange(0, DP)
        at = (head * CHUNKS + cs) * G + g
        lse = tl.load(lse_ptr + at)
        weight = tl.exp2(lse - tl.max(lse, 0))
        written = (weight > 0)[:, None] & (ds < d)[None, :]     # the other parts are garbage
        part = tl.load(part_ptr + at[:, None] * d + ds[None, :], mask=written, other=0.0)
        mean = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
        tl.store(out_ptr + (head * G + g) * d + ds, mean.to(out_ptr.dtype.element_ty), mask=ds < d)

def cut(n, kv_heads, processors):
    """Return into how many chunks at most n sequences are cut, and how many blocks a chunk has at
    least: about eight programs for each processor, but no small chunks where there is no need."""
    chunks = triton.next_power_of_2(triton.cdiv(8 * processors, n * kv_heads))
    return min(max(chunks, 4), 64), 1 if n * kv_heads < 4 * processors else 8

def _kernel(q, k, v, block_table, context_lens, k_scale, v_scale):
    (n, heads, d), (_, block_size, kv_heads, _) = q.shape, k.shape
    G, DP, processors = heads // kv_heads, triton.next_power_of_2(d), 4
    if q.is_cuda:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    chunks, min_blocks = cut(n, kv_heads, processors)
    part = q.new_empty(n, kv_heads, chunks, G, d, dtype=torch.float32)
    lse = q.new_empty(n, kv_heads, chunks, G, dtype=torch.float32)
    out, options = torch.empty_like(q), {"num_stages": 3}
    if k_scale is not None:             # two blocks in flight, as each has half the bytes
        options = {"num_stages": 5, "maxnreg": 128 if q.dtype == torch.bfloat16 else None}
    _chunk_kernel[n, kv_heads, chunks](
        q.contiguous(), k, v, k_scale, v_scale, block_table, context_lens, part, lse,
        math.log2(math.e) / math.sqrt(d), block_table.stride(0), min_blocks, kv_heads, G,
        max(16, triton.next_power_of_2(G)), d, DP, block_size, num_warps=4, **options)
    _join_kernel[n * kv_heads, G](part, lse, out, chunks, G, d, DP, num_warps=1)
    return out

def paged_attention(q, k, v, block_table, context_lens, k_scale=None, v_scale=None):
    """Attention of one query token per sequence: (n, H, d) of q's dtype.

    Args:
        q: (n, H, d); the scaling by 1/sqrt(d) is done here.
        k, v: (blocks, block_size, Hkv, d), contiguous, of q's dtype or int8.
        block_table: (n, max_blocks) int32, the blocks of each sequence in order.
        context_lens: (n,) int, tokens of each sequence that the query sees, at least 1.
        k_scale, v_scale: (blocks, block_size, Hkv) fp32 of an int8 cache, see fused.quantize_kv."""
    attend = _kernel if use_kernels(q) else _plain
    return attend(q, k, v, block_table, context_lens, k_scale, v_scale)
