"""
Write OUT/report.html, one page that holds all of a run: the figures, how it was made, every trace.

    python -m extras.report --out out                      # after any stage
    python -m extras.report --compare out/kl out/full      # the figures of other runs beside these

The page opens from disk and loads nothing. Traces are untrusted text. They travel as JSON in which
no tag can begin, gzipped. The page only ever sets them as text, and its Content-Security-Policy
lets no script run but the page's own. Hidden characters are shown, in prompts and responses as code
points, elsewhere as escapes. The page is extras/report.html; this file fills in its data.
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

from data.rows import (
    EVAL_KEYS, GUARDED_KEYS, METRIC_KEYS, TRACE_KEYS, content_id, read_rows, write_atomic)
from data.run_record import read_eval, read_run
from eval import wilson
from thinksafe import (
    LABELS, HelpFormatter, InputError, Parser, bounded, cli, escape_control_chars, trace_key)

PAGE = Path(__file__).with_suffix(".html")
MAX_CHARS = 200_000                 # of one text that the page shows
# These are the same in all traces of a prompt.
PROMPT_ROW_KEYS = ("id", "k", "set", "instruction", "prompt_label", "task", "answer")

def curves(rows, max_points=500):
    """Return rows of metrics.jsonl as {"every", "step": [...], "lines": {name: [...]}}.

    Each point is the mean of `every` steps."""
    every = math.ceil(len(rows) / max_points) or 1
    groups = [rows[i:i + every] for i in range(0, len(rows), every)]
    names = {}                                       # a dict keeps their order

    def is_number(value):
        return type(value) in (int, float) and abs(value) < 1e100      # a sum of them is finite
    for row in rows:
        names |= {key: None for key, value in row.items() if is_number(value) and key != "step"}

    def mean(group, name):
        values = [row[name] for row in group if is_number(row.get(name))]
        return float(f"{statistics.fmean(values):.5g}") if values else None
    return {"every": every,
            "step": [group[-1].get("step", i) for i, group in enumerate(groups, 1)],
            "lines": {name: [mean(group, name) for group in groups] for name in names}}

def histograms(groups):
    """Return {name: [lengths]} as {"width", "groups": {name: {"counts", "median", "n"}}}.

    All bins have one width; the last one has no upper end. None without any length."""
    lengths = sorted(n for group in groups.values() for n in group)
    if not lengths:
        return None
    top = lengths[int(0.995 * (len(lengths) - 1))]     # a few very long ones must not flatten all
    widths = [digit * 10**e for e in range(9) for digit in (1, 2, 5)]
    width = next(width for width in widths if width * 24 >= top)
    out = {}
    for name, group in groups.items():
        counts = Counter(min(n, top) // width for n in group)
        out[name] = {"counts": [counts[i] for i in range(top // width + 1)],
                     "median": statistics.median(group), "n": len(group)}
    return {"width": width, "groups": out}

def summary(traces, answers):
    """Return counts over all rows, also those that the page has no room for: acceptance, reasons
    for what was dropped, lengths."""
    labels, dropped, lengths = defaultdict(Counter), defaultdict(Counter), defaultdict(list)
    for row in traces:
        label, verdict = row["prompt_label"], row.get("response_label")
        kept = row.get("keep") is True
        labels[label].update(n=1, judged=verdict is not None, kept=kept)
        lengths[label].append(row["n_tokens"])
        if row.get("keep") is False:
            reason = row.get("reason") or (verdict if verdict != "safe" else "not_kept")
            dropped[reason][label] += 1
    shares = {}
    for label in filter(labels.get, LABELS):
        counts = labels[label]
        low, high = wilson(counts["kept"], counts["judged"])
        percent = 100 * counts["kept"] / counts["judged"] if counts["judged"] else None
        shares[label] = {**counts, "percent": percent, "low": low, "high": high}
    answer_lengths = defaultdict(list)
    for row in answers:
        solvable = row["set"] == "reasoning" and row.get("task")
        kind = f"reasoning {row['task']}" if solvable else row["set"]
        answer_lengths[f"{kind} {row['when']}"].append(row["n_tokens"])
    return {"labels": shares, "dropped": dropped, "lengths": histograms(lengths),
            "eval_lengths": histograms(answer_lengths)}

def clip(value):
    """Cut a text that is too long for the page, and say so."""
    if not isinstance(value, str) or len(value) <= MAX_CHARS:
        return value
    return f"{value[:MAX_CHARS]}\n[{len(value) - MAX_CHARS:,} more characters are in the file]"

def inert(value):
    """Return JSON data with hidden characters escaped in all of its texts, keys too."""
    if isinstance(value, dict):
        return {escape_control_chars(key): inert(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [inert(item) for item in value]
    return escape_control_chars(value) if isinstance(value, str) else value

def page_rows(rows, stage):
    """Return traces as rows of the page, one for each prompt and k: what is said of the prompt,
    then its traces (before, after). Of prompts and responses the page shows what is hidden."""
    out = {}
    for row in rows:
        texts = {key: clip(row[key]) for key in ("instruction", "response") if key in row}
        row = inert({key: clip(value) for key, value in row.items() if value is not None}) | texts
        prompt = {key: row.pop(key) for key in PROMPT_ROW_KEYS if key in row}
        page_row = out.setdefault(trace_key(prompt), {"stage": stage, **prompt, "traces": []})
        page_row["traces"].append(row)
    return list(out.values())

def has_changed(row):
    """Tell whether training changed the verdict on an evaluation prompt."""
    verdicts = [[trace.get(key) for key in ("unsafe", "refused", "solved")]
                for trace in row["traces"]]
    return any(verdict != verdicts[0] for verdict in verdicts)

def compress(rows, max_bytes):
    """Return as many rows as fit into max_bytes, as gzipped JSON in base64, and their number.

    First come those whose verdict changed, then the others, in an order that depends on nothing
    but their ids."""
    def rank(i):
        row = rows[i]
        return not has_changed(row), content_id(row["id"], str(row.get("k")))
    ranked = sorted(range(len(rows)), key=rank)
    while True:
        chosen = [rows[i] for i in sorted(ranked)]
        text = json.dumps(chosen, ensure_ascii=False, separators=(",", ":"))
        data = base64.b64encode(gzip.compress(text.encode("utf-8"), mtime=0)).decode()
        if len(data) <= max_bytes or not ranked:
            return data, len(ranked)
        del ranked[int(0.95 * len(ranked) * max_bytes / len(data)):]

def script_json(value):
    """Return JSON that is inert within <script>: nothing in it can open a tag, a comment or an
    entity, and all of it is ASCII."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace(">", r"\u003e").replace("&", r"\u0026")

def fill(page, **parts):
    """Return the page with each {{name}} replaced, once, and a policy that allows the page's own
    <script> and <style> by their hashes."""
    hashes = {}
    for tag in ("script", "style"):
        content = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    parts["policy"] = (f"default-src 'none'; script-src 'sha256-{hashes['script']}'; "
                       f"style-src 'sha256-{hashes['style']}'; base-uri 'none'; "
                       "form-action 'none'")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], page)

def write_report(out, compare=(), max_mb=4.8):
    """Write OUT/report.html from what is in OUT -> a line that says what is in the page.

    Args:
        compare: folders of other runs, of which eval.json is shown.
        max_mb: room for the traces, in megabytes of the page.

    Raises InputError for a file that is damaged or missing."""
    out, run = Path(out), read_run(out)
    samples, guarded, answers, metrics = (
        read_rows(out / f"{name}.jsonl", required, growing=True) for name, required in (
            ("samples", TRACE_KEYS), ("guarded", GUARDED_KEYS), ("eval", EVAL_KEYS),
            ("metrics", METRIC_KEYS)))
    if not (run or samples or guarded or answers or metrics):
        raise InputError(f"{out}: nothing to report there; run python sample.py --out {out} first")
    runs = []
    for folder in map(Path, (out, *compare)):
        figures = read_eval(folder)
        if figures:
            shown = {key: figures[key] for key in ("judge", "guard", "before", "after")}
            runs.append({"name": str(folder), **shown, "paper": figures.get("paper") or {}})
        elif folder != out:
            raise InputError(f"{folder}: no eval.json to compare with; run python eval.py "
                             f"--out {folder} first")
    judged = {trace_key(row): row for row in samples + guarded}    # a verdict replaces its sample
    traces = list(judged.values())
    rows = page_rows(traces, "train") + page_rows(answers, "eval")
    data, n = compress(rows, max_mb * 1e6)
    facts = {"name": str(out), "run": run, "runs": runs, "curves": curves(metrics),
             "measured": (out / "eval.json").exists(), "rows": len(rows), "shown": n,
             "files": {"samples.jsonl": len(samples), "guarded.jsonl": len(guarded),
                       "metrics.jsonl": len(metrics), "eval.jsonl": len(answers)},
             **summary(traces, answers)}
    try:
        page = fill(PAGE.read_text("utf-8"), data=script_json(inert(facts)),
                    traces=script_json(data))
    except ValueError:
        raise InputError(f"{out}/run.json: a number in it is not finite; the stage that wrote it "
                         "must be run again")
    write_atomic(out / "report.html", page)
    return f"{n:,} of {len(rows):,} rows in a page of {len(page) / 1e6:.2f} MB"

def main():
    p = Parser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("--out", type=Path, default=Path("out"), help="folder of the run")
    p.add_argument("--compare", type=Path, nargs="+", default=(), metavar="OUT",
                   help="folders of other runs to show beside it")
    p.add_argument("--max-mb", type=bounded(float, 0.01), default=4.8,
                   help="room for the traces in the page, in MB. What is too much is left out, and "
                   "the page says so; evaluation prompts whose verdict changed are the last to go")
    args = p.parse_args()
    line = write_report(args.out, args.compare, args.max_mb)
    print(escape_control_chars(f"{line}\n  -> {args.out}/report.html"))

if __name__ == "__main__":
    cli(main)
