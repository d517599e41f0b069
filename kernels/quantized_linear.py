"""Frozen linear layers with weights of 4 or 8 bits, by bitsandbytes.

    layer = QuantizedLinear(weight, bias, "nf4")        # weight (n_out, n_in)
    y = layer(x)                                        # x (T, n_in) -> (T, n_out), of x's dtype

"nf4" is QLoRA's (arXiv 2305.14314): blocks of 64, their scales quantized again, 4.13 bits a weight.
"int8" keeps rows with one scale each, as LLM.int8 (arXiv 2208.07339) does, but multiplies in the
dtype of x and sets no outliers apart. bitsandbytes' own modules are not used: on a CPU Linear4bit
has no gradient after evaluation, and Linear8bitLt keeps activations that checkpointing cannot free.
"""
import functools
import logging

import torch
import torch.nn.functional as F
from torch import nn

# On some CPUs bitsandbytes looks for a kernel on the hub, can do without, and warns.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage())

class _Int8Product(torch.autograd.Function):
    """x (T, n_in) times int8 weight (n_out, n_in) and scale (n_out,), with a gradient to x. Saves
    weight and scale for the backward pass, where autograd would save a copy in x's dtype."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        return (grad * scale) @ weight.to(grad.dtype), None, None

class QuantizedLinear(nn.Module):
    """A frozen linear layer that keeps a weight (n_out, n_in) as kind "nf4" or "int8", and restores
    it in the dtype of x in every pass. bias: (n_out,) or None. Raises ImportError without
    bitsandbytes, ValueError if the rows are not a multiple of 64 for nf4."""

    def __init__(self, weight, bias, kind):
        import bitsandbytes as bnb
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if kind == "nf4":
            if self.in_features % 64:       # bitsandbytes 0.50 restores them wrongly on a CPU
                raise ValueError(f"{self.in_features} inputs of a linear layer, no multiple of 64")
            weight, state = bnb.functional.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=True)
            scale = state.absmax
            self.product = functools.partial(bnb.matmul_4bit, quant_state=state)
        else:
            dtype = weight.dtype
            weight, largest, _ = bnb.functional.int8_vectorwise_quant(weight.half())
            scale = (largest / 127).to(dtype)
            self.product = lambda x, weight: _Int8Product.apply(x, weight, scale)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x):
        out = self.product(x, self.weight)
        return out if self.bias is None else out + self.bias
