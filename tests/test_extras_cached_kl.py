"""extras/cached_kl.py: what is read back is what the frozen student says; files that are not whole or of another run."""
import resource
import signal

import pytest
import torch
from conftest import call, killed_at, rows_of
from safetensors.torch import load_file

from extras.cached_kl import cached_reference
from thinksafe import InputError
from train import encode_rows, frozen_reference
from training_rows import ROWS, write


@pytest.fixture
def model_and_examples(student_with_lora):
    model, tokenizer = student_with_lora
    return model, encode_rows(ROWS, tokenizer, 2048, kl=True)[0]


FILES = ["reference.bin", "reference.json"]


@pytest.mark.parametrize("pack_tokens", [1, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_reference(model_and_examples, tmp_path, pack_tokens, dtype):
    model, examples = model_and_examples

    def live(examples):
        return frozen_reference(model)(examples).to(dtype)
    path, made = tmp_path / "reference.bin", {"model": "a"}
    cached = cached_reference(tmp_path, live, examples, pack_tokens, 1, made)
    benign = [e for e in examples if e["benign"]][::-1]
    torch.testing.assert_close(cached(benign), live(benign))
    written = path.read_bytes()
    again = cached_reference(tmp_path, live, examples, pack_tokens, 1, made)
    assert torch.equal(again(benign), cached(benign)) and path.read_bytes() == written
    for others, fingerprint in ((examples, {"model": "c"}), (examples[:-3], made)):
        with pytest.raises(InputError, match="another model or from other rows"):
            cached_reference(tmp_path, live, others, pack_tokens, 1, fingerprint)
    path.write_bytes(written[:-5])
    with pytest.raises(InputError, match="damaged"):
        cached_reference(tmp_path, live, examples, pack_tokens, 1, made)
    with pytest.raises(InputError, match="are needed"):
        cached_reference(tmp_path / "new", live, examples, pack_tokens, 1e-9, made)
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES


def test_the_file_is_not_read_into_memory(model_and_examples, tmp_path):
    """It is mapped: what changes on disk is what is read."""
    model, examples = model_and_examples
    cached = cached_reference(tmp_path, frozen_reference(model), examples, 1000, 1, {})
    benign = [e for e in examples if e["benign"]]
    with open(tmp_path / "reference.bin", "r+b") as f:
        f.write(bytes(4 * 48))
    assert (cached(benign)[0] == 0).all() and (cached(benign)[1] != 0).any()


def test_a_file_that_was_not_finished(model_and_examples, tmp_path):
    """Stopped, killed, or on a full disk: no part of a file is taken for the whole, and no room stays taken."""
    model, examples = model_and_examples
    path, live, calls = tmp_path / "reference.bin", frozen_reference(model), []

    def stopped(pack):
        calls.append(pack)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return live(pack)
    with pytest.raises(KeyboardInterrupt):
        cached_reference(tmp_path, stopped, examples, 1, 1, {})
    assert not list(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(InputError, match="make room"):
            cached_reference(tmp_path, live, examples, 1, 1, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    path.with_name(path.name + ".tmp").write_bytes(b"what a killed process left" * 10**4)
    cached = cached_reference(tmp_path, live, examples, 1, 1, {})
    benign = [e for e in examples if e["benign"]]
    torch.testing.assert_close(cached(benign), live(benign))
    (tmp_path / "reference.json").unlink()                       # killed before it was written
    path.write_bytes(bytes(path.stat().st_size))
    cached = cached_reference(tmp_path, live, examples, 1, 1, {})
    torch.testing.assert_close(cached(benign), live(benign))


def test_without_benign_rows_nothing_is_written(model_and_examples, tmp_path):
    model, examples = model_and_examples
    cached_reference(tmp_path, frozen_reference(model), [e for e in examples if not e["benign"]], 1, 1, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", [[], ["--full"]])
def test_training_with_it(tmp_path, full):
    """The same losses as without, and a file of other rows is refused."""
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "cached"
    flags = ["--model", "tiny", "--epochs", 3, "--batch-size", 4, *full]
    call("train.py", *flags, "--kl", "--data", data, "--out", tmp_path / "live")
    done = call("extras.cached_kl", *flags, "--data", data, "--out", out, "--gb", 1)
    assert done.returncode == 0, done.stderr
    for a, b in zip(rows_of(tmp_path / "live" / "metrics.jsonl"), rows_of(out / "metrics.jsonl"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-5)
    (out / "metrics.jsonl").unlink()
    done = call("extras.cached_kl", *flags, "--data", write(tmp_path / "fewer.jsonl", ROWS[:-1]), "--out", out)
    assert done.returncode == 2 and "reference.bin was made by another model or from other rows" in done.stderr


def test_drawn_rows_and_strip_cot(tmp_path):
    """The file is for the rows that --limit draws, as --strip-cot leaves them."""
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    flags = ["--model", "tiny", "--data", data, "--out", out, "--limit", 6, "--epochs", 1, "--strip-cot", "all"]
    done = call("extras.cached_kl", *flags)
    assert done.json["rows"] == 6 and done.json["skipped"] == {"not_drawn": 5}
    small = (out / "reference.bin").stat().st_size
    assert call("extras.cached_kl", "--model", "tiny", "--data", data, "--out", tmp_path / "all", "--epochs", 1).returncode == 0
    assert 0 < small < (tmp_path / "all" / "reference.bin").stat().st_size
    done = call("extras.cached_kl", *flags, "--gb", 1e-9)
    assert done.returncode == 2 and "1e-09 allowed" in done.stderr


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path):
    data = write(tmp_path / "rows.jsonl", ROWS)
    common = ["--model", "tiny", "--data", data, "--epochs", 6, "--batch-size", 3, "--save-every", 5]
    call("extras.cached_kl", *common, "--out", tmp_path / "a")
    flags = [*common, "--out", tmp_path / "b"]
    assert killed_at("extras.cached_kl", flags, tmp_path / "b" / "metrics.jsonl", 7) == -signal.SIGKILL
    assert not (tmp_path / "b" / "model").exists() and call("extras.cached_kl", *flags).returncode == 0
    a, b = (load_file(tmp_path / x / "model" / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_the_reference_makes_of_the_head_is_beside_it():
    """As on a GPU: softmax(h W^T) W behind h, and the loss of a pass takes both."""
    from extras.cached_kl import with_head_mean
    head = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        kept = with_head_mean(lambda examples: hidden, head)([])
    assert not kept.requires_grad and torch.equal(kept[:, :8], hidden)
    torch.testing.assert_close(kept[:, 8:], (hidden @ head.T).softmax(1) @ head, rtol=1e-4, atol=1e-5)
