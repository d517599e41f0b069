"""Base models in 4 bits: what is quantized, its gradients, training on it, and what is refused."""
import json
import math

import pytest
import torch
from conftest import ROOT, call, rows_of

from thinksafe import InputError, add_lora, load_model, lora_tensors, merge_lora, save_model
from train import encode_rows

from quantized_linear import QuantizedLinear

pytest.importorskip("bitsandbytes")
DOCS = torch.randint(5, 1000, (90,), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 30, 90])


def restored(layer):
    """Weight (n_out, n_in) that a quantized layer computes with: its product with the identity."""
    return layer.product(torch.eye(layer.in_features), layer.weight).T


def quantized_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def test_the_linear_layers_of_the_blocks_and_nothing_else(tiny):
    """All of them, in so many bits a weight, each within its rounding error; embedding, head and norms stay as they are."""
    model, _ = load_model("tiny", "cpu", torch.float32, "nf4")
    layers = quantized_layers(model)
    assert len(layers) == 7 * len(model.layers) and all(name.startswith("layers.") for name in layers)
    assert model.hash == tiny[0].hash + "-nf4"
    for name, layer in layers.items():
        weight = tiny[0].get_submodule(name).weight
        assert 8 * (layer.weight.nbytes + layer.scale.nbytes) <= 4.2 * weight.numel()
        assert (restored(layer) - weight).norm() < 0.12 * weight.norm(), name
    assert torch.equal(model.head, tiny[0].head) and torch.equal(model.norm.weight, tiny[0].norm.weight)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_restored_weights(checkpointing):
    model, plain = load_model("tiny", "cpu", torch.float32, "nf4")[0], load_model("tiny", "cpu", torch.float32)[0]
    with torch.no_grad():
        for name, layer in quantized_layers(model).items():
            plain.get_submodule(name).weight.copy_(restored(layer))
    results = []
    for m in (model, plain):
        torch.manual_seed(0)
        add_lora(m, 4, 8, 0.0, ("q_proj", "v_proj", "down_proj"))
        for p in lora_tensors(m).values():
            p.normal_(std=0.1)
        m.activation_checkpointing = checkpointing and m is model
        logits = m.logits(m(*DOCS))
        results.append((logits, *torch.autograd.grad(logits.square().mean(), [p for p in m.parameters() if p.requires_grad])))
    for got, want in zip(*results):
        assert got.isfinite().all() and (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_nf4_is_that_of_transformers():
    """The same 4 bits as transformers makes of the folder: logits of its model, in training mode, where it computes in fp32."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    hf = AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "student", quantization_config=config, dtype=torch.float32, device_map="cpu").train()
    model, _ = load_model("tiny", "cpu", torch.float32, "nf4")
    want = hf(DOCS[0][None, :30]).logits[0]
    assert (model.logits(model(*DOCS))[:30] - want).abs().max() < 1e-4 * want.abs().max()


ROWS = [{"id": str(i), "instruction": f"Question {i}?", "prompt_label": ("vanilla_harmful", "vanilla_benign")[i % 2],
         "response": f"<think>\nThe user asks {i}." + " More." * (i % 5) + f"\n</think>\n\nAnswer {i}."} for i in range(12)]


def row(tokenizer):
    ids = encode_rows(ROWS, tokenizer, 2048)[0][0]["ids"]
    return torch.tensor(ids), torch.tensor([0, len(ids)])


def kl(logits, others):
    """Mean over the tokens, in nats."""
    log_p, log_q = logits.log_softmax(-1), others.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of train.py on a quantized base -> its folder, flags and rows of metrics."""
    folder = tmp_path_factory.mktemp("nf4")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--model", "tiny", "--data", folder / "rows.jsonl", "--quantize", "nf4", "--epochs", 3, "--batch-size", 4, "--lr", 1e-3]
    done = call("train.py", *flags, "--kl", "--out", folder / "kl")
    assert done.returncode == 0, done.stderr
    done = call("train.py", *flags, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return folder, flags, rows_of(folder / "out" / "metrics.jsonl"), rows_of(folder / "kl" / "metrics.jsonl")


def test_a_qlora_run_learns(trained):
    for steps in trained[2:]:
        assert len(steps) == 9 and all(math.isfinite(s["loss"]) and 0 < s["grad_norm"] < 1e3 for s in steps)
    assert sum(s["loss"] for s in trained[2][6:]) < 0.9 * sum(s["loss"] for s in trained[2][:3])
    assert abs(trained[3][0]["kl"]) < 1e-4                                   # student and reference are one model at the start


def test_peft_loads_the_adapter(trained):
    """On the base model as it was PEFT's logits are ours; on the quantized one ours are close to them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    folder, flags, _, _ = trained
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "student").float(), folder / "out" / "model")
    model, tokenizer = load_model(folder / "out" / "model", "cpu", torch.float32)
    want = peft(row(tokenizer)[0][None]).logits[0]
    torch.testing.assert_close(model.logits(model(*row(tokenizer))), want, rtol=1e-3, atol=1e-3)
    model, _ = load_model(folder / "out" / "model", "cpu", torch.float32, "nf4")
    assert 0 < kl(want, model.logits(model(*row(tokenizer)))) < 0.1
    assert "-nf4+" in model.hash


def test_merging_takes_the_base_as_it_was(trained, tmp_path):
    folder, flags, _, _ = trained
    done = call("train.py", *flags, "--merge", "--out", tmp_path / "merged")
    assert done.returncode == 0 and "before it was quantized" in done.stdout
    merged, tokenizer = load_model(tmp_path / "merged" / "model", "cpu", torch.float32)
    adapter, _ = load_model(folder / "out" / "model", "cpu", torch.float32)
    assert kl(*(m.logits(m(*row(tokenizer))) for m in (adapter, merged))) < 1e-3      # the merged weights are rounded to bf16


def test_what_is_refused(trained, folders, tmp_path):
    folder, flags, _, _ = trained
    model, _ = load_model(folder / "out" / "model", "cpu", torch.float32, "nf4")
    with pytest.raises(InputError, match="merged into"):
        merge_lora(model)
    with pytest.raises(AssertionError):                                         # train.py does not get there
        save_model(model, tmp_path / "model")
    done = call("train.py", *flags, "--full", "--out", tmp_path / "full")
    assert done.returncode == 2 and "--full trains them" in done.stderr and not (tmp_path / "full").exists()
    done = call("train.py", *flags[:4], *flags[6:], "--out", folder / "out")    # the same folder, not quantized
    assert done.returncode == 2 and "made with" in done.stderr
    with pytest.raises(InputError, match="48 inputs"):
        load_model(folders("qwen3")[1], "cpu", torch.float32, "nf4")


def test_sampling_from_a_quantized_model(tmp_path):
    done = call("sample.py", "--model", "tiny", "--limit", 4, "--quantize", "nf4", "--out", tmp_path / "out")
    assert done.returncode == 0 and done.json["finish_stop"] == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_agrees_with_the_cpu(dtype):
    """Logits and gradients; and sampling, whose steps are CUDA graphs, gives traces."""
    from sample import Sampler
    results = []
    for device in ("cpu", "cuda"):
        model, tokenizer = load_model("tiny", device, dtype, "nf4")
        torch.manual_seed(0)
        add_lora(model, 4, 8, 0.0, ("q_proj", "down_proj"))
        for p in lora_tensors(model).values():
            p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
        logits = model.logits(model(DOCS[0].to(device), DOCS[1]))
        grads = torch.autograd.grad(logits.square().mean(), [p for p in model.parameters() if p.requires_grad])
        results.append([x.float().cpu() for x in (logits, *grads)])
    for got, want in zip(*results):
        assert (got - want).abs().max() <= (1e-2 if dtype == torch.float32 else 0.1) * want.abs().max()
    model.eval()
    assert len(list(Sampler(model, tokenizer, 4).generate([[7, 8, 9]] * 4, max_new_tokens=40))) == 4
