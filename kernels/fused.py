"""What a decoder block does between its matrix products, each step by one kernel.

    x, h = add_norm(x, delta, weight, eps)                      # residual sum and its RMSNorm
    q, k, v = norm_rope(qkv, sizes, weights, eps, cos, sin)     # RMSNorm of q and k, rotary
    h = silu_mul(gate_up)

A GPU takes longer to start such a step, and to move its numbers, than to compute it. The kernels
compute in fp32 and round once, and have gradients to all but the norms' weights. The `_plain_...`
are the definitions, and do the work on a CPU, under autocast, and where those weights are trained.
Prior art, for the idea: Liger-Kernel, vLLM.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:         # CPU builds of torch come without it
    triton = tl = None

INTERPRET = False           # tests send CPU tensors through the kernels, with TRITON_INTERPRET=1

def use_kernels(x, *weights):
    """Tell whether the kernels serve for x and these frozen weights, of which some may be None."""
    trained = torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights)
    autocast = torch.is_autocast_enabled(x.device.type)
    return triton is not None and (x.is_cuda or INTERPRET) and not (trained or autocast)

def _joined(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

def _parts(parts, sizes):
    return parts[0].split(sizes, -1) if len(parts) == 1 else parts

def _plain_norm(x, weight, eps):
    return x if weight is None else F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)

def _plain_norm_rope(qkv, weights, eps, cos, sin):
    q, k, v = (x.unflatten(-1, (-1, cos.shape[-1])) for x in qkv)       # (T, H, d), (T, Hkv, d)
    rotated = []
    for x, weight in zip((q, k), weights):
        x = _plain_norm(x, weight, eps)
        a, b = x.chunk(2, -1)
        x = torch.addcmul(x * cos.to(x.dtype), torch.cat((b, a), -1), sin.to(x.dtype))
        rotated.append(x.to(v.dtype))               # autocast runs norms in fp32
    return *rotated, v

if triton is not None:
    @triton.jit
    def _read(ptrs, mask):
        return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _norm_kernel(x_ptr, delta_ptr, weight_ptr, sum_ptr, d_ptr, out_ptr, eps, D: tl.constexpr,
                     BLOCK: tl.constexpr):
        """The norm of one row of x, or of x + delta, which goes to sum; all are (T, D). With d, the
        gradient to the norm, the gradient to x is written, plus sum unless that is None."""
        ds = tl.arange(0, BLOCK)
        at, inside = tl.program_id(0).to(tl.int64) * D + ds, ds < D
        x = _read(x_ptr + at, inside)
        if delta_ptr is not None:
            x = (x + _read(delta_ptr + at, inside)).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + at, x, mask=inside)
            x = x.to(tl.float32)
        weight = _read(weight_ptr + ds, inside)
        scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
        x *= scale
        out = x * weight
        if d_ptr is not None:
            d = _read(d_ptr + at, inside) * weight
            out = scale * (d - x * (tl.sum(d * x, 0) / D))
            if sum_ptr is not None:
                out += _read(sum_ptr + at, inside)
        tl.store(out_ptr + at, out, mask=inside)

    @triton.jit
    def _rope_kernel(
        qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, d_ptr, out_ptr, k_cache_ptr,
        v_cache_ptr, k_scale_ptr, v_scale_ptr, rows_ptr, out_stride, eps, G: tl.constexpr,
        HKV: tl.constexpr, HP: tl.constexpr, d: tl.constexpr, DP: tl.constexpr,
    ):
        """HKV of the (G + 2) HKV heads of a token: of q in programs 0 to G - 1, of k in program G,
        of v in the last. qkv (T, heads, d); HP, DP: HKV and d padded. cos, sin (T, d) fp32; the
        first half of sin is negated. Results go to out, out_stride apart; with rows (T,) those of k
        and v to these rows of a cache, as int8 if it has scales (rows, HKV). With d_ptr, the
        gradient to out, all of its layout like qkv, the gradient to qkv is written instead."""
        token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        hs, ds = tl.arange(0, HP)[:, None], tl.arange(0, DP)[None, :]
        swapped, inside = (ds + d // 2) % d, (hs < HKV) & (ds < d)      # the partner in a rotation
        heads = (token * (G + 2) + part) * HKV * d + hs * d
        x = _read(qkv_ptr + heads + ds, inside)
        if d_ptr is not None and part > G:
            x = _read(d_ptr + heads + ds, inside)
        if part <= G:
            y = _read(qkv_ptr + heads + swapped, inside)
            cos = _read(cos_ptr + token * d + ds, ds < d)
            sin = _read(sin_ptr + token * d + ds, ds < d)
            scale = 1.0
            if q_weight_ptr is not None:
                weight_ptr = q_weight_ptr
                if part == G:
                    weight_ptr = k_weight_ptr
                scale = tl.rsqrt(tl.sum(x * x, 1) / d + eps)[:, None]
                weight = _read(weight_ptr + ds, ds < d)
                x *= scale
                y *= scale * _read(weight_ptr + swapped, ds < d)
            if d_ptr is None:
                if q_weight_ptr is not None:
                    x *= weight
                x = x * cos + y * sin
            else:
                grad = _read(d_ptr + heads + ds, inside) * cos
                grad -= _read(d_ptr + heads + swapped, inside) * sin
                if q_weight_ptr is not None:
                    grad *= weight
                    grad = scale * (grad - x * (tl.sum(grad * x, 1) / d)[:, None])
                x = grad
        if rows_ptr is None or part < G:
            tl.store(out_ptr + token * out_stride + part * HKV * d + hs * d + ds, x, mask=inside)
        elif rows_ptr is not None:
            row = tl.load(rows_ptr + token) * HKV
            cache_ptr = k_cache_ptr
            if part > G:
                cache_ptr = v_cache_ptr
            if k_scale_ptr is not None:
                scale_ptr = k_scale_ptr
                if part > G:
                    scale_ptr = v_scale_ptr
                to_int8 = tl.maximum(tl.max(tl.abs(x), 1)[:, None], 1e-12) / 127
                tl.store(scale_ptr + row + hs, to_int8, mask=hs < HKV)
                x = (x / to_int8 + 12582912.0) - 12582912.0             # 1.5 * 2^23: rounds
            tl.store(cache_ptr + (row + hs) * d + ds, x, mask=inside)

    @triton.jit
    def _silu_kernel(gate_up_ptr, d_ptr, out_ptr, F, BLOCK: tl.constexpr):
        """A block of out (T, F) = silu(gate) * up, of gate_up (T, 2F). With d (T, F), the gradient
        to that, out (T, 2F) is the gradient to gate_up."""
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside, wide = at < F, 2 * row * F + at
        gate, up = _read(gate_up_ptr + wide, inside), _read(gate_up_ptr + wide + F, inside)
        sigmoid = 1 / (1 + tl.exp(-gate))
        if d_ptr is None:
            tl.store(out_ptr + row * F + at, gate * sigmoid * up, mask=inside)
        else:
            d = _read(d_ptr + row * F + at, inside) * sigmoid
            tl.store(out_ptr + wide, d * up * (1 + gate * (1 - sigmoid)), mask=inside)
            tl.store(out_ptr + wide + F, d * gate, mask=inside)

def quantize_kv(x):
    """Quantize x (..., d) to int8 of that shape and fp32 scales (...): x is about int8 * scale."""
    x = x.float()
    scale = x.abs().amax(-1).clamp(min=1e-12) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale

class PagedWriter(NamedTuple):
    """Stores k, v (T, Hkv, d) in rows (T,) int64 of the caches of all layers, each (blocks, tokens,
    Hkv, d), as int8 where there are scales (blocks, tokens, Hkv)."""
    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | list
    v_scale: torch.Tensor | list
    rows: torch.Tensor

    def __call__(self, layer, k, v):
        for cache, scale, x in ((self.k, self.k_scale, k), (self.v, self.v_scale, v)):
            if scale[layer] is not None:
                x, scale[layer].view(-1, x.shape[1])[self.rows] = quantize_kv(x)
            cache[layer].flatten(0, 1)[self.rows] = x

class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        (T, D), x, ctx.eps = x.shape, x.contiguous(), eps
        total, out = x if delta is None else torch.empty_like(x), torch.empty_like(x)
        _norm_kernel[T,](x, delta, weight, total, None, out, eps, D, triton.next_power_of_2(D))
        ctx.save_for_backward(total, weight)
        ctx.set_materialize_grads(False)                # nobody may want the sum
        return total, out

    @staticmethod
    def backward(ctx, d_total, d_out):
        x, weight = ctx.saved_tensors
        (T, D), d_x = x.shape, torch.empty_like(x)
        _norm_kernel[T,](x, None, weight, d_total, d_out.contiguous(), d_x, ctx.eps, D,
                         triton.next_power_of_2(D))
        return d_x, d_x if ctx.needs_input_grad[1] else None, None, None

def add_norm(x, delta, weight, eps):
    """Return x + delta, or x if delta is None, and its RMSNorm, each (T, D) like x."""
    if use_kernels(x, weight):
        return _AddNorm.apply(x, delta, weight, eps)
    x = x if delta is None else x + delta
    return x, _plain_norm(x, weight, eps)

class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, sizes, weights, eps, cos, sin, cache):
        sizes_out = sizes[:1] if cache else sizes       # of what does not go to the cache
        out = qkv.new_empty(len(qkv), sum(sizes_out))
        ctx.args = sizes, weights, eps
        ctx.save_for_backward(qkv, cos, sin)
        _NormRope.launch(qkv, *ctx.args, cos, sin, None, out, cache or [None] * 5)
        return tuple(x.unflatten(-1, (-1, cos.shape[-1])) for x in out.split(sizes_out, -1))

    @staticmethod
    def backward(ctx, *grads):
        qkv, cos, sin = ctx.saved_tensors
        grad, d_qkv = torch.cat([grad.flatten(1) for grad in grads], -1), torch.empty_like(qkv)
        _NormRope.launch(qkv, *ctx.args, cos, sin, grad, d_qkv, [None] * 5)
        return d_qkv, *[None] * 6

    @staticmethod
    def launch(qkv, sizes, weights, eps, cos, sin, grad, out, cache):
        d, G, HKV = cos.shape[-1], sizes[0] // sizes[1], sizes[1] // cos.shape[-1]
        _rope_kernel[len(qkv), G + 2](
            qkv, *weights, cos, sin, grad, out, *cache, out.stride(0), eps, G, HKV,
            triton.next_power_of_2(HKV), d, triton.next_power_of_2(d))

def norm_rope(qkv, sizes, weights, eps, cos, sin, layer=0, store=None):
    """Norm q and k over each head, where there are weights, and apply the rotary embedding.

    Args:
        qkv: [q (T, H * d), k (T, Hkv * d), v], or [all three side by side].
        sizes: H * d, Hkv * d, Hkv * d.
        weights: of the norms of q and k, (d,) or None.
        cos, sin: (T, 1, d) fp32; the first half of sin is negated.
        store: f(layer, k, v) of a cache. The kernel does the work of a PagedWriter itself.

    Returns q (T, H, d), and k, v (T, Hkv, d), which are None if the kernel has stored them."""
    if use_kernels(qkv[0], *weights):
        cache = isinstance(store, PagedWriter) and (*(x[layer] for x in store[:4]), store.rows)
        qkv = _NormRope.apply(_joined(qkv), sizes, weights, eps, cos, sin, cache)
        if cache:
            return *qkv, None, None
    else:
        qkv = _plain_norm_rope(_parts(qkv, sizes), weights, eps, cos, sin)
    if store:
        store(layer, *qkv[1:])
    return qkv

class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        T, F = len(gate_up), gate_up.shape[1] // 2
        ctx.save_for_backward(gate_up)
        out = gate_up.new_empty(T, F)
        _silu_kernel[T, triton.cdiv(F, 1024)](gate_up, None, out, F, 1024)
        return out

    @staticmethod
    def backward(ctx, d):
        (T, F), (gate_up,) = d.shape, ctx.saved_tensors
        d_gate_up = torch.empty_like(gate_up)
        _silu_kernel[T, triton.cdiv(F, 1024)](gate_up, d.contiguous(), d_gate_up, F, 1024)
        return d_gate_up

def silu_mul(gate_up):
    """Return silu(gate) * up, (T, F), of [gate, up] or [(T, 2F)], both side by side."""
    if use_kernels(gate_up[0]):
        return _SiluMul.apply(_joined(gate_up))
    gate, up = _parts(gate_up, gate_up[0].shape[-1] // 2)
    return F.silu(gate) * up
