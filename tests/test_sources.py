"""Prompts and training rows by name and by path, and what is said where they cannot be had."""
import gzip
import io
import json
import os
import re
import urllib.error
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from conftest import ROOT, call, rows_of

from data import sources
from data.sources import (
    READERS,
    SETS,
    Unavailable,
    label_counts,
    load_rows,
    prompt_rows,
    read_file,
    training_rows,
)
from data.rows import content_id
from thinksafe import LABELS, InputError

SAMPLES = Path(os.environ.get("THINKSAFE_DATA", ROOT.parent / "shared" / "data"))


def sample(name):
    """A small real sample of a public set, which the project does not ship."""
    if not (SAMPLES / name).exists():
        pytest.skip(f"no {name} in {SAMPLES}; THINKSAFE_DATA says where the samples are")
    return SAMPLES / name


def write(path, content):
    """Rows into a file of the format that the suffix names, or text or bytes as they are."""
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
    """The hub's cache in an empty folder, offline -> f(url, content): as if downloaded before."""
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(url, content):
        path = tmp_path / "hub" / "thinksafe" / content_id(url) / url.rsplit("/", 1)[-1]
        path.parent.mkdir(parents=True)
        write(path, content)
    return put


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub: f(splits or exception) is what the next data set is; `.asked` what was asked for.

    The builders are real ones.
    """
    import datasets
    real = datasets.load_dataset_builder

    def give(content):
        def builder(name, config=None, revision=None):
            give.asked = name, config, revision
            if isinstance(content, Exception):
                raise content
            files = {split: str(write(tmp_path / f"{split}.jsonl", rows))
                     for split, rows in content.items()}
            made = real("json", data_files=files, cache_dir=str(tmp_path / "cache"))
            made.hash = "c" * 40
            return made
        monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    return give


# ---------------------------------------------------------------------------------------------
# Files

ROWS = [{"id": "a", "prompt": 'He said: "no",\nand went', "label": "safe"},
        {"id": "b", "prompt": "naïve 😀\r\nline", "label": "unsafe"}]
CSV = ('id,prompt,label\r\na,"He said: ""no"",\nand went",safe\r\n'
       'b,"naïve 😀\r\nline",unsafe\r\n')
TSV = ('id\tprompt\tlabel\na\t"He said: ""no"",\nand went"\tsafe\n'
       'b\t"naïve 😀\r\nline"\tunsafe\n')


@pytest.mark.parametrize("name, content", [
    ("x.jsonl", ROWS),
    ("x.json", ROWS),
    ("x.parquet", ROWS),
    ("x.csv", CSV),
    ("x.tsv", TSV),
    ("bom.csv", b"\xef\xbb\xbf" + CSV.encode()),
    ("bom.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    ("crlf.jsonl", "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in ROWS)),
    ("X.JSONL", "\n".join(map(json.dumps, ROWS))),
    ("groups.json", {"one": ROWS[:1], "two": ROWS[1:]}),
    ("groups.json", {"train_wreck": ROWS[:1], "bulk_cash_smuggling": ROWS[1:]}),    # HarmBench
    ("split.json", {"train": ROWS}),
    ("semicolon.csv", CSV.replace("a,", "a;").replace(",safe", ";safe").replace("b,", "b;")
     .replace(",unsafe", ";unsafe").replace("id,prompt,label", "id;prompt;label")),
    ("tab.csv", TSV),
    ("utf16.csv", CSV.encode("utf-16")),
    ("utf16.json", json.dumps(ROWS).encode("utf-16")),
    ("bytes.parquet", [{key: value.encode() for key, value in row.items()} for row in ROWS]),
])
def test_every_format_gives_the_same_rows(tmp_path, name, content):
    assert read_file(write(tmp_path / name, content)) == ROWS


def test_csv_is_text(tmp_path):
    """No number, date, truth value or missing value is made of what is written there."""
    path = write(tmp_path / "x.csv", "z,a,b,\n1,007,NA,1e5\n\n2,True,2020-01-01,\n")
    assert read_file(path) == [{"z": "1", "a": "007", "b": "NA", "": "1e5"},
                               {"z": "2", "a": "True", "b": "2020-01-01", "": ""}]


def test_a_field_of_megabytes(tmp_path):
    text = "word, " * 500_000
    path = write(tmp_path / "x.csv", f'prompt,label\n"{text}",safe\n')
    assert read_file(path) == [{"prompt": text, "label": "safe"}]


def test_what_json_cannot_hold_is_made_plain(tmp_path):
    rows = [{"prompt": "x", "when": date(2026, 1, 2), "score": float("nan"), "list": [1, None]}]
    assert read_file(write(tmp_path / "x.parquet", rows)) == [
        {"prompt": "x", "when": "2026-01-02", "score": None, "list": [1, None]}]


def parquet_bytes(table):
    from pyarrow import parquet
    file = io.BytesIO()
    parquet.write_table(table, file)
    return file.getvalue()


def duplicate_columns():
    import pyarrow
    return parquet_bytes(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["prompt"] * 2))


def far_date():
    import pyarrow
    return parquet_bytes(pyarrow.table({"day": pyarrow.array([10**9], pyarrow.date32())}))


def test_types_of_arrow(tmp_path):
    """Text in any of its types is text; what JSON does not know becomes text, and bytes too."""
    import pyarrow as pa
    types = pa.table({
        "large": pa.array(["ä"], pa.large_string()), "word": pa.array(["x"]).dictionary_encode(),
        "bytes": pa.array(["ä".encode()]), "image": pa.array([{"bytes": b"\x89PNG", "path": "p"}]),
        "number": pa.array([Decimal("1.10")]), "time": pa.array([1], pa.timestamp("ns", tz="UTC")),
        "turns": pa.array([[{"role": "user", "content": "x"}]]),
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), "none": pa.nulls(1)})
    path = write(tmp_path / "x.parquet", parquet_bytes(types))
    assert read_file(path) == [{
        "large": "ä", "word": "x", "bytes": "ä", "number": "1.10", "none": None,
        "image": {"bytes": {"bytes that are not text in UTF-8": 4}, "path": "p"},
        "time": "1970-01-01 00:00:00.000000001+00:00", "map": [["k", 1]],
        "turns": [{"role": "user", "content": "x"}]}]
    for data in (b"\xff\xfe\x00", "Käse".encode("latin1"), b"P\0r\0"):
        path = write(tmp_path / "x.parquet", [{"prompt": data, "label": "safe"}])
        with pytest.raises(InputError, match="prompt is {'bytes that are not text in UTF-8'"):
            prompt_rows(path)


@pytest.mark.parametrize("header", [",prompt,label", "Unnamed: 0,prompt,label",
                                    "Index, Prompt ,LABEL"])
def test_an_index_column_is_not_read(tmp_path, header):
    path = write(tmp_path / "x.csv", header + "\n0,a,safe\n1,b,unsafe\n")
    assert [row["instruction"] for row in prompt_rows(path)] == ["a", "b"]
    path = write(tmp_path / "x.csv", header + ",,\n0,a,safe,,\n")        # as Excel leaves them
    assert [row["instruction"] for row in prompt_rows(path)] == ["a"]


@pytest.mark.parametrize("name, content, message", [
    ("x.txt", "a", "ends in .jsonl .json .csv .parquet .tsv"),
    ("x.csv", "", "no rows"),
    ("x.csv", "prompt,label\n", "no rows"),
    ("x.json", "[]", "no rows"),
    ("x.csv", "prompt,label\na,safe\nb\n", "row 2: not as many fields"),
    ("x.csv", "prompt,label\na,safe,c\n", "row 1: not as many fields"),
    ("x.csv", 'prompt,label\na,safe\n"never closed,safe\n', "row 2: not CSV"),
    ("x.csv", 'prompt,label\na,safe\n"closed"early,safe\n', "row 2: not CSV"),
    ("x.csv", b"prompt\n\xff\xfe\n", "not a .csv file"),
    ("x.csv", "prompt,label\nKäse,safe\n".encode("latin1"), "not a .csv file"),
    ("x.csv", "prompt,label\na,safe\n".encode("utf-16-le"), "null characters in it"),
    ("x.csv", "prompt,label\na\0b,safe\n", "null characters in it"),
    ("x.csv", "prompt,prompt,label\na,b,safe\n", "2 columns are called 'prompt'"),
    ("x.parquet", duplicate_columns(), "not a .parquet file"),
    ("x.parquet", far_date(), "not a .parquet file"),
    ("x.json", '[{"a": 1, "a": 2}]', "key 'a' stands there twice"),
    ("x.jsonl", '{"a": {"b": 1, "b": 2}}', "key 'b' stands there twice"),
    ("x.json", '[{"a": 1},]', "not a .json file"),
    ("x.json", {"train": [{"a": 1}], "test": [{"a": 2}]}, "holds train, test, which are not read"),
    ("x.json", {"Validation": [{"a": 1}], "other": [{"a": 2}]}, "holds Validation, other"),
    ("x.json", {"train_sft": [{"a": 1}], "test_sft": [{"a": 2}]}, "holds train_sft, test_sft"),
    ("x.json", {"a": {"0": 1}}, "not a list of objects"),
    ("x.json", {"a": [1, 2]}, "row 1: expected a JSON object"),
    ("x.jsonl", '{"a": 1}\n'.encode("utf-16"), "not a line of JSON in UTF-8"),
    ("x.jsonl", gzip.compress(b'{"a": 1}', mtime=0), "not a line of JSON in UTF-8"),
    ("x.jsonl.gz", gzip.compress(b'{"a": 1}', mtime=0), "ends in .jsonl"),
    ("x.json", '{"a": 1}', "not a list of objects"),
    ("x.json", '{"a": 1}\n{"a": 2}\n', "JSON lines go into .jsonl"),
    ("x.json", '[{"a": 1}, 3]', "row 2"),
    ("x.json", '[{"a": NaN}]', "NaN is not JSON"),
    ("x.json", '[{"a": "\\ud800"}]', "row 1"),
    ("x.json", "[" * 100_000, "not a .json file"),
    ("x.jsonl", '{"a": 1}\n{', "x.jsonl:2"),
    ("x.parquet", "PAR1 not at all", "not a .parquet file"),
])
def test_unreadable_files_are_named(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError) as e:
        read_file(path)
    assert message in str(e.value) and str(path) in str(e.value)


def test_missing_files_and_unknown_sources(tmp_path):
    for source, message in ((tmp_path / "no.csv", "no.csv: cannot be read"),
                            (tmp_path, "guarded.jsonl: cannot be read"),
                            ("no_such_set", "or one of safechain, eopsa"),
                            ("a/b/c", "no such file")):
        with pytest.raises(InputError, match=message):
            load_rows(source)


def test_the_folder_of_a_run_is_its_guarded_rows(tmp_path, monkeypatch):
    """In the same order, whichever trace was finished first."""
    monkeypatch.setattr(sources, "VERSIONS", {})
    rows = [{"id": i, "k": k, "instruction": "x", "prompt_label": "vanilla_benign", "response": "r",
             "response_label": "safe", "keep": True, "finish_reason": "stop", "n_tokens": 1} for i in ("a", "b") for k in (0, 1)]
    write(tmp_path / "guarded.jsonl", [rows[i] for i in (2, 1, 3, 0)])
    write(tmp_path / "samples.jsonl", rows[:1])
    assert training_rows(tmp_path) == rows and training_rows(tmp_path / "guarded.jsonl") == [rows[i] for i in (2, 1, 3, 0)]
    assert len(set(sources.VERSIONS.values())) == 1 and len(sources.VERSIONS) == 2
    write(tmp_path / "guarded.jsonl", [rows[3], {**rows[0], "prompt_label": "x"}])
    with pytest.raises(InputError, match="jsonl:2: prompt_label is 'x'"):      # as it is numbered in the file
        training_rows(tmp_path)
    for key in ("keep", "response_label", "id"):                             # no verdict, nothing to train on
        write(tmp_path / "guarded.jsonl", [{k: v for k, v in row.items() if k != key} for row in rows])
        with pytest.raises(InputError, match=f"guarded.jsonl:1: {key} must be"):
            training_rows(tmp_path)


# ---------------------------------------------------------------------------------------------
# Columns and labels


@pytest.mark.parametrize("row, instruction, label", [
    ({"instruction": "x", "prompt_label": "adversarial_benign"}, "x", "adversarial_benign"),
    # SafeChain
    ({"instruction": "x", "label": "vanilla_harmful", "response": "r"}, "x", "vanilla_harmful"),
    # EOPSA
    ({"problem": "x", "answer": "", "data_type": "safety", "safechain_label": "adversarial_harmful",
      "problem_id": 0}, "x", "adversarial_harmful"),
    ({"problem": "x", "data_type": "safety", "safechain_label": "wildjailbreak"},
     "x", "vanilla_harmful"),
    ({"problem": "x", "data_type": "overreject", "safechain_label": "vanilla_benign"},
     "x", "vanilla_benign"),
    # WildJailbreak
    ({"vanilla": "v", "adversarial": "x", "completion": "", "data_type": "adversarial_harmful"},
     "x", "adversarial_harmful"),
    ({"vanilla": "x", "adversarial": None, "completion": "", "data_type": "vanilla_benign"},
     "x", "vanilla_benign"),
    ({"adversarial": "x", "label": 1, "data_type": "adversarial_harmful"},
     "x", "adversarial_harmful"),
    # XSTest
    ({"id": 3, "prompt": "x", "type": "homonyms", "label": "safe"}, "x", "vanilla_benign"),
    ({"prompt": "x", "label": "unsafe"}, "x", "vanilla_harmful"),
    # SafeKey
    ({"question": "x", "source": "4o_rewrite"}, "x", "vanilla_benign"),
])
def test_known_columns(tmp_path, row, instruction, label):
    found, = prompt_rows(write(tmp_path / "x.jsonl", [row]))
    assert (found["instruction"], found["prompt_label"]) == (instruction, label)
    assert found["id"] == (str(row["id"]) if "id" in row else content_id(label, instruction))
    assert "response" not in found


def test_rows_without_a_label_need_one(tmp_path):
    path = write(tmp_path / "x.csv", "category,source,forbidden_prompt\nc,DAN,How?\n")
    with pytest.raises(InputError, match="row 1: no label .*--label"):
        prompt_rows(path)
    assert prompt_rows(path, "vanilla_harmful") == [
        {"id": content_id("vanilla_harmful", "How?"), "instruction": "How?",
         "prompt_label": "vanilla_harmful", "source": "DAN"}]
    behaviors = write(tmp_path / "b.csv",
                      "Behavior,ContextString\nDo it,\nDo that,Some text\n")
    assert [row["instruction"] for row in prompt_rows(behaviors, "vanilla_harmful")] == [
        "Do it", "Some text\n\n---\n\nDo that"]


@pytest.mark.parametrize("rows, message", [
    ([{"prompt": "x", "label": "safe"}, {"prompt": "y", "label": "harmfull"}],
     "row 2: label is 'harmfull', not one of"),
    ([{"prompt": "x", "label": "safe"}, {"prompt": "x", "label": 1}], "row 2: label is 1"),
    ([{"prompt": ["x"], "label": "safe"}],
     "row 1: no text under .*found the keys prompt, label"),
    ([{"instruction": " ", "prompt_label": "vanilla_benign"}], "row 1: .*instruction"),
    ([{"instruction": 3, "prompt_label": "vanilla_benign"}], "row 1: .*instruction"),
    ([{"instruction": "x", "prompt_label": "benign"}], "row 1: prompt_label is 'benign', not one"),
    ([{"id": [1], "prompt": "x", "label": "safe"}], "row 1: id must be"),
    ([{"id": 1, "prompt": "x", "label": "safe"}, {"id": "1", "prompt": "y", "label": "safe"}],
     "row 2: id '1' is used"),
    ([{"refusal": "I cannot"}], "row 1: 'refusal' is not"),
])
def test_unknown_columns_and_labels_are_named(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        prompt_rows(write(tmp_path / "x.jsonl", rows), "vanilla_harmful")


def test_repeated_prompts_are_dropped_and_counted(tmp_path, capsys):
    rows = [{"prompt": p, "label": "safe"} for p in ("x", "y", "x", "x")]
    found = prompt_rows(write(tmp_path / "x.jsonl", rows))
    assert [row["instruction"] for row in found] == ["x", "y"]
    assert "2 repeated prompts dropped" in capsys.readouterr().err


def test_our_own_rows_keep_their_keys_but_no_verdict_of_an_earlier_run(tmp_path):
    prompt = {"id": "a", "instruction": "x", "prompt_label": "vanilla_benign", "topic": "t"}
    trace = {**prompt, "response": "r", "k": 0, "seed": 0, "steer": "none", "finish_reason": "stop",
             "n_tokens": 1, "n_prompt_tokens": 2, "response_label": "safe", "p_unsafe": 0.1,
             "guard": "g", "reason": None, "keep": True}
    assert prompt_rows(write(tmp_path / "x.jsonl", [trace])) == [prompt]
    assert training_rows(tmp_path / "x.jsonl") == [trace]
    tiny = ROOT / "tiny" / "prompts.jsonl"
    assert prompt_rows(tiny) == rows_of(tiny)


# ---------------------------------------------------------------------------------------------
# Training rows


@pytest.mark.parametrize("row, response", [
    # SafeChain
    ({"instruction": "x", "label": "vanilla_benign", "response": "I see.\n</think>\n\nYes."},
     "<think>\nI see.\n</think>\n\nYes."),
    # STAR-1
    ({"question": "x", "source": "HarmBench", "response": "<think>\na\n</think>\n\nNo."},
     "<think>\na\n</think>\n\nNo."),
    # DirectRefusal
    ({"refusal": "Question: x \nAnswer: I cannot.\nAnswer: no."},
     "<think>\nI should not answer this question!\n</think>\n\nI cannot.\nAnswer: no."),
    # WildJailbreak
    ({"vanilla": "x", "adversarial": "", "completion": "No.", "data_type": "vanilla_harmful"},
     "<think>\n\n</think>\n\nNo."),
    # no reasoning at all
    ({"instruction": "x", "prompt_label": "vanilla_benign", "response": "Yes.",
      "response_label": "safe"}, "Yes."),
    # a trace of sample.py
    ({"instruction": "x", "prompt_label": "vanilla_benign", "response": "a</think>b",
      "steer": "none", "response_label": "safe", "finish_reason": "stop"}, "a</think>b"),
])
def test_targets_of_known_sets(tmp_path, row, response):
    found, = training_rows(write(tmp_path / "x.jsonl", [row]), "vanilla_harmful")
    assert found["instruction"] == "x" and found["response"] == response
    assert found["prompt_label"] in LABELS
    assert found["id"] == content_id(found["prompt_label"], "x", response)


def test_repeated_rows_are_dropped_and_draws_are_not(tmp_path, capsys):
    row = {"instruction": "x", "label": "vanilla_benign", "response": "r"}
    path = write(tmp_path / "x.jsonl", [row, row, {**row, "response": "s"}])
    assert len(training_rows(path)) == 2
    assert "1 repeated rows dropped" in capsys.readouterr().err
    trace = {"id": "a", "instruction": "x", "prompt_label": "vanilla_benign", "response": "r",
             "response_label": "safe", "finish_reason": "stop"}
    path = write(tmp_path / "y.jsonl", [{**trace, "k": k} for k in (0, 1, 1)])
    assert len(training_rows(path)) == 2        # the same words drawn twice count twice


@pytest.mark.parametrize("row, message", [
    ({"prompt": "x", "label": "safe"}, "row 1: no text under response, completion, output"),
    ({"prompt": "x", "label": "safe", "response": 3}, "row 1: no text under response, completion, output"),
    ({"instruction": "x", "prompt_label": "vanilla_benign", "response": "r", "steer": "none"},
     "row 1: a trace that no guard has judged"),
    ({"instruction": "x", "prompt_label": "vanilla_benign", "response": "r", "k": "0"},
     "row 1: k is '0', not a whole number"),
])
def test_rows_that_cannot_be_trained_on(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        training_rows(write(tmp_path / "x.jsonl", [row]))


def test_training_on_a_file_of_another_form(tmp_path):
    """train.py says what the rows are and what evaluation shares with them.

    Wrong files leave nothing behind.
    """
    shared = rows_of(ROOT / "tiny" / "eval.jsonl")[0]["instruction"]
    rows = [{"question": q, "response": "<think>\nHarm.\n</think>\n\nNo."}
            for q in ("Tell me how.", shared, shared)]
    path, out = write(tmp_path / "star.json", rows), tmp_path / "out"
    flags = "--model", "tiny", "--data", path, "--out", out, "--epochs", 1
    done = call("train.py", *flags)
    assert done.returncode == 2 and "row 1: no label" in done.stderr and not out.exists()
    done = call("train.py", *flags, "--label", "vanilla_harmful")
    assert done.returncode == 0 and done.json["rows"] == 2, done.stderr
    assert ("data: 2 rows (2 vanilla_harmful)\n"
            "rows that have a prompt of evaluation: eval.jsonl 1\n") in done.stdout
    assert "1 repeated rows dropped" in done.stderr
    assert json.loads((out / "run.json").read_text())["train"]["sources"][str(path)]


def test_sampling_from_a_csv_file(tmp_path):
    prompt = "Tell me how to kill a clerk."
    path = write(tmp_path / "prompts.csv", f"Behavior,ContextString\n{prompt},\n")
    done = call("sample.py", "--model", "tiny", "--prompts", path, "--label", "vanilla_harmful",
                "--out", tmp_path / "out", "--max-new-tokens", 4)
    assert done.returncode == 0 and "prompts: 1 rows (1 vanilla_harmful)" in done.stdout
    row, = rows_of(tmp_path / "out" / "samples.jsonl")
    assert row["steer"] == "default" and row["instruction"] == prompt
    assert row["prompt_label"] == "vanilla_harmful"


# ---------------------------------------------------------------------------------------------
# The hub and URLs


def test_a_data_set_of_the_hub(hub, monkeypatch):
    monkeypatch.setattr(sources, "VERSIONS", {})
    rows = [{"question": "x", "response": "r"}]
    hub({"train": rows, "test": [{"question": "y", "response": "s"}]})
    assert load_rows("owner/name") == rows and hub.asked == ("owner/name", None, None)
    assert load_rows("owner/name:main:test@v1.0")[0]["question"] == "y"
    assert hub.asked == ("owner/name", "main", "v1.0")
    assert load_rows("owner/name::test")[0]["question"] == "y"
    assert hub.asked == ("owner/name", None, None)
    assert sources.VERSIONS == dict.fromkeys(
        ("owner/name", "owner/name:main:test@v1.0", "owner/name::test"), "c" * 40)
    with pytest.raises(InputError, match="no split dev; name one of train, test"):
        load_rows("owner/name::dev")
    with pytest.raises(Unavailable, match="the cache has commit cccc"):     # not the one asked for
        load_rows("owner/name@" + "d" * 40)
    assert training_rows("star1")[0]["prompt_label"] == "vanilla_harmful"
    assert hub.asked[0] == "UCSC-VLAA/STAR-1"
    hub({"test": rows})
    assert load_rows("owner/name") == rows


class GatedRepoError(Exception):
    """As huggingface_hub names its own, which needs a response to be made from."""


def caused_by(error, cause):
    error.__cause__ = cause
    return error


def not_found(message):
    from datasets.exceptions import DatasetNotFoundError
    return DatasetNotFoundError(message)


@pytest.mark.parametrize("error, name, why, message", [
    (not_found("Dataset 'UWNSL/SafeChain' is a gated dataset on the Hub. You must be authenticated "
               "to access it."), "safechain", "gated",
     "UWNSL/SafeChain is gated: open https://huggingface.co/datasets/UWNSL/SafeChain and accept "
     "its terms, then run `hf auth login`; the set eopsa has"),
    (caused_by(OSError("403"), GatedRepoError()), "allenai/wildjailbreak:train@main", "gated",
     "datasets/allenai/wildjailbreak and accept .*walledai/WildJailbreak"),
    (ConnectionError("Couldn't reach 'o/n' on the Hub (LocalEntryNotFoundError)"), "o/n",
     "no network", "o/n: no network"),
    (not_found("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed."), "o/n",
     "not found", "'o/n' doesn't exist"),
    (RuntimeError("Dataset scripts are no longer supported, but found n.py"), "o/n",
     "not readable", "scripts are no longer supported"),
    (ValueError("Config name is missing.\nPlease pick one among the available configs: ['main']"),
     "o/n", "not readable", r"\['main'\]"),
])
def test_what_is_said_when_the_hub_does_not_give_a_set(hub, error, name, why, message):
    hub(error)
    with pytest.raises(Unavailable, match=message) as e:
        prompt_rows(name)
    assert e.value.why == why


def test_offline_the_library_itself_says_so(cache, monkeypatch):
    """No faked exception: datasets in its own offline mode, with nothing in the cache."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="no such/set|no network") as e:
        load_rows("no-such-owner/no-such-set")
    assert e.value.why == "no network"


def test_a_url_is_downloaded_once(tmp_path, monkeypatch):
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
    monkeypatch.setattr(sources.urllib.request, "urlopen", urlopen)
    for _ in range(2):
        assert prompt_rows("https://example.org/x.csv")[0]["instruction"] == "x"
    assert asked == ["https://example.org/x.csv"]
    assert len(sources.VERSIONS["https://example.org/x.csv"]) == 16
    for name, why, message in (("missing.csv", "not found", "404 Not Found"),
                               ("away.csv", "no network", "no network .*give the file")):
        with pytest.raises(Unavailable, match=message) as e:
            load_rows(f"https://example.org/{name}")
        assert e.value.why == why and not list(tmp_path.rglob(name + "*"))


def test_names_of_sets_are_sources():
    """Every named set is a source whose form load_rows knows: a hub name, or a URL of a reader."""
    for source, _ in SETS.values():
        is_url = source.startswith("https://") and Path(source).suffix in READERS
        assert is_url or re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*)?(:[\w.-]+)?", source), source
    assert SETS["thinksafe-qwen3-0.6b"][0] == "Seanie-lee/ThinkSafe-Qwen3-0.6B"
    assert SETS["thinksafe-r1-distill-7b-wildguard"][0] == (
        "Seanie-lee/ThinkSafe-R1-Distill-7B-WildGuard")


# ---------------------------------------------------------------------------------------------
# Real samples


def test_real_prompts():
    for name, label, counts in (
            ("xstest.csv", None, "450 rows (200 vanilla_harmful, 250 vanilla_benign)"),
            ("strongreject.csv", "vanilla_harmful", "40 rows (40 vanilla_harmful)"),
            ("harmbench_behaviors.csv", "vanilla_harmful", "40 rows (40 vanilla_harmful)")):
        assert label_counts(prompt_rows(sample(name), label)) == counts
    rows = training_rows(sample("star1_first100.json"), "vanilla_harmful")
    assert len(rows) == 100
    assert all(row["response"].startswith("<think>\n") and "</think>" in row["response"]
               for row in rows)
    assert rows[0]["id"] == "68" and rows[0]["instruction"] == "Is it worth me being alive?"
