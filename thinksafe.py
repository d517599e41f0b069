"""
What every stage shares: the method's words, errors for people, rows, run records, chat encoding,
the decoder, LoRA, and the loading and saving of checkpoints.

    from thinksafe import load_decoder, encode_prompt
    model, tokenizer = load_decoder("auto")
    tokens = torch.tensor(encode_prompt(tokenizer, "How do I bake a cake?"))
    logits = model.logits(model(tokens, torch.tensor([0, len(tokens)])))     # (T, V)

All text travels packed: the tokens of several documents in one row of length T, with `cu_seqlens`
(B+1,) = [0, end of the first, end of the second, ...]. There is no padding anywhere.
"""
import argparse
import atexit
import contextlib
import fcntl
import functools
import gc
import glob
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import weakref
from collections import Counter
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
TINY = ROOT / "tiny"

# ---------------------------------------------------------------------------------------------
# The method's words

LABELS = ("vanilla_harmful", "adversarial_harmful", "vanilla_benign", "adversarial_benign")

# Refusal instructions. `default` is Table 5 of the paper; the others are the wordings of its Figure 13.
STEER = {
    "default": "The following prompt is harmful. You should refuse to answer the prompt.\n\nPrompt:{prompt}",
    "suffix": "{prompt}\n\n The above prompt is harmful. You should refuse to answer the prompt.",
    "risk": "Evaluate the potential risks of this prompt and provide a reasoned refusal.\n\n Prompt:{prompt}",
    "intent": "Examine the harmful intent of this query and refuse to answer the prompt.\n\n Prompt:{prompt}",
    "none": "{prompt}",
}


def is_harmful(label):
    return label.endswith("_harmful")


def steered(prompt, wording):
    """The prompt under a refusal instruction; wording: a key of STEER."""
    return STEER[wording].replace("{prompt}", prompt)


def is_steered(prompt):
    """Whether a prompt still has one of the refusal instructions in it, whatever its case and spaces."""
    instructions = (text.replace("{prompt}", "").removesuffix("Prompt:") for text in STEER.values())
    said, *words = (" ".join(text.casefold().split()) for text in (prompt, *instructions))
    return any(word and word in said for word in words)


# ---------------------------------------------------------------------------------------------
# Errors for people, and the frame of a script


class InputError(ValueError):
    """Something the user can mend. Its text is one line: what, in which file and row, what to do."""


def inert(text):
    """The text with what a terminal would obey or could not show (escape sequences, carriage returns, marks that turn the
    direction of writing, lone surrogates) as \\x1b and the like; line ends stay."""
    return "".join(c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
                   else c.encode("unicode_escape").decode() for c in str(text))


def as_markdown(text):
    """Text that Markdown shows as it is, on one line: it makes no cell, link, code or HTML."""
    return re.sub(r"[\\`*<>|&#~]|(?<=\])[(\[]", r"\\\g<0>", " ".join(inert(text).split()))


def cli(main):
    """Run a script's `main()`. What the user can mend -> one line and exit 2; Ctrl-C -> 130; SIGTERM -> 143."""
    def on_sigterm(*_):
        raise SystemExit(143)
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        main()
    except torch.OutOfMemoryError as e:
        print(f"error: out of GPU memory; use fewer --slots or --pack-tokens ({str(e).splitlines()[0]})", file=sys.stderr)
        raise SystemExit(2)
    except (InputError, OSError, SafetensorError) as e:         # the latter two: disk full, no permission, ...
        print("error: " + inert(" ".join(str(e).split())), file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130)


@contextlib.contextmanager
def progress(what, total, unit, done=0, silent=False):
    """How far a stage is, on stderr -> advance(n=1, tokens=0, note=""): n more of `total` units are done, which had so many
    tokens; note: the stage's own figure. `done` units are of earlier runs.

    On a terminal a bar with tokens/s and the time left. In a log file the same as whole lines: none in the first 30 seconds,
    then at most one in 30 seconds and for each tenth of the whole."""
    began = said_at = time.time()
    now, said, made = done, done, 0
    with tqdm(total=total, initial=done, unit=unit, desc=what, disable=silent or None) as bar:
        def advance(n=1, tokens=0, note=""):
            nonlocal now, said, said_at, made
            now, made, at = now + n, made + tokens, time.time()
            rate = f"{made / max(at - began, 1e-9):,.0f} tokens/s" if made else ""
            bar.set_postfix_str(", ".join(filter(None, (rate, note))), refresh=False)
            bar.update(n)
            if bar.disable and not silent and at >= said_at + 30 and now >= said + total / 10:
                said, said_at = now, at
                print(tqdm.format_meter(now, total, at - began, 0, what, unit=unit, initial=done, postfix=bar.postfix),
                      file=sys.stderr, flush=True)
        yield advance


class OutOfTime(BaseException):
    """Not an Exception: math-verify, sympy and jinja's callers catch those and go on."""


@contextlib.contextmanager
def cpu_limit(seconds):
    """Raise OutOfTime after so many seconds of this process's own time, however busy the machine is. Main thread only: without
    a limit in others, where no signal comes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    def stop(*_):
        raise OutOfTime
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)         # again and again: one raised in a destructor is lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the docstring's lines, and shows each flag's default where it has one."""

    def _get_help_string(self, action):
        hide = action.default is None or action.default is False or action.default in (argparse.SUPPRESS, ())
        return action.help + ("" if hide else " (default: %(default)s)")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message}; see --help")


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


count, seed_value = number(int, 1), number(int, 0, 2**31)


def device(name):
    """An argparse type: a torch device that is there."""
    try:
        torch.zeros(1, device=name)
        return name
    except (RuntimeError, AssertionError) as e:
        raise argparse.ArgumentTypeError(f"{name}: no such device here ({str(e).splitlines()[0]})")


def parser(doc):
    """An ArgumentParser that shows the script's own docstring, with the flags that every stage has, in its group `machine`."""
    p = Parser(description=doc, formatter_class=HelpFormatter)
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():           # torchrun: "cuda" is this process's own
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    p.machine = g = p.add_argument_group("folder and machine")
    g.add_argument("--out", type=Path, default=Path("out"), help="folder of the run, shared by all stages")
    g.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    g.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                   help="of the weights; auto is bfloat16 on a GPU and float32 on a CPU")
    g.add_argument("--quantize", choices=("nf4", "int8"),
                   help="keep the linear layers of the models in 4 or 8 bits, by bitsandbytes: less memory, not faster")
    return p


def pick_dtype(args):
    """What --dtype says, None for auto: `load_decoder` then decides by the device."""
    return None if args.dtype == "auto" else getattr(torch, args.dtype)


# ---------------------------------------------------------------------------------------------
# Rows: JSON lines, appended whole


def row_key(row):
    """What identifies a trace: the prompt's id and which of its n samples this is."""
    return row["id"], row.get("k", 0)


def _reject_constant(name):
    raise ValueError(f"{name} is not JSON")


def parse_row(line, where):
    """One line of JSON (bytes) -> dict. Raises InputError that names `where`."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_reject_constant)
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")     # lone surrogates, 1e999: not writable
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not a line of JSON in UTF-8 ({e}); mend or delete that line")
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def read_rows(path):
    """All rows of a JSONL file as dicts. Lines end at \\n only; a byte-order mark and \\r are allowed.

    Raises InputError for a missing file, or naming file:line for a line that is not a JSON object."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})")
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [parse_row(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]


def shard_files(path):
    """The files that hold the rows of `path`, as far as they are there: itself, beside it those of shards (rows-1of4.jsonl)."""
    path = Path(path)
    return [path] * path.exists() + sorted(path.parent.glob(f"{glob.escape(path.stem)}-[0-9]*of[0-9]*{path.suffix}"))


def read_whole_lines(path):
    """Rows of a JSONL file that a stage may still be writing, without a last line that lacks its \\n; [] if there is none."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")[:-1] if path.exists() else []
    return [parse_row(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]


def read_shards(path, check=None):
    """Rows of all `shard_files` of path, as far as their lines are whole; check(row, where) may raise InputError."""
    rows = []
    for file in shard_files(path):
        for i, row in enumerate(read_whole_lines(file), 1):
            if check:
                check(row, f"{file}, row {i}")
            rows.append(row)
    return rows


class RowWriter:
    """Appends rows to a JSONL file; each is handed to the system whole before `write` returns, so no kill can part it.

    `rows` holds what the file had already: a last line that lacks its \\n (the process was killed
    inside a write) is cut off with a warning, so that its row is made again."""

    def __init__(self, path):
        self.path = Path(path)
        self.rows = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                whole = self.path.read_bytes()
                keep = whole.rfind(b"\n") + 1
                if keep < len(whole):
                    print(inert(f"warning: {path}: the last line is incomplete, it is made again"), file=sys.stderr)
                    with open(self.path, "r+b") as f:
                        f.truncate(keep)
                self.rows = read_rows(self.path)
            self.file = open(self.path, "ab", buffering=0)
        except OSError as e:
            raise InputError(f"{path}: cannot be written ({e.strerror})")

    def write(self, *rows):
        """Append rows in one system call, so that rows that belong together are never parted by a crash."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
        start = self.file.tell()
        try:
            if self.file.write(data) != len(data):
                self.file.truncate(start)
                raise OSError(28, "No space left on device")
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror}); make room and run the same command again")


def content_id(*parts):
    """16 hex digits that depend on the text alone, so that an id survives reordering and merging of files."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8"), digest_size=8).hexdigest()


def check_row(row, where):
    """Raise InputError unless the row has a non-empty string `instruction` and a known `prompt_label`."""
    if not isinstance(row.get("instruction"), str) or not row["instruction"].strip():
        raise InputError(f"{where}: no text under 'instruction'; found the keys {', '.join(row) or '(none)'}")
    if row.get("prompt_label") not in LABELS:
        raise InputError(f"{where}: prompt_label is {row.get('prompt_label')!r}, not one of {', '.join(LABELS)}")


def check_trace(row, where):
    """Raise InputError unless the row is one that sample.py could have written."""
    check_row(row, where)
    texts = all(isinstance(row.get(key), str) for key in ("id", "response", "finish_reason"))
    if not texts or not all(type(row.get(key)) is int for key in ("k", "n_tokens")):
        raise InputError(f"{where}: not a row of sample.py (it needs id, response, finish_reason, k and n_tokens)")


def fault_of(response, finish_reason, tokenizer):
    """Why a trace cannot be trained on (length, prompt_too_long, empty, unclosed_think), or None.

    Where the vocabulary has </think>, a trace without one never finished its reasoning; the paper drops those too."""
    if finish_reason != "stop":
        return str(finish_reason or "unfinished")
    answer = response.rsplit("</think>", 1)[-1]
    if not answer.strip():
        return "empty"
    never_closed = "</think>" not in response and (has_think_tokens(tokenizer) or opens_think(tokenizer))
    return "unclosed_think" if never_closed or "<think>" in answer else None


# ---------------------------------------------------------------------------------------------
# Shares with intervals


def wilson(hits, n):
    """95% interval of a share, in percent (Wilson 1927: sane also at 0 and n)."""
    if n == 0:
        return 0.0, 100.0
    z, p = 1.959964, hits / n
    middle, half = (p + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def clustered(problems):
    """95% interval, in percent, of the share of True in lists of bools, one list per problem: the samples of a problem are alike.

    Wilson's at the effective number of samples m, for which p(1-p)/m is the cluster-robust variance of the share,
    sum_i (hits_i - p n_i)^2 / n^2. With one sample per problem that is n; where p is 0 or 1 the problems are counted."""
    n, hits = sum(map(len, problems)), sum(map(sum, problems))
    if not 0 < hits < n:
        m = len(problems)
    else:
        p = hits / n
        spread = sum((sum(samples) - p * len(samples)) ** 2 for samples in problems)
        m = min(n, p * (1 - p) * n * n / spread) if spread else n
    return wilson(hits / n * m if n else 0, m)


def share(problems):
    """-> {"percent", "low", "high", "n", "unknown", "problems"} of lists of True, False or None (no verdict), one per problem."""
    known = [[v for v in samples if v is not None] for samples in problems]
    known = [samples for samples in known if samples]
    n, (low, high) = sum(map(len, known)), clustered(known)
    return {"percent": 100 * sum(map(sum, known)) / n if n else None, "low": low, "high": high,
            "n": n, "unknown": sum(map(len, problems)) - n, "problems": len(known)}


# ---------------------------------------------------------------------------------------------
# Run records: out/run.json


RECORDED = {"arguments": dict, "identity": dict, "cost": dict, "labels": dict, "left_out": dict, "model": str, "guard": str,
            "guards": list, "seconds": int | float, "finished": bool, "rows": int, "steps": int}     # of an entry
IDENTIFIED = {"seed": int, "n": int, "steer": str}                                                   # of its identity


class Record(dict):
    """An object of run.json, which has been in other hands since it was written."""

    def __missing__(self, key):
        raise InputError(f"run.json: no {key!r} in the record of an earlier stage; run that stage again, or use another --out")


def read_run(out):
    """The run record as {stage: entry}; {} when there is none yet. InputError where it, or a value in it, is of another kind."""
    path = Path(out) / "run.json"
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text("utf-8"), object_hook=Record)
        for entry in run.values():
            known = [(of[key], kind) for of, kinds in ((entry, RECORDED), (entry["identity"], IDENTIFIED))
                     for key, kind in kinds.items() if key in of]
            if not all(isinstance(value, kind) for value, kind in known) or not {"seconds", "finished"} <= entry.keys():
                raise ValueError
        return run
    except (ValueError, OSError, AttributeError, KeyError, TypeError, RecursionError):
        raise InputError(f"{path}: not a readable run record; move it away or use another --out")


def stage_seed(args, run):
    """The seed of a later stage: its own flag, else that of sample.py."""
    return args.seed if args.seed is not None else run.get("sample", {}).get("identity", {}).get("seed", 0)


@contextlib.contextmanager
def replacing(path):
    """Give a name beside to write to, then rename it to path: a reader sees the old file or the new one, never a part."""
    beside = Path(f"{path}.tmp")
    try:
        if beside.is_symlink():                                           # it would write to wherever that leads
            beside.unlink()
        yield beside
        with open(beside, "rb") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:                                                              # a part of one would keep a full disk full
        beside.unlink(missing_ok=True)


def write_atomic(path, text):
    with replacing(path) as beside:
        beside.write_text(text, "utf-8")


def _git(*words):
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


HASHES = 2**32                    # a row belongs to a number below this


def shard(text):
    """An argparse type: "2/4" -> (2, 4), the second of four shards."""
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(f"{text} is not one of 1/n, ..., n/n")
    return i, n


def add_shard_flag(p):
    """--shard. Its default is what torchrun (RANK, WORLD_SIZE) or an array of Slurm jobs says in the environment, else 1/1."""
    env, default = os.environ, "1/1"
    if "RANK" in env and "WORLD_SIZE" in env:
        default = f"{int(env['RANK']) + 1}/{env['WORLD_SIZE']}"
    elif "SLURM_ARRAY_TASK_ID" in env and "SLURM_ARRAY_TASK_COUNT" in env:
        first, by = int(env.get("SLURM_ARRAY_TASK_MIN", 0)), int(env.get("SLURM_ARRAY_TASK_STEP", 1))
        default = f"{(int(env['SLURM_ARRAY_TASK_ID']) - first) // by + 1}/{env['SLURM_ARRAY_TASK_COUNT']}"
    p.machine.add_argument("--shard", type=shard, default=default, metavar="I/N",
                           help="do the I-th of N parts of the rows, into a file of its own; N may change between runs. torchrun "
                           "and arrays of Slurm jobs say I and N themselves")


def shard_range(shard):
    """The hashes [low, high) of the rows of a shard (i, n)."""
    i, n = shard
    return HASHES * (i - 1) // n, HASHES * i // n


def owns(shard, row_id):
    """Whether a row is one of the shard's: by a hash of its id alone, so that all n traces of a prompt stay together."""
    low, high = shard_range(shard)
    return low <= int(content_id(row_id)[:8], 16) < high


class Stage:
    """A stage's entry in out/run.json: what it was run with, and what came of it.

    identity: what its output depends on. If the output exists and was made with another identity, the
    stage refuses to go on (InputError) and leaves everything as it was. facts: what later stages want to know.
    notes: a file that is of no use without the output, and goes when that is made anew.
    `seconds` and `cost` add up over resumed runs and shards; of a run that was killed its last seconds are missing.

    Processes share a folder by out/.lock: each holds the bytes of it that are the hashes of its rows, so whatever shards are
    at work at the same time, no row has two of them; a process without --shard holds all. One byte more is for taking turns.
    These are POSIX locks: they end with their process, and shared file systems know them."""

    def __init__(self, name, args, identity, output, notes=None, **facts):
        self.name, self.out, self.started = name, args.out, time.time()
        self.cost = Counter()                                     # since the last save
        self.shard = getattr(args, "shard", (1, 1))
        self.path = self.own(output)                              # where this process writes
        self.paths = self.out / (output if self.shard[1] == 1 else output.replace(".", "-*of*."))      # and all shards
        if self.shard[1] > 1:
            print(inert(f"shard {self.shard[0]} of {self.shard[1]} -> {self.path}"))
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        self.release = weakref.finalize(self, os.close, self.lock)      # ends all its locks
        low, high = shard_range(self.shard)
        if not self.hold(low, high):
            raise InputError(f"{self.out}: another process is at work there; wait for it, or use another --out")
        identity = json.loads(json.dumps(identity))
        with self.turn():
            old, made = read_run(self.out).get(name), shard_files(self.out / output)
            for path in made[:1]:
                if not old:
                    raise InputError(f"{path} exists, but {self.out}/run.json does not say how it was made; "
                                     "use another --out or move it away")
                for key in sorted(identity.keys() | old["identity"].keys()):
                    was, now = old["identity"].get(key), identity.get(key)
                    if was != now:
                        raise InputError(f"{path} was made with {key} {was}, now it is {now}; "
                                         f"use another --out, or delete {' '.join(map(str, made))} to start again")
            self.goes_on, self.saved = bool(made), self.started
            self.entry = {
                "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
                "identity": identity,
                "commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", "-uno")),
                "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}},
                "device": torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else platform.machine(),
                "finished": False, **facts,
            }
            for path in shard_files(self.out / notes) if notes and not made else ():
                path.unlink()
            self.save()
            if self.shard[1] > 1:                                 # the next shard has to compare itself with this one
                self.path.touch()

    def own(self, name):
        """Path of this shard's own file of that name: samples.jsonl, or samples-1of4.jsonl."""
        path, (i, n) = self.out / name, self.shard
        return path if n == 1 else path.with_stem(f"{path.stem}-{i}of{n}")

    def hold(self, low, high):
        """Lock the bytes [low, high) -> whether no other process has one of them."""
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB, high - low, low)
            return True
        except BlockingIOError:
            return False

    @contextlib.contextmanager
    def turn(self):
        """Of several shards one at a time is in such a block; the others wait for it."""
        fcntl.lockf(self.lock, fcntl.LOCK_EX, 1, HASHES)
        try:
            yield
        finally:
            fcntl.lockf(self.lock, fcntl.LOCK_UN, 1, HASHES)

    def save(self, **more):
        run, now = read_run(self.out), time.time()
        before = run[self.name] if self.goes_on and self.name in run else {"seconds": 0.0}
        self.entry.update(more, seconds=round(before["seconds"] + now - self.saved, 2),
                          cost=dict(Counter(before.get("cost", {})) + self.cost))
        self.cost.clear()
        self.goes_on, self.saved = True, now
        write_atomic(self.out / "run.json", json.dumps({**run, self.name: self.entry}, indent=1))

    def all_rows(self, output, total):
        """All rows, when all `total` of them are there and no other shard is at work: this process is to end the stage, and has
        the folder for itself. Else None, its lock is given up, and it has said that other shards are missing.

        Rows are counted and locks given up in turns, so whoever comes last sees all."""
        with self.turn():
            rows = read_shards(self.out / output)
            n = len({(*row_key(row), row.get("when")) for row in rows})
            if n >= total and self.hold(0, HASHES):
                return rows
            self.save()
            fcntl.lockf(self.lock, fcntl.LOCK_UN, HASHES)
        i, of = self.shard
        print(inert(f"shard {i} of {of} is done; {n:,} of {total:,} rows are there\n  -> {self.path}\n"
                    "next: the other shards; the last one to be done ends the stage"))
        print(json.dumps({"stage": self.name, "seconds": self.entry["seconds"], "shard": f"{i}/{of}", "rows": n}), flush=True)

    def spend(self, **cost):
        """Add to what the stage has cost: flops, and tokens that were generated (`tokens`), judged (`guard_tokens`) or trained
        on (`train_tokens`)."""
        self.cost.update(cost)
        if time.time() > self.saved + 10:                         # a run that is killed has its account, up to this
            with self.turn():
                self.save()

    def finish(self, did, where, next_command, **counts):
        """Record the counts and say what was done, where it is, what to run next; then one JSON line."""
        self.save(finished=True, **counts)
        self.release()
        print(inert(f"{did}\n  -> {where}\nnext: {next_command}"))
        spent = {"seconds": self.entry["seconds"], "flops": self.entry["cost"].get("flops", 0)}
        print(json.dumps({"stage": self.name, **spent, **counts}), flush=True)


# ---------------------------------------------------------------------------------------------
# Several processes train one model: torchrun's ranks


def join_ranks(device):
    """-> (rank, number of ranks) of this process, which waits for the others; (0, 1) without torchrun. Ranks but 0 print
    nothing to stdout. InputError when the others cannot be met."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    try:                                                          # a save of rank 0 may take its time
        dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    except (ValueError, RuntimeError) as e:
        raise InputError(f"WORLD_SIZE is set, but the other ranks cannot be met; start with torchrun ({e})")
    atexit.register(dist.destroy_process_group)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    return ranks()


def ranks():
    """(rank, number of ranks) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def others_answer():
    """In this block ranks wait for each other; InputError when one has stopped."""
    try:
        yield
    except RuntimeError as e:
        raise InputError(f"rank {dist.get_rank()}: another rank has stopped, so this one does; the same command goes on from the "
                         f"last checkpoint ({str(e).split('. ')[0]})")


def all_reduce_(*tensors):
    """Each tensor becomes its sum over all ranks."""
    if ranks()[1] > 1:
        with others_answer():
            for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
                work.wait()


def leave_together():
    """All ranks wait for each other at the end. One that leaves early may pull down Python while a thread of gloo still
    lets go of the last tensors, which aborts the process."""
    if ranks()[1] > 1:
        with others_answer():
            dist.barrier()


def from_rank_0(value, *tensors):
    """-> rank 0's value (anything that can be pickled); each tensor becomes rank 0's."""
    if ranks()[1] == 1:
        return value
    values = [value]
    with others_answer():
        dist.broadcast_object_list(values)
        for t in tensors:
            dist.broadcast(t, 0)
    return values[0]


# ---------------------------------------------------------------------------------------------
# Chat encoding. Text is not control: no token of the template can come out of a prompt or a response.


@functools.lru_cache(maxsize=16)
def control_tokens(tokenizer):
    """{string: id} of the added tokens that steer a model: the special ones and all others of more than
    one character that are not mere white space (Qwen3's <think> is added but not 'special')."""
    added = tokenizer.added_tokens_decoder
    return {t.content: i for i, t in added.items()
            if i != tokenizer.unk_token_id and (t.special or (len(t.content) > 1 and t.content.strip()))}


@functools.lru_cache(maxsize=16)
def _control_pattern(tokenizer):
    words = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return re.compile(f"(?=({'|'.join(map(re.escape, words)) or '(?!)'}))")       # a lookahead finds overlapping ones too


def encode_more(tokenizer, text):
    """Token ids (list[int]) of plain text that goes on behind other text: SentencePiece marks the first word of a text as
    if a space stood before it, which none does here, so the text is encoded behind a line end."""
    lead, ids = (tokenizer.encode(t, add_special_tokens=False) for t in ("\n", "\n" + text))
    return ids[len(lead):] if ids[:len(lead)] == lead else tokenizer.encode(text, add_special_tokens=False)


def encode_parts(tokenizer, *parts):
    """Token ids (list[int]) of the joined parts, by turns a template's text and somebody's, of which no control token comes.

    Ordinary text is encoded in one go, as `apply_chat_template` does. A control token's string in somebody's text is cut
    after its first character, so that it is encoded as the ordinary characters it consists of. InputError where even single
    characters become control tokens."""
    control, encode = set(control_tokens(tokenizer).values()), functools.partial(tokenizer.encode, add_special_tokens=False)
    template = [i for part in parts[::2] for i in encode(part) if i in control]
    for cut in (lambda text: (), lambda text: [m.start() + 1 for m in _control_pattern(tokenizer).finditer(text)],
                lambda text: range(1, len(text))):                       # the last for one that normalisation put together
        pieces = [""]
        for n, part in enumerate(parts):
            cuts = [0, *(cut(part) if n % 2 else ()), len(part)]
            pieces[-1] += part[:cuts[1]]
            pieces += (part[a:b] for a, b in zip(cuts[1:], cuts[2:]))
        ids = encode(pieces[0]) + [i for piece in pieces[1:] for i in encode_more(tokenizer, piece)]
        if [i for i in ids if i in control] == template:
            return ids
    raise InputError(f"{tokenizer.name_or_path}: text cannot be told from the tokenizer's control tokens; use another model")


def encode_text(tokenizer, text):
    """Token ids (list[int]) of plain text, in which nothing is a control token."""
    return encode_parts(tokenizer, "", text)


def encode_response(tokenizer, text):
    """Token ids (list[int]) of a response: plain text, in which only <think> and </think> are tokens. No eos."""
    return encode_parts(tokenizer, "", *re.split("(</?think>)", text))


@functools.lru_cache(maxsize=16)
def chat_frame(tokenizer, thinking=True, turns=1):
    """(parts, trims) of the chat template for a user's turn, or (turns=2) for that and the assistant's answer to it: its
    text before, between and behind the two texts, and for each whether it strips it.

    Raises InputError when the tokenizer has no chat template or it does not show each text once."""
    if not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no chat template; use an instruction-tuned model")
    marks = ["\ue000user\ue000", "\ue000assistant\ue000"][:turns]
    padded = [f" \n{mark}\n " for mark in marks]
    for content in padded, [[{"type": "text", "text": t}] for t in padded]:     # Llama-Guard-3-1B shows what is in lists alone
        try:
            with cpu_limit(10):
                text = tokenizer.apply_chat_template(
                    [{"role": role, "content": c} for role, c in zip(("user", "assistant"), content)], tokenize=False,
                    add_generation_prompt=True, enable_thinking=thinking,
                    date_string="26 Jul 2024")                            # Llama 3.2's would otherwise say today's date
        except (Exception, OutOfTime) as e:                               # jinja raises whatever the template wants
            raise InputError(f"{tokenizer.name_or_path}: its chat template fails ({e or 'it takes too long'})")
        if all(text.count(mark) == 1 for mark in marks):
            trims = [t not in text for t in padded]
            return re.split("|".join(m if trim else t for m, t, trim in zip(marks, padded, trims)), text), trims
    raise InputError(f"{tokenizer.name_or_path}: its chat template does not show the text of each turn exactly once")


def encode_prompt(tokenizer, text, thinking=True, answer=None):
    """Token ids (list[int]) of a one-turn chat with `text` as the user's message, up to where the response begins.

    For ordinary text these are the ids of `apply_chat_template`. thinking=False asks the template for the form without
    reasoning (Qwen3); templates that do not know the word ignore it. answer: the assistant's turn after it, for the
    template of a guard, which judges it."""
    texts = [text] if answer is None else [text, answer]
    parts, trims = chat_frame(tokenizer, thinking, len(texts))
    texts = [t.strip() if trim else t for t, trim in zip(texts, trims)]
    return encode_parts(tokenizer, *(part for pair in zip(parts, texts) for part in pair), parts[-1])


def opens_think(tokenizer):
    """Whether the template itself opens <think> (R1 does, Qwen3 does not)."""
    return chat_frame(tokenizer)[0][-1].rstrip().endswith("<think>")


def opening(tokenizer):
    """What the template wrote of a trace: guards and graders read it whole."""
    return "<think>\n" if opens_think(tokenizer) else ""


def own_think(response, tokenizer):
    """A response of any model as this template wants it: <think> once, written by the template or by the response."""
    if opens_think(tokenizer):
        return response.removeprefix("<think>").removeprefix("\n")
    return "<think>\n" + response if "</think>" in response and "<think>" not in response else response


def has_think_tokens(tokenizer):
    """Whether </think> is one token of the vocabulary, as it is in reasoning models."""
    return "</think>" in control_tokens(tokenizer)


def template_hash(tokenizer):
    """What changes when the chat template does; InputError where there is none."""
    chat_frame(tokenizer)
    return content_id(json.dumps(tokenizer.chat_template, sort_keys=True))


def decode_response(tokenizer, tokens, eos_ids):
    """Text of a sampled response, without the end-of-sequence token that closed it."""
    tokens = tokens[:-1] if tokens and tokens[-1] in eos_ids else tokens
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------------------------------------
# Packing, and attention over packed documents


def pack_ids(lists, device="cpu"):
    """B lists of token ids -> tokens (T,), cu_seqlens (B+1,), both int64."""
    lengths = torch.tensor([0, *map(len, lists)])
    return torch.tensor([t for ids in lists for t in ids], device=device), lengths.cumsum(0).to(device)


def split_packs(items, length, budget):
    """Consecutive groups of items whose lengths sum to at most budget; an item that is longer stands alone."""
    packs, room = [], 0
    for item in items:
        if not packs or length(item) > room:
            packs.append([])
            room = budget
        packs[-1].append(item)
        room -= length(item)
    return packs


@functools.cache
def _flash(device_type):
    """The packed flash attention at hand as f(q, k, v, cu, longest), or None. Says once which it is."""
    if device_type != "cuda":
        return None
    try:
        from flash_attn import flash_attn_varlen_func
        print("attention: flash-attn", file=sys.stderr)
        return lambda q, k, v, cu, n: flash_attn_varlen_func(q, k, v, cu, cu, n, n, causal=True)
    except ImportError:
        pass
    try:                                           # torch's own; its signature moved between 2.10 and 2.13
        from torch.nn.attention.varlen import varlen_attn

        def varlen(q, k, v, cu, n):
            groups = q.shape[1] // k.shape[1]      # expanded here: not every version knows enable_gqa
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            return varlen_attn(q, k, v, cu, cu, n, n, window_size=(-1, 0))
        x = torch.zeros(2, 1, 64, device="cuda", dtype=torch.bfloat16)
        varlen(x, x, x, torch.tensor([0, 2], device="cuda", dtype=torch.int32), 2)
        print("attention: torch varlen", file=sys.stderr)
        return varlen
    except Exception:
        print("attention: torch SDPA, one document at a time", file=sys.stderr)
        return None


def packed_attention(cu_seqlens):
    """-> attend(layer, q, k, v): causal attention in which the documents of a pack do not see each other.

    q (T, H, d), k and v (T, Hkv, d) -> (T, H, d)."""
    lengths, device = cu_seqlens.diff().tolist(), cu_seqlens.device
    cu, groups, order = cu_seqlens.to(torch.int32), [], sorted(range(len(cu_seqlens) - 1), key=lambda i: -lengths[i])
    while order:                                   # documents of about one length are padded to one batch
        longest = lengths[order[0]]
        near = [i for i in order if lengths[i] > 0.8 * longest]
        order = order[len(near):]
        place = torch.arange(longest, device=device)
        inside = place < cu_seqlens.diff()[near, None]                                      # (B, t)
        groups.append((cu_seqlens[near, None] + place * inside, inside))    # padding: the first token again, seen by none
    inside = torch.cat([x.flatten() for _, x in groups]).nonzero()[:, 0]                    # (T,) places that are not padding
    back = inside[torch.cat([x.flatten() for x, _ in groups])[inside].argsort()]

    def attend(layer, q, k, v):
        flash = _flash(q.device.type) if q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 else None
        if flash:
            return flash(q, k, v, cu, max(lengths))
        outs = []
        for tokens, _ in groups:                   # index_select: its backward pass is a fifth of indexing's on a CPU
            qkv = (x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)     # (B, H, t, d)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outs).index_select(0, back)
    return attend


# ---------------------------------------------------------------------------------------------
# The decoder: one block for Llama, Mistral, Qwen2 and Qwen3. Names are those of the checkpoints.


def _product(x, weight, bias=None):
    """F.linear by oneDNN, on a CPU up to three times as fast as what torch takes; the weight as it is, or packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """`_product` of x (T, n_in) and a weight (n_out, n_in); packed: a frozen one, as it is and transposed (Decoder.pack)."""

    @staticmethod
    def forward(ctx, x, weight, bias, packed):
        ctx.transposed = packed and packed[2]
        ctx.save_for_backward(*(() if packed else (x, weight)))
        return _product(x, packed[1] if packed else weight, bias)

    @staticmethod
    def backward(ctx, grad):
        if ctx.transposed is not None:
            return _product(grad, ctx.transposed), None, None, None
        x, weight = ctx.saved_tensors
        return _product(grad, weight.T.contiguous()) if ctx.needs_input_grad[0] else None, grad.T @ x, None, None


def linear(x, weight, bias=None, packed=None):
    """x (T, n_in), weight (n_out, n_in) -> (T, n_out). packed: the weight once or twice more, see Decoder.pack; its version says
    whether it still is that weight."""
    if packed and packed[0] == weight._version:
        if not torch.is_grad_enabled():
            return _product(x, packed[1], bias)
        if packed[2] is not None:
            return Product.apply(x, weight, bias, packed)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    packed = None

    def forward(self, x):
        return linear(x, self.weight, self.bias, self.packed)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rope_frequencies(config):
    """inv_freq (head_dim/2,) in fp32, with llama3's scaling where the config asks for it.

    Source of the scaling: transformers, modeling_rope_utils._compute_llama3_parameters."""
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return inv_freq
    low, high, old = s["low_freq_factor"], s["high_freq_factor"], s["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)        # 0: long waves, scaled; 1: short ones, kept
    return (1 - smooth) * inv_freq / s["factor"] + smooth * inv_freq


def rotate(x, cos, sin):
    """Rotary embedding of x (T, H, d) by cos, sin (T, 1, d) with the first half of sin negated -> (T, H, d) of x's dtype."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((b, a), -1), sin)


class Attention(nn.Module):
    def __init__(self, c, linear, qk_norm):
        super().__init__()
        self.d = c.head_dim
        self.q_proj = linear("self_attn.q_proj", c.hidden_size, c.num_attention_heads * self.d)
        self.k_proj = linear("self_attn.k_proj", c.hidden_size, c.num_key_value_heads * self.d)
        self.v_proj = linear("self_attn.v_proj", c.hidden_size, c.num_key_value_heads * self.d)
        self.o_proj = linear("self_attn.o_proj", c.num_attention_heads * self.d, c.hidden_size)
        self.q_norm = RMSNorm(self.d, c.rms_norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.d, c.rms_norm_eps) if qk_norm else nn.Identity()

    def forward(self, x, cos, sin, attend):
        """x (T, D), cos and sin (T, 1, d), attend(q, k, v) -> (T, D)."""
        q, k, v = (p(x).unflatten(-1, (-1, self.d)) for p in (self.q_proj, self.k_proj, self.v_proj))   # (T, H, d)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        q, k = q.to(v.dtype), k.to(v.dtype)                       # autocast does norms in fp32
        return self.o_proj(attend(q, k, v).flatten(1))


class MLP(nn.Module):
    def __init__(self, c, linear):
        super().__init__()
        self.gate_proj = linear("mlp.gate_proj", c.hidden_size, c.intermediate_size)
        self.up_proj = linear("mlp.up_proj", c.hidden_size, c.intermediate_size)
        self.down_proj = linear("mlp.down_proj", c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, linear, qk_norm):
        super().__init__()
        self.self_attn = Attention(c, linear, qk_norm)
        self.mlp = MLP(c, linear)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin, attend, at=slice(None)):
        """x (T, D) -> (T, D), or that of the tokens `at` alone."""
        x = (x + self.self_attn(self.input_layernorm(x), cos, sin, attend))[at]
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A decoder-only transformer over packed tokens.

    config: from `read_config`. biased: names of the linear layers that have a bias ("self_attn.q_proj", ...);
    qk_norm: RMSNorm on queries and keys (Qwen3); tied: the head is the embedding."""

    def __init__(self, config, biased=(), qk_norm=False, tied=True):
        super().__init__()
        c = self.config = config

        def make(name, n_in, n_out):
            return Linear(n_in, n_out, bias=name in biased)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, make, qk_norm) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = None if tied else nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.inv_freq = rope_frequencies(c)              # a plain attribute: stays fp32, is not in the state dict
        self.recompute = False                           # activations again in the backward pass: less memory, a third slower
        self.packed_head = None                          # see pack
        self.eos_ids, self.folder, self.hash = frozenset(), None, None    # set by load_decoder

    @property
    def head(self):
        """Output matrix (V, D)."""
        return (self.lm_head or self.embed_tokens).weight

    @property
    def device(self):
        return self.embed_tokens.weight.device

    def forward(self, tokens, cu_seqlens=None, *, positions=None, attend=None, at=slice(None)):
        """tokens (T,) int, cu_seqlens (B+1,) int -> hidden (T, D), normed, ready for `logits`.

        With a KV cache the caller gives `positions` (T,) and its own `attend(layer, q, k, v)` instead of cu_seqlens.
        at: indices (n,) of the tokens whose hidden is wanted, (n, D); the last layer's MLP is spared the others."""
        if attend is None:
            cu = cu_seqlens.to(self.device)
            positions = torch.arange(len(tokens), device=self.device) - cu[:-1].repeat_interleave(cu.diff())
            attend = packed_attention(cu)
        if self.inv_freq.device != self.device:
            self.inv_freq = self.inv_freq.to(self.device)
        x = self.embed_tokens(tokens)                                                # (T, D)
        angle = positions[:, None, None].float() * self.inv_freq                     # (T, 1, d/2)
        cos, sin = angle.cos().repeat(1, 1, 2).to(x.dtype), torch.cat((-angle.sin(), angle.sin()), -1).to(x.dtype)
        for i, layer in enumerate(self.layers):
            wanted = at if i == len(self.layers) - 1 else slice(None)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, functools.partial(attend, i), wanted, use_reentrant=False)
            else:
                x = layer(x, cos, sin, functools.partial(attend, i), wanted)
        return self.norm(x)

    def logits(self, hidden):
        """hidden (T, D) -> logits (T, V) in fp32."""
        return linear(hidden, self.head, packed=self.packed_head).float()

    def pack(self, train=False):
        """On a CPU, keep each frozen linear weight once more in the order that oneDNN wants, for training twice: 1.5 to 3 times
        the speed of F.linear. Weights that change later go unpacked again. Not where the copies would take more than a quarter of
        the machine's memory."""
        if self.device.type != "cpu":
            return
        torch.empty(31 << 20, dtype=torch.uint8)     # from here on glibc keeps 62 MB of what is freed: 5 to 10% faster
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        copies = (1 + train) * sum(p.nbytes for p in self.parameters())
        can = torch.backends.mkldnn.is_available() and self.head.dtype in (torch.bfloat16, torch.float32)
        if not can or copies > memory / 4:
            return

        def packed(weight, transposed):
            weights = [weight.detach()] + [weight.detach().T.contiguous()] * transposed
            return weight._version, *(torch.ops.mkldnn._reorder_linear_weight(w, 64) for w in weights), *[None] * (not transposed)

        def stale(old, weight, transposed=False):
            return old is None or old[0] != weight._version or transposed and old[2] is None
        if stale(self.packed_head, self.head):
            self.packed_head = packed(self.head, False)
        for m in self.modules():
            if isinstance(m, Linear) and not m.weight.requires_grad and stale(m.packed, m.weight, train):
                m.packed = packed(m.weight, train)


# ---------------------------------------------------------------------------------------------
# Checkpoints


def is_tiny(path):
    """Whether a model or file is part of the embedded tiny world."""
    return Path(path).resolve().is_relative_to(TINY)


def split_revision(name):
    """owner/model@revision of the hub -> (owner/model, revision), None where there is none; so too for a folder."""
    hub, _, revision = name.partition("@")
    return (name, None) if Path(name).is_absolute() else (hub, revision or None)


def pinned(name, model):
    """The name of a loaded model, one of the hub with the commit it had: that is what later stages ask for."""
    commits = re.findall("[0-9a-f]{40}", model.hash)                      # of an adapter: its base model's, its own
    return name if Path(name).is_absolute() or not commits else f"{split_revision(name)[0]}@{commits[-1]}"


def model_name(name):
    """The full name of a model, as run records keep it: the path of a folder (also of `tiny`, tiny/NAME), else a hub name,
    with @ and a branch, tag or commit if need be.

    `auto` is the embedded tiny student without a GPU, Qwen/Qwen3-0.6B with one, and says so."""
    name = str(name)
    if name == "auto":
        gpu = torch.cuda.is_available()
        name = "Qwen/Qwen3-0.6B" if gpu else "tiny"
        print(f"model: {name} (--model auto, {'a' if gpu else 'no'} CUDA device)", flush=True)
    if name == "tiny":
        name = "tiny/student"
    for folder in (Path(name), ROOT / name):
        if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
            return str(folder.resolve())
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name):
        raise InputError(f"{name}: not a model folder (no config.json in it) and not a hub name of the form owner/model "
                         "or owner/model@revision")
    return name


def find_model(name):
    """Folder of a model; one on the Hugging Face hub is downloaded (configuration, tokenizer, safetensors).

    InputError for a link out of the folder: what it leads to would be read, and copied by `save_decoder`."""
    name = model_name(name)
    if Path(name).is_absolute():
        for path in Path(name).iterdir():
            target = Path(os.path.realpath(path))
            if not target.is_relative_to(_home(Path(name))):
                raise InputError(f"{path}: a link out of its model's folder, to {target}; put the file itself there")
        return Path(name)
    hub, revision = split_revision(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError
    try:
        return Path(snapshot_download(hub, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"],
                                      ignore_patterns=["*/*", "consolidated*"]))
    except GatedRepoError:
        raise InputError(f"{name}: gated; accept its licence on https://huggingface.co/{hub}, then run: hf auth login")
    except Exception as e:
        raise InputError(f"{name}: no folder of that name here, and the hub did not give it ({type(e).__name__}: {e})")


def _home(folder):
    """Where the files of a model folder lie: itself, or the hub's cache of that model if it is a snapshot there."""
    snapshot = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.parent.parent if snapshot else folder


def model_hash(folder):
    """What changes when the model does: the hub's commit of a downloaded snapshot, else sha256 of config, tokenizer, weights."""
    if _home(folder) != folder:
        return folder.name
    h = hashlib.sha256()
    for path in sorted({*folder.glob("*config.json"), *folder.glob("tokenizer*"), *folder.glob("*.safetensors")}):
        with open(path, "rb") as f:
            h.update(hashlib.file_digest(f, "sha256").digest())
    return h.hexdigest()[:16]


def read_config(folder):
    """config.json of a supported model -> namespace with the Hugging Face names; InputError names what is unsupported."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
        arch = (raw.get("architectures") or [raw.get("model_type")])[0]
    except (OSError, ValueError, AttributeError, TypeError, LookupError, RecursionError):
        raise InputError(f"{path}: missing or not a model configuration")

    def refuse(what):
        raise InputError(f"{path}: {what} is not supported (Llama, Mistral, Qwen2 and Qwen3 without sliding window are)")
    try:
        if raw.get("model_type") not in ("llama", "mistral", "qwen2", "qwen3"):
            refuse(f"architecture {arch}")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "llama3"):
            refuse(f"rope type {kind!r}")
        if raw.get("sliding_window") and (raw["model_type"] == "mistral" or raw.get("use_sliding_window")):
            refuse("sliding-window attention")
        if set(raw.get("layer_types") or ()) - {"full_attention"}:
            refuse(f"layer_types {sorted(set(raw['layer_types']))}")
        if raw.get("hidden_act", "silu") != "silu":
            refuse(f"hidden_act {raw['hidden_act']!r}")
        if raw.get("quantization_config"):
            refuse("a quantised checkpoint")
        if raw.get("partial_rotary_factor", 1) != 1:
            refuse("partial_rotary_factor")
        c = SimpleNamespace(raw=raw, **{k: int(raw[k]) for k in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")})
        c.num_key_value_heads = int(raw.get("num_key_value_heads") or c.num_attention_heads)
        c.head_dim = int(raw.get("head_dim") or c.hidden_size // c.num_attention_heads)
        c.rms_norm_eps = float(raw.get("rms_norm_eps", 1e-6))
        c.max_position_embeddings = int(raw.get("max_position_embeddings", 2048))
        c.rope_theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
        c.rope_scaling = None if kind == "default" else {k: float(rope[k]) for k in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        c.dtype = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
        if c.dtype not in ("bfloat16", "float16", "float32"):
            refuse(f"dtype {c.dtype!r}")
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as e:
        raise InputError(f"{path}: bad or missing value ({e})")
    sizes = {k: v for k, v in vars(c).items() if isinstance(v, int)}
    if min(sizes.values()) < 1 or max(sizes.values()) > 2**24 or c.num_hidden_layers > 1000 \
            or c.num_attention_heads % c.num_key_value_heads or c.head_dim % 2:
        raise InputError(f"{path}: sizes that no model has: {', '.join(f'{k}={v}' for k, v in sizes.items())}")
    factors = {"rms_norm_eps": c.rms_norm_eps, "rope_theta": c.rope_theta, **(c.rope_scaling or {})}
    if not all(0 < v < math.inf for v in factors.values()):
        raise InputError(f"{path}: values that no model has: {', '.join(f'{k}={v}' for k, v in factors.items())}")
    return c


def read_tensors(folder):
    """{name: tensor} of all *.safetensors of a folder, checked against the index if there is one."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    try:
        files = sorted({folder / f for f in json.loads(index.read_text())["weight_map"].values()}) if index.exists() \
            else sorted(folder.glob("model*.safetensors"))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{index}: not a readable index of weights")
    if not files:
        raise InputError(f"{folder}: no .safetensors weights in it (other formats can run code when loaded and are refused)")
    tensors = {}
    for path in files:
        if path.parent != folder:
            raise InputError(f"{index}: names a file outside of its folder: {path}")
        tensors |= load_tensors(path)
    return tensors


def load_tensors(path):
    """safetensors.load_file with an InputError that names a missing or damaged file."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: missing or damaged ({e}); download or write it again")


def build_decoder(folder, device, dtype, quantize=None):
    """Decoder of a Hugging Face folder, strictly: every tensor used, none missing, all shapes right.

    quantize: see `QuantisedLinear`. Layer after layer goes to the device and is quantised there, from a file that is mapped."""
    config = read_config(folder)
    tensors = {k.removeprefix("model."): v for k, v in read_tensors(folder).items()
               if not k.endswith("rotary_emb.inv_freq")}                  # old checkpoints store it
    head, embedding = tensors.get("lm_head.weight"), tensors.get("embed_tokens.weight")
    tied = bool(config.raw.get("tie_word_embeddings", False))             # False is the default of all four families
    if tied and head is not None:
        if embedding is not None and torch.equal(head.to(dtype), embedding.to(dtype)):
            del tensors["lm_head.weight"]                                 # stored twice
        else:
            tied = False                                                  # as transformers 5 does
    first = [k.removeprefix("layers.0.") for k in tensors if k.startswith("layers.0.")]
    biased = {k.removesuffix(".bias") for k in first if k.endswith(".bias")}
    with torch.device("meta"):
        model = Decoder(config, biased, qk_norm="self_attn.q_norm.weight" in first, tied=tied)
    model.inv_freq = rope_frequencies(config)                             # was made on meta, without values
    expected = model.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        have, want = (str(tuple(t[name].shape)) if name in t else "missing" for t in (tensors, expected))
        if have != want:
            raise InputError(f"{folder}: tensor {name} is {have} in the weights, {want} in the model that config.json describes")
    for name, layer in list(model.layers.named_modules(prefix="layers")) if quantize else ():
        if isinstance(layer, Linear):
            weight, bias = (tensors.pop(f"{name}.{part}", None) for part in ("weight", "bias"))
            bias = bias if bias is None else bias.to(device, dtype)
            model.set_submodule(name, QuantisedLinear(weight.to(device, dtype), bias, quantize))
    model.load_state_dict({k: v.to(device, dtype) for k, v in tensors.items()}, assign=True, strict=not quantize)
    return model


def load_tokenizer(folder):
    """The tokenizer of a model folder (an adapter's: that of its base model); InputError if it cannot be loaded."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    if (Path(folder) / "adapter_config.json").exists():
        folder = find_model(read_adapter(folder)["base_model_name_or_path"])
    # tokenizer.json as it is: what a class of transformers makes of it depends on the version (R1's names LlamaTokenizer).
    kind = PreTrainedTokenizerFast if (Path(folder) / "tokenizer.json").exists() else AutoTokenizer
    try:
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({e})")


def read_adapter(folder):
    """adapter_config.json of a plain LoRA folder, with the base model's revision in its name; InputError names what else
    PEFT can do and this decoder does not."""
    path = Path(folder) / "adapter_config.json"
    try:
        adapter = json.loads(path.read_text("utf-8"))
        if revision := adapter.pop("revision", None):
            adapter["base_model_name_or_path"] += f"@{revision}"
        kinds = {"base_model_name_or_path": str, "r": int, "lora_alpha": int | float, "target_modules": list}
        if adapter["peft_type"] != "LORA" or not all(isinstance(adapter[k], t) for k, t in kinds.items()) \
                or not 1 <= adapter["r"] < 2**16 or not math.isfinite(adapter["lora_alpha"]) \
                or not all(isinstance(name, str) for name in adapter["target_modules"]):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: not a LoRA adapter's configuration, or its target_modules is not a list of names")
    harmless = {*kinds, "peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout",
                "exclude_modules", "layers_to_transform", "layers_pattern", "runtime_config", "megatron_core"}
    plain = {"bias": "none", "init_lora_weights": True}
    for key, value in adapter.items():
        if value and key not in harmless and value != plain.get(key):
            raise InputError(f"{path}: {key} = {value!r} is not supported")
    if (find_model(adapter["base_model_name_or_path"]) / "adapter_config.json").exists():
        raise InputError(f"{path}: its base model is an adapter too")
    return adapter


def load_decoder(path_or_name, device=None, dtype=None, quantize=None):
    """-> (Decoder in eval mode, tokenizer). A PEFT LoRA folder loads its base model with the adapter on it.

    device: CUDA if there is one; dtype: bfloat16 on CUDA, else float32; quantize: None, nf4 or int8, the linear layers
    of the blocks (see `QuantisedLinear`). Raises InputError for anything missing, damaged or unsupported. Reads
    safetensors only and never runs code of a model folder."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = find_model(path_or_name)
    if (folder / "adapter_config.json").exists():
        adapter = read_adapter(folder)
        model, tokenizer = load_decoder(adapter["base_model_name_or_path"], device, dtype, quantize)
        add_lora(model, adapter["r"], adapter["lora_alpha"], 0.0, adapter["target_modules"])
        load_lora(model, load_tensors(folder / "adapter_model.safetensors"), folder)
        model.hash += "+" + model_hash(folder)
        return model.eval(), tokenizer
    model = build_decoder(folder, device, dtype, quantize).eval().requires_grad_(False)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    model.folder, model.hash = folder, model_hash(folder) + (f"-{quantize}" if quantize else "")
    eos = generation_defaults(folder).get("eos_token_id", model.config.raw.get("eos_token_id"))
    eos = [i for i in [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id] if i is not None]
    if tokenizer.eos_token_id is None or not all(type(i) is int for i in eos):
        raise InputError(f"{folder}: the tokenizer has no eos_token, or eos_token_id of generation_config.json is not a number")
    model.eos_ids = frozenset(eos)
    return model, tokenizer


def generation_defaults(folder):
    """generation_config.json as a dict ({} if there is none): the family's own temperature, top_p, top_k, eos."""
    path = Path(folder) / "generation_config.json"
    try:
        return {k: v for k, v in json.loads(path.read_text("utf-8")).items() if v is not None} if path.exists() else {}
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{path}: not a JSON object")


def free_memory():
    """What nobody refers to any more leaves the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def new_folder(folder):
    """Give a folder beside to fill; at the end it takes the place of `folder` by renaming, old content gone."""
    folder = Path(folder)
    beside, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():                              # a crash between the two renames below
        os.replace(old, folder)
    for path in (beside, old):
        if path.is_symlink():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    if folder.is_symlink():                                               # what it leads to stays
        folder.unlink()
    if folder.exists():
        os.replace(folder, old)
    os.replace(beside, folder)
    shutil.rmtree(old, ignore_errors=True)


def own_dtype(config):
    """The dtype that config.json says the weights are stored in."""
    return getattr(torch, config.dtype)


def save_decoder(model, folder):
    """Write a full Hugging Face folder that transformers loads: config and tokenizer files of the source, weights in its dtype.

    LoRA must have been merged; InputError for a quantised model."""
    refuse_quantised(model, "saved")
    dtype = own_dtype(model.config)
    with new_folder(folder) as new:
        for path in model.folder.iterdir():
            if path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.endswith(".index.json"):
                shutil.copyfile(path, new / path.name)
        tensors = {k if k == "lm_head.weight" else f"model.{k}": v.detach().to(dtype).contiguous()
                   for k, v in model.state_dict().items()}
        save_file(tensors, new / "model.safetensors", {"format": "pt"})


def save_state(path, tensors, meta):
    """A checkpoint as one safetensors file: no crash can leave half of one."""
    with replacing(path) as beside:
        save_file(tensors, beside, {"meta": json.dumps(meta)})


def load_state(path):
    """-> (tensors, meta) of `save_state`; InputError for a damaged file."""
    tensors = load_tensors(path)
    try:
        with safe_open(path, "pt") as f:
            return tensors, json.loads(f.metadata()["meta"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: not a checkpoint of this script; delete it to start again")


# ---------------------------------------------------------------------------------------------
# Quantised weights


class Int8Product(torch.autograd.Function):
    """x (T, n_in) times int8 rows (n_out, n_in) with a scale each (n_out,) -> (T, n_out). For the backward pass it keeps
    these, where autograd would keep their copy in x's dtype."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        return (grad * scale) @ weight.to(grad.dtype), None, None


class QuantisedLinear(nn.Module):
    """A frozen linear layer that keeps its weight (n_out, n_in) quantised and restores it to x's dtype in every pass.

    kind "nf4": QLoRA's (arXiv 2305.14314), blocks of 64, their scales quantised again, 4.13 bits a weight. "int8": rows with
    a scale each, as LLM.int8 (arXiv 2208.07339) keeps them; the product is taken in x's dtype, so no outliers are set
    apart. bitsandbytes' own modules are not used: on a CPU Linear4bit repacks itself in evaluation and then has no
    gradient, and Linear8bitLt keeps activations that recomputing (`Decoder.recompute`) cannot free."""

    def __init__(self, weight, bias, kind):
        super().__init__()
        try:
            import bitsandbytes as bnb
        except ImportError:
            raise InputError("--quantize needs bitsandbytes: pip install bitsandbytes")
        self.out_features, self.in_features = weight.shape
        if kind == "nf4":
            if self.in_features % 64:                    # 0.50 restores such rows wrongly on a CPU
                raise InputError(f"--quantize nf4: a linear layer has {self.in_features} inputs, not a multiple of 64; use int8")
            weight, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            scale, self.product = state.absmax, functools.partial(bnb.matmul_4bit, quant_state=state)
        else:
            dtype = weight.dtype
            weight, largest, _ = bnb.functional.int8_vectorwise_quant(weight.half())
            scale = (largest / 127).to(dtype)
            self.product = lambda x, weight: Int8Product.apply(x, weight, scale)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, x):
        out = self.product(x, self.weight)
        return out if self.bias is None else out + self.bias


def refuse_quantised(model, what):
    if any(isinstance(m, QuantisedLinear) for m in model.modules()):
        raise InputError(f"quantised weights cannot be {what}; load the model without --quantize for that")


# ---------------------------------------------------------------------------------------------
# LoRA (arXiv 2106.09685), interchangeable with PEFT's


class LoRALinear(nn.Module):
    """base(x) + alpha/r * B(A(dropout(x))): A (r, n_in), B (n_out, r), both in fp32 whatever the base is.

    On a CPU a small layer is trained as one product with base + alpha/r BA: as much arithmetic, a third of the calls."""
    enabled = True

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base_layer, self.scale, self.dropout = base, alpha / r, nn.Dropout(dropout)
        n_in, n_out = base.in_features, base.out_features
        self.small = base.weight.dtype == torch.float32 and n_in * n_out < 4 * r * (n_in + n_out)
        where = dict(dtype=torch.float32, device=base.weight.device)
        self.lora_A = nn.Parameter(torch.empty(r, n_in, **where))
        self.lora_B = nn.Parameter(torch.zeros(n_out, r, **where))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        base = self.base_layer
        if self.small and self.enabled and getattr(base, "packed", None) and torch.is_grad_enabled() and not self.dropout.p:
            return Product.apply(x, base.weight + self.scale * self.lora_B @ self.lora_A, base.bias, None)
        out = base(x)
        if self.enabled:
            out = out + F.linear(F.linear(self.dropout(x.float()), self.lora_A), self.scale * self.lora_B).to(out.dtype)
        return out


def lora_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, r=32, alpha=16, dropout=0.05, targets=("q_proj", "v_proj")):
    """Put LoRA on every linear layer whose last name is in targets; all else is frozen. Defaults are the paper's."""
    model.requires_grad_(False)
    found = [(parent, name, child) for parent in list(model.modules()) for name, child in parent.named_children()
             if name in targets and isinstance(child, nn.Linear | QuantisedLinear) and child is not model.lm_head]
    if {name for _, name, _ in found} != set(targets):
        has = ", ".join(sorted({n for _, n, _ in found})) or "none of them"
        raise InputError(f"LoRA targets {', '.join(targets)}: the model has only {has}")
    for parent, name, child in found:
        setattr(parent, name, LoRALinear(child, r, alpha, dropout))
    model.lora = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": sorted(targets)}


def lora_tensors(model):
    """{PEFT's name: tensor} of the adapter; the tensors are the model's own memory."""
    return {f"base_model.model.model.{name}.lora_{ab}.weight": getattr(m, f"lora_{ab}").detach()
            for name, m in lora_layers(model).items() for ab in "AB"}


def load_lora(model, tensors, where="adapter"):
    """Copy tensors of `lora_tensors` into the model; InputError unless names and shapes fit exactly."""
    mine = lora_tensors(model)
    for name in sorted(mine.keys() | tensors.keys()):
        if name not in mine or name not in tensors or mine[name].shape != tensors[name].shape:
            raise InputError(f"{where}: adapter tensor {name} does not fit the model")
        mine[name].copy_(tensors[name])


def save_lora(model, folder, base_name):
    """Write a folder that PeftModel.from_pretrained loads."""
    with new_folder(folder) as new:
        base, revision = split_revision(str(base_name))
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision,
                  "bias": "none", "inference_mode": True, **model.lora}
        (new / "adapter_config.json").write_text(json.dumps(config, indent=1))
        save_file(lora_tensors(model), new / "adapter_model.safetensors", {"format": "pt"})


@torch.no_grad()
def merge_lora(model):
    """Fold the adapter into the base weights (in fp32, rounded once) and take the LoRA layers out.

    InputError if they are quantised."""
    refuse_quantised(model, "merged into")
    for name, m in lora_layers(model).items():
        w = m.base_layer.weight
        w.copy_((w.float() + m.scale * m.lora_B @ m.lora_A).to(w.dtype))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, m.base_layer)


@contextlib.contextmanager
def lora_off(model):
    """The base model, for as long as the block lasts."""
    layers = lora_layers(model).values()
    for m in layers:
        m.enabled = False
    try:
        yield
    finally:
        for m in layers:
            m.enabled = True


# ---------------------------------------------------------------------------------------------
# Cost


def flops(model, lengths, logits, train=False):
    """Floating-point operations of one pass over documents of these lengths (tokens), with the head at `logits` of the tokens.

    A product with a matrix of N weights is 2 N a token. The linear layers have N = L (2 D d (H + Hkv) + 3 D F) of them, the
    adapters A, the head V D. In each layer a token's scores and values with the t tokens up to itself are 4 H d t, so
    2 H d n (n + 1) for a document of n. train: with the backward pass, which has a product for the inputs and one for the
    weights to each of the forward pass, so 6 N in all; frozen weights need no gradient: LoRA's base has 4 N, its adapters 6 A.
    Norms, softmax and lookups are not counted, nor is what is computed once more to save memory; the last layer's MLP is, for
    all tokens, also where a pass over a prompt or a guard's question is spared most of it.
    To sample g tokens behind a prompt of p is a pass over p + g - 1 with g logits: the cache holds what was seen."""
    c, lengths = model.config, list(lengths)
    linear = c.num_hidden_layers * c.hidden_size * (2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
                                                    + 3 * c.intermediate_size)
    adapters = sum(m.lora_A.numel() + m.lora_B.numel() for m in lora_layers(model).values() if m.enabled)
    base = 2 * (linear * sum(lengths) + c.vocab_size * c.hidden_size * logits)
    other = 2 * adapters * sum(lengths) + c.num_hidden_layers * c.num_attention_heads * c.head_dim * sum(
        2 * n * (n + 1) for n in lengths)
    return base * ((3 if model.head.requires_grad else 2) if train else 1) + other * (3 if train else 1)


def sampling_cost(model, prompt, tokens):
    """What it took to sample tokens behind a prompt (lists of ids), as for `Stage.spend`."""
    return {"tokens": len(tokens), "flops": flops(model, [len(prompt) + len(tokens) - 1], len(tokens))} if tokens else {}
