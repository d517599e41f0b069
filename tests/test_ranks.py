"""Several processes train one model: extras/ranks.py."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, rows_of
from safetensors.torch import load_file, save_file

from data.chat import encode_parts
from data.run_record import read_run
from thinksafe import load_tokenizer

pytestmark = pytest.mark.trust


def ok(script, *flags):
    done = call(script, *flags)
    assert done.returncode == 0, done.stderr
    return done


def training_rows(path, n=40):
    """Rows of all four labels, of different lengths."""
    with open(ROOT / "tiny" / "prompts.jsonl", encoding="utf-8") as f:
        prompts = [json.loads(line) for line in f][::1200 // n][:n]
    path.write_text("".join(json.dumps({**row, "response": f"<think>\n{row['instruction']} {'Why? ' * (i % 7)}\n</think>\n\nNo, {i}."}) + "\n"
                            for i, row in enumerate(prompts)))
    return path


def torchrun(n, *flags, script=("-m", "extras.ranks")):
    """torchrun -m extras.ranks in its own session -> Popen."""
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), *script,
                             *map(str, flags)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
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


RUNS_OUT = """
import os, sys
sys.path.insert(0, os.getcwd())
import torch
import train
from extras import ranks

forward, calls = train.target_hidden_states, []

def target_hidden_states(model, examples):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 5:
        raise torch.OutOfMemoryError("none left")
    return forward(model, examples)

train.target_hidden_states = target_hidden_states
ranks.cli(ranks.main)
"""


def test_one_rank_runs_out_of_memory_and_steps_have_fewer_rows_than_ranks(tries, tmp_path):
    """Rank 1 of 3 in its fifth pass: all recompute activations from there on, and the weights are those of one process."""
    flags = ["--model", "tiny", "--data", training_rows(tmp_path / "rows.jsonl", 8), "--full", "--epochs", 1, "--batch-size", 2, "--lr", "1e-3",
             "--pack-tokens", 100]
    (tmp_path / "runs_out.py").write_text(RUNS_OUT)
    ok("train.py", "--out", tmp_path / "one", *flags)
    with tries("fault"):
        job = torchrun(3, "--out", tmp_path / "new" / "three", *flags, script=[tmp_path / "runs_out.py"])
        said = job.communicate(timeout=250)[0]
        assert job.returncode == 0 and said.count("from here on activations are recomputed") == 1, said
    with tries("comparison"):
        a, b = (load_file(tmp_path / out / "model" / "model.safetensors") for out in ("one", "new/three"))
        assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["three"]           # the other ranks wrote nothing


def test_with_dropout_one_process_goes_on_from_what_two_did(tries, tmp_path):
    flags = ["--model", "tiny", "--data", training_rows(tmp_path / "rows.jsonl", 8), "--epochs", 1, "--batch-size", 4, "--lora-dropout", 0.2]
    job = torchrun(2, "--out", tmp_path / "out", *flags)
    said = job.communicate(timeout=250)[0]
    assert job.returncode == 0, said
    with tries("fault"):
        assert "all steps were taken before" in ok("train.py", "--out", tmp_path / "out", *flags).stdout
    job = torchrun(2, "--out", tmp_path / "out", *flags, "--lr", "1e-3")
    said = job.communicate(timeout=250)[0]
    with tries("fault"):
        assert job.returncode != 0 and "was made with lr" in said


def test_nan_on_one_rank_stops_all(tries, tmp_path, folders):
    """One of two rows has a token whose embedding is nan: no rank takes the step, and the rows are named."""
    model = tmp_path / "model"
    shutil.copytree(folders("llama_untied_bias")[1], model)
    tensors = load_file(model / "model.safetensors")
    token = encode_parts(load_tokenizer(model), "", "%")[0]
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"id": i, "instruction": text, "prompt_label": "vanilla_benign", "response": "<think>\nA\n</think>\n\nB"}) + "\n"
                            for i, text in (("good", "Hello"), ("bad", "%"))))
    with tries("fault"):
        job = torchrun(2, "--out", tmp_path / "out", "--model", model, "--data", data, "--batch-size", 2, "--epochs", 1, "--device", "cpu")
        said = job.communicate(timeout=120)[0]
        assert job.returncode != 0 and "error: step 1: loss nan" in said and "stopped before this step was taken. Its rows: " in said
        assert not (tmp_path / "out" / "checkpoint.pt").exists() and not rows_of(tmp_path / "out" / "metrics.jsonl")


def test_without_torchrun_it_is_train(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    flags = "--model", "tiny", "--data", training_rows(tmp_path / "rows.jsonl", 4), "--epochs", 1
    ok("extras.ranks", "--out", tmp_path / "a", *flags)
    ok("train.py", "--out", tmp_path / "b", *flags)
    assert [row["loss"] for row in rows_of(tmp_path / "a" / "metrics.jsonl")] == [row["loss"] for row in rows_of(tmp_path / "b" / "metrics.jsonl")]
