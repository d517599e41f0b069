"""
Rows of a named set, a file, a URL, the Hugging Face hub or a run, in the form of this project.

    from data.sources import prompt_rows, training_rows
    prompt_rows("safechain")                          # id, instruction, prompt_label: for sample.py
    training_rows("my_rows.json", "vanilla_harmful")  # the same and response: for train.py

A source is one of:
    a name in SETS
    a .jsonl .json .csv .tsv .parquet file, or the URL of one
    owner/name[:config[:split]][@revision], a data set of the hub
    the folder of a run, of which guarded.jsonl is read
Columns are recognized by name, see data/columns.py. VERSIONS records which version of each source
this process has read. Data is read; code that comes with a data set is never run.
"""
import argparse
import codecs
import csv
import hashlib
import http.client
import io
import json
import random
import re
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

from data.columns import (
    CHAT_COLUMNS, LATER_STAGE_KEYS, PROMPT_COLUMNS, RESPONSE_COLUMNS, STAGE_KEYS, TRACE_STAGE_KEYS,
    VERDICT_KEYS, foreign_label_columns, has_value, name_columns, normalize_name, normalize_row,
    parts_beside)
from data.kinds import parse_json
from data.rows import GUARDED_KEYS, atomic_path, content_id, parse_row, read_rows
from thinksafe import LABELS, InputError, escape_control_chars, read_regular

GITHUB = "https://raw.githubusercontent.com"
HARMBENCH = f"{GITHUB}/centerforaisafety/HarmBench/8e1604d1171fe8a48d8febecd22f600e462bdcdd"
EOPSA = f"{GITHUB}/neuqrui/EOPSA/f152311667f66640df5ba2cbee84bcea6457e6ef/examples/safety_rl"
SAFEKEY = f"{GITHUB}/eric-ai-lab/SafeKey/b8327f4aab786065e427c61cbaacb54056a5b1e5"

# name -> (source, label of the prompts if the set has no column of labels)
SETS = {
    "safechain": ("UWNSL/SafeChain", None),                     # the paper's 40,000 prompts; gated
    "eopsa": (f"{EOPSA}/datasets/safechain-subset/train.jsonl", None),      # 5,856; Apache-2.0
    "wildjailbreak": ("allenai/wildjailbreak:train", None),     # 261,559; ODC-BY, gated
    "star1": ("UCSC-VLAA/STAR-1", "vanilla_harmful"),           # 1,000; Apache-2.0
    "safekey": (f"{SAFEKEY}/data/train/sft_mix_2k.json", "vanilla_harmful"),    # no licence
    "directrefusal": ("TianshengHuang/DirectRefusal", "vanilla_harmful"),   # 1,000; Apache-2.0
    "harmbench": (f"{HARMBENCH}/data/classifier_val_sets/text_behaviors_val_set.json",
                  "adversarial_harmful"),
    "strongreject": (f"{GITHUB}/alexandrasouly/strongreject/main/strongreject_dataset/"
                     "strongreject_dataset.csv", "vanilla_harmful"),
    "xstest": (f"{GITHUB}/paul-rottger/xstest/main/xstest_prompts.csv", "vanilla_benign"),
}
for student in ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B",
                "R1-Distill-1.5B", "R1-Distill-7B", "R1-Distill-8B"):
    for guard in ("", "-WildGuard"):            # traces that the authors of ThinkSafe released
        SETS[f"thinksafe-{student}{guard}".lower()] = f"Seanie-lee/ThinkSafe-{student}{guard}", None

UNGATED = {         # gated data set -> where the same prompts can be had without a login
    "UWNSL/SafeChain": "the set eopsa has some of the same prompts, ungated",
    "allenai/wildjailbreak":
        "walledai/WildJailbreak has the prompts of its evaluation part, ungated",
    "Idavidrein/gpqa": "no ungated set has the same questions",
}
VERSIONS = {}       # source -> commit of a hub data set, or first 16 hex digits of a file's sha256

def take_versions():
    """Return {source: version} of what was loaded since the last call; a stage records it."""
    taken = dict(VERSIONS)
    VERSIONS.clear()
    return taken

class Unavailable(InputError):
    """A data set that cannot be had; why: gated, no network, not found or not readable."""

    def __init__(self, message, why):
        super().__init__(message)
        self.why = why

# ---------------------------------------------------------------------------------------------
# Files

def decode(data, path):
    """Decode a file's bytes: UTF-8, or UTF-16 with a byte order mark. Raises InputError for null
    characters: such a file is UTF-16 without a mark, or no text."""
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if marked else "utf-8-sig")
    if "\0" in text:
        raise InputError(f"{path}: null characters in it; save it as UTF-8")
    return text

def read_csv(data, path, delimiter=None):
    """Read the rows of a CSV file as dicts of strings.

    delimiter: a comma by default or, where the first line has none, the semicolon or tab in it."""
    # Not pandas: it pads a short row and cuts a long first row without an error.
    csv.field_size_limit(2**31 - 1)
    text = decode(data, path)
    first_line = text.partition("\n")[0]
    delimiter = delimiter or next((c for c in ",;\t" if c in first_line), ",")
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        check_columns(reader.fieldnames or (), path)
        for row in reader:
            rows.append(row)
            if None in row or None in row.values():
                raise InputError(f"{path}, row {len(rows)}: not as many fields as the first line "
                                 f"has ({len(reader.fieldnames)})")
    except csv.Error as e:
        raise InputError(f"{path}, row {len(rows) + 1}: not CSV ({e})")
    return rows

def check_columns(names, path):
    """Raise InputError for two columns of one name, of which a row could hold only the last."""
    for name, n in Counter(names).items():
        if n > 1 and name.strip():
            raise InputError(f"{path}: {n} columns are called {name!r}; rename or delete all but "
                             "one of them")

SPLITS = re.compile("(train|test|validation|valid|val|dev|eval)(?![a-z])", re.I)

def read_json(data, path):
    """Read a list of objects. The lists of an object of lists (HarmBench's form) are joined; where
    they are the splits of a data set (train, test) the only one is taken, several are refused."""
    rows = parse_json(decode(data, path).encode("utf-8"))
    if isinstance(rows, dict) and all(isinstance(group, list) for group in rows.values()):
        splits = [name for name in rows if SPLITS.match(name)]
        if len(rows) > 1 and (len(splits) == len(rows) or any(map(SPLITS.fullmatch, splits))):
            raise InputError(f"{path}: holds {', '.join(rows)}, which are not read as one; put the "
                             "rows that you mean into a file of their own")
        rows = [row for group in rows.values() for row in group]
    if not isinstance(rows, list):
        raise InputError(f"{path}: not a list of objects")
    return [parse_row(json.dumps(row).encode(), f"{path}, row {i}")
            for i, row in enumerate(rows, 1)]

def read_parquet(data, path):
    """Read the rows of a parquet file, see as_json."""
    from pyarrow import parquet
    table = parquet.read_table(io.BytesIO(data))
    check_columns(table.column_names, path)
    return as_json(table.to_pylist())

def as_json(rows):
    """Convert rows of Arrow values to what JSON can hold: bytes become text, see bytes_as_text,
    dates and decimals too, nan becomes None."""
    return [json.loads(json.dumps(row, default=bytes_as_text), parse_constant=lambda _: None)
            for row in rows]

def bytes_as_text(value):
    """Decode bytes as UTF-8. Other bytes, an image for example, become an object that says so."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return decode(value, "")
    except (UnicodeDecodeError, InputError):
        return {"bytes that are not text in UTF-8": len(value)}

READERS = {
    ".jsonl": lambda data, path: read_rows(path),
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".tsv": lambda data, path: read_csv(data, path, "\t"),
}

def read_file(path):
    """Read the rows of a file as dicts; raises InputError that names the file and the row."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise InputError(f"{path}: the name of a file of rows ends in {' '.join(READERS)}")
    try:
        rows = READERS[suffix](read_regular(path), path)
    except InputError:
        raise
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})")
    except (ValueError, RuntimeError, TypeError, ArithmeticError, LookupError) as e:
        # from decoding UTF-8, JSON and Arrow, whose dates may be beyond Python's
        hint = "; JSON lines go into .jsonl" if suffix == ".json" else ""
        raise InputError(f"{path}: not a {suffix} file ({e}){hint}")
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return rows

# ---------------------------------------------------------------------------------------------
# URLs and the hub

# owner/name[:config[:split]][@revision]
HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]*))?(?::([\w.-]+))?(?:@([\w./-]+))?")

def download(url):
    """Return the path of a URL's file, downloaded into the hub's cache folder the first time."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_OFFLINE
    path = Path(HF_HOME) / "thinksafe" / content_id(url) / url.rsplit("/", 1)[-1]
    if path.exists():
        return path
    try:
        if HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        with urllib.request.urlopen(url, timeout=30) as response:
            data = response.read()
    except urllib.error.HTTPError as e:
        raise Unavailable(f"{url}: {e.code} {e.reason}", "not found")
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise Unavailable(f"{url}: no network ({e}); download it elsewhere and give the file",
                          "no network")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path

def hub_rows(source, name, config, split, revision):
    """Load the rows of a hub data set. A split that is not named is train, or the only one."""
    import datasets
    try:
        builder = datasets.load_dataset_builder(name, config or None, revision=revision)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except Exception as e:
        raise hub_error(name, e)
    VERSIONS[source] = commit = str(builder.hash)
    if re.fullmatch("[0-9a-f]{40}", revision or "") and commit != revision:
        # without network `datasets` takes whatever commit is in the cache
        raise Unavailable(f"{name}: no network, and the cache has commit {commit}, not {revision}",
                          "no network")
    split = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if split not in splits:
        raise InputError(f"{source}: no split {split}; "
                         f"name one of {', '.join(splits)} as {name}:{config or ''}:SPLIT")
    return as_json(splits[split].to_list())

def hub_error(name, error):
    """Turn an exception of `datasets` into Unavailable: one line that says what to do."""
    kinds = set()
    cause = error
    while cause:
        kinds |= {kind.__name__ for kind in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    if "GatedRepoError" in kinds or "gated dataset" in str(error):
        hint = f"; {UNGATED[name]}" if name in UNGATED else ""
        return Unavailable(f"{name} is gated: open https://huggingface.co/datasets/{name} and "
                           f"accept its terms, then run `hf auth login`{hint}", "gated")
    if kinds & {"ConnectionError", "TransportError"}:
        return Unavailable(f"{name}: no network, and no copy in the hub's cache ({error}); "
                           "download it elsewhere and give the file", "no network")
    if "DatasetNotFoundError" in kinds:
        return Unavailable(f"{error} If it is private, run `hf auth login`", "not found")
    return Unavailable(f"{name}: cannot be read from the hub ({type(error).__name__}: {error})",
                       "not readable")

def load_rows(source):
    """Load the rows of a source (see the top of this file) as dicts and record it in VERSIONS.

    Raises InputError, or Unavailable for a URL or a data set that cannot be had.
    """
    source = str(source)
    path = Path(source)
    hub_name = HUB_NAME.fullmatch(source)
    if source.startswith(("https://", "http://")):
        path = download(source)
    elif path.is_dir():
        path = path / "guarded.jsonl"
        read_rows(path, GUARDED_KEYS)                # each with its verdict
    elif path.exists() or path.suffix.lower() in READERS:
        pass
    elif hub_name:
        return name_columns(hub_rows(source, *hub_name.groups()), source)
    else:
        raise InputError(f"{source}: no such file; name one, a URL, owner/name of a hub data set, "
                         f"or one of {', '.join(SETS)}")
    rows = name_columns(read_file(path), source)
    VERSIONS[source] = hashlib.sha256(read_regular(path)).hexdigest()[:16]
    return rows

# ---------------------------------------------------------------------------------------------
# Rows of any known set in the form of this project

def normalized_rows(source, label, column=None):
    """Return [(where, normalized row, row of the source), ...] of a name in SETS or any other
    source. label, column: those of --label and --prompt-column. What they outrank is said."""
    source, label_of_set = SETS.get(str(source), (source, None))
    label, found, alone = label or label_of_set, [], {}
    rows = load_rows(source)
    foreign = foreign_label_columns(rows) if label else []
    if foreign:
        report(source, f"not read, as no word there is a label of prompts: {', '.join(foreign)}")
    for i, row in enumerate(rows, 1):
        where = f"{source}, row {i}"
        same = [c for c in row if column and normalize_name(c) == normalize_name(column)]
        named = same[0] if same else column
        known = {key: value for key, value in row.items() if key not in foreign}
        found.append((where, normalize_row(known, label, where, named), row))
        if named:
            beside = [c for c in PROMPT_COLUMNS + CHAT_COLUMNS if has_value(row, c)]
            beside += parts_beside(row, found[-1][1]["instruction"])
            alone |= dict.fromkeys(c for c in beside if c != named)
    if alone:
        report(source, f"{column} alone is the prompt, without {', '.join(alone)}")
    if Path(source).is_dir():        # in an order that does not depend on what was finished first
        found.sort(key=lambda item: (str(item[2].get("id")), str(item[2].get("k"))))
    return found

def without_stage_keys(found, keys, source):
    """Drop keys from rows [(where, row, row of the source), ...].

    The rule: a column with the name of something that a stage writes (STAGE_KEYS) is dropped where
    rows enter, and a line says so; only training_rows reads what sample.py and guard.py wrote."""
    dropped = dict.fromkeys(key for _, row, of_source in found for key in row
                            if key in keys and key in of_source)
    if dropped:
        report(source, f"not read, as stages write such columns: {', '.join(dropped)}")
    return [(where, {key: value for key, value in row.items() if key not in keys}, of_source)
            for where, row, of_source in found]

def prompt_rows(source, label=None, column=None):
    """Return prompts for sample.py: rows with id, instruction and prompt_label.

    label: the label of prompts that have none of their own. column: what alone is the prompt.
    A prompt that is there twice is dropped with a notice that says what else of the two differs.
    Raises InputError, also for two different prompts under one id, or a prompt with two answers.
    """
    rows, repeats = {}, []
    found = [(where, {key: value for key, value in row.items() if key != "response"}, of_source)
             for where, row, of_source in normalized_rows(source, label, column)]
    found = without_stage_keys(found, STAGE_KEYS, source)
    for where, row, of_source in found:
        for key in "set", "task":
            if not isinstance(row.get(key), str | None):
                raise InputError(f"{where}: {key} must be text, not {row[key]!r}")
        row = {"id": content_id(row["prompt_label"], row["instruction"]), **row}
        first, first_of_source = rows.setdefault(row["id"], (row, of_source))
        if any(first[key] != row[key] for key in ("prompt_label", "instruction")):
            raise InputError(f"{where}: id {row['id']!r} is used by another prompt before it; "
                             "ids must be unique")
        if "set" in row and any(first.get(k) != row.get(k) for k in ("set", "task", "answer")):
            raise InputError(f"{where}: the prompt is there before, with another set, task or "
                             "answer; delete one of them")
        if first is not row:
            repeats.append((first_of_source, of_source))
    report_dropped(source, "prompts", repeats, TRACE_STAGE_KEYS)
    return [row for row, _ in rows.values()]

def training_rows(source, label=None, column=None):
    """Return rows for train.py: id, instruction, prompt_label and response; a trace has more keys.

    label: the label of prompts that have none of their own. column: what alone is the prompt.
    A row is repeated if all that is read of it is equal, a trace only if its id and k are too.
    Repeated rows are dropped with a notice. Raises InputError, also for two traces of one id and k.
    """
    rows, repeats = {}, []
    also_read = ("prompt_label", "eos", *VERDICT_KEYS, "summary_end_idx", "next_sentence_end_idx")
    found = normalized_rows(source, label, column)
    traces = any("finish_reason" in row for _, row, _ in found)      # else another tool's eos
    unread = LATER_STAGE_KEYS if traces else LATER_STAGE_KEYS | {"eos"}
    for where, row, of_source in without_stage_keys(found, unread, source):
        if not isinstance(row.get("response"), str):
            raise InputError(f"{where}: no text under {', '.join(RESPONSE_COLUMNS)}: it is "
                             f"{row.get('response')!r:.80}; found the keys {', '.join(of_source)}")
        if "steer" in row and "response_label" not in row:
            raise InputError(f"{where}: a trace that no guard has judged; run guard.py first")
        if type(row.get("k", 0)) is not int:
            raise InputError(f"{where}: k is {row['k']!r}, not a whole number")
        read = row["instruction"], row["response"], str([row.get(key) for key in also_read])
        default_id = content_id(row["prompt_label"], row["instruction"], row["response"])
        row["id"] = row.get("id", default_id)
        # the same words drawn twice count twice
        key = (row["id"], row["k"]) if "k" in row else read
        first, first_of_source, first_read, first_where = rows.setdefault(
            key, (row, of_source, read, where))
        if first_read != read:
            raise InputError(f"{where}: id {row['id']!r} and k {row['k']} are those of another "
                             f"trace, {first_where}")
        if first is not row:
            repeats.append((first_of_source, of_source))
    report_dropped(source, "rows", repeats)
    return [row for row, *_ in rows.values()]

def report(source, text):
    print(escape_control_chars(f"{source}: {text}"), file=sys.stderr)

def report_dropped(source, what, repeats, expected=()):
    """Say how many rows were dropped, and in which columns they differ from the row that stays.

    repeats: [(row that stays, dropped row), ...] of the source. expected: columns not to name."""
    differ = {}
    for first, row in repeats:
        differ |= dict.fromkeys(key for key in {**first, **row} if row.get(key) != first.get(key))
    names = [key for key in differ if key not in ("id", *expected)]
    if repeats:
        also = f"; they differ in {', '.join(names)}" if names else ""
        report(source, f"{len(repeats)} repeated {what} dropped{also}")

def label_counts(rows):
    """Return, for example, '3 rows (1 vanilla_harmful, 2 vanilla_benign)'."""
    counts = Counter(row["prompt_label"] for row in rows)
    parts = [f"{counts[label]:,} {label}" for label in LABELS if counts[label]]
    return f"{len(rows):,} rows ({', '.join(parts)})"

def read_training_rows(args, judged, read=training_rows):
    """Read the rows of args.data or, for None, those that guard.py has written into args.out.

    args: has the flags of add_column_flags too. judged: guard.py's entry in the run record. read:
    training_rows, or prompt_rows where no responses are needed. Raises InputError when guard.py's
    rows are asked for and not complete."""
    if args.data is None and not judged.get("finished"):
        raise InputError(f"{args.out}: guard.py has not finished there; run it first, or give rows "
                         "with --data FILE")
    rows = read(args.data or args.out, args.label, args.prompt_column)
    if args.data is None and read is training_rows and len(rows) < judged.get("rows", 0):
        raise InputError(f"{args.out}/guarded.jsonl: {len(rows)} of the {judged['rows']} rows that "
                         "guard.py wrote are there; run it again, or give rows with --data FILE")
    return rows

def balanced_subset(examples, n, seed):
    """Draw n rows or examples, equally many of each `label` as far as there are."""
    drawn, ranked = Counter(), []
    for example in random.Random(seed).sample(examples, len(examples)):
        drawn[example["label"]] += 1
        ranked.append((drawn[example["label"]], example))
    return [example for _, example in sorted(ranked, key=lambda pair: pair[0])[:n]]

def draw_examples(examples, skipped, limit, seed):
    """Return at most `limit` of the examples (None: all), and count the others in skipped. Raises
    InputError when there are none."""
    if not examples:
        raise InputError(f"none of the rows can be trained on ({dict(skipped)})")
    if limit and limit < len(examples):
        skipped["not_drawn"] = len(examples) - limit
        examples = balanced_subset(examples, limit, seed)
    return examples

# ---------------------------------------------------------------------------------------------
# Shards: a part of the prompts

def shard_of(text):
    """An argparse type: "2/4" -> (2, 4), the second of four parts."""
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise argparse.ArgumentTypeError(f"{text} is not one of 1/N, ..., N/N")
    return i, n

def add_shard_flag(p):
    p.machine.add_argument("--shard", type=shard_of, metavar="I/N",
                           help="only the I-th of N parts of the prompts, in a folder of its own; "
                           "then: python -m extras.merge OUT OUT/shard-*")

def owns(shard, prompt_id):
    """Tell whether a prompt is in a shard (i, n), by a hash of its id. None has all prompts."""
    return shard is None or int(content_id(prompt_id), 16) % shard[1] == shard[0] - 1
