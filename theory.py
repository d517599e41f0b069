"""
ThinkSafe's theory, measured: `python eval.py --theory`. Traces -> OUT/theory.jsonl, figures -> OUT/theory.json.

    python eval.py --theory --n 8 --limit 500                    # 8 traces of each of 500 harmful prompts, both ways
    python eval.py --theory --sources out/rejection out/teacher  # and the data of other runs, against the same student

The claim (arXiv 2601.23143). p is the student, alpha the share of its responses to a harmful prompt that are accepted as safe.
Of all distributions over safe responses the one nearest to p is p(y|x) / alpha, at KL = -log alpha. If the refusal instruction I
changes nothing but the odds of safe to unsafe, by a factor omega (the tilt), then what is accepted under it has that very
distribution, and a share alpha_I = omega alpha / (1 + (omega - 1) alpha) of it is accepted: the same data for less.

What p is. The claim is about the model itself: p is the model at temperature 1, nothing cut off. A p that is cut to its likely
tokens gives some traces probability 0, and KL to it is infinite. Traces are drawn here in that way too, so that they agree
with their log-probabilities. The data of a run were drawn otherwise (temperature 0.6, top-p 0.95, ...); their own
log-probability is that of the distribution they were drawn from. In bfloat16 log-probabilities are good to about 0.01 nats a
token; --dtype float32 for better.
"""
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from data import Unavailable, prompt_rows, training_rows
from guard import guard_format, load_guard
from kernels.ce_kl import ce_kl_loss
from sample import Sampler
from thinksafe import (
    STEER,
    TINY,
    InputError,
    RowWriter,
    Stage,
    check_trace,
    content_id,
    decode_response,
    encode_prompt,
    encode_response,
    fault_of,
    find_model,
    free_memory,
    inert,
    is_harmful,
    is_tiny,
    load_decoder,
    merge_lora,
    model_hash,
    model_name,
    opening,
    own_think,
    pick_dtype,
    progress,
    read_rows,
    read_run,
    read_shards,
    row_key,
    sampling_cost,
    shard_files,
    share,
    split_packs,
    steered,
    template_hash,
    write_atomic,
)
from tiny import world
from train import PAPER, encode_rows, target_states

AS_IT_IS = (1.0, 1.0, 0)              # temperature, top_p, top_k
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)

# ---------------------------------------------------------------------------------------------
# Log-probabilities and perplexity of items {"ids": prompt and response, "n_prompt"}, as train.py has them


def cut_log_probs(logits, targets, temperature, top_p, top_k):
    """log-probability (n,) of targets (n,) in what `pick_tokens` draws from logits (n, V); -inf for what it never draws."""
    if temperature == 0:
        temperature, top_k = 1.0, 1
    best, ids = (logits.double() / temperature).topk(top_k or logits.shape[-1])              # (n, k), falling
    p = best.softmax(-1)
    kept = best.where(p.cumsum(-1) - p < top_p, -math.inf).log_softmax(-1)                   # as long as top_p was not reached
    return kept.where(ids == targets[:, None], -math.inf).amax(-1)


@torch.no_grad()
def log_probs(model, items, drawn=AS_IT_IS, pack_tokens=8192):
    """log p(response | prompt) of each item in nats (list of floats), p drawing with this temperature, top_p and top_k."""
    out = []
    for pack in split_packs(items, lambda item: len(item["ids"]), pack_tokens):
        hidden, targets = target_states(model, pack)
        if drawn == AS_IT_IS:
            logs = -ce_kl_loss(hidden, model.head, targets)
        else:
            logs = torch.cat([cut_log_probs(model.logits(h), y, *drawn) for h, y in zip(hidden.split(256), targets.split(256))])
        out += [part.sum().item() for part in logs.double().split([len(item["ids"]) - item["n_prompt"] for item in pack])]
    return out


def perplexity(model, items):
    """{"perplexity", "low", "high", "rows", "tokens"} of the items' responses under the model; None if there are no items.

    exp of the mean -log p of a token; its 95% interval by the delta method, rows being what was drawn."""
    if not items:
        return None
    nats, lengths = [-x for x in log_probs(model, items)], [len(item["ids"]) - item["n_prompt"] for item in items]
    n = sum(lengths)
    mean = sum(nats) / n
    half = 1.96 * math.hypot(*(x - mean * length for x, length in zip(nats, lengths))) / n
    low, middle, high = (math.exp(x) for x in (mean - half, mean, mean + half))
    return {"perplexity": middle, "low": low, "high": high, "rows": len(items), "tokens": n}


def training_items(out, model, tokenizer, most=512):
    """What train.py was or would be trained on in a folder, as items: at most so many, chosen by their ids. [] if it has no set
    of rows (online methods), or they cannot be had here."""
    train = read_run(out).get("train", {"arguments": {}, "identity": {}})
    args = train["arguments"]
    source = args.get("data") or Path(out) / "guarded.jsonl"
    if args.get("online") or not args.get("data") and not shard_files(source):
        return []
    try:
        rows = (prompt_rows if args.get("primer") else training_rows)(source, args.get("label"))
    except Unavailable as e:
        print(inert(f"no perplexity of the training set: {e}"), file=sys.stderr)
        return []
    how = {key: args[key] for key in ("strip_cot", "primer") if args.get(key)}
    items, _ = encode_rows(rows, tokenizer, train["identity"].get("max_length", model.config.max_position_embeddings), **how)
    return sorted(items, key=lambda item: content_id(str(item["id"])))[:most]


def perplexity_by_epoch(out):
    """[exp of the mean cross-entropy of an epoch's steps, ...]: the set's while the student trained. [] where it is not that."""
    train = read_run(out)["train"]
    if train["identity"].get("kl") or train["arguments"].get("online"):
        return []
    losses = [row["ce"] for row in read_rows(Path(out) / "metrics.jsonl")]
    each = len(losses) // train["identity"]["epochs"]
    return [math.exp(sum(losses[i:i + each]) / each) for i in range(0, len(losses), each)]


# ---------------------------------------------------------------------------------------------
# Estimators. A row is a trace: id (of its prompt), arm (plain, or told: under the instruction), whether it is accepted, its
# log-probabilities; `weight`: how many traces it stands for, 1 if it does not say.


def bootstrap(statistic, prompts):
    """{"mean", "low", "high"} of statistic(indices (B, P) of prompts) -> (B,): of all of them, and its 95% interval over
    prompts that are drawn anew."""
    again = torch.randint(prompts, (2000, prompts), generator=torch.Generator().manual_seed(0))
    low, high = statistic(again).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": statistic(torch.arange(prompts)[None]).item(), "low": low, "high": high}


def accepted_counts(rows, judge):
    """{id: [s, n, t, m]}: s of n plain traces of the prompt and t of m told ones are accepted, row[judge]."""
    counts = defaultdict(lambda: [0, 0, 0, 0])
    for row in rows:
        at, weight = 2 * (row["arm"] == "told"), row.get("weight", 1)
        counts[row["id"]][at] += weight * row[judge]
        counts[row["id"]][at + 1] += weight
    return dict(counts)


def tilt(tables):
    """The odds ratio that prompts with tables (s, n, t, m) have in common -> {"omega", "low", "high"}, with a 95% interval.

    Mantel and Haenszel's: consistent also for few traces of each of many prompts, where maximum likelihood, with a parameter
    for each prompt, is not. The interval of its logarithm by Robins, Breslow and Greenland (1986). If all traces that could
    tell speak for one side, 1/2 is added to each cell of the table of all prompts together."""
    def terms(s, n, t, m):
        return t * (n - s) / (n + m), s * (m - t) / (n + m), (t + n - s) / (n + m)
    parts = [terms(*x) for x in tables]
    if not all(map(sum, list(zip(*parts))[:2])):
        s, n, t, m = map(sum, zip(*tables))
        parts = [terms(s + 0.5, n + 1, t + 0.5, m + 1)]
    more, less, _ = map(sum, zip(*parts))
    variance = sum(p * r / (2 * more**2) + ((1 - p) * r + p * q) / (2 * more * less) + (1 - p) * q / (2 * less**2)
                   for r, q, p in parts)
    factor = math.exp(1.96 * math.sqrt(variance))
    return {"omega": more / less, "low": more / less / factor, "high": more / less * factor}


def beta(s, n):
    """a, b (..., 1) of the Beta distribution that the prompts' shares come from, by the moments of s of n accepted (..., P).

    s (s - 1) / (n (n - 1)) is unbiased for the square of a share. Where no prompt has two traces nothing tells how prompts
    differ; they are taken to be alike then."""
    mean = ((s.sum(-1) + 0.5) / (n.sum(-1) + 1))[..., None]
    square = ((s * (s - 1)).sum(-1) / (n * (n - 1)).sum(-1))[..., None]
    strength = mean * (1 - mean) / (square - mean**2) - 1
    strength = strength.where(square > mean**2, math.inf).clamp(0.1, 1e6)
    return mean * strength, (1 - mean) * strength


def minus_log_share(s, n):
    """(..., P): what -log of each prompt's share is expected to be, given s of n and the Beta of all. Finite also at s = 0."""
    a, b = beta(s, n)
    return torch.digamma(a + b + n) - torch.digamma(a + s)


def calibration(tables, omega):
    """How well alpha_I = omega alpha / (1 + (omega - 1) alpha) tells the share accepted under the instruction from the s of n
    without it: predicted and seen in percent for each s; and over prompts the root mean square error `rmse`, what it would be
    if the prediction were right (`noise`: there are few traces, and s of n tells little of alpha), and that of predicting the
    mean for all (`constant`)."""
    a, b = (x.item() for x in beta(*torch.tensor([x[:2] for x in tables], dtype=torch.float64).T))
    z = torch.linspace(-100, 100, 8001, dtype=torch.float64)                                # log odds of alpha
    f, bins, squares, noise = (z + math.log(omega)).sigmoid(), defaultdict(list), 0, 0
    for s, n, t, m in tables:
        bins[s, n].append((t, m))
    out = []
    for (s, n), told in sorted(bins.items()):
        w = ((a + s) * F.logsigmoid(z) + (b + n - s) * F.logsigmoid(-z)).softmax(0)         # of alpha, given s of n
        mean, square = (w * f).sum().item(), (w * f * f).sum().item()
        squares += sum((t / m - mean) ** 2 for t, m in told)
        noise += sum((mean - square) / m + square - mean**2 for _, m in told)               # E[f (1 - f)] / m + Var[f]
        seen = share([[True] * t + [False] * (m - t) for t, m in told])
        out.append({"accepted": s, "of": n, "prompts": len(told), "predicted": 100 * mean, "seen": seen})
    constant = torch.tensor([t / m for *_, t, m in tables], dtype=torch.float64).std(correction=0).item()
    return {"bins": out, "rmse": math.sqrt(squares / len(tables)), "noise": math.sqrt(noise / len(tables)), "constant": constant}


def label_only(rows, judge):
    """Is d = log p(y|I,x) - log p(y|x) one number on a prompt's safe traces and another on its unsafe ones? Nothing is estimated
    in d: if the tilt depends on the label alone then it has no spread within a label, and log omega between them.

    -> "kinds": {label and arm: traces, mean, sd within and across prompts}; "distance" of the labels, over prompts that have
    both; "within": the larger sd of a label; "explained": share of the variance within those prompts that is the label's."""
    groups = defaultdict(lambda: defaultdict(list))                       # kind -> prompt -> [(d, weight)]
    for row in rows:
        label = "safe" if row[judge] else "unsafe"
        for kind in label, f"{label}, {row['arm']}", "all":
            groups[kind][row["id"]].append((row["log_told"] - row["log_plain"], row.get("weight", 1)))

    def moments(traces):
        total = sum(w for _, w in traces)
        mean = sum(d * w for d, w in traces) / total
        return total, mean, sum(w * (d - mean) ** 2 for d, w in traces)
    kinds = {}
    for kind in sorted(groups.keys() - {"all"}):
        each = list(map(moments, groups[kind].values()))
        total, freedom = sum(w for w, _, _ in each), sum(w - 1 for w, _, _ in each)
        means = torch.tensor([mean for _, mean, _ in each])
        kinds[kind] = {"traces": total, "mean": sum(w * mean for w, mean, _ in each) / total,
                       "within": math.sqrt(sum(square for *_, square in each) / freedom) if freedom else None,
                       "across": means.std().item() if len(means) > 1 else None}
    safe, unsafe, all_ = ({i: moments(traces) for i, traces in groups[kind].items()} for kind in ("safe", "unsafe", "all"))
    both = sorted(safe.keys() & unsafe.keys())
    if not both:
        return {"kinds": kinds, "distance": None}
    apart = torch.tensor([safe[i][1] - unsafe[i][1] for i in both], dtype=torch.float64)
    total = sum(all_[i][2] for i in both)
    return {"kinds": kinds, "distance": bootstrap(lambda i: apart[i].mean(-1), len(both)),
            "within": max(kinds[label]["within"] or 0 for label in ("safe", "unsafe")),
            "explained": 1 - sum(safe[i][2] + unsafe[i][2] for i in both) / total if total else 1.0}


def decomposition(rows, source, student):
    """KL(q || p) = -log alpha + excess, in nats a trace: of q = p_source / alpha_source on what is accepted, from the student.

    rows: accepted traces of the source with log_source and log_plain; source, student: {id: (s, n)}, what is accepted of its
    traces and of the student's plain ones. KL of a prompt is the mean of log p_source - log p over its rows, less
    log alpha_source. Means are over the prompts that have rows. -> {"prompts", "kl", "minimum", "excess"}"""
    ids = sorted(source)
    sums = {i: [0, 0] for i in ids}
    for row in rows:
        weight = row.get("weight", 1)
        sums[row["id"]][0] += weight * (row["log_source"] - row["log_plain"])
        sums[row["id"]][1] += weight
    used = torch.tensor([sums[i][1] > 0 for i in ids])
    if not used.any():
        return {"prompts": 0}
    ratio = torch.tensor([sums[i][0] / (sums[i][1] or 1) for i in ids], dtype=torch.float64)
    mine, its = (torch.tensor([counts[i] for i in ids], dtype=torch.float64).T for counts in (student, source))

    def mean(of_prompts):
        return bootstrap(lambda i: of_prompts(i).where(used[i], 0).sum(-1) / used[i].sum(-1), len(ids))
    return {"prompts": int(used.sum()), "kl": mean(lambda i: ratio[i] + minus_log_share(*its[:, i])),
            "minimum": mean(lambda i: minus_log_share(*mine[:, i])),
            "excess": mean(lambda i: ratio[i] + minus_log_share(*its[:, i]) - minus_log_share(*mine[:, i]))}


def guard_errors(rows, threshold):
    """{"missed": share of the unsafe traces that the guard calls safe, "flagged": of the safe ones that it calls unsafe}.

    rows: with p_unsafe, and oracle: whether they are safe."""
    wrong = {"missed": defaultdict(list), "flagged": defaultdict(list)}
    for row in rows:
        unsafe = None if row["p_unsafe"] is None else row["p_unsafe"] >= threshold
        wrong["flagged" if row["oracle"] else "missed"][row["id"]].append(None if unsafe is None else unsafe == row["oracle"])
    return {kind: share(list(prompts.values())) for kind, prompts in wrong.items()}


# ---------------------------------------------------------------------------------------------
# The stage


def read_source(folder, known):
    """A run with a finished guard.py: {"folder", "model", "drawn", "judged": its rows, "rows": those accepted, of prompts whose
    ids are known, "counts": of those prompts {id: (accepted, all)}}. Raises InputError."""
    run = read_run(folder)
    if not run.get("guard", {}).get("finished"):
        raise InputError(f"{folder}: guard.py has not finished there; run it first")
    judged, how, counts = read_shards(folder / "guarded.jsonl"), run["sample"]["identity"], {}
    rows = [row for row in judged if row["id"] in known and row["k"] < how["n"]]          # retries are of rejected prompts only
    for row in rows:
        s, n = counts.get(row["id"], (0, 0))
        counts[row["id"]] = s + (row["response_label"] == "safe"), n + 1
    return {"folder": folder, "model": run["sample"]["model"], "drawn": (how["temperature"], how["top_p"], how["top_k"]),
            "judged": judged, "rows": [row for row in rows if row["response_label"] == "safe"], "counts": counts}


def text_item(tokenizer, prompt, response):
    """A prompt (the user's turn) and the text of a response as an item."""
    ids = encode_prompt(tokenizer, prompt)
    answer = encode_response(tokenizer, own_think(response, tokenizer))
    return {"ids": ids + answer + [tokenizer.eos_token_id], "n_prompt": len(ids)}


def figures(rows, judge):
    """What the student's traces tell, accepted as row[judge] says."""
    by_arm = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_arm[row["arm"]][row["id"]].append(row[judge])
    mine = [row for row in rows if row["arm"] in ("plain", "told")]
    counts = accepted_counts(mine, judge)
    omega = tilt(counts.values())
    return {"acceptance": {arm: share(list(by_arm[arm].values())) for arm in sorted(by_arm)},
            "never": sum(s == 0 for s, *_ in counts.values()), "tilt": omega,
            "calibration": calibration(counts.values(), omega["omega"]),
            "label_only": label_only([row for row in mine if not row["fault"]], judge), "counts": counts}


def decompositions(rows, sources):
    """{name or folder: see `decomposition`}: of the traces drawn here under the instruction, and of each source; by the guard's
    labels."""
    counts = accepted_counts([row for row in rows if row["arm"] in ("plain", "told")], "guard")
    plain, told = ({i: c[at:at + 2] for i, c in counts.items()} for at in (0, 2))
    here = [{**row, "log_source": row["log_told"]} for row in rows if row["arm"] == "told" and row["guard"]]
    out = {}
    for source in [{"folder": "told, temperature 1", "rows": here, "counts": told}, *sources]:
        drawn = [row for row in source["rows"] if row["log_source"] > -math.inf]      # not so if the text's tokens are others
        out[str(source["folder"])] = {**decomposition(drawn, source["counts"], plain), "traces": len(drawn),
                                      "other tokens": len(source["rows"]) - len(drawn)}
    return out


def of_the_guard(rows, sources, threshold):
    """Against the oracle: {"errors": {where: see `guard_errors`}, "let_through": {folder: {"kept", "unsafe"} harmful rows}}."""
    kinds = {f"temperature 1, threshold {x}": ([row for row in rows if not row["fault"]], x) for x in THRESHOLDS}
    let_through = {}
    for source in sources:
        truth = [{**row, "oracle": world.oracle(row["prompt_label"], row["response"]) == "safe"} for row in source["judged"]]
        for kind in "harmful", "benign":
            kinds[f"{source['folder']}, {kind}"] = [row for row in truth if row["prompt_label"].endswith(kind)], threshold
        kept = [row["oracle"] for row in truth if row["keep"] and is_harmful(row["prompt_label"])]
        let_through[str(source["folder"])] = {"kept": len(kept), "unsafe": kept.count(False)}
    return {"errors": {where: guard_errors(*kind) for where, kind in kinds.items()}, "let_through": let_through}


def interval(x, key="percent", digits=1):
    """'4.2 [3.1, 5.0]' of a figure {key, low, high}, or '-'."""
    return "-" if not x or x[key] is None else f"{x[key]:.{digits}f} [{x['low']:.{digits}f}, {x['high']:.{digits}f}]"


def table(report):
    """theory.json as text."""
    by, lines = report["by"], []
    first = next(iter(by.values()))

    def line(name, cells, width):
        lines.append(f"{name:40}" + "".join(f"{cell:>{width}}" for cell in cells))
    line(f"{report['prompts']} harmful prompts, {report['n']} traces each way", [f"by the {judge}" for judge in by], 26)
    words = {"plain": "accepted, %", "told": "accepted under the instruction, %", "trained, plain": "  of the trained student, %",
             "trained, told": "  of it under the instruction, %"}
    for arm, name in words.items():
        if arm in first["acceptance"]:
            line(name, [interval(x["acceptance"][arm]) for x in by.values()], 26)
    line("prompts with no accepted trace", [x["never"] for x in by.values()], 26)
    line("tilt omega", [interval(x["tilt"], "omega", 0) for x in by.values()], 26)
    words = {"rmse": "rms error of alpha_I from omega", "noise": "  if omega were right", "constant": "  of one alpha_I for all"}
    for key, name in words.items():
        line(name, [f"{x['calibration'][key]:.3f}" for x in by.values()], 26)
    for x in first["calibration"]["bins"]:
        line(f"    {x['accepted']} of {x['of']} accepted ({x['prompts']} prompts)",
             [f"predicted {x['predicted']:.1f}", f"seen {interval(x['seen'])}"], 26)
    fit, test = first["calibration"], first["label_only"]
    says = "better" if fit["rmse"] < fit["constant"] else "no better"
    lines += [f"omega tells prompts apart {says} than one alpha_I for all.", ""]
    line("log p(y|I,x) - log p(y|x), nats", ["mean", "sd within prompts", "sd across", "traces"], 18)
    for kind, x in test["kinds"].items():
        cells = ["-" if x[key] is None else f"{x[key]:.2f}" for key in ("mean", "within", "across")]
        line(f"  {kind}", [*cells, x["traces"]], 18)
    if test["distance"]:
        size = abs(test["distance"]["mean"])                              # by the sd within a label: 10% of it, 30%, more
        says = "holds" if test["within"] < 0.1 * size else "holds roughly" if test["within"] < 0.3 * size else "does not hold"
        apart, omega = interval(test["distance"], "mean", 2), math.log(first["tilt"]["omega"])
        lines += [f"That the tilt depends on the label alone {says}: safe and unsafe traces of a prompt are {apart} apart,",
                  f"log omega is {omega:.2f}; within a label the sd is up to {test['within']:.2f}, and the label explains "
                  f"{100 * test['explained']:.0f}% of the variance."]
    lines.append("")
    line("KL(q || student), nats a trace", ["KL", "= -log alpha", "+ excess", "prompts (traces)"], 20)
    for name, x in report["decomposition"].items():
        cells = [interval(x.get(key), "mean", 2) for key in ("kl", "minimum", "excess")]
        line(f"  {Path(name).name}", [*cells, f"{x['prompts']} ({x['traces']})"], 20)
    lines.append("")
    line("perplexity of the training set", ["under the student", "when it is trained", "rows"], 22)
    for name, x in report["perplexity"].items():
        if x["before"]:
            cells = [interval(x.get(when), "perplexity", 3) for when in ("before", "after")]
            line(f"  {Path(name).name}", [*cells, x["before"]["rows"]], 22)
    if report["epochs"]:
        lines.append("  in each epoch of training: " + ", ".join(f"{x:.3f}" for x in report["epochs"]))
    if report["guard"]:
        lines.append("")
        line("guard against the oracle, %", ["missed of unsafe", "flagged of safe"], 22)
        for where, x in report["guard"]["errors"].items():
            line(f"  {Path(where).name}", [interval(x["missed"]), interval(x["flagged"])], 22)
        for name, x in report["guard"]["let_through"].items():
            lines.append(f"  {Path(name).name}: {x['unsafe']} of {x['kept']} traces of harmful prompts that were kept are unsafe")
    return "\n".join(lines)


def second_round(out, run, trained, student):
    """The commands that do all of it again with the trained student as the student, into OUT-2."""
    sampled, train, again = run["sample"]["arguments"], run["train"], f"{out}-2"
    flags = {key: sampled[key] for key in ("prompts", "label", "steer", "limit", "seed") if sampled[key]}
    flags["max-new-tokens"] = run["sample"]["identity"]["max_new_tokens"]
    recipe = {key: value for key, value in train["identity"].items() if key in PAPER}

    def command(script, **flags):
        return " ".join([f"python {script}.py --out {again}", *(f"--{k.replace('_', '-')} {v}" for k, v in flags.items())])
    adapter = (find_model(trained) / "adapter_config.json").exists()
    merge = [f"python train.py --out {out} --merge     # and the flags it had"] * adapter
    return [*merge, command("sample", model=trained, **flags), command("guard", guard=run["guard"]["guard"]),
            command("train", **recipe), command("eval", before=student)]


def main(args):
    """`eval.py --theory` with its flags."""
    run = read_run(args.out)
    if not run.get("guard", {}).get("finished"):
        raise InputError(f"{args.out}: guard.py has not finished there; run it first")
    sampled, train = run["sample"], run.get("train", {})
    student = model_name(args.before or train.get("model") or sampled["model"])
    trained = args.model or (args.out / "model" if train.get("finished") else None)
    steer = {"none": "default"}.get(sampled["identity"]["steer"], sampled["identity"]["steer"])
    prompts = {row["id"]: {key: row[key] for key in ("id", "instruction", "prompt_label")}
               for row in read_shards(args.out / "guarded.jsonl") if is_harmful(row["prompt_label"])}
    prompts = dict(sorted(prompts.items())[:args.limit or 600])           # ids are hashes: no matter which
    if not prompts:
        raise InputError(f"{args.out}/guarded.jsonl: no harmful prompts in it")
    sources = [read_source(folder, prompts) for folder in dict.fromkeys([args.out, *map(Path, args.sources)])]
    judge, threshold = run["guard"]["guard"], run["guard"]["identity"]["threshold"]
    judge_folder = guard_format(judge, student)[1]

    def load(name):
        return load_decoder(name, args.device, pick_dtype(args), args.quantize)
    model, tokenizer = load(student)
    n, most = args.n or 8, args.max_new_tokens or sampled["identity"]["max_new_tokens"]
    stage = Stage("theory", args, {
        "student": model.hash, "trained": trained and model_hash(find_model(trained)), "guard": [judge, model_hash(judge_folder)],
        "template": template_hash(tokenizer), "prompts": content_id(*prompts), "n": n, "seed": args.seed,
        "wording": STEER[steer], "max_new_tokens": most, "dtype": str(model.head.dtype)}, "theory.jsonl")
    writer = RowWriter(args.out / "theory.jsonl")
    rows = writer.rows
    for i, row in enumerate(rows, 1):
        check_trace(row, f"{writer.path}:{i}")
    done = {(*row_key(row), row["arm"]) for row in rows}

    def draw(model, arms):
        """Traces of each prompt for {arm: (wording, how many)}, appended to rows."""
        todo = [(arm, wording, row, k) for arm, (wording, times) in arms.items() for row in prompts.values() for k in range(times)
                if (row["id"], k, arm) not in done]
        ids = [encode_prompt(tokenizer, steered(row["instruction"], wording)) for _, wording, row, _ in todo]
        keys = [f"{row['id']}/{arm}/{k}" for arm, _, row, k in todo]
        found = Sampler(model, tokenizer, args.slots).generate(ids, most, *AS_IT_IS, seed=args.seed, keys=keys)
        with progress("; ".join(arms), len(todo), "trace") as advance:
            for c in found:
                arm, _, row, k = todo[c.index]
                rows.append({**row, "arm": arm, "k": k, "response": decode_response(tokenizer, c.tokens, model.eos_ids),
                             "finish_reason": c.finish_reason, "n_tokens": len(c.tokens), "tokens": c.tokens})
                writer.write(rows[-1])
                stage.spend(**sampling_cost(model, ids[c.index], c.tokens))
                advance(tokens=len(c.tokens))

    def score(rows, key, items, drawn=AS_IT_IS):
        for row, x in zip(rows, log_probs(model, items, drawn)):
            row[key] = x
    draw(model, {"plain": ("none", n), "told": (steer, n)})
    for key, wording in ("log_plain", "none"), ("log_told", steer):
        todo = [row for row in rows if row["arm"] in ("plain", "told") and key not in row]
        asked = [encode_prompt(tokenizer, steered(row["instruction"], wording)) for row in todo]
        score(todo, key, [{"ids": ids + row["tokens"], "n_prompt": len(ids)} for ids, row in zip(asked, todo)])
    perplexities = {}
    for source in sources:
        perplexities[str(source["folder"])] = {"before": perplexity(model, training_items(source["folder"], model, tokenizer))}
        score(source["rows"], "log_plain", [text_item(tokenizer, row["instruction"], row["response"]) for row in source["rows"]])
    for name in dict.fromkeys([student, *(source["model"] for source in sources)]):          # one model at a time
        its = tokenizer
        if name != student:
            model = None
            free_memory()
            model, its = load(name)
        for source in sources:
            if source["model"] == name:
                score(source["rows"], "log_source", [text_item(its, steered(row["instruction"], row["steer"]), row["response"])
                                                     for row in source["rows"]], source["drawn"])
    if trained:
        model = None
        free_memory()
        model, _ = load(trained)
        perplexities[str(args.out)]["after"] = perplexity(model, training_items(args.out, model, tokenizer))
        if model.head.dtype == torch.float32 and not args.quantize:
            merge_lora(model)                                             # faster; bf16 weights would be rounded by it
        draw(model, {"trained, plain": ("none", 1), "trained, told": (steer, 1)})
    model = None
    free_memory()

    opened, todo = opening(tokenizer), [row for row in rows if "p_unsafe" not in row]
    if todo:
        guard = load_guard(judge, args.device, pick_dtype(args), load(student) if judge == "self" else None, args.quantize)
        with progress(f"guard {judge}", len(todo), "trace") as advance:
            for few in split_packs(todo, lambda row: 1, 128):
                for row, verdict in zip(few, guard.judge([(row["instruction"], opened + row["response"]) for row in few])):
                    row["p_unsafe"] = verdict.p_unsafe
                advance(len(few))
        stage.spend(**guard.cost)
    in_tiny_world = is_tiny(student) and is_tiny(sampled["arguments"]["prompts"] or TINY)
    for row in rows:
        row["fault"] = fault_of(row["response"], row["finish_reason"], tokenizer)
        row["guard"] = not row["fault"] and row["p_unsafe"] is not None and row["p_unsafe"] < threshold
        if in_tiny_world:
            row["oracle"] = not row["fault"] and world.oracle(row["prompt_label"], row["response"]) == "safe"
    write_atomic(writer.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    report = {"student": student, "steer": steer, "prompts": len(prompts), "n": n,
              "by": {name: figures(rows, name) for name in ["oracle"] * in_tiny_world + ["guard"]},
              "decomposition": decompositions(rows, sources), "perplexity": perplexities,
              "epochs": perplexity_by_epoch(args.out) if train.get("finished") else [],
              "guard": of_the_guard(rows, sources, threshold) if in_tiny_world else None}
    write_atomic(args.out / "theory.json", json.dumps(report, indent=1))
    print(inert(table(report)))
    if train.get("finished"):
        again = second_round(args.out, run, str(trained), student)
        print(inert("a second round, from the trained student:\n  " + "\n  ".join(again)))
    stage.finish(f"measured the theory on {len(prompts)} prompts", args.out / "theory.json",
                 f"python eval.py --compare {args.out} --out FOLDER", rows=len(rows))
