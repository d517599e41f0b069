"""
Rows: JSON lines that stages read, append to and derive from each other.

    from data.rows import TRACE_KEYS, RowWriter, read_rows
    traces = read_rows("out/samples.jsonl", TRACE_KEYS)
"""
import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path

from data.kinds import COUNT, TOKENS, Number, find_fault, parse_json, shorten
from thinksafe import LABELS, InputError, escape_control_chars, read_regular, trace_key

# Of a row in each file: what it must have, as kinds (data/kinds.py).
PROMPT_KEYS = {"instruction": str, "prompt_label": str}
TRACE_KEYS = {"id": str, **PROMPT_KEYS, "response": str, "finish_reason": str, "k": TOKENS,
              "n_tokens": TOKENS, "n_prompt_tokens?": TOKENS, "eos?": str}        # samples.jsonl
VERDICT_LABELS = "safe", "unsafe", "unknown"
_JUDGED = {"guard": str, "id": str, "k": TOKENS, "n_tokens?": TOKENS}
VERDICT = ({**_JUDGED, "label": "unknown", "p_unsafe": None, "reason": str},
           {**_JUDGED, "label": ("safe", "unsafe"), "p_unsafe": Number(0, 1), "reason": None})
GUARDED_KEYS = {**TRACE_KEYS, "response_label": VERDICT_LABELS, "keep": bool, "guard?": str,
                "p_unsafe?": (None, Number(0, 1)), "reason?": (None, str)}
_ASKED = {**TRACE_KEYS, "when": ("before", "after"), "set": str, "task?": str}
_ANSWERS = "unsafe", "refused", "solved", "guard_unsafe"
EVAL_KEYS = {**_ASKED, **{f"{key}?": (None, bool) for key in _ANSWERS}}
JUDGED_EVAL_KEYS = {**_ASKED, **dict.fromkeys(_ANSWERS, (None, bool))}       # eval.py has finished
METRIC_KEYS = {"step": COUNT, "tokens": COUNT,
               **dict.fromkeys(("targets?", "generated?", "guard_tokens?"), COUNT),
               **dict.fromkeys(("loss?", "ce?", "kl?", "reverse_kl?"), Number())}

def verdict_of(guards):
    """Return the kind of a row of verdicts.jsonl that one of the guards (names) gave."""
    return tuple({**kind, "guard": tuple(guards)} for kind in VERDICT)

def content_id(*parts):
    """Return 16 hex digits that depend on the text alone, whatever the order of the rows."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8"), digest_size=8).hexdigest()

def parse_row(line, where):
    """Parse one line of JSON (bytes) -> dict. Raises InputError that names `where`."""
    try:
        row = parse_json(line)
        json.dumps(row, ensure_ascii=False).encode("utf-8")          # can be written again
    except ValueError as e:
        raise InputError(f"{where}: not a line of JSON in UTF-8 ({e}); mend or delete that line")
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row

def check_row(row, required, where):
    """Raise InputError unless a row is of the kind `required`, with some text and a known label."""
    fault = find_fault(row, required)
    if not fault and "instruction" in required and not row["instruction"].strip():
        fault = "instruction must be str and not empty"
    if not fault and "prompt_label" in required and row["prompt_label"] not in LABELS:
        label = shorten(repr(row["prompt_label"]))
        fault = f"prompt_label is {label}, not one of {', '.join(LABELS)}"
    if fault:
        raise InputError(f"{where}: {fault}; mend or delete that row")

ROW_KEY = "id", "k", "when", "guard", "arm"      # what tells the rows of a stage's file apart

def read_rows(path, required=None, growing=False):
    """Read the rows (dicts) of a JSONL file.

    required: the kind of each row, such as TRACE_KEYS. growing: a stage may still be writing, so
    no file is no rows, and text after the last line end is left out.

    The rule: which of two rows is right is not guessed. Raises InputError for a missing file, for
    what is no regular file, one that names the line that is wrong, and one that names both
    lines of a trace that is there twice in a stage's file (with `required`)."""
    path = Path(path)
    if growing and not path.exists():
        return []
    try:
        data = read_regular(path)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})")
    return _parse_rows(data, path, required, growing)

def _parse_rows(data, path, required, growing=False):
    lines, rows, numbers = data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), [], {}
    for number, line in enumerate(lines[:-1] if growing else lines, 1):
        if not line.strip():
            continue
        row = parse_row(line, f"{path}:{number}")
        check_row(row, required or {}, f"{path}:{number}")
        rows.append(row)
        if required and {"id", "k"} <= row.keys():
            first = numbers.setdefault(json.dumps([row.get(key) for key in ROW_KEY]), number)
            if first != number:
                raise InputError(f"{path}:{number}: id {row['id']!r}, k {row['k']} stands in it "
                                 f"twice, also in line {first}; delete one of the two lines")
    return rows

def _json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")

def refuse_link(path):
    """Raise InputError if `path`, to which something is to be written, is a link or no file: what
    lies behind a link belongs to somebody else."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise InputError(f"{path}: a link, or not a regular file; move it away")

class RowWriter:
    """Appends rows to a JSONL file, whole: a kill can lose the last row but never part it.

    `rows` holds what the file had before. A last line without line end, from a process that was
    killed inside a write, is cut off with a warning. Raises InputError for a damaged file, and for
    a link, which is not followed."""

    def __init__(self, path, required=None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        refuse_link(self.path)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        self.file = open(self.path, "a+b", buffering=0,
                         opener=lambda path, _: os.open(path, flags, 0o666))
        self.file.seek(0)
        whole = self.file.read()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            print(escape_control_chars(f"warning: {path}: the last line is incomplete, it is made "
                                       "again"), file=sys.stderr)
            self.file.truncate(end)
        self.rows = _parse_rows(whole[:end], self.path, required)

    def write(self, *rows):
        """Append rows in one system call, so that no crash parts rows that belong together."""
        data, start = _json_lines(rows), self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(data) != len(data):
                self.file.truncate(start)
                raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror}); make room and run "
                             "the same command again")

def remove_leftovers(folder, names, age=86400):
    """Remove what killed processes have left of the files `names` in a folder (see atomic_path), if
    it is older than `age` seconds: nobody is at work on it any more."""
    for name in names:
        for path in Path(folder).glob(f".{glob.escape(name)}.????????.tmp"):
            with contextlib.suppress(OSError):       # not there, or another process removes it too
                if time.time() - path.lstat().st_mtime >= age:
                    is_folder = path.is_dir() and not path.is_symlink()
                    shutil.rmtree(path) if is_folder else path.unlink()

def rows_to_do(path, rows, asked):
    """Return those of `asked`, traces that sample.py is to make, that the rows of a file lack.

    Raises InputError for a row of the file that was not asked so: of another prompt, label, seed or
    instruction. Traces that extras.retry added have a further k."""
    wanted, first = {trace_key(row): row for row in asked}, {row["id"]: row for row in asked}
    for row in rows:
        own = wanted.get(trace_key(row)) or {**first.get(row["id"], {}), "k": row["k"]}
        if any(own.get(key) != row.get(key) for key in (*PROMPT_KEYS, "id", "k", "seed", "steer")):
            raise InputError(f"{path}: id {row['id']}, k {row['k']} is of another run, or was "
                             "edited; delete that row, or use another --out")
    done = set(map(trace_key, rows))
    return [row for key, row in wanted.items() if key not in done]

@contextlib.contextmanager
def atomic_path(path):
    """Give a path in a new folder beside, known to nobody else, to write to, then rename it to
    `path`: readers see old or new, whole, and writers of one file do not meet."""
    path = Path(path)
    remove_leftovers(path.parent, [path.name])
    with tempfile.TemporaryDirectory(".tmp", f".{path.name}.", path.parent) as folder:
        beside = Path(folder) / path.name
        yield beside
        with open(beside, "rb") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)

def write_atomic(path, text):
    """Replace a file's text atomically."""
    with atomic_path(path) as beside:
        beside.write_text(text, "utf-8")

def write_rows(path, rows):
    """Replace a JSONL file's rows atomically."""
    write_atomic(path, _json_lines(rows).decode("utf-8"))
