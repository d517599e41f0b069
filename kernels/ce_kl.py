"""
Linear head + cross-entropy + forward KL to a reference, per token weighted, never holding the logits:

    L_i = w_i * (-log p_i(y_i)) + lambda_i * KL(p_ref,i || p_i),        p = softmax(z), z = h W^T  (V logits)

    python kernels/ce_kl.py          # checks itself against fp64 and times itself against what is installed

With S = sum_j exp(z_j - c) for any shift c near the largest logit, and g(h) = softmax(h W^T) W,

    -log p(y) = log S - (z_y - c)                                       dL/dh = g(h) - W_y
    KL        = sum_j p_ref,j (x_ref,j - x_j) + log S - log S_ref       dL/dh = g(h) - g(h_ref),      x = z - c

so one GEMM makes the logits, tile by tile, and its epilogue leaves e = exp(z - c) in bf16 and fp32 row sums; a
second GEMM makes e W. That is 4VD FLOP per token, everything a frozen head needs, and no logit or
log-softmax is ever stored. What makes it safe and exact:

* The shift c is the target's own logit: no pass for the maximum. Each tile leaves its maximum; the rare row whose
  largest logit lies MARGIN from its shift is done again with that logit as c.
* bf16 has the range of fp32, so e may be large. e W is divided by the sum of the *rounded* e: what remains of the
  rounding sums to zero over the vocabulary and has no component along the mean of W.
* KL rows. Near the reference g(h) - g(h_ref) is a small difference of large vectors. The epilogue has both logits
  at hand, each less its own shift, so it writes d = e - alpha e_ref and e_ref, alpha = 1 for rows near the
  reference, else 0. With D = d W, E = e_ref W, R the sums of the rounded values and R_s = R_d + alpha R_ref,
      g(h) = (D + alpha E) / R_s                    g(h) - g(h_ref) = (D - (R_d / R_ref) E) / R_s
  so rounding is relative to the difference of the distributions (a shift of all logits, which KL does not see, is
  gone), and a student equal to its reference has d = 0: loss and gradient are exactly zero whatever the GEMMs do.
  alpha is guessed from the target's two logits; a row for which S_ref / S and the KL say otherwise is done again.
* Per-token gradients are kept in the forward pass and scaled by the incoming gradient in the backward pass. A
  trained head recomputes the logits there, with log S known, for dW = dz^T h, accumulated in fp32.
* No atomics, int64 offsets, no clamping: nan and inf reach the loss and the gradient of their row.

Prior art, for the ideas: mgmalek/efficient_cross_entropy (gradient in the forward pass), apple/ml-cross-entropy (log
sum in the epilogue), Liger-Kernel (chunks), jonathanc.net/blog/kl-cache-trick (g carries the teacher of the KL).
"""
import argparse
import atexit
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                                  # read when the kernel is decorated

try:
    import triton
    import triton.language as tl
except ImportError:                                                       # CPU builds of torch come without
    triton = None

torch.zeros(1).exp()    # MKL chooses its accuracy in the first call, and two threads in it at once may get less: 12 bits seen

IGNORE = -100           # targets with this value have no loss
INTERPRET = False       # send CPU tensors through the kernel (needs TRITON_INTERPRET=1): tests and the bench below
GPU_BUFFER = 720e6      # bytes in flight and of the kept gradient: 2048 rows at a time for 32k tokens, V = 151936, D = 1024
CPU_ROWS = 256          # rows of logits in flight on the CPU: enough for the GEMM, 156 MB at V = 151936
MARGIN = 44.0           # nats, about 2^64: e W and its sums stay far below the largest bf16, 2^127
FAR = 3.0               # largest S_ref / S for alpha = 1: the rounding of e grows with it
NEAR = 0.1              # nats of KL below which alpha = 0 costs accuracy


# ---------------------------------------------------------------------------------------------------------------
# The plain definition, and the CPU path. Everything in fp32, one chunk of logits at a time.

def _plain_dlogits(head, head_r, h, y, w, r, lam):
    """head, head_r (V, D), h, r (C, D), y, w, lam (C,) -> loss (C,) and its gradient to the logits (C, V)."""
    y = y[:, None]
    x = h @ head.T                                                        # (C, V); from here in place
    x -= x.amax(1, keepdim=True)
    x_y = x.gather(1, y)[:, 0]
    if r is None:
        dz = x.exp_()
        total = dz.sum(1)
        loss = w * (total.log() - x_y)
        dz *= (w / total)[:, None]
    else:
        x_r = r @ head_r.T
        x_r -= x_r.amax(1, keepdim=True)
        e_r = x_r.exp()
        x_r -= x
        dz = x.exp_()
        total, total_r = dz.sum(1), e_r.sum(1)
        kl = x_r.mul_(e_r).sum(1) / total_r + (total / total_r).log()
        loss = w * (total.log() - x_y) + lam * kl
        dz *= ((w + lam) / total)[:, None]
        dz -= e_r.mul_((lam / total_r)[:, None])
    return loss, dz.scatter_add_(1, y, -w[:, None])


# ---------------------------------------------------------------------------------------------------------------
# The kernel: one tile of logits of the student, and of the reference beside it, and what is to be left of them.

if triton is not None:
    @triton.jit(do_not_specialize=["C"])                     # it varies from pass to pass, and only masks
    def _head_kernel(h_ptr, r_ptr, head_ptr, head_r_ptr, y_ptr, shift_ptr, coef_ptr, out_ptr, stat_ptr, zy_ptr, C, V,
                     head_stride, head_r_stride, out_stride, D: tl.constexpr, REF: tl.constexpr, TWO: tl.constexpr,
                     MODE: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
        """h, r (C, D), head, head_r (V, D; TWO: they differ), y (C,) int32, shift (3, C) = c, c_ref, alpha,
        coef (2, C) = w, lambda -> stat (3 or 7, tiles, C) = S, R, max x, S_ref, R_ref, max x_ref, T and z_y (C,);
        with MODE "grad" also d, or d and e_ref below it, in out (C or 2C, V).
        MODE "dlogits": shift (4, C) = c, c_ref, log S, log S_ref -> out (C, V) = dL/dz."""
        row_blocks = tl.cdiv(C, BC)                         # neighbours share a tile of the head: read once, then L2
        tile = tl.program_id(0) // row_blocks
        rows = (tl.program_id(0) % row_blocks) * BC + tl.arange(0, BC)
        cols = tile * BV + tl.arange(0, BV)
        ks = tl.arange(0, BD)
        row = tl.minimum(rows, C - 1).to(tl.int64)          # beyond the edge: reads the last row, writes nothing
        col = tl.minimum(cols, V - 1).to(tl.int64)
        h_ptrs = h_ptr + row[:, None] * D + ks[None, :]
        r_ptrs = r_ptr + row[:, None] * D + ks[None, :]
        head_ptrs = head_ptr + col[:, None] * head_stride + ks[None, :]
        head_r_ptrs = head_r_ptr + col[:, None] * head_r_stride + ks[None, :]
        z = tl.zeros((BC, BV), tl.float32)
        z_r = tl.zeros((BC, BV), tl.float32)
        for k in range(0, D, BD):
            inside = (ks[None, :] < D - k) | (D % BD == 0)  # all true where BD divides D: the compiler drops the mask
            b = tl.trans(tl.load(head_ptrs, mask=inside, other=0.0))
            z = tl.dot(tl.load(h_ptrs, mask=inside, other=0.0), b, z, input_precision="ieee")
            if REF:
                if TWO:
                    b = tl.trans(tl.load(head_r_ptrs, mask=inside, other=0.0))
                z_r = tl.dot(tl.load(r_ptrs, mask=inside, other=0.0), b, z_r, input_precision="ieee")
            h_ptrs += BD
            r_ptrs += BD
            head_ptrs += BD
            head_r_ptrs += BD
        if (tile + 1) * BV > V:                             # only the last tile; finite, so that 0 * x stays 0
            z = tl.where(cols[None, :] < V, z, -1e30)
            z_r = tl.where(cols[None, :] < V, z_r, -1e30)

        y = tl.load(y_ptr + row)
        shift = tl.load(shift_ptr + row)
        shift_r = tl.load(shift_ptr + C + row)
        out_ptrs = out_ptr + row[:, None] * out_stride + cols[None, :]
        valid = (rows[:, None] < C) & (cols[None, :] < V)
        if MODE == "dlogits":
            p = tl.exp(z - shift[:, None] - tl.load(shift_ptr + 2 * C + row)[:, None])
            dz = tl.load(coef_ptr + row)[:, None] * (p - tl.where(cols[None, :] == y[:, None], 1.0, 0.0))
            if REF:
                p_r = tl.exp(z_r - shift_r[:, None] - tl.load(shift_ptr + 3 * C + row)[:, None])
                dz += tl.load(coef_ptr + C + row)[:, None] * (p - p_r)
            tl.store(out_ptrs, dz.to(out_ptr.dtype.element_ty), mask=valid)
        else:
            here = (y >= tile * BV) & (y < (tile + 1) * BV)
            if tl.max(here.to(tl.int32), 0) > 0:            # few tiles hold a target
                z_y = tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), 1)
                tl.store(zy_ptr + rows, z_y, mask=here & (rows < C))
            stat_ptrs = stat_ptr + tile.to(tl.int64) * C + rows
            stat_stride = tl.num_programs(0).to(tl.int64) // row_blocks * C
            x = z - shift[:, None]
            tl.store(stat_ptrs + 2 * stat_stride, tl.max(x, 1), mask=rows < C)
            e = tl.exp(x)
            tl.store(stat_ptrs, tl.sum(e, 1), mask=rows < C)
            if REF:
                x_r = z_r - shift_r[:, None]
                tl.store(stat_ptrs + 5 * stat_stride, tl.max(x_r, 1), mask=rows < C)
                e_r = tl.exp(x_r)
                tl.store(stat_ptrs + 3 * stat_stride, tl.sum(e_r, 1), mask=rows < C)
                tl.store(stat_ptrs + 6 * stat_stride, tl.sum(e_r * (x_r - x), 1), mask=rows < C)
                e -= tl.load(shift_ptr + 2 * C + row)[:, None] * e_r
            if MODE == "grad":
                q = e.to(out_ptr.dtype.element_ty)
                tl.store(out_ptrs, q, mask=valid)
                tl.store(stat_ptrs + stat_stride, tl.sum(q.to(tl.float32), 1), mask=rows < C)
                if REF:
                    q = e_r.to(out_ptr.dtype.element_ty)
                    tl.store(out_ptr + (row + C)[:, None] * out_stride + cols[None, :], q, mask=valid)
                    tl.store(stat_ptrs + 4 * stat_stride, tl.sum(q.to(tl.float32), 1), mask=rows < C)


def _launch(mode, h, head, y, r, head_r, shift, coef=None):
    """mode "loss", "grad" or "dlogits" -> out (C or 2C, V) in h's dtype or None, stat, z_y; see the kernel."""
    (C, D), V, ref, two = h.shape, len(head), r is not None, head_r is not head
    if h.dtype == torch.float32:                                          # CUDA cores, not TF32
        BC, BV, BD, warps, stages = 64, 64, 32, 4, 3
    elif not h.is_cuda or torch.cuda.get_device_properties(h.device).shared_memory_per_block_optin > 2**17:
        BC, BV, BD, warps, stages = 128, 128 if ref else 256, 64, 8, 3    # A100, H100: 147 kB of operands in flight
        if ref and two and h.is_cuda and torch.cuda.get_device_capability(h.device)[0] < 9:
            BC = 64                                                       # A100: two accumulators of 128 rows spill
    else:
        BC, BV, BD, warps, stages = 64 if ref else 128, 128, 32, 8, 4     # consumer cards have 99 kB
    out = None
    if mode != "loss":                                                      # rows aligned for the second GEMM
        out = h.new_empty((2 if ref and mode == "grad" else 1) * C, -(-V // 64) * 64)[:, :V]
    tiles = triton.cdiv(V, BV)
    stat = torch.empty(7 if ref else 3, tiles, C, device=h.device)
    z_y = torch.full((C,), float("nan"), device=h.device)                 # stays for a target that is no column
    if not h.is_cuda:              # the interpreter multiplies bf16 as the integers of their bits; fp32 is the same
        h, head, head_r, r = h.float(), head.float(), head_r.float(), r.float() if ref else None
    with torch.cuda.device_of(h):                                         # Triton launches on the current device
        _head_kernel[(triton.cdiv(C, BC) * tiles,)](
            h, r if ref else h, head, head_r, y.int(), shift, shift if coef is None else coef, z_y if out is None else out,
            stat, z_y, C, V, head.stride(0), head_r.stride(0), 0 if out is None else out.stride(0), D=D, REF=ref,
            TWO=two, MODE=mode, BC=BC, BV=BV, BD=BD, num_warps=warps, num_stages=stages)
    return out, stat, z_y


def mm(a, b):
    """a @ b, accumulated and returned in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _kernel_chunk(head, head_r, h, y, w, r, lam, want_grad, shift):
    """shift (3, C), or None to guess it -> loss (C,), gradient to h (C, D) fp32 or None, c, c_ref, log S, log S_ref (4, C),
    and which rows to do again (C,) with what shift (3, C); see the kernel."""
    head_y = head[y]                                                      # (C, D)
    if shift is None:                            # in fp32: products rounded to bf16 would put a shift between c and c_ref
        c = (h.float() * head_y).sum(1)
        c_r = c if r is None else (r.float() * head_r[y]).sum(1)
        shift = torch.stack((c, c_r, ((c - c_r).abs() <= 4).float()))
    c, c_r, alpha = shift
    out, stat, z_y = _launch("grad" if want_grad else "loss", h, head, y, r, head_r, shift)
    sums = stat.sum(1)
    S, top = sums[0], stat[2].amax(0)
    S_r, top_r, kl = S, top, torch.zeros_like(S)
    if r is not None:
        S_r, top_r = sums[3], stat[5].amax(0)
        kl = sums[6] / S_r + (S / S_r).log()
    loss = w * (S.log() - (z_y - c)) + lam * kl
    wrong = torch.where(alpha > 0, S_r > FAR * S, (S_r < FAR * S) & (kl < NEAR))
    again = want_grad & wrong
    for t in (top, top_r):
        again = again | t.isfinite() & (t.abs() > MARGIN)
    grad = None
    if want_grad:
        R, grad = sums[1], mm(out, head)                                 # D, and E below it
        if r is None:
            grad *= (w / R)[:, None]
        else:
            R_r, (grad, E) = sums[4], grad.split(len(h))
            R_s = R + alpha * R_r
            grad *= ((w + lam) / R_s)[:, None]
            grad.addcmul_(E, ((w * alpha - lam * R / R_r) / R_s)[:, None])
        grad.addcmul_(head_y, w[:, None], value=-1)
    norm, shift = torch.stack((c, c_r, S.log(), S_r.log())), torch.stack((c + top, c_r + top_r, (alpha - wrong.float()).abs()))
    return loss, grad, norm, again, shift


# ---------------------------------------------------------------------------------------------------------------
# Autograd, and the entry point. Rows without any weight are dropped before the first GEMM; the others come in two
# groups, CE alone and with KL, so that a reference is read only where it counts.

def _groups(targets, w, ref, lam):
    """-> (numbers of its rows, their reference or None) of each group that has rows."""
    kept = (targets != IGNORE) & ((w != 0) | (lam != 0))
    groups = ((kept & (lam == 0)).nonzero()[:, 0], None), ((kept & (lam != 0)).nonzero()[:, 0], ref)
    return [(rows, r) for rows, r in groups if len(rows)]


def _chunks(rows, size, dtype, hidden, targets, w, r, lam):
    """`size` rows at a time -> their numbers, and what is known of them: h, y, w, r, lambda."""
    for i in rows.split(size):
        r_i = None if r is None else r[i].to(dtype).contiguous()
        yield i, hidden[i].to(dtype).contiguous(), targets[i].long(), w[i], r_i, lam[i]


def _heads(dtype, head, ref_head):
    """-> both in dtype; one tensor where the reference has none of its own."""
    head = head.to(dtype)
    return head, head if ref_head is None else ref_head.to(dtype)


def _plain(hidden, head, targets, w, ref, ref_head, lam, want_hidden, want_head):
    """-> loss (N,) and its gradients to hidden (N, D), in hidden's dtype, and head (V, D) fp32, where wanted."""
    head, head_r = _heads(torch.float32, head, ref_head)
    loss = hidden.new_zeros(len(hidden), dtype=torch.float32)
    d_hidden = torch.zeros_like(hidden) if want_hidden else None
    d_head = torch.zeros_like(head) if want_head else None
    for rows, r in _groups(targets, w, ref, lam):
        for i, h, *rest in _chunks(rows, CPU_ROWS, head.dtype, hidden, targets, w, r, lam):
            loss[i], dz = _plain_dlogits(head, head_r, h, *rest)
            if want_hidden:
                d_hidden[i] = (dz @ head).to(hidden.dtype)
            if want_head:
                d_head.addmm_(dz.T, h)
    return loss, d_hidden, d_head


def _kernel_rows(hidden, head, r):
    """How many at a time: each has V numbers of e, and h, W_y and its part of e W, together twice with a reference."""
    free = max(GPU_BUFFER - hidden.numel() * hidden.element_size(), GPU_BUFFER / 2)
    row = (len(head) + 4 * head.shape[1]) * head.element_size() * (1 if r is None else 2)
    return max(128, int(free / row) // 128 * 128)


def _kernel(hidden, head, targets, w, ref, ref_head, lam, want_hidden):
    """-> loss (N,), its gradient to hidden (N, D) in hidden's dtype if wanted, norm (4, N) of _kernel_chunk."""
    head, head_r = _heads(torch.promote_types(hidden.dtype, head.dtype), head, ref_head)
    loss, norm, shift = (hidden.new_zeros(*k, len(hidden), dtype=torch.float32) for k in ((), (4,), (3,)))
    d_hidden, again = torch.zeros_like(hidden) if want_hidden else None, torch.zeros_like(loss, dtype=torch.bool)
    for rows, r in _groups(targets, w, ref, lam):
        for known in (False, True, True):                                  # the guess, its shift put right, then its alpha
            for i, *part in _chunks(rows, _kernel_rows(hidden, head, r), head.dtype, hidden, targets, w, r, lam):
                given = shift[:, i].contiguous() if known else None
                loss[i], grad, norm[:, i], again[i], shift[:, i] = _kernel_chunk(head, head_r, *part, want_hidden, given)
                if want_hidden:
                    d_hidden[i] = grad.to(hidden.dtype)
            rows = rows[again[rows]]                                       # waits for the GPU, once
            if not len(rows):
                break
    return loss, d_hidden, norm


def _kernel_d_head(hidden, head, targets, w, ref, ref_head, lam, norm):
    """-> gradient to head (V, D) fp32."""
    head, head_r = _heads(torch.promote_types(hidden.dtype, head.dtype), head, ref_head)
    d_head = torch.zeros_like(head, dtype=torch.float32)
    for rows, r in _groups(targets, w, ref, lam):
        for i, h, y, w_i, r_i, lam_i in _chunks(rows, _kernel_rows(hidden, head, r), head.dtype, hidden, targets, w, r, lam):
            dz = _launch("dlogits", h, head, y, r_i, head_r, norm[:, i].contiguous(), torch.stack((w_i, lam_i)))[0]
            if dz.is_cuda and dz.dtype != torch.float32:
                torch.addmm(d_head, dz.T, h, out_dtype=torch.float32, out=d_head)
            else:
                d_head.addmm_(dz.T.float(), h.float())
    return d_head


class _CeKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, w, ref, ref_head, lam):
        want_hidden, want_head = ctx.needs_input_grad[:2]
        ctx.fused = triton is not None and (hidden.is_cuda or INTERPRET)
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.fused:
                loss, d_hidden, extra = _kernel(hidden, head, targets, w, ref, ref_head, lam, want_hidden)           # norm
            else:
                loss, d_hidden, extra = _plain(hidden, head, targets, w, ref, ref_head, lam, want_hidden, want_head)  # d_head
        ctx.save_for_backward(d_hidden, *((extra, hidden, head, targets, w, ref, ref_head, lam) if want_head else ()))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        d_hidden, *saved = ctx.saved_tensors
        d_head = None
        if d_hidden is not None:
            d_hidden = torch.mul(d_hidden, upstream[:, None], out=torch.empty_like(d_hidden))     # in fp32, rounded
        if saved:
            extra, hidden, head, targets, w, ref, ref_head, lam = saved
            scaled = hidden, head, targets, w * upstream, ref, ref_head, lam * upstream
            with torch.autocast(upstream.device.type, enabled=False):
                if ctx.fused:
                    d_head = _kernel_d_head(*scaled, extra)
                elif (upstream == upstream[:1]).all():                     # the usual mean or sum: no need to repeat
                    d_head = extra * upstream[:1].sum()
                else:
                    d_head = _plain(*scaled, False, True)[2]
            d_head = d_head.to(head.dtype)
        return d_hidden, d_head, None, None, None, None, None


def ce_kl_loss(hidden, head, targets, weight=None, ref_hidden=None, kl_weight=None, ref_head=None):
    """Loss of each token, (N,) fp32; the caller normalises.

    hidden      (N, D) bf16 or fp32, the student's last hidden state
    head        (V, D) bf16 or fp32, of the student and, as a constant, of the reference
    targets     (N,) int; -100 has no loss, no gradient and no cost, like a row whose weights are both 0
    weight      (N,) w, any sign, or None for 1
    ref_hidden  (N, D) the reference's hidden state, read where kl_weight is not 0; from a cache, bf16 will do
    kl_weight   (N,) lambda, any sign, or None for 0
    ref_head    (V, D) the reference's own head, where the student's is trained; None: they share head

    Differentiated: hidden, and head (through the student's logits only) if it requires gradient. Constants:
    targets, weight, ref_hidden, kl_weight, ref_head and the reference's use of head. Computed in the wider dtype of hidden and
    head, in bf16 with fp32 sums if both are bf16; on a CPU always in fp32. A gradient has the dtype of its tensor;
    that of head is summed in fp32 within the call. Gradient of the gradient is not available.
    Raises ValueError where shapes or dtypes do not fit, or a kl_weight has no reference."""
    N, D = hidden.shape
    zeros = hidden.new_zeros(N, dtype=torch.float32)
    for name, t, shape in (("head", head, (len(head), D)), ("targets", targets, (N,)), ("weight", weight, (N,)),
                           ("ref_hidden", ref_hidden, (N, D)), ("kl_weight", kl_weight, (N,)),
                           ("ref_head", ref_head, head.shape)):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} is {tuple(t.shape)}, but hidden {tuple(hidden.shape)} asks for {shape}")
    for name, t in (("hidden", hidden), ("head", head)):
        if t.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"{name} is {t.dtype}; bfloat16 and float32 are supported")
    if targets.is_floating_point():
        raise ValueError(f"targets are {targets.dtype}; integers are needed")
    if (ref_hidden is None) != (kl_weight is None) and (kl_weight is None or (kl_weight != 0).any()):
        raise ValueError("ref_hidden and kl_weight need each other")
    if not torch.is_grad_enabled():                                        # an evaluation: no gradient is prepared
        hidden, head = hidden.detach(), head.detach()
    head = head if head.stride(1) == 1 else head.contiguous()
    if ref_head is not None:
        ref_head = ref_head.detach() if ref_head.stride(1) == 1 else ref_head.detach().contiguous()
    return _CeKl.apply(hidden, head, targets, zeros + 1 if weight is None else weight.detach().float(),
                       None if ref_hidden is None else ref_hidden.detach(), ref_head,
                       zeros if kl_weight is None else kl_weight.detach().float())


# ---------------------------------------------------------------------------------------------------------------
# Checks and bench.

PEERS = 120             # seconds, after which the bench on a GPU leaves out what is not ours


def _eager(h, head, y, w, r=None, lam=None):
    """The textbook, in the dtype of its inputs: bf16 logits if they are bf16, fp64 truth if they are fp64. w None: no CE."""
    def logits(t):
        z = F.linear(t, head)
        return z if z.dtype == torch.float64 else z.float()
    z = logits(h)
    loss = 0 if w is None else w * F.cross_entropy(z, y, reduction="none")
    if r is not None:
        with torch.no_grad():
            log_r = logits(r).log_softmax(-1)
        loss = loss + lam * (log_r.exp() * (log_r - z.log_softmax(-1))).sum(-1)
    return loss


def _data(N, V, D, dtype, device, apart):
    """Rows that are mostly sure of their target -> hidden, head, targets, reference hidden, KL about apart^2 nats."""
    gen = torch.Generator(device).manual_seed(0)
    head = (torch.randn(V, D, generator=gen, device=device) / D**0.5).to(dtype)
    y = torch.randint(0, V, (N,), generator=gen, device=device)
    noise = torch.randn(2, N, D, generator=gen, device=device)
    h = ((math.log(V) + 6) * head[y].float() + 2.5 * noise[0]).to(dtype)
    return h, head, y, (h.float() + 2.5 * apart * noise[1]).to(dtype)


def _gradient(loss, h, *args):
    """-> loss of each row and its gradient to h, fp64."""
    h = h.detach().requires_grad_()
    value = loss(h, *args)
    value.sum().backward()
    return value.detach().double(), h.grad.double()


def _errors(got, truth):
    return [_short((a - b).norm() / b.norm()) for a, b in zip(got, truth)]


def _short(x):
    return float(f"{x:.3g}")


def _show(row):
    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return row


def _through_kernel(*args):
    """ce_kl_loss by the kernel wherever it is, on a CPU by the interpreter."""
    global INTERPRET
    INTERPRET = True
    try:
        return ce_kl_loss(*args)
    finally:
        INTERPRET = False


def check(device, N, V, D):
    """One line of relative errors against fp64 for every loss -> rows, and whether each is within its bound."""
    rows, good = [], True
    methods = {"kernel": _through_kernel} if triton else {}
    methods |= {} if device == "cuda" else {"CPU path": ce_kl_loss}
    print(f"relative error against fp64 of loss and gradient to hidden, {N} rows, V={V}, D={D}")
    for dtype, apart in itertools.product((torch.float32, torch.bfloat16), (None, 0.01, 0.03, 0.1, 0.3)):
        h, head, y, r = _data(N, V, D, dtype, device, apart or 0)
        w = torch.full((N,), float(apart is None), device=device)
        args = (head, y, w) if apart is None else (head, y, w, r, 1 - w)
        wide = [a.double() if a.is_floating_point() else a for a in args]
        truth = _gradient(_eager, h.double(), *wide)
        row = {"dtype": str(dtype)[6:], "loss": "CE" if apart is None else f"KL {truth[0].mean():.0e}"}
        for name, loss in (methods | {"eager": _eager}).items():
            row[name] = _errors(_gradient(loss, h, *args), truth)
        bound = 2 if dtype == torch.float32 else 0.5
        good &= all(a <= bound * b for name in methods for a, b in zip(row[name], row["eager"]))
        if apart and dtype == torch.bfloat16:           # had g = softmax(h_ref W^T) W been cached instead of h_ref
            z = h.float() @ head.float().T
            e = (z - z.gather(1, y[:, None])).exp().bfloat16()
            g = mm(e, head) / e.float().sum(1, keepdim=True)
            g_r = ((r.double() @ wide[0].T).softmax(1) @ wide[0]).float()
            row |= {name: _errors([g - c], truth[1:]) for name, c in (("g fp32", g_r), ("g bf16", g_r.bfloat16()))}
        rows.append(_show(row))
    return rows, good


def _methods(kl):
    """name -> f(hidden, head, targets, reference hidden) -> mean CE or KL, of those that are installed."""
    def ours(h, head, y, r):
        one = h.new_ones(len(h), dtype=torch.float32)
        return (ce_kl_loss(h, head, y, 0 * one, r, one) if kl else ce_kl_loss(h, head, y)).mean()

    def eager(h, head, y, r):
        one = h.new_ones(len(h), dtype=torch.float32)
        return (_eager(h, head, y, None, r, one) if kl else _eager(h, head, y, one)).mean()

    def chunked(h, head, y, r):                 # TRL's default: fp32 copies of 256 rows and of the head, checkpointed
        parts = zip(h.split(256), y.split(256), r.split(256))
        return sum(checkpoint(lambda a, b, c: eager(a.float(), head.float(), b, c.float()) * len(a), *part,
                              use_reentrant=False) for part in parts) / len(h)

    found = {"ours": ours, "eager": eager}
    if not kl and hasattr(F, "linear_cross_entropy"):
        found["torch chunked"] = lambda h, head, y, r: F.linear_cross_entropy(
            h, head, y, options=torch.nn.LinearCrossEntropyOptions())
    if not torch.cuda.is_available():
        return found
    found |= {"torch.compile": torch.compile(eager, dynamic=False), "fp32 chunks, as TRL": chunked}
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD
        found["Liger"] = ((lambda h, head, y, r: LigerFusedLinearJSD(jsd_beta=0.0)(h, head, r, head, y)) if kl else
                          (lambda h, head, y, r: LigerFusedLinearCrossEntropyLoss()(head, h, y)))
    if not kl and find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy
        found["cut-cross-entropy"] = lambda h, head, y, r: linear_cross_entropy(h, head, y)
    return found


def _clock(f):
    """-> f(), seconds, peak MB above what is held: the median of up to 5 calls; on a CPU, CPU time of one call."""
    if not torch.cuda.is_available():
        def peak():
            return next(int(s.split()[1]) for s in Path("/proc/self/status").open() if s.startswith("VmHWM")) / 1e3
        Path("/proc/self/clear_refs").write_text("5")                                    # resets VmHWM
        before, start = peak(), time.process_time()
        return f(), time.process_time() - start, peak() - before
    f()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    while len(times) < 5 and sum(times) < 1:
        result = None                                                      # the last one's memory
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return result, statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 1e6


@functools.cache
def _gemm_rate(dtype, device):
    """FLOP per second of a large product: what the floor is made of."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(_clock(lambda: a @ a)[1] for _ in range(3))


def measure(loss, trained, name, N, V, D):
    """One method on one loss -> its row: time, share of the floor, extra memory, error of 64 rows' gradient against fp64."""
    cuda, kl, few = torch.cuda.is_available(), loss == "KL", 64
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    h, head, y, r = _data(N, V, D, dtype, device, 0.03)
    head.requires_grad_(trained)
    method, row = _methods(kl)[name], {"D": D, "loss": loss, "head": "trained" if trained else "frozen", "method": name}
    floor = N * V * D * (4 + 2 * kl + 2 * trained) / _gemm_rate(dtype, device)         # KL: logits twice, gradient once
    try:
        torch._dynamo.reset()                            # a compiled graph for this shape, not for any
        wanted = [h.requires_grad_(), head] if trained else [h.requires_grad_()]
        grads, seconds, extra = _clock(lambda: torch.autograd.grad(method(h, head, y, r), wanted))
        row |= {"ms": _short(seconds * 1e3), "share of floor": _short(floor / seconds), "extra MB": _short(extra)}
        one, wide = torch.ones(few, device=device).double(), [t.detach().double() for t in (h[:few], head)] + [y[:few]]
        truth = _gradient(_eager, *wide, *((None, r[:few].double(), one) if kl else (one,)))[1]
        row["gradient error"] = _errors([N * grads[0][:few].double()], [truth])[0]
    except Exception as error:                  # a peer that does not fit or does not run is a result too
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        if name == "ours":
            raise
    return row


def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Check and time the fused loss against what is installed.")
    parser.add_argument("--n", type=int, default=32768 if cuda else 4096, help="tokens")
    parser.add_argument("--v", type=int, default=151936 if cuda else 32768, help="vocabulary")
    parser.add_argument("--d", type=int, nargs="+", default=[1024, 2560] if cuda else [512], help="hidden sizes")
    args = parser.parse_args()
    start, device = time.time(), torch.cuda.get_device_name() if cuda else "cpu"
    if not cuda:
        print("no GPU here:", "the kernel runs in Triton's interpreter," if triton else "no Triton either,",
              "only the CPU path is timed")
    errors, good = check("cuda", 64, 20011, 1000) if cuda else check("cpu", 48, 3001, 200)
    print(f"forward and backward on {device}, N={args.n} V={args.v}, {'bf16' if cuda else 'fp32, CPU time'}")
    bench = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    atexit.register(lambda: print(json.dumps({              # also after a time limit, or a peer that broke the GPU's context
        "device": device, "torch": torch.__version__, "triton": triton and triton.__version__, "good": good, "errors": errors,
        "bench": bench, "seconds": round(time.time() - start, 1)})))
    for d, (loss, trained) in itertools.product(args.d, (("CE", False), ("KL", False), ("CE", True))):
        for name in _methods(loss == "KL"):
            job = loss, trained, name, args.n, args.v, d
            if cuda and name != "ours" and time.time() - start > PEERS:
                row = dict(zip(("D", "loss", "method"), (d, loss, name)), failed="left out, for lack of time")
            elif cuda:
                row = measure(*job)
                torch.cuda.empty_cache()
            else:                                                          # a process each, for an honest peak
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = pool.apply(measure, job)
            bench.append(_show(row))
    print("every error is within its bound" if good else "AN ERROR IS OUT OF ITS BOUND")
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
