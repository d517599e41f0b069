"""Linear head, cross-entropy and forward KL to a reference in one operation that stores no logits.

    L_i = w_i * (-log p_i(y_i)) + lambda_i * KL(p_ref,i || p_i)        p = softmax(z), z = h W^T

    loss = linear_ce_kl(hidden, head, targets)                                  # (N,) cross-entropy
    loss = linear_ce_kl(hidden, head, targets, ce_weight, ref_hidden, kl_weight)

Let c be any shift near the largest logit, x = z - c, S = sum_j exp(x_j), g(h) = softmax(h W^T) W.

    -log p(y) = log S - x_y                                            dL/dh = g(h) - W_y
    KL        = sum_j p_ref,j (x_ref,j - x_j) + log S - log S_ref      dL/dh = g(h) - g(h_ref)

One GEMM makes the logits tile by tile. Its epilogue stores e = exp(x) in the dtype of h (bf16 or
fp32) and sums of each row in fp32. A second GEMM makes e W. That is 4VD FLOP per token, all that a
frozen head needs. No logit and no log-softmax is stored. Why this is safe and exact:

* The shift c is the target's own logit, so no pass is spent on the maximum. Each tile stores the
  largest x. A row whose largest x is beyond MARGIN is computed again with its largest logit as c.
* bf16 has the range of fp32, so e may be large. e W is divided by the sum of the *rounded* e: the
  rounding errors that remain sum to zero over the vocabulary.
* Near the reference g(h) - g(h_ref) is a small difference of large vectors. The epilogue has both
  logits, each less its own shift, so it stores d = e - alpha e_ref and e_ref. alpha is 1 for rows
  near the reference and 0 for the others. With D = d W, E = e_ref W, R the sums of the rounded
  values and R_s = R_d + alpha R_ref,
      g(h) = (D + alpha E) / R_s             g(h) - g(h_ref) = (D - (R_d / R_ref) E) / R_s
  The rounding error is now relative to the difference of the distributions. A shift of all logits,
  which the KL does not see, cancels. A student equal to the reference has d = 0: its loss and
  gradient are exactly zero. E / R_ref belongs to the reference alone: who keeps it beside h_ref, in
  bf16, spares 2VD and the stores of e_ref, 6VD are left. alpha is guessed from the target's two
  logits; a row for which S_ref / S and the KL say otherwise is computed again.
* The forward pass keeps the gradient to h of each token; the backward pass scales it. For a trained
  head it also makes dW = dz^T h of the same e, summed in fp32: dz is a multiple of d and e_ref.
* No atomics, no clamping, int64 offsets: nan and inf reach the loss and the gradient of their row.

Prior art: mgmalek/efficient_cross_entropy (gradient in the forward pass), Liger-Kernel (chunks),
apple/ml-cross-entropy (log sum in the epilogue), jonathanc.net/blog/kl-cache-trick.
"""
import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:         # CPU builds of torch come without it
    triton = None

torch.zeros(1).exp()    # MKL picks its accuracy in the first call; two threads at once got 12 bits

IGNORE = -100           # targets with this value have no loss
INTERPRET = False       # tests send CPU tensors through the kernel, see tests/tools/interpreter.py
GPU_BUFFER = 720e6      # bytes for e and the kept gradient: 2048 rows at V = 151936, D = 1024
PLAIN_ROWS = 256        # rows of logits at a time without the kernel: 156 MB at V = 151936
MARGIN = 44.0           # nats, about 2^64: e W and its sums stay far below bf16's largest, 2^127
FAR = 3.0               # largest S_ref / S with alpha = 1: the rounding error of e grows with it
NEAR = 0.1              # nats of KL below which alpha = 0 costs accuracy

def _plain_dlogits(head, ref_head, hidden, targets, ce_weight, ref_hidden, kl_weight):
    """The definition, in fp32: the loss (n,) of n tokens and the gradient to the logits (n, V), of
    head, ref_head (V, D), hidden, ref_hidden (n, D) or None, and the others (n,)."""
    x = mm(hidden, head.T)                                                      # (n, V)
    x -= x.amax(1, keepdim=True)
    dlogits, targets = x.exp(), targets[:, None]
    total = dlogits.sum(1)
    loss = ce_weight * (total.log() - x.gather(1, targets)[:, 0])
    dlogits *= ((ce_weight + kl_weight) / total)[:, None]
    if ref_hidden is not None:
        x_ref = mm(_split_reference(hidden, ref_hidden)[0], ref_head.T)
        x_ref -= x_ref.amax(1, keepdim=True)
        e_ref = x_ref.exp()
        total_ref = e_ref.sum(1)
        kl = x_ref.sub_(x).mul_(e_ref).sum(1) / total_ref + (total / total_ref).log()
        loss += kl_weight * kl
        dlogits -= e_ref.mul_((kl_weight / total_ref)[:, None])
    return loss, dlogits.scatter_add_(1, targets, -ce_weight[:, None])

if triton is not None:
    @triton.jit(do_not_specialize=["N"])        # N varies from call to call and only masks
    def _head_kernel(
        hidden_ptr, ref_hidden_ptr, head_ptr, ref_head_ptr, target_ptr, shift_ptr, out_ptr,
        stat_ptr, target_logit_ptr, N, V, head_stride, ref_head_stride, out_stride,
        D: tl.constexpr, REF: tl.constexpr, REF_HEAD: tl.constexpr, GRAD: tl.constexpr,
        REF_OUT: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    ):
        """One tile (BN, BV) of the logits of the student and, with REF, of the reference.

        hidden, ref_hidden (N, D); head, ref_head (V, D), REF_HEAD: they differ; target (N,) int32.
        From shift (3, N) = c, c_ref, alpha to the target's logit (N,) and stat (3 or 7, tiles, N):
        sums of e and of the rounded d, maxima of x; with REF also sums of e_ref and of the rounded
        e_ref, maxima of x_ref, sums of e_ref (x_ref - x). With GRAD also to out (N or 2N, V): d,
        and with REF_OUT e_ref below it."""
        row_blocks = tl.cdiv(N, BN)             # neighbours share a tile of the head in the cache
        tile = tl.program_id(0) // row_blocks
        rows = (tl.program_id(0) % row_blocks) * BN + tl.arange(0, BN)
        cols = tile * BV + tl.arange(0, BV)
        ks = tl.arange(0, BD)
        row = tl.minimum(rows, N - 1).to(tl.int64)      # past the edge: reads the last row ...
        col = tl.minimum(cols, V - 1).to(tl.int64)      # ... and writes nothing
        hidden_ptrs = hidden_ptr + row[:, None] * D + ks[None, :]
        ref_hidden_ptrs = ref_hidden_ptr + row[:, None] * D + ks[None, :]
        head_ptrs = head_ptr + col[:, None] * head_stride + ks[None, :]
        ref_head_ptrs = ref_head_ptr + col[:, None] * ref_head_stride + ks[None, :]
        z = tl.zeros((BN, BV), tl.float32)
        z_ref = tl.zeros((BN, BV), tl.float32)
        for k in range(0, D, BD):
            inside = (ks[None, :] < D - k) | (D % BD == 0)      # no mask where BD divides D
            h = tl.load(hidden_ptrs + k, mask=inside, other=0.0)
            w = tl.trans(tl.load(head_ptrs + k, mask=inside, other=0.0))
            z = tl.dot(h, w, z, input_precision="ieee")
            if REF:
                if REF_HEAD:
                    w = tl.trans(tl.load(ref_head_ptrs + k, mask=inside, other=0.0))
                h = tl.load(ref_hidden_ptrs + k, mask=inside, other=0.0)
                z_ref = tl.dot(h, w, z_ref, input_precision="ieee")
        if (tile + 1) * BV > V:                 # the last tile; finite, so that 0 * x stays 0
            z = tl.where(cols[None, :] < V, z, -1e30)
            z_ref = tl.where(cols[None, :] < V, z_ref, -1e30)

        target = tl.load(target_ptr + row)
        is_target = cols[None, :] == target[:, None]
        x = z - tl.load(shift_ptr + row)[:, None]
        x_ref = z_ref - tl.load(shift_ptr + N + row)[:, None]
        out_ptrs = out_ptr + row[:, None] * out_stride + cols[None, :]
        in_rows = rows < N
        in_out = in_rows[:, None] & (cols[None, :] < V)
        here = (target >= tile * BV) & (target < (tile + 1) * BV)
        if tl.max(here.to(tl.int32), 0) > 0:                    # few tiles hold a target
            target_logit = tl.sum(tl.where(is_target, z, 0.0), 1)
            tl.store(target_logit_ptr + rows, target_logit, mask=here & in_rows)
        slot = tl.num_programs(0).to(tl.int64) // row_blocks * N
        sum_ptrs = stat_ptr + tile.to(tl.int64) * N + rows
        rounded_sum_ptrs = sum_ptrs + slot
        max_ptrs = sum_ptrs + 2 * slot
        tl.store(max_ptrs, tl.max(x, 1), mask=in_rows)
        e = tl.exp(x)
        tl.store(sum_ptrs, tl.sum(e, 1), mask=in_rows)
        if REF:
            ref_sum_ptrs = sum_ptrs + 3 * slot
            ref_rounded_sum_ptrs = sum_ptrs + 4 * slot
            ref_max_ptrs = sum_ptrs + 5 * slot
            cross_sum_ptrs = sum_ptrs + 6 * slot
            tl.store(ref_max_ptrs, tl.max(x_ref, 1), mask=in_rows)
            e_ref = tl.exp(x_ref)
            tl.store(ref_sum_ptrs, tl.sum(e_ref, 1), mask=in_rows)
            tl.store(cross_sum_ptrs, tl.sum(e_ref * (x_ref - x), 1), mask=in_rows)
            e -= tl.load(shift_ptr + 2 * N + row)[:, None] * e_ref
        if GRAD:
            e = e.to(out_ptr.dtype.element_ty)
            tl.store(out_ptrs, e, mask=in_out)
            tl.store(rounded_sum_ptrs, tl.sum(e.to(tl.float32), 1), mask=in_rows)
            if REF_OUT:
                e_ref = e_ref.to(out_ptr.dtype.element_ty)
                ref_out_ptrs = out_ptr + (row + N)[:, None] * out_stride + cols[None, :]
                tl.store(ref_out_ptrs, e_ref, mask=in_out)
                tl.store(ref_rounded_sum_ptrs, tl.sum(e_ref.to(tl.float32), 1), mask=in_rows)

def _launch(want_grad, head, ref_head, hidden, targets, ref_hidden, shift, ref_out=True):
    """Run the kernel, see there, without a reference if ref_hidden is None -> out (meaningless
    without want_grad, without e_ref unless ref_out), stat, and the target's logit (N,), which is
    nan for a target that is no column."""
    N, V, device, ref = len(hidden), len(head), hidden.device, ref_hidden is not None
    ref_has_own_head = ref and ref_head.data_ptr() != head.data_ptr()
    if hidden.dtype == torch.float32:                           # on CUDA cores, not in TF32
        BN, BV, BD, num_warps, num_stages = 64, 64, 32, 4, 3
    elif hidden.is_cuda and torch.cuda.get_device_properties(
            device).shared_memory_per_block_optin <= 2**17:     # consumer cards have 99 kB
        BN, BV, BD, num_warps, num_stages = 64 if ref else 128, 128, 32, 8, 4
    else:       # A100, H100: 147 kB of operands; an A100 has no registers for 128 rows of two heads
        BN, BV = 64 if ref_has_own_head else 128, 128 if ref else 256
        BD, num_warps, num_stages = 64, 8, 3
    out = target_logit = torch.full((N,), float("nan"), device=device)
    if want_grad:                                               # rows aligned for the next GEMM
        out = hidden.new_empty(2 * N if ref and ref_out else N, -(-V // 64) * 64)[:, :V]
    tiles = triton.cdiv(V, BV)
    stat = torch.empty(7 if ref else 3, tiles, N, device=device)
    _head_kernel[(triton.cdiv(N, BN) * tiles,)](
        hidden, ref_hidden if ref else hidden, head, ref_head, targets.int(), shift, out, stat,
        target_logit, N, V, head.stride(0), ref_head.stride(0), out.stride(0), D=hidden.shape[1],
        REF=ref, REF_HEAD=ref_has_own_head, GRAD=want_grad, REF_OUT=ref and ref_out, BN=BN, BV=BV,
        BD=BD, num_warps=num_warps, num_stages=num_stages)
    return out, stat, target_logit

def mm(a, b):
    """The matrix product a @ b, summed and returned in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()

def _split_reference(hidden, ref_hidden):
    """[ref_hidden] or, if it has twice the width of hidden, [ref_hidden, E / R_ref]."""
    if ref_hidden is None:
        return [None]
    return [part.contiguous() for part in ref_hidden.split(hidden.shape[1], 1)]

def _kernel_batch(head, ref_head, batch, shift, last, want_grad, d_head):
    """By the kernel: a batch of n tokens, see _batches, with shift (3, n) or None to guess it ->
    the loss (n,), its gradient to hidden (n, D) in fp32 or None, and which tokens (n,) to compute
    again with which shift (3, n), none in the last attempt. The gradient to the head is added to
    d_head, if not None."""
    hidden, targets, ce_weight, ref_hidden, kl_weight = batch
    ref_hidden, *ref_mean = _split_reference(hidden, ref_hidden)
    ref_mean = ref_mean if d_head is None else []       # whose gradient needs e_ref
    head_target = head[targets]                         # (n, D)
    if shift is None:           # in fp32: rounded products would put a shift between c and c_ref
        c = (hidden.float() * head_target).sum(1)
        c_ref = c if ref_hidden is None else (ref_hidden.float() * ref_head[targets]).sum(1)
        shift = torch.stack((c, c_ref, ((c - c_ref).abs() <= 4).float()))
    c, c_ref, alpha = shift
    out, stat, target_logit = _launch(
        want_grad, head, ref_head, hidden, targets, ref_hidden, shift, not ref_mean)
    S, R, _, *ref_sums = stat.sum(1)                    # each (n,)
    S_ref, kl = S, torch.zeros_like(S)
    if ref_hidden is not None:
        S_ref, R_ref, _, cross = ref_sums
        kl = cross / S_ref + (S / S_ref).log()
    loss = ce_weight * (S.log() - (target_logit - c)) + kl_weight * kl
    largest = stat[2::3].amax(1)                        # (1 or 2, n), of x and of x_ref
    far_off = (largest.isfinite() & (largest.abs() > MARGIN)).any(0)
    wrong_alpha = torch.where(alpha > 0, S_ref > FAR * S, (S_ref < FAR * S) & (kl < NEAR))
    again = (far_off | want_grad & wrong_alpha) & (not last)
    grad = None
    if want_grad:
        weights = [(ce_weight / R)[:, None]]            # of d and e_ref in the gradient to z
        if ref_hidden is not None:
            R_ref = S_ref if ref_mean else R_ref
            R_s = R + alpha * R_ref
            weights = [((ce_weight + kl_weight) / R_s)[:, None],
                       ((ce_weight * alpha - kl_weight * R / R_ref) / R_s)[:, None]]
        grad, *E = mm(out, head).split(len(hidden))     # D, and E below it
        E = [R_ref[:, None] * ref_mean[0].float()] if ref_mean else E
        grad *= weights[0]
        if E:
            grad.addcmul_(*E, weights[1])
        grad.addcmul_(head_target, ce_weight[:, None], value=-1)
    if d_head is not None:              # dz^T h, but the target's part of dz, a difference, in fp32
        dz, *e_ref = out.split(len(hidden))
        at, h = (torch.arange(len(hidden), device=dz.device), targets), hidden
        if e_ref:
            of_target = (weights[0] * dz[at][:, None] + weights[1] * e_ref[0][at][:, None])[:, 0]
            dz.mul_(weights[0]).addcmul_(*e_ref, weights[1])
        else:
            of_target = weights[0][:, 0] * (R / S) * (target_logit - c).exp()
            h = (h * weights[0]).to(dz.dtype)
        dz[at] = 0
        dz[again] = 0                                   # computed again; waits for the GPU
        add_mm(d_head, dz.T, h.masked_fill(again[:, None], 0))
        of_target = (of_target - ce_weight).masked_fill(again, 0)
        d_head.index_put_((targets,), of_target[:, None] * hidden.float(), accumulate=True)
    alpha = (alpha - wrong_alpha.float()).abs()
    shift = torch.stack((c + largest[0], c_ref + largest[-1], alpha))
    return loss, grad, again, shift

def add_mm(total, a, b):
    """Add the matrix product a @ b to total, in fp32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())

# Autograd and the entry point. `inputs` are hidden (N, D), targets (N,), ce_weight (N,), ref_hidden
# (N, D) or None and kl_weight (N,). Both heads are (V, D), of one dtype.

def _batches(use_kernel, head, inputs, todo):
    """Split the tokens that have a loss and are in the mask todo (N,): first those without a KL.
    Yields their numbers (n,) and their part of the inputs in the dtype of head, ref_hidden None
    without a KL. So tokens without a loss reach no GEMM and a reference is read where it counts."""
    hidden, targets, ce_weight, ref_hidden, kl_weight = inputs
    todo = todo & (targets != IGNORE) & ((ce_weight != 0) | (kl_weight != 0))
    for with_kl, ref in ((False, None), (True, ref_hidden)):
        max_rows = PLAIN_ROWS
        if use_kernel:      # a token takes V numbers e, h, W_y and e W, all twice with a reference
            free = max(GPU_BUFFER - hidden.nbytes, GPU_BUFFER / 2)
            row_bytes = (len(head) + 4 * head.shape[1]) * head.element_size() * (1 + with_kl)
            max_rows = max(128, int(free / row_bytes) // 128 * 128)
        rows = (todo & ((kl_weight != 0) == with_kl)).nonzero()[:, 0]
        for i in rows.split(max_rows) if len(rows) else ():
            assert with_kl == (ref is not None), "a kl_weight needs ref_hidden"
            h, r = (t if t is None else t[i].to(head.dtype).contiguous() for t in (hidden, ref))
            yield i, (h, targets[i].long(), ce_weight[i], r, kl_weight[i])

def _plain_batch(head, ref_head, batch, shift, last, want_grad, d_head):
    """As _kernel_batch, without the kernel: nothing is shifted, and no token computed again."""
    loss, dlogits = _plain_dlogits(head, ref_head, *batch)
    if d_head is not None:
        d_head.addmm_(dlogits.T, batch[0])
    grad = None
    if want_grad and head.dtype == torch.float16:       # its smallest number is 6e-8
        grad = mm((dlogits * 1024).half(), head) / 1024
    elif want_grad:
        grad = dlogits @ head
    return loss, grad, False, 0.0

def _compute(use_kernel, head, ref_head, inputs, want_hidden, want_head):
    """The loss (N,) and, where wanted, the gradients to hidden and, in fp32, to head."""
    hidden = inputs[0]
    loss = hidden.new_zeros(len(hidden), dtype=torch.float32)
    shift = loss.repeat(3, 1)
    d_hidden = torch.zeros_like(hidden) if want_hidden else None
    d_head = torch.zeros_like(head, dtype=torch.float32) if want_head else None
    compute_batch, todo = _kernel_batch if use_kernel else _plain_batch, True
    for attempt in range(3):            # with a guess, then with c corrected, then with alpha
        again = torch.zeros_like(loss, dtype=torch.bool)
        for i, batch in _batches(use_kernel, head, inputs, todo):
            known_shift = shift[:, i].contiguous() if attempt else None
            loss[i], grad, again[i], shift[:, i] = compute_batch(
                head, ref_head, batch, known_shift, attempt == 2, want_hidden or want_head, d_head)
            if want_hidden:
                d_hidden[i] = grad.to(hidden.dtype)
        todo = again
        if not todo.any():              # waits for the GPU
            break
    return loss, d_hidden, d_head

class _LinearCEKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, use_kernel, head, ref_head, *inputs):
        _, want_head, _, want_hidden, *_ = ctx.needs_input_grad
        ctx.use_kernel = use_kernel
        with torch.autocast(head.device.type, enabled=False):
            loss, d_hidden, d_head = _compute(
                use_kernel, head, ref_head, inputs, want_hidden, want_head)
        saved = (d_head, head, ref_head, *inputs) if want_head else ()
        ctx.save_for_backward(d_hidden, *saved)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        d_hidden, *saved = ctx.saved_tensors
        d_head = None
        if d_hidden is not None:                        # out=: multiplied in fp32, then rounded
            d_hidden = torch.mul(d_hidden, upstream[:, None], out=torch.empty_like(d_hidden))
        if saved:
            d_head, head, ref_head, hidden, targets, ce_weight, ref_hidden, kl_weight = saved
            if (upstream == upstream[:1]).all():        # a mean or a sum: no need to repeat
                d_head = d_head * upstream[:1].sum()
            else:
                inputs = hidden, targets, ce_weight * upstream, ref_hidden, kl_weight * upstream
                with torch.autocast(upstream.device.type, enabled=False):
                    d_head = _compute(ctx.use_kernel, head, ref_head, inputs, False, True)[2]
        return None, d_head, None, d_hidden, None, None, None, None

def _in_rows(head, dtype):
    """head in dtype, each row contiguous."""
    head = head.to(dtype)
    return head if head.stride(1) == 1 else head.contiguous()

def linear_ce_kl(hidden, head, targets, ce_weight=None, ref_hidden=None, kl_weight=None,
                 ref_head=None):
    """Weighted cross-entropy and KL(reference || student) of each token: (N,) fp32, not normalized.

    Args:
        hidden: (N, D), last hidden states of the student, in bf16, fp16 or fp32.
        head: (V, D) likewise, of the student and, as a constant, of the reference.
        targets: (N,) integers. A token with target -100, or with both weights 0, has no loss, no
            gradient and no cost.
        ce_weight, kl_weight: (N,) of any sign; None for 1 and for 0.
        ref_hidden: (N, D) hidden states of the reference, read where kl_weight is not 0. Or (N, 2D)
            with softmax(h_ref W^T) W beside them, which spares a quarter of the products on a GPU.
        ref_head: (V, D) head of the reference if it is not that of the student.

    Differentiates with respect to hidden, and to head if it requires a gradient, once. All else is
    constant. Computes in the wider dtype of hidden and head with sums in fp32; on a CPU in fp32;
    with a frozen head of fp16, for GPUs that have nothing better, in that, and not by the kernel.
    A kl_weight that is not 0 needs ref_hidden."""
    N, D = hidden.shape
    on_gpu, half = hidden.is_cuda or INTERPRET, head.dtype == torch.float16
    assert {hidden.dtype, head.dtype} <= {torch.bfloat16, torch.float16, torch.float32}
    assert head.shape[1] == D and targets.shape == (N,) and not targets.is_floating_point()
    assert all(t is None or t.shape == (N,) for t in (ce_weight, kl_weight))
    assert ref_hidden is None or ref_hidden.shape in ((N, D), (N, 2 * D))
    assert ref_head is None or ref_head.shape == head.shape
    use_kernel = triton is not None and on_gpu and not half
    dtype = torch.promote_types(hidden.dtype, head.dtype) if use_kernel else torch.float32
    dtype = torch.float16 if on_gpu and half and not head.requires_grad else dtype
    zeros = hidden.new_zeros(N, dtype=torch.float32)
    ce_weight = zeros + 1 if ce_weight is None else ce_weight.detach().float()
    kl_weight = zeros if kl_weight is None else kl_weight.detach().float()
    ref_hidden = ref_hidden if ref_hidden is None else ref_hidden.detach()
    if not torch.is_grad_enabled():                     # then no gradient is prepared
        hidden, head = hidden.detach(), head.detach()
    head = _in_rows(head, dtype)
    ref_head = (head if ref_head is None else _in_rows(ref_head, dtype)).detach()
    return _LinearCEKL.apply(
        use_kernel, head, ref_head, hidden, targets, ce_weight, ref_hidden, kl_weight)
