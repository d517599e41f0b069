"""
Linear head + cross-entropy + forward KL to a reference, per token weighted:

    L_i = w_i * (-log p(y_i)) + lambda_i * KL(p_ref,i || p_i)

This is the plain PyTorch definition: logits of one chunk of tokens at a time, in fp32, made again for
the backward pass, so that memory holds (chunk, V) and never (N, V).
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def _chunk_loss(h, head, y, w, h_ref, head_ref, lam):
    logits = F.linear(h, head).float()                                        # (C, V)
    loss = w * F.cross_entropy(logits, y, reduction="none")
    if h_ref is not None:
        with torch.no_grad():
            log_ref = F.linear(h_ref, head_ref).float().log_softmax(-1)
        kl = (log_ref.exp() * (log_ref - logits.log_softmax(-1))).sum(-1)
        loss = loss + lam * kl
    return loss


def ce_kl_loss(hidden, head, targets, weight=None, ref_hidden=None, kl_weight=None, ref_head=None, chunk=1024):
    """Loss per token, (N,) fp32; the caller normalises.

    hidden (N, D), head (V, D), targets (N,) int with -100 where nothing is to be learned (its loss is 0
    and costs nothing), weight w (N,) or None for 1, ref_hidden (N, D) the reference model's hidden state
    and kl_weight lambda (N,). ref_head (V, D) is the reference's head where it is another than head, as when
    the head is trained. Gradients reach hidden and, if it wants them, head; never the reference."""
    ref_head = head if ref_head is None else ref_head
    loss = torch.zeros(len(targets), device=hidden.device)
    weight = torch.ones_like(loss) if weight is None else weight.float()
    lam = torch.zeros_like(loss) if kl_weight is None else kl_weight.float()
    parts, where = [], (targets != -100).nonzero().flatten()
    for i in where.split(chunk):
        kl_here = ref_hidden is not None and bool((lam[i] != 0).any())
        parts.append(checkpoint(_chunk_loss, hidden[i], head, targets[i], weight[i],
                                ref_hidden[i] if kl_here else None, ref_head, lam[i], use_reentrant=False))
    return loss.index_put((where,), torch.cat(parts)) if parts else loss + 0 * hidden.sum()
