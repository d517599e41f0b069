"""Draw one token per row of logits, each row by a random number of its own.

    u = torch.cat([uniforms(seed, key, 1) for key in keys])                     # (n,) fp64
    tokens = sample_tokens(logits, u, temperature=0.6, top_p=0.95, top_k=20)    # (n,) int64
    draw_tokens(logits, slots, eos, temperature=0.6, top_p=0.95, top_k=20)      # and note them

A draw inverts the distribution function at u, so it depends on the row alone, not on the batch. On
a GPU two kernels do all that follows the logits, for a top_k of up to 64 and for the most likely
token: one finds the candidates of each chunk of a row, the other joins them and draws.
"""
import hashlib
from typing import NamedTuple

import torch

from fused import tl, triton, use_kernels

NOT_FINITE, NOT_FOUND = -1, -2          # in place of a token, see sample_tokens
CHUNK = 4096                # logits of a row that one program reads

def uniforms(seed, key, n):
    """Random numbers (n,) fp64 in [0, 1) that depend on seed and key alone."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.rand(n, generator=generator, dtype=torch.float64)

def _invert_cdf(p, u):
    """Index (n,) where the running sum of p (n, k) fp64, scaled to end in 1, passes u (n,). The sum
    ends in exactly 1 and u < 1: p is never 0 there. p is overwritten."""
    cdf = p.cumsum_(-1)
    cdf /= cdf[:, -1:].clone()
    return torch.searchsorted(cdf, u[:, None], right=True)[:, 0].clamp(max=p.shape[-1] - 1)

def sample_tokens(logits, u, temperature, top_p, top_k, max_candidates=1024):
    """Draw one token per row: (n,) int64.

    Filters in the order of transformers: temperature, top_k, then the smallest set of most likely
    tokens whose probability reaches top_p. The vocabulary is never sorted.

    Args:
        logits: (n, V) fp32.
        u: (n,) fp64 in [0, 1).
        temperature: 0 for the most likely token.
        top_p, top_k: 1 and 0 for all tokens.
        max_candidates: if top_k is 0, look for the set among so many most likely tokens.

    A row with nan or inf gives NOT_FINITE. A row whose set is larger than max_candidates gives
    NOT_FOUND; with max_candidates=V there is none."""
    V = logits.shape[-1]
    if temperature == 0:
        best, token = logits.max(-1)
        return token.where(best.isfinite(), NOT_FINITE)
    if top_k == 0 and top_p >= 1:
        p = (logits / temperature).softmax(-1).double()
        finite = p[:, 0].isfinite()
        return _invert_cdf(p, u).where(finite, NOT_FINITE)
    best, ids = logits.topk(min(top_k or max_candidates, V))                    # (n, k), falling
    p = ((best - best[:, :1]) / temperature).exp().double()
    total = p.sum(-1)
    if top_k == 0:
        total = ((logits - best[:, :1]) / temperature).exp().sum(-1, dtype=torch.float64)
    before = p.cumsum(-1) - p
    found = before[:, -1] + p[:, -1] >= top_p * total
    p = p.where(before < top_p * total[:, None], 0)     # what came before had not reached top_p yet
    token = ids.gather(-1, _invert_cdf(p, u)[:, None])[:, 0]
    if not top_k and ids.shape[-1] < V:
        token = token.where(found, NOT_FOUND)
    return token.where(best[:, 0].isfinite(), NOT_FINITE)

class Slots(NamedTuple):
    """What draw_tokens reads and writes of n sequences; w is the length of a window of steps."""
    max_new: torch.Tensor       # (n,) tokens to draw in this window
    num_new: torch.Tensor       # (n,) tokens drawn in it
    last_draw: torch.Tensor     # (n,) what sample_tokens returned last
    tokens: torch.Tensor        # (n, w + 2): the token before the window, the window, a spare one
    u: torch.Tensor             # (n, w + 1) fp64 in [0, 1), one for each draw

if triton is not None:
    @triton.jit
    def _best_kernel(logits_ptr, best_ptr, id_ptr, stride, V, K: tl.constexpr, CHUNK: tl.constexpr):
        """The K largest logits of a chunk of a row, falling, to best and id (n, chunks, K)."""
        row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + row * stride + ids, mask=ids < V, other=float("-inf"))
        x = tl.where(x != x, float("inf"), x.to(tl.float32))            # nan is not hidden
        out = (row * tl.num_programs(1) + chunk) * K
        for i in range(K):
            best = tl.max(x, 0)
            at = tl.min(tl.where(x == best, ids, V), 0)
            tl.store(best_ptr + out + i, best)
            tl.store(id_ptr + out + i, at)
            x = tl.where(ids == at, float("-inf"), x)

    @triton.jit
    def _draw_kernel(
        best_ptr, id_ptr, max_new_ptr, num_new_ptr, last_draw_ptr, tokens_ptr, u_ptr, eos_ptr,
        tokens_stride, u_stride, n_candidates, n_eos, temperature, top_p, CODE: tl.constexpr,
        K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, E: tl.constexpr,
    ):
        """Draw from the K best of a row's candidates, as sample_tokens does, and note the token.
        CODE: NOT_FINITE. KP, C, E: K, n_candidates, n_eos padded to powers of two."""
        row, cs, ks = tl.program_id(0).to(tl.int64), tl.arange(0, C), tl.arange(0, KP)
        inside, candidates = cs < n_candidates, row * n_candidates + cs
        x = tl.load(best_ptr + candidates, mask=inside, other=float("-inf"))
        ids = tl.load(id_ptr + candidates, mask=inside, other=0)
        best, best_id = tl.full((KP,), float("-inf"), tl.float32), tl.zeros((KP,), tl.int32)
        for i in range(K):
            largest = tl.max(x, 0)
            at = tl.min(tl.where(x == largest, cs, C), 0)
            best = tl.where(ks == i, largest, best)
            best_id = tl.where(ks == i, tl.sum(tl.where(cs == at, ids, 0), 0), best_id)
            x = tl.where(cs == at, float("-inf"), x)
        largest, num_new = tl.max(best, 0), tl.load(num_new_ptr + row)
        p = tl.exp((best - largest) / temperature).to(tl.float64)
        p = tl.where(tl.cumsum(p, 0) - p < top_p * tl.sum(p, 0), p, 0.0)
        cdf = tl.cumsum(p, 0)
        passed = cdf / tl.max(cdf, 0) <= tl.load(u_ptr + row * u_stride + num_new)
        token = tl.sum(tl.where(ks == tl.sum(passed.to(tl.int32), 0), best_id, 0), 0).to(tl.int64)
        token = tl.where(tl.abs(largest) < float("inf"), token, CODE)
        tl.store(last_draw_ptr + row, token)
        tl.store(tokens_ptr + row * tokens_stride + num_new + 1, token)
        num_new += ((token >= 0) & (num_new < tl.load(max_new_ptr + row))).to(tl.int64)
        tl.store(num_new_ptr + row, num_new)
        eos = tl.load(eos_ptr + tl.arange(0, E), mask=tl.arange(0, E) < n_eos, other=-3)
        is_eos = tl.sum((eos == token).to(tl.int32), 0) > 0
        tl.store(max_new_ptr + row, num_new, mask=is_eos)

def _kernel(logits, slots, eos, temperature, top_p, K):
    (n, V), pad = logits.shape, triton.next_power_of_2
    chunks = triton.cdiv(V, CHUNK)
    best = logits.new_empty(n, chunks, K, dtype=torch.float32)
    ids = logits.new_empty(n, chunks, K, dtype=torch.int32)
    _best_kernel[n, chunks](logits, best, ids, logits.stride(0), V, K, CHUNK)
    _draw_kernel[n,](
        best, ids, *slots, eos, slots.tokens.stride(0), slots.u.stride(0), chunks * K, len(eos),
        temperature, top_p, NOT_FINITE, K, pad(K), pad(chunks * K), pad(max(len(eos), 1)))

def draw_tokens(logits, slots, eos, temperature, top_p, top_k, defer=False):
    """Draw a token for each of n Slots and note it there. An eos ends the sequence.

    logits: (n, V). eos: (k,) ids. The other options: see sample_tokens. defer: read nothing back
    from the device. A slot with NOT_FOUND then waits for a call that is not deferred."""
    K = top_k if temperature else 1
    if use_kernels(logits) and 0 < K <= min(64, logits.shape[1]):
        return _kernel(logits, slots, eos, temperature or 1.0, top_p, K)
    max_new, num_new, last_draw, tokens, u = slots
    logits, options = logits.float(), (temperature, top_p, top_k)
    u = u.gather(1, num_new[:, None])[:, 0]
    token = sample_tokens(logits, u, *options)
    if not defer and (token == NOT_FOUND).any():               # look at the whole vocabulary
        token = sample_tokens(logits, u, *options, max_candidates=logits.shape[-1])
    last_draw.copy_(token)
    tokens.scatter_(1, num_new[:, None] + 1, token[:, None])   # read only if num_new grows
    num_new += (token >= 0) & (num_new < max_new)
    is_eos = (token[:, None] == eos).any(-1)
    max_new.copy_(num_new.where(is_eos, max_new))
