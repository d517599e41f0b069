"""kernels/quantized_linear.py alone; test_quantized.py has models with such layers."""
import sys

import pytest
import torch

from quantized_linear import QuantizedLinear

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_with_the_restored_weight(dtype):
    """In so many bits a weight and within the rounding error; output and gradient are those of the restored weight."""
    torch.manual_seed(0)
    weight, bias = torch.randn(80, 512, dtype=dtype), torch.randn(80, dtype=dtype)
    layer = QuantizedLinear(weight, bias)
    assert 8 * (layer.weight.nbytes + layer.scale.nbytes) <= 4.2 * weight.numel() and not list(layer.buffers())[0].requires_grad
    restored = layer.product(torch.eye(512, dtype=dtype), layer.weight).T
    assert (restored - weight).norm() < 0.12 * weight.norm()
    x, upstream = torch.randn(30, 512, dtype=dtype, requires_grad=True), torch.randn(30, 80, dtype=dtype)
    results = []
    for f in (layer, lambda x: torch.nn.functional.linear(x, restored, bias)):
        out = f(x)
        results.append((out, *torch.autograd.grad(out, x, upstream)))
    for a, b in zip(*results):
        assert a.dtype == dtype and (a - b).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * b.norm()
    assert QuantizedLinear(weight, None).bias is None


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="48 inputs"):
        QuantizedLinear(torch.randn(16, 48), None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError):
        QuantizedLinear(torch.randn(16, 64), None)
