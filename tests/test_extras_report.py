"""The report: counts, sizes, what is not there yet, broken files; and the page itself, clicked through in a headless Chromium."""
import base64
import gzip
import hashlib
import json
import random
import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import ROOT, call

from extras.report import compress, curves, histograms, page_rows, script_json, summary, write_report
from thinksafe import LABELS, InputError

HOSTILE = [
    "<script>window.pwned = 1</script>",
    "</script><script>window.pwned = 1</script><!-- <script>",
    "<img src=x onerror='window.pwned=1'><svg onload=window.pwned=1><iframe srcdoc='<script>parent.pwned=1</script>'>",
    "</textarea></title></style><a href='javascript:window.pwned=1'>click</a>&lt;b&gt; &#x3c;script>",
    "nul\0 escape \x1b[2J\x1b]0;title\x07 backspaces" + "\b" * 70000,
    "bidi \u202egnp.exe\u202c \u2066x\u2069 zero\u200bwidth\u200d\ufe0f\u034f\u3164\u2800 tag\U000e0041 lines\u2028and\u2029and\x85next",
    "{{traces}} {{data}} {{policy}} ${x} `y` \\ \" ' $& $1",
    "Z" + "\u0336\u0489" * 300 + " long" * 500 + "x" * 5000,
]


def entry(**more):
    return {"arguments": {"out": "out", "limit": None}, "fingerprint": {"model": "a1b2", "seed": 3, "wording": "Refuse.\n\n{prompt}", "steer": "default"},
            "commit": "c" * 40, "dirty": True, "versions": {"python": "3.11", "torch": "2.13"}, "device": "cpu", "finished": True, "seconds": 2.5, **more}


def trace(i, text="How?", **more):
    label = LABELS[i % 4]
    return {"id": f"{i:04x}", "instruction": f"{text} {i}", "prompt_label": label, "response": f"<think>\nLet me think {i}.\n</think>\n\nAnswer {i}.", "k": 0, "seed": 3,
            "steer": "default" if label.endswith("harmful") else "none", "finish_reason": "stop", "n_tokens": 20 + i % 50, **more}


def judged(i, text="How?", **more):
    unsafe, unknown = i % 10 == 3, i % 10 == 7
    return trace(i, text, **{"response_label": "unsafe" if unsafe else "unknown" if unknown else "safe", "p_unsafe": None if unknown else 0.9 if unsafe else 0.01 * (i % 7),
                       "guard": "tiny", "reason": "no_verdict" if unknown else None, "keep": not (unsafe or unknown), **more})


def answer(i, when, **more):
    kind = ("harm_plain", "harm_wrapped", "over_refusal", "reasoning")[i % 4]
    good = when == "after"
    return trace(i, "Asked", **{"set": kind, "when": when, "unsafe": not good if i % 4 < 2 else None, "refused": False if i % 4 == 2 else None, "solved": i % 8 == 3 if i % 4 == 3 else None,
                                "guard_unsafe": not good if i % 4 < 2 else None, "answer": "7", "task": "tiny", **more})


def figure(percent, n=200):
    return {"percent": percent, "low": max(0, percent - 3), "high": min(100, percent + 3), "n": n, "unknown": 1}


FIGURES = {"judge": "oracle", "guard": "tiny",
           "before": {"harm": figure(92.25), "harm_plain": figure(85.0), "over_refusal": figure(0.0), "pass@1": figure(80.0), "pass@1_sums": figure(81.0), "pass@1_aime": figure(8.0)},
           "after": {"harm": figure(1.5), "harm_plain": figure(0.5), "over_refusal": figure(2.0), "pass@1": figure(79.0), "pass@1_aime": {**figure(9.0, 240), "problems": 30},
                     "pass@1_sums": {"percent": None, "low": None, "high": None, "n": 0, "unknown": 9}},
           "paper": {"before": {"harm": 38.2}, "after": {"harm": 9.6}}}
METRICS = [{"step": i + 1, "loss": 1 / (i + 1), "ce": 0.6 / (i + 1), "kl": 0.4 / (i + 1), "lr": 1e-4, "grad_norm": 0.1, "tokens": 100} for i in range(30)]


def write(out, samples=(), guarded=(), metrics=(), answers=(), figures=None, **run):
    out.mkdir(exist_ok=True)
    for name, rows in (("samples", samples), ("guarded", guarded), ("metrics", metrics), ("eval", answers)):
        if rows:
            (out / f"{name}.jsonl").write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    if figures:
        (out / "eval.json").write_text(json.dumps(figures))
    (out / "run.json").write_text(json.dumps(run))
    return out


def whole_run(out, n_train=200, n_eval=80, texts=()):
    """A run of all four stages; texts: prompts and responses of further rows, of training and of evaluation."""
    rows = [trace(i) for i in range(n_train)] + [trace(0, id=f"train-{i}", instruction=text, response=text) for i, text in enumerate(texts)]
    guarded = [judged(i) for i in range(n_train)] + [judged(0, id=f"train-{i}", instruction=text, response=text) for i, text in enumerate(texts)]
    answers = [answer(i, when) for when in ("before", "after") for i in range(n_eval)]
    answers += [answer(0, when, id=f"eval-{i}", instruction=text, response=f"<think>{text}</think>{text}") for when in ("before", "after") for i, text in enumerate(texts)]
    return write(out, rows, guarded, METRICS, answers, FIGURES, sample=entry(model="tiny/student", rows=len(rows), tokens=9000), guard=entry(guard="tiny"),
                 train=entry(rows=160, steps=30, train_tokens=3000, skipped={"unsafe": 20, "too_long": 4}), eval=entry(note=HOSTILE[1] + HOSTILE[6]))


class Page(HTMLParser):
    """The scripts, styles and policy of a page, as an HTML parser sees them."""

    def __init__(self, path):
        super().__init__()
        self.scripts, self.styles, self.policy, self.inside = [], [], None, None
        self.feed(path.read_text("utf-8"))
        self.facts = json.loads(self.scripts[0])
        self.rows = json.loads(gzip.decompress(base64.b64decode(json.loads(self.scripts[1]))))

    def handle_starttag(self, tag, attrs):
        if tag == "meta" and dict(attrs).get("http-equiv"):
            self.policy = dict(attrs)["content"]
        self.inside = {"script": self.scripts, "style": self.styles}.get(tag)

    def handle_data(self, data):
        if self.inside is not None:
            self.inside.append(data)

    def handle_endtag(self, tag):
        self.inside = None


def test_counts():
    guarded = [judged(i) for i in range(200)]
    found = summary(guarded, [answer(i, when) for when in ("before", "after") for i in range(40)])
    assert sum(of["n"] for of in found["labels"].values()) == sum(of["judged"] for of in found["labels"].values()) == 200
    assert sum(of["kept"] for of in found["labels"].values()) == 160
    label = found["labels"][LABELS[1]]
    assert label["kept"] == 30 and label["percent"] == 60 and label["low"] == pytest.approx(46.18, abs=0.01)     # Wilson, 30 of 50
    assert {why: sum(by.values()) for why, by in found["dropped"].items()} == {"unsafe": 20, "no_verdict": 20}
    assert {name: sum(of["counts"]) for name, of in found["lengths"]["groups"].items()} == dict.fromkeys(LABELS, 50)
    assert found["eval_lengths"]["groups"]["harm_plain after"]["n"] == 10
    not_taken = summary([judged(0, keep=False, reason=None)], [])
    assert dict(not_taken["dropped"]) == {"not_kept": {LABELS[0]: 1}}


def test_curves_are_means_of_equal_parts():
    rows = [{"step": i + 1, "loss": float(i), "note": "text"} for i in range(1000)]
    found = curves(rows, max_points=100)
    assert found["every"] == 10 and found["step"][0] == 10 and list(found["lines"]) == ["loss"] and found["lines"]["loss"][:2] == [4.5, 14.5]
    assert curves([]) == {"every": 1, "step": [], "lines": {}}


def test_histogram_keeps_every_trace():
    found = histograms({"a": [0, 9, 10, 99, 100, 100000], "b": [50] * 1000})
    assert sum(found["groups"]["a"]["counts"]) == 6 and found["groups"]["a"]["counts"][-1] == 3 and found["groups"]["b"]["median"] == 50


@pytest.mark.trust
def test_script_json_holds_no_markup(tries):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    @hypothesis.given(st.recursive(st.text() | st.sampled_from(HOSTILE), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
    @hypothesis.settings(deadline=None, max_examples=40)
    def check(value):
        with tries("attack"):
            text = script_json(value)
            assert text.isascii() and not set(text) & set("<>&\u2028\u2029") and json.loads(text) == value
    check()


@pytest.mark.trust
def test_page_parses_as_written(tries, tmp_path):
    """Three scripts and no more, whatever the rows say; all rows arrive; the policy names the page's own script and style."""
    out = whole_run(tmp_path / "out", texts=HOSTILE)
    write_report(out)
    page = Page(out / "report.html")
    assert len(page.scripts) == 3 and len(page.styles) == 1
    assert page.facts["run"]["eval"]["note"] == HOSTILE[1] + HOSTILE[6] and page.facts["rows"] == page.facts["shown"] == len(page.rows) == 200 + 80 + 2 * len(HOSTILE)
    for i, text in enumerate(HOSTILE):
        with tries("attack"):
            row = next(row for row in page.rows if row["id"] == f"train-{i}")
            assert row["instruction"] == row["traces"][0]["response"] == text and row["traces"][0]["guard"] == "tiny"
    pair = next(row for row in page.rows if row["stage"] == "eval")["traces"]
    assert [t["when"] for t in pair] == ["before", "after"]
    for content in (page.scripts[2], page.styles[0]):
        assert base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() in page.policy
    assert "unsafe-inline" not in page.policy and page.policy.startswith("default-src 'none';")


@pytest.mark.trust
@pytest.mark.trust
def test_what_is_hidden_reaches_the_page_as_escapes(tries, tmp_path):
    """Names, labels, reasons, keys of metrics: everywhere but in prompts and responses, which the page shows itself."""
    hidden = "\u202e\u200d\ufe0f\u3164\u2800\U000e0041\x1b\u2028"
    out = tmp_path / f"out{hidden}"
    rows = [judged(i, "Hi" + hidden, reason=f"why{hidden}", source=hidden, **{hidden: [hidden]}) for i in range(4)]
    write(out, (), rows, [{"step": 1, "tokens": 1, f"loss{hidden}": 1.0}], [answer(0, "after", task=hidden, set=hidden)], {**FIGURES, "judge": hidden}, sample=entry(model=hidden))
    write_report(out)
    page = Page(out / "report.html")
    with tries("attack"):
        assert not set(hidden) & set(json.dumps(page.facts, ensure_ascii=False)) and r"\\u202e" in json.dumps(page.facts)
    with tries("attack"):
        assert [row.pop("instruction") for row in page.rows][0] == rows[0]["instruction"] and not set(hidden) & set(json.dumps(page.rows, ensure_ascii=False))


def test_nothing_is_loaded():
    text = (ROOT / "extras" / "report.html").read_text()
    assert re.findall(r"https?://[^\"\s]*", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"\ssrc=|url\(|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text)


def test_size_of_long_traces(tmp_path):
    """2,000 rows of 3,000 characters of word salad fit; what does not fit is left out by a rule that the page states."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]
    rows = [judged(i, response="<think>" + " ".join(rng.choices(words, k=500)) + "</think>Yes.") for i in range(2000)]
    out = write(tmp_path / "out", guarded=rows, guard=entry())
    assert write_report(out).startswith("2,000 of 2,000 rows") and (out / "report.html").stat().st_size < 5e6
    assert not write_report(out, max_mb=0.5).startswith("2,000") and (out / "report.html").stat().st_size < 0.6e6
    page = Page(out / "report.html")
    assert page.facts["shown"] == len(page.rows) > 100 and sum(of["n"] for of in page.facts["labels"].values()) == 2000


def test_changed_verdicts_are_the_last_to_be_left_out():
    rows = page_rows([answer(i, when) for when in ("before", "after") for i in range(400)], "eval")
    keep, n = compress(rows, 2500)
    kept = json.loads(gzip.decompress(base64.b64decode(keep)))
    assert 10 < n == len(kept) < 200 and all(row["set"].startswith("harm") for row in kept) and len(keep) <= 2500
    again = json.loads(gzip.decompress(base64.b64decode(compress(rows[::-1], 2500)[0])))
    assert len({row["id"] for row in kept} & {row["id"] for row in again}) > 0.9 * min(n, len(again))            # the order of the file does not choose
    huge = page_rows([answer(0, "before", response=random.Random(0).randbytes(9000).hex())], "eval")
    assert compress(huge, 1000)[1] == 0


def test_a_text_of_a_megabyte_is_cut():
    row, = page_rows([trace(0, response="x" * 1_000_000)], "train")
    assert len(row["traces"][0]["response"]) < 201_000 and "800,000 more characters" in row["traces"][0]["response"]


STAGES = [dict(samples=[trace(i) for i in range(12)], sample=entry(finished=False)), dict(guarded=[judged(i) for i in range(12)], guard=entry()),
          dict(metrics=METRICS, train=entry(rows=9, steps=30)), dict(answers=[answer(i, "before", unsafe=None, refused=None, solved=None) for i in range(8)], eval=entry(finished=False)),
          dict(answers=[answer(i, when) for when in ("before", "after") for i in range(8)], figures=FIGURES, eval=entry())]


@pytest.mark.parametrize("n", range(len(STAGES)))
def test_after_each_stage(tmp_path, n):
    parts = {key: value for stage in STAGES[:n + 1] for key, value in stage.items()}
    out = write(tmp_path / "out", **parts)
    if n == 1:                                                             # guard.py is at work: some rows judged, one being written
        (out / "guarded.jsonl").write_bytes(b"".join(line + b"\n" for line in (out / "guarded.jsonl").read_bytes().split(b"\n")[:5]) + b'{"id": "00')
    done = call("extras.report", "--out", out)
    assert done.returncode == 0, done.stderr
    facts = Page(out / "report.html").facts
    assert len(facts["labels"]) == 4 and facts["measured"] == (n == 4) and bool(facts["curves"]["step"]) == (n >= 2)
    assert sum(of["judged"] for of in facts["labels"].values()) == (0, 5, 12, 12, 12)[n] and facts["rows"] == (12 if n < 3 else 20)


def test_nothing_there(tmp_path):
    done = call("extras.report", "--out", tmp_path / "none")
    assert done.returncode == 2 and "nothing to report" in done.stderr and not (tmp_path / "none").exists()
    out = whole_run(tmp_path / "out")
    assert call("extras.report", "--out", out, "--compare", tmp_path).returncode == 2


@pytest.mark.parametrize("name, content", [
    ("samples.jsonl", b'{"id": 1}\n'), ("samples.jsonl", b"{}\n[]\n"), ("guarded.jsonl", b"nonsense\n"), ("eval.jsonl", b'{"id": "x", "instruction"\n'),
    ("guarded.jsonl", json.dumps(judged(1, p_unsafe="high")).encode() + b"\n"), ("guarded.jsonl", json.dumps(judged(1, reason=[])).encode() + b"\n"),
    ("eval.jsonl", json.dumps(answer(1, None)).encode() + b"\n"), ("eval.jsonl", json.dumps(answer(1, "before", set=3)).encode() + b"\n"),
    ("metrics.jsonl", b'{"step": NaN}\n'), ("run.json", b"{"), ("run.json", b'{"sample": {"fingerprint": {}, "finished": true, "seconds": NaN}}'),
    ("eval.json", b"[]"), ("eval.json", b'{"before": {}}'), ("eval.json", b'{"before": {"harm": {"percent": "high"}}, "after": {}}'),
    ("eval.json", b'{"before": {"harm": {"percent": Infinity}}, "after": {}}'),
])
def test_a_broken_file_is_named(tmp_path, name, content):
    out = whole_run(tmp_path / "out", 8, 8)
    write_report(out)
    old = (out / "report.html").read_bytes()
    (out / name).write_bytes(content)
    done = call("extras.report", "--out", out)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert str(out / name) in done.stderr and (out / "report.html").read_bytes() == old


def test_other_runs_beside_it(tmp_path):
    out, other = whole_run(tmp_path / "out"), write(tmp_path / "kl", figures=FIGURES)
    write_report(out, [other])
    assert [run["name"] for run in Page(out / "report.html").facts["runs"]] == [str(out), str(other)]
    with pytest.raises(InputError, match="no eval.json"):
        write_report(out, [tmp_path])


# ---------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page is not clicked through")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not path:
        pytest.skip("no Chromium here: the page is not clicked through")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    out = whole_run(tmp_path_factory.mktemp("big") / "out", 3000, 2000, HOSTILE)
    write_report(out)
    return out / "report.html"


@pytest.fixture
def visit(chromium):
    """f(path, width, height, scheme) -> the page, read in; at the end: no script failed, nothing was loaded but the page itself."""
    contexts, faults = [], []

    def opened(path, width=1280, height=900, scheme="light", ready="#reader:not([hidden])"):
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(10000)
        page.on("pageerror", lambda e: faults.append(str(e)))
        page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
        page.on("dialog", lambda d: faults.append("dialog"))
        page.on("request", lambda r: faults.append(r.url) if r.url != path.as_uri() else None)
        page.goto(path.as_uri())
        page.wait_for_selector(ready)
        return page
    opened.faults = faults
    yield opened
    for context in contexts:
        context.close()
    assert not faults


def count(page):
    return int(page.inner_text("#count").split()[0].replace(",", ""))


def test_filters(visit, big):
    page = visit(big)
    extra = len(HOSTILE)
    assert count(page) == 5000 + 2 * extra and page.locator(".row").count() < 40                 # only the rows in sight exist
    page.select_option("#stage", label=f"evaluation ({2000 + extra:,})")
    assert count(page) == 2000 + extra
    page.select_option("#label", label="reasoning tiny (500)")
    page.select_option("#verdict", label="wrong (250)")
    assert count(page) == 250 and page.locator("#trace .verdict.bad").count() == 2
    page.keyboard.press("Escape")                                                               # a select has the focus: leaves it
    page.keyboard.press("Escape")                                                               # and again: all rows
    assert count(page) == 5000 + 2 * extra
    page.select_option("#verdict", label=f"got better ({1000 + extra:,})")
    assert page.locator("#trace article").all_inner_texts()[0].startswith("Before training") and page.inner_text(".row >> nth=0").count("→") == 1
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.fill("#text", "LET ME THINK 1234.")
    assert count(page) == 2 and page.inner_text("#trace mark >> nth=0") == "Let me think 1234."        # found in the reasoning, which unfolds
    for odd in "a-b", "\\", "/", "[", "]", "$&", "\u202e", ".*(":
        page.fill("#text", odd)                                                                 # any text is a search, no pattern
    assert page.inner_text("#trace").startswith("No row matches")
    page.fill("#text", "")
    page.select_option("#order", label="p_unsafe, highest first")
    assert "p_unsafe 0.90" in page.inner_text(".row >> nth=0")
    page.get_by_role("button", name="Read the 250 wrong").click()
    assert count(page) == 250


def test_keyboard(visit, big):
    page = visit(big)
    def place():
        return page.inner_text("#place").split()[0]
    for key in "jjjk":
        page.keyboard.press(key)
    assert place() == "3" and page.inner_text(".row[aria-selected=true] p") == page.inner_text("#trace .prompt")
    page.focus("#list")
    page.keyboard.press("End")
    assert place() == f"{5000 + 2 * len(HOSTILE):,}" and page.locator(".row[aria-selected=true]").is_visible()
    assert page.get_attribute("#list", "aria-activedescendant") == page.get_attribute(".row[aria-selected=true]", "id")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("PageDown")
    assert int(place()) > 4
    assert page.locator("#trace details").first.get_attribute("open") is None
    page.keyboard.press("o")
    assert page.locator("#trace .think").first.is_visible()
    page.keyboard.press("j")
    assert page.locator("#trace .think").first.is_visible()                                        # stays unfolded from trace to trace
    page.click("#trace summary")
    assert not page.locator("#trace .think").first.is_visible()
    page.keyboard.press("/")
    page.keyboard.type("jo")
    assert page.input_value("#text") == "jo"
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    assert page.input_value("#text") == ""
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()


@pytest.mark.trust
def test_hostile_rows_are_inert_and_visible(tries, visit, big):
    page = visit(big)
    for i, text in enumerate(HOSTILE):
        for found, cards in ((f"train-{i}", 1), (f"eval-{i}", 2)):
            with tries("attack"):
                page.fill("#text", found)
                page.locator("#trace .about", has_text=f"id {found}").first.wait_for()
                assert page.locator("#trace article").count() == cards
                seen = page.locator("#trace .prompt").text_content()
                assert seen.startswith(text[:3]) and not re.search("[\0\x1b\x85\u202a-\u202e\u2028\u2066-\u2069\u200b\u200d\ufe0f\u034f\u3164\u2800\U000e0041]", seen)
                if i in (0, 1, 2, 3, 6):
                    assert seen == text
    page.fill("#text", "train-4")
    assert {"U+0000", "U+001B", "U+0007", "U+0008 ×70000"} <= set(page.locator("#trace .prompt .ctl").all_inner_texts())
    page.fill("#text", "eval-5")
    assert {"U+202E", "U+2066", "U+200B", "U+200D", "U+FE0F", "U+034F", "U+3164", "U+2800", "U+E0041", "U+2028", "U+0085"} <= set(page.locator("#trace .prompt .ctl").all_inner_texts())
    page.locator("#made summary").last.click()
    assert page.evaluate("window.pwned") is None and page.locator("script").count() == 3 and page.locator("img, iframe, a[href^=javascript]").count() == 0
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.pwned = 2'}))")
    assert page.evaluate("window.pwned") is None                                                      # the policy holds even for what slips through
    assert len(visit.faults) == 1 and "Content Security Policy" in visit.faults.pop()


def test_result_and_plots(visit, tmp_path):
    out, other = whole_run(tmp_path / "out"), write(tmp_path / "kl", figures=FIGURES)
    write_report(out, [other])
    page = visit(out / "report.html")
    page.wait_for_selector("#training svg[role=img]")
    text = page.inner_text("#result")
    assert "92.2 → 1.5 %" in text and "0.0 → 2.0 %" in text and "[89.2, 95.2]" in text and "sums" in text and "38.2 → 9.6" in text and "30 × 8" in text
    assert page.locator(".figures >> nth=0").locator("tbody th").all_inner_texts() == ["harm", "over-refusal", "pass@1", "sums", "aime"]      # an only part is left out
    labels = page.locator("svg[role=img]").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert all(labels) and any("kl harm 1.5 [0.0, 4.5]" in label for label in labels) and any(label.startswith("loss per target token over 30 points: loss 1 → 0.0333, ce") for label in labels)
    data = page.inner_text("#data")
    assert "30 of 50" in data and "the guard gave no verdict" in data and "longer than --max-length" in data
    assert "cccccccccccc with local changes" in page.inner_text("#made")


@pytest.mark.parametrize("width, height", [(390, 844), (1280, 900)])
def test_widths(visit, big, width, height):
    page = visit(big, width, height)
    page.wait_for_selector("#training svg[role=img]")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.locator(".row >> nth=1").click()
    assert page.locator("#trace").is_visible() and page.locator("#list").is_visible() == (width > 760)
    if width < 760:
        page.get_by_role("button", name="Next trace").click()
        assert page.inner_text("#place").startswith("3 of")
        page.get_by_role("button", name="List").click()
        assert page.locator(".row[aria-selected=true]").is_visible() and not page.locator("#trace").is_visible()


def test_light_dark_and_print(visit, big):
    def background(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")
    light, dark = visit(big), visit(big, scheme="dark")
    assert background(light) != background(dark)
    light.keyboard.press("t")
    dark.get_by_role("button", name="Light").click()
    assert background(light) == "rgb(19, 21, 25)" and background(dark) == "rgb(250, 249, 246)"
    light.emulate_media(media="print")
    assert background(light) == "rgb(255, 255, 255)" and not light.locator("nav, #list, .tools").locator("visible=true").count()
    assert light.locator("#trace .prompt").is_visible() and light.pdf().startswith(b"%PDF")


@pytest.mark.parametrize("n", range(len(STAGES)))
def test_page_after_each_stage(visit, tmp_path, n):
    out = write(tmp_path / "out", **{key: value for stage in STAGES[:n + 1] for key, value in stage.items()})
    write_report(out)
    page = visit(out / "report.html")
    missing = page.locator(".absent").all_inner_texts()
    assert [any(f"{name}.py" in text for text in missing) for name in ("guard", "train", "eval")] == [n < 1, n < 2, n < 4]
    assert page.locator(".row").count() > 0


def test_page_of_training_on_other_rows(visit, tmp_path):
    """`train.py --data FILE` alone leaves no traces."""
    out = write(tmp_path / "out", metrics=METRICS, train=entry(rows=9, steps=30))
    write_report(out)
    page = visit(out / "report.html", ready="#training svg[role=img]")
    assert "No traces are sampled yet" in page.inner_text("#data") and "No traces yet" in page.inner_text("#traces")
