"""
Linear head + reverse KL to a teacher, per token, never holding all logits:

    L_i = KL(p_i || q_i) = sum_j p_ij (log p_ij - log q_ij),      p = softmax(h W^T), q = softmax(r W_r^T)

The teacher is a constant, so with z = h W^T

    dL/dz_j = p_j (log p_j - log q_j - L)                          dL/dh = dz W

needs nothing but the two rows of logits that the loss needs too: the gradient to h is made in the forward pass, block by
block, and scaled by the incoming one in the backward pass. Everything about logits is in fp32. A student equal to its
teacher has a loss and a gradient of exactly zero. The forward KL is in ce_kl.py.
"""
import torch
from torch.autograd.function import once_differentiable

from kernels.ce_kl import mm

ROWS = 256              # rows of logits in flight: four blocks of 156 MB at V = 151936


def _plain(h, W, r, W_r):
    """h (C, D), W (V, D), r (C, D_r), W_r (V, D_r) -> loss (C,) and its gradient to the logits (C, V), fp32."""
    log_p = mm(h, W.T).log_softmax(1)
    p = log_p.exp()
    apart = log_p.sub_(mm(r, W_r.T).log_softmax(1))                     # log p - log q
    loss = (p * apart).sum(1)
    return loss, p.mul_(apart.sub_(loss[:, None]))


class _ReverseKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, ref_hidden, ref_head):
        if not hidden.is_cuda:                                           # once, not for every block
            head, ref_head = head.float(), ref_head.float()
        loss, d_hidden = hidden.new_empty(len(hidden), dtype=torch.float32), torch.empty_like(hidden)
        for i in range(0, len(hidden), ROWS):
            rows = slice(i, i + ROWS)
            loss[rows], dz = _plain(hidden[rows], head, ref_hidden[rows], ref_head)
            if ctx.needs_input_grad[0]:
                d_hidden[rows] = mm(dz.to(head.dtype), head)
        ctx.save_for_backward(d_hidden)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        return (ctx.saved_tensors[0] * upstream[:, None]).to(ctx.saved_tensors[0].dtype), None, None, None


def reverse_kl_loss(hidden, head, ref_hidden, ref_head):
    """KL(student || teacher) of each token in nats, (N,) fp32; the caller normalises.

    hidden      (N, D) bf16 or fp32, the student's last hidden state; all that is differentiated
    head        (V, D), of the same dtype
    ref_hidden  (N, D_r) the teacher's, ref_head (V_r, D_r) its head, both of one dtype

    Of two heads of different length the columns beyond the shorter one are padding and left out of both softmaxes.
    Raises ValueError where shapes or dtypes do not fit, or the head is to be trained too."""
    for a, b in ((hidden, head), (ref_hidden, ref_head)):
        if a.dtype != b.dtype or a.shape[1] != b.shape[1]:
            raise ValueError(f"hidden {tuple(a.shape)} of {a.dtype} does not fit head {tuple(b.shape)} of {b.dtype}")
    if len(hidden) != len(ref_hidden):
        raise ValueError(f"{len(hidden)} hidden states of the student, {len(ref_hidden)} of the teacher")
    if head.requires_grad:
        raise ValueError("the reverse KL has no gradient to the head")
    V = min(len(head), len(ref_head))
    return _ReverseKl.apply(hidden, head[:V], ref_hidden.detach(), ref_head[:V].detach())
