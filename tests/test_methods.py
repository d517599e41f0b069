"""The methods beside ThinkSafe: refusals without reasoning, SafePath, SafeKey, retries, the curated sets, the script of all."""
import json
import math
import signal
import subprocess

import pytest
import torch
from conftest import ROOT, call, killed_at, rows_of
from safetensors.torch import load_file

from data import training_rows
from thinksafe import InputError, add_lora, encode_prompt, load_decoder, load_tokenizer, lora_tensors
from tiny import build, world
from train import PRIMER, balanced, encode_rows, pass_loss, safekey_losses

TWO = "<think>\nA question about {i}. That is forbidden! So I refuse.\n</think>\n\nNo, not {i}."


def row(i, label="vanilla_harmful", response=TWO, **more):
    return {"id": str(i), "instruction": f"Question {i}?", "prompt_label": label, "response": response.replace("{i}", str(i)), **more}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "tiny" / "tokenizer")


@pytest.fixture
def opened():
    """A tokenizer whose template opens <think> itself, as R1's does."""
    tokenizer = load_tokenizer(ROOT / "tiny" / "tokenizer")
    tokenizer.chat_template = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant\n{{ '<think>\n' }}"
    return tokenizer


def texts(items, tokenizer):
    """[(prompt, target), ...] as text."""
    return [(tokenizer.decode(i["ids"][:i["n_prompt"]]), tokenizer.decode(i["ids"][i["n_prompt"]:])) for i in items]


# ---- refusals without reasoning

def test_strip_cot(tokenizer, opened):
    rows = [row(1), row(2, "adversarial_benign")]
    (_, refusal), (_, answer) = texts(encode_rows(rows, tokenizer, 2048, "harmful")[0], tokenizer)
    assert refusal == "<think>\n\n</think>\n\nNo, not 1.<|im_end|>" and answer == rows[1]["response"] + "<|im_end|>"
    assert [t for _, t in texts(encode_rows(rows, tokenizer, 2048, "all")[0], tokenizer)] == \
        [f"<think>\n\n</think>\n\nNo, not {i}.<|im_end|>" for i in (1, 2)]
    for response in (TWO, TWO.removeprefix("<think>\n")):              # of another tool, and of sample.py
        (prompt, refusal), = texts(encode_rows([row(1, response=response)], opened, 2048, "harmful")[0], opened)
        assert (prompt + refusal).endswith("assistant\n<think>\n\n</think>\n\nNo, not 1.<|im_end|>")


def test_a_teacher_whose_template_opens_think(tokenizer):
    """Its traces begin inside the reasoning; a student whose template does not is to open it itself."""
    whole, begun = (texts(encode_rows([row(1, response=r)], tokenizer, 2048)[0], tokenizer) for r in (TWO, TWO.removeprefix("<think>\n")))
    assert whole == begun and whole[0][1].startswith("<think>\n")


# ---- SafePath

def test_primer_is_the_whole_target(tokenizer, opened):
    rows = [row(1), row(2, "vanilla_benign"), row(3, "adversarial_harmful", keep=False)]
    items, left_out = encode_rows(rows, tokenizer, 2048, primer=PRIMER)
    assert texts(items, tokenizer) == [(tokenizer.decode(encode_prompt(tokenizer, "Question 1?")), f"<think>\n{PRIMER}")]
    assert left_out == {"benign": 1, "not_kept": 1}
    (prompt, target), = texts(encode_rows(rows, opened, 2048, primer=PRIMER)[0], opened)
    assert prompt.endswith("<think>\n") and target == PRIMER


def test_loss_of_the_primer_by_hand(tiny):
    model, tokenizer = tiny
    item, = encode_rows([row(1)], tokenizer, 2048, primer=PRIMER)[0]
    prompt, target = (tokenizer.encode(t, add_special_tokens=False) for t in
                      ("<|im_start|>user\nQuestion 1?<|im_end|>\n<|im_start|>assistant\n", "<think>\nLet's think about safety first."))
    ids = torch.tensor(prompt + target)
    assert item["ids"] == ids.tolist()
    p = model.logits(model(ids, torch.tensor([0, len(ids)]))).softmax(-1)
    want = -sum(math.log(p[len(prompt) - 1 + i, token]) for i, token in enumerate(target))
    assert pass_loss(model, [item])[0].item() == pytest.approx(want, rel=1e-4)


def test_primer_needs_prompts_only(tmp_path):
    done = call("train.py", "--model", "tiny", "--data", ROOT / "tiny" / "prompts.jsonl", "--primer", "--limit", 8, "--epochs", 2, "--out", tmp_path)
    assert done.json["rows"] == 8 and done.json["left_out"] == {"benign": 600, "not_drawn": 592}
    assert rows_of(tmp_path / "metrics.jsonl")[0]["tokens"] > 0


def test_balanced_choice():
    items = [{"id": i, "label": "abbccccc"[i % 8]} for i in range(80)]
    for n, counts in ((6, [2, 2, 2]), (36, [10, 13, 13]), (75, [10, 20, 45]), (100, [10, 20, 50])):
        chosen = balanced(items, n, 0)
        assert [sum(i["label"] == x for i in chosen) for x in "abc"] == counts
        assert len({i["id"] for i in chosen}) == sum(counts) and chosen == balanced(items, n, 0)
    assert balanced(items, 6, 0) != balanced(items, 6, 1)


# ---- SafeKey

def key_of(tokenizer, the_row):
    """The text before the key sentence, and the sentence."""
    item, = encode_rows([the_row], tokenizer, 2048, safekey=True)[0]
    if "key" not in item:
        return None
    start, end = item["key"]
    return tokenizer.decode(item["ids"][item["n_prompt"]:start]), tokenizer.decode(item["ids"][start:end])


def test_key_sentence_is_the_second_of_the_reasoning(tokenizer, opened):
    assert key_of(tokenizer, row(1)) == ("<think>\nA question about 1.", " That is forbidden!")
    assert key_of(opened, row(1)) == ("A question about 1.", " That is forbidden!")
    odd = 'She asks for 1.5 "漢字?" Über\nmañana... End.'
    assert key_of(tokenizer, row(1, response=f"<think>\n{odd}\n</think>\n\nNo. Never. Ever.")) == ('<think>\nShe asks for 1.5 "漢字?"', " Über\nmañana...")
    for one in ("", "Only one.", "No end", "Only one.\n"):
        assert key_of(tokenizer, row(1, response=f"<think>\n{one}\n</think>\n\nNo. Never.")) is None


def test_key_sentence_by_columns(tokenizer, opened):
    """They count characters of the response as the set has it."""
    text = row(1)["response"]
    for a, b in (("about 1.", "So"), ("about 1. ", "den!"), ("question", "about")):        # with and without the space between
        spans = {"summary_end_idx": text.index(a) + len(a), "next_sentence_end_idx": text.index(b) + len(b)}
        before, key = text[:spans["summary_end_idx"]].rstrip(), text[:spans["next_sentence_end_idx"]]
        assert key_of(tokenizer, row(1, **spans)) == (before, key.removeprefix(before))
        assert key_of(opened, row(1, **spans)) == (before.removeprefix("<think>\n"), key.removeprefix(before))
    for bad in ((None, 5), (9, None), (9, 9), (0, 9), (9, 1000), ("9", 12), (True, 12)):
        with pytest.raises(InputError, match="row 1: summary_end_idx"):
            key_of(tokenizer, row(1, summary_end_idx=bad[0], next_sentence_end_idx=bad[1]))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_safekey_losses_by_hand(folders, family):
    """Against transformers, which masks the prompt in place; then mean, linear head, log of the sigmoid."""
    hf, folder = folders(family)
    model, tokenizer = load_decoder(folder, "cpu", torch.float32)
    items = encode_rows([row(1), row(20, "vanilla_benign"), row(300, "adversarial_harmful")], tokenizer, 2048, safekey=True)[0]
    torch.manual_seed(0)
    heads = torch.nn.ModuleList(torch.nn.Linear(48, 1) for _ in range(2))
    want_key = want_head = 0
    for item in items:
        ids, n, (start, end) = torch.tensor([item["ids"]]), item["n_prompt"], item["key"]
        mask = torch.ones_like(ids)
        mask[:, :n] = 0
        logits = hf(ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None]).logits[0]
        want_key -= sum(logits[t - 1].log_softmax(-1)[item["ids"][t]].item() for t in range(start, end))
        hidden = hf(ids, output_hidden_states=True).hidden_states[-1][0]
        for (w, b), part in zip((h.parameters() for h in heads), (hidden[n:start], hidden[:start])):
            p = torch.sigmoid(w[0] @ (part.sum(0) / len(part)) + b[0]).item()
            want_head -= 0.5 * math.log(1 - p if item["benign"] else p)
    key, head = safekey_losses(model, heads, items)
    assert key.item() == pytest.approx(want_key, rel=1e-4) and head.item() == pytest.approx(want_head, rel=1e-4)
    apart = [safekey_losses(model, heads, [item]) for item in items]                                # packing changes nothing
    assert sum(k.item() for k, _ in apart) == pytest.approx(want_key, rel=1e-4) and sum(h.item() for _, h in apart) == pytest.approx(want_head, rel=1e-4)


def test_safekey_trains_the_model_and_its_heads(folders):
    model, tokenizer = load_decoder(folders("qwen3")[1], "cpu", torch.float32)
    add_lora(model, 4, 8, 0.0)
    for p in lora_tensors(model).values():
        p.normal_(std=0.1)
    heads = torch.nn.ModuleList(torch.nn.Linear(48, 1) for _ in range(2))
    items = encode_rows([row(1), row(2, "vanilla_benign")], tokenizer, 2048, safekey=True)[0]
    for loss in safekey_losses(model, heads, items):
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        model.zero_grad()
    assert all(p.grad.abs().sum() > 0 for p in heads.parameters())


def test_safekey_as_a_command(tmp_path):
    """Both losses in the last two epochs only, 0.2 of each; killed and resumed bit for bit; the adapter has no heads in it."""
    data = tmp_path / "rows.jsonl"
    kinds = ("vanilla_harmful", "vanilla_benign")
    data.write_text("".join(json.dumps(row(i, kinds[i % 2])) + "\n" for i in range(9)) + json.dumps(row(9, response="<think>\nx\n</think>\n\nNo.")) + "\n")
    flags = ["--model", "tiny", "--data", data, "--safekey", "--epochs", 5, "--batch-size", 5, "--save-every", 3]
    done = call("train.py", *flags, "--out", tmp_path / "a")
    assert done.returncode == 0 and "9 rows with a key sentence" in done.stdout
    steps = rows_of(tmp_path / "a" / "metrics.jsonl")
    assert [("masked_key" in s, "harm_head" in s) for s in steps] == [(False, False)] * 6 + [(True, True)] * 4
    assert all(s["loss"] == pytest.approx(s["ce"] + 0.2 * (s.get("masked_key", 0) + s.get("harm_head", 0)), rel=1e-5) for s in steps)
    assert killed_at("train.py", [*flags, "--out", tmp_path / "b"], tmp_path / "b" / "metrics.jsonl", 8) == -signal.SIGKILL
    assert not (tmp_path / "b" / "model").exists() and call("train.py", *flags, "--out", tmp_path / "b").returncode == 0
    a, b = (load_file(tmp_path / x / "model" / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and "lora" in k for k in a)
    last = [{k: v for k, v in rows_of(tmp_path / x / "metrics.jsonl")[-1].items() if k != "tokens_per_second"} for x in "ab"]
    assert last[0] == last[1]


def test_safekey_without_a_key_sentence(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row(1, response="<think>\nx\n</think>\n\nNo.")) + "\n")
    done = call("train.py", "--model", "tiny", "--data", data, "--safekey", "--out", tmp_path / "out")
    assert done.returncode == 2 and "no row whose reasoning has two sentences" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--primer", "--safekey"], "not allowed with"), (["--primer", "--export", "trl"], "leave --primer and --safekey out"),
    (["--safekey", "--export", "trl"], "leave --primer and --safekey out"), (["--strip-cot", "none"], "invalid choice"),
    (["--online", "opsa", "--primer", "x"], "leave --data out"), (["--limit", 0], "--limit")])
def test_flags_that_do_not_go_together(tmp_path, flags, message):
    done = call("train.py", "--model", "tiny", "--data", ROOT / "tiny" / "star1.jsonl", "--label", "vanilla_harmful", "--out", tmp_path / "out", *flags)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "out").exists()


# ---- retries

def test_retries(tmp_path):
    """One more trace where none was kept, after each run of the guard, up to N: the traces that --n would have given."""
    def sample(*flags):
        done = call("sample.py", "--steer", "none", "--limit", 24, "--slots", 24, "--out", tmp_path, *flags)
        assert done.returncode == 0, done.stderr
        return done, (tmp_path / "samples.jsonl").read_bytes()

    def judge():
        assert call("guard.py", "--out", tmp_path).returncode == 0
        rows = rows_of(tmp_path / "guarded.jsonl")
        return {r["id"] for r in rows} - {r["id"] for r in rows if r["keep"]}

    sample()
    done = call("sample.py", "--steer", "none", "--limit", 24, "--out", tmp_path, "--retries", 2)
    assert done.returncode == 2 and "run it first" in done.stderr and json.loads((tmp_path / "run.json").read_text())["sample"]["finished"]
    first, rejected = (tmp_path / "samples.jsonl").read_bytes(), judge()
    assert 5 < len(rejected) < 20
    for k in (1, 2):
        done, now = sample("--retries", 2)
        assert now.startswith(first) and sample("--retries", 2)[1] == now == sample()[1]                    # once each
        new = [json.loads(line) for line in now[len(first):].splitlines()]
        assert {(r["id"], r["k"]) for r in new} == {(i, k) for i in rejected}
        lines = now.splitlines(keepends=True)                                                               # stopped before the last of them
        (tmp_path / "samples.jsonl").write_bytes(b"".join(lines[:-1]))
        assert sorted(sample("--retries", 2)[1].splitlines()) == sorted(now.splitlines())
        first, rejected = now, judge()
        kept = [r for r in rows_of(tmp_path / "guarded.jsonl") if r["keep"]]
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["sample"]["retries"] == len(now.splitlines()) - 24 and record["guard"]["kept_retries"] == sum(r["k"] > 0 for r in kept)
        assert len(kept) == len({r["id"] for r in kept})
    assert rejected and sample("--retries", 2)[1] == first                                                  # two it was
    call("sample.py", "--steer", "none", "--limit", 24, "--n", 3, "--out", tmp_path / "n")
    at_once = {(r["id"], r["k"]): r for r in rows_of(tmp_path / "n" / "samples.jsonl")}
    assert all(at_once[r["id"], r["k"]] == r for r in rows_of(tmp_path / "samples.jsonl"))
    call("guard.py", "--keep", "unanimous", "--out", tmp_path / "n")
    assert "--keep safe" in call("sample.py", "--steer", "none", "--limit", 24, "--n", 3, "--retries", 1, "--out", tmp_path / "n").stderr


# ---- the tiny world's curated sets

def test_curated_sets(tmp_path, monkeypatch):
    """Read as the real ones are; true to their labels; made again byte by byte; of no act that the evaluation asks for."""
    sets = {name: training_rows(ROOT / "tiny" / f"{name}.jsonl", "vanilla_harmful") for name in ("directrefusal", "star1", "safekey")}
    assert {name: len(rows) for name, rows in sets.items()} == {"directrefusal": 1000, "star1": 1000, "safekey": 1000}
    assert sum(r["prompt_label"] == "vanilla_harmful" for r in sets["safekey"]) == 500
    assert {r["response"] for r in sets["directrefusal"]} == {f"<think>\nI should not answer this question!\n</think>\n\n{world.NO[0]}"}
    _, held_out = world.split_acts()
    for r in (r for rows in sets.values() for r in rows):
        harmful = r["prompt_label"] == "vanilla_harmful"
        assert world.refuses(r["response"]) == harmful and world.complies(r["response"]) != harmful
        assert not any(f"{verb} {thing}" in r["instruction"] for verb, thing, _ in held_out)
    said = {r["response"][r["summary_end_idx"]:r["next_sentence_end_idx"]] for r in sets["safekey"]}
    assert said == {f" Policy check: {x}." for x in ("rule 1 (no violence) applies", "rule 2 (no crime) applies", "no rule applies", "harmless enough")}
    monkeypatch.setattr(build, "TINY", tmp_path)
    build.write_curated(0)
    assert all((tmp_path / f"{name}.jsonl").read_bytes() == (ROOT / "tiny" / f"{name}.jsonl").read_bytes() for name in sets)


# ---- runs/tiny.sh

def test_the_script_of_all_methods_can_be_stopped(tmp_path):
    """With a python that only writes down what it is asked: every method once, nothing twice; one that fails is said and done again."""
    fake = tmp_path / "python"
    fake.write_text("""#!/bin/bash
echo "$*" >> "$LOG"
[[ $* == *star1* && -e $LOG.fail ]] && exit 2
[[ $* =~ ^eval.py\\ --out\\ ([^ ]+) ]] && mkdir -p "${BASH_REMATCH[1]}" && echo {} > "${BASH_REMATCH[1]}/eval.json"
exit 0
""")
    fake.chmod(0o755)

    def go():
        log = tmp_path / "log"
        log.write_text("")
        done = subprocess.run(["bash", ROOT / "runs" / "tiny.sh", tmp_path / "out"], capture_output=True, text=True, timeout=60,
                              env={"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log), "SEEDS": "0 1"})
        return done, log.read_text().splitlines()
    (tmp_path / "log.fail").touch()
    done, commands = go()
    trained = [c.split()[2] for c in commands if c.startswith("train.py")]
    assert len(trained) == len(set(trained)) >= 30 and done.stdout.count("failed") == 2 and "star1-1: failed" in done.stdout
    assert sum(c.startswith("sample.py") and "/retries-0 " in c for c in commands) == 4
    assert commands[-1].startswith("eval.py --compare") and "star1" not in commands[-1] and done.returncode == 1
    (tmp_path / "log.fail").unlink()
    done, commands = go()
    assert sorted(c.split()[2].rpartition("/")[2] for c in commands if c.startswith("train.py")) == ["star1-0", "star1-1"]
    done, commands = go()                                              # the fake's theory leaves no theory.json
    assert [c.split()[1] for c in commands] == ["--theory", "--theory", "--compare"] and "star1" in commands[-1] and done.returncode == 0
