"""What people see of the scripts: progress on a terminal and in a log file, trackers."""
import json
import os
import pty
import re
import subprocess
import sys
import termios
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT, call, rows_of

import thinksafe
from thinksafe import progress


def on_a_terminal(*command):
    """Run a command with all its streams on a terminal of 130 columns -> (exit code, all that it showed)."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 130))
    job = subprocess.Popen([sys.executable, *map(str, command)], stdout=slave, stderr=slave, cwd=ROOT)
    os.close(slave)
    shown = b""
    while True:
        try:
            shown += os.read(master, 65536)
        except OSError:                                           # the other end is closed
            break
    os.close(master)
    return job.wait(), shown.decode()


def test_progress_on_a_terminal_is_a_bar_with_rate_time_left_and_figure(tmp_path):
    code, shown = on_a_terminal("sample.py", "--out", tmp_path, "--device", "cpu", "--model", "tiny", "--limit", 40, "--slots", 4)
    assert code == 0 and re.search(r"\rsample: +\d+%\|.*\d+/40 \[\d\d:\d\d<\d\d:\d\d, .*trace/s, [\d,]+ tokens/s\]", shown)
    *_, did, where, then, last = shown.strip().splitlines()
    assert did.startswith("sampled 40") and where.startswith("  -> ") and then.startswith("next: ") and json.loads(last)["rows"] == 40
    code, shown = on_a_terminal("guard.py", "--out", tmp_path, "--device", "cpu")
    assert code == 0 and re.search(r"guard tiny: 100%.* 40/40 .*tokens/s, \d+ safe, \d+ unsafe\]", shown)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(thinksafe, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


@pytest.mark.parametrize("seconds, lines", [
    (0.1, 0),           # a step; 20 s in all: nothing
    (0.2, 1),           # 40 s: the one after 30
    (1, 6),             # 200 s: every 30
    (60, 10)])          # 12,000 s: each tenth of the steps
def test_progress_in_a_log_is_few_whole_lines(clock, capsys, seconds, lines):
    with progress("train", 200, "step") as advance:
        for step in range(200):
            clock.now += seconds
            advance(tokens=50, note=f"loss {step}.5")
    out, err = capsys.readouterr()
    assert out == "" and "\r" not in err and err.count("\n") == lines
    if not lines:
        return
    first = re.fullmatch(r"train: +\d+% (\d+)/200 \[.*<.*step.*, ([\d,]+) tokens/s, loss (\d+)\.5\]", err.splitlines()[0])
    assert int(first[3]) + 1 == int(first[1]) and int(first[2].replace(",", "")) == round(50 / seconds)


def test_progress_of_a_resumed_stage_and_of_another_rank(clock, capsys):
    for silent in (False, True):
        with progress("train", 10, "step", 6, silent) as advance:
            clock.now += 100
            advance()
    assert re.fullmatch(r"train: +70% 7/10 \[01:40<.*\]\n", capsys.readouterr().err)      # the 6 were not done in these 100 s


# ---------------------------------------------------------------------------------------------
# Tracking


@pytest.fixture
def training(tmp_path):
    """f(*flags) -> train.py on eleven rows for 11 steps of one, with a checkpoint every 4; and its folder."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"id": str(i), "instruction": f"Question {i}?", "prompt_label": "vanilla_benign",
                                        "response": f"<think>\nSo {i}.\n</think>\n\nAnswer {i}."}) + "\n" for i in range(11)))
    common = ["--model", "tiny", "--device", "cpu", "--data", data, "--out", out, "--epochs", 1, "--batch-size", 1, "--save-every", 4]
    return lambda *flags: call("train.py", *common, *flags), out


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


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_each_row_of_the_metrics_once(name, monkeypatch, training):
    train, out = training
    said = tracker(monkeypatch, name)
    said.fails[7] = KeyboardInterrupt()
    assert train("--track", name).returncode == 130 and said.finished == 0
    assert [row["step"] for row in rows_of(out / "metrics.jsonl")] == list(range(1, 8))
    done = train("--track", name)                                     # takes steps 5 to 7 again
    assert done.returncode == 0 and done.json["steps"] == 11 and said.finished == 1
    assert [row["step"] for row in said.rows] == list(range(1, 12))
    times = {"tokens_per_second"}
    for row, kept in zip(said.rows, rows_of(out / "metrics.jsonl")):
        assert row.keys() == kept.keys() and all(row[key] == kept[key] for key in row.keys() - times)
    first, second = said.init
    assert first == second and re.fullmatch(r"run-[0-9a-f]{8}", first["name"]) and first["resume"] == "allow"
    assert first["config"]["batch_size"] == 1 and first.get("id") == (first["name"] if name == "wandb" else None)


def test_a_tracker_that_comes_later_gets_the_earlier_rows_and_a_new_run_another_name(monkeypatch, training):
    train, out = training
    assert train().returncode == 0
    said = tracker(monkeypatch, "trackio")
    assert train("--track", "trackio").returncode == 0
    assert said.rows == rows_of(out / "metrics.jsonl") and len(said.rows) == 11
    (out / "metrics.jsonl").unlink()                                  # to start again
    assert train("--track", "trackio").returncode == 0
    assert [row["step"] for row in said.rows] == 2 * list(range(1, 12)) and said.init[0]["name"] != said.init[1]["name"]


def test_a_tracker_that_is_missing_or_refuses_is_one_line(monkeypatch, training):
    train, out = training
    for name in ("wandb", "trackio", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)                  # whatever is installed here
        done = train("--track", name)
        assert done.returncode == 2 and done.stderr == f"error: --track {name}: it is not installed here; pip install {name}\n"
    assert not out.exists()
    said = tracker(monkeypatch, "wandb")
    said.fails[0] = RuntimeError("no key:\nrun wandb login")
    done = train("--track", "wandb")
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == "error: --track wandb: no key: run wandb login"


def test_tensorboard_gets_the_same_rows(training):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train, out = training
    assert train("--track", "tensorboard").returncode == 0
    folder, = (out / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    rows = rows_of(out / "metrics.jsonl")
    for key in rows[0].keys() - {"step"}:
        assert [(e.step, e.value) for e in events.Scalars(key)] == [(row["step"], pytest.approx(row[key])) for row in rows]
