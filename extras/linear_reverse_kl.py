"""Linear head and reverse KL to a teacher in one operation that holds few rows of logits.

    L_i = KL(p_i || q_i) = sum_j p_ij (log p_ij - log q_ij)     p = softmax(h W^T)
                                                                q = softmax(r W_r^T)

    loss = linear_reverse_kl(hidden, head, ref_hidden, ref_head)                # (N,) nats

The teacher is a constant, so with z = h W^T

    dL/dz_j = p_j (log p_j - log q_j - L)                        dL/dh = dz W

needs only the two rows of logits that the loss needs too. The forward pass makes the gradient to h
in batches, the backward pass scales it. All about logits is fp32. A student equal to the teacher
has a loss and a gradient of exactly zero.
"""
import torch
from torch.autograd.function import once_differentiable

import thinksafe  # noqa: F401     it puts kernels/ on the path

from linear_ce_kl import mm

ROWS = 256              # rows of logits at a time: four buffers of 156 MB at V = 151936

class _LinearReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, ref_hidden, ref_head):
        if not hidden.is_cuda:                  # mm multiplies in fp32: convert once, not per batch
            head, ref_head = head.float(), ref_head.float()
        loss = hidden.new_empty(len(hidden), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden)
        for i in range(0, len(hidden), ROWS):
            rows = slice(i, i + ROWS)
            log_p = mm(hidden[rows], head.T).log_softmax(1)                     # (n, V)
            log_q = mm(ref_hidden[rows], ref_head.T).log_softmax(1)
            p, log_ratio = log_p.exp(), log_p.sub_(log_q)
            loss[rows] = (p * log_ratio).sum(1)
            if ctx.needs_input_grad[0]:
                dlogits = p.mul_(log_ratio.sub_(loss[rows, None]))
                d_hidden[rows] = mm(dlogits.to(head.dtype), head)
        ctx.save_for_backward(d_hidden)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        d_hidden, = ctx.saved_tensors
        return (d_hidden * upstream[:, None]).to(d_hidden.dtype), None, None, None

def linear_reverse_kl(hidden, head, ref_hidden, ref_head):
    """KL(student || teacher) of each token in nats: (N,) fp32, not normalized.

    Args:
        hidden, head: (N, D) last hidden states and (V, D) head of the student, bf16 or fp32.
        ref_hidden, ref_head: (N, D_r) and (V_r, D_r) of the teacher.

    Differentiates with respect to hidden, once. Rows of a head beyond the other's are padding and
    left out. Raises ValueError if shapes or dtypes do not fit or head requires a gradient."""
    for a, b in ((hidden, head), (ref_hidden, ref_head)):
        if a.dtype != b.dtype or a.shape[1] != b.shape[1]:
            raise ValueError(f"hidden {tuple(a.shape)} of {a.dtype} does not fit "
                             f"head {tuple(b.shape)} of {b.dtype}")
    if len(hidden) != len(ref_hidden):
        raise ValueError(
            f"{len(hidden)} hidden states of the student, {len(ref_hidden)} of the teacher")
    if head.requires_grad:
        raise ValueError("the reverse KL has no gradient to the head")
    V = min(len(head), len(ref_head))
    return _LinearReverseKL.apply(hidden, head[:V], ref_hidden.detach(), ref_head[:V].detach())
