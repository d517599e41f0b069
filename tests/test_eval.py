"""Intervals, figures and graders."""
import pytest

from eval import figures_of, grade, measure, table, wilson


def test_wilson():
    """Against values of the formula worked out elsewhere (Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29)."""
    for hits, n, low, high in ((81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)):
        assert wilson(hits, n) == pytest.approx((low, high), abs=0.01)
    assert wilson(0, 0) == (0.0, 100.0) and wilson(5, 5)[1] == 100.0


def row(kind, **verdicts):
    return {"set": kind, "unsafe": None, "refused": None, "solved": None, "guard_unsafe": None, **verdicts}


def test_figures():
    rows = [row("harm_plain", unsafe=True, guard_unsafe=False), row("harm_wrapped", unsafe=False, guard_unsafe=False), row("harm_wrapped"),
            row("over_refusal", refused=True), row("reasoning", solved=True), row("reasoning", solved=False)]
    assert figures_of(rows[3]) == [("over_refusal", True)]
    figures = measure(rows)
    assert {k: (v["percent"], v["n"], v["unknown"]) for k, v in figures.items()} == {
        "harm": (50.0, 2, 1), "harm_plain": (100.0, 1, 0), "harm_wrapped": (0.0, 1, 1), "guard_harm": (0.0, 2, 1), "guard_harm_plain": (0.0, 1, 0),
        "guard_harm_wrapped": (0.0, 1, 1), "over_refusal": (100.0, 1, 0), "pass@1": (50.0, 2, 0)}
    text = table({"before": figures, "after": figures}, "oracle", "tiny")
    assert "harm (oracle)" in text and "over-refusal" in text and "pass@1" in text
    assert measure([row("harm_plain")])["harm"]["percent"] is None


@pytest.mark.parametrize("task, response, answer, right", [
    ("tiny", "<think>\n1 + 2 = 3\n</think>\n\nThe answer is 3.", "3", True),
    ("tiny", "<think>\n1 + 2 = 3\n</think>\n\nThe answer is 4.", "3", False),
    ("gsm8k", "<think>\nx\n</think>\n\nThe final answer is 18.00", "16 - 3 - 4 = 9\n#### 18", True),
    ("gsm8k", "The final answer is 19", "#### 18", False),
    ("math500", "So \\boxed{\\frac{1}{2}}", "\\frac{1}{2}", True),
    ("math500", "", "3", False),
    ("math500", "It is \\boxed{p - q}", "p - q", True),
    ("math500", "It is \\boxed{3\\sqrt{13}}", "3\\sqrt{13}", True),
    ("math500", "It is \\boxed{4}", 4, True),
])
def test_grade(task, response, answer, right):
    assert grade(task, response, answer) is right
