"""The methods beside ThinkSafe: refusals without reasoning, retries, the curated sets, the script of all. SafePath, SafeKey and
the online methods have files of their own."""
import json
import subprocess

import pytest
from conftest import ROOT, call, rows_of

from data.sources import balanced_subset, training_rows
from tiny import build, world
from train import encode_rows
from training_rows import TWO, row, texts


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


def test_a_teacher_whose_template_opens_think(tokenizer, tmp_path):
    """Rows of other tools begin inside its reasoning; a student whose template does not open it is to do that itself. A student's own
    trace stays as it is."""
    begun = {"instruction": "q", "prompt_label": "vanilla_harmful", "response": TWO.removeprefix("<think>\n")}
    trace = {**begun, "id": "1", "k": 0, "finish_reason": "stop"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (begun, trace)))
    examples, _ = encode_rows(training_rows(tmp_path / "rows.jsonl"), tokenizer, 2048)
    assert [text for _, text in texts(examples, tokenizer)] == [TWO + "<|im_end|>", TWO.removeprefix("<think>\n") + "<|im_end|>"]


def test_balanced_choice():
    items = [{"id": i, "label": "abbccccc"[i % 8]} for i in range(80)]
    for n, counts in ((6, [2, 2, 2]), (36, [10, 13, 13]), (75, [10, 20, 45]), (100, [10, 20, 50])):
        chosen = balanced_subset(items, n, 0)
        assert [sum(i["label"] == x for i in chosen) for x in "abc"] == counts
        assert len({i["id"] for i in chosen}) == sum(counts) and chosen == balanced_subset(items, n, 0)
    assert balanced_subset(items, 6, 0) != balanced_subset(items, 6, 1)


@pytest.mark.parametrize("flags, message", [
    (["--strip-cot", "none"], "invalid choice"), (["--limit", 0], "--limit")])
def test_flags_that_train_py_does_not_take(tmp_path, flags, message):
    done = call("train.py", "--model", "tiny", "--data", ROOT / "tiny" / "star1.jsonl", "--label", "vanilla_harmful", "--out", tmp_path / "out", *flags)
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "out").exists()


# ---- retries

def test_retries(tmp_path):
    """One more trace where none was kept, after each run of the guard, up to N: the traces that --n would have given."""
    flags = ["--steer", "none", "--limit", 24]

    def retry():
        done = call("extras.retry", "--n", 2, "--slots", 24, "--out", tmp_path)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "samples.jsonl").read_bytes()

    def sample():
        assert call("sample.py", *flags, "--slots", 24, "--out", tmp_path).returncode == 0
        return (tmp_path / "samples.jsonl").read_bytes()

    def judge():
        assert call("guard.py", "--out", tmp_path).returncode == 0
        rows = rows_of(tmp_path / "guarded.jsonl")
        return {r["id"] for r in rows} - {r["id"] for r in rows if r["keep"]}

    first = sample()
    done = call("extras.retry", "--n", 2, "--out", tmp_path)
    assert done.returncode == 2 and "run it first" in done.stderr and json.loads((tmp_path / "run.json").read_text())["sample"]["finished"]
    rejected = judge()
    assert 5 < len(rejected) < 20
    for k in (1, 2):
        now = retry()
        assert now.startswith(first) and retry() == now == sample()                                         # once each
        new = [json.loads(line) for line in now[len(first):].splitlines()]
        assert {(r["id"], r["k"]) for r in new} == {(i, k) for i in rejected}
        lines = now.splitlines(keepends=True)                                                               # stopped before the last of them
        (tmp_path / "samples.jsonl").write_bytes(b"".join(lines[:-1]))
        now = retry()
        assert sorted(now.splitlines()) == sorted(line.rstrip() for line in lines)
        first, rejected = now, judge()
        kept = [r for r in rows_of(tmp_path / "guarded.jsonl") if r["keep"]]
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["sample"]["rows"] == record["guard"]["rows"] == len(now.splitlines())
        assert len(kept) == len({r["id"] for r in kept})
    assert rejected and retry() == first                                                                    # two it was
    call("sample.py", *flags, "--n", 3, "--out", tmp_path / "n")
    at_once = {(r["id"], r["k"]): r for r in rows_of(tmp_path / "n" / "samples.jsonl")}
    assert all(at_once[r["id"], r["k"]] == r for r in rows_of(tmp_path / "samples.jsonl"))
    call("guard.py", "--keep", "unanimous", "--out", tmp_path / "n")
    assert "--keep safe" in call("extras.retry", "--n", 1, "--out", tmp_path / "n").stderr


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

    def trained(commands):
        """Names of the runs that are trained, by train.py or a script of extras/."""
        scripts = ("train.py", "-m extras.safekey", "-m extras.safepath", "-m extras.online")
        return [c.partition("--out ")[2].split()[0].rpartition("/")[2] for c in commands if c.startswith(scripts)]
    (tmp_path / "log.fail").touch()
    done, commands = go()
    assert len(trained(commands)) == len(set(trained(commands))) == 38 and done.stdout.count("failed") == 2 and "star1-1: failed" in done.stdout
    assert sum(c.startswith(("sample.py", "-m extras.retry")) and "/retries-0 " in c for c in commands) == 4
    measured = {c.rpartition("/")[2] for c in commands if c.startswith("-m extras.perplexity")}
    assert measured == {name for name in trained(commands) if name[:-2] not in ("star1", "safepath", "grpo", "opd", "opsa")}
    assert commands[-1].startswith("-m extras.compare") and "star1" not in commands[-1] and done.returncode == 1
    (tmp_path / "log.fail").unlink()
    done, commands = go()
    assert sorted(trained(commands)) == ["star1-0", "star1-1"]
    done, commands = go()                                              # the fake's theory leaves no theory.json
    assert [c.split()[1] for c in commands] == ["extras.theory", "extras.theory", "extras.compare"] and "star1" in commands[-1] and done.returncode == 0


def test_the_scripts_commands_are_known(tmp_path):
    """Every command of runs/*.sh that trains, parsed by the script itself: no flag is left of an earlier version."""
    fake, log = tmp_path / "python", tmp_path / "log"
    fake.write_text('#!/bin/bash\necho "$*" >> "$LOG"\n')
    fake.chmod(0o755)
    for name in ("qwen3-0.6b", "qwen3-4b", "r1-distill-1.5b", "tiny"):
        subprocess.run(["bash", ROOT / "runs" / f"{name}.sh", tmp_path / "out"], capture_output=True, timeout=60,
                       env={"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log), "SEEDS": "0", "METHODS": "all" if name.startswith("qwen3-0") else ""})
    commands = {" ".join(line.split()) for line in log.read_text().splitlines()}
    helps = {}
    for command in commands:
        script = command.split()[1 if command.startswith("-m ") else 0]
        helps.setdefault(script, call(script, "--help").stdout)
        unknown = [word for word in command.split() if word.startswith("--") and word not in helps[script]]
        assert not unknown, command
    assert helps.keys() >= {"sample.py", "guard.py", "train.py", "eval.py", "extras.online", "extras.safekey", "extras.safepath", "extras.retry",
                            "extras.perplexity", "extras.report"} and len(commands) > 80
