"""
Set runs side by side: tables and plots of their run.json, eval.json, theory.json and rows.

    python -m extras.compare out/plain-0 out/plain-1 out/kl-0 --out out/table
    python -m extras.compare runs/* --out out/table --group "(.+)-seed.*"

    table.md, table.csv     each method: harm, over-refusal, reasoning, perplexity of the training
                            set under the student (by extras.perplexity), cost
    pareto.png              robustness against reasoning, and the frontier
    perplexity.png          of each training set under the student before training
    cost.png                robustness against the FLOPs of sampling, judging and training
    acceptance.png          acceptance under the instruction, seen and predicted by the tilt (of
                            runs with extras.theory)

Folders named METHOD-SEED (see --group) are seeds of one method. A figure of several seeds is the
mean of theirs, with a 95% interval from the samples of the evaluation, and +- the standard
deviation between the seeds. The safety score is the mean of all harm sets and over-refusal, as in
the paper: lower is better, and robustness is 100 less the score.
"""
import csv
import io
import math
import re
import statistics
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.guards import GUARDS
from data.kinds import TOKENS, shorten
from data.rows import METRIC_KEYS, TRACE_KEYS, VERDICT, atomic_path, read_rows, write_atomic
from data.run_record import THEORY, Record, read_eval, read_object, read_run
from thinksafe import (
    ROOT, HelpFormatter, InputError, Parser, cli, escape_control_chars, is_harmful, load_tensors,
    read_adapter, read_config)

SEEDS = r"(.+)[-_]\d+"
COST = {"seconds": "seconds", "tokens": "sampled", "guard_tokens": "judged",
        "train_tokens": "trained on", "flops": "FLOPs"}

# --------------------------------------------------------------------------------------------------
# Cost: floating-point operations, from the rows of a run and the shapes of its models

def linear_layers(config):
    """Return {name: (inputs, outputs)} of the linear layers of one block."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size = config.head_dim * config.num_attention_heads
    kv_size = config.head_dim * config.num_key_value_heads
    return {"q_proj": (hidden, q_size), "k_proj": (hidden, kv_size), "v_proj": (hidden, kv_size),
            "o_proj": (q_size, hidden), "gate_proj": (hidden, inner), "up_proj": (hidden, inner),
            "down_proj": (inner, hidden)}

def adapter_size(config, r, targets):
    """Return the number of parameters of a LoRA adapter of rank r on the layers in targets."""
    layers = linear_layers(config)
    if not set(targets) <= layers.keys():
        raise InputError(f"an adapter on {shorten(', '.join(targets))}: the model has only "
                         + ", ".join(layers))
    return config.num_hidden_layers * r * sum(sum(layers[name]) for name in targets)

def flops(config, adapter_parameters, lengths, logits, train=False):
    """Return the floating-point operations of one pass over documents of these lengths (tokens),
    with the head at `logits` of the tokens.

    A product with a matrix of N weights is 2 N a token. The linear layers have
    N = L (2 D d (H + Hkv) + 3 D F) weights, the adapters A, the head V D. In each layer a token's
    scores and values with the t tokens up to itself are 4 H d t, so 2 H d n (n + 1) for a document
    of n tokens.

    train: with the backward pass, which has a product for the inputs and one for the weights to
    each of the forward pass, so 6 N in all. Frozen weights need no gradient: LoRA's base has 4 N,
    its adapters 6 A. Training without adapter parameters updates all weights.

    Norms, softmax and lookups are not counted, nor is what is computed once more to save memory.
    The last layer's MLP is counted for all tokens, also where a pass over a prompt or a guard's
    question skips most of it. To sample g tokens behind a prompt of p is a pass over p + g - 1 with
    g logits: the cache holds what was seen."""
    c, lengths = config, list(lengths)
    weights = c.num_hidden_layers * sum(n_in * n_out for n_in, n_out in linear_layers(c).values())
    base = 2 * (weights * sum(lengths) + c.vocab_size * c.hidden_size * logits)
    pairs = sum(2 * n * (n + 1) for n in lengths)
    attention = c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs
    other = 2 * adapter_parameters * sum(lengths) + attention
    if not train:
        return base + other
    return (2 if adapter_parameters else 3) * base + 3 * other

def model_shape(name):
    """Return a model's config, and the number of parameters of its adapter (0 without one).

    Weights are not read, nor downloaded. name: as in run.json and in flags. Raises InputError."""
    name = "tiny/student" if name == "tiny" else name
    folder = Path(name) if Path(name).exists() else ROOT / name
    if (folder / "adapter_config.json").exists():
        adapter = read_adapter(folder)
        config, _ = model_shape(adapter["base"])
        tensors = load_tensors(folder / "adapter_model.safetensors").values()
        return config, sum(tensor.numel() for tensor in tensors)
    if not folder.exists():
        from huggingface_hub import hf_hub_download
        repo, _, revision = name.partition("@")
        try:
            path = hf_hub_download(repo, "config.json", revision=revision or None)
        except Exception as e:
            raise InputError(f"{name}: no folder of that name here, and the hub did not give its "
                             f"config.json ({type(e).__name__}: {e})")
        folder = Path(path).parent
    return read_config(folder), 0

def guard_shape(name, run):
    """Return the config of a guard, as guard.py --guard names it. `self` is the student."""
    key, _, path = name.partition("=")
    form = GUARDS.get(key)
    model = path or form.model if form else name
    stage = run.get("sample") or run["train"]
    return model_shape(model or stage["model"])[0]

def sampling_cost(folder, run):
    """Return {"tokens", "flops"} of samples.jsonl."""
    config, adapter = model_shape(run["sample"]["model"])
    rows = read_rows(folder / "samples.jsonl", {**TRACE_KEYS, "n_prompt_tokens": TOKENS})
    rows = [row for row in rows if row["n_tokens"]]
    tokens = sum(row["n_tokens"] for row in rows)
    lengths = [row["n_prompt_tokens"] + row["n_tokens"] - 1 for row in rows]
    return {"tokens": tokens, "flops": flops(config, adapter, lengths, tokens)}

def judging_cost(folder, run):
    """Return {"guard_tokens", "flops"} of verdicts.jsonl."""
    lengths, cost = defaultdict(list), Counter()
    for row in read_rows(folder / "verdicts.jsonl", VERDICT):
        if row.get("n_tokens"):                          # 0: the guard was not asked
            lengths[row["guard"]].append(row["n_tokens"])
    for name, read in lengths.items():
        config = guard_shape(name, run)
        cost.update(guard_tokens=sum(read), flops=flops(config, 0, read, len(read)))
    return cost

def reference_passes(run, config, adapter):
    """Return [(config, adapter parameters, share of the tokens), ...] of the forward passes that a
    training step takes beside its own: of a frozen student or a teacher."""
    train, fingerprint = run["train"], run["train"]["fingerprint"]
    if fingerprint.get("kl"):
        benign = sum(n for label, n in train["labels"].items() if not is_harmful(label))
        return [(config, 0, benign / max(1, sum(train["labels"].values())))]
    method = fingerprint.get("online")
    if method == "opd":
        return [(*model_shape(train["arguments"]["teacher"]), 1)]
    frozen = [(config, 0, 1)]
    return {"grpo": [(config, adapter, 1), *frozen], "opsa": frozen}.get(method, [])

def training_cost(folder, run):
    """Return {"train_tokens", "flops"} of metrics.jsonl; of an online method also what the steps
    sampled and judged, "tokens" and "guard_tokens".

    The documents of a step are taken as equally long, and benign ones as long as harmful ones.
    SafeKey's passes over parts of some rows and OPSA's hints are left out."""
    train, fingerprint = run["train"], run["train"]["fingerprint"]
    config, _ = model_shape(train["model"])
    adapter = 0
    if not fingerprint["full"]:
        targets = fingerprint["lora_targets"].split(",")
        adapter = adapter_size(config, fingerprint["lora_r"], targets)
    references = reference_passes(run, config, adapter)
    batch_size, rollouts = fingerprint["batch_size"], fingerprint.get("rollouts", 1)
    steps_per_epoch = -(-train["rows"] // batch_size) or 1
    cost = Counter()
    for step, row in enumerate(read_rows(folder / "metrics.jsonl", METRIC_KEYS)):
        first = step % steps_per_epoch * batch_size
        n = rollouts * max(1, min(batch_size, train["rows"] - first))     # documents of the step
        length, targets = row["tokens"] / n, row.get("targets", row["tokens"])
        cost.update(train_tokens=row["tokens"],
                    flops=n * flops(config, adapter, [length], targets / n, train=True))
        for shape, parameters, share in references:
            cost.update(flops=n * share * flops(shape, parameters, [length], targets / n))
        if "generated" in row:
            cost.update(tokens=targets,
                        flops=n * flops(config, adapter, [length - 1], targets / n))
        if "guard_tokens" in row:
            name = train["arguments"]["guard"] or run["guard"]["guard"]
            cost.update(guard_tokens=row["guard_tokens"],
                        flops=n * flops(guard_shape(name, run), 0, [row["guard_tokens"] / n], 1))
    return cost

def cost_of(folder):
    """Return {column: {"value"}} of what a run's data and training took, the data in the folder
    that they came from.

    {} if train.py has not finished there. The cost alone is left out, with a notice, where rows or
    a model's config are missing. Entries of earlier versions have their `cost` recorded."""
    run = read_run(folder)
    train = run.get("train", {})
    if not train.get("finished"):
        return {}
    home, made = folder, run
    if train["arguments"].get("data"):               # a file, the folder of a run, or a name
        source = Path(train["arguments"]["data"])
        home = source if source.is_dir() else source.parent
        made = read_run(home) if source.exists() or home != Path() else {}
    stages = [("sample", sampling_cost, home, made), ("guard", judging_cost, home, made),
              ("train", training_cost, folder, run)]
    stages = [stage for stage in stages if stage[0] in stage[3]]
    cost = Counter(dict.fromkeys(COST, 0))
    cost["seconds"] = seconds = sum(record[name]["seconds"] for name, _, _, record in stages)
    try:
        for name, measure, where, record in stages:
            cost.update(record[name].get("cost") or measure(where, record))
        cost["flops"] = round(cost["flops"])
    except InputError as e:
        print(escape_control_chars(f"{folder}: the cost is left out: {e}"), file=sys.stderr)
        cost = {"seconds": seconds}
    return {key: {"value": value} for key, value in {"rows": train["rows"], **cost}.items()}

# --------------------------------------------------------------------------------------------------
# Runs and their seeds

def pool(figures):
    """Return the mean of independent figures {"value", "low", "high"}, None if there is none.

    Its interval is by square-and-add, if all have one. `sd` is the standard deviation between
    them."""
    values = [x["value"] for x in figures]
    if not values:
        return None
    out = {"value": statistics.fmean(values)}
    if all("low" in x for x in figures):
        for limit, sign in ("low", -1), ("high", 1):
            distance = math.hypot(*(x["value"] - x[limit] for x in figures)) / len(values)
            out[limit] = out["value"] + sign * distance
    return out | ({"sd": statistics.stdev(values)} if len(values) > 1 else {})

def proportions_of(metrics):
    """Return {column: {"value", "low", "high"}} of one side of an eval.json."""
    out = {}
    for name, x in metrics.items():
        value, low, high = (x[key] for key in ("percent", "low", "high"))
        if None not in (value, low, high) and not name.startswith("guard_harm"):
            out[name] = {"value": float(value), "low": float(low), "high": float(high)}
    parts = [x for name, x in out.items() if name.startswith("harm_") or name == "over_refusal"]
    if "over_refusal" in out and len(parts) > 1:
        out.setdefault("safety", pool(parts))
    return out

class Run(NamedTuple):
    """What is compared of a run. Figures are {column: {"value", "low", "high"}}."""
    student: str                # name of the model before training
    seed: int                   # of the evaluation
    judge: str
    before: dict                # figures of the student
    after: dict                 # figures of the trained student, of the training set, and cost
    paper: dict                 # {"before", "after": {column: percent}}, or {}
    theory: dict | None         # theory.json

def load_run(folder):
    """Return a Run. Raises InputError if eval.json is missing, or a file is damaged."""
    run, report = read_run(folder), read_eval(folder)
    if report is None:
        raise InputError(f"{folder}: no eval.json to compare; run python eval.py --out {folder} "
                         "first")
    after = proportions_of(report["after"])
    known = run.get("train", {}).get("perplexity") or report.get("perplexity") or {}
    if known.get("before"):
        after["perplexity"] = {**known["before"], "value": known["before"]["perplexity"]}
    evaluated = run.get("eval", Record())
    student = evaluated.get("models", {}).get("before")
    student = student or evaluated["arguments"].get("before") or run.get("train", {}).get("model")
    if student is None:
        raise InputError(f"{folder}: run.json does not say which model eval.py asked; run it again")
    return Run(Path(student.partition("@")[0]).name, evaluated["fingerprint"]["seed"],
               report["judge"], proportions_of(report["before"]), after | cost_of(folder),
               report.get("paper") or {}, read_object(folder / "theory.json", THEORY))

def read_runs(folders, pattern):
    """Read runs -> ({method: {"seeds": n, column: see `pool`}}, {folder's name: theory.json}).

    First come the students as they were, then the methods in the order of the folders, then the
    paper's figures. pattern: see --group. Raises InputError."""
    try:
        pattern = re.compile(pattern)
        if not pattern.groups:
            raise re.error("no group in it for the method")
    except re.error as e:
        raise InputError(f"--group {pattern!r}: {e}")
    runs = {folder: load_run(folder) for folder in map(Path, folders)}
    judges = sorted({run.judge for run in runs.values()})
    if len(judges) > 1:
        print(escape_control_chars(f"the runs have different judges ({', '.join(judges)}): their "
                                   "harm is not the same measure"))
    before = {(run.student, run.seed): run.before for run in runs.values()}
    students, methods, paper = defaultdict(list), defaultdict(list), {}
    for (student, _), figures in before.items():
        students[f"{student}, before"].append(figures)
    for folder, run in runs.items():
        name = pattern.fullmatch(folder.name)
        methods[name[1] if name else folder.name].append(run.after)
        for when, title in ("before", "paper: before"), ("after", "paper: ThinkSafe"):
            figures = {key: {"value": value} for key, value in run.paper.get(when, {}).items()}
            if figures:
                paper[f"{title}, {run.student}"] = [figures]
    out = {}
    for name, seeds in {**students, **methods, **paper}.items():
        keys = dict.fromkeys(key for figures in seeds for key in figures)
        pooled = {key: pool([figures[key] for figures in seeds if key in figures]) for key in keys}
        out[name] = {"seeds": len(seeds), **pooled}
    return out, {folder.name: run.theory for folder, run in runs.items() if run.theory}

# --------------------------------------------------------------------------------------------------
# Tables

def columns(methods):
    """Return {key: heading} of what there is to show, in order."""
    keys = {key for row in methods.values() for key in row}
    tasks = sorted(key for key in keys if key.startswith("pass@1_"))
    order = [*sorted(key for key in keys if key.startswith("harm_")), "harm", "over_refusal",
             "safety", "pass@1", *(tasks if len(tasks) > 1 else ()), "perplexity", "rows", *COST]
    titles = {"over_refusal": "over-refusal", "safety": "safety score", **COST}
    return {key: titles.get(key, key.replace("harm_", "harm, ").removeprefix("pass@1_"))
            for key in order if key in keys}

def short(x):
    """Return a number in few characters: 1,234, 83k, 1.2M, 3.4e+12."""
    if x >= 1e10:
        return f"{x:.1e}"
    if x >= 1e6:
        return f"{x / 1e6:.3g}M"
    return f"{x / 1e3:.3g}k" if x >= 1e4 else f"{x:,.0f}"

def cell(key, x):
    """Return a figure as text: 4.2 [3.1, 5.0] ±0.3. Of cost and rows it is the mean alone."""
    if not x:
        return ""
    if key in COST or key == "rows":
        return short(x["value"])
    digits = 3 if key == "perplexity" and x["value"] < 10 else 1
    text = f"{x['value']:.{digits}f}"
    if "low" in x:
        text += f" [{x['low']:.{digits}f}, {x['high']:.{digits}f}]"
    return text + (f" ±{x['sd']:.{digits}f}" if "sd" in x else "")

def as_markdown(text):
    """Return text that Markdown shows as it is, on one line: no cell, link, code or HTML."""
    text = " ".join(escape_control_chars(text).split())
    return re.sub(r"[\\`*<>|&#~]|(?<=\])[(\[]", r"\\\g<0>", text)

def markdown(methods):
    """Return the table in Markdown."""
    keys = columns(methods)
    lines = [["method", "seeds", *keys.values()], ["---"] * (2 + len(keys))]
    for name, row in methods.items():
        lines.append([name, str(row["seeds"]), *(cell(key, row.get(key)) for key in keys)])
    return "".join(f"| {' | '.join(map(as_markdown, cells))} |\n" for cells in lines)

def comma_separated(methods):
    """Return the table as CSV, with the limits of intervals in columns of their own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    parts = {"value": "", "low": " low", "high": " high", "sd": " sd"}
    keys = columns(methods)
    header = [escape_control_chars(key) + suffix for key in keys for suffix in parts.values()]
    writer.writerow(["method", "seeds", *header])
    for name, row in methods.items():
        name = escape_control_chars(name)
        if re.match(r"\s*[-=+@]", unicodedata.normalize("NFKC", name)):    # a spreadsheet runs it
            name = "'" + name
        values = [(row.get(key) or {}).get(part, "") for key in keys for part in parts]
        writer.writerow([name, row["seeds"], *values])
    return out.getvalue()

# --------------------------------------------------------------------------------------------------
# Plots

ROBUSTNESS = "robustness: 100 - mean of harm and over-refusal, %"

def canvas(xlabel, ylabel, height=5):
    """Return the figure and the axes of an empty plot."""
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
    with atomic_path(path) as beside:
        figure.savefig(beside)
    pyplot.close(figure)
    return path.name

def label(ax, points):
    """Write the names of points {name: (x, y)} beside them, where they cover least."""
    texts = [ax.text(x, y, name, fontsize=8, in_layout=False) for name, (x, y) in points.items()]
    try:
        from adjustText import adjust_text
    except ImportError:
        return
    ax.figure.draw_without_rendering()               # now the axes have their final size
    corners = np.array([(0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]) * 10    # of a marker, pixels
    pixels = ax.transData.transform(list(points.values()))[:, None] + corners
    x, y = ax.transData.inverted().transform(pixels.reshape(-1, 2)).T
    adjust_text(texts, x, y, ax=ax, force_text=(0.5, 1), prevent_crossings=False, iter_lim=300,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.6"})

def color(name, names):
    """Return gray for students before training, black for the paper, the color cycle for others."""
    from matplotlib import colormaps
    if name.startswith("paper"):
        return "black"
    if name.endswith(", before"):
        return "0.45"
    others = [x for x in names if not x.endswith(", before") and not x.startswith("paper")]
    return colormaps["tab20"](others.index(name) * (2 if len(others) <= 10 else 1) % 20)

def error_bar(x):
    """Return a figure's interval as matplotlib wants it, or None."""
    if "low" not in x:
        return None
    # Of a share of 100% rounding may put the upper end below.
    return [[max(0, x["value"] - x["low"])], [max(0, x["high"] - x["value"])]]

def scatter(ax, methods, x, y):
    """Draw each method that has both x(row) and y(row), figures of `pool`, with their intervals ->
    {name: (x, y)}."""
    points = {}
    ax.margins(0.1)                                  # room for names
    for name, row in methods.items():
        a, b = x(row), y(row)
        if a and b:
            points[name] = a["value"], b["value"]
            ax.errorbar(*points[name], error_bar(b), error_bar(a), color=color(name, methods),
                        linestyle="none", elinewidth=1, markersize=7,
                        marker="D" if name.endswith(", before") else "o",
                        fillstyle="none" if name.startswith("paper") else "full")
    return points

def robustness(row):
    """Return the figure 100 - safety score of a method, or None."""
    x = row.get("safety")
    if not x:
        return None
    limits = {"low": 100 - x["high"], "high": 100 - x["low"]} if "low" in x else {}
    return {"value": 100 - x["value"], **limits}

def reasoning(row):
    return row.get("pass@1")

def total_flops(row):
    return {"value": row["flops"]["value"]} if row.get("flops") else None

def frontier(points):
    """Return the points (x, y) that no other exceeds in one and equals or exceeds in the other, by
    rising x."""
    best = [p for p in set(points)
            if not any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)]
    return sorted(best)

def pareto_plot(methods, path):
    figure, ax = canvas(f"{ROBUSTNESS}  (right is better)", "reasoning: pass@1, %  (up is better)")
    points = scatter(ax, methods, robustness, reasoning)
    edge = frontier(list(points.values()))
    (left, _), (bottom, _) = ax.get_xlim(), ax.get_ylim()
    corners = [(left, edge[0][1])]
    for (x, y), (_, below) in zip(edge, [*edge[1:], (0, bottom)]):
        corners += [(x, y), (x, below)]
    ax.plot(*zip(*corners), color="0.6", linewidth=1, linestyle="--", zorder=0, scalex=False,
            scaley=False)
    label(ax, points)
    return save(figure, path)

def perplexity_plot(methods, path):
    found = [(row["perplexity"], name) for name, row in methods.items() if row.get("perplexity")]
    found.sort(key=lambda x: x[0]["value"])
    figure, ax = canvas("perplexity of the training set under the student before training", "",
                        1 + 0.35 * len(found))
    for i, (x, name) in enumerate(found):
        ax.barh(i, x["value"] - 1, left=1, color=color(name, methods), height=0.65)   # 1: certain
        ax.errorbar(x["value"], i, xerr=error_bar(x), color="black", elinewidth=1, capsize=2)
        ax.annotate(cell("perplexity", {"value": x["value"]}), (x["high"], i), (4, 0),
                    textcoords="offset points", va="center", fontsize=8)
    highest = found[-1][0]["high"]
    ax.set_xlim(1, 1 + 1.1 * (highest - 1))
    if highest > 10:
        ax.set_xscale("log")
        marks = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000)
        ax.set_xticks([x for x in marks if x <= highest])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_xlim(1, highest**1.1)
    ax.set_yticks(range(len(found)), [name for _, name in found])
    ax.grid(axis="y", visible=False)
    return save(figure, path)

def cost_plot(methods, path):
    figure, ax = canvas("FLOPs of sampling, judging and training", ROBUSTNESS)
    ax.set_xscale("log")
    label(ax, scatter(ax, methods, total_flops, robustness))
    return save(figure, path)

def acceptance_plot(theories, path):
    """Seen: with intervals, larger for more prompts. Predicted: the line."""
    figure, ax = canvas("accepted without the instruction, % of a prompt's traces",
                        "accepted under the instruction, %")
    lowest = 100.0
    for name, report in theories.items():
        by = next(iter(report["by"].values()), None)
        if not by:
            continue
        bins, shade = by["calibration"]["bins"], color(name, theories)
        where = [100 * x["accepted"] / x["of"] for x in bins]
        ax.plot(where, [x["predicted"] for x in bins], color=shade, linestyle="--", linewidth=1,
                marker="x", markersize=4,
                label=f"{name}: predicted with omega {by['tilt']['omega']:.0f}")
        for at, x in zip(where, bins):
            seen = {**x["seen"], "value": x["seen"]["percent"]}
            ax.errorbar(at, seen["value"], error_bar(seen), color=shade, marker="o",
                        markersize=3 + math.log2(x["prompts"]), elinewidth=1, alpha=0.8,
                        linestyle="none")
            lowest = min(lowest, x["predicted"], seen["value"])
            if x["prompts"] >= 10:       # the intervals of a few prompts would hide the rest
                lowest = min(lowest, seen["low"])
    ax.set_ylim(lowest - 2, 101)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return save(figure, path)

def main():
    p = Parser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, metavar="OUT", help="folders of runs")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                   help="where the tables and plots go")
    p.add_argument("--group", default=SEEDS, metavar="PATTERN",
                   help="the first group of this regular expression in a folder's name is the "
                   "method; runs of one method are its seeds")
    args = p.parse_args()
    methods, theories = read_runs(args.runs, args.group)
    args.out.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out / "table.md", markdown(methods))
    write_atomic(args.out / "table.csv", comma_separated(methods))
    made, rows = ["table.md", "table.csv"], methods.values()
    if any(robustness(row) and reasoning(row) for row in rows):
        made.append(pareto_plot(methods, args.out / "pareto.png"))
    if any(row.get("perplexity") for row in rows):
        made.append(perplexity_plot(methods, args.out / "perplexity.png"))
    if any(robustness(row) and row.get("flops") for row in rows):
        made.append(cost_plot(methods, args.out / "cost.png"))
    if theories:
        made.append(acceptance_plot(theories, args.out / "acceptance.png"))
    print(escape_control_chars(f"{markdown(methods)}compared {len(args.runs)} runs\n"
                               f"  -> {args.out}: {', '.join(made)}"))

if __name__ == "__main__":
    cli(main)
