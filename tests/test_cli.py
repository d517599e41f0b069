"""What people see of the scripts: --help, flags, progress on a terminal and in a log file."""
import argparse
import ast
import contextlib
import functools
import importlib
import json
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, call, on_a_terminal, run

import thinksafe
from thinksafe import progress

# ---------------------------------------------------------------------------------------------
# --help

CORE = ("sample", "guard", "train", "eval")
EXTRAS = tuple(f"extras.{name}" for name in (
    "online", "safekey", "safepath", "theory", "compare", "report", "chat", "export", "memory", "merge", "cached_kl", "retry", "perplexity",
    "ranks", "doses", "study"))
SCRIPTS = CORE + EXTRAS


def script_of(name):
    """How conftest's `run` and `call` name a script."""
    return name if "." in name else f"{name}.py"


SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
           for pattern in ("*.py", "data/*.py", "extras/*.py") for path in ROOT.glob(pattern)}


def test_every_script_is_tried():
    assert {module for module in SOURCES if any(getattr(node, "name", "") == "main" for node in SOURCES[module].body)} == set(SCRIPTS)


@functools.cache
def definitions(module):
    """{name: (module where it is defined, syntax tree)} of a file's own functions, classes and constants, and those that it imports
    from the other files here; a whole file that it imports has no tree."""
    found = {}
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = alias.asname or alias.name
                if f"{node.module}.{alias.name}" in SOURCES:
                    found[name] = f"{node.module}.{alias.name}", None
                elif node.module in SOURCES and alias.name in definitions(node.module):
                    found[name] = definitions(node.module)[alias.name]
        elif isinstance(node, ast.Import):
            found |= {alias.asname or alias.name: (alias.name, None) for alias in node.names if alias.name in SOURCES}
    for node in SOURCES[module].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
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
            local = [a.value for a in ast.walk(unit) if isinstance(a, ast.Assign) and any(getattr(t, "id", 0) == n.id for t in a.targets)]
            home, where = definitions(module).get(n.id, (module, None))
            for value in local or ([where.value] if isinstance(where, ast.Assign) else []):
                found |= words_in(value, unit, module if local else home, (*seen, n.id))
    return found


def flags_read(script):
    """The flags (their `dest`) that are read by what a script's main() can reach: args.x, getattr(args, "x"), and getattr(args, name)
    or vars(args)[name] where a loop over strings gives the name. What `parse_args` reads does not count: it only checks."""
    todo, seen, read = [(script, "main")], set(), set()
    while todo:
        home, unit = definitions(todo[-1][0]).get(todo.pop()[1], (None, None))
        if unit is None or id(unit) in seen or getattr(unit, "name", "") == "parse_args":
            continue
        seen.add(id(unit))
        loops = [n for n in ast.walk(unit) if isinstance(n, ast.For | ast.comprehension)]
        flags = {name.id for loop in loops if "vars(args)" in ast.unparse(loop.iter) for name in ast.walk(loop.target) if isinstance(name, ast.Name)}
        for n in ast.walk(unit):
            key = None
            if isinstance(n, ast.Name):
                todo.append((home, n.id))
            elif isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name):
                module, tree = definitions(home).get(n.value.id, (None, None))
                if module and tree is None:
                    todo.append((module, n.attr))
                elif n.value.id == "args" and isinstance(n.ctx, ast.Load):
                    read.add(n.attr)
            elif isinstance(n, ast.Call) and ast.unparse(n.func) == "getattr" and ast.unparse(n.args[0]) == "args":
                key = n.args[1]
            elif isinstance(n, ast.Subscript) and (ast.unparse(n.value) == "vars(args)" or getattr(n.value, "id", None) in flags):
                key = n.slice
            if isinstance(key, ast.Constant):
                read.add(key.value)
            elif isinstance(key, ast.Name):
                for loop in loops:
                    if key.id in {t.id for t in ast.walk(loop.target) if isinstance(t, ast.Name)}:
                        read |= words_in(loop.iter, unit, home)
    return read


def parser_of(script, monkeypatch):
    """The ArgumentParser that a script's main() makes."""
    made = []

    def stop(parser, *_):
        made.append(parser)
        raise SystemExit(0)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [script])
    with contextlib.suppress(SystemExit):
        importlib.import_module(script).main()
    return made[0]


UNITS = ("token", "row", "prompt", "trace", "sequence", "step", "pass", "share", "p_unsafe", "GB", "MB", "memory", "norm", "rank", "scaled", "rate",
         "AdamW", "draws")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_says_what_it_is(script, monkeypatch):
    flags = [action for action in parser_of(script, monkeypatch)._actions if action.dest != "help"]
    unread = {action.dest for action in flags} - flags_read(script)
    if script in ("extras.memory", "extras.ranks"):                   # which are run with the flags of train.py, whatever they are
        unread -= flags_read("train")
    assert flags and not unread
    for action in flags:
        assert action.help and len(action.help) > 5, action.dest
        if getattr(action.type, "__name__", "") in ("int", "float"):
            assert any(unit in action.help for unit in UNITS), f"{action.dest}: of what?"


def test_flags_read_tells_flags_of_other_scripts():
    """So that the test above can fail: what another script reads is not read here."""
    read = {script: flags_read(script) for script in SCRIPTS}
    assert {"temperature", "steer", "shard"} <= read["sample"] and not {"threshold", "keep", "lr", "judge", "no_such_flag"} & read["sample"]
    assert {"threshold", "keep"} <= read["guard"] and not {"temperature", "n", "slots", "kl"} & read["guard"]
    assert {"lr", "lora_targets", "weight_decay", "strip_cot"} <= read["train"] and not {"keep", "slots", "judge", "retries"} & read["train"]
    assert {"before", "judge", "temperature"} <= read["eval"] and not {"lr", "kl", "keep"} & read["eval"]
    assert {"lr", "lora_targets", "save_every"} <= read["extras.online"] and not {"kl", "strip_cot", "keep"} & read["extras.online"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_grouped_and_fits(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    done = call(script_of(script), "--help")
    assert done.returncode == 0 and done.stderr == "" and not [line for line in done.stdout.splitlines() if len(line) > 100]
    assert "[]" not in done.stdout and "None" not in done.stdout and "SUPPRESS" not in done.stdout
    ungrouped = re.search(r"\noptions:\n(.*?)(\n\n|$)", done.stdout, re.S)[1]
    flags = set(re.findall(r"^  (-\S+)", ungrouped, re.M)) - {"-h,"}
    if "\nfolder and machine:\n" in done.stdout:                      # else it is a script with few flags
        assert not flags and "\nfolder and machine:\n  --out OUT" in done.stdout
    else:
        assert script in EXTRAS and len(flags) <= 4


@pytest.mark.parametrize("script", ["sample", "extras.online"])
def test_help_of_a_fresh_process(script):
    done = run(script_of(script), "--help", check=False)
    assert done.returncode == 0 and done.stderr == "" and re.match(rf"usage: .*{script.rpartition('.')[2]}", done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_wrong_flag_is_one_line(script):
    done = call(script_of(script), "--no-such-flag")
    assert done.returncode == 2 and done.stdout == "" and re.fullmatch(r"error: .*see --help\n", done.stderr)


# ---------------------------------------------------------------------------------------------
# Progress


def test_progress_on_a_terminal_is_a_bar_with_rate_time_left_and_figure(tmp_path):
    code, shown = on_a_terminal("sample.py", "--out", tmp_path, "--device", "cpu", "--model", "tiny", "--limit", 20, "--slots", 4)
    assert code == 0 and re.search(r"\rsample: +\d+%\|.*\d+/20 \[\d\d:\d\d<\d\d:\d\d, .*trace/s, [\d,]+ tokens/s\]", shown)
    *_, did, where, then, last = shown.strip().splitlines()
    assert did.startswith("sampled 20") and where.startswith("  -> ") and then.startswith("next: ") and json.loads(last)["rows"] == 20
    code, shown = on_a_terminal("guard.py", "--out", tmp_path, "--device", "cpu")
    assert code == 0 and re.search(r"guard tiny: 100%.* 20/20 .*tokens/s, \d+ safe, \d+ unsafe\]", shown)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(thinksafe, "time", SimpleNamespace(time=lambda: clock.now))
    return clock


@pytest.mark.parametrize("seconds, lines", [     # of a step; 200 steps
    (0.1, 0),           # 20 s in all: nothing
    (0.2, 1),           # 40 s: the one after 30
    (1, 6),             # 200 s: every 30
    (60, 200)])         # each step
def test_progress_in_a_log_is_a_whole_line_every_30_seconds(clock, capsys, seconds, lines):
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


def test_progress_of_a_resumed_stage(clock, capsys):
    with progress("train", 10, "step", 6) as advance:
        clock.now += 100
        advance()
    assert re.fullmatch(r"train: +70% 7/10 \[01:40<.*\]\n", capsys.readouterr().err)      # the 6 were not done in these 100 s
