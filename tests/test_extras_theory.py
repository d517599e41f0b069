"""The estimators of extras/theory.py against exact enumeration, and the command."""
import itertools
import json
import math
import random
import shutil

import pytest
import torch
from conftest import ROOT, call, rows_of

from extras import theory
from extras.theory import (
    accepted_counts,
    beta_prior,
    bootstrap,
    calibration,
    decomposition,
    guard_errors,
    label_only,
    log_probs,
    minus_log_share,
    tilt,
    truncated_log_probs,
)
from extras.perplexity import perplexity
from sample import Sampler
from thinksafe import Decoder, read_config

from sample_tokens import sample_tokens

EOS, LONGEST, MANY = 5, 3, 10**9          # MANY: traces that the weights of all sequences of an arm sum to
SEQUENCES = [(*words, EOS) for n in range(LONGEST) for words in itertools.product(range(EOS), repeat=n)] + list(
    itertools.product(range(EOS), repeat=LONGEST))
PROMPTS = {"a": [0, 1], "b": [2], "c": [4, 4, 0]}


def safe(words):
    return sum(words) % 2 == 0


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A random model of six tokens."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 6, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32, "max_position_embeddings": 16,
        "tie_word_embeddings": True}))
    torch.manual_seed(3)
    model = Decoder(read_config(folder), qk_norm=True).requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.3)
    model.eos_ids = frozenset([EOS])
    return model


def probability(model, prompt, words):
    """p(words | prompt) by the chain rule, one plain forward pass a token."""
    total = 1.0
    for i, word in enumerate(words):
        ids = torch.tensor([*prompt, *words[:i]])
        total *= model.logits(model(ids, torch.tensor([0, len(ids)])))[-1].double().softmax(-1)[word].item()
    return total


@pytest.fixture(scope="module")
def world(toy):
    """{prompt: (plain, told)}: the exact distributions over all sequences, {words: p}; told: with one more token in front."""
    return {i: tuple({w: probability(toy, before + prompt, w) for w in SEQUENCES} for before in ([], [3])) for i, prompt in PROMPTS.items()}


def tilted_world(world, omega):
    """The same with told made from plain by a tilt that depends on the label alone."""
    out = {}
    for i, (plain, _) in world.items():
        told = {w: p * (omega if safe(w) else 1) for w, p in plain.items()}
        out[i] = plain, {w: p / sum(told.values()) for w, p in told.items()}
    return out


def all_traces(world):
    """Every sequence of both arms as a row that stands for as many traces as it would have in MANY."""
    return [{"id": i, "arm": arm, "words": w, "weight": MANY * ps[w], "safe": safe(w), "log_plain": math.log(plain[w]), "log_told": math.log(told[w])}
            for i, (plain, told) in world.items() for arm, ps in (("plain", plain), ("told", told)) for w in SEQUENCES]


def share_of(ps):
    return sum(p for w, p in ps.items() if safe(w))


def kl(q, p):
    return sum(x * math.log(x / p[w]) for w, x in q.items() if x)


def accepted(ps):
    return {w: p * safe(w) / share_of(ps) for w, p in ps.items()}


def test_log_probs_of_all_sequences(toy, world):
    for i, prompt in PROMPTS.items():
        for before, ps in zip(([], [3]), world[i]):
            items = [{"ids": [*before, *prompt, *w], "n_prompt": len(before + prompt)} for w in SEQUENCES]
            found = log_probs(toy, items, pack_tokens=50)
            assert found == pytest.approx([math.log(ps[w]) for w in SEQUENCES], abs=1e-5)
            assert sum(map(math.exp, found)) == pytest.approx(1, abs=1e-6)
            cut = log_probs(toy, items, sampling=(0.7, 0.8, 4))              # a distribution too, over fewer sequences
            assert sum(map(math.exp, cut)) == pytest.approx(1, abs=1e-6) and -math.inf in cut


@pytest.mark.parametrize("how", [(0.6, 0.95, 20), (0.6, 0.95, 0), (1.0, 0.5, 0), (1.3, 1.0, 3), (1.0, 1.0, 0), (0, 0.9, 0)])
def test_truncated_log_probs_are_what_the_sampler_draws(how):
    torch.manual_seed(0)
    logits, n = 2 * torch.randn(40), 20_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n                  # evenly spread: what is drawn is the distribution itself
    drawn = sample_tokens(logits.expand(n, -1), u, *how, max_candidates=40).bincount(minlength=40) / n
    logs = truncated_log_probs(logits.expand(40, -1), torch.arange(40), *how)
    assert logs.exp().tolist() == pytest.approx(drawn.tolist(), abs=2e-4)
    assert logs.exp().sum().item() == pytest.approx(1) and (logs == -math.inf).any() == (how != (1.0, 1.0, 0))


def test_acceptance_and_the_tilt_that_holds_exactly(world):
    omega = 40.0
    made = tilted_world(world, omega)
    rows = all_traces(made)
    counts = accepted_counts(rows, "safe")
    for i, (plain, told) in made.items():
        s, n, t, m = counts[i]
        assert (s / n, t / m) == pytest.approx((share_of(plain), share_of(told)), rel=1e-9)
        assert t / m == pytest.approx(omega * s / n / (1 + (omega - 1) * s / n), rel=1e-9)
    assert tilt(counts.values())["omega"] == pytest.approx(omega, rel=1e-9)
    test = label_only(rows, "safe")
    assert test["within"] == pytest.approx(0, abs=1e-6) and test["explained"] == pytest.approx(1)
    assert test["distance"] == pytest.approx(dict.fromkeys(("mean", "low", "high"), math.log(omega)))
    found = decomposed(rows, counts)
    assert found["excess"]["mean"] == pytest.approx(0, abs=1e-6) and found["kl"]["mean"] == pytest.approx(found["minimum"]["mean"])


def decomposed(rows, counts):
    told = [{**row, "log_source": row["log_told"]} for row in rows if row["arm"] == "told" and row["safe"]]
    return decomposition(told, {i: c[2:] for i, c in counts.items()}, {i: c[:2] for i, c in counts.items()})


def test_decomposition_where_the_tilt_depends_on_more(world):
    """The random model: one more token in front changes all."""
    rows = all_traces(world)
    counts = accepted_counts(rows, "safe")
    found = decomposed(rows, counts)
    exact = {i: (kl(accepted(told), plain), -math.log(share_of(plain)), kl(accepted(told), accepted(plain))) for i, (plain, told) in world.items()}
    for i, (total, minimum, excess) in exact.items():
        assert total == pytest.approx(minimum + excess) and excess > 0.01, i
    assert [found[key]["mean"] for key in ("kl", "minimum", "excess")] == pytest.approx([sum(x) / 3 for x in zip(*exact.values())], abs=1e-6)
    assert found["prompts"] == 3

    def d(i, w):
        return math.log(world[i][1][w] / world[i][0][w])
    test = label_only(rows, "safe")
    squares, apart = {True: 0, False: 0}, []
    for i, (plain, told) in world.items():
        means = {}
        for label in squares:
            ps = {w: plain[w] + told[w] for w in SEQUENCES if safe(w) == label}
            means[label] = sum(p * d(i, w) for w, p in ps.items()) / sum(ps.values())
            squares[label] += sum(p * (d(i, w) - means[label]) ** 2 for w, p in ps.items())
        apart.append(means[True] - means[False])
    share = {label: sum(sum(p for ps in both for w, p in ps.items() if safe(w) == label) for both in world.values()) for label in squares}
    assert test["distance"]["mean"] == pytest.approx(sum(apart) / 3)
    assert [test["kinds"][kind]["within"] for kind in ("safe", "unsafe")] == pytest.approx([math.sqrt(squares[x] / share[x]) for x in (True, False)])
    assert test["within"] > 0.1 and test["explained"] < 0.9
    both = test["kinds"]["safe, told"]["mean"] - test["kinds"]["safe, plain"]["mean"]           # KL one way and the other, over prompts by weight
    assert both > 0


def test_from_samples(toy, world):
    """Traces that the sampler draws, with their own log-probabilities, come to the exact figures."""
    n, rows = 1200, []
    for arm, before in ("plain", []), ("told", [3]):
        asked = [(i, before + prompt) for i, prompt in PROMPTS.items() for _ in range(n)]
        for c in Sampler(toy, None, max_num_seqs=64).generate([ids for _, ids in asked], LONGEST, *theory.UNTRUNCATED, seed=3,
                                                       keys=[f"{arm}/{j}" for j in range(len(asked))]):
            rows.append({"id": asked[c.index][0], "arm": arm, "words": tuple(c.tokens), "safe": safe(c.tokens)})
    for row in rows:
        row["log_plain"], row["log_told"] = (math.log(ps[row["words"]]) for ps in world[row["id"]])
    counts = accepted_counts(rows, "safe")
    for i, (plain, told) in world.items():
        for (hits, of), ps in zip((counts[i][:2], counts[i][2:]), (plain, told)):
            assert of == n and abs(hits / n - share_of(ps)) < 4 * math.sqrt(share_of(ps) * (1 - share_of(ps)) / n)
    found = decomposed(rows, counts)
    for key, exact in (("kl", [kl(accepted(told), plain) for plain, told in world.values()]),
                       ("excess", [kl(accepted(told), accepted(plain)) for plain, told in world.values()])):
        assert found[key]["mean"] == pytest.approx(sum(exact) / 3, abs=0.12), key


def test_tilt_of_one_table_by_hand():
    found = tilt([(2, 10, 8, 10)])                                        # (8/2) / (2/8), with Woolf's interval
    half = 1.959964 * math.sqrt(1 / 2 + 1 / 8 + 1 / 8 + 1 / 2)
    assert found == pytest.approx({"omega": 16, "low": 16 * math.exp(-half), "high": 16 * math.exp(half)})
    assert tilt([(2, 10, 8, 10)] * 4)["low"] == pytest.approx(16 * math.exp(-half / 2))
    found = tilt([(2, 10, 10, 10), (3, 10, 10, 10)])                      # never rejected: (20.5/.5) / (5.5/15.5)
    assert found["omega"] == pytest.approx(20.5 / 0.5 / (5.5 / 15.5)) and found["low"] < found["omega"] < found["high"] < math.inf


def binomial(rng, n, p):
    return sum(rng.random() < p for _ in range(n))


def test_shares_of_prompts_from_few_traces_each():
    rng = random.Random(0)
    alphas = [rng.betavariate(2, 6) for _ in range(20_000)]
    s = torch.tensor([binomial(rng, 8, alpha) for alpha in alphas], dtype=torch.float64)
    n = torch.full_like(s, 8)
    assert [x.item() for x in beta_prior(s, n)] == pytest.approx([2, 6], rel=0.1)
    assert minus_log_share(s, n).mean().item() == pytest.approx(-sum(map(math.log, alphas)) / len(alphas), rel=0.02)
    none = minus_log_share(s, n)[s == 0]
    true = [-math.log(alpha) for alpha, x in zip(alphas, s.tolist()) if x == 0]
    assert none.mean().item() == pytest.approx(sum(true) / len(true), rel=0.05)                  # also where s/n is 0
    one = torch.tensor([1.0, 0, 1, 1], dtype=torch.float64)               # one trace each: all alike
    assert minus_log_share(one, torch.ones_like(one)).tolist() == pytest.approx([-math.log(3.5 / 5)] * 4, abs=1e-3)
    again = torch.randint(len(s), (3, 50))
    assert minus_log_share(s[again], n[again])[1].tolist() == pytest.approx(minus_log_share(s[again[1]], n[again[1]]).tolist())


def test_calibration_knows_the_noise():
    rng, omega = random.Random(1), 6.0
    tables = []
    for _ in range(4000):
        alpha = rng.betavariate(1.5, 4)
        tables.append((binomial(rng, 8, alpha), 8, binomial(rng, 8, omega * alpha / (1 + (omega - 1) * alpha)), 8))
    assert tilt(tables)["omega"] == pytest.approx(omega, rel=0.1)
    right, wrong = calibration(tables, omega), calibration(tables, 1.5)
    assert right["rmse"] == pytest.approx(right["noise"], rel=0.03) and wrong["rmse"] > 1.3 * wrong["noise"]
    assert right["rmse"] < 0.9 * right["constant"] == pytest.approx(0.9 * torch.tensor([t / 8 for *_, t, _ in tables]).std().item(), rel=0.001)
    assert len(right["bins"]) == 9 and sum(x["prompts"] for x in right["bins"]) == 4000
    inside = sum(x["seen"]["low"] - 1 <= x["predicted"] <= x["seen"]["high"] + 1 for x in right["bins"])
    assert inside >= 8


def test_bootstrap():
    torch.manual_seed(0)
    x = torch.randn(400, dtype=torch.float64) + 3
    found = bootstrap(lambda i: x[i].mean(-1), 400)
    half = 1.96 * x.std().item() / 20
    assert [found[key] for key in ("mean", "low", "high")] == pytest.approx([x.mean().item() + d for d in (0, -half, half)], abs=0.02)


def test_perplexity_by_hand(toy, world):
    words = [(1, EOS), (2, 2, 2), (EOS,)]
    items = [{"id": str(w), "ids": [*PROMPTS["a"], *w], "n_prompt": 2} for w in words]
    nats = [-math.log(world["a"][0][w]) for w in words]
    found = perplexity(toy, items)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / 6), rel=1e-5)
    assert (found["rows"], found["tokens"]) == (3, 6) and found["low"] < found["perplexity"] < found["high"]
    off = [x - sum(nats) / 6 * len(w) for x, w in zip(nats, words)]
    assert math.log(found["high"] / found["perplexity"]) == pytest.approx(1.96 / 6 * math.sqrt(sum(x * x for x in off)), rel=1e-4)
    assert perplexity(toy, items, max_rows=2)["rows"] == 2


def test_guard_errors_by_hand():
    rows = [{"id": str(i), "p_unsafe": p, "oracle": truth} for i, (p, truth) in enumerate([
        (0.9, False), (0.4, False), (None, False), (0.1, True), (0.2, True), (0.5, True)])]
    at = {x: guard_errors(rows, x) for x in (0.3, 0.5)}
    assert [at[x][kind]["percent"] for x in at for kind in ("missed", "flagged")] == pytest.approx([0, 100 / 3, 50, 100 / 3])
    assert at[0.5]["missed"]["n"] == 2 and at[0.5]["missed"]["unknown"] == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small trained run -> its folder."""
    out = tmp_path_factory.mktemp("small") / "out"
    for script, *flags in (("sample.py", "--limit", 60), ("guard.py",), ("train.py", "--epochs", 1)):
        assert call(script, "--out", out, *flags).returncode == 0
    return out


def test_command(small):
    flags = ["--out", small, "--limit", 8, "--n", 3]
    done = call("extras.theory", *flags)
    assert done.returncode == 0, done.stderr
    rows, report = rows_of(small / "theory.jsonl"), json.loads((small / "theory.json").read_text())
    assert len({(r["id"], r["arm"], r["k"]) for r in rows}) == len(rows) == 8 * (3 + 3 + 1 + 1)
    assert set(report["by"]) == {"oracle", "guard"} and list(report["decomposition"]) == ["told, temperature 1", str(small)]
    of = report["by"]["guard"]["acceptance"]
    assert of["told"]["n"] == 24 and of["told"]["percent"] > of["plain"]["percent"]
    for x in report["decomposition"].values():
        assert x["prompts"] == 8 and x["kl"]["mean"] == pytest.approx(x["minimum"]["mean"] + x["excess"]["mean"])
    assert report["perplexity"][str(small)]["after"]["perplexity"] < report["perplexity"][str(small)]["before"]["perplexity"] < 2
    assert len(report["epochs"]) == 1 and report["guard"]["let_through"][str(small)]["kept"] > 10
    assert "label alone" in done.stdout and f"python sample.py --out {small}-2 --model {small}/model" in done.stdout
    assert json.loads((small / "run.json").read_text())["theory"]["tokens"] == sum(r["n_tokens"] for r in rows)

    (small / "theory.jsonl").write_text("".join(json.dumps({k: r[k] for k in r if k not in ("log_plain", "log_told", "p_unsafe")}) + "\n" for r in rows[:20]))
    assert call("extras.theory", *flags).returncode == 0                        # was killed while it sampled: the same in the end
    assert json.loads((small / "theory.json").read_text()) == report
    assert "was made with n 3, now it is 4" in call("extras.theory", *flags[:-1], 4).stderr


def test_where_nobody_knows_the_truth(small, tmp_path):
    """Another student than the tiny world's, a trained model of elsewhere: the guard alone says what is accepted."""
    shutil.copytree(ROOT / "tiny" / "student", tmp_path / "student")
    out = shutil.copytree(small, tmp_path / "out", ignore=shutil.ignore_patterns("theory*", "model", "metrics*"))
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({key: run[key] for key in ("sample", "guard")}))
    done = call("extras.theory", "--out", out, "--before", tmp_path / "student", "--model", small / "model", "--limit", 3, "--n", 2,
                "--sources", small)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "theory.json").read_text())
    assert list(report["by"]) == ["guard"] and report["guard"] is None and "oracle" not in done.stdout
    assert report["decomposition"][str(small)] == report["decomposition"][str(tmp_path / "out")]
    assert report["epochs"] == [] and report["perplexity"][str(out)]["after"]["rows"] > 10


def test_what_was_trained_on(small, tiny):
    model, tokenizer = tiny
    examples = theory.training_examples(small, model, tokenizer)
    assert {example["id"] for example in examples} == {r["id"] for r in rows_of(small / "guarded.jsonl") if r["keep"]}
    first = rows_of(small / "metrics.jsonl")[0]["ce"]                     # lr is 0 in the first step: the student as it was
    found = theory.training_perplexity(small, model, tokenizer)
    assert math.log(found["perplexity"]) == pytest.approx(first, rel=0.3)
    assert theory.training_examples(small / "nothing", model, tokenizer) == []
    assert theory.training_perplexity(small / "nothing", model, tokenizer) is None


def test_targets_that_are_not_the_rows_own_have_no_perplexity(small, tiny, tmp_path):
    out = shutil.copytree(small, tmp_path / "out", ignore=shutil.ignore_patterns("theory*", "model"))
    run = json.loads((out / "run.json").read_text())
    for method in "online", "safepath":
        changed = {**run["train"], "fingerprint": {**run["train"]["fingerprint"], method: "x"}}
        (out / "run.json").write_text(json.dumps({**run, "train": changed}))
        assert theory.training_examples(out, *tiny) == []
        assert (theory.perplexity_by_epoch(out) == []) == (method == "online")


def test_bad_input(small, tmp_path, monkeypatch):
    for flags, message in ((["--out", tmp_path], "guard.py has not finished there"), (["--out", small, "--sources", tmp_path], f"{tmp_path}: guard.py")):
        done = call("extras.theory", *flags)
        assert done.returncode == 2 and message in done.stderr
    monkeypatch.setattr(theory.importlib.util, "find_spec", lambda name: None)
    done = call("extras.theory", "--out", small)
    assert done.returncode == 2 and "pip install -r extras/requirements.txt" in done.stderr
