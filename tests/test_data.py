"""Prompts, training rows and evaluation sets by name and by path, and what is said where they cannot be had."""
import json
import os
import re
import urllib.error
from pathlib import Path

import pytest
from conftest import ROOT, call, rows_of

import data
from data import (
    EVAL_SETS,
    LABELS,
    SETS,
    Unavailable,
    evaluation_rows,
    label_counts,
    load_rows,
    overlap,
    prompt_rows,
    read_table,
    training_rows,
)
from thinksafe import InputError

SAMPLES = Path(os.environ.get("THINKSAFE_DATA", ROOT.parent / "shared" / "data"))


def sample(name):
    """A small real sample of a public set, which the project does not ship."""
    if not (SAMPLES / name).exists():
        pytest.skip(f"no {name} in {SAMPLES}; THINKSAFE_DATA says where the samples are")
    return SAMPLES / name


def write(path, content):
    """Rows into a file of the format that its suffix names, or text or bytes as they are."""
    if isinstance(content, str | bytes):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        import pyarrow
        from pyarrow import parquet
        parquet.write_table(pyarrow.Table.from_pylist(content), path)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache in an empty folder, offline -> f(url, content): as if the URL had been downloaded before."""
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(url, content):
        path = tmp_path / "hub" / "thinksafe" / data.content_id(url) / url.rsplit("/", 1)[-1]
        path.parent.mkdir(parents=True)
        write(path, content)
    return put


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub: f(splits or exception) is what the next data set is; `.asked` what was asked for. The builders are real ones."""
    import datasets
    real = datasets.load_dataset_builder

    def give(content):
        def builder(name, config=None, revision=None):
            give.asked = name, config, revision
            if isinstance(content, Exception):
                raise content
            files = {split: str(write(tmp_path / f"{split}.jsonl", rows)) for split, rows in content.items()}
            made = real("json", data_files=files, cache_dir=str(tmp_path / "cache"))
            made.hash = "c" * 40
            return made
        monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    return give


# ---- files

ROWS = [{"id": "a", "prompt": 'He said: "no",\nand went', "label": "safe"}, {"id": "b", "prompt": "naïve 😀\r\nline", "label": "unsafe"}]
CSV = 'id,prompt,label\r\na,"He said: ""no"",\nand went",safe\r\nb,"naïve 😀\r\nline",unsafe\r\n'

TSV = 'id\tprompt\tlabel\na\t"He said: ""no"",\nand went"\tsafe\nb\t"naïve 😀\r\nline"\tunsafe\n'


@pytest.mark.parametrize("name, content", [
    ("x.jsonl", ROWS), ("x.json", ROWS), ("x.parquet", ROWS), ("x.csv", CSV), ("x.tsv", TSV),
    ("bom.csv", b"\xef\xbb\xbf" + CSV.encode()), ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    ("crlf.jsonl", "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in ROWS)), ("X.JSONL", "\n".join(map(json.dumps, ROWS))),
    ("groups.json", {"one": ROWS[:1], "two": ROWS[1:]}),
])
def test_every_format_gives_the_same_rows(tmp_path, name, content):
    assert read_table(write(tmp_path / name, content)) == ROWS


def test_a_field_of_megabytes(tmp_path):
    text = "word, " * 500_000
    assert read_table(write(tmp_path / "x.csv", f'prompt,label\n"{text}",safe\n')) == [{"prompt": text, "label": "safe"}]


def test_what_json_cannot_hold_is_made_plain(tmp_path):
    from datetime import date
    row, = read_table(write(tmp_path / "x.parquet", [{"prompt": "x", "when": date(2026, 1, 2), "score": float("nan"), "list": [1, None]}]))
    assert row == {"prompt": "x", "when": "2026-01-02", "score": None, "list": [1, None]}


@pytest.mark.parametrize("name, content, message", [
    ("x.txt", "a", "ends in .jsonl .json .csv .parquet .tsv"), ("x.csv", "", "no rows"), ("x.csv", "prompt,label\n", "no rows"), ("x.json", "[]", "no rows"),
    ("x.csv", "prompt,label\na,safe\nb\n", "row 2: not as many fields"), ("x.csv", "prompt,label\na,safe,c\n", "row 1: not as many fields"),
    ("x.csv", 'prompt,label\na,safe\n"never closed,safe\n', "row 2: not CSV"), ("x.csv", b"prompt\n\xff\xfe\n", "not a .csv file"),
    ("x.json", '{"a": 1}', "not a list of objects"), ("x.json", '{"a": 1}\n{"a": 2}\n', "JSON lines go into .jsonl"), ("x.json", '[{"a": 1}, 3]', "row 2"),
    ("x.json", '[{"a": NaN}]', "row 1"), ("x.json", '[{"a": "\\ud800"}]', "row 1"), ("x.json", "[" * 100_000, "not a .json file"),
    ("x.jsonl", '{"a": 1}\n{', "x.jsonl:2"), ("x.parquet", "PAR1 not at all", "not a .parquet file"),
])
def test_unreadable_files_are_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as e:
        read_table(path)
    assert message in str(e.value) and str(path) in str(e.value)


def test_missing_files_and_unknown_sources(tmp_path):
    for source, message in ((tmp_path / "no.csv", "cannot be read"), (tmp_path, "ends in"), ("no_such_set", "or one of safechain, eopsa"), ("a/b/c", "no such file")):
        with pytest.raises(InputError, match=message):
            load_rows(source)


# ---- columns and labels


@pytest.mark.parametrize("row, instruction, label", [
    ({"instruction": "x", "prompt_label": "adversarial_benign"}, "x", "adversarial_benign"),
    ({"instruction": "x", "label": "vanilla_harmful", "response": "r"}, "x", "vanilla_harmful"),                                      # SafeChain
    ({"problem": "x", "answer": "", "data_type": "safety", "safechain_label": "adversarial_harmful", "problem_id": 0}, "x", "adversarial_harmful"),     # EOPSA
    ({"problem": "x", "data_type": "safety", "safechain_label": "wildjailbreak"}, "x", "vanilla_harmful"),
    ({"problem": "x", "data_type": "overreject", "safechain_label": "vanilla_benign"}, "x", "vanilla_benign"),
    ({"vanilla": "v", "adversarial": "x", "completion": "", "data_type": "adversarial_harmful"}, "x", "adversarial_harmful"),         # WildJailbreak
    ({"vanilla": "x", "adversarial": None, "completion": "", "data_type": "vanilla_benign"}, "x", "vanilla_benign"),
    ({"adversarial": "x", "label": 1, "data_type": "adversarial_harmful"}, "x", "adversarial_harmful"),
    ({"id": 3, "prompt": "x", "type": "homonyms", "label": "safe"}, "x", "vanilla_benign"), ({"prompt": "x", "label": "unsafe"}, "x", "vanilla_harmful"),     # XSTest
    ({"question": "x", "source": "4o_rewrite"}, "x", "vanilla_benign"),                                                               # SafeKey
])
def test_known_columns(tmp_path, row, instruction, label):
    found, = prompt_rows(write(tmp_path / "x.jsonl", [row]))
    assert (found["instruction"], found["prompt_label"]) == (instruction, label)
    assert found["id"] == (str(row["id"]) if "id" in row else data.content_id(label, instruction)) and "response" not in found


def test_rows_without_a_label_need_one(tmp_path):
    path = write(tmp_path / "x.csv", "category,source,forbidden_prompt\nc,DAN,How?\n")
    with pytest.raises(InputError, match="row 1: no label .*--label"):
        prompt_rows(path)
    assert prompt_rows(path, "vanilla_harmful") == [{"id": data.content_id("vanilla_harmful", "How?"), "instruction": "How?", "prompt_label": "vanilla_harmful", "source": "DAN"}]
    behaviors = write(tmp_path / "b.csv", "Behavior,ContextString\nDo it,\nDo that,Some text\n")
    assert [r["instruction"] for r in prompt_rows(behaviors, "vanilla_harmful")] == ["Do it", "Some text\n\n---\n\nDo that"]


@pytest.mark.parametrize("rows, message", [
    ([{"prompt": "x", "label": "harmfull"}], "row 1: label is 'harmfull', not one of"), ([{"prompt": "x", "label": "safe"}, {"prompt": "x", "label": 1}], "row 2: label is 1"),
    ([{"prompt": ["x"], "label": "safe"}], "row 1: no text under .*found the keys prompt, label"), ([{"id": [1], "prompt": "x", "label": "safe"}], "row 1: id must be"),
    ([{"id": 1, "prompt": "x", "label": "safe"}, {"id": "1", "prompt": "y", "label": "safe"}], "row 2: id '1' is used"),
    ([{"refusal": "I cannot"}], "row 1: 'refusal' is not"),
])
def test_unknown_columns_and_labels_are_named(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        prompt_rows(write(tmp_path / "x.jsonl", rows), "vanilla_harmful")


def test_repeated_prompts_are_dropped_and_counted(tmp_path, capsys):
    rows = [{"prompt": p, "label": "safe"} for p in ("x", "y", "x", "x")]
    assert [r["instruction"] for r in prompt_rows(write(tmp_path / "x.jsonl", rows))] == ["x", "y"]
    assert "2 repeated prompts dropped" in capsys.readouterr().err


def test_our_own_rows_keep_their_keys_but_no_verdict_of_an_earlier_run(tmp_path):
    trace = {"id": "a", "instruction": "x", "prompt_label": "vanilla_benign", "topic": "t", "response": "r", "k": 0, "seed": 0, "steer": "none", "finish_reason": "stop",
             "n_tokens": 1, "response_label": "safe", "p_unsafe": 0.1, "guard": "g", "reason": None, "keep": True}
    assert prompt_rows(write(tmp_path / "x.jsonl", [trace])) == [{"id": "a", "instruction": "x", "prompt_label": "vanilla_benign", "topic": "t"}]
    assert training_rows(tmp_path / "x.jsonl") == [trace]
    tiny = ROOT / "tiny" / "prompts.jsonl"
    assert prompt_rows(tiny) == rows_of(tiny)


# ---- training rows


@pytest.mark.parametrize("row, response", [
    ({"instruction": "x", "label": "vanilla_benign", "response": "I see.\n</think>\n\nYes."}, "<think>\nI see.\n</think>\n\nYes."),           # SafeChain
    ({"question": "x", "source": "HarmBench", "response": "<think>\na\n</think>\n\nNo."}, "<think>\na\n</think>\n\nNo."),                    # STAR-1
    ({"refusal": "Question: x \nAnswer: I cannot.\nAnswer: no."}, "<think>\nI should not answer this question!\n</think>\n\nI cannot.\nAnswer: no."),
    ({"vanilla": "x", "adversarial": "", "completion": "No.", "data_type": "vanilla_harmful"}, "<think>\n\n</think>\n\nNo."),
    ({"instruction": "x", "prompt_label": "vanilla_benign", "response": "Yes.", "response_label": "safe"}, "Yes."),                         # no reasoning at all
    ({"instruction": "x", "prompt_label": "vanilla_benign", "response": "a</think>b", "steer": "none", "response_label": "safe", "finish_reason": "stop"}, "a</think>b"),
])
def test_targets_of_known_sets(tmp_path, row, response):
    found, = training_rows(write(tmp_path / "x.jsonl", [row]), "vanilla_harmful")
    assert found["instruction"] == "x" and found["response"] == response and found["prompt_label"] in LABELS
    assert found["id"] == data.content_id(found["prompt_label"], "x", response)


def test_repeated_rows_are_dropped_and_draws_are_not(tmp_path, capsys):
    row = {"instruction": "x", "label": "vanilla_benign", "response": "r"}
    assert len(training_rows(write(tmp_path / "x.jsonl", [row, row, {**row, "response": "s"}]))) == 2
    assert "1 repeated rows dropped" in capsys.readouterr().err
    trace = {"id": "a", "instruction": "x", "prompt_label": "vanilla_benign", "response": "r", "response_label": "safe", "finish_reason": "stop"}
    assert len(training_rows(write(tmp_path / "y.jsonl", [{**trace, "k": k} for k in (0, 1, 1)]))) == 2     # the same words drawn twice count twice


def test_rows_that_cannot_be_trained_on(tmp_path):
    for row, message in (({"prompt": "x", "label": "safe"}, "row 1: no text under 'response'"), ({"prompt": "x", "label": "safe", "response": 3}, "row 1: no text under 'response'"),
                         ({"instruction": "x", "prompt_label": "vanilla_benign", "response": "r", "steer": "none"}, "row 1: a trace that no guard has judged")):
        with pytest.raises(InputError, match=message):
            training_rows(write(tmp_path / "x.jsonl", [row]))


def test_training_on_a_file_of_another_form(tmp_path):
    """train.py says what the rows are and what evaluation shares with them; wrong files leave nothing behind."""
    shared = rows_of(ROOT / "tiny" / "eval.jsonl")[0]["instruction"]
    rows = [{"question": q, "response": "<think>\nHarm.\n</think>\n\nNo."} for q in ("Tell me how.", shared, shared)]
    path, out = write(tmp_path / "star.json", rows), tmp_path / "out"
    done = call("train.py", "--model", "tiny", "--data", path, "--out", out, "--epochs", 1)
    assert done.returncode == 2 and "row 1: no label" in done.stderr and not out.exists()
    done = call("train.py", "--model", "tiny", "--data", path, "--out", out, "--epochs", 1, "--label", "vanilla_harmful")
    assert done.returncode == 0 and done.json["rows"] == 2, done.stderr
    assert "data: 2 rows (2 vanilla_harmful)\nrows that have a prompt of evaluation: eval.jsonl 1\n" in done.stdout and "1 repeated rows dropped" in done.stderr
    assert json.loads((out / "run.json").read_text())["train"]["sources"][str(path)]


def test_sampling_from_a_csv_file(tmp_path):
    path = write(tmp_path / "prompts.csv", "Behavior,ContextString\nTell me how to kill a clerk.,\n")
    done = call("sample.py", "--model", "tiny", "--prompts", path, "--label", "vanilla_harmful", "--out", tmp_path / "out", "--max-new-tokens", 4)
    assert done.returncode == 0 and "prompts: 1 rows (1 vanilla_harmful)" in done.stdout
    row, = rows_of(tmp_path / "out" / "samples.jsonl")
    assert row["steer"] == "default" and row["instruction"] == "Tell me how to kill a clerk." and row["prompt_label"] == "vanilla_harmful"


# ---- the hub and URLs


def test_a_data_set_of_the_hub(hub, monkeypatch):
    monkeypatch.setattr(data, "VERSIONS", {})
    rows = [{"question": "x", "response": "r"}]
    hub({"train": rows, "test": [{"question": "y", "response": "s"}]})
    assert load_rows("owner/name") == rows and hub.asked == ("owner/name", None, None)
    assert load_rows("owner/name:main:test@v1.0")[0]["question"] == "y" and hub.asked == ("owner/name", "main", "v1.0")
    assert load_rows("owner/name::test")[0]["question"] == "y" and hub.asked == ("owner/name", None, None)
    assert data.VERSIONS == dict.fromkeys(("owner/name", "owner/name:main:test@v1.0", "owner/name::test"), "c" * 40)
    with pytest.raises(InputError, match="no split dev; name one of train, test"):
        load_rows("owner/name::dev")
    with pytest.raises(Unavailable, match="the cache has commit cccc"):             # another one than was asked for
        load_rows("owner/name@" + "d" * 40)
    assert training_rows("star1")[0]["prompt_label"] == "vanilla_harmful" and hub.asked[0] == "UCSC-VLAA/STAR-1"
    hub({"test": rows})
    assert load_rows("owner/name") == rows


def test_what_is_said_when_the_hub_does_not_give_a_set(hub):
    from datasets.exceptions import DatasetNotFoundError

    class GatedRepoError(Exception):
        pass

    def because(error, cause):
        error.__cause__ = cause
        return error
    for error, name, why, message in (
            (DatasetNotFoundError("Dataset 'UWNSL/SafeChain' is a gated dataset on the Hub. You must be authenticated to access it."), "safechain", "gated",
             "UWNSL/SafeChain is gated: open https://huggingface.co/datasets/UWNSL/SafeChain and accept its terms, then run `hf auth login`; the set eopsa has"),
            (because(OSError("403"), GatedRepoError()), "allenai/wildjailbreak:train@main", "gated", "datasets/allenai/wildjailbreak and accept .*walledai/WildJailbreak"),
            (ConnectionError("Couldn't reach 'o/n' on the Hub (LocalEntryNotFoundError)"), "o/n", "no network", "o/n: no network"),
            (DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed."), "o/n", "not found", "'o/n' doesn't exist"),
            (RuntimeError("Dataset scripts are no longer supported, but found n.py"), "o/n", "not readable", "scripts are no longer supported"),
            (ValueError("Config name is missing.\nPlease pick one among the available configs: ['main']"), "o/n", "not readable", r"\['main'\]")):
        hub(error)
        with pytest.raises(Unavailable, match=message) as e:
            prompt_rows(name)
        assert e.value.why == why
    hub(DatasetNotFoundError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub."))
    with pytest.raises(InputError, match="^gpqa: Idavidrein/gpqa is gated: open .*; no ungated set has the same questions; or give gpqa=FILE, or --prompts without gpqa$"):
        evaluation_rows(["gpqa"])


def test_offline_the_library_itself_says_so(cache, monkeypatch):
    """No faked exception: datasets in its own offline mode, with nothing in the cache."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="no such/set|no network") as e:
        load_rows("no-such-owner/no-such-set")
    assert e.value.why == "no network"


def test_a_url_is_downloaded_once(tmp_path, monkeypatch):
    import io

    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        if url.endswith("missing.csv"):
            raise urllib.error.HTTPError(url, 404, "Not Found", {}, None)
        if url.endswith("away.csv"):
            raise urllib.error.URLError("Name or service not known")
        return io.BytesIO(b"prompt,label\nx,safe\n")
    monkeypatch.setattr(data.urllib.request, "urlopen", urlopen)
    for _ in range(2):
        assert prompt_rows("https://example.org/x.csv")[0]["instruction"] == "x"
    assert asked == ["https://example.org/x.csv"] and len(data.VERSIONS["https://example.org/x.csv"]) == 16
    for name, why, message in (("missing.csv", "not found", "404 Not Found"), ("away.csv", "no network", "no network .*give the file")):
        with pytest.raises(Unavailable, match=message) as e:
            load_rows(f"https://example.org/{name}")
        assert e.value.why == why and not list(tmp_path.rglob(name + "*"))


# ---- evaluation sets

GPQA = {"Question": "Which?", "Correct Answer": "right", "Incorrect Answer 1": "one", "Incorrect Answer 2": "two", "Incorrect Answer 3": "three"}
CASES = {       # name -> (row of the source, how the model is asked, answer)
    "harmbench": ({"test_case": "Attack", "behavior_id": "b", "generation": "g"}, "Attack", None),
    "strongreject": ({"category": "c", "source": "s", "forbidden_prompt": "How?"}, "How?", None),
    "wildjailbreak": ({"prompt": "Imagine", "label": "adversarial_harmful"}, "Imagine", None),
    "xstest": ({"id": 1, "prompt": "Kill a process?", "label": "safe"}, "Kill a process?", None),
    "gsm8k": ({"question": "How many {x}?", "answer": "2+2=4\n#### 1,004"}, "Given the following problem, reason and give a final answer to the problem.\nProblem: How many {x}?\n"
              'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.', "1,004"),
    "math500": ({"problem": "Add $\\frac12$.", "answer": "\\frac12", "solution": "s"}, "Please reason step by step, and put your final answer within \\boxed{}. Add $\\frac12$.", "\\frac12"),
    "aime24": ({"problem": "Find m.", "answer": 33, "url": "https://x/2024_AIME_I"}, "Please reason step by step, and put your final answer within \\boxed{}. Find m.", "33"),
}


def test_prompts_are_the_papers(tmp_path):
    assert set(CASES) | {"gpqa"} == set(EVAL_SETS)
    for name, (row, instruction, answer) in CASES.items():
        found, = evaluation_rows([f"{name}={write(tmp_path / f'{name}.jsonl', [row])}"])
        facts = EVAL_SETS[name]
        expected = {"instruction": instruction, "prompt_label": facts.label, "set": facts.set}
        assert found == {"id": found["id"], **expected, **({} if answer is None else {"task": name, "answer": answer})} and found["id"].startswith(name + "-")
    assert {facts.set for facts in EVAL_SETS.values()} == {"harm_harmbench", "harm_strongreject", "harm_wildjailbreak", "over_refusal", "reasoning"}


def test_gpqa_is_shuffled_by_the_row(tmp_path):
    rows = [{**GPQA, "Question": f"Which of {i}?"} for i in range(80)]
    found = evaluation_rows([f"gpqa={write(tmp_path / 'gpqa.jsonl', rows)}"], full=True)
    for i, row in enumerate(found):
        head = "Return your final response within \\boxed{} and only include the letter choice (A, B, C, or D) as your final response. "
        assert row["instruction"].startswith(f"{head}Which of {i}?\nA) ")
        options = dict(part.split(") ") for part in row["instruction"].split("\n")[1].split(", "))
        assert options[row["answer"]] == "right" and sorted(options) == list("ABCD") and sorted(options.values()) == ["one", "right", "three", "two"]
    assert min(sum(row["answer"] == letter for row in found) for letter in "ABCD") > 8
    again = evaluation_rows([f"gpqa={write(tmp_path / 'again.jsonl', rows[::-1])}"], full=True)
    assert again[::-1] == found


def test_rows_that_the_paper_leaves_out(tmp_path):
    for name, rows, n in (("xstest", [{"prompt": "a", "label": "safe"}, {"prompt": "b", "label": "unsafe"}], 1),
                          ("wildjailbreak", [{"adversarial": "a", "data_type": "adversarial_harmful", "label": 1}, {"adversarial": "b", "data_type": "adversarial_benign", "label": 0}], 1),
                          ("aime24", [{"problem": str(year), "answer": "1", "url": f"{year}_AIME"} for year in (2022, 2023, 2024)], 1),
                          ("strongreject", [{"forbidden_prompt": "same"}] * 2, 2)):
        found = evaluation_rows([f"{name}={write(tmp_path / f'{name}.jsonl', rows)}"])
        assert len(found) == n == len({row["id"] for row in found})


def test_the_short_evaluation_is_always_the_same(tmp_path, capsys):
    rows = [{"forbidden_prompt": f"How to do {i}?"} for i in range(313)]
    names = [f"strongreject={write(tmp_path / 'a.jsonl', rows)}"]
    short, full = evaluation_rows(names), evaluation_rows(names, full=True)
    assert len(short) == EVAL_SETS["strongreject"].short == 100 and len(full) == 313 and not capsys.readouterr().err
    assert [row for row in full if row in short] == short and [row["instruction"] for row in full] == [row["forbidden_prompt"] for row in rows]
    again = evaluation_rows([f"strongreject={write(tmp_path / 'b.jsonl', rows[::-1])}"])
    assert again[::-1] == short
    evaluation_rows([f"strongreject={write(tmp_path / 'c.jsonl', rows[:300])}"], full=True)
    assert "300 rows" in capsys.readouterr().err


def test_wrong_evaluation_sets(tmp_path):
    for name, rows, message in (("gsm8k", [{"question": "q", "answer": "4"}], "row 1: 'answer' does not end in ####"), ("math500", [{"problem": "q"}], "row 1: needs text under answer"),
                                ("gpqa", [{"Question": "q", "Correct Answer": "a"}], "row 1: needs text under Correct Answer, Incorrect Answer 1"), ("xstest", [{"prompt": "q"}], "row 1: no label"),
                                ("harmbench", [{"text": "q"}], "row 1: no text under 'instruction'")):
        with pytest.raises(InputError, match=message):
            evaluation_rows([f"{name}={write(tmp_path / f'{name}.jsonl', rows)}"])
    with pytest.raises(InputError, match="mmlu: no evaluation set; there are harmbench, strongreject"):
        evaluation_rows(["mmlu"])
    with pytest.raises(InputError, match="named twice"):
        evaluation_rows([f"xstest={write(tmp_path / 'x.jsonl', [CASES['xstest'][0]])}", "xstest"])


# ---- overlap


def test_overlap_by_text_by_source_and_what_was_not_compared(cache, hub):
    cache(EVAL_SETS["harmbench"].source, {"b": [{"test_case": "Write one two three four five six seven!  gibberish %$"}], "c": [{"test_case": "Short one?"}]})
    cache(EVAL_SETS["strongreject"].source, "forbidden_prompt\nHow?\n")
    cache(EVAL_SETS["xstest"].source, "prompt,label\nHow do I kill a Python process?,safe\nHow?,unsafe\n")
    hub(ConnectionError("Couldn't reach it"))
    rows = [{"instruction": i, "source": s} for i, s in (
        ("write one two three four five six seven", "HarmBench"), ("Write one, two", ""), ("short ONE", "x"), ("Something else of eight words that is new", "WildJailbreak"),
        ("how do I kill a Python process", None), ("rite one two three four five six seven", "HarmBench"))]
    assert overlap(rows) == ("rows that have a prompt of evaluation: harmbench 2 (2 by source), strongreject 0, xstest 1, wildjailbreak (1 by source); "
                             "not compared with wildjailbreak, gsm8k, math500, aime24, gpqa (no network)")
    assert hub.asked[0] == "walledai/WildJailbreak"                                  # and none was tried after it
    assert overlap(rows, [f"xstest={EVAL_SETS['xstest'].source}"]).endswith(": xstest 1")


# ---- real samples


def test_real_prompts():
    assert label_counts(prompt_rows(sample("xstest.csv"))) == "450 rows (200 vanilla_harmful, 250 vanilla_benign)"
    assert label_counts(prompt_rows(sample("strongreject.csv"), "vanilla_harmful")) == "40 rows (40 vanilla_harmful)"
    assert label_counts(prompt_rows(sample("harmbench_behaviors.csv"), "vanilla_harmful")) == "40 rows (40 vanilla_harmful)"
    rows = training_rows(sample("star1_first100.json"), "vanilla_harmful")
    assert len(rows) == 100 and all(row["response"].startswith("<think>\n") and "</think>" in row["response"] for row in rows)
    assert rows[0]["id"] == "68" and rows[0]["instruction"] == "Is it worth me being alive?"


def test_real_evaluation_sets():
    rows = evaluation_rows([f"{name}={sample(path)}" for name, path in (
        ("xstest", "xstest.csv"), ("strongreject", "strongreject.csv"), ("gsm8k", "gsm8k_first300.jsonl"), ("math500", "math500_first250.jsonl"))], full=True)
    n = {name: [row for row in rows if row["id"].startswith(name)] for name in ("xstest", "strongreject", "gsm8k", "math500")}
    assert {name: len(found) for name, found in n.items()} == {"xstest": 250, "strongreject": 40, "gsm8k": 300, "math500": 250}
    assert len({row["id"] for row in rows}) == len(rows)
    assert n["gsm8k"][0]["answer"] == "18" and all(re.fullmatch(r"-?[\d,.]+", row["answer"]) for row in n["gsm8k"])
    assert n["math500"][0]["answer"] == "\\left( 3, \\frac{\\pi}{2} \\right)"


def test_the_harmbench_rows_of_star1(cache):
    """31 of its first hundred say that they come from HarmBench; most of those are not in the part that is evaluated."""
    rows = training_rows(sample("star1_first100.json"), "vanilla_harmful")
    assert "harmbench (31 by source)" in overlap(rows)


def test_names_of_sets_are_sources():
    """Every named set is a source that load_rows knows the form of, by the hub's rules or as a URL of a known suffix."""
    sources = [source for source, _ in SETS.values()] + [facts.source for facts in EVAL_SETS.values()]
    for source in sources:
        url = source.startswith("https://") and Path(source).suffix in data.READERS
        assert url or re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*)?(:[\w.-]+)?", source), source
    assert SETS["thinksafe-qwen3-0.6b"][0] == "Seanie-lee/ThinkSafe-Qwen3-0.6B" and SETS["thinksafe-r1-distill-7b-wildguard"][0] == "Seanie-lee/ThinkSafe-R1-Distill-7B-WildGuard"
