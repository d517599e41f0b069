"""Cost, and runs side by side."""
import csv
import json
import math
import shutil
import sys

import pytest
import torch
from conftest import ROOT, call, rows_of
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from data.chat import encode_prompt
from extras import compare
from extras.compare import (
    SEEDS, adapter_size, cell, comma_separated, cost_of, flops, frontier, markdown, model_shape, pool, read_runs, short)
from guard import load_guard
from thinksafe import Decoder, InputError, add_lora, add_refusal_instruction, lora_tensors, read_config
from train import encode_rows

# ---------------------------------------------------------------------------------------------
# Cost


def model_of(folder, **more):
    config = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=5, hidden_size=2, num_hidden_layers=1,
                  num_attention_heads=1, num_key_value_heads=1, head_dim=2, intermediate_size=3, max_position_embeddings=64,
                  tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(config | more))
    return Decoder(read_config(folder))


def test_flops_by_hand(tmp_path):
    """L 1, D 2, H = Hkv 1, d 2, F 3, V 5; documents of 3 and 1 tokens, 2 logits."""
    config = model_of(tmp_path).config
    linear = 4 * (2 * 2) + 3 * (2 * 3)                                    # q k v o, gate up down: 34 weights
    base = 2 * linear * 4 + 2 * (5 * 2) * 2                               # 272 + 40
    attention = 2 * 2 * 2 * (1 + 2 + 3) + 2 * 2 * 2 * 1                   # scores and values, 2 d each, of 6 and 1 pairs of tokens
    assert flops(config, 0, iter([3, 1]), 2) == base + attention == 312 + 56
    assert flops(config, 0, [3, 1], 2, train=True) == 3 * (312 + 56)
    adapter = adapter_size(config, 1, ("q_proj", "v_proj"))
    assert adapter == 8                                                   # 2 layers of 2 + 2 weights
    assert flops(config, adapter, [3, 1], 2) == 312 + 56 + 2 * 8 * 4
    assert flops(config, adapter, [3, 1], 2, train=True) == 2 * 312 + 3 * (56 + 64)


SHAPE = dict(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=40)


def test_flops_against_torch_s_counter(tmp_path):
    """The products of a pass and its backward pass; attention apart, of which torch counts what is masked too."""
    model = model_of(tmp_path, **SHAPE)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    with FlopCounterMode(display=False) as counter:
        hidden = model(torch.arange(11), torch.tensor([0, 7, 11]))
        model.logits(hidden[:5]).sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    attention = 3 * 2 * 4 * 8 * 2 * (7 * 8 + 4 * 5)
    assert counted == flops(model.config, 0, [7, 4], 5, train=True) - attention


def test_size_of_an_adapter(tmp_path):
    model = model_of(tmp_path, **SHAPE)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    add_lora(model, 3, targets=targets)
    assert adapter_size(model.config, 3, targets) == sum(x.numel() for x in lora_tensors(model).values())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small run of all four scripts and one with --kl on its rows -> their folders."""
    home = tmp_path_factory.mktemp("small")
    kl = "--kl", "--model", "tiny", "--data", home / "plain-0" / "guarded.jsonl"
    for script, name, *flags in (("sample.py", "plain-0", "--limit", 40), ("guard.py", "plain-0"), ("train.py", "plain-0", "--epochs", 1),
                                 ("train.py", "kl-0", "--epochs", 1, *kl), *(("extras.perplexity", name) for name in ("plain-0", "kl-0")),
                                 *(("eval.py", name, "--limit", 5) for name in ("plain-0", "kl-0"))):
        assert call(script, "--out", home / name, *flags).returncode == 0
    return home


def test_cost_of_each_stage(small, tiny):
    """From the texts, each counted by itself, as against the rows."""
    model, tokenizer = tiny
    out, config = small / "plain-0", model.config
    cost = {name: x["value"] for name, x in cost_of(out).items()}
    rows = rows_of(out / "guarded.jsonl")
    prompts = [len(encode_prompt(tokenizer, add_refusal_instruction(r["instruction"], r["steer"]))) for r in rows]
    sampled = sum(flops(config, 0, [n + r["n_tokens"] - 1], r["n_tokens"]) for n, r in zip(prompts, rows))
    guard = load_guard("tiny", "cpu", torch.float32)
    read = [len(guard.encode(r["instruction"], r["response"])) for r in rows]
    judged = sum(flops(guard.model.config, 0, [n], 1) for n in read)
    adapter = adapter_size(config, 32, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    examples = encode_rows(rows, tokenizer, 2048)[0]
    trained = sum(flops(config, adapter, [len(e["ids"])], len(e["ids"]) - e["n_prompt"], train=True) for e in examples)
    assert cost["flops"] == pytest.approx(sampled + judged + trained, rel=0.005)
    assert cost["flops"] - trained == pytest.approx(sampled + judged, rel=0.02)
    assert (cost["tokens"], cost["guard_tokens"]) == (sum(r["n_tokens"] for r in rows), sum(read))
    assert cost["train_tokens"] == sum(len(e["ids"]) for e in examples) and cost["rows"] == len(examples)
    kl = {name: x["value"] for name, x in cost_of(small / "kl-0").items()}
    benign = [e for e in examples if e["benign"]]
    seen = sum(flops(config, 0, [len(e["ids"])], len(e["ids"]) - e["n_prompt"]) for e in benign)
    assert kl["flops"] - cost["flops"] == pytest.approx(seen, rel=0.1) and kl["train_tokens"] == cost["train_tokens"]
    assert (kl["tokens"], kl["guard_tokens"]) == (cost["tokens"], cost["guard_tokens"])          # of the folder the rows are in


@pytest.mark.parametrize("method", ["grpo", "opd", "opsa"])
def test_cost_of_online_methods(tiny, tmp_path, method):
    flags = {"grpo": ["--guard", "tiny", "--rollouts", 2], "opd": ["--teacher", "tiny/teacher"], "opsa": []}[method]
    done = call("extras.online", method, "--model", "tiny", "--prompts", ROOT / "tiny" / "prompts.jsonl", "--limit", 4, "--epochs", 1,
                "--batch-size", 3, "--max-new-tokens", 40, "--out", tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    cost, steps = {name: x["value"] for name, x in cost_of(tmp_path).items()}, rows_of(tmp_path / "metrics.jsonl")
    made, config = sum(row["generated"] for row in steps), tiny[0].config
    assert (cost["rows"], cost["tokens"]) == (4, made) and cost["guard_tokens"] == sum(row.get("guard_tokens", 0) for row in steps)
    weights = sum(p.numel() for p in tiny[0].parameters()) - config.vocab_size * config.hidden_size
    passes = 1 + 2 * (1 + (method == "grpo")) + 4                         # sampling, references, forward and backward: 2, 2 and 4 N a token
    assert cost["flops"] > (passes - 1) * weights * cost["train_tokens"]
    if method == "opd":
        run = json.loads((tmp_path / "run.json").read_text())
        run["train"]["arguments"]["teacher"] = "tiny/student"
        (tmp_path / "run.json").write_text(json.dumps(run))
        assert cost_of(tmp_path)["flops"]["value"] < cost["flops"]        # the teacher is larger


def test_shape_of_an_adapter_on_a_model(small, tiny):
    config, adapter = model_shape(str(small / "plain-0" / "model"))
    assert adapter == sum(x.numel() for x in load_file(small / "plain-0" / "model" / "adapter_model.safetensors").values())
    assert model_shape("tiny")[0].hidden_size == config.hidden_size == tiny[0].config.hidden_size and model_shape("tiny/student")[1] == 0
    with pytest.raises(InputError, match="nowhere/none"):
        model_shape("nowhere/none@main")


@pytest.mark.parametrize("broken", ["samples.jsonl", "verdicts.jsonl", "metrics.jsonl", "n_prompt_tokens", "model"])
def test_without_its_rows_a_run_has_no_cost(small, tmp_path, capsys, broken):
    out = shutil.copytree(small / "plain-0", tmp_path / "out")
    path, run = out / "samples.jsonl", json.loads((out / "run.json").read_text())
    if broken == "n_prompt_tokens":
        path.write_text(path.read_text().replace(broken, "n_other_tokens"))
    elif broken == "model":
        run["sample"]["model"] = str(tmp_path / "gone")
        (out / "run.json").write_text(json.dumps(run))
    else:
        (out / broken).unlink()
    assert set(cost_of(out)) == {"rows", "seconds"}
    said = capsys.readouterr().err
    assert said.startswith(f"{out}: the cost is left out: ") and said.count("\n") == 1 and {"model": "gone"}.get(broken, broken) in said


# ---------------------------------------------------------------------------------------------
# Pooling


def test_pool_by_hand():
    a, b = {"value": 50, "low": 47, "high": 54}, {"value": 80, "low": 76, "high": 83}
    assert pool([a, b]) == pytest.approx({"value": 65, "low": 62.5, "high": 67.5, "sd": 30 / math.sqrt(2)})      # 3-4-5
    assert pool([a]) == a and pool([]) is None and pool([a, {"value": 60}]) == pytest.approx({"value": 55, "sd": 10 / math.sqrt(2)})


def test_frontier():
    assert frontier([(1, 5), (2, 4), (2, 3), (3, 1), (0, 5), (3, 1), (2.5, 1)]) == [(1, 5), (2, 4), (3, 1)]


def test_text_of_a_cell():
    assert [short(x) for x in (0, 950, 12_345, 3_456_789, 2.5e12)] == ["0", "950", "12.3k", "3.46M", "2.5e+12"]
    assert cell("harm", {"value": 4.23, "low": 3.1, "high": 5, "sd": 0.31}) == "4.2 [3.1, 5.0] ±0.3"
    assert cell("perplexity", {"value": 1.2345}) == "1.234" and cell("flops", {"value": 2e12}) == "2.0e+12" and cell("harm", None) == ""


def share(percent):
    return {"percent": percent, "low": percent - 1, "high": percent + 1, "n": 100, "unknown": 0, "problems": 100}


def write_run(folder, seed=0, harm=10.0, refused=2.0, solved=80.0, flops=1e12, data=None, paper=None, judge="oracle", student="/x/student"):
    """What is read of a run of an earlier version, which has its cost recorded."""
    folder.mkdir()
    after = {"harm": share(harm), "harm_plain": share(harm - 5), "harm_wrapped": share(harm + 5), "over_refusal": share(refused),
             "pass@1": share(solved), "pass@1_tiny": share(solved), "guard_harm": share(50.0), "guard_harm_plain": share(50.0)}
    before = {**after, "harm": share(90.0), "harm_plain": share(85.0), "harm_wrapped": share(95.0)}
    (folder / "eval.json").write_text(json.dumps({
        "judge": judge, "guard": "tiny", "before": before, "after": after, "paper": paper or {},
        "perplexity": {"before": {"perplexity": 1.5, "low": 1.4, "high": 1.6, "rows": 9, "tokens": 99}, "after": None}}))
    stage = {"identity": {"seed": seed}, "finished": True, "seconds": 10.0, "arguments": {}}
    record = {"train": {**stage, "model": student, "rows": 7, "arguments": {"data": data}, "cost": {"flops": flops, "train_tokens": 300}},
              "eval": stage}
    if not data:
        record |= {"sample": {**stage, "cost": {"flops": 1e11, "tokens": 100}}, "guard": {**stage, "cost": {"flops": 1e10, "guard_tokens": 200}}}
    (folder / "run.json").write_text(json.dumps(record))


def test_cost_of_data_is_where_they_were_made(tmp_path):
    write_run(tmp_path / "a-0")
    write_run(tmp_path / "b-0", data=str(tmp_path / "a-0" / "guarded.jsonl"))
    write_run(tmp_path / "c-0", data="star1")
    write_run(tmp_path / "d-0", data=str(tmp_path / "a-0"))                                     # the run's folder
    (tmp_path / "e-0").mkdir()
    a, b, c, d, e = (cost_of(tmp_path / name) for name in ("a-0", "b-0", "c-0", "d-0", "e-0"))
    assert a == b == d == {"rows": {"value": 7}, "seconds": {"value": 30.0}, "tokens": {"value": 100}, "guard_tokens": {"value": 200},
                           "train_tokens": {"value": 300}, "flops": {"value": 1.11e12}}
    assert c["flops"]["value"] == 1e12 and c["tokens"]["value"] == 0 and e == {}


def test_methods_and_their_seeds(tmp_path, capsys):
    paper = {"before": {"harm_harmbench": 68.0, "pass@1": 45.0}, "after": {"harm_harmbench": 40.0, "pass@1": 44.0}}
    for name, more in (("safe-0", {}), ("safe-1", {"seed": 1, "harm": 14.0}), ("qwen3-0.6b", {"seed": 0, "paper": paper})):
        write_run(tmp_path / name, **more)
    methods, theories = read_runs([tmp_path / name for name in ("safe-0", "safe-1", "qwen3-0.6b")], SEEDS)
    assert list(methods) == ["student, before", "safe", "qwen3-0.6b", "paper: before, student", "paper: ThinkSafe, student"] and not theories
    assert [row["seeds"] for row in methods.values()] == [2, 2, 1, 1, 1]
    assert methods["safe"]["harm"] == pytest.approx({"value": 12, "low": 12 - math.sqrt(2) / 2, "high": 12 + math.sqrt(2) / 2, "sd": 2 * math.sqrt(2)})
    assert methods["qwen3-0.6b"]["safety"]["value"] == pytest.approx((5 + 15 + 2) / 3)           # both harm sets and over-refusal
    lines = markdown(methods).splitlines()
    assert lines[0].split(" | ")[2:9] == ["harm, harmbench", "harm, plain", "harm, wrapped", "harm", "over-refusal", "safety score", "pass@1"]
    assert len({line.count(" | ") for line in lines}) == 1 and "12.0 [11.3, 12.7] ±2.8" in lines[3] and "guard" not in lines[0]
    rows = list(csv.DictReader(comma_separated(methods).splitlines()))
    assert float(rows[1]["harm sd"]) == pytest.approx(2 * math.sqrt(2)) and rows[2]["harm sd"] == "" and rows[4]["harm_harmbench"] == "40.0"
    assert capsys.readouterr().out == ""
    write_run(tmp_path / "other-0", judge="self")
    read_runs([tmp_path / "safe-0", tmp_path / "other-0"], SEEDS)
    assert "different judges" in capsys.readouterr().out


@pytest.mark.parametrize("installed", [True, False])
def test_names_beside_their_points(tmp_path, monkeypatch, installed):
    """Placed by adjustText; without it plainly, but all there."""
    if not installed:
        monkeypatch.setitem(sys.modules, "adjustText", None)
    names = []

    def save(figure, path):
        names.extend(text.get_text() for text in figure.axes[0].texts)
    monkeypatch.setattr(compare, "save", save)
    figures = {"safety": {"value": 5.0}, "pass@1": {"value": 80.0}, "flops": {"value": 1e12}}
    compare.pareto_plot({"a": figures, "b": figures, "c": {"pass@1": {"value": 1.0}}}, tmp_path / "pareto.png")
    compare.cost_plot({"d": figures}, tmp_path / "cost.png")
    assert names == ["a", "b", "d"]


def test_bad_input(tmp_path):
    write_run(tmp_path / "a-0")
    for folders, pattern, message in (([tmp_path / "b"], SEEDS, "no eval.json"), ([tmp_path / "a-0"], "[", "--group"),
                                      ([tmp_path / "a-0"], "a-0", "no group")):
        with pytest.raises(InputError, match=message):
            read_runs(folders, pattern)
    text = (tmp_path / "a-0" / "eval.json").read_text()
    for changed in ('{"judge": 1}', text.replace('"percent": 10.0', '"percent": "high"')):
        (tmp_path / "a-0" / "eval.json").write_text(changed)
        with pytest.raises(InputError, match="eval.json: not what a stage writes"):
            read_runs([tmp_path / "a-0"], SEEDS)


def test_command(small, tmp_path):
    assert call("extras.theory", "--out", small / "plain-0", "--limit", 4, "--n", 2).returncode == 0
    done = call("extras.compare", small / "plain-0", small / "kl-0", "--out", tmp_path / "table")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "table").iterdir()} == {"table.md", "table.csv", "pareto.png", "perplexity.png", "cost.png", "acceptance.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 10_000 for p in (tmp_path / "table").glob("*.png"))
    rows = {row["method"]: row for row in csv.DictReader((tmp_path / "table" / "table.csv").open())}
    assert list(rows) == ["student, before", "plain", "kl"] and rows["kl"]["tokens"] == rows["plain"]["tokens"] != ""
    assert float(rows["kl"]["flops"]) > float(rows["plain"]["flops"]) and float(rows["plain"]["perplexity"]) > 1
    assert rows["student, before"]["flops"] == "" and (tmp_path / "table" / "table.md").read_text() in done.stdout
    report = json.loads((small / "plain-0" / "eval.json").read_text())
    assert float(rows["plain"]["harm_wrapped"]) == report["after"]["harm_wrapped"]["percent"]
