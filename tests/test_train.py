"""Masks, packing, loss, schedule, LoRA targets, checkpoints."""
import json
import resource
import signal

import pytest
import torch
from conftest import ROOT, call, killed_at, rows_of
from safetensors.torch import load_file

from thinksafe import (
    InputError,
    add_lora,
    encode_prompt,
    load_decoder,
    load_state,
    lora_off,
    lora_tensors,
    save_state,
    split_packs,
)
from train import (
    TINY_RECIPE,
    batches,
    cached_reference,
    checkpoint_tensors,
    encode_rows,
    learning_rate,
    make_optimizer,
    pass_loss,
    restore_checkpoint,
    target_states,
)


def trace(i, label="vanilla_harmful", **more):
    return {"id": str(i), "instruction": f"Question {i}?", "prompt_label": label,
            "response": f"<think>\nThe user asks {i}." + " More." * (i % 5) + f"\n</think>\n\nAnswer {i}.", **more}


ROWS = [trace(i, ("vanilla_harmful", "adversarial_benign", "vanilla_benign")[i % 3]) for i in range(11)]


@pytest.fixture
def model_and_items(folders):
    model, tokenizer = load_decoder(folders("qwen3")[1], "cpu", torch.float32)
    torch.manual_seed(0)
    add_lora(model, 4, 8, 0.0, ("q_proj", "v_proj", "up_proj"))
    for p in lora_tensors(model).values():
        p.normal_(std=0.1)
    return model, tokenizer, encode_rows(ROWS, tokenizer, 2048)[0]


def test_ids_are_prompt_response_eos(model_and_items):
    _, tokenizer, items = model_and_items
    for row, item in zip(ROWS, items):
        assert item["ids"][:item["n_prompt"]] == encode_prompt(tokenizer, row["instruction"])
        assert tokenizer.decode(item["ids"][item["n_prompt"]:]) == row["response"] + "<|im_end|>"
        assert item["ids"][-1] == tokenizer.eos_token_id


def test_what_is_not_trained_on(model_and_items):
    tokenizer = model_and_items[1]
    rows = [trace(0), trace(1, response_label="unsafe"), trace(2, response_label="unknown", reason="no_verdict"), trace(3, keep=False, response_label="safe"),
            trace(4, finish_reason="length"), {**trace(5), "response": "<think>\nnever closed"}, {**trace(6), "response": " "},
            {**trace(7), "response": "<think>\nx\n</think>\n\n" + "long " * 600}, trace(8, keep=True), trace(9, response_label="safe"),
            trace(10, keep="true"), trace(11, keep=True, response_label="unsafe"), trace(12, finish_reason=None)]
    items, left_out = encode_rows(rows, tokenizer, 500)
    assert [item["id"] for item in items] == ["0", "8", "9"]
    assert left_out == {"unsafe": 2, "no_verdict": 1, "not_kept": 2, "length": 1, "unclosed_think": 1, "empty": 1, "too_long": 1, "unfinished": 1}


def frozen(model):
    """The reference of `pass_loss`: the model itself with its LoRA off."""
    def reference(items):
        with torch.no_grad(), lora_off(model):
            return target_states(model, items)[0]
    return reference


def by_hand(model, items, kl):
    """The loss of a step in one plain sentence per row: CE, or KL to the base model on benign rows, summed over the response."""
    total = 0
    for item in items:
        ids, cu = torch.tensor(item["ids"]), torch.tensor([0, len(item["ids"])])
        at = torch.arange(item["n_prompt"] - 1, len(ids) - 1)
        log_p = model.logits(model(ids, cu))[at].log_softmax(-1)
        if kl and item["benign"]:
            with lora_off(model), torch.no_grad():
                log_ref = model.logits(model(ids, cu))[at].log_softmax(-1)
            total = total + (log_ref.exp() * (log_ref - log_p)).sum()
        else:
            total = total - log_p.gather(1, ids[at + 1][:, None]).sum()
    return total


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("pack_tokens", [1, 150, 10**6])
def test_packed_loss_and_gradient_equal_row_by_row(model_and_items, kl, pack_tokens):
    model, _, items = model_and_items
    params = [p for p in model.parameters() if p.requires_grad]
    want = by_hand(model, items, kl)
    grads = torch.autograd.grad(want, params)
    packs = split_packs(items, lambda item: len(item["ids"]), pack_tokens)
    assert sorted(i["id"] for part in packs for i in part) == sorted(i["id"] for i in items)
    losses = [pass_loss(model, part, frozen(model) if kl else None) for part in packs]
    total = sum(loss[0] for loss in losses)
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sum(loss[1] + loss[2] for loss in losses), want.detach(), rtol=1e-5, atol=1e-4)
    total.backward()
    for p, g in zip(params, grads):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-3)
        p.grad = None


def test_recomputed_activations_give_the_same_gradients(model_and_items):
    model, _, items = model_and_items
    params = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(pass_loss(model, items, frozen(model))[0], params)
    model.recompute = True
    got = torch.autograd.grad(pass_loss(model, items, frozen(model))[0], params)
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_split_packs():
    assert split_packs([5, 5, 5, 30, 1, 9], int, 10) == [[5, 5], [5], [30], [1, 9]] and split_packs([], int, 10) == []


def test_full_training_has_the_reference_of_the_frozen_head(folders, model_and_items):
    """KL of --full after the student (head included) has moved: against the untouched copy, by hand."""
    items = [i for i in model_and_items[2] if i["benign"]]
    student, reference = (load_decoder(folders("qwen3")[1], "cpu", torch.float32)[0] for _ in range(2))
    with torch.no_grad():
        for p in student.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    want = 0
    for item in items:
        ids, cu = torch.tensor(item["ids"]), torch.tensor([0, len(item["ids"])])
        log_p, log_ref = (m.logits(m(ids, cu))[item["n_prompt"] - 1:-1].log_softmax(-1) for m in (student, reference))
        want += (log_ref.exp() * (log_ref - log_p)).sum()
    torch.testing.assert_close(pass_loss(student, items, frozen(reference), reference.head)[0], want, rtol=1e-4, atol=1e-4)


def test_loss_equals_transformers(folders, model_and_items):
    """Without an adapter, the step's loss is that of transformers with -100 on the prompt."""
    hf, folder = folders("qwen3")
    model, _ = load_decoder(folder, "cpu", torch.float32)
    items = model_and_items[2]
    total = pass_loss(model, items)[0]
    n, want = 0, 0
    for item in items:
        ids = torch.tensor(item["ids"])[None]
        labels = ids.clone()
        labels[:, :item["n_prompt"]] = -100
        k = int((labels != -100).sum())
        want, n = want + hf(ids, labels=labels).loss * k, n + k
    torch.testing.assert_close(total / n, want / n, rtol=1e-5, atol=1e-5)


def test_kl_to_itself_is_zero(model_and_items):
    model, _, items = model_and_items
    for p in lora_tensors(model).values():
        p.zero_()
    loss, ce, kl = pass_loss(model, [i for i in items if i["benign"]], frozen(model))
    assert loss == ce == kl == 0


@pytest.mark.parametrize("pack_tokens", [1, 10**6])
def test_cached_reference_is_the_reference(model_and_items, tmp_path, pack_tokens):
    model, _, items = model_and_items
    path, live, identity = tmp_path / "reference.safetensors", frozen(model), {"model": "a", "rows": "b"}
    cached = cached_reference(path, live, items, pack_tokens, 1, identity)
    benign = [i for i in items if i["benign"]][::-1]
    torch.testing.assert_close(cached(benign), live(benign))
    written = path.read_bytes()
    again = cached_reference(path, live, items, pack_tokens, 1, identity)
    assert torch.equal(again(benign), cached(benign)) and path.read_bytes() == written
    with pytest.raises(InputError, match="another model"):
        cached_reference(path, live, items, pack_tokens, 1, {"model": "c", "rows": "b"})
    path.write_bytes(written[:-5])
    with pytest.raises(InputError, match="damaged"):
        cached_reference(path, live, items, pack_tokens, 1, identity)
    with pytest.raises(InputError, match="are needed"):
        cached_reference(tmp_path / "new", live, items, pack_tokens, 1e-9, identity)
    assert [p.name for p in tmp_path.iterdir()] == ["reference.safetensors"]


def test_cached_reference_that_was_not_finished(model_and_items, tmp_path):
    """Stopped, killed, or on a full disk: no part of a file is taken for the whole, and no room stays taken."""
    model, _, items = model_and_items
    path, live, calls = tmp_path / "reference.safetensors", frozen(model), []

    def stopped(part):
        calls.append(part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return live(part)
    with pytest.raises(KeyboardInterrupt):
        cached_reference(path, stopped, items, 1, 1, {})
    assert not list(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(InputError, match="make room"):
            cached_reference(path, live, items, 1, 1, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    path.with_name(path.name + ".tmp").write_bytes(b"what a killed process left" * 10**4)
    cached = cached_reference(path, live, items, 1, 1, {})
    benign = [i for i in items if i["benign"]]
    torch.testing.assert_close(cached(benign), live(benign))


def test_training_with_a_cached_reference(tmp_path):
    """The same losses as without, and a cache of other rows is refused."""
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "cached"
    flags = ["--model", "tiny", "--epochs", 3, "--batch-size", 4, "--kl"]
    call("train.py", *flags, "--data", data, "--out", tmp_path / "live")
    assert call("train.py", *flags, "--data", data, "--out", out, "--cache-reference", 1).returncode == 0
    for a, b in zip(rows_of(tmp_path / "live" / "metrics.jsonl"), rows_of(out / "metrics.jsonl")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
    (out / "metrics.jsonl").unlink()
    done = call("train.py", *flags, "--data", write(tmp_path / "fewer.jsonl", ROWS[:-1]), "--out", out, "--cache-reference", 1)
    assert done.returncode == 2 and "reference.safetensors was made by another model or from other rows" in done.stderr


def test_batches_cover_every_row_once_per_epoch():
    steps = list(batches(10, 4, 3, seed=1))
    assert [len(s) for s in steps] == [4, 4, 2] * 3
    epochs = [sum(steps[i:i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1]
    assert steps == list(batches(10, 4, 3, seed=1)) != list(batches(10, 4, 3, seed=2))


@pytest.mark.parametrize("steps, warmup", [(100, 0.1), (7, 0.1), (33, 0.0)])
def test_schedule_is_that_of_transformers(steps, warmup):
    import math

    from transformers import get_cosine_schedule_with_warmup
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(steps * warmup), steps)
    for step in range(steps):
        assert learning_rate(step, steps, 3.0, warmup) == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("flags", [[], ["--kl"], ["--full"], ["--full", "--kl"], ["--merge"]])
def test_train_writes_a_model_that_others_load(tmp_path, flags):
    data = write(tmp_path / "rows.jsonl", ROWS)
    done = call("train.py", "--model", "tiny", "--data", data, "--out", tmp_path / "out", "--epochs", 2, "--batch-size", 4, "--lr", 1e-3, *flags)
    steps = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert done.json["steps"] == len(steps) == 6
    if "--kl" not in flags:                              # with it, how much of a step is cross-entropy depends on its rows
        assert sum(s["loss"] for s in steps[3:]) < sum(s["loss"] for s in steps[:3])
    model, tokenizer = load_decoder(tmp_path / "out" / "model", "cpu", torch.float32)
    ids = torch.tensor(encode_prompt(tokenizer, "Hello"))
    ours = model.logits(model(ids, torch.tensor([0, len(ids)])))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    if flags and flags[0] in ("--full", "--merge"):
        hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").float()
    else:
        hf = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "student").float(), tmp_path / "out" / "model")
    torch.testing.assert_close(ours, hf(ids[None]).logits[0], rtol=1e-3, atol=1e-3)
    base, _ = load_decoder("tiny", "cpu", torch.float32)
    assert (base.logits(base(ids, torch.tensor([0, len(ids)]))) - ours).abs().max() > 1e-2


def test_kl_metrics_and_first_step(tmp_path):
    """At the first step student and reference are the same model: its KL is 0 up to rounding, its lr 0 as in transformers' schedule."""
    data = write(tmp_path / "rows.jsonl", [r for r in ROWS if "benign" in r["prompt_label"]])
    call("train.py", "--model", "tiny", "--data", data, "--out", tmp_path / "out", "--epochs", 3, "--batch-size", 4, "--kl")
    steps = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert abs(steps[0]["kl"]) < 1e-5 and all(s["ce"] == 0 for s in steps) and steps[0]["lr"] == 0


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_optimizer_state_survives_a_checkpoint(optimizer, tmp_path):
    """Three steps, saved, restored into a fresh optimizer: the fourth step is the same bit for bit."""
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")

    def fresh():
        params = {name: torch.nn.Parameter(torch.linspace(-1, 1, 64 * 128).view(64, 128)) for name in "ac"}    # two 8-bit states
        params["b"] = torch.nn.Parameter(torch.ones(7))
        return params, make_optimizer(optimizer, list(params.values()), 0.01, 0.0)

    def step(params, opt, i):
        for j, p in enumerate(params.values()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + j))
        opt.step()
    params, opt = fresh()
    for i in range(3):
        step(params, opt, i)
    save_state(tmp_path / "state", checkpoint_tensors(params, opt), {"step": 3})
    step(params, opt, 3)
    saved, meta = load_state(tmp_path / "state")
    assert meta == {"step": 3}
    again, opt2 = fresh()
    restore_checkpoint(again, opt2, saved)
    step(again, opt2, 3)
    assert all(torch.equal(params[k], again[k]) for k in params)


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    """Killed at a checkpoint and inside an interval, then run again: the same weights and metrics (time aside)."""
    data = write(tmp_path / "rows.jsonl", ROWS)
    common = ["--model", "tiny", "--data", data, "--epochs", 10, "--batch-size", 3, "--lora-dropout", 0.1, "--kl"]
    call("train.py", *common, "--out", tmp_path / "a", "--save-every", 1000)

    def metrics_of(out):
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows_of(out / "metrics.jsonl")]
    weights, metrics = load_file(tmp_path / "a" / "model" / "adapter_model.safetensors"), metrics_of(tmp_path / "a")
    assert len(metrics) == 40
    for seen in (7, 10):
        out = tmp_path / f"killed at {seen}"
        flags = [*common, "--out", out, "--save-every", 5]
        assert killed_at("train.py", flags, out / "metrics.jsonl", seen) == -signal.SIGKILL
        assert len(rows_of(out / "metrics.jsonl")) < 40 and (out / "checkpoint.safetensors").exists() and not (out / "model").exists()
        assert call("train.py", *flags).returncode == 0
        assert metrics_of(out) == metrics
        got = load_file(out / "model" / "adapter_model.safetensors")
        assert got.keys() == weights.keys() and all(torch.equal(weights[k], got[k]) for k in weights)


def test_tiny_recipe_targets_exist(tiny):
    add_lora(load_decoder("tiny", "cpu")[0], targets=tuple(TINY_RECIPE["lora_targets"].split(",")))
