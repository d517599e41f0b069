"""Methods side by side in the tiny world: figures, paired differences, and what is written."""
import json
import random

import numpy as np
import pytest
from conftest import call

from extras import study

KINDS = *study.SAFETY, "control", *study.TASKS

def drawn(rng, shares, n):
    return {kind: "".join(str(int(rng.random() < shares.get(kind, 0.5))) for _ in range(n)) for kind in KINDS}

def write_run(folder, method, world, seed, shares, n=60, doses=("1",)):
    rng = random.Random(f"{method} {world} {seed}")
    out = folder / f"{method}-{world}-{seed}"
    out.mkdir(parents=True)
    found = {dose: {**drawn(rng, shares, n), "dialect": "AAB-" * (n // 4)} for dose in doses}
    (out / "doses.json").write_text(json.dumps(found))
    if method != "untouched":
        (out / "run.json").write_text(json.dumps({
            "sample": {"seconds": 3}, "guard": {"seconds": 2}, "train": {
                "seconds": 5, "rows": 7, "perplexity": {"before": {"perplexity": 1.5}}}}))

SHARES = {"untouched": dict.fromkeys(study.HARM, 0.6) | {"over_refusal": 0.05},
          "thinksafe": dict.fromkeys(study.HARM, 0.2) | {"over_refusal": 0.1},
          "twin": dict.fromkeys(study.HARM, 0.2) | {"over_refusal": 0.1},
          "directrefusal": dict.fromkeys(study.HARM, 0.0) | {"over_refusal": 1.0}}

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for method, shares in SHARES.items():
        for world in range(3):
            for seed in range(3):
                write_run(out, method, world, seed, shares, doses=("0",) if method == "untouched" else ("1/8", "1"))
    write_run(out, "thinksafe@foreign", 0, 0, SHARES["thinksafe"])
    write_run(out, "safechain", 0, 0, SHARES["thinksafe"])
    return out

def test_figures_by_hand():
    bits = {kind: np.array([True, False, False, False]) for kind in KINDS}
    bits["over_refusal"] = np.array([False] * 4)
    found = study.figures(bits)
    assert found["harm"] == 25 and found["safety"] == 75 / 4 and found["tax"] == 12.5 and found["pass@1"] == 25
    # 9 of 12 harmful prompts refused, 0 of 4 safe ones, half a prompt added: z(9.5/13) - z(.5/5)
    assert found["d_prime"] == pytest.approx(0.6151 + 1.2816, abs=1e-3)
    assert found["criterion"] == pytest.approx(-(0.6151 - 1.2816) / 2, abs=1e-3)

def test_refusing_all_and_answering_all_cost_the_same():
    all_of = {kind: np.ones(10, bool) for kind in KINDS}
    none = {kind: np.zeros(10, bool) for kind in KINDS}
    refuses, answers = {**none, "over_refusal": all_of["control"]}, {**all_of, "over_refusal": none["control"]}
    assert study.figures(refuses)["tax"] == study.figures(answers)["tax"] == 50
    assert study.figures(refuses)["safety"] == 25                        # the paper's score prefers it

def test_bootstrap_is_centred_and_paired(folder):
    runs, methods = study.read_runs(folder), ["untouched", "thinksafe", "twin", "directrefusal"]
    samples = study.bootstrap(runs, methods, "student", study.SAFETY)
    for i, method in enumerate(methods):
        mean = study.summary(runs, method, "student")["safety"][0]
        assert samples[:, i].mean() == pytest.approx(mean, abs=0.3)
    twice = study.bootstrap(runs, ["thinksafe", "thinksafe"], "student", study.SAFETY)
    assert np.array_equal(twice[:, 0], twice[:, 1])                      # the same prompts, seeds and worlds

def test_what_differs_and_what_does_not(folder):
    runs, methods = study.read_runs(folder), ["untouched", "thinksafe", "twin", "directrefusal"]
    samples = study.bootstrap(runs, methods, "student", study.SAFETY)
    found, differ, pairs = study.compare(samples, methods, "thinksafe")
    difference, low, high, p = found["untouched"]
    assert 25 < difference < 33 and low < difference < high and p < 0.01
    assert found["twin"][3] > 0.05 and found["twin"][1] < 0 < found["twin"][2]
    assert pairs == 6 and 3 <= differ <= 5                               # all but the twins, at most

def test_p_values_are_not_too_small():
    """Of differences that are none, at most about a twentieth are called one."""
    rng, false = np.random.default_rng(0), 0
    for _ in range(300):
        data = rng.normal(size=40)
        drawn = rng.integers(40, size=(500, 40))
        false += study.p_values(data[drawn].mean(1, keepdims=True))[0] < 0.05
    assert false / 300 < 0.1

def test_holm_by_hand():
    """Three p-values: the smallest times 3, the next times 2, and none below one before it."""
    assert study.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])

def test_tau_with_the_paper():
    paper = {"untouched": 48, "directrefusal": 44, "safechain": 45.27, "star1": 42, "safepath": 46, "safekey": 45.25, "thinksafe": 30}
    assert study.paper_tau(paper)[0] == pytest.approx(1) and study.paper_tau(paper)[2] == 7
    assert study.paper_tau({m: -x for m, x in paper.items()})[0] == pytest.approx(-1)

def test_the_script(folder):
    done = call("extras.study", folder)
    text = (folder / "table.md").read_text()
    assert text in done.stdout + "\n" and "## student: 9 runs of each method" in text
    assert "Not all of their runs are there: safechain." in text and "## foreign: 1 runs of each method" in text
    row = next(line for line in text.splitlines() if line.startswith("| directrefusal"))
    assert "| 0.0 ±0.0 | 0.0 ±0.0 | 0.0 ±0.0 |" in row and "| 25 | 1.50 | 7 | 10 |" in row and " *" in row
    for name in ("pareto.png", "dose.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"

def test_nothing_to_compare(tmp_path):
    assert "no METHOD-WORLD-SEED/doses.json there" in call("extras.study", tmp_path).stderr
