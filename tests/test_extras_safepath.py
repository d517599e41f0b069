"""extras/safepath.py: harmful prompts with the first words of the reasoning as their whole target."""
import math

import pytest
import torch
from conftest import ROOT, call, rows_of

from extras.export import model_card
from extras.safepath import WORDS, encode_prompts
from data.chat import encode_prompt
from thinksafe import REFUSAL_INSTRUCTIONS
from train import packed_loss
from training_rows import texts


def row(i, label="vanilla_harmful", **more):
    return {"id": str(i), "instruction": f"Question {i}?", "prompt_label": label, **more}


def test_the_words_are_the_whole_target(tokenizer, opened):
    told = row(3, "adversarial_harmful", instruction=REFUSAL_INSTRUCTIONS["suffix"].replace("{prompt}", "Question 3?"))
    rows = [row(1), row(2, "vanilla_benign"), told, row(4, "adversarial_harmful", instruction="long " * 3000)]
    examples, skipped = encode_prompts(rows, tokenizer, 2048)
    assert texts(examples, tokenizer) == [(tokenizer.decode(encode_prompt(tokenizer, "Question 1?")), f"<think>\n{WORDS}")]
    assert skipped == {"benign": 1, "has_instruction": 1, "too_long": 1}
    (prompt, target), = texts(encode_prompts(rows, opened, 2048)[0], opened)
    assert prompt.endswith("<think>\n") and target == WORDS
    (_, target), = texts(encode_prompts(rows, tokenizer, 2048, "Is it safe?")[0], tokenizer)
    assert target == "<think>\nIs it safe?"


def test_loss_of_the_words_by_hand(tiny):
    model, tokenizer = tiny
    example, = encode_prompts([row(1)], tokenizer, 2048)[0]
    prompt, target = (tokenizer.encode(t, add_special_tokens=False) for t in
                      ("<|im_start|>user\nQuestion 1?<|im_end|>\n<|im_start|>assistant\n", "<think>\nLet's think about safety first."))
    ids = torch.tensor(prompt + target)
    assert example["ids"] == ids.tolist()
    p = model.logits(model(ids, torch.tensor([0, len(ids)]))).softmax(-1)
    want = -sum(math.log(p[len(prompt) - 1 + i, token]) for i, token in enumerate(target))
    assert packed_loss(model, [example]).total.item() == pytest.approx(want, rel=1e-4)


def test_it_needs_prompts_only(tmp_path):
    flags = ["--model", "tiny", "--data", ROOT / "tiny" / "prompts.jsonl", "--limit", 8, "--epochs", 2, "--out", tmp_path]
    done = call("extras.safepath", *flags)
    assert done.json["rows"] == 8 and done.json["skipped"] == {"benign": 600, "not_drawn": 592}
    assert rows_of(tmp_path / "metrics.jsonl")[0]["tokens"] > 0
    assert "fine-tuned with SafePath" in str(model_card(tmp_path))
    done = call("extras.safepath", *flags, "--words", "Is it safe?")
    assert done.returncode == 2 and "made with" in done.stderr


def test_kept_or_not_a_prompt_of_the_run_is_a_prompt(tmp_path):
    """Without --data: the harmful prompts of OUT/guarded.jsonl, each once, whatever the guard said of the traces."""
    assert "guard.py has not finished" in call("extras.safepath", "--model", "tiny", "--out", tmp_path).stderr
    call("sample.py", "--model", "tiny", "--limit", 30, "--steer", "none", "--n", 2, "--out", tmp_path, "--device", "cpu")
    call("guard.py", "--out", tmp_path)
    guarded = rows_of(tmp_path / "guarded.jsonl")
    harmful = {r["id"] for r in guarded if r["prompt_label"].endswith("harmful")}
    done = call("extras.safepath", "--epochs", 1, "--out", tmp_path)
    assert not all(r["keep"] for r in guarded) and done.json["rows"] == len(harmful)
