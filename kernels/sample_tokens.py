"""Draw one token per row of logits, each row by a random number of its own.

    u = torch.cat([uniforms(seed, key, 1) for key in keys])                     # (n,) fp64
    tokens = sample_tokens(logits, u, temperature=0.6, top_p=0.95, top_k=20)    # (n,) int64

A draw inverts the distribution function at u, so it depends on the row alone, not on the batch.
"""
import hashlib

import torch
import torch.nn.functional as F

NOT_FINITE, NOT_FOUND = -1, -2          # in place of a token, see sample_tokens

def uniforms(seed, key, n):
    """Random numbers (n,) fp64 in [0, 1) that depend on seed and key alone."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.rand(n, generator=generator, dtype=torch.float64)

def _invert_cdf(p, u):
    """Index (n,) where the running sum of p (n, k) fp64, scaled to end in 1, passes u (n,), and the
    fraction (n,) of that step below u. The sum ends in exactly 1 and u < 1: p is never 0 there."""
    cdf = p.cumsum(-1)
    cdf = cdf / cdf[:, -1:]
    index = torch.searchsorted(cdf, u[:, None], right=True).clamp(max=p.shape[-1] - 1)  # nan: k
    end, step = cdf.gather(-1, index)[:, 0], (p / p.sum(-1, keepdim=True)).gather(-1, index)[:, 0]
    return index[:, 0], (1 - (end - u) / step).clamp(0, 1 - 2**-53)

def _topk(x, k):
    """torch.topk of x (n, V), faster: the k best lie in the k blocks of 64 with the best maxima."""
    n, V = x.shape
    if V % 64 or V < 64 * 4 * k:
        return x.topk(k)
    blocks = x.view(n, -1, 64)
    best_blocks = blocks.amax(-1).topk(k).indices                               # (n, k)
    candidates = blocks.gather(1, best_blocks[..., None].expand(-1, -1, 64))    # (n, k, 64)
    best, i = candidates.flatten(1).topk(k)
    return best, 64 * best_blocks.gather(1, i // 64) + i % 64

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
    if top_k == 0 and top_p >= 1:                       # by blocks of 256: few sums in fp64
        p = F.pad((logits / temperature).softmax(-1), (0, -V % 256)).unflatten(-1, (-1, 256))
        mass = p.sum(-1, dtype=torch.float64)           # (n, blocks)
        block, rest = _invert_cdf(mass, u)
        in_block = p[torch.arange(len(p), device=p.device), block].double()
        token = 256 * block + _invert_cdf(in_block, rest)[0]
        return token.where(mass.sum(-1).isfinite(), NOT_FINITE)
    best, ids = _topk(logits, min(top_k or max_candidates, V))                  # (n, k), falling
    p = ((best - best[:, :1]) / temperature).exp().double()
    total = p.sum(-1)
    if top_k == 0:
        total = ((logits - best[:, :1]) / temperature).exp().sum(-1, dtype=torch.float64)
    before = p.cumsum(-1) - p
    found = before[:, -1] + p[:, -1] >= top_p * total
    p = p.where(before < top_p * total[:, None], 0)     # what came before had not reached top_p yet
    token = ids.gather(-1, _invert_cdf(p, u)[0][:, None])[:, 0]
    if not top_k and ids.shape[-1] < V:
        token = token.where(found, NOT_FOUND)
    return token.where(best[:, 0].isfinite(), NOT_FINITE)
