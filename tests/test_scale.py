"""More than one process: shards of the stages that go row by row, ranks of torchrun for training."""
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call, rows_of
from safetensors.torch import load_file, save_file

from thinksafe import InputError, RowWriter, Stage, content_id, owns, read_run, read_shards, shard_range

pytestmark = pytest.mark.trust

fork = multiprocessing.get_context("fork")                                  # POSIX locks know processes, not objects


def by_key(rows):
    """In one order; p_unsafe up to rounding, which depends on what is packed together."""
    rows = [{**row, **({"p_unsafe": round(row["p_unsafe"], 5)} if row.get("p_unsafe") else {})} for row in rows]
    return sorted(rows, key=lambda row: (row["id"], row.get("when", ""), row["k"]))


def ok(script, *flags):
    done = call(script, *flags)
    assert done.returncode == 0, done.stderr
    return done


def test_every_row_has_one_shard(tries):
    ids = [content_id(str(i)) for i in range(2000)]
    for n in (1, 2, 3, 7, 64):
        with tries("comparison"):
            owners = [[i for i in range(1, n + 1) if owns((i, n), x)] for x in ids]
            assert all(len(i) == 1 for i in owners)
            assert all(0.5 < sum(i == [k] for i in owners) * n / len(ids) < 1.6 for k in range(1, n + 1))
            assert [shard_range((i, n))[1] for i in range(1, n)] == [shard_range((i, n))[0] for i in range(2, n + 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in one process -> its folder."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ok("sample.py", "--out", out, "--limit", 24, "--n", 2)
    ok("guard.py", "--out", out, "--keep", "unanimous")
    ok("train.py", "--out", out, "--epochs", 1)
    ok("eval.py", "--out", out, "--limit", 3)
    return out


def test_shards_make_what_one_process_makes(whole, tries, tmp_path):
    """In each stage a shard of three, then two of two: n changes on the way. What is there is not made again."""
    out = tmp_path / "out"
    for script, name, flags in (("sample.py", "samples", ["--limit", 24, "--n", 2]), ("guard.py", "guarded", ["--keep", "unanimous"]),
                                ("train.py", None, ["--epochs", 1]), ("eval.py", "eval", ["--limit", 3])):
        if script == "train.py":
            ok(script, "--out", out, *flags)
            continue
        expected, stage = rows_of(whole / f"{name}.jsonl"), script.removesuffix(".py")
        for shard, last in (("2/3", False), ("1/2", False), ("2/2", True)):
            done = ok(script, "--out", out, *flags, "--shard", shard)
            assert read_run(out)[stage]["finished"] == last and ("shard" not in done.json) == last
            if script == "sample.py" and not last:
                done = call("guard.py", "--out", out)
                assert done.returncode == 2 and "not complete" in done.stderr
        with tries("comparison"):
            assert {p.name for p in out.glob(f"{name}*")} - {"eval.json"} == {f"{name}-{x}.jsonl" for x in ("2of3", "1of2", "2of2")}
            assert by_key(read_shards(out / f"{name}.jsonl")) == by_key(expected)
            assert all(rows_of(path) for path in out.glob(f"{name}-*of*.jsonl"))
        files = {p: p.read_bytes() for p in out.glob(f"{name}*.jsonl")}
        ok(script, "--out", out, *flags)                                       # one process: nothing is left to do
        assert not (out / f"{name}.jsonl").read_bytes() and {p: p.read_bytes() for p in files} == files and read_run(out)[stage]["finished"]
    assert json.loads((out / "eval.json").read_text()) == json.loads((whole / "eval.json").read_text())
    assert read_run(out)["train"]["rows"] == read_run(whole)["train"]["rows"]
    assert all(len(rows_of(f / "metrics.jsonl")) == read_run(whole)["train"]["steps"] for f in (out, whole))
    said, its = (ok("report.py", "--out", f).stdout.partition(" rows")[0] for f in (out, whole))
    assert said == its                                                           # 72 of 72


def test_rows_that_are_missing_are_noticed(whole, tries, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name, script in (("guarded", "train.py"), ("samples", "guard.py")):
        with tries("fault"):
            path = out / f"{name}.jsonl"
            path.write_text(path.read_text().partition("\n")[2])
            done = call(script, "--out", out, *(["--keep", "unanimous"] if script == "guard.py" else ["--epochs", 1]))
            assert done.returncode == 2 and ("47 of the 48 rows" in done.stderr or "not complete" in done.stderr)


def test_a_shard_killed_inside_a_row(whole, tries, tmp_path):
    """Half a row at the end of a shard's file is no row: another shard makes it, and readers pass it by."""
    out = tmp_path / "out"
    ok("sample.py", "--out", out, "--limit", 24, "--n", 2, "--shard", "1/2")
    with tries("fault"):
        path = out / "samples-1of2.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
        ok("sample.py", "--out", out, "--limit", 24, "--n", 2, "--shard", "2/2")
        assert not read_run(out)["sample"]["finished"]
        ok("sample.py", "--out", out, "--limit", 24, "--n", 2)
        assert by_key(read_shards(out / "samples.jsonl")) == by_key(rows_of(whole / "samples.jsonl"))
        assert len(rows_of(out / "samples.jsonl")) == 1
        assert ok("guard.py", "--out", out, "--keep", "unanimous").json["rows"] == 48


@pytest.mark.parametrize("env, path", [
    ({"RANK": "0", "WORLD_SIZE": "3"}, "samples-1of3.jsonl"), ({"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "4",
     "SLURM_ARRAY_TASK_STEP": "2"}, "samples-2of2.jsonl"), ({"RANK": "0", "WORLD_SIZE": "1"}, "samples.jsonl")])
def test_the_environment_says_which_shard(tmp_path, monkeypatch, env, path):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    ok("sample.py", "--out", tmp_path, "--limit", 2, "--max-new-tokens", 1)
    assert (tmp_path / path).exists()


def test_bad_shards(tmp_path):
    for word in ("0/2", "3/2", "1", "a/b", "1/2/3"):
        done = call("sample.py", "--out", tmp_path, "--shard", word)
        assert done.returncode == 2 and "--shard" in done.stderr and done.stderr.count("\n") == 1


def work(out, shard, total, seed=0, wait=0.0, said=None):
    """A stage without a model: the shard's part of `total` rows."""
    try:
        stage = Stage("sample", SimpleNamespace(out=Path(out), device="cpu", shard=shard), {"seed": seed}, "samples.jsonl")
        writer = RowWriter(stage.path)
        done = {row["id"] for row in read_shards(Path(out) / "samples.jsonl")}
        writer.write(*({"id": str(i)} for i in range(total) if owns(shard, str(i)) and str(i) not in done))
        if said:
            said.put("at work")
        time.sleep(wait)
        rows = stage.all_rows("samples.jsonl", total)
        if rows is not None:
            stage.finish("did", stage.paths, "next", rows=len(rows))
        result = len(rows or ())
    except InputError as e:
        result = str(e)
    if said:
        said.put(result)


def test_shards_that_work_at_the_same_time(tries, tmp_path):
    """Whoever comes last ends the stage, once; and no run record of another shard is lost."""
    for trial in range(20):
        out, said = tmp_path / str(trial), fork.Queue()
        workers = [fork.Process(target=work, args=(out, (i, 4), 100, 0, 0.0, said)) for i in (1, 2, 3, 4)]
        for w in workers:
            w.start()
        results = [said.get(timeout=60) for _ in range(8)]
        for w in workers:
            w.join()
        with tries("comparison"):
            assert sorted(r for r in results if r != "at work") == [0, 0, 0, 100]
            assert read_run(out)["sample"]["finished"] and read_run(out)["sample"]["rows"] == 100
            assert sorted(int(row["id"]) for row in read_shards(out / "samples.jsonl")) == list(range(100))


def test_shards_that_overlap_or_differ_are_refused(tries, tmp_path):
    """While 1/2 is at work: none that has rows of it, whatever its n; none with other flags. Its other half may work."""
    said = fork.Queue()
    first = fork.Process(target=work, args=(tmp_path, (1, 2), 50, 0, 60.0, said))
    first.start()
    assert said.get(timeout=60) == "at work"

    def other(shard, seed=0):
        heard = fork.Queue()
        process = fork.Process(target=work, args=(tmp_path, shard, 50, seed, 0.0, heard))
        process.start()
        process.join()
        return [heard.get(timeout=10) for _ in range(heard.qsize())][-1]
    for shard in ((1, 1), (1, 2), (2, 3), (1, 64)):
        with tries("fault"):
            assert "another process" in other(shard)
    with tries("fault"):
        assert "made with seed 0, now it is 1" in other((2, 2), seed=1)
    assert other((2, 2)) == other((4, 4)) == 0
    with tries("fault"):
        first.kill()                                                            # its lock ends with it
        first.join()
        assert other((1, 2)) == 50 and read_run(tmp_path)["sample"]["finished"]


# ---------------------------------------------------------------------------------------------
# torchrun


def training_rows(path, n=40):
    """Rows of all four labels, of different lengths."""
    with open(ROOT / "tiny" / "prompts.jsonl", encoding="utf-8") as f:
        prompts = [json.loads(line) for line in f][::1200 // n][:n]
    path.write_text("".join(json.dumps({**row, "response": f"<think>\n{row['instruction']} {'Why? ' * (i % 7)}\n</think>\n\nNo, {i}."}) + "\n"
                            for i, row in enumerate(prompts)))
    return path


def torchrun(n, *flags):
    """torchrun train.py in its own session -> Popen."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), str(ROOT / "train.py"),
                             *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def same_training(a, b):
    """Metrics and weights within 1e-5."""
    rows, others = rows_of(a / "metrics.jsonl"), rows_of(b / "metrics.jsonl")
    assert len(rows) == len(others) and [r["tokens"] for r in rows] == [r["tokens"] for r in others]
    for key in ("loss", "ce", "kl", "grad_norm", "lr"):
        torch.testing.assert_close(torch.tensor([r[key] for r in rows]), torch.tensor([r[key] for r in others]), atol=1e-5, rtol=1e-5)
    assert sum(r["ce"] > 1e-3 and r["kl"] > 1e-5 for r in rows) > 5                   # both are at work, in the same steps
    weights, its = (load_file(f / "model" / "adapter_model.safetensors") for f in (a, b))
    assert weights.keys() == its.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], its[name], atol=1e-5, rtol=1e-5)


def test_two_ranks_train_as_one_process_does_also_when_one_was_killed(tries, tmp_path):
    """Ten steps of cross-entropy and KL, the last with one row; then once more with rank 1 killed, and gone on with by one process and by two."""
    flags = ["--model", "tiny", "--data", training_rows(tmp_path / "rows.jsonl", 37), "--kl", "--epochs", 2, "--batch-size", 9, "--save-every", 1]
    one, two, stopped = (tmp_path / name for name in ("one", "two", "stopped"))
    ok("train.py", "--out", one, *flags)
    assert len(rows_of(one / "metrics.jsonl")) == 10
    job = torchrun(2, "--out", two, *flags)
    said = job.communicate(timeout=250)[0]
    assert job.returncode == 0, said
    assert said.count('"stage": "train"') == 1 and read_run(two)["train"]["finished"]           # rank 0 alone speaks
    with tries("comparison"):
        same_training(one, two)

    job = torchrun(2, "--out", stopped, *flags)
    metrics = stopped / "metrics.jsonl"
    while job.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 2):
        time.sleep(0.005)
    ranks = {}
    for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        env = dict(pair.partition(b"=")[::2] for pair in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        ranks[env.get(b"RANK")] = int(pid)
    with tries("fault"):
        os.kill(ranks[b"1"], signal.SIGKILL)
        said = job.communicate(timeout=120)[0]
        assert job.returncode != 0 and "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in said      # torchrun says who was killed
        assert not read_run(stopped)["train"]["finished"] and not (stopped / "model").exists()
        assert 2 <= len(rows_of(metrics)) < 10
        shutil.copytree(stopped, tmp_path / "resumed")
        ok("train.py", "--out", stopped, *flags)
        same_training(one, stopped)

        job = torchrun(2, "--out", tmp_path / "resumed", *flags)
        said = job.communicate(timeout=250)[0]
        assert job.returncode == 0, said
        same_training(one, tmp_path / "resumed")


def test_nan_on_one_rank_stops_all(tries, tmp_path, folders):
    """One of two rows has a token whose embedding is nan: no rank takes the step, and the rows are named."""
    model = tmp_path / "model"
    shutil.copytree(folders("llama_untied_bias")[1], model)
    tensors = load_file(model / "model.safetensors")
    from thinksafe import encode_text, load_tokenizer
    token = encode_text(load_tokenizer(model), "%")[0]
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"id": i, "instruction": text, "prompt_label": "vanilla_benign", "response": "<think>\nA\n</think>\n\nB"}) + "\n"
                            for i, text in (("good", "Hello"), ("bad", "%"))))
    with tries("fault"):
        job = torchrun(2, "--out", tmp_path / "out", "--model", model, "--data", data, "--batch-size", 2, "--epochs", 1, "--device", "cpu")
        said = job.communicate(timeout=120)[0]
        assert job.returncode != 0 and "error: step 1: loss nan" in said and "stopped before this step was taken. Its rows: " in said
        assert not (tmp_path / "out" / "checkpoint.safetensors").exists() and not rows_of(tmp_path / "out" / "metrics.jsonl")


def test_what_ranks_refuse(tries, tmp_path, monkeypatch):
    rows = training_rows(tmp_path / "rows.jsonl", 4)
    monkeypatch.setenv("WORLD_SIZE", "2")                                       # without torchrun's other variables
    with tries("fault"):
        done = call("train.py", "--out", tmp_path / "out", "--model", "tiny", "--data", rows)
        assert done.returncode == 2 and "start with torchrun" in done.stderr and done.stderr.count("\n") == 1
