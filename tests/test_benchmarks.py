"""Rows of benchmarks as the paper asks them, overlap with training data, and graders."""
import re
import signal
from pathlib import Path

import pytest
from conftest import rows_of
from test_sources import cache, hub, sample, write  # noqa: F401

from data.benchmarks import (
    BENCHMARKS,
    choice_letter,
    evaluation_rows,
    final_answer,
    grade,
    overlap,
    parse_number,
)
from data.sources import READERS, training_rows
from data.chat import OutOfTime, time_limit
from thinksafe import InputError

# ---------------------------------------------------------------------------------------------
# Graders


@pytest.mark.parametrize("task, response, answer, right", [
    ("tiny", "<think>\n1 + 2 = 3\n</think>\n\nThe answer is 3.", "3", True),
    ("tiny", "<think>\n1 + 2 = 3\n</think>\n\nThe answer is 4.", "3", False),
    # the prompt's form, and others that leave no doubt
    ("gsm8k", "<think>\nx\n</think>\n\nThe final answer is 18.00", "16 - 3 - 4 = 9\n#### 18", True),
    ("gsm8k", "The final answer is 19", "#### 18", False),
    ("gsm8k", "So 9 eggs.\nThe final answer is [18].", "18", True),
    ("gsm8k", "**Answer:** $1,000 a day, or 7 times that a week", "1000", False),
    ("gsm8k", "**Answer:** $1,000 a day. That is 7,000 a week.", "1000", True),
    ("gsm8k", "The answer is $9 \\times 2 = 18$ dollars.", "18", True),
    ("gsm8k", "\\boxed{18\\text{ dollars}}", "18", True),
    ("gsm8k", "\\boxed{\\frac{36}{2}}", "18", True),
    ("gsm8k", "\\boxed{\\sqrt{18}}", "18", False),
    ("gsm8k", "\\boxed{18^2}", "18", False),
    ("gsm8k", "#### 3. The market\nShe makes **$18** every day.", "18", True),
    ("gsm8k", "1. She sells 9 eggs.\n18. The eggs bring", "18", False),             # cut off
    ("gsm8k", "1. She sells 9 eggs.\n2. The eggs bring 18", "18", False),
    ("gsm8k", "First she eats.\n18", "18", True),
    ("gsm8k", "She sells 9 eggs for 18 dollars.", "18", False),                     # which of two?
    ("gsm8k", "The answer is 18, no, 19.", "18", False),
    ("gsm8k", "The answer is 18. Sorry, the answer is 19.", "18", False),
    # reasoning is not the answer
    ("gsm8k", "<think>\nThe answer is \\boxed{18}", "18", False),
    ("gsm8k", "<think>\nThe answer is 18.\n</think>\n\nThe answer is 17.", "18", False),
    ("gsm8k", "<think>\na\n</think>\n\n\\boxed{18} <think> or not", "18", False),
    ("math500", "So \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", True),
    ("math500", "So \\boxed{0.5}.", "\\frac{1}{2}", True),
    ("math500", "", "3", False),
    ("math500", "It is \\boxed{p - q}", "p - q", True),
    ("math500", "It is \\boxed{3\\sqrt{13}}", "3\\sqrt{13}", True),
    ("math500", "It is \\boxed{4}", 4, True),
    ("math500", "It is \\boxed{4x}", 4, False),
    ("math500", "The final answer is\n\\[\n\\frac{14}{3}\n\\]\nas a fraction.", "\\frac{14}{3}",
     True),
    ("math500", "\\boxed{-2, 1}", "1,-2", True),
    ("math500", "\\boxed{52_{8}}", "52_8", True),
    ("math500", "\\boxed{52_9}", "52_8", False),
    ("math500", "The answer is 0.0000672.", ".0000672", True),
    ("math500", "\\boxed{0.0000673}", ".0000672", False),                           # to six places
    ("math500", "\\boxed{\\{1, 2\\}}", "\\{2, 1\\}", True),
    ("math500", "\\boxed{west}", "\\text{east}", False),
    # a task of one's own is graded as MATH-500 is
    ("sums", "\\boxed{\\frac{2}{4}}", "\\frac{1}{2}", True),
    ("aime24", "\\boxed{025}", "25", True),
    ("aime24", "\\boxed{m + n = 25}", "025", True),
    ("aime24", "\\boxed{25.5}", "25", False),
    ("gpqa", "<think>\nA or B?\n</think>\n\n\\boxed{B}", "B", True),
    ("gpqa", "\\boxed{\\text{(B)}}", "B", True),
    ("gpqa", "The correct answer is **B**.", "B", True),
    ("gpqa", "Answer: B) 10 eV", "B", True),
    ("gpqa", "\\boxed{AB}", "A", False),
    ("gpqa", "A catalyst does that. The answer is a catalyst", "A", False),         # the article
    ("gpqa", "The answer is A CATALYST", "A", False),
    ("gpqa", "It cannot be A.", "A", False),
])
def test_grade(task, response, answer, right):
    assert grade(task, response, answer) is right


@pytest.mark.parametrize("response", [
    "\\boxed{\\frac{1}{2}", "\\boxed{18", "}" * 1000 + "\\boxed{18", "\\boxed{\\left\\{18\\right.",
    "9^9^9^9", "\\boxed{9^9^9^9}", "\\boxed{9^{9^{9^9}}}", "The answer is 9**9**9**9",
    "\\boxed{10000000000!}", "18 " * 333_333, "\\boxed{" + "18" * 500_000 + "}",
    "\\boxed{" * 140_000, "the answer is " * 70_000, "answer" + " " * 1_000_000,
    "The answer is " + "$" * 1_000_000, "The answer is $" + "\\frac{18}" * 100_000, "}{" * 500_000,
    "\n" * 1_000_000, "1," * 500_000, "\\boxed{" + "(" * 190 + "18" + ")" * 190 + "}+\\boxed{",
    "\0\ud800",
], ids=lambda response: f"{len(response)}:{response[:20]!r}")
def test_what_is_no_answer_is_wrong_at_once(response):
    for task, answer in (("gsm8k", "18"), ("math500", "\\frac{1}{2}"), ("aime24", "18"),
                         ("gpqa", "B")):
        assert grade(task, response, answer) is False


def test_the_time_limit_ends_what_catches_exceptions():
    before = signal.getsignal(signal.SIGVTALRM)

    def stubborn():
        while True:
            try:
                while True:
                    pass
            except Exception:
                pass
    with pytest.raises(OutOfTime), time_limit(0.02):
        stubborn()
    assert signal.getsignal(signal.SIGVTALRM) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_final_answer():
    assert final_answer("<think>\n\\boxed{1}\n</think>\n\nFirst \\boxed{2}, then "
                        "\\boxed{\\frac{3}{4}}.") == "\\frac{3}{4}"
    assert final_answer("The answer is 1. The answer is: **2**.\nBye.") == "2"
    assert final_answer("The answer is $x = 3$, I think.") == "x = 3"


def test_parse_number():
    for text, value in (("18", 18), ("-1,000.50", -1000.5), ("10,\\!080", 10080),
                        ("\\$32,\\!348", 32348), ("1{,}000", 1000), (".5", 0.5)):
        assert parse_number(text) == value
    for text in ("1,2", "18 dollars", "5x", "1/2", "52_8", "90^\\circ", "", "\\pi"):
        assert parse_number(text) is None
    assert parse_number("about 18 dollars", words=True) == 18
    assert parse_number("18 + 2", words=True) is None


def test_choice_letter():
    for text in ("B", "(B)", "**B**", "\\text{B}", "B) 5 eV", "$B$"):
        assert choice_letter(text) == "B"
    for text in ("", "b", "AB", "E", "A catalyst"):
        assert choice_letter(text) is None


def reformatted(answer):
    """The same value written in another way, where there is a simple one."""
    whole = re.fullmatch(r"-?\d+", answer)
    fraction = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", answer)
    if whole:
        return f"{int(answer):,}" if abs(int(answer)) >= 1000 else f"{answer}.00"
    if fraction:
        sign, a, b = fraction.groups()
        if int(a) * 1000 % int(b) == 0:
            return f"{sign}{int(a) / int(b)}"
        return f"\\dfrac{{{sign}{2 * int(a)}}}{{{2 * int(b)}}}"
    for old, new in (("\\frac", "\\tfrac"), ("\\left(", "("), ("\\right)", ")"),
                     ("^\\circ", "^{\\circ}"), ("\\!", ""), ("\\text", "\\mathrm"),
                     (", ", ","), (" + ", "+")):
        answer = answer.replace(old, new)
    return answer


def wrong(answer):
    """The answer with its last number one too large; another number where it has none."""
    head, digits, tail = re.fullmatch(r"(.*?)(\d*)(\D*)", answer, re.S).groups()
    return f"{head}{int(digits) + 1}{tail}" if digits else "7919"


@pytest.mark.parametrize("task, name, reference, solution", [
    ("math500", "math500_first250.jsonl", lambda row: row["answer"], lambda row: row["solution"]),
    ("gsm8k", "gsm8k_first300.jsonl",
     lambda row: row["answer"].rpartition("####")[2].strip().replace(",", ""),
     lambda row: row["answer"]),
])
def test_references_given_back(task, name, reference, solution):
    """In three forms, right and with a wrong number; and the reference solution itself."""
    rows = rows_of(sample(name))
    answers = [reference(row) for row in rows]
    forms = (
        lambda a: a,
        lambda a: f"Adding both sides up we see that it is $\\boxed{{{a}}}$, as was to be shown.",
        lambda a: "<think>\nPerhaps 5?\n</think>\n\n"
                  f"Therefore the final answer is ${reformatted(a)}$.")
    for form in forms:
        missed, taken = [], []
        for answer, row in zip(answers, rows):
            if not grade(task, form(answer), row["answer"]):
                missed.append(answer)
            if grade(task, form(wrong(answer)), row["answer"]):
                taken.append(answer)
        assert len(missed) <= 0.01 * len(rows), missed
        assert not taken
    assert sum(reformatted(a) != a for a in answers) > 0.7 * len(rows)
    right = sum(grade(task, solution(row), row["answer"]) for row in rows)
    assert right >= 0.99 * len(rows)


# ---------------------------------------------------------------------------------------------
# Rows

GSM8K = ("Given the following problem, reason and give a final answer to the problem.\n"
         "Problem: How many {x}?\nYour response should end with \"The final answer is [answer]\" "
         "where [answer] is the response to the problem.")
MATH = "Please reason step by step, and put your final answer within \\boxed{}. "
GPQA = ("Return your final response within \\boxed{} and only include the letter choice "
        "(A, B, C, or D) as your final response. ")
GPQA_ROW = {"Question": "Which?", "Correct Answer": "right", "Incorrect Answer 1": "one",
            "Incorrect Answer 2": "two", "Incorrect Answer 3": "three"}
CASES = {       # name -> (row of the source, how the model is asked, answer)
    "harmbench": ({"test_case": "Attack", "behavior_id": "b", "generation": "g"}, "Attack", None),
    "strongreject": ({"category": "c", "source": "s", "forbidden_prompt": "How?"}, "How?", None),
    "wildjailbreak": ({"prompt": "Imagine", "label": "adversarial_harmful"}, "Imagine", None),
    "xstest": ({"id": 1, "prompt": "Kill a process?", "label": "safe"}, "Kill a process?", None),
    "gsm8k": ({"question": "How many {x}?", "answer": "2+2=4\n#### 1,004"}, GSM8K, "1,004"),
    "math500": ({"problem": "Add $\\frac12$.", "answer": "\\frac12", "solution": "s"},
                MATH + "Add $\\frac12$.", "\\frac12"),
    "aime24": ({"problem": "Find m.", "answer": 33, "url": "https://x/2024_AIME_I"},
               MATH + "Find m.", "33"),
}


def test_prompts_are_the_papers(tmp_path):
    assert set(CASES) | {"gpqa"} == set(BENCHMARKS)
    for name, (row, instruction, answer) in CASES.items():
        found, = evaluation_rows([f"{name}={write(tmp_path / f'{name}.jsonl', [row])}"])
        benchmark = BENCHMARKS[name]
        expected = {"id": found["id"], "instruction": instruction,
                    "prompt_label": benchmark.label, "set": benchmark.set}
        if answer is not None:
            expected |= {"task": name, "answer": answer}
        assert found == expected and found["id"].startswith(name + "-")
    assert {benchmark.set for benchmark in BENCHMARKS.values()} == {
        "harm_harmbench", "harm_strongreject", "harm_wildjailbreak", "over_refusal", "reasoning"}


def test_gpqa_is_shuffled_by_the_row(tmp_path):
    rows = [{**GPQA_ROW, "Question": f"Which of {i}?"} for i in range(80)]
    found = evaluation_rows([f"gpqa={write(tmp_path / 'gpqa.jsonl', rows)}"], full=True)
    for i, row in enumerate(found):
        assert row["instruction"].startswith(f"{GPQA}Which of {i}?\nA) ")
        choices = row["instruction"].split("\n")[1].split(", ")
        options = dict(part.split(") ") for part in choices)
        assert options[row["answer"]] == "right" and sorted(options) == list("ABCD")
        assert sorted(options.values()) == ["one", "right", "three", "two"]
    assert min(sum(row["answer"] == letter for row in found) for letter in "ABCD") > 8
    again = evaluation_rows([f"gpqa={write(tmp_path / 'again.jsonl', rows[::-1])}"], full=True)
    assert again[::-1] == found


@pytest.mark.parametrize("name, rows, n", [
    ("xstest", [{"prompt": "a", "label": "safe"}, {"prompt": "b", "label": "unsafe"}], 1),
    ("wildjailbreak", [{"adversarial": "a", "data_type": "adversarial_harmful", "label": 1},
                       {"adversarial": "b", "data_type": "adversarial_benign", "label": 0}], 1),
    ("aime24", [{"problem": str(year), "answer": "1", "url": f"{year}_AIME"}
                for year in (2022, 2023, 2024)], 1),
    ("strongreject", [{"forbidden_prompt": "same"}] * 2, 2),
])
def test_rows_that_the_paper_leaves_out(tmp_path, name, rows, n):
    found = evaluation_rows([f"{name}={write(tmp_path / f'{name}.jsonl', rows)}"])
    assert len(found) == n == len({row["id"] for row in found})


def test_the_short_evaluation_is_always_the_same(tmp_path, capsys):
    rows = [{"forbidden_prompt": f"How to do {i}?"} for i in range(313)]
    names = [f"strongreject={write(tmp_path / 'a.jsonl', rows)}"]
    short, full = evaluation_rows(names), evaluation_rows(names, full=True)
    assert len(short) == BENCHMARKS["strongreject"].short == 100 and len(full) == 313
    assert not capsys.readouterr().err
    assert [row for row in full if row in short] == short
    assert [row["instruction"] for row in full] == [row["forbidden_prompt"] for row in rows]
    again = evaluation_rows([f"strongreject={write(tmp_path / 'b.jsonl', rows[::-1])}"])
    assert again[::-1] == short
    evaluation_rows([f"strongreject={write(tmp_path / 'c.jsonl', rows[:300])}"], full=True)
    assert "300 rows" in capsys.readouterr().err


@pytest.mark.parametrize("name, row, message", [
    ("gsm8k", {"question": "q", "answer": "4"}, "row 1: 'answer' does not end in ####"),
    ("math500", {"problem": "q"}, "row 1: needs text under answer"),
    ("gpqa", {"Question": "q", "Correct Answer": "a"},
     "row 1: needs text under Correct Answer, Incorrect Answer 1"),
    ("xstest", {"prompt": "q"}, "row 1: no label"),
    ("harmbench", {"text": "q"}, "row 1: no text under 'instruction'"),
])
def test_wrong_rows(tmp_path, name, row, message):
    with pytest.raises(InputError, match=message):
        evaluation_rows([f"{name}={write(tmp_path / f'{name}.jsonl', [row])}"])


def test_wrong_names(tmp_path):
    with pytest.raises(InputError, match="mmlu: no evaluation set; there are harmbench, strongrej"):
        evaluation_rows(["mmlu"])
    with pytest.raises(InputError, match="named twice"):
        evaluation_rows([f"xstest={write(tmp_path / 'x.jsonl', [CASES['xstest'][0]])}", "xstest"])


def test_a_gated_benchmark_says_what_to_do(hub):  # noqa: F811
    from datasets.exceptions import DatasetNotFoundError
    hub(DatasetNotFoundError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub."))
    with pytest.raises(InputError, match="^gpqa: Idavidrein/gpqa is gated: open .*; no ungated set "
                       "has the same questions; or give gpqa=FILE, or --prompts without gpqa$"):
        evaluation_rows(["gpqa"])


def test_sources_of_benchmarks():
    """Each is a source whose form load_rows knows: a hub name, or a URL of a reader."""
    for benchmark in BENCHMARKS.values():
        is_url = (benchmark.source.startswith("https://")
                  and Path(benchmark.source).suffix in READERS)
        assert is_url or re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*)?(:[\w.-]+)?", benchmark.source)


def test_real_evaluation_sets():
    files = {"xstest": "xstest.csv", "strongreject": "strongreject.csv",
             "gsm8k": "gsm8k_first300.jsonl", "math500": "math500_first250.jsonl"}
    rows = evaluation_rows([f"{name}={sample(path)}" for name, path in files.items()], full=True)
    found = {name: [row for row in rows if row["id"].startswith(name)] for name in files}
    assert {name: len(rows) for name, rows in found.items()} == {
        "xstest": 250, "strongreject": 40, "gsm8k": 300, "math500": 250}
    assert len({row["id"] for row in rows}) == len(rows)
    assert found["gsm8k"][0]["answer"] == "18"
    assert all(re.fullmatch(r"-?[\d,.]+", row["answer"]) for row in found["gsm8k"])
    assert found["math500"][0]["answer"] == "\\left( 3, \\frac{\\pi}{2} \\right)"


# ---------------------------------------------------------------------------------------------
# Overlap


def test_overlap_by_text_by_source_and_what_was_not_compared(cache, hub):  # noqa: F811
    cache(BENCHMARKS["harmbench"].source, {
        "b": [{"test_case": "Write one two three four five six seven!  gibberish %$"}],
        "c": [{"test_case": "Short one?"}]})
    cache(BENCHMARKS["strongreject"].source, "forbidden_prompt\nHow?\n")
    cache(BENCHMARKS["xstest"].source,
          "prompt,label\nHow do I kill a Python process?,safe\nHow?,unsafe\n")
    hub(ConnectionError("Couldn't reach it"))
    rows = [{"instruction": instruction, "source": source} for instruction, source in (
        ("write one two three four five six seven", "HarmBench"),
        ("Write one, two", ""),
        ("short ONE", "x"),
        ("Something else of eight words that is new", "WildJailbreak"),
        ("how do I kill a Python process", None),
        ("rite one two three four five six seven", "HarmBench"))]
    assert overlap(rows) == (
        "rows that have a prompt of evaluation: "
        "harmbench 2 (2 by source), strongreject 0, xstest 1, wildjailbreak (1 by source); "
        "not compared with wildjailbreak, gsm8k, math500, aime24, gpqa (no network)")
    assert hub.asked[0] == "walledai/WildJailbreak"         # and none was tried after it
    assert overlap(rows, [f"xstest={BENCHMARKS['xstest'].source}"]).endswith(": xstest 1")


def test_the_harmbench_rows_of_star1(cache):  # noqa: F811
    """31 of the first hundred say that they come from HarmBench; most are not evaluated on."""
    rows = training_rows(sample("star1_first100.json"), "vanilla_harmful")
    assert "harmbench (31 by source)" in overlap(rows)
