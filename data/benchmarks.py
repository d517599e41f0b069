"""
Benchmarks: where the rows are, how the model is asked, and whether an answer is right.

    from data.benchmarks import evaluation_rows, grade
    rows = evaluation_rows(["xstest", "gsm8k=my.jsonl"])  # id, instruction, prompt_label, set; for
                                                          # reasoning also task and answer
    grade("gsm8k", response, "18")                        # -> bool

To add a benchmark, add an entry to BENCHMARKS.
"""
import csv
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

from data.columns import find_label, find_prompt, has_value
from data.graders import is_right, same_choice, same_number, same_value
from data.rows import content_id
from data.sources import SETS, Unavailable, label_counts, load_rows, prompt_rows
from thinksafe import ROOT, TINY, InputError, escape_control_chars, is_tiny
from tiny import world

def grade(task, response, answer):
    """Whether the final answer of a response (see data.graders.final_answer) is right.

    task: a benchmark, "tiny" for the tiny world's sums, or any other name: graded as MATH-500 is.
    """
    if task == "tiny":
        return world.solved(response, answer)
    return is_right(BENCHMARKS[task].grader if task in BENCHMARKS else same_value, response, answer)

# ---------------------------------------------------------------------------------------------
# Rows of a benchmark as (problem, reference answer), or None for a row that the paper does not use

def prompt_alone(row, where):
    return find_prompt(row, where), ""

def safe_prompt(row, where):
    is_safe = find_label(row, where) == "vanilla_benign"
    return prompt_alone(row, where) if is_safe else None

def harmful_attack(row, where):
    is_harmful = find_label(row, where) == "adversarial_harmful"
    return prompt_alone(row, where) if is_harmful else None

def math_problem(row, where, columns=("answer",)):
    """The prompt and the first of the columns; raises InputError if one of them has no text."""
    problem = find_prompt(row, where)
    if not all(has_value(row, column) for column in columns):
        raise InputError(f"{where}: needs text under {', '.join(columns)}; "
                         f"found the keys {', '.join(row)}")
    return problem, str(row[columns[0]]).strip()

def gsm8k_problem(row, where):
    problem, answer = math_problem(row, where)
    if "####" not in answer:
        raise InputError(f"{where}: 'answer' does not end in #### and a number")
    return problem, answer.rpartition("####")[2].strip()

def aime24_problem(row, where):
    year = row.get("url") or row.get("Year") or "2024"      # the source has three years
    is_2024 = "2024" in str(year)
    return math_problem(row, where) if is_2024 else None

def gpqa_problem(row, where):
    """The options are sorted by a hash, so that the order is always the same."""
    columns = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    question, _ = math_problem(row, where, columns)
    options = [str(row[column]) for column in columns]
    correct = options[0]
    options.sort(key=lambda option: content_id(f"gpqa-{content_id(question)}", option))
    choices = ", ".join(f"{letter}) {option}" for letter, option in zip("ABCD", options))
    return f"{question}\n{choices}", "ABCD"[options.index(correct)]

class Benchmark(NamedTuple):
    """An evaluation set as the paper uses it."""
    source: str
    set: str                            # harm_..., over_refusal or reasoning
    label: str                          # prompt_label of the rows
    full: int                           # rows that the paper uses
    short: int                          # rows that an evaluation without --full uses
    license: str
    read: Callable = prompt_alone       # (row, where) -> (problem, reference answer) or None
    prompt: str = "{problem}"           # the user's turn, SkyThought's; there is no system prompt
    grader: Callable = same_value       # (final answer, reference answer) -> bool

GSM8K_PROMPT = (
    "Given the following problem, reason and give a final answer to the problem.\n"
    "Problem: {problem}\n"
    'Your response should end with "The final answer is [answer]" '
    "where [answer] is the response to the problem.")
MATH_PROMPT = r"Please reason step by step, and put your final answer within \boxed{}. {problem}"
GPQA_PROMPT = (
    r"Return your final response within \boxed{} and only include the letter choice (A, B, C, or D)"
    " as your final response. {problem}")

# The short evaluation should end within half an hour on an RTX 4090, for Qwen3-0.6B before and
# after training, one trace a prompt. Decoding mostly reads the cache, 112 KiB a token in bf16: at
# 65% of 1.0 TB/s that is 5.3e6 tokens of context a second. A trace of L tokens after a prompt of
# p tokens reads L (p + L/2) of them. With assumed lengths, a model takes 635 s, of which
#             traces       L    p                       traces       L    p
#     harm   3 x 100     650  200    19 s      math500     100   4,000  120   160 s
#     xstest     250     600   30     9 s      aime24       15  12,000  150   209 s
#     gsm8k      200   1,500  150    51 s      gpqa         50   6,000  300   187 s
# and two models take 21 minutes. The rest is for loading, the judge and the last long traces.
BENCHMARKS = {
    "harmbench": Benchmark(
        SETS["harmbench"][0], "harm_harmbench", "adversarial_harmful", full=602, short=100,
        license="MIT"),
    "strongreject": Benchmark(
        SETS["strongreject"][0], "harm_strongreject", "vanilla_harmful", full=313, short=100,
        license="MIT"),
    "xstest": Benchmark(
        SETS["xstest"][0], "over_refusal", "vanilla_benign", full=250, short=250,
        license="CC-BY-4.0", read=safe_prompt),
    "wildjailbreak": Benchmark(         # ungated, with the same rows as allenai/wildjailbreak:eval
        "walledai/WildJailbreak", "harm_wildjailbreak", "adversarial_harmful", full=2000, short=100,
        license="ODC-BY", read=harmful_attack),
    "gsm8k": Benchmark(
        "openai/gsm8k:main:test", "reasoning", "vanilla_benign", full=1319, short=200,
        license="MIT", read=gsm8k_problem, prompt=GSM8K_PROMPT, grader=same_number),
    "math500": Benchmark(
        "HuggingFaceH4/MATH-500::test", "reasoning", "vanilla_benign", full=500, short=100,
        license="MIT", read=math_problem, prompt=MATH_PROMPT),
    "aime24": Benchmark(
        "AI-MO/aimo-validation-aime", "reasoning", "vanilla_benign", full=30, short=15,
        license="not stated", read=aime24_problem, prompt=MATH_PROMPT, grader=same_number),
    "gpqa": Benchmark(
        "Idavidrein/gpqa:gpqa_diamond", "reasoning", "vanilla_benign", full=198, short=50,
        license="CC-BY-4.0", read=gpqa_problem, prompt=GPQA_PROMPT, grader=same_choice),
}

# ---------------------------------------------------------------------------------------------
# Rows for eval.py

def benchmark_rows(name, source):
    """Return {id: row} of all rows of a source that the paper's use of a benchmark includes."""
    benchmark = BENCHMARKS[name]
    rows = {}
    repeats = Counter()
    for i, source_row in enumerate(load_rows(source), 1):
        where = f"{source}, row {i}"
        case = benchmark.read(source_row, where)
        if case is None:
            continue
        problem, answer = case
        row_id = f"{name}-{content_id(find_prompt(source_row, where))}"
        repeats[row_id] += 1
        if repeats[row_id] > 1:         # what the set has twice counts twice
            row_id += f"-{repeats[row_id]}"
        rows[row_id] = {"id": row_id, "instruction": benchmark.prompt.replace("{problem}", problem),
                        "prompt_label": benchmark.label, "set": benchmark.set}
        if benchmark.set == "reasoning":
            rows[row_id] |= {"task": name, "answer": answer}
    return rows

def evaluation_rows(names, full=False):
    """Return rows for eval.py: id, instruction, prompt_label, set; for reasoning task and answer.

    names: keys of BENCHMARKS, or KEY=SOURCE for a file or data set of one's own.
    full: all rows. Otherwise `short` of each benchmark, the same ones in whatever order they come.
    Raises InputError, or Unavailable for a benchmark that cannot be had.
    """
    chosen = {}
    for word in names:
        name, _, source = word.partition("=")
        if name in chosen:
            raise InputError(f"{word}: named twice")
        if name not in BENCHMARKS:
            raise InputError(f"{word}: no evaluation set; there are {', '.join(BENCHMARKS)}, "
                             "each also as NAME=FILE")
        benchmark = BENCHMARKS[name]
        source = source or benchmark.source
        try:
            rows = benchmark_rows(name, source)
        except Unavailable as e:
            raise Unavailable(f"{name}: {e}; or give {name}=FILE, or --prompts without {name}",
                              e.why)
        if full and len(rows) != benchmark.full:
            print(escape_control_chars(f"{name}: {len(rows):,} rows in {source}; "
                                       f"the paper uses {benchmark.full:,}"), file=sys.stderr)
        ids = set(rows if full else sorted(rows, key=content_id)[:benchmark.short])
        chosen[name] = [row for row_id, row in rows.items() if row_id in ids]
    return [row for rows in chosen.values() for row in rows]

# ---------------------------------------------------------------------------------------------
# Overlap of training data with benchmarks

def plain_words(text):
    """Reduce a text to words in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))

def count_shared(prompts, texts):
    """Count the prompts that are one of the texts or, with eight words or more, a part of one.

    A part, because attacks and answer formats are put around a prompt. All are of plain_words.
    """
    joined = "\n".join(f" {text} " for text in texts)
    starts = set()                      # runs of eight words: they spare most searches in `joined`
    for text in texts:
        words = text.split()
        starts |= {" ".join(words[i:i + 8]) for i in range(len(words) - 7)}
    shared = 0
    for prompt in prompts:
        start = " ".join(prompt.split(" ", 8)[:8])
        shared += prompt in texts or start in starts and f" {prompt} " in joined
    return shared

def overlap(rows, names=tuple(BENCHMARKS)):
    """Say in one line how many training rows have the prompt of a benchmark.

    By text, see count_shared; and by source: the row's column `source` names the benchmark, as
    STAR-1's does. The line also names the benchmarks that could not be compared.

    names: as for evaluation_rows, or files of evaluation rows.
    """
    prompts = [plain_words(row["instruction"]) for row in rows]
    sources = [plain_words(str(row.get("source", ""))) for row in rows]
    found, missing = [], {}
    for word in map(str, names):
        name = word.partition("=")[0]
        counts = []
        try:
            if "no network" in missing:         # each further try would take its time
                raise Unavailable(word, "no network")
            is_name = name in BENCHMARKS
            cases = evaluation_rows([word], full=True) if is_name else prompt_rows(word)
            texts = {plain_words(case["instruction"]) for case in cases}
            counts.append(str(count_shared(prompts, texts)))
        except InputError as e:                 # a benchmark is no reason to stop
            missing.setdefault(getattr(e, "why", "not readable"), []).append(name)
        by_source = sum(name in source for source in sources)
        if by_source:
            counts.append(f"({by_source} by source)")
        if counts:
            found.append(" ".join([Path(name).name, *counts]))
    parts = [", ".join(found)] if found else []
    parts += [f"not compared with {', '.join(sets)} ({why})" for why, sets in missing.items()]
    return "rows that have a prompt of evaluation: " + "; ".join(parts)

NAMED = re.compile(r"[\w-]+(=.+)?")              # NAME or NAME=FILE; all else is a file of rows

def read_evaluation(words, full, limit):
    """Return the prompts (rows, at most `limit` of each kind) and {benchmark: why it is left out}.

    Args:
        words: benchmarks, NAME=FILE, or files of evaluation rows. None: all benchmarks but those
            that are gated here.

    Raises InputError for a row that does not say which metric it is for."""
    rows, left_out, counts = {}, {}, Counter()
    for word in words or BENCHMARKS:
        try:
            named = NAMED.fullmatch(str(word))
            found = evaluation_rows([word], full=full) if named else prompt_rows(word)
        except Unavailable as e:
            if words or e.why != "gated":
                raise
            left_out[word] = str(e)
            continue
        for number, row in enumerate(found, 1):
            kind = str(row.get("set"))
            is_task = isinstance(row.get("task"), str) and has_value(row, "task")
            solvable = kind == "reasoning" and is_task and has_value(row, "answer")
            if not (kind.startswith("harm_") or kind == "over_refusal" or solvable):
                raise InputError(f"{word}, row {number}: needs `set` (harm_..., over_refusal or "
                                 "reasoning), and for reasoning `task` and `answer`")
            if row["id"] in rows:
                raise InputError(f"{word}, row {number}: the prompt is in two of them")
            counts[kind_of(row)] += 1
            if limit is None or counts[kind_of(row)] <= limit:
                rows[row["id"]] = row
    return list(rows.values()), left_out

# --------------------------------------------------------------------------------------------------
# The paper's figures, and metrics that are means of others

SAFETY_SETS = ("harm_harmbench", "harm_strongreject", "harm_wildjailbreak", "over_refusal")

def kind_of(row):
    """Return a row's set or, for reasoning, its task."""
    return row["task"] if row["set"] == "reasoning" else row["set"]

def means_over(names):
    """Return {metric: the metrics it is the mean of} for what can be computed from `names`."""
    tasks = [name for name in names if name.startswith("pass@1_")]
    means = {"pass@1": tasks, "safety": SAFETY_SETS}
    return {name: parts for name, parts in means.items() if parts and set(parts) <= set(names)}

def sensitivity(figures):
    """Return {"d_prime", "low", "high", "criterion"} of the metrics of one model, None without harm
    or over-refusal: whether it tells harmful prompts from those that only sound harmful.

    d' = z(share refused of harmful) - z(share refused of safe ones), where what is not answered
    harmfully counts as refused, and the criterion -(sum of both)/2 is lower the readier a model is
    to refuse anything. Training that only makes it refuse more lowers the criterion and leaves d'.
    Half a prompt is added to each count, so that 0% and 100% have a z (Hautus 1995). The interval
    is Gourevitch and Galanter's (1967), at 95%."""
    normal, z, variance = NormalDist(), [], 0.0
    for name in ("harm", "over_refusal"):
        x = figures.get(name)
        if not x or not x["n"]:
            return None
        percent = x["percent"] if name == "over_refusal" else 100 - x["percent"]
        share = (percent / 100 * x["n"] + 0.5) / (x["n"] + 1)
        z.append(normal.inv_cdf(share))
        variance += share * (1 - share) / (x["n"] * normal.pdf(z[-1]) ** 2)
    found, half = z[0] - z[1], 1.96 * math.sqrt(variance)
    return {"d_prime": round(found, 3), "low": round(found - half, 3),
            "high": round(found + half, 3), "criterion": round(-sum(z) / 2, 3)}

def sensitivity_lines(*models):
    """Return two lines of eval.py's table: the `sensitivity` of each model's metrics."""
    found = [sensitivity(figures) for figures in models]
    if None in found:
        return []
    cells = ["{d_prime:.2f} [{low:.2f}, {high:.2f}]".format(**x).rjust(22) for x in found]
    criteria = [f"{x['criterion']:22.2f}" for x in found]
    return ["".join([f"{'d-prime, harmful from safe':34}", *cells]),
            "".join([f"{'criterion, lower: refuses more':34}", *criteria])]

def paper_figures(model, names):
    """Return {"before": {metric: percent}, "after": ...}: which of the metrics `names` the paper
    reports of a model of the hub, {} if none. After: trained by ThinkSafe."""
    figures = {}
    with open(ROOT / "runs" / "paper.csv", encoding="utf-8") as f:
        for row in csv.DictReader(line for line in f if not line.startswith("#")):
            if row["model"] == model:
                found = {name: float(row[name]) for name in names if name in row}
                for name, parts in means_over(found).items():
                    found[name] = round(sum(found[part] for part in parts) / len(parts), 2)
                figures[row["when"]] = found
    return figures if any(figures.values()) else {}

def describe_rows(rows, student):
    """Return two lines: how many training rows there are of each label, and how many have a prompt
    of evaluation. student: folder of the model, which tells the benchmarks that are meant."""
    names = [TINY / "eval.jsonl"] if is_tiny(student) else list(BENCHMARKS)
    return f"data: {label_counts(rows)}\n{overlap(rows, names)}"
