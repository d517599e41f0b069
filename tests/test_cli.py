"""What people see of the scripts: --help, progress on a terminal and in a log file, trackers, the chat."""
import argparse
import ast
import contextlib
import functools
import importlib
import io
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
from conftest import ROOT, call, rows_of, run

import thinksafe
from eval import for_terminal
from guard import load_guard
from sample import Sampler
from thinksafe import decode_response, encode_prompt, load_decoder, progress

# ---------------------------------------------------------------------------------------------
# --help

SCRIPTS = ("sample", "guard", "train", "eval", "report")
SOURCES = {path.stem: ast.parse(path.read_text("utf-8")) for path in ROOT.glob("*.py")}


@functools.cache
def definitions(module):
    """{name: (module where it is defined, syntax tree)} of a file's own functions, classes and constants, and those that it imports
    from the other files here."""
    found = {}
    for node in SOURCES[module].body:
        if isinstance(node, ast.ImportFrom) and node.module in SOURCES:
            theirs = definitions(node.module)
            found |= {a.asname or a.name: theirs[a.name] for a in node.names if a.name in theirs}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = module, node
        elif isinstance(node, ast.Assign | ast.AugAssign):
            found |= {n.id: (module, node) for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


def words_in(node, unit, module, seen=()):
    """The strings that an expression of a function is made of, also by way of names."""
    found = set()
    for n in ast.walk(node):
        if isinstance(n, ast.Constant) and isinstance(n.value, str):
            found.add(n.value)
        elif isinstance(n, ast.Name) and n.id not in seen:
            its = [a.value for a in ast.walk(unit) if isinstance(a, ast.Assign) and any(getattr(t, "id", 0) == n.id for t in a.targets)]
            home, where = definitions(module).get(n.id, (module, None))
            for value in its or ([where.value] if isinstance(where, ast.Assign) else []):
                found |= words_in(value, unit, home if not its else module, (*seen, n.id))
    return found


def flags_read(script):
    """The flags (their `dest`) that are read by what a script's main() can reach: args.x, getattr(args, "x"), and getattr(args, name)
    where a loop over strings gives the name. `check_flags` does not count: it only says which flags would do nothing."""
    todo, seen, read = [(script, "main")], set(), set()
    while todo:
        home, unit = definitions(todo[-1][0]).get(todo.pop()[1], (None, None))
        if unit is None or id(unit) in seen or getattr(unit, "name", "") == "check_flags":
            continue
        seen.add(id(unit))
        loops = [n for n in ast.walk(unit) if isinstance(n, ast.For | ast.comprehension)]
        for n in ast.walk(unit):
            if isinstance(n, ast.Name):
                todo.append((home, n.id))
            elif isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name):
                if n.value.id in SOURCES:
                    todo.append((n.value.id, n.attr))
                elif n.value.id == "args" and isinstance(n.ctx, ast.Load):
                    read.add(n.attr)
            elif isinstance(n, ast.Call) and ast.unparse(n.func) == "getattr" and ast.unparse(n.args[0]) == "args":
                key = n.args[1]
                over = [key] if isinstance(key, ast.Constant) else [
                    loop.iter for loop in loops if key.id in {t.id for t in ast.walk(loop.target) if isinstance(t, ast.Name)}]
                for expression in over:
                    read |= words_in(expression, unit, home)
            elif isinstance(n, ast.Compare) and ast.unparse(n).endswith("in sys.argv"):
                read.add(n.left.value.strip("-"))
    return read


def parser_of(script, monkeypatch):
    """The ArgumentParser that a script's main() makes."""
    made = []

    def stop(parser):
        made.append(parser)
        raise SystemExit(0)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script])
    with contextlib.suppress(SystemExit):
        importlib.import_module(script).main()
    return made[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_says_what_it_is(script, monkeypatch):
    parser, read = parser_of(script, monkeypatch), flags_read(script)
    flags = [action for action in parser._actions if action.dest != "help"]
    assert not {action.dest for action in flags} - read
    units = ("token", "row", "prompt", "trace", "sequence", "step", "pass", "share", "p_unsafe", "GB", "MB", "memory", "norm", "rank", "scaled", "rate",
             "AdamW", "draws")
    for action in flags:
        name = action.option_strings[0]
        assert action.help and len(action.help) > 5, name
        if getattr(action.type, "__name__", "") in ("int", "float"):
            assert any(unit in action.help for unit in units), f"{name}: of what?"


def test_flags_read_tells_flags_of_other_scripts():
    """So that the test above can fail: what another script reads is not read here."""
    read = {script: flags_read(script) for script in SCRIPTS}
    assert "temperature" in read["sample"] and not {"threshold", "keep", "lr", "judge", "no_such_flag"} & read["sample"]
    assert "threshold" in read["guard"] and not {"temperature", "n", "slots", "kl"} & read["guard"]
    assert {"lr", "lora_targets", "weight_decay", "rollouts", "teacher"} <= read["train"] and not {"keep", "sources", "retries"} & read["train"]
    assert {"sources", "compare", "group", "chat"} <= read["eval"] and not {"lr", "kl", "keep"} & read["eval"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_grouped_and_fits(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "130")
    done = call(f"{script}.py", "--help")
    assert done.returncode == 0 and done.stderr == "" and max(map(len, done.stdout.splitlines())) <= 130
    assert "[]" not in done.stdout and "None" not in done.stdout
    if script != "report":                                            # with its three flags
        ungrouped = re.search(r"\noptions:\n(.*?)\n\n", done.stdout, re.S)[1]
        assert set(re.findall(r"^  (-\S+)", ungrouped, re.M)) <= {"-h,", "--bench"}
        assert "\nfolder and machine:\n  --out OUT" in done.stdout


def test_help_of_a_fresh_process():
    done = run("sample.py", "--help", check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: sample.py") and done.stderr == ""


# ---------------------------------------------------------------------------------------------
# Progress


def on_a_terminal(*command, typed=""):
    """Run a command with all its streams on a terminal of 130 columns, where `typed` is typed -> (exit code, all that it showed)."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 130))
    job = subprocess.Popen([sys.executable, *map(str, command)], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT)
    os.close(slave)
    os.write(master, typed.encode())
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
    assert first["config"]["batch_size"] == 1 and first.get("id") == (first["name"][-8:] if name == "wandb" else None)


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


# ---------------------------------------------------------------------------------------------
# eval.py --chat


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run of the tiny world, trained so hard that what the student says is another text afterwards."""
    out = tmp_path_factory.mktemp("run")
    for flags in (["sample.py", "--limit", 40, "--seed", 3], ["guard.py", "--threshold", 0.4], ["train.py", "--epochs", 3, "--lr", 3e-3]):
        script, *flags = flags
        assert call(script, "--out", out, "--device", "cpu", *(["--model", "tiny"] if script == "sample.py" else []), *flags).returncode == 0
    return out


def chat(monkeypatch, out, said, *flags):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), "utf-8"))
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    done = call("eval.py", "--chat", "--out", out, "--device", "cpu", *flags)
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before      # it writes nothing
    return done


ASK = "How do I kill a frozen program?"


def test_chat_shows_what_both_models_say_and_the_guards_verdict(monkeypatch, trained, tiny):
    done = chat(monkeypatch, trained, f"{ASK}\n{ASK}\n\nnot asked any more\n".encode())
    assert done.returncode == 0 and done.stderr == "" and "\033" not in done.stdout and "any more" not in done.stdout
    block = r"> ([^\n]+)\n\nbefore:\n(.+?)\nguard tiny: (.+?)\n\nafter:\n(.+?)\nguard tiny: (.+?)\n\n"
    turns = re.findall(block, done.stdout, re.S)
    assert re.sub(block, "", done.stdout, flags=re.S) == "" and [turn[0] for turn in turns] == [ASK, ASK]

    # Each is what the sampler draws from that model, judged by the run's guard
    guard, trained_model = load_guard("tiny", "cpu"), load_decoder(trained / "model", "cpu")
    for turn, (_, *blocks) in enumerate(turns):
        for (model, tokenizer), text, verdict in zip((tiny, trained_model), blocks[::2], blocks[1::2]):
            c, = Sampler(model, tokenizer, 4).generate([encode_prompt(tokenizer, ASK)], 256, 0.6, 0.95, 20, 3, [str(turn)])
            assert text == decode_response(tokenizer, c.tokens, model.eos_ids)
            v, = guard.judge([(ASK, text)], 0.4)
            assert verdict == f"{v.label}, p_unsafe {v.p_unsafe:.3f}"
        assert blocks[0] != blocks[2]


def test_chat_on_a_terminal_dims_the_reasoning(trained):
    code, shown = on_a_terminal("eval.py", "--chat", "--out", trained, "--device", "cpu", typed=f"{ASK}\n\n")
    assert code == 0 and "> " in shown
    for when in ("before", "after"):
        assert re.search(when + r":\r\n\033\[2m<think>[^\033]+</think>\033\[0m[^\033]+guard tiny: (un)?safe, p_unsafe", shown)


def test_chat_text_cannot_steer_the_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    for text, shown in [("<think>\n\033[2Ja\n</think>\nb\r\u202e", "\033[2m<think>\n\\x1b[2Ja\n</think>\033[0m\nb\\r\\u202e"),
                        ("<think>\nnever closed", "\033[2m<think>\nnever closed\033[0m"), ("no reasoning\033[0m", "no reasoning\\x1b[0m")]:
        assert for_terminal(text) == shown


def test_chat_with_what_cannot_be_answered(monkeypatch, trained, tmp_path):
    done = chat(monkeypatch, trained, b"\xff\n")
    assert done.returncode == 2 and done.stderr == "error: prompt 1 is not text in UTF-8\n" and done.stdout == ""
    done = chat(monkeypatch, trained, b"word " * 5000 + b"\n\033[2J <|im_end|>\n", "--max-new-tokens", 2)      # its end is the end
    assert done.returncode == 0 and done.stdout.count("guard tiny: unknown, prompt_too_long") == 2
    assert done.stdout.count("guard tiny: unknown, length") == 2 and "\033" not in done.stdout
    done = chat(monkeypatch, tmp_path, b"hello\n")
    assert done.returncode == 2 and "train.py has not finished there" in done.stderr and done.stderr.count("\n") == 1


def test_chat_with_two_models_of_their_own(monkeypatch, trained):
    done = chat(monkeypatch, trained, f"{ASK}\n".encode(), "--before", ROOT / "tiny" / "teacher", "--model", ROOT / "tiny" / "student")
    assert done.returncode == 0 and done.stdout.count("guard tiny: ") == 2
