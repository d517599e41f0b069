"""extras/safekey.py: where the key sentence is, the two losses by hand, and training with them."""
import json
import math
import signal

import pytest
import torch
from conftest import call, killed_at, rows_of
from safetensors.torch import load_file

from extras.export import model_card
from extras.safekey import encode_rows, safekey_losses
from thinksafe import InputError, add_lora, load_model, lora_tensors
from training_rows import row


def key_of(tokenizer, the_row):
    """The text before the key sentence, and the sentence."""
    item, = encode_rows([the_row], tokenizer, 2048)[0]
    if "key" not in item:
        return None
    start, end = item["key"]
    return tokenizer.decode(item["ids"][item["n_prompt"]:start]), tokenizer.decode(item["ids"][start:end])


def test_key_sentence_is_the_second_of_the_reasoning(tokenizer, opened):
    assert key_of(tokenizer, row(1)) == ("<think>\nA question about 1.", " That is forbidden!")
    assert key_of(opened, row(1)) == ("A question about 1.", " That is forbidden!")
    odd = 'She asks for 1.5 "漢字?" Über\nmañana... End.'
    assert key_of(tokenizer, row(1, response=f"<think>\n{odd}\n</think>\n\nNo. Never. Ever.")) == ('<think>\nShe asks for 1.5 "漢字?"', " Über\nmañana...")
    for one in ("", "Only one.", "No end", "Only one.\n"):
        assert key_of(tokenizer, row(1, response=f"<think>\n{one}\n</think>\n\nNo. Never.")) is None


def test_key_sentence_by_columns(tokenizer, opened):
    """They count characters of the response as the set has it."""
    text = row(1)["response"]
    for a, b in (("about 1.", "So"), ("about 1. ", "den!"), ("question", "about")):        # with and without the space between
        spans = {"summary_end_idx": text.index(a) + len(a), "next_sentence_end_idx": text.index(b) + len(b)}
        before, key = text[:spans["summary_end_idx"]].rstrip(), text[:spans["next_sentence_end_idx"]]
        assert key_of(tokenizer, row(1, **spans)) == (before, key.removeprefix(before))
        assert key_of(opened, row(1, **spans)) == (before.removeprefix("<think>\n"), key.removeprefix(before))
    for bad in ((None, 5), (9, None), (9, 9), (0, 9), (9, 1000), ("9", 12), (True, 12)):
        with pytest.raises(InputError, match="row 1: summary_end_idx"):
            key_of(tokenizer, row(1, summary_end_idx=bad[0], next_sentence_end_idx=bad[1]))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_safekey_losses_by_hand(folders, family):
    """Against transformers, which masks the prompt in place; then mean, linear head, log of the sigmoid."""
    hf, folder = folders(family)
    model, tokenizer = load_model(folder, "cpu", torch.float32)
    examples = encode_rows([row(1), row(20, "vanilla_benign"), row(300, "adversarial_harmful")], tokenizer, 2048)[0]
    torch.manual_seed(0)
    heads = torch.nn.ModuleList(torch.nn.Linear(48, 1) for _ in range(2))
    want_key = want_head = 0
    for item in examples:
        ids, n, (start, end) = torch.tensor([item["ids"]]), item["n_prompt"], item["key"]
        mask = torch.ones_like(ids)
        mask[:, :n] = 0
        logits = hf(ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None]).logits[0]
        want_key -= sum(logits[t - 1].log_softmax(-1)[item["ids"][t]].item() for t in range(start, end))
        hidden = hf(ids, output_hidden_states=True).hidden_states[-1][0]
        for (w, b), part in zip((h.parameters() for h in heads), (hidden[n:start], hidden[:start])):
            p = torch.sigmoid(w[0] @ (part.sum(0) / len(part)) + b[0]).item()
            want_head -= 0.5 * math.log(1 - p if item["benign"] else p)
    key, head = safekey_losses(model, heads, examples)
    assert key.item() == pytest.approx(want_key, rel=1e-4) and head.item() == pytest.approx(want_head, rel=1e-4)
    apart = [safekey_losses(model, heads, [item]) for item in examples]                                # packing changes nothing
    assert sum(k.item() for k, _ in apart) == pytest.approx(want_key, rel=1e-4) and sum(h.item() for _, h in apart) == pytest.approx(want_head, rel=1e-4)


def test_safekey_trains_the_model_and_its_heads(folders):
    model, tokenizer = load_model(folders("qwen3")[1], "cpu", torch.float32)
    add_lora(model, 4, 8, 0.0)
    for p in lora_tensors(model).values():
        p.normal_(std=0.1)
    heads = torch.nn.ModuleList(torch.nn.Linear(48, 1) for _ in range(2))
    examples = encode_rows([row(1), row(2, "vanilla_benign")], tokenizer, 2048)[0]
    for loss in safekey_losses(model, heads, examples):
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
        model.zero_grad()
    assert all(p.grad.abs().sum() > 0 for p in heads.parameters())


def test_safekey_as_a_command(tmp_path):
    """Both losses in the last two epochs only, 0.2 of each; killed and resumed bit for bit; the adapter has no heads in it."""
    data = tmp_path / "rows.jsonl"
    kinds = ("vanilla_harmful", "vanilla_benign")
    data.write_text("".join(json.dumps(row(i, kinds[i % 2])) + "\n" for i in range(9)) + json.dumps(row(9, response="<think>\nx\n</think>\n\nNo.")) + "\n")
    flags = ["--model", "tiny", "--data", data, "--epochs", 5, "--batch-size", 5, "--save-every", 3]
    done = call("extras.safekey", *flags, "--out", tmp_path / "a")
    assert done.returncode == 0 and "9 rows with a key sentence" in done.stdout
    steps = rows_of(tmp_path / "a" / "metrics.jsonl")
    assert [("masked_key" in s, "harm_head" in s) for s in steps] == [(False, False)] * 6 + [(True, True)] * 4
    assert all(s["loss"] == pytest.approx(s["ce"] + 0.2 * (s.get("masked_key", 0) + s.get("harm_head", 0)), rel=1e-5) for s in steps)
    assert killed_at("extras.safekey", [*flags, "--out", tmp_path / "b"], tmp_path / "b" / "metrics.jsonl", 8) == -signal.SIGKILL
    assert not (tmp_path / "b" / "model").exists() and call("extras.safekey", *flags, "--out", tmp_path / "b").returncode == 0
    assert "fine-tuned with SafeKey" in str(model_card(tmp_path / "b"))
    a, b = (load_file(tmp_path / x / "model" / "adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and "lora" in k for k in a)
    last = [{k: v for k, v in rows_of(tmp_path / x / "metrics.jsonl")[-1].items() if k != "tokens_per_second"} for x in "ab"]
    assert last[0] == last[1]


def test_safekey_without_a_key_sentence(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(row(1, response="<think>\nx\n</think>\n\nNo.")) + "\n")
    done = call("extras.safekey", "--model", "tiny", "--data", data, "--out", tmp_path / "out")
    assert done.returncode == 2 and "no row whose reasoning has two sentences" in done.stderr and not (tmp_path / "out").exists()
