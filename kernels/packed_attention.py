"""Causal attention within each document of a pack, by flash attention or one after the other.

    attend = packed_attention(cu_seqlens, device)
    out = attend(layer, q, k, v)                    # (T, H, d)
"""
import functools
import inspect
import sys

import torch
import torch.nn.functional as F

@functools.cache
def _flash_attention():
    """Return packed flash attention f(q, k, v, cu_seqlens, longest), None where a GPU has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
        takes_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters    # torch 2.12

        def flash(q, k, v, cu, longest):
            options = {"enable_gqa": True} if takes_gqa else {}
            if not takes_gqa:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **options)
        x = torch.zeros(2, 1, 64, device="cuda", dtype=torch.bfloat16)
        flash(x, x, x, torch.tensor([0, 2], device="cuda", dtype=torch.int32), 2)
        return flash
    except Exception as e:
        print(f"attention: torch SDPA, as varlen_attn fails here ({e})", file=sys.stderr)

def packed_attention(cu_seqlens, device):
    """Return attend(layer, q, k, v): causal attention within each document of a pack. q and the
    result are (T, H, d), k and v are (T, Hkv, d). cu_seqlens (B+1,) is on the CPU."""
    lengths, cu = cu_seqlens.diff().tolist(), cu_seqlens.to(device, torch.int32, non_blocking=True)

    def attend(layer, q, k, v):
        if q.is_cuda and q.dtype != torch.float32 and q.shape[-1] % 8 == 0:
            if flash := _flash_attention():
                return flash(q, k, v, cu, max(lengths))
        if q.device.type != "cpu":                   # enable_gqa would store all scores
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        outs = []
        for document in zip(*(x.split(lengths) for x in (q, k, v))):
            heads = (x.transpose(0, 1)[None] for x in document)                  # (1, H, t, d)
            out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)
    return attend
