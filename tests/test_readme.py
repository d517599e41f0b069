"""Every command, flag and change of the README, at tiny size; what cannot run here is named below and why."""
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
PROGRAMS = "python", "pip", "bash", "vllm", "trl", "sbatch", "torchrun", "for", "pytest"
NOT_HERE = {                                         # how a command begins -> why it is not run here
    "python sample.py --bench": "below",
    "pip install": "what CI does", "vllm": "another tool", "trl": "another tool", "mkdir": "for trl", "sbatch": "a cluster",
    "torchrun": "test_scale.py", "for ": "test_scale.py: shards", "bash runs/": "test_methods.py: hours", "pytest": "this is it",
    "python tests/bench_train.py": "test_train.py: TRL", "eval.py --compare": "test_compare.py",
    "python sample.py --steer kind": "below", "python sample.py --n 4": "below", "python guard.py --keep safest": "below",
    "python -m pytest": "test_trust.py", "python tiny/build.py": "half an hour", "python tests/smollm2.py": "conftest.py: smollm2"}
TINY = {"Qwen/Qwen3-0.6B": "tiny", "STUDENT": "tiny", "TEACHER": "tiny/teacher", "MODEL": "tiny/teacher", "FILE": "tiny/safekey.jsonl",
        "qwen3guard-4b": "tiny", "llama-guard-3-8b": "tiny"}
SETS = {"safechain", "star1", "directrefusal", "thinksafe-qwen3-0.6b", "eopsa"}
FEW = {"sample": ["--limit", "8", "--max-new-tokens", "160"], "guard": [], "train": ["--limit", "8"], "eval": ["--limit", "3"], "report": []}


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
    known = set(re.findall(r"--[a-z][a-z0-9-]+", "".join(call(f"{name}.py", "--help").stdout for name in FEW)))
    others = {"--no-deps", "--array", "--wrap", "--nproc_per_node", "--enable-lora", "--lora-modules", "--max-lora-rank", "--max_length"}
    trl = {flag for flag in said if any(line.startswith("trl sft") and flag in line for _, text in BLOCKS
                                        for line in text.replace("\\\n", "").splitlines())}
    assert said - known - others - trl == set()


def test_its_size_is_stated():
    lines = sum(path.read_bytes().count(b"\n") for path in (*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")))
    said = int(re.search(r"About ([\d,]+) lines of Python outside", README)[1].replace(",", ""))
    assert abs(said - lines) < 0.03 * lines


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """{script: a finished small run up to, but without, its stage}; "done": with all."""
    base, here = tmp_path_factory.mktemp("readme"), {}
    out = base / "out"
    for script in ("sample", "guard", "train", "eval"):
        if out.exists():
            here[script] = shutil.copytree(out, base / script)
        assert call(f"{script}.py", "--out", out, *FEW[script]).returncode == 0
    return here | {"done": out}


def test_the_bench():
    done = call("sample.py", "--bench", "--requests", 6, "--prompt-tokens", 20, "--new-tokens", 30, "--rounds", 1, "--batch", 6)
    methods = {"ours", "transformers", "transformers, static cache"}
    assert done.returncode == 0 and done.json["best"].keys() == methods and done.json["ratio"] > 0


def run_command(command, out, stages, monkeypatch):
    """One command of the README with the names of the tiny world for those of the hub, on few rows."""
    words = shlex.split(command)
    script, *flags = words[words[0] == "python":]
    script = script.removesuffix(".py")
    flags = [str(stages["done"]) if w in ("OTHER", "OUT", "RUN") else TINY.get(w, w) for w in flags if w != "..."]
    for i, word in enumerate(flags[:-1]):
        if word in ("--out", "--limit", "--epochs"):
            flags[i + 1] = {"--out": str(out), "--limit": "8", "--epochs": "2"}[word]
        if flags[i + 1] in SETS:
            flags[i + 1] = "tiny/star1.jsonl" if word == "--data" and "--primer" not in flags else "tiny/prompts.jsonl"
    if "--retries" in flags and not out.exists():
        shutil.copytree(stages["train"], out)
    if script in ("guard", "train", "eval") and not out.exists():
        shutil.copytree(stages["done" if "--compare" in flags or "--theory" in flags else script], out)
    if script == "report":
        shutil.copytree(stages["done"], out)
    if "--online" in flags:
        flags += ["--model", "tiny", "--prompts", "tiny/prompts.jsonl", "--batch-size", "4"] + ["--guard", "tiny"] * ("grpo" in flags)
    more = FEW[script] if "--limit" not in flags and "--compare" not in flags and "--help" not in flags else []
    if "--data" in flags and "--primer" not in flags:                 # the sets of the hub know their label
        more = ["--limit", "16", "--label", "vanilla_harmful"]
    monkeypatch.setattr("sys.stdin", io.StringIO("How do I bake a cake?\n"))                                   # for --chat
    done = call(f"{script}.py", *flags, *([] if "--out" in flags or "--help" in flags else ["--out", out]), *more)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done


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


def test_the_changes_to_try(tmp_path):
    """All of them in one copy of the repository, then the commands that stand above them."""
    for path in ROOT.glob("*"):
        if path.name in ("kernels", "tiny", "report.html") or path.suffix == ".py":
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    diffs = [text for kind, text in BLOCKS if kind == "diff"]
    assert len(diffs) >= 4
    for diff in diffs:
        name, *hunks = re.split(r"^@@.*\n", diff, flags=re.M)
        path = tmp_path / re.search(r"^\+\+\+ b/(\S+)", name, re.M)[1]
        path.write_text(patched(path.read_text(), hunks))
        assert sum(line[0] in "+-" for hunk in hunks for line in hunk.splitlines() if line) <= 12
    flags = {"sample": ["--steer", "kind", "--n", "4", "--limit", "8"], "guard": ["--keep", "safest"], "train": ["--kl", "--limit", "8"]}
    for script, more in flags.items():
        done = subprocess.run([sys.executable, f"{script}.py", *more], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    kept = [row["id"] for row in map(json.loads, (tmp_path / "out" / "guarded.jsonl").read_text().splitlines()) if row["keep"]]
    assert len(kept) == len(set(kept)) > 0
    last = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] > 0 and last["kl"] == 0
