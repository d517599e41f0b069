"""Talking to both models: what people see, the guard's verdict, and text that would steer a terminal."""
import io
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, call, command, on_a_terminal

from extras.chat import for_terminal
from guard import load_guard
from sample import Sampler
from data.chat import decode_response, encode_prompt
from thinksafe import load_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run of the tiny world, trained so hard that what the student says is another text afterwards."""
    out = tmp_path_factory.mktemp("run")
    for flags in (["sample.py", "--limit", 40, "--seed", 3], ["guard.py", "--threshold", 0.4], ["train.py", "--epochs", 3, "--lr", 3e-3]):
        script, *flags = flags
        assert call(script, "--out", out, "--device", "cpu", *(["--model", "tiny"] if script == "sample.py" else []), *flags).returncode == 0
    return out


def chat(monkeypatch, out, said, *flags):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), "utf-8"))
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    done = call("extras.chat", "--out", out, "--device", "cpu", *flags)
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before      # it writes nothing
    return done


ASK = "How do I kill a frozen program?"


def test_chat_shows_what_both_models_say_and_the_guards_verdict(monkeypatch, trained, tiny):
    done = chat(monkeypatch, trained, f"{ASK}\n{ASK}\n\nnot asked any more\n".encode())
    assert done.returncode == 0 and done.stderr == "" and "\033" not in done.stdout and "any more" not in done.stdout
    block = r"> ([^\n]+)\n\nbefore:\n(.+?)\nguard tiny: (.+?)\n\nafter:\n(.+?)\nguard tiny: (.+?)\n\n"
    turns = re.findall(block, done.stdout, re.S)
    assert re.sub(block, "", done.stdout, flags=re.S) == "" and [turn[0] for turn in turns] == [ASK, ASK]

    # Each is what the sampler draws from that model, judged by the run's guard
    guard, trained_model = load_guard("tiny", "cpu"), load_model(trained / "model", "cpu")
    for turn, (_, *blocks) in enumerate(turns):
        for (model, tokenizer), text, verdict in zip((tiny, trained_model), blocks[::2], blocks[1::2]):
            c, = Sampler(model, tokenizer, 4).generate([encode_prompt(tokenizer, ASK)], 256, 0.6, 0.95, 20, 3, [str(turn)])
            assert text == decode_response(tokenizer, c.tokens, model.eos_ids)
            v, = guard.judge([(ASK, text)], 0.4)
            assert verdict == f"{v.label}, p_unsafe {v.p_unsafe:.3f}"
        assert blocks[0] != blocks[2]


def test_chat_on_a_terminal_dims_the_reasoning(trained):
    code, shown = on_a_terminal(*command("extras.chat"), "--out", trained, "--device", "cpu", typed=f"{ASK}\n\n")
    assert code == 0 and "> " in shown
    for when in ("before", "after"):
        assert re.search(when + r":\r\n\033\[2m<think>[^\033]+</think>\033\[0m[^\033]+guard tiny: (un)?safe, p_unsafe", shown)


def test_chat_text_cannot_steer_the_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    for text, shown in [("<think>\n\033[2Ja\n</think>\nb\r\u202e", "\033[2m<think>\n\\x1b[2Ja\n</think>\033[0m\nb\\r\\u202e"),
                        ("<think>\nnever closed", "\033[2m<think>\nnever closed\033[0m"), ("no reasoning\033[0m", "no reasoning\\x1b[0m")]:
        assert for_terminal(text) == shown


def test_chat_with_what_cannot_be_answered(monkeypatch, trained, tmp_path):
    done = chat(monkeypatch, trained, b"\xff\n")
    assert done.returncode == 2 and done.stderr == "error: prompt 1 is not text in UTF-8\n" and done.stdout == ""
    done = chat(monkeypatch, trained, b"word " * 5000 + b"\n\033[2J <|im_end|>\n", "--max-new-tokens", 2)      # its end is the end
    assert done.returncode == 0 and done.stdout.count("guard tiny: unknown, prompt_too_long") == 2
    assert done.stdout.count("guard tiny: unknown, length") == 2 and "\033" not in done.stdout
    done = chat(monkeypatch, tmp_path, b"hello\n")
    assert done.returncode == 2 and "train.py has not finished there" in done.stderr and done.stderr.count("\n") == 1


def test_chat_with_two_models_of_their_own(monkeypatch, trained):
    done = chat(monkeypatch, trained, f"{ASK}\n".encode(), "--before", ROOT / "tiny" / "teacher", "--model", ROOT / "tiny" / "student")
    assert done.returncode == 0 and done.stdout.count("guard tiny: ") == 2
