"""Cards and machines that are not here: kernels compiled for them, GPUs without bfloat16, CPUs without oneDNN's products, a Mac."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, call, rows_of
from torch.utils._python_dispatch import TorchDispatchMode

import cpu_linear
import fused
import sample
import thinksafe
import train
from data.run_record import peak_gb
from kv_cache import default_block_size
from linear_ce_kl import linear_ce_kl
from sample import Sampler
from thinksafe import add_lora, load_model, lora_tensors

CARDS = 75, 80, 86, 89, 90, 100, 120
# Kernels that are known to keep more than 128 bytes of a thread's registers in memory: (architecture, kernel): bytes at most.
SPILLED = {(80, "_head_kernel"): 160, (100, "_head_kernel"): 216}


def compiled(*flags):
    """What tests/tools/compile_kernels.py says: one dict for each kernel and configuration."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, ROOT / "tests" / "tools" / "compile_kernels.py", *map(str, flags)], capture_output=True, text=True,
                          timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows):
    for row in rows:
        assert row["shared"] <= row["limit"], row
        assert row["spilled"] <= SPILLED.get((row["arch"], row["kernel"]), 128), row
    return {row["kernel"] for row in rows}


@pytest.mark.trust
@pytest.mark.skipif(fused.triton is None, reason="triton is not installed: nothing compiles")
@pytest.mark.parametrize("arch", CARDS)
def test_kernels_compile_for_cards_that_are_not_here(arch, request):
    """Within the shared memory of a card, and with few spilled registers: a sample of the shapes, with -m trust all of them. The loss's
    kernel takes longest to compile, and the small ones are alike on neighbours."""
    kernels = {"_norm_kernel", "_rope_kernel", "_silu_kernel", "_chunk_kernel", "_join_kernel", "_best_kernel", "_draw_kernel"}
    if "trust" in request.config.option.markexpr:
        assert kernels < check(compiled(arch))
    elif arch in (75, 90, 120):
        assert check(compiled(arch, "--only", "norm", "rope", "silu", "attention", "draws")) == kernels
    else:
        assert check(compiled(arch, "--only", "attention", *["loss_small"] * (arch == 86))) >= {"_chunk_kernel", "_join_kernel"}


# ---------------------------------------------------------------------------------------------
# GPUs without bfloat16


@pytest.fixture
def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    thinksafe.default_dtype.cache_clear()
    yield
    thinksafe.default_dtype.cache_clear()


def test_a_gpu_without_bfloat16_takes_float16_and_says_so_once(old_gpu, capsys):
    assert [thinksafe.default_dtype("cuda") for _ in range(2)] == [torch.float16] * 2
    assert capsys.readouterr().err.count("--dtype float16: this GPU has no bfloat16") == 1
    assert thinksafe.default_dtype("cpu") == thinksafe.default_dtype("mps") == torch.float32
    thinksafe.default_dtype.cache_clear()
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    assert thinksafe.default_dtype("cuda") == torch.bfloat16


def test_blocks_are_smaller_where_registers_are_few(monkeypatch):
    for capability, size in (((7, 5), 32), ((8, 0), 64), ((12, 0), 64)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert default_block_size(torch.device("cuda")) == size
    assert default_block_size(torch.device("cpu")) is None and default_block_size(torch.device("mps")) == 64


def test_all_stages_in_float16(tmp_path):
    """sample, guard, train and eval on a CPU in the dtype of such a GPU; training learns what it learns in float32."""
    out = tmp_path / "half"
    assert call("sample.py", "--model", "tiny", "--limit", 8, "--max-new-tokens", 96, "--dtype", "float16", "--out", out).returncode == 0
    assert call("guard.py", "--dtype", "float16", "--out", out).returncode == 0
    losses = []
    for dtype in ("float16", "float32"):
        flags = "--model", "tiny", "--data", out / "guarded.jsonl", "--epochs", 1, "--lr", "1e-3", "--kl", "--dtype", dtype, "--out", tmp_path / dtype
        done = call("train.py", *flags)
        assert done.returncode == 0, done.stderr
        losses.append([row["loss"] for row in rows_of(tmp_path / dtype / "metrics.jsonl")])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=2e-2, atol=5e-4)
    assert load_model(tmp_path / "float16" / "model")[0].lora


def test_gradients_in_float16(tiny, monkeypatch):
    """Scaled from the last hidden states to LoRA's weights: tiny ones do not vanish, and those that overflow are computed once more."""
    grads = []
    for dtype, scale in ((torch.float16, 2.0**16), (torch.float16, 1.0), (torch.float32, 1.0)):
        model, _ = load_model("tiny", "cpu", dtype)
        torch.manual_seed(0)
        add_lora(model, 4, 8, 0.0)
        model.grad_scale = scale
        hidden = model(torch.arange(5, 45), torch.tensor([0, 40]))
        (linear_ce_kl(hidden, model.head, torch.arange(6, 46)).sum() / 1e5).backward()     # as in a step of 100,000 targets
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    error = [((g - grads[2]).norm() / grads[2].norm()).item() for g in grads[:2]]
    assert error[0] < 0.02 < error[1]


def test_a_step_that_overflows_is_computed_once_more(tmp_path, monkeypatch):
    scales, loss = [], train.packed_loss

    def watched(model, *args, **kw):
        scales.append(model.grad_scale)
        model.grad_scale = model.grad_scale * 2.0**20 if len(scales) == 1 else model.grad_scale
        return loss(model, *args, **kw)
    monkeypatch.setattr(train, "packed_loss", watched)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "Hi", "response": "<think>\nx\n</think>\n\nNo.", "prompt_label": "vanilla_benign"}))
    flags = "--model", "tiny", "--data", tmp_path / "rows.jsonl", "--epochs", 3, "--dtype", "float16", "--out", tmp_path
    done = call("train.py", *flags)
    assert done.returncode == 0, done.stderr
    assert len(scales) > 2 and scales[-1] < scales[0] * 2.0**20
    assert all(p.isfinite().all() for p in lora_tensors(load_model(tmp_path / "model")[0]).values())


@pytest.mark.parametrize("kl", [False, True])
def test_loss_in_float16(monkeypatch, kl):
    """The way of an old GPU, with products in float16: close to fp64 also where the student is close to the reference."""
    import linear_ce_kl as ck
    monkeypatch.setattr(ck, "INTERPRET", True)
    gen = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(20, 32, generator=gen), torch.randn(500, 32, generator=gen).half()
    targets, ref = torch.randint(500, (20,), generator=gen), (hidden + 0.05 * torch.randn(20, 32, generator=gen)).half()
    found = []
    for dtype in (torch.float16, torch.float64):
        h = hidden.half().to(dtype).requires_grad_()
        if dtype == torch.float16:
            one = torch.ones(20)
            loss = linear_ce_kl(h, head, targets, 0 * one, ref, one) if kl else linear_ce_kl(h, head, targets)
        else:
            log_p, log_ref = (h @ head.double().T).log_softmax(-1), (ref.double() @ head.double().T).log_softmax(-1)
            loss = (log_ref.exp() * (log_ref - log_p)).sum(-1) if kl else -log_p[torch.arange(20), targets]
        loss.sum().backward()
        found.append((loss.double(), h.grad.double()))
    for a, b in zip(*found):
        assert (a - b).norm() < 2e-3 * b.norm()


# ---------------------------------------------------------------------------------------------
# CPUs without oneDNN's products, and a Mac


@pytest.mark.parametrize("missing", ["AVX-512", "mkldnn", "its products"])
def test_a_cpu_without_products_of_onednn(monkeypatch, capsys, missing):
    """Weights are not packed, and F.linear serves. Slow bfloat16 is said once."""
    model, _ = load_model("tiny", "cpu", torch.bfloat16 if missing == "AVX-512" else torch.float32)
    cpu_linear.has_product.cache_clear()
    if missing == "AVX-512":
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    elif missing == "mkldnn":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    for _ in range(2):
        model.prepack_weights()
    cpu_linear.has_product.cache_clear()
    assert model.packed_head is None and model(torch.arange(9), torch.tensor([0, 9])).isfinite().all()
    assert capsys.readouterr().err.count("AVX-512") == (missing == "AVX-512")


def test_a_system_that_tells_nothing(tiny, monkeypatch, tmp_path):
    """No sysconf, no /proc, no posix_fallocate: memory counts as 8 GB, the plan says that it does not know, and rows are cached."""
    from extras import memory
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "missing")
    model, _ = load_model("tiny", "cpu", torch.float32)
    model.prepack_weights()
    assert model.packed_head is not None
    done = call("extras.cached_kl", "--model", "tiny", "--data", ROOT / "tiny" / "star1.jsonl", "--label", "vanilla_harmful", "--limit", 16, "--epochs", 1, "--out", tmp_path / "kl")
    assert done.returncode == 0, done.stderr


def test_free_memory_that_nothing_tells(monkeypatch, tmp_path):
    from extras import memory
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "missing")
    monkeypatch.delattr(os, "sysconf")
    assert memory.free_bytes(torch.device("cpu")) != memory.free_bytes(torch.device("cpu"))        # nan


def test_peak_memory_counts_in_bytes_on_a_mac(monkeypatch):
    here = peak_gb("cpu")
    assert 0.1 < here < 100
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_gb("cpu") < here / 500


class NoDoubles(TorchDispatchMode):
    """Fails at any operation with 64-bit floats, which a Mac's GPU does not have."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in (*args, *(result if isinstance(result, tuple | list) else [result])):
            is_view = func._schema.returns and func._schema.returns[0].alias_info        # of the draws' numbers, on the CPU
            assert is_view or not (isinstance(x, torch.Tensor) and x.dtype == torch.float64), func.name()
        return result


def test_the_paths_of_a_mac(tiny, monkeypatch, tmp_path):
    """--device mps is offered where there is one. Nothing of the model, cache, loss and optimizer wants 64-bit floats: those of the draws
    are on the CPU."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "{cpu,mps}" in thinksafe.make_parser("").format_help() or "{cpu,cuda,mps}" in thinksafe.make_parser("").format_help()
    model, tokenizer = load_model("tiny", "cpu", torch.float32)
    add_lora(model, 4, 8, 0.1)
    sampler, draw = Sampler(model, tokenizer, 4, block_size=64), sample.draw_tokens
    assert sampler.draw_device.type == "cpu"

    def outside(f):
        def g(*args, **kw):
            with torch.utils._python_dispatch._disable_current_modes():
                return f(*args, **kw)
        return g
    monkeypatch.setattr(sample, "draw_tokens", outside(draw))
    for name in ("_begin_window", "_end_window", "_allocate"):
        monkeypatch.setattr(Sampler, name, outside(getattr(Sampler, name)))
    monkeypatch.setattr(sample, "uniforms", outside(sample.uniforms))
    want = sorted(Sampler(model, tokenizer, 4).generate([[5, 6, 7], [8, 9]], 9))
    with NoDoubles():
        assert sorted(sampler.generate([[5, 6, 7], [8, 9]], 9)) == want
        examples = [{"id": i, "ids": list(range(5, 30)), "n_prompt": 9, "ce_weight": 1.0} for i in range(2)]
        model.train()
        train.packed_loss(model, examples).total.backward()
        optimizer = train.make_optimizer("adamw", [p for p in model.parameters() if p.requires_grad], 1e-3, 0.0)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
