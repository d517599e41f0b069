"""
Join the folders of shards into one folder, as a single process would have left it.

    for i in 1 2 3 4; do python sample.py --shard $i/4 --out out/shard-$i & done; wait
    python -m extras.merge out out/shard-*
    python guard.py --out out

Joined are the stages that the shards have run: sample.py --shard, guard.py after it, and
eval.py --shard, whose figures are computed from all rows. What OUT has of other stages stays.
"""
import json
from operator import itemgetter
from pathlib import Path

from data.kinds import shorten
from data.rows import (
    GUARDED_KEYS, JUDGED_EVAL_KEYS, TRACE_KEYS, VERDICT, content_id, read_rows, write_atomic,
    write_rows)
from data.run_record import lock_folder, read_eval, read_run
from eval import write_figures
from thinksafe import HelpFormatter, InputError, Parser, cli, escape_control_chars

# Of each stage: its files, the kind of their rows, and the keys that tell one row from another.
FILES = {"sample": {"samples.jsonl": (TRACE_KEYS, ("id", "k"))},
         "guard": {"verdicts.jsonl": (VERDICT, ("id", "guard", "k")),
                   "guarded.jsonl": (GUARDED_KEYS, ("id", "k"))},
         "eval": {"eval.jsonl": (JUDGED_EVAL_KEYS, ("id", "when", "k"))}}

def shards_in_order(runs, name):
    """Return the folders of the shards 1/N, 2/N, ... of a stage. runs: {folder: run record}.

    Raises InputError unless each of the N is there once, and all finished and ran alike."""
    numbers, first = {}, next(iter(runs))
    for folder, run in runs.items():
        sharded = "sample" if name == "guard" else name        # guard.py knows nothing of shards
        for needed in (sharded, name):
            if not run.get(needed, {}).get("finished"):
                raise InputError(f"{folder}: {needed}.py has not finished there; run it again")
        now, before = run[name]["fingerprint"], runs[first][name]["fingerprint"]
        for key in sorted({*now, *before} - {"shard", "samples"}):
            if now.get(key) != before.get(key):
                raise InputError(f"{folder}: {name}.py ran with {key} {shorten(now.get(key))}, in "
                                 f"{first} with {shorten(before.get(key))}; these are not shards "
                                 "of one run")
        shard = tuple(run[sharded]["fingerprint"].get("shard") or (1, 1))
        if len(shard) != 2:
            raise InputError(f"{folder}: run.json: a shard is [i, n], not {shorten(shard)}")
        if shard in numbers:
            raise InputError(f"{folder} and {numbers[shard]} both hold shard "
                             f"{shard[0]}/{shard[1]}; name one of them")
        numbers[shard] = folder
    n = max(n for _, n in numbers)
    if sorted(numbers) != [(i, n) for i in range(1, len(numbers) + 1)] or n != len(numbers):
        found = ", ".join(f"{i}/{n}" for i, n in sorted(numbers))
        raise InputError(f"{name}.py: there are the shards {found}; it needs 1/{n} to {n}/{n}")
    return [numbers[shard] for shard in sorted(numbers)]

def joined_rows(folders, path, kind, keys):
    """Return the rows of all shards that `path` is to hold, sorted. kind, keys: see FILES.

    Raises InputError for a row that is there twice, and for a row of `path` that no shard has."""
    rows, folder_of, key_of = {}, {}, itemgetter(*keys)
    for folder in folders:
        for row in read_rows(folder / path.name, kind):
            key = key_of(row)
            if key in rows:
                raise InputError(f"{folder / path.name}: id {row['id']}, k {row['k']} is there "
                                 f"twice, the first time in {folder_of[key] / path.name}")
            rows[key], folder_of[key] = row, folder
    for row in read_rows(path, kind, growing=True):
        if rows.get(key_of(row)) != row:
            raise InputError(f"{path} has other rows: id {row['id']}, k {row['k']} is not from "
                             "these shards; move the file away, or use another OUT")
    return [rows[key] for key in sorted(rows)]

def check_pairs(rows, folders):
    """Raise InputError unless each sample of eval.py is there before and after training, of one set
    and task."""
    kinds = {(row["id"], row["k"], row["when"]): (row["set"], row.get("task")) for row in rows}
    for (prompt, k, _), kind in kinds.items():
        both = {kinds.get((prompt, k, when)) for when in ("before", "after")}
        if both != {kind} or kind == ("reasoning", None):
            raise InputError(f"{folders[0].parent}/*/eval.jsonl: id {prompt}, k {k} is not there "
                             "before and after training, of one set and task; run eval.py again")

def added(values):
    """Return the sum of numbers, also by key in dictionaries, and of other values the first."""
    if all(isinstance(value, dict) for value in values):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: added([value[key] for value in values if key in value]) for key in keys}
    numbers = all(type(value) in (int, float) and abs(value) < 1e100 for value in values)
    return round(sum(values), 2) if numbers else values[0]

def merge(name, out, runs, folders):
    """Join the shards of a stage: the rows, the figures of eval.py, and the entry in run.json."""
    entries = [runs[folder][name] for folder in folders]
    files = {out / file: joined_rows(folders, out / file, *how)
             for file, how in FILES[name].items()}
    entry = {**added(entries), "started": min(entry["started"] for entry in entries)}
    entry["peak_gb"] = max(entry.get("peak_gb", 0) for entry in entries)
    for key in ("arguments", "fingerprint"):
        entry[key] = dict(entries[0][key])
        if "shard" in entry[key]:
            entry[key]["shard"] = None
    entry["arguments"]["out"] = str(out)
    n_rows = len(next(iter(files.values())))
    if name != "guard" and entry.get("rows", n_rows) != n_rows:
        raise InputError(f"{out}: the shards of {name}.py hold {n_rows} rows, and say that they "
                         f"made {entry['rows']}; run it again in each")
    if name == "eval":
        check_pairs(files[out / "eval.jsonl"], folders)
    reports = [read_eval(folder) for folder in folders if name == "eval"]
    if None in reports:
        raise InputError(f"{folders[reports.index(None)]}: no eval.json there; run eval.py again")
    if len({(report["judge"], report["guard"]) for report in reports}) > 1:
        raise InputError("the shards of eval.py were judged by different judges; run them with the "
                         "same --judge")
    for path, rows in files.items():
        write_rows(path, rows)
        print(escape_control_chars(f"{name}: {len(rows)} rows of {len(folders)} shards -> {path}"))
    if name == "guard":                                # as guard.py says which traces it judged
        n = runs[folders[0]]["sample"]["fingerprint"]["n"]
        traces = [row for row in read_rows(out / "samples.jsonl") if row["k"] < n]
        entry["fingerprint"]["samples"] = content_id(json.dumps(traces))
    if name == "eval":
        entry |= write_figures(out, rows, reports[0]["judge"], reports[0]["guard"],
                               reports[0].get("prompts", {}), entries[0]["models"]["before"])
    write_atomic(out / "run.json", json.dumps({**read_run(out), name: entry}, indent=1))

def main():
    p = Parser(description=__doc__, formatter_class=HelpFormatter)
    p.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    p.add_argument("shards", type=Path, nargs="+", metavar="SHARD", help="their folders")
    args = p.parse_args()
    runs = {folder: read_run(folder) for folder in args.shards}
    names = [name for name in FILES if any(name in run for run in runs.values())]
    if not names:
        raise InputError(f"{args.shards[0]}: no run record of sample.py, guard.py or eval.py there")
    folders = {name: shards_in_order(runs, name) for name in names}    # before anything is written
    lock = lock_folder(args.out)
    for name in names:
        merge(name, args.out, runs, folders[name])
    lock.release()
    print(json.dumps({"joined": names, "shards": len(runs), "out": str(args.out)}))

if __name__ == "__main__":
    cli(main)
