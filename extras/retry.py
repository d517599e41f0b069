"""
One more trace, again and again, for each prompt of which guard.py kept none.

    python sample.py && python guard.py
    python -m extras.retry && python guard.py        # up to three times, or --n N in one go each

Each call adds one trace to OUT/samples.jsonl for every prompt without a kept trace, sampled as
sample.py did. Run guard.py after each call. Prompts that are seldom answered safely weigh more by
this, and of their kept traces more are the guard's mistakes.
"""
from collections import Counter

from data.rows import TRACE_KEYS, RowWriter, read_rows
from data.run_record import Stage, read_run, steer_of
from data.sources import owns, prompt_rows
from sample import sample_traces
from thinksafe import (
    TINY, InputError, choose_dtype, cli, is_harmful, load_model, make_parser, positive, progress)

def prompts_to_retry(prompts, rows, guarded, max_traces):
    """Return [(prompt, number of its traces), ...] of the prompts of which no trace was kept.

    Left out are prompts with max_traces traces, and those whose last trace is not judged yet: the
    same call again adds nothing. rows: of samples.jsonl. guarded: of guarded.jsonl."""
    traces = Counter(row["id"] for row in rows)
    judged = Counter(row["id"] for row in guarded)
    kept = {row["id"] for row in guarded if row["keep"]}
    return [(row, traces[row["id"]]) for row in prompts if row["id"] not in kept
            and judged[row["id"]] == traces[row["id"]] < max_traces]

def main():
    p = make_parser(__doc__)
    g = p.add_argument_group("retries")
    g.add_argument("--n", type=positive, default=3, help="traces more than sample.py made of a "
                   "prompt, at most")
    g.add_argument("--slots", type=positive, default=256, help="sequences decoded at a time")
    args = p.parse_args()
    run = read_run(args.out)
    judged = run.get("guard", {})
    if not (judged.get("finished") and judged["fingerprint"]["keep"] == "safe"):
        raise InputError(f"{args.out}: retries go by what guard.py kept; run it first, with "
                         "--keep safe")
    sampled = run["sample"]
    how, given = sampled["fingerprint"], sampled["arguments"]
    model, tokenizer = load_model(sampled["model"], args.device, choose_dtype(args), args.quantize)
    stage = Stage("sample", args, "samples.jsonl", {
        **how, "model": model.hash, "dtype": str(model.head.dtype)}, model=sampled["model"],
        sources=sampled.get("sources"))
    stage.save(arguments={**given, "retries": args.n})      # later stages read sample.py's flags
    prompts = prompt_rows(given["prompts"] or TINY / "prompts.jsonl", given["label"],
                          given.get("prompt_column"))
    prompts = [row for row in prompts[:given["limit"]] if owns(how.get("shard"), row["id"])]
    writer = RowWriter(stage.path, TRACE_KEYS)
    guarded = read_rows(args.out / "guarded.jsonl", {"id": str, "keep": bool})
    todo = []
    for row, k in prompts_to_retry(prompts, writer.rows, guarded, how["n"] + args.n):
        steer = steer_of(sampled) if is_harmful(row["prompt_label"]) else "none"
        todo.append({**row, "k": k, "seed": how["seed"], "steer": steer})
    options = {key: how[key] for key in ("temperature", "top_p", "top_k", "max_new_tokens")}
    rows = writer.rows
    with progress("retry", len(todo), "trace") as advance:
        for trace in sample_traces(model, tokenizer, todo, args.slots, how.get("kv_bits", 16),
                                   seed=how["seed"], **options):
            writer.write(trace)
            rows.append(trace)
            advance(tokens=trace["n_tokens"])
    stage.finish(f"sampled {len(todo)} more traces, {len(rows)} in all", stage.path,
                 f"python guard.py --out {args.out}", rows=len(rows),
                 tokens=sum(row["n_tokens"] for row in rows), retried=len(todo))

if __name__ == "__main__":
    cli(main)
