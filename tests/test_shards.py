"""Shards of sample.py and eval.py in folders of their own, and extras/merge.py, which joins them."""
import json
import shutil

import pytest
from conftest import call, rows_of

from data.sources import owns, shard_of
from data.rows import content_id
from data.run_record import read_run

pytestmark = pytest.mark.trust

SAMPLE = ["--limit", 24, "--n", 2]
N = 3


def ok(script, *flags):
    done = call(script, *flags)
    assert done.returncode == 0, done.stderr
    return done


def sorted_rows(path):
    """In one order; p_unsafe up to rounding, which depends on what is packed together."""
    rows = rows_of(path)
    for row in rows:
        if row.get("p_unsafe"):
            row["p_unsafe"] = round(row["p_unsafe"], 5)
    return sorted(rows, key=lambda row: (row["id"], row.get("when", ""), row["k"]))


def test_every_prompt_is_in_one_shard(tries):
    ids = [content_id(str(i)) for i in range(2000)]
    for n in (1, 2, 3, 7, 64):
        with tries("comparison"):
            owners = [[i for i in range(1, n + 1) if owns((i, n), x)] for x in ids]
            assert all(len(found) == 1 for found in owners)
            assert all(0.5 < owners.count([i]) * n / len(ids) < 1.6 for i in range(1, n + 1))
    assert all(owns(None, x) for x in ids) and shard_of("2/4") == (2, 4)


def test_bad_shards(tmp_path):
    for word in ("0/2", "3/2", "1", "a/b", "1/2/3"):
        done = call("sample.py", "--out", tmp_path, "--shard", word)
        assert done.returncode == 2 and "--shard" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in one process -> its folder."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ok("sample.py", "--out", out, *SAMPLE)
    ok("guard.py", "--out", out, "--keep", "unanimous")
    ok("train.py", "--out", out, "--epochs", 1)
    ok("eval.py", "--out", out, "--limit", 3)
    return out


@pytest.fixture(scope="module")
def parts(whole, tmp_path_factory):
    """The folders of three shards of sample.py, guard.py and eval.py."""
    base = tmp_path_factory.mktemp("parts")
    folders = [base / f"shard-{i}" for i in range(1, N + 1)]
    for i, folder in enumerate(folders, 1):
        ok("sample.py", "--out", folder, *SAMPLE, "--shard", f"{i}/{N}")
        ok("guard.py", "--out", folder, "--keep", "unanimous")
        ok("eval.py", "--out", folder, "--limit", 3, "--model", whole / "model", "--shard", f"{i}/{N}")
    return folders


def copies(parts, tmp_path):
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in parts]


def test_shards_joined_are_what_one_process_makes(whole, parts, tries, tmp_path):
    out = tmp_path / "out"
    done = ok("extras.merge", out, *reversed(parts))
    assert done.json == {"joined": ["sample", "guard", "eval"], "shards": N, "out": str(out)}
    assert "sample: 48 rows of 3 shards" in done.stdout
    for name in ("samples", "guarded", "eval"):
        with tries("comparison"):
            assert all(rows_of(folder / f"{name}.jsonl") for folder in parts)
            assert sorted_rows(out / f"{name}.jsonl") == sorted_rows(whole / f"{name}.jsonl")
    assert json.loads((out / "eval.json").read_text()) == json.loads((whole / "eval.json").read_text())
    joined, alone = read_run(out), read_run(whole)
    for stage in ("sample", "guard", "eval"):
        with tries("comparison"):
            apart = {"arguments", "started", "seconds", "peak_gb"}
            if stage == "eval":
                apart.add("models")                                        # here the adapter has another path
            assert {k: v for k, v in joined[stage].items() if k not in apart} == {k: v for k, v in alone[stage].items() if k not in apart}
            assert joined[stage]["arguments"]["out"] == str(out) and joined[stage]["arguments"].get("shard") is None
            assert joined[stage]["seconds"] == pytest.approx(sum(read_run(folder)[stage]["seconds"] for folder in parts))


def test_the_joined_folder_goes_on(parts, tmp_path):
    """Each stage finds nothing left to do, and the next one starts; joining again changes nothing."""
    out = tmp_path / "out"
    ok("extras.merge", out, *parts)
    files = {path: path.read_bytes() for path in out.glob("*.jsonl")}
    assert len(files) == 4
    ok("extras.merge", out, *parts)
    ok("sample.py", "--out", out, *SAMPLE)
    ok("guard.py", "--out", out, "--keep", "unanimous")
    assert {path: path.read_bytes() for path in files} == files
    ok("train.py", "--out", out, "--epochs", 1)
    ok("extras.merge", out, *parts)
    assert read_run(out)["train"]["finished"] and (out / "model").is_dir()


def test_samples_alone_are_joined_for_one_guard(whole, parts, tmp_path):
    shards, out = copies(parts, tmp_path), tmp_path / "out"
    for folder in shards:
        run = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({"sample": run["sample"]}))
    assert ok("extras.merge", out, *shards).json["joined"] == ["sample"]
    ok("guard.py", "--out", out, "--keep", "unanimous")
    assert sorted_rows(out / "guarded.jsonl") == sorted_rows(whole / "guarded.jsonl")


def test_what_cannot_be_joined_is_refused(parts, tries, tmp_path):
    one, two, three = copies(parts, tmp_path)
    out = tmp_path / "out"

    def refused(message, *folders):
        with tries("fault"):
            done = call("extras.merge", out, *folders)
            assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
            assert not list(out.glob("*.json*"))

    def edited(folder, stage, **changes):
        copy = tmp_path / f"edited-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(folder, copy)
        run = json.loads((copy / "run.json").read_text())
        for key, value in changes.items():
            record = run[stage] if key in run[stage] else run[stage]["fingerprint"]
            record[key] = value
        (copy / "run.json").write_text(json.dumps(run))
        return copy
    refused("there are the shards 1/3, 3/3; it needs 1/3 to 3/3", one, three)
    refused("both hold shard 2/3", one, two, parts[1], three)
    refused("1/3, 2/2, 3/3", one, edited(two, "sample", shard=[2, 2]), three)
    refused("sample.py ran with seed 5", one, edited(two, "sample", seed=5), three)
    refused("guard.py ran with threshold 0.1", one, edited(two, "guard", threshold=0.1), three)
    refused("sample.py has not finished there", one, edited(two, "sample", finished=False), three)
    refused("guard.py has not finished there", one, edited(two, "guard", finished=False), three)
    refused("no run record", tmp_path)
    samples = (two / "samples.jsonl").read_bytes()
    (two / "samples.jsonl").write_bytes(samples + (one / "samples.jsonl").read_bytes())
    refused(f"is there twice, the first time in {one / 'samples.jsonl'}", one, two, three)
    (two / "samples.jsonl").write_bytes(samples[:samples.rindex(b"\n", 0, -1) + 1])
    refused("rows, and say that they made", one, two, three)
    (two / "samples.jsonl").write_bytes(samples)
    report = json.loads((two / "eval.json").read_text())
    (two / "eval.json").write_text(json.dumps({**report, "judge": "self"}))
    with tries("fault"):
        done = call("extras.merge", out, one, two, three)
        assert done.returncode == 2 and "different judges" in done.stderr


def test_rows_of_something_else_stay(whole, parts, tries, tmp_path):
    out = tmp_path / "out"
    ok("sample.py", "--out", out, "--limit", 2, "--seed", 7)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with tries("fault"):
        done = call("extras.merge", out, *parts)
        assert done.returncode == 2 and "samples.jsonl has other rows" in done.stderr
        assert {path: path.read_bytes() for path in before} == before
    with tries("fault"):
        from filelock import FileLock
        with FileLock(out / ".lock"):
            done = call("extras.merge", out, *parts)
        assert done.returncode == 2 and "another process is at work" in done.stderr


def test_a_killed_shard_is_made_whole_first(whole, parts, tries, tmp_path):
    """Half a row at the end of a shard's file is no row: the shard makes it again."""
    shards, out = copies(parts, tmp_path), tmp_path / "out"
    path = shards[1] / "samples.jsonl"
    with tries("fault"):
        path.write_bytes(path.read_bytes()[:-20])
        assert call("extras.merge", out, *shards).returncode == 2
        ok("sample.py", "--out", shards[1], *SAMPLE, "--shard", f"2/{N}")
        ok("extras.merge", out, *shards)
        assert sorted_rows(out / "samples.jsonl") == sorted_rows(whole / "samples.jsonl")


def test_rows_that_are_missing_are_noticed(whole, tries, tmp_path):
    """Of a folder that somebody has joined or cut by hand."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name, script, flags, message in (("guarded", "train.py", ["--epochs", 1], "47 of the 48 rows"),
                                         ("samples", "guard.py", ["--keep", "unanimous"], "not complete")):
        with tries("fault"):
            path = out / f"{name}.jsonl"
            path.write_text(path.read_text().partition("\n")[2])
            done = call(script, "--out", out, *flags)
            assert done.returncode == 2 and message in done.stderr


def test_another_shard_needs_another_folder(parts, tmp_path):
    one = copies(parts, tmp_path)[0]
    done = call("sample.py", "--out", one, *SAMPLE, "--shard", f"2/{N}")
    assert done.returncode == 2 and "made with shard [1, 3], now it is [2, 3]" in done.stderr
