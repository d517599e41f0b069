"""The commands as a user types them: end to end, stopped and resumed, and with bad input."""
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call, killed_at, rows_of

from data import run_record


def files(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small run of all four scripts -> its folder."""
    out = tmp_path_factory.mktemp("small") / "out"
    assert call("sample.py", "--out", out, "--limit", 60, "--slots", 16).returncode == 0
    assert call("guard.py", "--out", out).returncode == 0
    assert call("train.py", "--out", out, "--epochs", 1).returncode == 0
    assert call("eval.py", "--out", out, "--limit", 8).returncode == 0
    return out


def test_the_stages_only_add_keys(small):
    samples, guarded = (sorted(rows_of(small / f"{n}.jsonl"), key=lambda r: r["id"]) for n in ("samples", "guarded"))
    assert len(samples) == len(guarded) == 60
    assert all(a.items() <= b.items() for a, b in zip(samples, guarded))
    assert {"id", "instruction", "prompt_label", "response", "k", "seed", "steer", "finish_reason", "n_tokens"} <= samples[0].keys()
    assert {"response_label", "p_unsafe", "guard", "keep"} <= guarded[0].keys()
    assert {r["steer"] for r in samples if "harmful" in r["prompt_label"]} == {"default"}
    assert {r["steer"] for r in samples if "benign" in r["prompt_label"]} == {"none"}
    assert not any("should refuse to answer the prompt" in r["instruction"] for r in guarded)          # the instruction is not kept
    assert all(r["keep"] == (r["response_label"] == "safe") for r in guarded)


def test_run_record(small):
    record = json.loads((small / "run.json").read_text())
    assert list(record) == ["sample", "guard", "train", "eval"]
    for entry in record.values():
        assert entry["finished"] and entry["seconds"] > 0 and {"arguments", "fingerprint", "commit", "dirty", "versions", "device"} <= entry.keys()
    report = json.loads((small / "eval.json").read_text())
    for when in ("before", "after"):
        assert {"harm", "harm_plain", "harm_wrapped", "guard_harm", "over_refusal", "pass@1"} <= report[when].keys()
        assert report[when]["harm"]["n"] == 16 and report[when]["harm"]["low"] <= report[when]["harm"]["percent"] <= report[when]["harm"]["high"]


def test_running_again_changes_nothing(small):
    before = {k: v for k, v in files(small).items() if k.name != "run.json"}
    for script, flags in (("sample.py", ["--limit", 60]), ("guard.py", []), ("train.py", ["--epochs", 1]), ("eval.py", ["--limit", 8])):
        assert call(script, "--out", small, *flags).returncode == 0
    assert {k: v for k, v in files(small).items() if k.name != "run.json"} == before


def test_two_runs_are_the_same_file(small, tmp_path):
    call("sample.py", "--out", tmp_path / "again", "--limit", 60, "--slots", 16)
    assert (tmp_path / "again" / "samples.jsonl").read_bytes() == (small / "samples.jsonl").read_bytes()


def test_killed_after_the_kth_row_in_each_stage(small, tmp_path):
    """SIGKILL, twice while sampling and once in each other stage, then to the end: the rows' ids of the undisturbed run, each once."""
    def ids(path):
        return sorted((r["id"], r.get("k", 0), r.get("when")) for r in rows_of(path))
    out = tmp_path / "out"
    for script, name, flags, stops in (("sample.py", "samples", ["--limit", 60, "--slots", 16], (1, 37)), ("guard.py", "verdicts", [], (20,)),
                                       ("eval.py", "eval", ["--limit", 8], (40,))):
        if script == "eval.py":
            call("train.py", "--out", out, "--epochs", 1)
        for k in stops:
            assert killed_at(script, [*flags, "--out", out], out / f"{name}.jsonl", k) == -signal.SIGKILL
        with open(out / f"{name}.jsonl", "ab") as f:                        # and one that was cut inside a row
            f.write(b'{"id": "half a row')
        assert call(script, *flags, "--out", out).returncode == 0
        assert ids(out / f"{name}.jsonl") == ids(small / f"{name}.jsonl")
    assert ids(out / "guarded.jsonl") == ids(small / "guarded.jsonl") == ids(small / "samples.jsonl")
    assert [r["response"] for r in sorted(rows_of(out / "samples.jsonl"), key=lambda r: r["id"])] == \
           [r["response"] for r in sorted(rows_of(small / "samples.jsonl"), key=lambda r: r["id"])]


@pytest.mark.parametrize("change", [{"id": "nobody"}, {"k": 0, "instruction": "Another?"}, {"prompt_label": "vanilla_benign"}, {"seed": 9}, {"steer": "risk"}])
def test_a_row_that_this_run_did_not_make_is_named(small, tmp_path, change):
    """And with it gone the run goes on to what it was."""
    out = tmp_path / "out"
    shutil.copytree(small, out)
    rows = rows_of(out / "samples.jsonl")
    at = next(i for i, row in enumerate(rows) if row["prompt_label"] == "vanilla_harmful")
    (out / "samples.jsonl").write_text("".join(json.dumps({**row, **change} if i == at else row) + "\n" for i, row in enumerate(rows)))
    flags = ["sample.py", "--out", out, "--limit", 60, "--slots", 16]
    done = call(*flags)
    assert done.returncode == 2 and f"id {change.get('id', rows[at]['id'])}, k 0 is of another run, or was edited" in done.stderr
    (out / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for i, row in enumerate(rows) if i != at))
    assert call(*flags).returncode == 0 and {row["id"]: row["response"] for row in rows_of(out / "samples.jsonl")} == {row["id"]: row["response"] for row in rows}


def test_seconds_of_stopped_runs_count_once(tmp_path, monkeypatch):
    """Up to the last row, also where facts were saved on the way."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(run_record, "time", SimpleNamespace(time=lambda: clock.now))
    args = SimpleNamespace(out=tmp_path, device="cpu")
    for begins, saves, last_row, seconds in ((1000, 1010, 1015, 15), (2000, 2004, 2004, 19), (3000, None, 3001, 20)):
        clock.now = begins
        stage = run_record.Stage("eval", args, "eval.jsonl", {})
        if saves:
            clock.now = saves
            stage.save(limit=5)
        (tmp_path / "eval.jsonl").touch()
        os.utime(tmp_path / "eval.jsonl", (last_row, last_row))
        stage.lock.release()                                               # as when it is killed
        clock.now = 9000
        stage = run_record.Stage("eval", args, "eval.jsonl", {})
        assert stage.earlier_seconds == seconds
        stage.lock.release()


@pytest.mark.trust
def test_signals_have_their_exit_codes(tries, tmp_path):
    for how, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with tries("fault"):
            out = tmp_path / str(code)
            assert killed_at("sample.py", ["--out", out, "--slots", 8], out / "samples.jsonl", 3, how) == code


def bad(tmp_path, script, *flags):
    """Run with bad input: exit 2, one line on stderr, whatever was there is as it was -> that line."""
    before = files(tmp_path)
    done = call(script, *flags)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert files(tmp_path) == before
    return lines[0]


GOOD = {"instruction": "Hello", "prompt_label": "vanilla_benign"}


@pytest.mark.parametrize("lines, message", [
    (None, "cannot be read"),
    ([json.dumps(GOOD), "{not json"], "prompts.jsonl:2"),
    ([json.dumps(GOOD), "[1]"], "prompts.jsonl:2"),
    (['{"instruction": "\\ud800", "prompt_label": "vanilla_benign"}'], "prompts.jsonl:1"),
    ([json.dumps(GOOD), '{"prompt_label": "vanilla_benign"}'], "row 2: no text under 'instruction'"),
    (['{"instruction": 5, "prompt_label": "vanilla_benign"}'], "instruction is 5"),
    (['{"instruction": "x", "prompt_label": "evil"}'], "prompt_label is 'evil'"),
    (['{"id": "a", "instruction": "x", "prompt_label": "vanilla_benign"}', '{"id": "a", "instruction": "y", "prompt_label": "vanilla_benign"}'], "'a'"),
    ([], "no rows"),
])
def test_bad_prompts(tmp_path, lines, message):
    path = tmp_path / "prompts.jsonl"
    if lines is not None:
        path.write_text("\n".join(lines) + "\n")
    assert message in bad(tmp_path, "sample.py", "--prompts", path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_models(tmp_path, folders):
    folder = tmp_path / "model"
    folder.mkdir()
    assert "not a model folder" in bad(tmp_path, "sample.py", "--model", folder, "--out", tmp_path / "out")
    source = folders("llama")[1]
    for f in source.iterdir():
        if f.name != "chat_template.jinja":
            (folder / f.name).write_bytes(f.read_bytes())
    assert "no chat template" in bad(tmp_path, "sample.py", "--model", folder, "--out", tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    assert "GPT2LMHeadModel is not supported" in bad(tmp_path, "sample.py", "--model", folder, "--out", tmp_path / "out")


def test_stages_out_of_order(tmp_path):
    for script, message in (("guard.py", "run python sample.py"), ("train.py", "guard.py has not finished"), ("eval.py", "train.py has not finished")):
        assert message in bad(tmp_path, script, "--out", tmp_path)


def test_a_changed_run_is_refused(small, tmp_path):
    for script, flags, message in (("sample.py", ["--limit", 60, "--seed", 1], "seed 0, now it is 1"),
                                   ("sample.py", ["--limit", 60, "--model", ROOT / "tiny" / "teacher"], "made with model"),
                                   ("sample.py", ["--limit", 60, "--steer", "none"], "made with steer default"),
                                   ("guard.py", ["--threshold", 0.4], "made with threshold"), ("guard.py", ["--guard", "self"], "made with "),
                                   ("train.py", ["--epochs", 2], "made with epochs 1"), ("train.py", ["--epochs", 1, "--seed", 3], "made with seed"),
                                   ("eval.py", ["--limit", 8, "--seed", 2], "made with seed")):
        assert message in bad(small, script, "--out", small, *flags)


@pytest.mark.parametrize("script, flags, message", [
    ("sample.py", ["--limit", 0], "--limit"), ("sample.py", ["--n", "x"], "--n"), ("sample.py", ["--slots", 0], "--slots"),
    ("sample.py", ["--temperature", "nan"], "temperature must be a number from 0 to 100, it is nan"), ("sample.py", ["--device", "cuda:9"], "--device"), ("sample.py", ["--nonsense"], "--nonsense"),
    ("guard.py", ["--threshold", 2], "--threshold"), ("guard.py", ["--guard", "no/such/model"], "no/such/model"),
    ("train.py", ["--save-every", 0], "--save-every"), ("train.py", ["--lora-dropout", 2], "--lora-dropout"), ("train.py", ["--lr", "inf"], "--lr"),
    ("train.py", ["--lora-targets", "typo"], "no block has a layer typo"), ("train.py", ["--data", "missing.jsonl"], "missing.jsonl"),
    ("eval.py", ["--limit", 8, "--judge", "no/such"], "no/such"), ("eval.py", ["--prompts", ROOT / "tiny" / "prompts.jsonl"], "row 1: needs `set`"),
])
def test_bad_flags(small, script, flags, message):
    assert message in bad(small, script, "--out", small, *flags)


def test_broken_files_of_an_earlier_stage(small, tmp_path):
    for name, text, script, message in (("run.json", "{", "guard.py", "run.json"), ("run.json", '{"sample": 3}', "guard.py", "run.json"),
                                        ("samples.jsonl", '{"id": "a"}\n', "guard.py", "samples.jsonl:1"),
                                        ("checkpoint.pt", "x", "train.py", "checkpoint.pt"),
                                        ("model/adapter_model.safetensors", "x", "eval.py", "adapter_model.safetensors")):
        out = tmp_path / name.replace("/", "_") / text[:1].strip("{") / "out"
        shutil.copytree(small, out, dirs_exist_ok=True)
        (out / name).write_text(text)
        assert message in bad(out, script, "--out", out, *{"train.py": ["--epochs", 1], "eval.py": ["--limit", 8]}.get(script, []))


def test_a_changed_chat_template_is_refused(small, tmp_path):
    student, out = tmp_path / "student", tmp_path / "out"
    shutil.copytree(ROOT / "tiny" / "student", student)
    assert call("sample.py", "--model", student, "--prompts", ROOT / "tiny" / "prompts.jsonl", "--out", out, "--limit", 2, "--max-new-tokens", 2).returncode == 0
    template = student / "chat_template.jinja"
    template.write_text("New. " + template.read_text())
    assert "made with template" in bad(out, "sample.py", "--model", student, "--prompts", ROOT / "tiny" / "prompts.jsonl", "--out", out, "--limit", 2, "--max-new-tokens", 2)


def test_a_model_as_judge(small, tmp_path):
    """--judge self: the student before training says what is harmful and what a refusal is; no verdict is counted apart."""
    out = tmp_path / "out"
    shutil.copytree(small, out)
    done = call("eval.py", "--out", out, "--limit", 8, "--judge", "self")
    report = json.loads((out / "eval.json").read_text())
    assert done.returncode == 0 and report["judge"] == "self"
    harm = report["before"]["harm"]
    assert harm["n"] + harm["unknown"] == 16 and harm["percent"] > 50
    assert report["after"]["pass@1"] == json.loads((small / "eval.json").read_text())["after"]["pass@1"]


def test_sampling_from_an_adapter(small, tmp_path):
    """The trained adapter is a model like any other: it can be sampled and asked as a guard."""
    out = tmp_path / "second"
    assert call("sample.py", "--model", small / "model", "--prompts", ROOT / "tiny" / "prompts.jsonl", "--limit", 4, "--out", out).returncode == 0
    assert call("guard.py", "--out", out, "--guard", "tiny").json["rows"] == 4


@pytest.mark.trust
def test_two_processes_cannot_share_a_folder(tries, tmp_path):
    out = tmp_path / "out"
    first = subprocess.Popen([sys.executable, str(ROOT / "sample.py"), "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (out / "samples.jsonl").exists():
            time.sleep(0.01)
        with tries("fault"):
            done = call("sample.py", "--out", out)
            assert done.returncode == 2 and "another process" in done.stderr
    finally:
        first.kill()
        first.wait()


def test_deleting_the_metrics_starts_training_again(small, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(small, out)
    (out / "metrics.jsonl").unlink()
    done = call("train.py", "--out", out, "--epochs", 1)
    assert done.json["steps"] == len(rows_of(out / "metrics.jsonl")) == len(rows_of(small / "metrics.jsonl"))


def test_other_weights_of_the_loss_are_another_training(small, tmp_path, monkeypatch):
    """A change of ten lines that changes the weights alone, as numbers or as tensors, is not taken for the run that has ended; the run itself is said
    to have ended."""
    import train
    out, encode = tmp_path / "out", train.encode_rows
    shutil.copytree(small, out)
    done = call("train.py", "--out", out, "--epochs", 1)
    assert done.returncode == 0 and "all steps were taken before" in done.stdout
    for weigh in (lambda e: 3.0, lambda e: torch.ones(len(e["ids"]) - e["n_prompt"])):
        def weighed(*args, weigh=weigh, **kw):
            examples, skipped = encode(*args, **kw)
            return [{**example, "ce_weight": weigh(example)} for example in examples], skipped
        with monkeypatch.context() as m:
            m.setattr(train, "encode_rows", weighed)
            assert "made with rows" in bad(out, "train.py", "--out", out, "--epochs", 1)
            assert call("train.py", "--out", tmp_path / "other", "--model", "tiny", "--data", out / "guarded.jsonl", "--epochs", 1).returncode == 0
            assert "all steps were taken before" in call("train.py", "--out", tmp_path / "other", "--model", "tiny", "--data", out / "guarded.jsonl", "--epochs", 1).stdout
            shutil.rmtree(tmp_path / "other")


def test_nothing_left_after_the_guard(tmp_path):
    out = tmp_path / "out"
    call("sample.py", "--out", out, "--limit", 6, "--max-new-tokens", 3)     # no trace closes its reasoning
    done = call("guard.py", "--out", out)
    assert done.json["unknown_because"] == {"length": 6} and done.json["kept"] == {}
    assert all(r["response_label"] == "unknown" and r["reason"] == "length" and not r["keep"] for r in rows_of(out / "guarded.jsonl"))
    assert "none of the rows can be trained on ({'length': 6})" in bad(tmp_path, "train.py", "--out", out)


def test_a_prompt_longer_than_the_context_is_recorded(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (GOOD, {**GOOD, "instruction": "word " * 3000})))
    out = tmp_path / "out"
    done = call("sample.py", "--prompts", path, "--out", out)
    assert done.json["finish_prompt_too_long"] == 1 and "do not fit" in done.stderr
    row, = (r for r in rows_of(out / "samples.jsonl") if r["finish_reason"] == "prompt_too_long")
    assert row["response"] == "" and row["n_tokens"] == 0
    assert call("guard.py", "--out", out).json["unknown_because"]["prompt_too_long"] == 1


def test_unanimous_keeps_one_of_n_or_none(tmp_path):
    out = tmp_path / "out"
    call("sample.py", "--out", out, "--limit", 40, "--n", 3, "--steer", "none", "--slots", 64)
    call("guard.py", "--out", out, "--keep", "unanimous")
    groups = {}
    for row in rows_of(out / "guarded.jsonl"):
        groups.setdefault(row["id"], []).append(row)
    assert len(groups) == 40 and all(sorted(r["k"] for r in g) == [0, 1, 2] for g in groups.values())
    assert len({tuple(sorted(r["response"] for r in g)) for g in groups.values()}) == 40
    for g in groups.values():
        agreed = all(r["response_label"] == "safe" for r in g)
        assert [r["k"] for r in g if r["keep"]] == ([0] if agreed else [])
    assert any(r["keep"] for g in groups.values() for r in g) and not all(any(r["keep"] for r in g) for g in groups.values())


def test_help_makes_no_noise():
    for script in ("sample.py", "guard.py", "train.py", "eval.py"):
        done = call(script, "--help")
        assert done.returncode == 0 and not done.stderr and "--out" in done.stdout
