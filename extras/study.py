"""
Methods side by side in the tiny world, by the runs of runs/tiny.sh.

    python -m extras.study out/tiny       # reads METHOD[@STUDENT]-WORLD-SEED/doses.json, run.json

Writes table.md, pareto.png and dose.png there. All figures are percent, by the oracle. A difference
to ThinkSafe (to the student that is trained on its own traces) is paired by world, seed and prompt.
Its interval and p-value are a bootstrap over worlds, seeds within a world, and prompts; Holm's
correction is over the methods of a student.
"""
import csv
import json
import math
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from scipy.stats import kendalltau
from statsmodels.stats.multitest import multipletests

from data.benchmarks import sensitivity
from data.rows import write_atomic
from extras.doses import PARTS
from thinksafe import ROOT, HelpFormatter, InputError, Parser, cli
from tiny import world2 as world

HARM = "harm_HB", "harm_SR", "harm_WJ"
SAFETY = *HARM, "over_refusal"
TASKS = tuple(f"tiny_{task}" for task in (*world.TASKS, "fact"))
HOME = {"foreign": "B", "foreign-large": "B"}           # students whose own dialect is not A
SAMPLES = 4000
IN_PAPER = {                                            # Table 1 of arXiv 2601.23143
    "untouched": "Initial", "directrefusal": "DirectRefusal", "safechain": "SafeChain",
    "star1": "STAR-1", "safepath": "SafePath", "safekey": "SafeKey", "thinksafe": "ThinkSafe"}

def as_bits(found):
    """Return {kind: bits (n,)} of {kind: "0110..."}."""
    return {kind: np.array(list(text)) == "1" for kind, text in found.items() if kind != "dialect"}

def read_runs(folder):
    """Return {(method, student, world, seed): run}. A run is {"doses": {dose: {kind: bits (n,)}},
    "dialect": letters, "run": run.json}."""
    runs = {}
    for path in sorted(folder.glob("*-*-*/doses.json")):
        name, w, seed = path.parent.name.rsplit("-", 2)
        method, _, student = name.partition("@")
        doses = json.loads(path.read_text("utf-8"))
        record = path.with_name("run.json")
        last = doses.get("1") or doses["0"]
        runs[method, student or "student", int(w), int(seed)] = {
            "doses": {dose: as_bits(found) for dose, found in doses.items()},
            "dialect": last["dialect"],
            "run": json.loads(record.read_text("utf-8")) if record.exists() else {}}
    if not runs:
        raise InputError(f"{folder}: no METHOD-WORLD-SEED/doses.json there")
    return runs

def last_dose(run):
    return run["doses"].get("1") or run["doses"]["0"]

def figures(bits):
    """Return the figures of one student from its {kind: bits (n,)}."""
    out = {kind: 100 * float(hits.mean()) for kind, hits in bits.items()}
    out["harm"], out["safety"], out["pass@1"] = (
        float(np.mean([out[kind] for kind in kinds])) for kinds in (HARM, SAFETY, TASKS))
    out["tax"] = (out["harm"] + out["over_refusal"]) / 2
    sides = {"harm": np.concatenate([bits[kind] for kind in HARM]),
             "over_refusal": bits["over_refusal"]}
    return out | sensitivity({name: {"percent": 100 * float(hits.mean()), "n": len(hits)}
                              for name, hits in sides.items()})

# --------------------------------------------------------------------------------------------------
# Differences

def bootstrap(runs, methods, student, kinds, seed=0):
    """Return (SAMPLES, methods) of the mean over worlds and seeds of the mean over kinds, percent.
    The same prompts, seeds and worlds are drawn for all methods."""
    rng, cells = np.random.default_rng(seed), defaultdict(list)
    for method, of, w, s in runs:
        if method == methods[0] and of == student:
            cells[w].append(s)
    means = []                                          # of each world (SAMPLES, methods)
    for w, seeds in sorted(cells.items()):
        total = np.zeros((SAMPLES, len(methods), len(seeds)))
        for kind in kinds:
            hits = np.array([[last_dose(runs[m, student, w, s])[kind] for s in seeds]
                             for m in methods], dtype=float)            # (methods, seeds, n)
            n = hits.shape[-1]
            times = rng.multinomial(n, np.full(n, 1 / n), SAMPLES)      # each prompt was drawn
            total += np.einsum("bn,msn->bms", times / n, hits) * (100 / len(kinds))
        times = rng.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), SAMPLES)
        means.append(np.einsum("bs,bms->bm", times / len(seeds), total))
    times = rng.multinomial(len(means), np.full(len(means), 1 / len(means)), SAMPLES)
    return np.einsum("bw,wbm->bm", times / len(means), np.array(means))

def p_values(differences):
    """Return two-sided bootstrap p-values (k,) of differences (SAMPLES, k)."""
    sides = differences <= 0, differences >= 0
    shares = [(1 + side.sum(0)) / (1 + len(differences)) for side in sides]
    return np.minimum(1.0, 2 * np.minimum(*shares))

def holm(p):
    """Return Holm's adjusted p-values."""
    return multipletests(p, method="holm")[1]

def compare(samples, methods, base):
    """Return {method: (difference, low, high, adjusted p)} to the method `base`, and of how many
    pairs of methods, and of how many there are, the difference is significant."""
    others = [i for i, method in enumerate(methods) if method != base]
    to_base = samples[:, others] - samples[:, [methods.index(base)]]
    low, high = np.percentile(to_base, (2.5, 97.5), axis=0)
    found = {methods[i]: values for i, values in zip(others, zip(
        to_base.mean(0), low, high, holm(p_values(to_base))))}
    pairs = np.array([samples[:, i] - samples[:, j]
                      for i in range(len(methods)) for j in range(i)]).T
    return found, int((holm(p_values(pairs)) < 0.05).sum()), pairs.shape[1]

def paper_tau(safety):
    """Return Kendall's tau of {method: safety score} with Table 1 of the paper, and its p-value."""
    with open(ROOT / "runs" / "table1.csv", encoding="utf-8") as f:
        lines = [line for line in f if not line.startswith("#")]
    paper = {row["method"]: float(row["safety"]) for row in csv.DictReader(lines)}
    both = [method for method, title in IN_PAPER.items() if method in safety and title in paper]
    tau = kendalltau([safety[m] for m in both], [paper[IN_PAPER[m]] for m in both])
    return float(tau.statistic), float(tau.pvalue), len(both)

# --------------------------------------------------------------------------------------------------
# Tables and figures

def summary(runs, method, student):
    """Return {figure: (mean, s.d.)} over worlds and seeds, of the method's runs."""
    mine = [run for (m, of, *_), run in runs.items() if (m, of) == (method, student)]
    found = [figures(last_dose(run)) for run in mine]
    for one, run in zip(found, mine):
        stages = [run["run"].get(name, {}) for name in ("sample", "guard", "train")]
        one["seconds"] = sum(stage.get("seconds", 0) for stage in stages)
        one["rows"] = stages[2].get("rows", 0)
        one["leak"] = 100 * np.mean([letter not in (HOME.get(student, "A"), "-")
                                     for letter in run["dialect"]])
        perplexity = stages[2].get("perplexity", {"before": {"perplexity": math.nan}})
        one["perplexity"] = perplexity["before"]["perplexity"]
    table = {key: np.array([one[key] for one in found]) for key in found[0]}
    return {key: (x.mean(), x.std(ddof=1) if len(x) > 1 else 0.0) for key, x in table.items()}

COLUMNS = {**{kind: kind[5:] for kind in HARM}, "control": "control", "over_refusal": "XS",
           "safety": "safety", "d_prime": "d'", "criterion": "criterion",
           **{task: task[5:] for task in TASKS}, "pass@1": "pass@1", "leak": "leak",
           "perplexity": "perplexity", "rows": "rows", "seconds": "seconds"}

DIGITS = {"d_prime": 2, "criterion": 2, "perplexity": 2, "rows": 0, "seconds": 0, "leak": 0}
WITH_SPREAD = *SAFETY, "safety", "d_prime", "pass@1"

def cell(key, mean, sd):
    digits = DIGITS.get(key, 1)
    spread = f" ±{sd:.{digits}f}" if key in WITH_SPREAD else ""
    return "" if math.isnan(mean) else f"{mean:.{digits}f}{spread}"

def table(runs, student, methods):
    """Return a Markdown table of a student's methods."""
    base = "thinksafe"
    head = ["method", *COLUMNS.values(), "safety, difference to ThinkSafe", "pass@1, difference"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    compared = [compare(bootstrap(runs, methods, student, kinds), methods, base)
                for kinds in (SAFETY, TASKS)] if base in methods and len(methods) > 1 else []
    for method in methods:
        values = summary(runs, method, student)
        cells = [method, *(cell(key, *values[key]) for key in COLUMNS)]
        for found, *_ in compared:
            if method == base:
                cells.append("")
            else:
                mean, low, high, p = found[method]
                cells.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]{' *' if p < 0.05 else ''}")
        lines.append("| " + " | ".join(cells) + " |")
    for name, (_, differ, pairs) in zip(("safety score", "pass@1"), compared):
        lines.append(f"\nPairs of methods that differ in {name} after Holm's correction over all "
                     f"pairs: {differ} of {pairs}.")
    return "\n".join(lines)

def dose_curves(runs, methods, path):
    """Draw harm and over-refusal against dose: mean over worlds and seeds."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    doses = ["0", *PARTS, "1"]
    fig, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    for axis, key, title in zip(axes, ("harm", "over_refusal", "d_prime"),
                                ("harm, mean of HB, SR, WJ, %", "over-refusal, %", "d'")):
        for method in methods:
            line = []
            for dose in doses:
                found = [figures(run["doses"][dose])[key] for (m, of, *_), run in runs.items()
                         if of == "student" and m == ("untouched" if dose == "0" else method)
                         and dose in run["doses"]]
                line.append(np.mean(found) if found else np.nan)
            axis.plot(range(len(doses)), line, marker="o", markersize=3, label=method)
        axis.set_xticks(range(len(doses)), doses)
        axis.set_xlabel("dose, share of the steps")
        axis.set_title(title)
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    fig.tight_layout()
    fig.savefig(path, dpi=130)

def pareto(found, path):
    """Draw pass@1 against the tax on refusing, a point for each method: {method: summary}."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from adjustText import adjust_text
    fig, axis = plt.subplots(figsize=(7.5, 5.2))
    labels = []
    for method, x in found.items():
        (tax, tax_sd), (score, score_sd) = x["tax"], x["pass@1"]
        axis.errorbar(tax, score, xerr=tax_sd, yerr=score_sd, fmt="o", markersize=4, linewidth=0.8)
        labels.append(axis.text(tax, score, method, fontsize=8))
    axis.invert_xaxis()
    axis.set_xlabel("(mean harm + over-refusal) / 2, %: to the right is better")
    axis.set_ylabel("pass@1, mean of five tasks, %")
    adjust_text(labels, ax=axis)
    fig.tight_layout()
    fig.savefig(path, dpi=130)

def main():
    p = Parser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("folder", type=Path, metavar="FOLDER", help="folder of METHOD-WORLD-SEED")
    args = p.parse_args()
    folder = args.folder
    runs, parts = read_runs(folder), []
    for student in dict.fromkeys(of for _, of, *_ in runs):
        cells = defaultdict(set)
        for method, of, *cell in runs:
            if of == student:
                cells[method].add(tuple(cell))
        whole = max(cells.values(), key=len)
        methods = [method for method in cells if cells[method] == whole]
        parts.append(f"## {student}: {len(whole)} runs of each method\n\n"
                     + table(runs, student, methods))
        if left := sorted(cells.keys() - set(methods)):
            parts.append(f"Not all of their runs are there: {', '.join(left)}.")
        if student == "student":
            found = {method: summary(runs, method, student) for method in methods}
            pareto(found, folder / "pareto.png")
            dose_curves(runs, [m for m in methods if m != "untouched"], folder / "dose.png")
            tau, p_value, n = paper_tau({m: x["safety"][0] for m, x in found.items()})
            parts.append("Kendall's tau of the safety scores with the paper's Table 1 (Qwen3-0.6B),"
                         f" {n} methods: {tau:.2f} (p {p_value:.2f}).")
    write_atomic(folder / "table.md", "\n\n".join(parts) + "\n")
    print("\n\n".join(parts))

if __name__ == "__main__":
    cli(main)
