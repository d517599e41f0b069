"""
Ask the model before and after training, a line from the keyboard at a time. The guard judges.

    python -m extras.chat --out out
    python -m extras.chat --model out/model --before Qwen/Qwen3-0.6B < prompts.txt

Each line of stdin, up to an empty one, is a prompt to both models, with the same random draws. No
prompt knows of those before it. Nothing is written.
"""
import contextlib
import itertools
import sys

from data.chat import decode_response, encode_prompt, rejection_reason
from data.generation import sampling_options
from data.run_record import stage_seed
from eval import add_model_flags, models_to_compare
from guard import default_guard, load_guard
from sample import Sampler, add_sampling_flags
from thinksafe import (
    InputError, choose_dtype, cli, escape_control_chars, load_model, lora_disabled, lora_layers,
    make_parser, resolve_model)

def for_terminal(response):
    """Return a response that is safe to print. On a terminal its reasoning is dim."""
    text = escape_control_chars(response)
    end = 0
    if "</think>" in text:
        end = text.rfind("</think>") + len("</think>")
    elif "<think>" in text:
        end = len(text)
    return f"\033[2m{text[:end]}\033[0m{text[end:]}" if end and sys.stdout.isatty() else text

def read_prompt(turn):
    """Return the next line of stdin, "" at the end. Raises InputError where it is no text."""
    try:
        prompt = input("> " if sys.stdin.isatty() else "").strip()
        prompt.encode("utf-8")
    except UnicodeError:
        raise InputError(f"prompt {turn + 1} is not text in UTF-8")
    except EOFError:
        return ""
    if prompt and not sys.stdin.isatty():
        print(f"> {escape_control_chars(prompt)}")
    return prompt

def judge(guard, prompt, response, finish_reason, tokenizer, threshold):
    """Return what the guard says of a response, for people: "unsafe, p_unsafe 0.931"."""
    if reason := rejection_reason(response, finish_reason, tokenizer):
        return f"unknown, {reason}"
    verdict, = guard.judge([(prompt, response)], threshold)
    return f"{verdict.label}, {verdict.reason or f'p_unsafe {verdict.p_unsafe:.3f}'}"

def main():
    p = make_parser(__doc__)
    add_model_flags(p)
    add_sampling_flags(p)
    args = p.parse_args()
    run, before, after = models_to_compare(args)
    seed, filtered = stage_seed(args, run), run.get("guard", {})
    threshold = filtered.get("fingerprint", {}).get("threshold", 0.5)

    where = {"device": args.device, "dtype": choose_dtype(args), "quantize": args.quantize}
    trained, tokenizer = load_model(after, **where)
    # An adapter on the model before training is that model while it is switched off.
    one_load = lora_layers(trained) and trained.folder == resolve_model(before).folder
    models = {"before": (trained, tokenizer) if one_load else load_model(before, **where),
              "after": (trained, tokenizer)}
    options = sampling_options(args, models["before"][0], run.get("sample", {}).get("fingerprint"))
    name = filtered.get("guard") or default_guard(before)
    student = load_model(before, **where) if name == "self" else None
    guard = load_guard(name, student=student, **where)

    for turn in itertools.count():
        prompt = read_prompt(turn)
        if not prompt:
            return
        for when, (model, tokenizer) in models.items():
            ids = encode_prompt(tokenizer, prompt)
            sampler = Sampler(model, tokenizer, args.slots)
            base = lora_disabled(model) if when == "before" and one_load else None
            with base or contextlib.nullcontext():
                c, = sampler.generate([ids], seed=seed, keys=[str(turn)], **options)
            response = decode_response(tokenizer, c.tokens, model.eos_ids)
            verdict = judge(guard, prompt, response, c.finish_reason, tokenizer, threshold)
            print(f"\n{when}:\n{for_terminal(response)}\nguard {guard.name}: {verdict}", flush=True)
        print()

if __name__ == "__main__":
    cli(main)
