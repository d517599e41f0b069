"""
Runs side by side: `python eval.py --compare OUT ... --out FOLDER` reads their run.json, eval.json and theory.json and writes

    table.md, table.csv     each method: harm, over-refusal, reasoning, perplexity of its data under the student, cost
    pareto.png              robustness against reasoning, and the frontier
    perplexity.png          of each training set under the student before training
    cost.png                robustness against the FLOPs of sampling, judging and training
    acceptance.png          acceptance under the instruction, seen and predicted by the tilt (of runs with eval.py --theory)

Folders named METHOD-SEED (see --group) are seeds of one method. A figure of several is the mean of theirs, its 95% interval from
the samples of the evaluation, and +- the standard deviation between the seeds. The safety score is the mean of all harm sets
and over-refusal, as in the paper: lower is better, and robustness is 100 less it.
"""
import csv
import io
import json
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

from thinksafe import InputError, as_markdown, inert, read_run, split_revision, write_atomic

SEEDS = r"(.+)[-_]\d+"
COST = {"seconds": "seconds", "tokens": "sampled", "guard_tokens": "judged", "train_tokens": "trained on", "flops": "FLOPs"}


def pool(figures):
    """The mean of independent figures {"value", "low", "high"}: its interval by square-and-add if all have one, and the standard
    deviation `sd` between them. None if there is none."""
    values = [x["value"] for x in figures]
    if not values:
        return None
    out = {"value": statistics.fmean(values)}
    if all("low" in x for x in figures):
        for limit, sign in ("low", -1), ("high", 1):
            out[limit] = out["value"] + sign * math.hypot(*(x["value"] - x[limit] for x in figures)) / len(values)
    return out | ({"sd": statistics.stdev(values)} if len(values) > 1 else {})


def shares_of(shares, perplexity=None):
    """{column: {"value", "low", "high"}} of one side of an eval.json and its perplexity."""
    out = {name: {"value": float(x["percent"]), "low": float(x["low"]), "high": float(x["high"])} for name, x in shares.items()
           if x["percent"] is not None and not name.startswith("guard_harm")}
    parts = [x for name, x in out.items() if name.startswith("harm_") or name == "over_refusal"]
    if "over_refusal" in out and len(parts) > 1:
        out.setdefault("safety", pool(parts))
    return out | ({"perplexity": {**perplexity, "value": perplexity["perplexity"]}} if perplexity else {})


def cost_of(run):
    """{column: {"value"}} of what a run's data and training took (Stage.spend), the data in the folder that they came from."""
    train = run.get("train", {})
    data = train.get("arguments", {}).get("data")
    if not train.get("finished"):
        return {}
    if data:                                                               # a file, perhaps in shards, a run's folder, or a name
        folder = Path(data) if Path(data).is_dir() else Path(data).parent if Path(data).suffix else None
    home = run if not data else read_run(folder) if folder else {}
    stages = [stage for stage in (home.get("sample"), home.get("guard"), train) if stage and "cost" in stage]
    out = {"rows": train["rows"], **{key: sum(stage["cost"].get(key, 0) for stage in stages) for key in COST},
           "seconds": sum(stage["seconds"] for stage in stages)}
    return {name: {"value": value} for name, value in out.items()}


def read_runs(folders, pattern):
    """-> {method: {"seeds": n, column: see `pool`}}, first the students as they were, then the methods in the order of the
    folders, then the paper's; and the theory.json of the folders that have one, by name. Raises InputError."""
    try:
        pattern = re.compile(pattern)
        if not pattern.groups:
            raise re.error("no group in it for the method")
    except re.error as e:
        raise InputError(f"--group {pattern!r}: {e}")
    students, methods, paper, theories, judges = {}, defaultdict(list), {}, {}, set()
    for folder in map(Path, dict.fromkeys(folders)):
        run = read_run(folder)
        try:
            report = json.loads((folder / "eval.json").read_text("utf-8"))
            after, before = (shares_of(report[when], report.get("perplexity", {}).get("before") if when == "after" else None)
                             for when in ("after", "before"))
            student = Path(split_revision(run["eval"]["arguments"].get("before") or run["train"]["model"])[0]).name
            students[student, run["eval"]["identity"]["seed"]] = before
            if (folder / "theory.json").exists():
                theories[folder.name] = json.loads((folder / "theory.json").read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(f"{folder}: no eval.json to compare; run python eval.py --out {folder} first")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{folder}: eval.json or theory.json is not what eval.py writes; run it again")
        name = pattern.fullmatch(folder.name)
        methods[name[1] if name else folder.name].append(after | cost_of(run))
        judges.add(report["judge"])
        for when, words in ("before", "paper: before"), ("after", "paper: ThinkSafe"):
            if report.get("paper", {}).get(when):
                paper[f"{words}, {student}"] = [{key: {"value": value} for key, value in report["paper"][when].items()}]
    if len(judges) > 1:
        print(inert(f"the runs have different judges ({', '.join(sorted(judges))}): their harm is not the same measure"))
    groups = {f"{name}, before": [x for (its, _), x in students.items() if its == name] for name, _ in students}
    out = {}
    for name, runs in (groups | methods | paper).items():
        keys = dict.fromkeys(key for run in runs for key in run)
        out[name] = {"seeds": len(runs), **{key: pool([run[key] for run in runs if key in run]) for key in keys}}
    return out, theories


# ---------------------------------------------------------------------------------------------
# Tables


def columns(methods):
    """{key: heading} of what there is to show, in order."""
    keys = {key for row in methods.values() for key in row}
    tasks = sorted(key for key in keys if key.startswith("pass@1_"))
    order = [*sorted(key for key in keys if key.startswith("harm_")), "harm", "over_refusal", "safety", "pass@1",
             *(tasks if len(tasks) > 1 else ()), "perplexity", "rows", *COST]
    words = {"over_refusal": "over-refusal", "safety": "safety score", **COST}
    return {key: words.get(key, key.replace("harm_", "harm, ").removeprefix("pass@1_")) for key in order if key in keys}


def short(x):
    """A number in few characters: 1,234, 83k, 1.2M, 3.4e+12."""
    return f"{x:.1e}" if x >= 1e10 else f"{x / 1e6:.3g}M" if x >= 1e6 else f"{x / 1e3:.3g}k" if x >= 1e4 else f"{x:,.0f}"


def cell(key, x):
    """A figure as text: 4.2 [3.1, 5.0] ±0.3; of cost and rows the mean alone."""
    if not x:
        return ""
    if key in COST or key == "rows":
        return short(x["value"])
    digits = 3 if key == "perplexity" and x["value"] < 10 else 1
    limits = f" [{x['low']:.{digits}f}, {x['high']:.{digits}f}]" if "low" in x else ""
    return f"{x['value']:.{digits}f}{limits}" + (f" ±{x['sd']:.{digits}f}" if "sd" in x else "")


def markdown(methods):
    keys = columns(methods)
    lines = [["method", "seeds", *keys.values()], ["---"] * (2 + len(keys))]
    lines += [[name, str(row["seeds"]), *(cell(key, row.get(key)) for key in keys)] for name, row in methods.items()]
    return "".join(f"| {' | '.join(map(as_markdown, line))} |\n" for line in lines)


def comma_separated(methods):
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    keys, parts = columns(methods), ("value", "low", "high", "sd")
    rows.writerow(["method", "seeds", *(inert(key) + f" {part}" * (part != "value") for key in keys for part in parts)])
    for name, row in methods.items():
        name = "'" * name.startswith(("=", "+", "-", "@")) + inert(name)  # a spreadsheet runs what begins like a formula
        rows.writerow([name, row["seeds"], *((row.get(key) or {}).get(part, "") for key in keys for part in parts)])
    return out.getvalue()


# ---------------------------------------------------------------------------------------------
# Figures


def canvas(xlabel, ylabel, height=5):
    """An empty plot -> (figure, axes)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, ax = pyplot.subplots(figsize=(7.5, height), dpi=160, layout="constrained")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    return figure, ax


def save(figure, path):
    from matplotlib import pyplot
    figure.savefig(path)
    pyplot.close(figure)
    return path.name


def label(ax, points):
    """Write the names of points {name: (x, y)} beside them, each where it covers least of points and other names."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox
    ax.figure.canvas.draw()
    inside, renderer = ax.get_window_extent(), ax.figure.canvas.get_renderer()
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in map(ax.transData.transform, points.values())]
    for name, point in points.items():
        tries = []
        for far in (6, 16, 28, 44, 64):
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
                text = ax.annotate(name, point, (far * dx, far * dy), textcoords="offset points", fontsize=8,
                                   bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.6, "pad": 0.5},
                                   ha=("center", "left", "right")[dx], va=("center", "bottom", "top")[dy],
                                   arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.6"} if far > 6 else None)
                text.set_in_layout(False)
                text.update_positions(renderer)
                box = Text.get_window_extent(text)                        # without the arrow
                lost = box.width * box.height - sum((b.width * b.height for b in [Bbox.intersection(box, inside)] if b), 0)
                covered = sum(b.width * b.height for b in (Bbox.intersection(box, other) for other in taken) if b)
                tries.append((10 * (covered + lost) + far, text, box))
        best = min(tries, key=lambda x: x[0])
        for _, text, _ in tries:
            if text is not best[1]:
                text.remove()
        taken.append(best[2])


def colour(name, names):
    """Grey for students before training, black for the paper, the colour cycle for the rest."""
    from matplotlib import colormaps
    own = [x for x in names if not x.endswith(", before") and not x.startswith("paper")]
    return colormaps["tab20"](own.index(name) * (2 if len(own) <= 10 else 1) % 20) if name in own \
        else "black" if name.startswith("paper") else "0.45"


def bars(x):
    """A figure's interval as matplotlib wants it, or None. (Of a share of 100% rounding may put the upper end below.)"""
    return [[max(0, x["value"] - x["low"])], [max(0, x["high"] - x["value"])]] if "low" in x else None


def scatter(ax, methods, x, y):
    """Each method that has both at (x(row), y(row)), figures of `pool`, with their intervals -> {name: (x, y)}."""
    points = {}
    for name, row in methods.items():
        a, b = x(row), y(row)
        if a and b:
            points[name] = a["value"], b["value"]
            marker, fill = "D" if name.endswith(", before") else "o", "none" if name.startswith("paper") else "full"
            ax.errorbar(*points[name], bars(b), bars(a), color=colour(name, methods), linestyle="none", elinewidth=1,
                        marker=marker, markersize=7, fillstyle=fill)
    return points


def robustness(row):
    """The figure 100 - safety score of a method, or None."""
    x = row.get("safety")
    limits = {"low": 100 - x["high"], "high": 100 - x["low"]} if x and "low" in x else {}
    return x and {"value": 100 - x["value"], **limits}


def frontier(points):
    """The points (x, y) that no other exceeds in one and equals or exceeds in the other, by rising x."""
    best = [p for p in set(points) if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]
    return sorted(best)


ROBUSTNESS = "robustness: 100 - mean of harm and over-refusal, %"


def pareto(methods, path):
    figure, ax = canvas(f"{ROBUSTNESS}  (right is better)", "reasoning: pass@1, %  (up is better)")
    points = scatter(ax, methods, robustness, lambda row: row.get("pass@1"))
    edge = frontier(list(points.values()))
    (left, _), (bottom, _) = ax.get_xlim(), ax.get_ylim()
    corners = [(left, edge[0][1])]
    for (x, y), (_, below) in zip(edge, [*edge[1:], (0, bottom)]):
        corners += [(x, y), (x, below)]
    ax.plot(*zip(*corners), color="0.6", linewidth=1, linestyle="--", zorder=0, scalex=False, scaley=False)
    label(ax, points)
    return save(figure, path)


def perplexity_bars(methods, path):
    found = [(row["perplexity"], name) for name, row in methods.items() if row.get("perplexity")]
    found.sort(key=lambda x: x[0]["value"])
    figure, ax = canvas("perplexity of the training set under the student before training", "", 1 + 0.35 * len(found))
    for i, (x, name) in enumerate(found):
        ax.barh(i, x["value"] - 1, left=1, color=colour(name, methods), height=0.65)         # 1 is certainty
        ax.errorbar(x["value"], i, xerr=bars(x), color="black", elinewidth=1, capsize=2)
        ax.annotate(cell("perplexity", {"value": x["value"]}), (x["high"], i), (4, 0), textcoords="offset points", va="center",
                    fontsize=8)
    most = found[-1][0]["high"]
    if most > 10:
        ax.set_xscale("log")
        ax.set_xticks([x for x in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000) if x <= most])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    ax.set_xlim(1, most**1.1 if most > 10 else 1 + 1.1 * (most - 1))
    ax.set_yticks(range(len(found)), [name for _, name in found])
    ax.grid(axis="y", visible=False)
    return save(figure, path)


def cost_plot(methods, path):
    figure, ax = canvas("FLOPs of sampling, judging and training", ROBUSTNESS)
    ax.set_xscale("log")
    points = scatter(ax, methods, lambda row: {"value": row["flops"]["value"]} if row.get("flops") else None, robustness)
    label(ax, points)
    return save(figure, path)


def acceptance_plot(theories, path):
    """Seen: with intervals, larger for more prompts; predicted: the line."""
    figure, ax = canvas("accepted without the instruction, % of a prompt's traces", "accepted under the instruction, %")
    low = 100.0
    for name, report in theories.items():
        by = next(iter(report["by"].values()))
        bins, its = by["calibration"]["bins"], colour(name, theories)
        where = [100 * x["accepted"] / x["of"] for x in bins]
        ax.plot(where, [x["predicted"] for x in bins], color=its, linestyle="--", linewidth=1, marker="x", markersize=4,
                label=f"{name}: predicted with omega {by['tilt']['omega']:.0f}")
        for at, x in zip(where, bins):
            ax.errorbar(at, x["seen"]["percent"], bars({**x["seen"], "value": x["seen"]["percent"]}), color=its, marker="o",
                        markersize=3 + math.log2(x["prompts"]), elinewidth=1, alpha=0.8, linestyle="none")
        sure = [x["seen"]["low"] for x in bins if x["prompts"] >= 10]
        low = min([low, *sure, *(min(x["predicted"], x["seen"]["percent"]) for x in bins)])
    ax.set_ylim(low - 2, 101)                                             # the intervals of a few prompts would hide the rest
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return save(figure, path)


def main(args):
    """`eval.py --compare` with its flags."""
    methods, theories = read_runs(args.compare, args.group)
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "table.md", markdown(methods))
    write_atomic(args.out / "table.csv", comma_separated(methods))
    made = ["table.md", "table.csv"]
    if any(robustness(row) and row.get("pass@1") for row in methods.values()):
        made.append(pareto(methods, args.out / "pareto.png"))
    if any(row.get("perplexity") for row in methods.values()):
        made.append(perplexity_bars(methods, args.out / "perplexity.png"))
    if any(robustness(row) and row.get("flops") for row in methods.values()):
        made.append(cost_plot(methods, args.out / "cost.png"))
    if theories:
        made.append(acceptance_plot(theories, args.out / "acceptance.png"))
    print(inert(markdown(methods) + f"compared {len(args.compare)} runs\n  -> {args.out}: {', '.join(made)}"))
