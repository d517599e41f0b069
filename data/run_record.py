"""
Run records: out/run.json says how each stage was run and what it produced.

    stage = Stage("guard", args, "verdicts.jsonl", {"guard": model_hash, ...}, guard="tiny")
    ...
    stage.finish("judged 1200 traces", path, "python train.py", rows=1200)
"""
import contextlib
import json
import math
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from data.rows import write_atomic
from thinksafe import ROOT, InputError, escape_control_chars

class Record(dict):
    """An object of run.json, which people may have edited since it was written."""

    def __missing__(self, key):
        raise InputError(f"run.json: no {key!r} in the record of an earlier stage; run that stage "
                         "again, or use another --out")

RECORD_TYPES = {"arguments": dict, "fingerprint": dict, "labels": dict, "skipped": dict,
                "model": str, "guard": str, "guards": list, "seconds": int | float,
                "finished": bool, "rows": int, "steps": int, "seed": int, "n": int, "steer": str}

def read_run(out):
    """Return out/run.json as {stage: entry}, {} if there is none. Raises InputError for a record
    that is damaged or holds values of the wrong type."""
    path = Path(out) / "run.json"
    try:
        run = json.loads(path.read_text("utf-8"), object_hook=Record) if path.exists() else {}
        for entry in run.values():
            for new, old in (("fingerprint", "identity"), ("skipped", "left_out")):
                if old in entry:                     # the names of earlier versions
                    entry[new] = entry.pop(old)
            used = {key: entry["fingerprint"][key] for key in ("seed", "n", "steer")
                    if key in entry["fingerprint"]}
            wrong = [key for key, value in [*entry.items(), *used.items()]
                     if key in RECORD_TYPES and not isinstance(value, RECORD_TYPES[key])]
            if wrong or not {"seconds", "finished"} <= entry.keys():
                raise ValueError
        return run
    except (ValueError, OSError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{path}: not a readable run record; move it away or use another --out")

def stage_seed(args, run):
    """Return the seed of a later stage: the flag --seed, else the seed of sample.py."""
    earlier = run.get("sample", {}).get("fingerprint", {}).get("seed", 0)
    return earlier if args.seed is None else args.seed

def _git(*words):
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True,
                              timeout=10).stdout.strip()

def check_fingerprint(path, old, new):
    """Raise InputError unless the output `path` was made with the same fingerprint."""
    for key in sorted(old.keys() | new.keys()):
        before, now = old.get(key), new.get(key)
        if before != now:
            raise InputError(f"{path} was made with {key} {before}, now it is {now}; use another "
                             f"--out, or delete {path} to start again")

class Stage:
    """One stage's entry in out/run.json: how the stage was run and what it produced.

    output: the file that the stage appends to. fingerprint: everything the output depends on (model
    hash, prompts, seed, options). facts: extra values that later stages read. If the folder already
    holds output with another fingerprint, __init__ raises InputError and changes nothing. A lock
    file allows one process per folder. `seconds` adds up over resumed runs, up to the last row."""

    def __init__(self, name, args, output, fingerprint, **facts):
        self.name, self.out, self.path = name, args.out, args.out / output
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.out / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{self.out}: another process is at work there; wait for it, or use "
                             "another --out")
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
        seconds = round(self.earlier_seconds + time.time() - self.started, 2)
        self.entry.update(facts, seconds=seconds)
        self._write()

    def finish(self, summary, where, next_command, **counts):
        """Record counts and end the stage: print the summary, the output and one JSON line."""
        self.save(finished=True, **counts)
        self.lock.release()
        print(escape_control_chars(f"{summary}\n  -> {where}\nnext: {next_command}"))
        line = {"stage": self.name, "seconds": self.entry["seconds"], **counts}
        print(json.dumps(line), flush=True)
