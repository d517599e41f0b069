"""Linear layers on a CPU by oneDNN, 1.5 to 3 times as fast as F.linear.

    layer = Linear(n_in, n_out)                     # an nn.Linear
    prepack_linear_layers(model, train=True)        # after loading; then use the model as before

oneDNN wants weights in an order of its own. Every frozen weight is kept once more in that order,
for training also transposed. A weight that changes later goes through F.linear again.
"""
import functools
import os
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

class PackedWeight(NamedTuple):
    version: int                            # of the weight when it was packed
    weight: torch.Tensor
    transposed: torch.Tensor | None         # for the gradient to x

def _product(x, weight, bias=None):
    """F.linear by oneDNN of a weight in its order."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

class _Product(torch.autograd.Function):
    """x (T, n_in) -> (T, n_out) by a PackedWeight, with a gradient to x."""

    @staticmethod
    def forward(ctx, x, bias, packed):
        ctx.packed = packed
        return _product(x, packed.weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return _product(grad, ctx.packed.transposed), None, None

def linear(x, weight, bias=None, packed=None):
    """F.linear of x (T, n_in), weight (n_out, n_in); by oneDNN if packed still is that weight."""
    if packed and packed.version == weight._version:
        if not torch.is_grad_enabled():
            return _product(x, packed.weight, bias)
        if packed.transposed is not None:
            return _Product.apply(x, bias, packed)
    return F.linear(x, weight, bias)

class Linear(nn.Linear):
    packed = None                           # a PackedWeight after prepack_linear_layers

    def forward(self, x):
        return linear(x, self.weight, self.bias, self.packed)

def _pack(weight, transposed, old):
    """PackedWeight of weight (n_out, n_in): the old one if it still serves."""
    if old and old.version == weight._version and (old.transposed is not None or not transposed):
        return old
    reorder, weight_ = torch.ops.mkldnn._reorder_linear_weight, weight.detach()
    back = reorder(weight_.T.contiguous(), 64) if transposed else None
    return PackedWeight(weight._version, reorder(weight_, 64), back)

@functools.cache                            # it says so once
def has_product(dtype):
    """Tell whether oneDNN has these products in that dtype here; bf16 needs AVX-512."""
    mkldnn = torch.backends.mkldnn.is_available() and torch.ops.mkldnn
    if not hasattr(mkldnn, "_linear_pointwise"):    # such as on a Mac
        return False
    if dtype != torch.bfloat16:
        return dtype == torch.float32
    if mkldnn._is_mkldnn_bf16_supported():
        return True
    print("bfloat16 is slow on this CPU, which has no AVX-512: --dtype float32 is faster",
          file=sys.stderr)
    return False

def prepack_linear_layers(model, train=False):
    """Pack the frozen Linear layers of a model on a CPU, with train also for the backward pass, and
    its head, which goes to packed_head. Nothing happens on a GPU, where oneDNN has no such product,
    or if the copies would take more than a quarter of the machine's memory."""
    if model.device.type != "cpu":
        return
    torch.empty(31 << 20, dtype=torch.uint8)    # makes glibc keep 62 MB of freed memory: 5% faster
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        memory = 8 << 30                        # a system that does not tell
    copies = (1 + train) * sum(p.nbytes for p in model.parameters())
    if copies > memory / 4 or not has_product(model.head.dtype):
        return
    model.packed_head = _pack(model.head, False, model.packed_head)
    for m in model.modules():
        if isinstance(m, Linear) and not m.weight.requires_grad:
            m.packed = _pack(m.weight, train, m.packed)
