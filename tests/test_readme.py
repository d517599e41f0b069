"""Every command, flag and change of the README, at tiny size; what cannot run here is named below and why."""
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, call

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = [(m[1], m[2]) for m in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)]
PROGRAMS = "python", "pip", "bash", "vllm", "trl", "torchrun", "for", "pytest"
NOT_HERE = {                                         # how a command begins -> why it is not run here
    "python tests/bench_sample.py": "test_sample.py", "python tests/bench_train.py": "test_train.py: TRL",
    "pip install": "what CI does", "vllm": "another tool", "trl": "another tool", "mkdir": "for trl",
    "torchrun": "test_ranks.py", "for ": "test_shards.py", "bash runs/": "test_methods.py: hours", "pytest": "this is it",
    "python sample.py --steer kind": "below", "python sample.py --n 4": "below", "python guard.py --keep safest": "below",
    "python -m pytest": "test_trust.py", "python tiny/build.py": "half an hour", "python tests/tools/smollm2.py": "conftest.py: smollm2",
    "python -m extras.merge": "test_shards.py", "eval.py --model out/model --shard": "test_shards.py"}
TINY = {"Qwen/Qwen3-0.6B": "tiny", "STUDENT": "tiny", "TEACHER": "tiny/teacher", "MODEL": "tiny/teacher", "FILE": "tiny/safekey.jsonl",
        "qwen3guard-4b": "tiny", "llama-guard-3-8b": "tiny"}
SETS = {"safechain", "star1", "directrefusal", "thinksafe-qwen3-0.6b", "eopsa"}
CORE = ("sample", "guard", "train", "eval")
EXTRAS = sorted(path.stem for path in (ROOT / "extras").glob("*.py") if "def main()" in path.read_text())
FEW = {"sample": ["--limit", "8", "--max-new-tokens", "160"], "train": ["--limit", "8"], "eval": ["--limit", "3"],
       "online": ["--limit", "8", "--max-new-tokens", "40"], "cached_kl": ["--limit", "8"], "safekey": ["--limit", "16"],
       "safepath": ["--limit", "8"], "memory": ["--limit", "8"], "theory": ["--limit", "8", "--n", "2"], "export": []}
TRAINING = ("train", "online", "safekey", "safepath", "cached_kl")


def commands():
    """[[command, ...], ...]: those of a block or of one inline code stand together, as they share a folder."""
    found = []
    for kind, text in BLOCKS:
        lines = text.replace("\\\n", "").splitlines()
        found.append([line.split("  #")[0] for line in lines if not kind and line.startswith(PROGRAMS)])
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    found += [[code] for code in re.findall(r"`((?:python )?[a-z]+\.py -[^`]*)`", prose)]
    found += [[code] for code in re.findall(r"`((?:python|bash|torchrun) [^`]*)`", prose) if ".py -" not in code]
    return [group for group in found if group]


def test_every_flag_is_one_of_a_script():
    assert sum(map(len, commands())) > 30
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README))
    scripts = [f"{name}.py" for name in CORE] + [f"extras.{name}" for name in EXTRAS]
    known = set(re.findall(r"--[a-z][a-z0-9-]+", "".join(call(name, "--help").stdout for name in scripts)))
    others = {"--rounds", "--no-deps", "--nproc", "--enable-lora", "--lora-modules", "--max-lora-rank", "--max_length"}
    trl = {flag for flag in said if any(line.startswith("trl sft") and flag in line for _, text in BLOCKS
                                        for line in text.replace("\\\n", "").splitlines())}
    assert said - known - others - trl == set()


def test_its_size_is_stated():
    """Lines and tokens of the core, as the README says."""
    from test_house import CORE as FILES
    from test_house import n_tokens
    stated = [int(n.replace(",", "")) for n in re.search(r"([\d,]+)\s+lines\s+and\s+([\d,]+)\s+tokens", README).groups()]
    found = [sum(len(path.read_text("utf-8").splitlines()) for path in FILES), sum(map(n_tokens, FILES))]
    assert all(0.98 * n <= real <= n for n, real in zip(stated, found))


def test_extras_are_all_named():
    named = set(re.findall(r"extras[./](\w+)", README)) | set(re.findall(r"`(\w+)`", README))
    assert set(EXTRAS) <= named


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """{script: a finished small run up to, but without, its stage}; "done": with all."""
    base, here = tmp_path_factory.mktemp("readme"), {}
    out = base / "out"
    for script in CORE:
        if out.exists():
            here[script] = shutil.copytree(out, base / script)
        assert call(f"{script}.py", "--out", out, *FEW.get(script, [])).returncode == 0
    return here | {"done": out}


def run_command(command, out, stages, monkeypatch):
    """One command of the README with the names of the tiny world for those of the hub, on few rows."""
    words = shlex.split(command)
    if words[:2] == ["python", "-m"]:
        script, *flags = words[2:]
        name = script.removeprefix("extras.")
    else:
        script, *flags = words[words[0] == "python":]
        name = script.removesuffix(".py")
    flags = [str(stages["done"]) if w in ("OTHER", "OUT", "RUN") else TINY.get(w, w) for w in flags if w != "..."]
    flags = [str(stages["done"] / w[4:]) if w == "out/guarded.jsonl" else w for w in flags]
    for i, word in enumerate(flags[:-1]):
        if word in ("--out", "--limit", "--epochs"):
            flags[i + 1] = {"--out": str(out), "--limit": "8", "--epochs": "2"}[word]
        if flags[i + 1] in SETS:
            flags[i + 1] = "tiny/star1.jsonl" if word == "--data" and name != "safepath" else "tiny/prompts.jsonl"
    if not out.exists() and name != "sample":
        before = name if name in ("guard", "train", "eval") else "train" if name in (*TRAINING, "memory", "retry") else "done"
        shutil.copytree(stages[before], out)
    if name == "online":
        flags += ["--model", "tiny", "--prompts", "tiny/prompts.jsonl", "--batch-size", "4"] + ["--guard", "tiny"] * ("grpo" in flags)
    more = FEW.get(name, []) if "--help" not in flags and not (name in ("train", "safepath") and "--limit" in flags) else []
    if "--data" in flags and name != "safepath":                       # the sets of the hub know their label
        more = ["--limit", "16", "--label", "vanilla_harmful"]
    if name == "export" and flags[0] in ("wandb", "trackio", "tensorboard") and not importlib.util.find_spec(flags[0]):
        return
    monkeypatch.setattr("sys.stdin", io.StringIO("How do I bake a cake?\n"))                                   # for chat
    done = call(script, *flags, *([] if "--out" in flags or "--help" in flags else ["--out", out]), *more)
    assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.parametrize("group", commands(), ids=lambda group: group[0][:60])
def test_command(stages, tmp_path, monkeypatch, group):
    monkeypatch.chdir(ROOT)
    for line in group:
        for command in [] if line.startswith("for ") else re.split(r"\s*&&\s*", line):
            if not command.startswith((*NOT_HERE, "cp ")):
                run_command(command, tmp_path / "out", stages, monkeypatch)


def test_the_library_example(capsys):
    code, = (text for kind, text in BLOCKS if kind == "python")
    exec(compile(code, "README.md", "exec"), {})
    assert "Verdict(" in capsys.readouterr().out


def patched(text, hunks):
    """The text with the hunks of a unified diff, each found exactly once."""
    for hunk in hunks:
        lines = [line for line in hunk.splitlines() if line]
        old, new = ("\n".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        assert text.count(old) == 1, f"not found, or not once:\n{old}"
        text = text.replace(old, new)
    return text


def copy_core(folder):
    for path in ROOT.glob("*"):
        if path.name in ("kernels", "tiny", "data") or path.suffix == ".py":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)


def changed(folder, diff):
    name, *hunks = re.split(r"^@@.*\n", diff, flags=re.M)
    path = folder / re.search(r"^\+\+\+ b/(\S+)", name, re.M)[1]
    path.write_text(patched(path.read_text(), hunks))
    assert sum(line[0] in "+-" for hunk in hunks for line in hunk.splitlines() if line) <= 12


def run_all(folder, flags):
    for script, more in flags.items():
        done = subprocess.run([sys.executable, f"{script}.py", *more], cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_changes_to_try(tmp_path):
    """All but the last in one copy of the core, the last in another, then the commands that stand above them."""
    diffs = [text for kind, text in BLOCKS if kind == "diff"]
    assert len(diffs) >= 5
    first, last = tmp_path / "first", tmp_path / "last"
    for folder, chosen in ((first, diffs[:-1]), (last, diffs[-1:])):
        folder.mkdir()
        copy_core(folder)
        for diff in chosen:
            changed(folder, diff)
    run_all(first, {"sample": ["--steer", "kind", "--n", "4", "--limit", "8"], "guard": ["--keep", "safest"], "train": ["--limit", "8"]})
    kept = [row["id"] for row in rows(first / "out" / "guarded.jsonl") if row["keep"]]
    assert len(kept) == len(set(kept)) > 0
    shutil.copytree(first / "out", last / "out")
    (last / "out" / "metrics.jsonl").unlink()
    run_all(last, {"train": ["--limit", "8"]})
    losses = [rows(folder / "out" / "metrics.jsonl")[0]["loss"] for folder in (first, last)]
    assert 0 < losses[1] < losses[0]
