"""extras/online.py: GRPO, OPD and OPSA against hand-computed values and TRL; resuming; that each improves what it aims at."""
import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call, killed_at, rows_of
from safetensors.torch import load_file

from extras import online
from extras.export import model_card
from extras.online import (
    BETA, WEIGHTS, Online, advantages, as_teacher_sees, grpo_weights, judge_rollouts, rollout_loss, token_logprobs, well_formed)
from guard import Verdict
from sample import Sampler
from thinksafe import add_lora, load_model, lora_disabled, lora_tensors
from train import target_hidden_states


class Bigram(torch.nn.Module):
    """A language model of three tokens: the logits of the next token are a row of a table, so every update can be made by hand."""

    def __init__(self, table):
        super().__init__()
        self.hidden = torch.nn.Parameter(torch.tensor(table))
        self.head, self.device, self.mixed = torch.eye(3), torch.device("cpu"), False

    def forward(self, tokens, cu):
        return self.hidden[tokens]


STUDENT, FROZEN = [[1.0, 0.5, -1.0], [0.0, 2.0, 1.0], [0.5, 0.5, 0.0]], [[0.0, 0.5, 0.0], [1.0, 0.0, 1.0], [-1.0, 0.5, 2.0]]


def states(model):
    return lambda items: target_hidden_states(model, items)[0].detach()


def softmax(logits, temperature=1.0):
    e = [math.exp(x / temperature) for x in logits]
    return [x / sum(e) for x in e]


def test_grpo_by_hand():
    """Two rollouts of one prompt, [1, 2] and [0], three tokens in all; every number of the gradient by its formula."""
    student, frozen, T, rewards = Bigram(STUDENT), Bigram(FROZEN), 0.7, [1.9, 0.4]
    items = [{"ids": [0, 1, 2], "n_prompt": 1}, {"ids": [0, 0], "n_prompt": 1}]
    log_p, log_ref = (token_logprobs(states(m), items, m.head, T, 1) for m in (student, frozen))
    weights, kls = grpo_weights(advantages(torch.tensor(rewards), 2), log_p, log_ref)
    items = [{**item, "ce_weight": w} for item, w in zip(items, weights)]
    (rollout_loss(student, items, states(frozen), temperature=T)[0] / 3).backward()

    mean = sum(rewards) / 2
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards))                       # of two: n - 1 = 1
    want, want_kl = torch.zeros(3, 3), []
    for i, transitions in enumerate([[(0, 1), (1, 2)], [(0, 0)]]):
        for x, y in transitions:
            p, q = softmax(STUDENT[x], T), softmax(FROZEN[x], T)
            r = q[y] / p[y]
            w = ((rewards[i] - mean) / (std + 1e-4) + 0.04 * (r - 1)) / len(transitions) / 2
            want_kl.append(r - math.log(r) - 1)
            for j in range(3):
                want[x, j] += w * (p[j] - (j == y)) / T
    torch.testing.assert_close(student.hidden.grad, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(kls), torch.tensor(want_kl), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["opd", "opsa"])
def test_distillation_by_hand(method):
    """One rollout of three tokens; reverse KL, and for OPSA half of either, its teacher under a longer prompt. fp64 autograd."""
    student, teacher = Bigram(STUDENT), Bigram(FROZEN)
    item = {"ids": [0, 1, 2, 1], "n_prompt": 1, **WEIGHTS[method]}
    seen = [0, 1, 2]                                                             # what the targets follow
    if method == "opsa":
        item["hinted"], seen = [2, 2], [2, 1, 2]
    (rollout_loss(student, [item], lambda items: states(teacher)(list(map(as_teacher_sees, items))), teacher.head)[0] / 3).backward()
    z = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=True)
    log_p, log_q = z[[0, 1, 2]].log_softmax(1), torch.tensor(FROZEN, dtype=torch.float64)[seen].log_softmax(1)
    forward, reverse = (log_q.exp() * (log_q - log_p)).sum(1), (log_p.exp() * (log_p - log_q)).sum(1)
    (reverse if method == "opd" else 0.5 * forward + 0.5 * reverse).mean().backward()
    torch.testing.assert_close(student.hidden.grad.double(), z.grad, rtol=1e-5, atol=1e-6)
    p, q = softmax(STUDENT[0]), softmax(FROZEN[seen[0]])
    assert reverse[0].item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q)))


def test_parts_of_the_loss():
    """Examples of every kind in one pass; KL and reverse KL are told without their weights, and cross-entropy with its own."""
    student, frozen = Bigram(STUDENT), Bigram(FROZEN)
    kinds = [{"ce_weight": torch.tensor([2.0, -1.0])}, {"kl_weight": 0.25}, {"reverse_kl_weight": 3.0}, {"ce_weight": 1.0}]
    items = [{"ids": [0, 1, 2], "n_prompt": 1, **kind} for kind in kinds]
    loss, ce, kl, reverse = rollout_loss(student, items, states(frozen))
    nll = -torch.tensor([math.log(softmax(STUDENT[0])[1]), math.log(softmax(STUDENT[1])[2])])
    both = [(softmax(STUDENT[x]), softmax(FROZEN[x])) for x in (0, 1)]
    forward, back = (sum(a * math.log(a / b) for p, q in both for a, b in zip(*f(p, q))) for f in (lambda p, q: (q, p), lambda p, q: (p, q)))
    torch.testing.assert_close(ce, 2 * nll[0] - nll[1] + nll.sum())
    torch.testing.assert_close(torch.stack((kl, reverse)), torch.tensor([forward, back]))
    torch.testing.assert_close(loss.detach(), ce + 0.25 * kl + 3 * reverse)


# ---------------------------------------------------------------------------------------------
# GRPO against TRL's formula, and TRL itself

T = 0.7


@pytest.fixture
def grpo_batch(folders):
    """A small model, another one as reference, and 2 prompts x 4 rollouts of different lengths, with rewards."""
    gen = torch.Generator().manual_seed(0)
    model, reference = (load_model(folders("qwen3")[1], "cpu", torch.float32)[0] for _ in range(2))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.03 * torch.randn(p.shape, generator=gen)
    model.requires_grad_(True)
    items = [{"ids": [5 + i // 4, 9, 11] + torch.randint(3, 1000, (2 + i % 4,), generator=gen).tolist(), "n_prompt": 3} for i in range(8)]
    return model, reference, items, torch.rand(8, generator=gen) + torch.tensor([0., 1, 1, 0, 1, 1, 1, 1])


def our_gradient(model, reference, items, rewards):
    log_p, log_ref = (token_logprobs(states(m), items, m.head, T, 10) for m in (model, reference))
    weights, _ = grpo_weights(advantages(rewards, 4), log_p, log_ref)
    items = [{**item, "ce_weight": w} for item, w in zip(items, weights)]
    (rollout_loss(model, items, None, temperature=T)[0] / sum(map(len, weights))).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def padded(items):
    """-> prompts (B, 3), completions (B, 5) and their mask, as TRL has them."""
    longest = max(len(item["ids"]) - 3 for item in items)
    done = [item["ids"][3:] for item in items]
    return (torch.tensor([item["ids"][:3] for item in items]), torch.tensor([d + [0] * (longest - len(d)) for d in done]),
            torch.tensor([[1] * len(d) + [0] * (longest - len(d)) for d in done]))


def test_grpo_gradient_is_that_of_trls_formula(grpo_batch):
    """The loss as trl/trainer/grpo_trainer.py (1.16) states it for loss_type "grpo", clipping and all, on our decoder."""
    model, reference, items, rewards = grpo_batch

    def logps(m, item):
        ids = torch.tensor(item["ids"])
        logits = m.logits(m(ids, torch.tensor([0, len(ids)])))[2:-1] / T
        return logits.log_softmax(-1).gather(1, ids[3:, None])[:, 0]
    groups = rewards.view(-1, 4)
    advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    losses = []
    for item, a in zip(items, advantage):
        log_p, log_ref = logps(model, item), logps(reference, item).detach()
        ratio = (log_p - log_p.detach()).exp()
        kl = (log_ref - log_p).exp() - (log_ref - log_p) - 1
        losses.append((-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a) + 0.04 * kl).mean())
    want = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))
    got = our_gradient(model, reference, items, rewards)
    for (name, g), w in zip(got.items(), want):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-5 * w.abs().max().item(), msg=name)


def test_grpo_gradient_is_trls(grpo_batch, folders, tmp_path):
    """GRPOTrainer itself on the same weights and batch; without the correction of the KL that came after the paper's TRL 0.21."""
    trl = pytest.importorskip("trl", reason="trl is not installed (pip install --no-deps trl accelerate)")
    from datasets import Dataset
    model, reference, items, rewards = grpo_batch
    settings = trl.GRPOConfig(str(tmp_path), beta=BETA, epsilon=0.2, loss_type="grpo", temperature=T, num_generations=4, bf16=False, use_cpu=True,
                              use_bias_correction_kl=False, per_device_train_batch_size=8, gradient_checkpointing=False, report_to="none")
    trainer = trl.GRPOTrainer(str(folders("qwen3")[1]), lambda completions, **_: [0.0] * len(completions), settings, Dataset.from_list([{"prompt": "a"}] * 8))
    trainer.current_gradient_accumulation_steps = 1
    hf, ours = trainer.model, dict(model.named_parameters())
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.copy_(ours[name.removeprefix("model.")])
    prompts, done, mask = padded(items)
    ids, seen, groups = torch.cat((prompts, done), 1), torch.cat((torch.ones_like(prompts), mask), 1), rewards.view(-1, 4)
    log_ref = trainer._get_per_token_logps_and_entropies(trainer.ref_model, ids, seen, done.shape[1])[0]
    advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    trainer._compute_loss(hf, {"prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": done, "completion_mask": mask,
                               "advantages": advantage, "ref_per_token_logps": log_ref.detach()}).backward()
    got = our_gradient(model, reference, items, rewards)
    for name, p in hf.named_parameters():
        torch.testing.assert_close(got[name.removeprefix("model.")], p.grad, rtol=2e-3, atol=2e-5 * p.grad.abs().max().item(), msg=name)


# ---------------------------------------------------------------------------------------------
# Rewards and rollouts


def test_format_and_advantages():
    good, opened = "<think>\na\n</think>\n\nb", "a\n</think>\n\nb"
    assert well_formed(good)
    assert not any(map(well_formed, (opened, "b", "<think>a", "</think><think>", good + "<think>", good + good, good + "</think>")))
    assert not any(well_formed("<think>\n" + text) for text in (good, "b", opened + "</think>"))        # a template has written <think>
    got = advantages(torch.tensor([2.0, 1, 1, 2, 1.5, 1.5, 1.5, 1.5]), 4)
    std = math.sqrt(1 / 3)
    torch.testing.assert_close(got, torch.tensor([1.0, -1, -1, 1, 0, 0, 0, 0]) * 0.5 / (std + 1e-4))


def test_reward_is_probability_of_safe_plus_format():
    """No verdict is no reward; the guard sees the prompt as asked and the whole trace."""
    seen = []

    class Fake:
        def judge(self, pairs):
            seen.extend(pairs)
            return [Verdict("unsafe", 0.75, None, 7), Verdict("unknown", None, "no_verdict", 5), Verdict("safe", 0.0, None, 4)]
    items = [{"instruction": "Q", "response": "<think>\n" + text} for text in ("a</think>b", "a</think>b", "never closed")]
    rewards, metrics = judge_rollouts(items, Fake())
    torch.testing.assert_close(rewards, torch.tensor([1.25, 1.0, 1.0]))
    assert seen[0] == ("Q", "<think>\na</think>b")
    assert metrics == {"reward": pytest.approx(3.25 / 3), "p_safe": pytest.approx(1.25 / 3), "format": pytest.approx(2 / 3), "guard_tokens": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sampler_sees_what_the_optimizer_did_to_lora(folders, dtype):
    """One Sampler, LoRA changed in place beneath it (on a CPU in bf16 the base weights lie packed): its most likely tokens are those
    that the trainer finds, before and after."""
    model, tokenizer = load_model(folders("qwen3")[1], "cpu", dtype)
    torch.manual_seed(0)
    add_lora(model, 4, 8, 0.0, ("q_proj", "v_proj", "up_proj"))
    sampler, prompt, seen = Sampler(model, tokenizer, 4), [5, 6, 7], []
    for _ in range(2):
        c, = sampler.generate([prompt], 24, 0)
        item = {"ids": prompt + c.tokens, "n_prompt": 3}
        mine, = token_logprobs(states(model), [item], model.head, T, 100)
        logits = model.logits(states(model)([item])) / T
        assert (logits.log_softmax(-1).amax(-1) - mine).max() < (1e-5 if dtype == torch.float32 else 0.1)
        with lora_disabled(model):
            seen.append((token_logprobs(states(model), [item], model.head, T, 100)[0] - mine).abs().max())
        with torch.no_grad():
            for p in lora_tensors(model).values():
                p.normal_(std=0.2)
    assert seen[0] == 0 and seen[1] > 1


def test_draws_belong_to_seed_step_id_and_k(tiny):
    """A prompt's rollouts of a step are the same in another batch, order and number of slots, and others in another step."""
    args = SimpleNamespace(method="opsa", seed=3, slots=4, pack_tokens=1000, hint=None)
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 40}
    method = Online(args, 2, {"max_length": 2048}, sampling, *tiny)
    rows, _ = method.encode(rows_of(ROOT / "tiny" / "prompts.jsonl")[:4])

    def texts(rows, step):
        items = method.roll_out(rows, step)
        assert [item["id"] for item in items] == [row["id"] for row in rows for _ in range(2)]
        return {row["id"]: [item["ids"] for item in items if item["id"] == row["id"]] for row in rows}
    first, other = texts(rows, 5), texts(rows, 6)
    method.slots = 64
    again = texts(rows[:0:-1], 5)
    assert all(again[i] == first[i] and first[i][0] != first[i][1] for i in again) and first != other


# ---------------------------------------------------------------------------------------------
# The command

METHODS = {"grpo": ["--guard", "tiny", "--lr", 3e-3, "--batch-size", 4], "opd": ["--teacher", "tiny/teacher", "--lr", 5e-3, "--batch-size", 8, "--epochs", 2],
           "opsa": ["--lr", 3e-3, "--batch-size", 12, "--epochs", 3]}


def prompts(path, n, kind="_harmful"):
    rows = [r for r in rows_of(ROOT / "tiny" / "prompts.jsonl") if r["prompt_label"].endswith(kind)][:n]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def flags_of(method, path, out):
    return [method, "--model", "tiny", "--prompts", path, "--out", out, "--max-new-tokens", 128, *METHODS[method]]


@pytest.mark.parametrize("method, key, n", [("grpo", "reward", 24), ("opd", "reverse_kl", 48), ("opsa", "loss", 36)])
def test_it_improves_what_it_aims_at(tmp_path, method, key, n):
    """First against last third of the steps. What it cost is in the metrics, and the adapter is one that others load."""
    out = tmp_path / "out"
    done = call("extras.online", *flags_of(method, prompts(tmp_path / "prompts.jsonl", n), out), "--warmup", 0)
    assert done.returncode == 0, done.stderr
    steps = rows_of(out / "metrics.jsonl")
    n = len(steps) // 3
    first, last = (sum(row[key] for row in part) / n for part in (steps[:n], steps[-n:]))
    assert len(steps) >= 6 and (last > first + 0.15 if method == "grpo" else last < 0.6 * first)
    assert all(row["generated"] > 0 and row["sample_s"] > 0 for row in steps)
    assert all(("guard_tokens" in row and row["guard_s"] > 0) == (method == "grpo") for row in steps)
    record = json.loads((out / "run.json").read_text())["train"]
    assert record["fingerprint"]["online"] == method
    if method == "grpo":
        assert record["fingerprint"]["rollouts"] == 8
        assert all(abs(row["reward"] - row["p_safe"] - row["format"]) < 1e-5 for row in steps) and steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert len(lora_tensors(load_model(out / "model", "cpu")[0])) == len(load_file(out / "model" / "adapter_model.safetensors"))
    assert f"fine-tuned with {method.upper()}" in str(model_card(out))


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    """Killed between checkpoints and run again: the same rollouts, metrics (time aside) and weights."""
    path = prompts(tmp_path / "prompts.jsonl", 8, "")
    common = ["--batch-size", 2, "--epochs", 2, "--lora-dropout", 0.1, "--rollouts", 2, "--save-every", 3, "--max-new-tokens", 32]

    def result(out):
        rows = [{k: v for k, v in row.items() if not k.endswith("_s") and k != "tokens_per_second"} for row in rows_of(out / "metrics.jsonl")]
        return rows, load_file(out / "model" / "adapter_model.safetensors")
    assert call("extras.online", *flags_of("grpo", path, tmp_path / "a"), *common).returncode == 0
    flags = [*flags_of("grpo", path, tmp_path / "b"), *common]
    assert killed_at("extras.online", flags, tmp_path / "b" / "metrics.jsonl", 4) == -signal.SIGKILL
    assert not (tmp_path / "b" / "model").exists()
    assert call("extras.online", *flags).returncode == 0
    (metrics, weights), (again, got) = result(tmp_path / "a"), result(tmp_path / "b")
    assert metrics == again and len(metrics) == 8 and all(torch.equal(weights[k], got[k]) for k in weights)


def test_prompts_and_guard_of_the_earlier_stages(tmp_path):
    """OUT's own prompts, as they were asked without the instruction; the guard that judged there; every prompt once, with n traces."""
    out = tmp_path / "out"
    call("sample.py", "--prompts", prompts(tmp_path / "prompts.jsonl", 4), "--out", out, "--n", 2, "--max-new-tokens", 40)
    call("guard.py", "--out", out)
    done = call("extras.online", "grpo", "--out", out, "--batch-size", 4, "--rollouts", 2)
    assert done.returncode == 0 and done.json["rows"] == 4 and done.json["steps"] == 1, done.stderr
    fingerprint = json.loads((out / "run.json").read_text())["train"]["fingerprint"]
    assert fingerprint["max_new_tokens"] == 40 and fingerprint["temperature"] == 0.7 and fingerprint["guard"][0] == "tiny"
    done = call("extras.online", "opsa", "--out", out)
    assert done.returncode == 2 and "now it is" in done.stderr


def test_the_student_guards_itself_without_its_adapter(tiny, tmp_path, monkeypatch):
    """--guard self asks the frozen student, however far the adapter has moved."""
    enabled = []

    def watched(rollouts, guard):
        enabled.append(guard.model.layers[0].self_attn.q_proj.enabled)
        return judge_rollouts(rollouts, guard)
    monkeypatch.setattr(online, "judge_rollouts", watched)
    flags = flags_of("grpo", prompts(tmp_path / "prompts.jsonl", 2), tmp_path / "out")
    assert call("extras.online", *flags, "--guard", "self", "--rollouts", 2, "--max-new-tokens", 8).returncode == 0 and enabled == [False]


def test_rollouts_that_hit_the_length_stay(tmp_path):
    out = tmp_path / "out"
    flags = flags_of("grpo", prompts(tmp_path / "prompts.jsonl", 2), out)
    assert call("extras.online", *flags, "--rollouts", 2, "--max-new-tokens", 5).returncode == 0
    row, = rows_of(out / "metrics.jsonl")
    assert row["cut"] == 4 and row["generated"] == 20 and row["format"] == 0


def test_long_prompts_are_skipped(tmp_path):
    path = prompts(tmp_path / "prompts.jsonl", 3)
    with open(path, "a") as f:
        f.write(json.dumps({"instruction": "word " * 3000, "prompt_label": "vanilla_benign"}) + "\n")
    done = call("extras.online", *flags_of("opsa", path, tmp_path / "out"), "--epochs", 1, "--max-new-tokens", 4)
    assert done.json["rows"] == 3 and done.json["skipped"] == {"prompt_too_long": 1}


@pytest.mark.parametrize("flags, message", [
    (["opd"], "name one with the student's tokenizer"), (["opd", "--teacher", "no/such/model"], "no/such/model"),
    (["grpo"], "rewarded by a guard"), (["grpo", "--guard", "no/such/guard"], "no/such/guard"),
    (["grpo", "--guard", "tiny", "--rollouts", 1], "--rollouts 2"), (["grpo", "--guard", "tiny", "--temperature", 0], "--temperature above 0"),
    (["opsa", "--guard", "tiny"], "--guard is for grpo"), (["grpo", "--teacher", "tiny"], "--teacher is for opd"), (["opd", "--hint", "full"], "--hint is for opsa"),
    (["opsa", "--kl"], "--kl"), (["opsa", "--full"], "leave --full out"), (["opsa", "--data", "x.jsonl"], "--data"), (["dpo"], "dpo"), ([], "method"),
])
def test_bad_flags(tmp_path, flags, message):
    path = prompts(tmp_path / "prompts.jsonl", 2)
    done = call("extras.online", *flags, "--model", "tiny", "--out", tmp_path / "out", "--prompts", path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_without_prompts_or_with_another_tokenizer(tmp_path):
    done = call("extras.online", "opsa", "--model", "tiny", "--out", tmp_path / "out")
    assert done.returncode == 2 and "give prompts with --prompts" in done.stderr
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for file in (ROOT / "tiny" / "teacher").iterdir():
        (teacher / file.name).write_bytes(file.read_bytes())
    tokens = json.loads((teacher / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (teacher / "tokenizer.json").write_text(json.dumps(tokens))
    done = call("extras.online", "opd", "--teacher", teacher, "--model", "tiny", "--prompts", prompts(tmp_path / "p.jsonl", 2), "--out", tmp_path / "out")
    assert done.returncode == 2 and "its tokenizer is not the student's" in done.stderr and not (tmp_path / "out").exists()
