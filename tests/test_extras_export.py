"""extras/export.py: rows for TRL, the model card, metrics sent to trackers."""
import json
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT, call, rows_of
from huggingface_hub import ModelCard

from extras import export
from extras.export import export_trl, model_card
from thinksafe import load_tokenizer
from data.sources import balanced_subset
from train import encode_rows
from training_rows import ROWS, trace, write


# ---------------------------------------------------------------------------------------------
# Rows for TRL


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
    """As SFTTrainer does it: prompt, and prompt + completion, each as text; rows whose text holds control tokens are skipped."""
    tokenizer = any_tokenizer
    rows = [*ROWS, *(trace(i, instruction=text) for i, text in enumerate((" spaces \n", "naïve 漢字 🙂", "12345 + 678", "line\r\nline", "{prompt}"), 20))]
    bad = [trace(30, instruction=f"Say {tokenizer.eos_token} now"), {**trace(31), "response": f"<think>\nx\n</think>\n\n{tokenizer.eos_token} no"}]
    examples = encode_rows(rows + bad, tokenizer, 4096)[0]
    assert len(examples) == len(rows) + 2
    export_trl(tmp_path / "trl.jsonl", examples, tokenizer)
    assert "skipped 2 " in capsys.readouterr().out
    written = rows_of(tmp_path / "trl.jsonl")
    assert len(written) == len(rows)
    for row, item in zip(written, examples):
        assert row.keys() == {"prompt", "completion"} and row["completion"].endswith(tokenizer.eos_token)
        assert tokenizer(row["prompt"])["input_ids"] == item["ids"][:item["n_prompt"]]
        assert tokenizer(row["prompt"] + row["completion"])["input_ids"] == item["ids"]


def test_trl_is_the_rows_that_train_py_trains_on(tmp_path):
    """With the same flags: the same rows, drawn with the same seed, of the same length and form; nothing else is written."""
    data, out = write(tmp_path / "rows.jsonl", [*ROWS, trace(50, response_label="unsafe"), trace(51, response="<think>\nx\n</think>\n\n" + "long " * 600)]), tmp_path / "out"
    flags = ["--model", "tiny", "--data", data, "--out", out]
    done = call("extras.export", "trl", *flags)
    assert done.returncode == 0 and [p.name for p in out.iterdir()] == ["trl.jsonl"], done.stderr
    assert len(rows_of(out / "trl.jsonl")) == len(ROWS) + 1
    done = call("extras.export", "trl", *flags, "--max-length", 200, "--limit", 4, "--strip-cot", "harmful", "--seed", 3)
    texts = {(row["prompt"], row["completion"]) for row in rows_of(out / "trl.jsonl")}
    tokenizer = load_tokenizer(ROOT / "tiny" / "student")
    examples = balanced_subset(encode_rows(ROWS, tokenizer, 200, "harmful")[0], 4, 3)
    assert texts == {(tokenizer.decode(e["ids"][:e["n_prompt"]]), tokenizer.decode(e["ids"][e["n_prompt"]:])) for e in examples}
    done = call("extras.export", "trl", "--data", data, "--out", tmp_path / "new")
    assert done.returncode == 2 and "give --model" in done.stderr and not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------
# The model card


def test_model_card(tmp_path):
    """Counts by label, recipe and base; results only if they are of this model."""
    out = tmp_path / "out"
    data = write(tmp_path / "rows.jsonl", [*ROWS, trace(50, response_label="unsafe")])
    call("train.py", "--model", "tiny", "--data", data, "--out", out, "--epochs", 2, "--lr", 0.001)
    assert call("extras.export", "card", "--out", tmp_path).stderr.endswith("train.py has not finished there; run it first\n")
    assert not (out / "model" / "README.md").exists() and call("extras.export", "card", "--out", out).returncode == 0
    card = (out / "model" / "README.md").read_text()
    assert card == str(model_card(out)) and "11 rows: `rows.jsonl`. Skipped: 1 unsafe." in card and str(tmp_path) not in card
    ModelCard.load(out / "model" / "README.md", ignore_metadata_errors=False)
    for line in ("| vanilla_harmful | 4 |", "| adversarial_benign | 4 |", "| lr | 0.001 |", "library_name: peft", "None here yet."):
        assert line in card
    done = call("eval.py", "--out", out, "--limit", 2, "--max-new-tokens", 4)
    assert done.returncode == 0, done.stderr
    assert call("extras.export", "card", "--out", out).returncode == 0
    card = (out / "model" / "README.md").read_text()
    assert card == str(model_card(out)) and "| over_refusal | " in card and "None here yet" not in card
    run = json.loads((out / "run.json").read_text())
    run["eval"]["fingerprint"]["after"] = "another"
    (out / "run.json").write_text(json.dumps(run))
    assert "None here yet" in str(model_card(out))


# ---------------------------------------------------------------------------------------------
# Trackers


def tracker(monkeypatch, name):
    """A module of that name that keeps what it is told -> its record; `fails`: {step: what to raise there, 0 for init}."""
    said = SimpleNamespace(init=[], rows=[], finished=0, fails={})
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)

    def fail(step):
        if step in said.fails:
            raise said.fails.pop(step)

    def init(**given):
        said.init.append(given)
        fail(0)

    def log(row, step):
        said.rows.append({"step": step, **row})
        fail(step)

    def finish():
        said.finished += 1
    module.init, module.log, module.finish = init, log, finish
    monkeypatch.setitem(sys.modules, name, module)
    return said


@pytest.fixture
def training(tmp_path):
    """f(*flags) -> train.py on eleven rows for 11 steps of one, with a checkpoint every 4; and its folder."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    write(data, [trace(i, "vanilla_benign") for i in range(11)])
    flags = ["--model", "tiny", "--device", "cpu", "--data", data, "--out", out, "--epochs", 1, "--batch-size", 1, "--save-every", 4]
    return flags, out


def as_it_was(out, steps, finished=False):
    """Put OUT back to where train.py had taken so many steps."""
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:steps]))
    run = json.loads((out / "run.json").read_text())
    run["train"]["finished"] = finished
    (out / "run.json").write_text(json.dumps(run))
    return lines


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_each_row_of_the_metrics_once(name, monkeypatch, training):
    """Over several calls: while train.py is at work, stopped inside a row, after train.py took some steps again, and at the end."""
    flags, out = training
    assert call("train.py", *flags).returncode == 0
    rows = rows_of(out / "metrics.jsonl")
    lines = as_it_was(out, 7)
    with open(out / "metrics.jsonl", "a") as f:
        f.write(lines[7][:20])                                        # train.py is writing it
    said = tracker(monkeypatch, name)
    said.fails[5] = KeyboardInterrupt()
    assert call("extras.export", name, "--out", out).returncode == 130 and said.finished == 1
    assert "sent 2 rows" in call("extras.export", name, "--out", out).stdout
    as_it_was(out, 4)                                                 # resumed from the checkpoint
    assert "sent 0 rows" in call("extras.export", name, "--out", out).stdout
    (out / "metrics.jsonl").write_text("".join(lines))
    assert "sent 4 rows" in call("extras.export", name, "--out", out).stdout
    assert "sent 0 rows" in call("extras.export", name, "--out", out).stdout
    assert said.rows == rows and len(rows) == 11 and said.finished == len(said.init) == 5
    assert all(given == said.init[0] for given in said.init)
    first = said.init[0]
    assert re.fullmatch(r"run-[0-9a-f]{8}", first["name"]) and first["resume"] == "allow"
    assert first["config"]["batch_size"] == 1 and first.get("id") == (first["name"][-8:] if name == "wandb" else None)


def test_another_tracker_gets_all_rows_and_a_new_run_another_name(monkeypatch, training):
    flags, out = training
    assert call("train.py", *flags).returncode == 0
    rows = rows_of(out / "metrics.jsonl")
    said, other = tracker(monkeypatch, "trackio"), tracker(monkeypatch, "wandb")
    for name in ("trackio", "wandb"):
        assert call("extras.export", name, "--out", out).returncode == 0
    assert said.rows == rows == other.rows and len(rows) == 11
    (out / "metrics.jsonl").unlink()                                  # to start again
    assert call("train.py", *flags, "--lr", 1e-3).returncode == 0
    assert call("extras.export", "trackio", "--out", out).returncode == 0
    assert [row["step"] for row in said.rows] == 2 * list(range(1, 12)) and said.init[0]["name"] != said.init[1]["name"]


def test_it_follows_train_py(monkeypatch, training):
    """--follow waits for the first row, sends rows as they come, and ends with the training."""
    flags, out = training
    assert call("train.py", *flags).returncode == 0
    rows, lines = rows_of(out / "metrics.jsonl"), as_it_was(out, 0)
    said, naps = tracker(monkeypatch, "trackio"), []

    def sleep(seconds):
        assert len(said.rows) == max(0, len(naps) - 2)                # each nap, train.py takes a step, from the third one on
        naps.append(seconds)
        if len(naps) > 2:
            with open(out / "metrics.jsonl", "a") as f:
                f.write(lines[len(naps) - 3])
        if len(naps) == 13:
            as_it_was(out, 11, finished=True)
    monkeypatch.setattr(export.time, "sleep", sleep)
    done = call("extras.export", "trackio", "--out", out, "--follow")
    assert done.returncode == 0 and said.rows == rows and said.finished == 1 and "sent 11 rows" in done.stdout


def test_a_tracker_that_is_missing_or_refuses_is_one_line(monkeypatch, training):
    flags, out = training
    for name in ("wandb", "trackio", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)                  # whatever is installed here
        done = call("extras.export", name, "--out", out)
        assert done.returncode == 2 and done.stderr == f"error: {name} is not installed here; pip install {name}\n"
    said = tracker(monkeypatch, "wandb")
    done = call("extras.export", "wandb", "--out", out)
    assert done.returncode == 2 and "no rows in it; run train.py first" in done.stderr and not out.exists() and not said.init
    assert call("train.py", *flags).returncode == 0
    said.fails[0] = RuntimeError("no key:\nrun wandb login")
    done = call("extras.export", "wandb", "--out", out)
    assert done.returncode == 2 and done.stderr == "error: wandb: no key: run wandb login\n"
    assert call("extras.export", "wandb", "--out", out).returncode == 0 and len(said.rows) == 11


def test_tensorboard_gets_the_same_rows(training):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    flags, out = training
    assert call("train.py", *flags).returncode == 0
    assert call("extras.export", "tensorboard", "--out", out).returncode == 0
    folder, = (out / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    rows = rows_of(out / "metrics.jsonl")
    for key in rows[0].keys() - {"step"}:
        assert [(e.step, e.value) for e in events.Scalars(key)] == [(row["step"], pytest.approx(row[key])) for row in rows]
