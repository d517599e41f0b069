"""
out/report.html: one page that holds all of a run - the figures, how it was made, every trace. It opens from disk, loads nothing.

    python report.py                             # after any stage; eval.py does it at its end
    python report.py --compare out/kl out/full   # the figures of other runs beside this one's

Traces are untrusted text. They travel as JSON in which no tag can begin, gzipped; the page only ever sets them as text,
and its Content-Security-Policy lets no script run but its own. The page itself is report.html; this file fills in its data.
"""
import base64
import gzip
import hashlib
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path

from thinksafe import (
    LABELS,
    ROOT,
    HelpFormatter,
    InputError,
    Parser,
    check_trace,
    cli,
    content_id,
    inert,
    number,
    read_run,
    read_shards,
    read_whole_lines,
    row_key,
    wilson,
    write_atomic,
)

LONGEST = 200_000                                                       # characters of one text that the page shows
OF_PROMPT = ("id", "k", "set", "instruction", "prompt_label", "task", "answer")       # the same in all traces of a prompt


def read_traces(path, **kinds):
    """Rows of samples.jsonl, guarded.jsonl or eval.jsonl. kinds: what further keys must hold, else InputError with the row."""
    def check(row, where):
        check_trace({"k": 0, **row}, where)
        wrong = [key for key, kind in {**kinds, "p_unsafe": float | int | None}.items() if not isinstance(row.get(key), kind)]
        if wrong or row.get("when") not in (None, "before", "after"):
            raise InputError(f"{where}: {(wrong or ['when'])[0]} is not what a stage writes; mend or delete that line")
    return read_shards(path, check)


def read_figures(out):
    """OUT/eval.json -> {"judge", "guard", "before": {figure: {percent, low, high, ...}}, "after": likewise,
    "paper": {when: {figure: percent}}}; None when it is not there yet."""
    path = out / "eval.json"
    try:
        found = json.loads(path.read_text("utf-8"))
        figures = {when: {name: {key: of.get(key) for key in ("percent", "low", "high", "n", "unknown", "problems")}
                          for name, of in found[when].items()} for when in ("before", "after")}
        paper = {when: dict(of) for when, of in (found.get("paper") or {}).items()}
        values = [v for when in figures.values() for of in when.values() for v in of.values()]
        values += [v for of in paper.values() for v in of.values()]
        if not all(v is None or type(v) in (int, float) and math.isfinite(v) for v in values):
            raise ValueError
        return {"judge": str(found.get("judge")), "guard": str(found.get("guard")), **figures, "paper": paper}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"{path}: not figures of eval.py; run eval.py again")


def curves(rows, most=500):
    """Rows of metrics.jsonl -> {"step": [...], name: [...]} of at most so many points, each the mean of `every` steps."""
    every = -(-len(rows) // most) or 1
    groups = [rows[i:i + every] for i in range(0, len(rows), every)]
    names = dict.fromkeys(key for row in rows for key, v in row.items() if type(v) in (int, float) and key != "step")

    def mean(group, name):
        found = [row[name] for row in group if type(row.get(name)) in (int, float)]
        return float(f"{statistics.fmean(found):.5g}") if found else None
    return {"every": every, "step": [group[-1].get("step", i) for i, group in enumerate(groups, 1)],
            "lines": {name: [mean(group, name) for group in groups] for name in names}}


def histograms(groups):
    """{name: [lengths]} -> {"width", "groups": {name: {"counts", "median", "n"}}}: bins of one width, the last without end."""
    lengths = sorted(n for group in groups.values() for n in group)
    if not lengths:
        return None
    top = lengths[int(0.995 * (len(lengths) - 1))]                      # a few very long ones must not flatten the rest
    width = next(w for e in range(9) for w in (10**e, 2 * 10**e, 5 * 10**e) if w * 24 >= top)
    out = {}
    for name, group in groups.items():
        counts = Counter(min(n, top) // width for n in group)
        out[name] = {"counts": [counts[i] for i in range(top // width + 1)], "median": statistics.median(group), "n": len(group)}
    return {"width": width, "groups": out}


def summary(traces, answers):
    """Counts over all rows, also those that the page has no room for: acceptance, reasons of what was dropped, lengths."""
    labels, dropped, lengths = defaultdict(Counter), defaultdict(Counter), defaultdict(list)
    for row in traces:
        label = row["prompt_label"]
        labels[label].update(n=1, judged="response_label" in row, kept=row.get("keep") is True)
        lengths[label].append(row["n_tokens"])
        if row.get("keep") is False:
            verdict = row.get("response_label")
            dropped[row.get("reason") or (verdict if verdict != "safe" else "not_kept")][label] += 1
    kept = {}
    for label in filter(labels.get, LABELS):
        of = labels[label]
        low, high = wilson(of["kept"], of["judged"])
        kept[label] = {**of, "percent": 100 * of["kept"] / of["judged"] if of["judged"] else None, "low": low, "high": high}
    asked = defaultdict(list)
    for row in answers:
        kind = f"reasoning {row['task']}" if row["set"] == "reasoning" and row.get("task") else row["set"]
        asked[f"{kind} {row['when']}"].append(row["n_tokens"])
    return {"labels": kept, "dropped": dropped, "lengths": histograms(lengths), "eval_lengths": histograms(asked)}


def shown(rows, stage):
    """Traces -> one row of the page for each prompt and k: what is said of the prompt once, then its traces (before, after)."""
    def clip(value):
        cut = isinstance(value, str) and len(value) > LONGEST
        return value[:LONGEST] + f"\n[{len(value) - LONGEST:,} more characters are in the file]" if cut else value
    out = {}
    for row in rows:
        row = {key: clip(value) for key, value in row.items() if value is not None}
        prompt = {key: row.pop(key) for key in OF_PROMPT if key in row}
        out.setdefault(row_key(prompt), {"stage": stage, **prompt, "traces": []})["traces"].append(row)
    return list(out.values())


def changed(row):
    """Whether training changed the verdict on an evaluation prompt."""
    verdicts = [[trace.get(key) for key in ("unsafe", "refused", "solved")] for trace in row["traces"]]
    return any(verdict != verdicts[0] for verdict in verdicts)


def packed(rows, most):
    """-> (JSON of the rows, gzipped, in base64; how many rows it has): as many as fit into `most` bytes.

    First those whose verdict changed, then any, in an order that depends on nothing but their ids."""
    ranked = sorted(range(len(rows)), key=lambda i: (not changed(rows[i]), content_id(rows[i]["id"], str(rows[i].get("k")))))
    while True:
        text = json.dumps([rows[i] for i in sorted(ranked)], ensure_ascii=False, separators=(",", ":"))
        data = base64.b64encode(gzip.compress(text.encode("utf-8"), mtime=0)).decode()
        if len(data) <= most or not ranked:
            return data, len(ranked)
        del ranked[int(0.95 * len(ranked) * most / len(data)):]


def script_json(value):
    """JSON that is inert within <script>: nothing in it can open a tag, a comment or an entity, and all of it is ASCII."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")


def fill(page, **parts):
    """The page with each {{name}} replaced, once, and a policy that allows its own <script> and <style> by their hashes."""
    def source(tag):
        return base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1].encode()).digest()).decode()
    parts["policy"] = (f"default-src 'none'; script-src 'sha256-{source('script')}'; style-src 'sha256-{source('style')}'; "
                       "base-uri 'none'; form-action 'none'")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], page)


def write_report(out, compare=(), max_mb=4.8):
    """Write OUT/report.html from what is in OUT -> a line that says what is in it. Raises InputError for a file that is damaged.

    compare: folders of other runs, of which eval.json is shown. max_mb: room for the traces, in megabytes of the page."""
    out, run = Path(out), read_run(out)
    samples = read_traces(out / "samples.jsonl")
    guarded = read_traces(out / "guarded.jsonl", response_label=str, reason=str | None)
    answers = read_traces(out / "eval.jsonl", set=str, when=str)
    metrics = read_whole_lines(out / "metrics.jsonl")
    if not (run or samples or guarded or answers or metrics):
        raise InputError(f"{out}: nothing to report there; run python sample.py --out {out} first")
    traces = list({row_key(row): row for row in samples + guarded}.values())       # a verdict replaces its sample
    runs = [{"name": str(folder), **figures} for folder in (out, *compare) if (figures := read_figures(Path(folder)))]
    missing = [str(folder) for folder in compare if not (Path(folder) / "eval.json").exists()]
    if missing:
        raise InputError(f"{missing[0]}: no eval.json to compare with; run python eval.py --out {missing[0]} first")
    rows = shown(traces, "train") + shown(answers, "eval")
    data, n = packed(rows, max_mb * 1e6)
    facts = {"name": str(out), "run": run, "runs": runs, "measured": (out / "eval.json").exists(), "curves": curves(metrics),
             "rows": len(rows), "shown": n, "files": {"samples.jsonl": len(samples), "guarded.jsonl": len(guarded),
                                                      "metrics.jsonl": len(metrics), "eval.jsonl": len(answers)},
             **summary(traces, answers)}
    try:
        page = fill((ROOT / "report.html").read_text("utf-8"), data=script_json(facts), traces=script_json(data))
    except ValueError:
        raise InputError(f"{out}/run.json: a number in it is not finite; the stage that wrote it must be run again")
    write_atomic(out / "report.html", page)
    return f"{n:,} of {len(rows):,} rows in a page of {len(page) / 1e6:.2f} MB"


def main():
    p = Parser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--out", type=Path, default=Path("out"), help="folder of the run")
    p.add_argument("--compare", type=Path, nargs="+", default=(), metavar="OUT", help="folders of other runs to show beside it")
    p.add_argument("--max-mb", type=number(float, 0.01), default=4.8, help="room for the traces in the page, in MB. What is too "
                   "much is left out, and the page says so; evaluation prompts whose verdict changed are the last to go")
    args = p.parse_args()
    print(inert(write_report(args.out, args.compare, args.max_mb) + f"\n  -> {args.out}/report.html"))


if __name__ == "__main__":
    cli(main)
