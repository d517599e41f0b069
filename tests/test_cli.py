"""What people see of the scripts: progress on a terminal and in a log file."""
import json
import os
import pty
import re
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest
from conftest import ROOT

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
