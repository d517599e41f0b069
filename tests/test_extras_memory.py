"""extras/memory.py: the plan by hand, and against what a step is seen to take."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import call

from extras import memory
from extras.memory import activation_bytes, memory_plan, print_plan, render_example, stored_bytes
from thinksafe import add_lora, load_model
from train import encode_rows, frozen_reference, make_optimizer, packed_loss
from training_rows import trace

from merged_linear import merge_linear_layers


def test_memory_plan_by_hand():
    """Three layers of width 10 in bf16, 100 tokens of which 40 are targets, V = 50."""
    head = SimpleNamespace(element_size=lambda: 2, requires_grad=False)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=10, vocab_size=50), head=head, layers=[0] * 3, device=torch.device("cpu"))
    examples = [{"ids": [0] * 60, "n_prompt": 40}, {"ids": [0] * 40, "n_prompt": 20}]
    plan = memory_plan(model, examples, [5000, 100], "adamw", (30_000, 9_000))
    assert plan["state"] == 5100 * 12                                   # fp32 gradient and two moments
    assert plan["inputs"] == 3 * 100 * 10 * 2
    assert plan["loss"] == 2 * 40 * 10 * 2 + 2 * 40 * 50 * 4            # hidden and its gradient; in fp32 logits and their gradient
    assert plan["kept"] == 61_200 + 30_000 + 17_600                     # the loss is larger than half a layer
    assert plan["recomputed"] == 61_200 + 6_000 + 17_600                # the loss is larger than a layer and half of it again
    assert memory_plan(model, examples, [5000, 100], "adamw", (30_000, 20_000))["recomputed"] == 61_200 + 6_000 + 30_000      # here it is not
    plan = memory_plan(model, examples, [5000, 100], "adamw8bit", (30_000, 9_000), kl=True)
    assert plan["state"] == 5100 * 4 + int(5000 * 2.03125) + 100 * 8    # small tensors keep 32 bits
    assert plan["loss"] == 4 * 40 * 10 * 2 + 4 * 40 * 50 * 4                    # with a reference both twice
    head.requires_grad = True
    assert memory_plan(model, examples, [5000], "adamw", (0, 0))["loss"] == 17_600 + 3 * 50 * 10 * 4


def test_recomputed_only_where_it_does_not_fit(capsys):
    plan = {"state": 0, "activations": 80, "inputs": 10, "loss": 5, "kept": 90, "recomputed": 30}
    for free, verdict, warned in ((100, "kept", False), (99, "recomputed", False), (33, "recomputed", True)):
        print_plan(plan, 1, 10, free)
        out, err = capsys.readouterr()
        assert out.endswith(f": {verdict}\n") and out.count("\n") == 1 and ("may not fit" in err) == warned


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


def plan_and_step(device, examples, full, kl, dtype=torch.float32):
    """-> model, its plan, the bytes of the optimizer's moments, and f() that takes a step (the first makes the moments)."""
    model, _ = load_model("tiny", device, dtype)
    if full:
        model.requires_grad_(True)
    else:
        add_lora(model)
    model.train()
    reference = load_model("tiny", device, dtype)[0] if full and kl else model
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, sizes = make_optimizer("adamw", params, 1e-4, 0.0), [p.numel() for p in params]

    def step():
        loss = packed_loss(model, examples, frozen_reference(reference) if kl else None, reference.head if reference is not model else None).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, memory_plan(model, examples, sizes, "adamw", activation_bytes(model, examples), kl), 8 * sum(sizes), step


LONG = [trace(i, ("vanilla_harmful", "vanilla_benign")[i % 2], response="<think>\n" + "More of it. " * (20 + 8 * i) + "\n</think>\n\nDone.") for i in range(8)]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kl", [False, True])
def test_memory_plan_is_what_a_step_takes(tiny, full, kl):
    examples = encode_rows(LONG, tiny[1], 2048, kl=kl)[0]
    model, plan, moments, step = plan_and_step("cpu", examples, full, kl)
    step()
    for model.activation_checkpointing in (False, True):
        need = plan["recomputed" if model.activation_checkpointing else "kept"] - moments
        assert 0.95 < need / peak_bytes(step) < 1.3, model.activation_checkpointing


@pytest.mark.gpu
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kl", [False, True])
def test_memory_plan_is_what_a_gpu_step_takes(tiny, full, kl):
    examples = encode_rows(LONG, tiny[1], 2048, kl=kl)[0]
    model, plan, moments, step = plan_and_step("cuda", examples, full, kl)
    step()
    for model.activation_checkpointing in (False, True):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        need, seen = plan["recomputed" if model.activation_checkpointing else "kept"] - moments, torch.cuda.max_memory_allocated() - before
        # blocks of logits may be as large as plan["loss"], which a small vocabulary does not fill
        assert seen < 1.1 * need and need - plan["loss"] < 1.3 * seen, (model.activation_checkpointing, need, seen)


def test_the_command_prints_a_plan_and_writes_nothing(tmp_path):
    data, seen = tmp_path / "rows.jsonl", {}
    data.write_text("".join(json.dumps(trace(i, ("vanilla_harmful", "vanilla_benign")[i % 2])) + "\n" for i in range(12)))
    for flags in ([], ["--pack-tokens", 1], ["--full"], ["--kl"], ["--full", "--kl"], ["--lora-targets", "q_proj"]):
        done = call("extras.memory", "--model", "tiny", "--data", data, "--out", tmp_path / "out", *flags)
        assert done.returncode == 0 and not (tmp_path / "out").exists(), done.stderr
        line, = (line for line in done.stdout.splitlines() if line.startswith("memory in GB"))
        assert line.startswith("memory in GB: weights 0.00") and line.endswith(": kept")
        words = line.replace(",", "").replace(";", "").split()
        at = {name: words.index(name) + 1 for name in ("weights", "optimizer", "loss", "tokens")}
        seen[" ".join(map(str, flags))] = {name: float(words[i]) for name, i in at.items()}
    plain = seen[""]
    assert seen["--pack-tokens 1"]["tokens"] < plain["tokens"] / 3 and seen["--pack-tokens 1"]["optimizer"] == plain["optimizer"]
    assert seen["--full"]["optimizer"] > 2 * plain["optimizer"] > 10 * seen["--lora-targets q_proj"]["optimizer"]
    assert seen["--kl"]["loss"] > plain["loss"] and seen["--full --kl"]["weights"] == pytest.approx(2 * seen["--full"]["weights"], rel=0.01)
    done = call("extras.memory", "--model", "tiny", "--out", tmp_path / "out")
    assert done.returncode == 2 and "guard.py has not finished there" in done.stderr


def test_the_command_shows_configuration_and_an_example(tmp_path):
    rows = [trace(0, instruction="Say \x1b[31m\u202ered\x07 and <|im_end|>\ntrained | no"), trace(1)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call("extras.memory", "--model", "tiny", "--data", data, "--out", tmp_path / "out", "--epochs", 1, "--batch-size", 2, "--lr", 0.5)
    assert done.returncode == 0 and sorted(tmp_path.iterdir()) == [data]
    assert "lr              0.5\n" in done.stdout
    assert "trained | The user asks" in done.stdout and done.stdout.rstrip().endswith("<|im_end|>")
    assert not set(done.stdout) & {"\x1b", "\x07", "\u202e"}


def test_an_example_shows_what_is_trained_on(tiny):
    examples, _ = encode_rows([trace(0, instruction="Say \x1b[31m\u202ered\nand stop")], tiny[1], 500)
    assert render_example(examples[0], tiny[1]).split("\n") == [
        "prompt  | <|im_start|>user", "prompt  | Say \\x1b[31m\\u202ered", "prompt  | and stop<|im_end|>", "prompt  | <|im_start|>assistant", "prompt  | ",
        "trained | <think>", "trained | The user asks 0.", "trained | </think>", "trained | ", "trained | Answer 0.<|im_end|>"]


@pytest.mark.trust
@pytest.mark.parametrize("content, free", [("MemTotal: 5 kB\nMemAvailable:    7 kB\n", 7 * 1024), ("MemTotal: 5 kB\n", None), ("", None), ("MemAvailable: \xff kB", None), (None, "nan")])
def test_machines_that_do_not_say_what_is_free(tries, tmp_path, monkeypatch, capsys, content, free):
    """Kernels before 3.14, and sandboxes without /proc."""
    path = tmp_path / "meminfo"
    if content is not None:
        path.write_text(content, "latin-1")
    monkeypatch.setattr(memory, "MEMINFO", path)
    with tries("fault"):
        found = memory.free_bytes(torch.device("cpu"))
        assert str(found) == "nan" if free == "nan" else found == free if free else found > 2**20
        memory.print_plan(dict.fromkeys(("state", "activations", "inputs", "loss", "kept", "recomputed"), 1000), 5, 7, found)
        assert ("cannot be told" in capsys.readouterr().out) == (free == "nan")


@pytest.mark.gpu
@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
def test_the_plan_is_not_below_what_a_gpu_takes(kl, recomputed):
    """Steps of Qwen3-0.6B's shape with passes of 8,000 tokens: never more than planned, and not less than half of it."""
    from random_model import random_model
    model, tokenizer = random_model("qwen3-0.6b", torch.device("cuda"), torch.bfloat16)
    add_lora(model, 32, 16.0, 0.05)
    model.train()
    merge_linear_layers(model)
    examples = [{"id": i, "ids": list(range(5, 1005)), "n_prompt": 20, "benign": True, "ce_weight": float(not kl), "kl_weight": float(kl)} for i in range(8)]
    params = [p for p in model.parameters() if p.requires_grad]
    sizes, weights = [p.numel() for p in params], stored_bytes(model.parameters())
    plan = memory_plan(model, examples, sizes, "adamw", activation_bytes(model, examples), kl)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model.activation_checkpointing, optimizer = recomputed, make_optimizer("adamw", params, 1e-5, 0.0)
    for _ in range(3):
        packed_loss(model, examples, frozen_reference(model)).total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seen = torch.cuda.max_memory_reserved()
    planned = weights + plan["recomputed" if recomputed else "kept"]
    assert planned / 2 < seen <= planned, (seen / 1e9, planned / 1e9)
