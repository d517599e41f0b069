"""
Prompts, training rows and benchmarks, by name or by path.

    from data import prompt_rows, training_rows, evaluation_rows
    prompt_rows("safechain")                                  # for sample.py: id, instruction, prompt_label
    training_rows("my_star1.json", "vanilla_harmful")         # for train.py: and response
    evaluation_rows(["xstest", "gsm8k=my.jsonl"])             # for eval.py: and set; for reasoning task and answer

A source is a name of SETS, a .jsonl .json .csv .tsv .parquet file or the URL of one, a data set of the Hugging
Face hub: owner/name[:config[:split]][@revision], or the folder of a run: its guarded.jsonl. A file that a stage wrote in
shards is read with all of them. Columns are recognised by their names. VERSIONS says what this process has read. Data is
read; code of a data set is never run.
"""
import csv
import hashlib
import http.client
import io
import json
import re
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from thinksafe import LABELS, InputError, check_row, content_id, inert, parse_row, read_rows, read_shards, replacing, shard_files


class EvalSet(NamedTuple):
    """An evaluation set as the paper uses it, and the fixed part of it that a short evaluation takes."""
    source: str
    set: str                      # harm_..., over_refusal or reasoning
    label: str
    full: int                     # rows that the paper uses
    short: int
    licence: str
    prompt: str = "{problem}"     # what the model is asked (SkyThought's prompts), without a system prompt


# The short evaluation is to end within half an hour on a 4090, for Qwen3-0.6B before and after training, one trace a prompt.
# Decoding reads the cache: 112 KiB a token in bf16; at 1.0 TB/s and 65% of the floor that is 5.3e6 tokens of context a second,
# once it outweighs the weights. A trace of L tokens after p of prompt reads L (p + L/2) of them. Lengths are assumed:
#   harm    3 x 100 of L   650, p 200:  19 s      xstest 250 of L    600, p  30:   9 s     gsm8k 200 of L 1,500, p 150:  51 s
#   math500     100 of L 4,000, p 120: 160 s      aime24  15 of L 12,000, p 150: 209 s     gpqa   50 of L 6,000, p 300: 187 s
# That is 635 s a model, 21 minutes for both; the rest is for loading, the judge and the last long traces.
GITHUB = "https://raw.githubusercontent.com"
MATH = r"Please reason step by step, and put your final answer within \boxed{}. {problem}"
EVAL_SETS = {
    "harmbench": EvalSet(                                             # the attacked cases of its classifier's validation set
        f"{GITHUB}/centerforaisafety/HarmBench/8e1604d1171fe8a48d8febecd22f600e462bdcdd/data/classifier_val_sets/"
        "text_behaviors_val_set.json", "harm_harmbench", "adversarial_harmful", 602, 100, "MIT"),
    "strongreject": EvalSet(
        f"{GITHUB}/alexandrasouly/strongreject/main/strongreject_dataset/strongreject_dataset.csv",
        "harm_strongreject", "vanilla_harmful", 313, 100, "MIT"),
    "xstest": EvalSet(
        f"{GITHUB}/paul-rottger/xstest/main/xstest_prompts.csv", "over_refusal", "vanilla_benign", 250, 250, "CC-BY-4.0"),
    "wildjailbreak": EvalSet(                                         # ungated; the same rows as allenai/wildjailbreak:eval
        "walledai/WildJailbreak", "harm_wildjailbreak", "adversarial_harmful", 2000, 100, "ODC-BY"),
    "gsm8k": EvalSet("openai/gsm8k:main:test", "reasoning", "vanilla_benign", 1319, 200, "MIT", (
        "Given the following problem, reason and give a final answer to the problem.\nProblem: {problem}\n"
        'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.')),
    "math500": EvalSet("HuggingFaceH4/MATH-500::test", "reasoning", "vanilla_benign", 500, 100, "MIT", MATH),
    "aime24": EvalSet("AI-MO/aimo-validation-aime", "reasoning", "vanilla_benign", 30, 15, "not stated", MATH),
    "gpqa": EvalSet("Idavidrein/gpqa:gpqa_diamond", "reasoning", "vanilla_benign", 198, 50, "CC-BY-4.0", (
        r"Return your final response within \boxed{} and only include the letter choice (A, B, C, or D) as your final response. "
        "{problem}")),
}

# Sets to sample from or to train on. name -> (source, label of its prompts where it has no column of labels)
SETS = {
    "safechain": ("UWNSL/SafeChain", None),                           # 40,000, those of the paper; gated
    "eopsa": (f"{GITHUB}/neuqrui/EOPSA/f152311667f66640df5ba2cbee84bcea6457e6ef/examples/safety_rl/datasets/"
              "safechain-subset/train.jsonl", None),                  # 5,856, mostly SafeChain's; Apache-2.0
    "wildjailbreak": ("allenai/wildjailbreak:train", None),           # 261,559; ODC-BY, gated
    "star1": ("UCSC-VLAA/STAR-1", "vanilla_harmful"),                 # 1,000; Apache-2.0
    "safekey": (f"{GITHUB}/eric-ai-lab/SafeKey/b8327f4aab786065e427c61cbaacb54056a5b1e5/data/train/sft_mix_2k.json",
                "vanilla_harmful"),                                   # STAR-1 and benign ones; no licence
    "directrefusal": ("TianshengHuang/DirectRefusal", "vanilla_harmful"),     # 1,000; Apache-2.0
    **{name: (EVAL_SETS[name].source, EVAL_SETS[name].label) for name in ("harmbench", "strongreject", "xstest")},
    **{f"thinksafe-{student}{guard}".lower(): (f"Seanie-lee/ThinkSafe-{student}{guard}", None)        # the authors' traces
       for student in ("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "R1-Distill-1.5B", "R1-Distill-7B", "R1-Distill-8B")
       for guard in ("", "-WildGuard")},
}
UNGATED = {                                                           # gated data set -> where its prompts are to be had
    "UWNSL/SafeChain": "the set eopsa has some of the same prompts, ungated",
    "allenai/wildjailbreak": "walledai/WildJailbreak has the prompts of its evaluation part, ungated",
    "Idavidrein/gpqa": "no ungated set has the same questions",
}

# ---------------------------------------------------------------------------------------------
# Rows of files, URLs and the hub

VERSIONS = {}                     # {source: commit of a hub data set, or the first 16 hex digits of a file's sha256}


class Unavailable(InputError):
    """A data set that cannot be had here; why: gated, no network, not found, or not readable."""

    def __init__(self, message, why):
        super().__init__(message)
        self.why = why


def _csv(data, path, delimiter=","):
    csv.field_size_limit(2**31 - 1)
    reader, rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True), []
    try:
        for row in reader:
            rows.append(row)
            if None in row or None in row.values():
                raise InputError(f"{path}, row {len(rows)}: not as many fields as the first line has ({len(reader.fieldnames)})")
    except csv.Error as e:
        raise InputError(f"{path}, row {len(rows) + 1}: not CSV ({e})")
    return rows


def _json(data, path):
    """A list of objects, or an object of such lists (HarmBench), which are put one after another."""
    rows = json.loads(data.decode("utf-8-sig"))
    if isinstance(rows, dict) and all(isinstance(group, list) for group in rows.values()):
        rows = [row for group in rows.values() for row in group]
    if not isinstance(rows, list):
        raise InputError(f"{path}: not a list of objects")
    return [parse_row(json.dumps(row).encode(), f"{path}, row {i}") for i, row in enumerate(rows, 1)]


def _plain(table):
    """Rows of an Arrow table as JSON has them: dates become text, nan null."""
    return [json.loads(json.dumps(row, default=str), parse_constant=lambda _: None) for row in table.to_pylist()]


def _parquet(data, path):
    from pyarrow import parquet
    return _plain(parquet.read_table(io.BytesIO(data)))


READERS = {".jsonl": lambda data, path: read_rows(path), ".json": _json, ".csv": _csv, ".parquet": _parquet,
           ".tsv": lambda data, path: _csv(data, path, "\t")}


def read_table(path):
    """Rows of a file as dicts, by its suffix (a key of READERS). InputError names the file and, where there is one, the row."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise InputError(f"{path}: the name of a file of rows ends in {' '.join(READERS)}")
    try:
        rows = READERS[suffix](path.read_bytes(), path)
    except InputError:
        raise
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})")
    except (ValueError, RuntimeError) as e:                           # of UTF-8, JSON and Arrow
        raise InputError(f"{path}: not a {suffix} file ({e})" + "; JSON lines go into .jsonl" * (suffix == ".json"))
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return rows


def _download(url):
    """Path of a URL's file in the hub's cache folder, where it stays after the first time."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_OFFLINE
    path = Path(HF_HOME) / "thinksafe" / content_id(url) / url.rsplit("/", 1)[-1]
    if not path.exists():
        try:
            if HF_HUB_OFFLINE:
                raise OSError("HF_HUB_OFFLINE is set")
            with urllib.request.urlopen(url, timeout=30) as response:
                data = response.read()
        except urllib.error.HTTPError as e:
            raise Unavailable(f"{url}: {e.code} {e.reason}", "not found")
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise Unavailable(f"{url}: no network ({e}); download it elsewhere and give the file", "no network")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_bytes(data)
    return path


def _hub(source, name, config, split, revision):
    """Rows of a data set of the hub. A split that is not named is train, or the only one."""
    import datasets
    try:
        builder = datasets.load_dataset_builder(name, config or None, revision=revision)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    except Exception as e:
        raise _hub_error(name, e)
    VERSIONS[source] = commit = str(builder.hash)
    if re.fullmatch("[0-9a-f]{40}", revision or "") and commit != revision:          # without network: whatever is in the cache
        raise Unavailable(f"{name}: no network, and the cache has commit {commit}, not {revision}", "no network")
    split = split or (next(iter(splits)) if len(splits) == 1 else "train")
    if split not in splits:
        raise InputError(f"{source}: no split {split}; name one of {', '.join(splits)} as {name}:{config or ''}:SPLIT")
    return _plain(splits[split].with_format("arrow")[:])


def _hub_error(name, e):
    """What `datasets` raised, as one line that says what to do."""
    chain = [e]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    if "GatedRepoError" in kinds or "gated dataset" in str(e):
        hint = f"; {UNGATED[name]}" if name in UNGATED else ""
        return Unavailable(f"{name} is gated: open https://huggingface.co/datasets/{name} and accept its terms, "
                           f"then run `hf auth login`{hint}", "gated")
    if kinds & {"ConnectionError", "TransportError"}:
        return Unavailable(f"{name}: no network, and no copy in the hub's cache ({e}); download it elsewhere and give the file",
                           "no network")
    if "DatasetNotFoundError" in kinds:
        return Unavailable(f"{e} If it is private, run `hf auth login`", "not found")
    return Unavailable(f"{name}: cannot be read from the hub ({type(e).__name__}: {e})", "not readable")


def load_rows(source):
    """Rows of a file, a URL, a run or a data set of the hub, as dicts; see the top of this file."""
    source = str(source)
    stage = Path(source) / "guarded.jsonl" if Path(source).is_dir() else Path(source)
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]*))?(?::([\w.-]+))?(?:@([\w./-]+))?", source)
    if source.startswith(("https://", "http://")):
        path = _download(source)
    elif (files := shard_files(stage)) and files != [Path(source)]:
        VERSIONS[source] = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
        return sorted(read_shards(stage), key=lambda row: (str(row.get("id")), str(row.get("k"))))      # whatever the files
    elif Path(source).exists() or Path(source).suffix.lower() in READERS:
        path = Path(source)
    elif hub:
        return _hub(source, *hub.groups())
    else:
        raise InputError(f"{source}: no such file; name one, a URL, owner/name of a hub data set, or one of {', '.join(SETS)}")
    rows = read_table(path)
    VERSIONS[source] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return rows


# ---------------------------------------------------------------------------------------------
# Rows of any known set in our form

PROMPT_COLUMNS = ("instruction", "prompt", "question", "problem", "adversarial", "vanilla", "forbidden_prompt",
                  "test_case", "Behavior", "Question")
LABEL_COLUMNS = ("prompt_label", "safechain_label", "data_type", "label")
LABEL_WORDS = {**{label: label for label in LABELS}, "safe": "vanilla_benign", "unsafe": "vanilla_harmful",       # XSTest
               "overreject": "vanilla_benign", "safety": "vanilla_harmful"}                                       # EOPSA
STAGE_KEYS = {"response", "k", "seed", "steer", "finish_reason", "n_tokens",          # what sample.py and guard.py add
              "response_label", "p_unsafe", "guard", "reason", "keep"}
DIRECT_REFUSAL = "<think>\nI should not answer this question!\n</think>\n\n"


def _has(row, column):
    return row.get(column) not in (None, "")


def _prompt(row, where):
    """The prompt of a row, whatever its column is called."""
    for column in PROMPT_COLUMNS:
        if isinstance(row.get(column), str) and row[column].strip():
            context = row.get("ContextString") if column == "Behavior" else None      # HarmBench's contextual behaviors
            return f"{context}\n\n---\n\n{row[column]}" if context else row[column]
    raise InputError(f"{where}: no text under {', '.join(map(repr, PROMPT_COLUMNS))}; found the keys {', '.join(row)}")


def _label(row, label, where):
    """The row's own label as one of LABELS; `label` is for rows without one."""
    if row.get("source") == "4o_rewrite":                             # the benign half of SafeKey's mixture has no other mark
        return "vanilla_benign"
    own = {column: row[column] for column in LABEL_COLUMNS if _has(row, column)}
    for word in own.values():
        if isinstance(word, str) and word in LABEL_WORDS:
            return LABEL_WORDS[word]
    if own:
        said = " and ".join(f"{column} is {word!r}" for column, word in own.items())
        raise InputError(f"{where}: {said}, not one of {', '.join(LABEL_WORDS)}")
    if not label:
        raise InputError(f"{where}: no label ({', '.join(LABEL_COLUMNS)}); say with --label what such prompts are")
    return label


def _ours(row, label, where):
    """A row of any known set with our keys: instruction, prompt_label, and id, response, source where it has them.

    Rows that have our keys keep the others too. Raises InputError that says what is missing."""
    response = row.get("response", row.get("completion"))
    if "refusal" in row and not any(_has(row, column) for column in PROMPT_COLUMNS):              # DirectRefusal
        parts = re.fullmatch(r"\s*Question:\s*(.*?)\s+Answer:\s*(.*?)\s*", str(row["refusal"]), re.DOTALL)
        if not parts:
            raise InputError(f"{where}: 'refusal' is not 'Question: ... Answer: ...'")
        row, response = {**row, "instruction": parts[1]}, DIRECT_REFUSAL + parts[2]
    elif isinstance(response, str) and "finish_reason" not in row:    # a trace of sample.py stays as it is
        if "adversarial" in row:                                      # WildJailbreak's completions have no reasoning
            response = "<think>\n\n</think>\n\n" + response
        elif "</think>" in response and "<think>" not in response:    # SafeChain's lack the opening tag
            response = "<think>\n" + response
    if not {"instruction", "prompt_label"} <= row.keys():
        row = {"instruction": _prompt(row, where), "prompt_label": _label(row, label, where),
               **{key: row[key] for key in ("id", "source", "summary_end_idx", "next_sentence_end_idx") if key in row}}
    check_row(row, where)
    if not _has(row, "id"):
        row = {key: row[key] for key in row if key != "id"}
    elif not isinstance(row["id"], str | int):
        raise InputError(f"{where}: id must be text or a whole number, not {row['id']!r}")
    return row if response is None else {**row, "response": response}


def _recognised(source, label):
    """[(where, row in our form), ...] of a name of SETS or any other source."""
    source, its_label = SETS.get(str(source), (source, None))
    wheres = ((f"{source}, row {i}", row) for i, row in enumerate(load_rows(source), 1))
    return [(where, _ours(row, label or its_label, where)) for where, row in wheres]


def prompt_rows(source, label=None):
    """Prompts for sample.py: rows with id, instruction and prompt_label; `label` is that of prompts without their own.

    Exact repetitions are dropped with a notice; two different prompts under one id are an InputError."""
    rows, data = {}, _recognised(source, label)
    for where, row in data:
        row = {"id": content_id(row["prompt_label"], row["instruction"]), **{k: row[k] for k in row if k not in STAGE_KEYS}}
        row["id"] = str(row["id"])
        first = rows.setdefault(row["id"], row)
        if any(first[k] != row[k] for k in ("prompt_label", "instruction")):
            raise InputError(f"{where}: id {row['id']!r} is used by another prompt before it; ids must be unique")
    if len(rows) < len(data):
        print(inert(f"{source}: {len(data) - len(rows)} repeated prompts dropped"), file=sys.stderr)
    return list(rows.values())


def training_rows(source, label=None):
    """Rows for train.py: id, instruction, prompt_label and response, and whatever else a guarded trace has.

    Dropped with a notice: the same trace (id, k) of sample.py twice, the same prompt and response twice in other sets."""
    rows, data = {}, _recognised(source, label)
    for where, row in data:
        if not isinstance(row.get("response"), str):
            raise InputError(f"{where}: no text under 'response'")
        if "steer" in row and "response_label" not in row:
            raise InputError(f"{where}: a trace that no guard has judged; run guard.py first")
        if type(row.get("k", 0)) is not int:
            raise InputError(f"{where}: k is {row['k']!r}, not a whole number")
        row["id"] = str(row.get("id", content_id(row["prompt_label"], row["instruction"], row["response"])))
        rows.setdefault((row["id"], row["k"]) if "k" in row else (row["instruction"], row["response"]), row)
    if len(rows) < len(data):
        print(inert(f"{source}: {len(data) - len(rows)} repeated rows dropped"), file=sys.stderr)
    return list(rows.values())


def label_counts(rows):
    """'3 rows (1 vanilla_harmful, 2 vanilla_benign)'"""
    counts = Counter(row["prompt_label"] for row in rows)
    return f"{len(rows):,} rows (" + ", ".join(f"{counts[label]:,} {label}" for label in LABELS if counts[label]) + ")"


# ---------------------------------------------------------------------------------------------
# Evaluation


def _case(name, row, where):
    """-> (id, problem, answer) of one row of an evaluation set; None for a row that the paper does not use."""
    facts = EVAL_SETS[name]
    if name in ("xstest", "wildjailbreak") and _label(row, None, where) != facts.label:
        return None                                                   # unsafe prompts; benign ones
    if name == "aime24" and "2024" not in (row.get("url") or "2024"):
        return None                                                   # the source has three years
    problem, answer = _prompt(row, where), ""
    row_id = f"{name}-{content_id(problem)}"
    if facts.set == "reasoning":
        options = ["Correct Answer"] + [f"Incorrect Answer {i}" for i in (1, 2, 3)] if name == "gpqa" else ["answer"]
        if not all(_has(row, key) for key in options):
            raise InputError(f"{where}: needs text under {', '.join(options)}; found the keys {', '.join(row)}")
        answer, *_ = options = [str(row[key]) for key in options]
    if name == "gsm8k":
        if "####" not in answer:
            raise InputError(f"{where}: 'answer' does not end in #### and a number")
        answer = answer.rpartition("####")[2]
    if name == "gpqa":                                                # shuffled by the row's id; the reference has no seed
        options.sort(key=lambda option: content_id(row_id, option))
        problem += "\n" + ", ".join(f"{letter}) {option}" for letter, option in zip("ABCD", options))
        answer = "ABCD"[options.index(answer)]
    return row_id, problem, answer.strip()


def evaluation_rows(names, full=False):
    """Rows for eval.py: id, instruction (as the model is asked), prompt_label, set, and for reasoning task and answer.

    names: keys of EVAL_SETS, or KEY=SOURCE for a file or set of one's own. Unless full, a set larger than its `short` is cut
    to that many rows, the same ones in whatever order they come. Raises InputError; Unavailable for a set that cannot be had."""
    done = {}
    for word in names:
        name, _, source = word.partition("=")
        if name not in EVAL_SETS or name in done:
            raise InputError(f"{word}: " + ("named twice" if name in done else "no evaluation set; there are "
                                            f"{', '.join(EVAL_SETS)}, each also as NAME=FILE"))
        facts = EVAL_SETS[name]
        source = source or facts.source
        try:
            data = load_rows(source)
        except Unavailable as e:
            raise Unavailable(f"{name}: {e}; or give {name}=FILE, or --prompts without {name}", e.why)
        rows, times = {}, Counter()
        for row_id, problem, answer in filter(None, (_case(name, row, f"{source}, row {i}") for i, row in enumerate(data, 1))):
            times[row_id] += 1
            row_id += f"-{times[row_id]}" if times[row_id] > 1 else ""        # what the set has twice counts twice
            rows[row_id] = {"id": row_id, "instruction": facts.prompt.replace("{problem}", problem), "prompt_label": facts.label,
                            "set": facts.set, **({"task": name, "answer": answer} if facts.set == "reasoning" else {})}
        if full and len(rows) != facts.full:
            print(inert(f"{name}: {len(rows):,} rows in {source}; the paper uses {facts.full:,}"), file=sys.stderr)
        chosen = set(rows if full else sorted(rows, key=content_id)[:facts.short])
        done[name] = [row for row_id, row in rows.items() if row_id in chosen]
    return [row for rows in done.values() for row in rows]


def _words(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def overlap(rows, names=tuple(EVAL_SETS)):
    """One line: how many training rows have the prompt of an evaluation set, and which sets could not be compared.

    By text: the prompt is one of the set's up to case and punctuation or, with eight words or more, a part of one (attacks and
    answer formats are put around a prompt). By source: the row's own column `source` names the set, as STAR-1's does.
    names: as for evaluation_rows, or files of evaluation rows."""
    prompts, sources = [_words(row["instruction"]) for row in rows], [_words(str(row.get("source", ""))) for row in rows]
    found, without = [], {}
    for word in map(str, names):
        name, counts = word.partition("=")[0], []
        try:
            if "no network" in without:                               # every further try would take its time
                raise Unavailable(word, "no network")
            cases = evaluation_rows([word], full=True) if name in EVAL_SETS else prompt_rows(word)
            texts = {_words(case["instruction"]) for case in cases}
            joined = "\n".join(f" {text} " for text in texts)
            eights = {" ".join(w[i:i + 8]) for w in map(str.split, texts) for i in range(len(w) - 7)}
            counts = [str(sum(p in texts or " ".join(p.split(" ", 8)[:8]) in eights and f" {p} " in joined for p in prompts))]
        except InputError as e:                                       # a benchmark is no reason to stop
            without.setdefault(getattr(e, "why", "not readable"), []).append(name)
        by_source = sum(name in source for source in sources)
        counts += [f"({by_source} by source)"] * bool(by_source)
        found += [" ".join([Path(name).name, *counts])] * bool(counts)
    return "rows that have a prompt of evaluation: " + "; ".join(
        [", ".join(found)] * bool(found) + [f"not compared with {', '.join(sets)} ({why})" for why, sets in without.items()])
