"""What a value in a file must be (data/kinds.py), and how JSON is read that may have been edited."""
import json

import pytest

from data.kinds import COUNT, MAX_DEPTH, Number, describe, find_fault, parse_json, shorten
from data.rows import EVAL_KEYS, GUARDED_KEYS, METRIC_KEYS, TRACE_KEYS, VERDICT
from data.run_record import EVAL, RUN, THEORY

HOSTILE = [None, True, False, -1, 0.5, 10**30, 10**299, 1e308, "", "x\x1b[2J", "\ud800", "nul\0", [], [[1]], {}, {"a": {"b": []}}]


@pytest.mark.parametrize("kind, good, bad", [
    (str, ["", "x"], [None, 1, ["x"]]), (int, [0, -5], [True, 1.0, "1"]), (bool, [True], [0, 1, None, "true"]),
    (COUNT, [0, 2**53 - 1], [-1, 2**53, 1.0, True, "1", None]), (Number(), [0, -1.5, 10**20], [True, "1", None, 10**301, 1e308]),
    (Number(0, 1), [0, 1, 0.5], [-1e-9, 1.01, 10**400]), ((None, str), [None, "x"], [False, 0, []]), (("safe", "unsafe"), ["safe"], ["Safe", ["safe"], {"safe": 1}, None]),
    ((None, 8, 16), [8, None], [8.0, True, "8"]), ([COUNT], [[], [1, 2]], [[1, -1], (1,), None, {"0": 1}]), ({}, [{}, {"a": 1}], [[], None, "x"]),
    ({"a": int, "b?": str}, [{"a": 1}, {"a": 1, "b": "x", "c": None}], [{}, {"a": "1"}, {"a": 1, "b": None}, [("a", 1)]]),
    ({str: {"n": COUNT}}, [{}, {"x?": {"n": 1}}], [{"x": 1}, {"x": {"n": -1}}, {"x": {}}]),
    (({"label": "unknown", "p": None}, {"label": "safe", "p": Number()}), [{"label": "safe", "p": 1}, {"label": "unknown", "p": None}], [{"label": "safe", "p": None}, {"label": ["safe"]}])])
def test_kinds(kind, good, bad):
    assert [find_fault(value, kind) for value in good] == [""] * len(good)
    assert all(find_fault(value, kind) for value in bad) and describe(kind)


@pytest.mark.parametrize("value, kind, fault", [
    ({"rows": -1}, {"rows": COUNT}, "rows must be a whole number from 0, it is -1"),
    ({"a": {"b": [1, "x"]}}, {"a": {"b": [int]}}, "a.b.1 must be int, it is 'x'"),
    ({"c": 1}, {"a": str}, "a must be str, it is missing; found the keys c"), ({}, {"a": str}, "a must be str, it is missing; found the keys (none)"),
    (["x"] * 999, ("safe", None), 'it must be "safe" or null, it is ' + repr(["x"] * 999)[:60] + "..."),
    ({"p": 2}, {"p": (None, Number(0, 1))}, "p must be null or a number from 0 to 1, it is 2"), ([0], (None, [COUNT[1:]]), "0 must be a whole number from 1, it is 0"),
    ({"label": "unknown", "p": 0.5}, ({"label": "safe"}, {"label": "unknown", "p": None}), "label must be \"safe\", it is 'unknown', or p must be null, it is 0.5"),
    (-1, Number(0), "it must be a number from 0, it is -1"), ("x", Number(high=1), "it must be a number to 1, it is 'x'")])
def test_a_fault_says_where_and_what(value, kind, fault):
    assert find_fault(value, kind) == fault


@pytest.mark.trust
@pytest.mark.parametrize("kind", [TRACE_KEYS, GUARDED_KEYS, EVAL_KEYS, VERDICT, METRIC_KEYS, RUN, EVAL, THEORY])
def test_nothing_makes_the_check_itself_fail(tries, kind):
    keys = {key.removesuffix("?") for one in (kind if isinstance(kind, tuple) else [kind]) for key in one}
    for value in HOSTILE:
        with tries("fault"):
            assert len(find_fault(dict.fromkeys(keys, value), kind)) < 400 and len(find_fault(value, kind)) < 400
            assert len(find_fault({str(value): value}, kind)) < 600


@pytest.mark.trust
@pytest.mark.parametrize("data, fault", [
    (b"", "Expecting value"), (b"{", "Expecting"), (b"NaN", "NaN is not JSON"), (b'{"a": -Infinity}', "-Infinity is not JSON"), (b"[1e999]", "1e999 is too large"),
    (b"-1" + b"0" * 400 + b".5", "too large a number"), (b"9" * 400, "a number of 400 digits"), (b"9" * 5000, "a number of 5000 digits"),
    (b'{"a": 1, "a": 1}', "'a' stands there twice"), (b'[{"b": {"a": 1, "c": 2, "a": 3}}]', "'a' stands there twice"), (b"[" * 200_000, "nested too deep"),
    (b'{"a":' * 200_000, "nested too deep"), (b"[" * 900 + b"]" * 900, "nested too deep"), (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "nested too deep"),
    (b'"\xff"', "utf-8"), (b"\xff\xfe{\0}\0", "utf-8"), ("\ufeff{}".encode(), "BOM")])
def test_json_that_is_refused(tries, data, fault):
    with tries("fault"), pytest.raises(ValueError, match=fault):
        parse_json(data)


def test_json_that_is_read():
    value = {"a": [1, -2.5, 1e300, 10**299, "\u2028", None, True, {"b": {}}], "": [[[]]]}
    assert parse_json(json.dumps(value).encode()) == value and parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert shorten("x" * 300) == "x" * 200 + "..." and shorten(5) == "5"
