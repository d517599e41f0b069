"""kernels/cpu_linear.py: what oneDNN computes from packed weights, and when a packed weight is used."""
import pytest
import torch
from torch import nn

import cpu_linear
from cpu_linear import Linear, _pack, linear, prepack_linear_layers

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no AVX-512"))])


class Model(nn.Module):
    """Layers and a head, as much as prepack_linear_layers asks of a model: one layer is trained, one is too small to pay."""

    def __init__(self, dtype):
        super().__init__()
        self.frozen, self.trained = Linear(256, 320, dtype=dtype), Linear(320, 256, bias=False, dtype=dtype)
        self.small = Linear(16, 16, dtype=dtype)
        self.head, self.packed_head = nn.Parameter(torch.randn(300, 256, dtype=dtype)), None
        self.device = torch.device("cpu")
        self.frozen.requires_grad_(False)
        self.small.requires_grad_(False)


def close(a, b, dtype):
    torch.testing.assert_close(a, b, **(dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)))


@DTYPES
def test_packed_products(dtype):
    """They are F.linear's; in grad mode they are not taken."""
    torch.manual_seed(0)
    model, x = Model(dtype), torch.randn(30, 256, dtype=dtype, requires_grad=True)
    want = nn.functional.linear(x, model.frozen.weight, model.frozen.bias)
    prepack_linear_layers(model)
    assert model.frozen.packed and model.packed_head and model.trained.packed is model.small.packed is None
    with torch.no_grad():
        close(model.frozen(x), want, dtype)
        close(linear(x, model.head, packed=model.packed_head), x @ model.head.T, dtype)
    out = model.frozen(x)
    assert torch.equal(out, want) and all(map(torch.equal, torch.autograd.grad(out.sum(), x), torch.autograd.grad(want.sum(), x)))
    model.frozen.packed = _pack(model.frozen.weight * 2, None)._replace(version=model.frozen.weight._version)
    with torch.no_grad():                                   # what is packed is what computes
        close(model.frozen(x) - model.frozen.bias, 2 * (want - model.frozen.bias), dtype)


def test_a_weight_that_changed_is_not_taken_from_the_pack():
    model, x = Model(torch.float32), torch.randn(30, 256)
    prepack_linear_layers(model)
    old = model.frozen.packed
    prepack_linear_layers(model)
    assert model.frozen.packed is old                       # nothing to do
    with torch.no_grad():
        model.frozen.weight.mul_(2)
        torch.testing.assert_close(model.frozen(x), nn.functional.linear(x, model.frozen.weight, model.frozen.bias), rtol=0, atol=0)
    prepack_linear_layers(model)
    assert model.frozen.packed.version == model.frozen.weight._version != old.version


@pytest.fixture
def unasked():
    """Whether the CPU has a product is asked anew, before and after."""
    cpu_linear.has_product.cache_clear()
    yield
    cpu_linear.has_product.cache_clear()


@pytest.mark.parametrize("reason", ["a GPU", "too little memory", "dtype", "no oneDNN", "no AVX-512"])
def test_when_nothing_is_packed(reason, monkeypatch, unasked, capsys):
    model = Model({"dtype": torch.float64, "no AVX-512": torch.bfloat16}.get(reason, torch.float32))
    if reason == "a GPU":
        model.device = torch.device("cuda")
    if reason == "too little memory":                       # the copies of all parameters would be just above a quarter of it
        pages = 4 * sum(p.nbytes for p in model.parameters()) - 1
        monkeypatch.setattr(cpu_linear.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": pages}.get)
    if reason in ("no oneDNN", "no AVX-512"):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: reason != "no oneDNN")
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    prepack_linear_layers(model)
    assert model.frozen.packed is None and model.packed_head is None
    prepack_linear_layers(model)
    assert capsys.readouterr().err.count("has no AVX-512") == (reason == "no AVX-512")             # said once
    with torch.no_grad():
        assert model.frozen(torch.randn(3, 256, dtype=model.head.dtype)).shape == (3, 320)
