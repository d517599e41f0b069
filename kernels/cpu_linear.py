"""Linear layers on a CPU by oneDNN: up to 4 times as fast as F.linear where few rows are decoded.

    layer = Linear(n_in, n_out)                     # an nn.Linear
    prepack_linear_layers(model)                    # after loading; then use the model as before

oneDNN wants weights in an order of its own, so frozen ones are kept once more in that order. In
grad mode, and for a weight that has changed, F.linear serves.
"""
import functools
import os
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

MIN_SIZE = 2**16            # numbers of a weight: for a smaller one the call takes longer

class PackedWeight(NamedTuple):
    version: int                            # of the weight when it was packed
    weight: torch.Tensor

def linear(x, weight, bias=None, packed=None):
    """F.linear of x (T, n_in), weight (n_out, n_in); by oneDNN if packed still is that weight."""
    if packed and packed.version == weight._version and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, packed.weight, bias, "none", [], "")
    return F.linear(x, weight, bias)

class Linear(nn.Linear):
    packed = None                           # a PackedWeight after prepack_linear_layers

    def forward(self, x):
        return linear(x, self.weight, self.bias, self.packed)

def _pack(weight, old):
    """PackedWeight of weight (n_out, n_in), the old one if it still serves; None if small."""
    if weight.numel() < MIN_SIZE:
        return None
    if old and old.version == weight._version:
        return old
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64)
    return PackedWeight(weight._version, packed)

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

def machine_memory():
    """Return the machine's memory in bytes, 8 GB on a system that does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 8 << 30

def prepack_linear_layers(model):
    """Pack the frozen Linear layers of a model on a CPU, and its head, which goes to packed_head.
    Nothing happens on a GPU, where oneDNN has no such product, or if the copies would take more
    than a quarter of the machine's memory."""
    if model.device.type != "cpu":
        return
    torch.empty(31 << 20, dtype=torch.uint8)    # makes glibc keep 62 MB of freed memory: 5% faster
    copies = sum(p.nbytes for p in model.parameters())
    if copies > machine_memory() / 4 or not has_product(model.head.dtype):
        return
    model.packed_head = _pack(model.head, model.packed_head)
    for m in model.modules():
        if isinstance(m, Linear) and not m.weight.requires_grad:
            m.packed = _pack(m.weight, m.packed)
