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
Columns are recognized by name. VERSIONS records which version of each source this process has read.
Data is read; code that comes with a data set is never run.
"""
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

from data.rows import PROMPT_KEYS, atomic_path, check_row, content_id, parse_row, read_rows
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

class Unavailable(InputError):
    """A data set that cannot be had; why: gated, no network, not found or not readable."""

    def __init__(self, message, why):
        super().__init__(message)
        self.why = why

# ---------------------------------------------------------------------------------------------
# Files

def read_csv(data, path, delimiter=","):
    """Read the rows of a CSV file as dicts of strings."""
    # Not pandas: it pads a short row and cuts a long first row without an error.
    csv.field_size_limit(2**31 - 1)
    text = io.StringIO(data.decode("utf-8-sig"), newline="")
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    rows = []
    try:
        for row in reader:
            rows.append(row)
            if None in row or None in row.values():
                raise InputError(f"{path}, row {len(rows)}: not as many fields as the first line "
                                 f"has ({len(reader.fieldnames)})")
    except csv.Error as e:
        raise InputError(f"{path}, row {len(rows) + 1}: not CSV ({e})")
    return rows

def read_json(data, path):
    """Read a list of objects. The lists of an object of lists (HarmBench's form) are joined."""
    rows = json.loads(data.decode("utf-8-sig"))
    if isinstance(rows, dict) and all(isinstance(group, list) for group in rows.values()):
        rows = [row for group in rows.values() for row in group]
    if not isinstance(rows, list):
        raise InputError(f"{path}: not a list of objects")
    return [parse_row(json.dumps(row).encode(), f"{path}, row {i}")
            for i, row in enumerate(rows, 1)]

def read_parquet(data, path):
    """Read the rows of a parquet file, see as_json."""
    from pyarrow import parquet
    return as_json(parquet.read_table(io.BytesIO(data)).to_pylist())

def as_json(rows):
    """Convert rows of Arrow values to what JSON can hold: dates become text, nan becomes None."""
    return [json.loads(json.dumps(row, default=str), parse_constant=lambda _: None)
            for row in rows]

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
    except (ValueError, RuntimeError) as e:      # from decoding UTF-8, JSON and Arrow
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
    is_run = path.is_dir()
    if source.startswith(("https://", "http://")):
        path = download(source)
    elif is_run:
        path = path / "guarded.jsonl"
    elif path.exists() or path.suffix.lower() in READERS:
        pass
    elif hub_name:
        return hub_rows(source, *hub_name.groups())
    else:
        raise InputError(f"{source}: no such file; name one, a URL, owner/name of a hub data set, "
                         f"or one of {', '.join(SETS)}")
    rows = read_file(path)
    VERSIONS[source] = hashlib.sha256(read_regular(path)).hexdigest()[:16]
    if is_run:      # in an order that does not depend on which trace was finished first
        rows.sort(key=lambda row: (str(row.get("id")), str(row.get("k"))))
    return rows

# ---------------------------------------------------------------------------------------------
# Rows of any known set in the form of this project

PROMPT_COLUMNS = ("instruction", "prompt", "question", "problem", "adversarial", "vanilla",
                  "forbidden_prompt", "test_case", "Behavior", "Question")
LABEL_COLUMNS = ("prompt_label", "safechain_label", "data_type", "label")
LABEL_WORDS = {label: label for label in LABELS} | {
    "safe": "vanilla_benign", "unsafe": "vanilla_harmful",              # XSTest
    "overreject": "vanilla_benign", "safety": "vanilla_harmful",        # EOPSA
}
# keys that sample.py and guard.py add to a prompt
STAGE_KEYS = {"response", "k", "seed", "steer", "finish_reason", "n_tokens", "n_prompt_tokens",
              "response_label", "p_unsafe", "guard", "reason", "keep"}
# the last two say where the key sentence of SafeKey's rows is
KEPT_KEYS = ("id", "source", "summary_end_idx", "next_sentence_end_idx")
DIRECT_REFUSAL = "<think>\nI should not answer this question!\n</think>\n\n"

def has_value(row, column):
    return row.get(column) not in (None, "")

def find_prompt(row, where):
    """Return the row's prompt, whichever of PROMPT_COLUMNS has it; raises InputError."""
    for column in PROMPT_COLUMNS:
        if isinstance(row.get(column), str) and row[column].strip():
            prompt = row[column]
            if column == "Behavior" and row.get("ContextString"):       # HarmBench
                prompt = f"{row['ContextString']}\n\n---\n\n{prompt}"
            return prompt
    raise InputError(f"{where}: no text under {', '.join(map(repr, PROMPT_COLUMNS))}; "
                     f"found the keys {', '.join(row)}")

def find_label(row, label, where):
    """Return the row's label, one of LABELS, or `label` if the row has none; raises InputError."""
    if row.get("source") == "4o_rewrite":        # SafeKey marks its benign rows only so
        return "vanilla_benign"
    words = {column: row[column] for column in LABEL_COLUMNS if has_value(row, column)}
    for word in words.values():
        if isinstance(word, str) and word in LABEL_WORDS:
            return LABEL_WORDS[word]
    if words:
        found = " and ".join(f"{column} is {word!r}" for column, word in words.items())
        raise InputError(f"{where}: {found}, not one of {', '.join(LABEL_WORDS)}")
    if not label:
        raise InputError(f"{where}: no label ({', '.join(LABEL_COLUMNS)}); "
                         "say with --label what such prompts are")
    return label

def find_response(row):
    """Return the row's response, with both think tags if it has reasoning, or None."""
    response = row.get("response", row.get("completion"))
    if not isinstance(response, str) or "finish_reason" in row:         # a trace stays as it is
        return response
    if "adversarial" in row:                     # WildJailbreak's completions have no reasoning
        return "<think>\n\n</think>\n\n" + response
    if "</think>" in response and "<think>" not in response:            # SafeChain
        return "<think>\n" + response
    return response

def normalize_row(row, label, where):
    """Convert a row of any known set to our keys: instruction, prompt_label and, if any, response.

    A row that has these keys keeps all others too, any other row KEPT_KEYS. Raises InputError that
    says what is missing.
    """
    response = find_response(row)
    if "refusal" in row and not any(has_value(row, column) for column in PROMPT_COLUMNS):
        text = str(row["refusal"])               # DirectRefusal
        parts = re.fullmatch(r"\s*Question:\s*(.*?)\s+Answer:\s*(.*?)\s*", text, re.DOTALL)
        if not parts:
            raise InputError(f"{where}: 'refusal' is not 'Question: ... Answer: ...'")
        row = {**row, "instruction": parts[1]}
        response = DIRECT_REFUSAL + parts[2]
    if not {"instruction", "prompt_label"} <= row.keys():
        kept = {key: row[key] for key in KEPT_KEYS if key in row}
        row = {"instruction": find_prompt(row, where),
               "prompt_label": find_label(row, label, where), **kept}
    check_row(row, PROMPT_KEYS, where)
    if not has_value(row, "id"):
        row = {key: value for key, value in row.items() if key != "id"}
    elif not isinstance(row["id"], str | int):
        raise InputError(f"{where}: id must be text or a whole number, not {row['id']!r}")
    return row if response is None else {**row, "response": response}

def normalized_rows(source, label):
    """Return [(where, normalized row), ...] of a name in SETS or any other source."""
    source, label_of_set = SETS.get(str(source), (source, None))
    found = []
    for i, row in enumerate(load_rows(source), 1):
        where = f"{source}, row {i}"
        found.append((where, normalize_row(row, label or label_of_set, where)))
    return found

def prompt_rows(source, label=None):
    """Return prompts for sample.py: rows with id, instruction and prompt_label.

    label: the label of prompts that have none of their own.
    Repeated prompts are dropped with a notice. Raises InputError, also for two different prompts
    under one id.
    """
    rows = {}
    found = normalized_rows(source, label)
    for where, row in found:
        row = {"id": content_id(row["prompt_label"], row["instruction"]),
               **{key: value for key, value in row.items() if key not in STAGE_KEYS}}
        row["id"] = str(row["id"])
        first = rows.setdefault(row["id"], row)
        if any(first[key] != row[key] for key in ("prompt_label", "instruction")):
            raise InputError(f"{where}: id {row['id']!r} is used by another prompt before it; "
                             "ids must be unique")
    report_dropped(source, "prompts", len(found) - len(rows))
    return list(rows.values())

def training_rows(source, label=None):
    """Return rows for train.py: id, instruction, prompt_label and response; a trace has more keys.

    label: the label of prompts that have none of their own.
    Repeated rows are dropped with a notice. A trace is repeated if it has the same id and k, any
    other row if it has the same prompt and response. Raises InputError.
    """
    rows = {}
    found = normalized_rows(source, label)
    for where, row in found:
        if not isinstance(row.get("response"), str):
            raise InputError(f"{where}: no text under 'response'")
        if "steer" in row and "response_label" not in row:
            raise InputError(f"{where}: a trace that no guard has judged; run guard.py first")
        if type(row.get("k", 0)) is not int:
            raise InputError(f"{where}: k is {row['k']!r}, not a whole number")
        default_id = content_id(row["prompt_label"], row["instruction"], row["response"])
        row["id"] = str(row.get("id", default_id))
        # the same words drawn twice count twice
        key = (row["id"], row["k"]) if "k" in row else (row["instruction"], row["response"])
        rows.setdefault(key, row)
    report_dropped(source, "rows", len(found) - len(rows))
    return list(rows.values())

def report_dropped(source, what, n):
    if n:
        print(escape_control_chars(f"{source}: {n} repeated {what} dropped"), file=sys.stderr)

def label_counts(rows):
    """Return, for example, '3 rows (1 vanilla_harmful, 2 vanilla_benign)'."""
    counts = Counter(row["prompt_label"] for row in rows)
    parts = [f"{counts[label]:,} {label}" for label in LABELS if counts[label]]
    return f"{len(rows):,} rows ({', '.join(parts)})"

def read_training_rows(source, label, out, judged, read=training_rows):
    """Read the rows of a source or, for None, those that guard.py has written into the folder out.

    judged: guard.py's entry in the run record. read: training_rows, or prompt_rows where no
    responses are needed. Raises InputError when guard.py's rows are asked for and not complete."""
    if source is None and not judged.get("finished"):
        raise InputError(f"{out}: guard.py has not finished there; run it first, or give rows with "
                         "--data FILE")
    rows = read(source or out, label)
    if source is None and read is training_rows and len(rows) < judged.get("rows", 0):
        raise InputError(f"{out}/guarded.jsonl: {len(rows)} of the {judged['rows']} rows that "
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
