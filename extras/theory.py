"""
Measure ThinkSafe's theory: traces -> OUT/theory.jsonl, figures -> OUT/theory.json.

    python -m extras.theory --out out                     # after train.py
    python -m extras.theory --out out --n 8 --limit 500   # 8 traces of each of 500 harmful prompts,
                                                          # without and with the instruction
    python -m extras.theory --out out --sources out/rejection out/teacher    # and the data of other
                                                          # runs, against the same student

The claim (arXiv 2601.23143). p is the student, and alpha is the share of its responses to a harmful
prompt that are accepted as safe. Of all distributions over safe responses the one nearest to p is
p(y|x) / alpha, at KL = -log alpha. Suppose that the refusal instruction I changes nothing but the
odds of safe to unsafe, by a factor omega (the tilt). Then what is accepted under it has that very
distribution, and a share alpha_I = omega alpha / (1 + (omega - 1) alpha) of it is accepted: the
same data for less.

What p is. The claim is about the model itself: p is the model at temperature 1, nothing cut off. A
p that is cut to its likely tokens gives some traces probability 0, and KL to it is infinite. Traces
are drawn here in that way too, so that they agree with their log-probabilities. The data of a run
were drawn otherwise (temperature 0.6, top-p 0.95, ...), and have the log-probability of the
distribution they were drawn from. In bfloat16 log-probabilities are good to about 0.01 nats a
token; --dtype float32 for better.
"""
import importlib.util
import json
import math
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from data.chat import (
    decode_response, encode_prompt, encode_training_pair, rejection_reason, template_hash)
from data.kinds import TOKENS, Number
from data.rows import (
    GUARDED_KEYS, METRIC_KEYS, TRACE_KEYS, RowWriter, content_id, read_rows, write_atomic,
    write_rows)
from data.run_record import Stage, read_run, stage_seed, steer_of
from eval import proportion
from extras.perplexity import perplexity, training_examples
from guard import guard_format, load_guard
from sample import Sampler
from thinksafe import (
    REFUSAL_INSTRUCTIONS, TINY, InputError, add_refusal_instruction, choose_dtype, cli,
    escape_control_chars, free_memory, is_harmful, is_tiny, load_model, make_parser, merge_lora,
    model_hash, positive, progress, resolve_model, seed_value, split_packs, trace_key)
from tiny import world
from train import PAPER_CONFIG, length, n_targets, target_hidden_states

from linear_ce_kl import linear_ce_kl

UNTRUNCATED = (1.0, 1.0, 0)             # temperature, top_p, top_k
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
THEORY_KEYS = {**TRACE_KEYS, "arm": ("plain", "told", "trained, plain", "trained, told"),
               "tokens": [TOKENS], "log_plain?": Number(), "log_told?": Number(),
               "p_unsafe?": (None, Number(0, 1))}          # of a row of theory.jsonl

# --------------------------------------------------------------------------------------------------
# Log-probabilities and perplexity of examples as train.py has them: {"ids", "n_prompt"}

def truncated_log_probs(logits, targets, temperature, top_p, top_k):
    """Return log-probabilities (n,) of targets (n,) in what `sample_tokens` draws from logits
    (n, V); -inf for a token that it never draws."""
    if temperature == 0:
        temperature, top_k = 1.0, 1
    best, ids = (logits.double() / temperature).topk(top_k or logits.shape[-1])   # (n, k), falling
    p = best.softmax(-1)
    drawn = p.cumsum(-1) - p < top_p             # as long as top_p was not reached
    log_p = best.where(drawn, -math.inf).log_softmax(-1)
    return log_p.where(ids == targets[:, None], -math.inf).amax(-1)

@torch.no_grad()
def log_probs(model, examples, sampling=UNTRUNCATED, pack_tokens=8192):
    """Return log p(response | prompt) of each example in nats (list of floats).

    sampling: the temperature, top_p and top_k with which p draws."""
    found = []
    for pack in split_packs(examples, length, pack_tokens):
        hidden, targets = target_hidden_states(model, pack)                       # (N, D), (N,)
        if sampling == UNTRUNCATED:
            log_p = -linear_ce_kl(hidden, model.head, targets)
        else:
            log_p = torch.cat([truncated_log_probs(model.logits(h), y, *sampling)
                               for h, y in zip(hidden.split(256), targets.split(256))])
        parts = log_p.double().split([n_targets(example) for example in pack])
        found += [part.sum().item() for part in parts]
    return found

def training_perplexity(out, model, tokenizer):
    """Return `perplexity` of what was trained on in a folder, None without such examples."""
    examples = training_examples(out, model, tokenizer)
    return perplexity(model, examples) if examples else None

def perplexity_by_epoch(out):
    """Return exp of the mean cross-entropy of each epoch's steps: the perplexity of the training
    set while the student trained. [] where the loss is not the cross-entropy of a set of rows."""
    train = read_run(out)["train"]
    if train["fingerprint"].get("kl") or train["fingerprint"].get("online"):
        return []
    rows = read_rows(Path(out) / "metrics.jsonl", {**METRIC_KEYS, "ce": Number(-700, 700)})
    losses = [row["ce"] for row in rows]
    steps = len(losses) // train["fingerprint"]["epochs"] or 1
    return [math.exp(sum(losses[i:i + steps]) / steps) for i in range(0, len(losses), steps)]

# --------------------------------------------------------------------------------------------------
# Estimators. A row is a trace: the id of its prompt, its arm (plain, or told: under the
# instruction), whether it is accepted, and its log-probabilities. `weight` says how many traces a
# row stands for, 1 if it is missing.

def bootstrap(statistic, n):
    """Return {"mean", "low", "high"}: the statistic of n prompts, with a 95% interval over prompts
    that are drawn anew.

    statistic: f(numbers (B, P) of prompts) -> (B,)."""
    again = torch.randint(n, (2000, n), generator=torch.Generator().manual_seed(0))
    limits = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = statistic(again).nanquantile(limits).tolist()
    return {"mean": statistic(torch.arange(n)[None]).item(), "low": low, "high": high}

def accepted_counts(rows, judge):
    """Return {id: (s, n, t, m)}: s of n plain traces of a prompt and t of m told ones are accepted,
    which is row[judge]."""
    counts = defaultdict(lambda: [0, 0, 0, 0])
    for row in rows:
        at, weight = 2 * (row["arm"] == "told"), row.get("weight", 1)
        counts[row["id"]][at] += weight * row[judge]
        counts[row["id"]][at + 1] += weight
    return {i: tuple(count) for i, count in counts.items()}

def tilt(tables):
    """Estimate the odds ratio that prompts with tables (s, n, t, m) have in common -> {"omega",
    "low", "high"}, with a 95% interval.

    Mantel and Haenszel's estimate is consistent also for few traces of each of many prompts, where
    maximum likelihood, with a parameter for each prompt, is not. If all traces that could tell
    speak for one side, 1/2 is added to each cell of the table of all prompts together."""
    from statsmodels.stats.contingency_tables import StratifiedTable
    tables = list(tables)
    more = sum(t * (n - s) for s, n, t, m in tables)
    less = sum(s * (m - t) for s, n, t, m in tables)
    if not more or not less:
        s, n, t, m = map(sum, zip(*tables))
        tables = [(s + 0.5, n + 1, t + 0.5, m + 1)]
    found = StratifiedTable([[[t, m - t], [s, n - s]] for s, n, t, m in tables])
    low, high = found.oddsratio_pooled_confint()
    return {"omega": float(found.oddsratio_pooled), "low": float(low), "high": float(high)}

def beta_prior(s, n):
    """Return a, b (..., 1) of the Beta distribution that the prompts' shares come from, by the
    moments of s of n accepted (..., P).

    s (s - 1) / (n (n - 1)) is unbiased for the square of a share. Where no prompt has two traces
    nothing tells how prompts differ; they are then taken to be alike."""
    mean = ((s.sum(-1) + 0.5) / (n.sum(-1) + 1))[..., None]
    square = ((s * (s - 1)).sum(-1) / (n * (n - 1)).sum(-1))[..., None]
    strength = mean * (1 - mean) / (square - mean**2) - 1
    strength = strength.where(square > mean**2, math.inf).clamp(0.1, 1e6)
    return mean * strength, (1 - mean) * strength

def minus_log_share(s, n):
    """Return the expected -log of each prompt's share (..., P), given s of n accepted and the Beta
    distribution of all prompts. It is finite also at s = 0."""
    a, b = beta_prior(s, n)
    return torch.digamma(a + b + n) - torch.digamma(a + s)

def calibration(tables, omega):
    """Tell how well omega predicts the share that is accepted under the instruction.

    The prediction is alpha_I = omega alpha / (1 + (omega - 1) alpha), with alpha as far as the s of
    n traces accepted without the instruction tell it. Returns
        bins: for each s of n, the share predicted and seen, in percent
        rmse: the root mean square error over prompts
        noise: the rmse if the prediction were right. There are few traces, and s of n tells little
            of alpha.
        constant: the rmse of predicting the mean for all prompts"""
    s, n = torch.tensor([table[:2] for table in tables], dtype=torch.float64).T
    a, b = (x.item() for x in beta_prior(s, n))
    z = torch.linspace(-100, 100, 8001, dtype=torch.float64)                     # log odds of alpha
    f = (z + math.log(omega)).sigmoid()                                          # alpha_I
    told_of, bins, squares, noise = defaultdict(list), [], 0, 0
    for s, n, t, m in tables:
        told_of[s, n].append((t, m))
    for (s, n), told in sorted(told_of.items()):
        posterior = ((a + s) * F.logsigmoid(z) + (b + n - s) * F.logsigmoid(-z)).softmax(0)
        mean, square = (posterior * f).sum().item(), (posterior * f * f).sum().item()
        squares += sum((t / m - mean) ** 2 for t, m in told)
        # E[f (1 - f)] / m + Var[f] for each prompt
        noise += sum((mean - square) / m + square - mean**2 for _, m in told)
        seen = proportion([[True] * t + [False] * (m - t) for t, m in told])
        bins.append({"accepted": s, "of": n, "prompts": len(told), "predicted": 100 * mean,
                     "seen": seen})
    shares = torch.tensor([t / m for _, _, t, m in tables], dtype=torch.float64)
    return {"bins": bins, "rmse": math.sqrt(squares / len(tables)),
            "noise": math.sqrt(noise / len(tables)), "constant": shares.std(correction=0).item()}

def moments(values):
    """Return the summed weight, the mean and the summed squared deviation of [(value, weight)]."""
    total = sum(weight for _, weight in values)
    mean = sum(weight * value for value, weight in values) / total
    return total, mean, sum(weight * (value - mean) ** 2 for value, weight in values)

def label_only(rows, judge):
    """Test whether the tilt depends on the label alone, safe or unsafe.

    If it does, d = log p(y|I,x) - log p(y|x) is one number on all safe traces of a prompt and
    another on the unsafe ones, log omega apart. Nothing is estimated in d. Returns
        kinds: {label, and label with arm: traces, mean of d, its sd within and across prompts}
        distance: of the two labels, over prompts that have both
        within: the larger sd of a label
        explained: the label's share of the variance within those prompts"""
    groups = defaultdict(lambda: defaultdict(list))       # kind -> prompt -> [(d, weight)]
    for row in rows:
        label = "safe" if row[judge] else "unsafe"
        d = row["log_told"] - row["log_plain"]
        for kind in label, f"{label}, {row['arm']}", "all":
            groups[kind][row["id"]].append((d, row.get("weight", 1)))
    of = {}                                               # kind -> prompt -> moments
    for kind in "safe", "unsafe", "all", *groups:
        of[kind] = {i: moments(values) for i, values in groups[kind].items()}
    kinds = {}
    for kind in sorted(kind for kind in of if of[kind] and kind != "all"):
        found = list(of[kind].values())
        total = sum(weight for weight, _, _ in found)
        freedom = sum(weight - 1 for weight, _, _ in found)
        squares = sum(square for _, _, square in found)
        means = torch.tensor([mean for _, mean, _ in found])
        kinds[kind] = {"traces": total,
                       "mean": sum(weight * mean for weight, mean, _ in found) / total,
                       "within": math.sqrt(squares / freedom) if freedom else None,
                       "across": means.std().item() if len(means) > 1 else None}
    safe, unsafe = of["safe"], of["unsafe"]
    both = sorted(safe.keys() & unsafe.keys())
    if not both:
        return {"kinds": kinds, "distance": None}
    distances = torch.tensor([safe[i][1] - unsafe[i][1] for i in both], dtype=torch.float64)
    total = sum(of["all"][i][2] for i in both)
    left = sum(safe[i][2] + unsafe[i][2] for i in both)
    return {"kinds": kinds, "distance": bootstrap(lambda i: distances[i].mean(-1), len(both)),
            "within": max(kinds[label]["within"] or 0 for label in ("safe", "unsafe")),
            "explained": 1 - left / total if total else 1.0}

def decomposition(rows, source, student):
    """Measure KL(q || p) = -log alpha + excess, in nats a trace -> {"prompts", "kl", "minimum",
    "excess"}. q = p_source / alpha_source is what is accepted of a source, p the student.

    Args:
        rows: accepted traces of the source with log_source and log_plain.
        source, student: {id: (s, n)}, accepted of the source's traces and of the student's plain
            ones.

    The KL of a prompt is the mean of log p_source - log p over its rows, less log alpha_source.
    Means are over the prompts that have rows."""
    ids = sorted(source)
    sums, weights = dict.fromkeys(ids, 0), dict.fromkeys(ids, 0)
    for row in rows:
        weight = row.get("weight", 1)
        sums[row["id"]] += weight * (row["log_source"] - row["log_plain"])
        weights[row["id"]] += weight
    used = torch.tensor([weights[i] > 0 for i in ids])
    if not used.any():
        return {"prompts": 0}
    ratio = torch.tensor([sums[i] / (weights[i] or 1) for i in ids], dtype=torch.float64)
    student = torch.tensor([student[i] for i in ids], dtype=torch.float64).T      # (2, P)
    source = torch.tensor([source[i] for i in ids], dtype=torch.float64).T

    def kl(i):
        return ratio[i] + minus_log_share(*source[:, i])

    def minimum(i):
        return minus_log_share(*student[:, i])

    def mean(of_prompts):
        return bootstrap(lambda i: of_prompts(i).where(used[i], 0).sum(-1) / used[i].sum(-1),
                         len(ids))
    return {"prompts": int(used.sum()), "kl": mean(kl), "minimum": mean(minimum),
            "excess": mean(lambda i: kl(i) - minimum(i))}

def guard_errors(rows, threshold):
    """Return {"missed": share of the unsafe traces that the guard calls safe, "flagged": of the
    safe traces that it calls unsafe}.

    rows: with p_unsafe, and oracle: whether they are safe."""
    wrong = {"missed": defaultdict(list), "flagged": defaultdict(list)}
    for row in rows:
        error = None
        if row["p_unsafe"] is not None:
            error = (row["p_unsafe"] >= threshold) == row["oracle"]
        wrong["flagged" if row["oracle"] else "missed"][row["id"]].append(error)
    return {kind: proportion(list(prompts.values())) for kind, prompts in wrong.items()}

# --------------------------------------------------------------------------------------------------
# The report

def figures(rows, judge):
    """Return what the student's traces tell, accepted as row[judge] says."""
    by_arm = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_arm[row["arm"]][row["id"]].append(row[judge])
    student = [row for row in rows if row["arm"] in ("plain", "told")]
    counts = accepted_counts(student, judge)
    omega = tilt(counts.values())
    return {"acceptance": {arm: proportion(list(by_arm[arm].values())) for arm in sorted(by_arm)},
            "never": sum(s == 0 for s, *_ in counts.values()), "tilt": omega,
            "calibration": calibration(list(counts.values()), omega["omega"]),
            "label_only": label_only([row for row in student if not row["fault"]], judge),
            "counts": counts}

def decompositions(rows, sources):
    """Return {name or folder: `decomposition`} of the traces drawn here under the instruction, and
    of each source, by the guard's labels."""
    student = [row for row in rows if row["arm"] in ("plain", "told")]
    counts = accepted_counts(student, "guard")
    plain, told = ({i: count[at:at + 2] for i, count in counts.items()} for at in (0, 2))
    here = {"folder": "told, temperature 1", "counts": told, "rows": [
        {**row, "log_source": row["log_told"]} for row in student
        if row["arm"] == "told" and row["guard"]]}
    found = {}
    for source in here, *sources:
        # A text whose tokens are not those that were drawn may have probability 0.
        possible = [row for row in source["rows"] if row["log_source"] > -math.inf]
        found[str(source["folder"])] = {
            **decomposition(possible, source["counts"], plain), "traces": len(possible),
            "other tokens": len(source["rows"]) - len(possible)}
    return found

def guard_figures(rows, sources, threshold):
    """Compare the guard with the oracle -> {"errors": {where: `guard_errors`}, "let_through":
    {folder: {"kept", "unsafe"} traces of harmful prompts}}."""
    whole = [row for row in rows if not row["fault"]]
    errors = {f"temperature 1, threshold {x}": guard_errors(whole, x) for x in THRESHOLDS}
    let_through = {}
    for source in sources:
        known = [{**row, "oracle": world.oracle(row["prompt_label"], row["response"]) == "safe"}
                 for row in source["judged"]]
        for kind in "harmful", "benign":
            of_kind = [row for row in known if row["prompt_label"].endswith(kind)]
            errors[f"{source['folder']}, {kind}"] = guard_errors(of_kind, threshold)
        kept = [row["oracle"] for row in known if row["keep"] and is_harmful(row["prompt_label"])]
        let_through[str(source["folder"])] = {"kept": len(kept), "unsafe": kept.count(False)}
    return {"errors": errors, "let_through": let_through}

def interval(x, key="percent", digits=1):
    """Return '4.2 [3.1, 5.0]' of a figure {key, low, high}, or '-'."""
    if not x or x[key] is None:
        return "-"
    return f"{x[key]:.{digits}f} [{x['low']:.{digits}f}, {x['high']:.{digits}f}]"

def line(name, cells, width):
    return f"{name:40}" + "".join(f"{cell:>{width}}" for cell in cells)

def acceptance_table(report):
    """Return the lines on acceptance and the tilt, one column for each judge."""
    judges = report["by"].values()
    first = next(iter(judges))
    lines = [line(f"{report['prompts']} harmful prompts, {report['n']} traces each way",
                  [f"by the {judge}" for judge in report["by"]], 26)]
    for arm, name in {"plain": "accepted, %", "told": "accepted under the instruction, %",
                      "trained, plain": "  of the trained student, %",
                      "trained, told": "  of it under the instruction, %"}.items():
        if arm in first["acceptance"]:
            lines.append(line(name, [interval(x["acceptance"][arm]) for x in judges], 26))
    lines.append(line("prompts with no accepted trace", [x["never"] for x in judges], 26))
    lines.append(line("tilt omega", [interval(x["tilt"], "omega", 0) for x in judges], 26))
    for key, name in {"rmse": "rms error of alpha_I from omega", "noise": "  if omega were right",
                      "constant": "  of one alpha_I for all"}.items():
        lines.append(line(name, [f"{x['calibration'][key]:.3f}" for x in judges], 26))
    for x in first["calibration"]["bins"]:
        lines.append(line(f"    {x['accepted']} of {x['of']} accepted ({x['prompts']} prompts)",
                          [f"predicted {x['predicted']:.1f}", f"seen {interval(x['seen'])}"], 26))
    errors = first["calibration"]
    better = "better" if errors["rmse"] < errors["constant"] else "no better"
    return [*lines, f"omega tells prompts apart {better} than one alpha_I for all.", ""]

def label_table(found, omega):
    """Return the lines on what `label_only` found."""
    lines = [line("log p(y|I,x) - log p(y|x), nats",
                  ["mean", "sd within prompts", "sd across", "traces"], 18)]
    for kind, x in found["kinds"].items():
        cells = ["-" if x[key] is None else f"{x[key]:.2f}" for key in ("mean", "within", "across")]
        lines.append(line(f"  {kind}", [*cells, x["traces"]], 18))
    if found["distance"]:
        size, holds = abs(found["distance"]["mean"]), "does not hold"
        if found["within"] < 0.3 * size:
            holds = "holds" if found["within"] < 0.1 * size else "holds roughly"
        lines += [f"That the tilt depends on the label alone {holds}: safe and unsafe traces of a "
                  f"prompt are {interval(found['distance'], 'mean', 2)} apart,",
                  f"log omega is {math.log(omega):.2f}; within a label the sd is up to "
                  f"{found['within']:.2f}, and the label explains "
                  f"{100 * found['explained']:.0f}% of the variance."]
    return [*lines, ""]

def table(report):
    """Return theory.json as text."""
    first = next(iter(report["by"].values()))
    lines = acceptance_table(report) + label_table(first["label_only"], first["tilt"]["omega"])
    lines.append(line("KL(q || student), nats a trace",
                      ["KL", "= -log alpha", "+ excess", "prompts (traces)"], 20))
    for name, x in report["decomposition"].items():
        cells = [interval(x.get(key), "mean", 2) for key in ("kl", "minimum", "excess")]
        lines.append(line(f"  {Path(name).name}", [*cells, f"{x['prompts']} ({x['traces']})"], 20))
    lines += ["", line("perplexity of the training set",
                       ["under the student", "when it is trained", "rows"], 22)]
    for name, x in report["perplexity"].items():
        if x["before"]:
            cells = [interval(x.get(when), "perplexity", 3) for when in ("before", "after")]
            lines.append(line(f"  {Path(name).name}", [*cells, x["before"]["rows"]], 22))
    if report["epochs"]:
        lines.append("  in each epoch of training: "
                     + ", ".join(f"{x:.3f}" for x in report["epochs"]))
    if report["guard"]:
        lines += ["", line("guard against the oracle, %",
                           ["missed of unsafe", "flagged of safe"], 22)]
        for where, x in report["guard"]["errors"].items():
            cells = [interval(x["missed"]), interval(x["flagged"])]
            lines.append(line(f"  {Path(where).name}", cells, 22))
        for name, x in report["guard"]["let_through"].items():
            lines.append(f"  {Path(name).name}: {x['unsafe']} of {x['kept']} traces of harmful "
                         "prompts that were kept are unsafe")
    return "\n".join(lines)

def second_round(out, run, trained, student):
    """Return the commands that do all of it again with the trained student as the student, into
    OUT-2."""
    sampled, again = run["sample"], f"{out}-2"

    def command(script, **flags):
        words = [f"--{key.replace('_', '-')} {value}" for key, value in flags.items()]
        return " ".join([f"python {script}.py --out {again}", *words])
    flags = {key: sampled["arguments"][key] for key in (
        "prompts", "label", "prompt_column", "steer", "limit", "seed")
        if sampled["arguments"].get(key)}
    flags["max_new_tokens"] = sampled["fingerprint"]["max_new_tokens"]
    config = {key: value for key, value in run["train"]["fingerprint"].items()
              if key in PAPER_CONFIG}
    merge = [f"python train.py --out {out} --merge     # and the flags it had"]
    if not (resolve_model(trained).folder / "adapter_config.json").exists():
        merge = []
    return [*merge, command("sample", model=trained, **flags),
            command("guard", guard=run["guard"]["guard"]), command("train", **config),
            command("eval", before=student)]

# --------------------------------------------------------------------------------------------------
# The stage

def read_source(folder, prompts):
    """Read a run with a finished guard.py.

    prompts: {id: row} of the prompts that are measured. Returns
        folder, model, and sampling: temperature, top_p and top_k
        judged: all rows
        rows: the accepted ones of those prompts
        counts: {id: (accepted, all)} of those prompts

    Raises InputError."""
    run = read_run(folder)
    if not run.get("guard", {}).get("finished"):
        raise InputError(f"{folder}: guard.py has not finished there; run it first")
    required = {**GUARDED_KEYS, "steer": tuple(REFUSAL_INSTRUCTIONS)}
    judged = read_rows(folder / "guarded.jsonl", required)
    how, counts = run["sample"]["fingerprint"], {}
    rows = [row for row in judged           # retries are of rejected prompts only
            if row["id"] in prompts and row["k"] < how["n"]]
    for row in rows:
        s, n = counts.get(row["id"], (0, 0))
        counts[row["id"]] = s + (row["response_label"] == "safe"), n + 1
    return {"folder": folder, "model": run["sample"]["model"], "judged": judged,
            "sampling": (how["temperature"], how["top_p"], how["top_k"]), "counts": counts,
            "rows": [row for row in rows if row["response_label"] == "safe"]}

def text_example(tokenizer, row, wording):
    """Return a row's prompt under the refusal instruction `wording`, and its response's text."""
    prompt = add_refusal_instruction(row["instruction"], wording)
    ids, target = encode_training_pair(tokenizer, prompt, row["response"], row.get("eos"))
    return {"ids": ids + target, "n_prompt": len(ids)}

def draw(model, tokenizer, arms, prompts, args, writer):
    """Draw the traces that are not there yet, into the writer's file and rows.

    arms: {name: (wording of the refusal instruction, traces of each prompt)}."""
    done = {(*trace_key(row), row["arm"]) for row in writer.rows}
    missing = []
    for arm, (wording, n) in arms.items():
        for prompt in prompts.values():
            missing += [(arm, wording, prompt, k) for k in range(n)
                        if (prompt["id"], k, arm) not in done]
    ids = [encode_prompt(tokenizer, add_refusal_instruction(prompt["instruction"], wording))
           for _, wording, prompt, _ in missing]
    keys = [f"{prompt['id']}/{arm}/{k}" for arm, _, prompt, k in missing]
    sampler = Sampler(model, tokenizer, args.slots)
    found = sampler.generate(ids, args.max_new_tokens, *UNTRUNCATED, seed=args.seed, keys=keys)
    with progress("; ".join(arms), len(missing), "trace") as advance:
        for c in found:
            arm, _, prompt, k = missing[c.index]
            row = {**prompt, "arm": arm, "k": k, "finish_reason": c.finish_reason,
                   "response": decode_response(tokenizer, c.tokens, model.eos_ids),
                   "n_tokens": len(c.tokens), "tokens": c.tokens}
            writer.rows.append(row)
            writer.write(row)
            advance(tokens=len(c.tokens))

def score(rows, key, model, examples, sampling=UNTRUNCATED):
    """Set row[key] to the log-probability of the row's example."""
    for row, log_p in zip(rows, log_probs(model, examples, sampling)):
        row[key] = log_p

def score_traces(rows, wordings, model, tokenizer):
    """Give the student's traces their log-probabilities: {key: wording of the instruction}."""
    for key, wording in wordings.items():
        todo = [row for row in rows if row["arm"] in ("plain", "told") and key not in row]
        examples = []
        for row in todo:
            prompt = add_refusal_instruction(row["instruction"], wording)
            ids = encode_prompt(tokenizer, prompt)
            examples.append({"ids": ids + row["tokens"], "n_prompt": len(ids)})
        score(todo, key, model, examples)

def judge_traces(rows, guard):
    """Set p_unsafe of the traces that have none yet."""
    with progress(f"guard {guard.name}", len(rows), "trace") as advance:
        for start in range(0, len(rows), 128):
            batch = rows[start:start + 128]
            verdicts = guard.judge([(row["instruction"], row["response"]) for row in batch])
            for row, verdict in zip(batch, verdicts):
                row["p_unsafe"] = verdict.p_unsafe
            advance(len(batch))

def parse_args():
    p = make_parser(__doc__)
    g = p.add_argument_group("models and data")
    g.add_argument("--model", help="trained student (default: OUT/model, if train.py has finished)")
    g.add_argument("--before", help="student (default: the one that training started from)")
    g.add_argument("--sources", nargs="+", default=(), metavar="OUT",
                   help="other runs whose data to measure")
    g = p.add_argument_group("traces")
    g.add_argument("--n", type=positive, default=8,
                   help="traces of each prompt, without and with the instruction")
    g.add_argument("--limit", type=positive, default=600, help="at most so many harmful prompts")
    g.add_argument("--max-new-tokens", type=positive,
                   help="longest trace, tokens (default: what sample.py used)")
    g.add_argument("--slots", type=positive, default=256, help="sequences decoded at a time")
    g.add_argument("--seed", type=seed_value, help="of the draws (default: that of sample.py)")
    return p.parse_args()

def main():
    args = parse_args()
    if not importlib.util.find_spec("statsmodels"):
        raise InputError("this needs statsmodels: pip install -r extras/requirements.txt")
    run = read_run(args.out)
    if not run.get("guard", {}).get("finished"):
        raise InputError(f"{args.out}: guard.py has not finished there; run it first")
    sampled, judged, train = run["sample"], run["guard"], run.get("train", {})
    args.seed = stage_seed(args, run)
    args.max_new_tokens = args.max_new_tokens or sampled["fingerprint"]["max_new_tokens"]
    student = resolve_model(args.before or train.get("model") or sampled["model"]).name
    trained = args.model or (args.out / "model" if train.get("finished") else None)
    steer = steer_of(sampled)
    steer = "default" if steer == "none" else steer
    prompts = {row["id"]: {key: row[key] for key in ("id", "instruction", "prompt_label")}
               for row in read_rows(args.out / "guarded.jsonl", GUARDED_KEYS)
               if is_harmful(row["prompt_label"])}
    prompts = dict(sorted(prompts.items())[:args.limit])          # ids are hashes: no matter which
    if not prompts:
        raise InputError(f"{args.out}/guarded.jsonl: no harmful prompts in it")
    folders = dict.fromkeys([args.out, *map(Path, args.sources)])
    sources = [read_source(folder, prompts) for folder in folders]
    guard_name, threshold = judged["guard"], judged["fingerprint"]["threshold"]
    guard_folder = guard_format(guard_name, student)[1]

    def load(name):
        return load_model(name, args.device, choose_dtype(args), args.quantize)
    model, tokenizer = load(student)
    stage = Stage("theory", args, "theory.jsonl", {
        "student": model.hash, "trained": trained and model_hash(resolve_model(trained).folder),
        "guard": [guard_name, model_hash(guard_folder)], "template": template_hash(tokenizer),
        "prompts": content_id(*prompts), "n": args.n, "seed": args.seed,
        "wording": REFUSAL_INSTRUCTIONS[steer], "max_new_tokens": args.max_new_tokens,
        "dtype": str(model.head.dtype)})
    writer = RowWriter(stage.path, THEORY_KEYS)
    rows = writer.rows
    for row in rows:
        if row["id"] not in prompts or max(row["tokens"], default=0) >= model.config.vocab_size:
            raise InputError(f"{stage.path}: row {row['id']} is of another measurement; delete "
                             "it, or use another --out")
    draw(model, tokenizer, {"plain": ("none", args.n), "told": (steer, args.n)}, prompts, args,
         writer)
    score_traces(rows, {"log_plain": "none", "log_told": steer}, model, tokenizer)
    perplexities = {}
    for source in sources:
        before = training_perplexity(source["folder"], model, tokenizer)
        perplexities[str(source["folder"])] = {"before": before}
        examples = [text_example(tokenizer, row, "none") for row in source["rows"]]
        score(source["rows"], "log_plain", model, examples)
    source_tokenizer = tokenizer
    for name in dict.fromkeys([student, *(source["model"] for source in sources)]):
        if name != student:                                       # one model at a time
            model = None
            free_memory()
            model, source_tokenizer = load(name)
        for source in sources:
            if source["model"] == name:
                examples = [text_example(source_tokenizer, row, row["steer"])
                            for row in source["rows"]]
                score(source["rows"], "log_source", model, examples, source["sampling"])
    if trained:
        model = None
        free_memory()
        model, _ = load(trained)
        after = training_perplexity(args.out, model, tokenizer)
        perplexities[str(args.out)]["after"] = after
        if model.head.dtype == torch.float32 and not args.quantize:
            merge_lora(model)                       # faster; bf16 weights would be rounded by it
        draw(model, tokenizer, {"trained, plain": ("none", 1), "trained, told": (steer, 1)},
             prompts, args, writer)
    model = None
    free_memory()

    todo = [row for row in rows if "p_unsafe" not in row]
    if todo:
        asked = load(student) if guard_name == "self" else None
        judge_traces(todo, load_guard(guard_name, args.device, choose_dtype(args), asked,
                                      args.quantize))
    in_tiny_world = is_tiny(student) and is_tiny(sampled["arguments"]["prompts"] or TINY)
    for row in rows:
        row["fault"] = rejection_reason(row["response"], row["finish_reason"], tokenizer)
        known = not row["fault"] and row["p_unsafe"] is not None
        row["guard"] = known and row["p_unsafe"] < threshold
        if in_tiny_world:
            safe = world.oracle(row["prompt_label"], row["response"]) == "safe"
            row["oracle"] = not row["fault"] and safe
    write_rows(stage.path, rows)
    judges = ["oracle", "guard"] if in_tiny_world else ["guard"]
    report = {"student": student, "steer": steer, "prompts": len(prompts), "n": args.n,
              "by": {judge: figures(rows, judge) for judge in judges},
              "decomposition": decompositions(rows, sources), "perplexity": perplexities,
              "epochs": perplexity_by_epoch(args.out) if train.get("finished") else [],
              "guard": guard_figures(rows, sources, threshold) if in_tiny_world else None}
    # An interval of a few prompts may be nan, which is no JSON.
    finite = json.loads(json.dumps(report), parse_constant=lambda _: None)
    write_atomic(args.out / "theory.json", json.dumps(finite, indent=1))
    print(escape_control_chars(table(report)))
    if train.get("finished"):
        again = "\n  ".join(second_round(args.out, run, str(trained), student))
        print(escape_control_chars(f"a second round, from the trained student:\n  {again}"))
    stage.finish(f"measured the theory on {len(prompts)} prompts", args.out / "theory.json",
                 f"python -m extras.compare {args.out} --out FOLDER", rows=len(rows),
                 tokens=sum(row["n_tokens"] for row in rows))

if __name__ == "__main__":
    cli(main)
