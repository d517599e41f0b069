"""
What is in a file: strict JSON, and a small language that says what a value must be.

    from data.kinds import COUNT, Number, find_fault, parse_json
    find_fault(parse_json(b'{"rows": -1}'), {"rows": COUNT, "share?": Number(0, 1)})
    # -> 'rows must be a whole number from 0, it is -1'

Each file of a run has one kind, and everything that reads the file goes by it: those of JSONL files
are in data/rows.py, those of run.json, eval.json and theory.json in data/run_record.py.
"""
import json
import math
from typing import NamedTuple

class Number(NamedTuple):
    """The kind of an int or float from low to high."""
    low: float = -1e300
    high: float = 1e300

COUNT = range(2**53)                    # what lies beyond is rounded in a report's JavaScript
POSITIVE = range(1, 2**53)
TOKENS = range(2**31)                   # of one text, and the numbers of its samples
MAX_DEPTH = 50                          # of lists and objects within each other

def shorten(text, length=200):
    """Return a text for an error, cut where it is long."""
    text = str(text)
    return text if len(text) <= length else f"{text[:length]}..."

def parse_json(data, make_object=dict):
    """Parse JSON (bytes). Raises ValueError for what is no JSON in UTF-8 and for what not every
    reader would understand alike: NaN, numbers beyond a float's, a key twice in an object, objects
    and lists that are nested deeper than MAX_DEPTH.

    make_object: f([(key, value), ...]), such as a subclass of dict."""
    def reject(constant):
        raise ValueError(f"{constant} is not JSON")

    def parse_int(digits):
        if len(digits) > 300:
            raise ValueError(f"a number of {len(digits)} digits")
        return int(digits)

    def parse_float(digits):
        if math.isinf(value := float(digits)):
            raise ValueError(f"{shorten(digits, 20)} is too large a number")
        return value

    def without_repeats(pairs):
        found = make_object(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {shorten(max(keys, key=keys.count), 50)!r} stands there twice")
        return found
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=reject, parse_int=parse_int,
                           parse_float=parse_float, object_pairs_hook=without_repeats)
    except RecursionError:
        raise ValueError("nested too deep")
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = []
        for x in level:
            if isinstance(x, dict | list):
                inner += x.values() if isinstance(x, dict) else x
        level = inner
    if level:
        raise ValueError("nested too deep")
    return value

def describe(kind):
    """Return a kind in words."""
    if isinstance(kind, Number):
        lower = f" from {kind.low:g}" if kind.low > -1e300 else ""
        return f"a number{lower}" + (f" to {kind.high:g}" if kind.high < 1e300 else "")
    if isinstance(kind, tuple):
        return " or ".join(dict.fromkeys(map(describe, kind)))
    if isinstance(kind, range):
        upper = f" to {kind.stop - 1}" if kind.stop < 2**53 else ""
        return f"a whole number from {kind.start}{upper}"
    if isinstance(kind, dict | list):
        return "an object" if isinstance(kind, dict) else "a list"
    return kind.__name__ if isinstance(kind, type) else json.dumps(kind)

def find_fault(value, kind, name="it"):
    """Say where a value, called `name`, is not of a kind, "" if it is. A kind is one of

        a type              bool is no int; {} for an object, whatever is in it
        a Number, a range   numbers from, to; whole numbers
        a tuple of kinds    one of them
        {"key": kind, ...}  an object, which may have other keys too; "key?" may be missing
        {str: kind}         an object of such values
        [kind]              a list of such values
        any other value     this very one
    """
    if isinstance(kind, Number):
        fits = type(value) in (int, float) and kind.low <= value <= kind.high
    elif isinstance(kind, tuple):
        faults = [find_fault(value, one, name) for one in kind]
        fits = "" in faults
        inner = [fault for one, fault in zip(kind, faults)
                 if isinstance(value, dict | list) and isinstance(one, type(value))]
        if not fits and inner:                       # what it lacks to be any of these
            return ", or ".join(inner)
    elif isinstance(kind, range):
        fits = type(value) is int and value in kind
    elif isinstance(kind, dict | list) and isinstance(value, type(kind)):
        faults = _inner_faults(value, kind, "" if name == "it" else f"{name}.")
        return next(filter(None, faults), "")
    elif isinstance(kind, type):
        fits = type(value) is kind
    else:
        fits = type(value) is type(kind) and value == kind
    return "" if fits else f"{name} must be {describe(kind)}, it is {shorten(repr(value), 60)}"

def _inner_faults(value, kind, prefix):
    """Yield what is wrong with each value of a list or an object."""
    if isinstance(kind, list):
        value, kind = dict(enumerate(value)), {str: kind[0]}
    if str in kind:
        for key, x in value.items():
            yield find_fault(x, kind[str], f"{prefix}{key}")
        return
    for key, inner in kind.items():
        name = key.removesuffix("?")
        if name in value:
            yield find_fault(value[name], inner, f"{prefix}{name}")
        elif name == key:
            yield (f"{prefix}{key} must be {describe(inner)}, it is missing; found the keys "
                   + shorten(", ".join(value) or "(none)"))
