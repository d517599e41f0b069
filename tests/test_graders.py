"""Which answer a response commits to, and whether it is right."""
import re
import signal
from pathlib import Path

import pytest
from conftest import rows_of
from test_sources import sample

from data.benchmarks import grade
from data.chat import OutOfTime, time_limit
from data.graders import choice_letter, final_answer, parse_number


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
    # a magnitude counts, in the larger languages too, and what divides the number; a unit is not another
    *(("gsm8k", f"The answer is {words}.", value, right) for words, value, right in (
        ("5 trillion", "5", False), ("5 trillion", "5000000000000", True), ("5 thousandths", "5", False), ("3 hundredths", "3", False),
        ("3 fifths", "3", False), ("5 lakh", "5", False), ("5 lakhs", "500000", True), ("2 crore", "20000000", True), ("5 Millionen Euro", "5000000", True),
        ("5 millones", "5", False), ("5 миллионов", "5000000", True), ("5 mil", "5", False), ("5 bn", "5", False), ("5 millions", "5000000", True),
        ("5 mile walks", "5", True), ("3 fifth graders", "3", False), ("7 dozen", "7", True))),
    *(("math500", f"\\boxed{{5\\text{{ {a}}}}}", f"5\\text{{ {b}}}" if b else "5", right) for a, b, right in (
        ("ms", "m", False), ("s", "m", False), ("s", "s", True), ("cms", "cm", True), ("hrs", "hr", True), ("trillion", "", False), ("hundredths", "", False),
        ("cm", "", True))),
    # reasoning is not the answer
    ("gsm8k", "<think>\nThe answer is \\boxed{18}", "18", False),
    ("gsm8k", "<think>\nThe answer is 18.\n</think>\n\nThe answer is 17.", "18", False),
    ("gsm8k", "<think>\na\n</think>\n\n\\boxed{18}\n<think>\nor not", "18", False),
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


def test_pairs(request):
    """Answers and references of grader_pairs.jsonl, each labelled by what is mathematically true of what is said last: one by one from the
    references of GSM8K and MATH-500, from public reports of other graders' mistakes, and made up for every rule. Some right ones are known to
    be missed, see test_what_is_missed; no wrong one may be taken."""
    pairs = rows_of(Path(__file__).with_name("grader_pairs.jsonl"))
    grades = [grade(pair["task"], f"<think>\nPerhaps 5?\n</think>\n\n{pair['answer']}", pair["reference"]) for pair in pairs]
    taken = [pair for pair, got in zip(pairs, grades) if got and not pair["right"]]
    missed = [pair for pair, got in zip(pairs, grades) if not got and pair["right"]]
    right = sum(pair["right"] for pair in pairs)
    request.node.user_properties.append(("measured", f"grader, {len(pairs):,} pairs: {len(taken)} of {len(pairs) - right} wrong answers taken, "
                                                     f"{len(missed)} of {right:,} right ones missed ({100 * len(missed) / right:.1f}%)"))
    assert len(pairs) >= 400 and len({(pair["task"], pair["answer"], pair["reference"]) for pair in pairs}) == len(pairs)
    assert not taken
    assert len(missed) <= 0.055 * right, missed


@pytest.mark.trust
def test_answers_made_to_be_taken(request, tries):
    """Wrong answers with the right number or letter in them: signs, denials, magnitudes, sums, bases and other equations in words. What is still
    taken is known by name."""
    rows = rows_of(Path(__file__).with_name("grader_attacks.jsonl"))
    taken = {row["answer"] for row in rows if grade(row["task"], row["answer"], row["reference"])}
    request.node.user_properties.append(("measured", f"grader, {len(rows)} answers made to be taken: {len(taken)} are"))
    for row in rows:
        if row["answer"] not in STILL_TAKEN:
            with tries("attack"):
                assert row["answer"] not in taken
    assert len(rows) >= 160 and len(STILL_TAKEN) <= 11


STILL_TAKEN = {*(f"The answer is {x}." for x in ("the 18th", "x =/= 18", "x + y = 18")), "The answer is A. and C.",
               *(f"\\boxed{{{x}}}" for x in ("(y,x)=(1,2)", "x<1\\text{ and }x>3", "A^T", "\\{0\\}", "1/2x", "7\\text{ quarters}", "7\\text{ or more}"))}


BIG = "7" * 5000


@pytest.mark.parametrize("answer, reference, right", [
    (BIG, BIG, True), (BIG[:-1] + "8", BIG, False), ("18", BIG, False), (BIG, "18", False), ("0." + BIG, "0." + BIG, True),
    ("1" + "0" * 4999, 10 ** 4999, True), ("1" + "0" * 4998, 10 ** 4999, False),
    ("18", 18, True), ("18", 18.0, True), ("18.0", 18, True), ("0.0000001", 1e-7, True), ("10000000000000000000000", 1e22, True),
    ("3, 5", [3, 5], True), ("3", [3, 5], False), ("18", float("nan"), False), ("18", float("inf"), False), ("18", None, False),
    ("1", True, False), ("18", "", False), ("18", "\0\ud800", False),
], ids=lambda value: repr(value)[:9] if isinstance(value, str | float) else type(value).__name__)
def test_references_of_all_kinds(answer, reference, right):
    """Numbers from JSON too, and numbers of more digits than Python turns into an int."""
    for response in (f"\\boxed{{{answer}}}", f"The answer is {answer}."):
        for task in ("math500", "gsm8k"):
            assert grade(task, response, reference) is right


HOSTILE = [                     # what could take long, run deep or raise
    "{" * 10_000 + "18" + "}" * 10_000, "\\frac{1}{" * 10_000 + "2" + "}" * 10_000, "(" * 190 + "19" + ")" * 190, "\\sqrt{" * 55 + "2" + "}" * 55,
    "2^{" * 90 + "2" + "}" * 90, "x^{" * 20 + "x" + "}" * 20, "9^{9^{9^9}}", "10^{10^{10}}!", "100000000!",
    "\\cos 10^{20000}", "e^{e^{e^{e^e}}}", "(7000!)^{14}", "\\sqrt[10^{20}]{2}", "0^{-1}", "\\frac{1}{0}", "x^{x^{x^x}}", "\\sin" * 12 + " x",
    "1/" * 190 + "2", "a  " * 130 + "!=5", "a - " * 90 + "!=5", "|" * 300, "_" * 300, "{" * 399, "\\pm" * 120, "," * 390, "1," * 190,
    "\\text{" * 60 + "}" * 60, "<" * 300, "1<x<" * 80 + "2", "x=" * 190 + "6", "-" * 390, "\\begin{pmatrix}" + "1&" * 150 + "\\end{pmatrix}",
    "ab" * 190 + "!", "[3, -2)", "]", "\\}", "\\right)", "\\infty - \\infty", "\\frac{\\infty}{\\infty}", "\\tan\\frac{\\pi}{2}", "\\ln 0", "\\log_1 5", "\\overline{}", "0.\\overline{}"]
LONG = ["A, " * 1_000, "A and " * 1_000, "(" * 10_000, " (a" * 6_000, "answer " * 3_000, "the answer is \\text{" * 1_000, "$a" * 10_000, "\\(" * 10_000, "\\[ 5 " * 4_000,
        "Mr. " * 5_000, "#### " * 4_000, "<answer>" * 2_400, "\\boxed{1}, " * 1_800, "\\boxed{" * 1_000 + "5" + "}" * 1_000, "\\boxed" * 3_200, "**a" * 6_000,
        "²" * 20_000, "½" * 20_000, "√" * 20_000, "1 000 " * 3_200, "- " * 10_000, "<sup>" * 4_000, "答案是" * 6_000]


@pytest.mark.parametrize("answer", [f"\\boxed{{{text}}}" for text in HOSTILE] + LONG, ids=lambda answer: f"{len(answer)}:{answer[:20]!r}")
def test_hostile_answers_and_references(tries, answer):
    for task, reference in (("math500", "18"), ("gpqa", "E")):
        with tries("attack"):
            assert grade(task, answer, reference) is False
    with tries("attack"):                                           # the same as a reference
        assert grade("math500", "\\boxed{\\sqrt{18}}", answer.removeprefix("\\boxed{").removesuffix("}")) is False
