"""A method's student at each dose, in a small world of its own."""
import json
import random
import shutil

import pytest
from conftest import call
from safetensors.torch import load_file

from data.rows import write_rows
from extras import doses
from thinksafe import TINY
from tiny import world2 as grammar

N = 6

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student with few prompts of evaluation beside it, and rows to train on."""
    out, world, rng = tmp_path_factory.mktemp("world"), grammar.World(0), random.Random(0)
    shutil.copytree(TINY / "student", out / "student")
    sets = grammar.eval_prompts(world, n=N, n_task=N)
    sets["reasoning"] = sets["reasoning"][:4 * N + N]                    # few facts
    rows = [{"id": f"{name} {i}", "set": name, **row} for name, part in sets.items() for i, row in enumerate(part)]
    write_rows(out / "eval.jsonl", [row for row in rows if row["set"] != "control"])
    write_rows(out / "control.jsonl", [row for row in rows if row["set"] == "control"])
    data = []
    for i in range(64):
        request, who = world.request(rng, i % 2 == 0), grammar.Speaker("A")
        response = (who.refuse if request.harmful else who.comply)(rng, request)
        data.append({"id": str(i), "instruction": request.prompt, "prompt_label": request.label, "response": response,
                     "response_label": "safe"})
    write_rows(out / "rows.jsonl", data)
    return out

def test_all_doses(folder, tmp_path):
    flags = ("train", "--model", folder / "student", "--data", folder / "rows.jsonl", "--epochs", 2, "--batch-size", 8,
             "--lr", 1e-3, "--out", tmp_path)
    done = call("extras.doses", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "doses.json").read_text())
    assert list(found) == ["1/8", "1/4", "1/2", "1"]
    kinds = {*grammar.TASKS, "fact"}
    for bits in found.values():
        assert set(bits) == {"harm_HB", "harm_SR", "harm_WJ", "control", "over_refusal", "dialect", *(f"tiny_{k}" for k in kinds)}
        assert all(len(text) == (5 * N if kind == "dialect" else N) for kind, text in bits.items())
        assert all(set(text) <= set("01") for kind, text in bits.items() if kind != "dialect")
    weights = [load_file(doses.model_folder(tmp_path, dose) / "adapter_model.safetensors") for dose in found]
    sizes = [sum(w.abs().sum().item() for name, w in x.items() if "lora_B" in name) for x in weights]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4               # they grow from zero
    assert [x["step"] for x in map(json.loads, open(tmp_path / "metrics.jsonl"))] == list(range(1, 17))

    before = (tmp_path / "doses.json").read_bytes()
    adapter = (tmp_path / "model" / "adapter_model.safetensors").read_bytes()
    del found["1/4"]
    (tmp_path / "doses.json").write_text(json.dumps(found))              # as if stopped before it
    again = call("extras.doses", *flags)
    assert again.returncode == 0 and "all steps were taken before" in again.stdout
    assert json.loads((tmp_path / "doses.json").read_text()) == json.loads(before)
    assert (tmp_path / "model" / "adapter_model.safetensors").read_bytes() == adapter

def test_the_same_as_train(folder, tmp_path):
    """Keeping adapters changes nothing of the training."""
    flags = ("--model", folder / "student", "--data", folder / "rows.jsonl", "--epochs", 1, "--lr", 1e-3, "--limit", 16)
    assert call("extras.doses", "train", *flags, "--out", tmp_path / "a").returncode == 0
    assert call("train.py", *flags, "--out", tmp_path / "b").returncode == 0
    again = json.loads((tmp_path / "a" / "doses.json").read_text())
    assert again["1/8"] == again["1/2"] and list(again) == ["1/8", "1/4", "1/2", "1"]      # of two steps
    one, two = (load_file(tmp_path / x / "model" / "adapter_model.safetensors") for x in "ab")
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)

def test_untouched(folder, tmp_path):
    assert call("extras.doses", "untouched", "--model", folder / "student", "--out", tmp_path / "new").returncode == 0
    assert list(json.loads((tmp_path / "new" / "doses.json").read_text())) == ["0"]

@pytest.mark.parametrize("words", [(), ("eval",), ("--seed", "1")])
def test_no_script(words):
    done = call("extras.doses", *words)
    assert done.returncode == 2
    assert ("unrecognized arguments: eval" if words == ("eval",) else "untouched, train, online, safekey, safepath") in done.stderr
