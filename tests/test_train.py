"""Masks, packing, loss, schedule, LoRA targets, checkpoints, the memory plan, and what others read."""
import json
import resource
import signal
from types import SimpleNamespace

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
    load_tokenizer,
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
    choose_recompute,
    encode_rows,
    export_trl,
    kept_bytes,
    learning_rate,
    make_optimizer,
    memory_plan,
    model_card,
    pass_loss,
    rendered,
    restore_checkpoint,
    stored_bytes,
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
    losses = pass_loss(model, [i for i in items if i["benign"]], frozen(model))
    assert all(loss == 0 for loss in losses)


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


# ---- the memory plan


def test_memory_plan_by_hand():
    """Three layers of width 10 in bf16, 100 tokens of which 40 are targets, V = 50."""
    head = SimpleNamespace(element_size=lambda: 2, requires_grad=False)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=10, vocab_size=50), head=head, layers=[0] * 3, device=torch.device("cpu"))
    items = [{"ids": [0] * 60, "n_prompt": 40}, {"ids": [0] * 40, "n_prompt": 20}]
    plan = memory_plan(model, items, [5000, 100], "adamw", (30_000, 9_000))
    assert plan["state"] == 5100 * 12                                   # fp32 gradient and two moments
    assert plan["inputs"] == 3 * 100 * 10 * 2
    assert plan["loss"] == 2 * 40 * 10 * 2 + 40 * 50 * 4                # hidden and its gradient; logits in fp32
    assert plan["kept"] == 61_200 + 30_000 + 9_600                      # the loss is larger than half a layer
    assert plan["recomputed"] == 61_200 + 6_000 + 13_500                # a layer and half of it again are larger than the loss
    plan = memory_plan(model, items, [5000, 100], "adamw8bit", (30_000, 9_000), kl=True)
    assert plan["state"] == 5100 * 4 + int(5000 * 2.03125) + 100 * 8    # small tensors keep 32 bits
    assert plan["loss"] == 4 * 40 * 10 * 2 + 2 * 40 * 50 * 4
    head.requires_grad = True
    assert memory_plan(model, items, [5000], "adamw", (0, 0))["loss"] == 9_600 + 3 * 50 * 10 * 4


def test_recomputed_only_where_it_does_not_fit(capsys):
    plan = {"state": 0, "activations": 80, "inputs": 10, "loss": 5, "kept": 90, "recomputed": 30}
    assert not choose_recompute(plan, 1, 10, 100) and choose_recompute(plan, 1, 10, 99)
    assert "recomputed" in capsys.readouterr().out
    assert choose_recompute(plan, 1, 10, 33) and "may not fit" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_optimizer_state_is_as_large_as_planned(optimizer):
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    params = [torch.nn.Parameter(torch.ones(n)) for n in (8192, 4095)]
    opt = make_optimizer(optimizer, params, 0.01, 0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    moments = stored_bytes(v for state in opt.state.values() for key, v in state.items() if torch.is_tensor(v) and v.numel() > 1 and "qmap" not in key)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=1, vocab_size=1), head=torch.ones(1), layers=[], device=torch.device("cpu"))
    assert memory_plan(model, [], [p.numel() for p in params], optimizer, (0, 0))["state"] == moments + 4 * (8192 + 4095)


def peak_bytes(f):
    """Most bytes that the CPU's allocator held during f beyond those before."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        f()
    events = sorted((e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most


def plan_and_step(device, items, full, kl, dtype=torch.float32):
    """-> model, its plan, the bytes of the optimizer's moments, and f() that takes a step (the first makes the moments)."""
    model, _ = load_decoder("tiny", device, dtype)
    if full:
        model.requires_grad_(True)
    else:
        add_lora(model)
    model.train()
    reference = load_decoder("tiny", device, dtype)[0] if full and kl else model
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, sizes = make_optimizer("adamw", params, 1e-4, 0.0), [p.numel() for p in params]

    def step():
        loss = pass_loss(model, items, frozen(reference) if kl else None, reference.head if reference is not model else None)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, memory_plan(model, items, sizes, "adamw", kept_bytes(model, items), kl), 8 * sum(sizes), step


LONG = [trace(i, ("vanilla_harmful", "vanilla_benign")[i % 2], response="<think>\n" + "More of it. " * (20 + 8 * i) + "\n</think>\n\nDone.") for i in range(8)]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kl", [False, True])
def test_memory_plan_is_what_a_step_takes(tiny, full, kl):
    items = encode_rows(LONG, tiny[1], 2048)[0]
    model, plan, moments, step = plan_and_step("cpu", items, full, kl)
    step()
    for model.recompute in (False, True):
        need = plan["recomputed" if model.recompute else "kept"] - moments
        assert 0.95 < need / peak_bytes(step) < 1.3, model.recompute


@pytest.mark.gpu
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kl", [False, True])
def test_memory_plan_is_what_a_gpu_step_takes(tiny, full, kl):
    items = encode_rows(LONG, tiny[1], 2048)[0]
    model, plan, moments, step = plan_and_step("cuda", items, full, kl)
    step()
    for model.recompute in (False, True):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        need, seen = plan["recomputed" if model.recompute else "kept"] - moments, torch.cuda.max_memory_allocated() - before
        # blocks of logits may be as large as plan["loss"], which a small vocabulary does not fill
        assert seen < 1.1 * need and need - plan["loss"] < 1.3 * seen, (model.recompute, need, seen)


# ---- what others read


def test_dry_run_shows_and_writes_nothing(tmp_path):
    rows = [trace(0, instruction="Say \x1b[31m\u202ered\x07 and <|im_end|>\ntrained | no"), trace(1)]
    data = write(tmp_path / "rows.jsonl", rows)
    before = sorted(tmp_path.iterdir())
    done = call("train.py", "--model", "tiny", "--data", data, "--out", tmp_path / "out", "--dry-run", "--epochs", 1, "--batch-size", 2, "--lr", 0.5)
    assert done.returncode == 0 and sorted(tmp_path.iterdir()) == before
    assert "lr              0.5\n" in done.stdout and "memory in GB: weights 0.00" in done.stdout
    assert "trained | The user asks" in done.stdout and done.stdout.rstrip().endswith("<|im_end|>")
    assert not set(done.stdout) & {"\x1b", "\x07", "\u202e"}


def test_an_example_shows_what_is_trained_on(tiny):
    items, _ = encode_rows([trace(0, instruction="Say \x1b[31m\u202ered\nand stop")], tiny[1], 500)
    assert rendered(items[0], tiny[1]).split("\n") == [
        "prompt  | <|im_start|>user", "prompt  | Say \\x1b[31m\\u202ered", "prompt  | and stop<|im_end|>", "prompt  | <|im_start|>assistant", "prompt  | ",
        "trained | <think>", "trained | The user asks 0.", "trained | </think>", "trained | ", "trained | Answer 0.<|im_end|>"]


@pytest.fixture(params=["tiny", "qwen3", "smollm2", "with a bos"])
def any_tokenizer(request, tmp_path):
    if request.param == "smollm2":
        return load_tokenizer(request.getfixturevalue("smollm2"))
    folder = {"qwen3": ROOT.parent / "shared" / "tokenizers" / "qwen3"}.get(request.param, ROOT / "tiny" / "student")
    if not folder.exists():
        pytest.skip("no Qwen3 tokenizer here")
    tokenizer = load_tokenizer(folder)
    if request.param == "with a bos":                            # as Llama's: in the template, and put before any text
        from tokenizers.processors import TemplateProcessing
        tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})
        tokenizer.chat_template = "<|endoftext|>" + tokenizer.chat_template
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)])
        assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def test_rows_for_trl_are_tokenized_to_our_ids(any_tokenizer, tmp_path, capsys):
    """As SFTTrainer does it: prompt, and prompt + completion, each as text; rows whose text holds control tokens are left out."""
    tokenizer = any_tokenizer
    rows = [*ROWS, *(trace(i, instruction=text) for i, text in enumerate((" spaces \n", "naïve 漢字 🙂", "12345 + 678", "line\r\nline", "{prompt}"), 20))]
    bad = [trace(30, instruction=f"Say {tokenizer.eos_token} now"), {**trace(31), "response": f"<think>\nx\n</think>\n\n{tokenizer.eos_token} no"}]
    items = encode_rows(rows + bad, tokenizer, 4096)[0]
    assert len(items) == len(rows) + 2
    export_trl(tmp_path / "trl.jsonl", items, tokenizer)
    assert "left out 2 " in capsys.readouterr().out
    written = rows_of(tmp_path / "trl.jsonl")
    assert len(written) == len(rows)
    for row, item in zip(written, items):
        assert row.keys() == {"prompt", "completion"} and row["completion"].endswith(tokenizer.eos_token)
        assert tokenizer(row["prompt"])["input_ids"] == item["ids"][:item["n_prompt"]]
        assert tokenizer(row["prompt"] + row["completion"])["input_ids"] == item["ids"]


def test_export_is_a_flag_that_does_not_train(tmp_path):
    data = write(tmp_path / "rows.jsonl", ROWS)
    done = call("train.py", "--model", "tiny", "--data", data, "--out", tmp_path / "out", "--export", "trl")
    assert done.returncode == 0 and [p.name for p in (tmp_path / "out").iterdir()] == ["trl.jsonl"]
    assert len(rows_of(tmp_path / "out" / "trl.jsonl")) == len(ROWS)


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


def test_model_card(tmp_path):
    """Counts by label, recipe and base; results only if they are of this model."""
    out = tmp_path / "out"
    data = write(tmp_path / "rows.jsonl", [*ROWS, trace(50, response_label="unsafe")])
    call("train.py", "--model", "tiny", "--data", data, "--out", out, "--epochs", 2, "--lr", 0.001)
    card = (out / "model" / "README.md").read_text()
    assert card == model_card(out) and "11 rows: `rows.jsonl`. Left out: 1 unsafe." in card and str(tmp_path) not in card
    for line in ("| vanilla_harmful | 4 |", "| adversarial_benign | 4 |", "| lr | 0.001 |", "library_name: peft", "None here yet."):
        assert line in card
    done = call("eval.py", "--out", out, "--limit", 2, "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    card = (out / "model" / "README.md").read_text()
    assert card == model_card(out) and "| over_refusal | " in card and "None here yet" not in card
    run = json.loads((out / "run.json").read_text())
    run["eval"]["identity"]["after"] = "another"
    (out / "run.json").write_text(json.dumps(run))
    assert "None here yet" in model_card(out)
