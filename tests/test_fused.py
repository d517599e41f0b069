"""The kernels of a decoder block, of merged linear layers with LoRA, and of the draws, through Triton's interpreter without a
GPU: against their definitions in fp64; and how many launches a decoding step has."""
import math
from collections import Counter
from unittest import mock

import pytest
import torch
from interpreter import like_a_gpu
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cpu_linear
import fused
import merged_linear
import sample_tokens as st
from fused import PagedWriter, add_norm, norm_rope, silu_mul
from sample import Sampler
from thinksafe import LoRALinear, add_lora, load_lora, load_model, lora_disabled, lora_tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
if fused.triton is None:
    pytest.skip("triton is not installed: the kernels cannot be tested here", allow_module_level=True)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def kernels(monkeypatch):
    """In these tests tensors on a CPU go through the kernels."""
    monkeypatch.setattr(fused, "INTERPRET", True)
    with like_a_gpu():
        yield


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype).to(DEVICE)


def both(f, inputs, weights):
    """Run f by the kernels and, in fp64, by its definition -> (outputs, gradients) of each. weights: of the outputs in the loss."""
    found = []
    for dtype in (inputs[0].dtype, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        with mock.patch.object(fused, "use_kernels", fused.use_kernels if dtype != torch.float64 else lambda *args: False):
            outs = f(*leaves)
            sum((out.double() * w.double()).sum() for out, w in zip(outs, weights)).backward()
        found.append((outs, [x.grad for x in leaves]))
    return found


def close(found, dtype):
    (outs, grads), (want, want_grads) = found
    for a, b in zip([*outs, *grads], [*want, *want_grads]):
        assert a.dtype == dtype and relative(a, b) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, D", [(5, 64), (3, 200), (1, 1)])
@pytest.mark.parametrize("first", [True, False])
def test_add_norm(kernels, dtype, T, D, first):
    weight = (1 + randn(D, seed=3, scale=0.3)).to(dtype)
    inputs = [randn(T, D, dtype=dtype, scale=3.0), randn(T, D, dtype=dtype, seed=1)][:2 - first]
    weights = randn(2, T, D, seed=2)
    close(both(lambda x, delta=None: add_norm(x, delta, weight.to(x.dtype), 1e-5), inputs, weights), dtype)


def test_add_norm_of_which_only_the_norm_is_used(kernels):
    """As behind the last layer."""
    weight = 1 + randn(24, seed=3)
    close(both(lambda x, d: add_norm(x, d, weight.to(x.dtype), 1e-5)[1:], [randn(4, 24), randn(4, 24, seed=1)], randn(1, 4, 24, seed=2)), torch.float32)


def angles(T, d):
    angle = 3 * randn(T, 1, d // 2, seed=9)
    return angle.cos().repeat(1, 1, 2), torch.cat((-angle.sin(), angle.sin()), -1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("T, H, Hkv, d", [(5, 4, 2, 32), (3, 3, 3, 24), (2, 5, 1, 16), (1, 6, 3, 4)])
@pytest.mark.parametrize("joined", [True, False])
def test_norm_rope(kernels, dtype, normed, T, H, Hkv, d, joined):
    sizes, (cos, sin) = (H * d, Hkv * d, Hkv * d), angles(T, d)
    norms = [(1 + randn(d, seed=s, scale=0.3)).to(dtype) if normed else None for s in (3, 4)]
    qkv = randn(T, sum(sizes), dtype=dtype, scale=2.0)
    inputs = [qkv] if joined else qkv.split(sizes, -1)

    def f(*parts):
        return norm_rope(parts, sizes, [w if w is None else w.to(parts[0].dtype) for w in norms], 1e-6, cos, sin)
    close(both(f, inputs, [randn(T, heads, d, seed=heads) for heads in (H, Hkv, Hkv)]), dtype)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("T, H, Hkv, d", [(5, 4, 2, 32), (3, 3, 3, 24)])
def test_norm_rope_stores_keys_and_values(kernels, int8, normed, T, H, Hkv, d):
    """In the rows of the cache that it is told and in no others, those that the definition gives."""
    sizes, (cos, sin), blocks, size = (H * d, Hkv * d, Hkv * d), angles(T, d), 4, 8
    norms = [1 + randn(d, seed=s, scale=0.3) if normed else None for s in (3, 4)]
    qkv, rows = randn(T, sum(sizes)), torch.randperm(blocks * size, generator=torch.Generator().manual_seed(1))[:T].to(DEVICE)

    def cache():
        numbers = torch.zeros(2, 2, blocks, size, Hkv, d, dtype=torch.int8 if int8 else torch.float32, device=DEVICE)
        scales = torch.zeros(2, 2, blocks, size, Hkv, device=DEVICE) if int8 else [[None] * 2] * 2
        return PagedWriter(*numbers, *scales, rows)
    mine, plain = cache(), cache()
    q, k, v = norm_rope([qkv], sizes, norms, 1e-6, cos, sin, 1, mine)
    assert k is None and v is None
    want_q, want_k, want_v = norm_rope([qkv], sizes, norms, 1e-6, cos, sin)
    plain(1, want_k, want_v)
    torch.testing.assert_close(q, want_q)
    for a, b in zip(mine[:4], plain[:4]):
        assert a[0] is None or not a[0].any()                                   # the other layer
        if a[1] is not None:
            torch.testing.assert_close(a[1].float(), b[1].float(), rtol=1e-5, atol=1.01 if a.dtype == torch.int8 else 1e-6)
    if int8:                                                                    # the numbers are those of the nearest integers
        assert ((mine.k[1].int() - plain.k[1].int()) != 0).float().mean() < 0.01
        stored = mine.k[1].flatten(0, 1)[rows] * mine.k_scale[1].flatten(0, 1)[rows][..., None]
        assert (stored - want_k).abs().max() <= 0.501 * mine.k_scale[1].max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, size", [(5, 64), (2, 1500), (1, 3)])
@pytest.mark.parametrize("joined", [True, False])
def test_silu_mul(kernels, dtype, T, size, joined):
    gate_up = randn(T, 2 * size, dtype=dtype, scale=3.0)
    inputs = [gate_up] if joined else gate_up.chunk(2, -1)
    close(both(lambda *parts: [silu_mul(parts)], inputs, [randn(T, size, seed=2)]), dtype)


def test_large_numbers_do_not_become_nan(kernels):
    x = torch.tensor([[-200.0, 200.0, 1e4, -1e4, 1.0, 1.0, 1.0, 1.0]], device=DEVICE, requires_grad=True)
    out = silu_mul([x])
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert add_norm(torch.zeros(1, 8, device=DEVICE), None, torch.ones(8, device=DEVICE), 1e-6)[1].abs().max() == 0


# ---------------------------------------------------------------------------------------------
# Merged linear layers, and LoRA in 16 bits


class Parallel(nn.Module):
    parallel, merged = ("a", "b"), None

    def __init__(self, *biases):
        super().__init__()
        self.a, self.b = (cpu_linear.Linear(48, n, bias=bias, device=DEVICE) for n, bias in zip((64, 16), biases))
        self.requires_grad_(False)

    def forward(self, x):
        return torch.cat(merged_linear.parallel_layers(self, x), -1)

    def parts(self, x):
        return len(merged_linear.parallel_layers(self, x))


@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False)])
def test_merged_layers_are_the_layers(kernels, biases):
    layers, x = Parallel(*biases), randn(7, 48)
    want = layers(x)
    merged_linear.merge_linear_layers(layers)
    assert layers.parts(x) == (1 if biases[0] == biases[1] else 2) and relative(layers(x), want) < 1e-6


def test_merged_layers_share_their_memory_and_are_found_stale(kernels):
    layers, x = Parallel(False, False), randn(3, 48)
    merged_linear.merge_linear_layers(layers)
    merged = layers.merged
    merged_linear.merge_linear_layers(layers)
    assert layers.merged is merged
    assert all(p.untyped_storage().data_ptr() == merged[0].untyped_storage().data_ptr() for p in layers.parameters())
    with torch.no_grad():
        layers.b.weight.mul_(2)                                     # in place: seen
        assert layers.parts(x) == 1 and relative(layers(x), torch.cat([layers.a(x), layers.b(x)], -1)) < 1e-6
        layers.a.weight = nn.Parameter(layers.a.weight + 1, requires_grad=False)
    assert layers.parts(x) == 2
    merged_linear.merge_linear_layers(layers)
    assert layers.parts(x) == 1 and layers.merged is not merged
    layers.a.weight.requires_grad_()
    assert layers.parts(x) == 2
    layers.a = LoRALinear(layers.a, 4, 8, 0.0)
    assert layers.parts(x) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_of_lora_in_16_bits(dtype, record_property):
    """Of a layer with 16-bit weights, whose products with A and B are in 16 bits too, against fp64 from the same numbers; A and B and
    their gradients are in fp32."""
    found = []
    for wide in (False, True):
        torch.manual_seed(0)
        base = cpu_linear.Linear(256, 128, bias=False, device=DEVICE).requires_grad_(False).to(dtype)
        layer = LoRALinear(base, 32, 16, 0.0).to(DEVICE)
        nn.init.normal_(layer.lora_B, std=0.02)
        x, weights = randn(512, 256, dtype=dtype), randn(512, 128, seed=1, dtype=dtype)
        if wide:
            layer, x, weights = layer.double(), x.double(), weights.double()
        x.requires_grad_()
        out = layer(x)
        (out * weights).sum().backward()
        found.append((out, x.grad, layer.lora_A.grad, layer.lora_B.grad))
    error = [relative(a, b) for a, b in zip(*found)]
    record_property("measured", f"LoRA's products in {dtype}, error against fp64: output {error[0]:.1e}, gradients {max(error[1:]):.1e}")
    assert found[0][2].dtype == torch.float32 and max(error) < (6e-3 if dtype == torch.bfloat16 else 8e-4)


# ---------------------------------------------------------------------------------------------
# Whole models


@pytest.mark.parametrize("family", ["llama_untied_bias", "qwen2", "qwen3"])
def test_a_model_by_the_kernels(folders, monkeypatch, family):
    """Hidden states and the gradients of LoRA: the same as without them, packed, recomputed, with LoRA off."""
    model, _ = load_model(folders(family)[1], DEVICE, torch.float32)
    torch.manual_seed(0)
    add_lora(model, 4, 8, 0.0, ("q_proj", "o_proj", "down_proj"))
    for p in lora_tensors(model).values():
        p.normal_(std=0.1)
    tokens, cu = torch.randint(1024, (6,), device=DEVICE), torch.tensor([0, 2, 6])

    def run(recomputed=False):
        model.activation_checkpointing = recomputed
        model.zero_grad()
        hidden = model(tokens, cu, at=torch.tensor([1, 5], device=DEVICE))
        hidden.square().sum().backward()
        with torch.no_grad(), lora_disabled(model):
            frozen = model(tokens, cu)
        return [hidden.detach(), frozen, *(p.grad for p in model.parameters() if p.requires_grad)]
    want = run()
    monkeypatch.setattr(fused, "INTERPRET", True)
    for merged in (False, True):
        if merged:
            model.prepack_weights()
            assert not model.layers[0].self_attn.merged and model.layers[1].mlp.merged
        for a, b in zip(run(recomputed=merged), want):
            assert relative(a, b) < 1e-4


def test_a_merged_model_is_saved_and_trained_as_any(folders, kernels, tmp_path):
    from thinksafe import merge_lora, save_model
    model, _ = load_model(folders("qwen2")[1], DEVICE, torch.float32)
    add_lora(model, 4, 8, 0.0)
    load_lora(model, {name: torch.randn_like(p) for name, p in lora_tensors(model).items()})
    tokens, cu = torch.randint(1024, (6,), device=DEVICE), torch.tensor([0, 2, 6])
    with torch.no_grad():
        want = model(tokens, cu)
        merge_lora(model)
        model.prepack_weights()
        assert model.layers[0].self_attn.merged
        assert relative(model(tokens, cu), want) < 1e-4
        save_model(model, tmp_path / "saved")
        assert relative(load_model(tmp_path / "saved", DEVICE, torch.float32)[0](tokens, cu), want) < 1e-4
    model.requires_grad_(True)                                      # as --full does
    model(tokens, cu).square().sum().backward()
    assert model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0 and model.layers[1].mlp.up_proj.weight.grad.abs().sum() > 0


def test_sampling_by_the_kernels(folders, kernels, monkeypatch):
    """The same tokens as without them, with refill, preemption, equal prompts, and a cache that serves two calls."""
    model = load_model(folders("qwen3")[1], DEVICE, torch.float32)
    prompts, options, runs = [[5, 6, 7]] * 2 + [[9] * 15], dict(seed=1, temperature=0.9, top_k=3), []
    for by_kernel in (True, False):
        monkeypatch.setattr(fused, "INTERPRET", by_kernel)
        sampler = Sampler(*model, 2, block_size=16, num_blocks=4, window=2)
        found = [sorted(sampler.generate(prompts, 4, **options))]
        cache = sampler.cache
        found.append(sorted(sampler.generate(prompts[1:], 2, **options)))
        assert sampler.cache is cache
        runs.append(found)
    assert runs[0] == runs[1]


# ---------------------------------------------------------------------------------------------
# Draws


def slots(n, window=4, seed=0):
    gen = torch.Generator().manual_seed(seed)
    num_new = torch.randint(0, window, (n,), generator=gen)
    found = [torch.full((n,), window), num_new, torch.zeros(n, dtype=torch.long), torch.zeros(n, window + 2, dtype=torch.long),
             torch.rand(n, window + 1, generator=gen, dtype=torch.float64)]
    return st.Slots(*(x.to(DEVICE) for x in found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V, options", [(5000, (0.6, 0.95, 20)), (300, (0.6, 0.5, 64)), (5000, (0, 1.0, 0)), (20, (1.0, 0.9, 20)), (9000, (2.0, 0.999, 15)),
                                        (4097, (0.7, 0.95, 1))])
def test_draws_by_the_kernels(kernels, monkeypatch, dtype, V, options):
    """They note the tokens that the definition draws, and end the sequences that it ends."""
    n = 9
    scores = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i)) for i in range(n)]).float()
    logits = (scores.log1p() * 3).to(dtype).to(DEVICE)              # ties where 16 bits do not tell neighbours apart
    eos = torch.tensor([1, 5, V - 1], device=DEVICE)
    logits[:3, 5] = logits.max() + 99
    mine, plain = slots(n), slots(n)
    st.draw_tokens(logits, mine, eos, *options)
    monkeypatch.setattr(st, "use_kernels", lambda logits: False)
    st.draw_tokens(logits, plain, eos, *options)
    values = [logits.gather(1, x.last_draw[:, None]) for x in (mine, plain)]
    assert torch.equal(*values)                                     # equal logits: of equal chance, whichever comes first
    if dtype == torch.float32:
        for a, b in zip(mine, plain):
            assert torch.equal(a, b)
    assert (mine.max_new[:3] == mine.num_new[:3]).all()


@pytest.mark.parametrize("kernel", [True, False])
def test_draws_of_a_model_without_eos(kernels, monkeypatch, kernel):
    monkeypatch.setattr(st, "use_kernels", lambda logits: kernel)
    mine = slots(2)
    st.draw_tokens(randn(2, 50), mine, torch.tensor([], dtype=torch.long, device=DEVICE), 0.6, 0.95, 3)
    assert (mine.last_draw >= 0).all() and (mine.max_new == 4).all()


@pytest.mark.parametrize("value, said", [(float("nan"), st.NOT_FINITE), (float("inf"), st.NOT_FINITE), (float("-inf"), 3)])
def test_draws_of_logits_that_are_not_finite(kernels, value, said):
    logits, mine = torch.full((2, 5000), -1e4, device=DEVICE), slots(2)
    logits[:, 3] = 5.0
    logits[1, 4500] = value
    before = mine.num_new.clone()
    st.draw_tokens(logits, mine, torch.tensor([9], device=DEVICE), 0.6, 0.95, 20)
    assert mine.last_draw.tolist() == [3, said] and (mine.num_new - before).tolist() == [1, said == 3]


def test_draws_have_the_distribution(kernels):
    """The shares of 80 draws, evenly spread, with top_k 3 and top_p .8."""
    n, logits = 80, torch.tensor([0.0, 2.0, 1.0, 1.9, -3.0], device=DEVICE)
    u = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None].repeat(1, 2)
    state = torch.ones(n).long(), torch.zeros(n).long(), torch.zeros(n).long(), torch.zeros(n, 3).long(), u
    mine = st.Slots(*(x.to(DEVICE) for x in state))
    st.draw_tokens(logits.repeat(n, 1), mine, torch.tensor([9], device=DEVICE), 1.0, 0.8, 3)
    p = torch.tensor([0, math.exp(2.0), 0, math.exp(1.9), 0])       # the third best begins beyond .8
    torch.testing.assert_close(mine.last_draw.bincount(minlength=5).cpu() / n, p / p.sum(), atol=0.013, rtol=0)


# ---------------------------------------------------------------------------------------------
# Launches


class Launches(TorchDispatchMode):
    """Counts in `seen` the kernels that operations would start on a GPU: not views, not new memory; and Triton's."""

    def __init__(self):
        super().__init__()
        self.seen, self.inside = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func._schema.returns and func._schema.returns[0].alias_info
        is_view = result and not result.is_write
        if not (self.inside or is_view or "empty" in func.name()):
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    from triton.runtime import interpreter
    mode, run = Launches(), interpreter.GridExecutor.__call__

    def counted(self, *args, **kw):
        mode.seen.append(f"triton::{self.fn.__name__}")
        mode.inside = True
        run(self, *args, **kw)
        mode.inside = False
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return mode


@pytest.mark.skipif(DEVICE == "cuda", reason="counted by the interpreter")
@pytest.mark.parametrize("family, kv_bits", [("qwen3", 16), ("qwen3", 8), ("llama", 16)])
def test_launches_of_a_decoding_step(folders, kernels, launches, family, kv_bits):
    """At most 11 a layer, and few around them. What one layer adds: a step with one layer less is taken off."""
    counts = []
    for n_layers in (2, 1):
        model, tokenizer = load_model(folders(family)[1], DEVICE, torch.float32)
        model.layers = model.layers[:n_layers]
        model.config.num_hidden_layers = n_layers
        sampler = Sampler(model, tokenizer, 4, kv_bits, block_size=16, window=1)
        step, seen = sampler._step, []

        def counted(n, defer=False, step=step, seen=seen):
            launches.seen = []
            with launches:
                step(n, True)
            seen.append([*launches.seen])
        sampler._step = counted
        list(sampler.generate([[5, 6, 7], [8, 9]], 2, top_k=3))
        counts.append(seen[0])
    two, one = counts
    assert "triton::_rope_kernel" in two and "triton::_draw_kernel" in two
    assert len(two) - len(one) <= 10, sorted((Counter(two) - Counter(one)).items())
    assert len(one) <= 30, one
