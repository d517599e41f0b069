"""Masks, packing, loss, schedule, LoRA targets, checkpoints, memory, and what others read."""
import argparse
import json
import signal

import pytest
import torch
from conftest import ROOT, call, killed_at, rows_of
from safetensors.torch import load_file

import thinksafe
import train
from data.chat import encode_prompt
from thinksafe import InputError, add_lora, balance_packs, load_model, lora_disabled, lora_tensors, split_packs
from extras.perplexity import perplexity
from train import (
    TINY_CONFIG, encode_rows, frozen_reference, learning_rate, load_checkpoint,
    make_batches, make_optimizer, packed_loss)
from training_rows import ROWS, trace, write


@pytest.fixture
def model_and_examples(student_with_lora):
    model, tokenizer = student_with_lora
    return model, tokenizer, encode_rows(ROWS, tokenizer, 2048)[0]


def test_ids_are_prompt_response_eos(model_and_examples):
    _, tokenizer, items = model_and_examples
    for row, item in zip(ROWS, items):
        assert item["ids"][:item["n_prompt"]] == encode_prompt(tokenizer, row["instruction"])
        assert tokenizer.decode(item["ids"][item["n_prompt"]:]) == row["response"] + "<|im_end|>"
        assert item["ids"][-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_what_is_not_trained_on(model_and_examples):
    tokenizer = model_and_examples[1]
    rows = [trace(0), trace(1, response_label="unsafe"), trace(2, response_label="unknown", reason="no_verdict"), trace(3, keep=False, response_label="safe"),
            trace(4, finish_reason="length"), {**trace(5), "response": "<think>\nnever closed"}, {**trace(6), "response": " "},
            {**trace(7), "response": "<think>\nx\n</think>\n\n" + "long " * 600}, trace(8, keep=True), trace(9, response_label="safe"),
            trace(10, keep="true"), trace(11, keep=True, response_label="unsafe"), trace(12, finish_reason=None)]
    items, skipped = encode_rows(rows, tokenizer, 500)
    assert [item["id"] for item in items] == ["0", "8", "9"]
    assert skipped == {"unsafe": 2, "no_verdict": 1, "not_kept": 2, "length": 1, "unclosed_think": 1, "empty": 1, "too_long": 1, "unfinished": 1}


def by_hand(model, items, kl):
    """The loss of a step in one plain sentence per row: CE, or KL to the base model on benign rows, summed over the response."""
    total = 0
    for item in items:
        ids, cu = torch.tensor(item["ids"]), torch.tensor([0, len(item["ids"])])
        at = torch.arange(item["n_prompt"] - 1, len(ids) - 1)
        log_p = model.logits(model(ids, cu))[at].log_softmax(-1)
        if kl and item["benign"]:
            with lora_disabled(model), torch.no_grad():
                log_ref = model.logits(model(ids, cu))[at].log_softmax(-1)
            total = total + (log_ref.exp() * (log_ref - log_p)).sum()
        else:
            total = total - log_p.gather(1, ids[at + 1][:, None]).sum()
    return total


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("pack_tokens", [1, 150, 10**6])
def test_packed_loss_and_gradient_equal_row_by_row(model_and_examples, kl, pack_tokens):
    model, _, items = model_and_examples
    params = [p for p in model.parameters() if p.requires_grad]
    for item in items:
        item.update(ce_weight=1.0 - (kl and item["benign"]), kl_weight=float(kl and item["benign"]))
    want = by_hand(model, items, kl)
    grads = torch.autograd.grad(want, params)
    packs = split_packs(items, lambda item: len(item["ids"]), pack_tokens)
    assert sorted(i["id"] for part in packs for i in part) == sorted(i["id"] for i in items)
    losses = [packed_loss(model, part, frozen_reference(model) if kl else None) for part in packs]
    total = sum(loss[0] for loss in losses)
    torch.testing.assert_close(total, want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(sum(loss[1] + loss[2] for loss in losses), want.detach(), rtol=1e-5, atol=1e-4)
    total.backward()
    for p, g in zip(params, grads):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-3)
        p.grad = None


def test_recomputed_activations_give_the_same_gradients(model_and_examples):
    model, tokenizer, _ = model_and_examples
    items, _ = encode_rows(ROWS, tokenizer, 2048, kl=True)
    params = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(packed_loss(model, items, frozen_reference(model))[0], params)
    model.activation_checkpointing = True
    got = torch.autograd.grad(packed_loss(model, items, frozen_reference(model))[0], params)
    assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_batches_cover_every_row_once_per_epoch():
    steps = make_batches(list(range(10)), 4, 3, seed=1)
    assert [len(s) for s in steps] == [4, 4, 2] * 3
    epochs = [sum(steps[i:i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and epochs[0] != epochs[1]
    again, other = (make_batches(list(range(10)), 4, 3, seed) for seed in (1, 2))
    assert steps == again != other


def test_a_checkpoint_of_another_kind_of_step_is_taken(tmp_path, model_and_examples):
    """AdamW is one fused step on a GPU, and was not before: neither is damage, and the optimizer stays as it is here."""
    from train import load_checkpoint, make_optimizer, save_checkpoint
    p = {"a": torch.nn.Parameter(torch.ones(3))}
    p["a"].grad = torch.ones(3)
    row = {"step": 1, "loss": 1.0, "ce": 1.0, "kl": 0.0, "reverse_kl": 0.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 3, "targets": 3, "tokens_per_second": 9}
    for kinds in ((True, None), (None, True)):
        saved, mine = (torch.optim.AdamW(p.values(), lr=0.1, betas=(0.9, 0.999), weight_decay=0.0, fused=kind) for kind in kinds)
        saved.step()
        save_checkpoint(tmp_path / "checkpoint.pt", p, saved, {}, [row])
        (tmp_path / "metrics.jsonl").write_text("")
        assert load_checkpoint(tmp_path / "checkpoint.pt", p, mine, {}) == [row]
        assert mine.param_groups[0]["fused"] == kinds[1] and mine.state[p["a"]]["exp_avg"].norm() > 0
    assert make_optimizer("adamw", p.values(), 0.1, 0.0).param_groups[0]["fused"] is None


def test_balanced_packs():
    rows = [5, 5, 5, 30, 1, 9]
    packs = balance_packs(rows, int, 30)
    assert sorted(sum(packs, [])) == sorted(rows) and [sum(pack) for pack in packs] == [30, 25]
    assert balance_packs(rows, int, 100) == [rows] and balance_packs([], int, 10) == []         # one pass keeps the order
    assert sorted(map(sum, balance_packs([1045] * 16, int, 16384))) == [8 * 1045] * 2           # not 15 rows and 1
    assert balance_packs([7, 6, 6, 5], int, 12) == [[7, 5], [6, 6]]
    assert sorted(sum(pack) for pack in balance_packs([99, 1, 1, 1], int, 10)) == [3, 99]        # longer than a pass: alone


def test_split_packs():
    assert split_packs([5, 5, 5, 30, 1, 9], int, 10) == [[5, 5], [5], [30], [1, 9]] and split_packs([], int, 10) == []


def test_full_training_has_the_reference_of_the_frozen_head(folders, model_and_examples):
    """KL of --full after the student (head included) has moved: against the untouched copy, by hand."""
    items = [i for i in encode_rows(ROWS, model_and_examples[1], 2048, kl=True)[0] if i["benign"]]
    student, reference = (load_model(folders("qwen3")[1], "cpu", torch.float32)[0] for _ in range(2))
    with torch.no_grad():
        for p in student.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    want = 0
    for item in items:
        ids, cu = torch.tensor(item["ids"]), torch.tensor([0, len(item["ids"])])
        log_p, log_ref = (m.logits(m(ids, cu))[item["n_prompt"] - 1:-1].log_softmax(-1) for m in (student, reference))
        want += (log_ref.exp() * (log_ref - log_p)).sum()
    torch.testing.assert_close(packed_loss(student, items, frozen_reference(reference), reference.head)[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_full_training_computes_in_bfloat16_where_that_is_the_device_s(tmp_path, monkeypatch, model_and_examples, dtype):
    """On fp32 weights with fp32 gradients, the frozen student likewise: near fp32's loss, and no KL before the first step."""
    monkeypatch.setattr(train, "default_dtype", lambda device: dtype)
    args = argparse.Namespace(model="tiny", full=True, quantize=None, out=tmp_path, seed=0, device="cpu", dtype="auto", **dict.fromkeys(TINY_CONFIG))
    model, tokenizer, _ = train.load_student(args, {})
    frozen = train.frozen_student(args, model)
    assert model.mixed == frozen.mixed == (dtype == torch.bfloat16) and frozen is not model and model.head.dtype == torch.float32
    items = encode_rows(ROWS, tokenizer, 2048, kl=True)[0]
    losses = packed_loss(model, items, frozen_reference(frozen), frozen.head)
    losses.total.backward()
    assert losses.kl == 0 and all(p.grad.dtype == torch.float32 and p.grad.norm() > 0 for p in model.parameters())
    want = packed_loss(load_model("tiny", "cpu", torch.float32)[0], encode_rows(ROWS, tokenizer, 2048)[0][:1]).total.item()
    got = packed_loss(model, encode_rows(ROWS, tokenizer, 2048)[0][:1]).total.item()
    assert 0 < abs(got / want - 1) < 0.02 if model.mixed else got == pytest.approx(want, rel=1e-6)


def test_loss_equals_transformers(folders, model_and_examples):
    """Without an adapter, the step's loss is that of transformers with -100 on the prompt."""
    hf, folder = folders("qwen3")
    model, _ = load_model(folder, "cpu", torch.float32)
    items = model_and_examples[2]
    total = packed_loss(model, items)[0]
    n, want = 0, 0
    for item in items:
        ids = torch.tensor(item["ids"])[None]
        labels = ids.clone()
        labels[:, :item["n_prompt"]] = -100
        k = int((labels != -100).sum())
        want, n = want + hf(ids, labels=labels).loss * k, n + k
    torch.testing.assert_close(total / n, want / n, rtol=1e-5, atol=1e-5)


def test_kl_to_itself_is_zero(model_and_examples):
    model, tokenizer, _ = model_and_examples
    items, _ = encode_rows(ROWS, tokenizer, 2048, kl=True)
    for p in lora_tensors(model).values():
        p.zero_()
    losses = packed_loss(model, [i for i in items if i["benign"]], frozen_reference(model))
    assert all(loss == 0 for loss in losses)


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


@pytest.mark.parametrize("flags", [[], ["--kl"], ["--full"], ["--full", "--kl"], ["--merge"]])
def test_train_writes_a_model_that_others_load(tmp_path, flags):
    data = write(tmp_path / "rows.jsonl", ROWS)
    done = call("train.py", "--model", "tiny", "--data", data, "--out", tmp_path / "out", "--epochs", 2, "--batch-size", 4, "--lr", 1e-3, *flags)
    steps = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert done.json["steps"] == len(steps) == 6
    if "--kl" not in flags:                              # with it, how much of a step is cross-entropy depends on its rows
        assert sum(s["loss"] for s in steps[3:]) < sum(s["loss"] for s in steps[:3])
    model, tokenizer = load_model(tmp_path / "out" / "model", "cpu", torch.float32)
    ids = torch.tensor(encode_prompt(tokenizer, "Hello"))
    ours = model.logits(model(ids, torch.tensor([0, len(ids)])))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    if flags and flags[0] in ("--full", "--merge"):
        hf = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").float()
    else:
        hf = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ROOT / "tiny" / "student").float(), tmp_path / "out" / "model")
    torch.testing.assert_close(ours, hf(ids[None]).logits[0], rtol=1e-3, atol=1e-3)
    base, _ = load_model("tiny", "cpu", torch.float32)
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
    metrics = [{"step": i + 1, "loss": 1.0, "tokens": 5} for i in range(3)]
    state = {"fingerprint": {"a": 1}, "metrics": metrics, "optimizer": opt.state_dict(), "params": {n: p.detach() for n, p in params.items()}}
    torch.save(state, tmp_path / "state")
    (tmp_path / "metrics.jsonl").write_text("")
    step(params, opt, 3)
    again, opt2 = fresh()
    assert load_checkpoint(tmp_path / "state", again, opt2, {"a": 1}) == metrics
    step(again, opt2, 3)
    assert all(torch.equal(params[k], again[k]) for k in params)
    with pytest.raises(InputError, match="was made with a 1, now it is 2"):
        load_checkpoint(tmp_path / "state", again, opt2, {"a": 2})
    whole = (tmp_path / "state").read_bytes()
    for damaged in (whole[:-100], whole[:len(whole) // 2], b"", b"no checkpoint"):
        (tmp_path / "state").write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            load_checkpoint(tmp_path / "state", again, opt2, {"a": 1})
    for key in ("params", "optimizer", "metrics"):
        torch.save({k: v for k, v in state.items() if k != key}, tmp_path / "state")
        with pytest.raises(InputError, match="damaged"):
            load_checkpoint(tmp_path / "state", again, opt2, {"a": 1})


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    """Killed at a checkpoint and inside an interval, then run again: the same weights and metrics (time aside)."""
    data = write(tmp_path / "rows.jsonl", ROWS)
    common = ["--model", "tiny", "--data", data, "--epochs", 6, "--batch-size", 3, "--lora-dropout", 0.1, "--kl"]
    call("train.py", *common, "--out", tmp_path / "a", "--save-every", 1000)

    def metrics_of(out):
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows_of(out / "metrics.jsonl")]
    weights, metrics = load_file(tmp_path / "a" / "model" / "adapter_model.safetensors"), metrics_of(tmp_path / "a")
    assert len(metrics) == 24
    for seen in (7, 10):
        out = tmp_path / f"killed at {seen}"
        flags = [*common, "--out", out, "--save-every", 5]
        assert killed_at("train.py", flags, out / "metrics.jsonl", seen) == -signal.SIGKILL
        assert len(rows_of(out / "metrics.jsonl")) < 24 and (out / "checkpoint.pt").exists() and not (out / "model").exists()
        assert call("train.py", *flags).returncode == 0
        assert metrics_of(out) == metrics
        got = load_file(out / "model" / "adapter_model.safetensors")
        assert got.keys() == weights.keys() and all(torch.equal(weights[k], got[k]) for k in weights)


def test_tiny_recipe_targets_exist(tiny):
    add_lora(load_model("tiny", "cpu")[0], targets=tuple(TINY_CONFIG["lora_targets"].split(",")))


# ---- what others read


def test_loss_curve_is_that_of_trl(tmp_path):
    """The same rows, order, LoRA weights and schedule: ids, losses and gradient norms are TRL's."""
    pytest.importorskip("trl")
    from bench_train import compare, largest_gap
    runs, same = compare(str(ROOT / "tiny" / "student"), write(tmp_path / "rows.jsonl", ROWS[:8]), tmp_path, steps=6, batch=4, settings=["padded batch"])
    ours, theirs = runs["train.py"][0], runs["padded batch"][0]
    assert same and len(ours) == len(theirs) == 6
    assert ours[5]["loss"] < 0.95 * ours[0]["loss"]
    assert largest_gap(ours, theirs, "loss") < 1e-5 and largest_gap(ours, theirs, "grad_norm") < 1e-4


def test_adapter_has_the_fields_and_names_of_peft_and_vllm(tmp_path):
    data = write(tmp_path / "rows.jsonl", ROWS)
    call("train.py", "--model", "tiny", "--data", data, "--out", tmp_path / "out", "--epochs", 1, "--lora-targets", "q_proj,down_proj", "--lora-r", 8)
    config = json.loads((tmp_path / "out" / "model" / "adapter_config.json").read_text())
    assert config == config | {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["down_proj", "q_proj"], "bias": "none",
                               "base_model_name_or_path": str(ROOT / "tiny" / "student")}
    names = {f"base_model.model.model.layers.{i}.{m}.lora_{ab}.weight" for i in range(4) for m in ("self_attn.q_proj", "mlp.down_proj") for ab in "AB"}
    assert load_file(tmp_path / "out" / "model" / "adapter_model.safetensors").keys() == names


def test_out_of_memory_switches_activation_checkpointing_on(tmp_path, monkeypatch, capsys):
    """The step that ran out is taken again: the same weights as without the error. A second error is the user's."""
    data, losses = write(tmp_path / "rows.jsonl", ROWS), train.packed_loss
    flags = ["--model", "tiny", "--data", data, "--epochs", 2, "--batch-size", 4, "--lora-dropout", 0.1]
    assert call("train.py", *flags, "--out", tmp_path / "a").returncode == 0
    calls = []

    def out_of_memory(model, *args, **options):
        calls.append(model)
        if len(calls) == fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(model, *args, **options)
    monkeypatch.setattr(train, "packed_loss", out_of_memory)
    fail_at = 3
    done = call("train.py", *flags, "--out", tmp_path / "b")
    assert done.returncode == 0 and done.stderr.count("from here on activations are recomputed") == 1
    assert calls[-1].activation_checkpointing and len(calls) == 7
    weights = [load_file(tmp_path / x / "model" / "adapter_model.safetensors") for x in "ab"]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])

    monkeypatch.setattr(train, "packed_loss", lambda *args, **options: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    done = call("train.py", *flags, "--out", tmp_path / "c")
    assert done.returncode == 2 and "use fewer --pack-tokens, --quantize nf4" in done.stderr


def test_perplexity_by_hand(model_and_examples):
    """exp of the mean -log p of a target, of the rows that are asked for."""
    model, _, items = model_and_examples
    nats = [by_hand(model, [item], False).item() for item in items]
    n = [len(item["ids"]) - item["n_prompt"] for item in items]
    found = perplexity(model, items)
    assert found["perplexity"] == pytest.approx(torch.tensor(sum(nats) / sum(n)).exp().item(), rel=1e-5)
    assert found["low"] < found["perplexity"] < found["high"] and (found["rows"], found["tokens"]) == (len(items), sum(n))
    assert perplexity(model, items, max_rows=4)["rows"] == 4


def test_perplexity_of_the_training_set_is_recorded(tmp_path):
    data = write(tmp_path / "rows.jsonl", ROWS)
    done = call("train.py", "--model", "tiny", "--data", data, "--out", tmp_path / "out", "--epochs", 4, "--batch-size", 4, "--lr", 1e-3)
    assert done.returncode == 0
    done = call("extras.perplexity", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "run.json").read_text())["train"]["perplexity"]
    assert found["after"]["perplexity"] < found["before"]["perplexity"]
    assert f"perplexity of the training set: {found['before']['perplexity']:.3f} [" in done.stdout


def test_an_instruction_in_a_prompt_is_found_whatever_its_wording(monkeypatch):
    """Also one of your own with text on both sides of the prompt, and whatever the case and spaces."""
    monkeypatch.setitem(thinksafe.REFUSAL_INSTRUCTIONS, "around", "Before.\n\n{prompt}\n\nDecline it.")
    for wording in thinksafe.REFUSAL_INSTRUCTIONS:
        steered = thinksafe.add_refusal_instruction("How do I bake a cake?", wording)
        for text in (steered, steered.upper().replace(" ", "  ")):
            assert thinksafe.has_refusal_instruction(text) == (wording != "none")
