"""Causal attention within each document of a pack, by flash attention or in padded batches.

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

    @functools.cache
    def padded():
        """Return the tokens (B, t) of padded batches of documents, and the places (T,) in them."""
        order, batches, rows = sorted(range(len(lengths)), key=lambda i: -lengths[i]), [], []
        while order:                            # documents of similar length share a padded batch
            similar = [i for i in order if lengths[i] >= 0.8 * lengths[order[0]]]
            place, order = torch.arange(lengths[order[0]]), order[len(similar):]
            real = place < cu_seqlens.diff()[similar, None]                      # (B, t)
            batches.append(cu_seqlens[similar, None] + place * real)    # padding: first token
            rows.append(real.flatten())
        rows = torch.cat(rows).nonzero()[:, 0]                                   # (T,)
        unpad = rows[torch.cat([tokens.flatten() for tokens in batches])[rows].argsort()]
        return [tokens.to(device) for tokens in batches], unpad.to(device)

    def attend(layer, q, k, v):
        if q.is_cuda and q.dtype != torch.float32 and q.shape[-1] % 8 == 0:
            if flash := _flash_attention():
                return flash(q, k, v, cu, max(lengths))
        (batches, unpad), outs = padded(), []
        for tokens in batches:        # index_select: on a CPU its backward is 5 times as fast
            q_, k_, v_ = (x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape)
                          .transpose(1, 2) for x in (q, k, v))
            if q.device.type != "cpu":               # enable_gqa would store all scores
                k_, v_ = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k_, v_))
            out = F.scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=True)
            outs.append(out.transpose(1, 2).flatten(0, 1))                       # (B * t, H, d)
        return torch.cat(outs).index_select(0, unpad)
    return attend
