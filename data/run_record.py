"""
Run records: out/run.json says how each stage was run and what it produced.

    stage = Stage("guard", args, "verdicts.jsonl", {"guard": model_hash, ...}, guard="tiny")
    ...
    stage.finish("judged 1200 traces", path, "python train.py", rows=1200)
"""
import contextlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from data.kinds import COUNT, POSITIVE, Number, find_fault, parse_json, shorten
from data.rows import METRIC_KEYS, refuse_link, remove_leftovers, write_atomic
from thinksafe import (
    LABELS, REFUSAL_INSTRUCTIONS, ROOT, InputError, escape_control_chars, read_regular)

# --------------------------------------------------------------------------------------------------
# What run.json, eval.json and theory.json hold, as kinds (data/kinds.py), and their readers. Of
# run.json's keys those are here that somebody reads; who misses one gets an error from Record.

SEED, POINTS = range(2**31 + 1), Number(-1000, 1000)
PERPLEXITY = (None, {**dict.fromkeys(("perplexity", "low", "high"), Number(0, 1e30)),
                     "rows": COUNT})
ENTRY = {"seconds": Number(0, 1e12), "finished": bool, "started?": Number(0, 1e12),
         "arguments?": {}, "fingerprint?": {}, "rows?": COUNT, "cost?": {str: Number(0)}}
SAMPLED = {"n?": POSITIVE, "seed?": SEED, "steer?": str,
           "temperature?": Number(0, 100), "top_p?": Number(0, 1), "top_k?": COUNT,
           "max_new_tokens?": POSITIVE, "kv_bits?": (8, 16), "shard?": (None, [POSITIVE])}
TRAINED = {"seed?": SEED, "full?": bool, "lora_r?": POSITIVE, "lora_targets?": str,
           "epochs?": POSITIVE, "batch_size?": POSITIVE, "max_length?": POSITIVE,
           "rollouts?": POSITIVE, "online?": (None, str)}
TEXT = (None, str)                      # or none
RUN = {
    "sample?": {**ENTRY, "model?": str, "fingerprint?": SAMPLED, "sources?": {}, "arguments?": {
        "prompts?": TEXT, "label?": (None, *LABELS), "limit?": (None, POSITIVE), "steer?": str}},
    "guard?": {**ENTRY, "guard?": str, "guards?": [str], "kept?": {str: COUNT},
               "fingerprint?": {"threshold?": Number(0, 1), "keep?": str}},
    "train?": {**ENTRY, "model?": str, "steps?": COUNT, "labels?": {str: COUNT},
               "skipped?": {str: COUNT}, "fingerprint?": TRAINED, "arguments?": {
                   "data?": TEXT, "label?": (None, *LABELS), "teacher?": TEXT, "guard?": TEXT,
                   "strip_cot?": (None, "harmful", "all")},
               "perplexity?": {"before": PERPLEXITY, "after": PERPLEXITY}},
    "theory?": ENTRY,
    "eval?": {**ENTRY, "models?": {"before": str, "after": str}, "arguments?": {"before?": TEXT},
              "fingerprint?": {"seed?": SEED, "shard?": (None, [POSITIVE])}}}
FIGURES = {str: {"percent": (None, POINTS), "low": (None, POINTS), "high": (None, POINTS),
                 **dict.fromkeys(("n?", "unknown?", "problems?"), (None, COUNT))}}
EVAL = {"judge": str, "guard": str, "before": FIGURES, "after": FIGURES, "prompts?": {},
        "paper?": (None, {"before?": {str: POINTS}, "after?": {str: POINTS}}),
        "perplexity?": (None, {"before": PERPLEXITY})}
SEEN = {"percent": POINTS, "low": POINTS, "high": POINTS}
THEORY = {"by": {str: {"tilt": {"omega": Number(0, 1e30)}, "calibration": {"bins": [{
    "accepted": COUNT, "of": POSITIVE, "prompts": POSITIVE, "predicted": POINTS, "seen": SEEN}]}}}}

class Record(dict):
    """An object of run.json, which people may have edited since it was written."""

    def __missing__(self, key):
        raise InputError(f"run.json: no {key!r} in the record of an earlier stage; run that stage "
                         "again, or use another --out")

def read_object(path, kind, make_object=dict):
    """Return the object in a JSON file, None without that file. Raises InputError that says where
    it is not of the kind."""
    try:
        if not os.path.lexists(path):
            return None
        found = parse_json(read_regular(path), make_object)
        fault = find_fault(found, kind)
    except (ValueError, OSError) as e:
        fault = getattr(e, "strerror", None) or e
    if fault:
        raise InputError(f"{path}: not what a stage writes ({shorten(fault)}); run that stage "
                         "again, or move the file away")
    return found

def _with_todays_names(pairs):
    record = Record(pairs)
    if any(isinstance(value, str) and "\0" in value for value in record.values()):
        raise ValueError("a NUL character, which no name has")
    for new, old in (("fingerprint", "identity"), ("skipped", "left_out")):
        if old in record:                            # the names of earlier versions
            record[new] = record.pop(old)
    return record

def read_run(out):
    """Return out/run.json as {stage: entry}, {} if there is none. Raises InputError for a record
    that is damaged or holds values of the wrong type."""
    return read_object(Path(out) / "run.json", RUN, _with_todays_names) or {}

def read_eval(out):
    """Return out/eval.json, the figures of eval.py, None if there is none. Raises InputError."""
    return read_object(Path(out) / "eval.json", EVAL)

def stage_seed(args, run):
    """Return the seed of a later stage: the flag --seed, else the seed of sample.py."""
    earlier = run.get("sample", {}).get("fingerprint", {}).get("seed", 0)
    return earlier if args.seed is None else args.seed

def steer_of(sampled):
    """Return the name of the refusal instruction in the record of sample.py. Raises InputError for
    one that thinksafe.py does not have."""
    steer = sampled["fingerprint"]["steer"]
    if steer not in REFUSAL_INSTRUCTIONS:
        raise InputError(f"run.json: thinksafe.py has no refusal instruction {shorten(steer)}, but "
                         + ", ".join(REFUSAL_INSTRUCTIONS))
    return steer

def _git(*words):
    """Return what git says of this checkout, None if there is no git or none that answers."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True,
                              timeout=10).stdout.strip()

def check_fingerprint(path, old, new):
    """Raise InputError unless the output `path` was made with the same fingerprint."""
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if before != now:
            raise InputError(f"{path} was made with {key} {shorten(before)}, now it is "
                             f"{shorten(now)}; use another --out, or delete {path} to start again")

def check_checkpoint(state, trainable, optimizer):
    """Raise unless training can go on from checkpoint.pt: its metrics are those of steps 1, 2, ...,
    each tensor is one of ours and finite, and the optimizer is ours, whatever its learning rate."""
    metrics, params, saved = (state[key] for key in ("metrics", "params", "optimizer"))
    fault = find_fault(metrics, [{**METRIC_KEYS, "loss": Number()}])
    if fault or [row["step"] for row in metrics] != [*range(1, len(metrics) + 1)] or not metrics:
        raise ValueError(f"metrics: {fault or 'not those of steps 1, 2, ...'}")
    parse_json(json.dumps(metrics).encode())         # what is written must be read again
    own = optimizer.state_dict()["param_groups"]
    for x, group in zip(saved["param_groups"], own):     # changes the speed alone
        x |= {"fused": group["fused"]} if "fused" in group else {}
    if [{**group, "lr": 0} for group in own] != [{**x, "lr": 0} for x in saved["param_groups"]]:
        raise ValueError("optimizer: of other parameters, or with other settings")
    kinds = [{name: (value.shape, value.dtype) for name, value in tensors.items()}
             for tensors in (params, trainable)]
    if kinds[0] != kinds[1] or not all(value.isfinite().all() for value in params.values()):
        raise ValueError("params: of another model, or not finite")
    if isinstance(optimizer, torch.optim.AdamW):     # in 8 bits the moments have other shapes
        shapes = [value.shape for value in trainable.values()]
        if not saved["state"]:
            raise ValueError("optimizer: no moments")
        for i, moments in saved["state"].items():    # some have none: SafeKey's heads begin later
            kinds = {key: (value.shape, value.dtype) for key, value in moments.items()}
            if i < 0 or kinds != {key: (shape, torch.float32) for key, shape in (
                    ("step", ()), ("exp_avg", shapes[i]), ("exp_avg_sq", shapes[i]))}:
                raise ValueError("optimizer: moments of another model")
            if not (all(value.isfinite().all() for value in moments.values())
                    and 1 <= moments["step"] <= len(metrics)
                    and (moments["exp_avg_sq"] >= 0).all()):
                raise ValueError("optimizer: moments that are none")

# What is written into a run's folder by a process that holds the folder's lock.
LOCKED_FILES = ("run.json", "samples.jsonl", "verdicts.jsonl", "guarded.jsonl", "metrics.jsonl",
                "checkpoint.pt", "model", "eval.jsonl", "eval.json", "theory.jsonl", "theory.json")

def lock_folder(out):
    """Make a run's folder and lock it for this process -> FileLock. What killed processes left
    there is removed. Raises InputError if another process is at work there."""
    out.mkdir(parents=True, exist_ok=True)
    refuse_link(out / ".lock")
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{out}: another process is at work there; wait for it, or use another "
                         "--out")
    remove_leftovers(out, LOCKED_FILES, age=0)
    return lock

def peak_gb(device):
    """Return the largest memory that torch has taken of a GPU, else that of this process, in GB."""
    if device == "cuda":
        return round(torch.cuda.max_memory_reserved() / 1e9, 2)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)    # a Mac counts bytes

class Stage:
    """One stage's entry in out/run.json: how the stage was run and what it produced.

    args: the flags, of which `out` and `device` are read. output: the file that the stage appends
    to. fingerprint: everything the output depends on (model hash, prompts, seed, options). facts:
    extra values that later stages read. If the folder already holds output with another
    fingerprint, __init__ raises InputError and the output stays. A lock file allows one process
    per folder. `seconds` adds up over resumed runs, up to the last row."""

    def __init__(self, name, args, output, fingerprint, **facts):
        self.name, self.out, self.path = name, args.out, args.out / output
        self.lock = lock_folder(self.out)
        refuse_link(self.path)
        fingerprint = json.loads(json.dumps(fingerprint))
        self.started, self.earlier_seconds = time.time(), 0.0
        if self.path.exists():
            old = read_run(self.out).get(name)
            if not old:
                raise InputError(f"{self.path} exists, but {self.out}/run.json does not say how it "
                                 "was made; use another --out or move it away")
            check_fingerprint(self.path, old["fingerprint"], fingerprint)
            killed_after = self.path.stat().st_mtime - old.get("started", math.inf)
            self.earlier_seconds = old["seconds"] + max(0, killed_after) * (not old["finished"])
        self.entry = {
            "arguments": json.loads(json.dumps(vars(args), default=str)),
            "fingerprint": fingerprint, "commit": _git("rev-parse", "HEAD"),
            "dirty": bool(_git("status", "--porcelain", "-uno")),
            "versions": {"python": platform.python_version(), "torch": version("torch"),
                         "transformers": version("transformers")},
            "device": (torch.cuda.get_device_name() if args.device == "cuda"
                       else platform.machine()),
            "started": self.started, "finished": False, "seconds": self.earlier_seconds, **facts}
        self._write()

    def _write(self):
        run = {**read_run(self.out), self.name: self.entry}
        write_atomic(self.out / "run.json", json.dumps(run, indent=1))

    def save(self, **facts):
        """Record more facts."""
        now = time.time()
        self.earlier_seconds += now - self.started
        self.started = now
        self.entry.update(facts, seconds=round(self.earlier_seconds, 2), started=now)
        self._write()

    def finish(self, summary, where, next_command, **counts):
        """Record counts and end the stage: print the summary, the output and one JSON line."""
        self.save(finished=True, peak_gb=peak_gb(self.entry["arguments"]["device"]), **counts)
        self.lock.release()
        print(escape_control_chars(f"{summary}\n  -> {where}\nnext: {next_command}"))
        line = {"stage": self.name, "seconds": self.entry["seconds"],
                "peak_gb": self.entry["peak_gb"], **counts}
        print(json.dumps(line), flush=True)
