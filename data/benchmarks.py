"""
Benchmarks: where the rows are, how the model is asked, and whether an answer is right.

    from data.benchmarks import evaluation_rows, grade
    rows = evaluation_rows(["xstest", "gsm8k=my.jsonl"])  # id, instruction, prompt_label, set; for
                                                          # reasoning also task and answer
    grade("gsm8k", response, "18")                        # -> bool

To add a benchmark, add an entry to BENCHMARKS.
"""
import csv
import functools
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from data.chat import OutOfTime, time_limit
from data.sources import (
    SETS, Unavailable, find_label, find_prompt, has_value, label_counts, load_rows, prompt_rows)
from data.rows import content_id
from thinksafe import ROOT, TINY, InputError, escape_control_chars, is_tiny
from tiny import world

# ---------------------------------------------------------------------------------------------
# Graders

MAX_ANSWER_CHARS = 400                 # the longest reference answer of MATH-500 has 48
ANSWER_PHRASE = re.compile(
    r"\banswer(?:\s+is)?[\s*]*:[\s*]*|\banswer\s+is\b[\s*]*|####\s*(?=[$\d.,-]+\s*$)", re.I | re.M)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.S)
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+")

def final_answer(response):
    """Return the text of the answer that a response commits to, or None.

    Only what follows the last </think> counts; reasoning that is not closed has no answer. Taken is
    the content of the last \\boxed{...}; else what follows the last "answer is", "answer:" or
    "#### ", to the end of the formula or sentence; else the last line. A last box without a closing
    brace is no answer, nor is a last line that stops in mid-sentence.
    """
    answer = response.rpartition("</think>")[2]
    if "<think>" in answer:
        return None
    box = answer.rfind("\\boxed{")
    if box >= 0:
        brace = box + len("\\boxed")
        return braced_text(answer[brace:brace + MAX_ANSWER_CHARS])
    end = max((phrase.end() for phrase in ANSWER_PHRASE.finditer(answer)), default=None)
    if end is None:
        last_line = answer.rstrip().rpartition("\n")[2]
        text = re.sub(r"^\s*(?:\d+[.)]|[-*#]+)\s+", "", last_line)      # "3." numbers a list
        if re.search("[a-z] [a-z]", text) and text[-1] not in ".!*$)}":
            return None
    else:
        rest = answer[end:end + MAX_ANSWER_CHARS]
        formula = FORMULA.match(rest)
        text = next(filter(None, formula.groups())) if formula else re.split(r"[.!]\s|\n", rest)[0]
    return text.lstrip(" *").rstrip(" *.") if len(text) < MAX_ANSWER_CHARS else None

def braced_text(text):
    """Return what is inside of the braces that a text begins with, or None if they stay open."""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", text, re.S):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[1:brace.start()].strip().rstrip(".")
    return None

def unwrap_text(latex):
    """Take words in LaTeX out of their command: \\text{ cm} becomes cm."""
    return re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r" \1 ", latex).strip()

def parse_number(text, words=False):
    """Return the only number of a text as a Fraction, or None: 18, $1,000.50, 10,\\!080.

    words: whether words may stand around it, as in 18 dollars.
    """
    text = re.sub(r"\\[!,;:]\s*", "", unwrap_text(text))
    for latex, plain in (("{,}", ","), ("\\$", "$"), ("\\%", "%"), ("−", "-")):
        text = text.replace(latex, plain)
    found = NUMBER.findall(text)
    rest = NUMBER.sub("", text)
    allowed = r"[A-Za-z\s$€£%.,:;()\[\]'\"*-]*" if words else r"[\s$]*"
    if len(found) != 1 or not re.fullmatch(allowed, rest):
        return None
    return Fraction(found[0].replace(",", ""))

def choice_letter(text):
    """Return the letter A to D of B, (B), **B**, \\text{B} or B) 5 eV; None for any other text."""
    choice = re.fullmatch(r"\(?([A-D])(?:[).:,].*)?", unwrap_text(text).strip(" $*"), re.S)
    return choice and choice[1]

@functools.lru_cache(maxsize=100_000)       # most samples of a problem agree
def same_expression(answer, reference):
    """Whether math-verify finds two LaTeX expressions equal within a second of processor time."""
    from math_verify import LatexExtractionConfig, parse, verify
    logging.getLogger("math_verify").setLevel(logging.ERROR)    # it warns that the limit is ours

    def parse_latex(text):
        return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)

    bases, reference_bases = (re.findall(r"\d_\{?(\d+)", text) for text in (answer, reference))
    if answer == reference or bases not in ([], reference_bases):       # it reads 52_8 as 52
        return answer == reference
    try:
        with time_limit(1):
            return bool(verify(parse_latex(reference), parse_latex(answer), timeout_seconds=None))
    except OutOfTime:
        return False

def same_choice(answer, reference):
    """Whether both are the same letter of a multiple choice."""
    return choice_letter(answer) is not None and choice_letter(answer) == choice_letter(reference)

def same_value(answer, reference):
    """Whether both are the same number or, if either is no single number, the same expression."""
    numbers = parse_number(answer), parse_number(reference)
    return numbers[0] == numbers[1] if None not in numbers else same_expression(answer, reference)

def same_number(answer, reference):
    """As same_value; words around the number, and an equation before it, do not matter."""
    numbers = parse_number(answer.rpartition("=")[2], words=True), parse_number(reference)
    return numbers[0] == numbers[1] if None not in numbers else same_expression(answer, reference)

def grade(task, response, answer):
    """Whether the final answer of a response (see final_answer) is right.

    task: a benchmark, "tiny" for the tiny world's sums, or any other name: graded as MATH-500 is.
    Call it from the main thread: elsewhere math-verify runs without a time limit.
    """
    if task == "tiny":
        return world.solved(response, answer)
    found = final_answer(response)
    if not found:
        return False
    grader = BENCHMARKS[task].grader if task in BENCHMARKS else same_value
    return grader(found, str(answer).rpartition("####")[2].strip())     # GSM8K's form of reference

# ---------------------------------------------------------------------------------------------
# Rows of a benchmark as (problem, reference answer), or None for a row that the paper does not use

def prompt_alone(row, where):
    return find_prompt(row, where), ""

def safe_prompt(row, where):
    is_safe = find_label(row, None, where) == "vanilla_benign"
    return prompt_alone(row, where) if is_safe else None

def harmful_attack(row, where):
    is_harmful = find_label(row, None, where) == "adversarial_harmful"
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
    is_2024 = "2024" in str(row.get("url") or "2024")       # the source has three years
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
            kind, answer = str(row.get("set")), str(row.get("answer", ""))
            if len(answer.rpartition("####")[2].strip()) > MAX_ANSWER_CHARS:
                raise InputError(f"{word}, row {number}: its `answer` has more than "
                                 f"{MAX_ANSWER_CHARS} characters, which nothing could equal")
            solvable = kind == "reasoning" and isinstance(row.get("task"), str) and answer
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
