"""Frozen linear layers with weights of 4 bits, by bitsandbytes.

    layer = QuantizedLinear(weight, bias)               # weight (n_out, n_in)
    y = layer(x)                                        # x (T, n_in) -> (T, n_out), of x's dtype

They are QLoRA's NF4 (arXiv 2305.14314): blocks of 64, their scales quantized again, 4.13 bits a
weight. bitsandbytes' own Linear4bit is not used: on a CPU it has no gradient after evaluation.
"""
import functools
import logging

from torch import nn

# On some CPUs bitsandbytes looks for a kernel on the hub, can do without, and warns.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.getMessage())

class QuantizedLinear(nn.Module):
    """A frozen linear layer that keeps a weight (n_out, n_in) in 4 bits, and restores it in the
    dtype of x in every pass. bias: (n_out,) or None. Raises ImportError without bitsandbytes,
    ValueError if the rows are not a multiple of 64."""

    def __init__(self, weight, bias):
        import bitsandbytes as bnb
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if self.in_features % 64:           # bitsandbytes 0.50 restores them wrongly on a CPU
            raise ValueError(f"{self.in_features} inputs of a linear layer, no multiple of 64")
        weight, state = bnb.functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=True)
        self.product = functools.partial(bnb.matmul_4bit, quant_state=state)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", state.absmax)
        self.register_buffer("bias", bias)

    def forward(self, x):
        out = self.product(x, self.weight)
        return out if self.bias is None else out + self.bias
