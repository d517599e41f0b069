"""
Rows: JSON lines that stages read, append to and derive from each other.

    from data.rows import TRACE_KEYS, RowWriter, read_rows
    traces = read_rows("out/samples.jsonl", TRACE_KEYS)
"""
import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

from thinksafe import LABELS, InputError, escape_control_chars

PROMPT_KEYS = {"instruction": str, "prompt_label": str}
TRACE_KEYS = {"id": str, **PROMPT_KEYS, "response": str, "finish_reason": str, "k": int,
              "n_tokens": int}

def content_id(*parts):
    """Return 16 hex digits that depend on the text alone, whatever the order of the rows."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8"), digest_size=8).hexdigest()

def parse_row(line, where):
    """Parse one line of JSON (bytes) -> dict. Raises InputError that names `where`."""
    def reject(constant):
        raise ValueError(f"{constant} is not JSON")
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=reject)
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8")     # can be written
    except (ValueError, RecursionError) as e:
        raise InputError(f"{where}: not a line of JSON in UTF-8 ({e}); mend or delete that line")
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row

def check_row(row, required, where):
    """Raise InputError unless a row has the required {key: type}, some text and a known label."""
    for key, kind in required.items():
        value = row.get(key)
        if type(value) is not kind or key == "instruction" and not value.strip():
            raise InputError(f"{where}: {key} must be {kind.__name__} and not empty, it is "
                             f"{value!r}; found the keys {', '.join(row) or '(none)'}")
    if "prompt_label" in required and row["prompt_label"] not in LABELS:
        raise InputError(f"{where}: prompt_label is {row['prompt_label']!r}, not one of "
                         f"{', '.join(LABELS)}")

ROW_KEY = "id", "k", "when", "guard", "arm"      # what tells the rows of a stage's file apart

def read_rows(path, required=None, growing=False):
    """Read the rows (dicts) of a JSONL file.

    required: {key: type} that each row must have, such as TRACE_KEYS. growing: a stage may still be
    writing, so no file is no rows, and text after the last line end is left out.

    The rule: which of two rows is right is not guessed. Raises InputError for a missing file, one
    that names the line that is wrong, and one that names both lines of a trace that is there twice
    in a stage's file (with `required`)."""
    path = Path(path)
    if growing and not path.exists():
        return []
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})")
    rows, numbers = [], {}
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

class RowWriter:
    """Appends rows to a JSONL file, whole: a kill can lose the last row but never part it.

    `rows` holds what the file had before. A last line without line end, from a process that was
    killed inside a write, is cut off with a warning. Raises InputError for a damaged file."""

    def __init__(self, path, required=None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "ab", buffering=0)
        whole = self.path.read_bytes()
        end = whole.rfind(b"\n") + 1
        if end < len(whole):
            print(escape_control_chars(f"warning: {path}: the last line is incomplete, it is made "
                                       "again"), file=sys.stderr)
            self.file.truncate(end)
        self.rows = read_rows(self.path, required)

    def write(self, *rows):
        """Append rows in one system call, so that no crash parts rows that belong together."""
        data, start = _json_lines(rows), self.file.seek(0, os.SEEK_END)
        try:
            if self.file.write(data) != len(data):
                self.file.truncate(start)
                raise OSError(28, "No space left on device")
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror}); make room and run "
                             "the same command again")

@contextlib.contextmanager
def atomic_path(path):
    """Give a path beside to write to, then rename it to `path`: readers see old or new, whole."""
    beside = Path(f"{path}.tmp")
    try:
        if beside.is_symlink():                      # writing would go where the link leads
            beside.unlink()
        yield beside
        with open(beside, "rb") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:                                         # a part of a file would keep a full disk full
        beside.unlink(missing_ok=True)

def write_atomic(path, text):
    """Replace a file's text atomically."""
    with atomic_path(path) as beside:
        beside.write_text(text, "utf-8")

def write_rows(path, rows):
    """Replace a JSONL file's rows atomically."""
    write_atomic(path, _json_lines(rows).decode("utf-8"))
