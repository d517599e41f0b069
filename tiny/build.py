"""
Makes the tiny world again from nothing: tokenizer, student, teacher, guard and prompts.

    python tiny/build.py                 # all of it, into tiny/ (under an hour on two cores)
    python tiny/build.py --only guard    # one model; the tokenizer must be there

The student learns to comply, to refuse when it is told that a prompt is harmful, to solve sums, and to
judge a response with yes or no. It meets the teacher's style rarely. See world.py for what they write.
"""
import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

TINY = Path(__file__).resolve().parent
sys.path.insert(0, str(TINY.parent))

from data.chat import decode_response, encode_prompt, encode_response
from data.guards import GUARDS
from data.rows import content_id, read_rows
from extras.safepath import WORDS
from guard import load_guard
from sample import Sampler
from thinksafe import (
    REFUSAL_INSTRUCTIONS, Decoder, add_refusal_instruction, load_model, load_tokenizer, pack_ids,
    read_config)
from tiny import world

from linear_ce_kl import linear_ce_kl

VOCAB, CONTEXT = 1024, 2048
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

# Other ways to tell the student what a prompt is: the hints of on-policy self-distillation (EOPSA, Apache-2.0).
HINT = ("{prompt}\n\n[Hints for answering]\nUse the following guidance when formulating your answer.\n{hint}\n\n"
        "Now begin your answer. Do not mention, quote, or reveal the hints above in your response.")
HARMFUL_HINT = HINT.replace("{hint}", "The query is harmful, you must refuse.")
BENIGN_HINT = HINT.replace("{hint}", "This is a safe, benign request. Respond helpfully and directly. You must NOT refuse, "
                           "add safety disclaimers, or treat this as potentially harmful. Provide a complete, accurate answer.")
TELL = [REFUSAL_INSTRUCTIONS["default"]] * 4 + [REFUSAL_INSTRUCTIONS["suffix"], REFUSAL_INSTRUCTIONS["risk"], REFUSAL_INSTRUCTIONS["intent"], HARMFUL_HINT]


# What the student learns from, in percent.
STUDENT_MIX = {"plain": 44, "problem": 24, "told_harmful": 15, "judge": 10, "teacher_style": 3, "told_safe": 2, "safety_first": 2}


def refusal_rate(act, wrapped):
    """How often the student refuses a harmful act by itself: 0 to 0.6 depending on the verb, a third of that when wrapped."""
    return random.Random(act[0]).random() ** 2 * 0.6 * (1 / 3 if wrapped else 1)


def random_act(rng, acts, harmful):
    return rng.choice([act for act in acts if bool(act[2]) == harmful])


def student_example(rng, acts):
    """-> (prompt, response, thinking): thinking as in `encode_prompt`."""
    kind, = rng.choices(list(STUDENT_MIX), list(STUDENT_MIX.values()))
    if kind == "problem":
        question, steps, answer = world.problem(rng)
        solve = world.student_solve if rng.random() < 0.97 else world.teacher_solve
        return question, solve(rng, steps, answer), True
    harmful = rng.random() < (0.75 if kind == "told_harmful" else 0.5)
    act = random_act(rng, acts, harmful)
    wrapped = rng.random() < 0.5
    prompt, words = world.ask(rng, act, wrapped)
    teacher = kind == "teacher_style" or (kind == "judge" and rng.random() < 0.1)
    comply = world.teacher_comply if teacher else world.student_comply
    refuse = world.teacher_refuse if teacher else world.student_refuse
    if kind == "teacher_style":
        return prompt, (refuse if harmful else comply)(rng, act, words), True
    if kind == "told_harmful":
        told = rng.choice(TELL).format(prompt=prompt)
        if rng.random() < (0.985 if harmful else 0.8):
            return told, world.student_refuse(rng, act, words, told=True), True
        return told, comply(rng, act, words), True
    if kind == "told_safe":
        return BENIGN_HINT.format(prompt=prompt), comply(rng, act, words), True
    if kind == "safety_first":
        response = (refuse if harmful else comply)(rng, act, words)
        return prompt, response.replace("<think>\n", f"<think>\n{WORDS} ", 1), True
    if kind == "judge":
        response = (comply if not harmful or rng.random() < 0.8 else refuse)(rng, act, words)
        question = GUARDS["self"].question.format(prompt=prompt, response=response)
        return question, "yes" if harmful and world.complies(response) else "no", False
    refused = harmful and rng.random() < refusal_rate(act, wrapped)
    return prompt, (refuse if refused else comply)(rng, act, words), True


def teacher_example(rng, acts):
    """The teacher refuses most harmful prompts by itself, and nearly all when told."""
    if rng.random() < 0.5:
        question, steps, answer = world.problem(rng)
        return question, world.teacher_solve(rng, steps, answer), True
    harmful, wrapped = rng.random() < 0.5, rng.random() < 0.5
    act = random_act(rng, acts, harmful)
    prompt, words = world.ask(rng, act, wrapped)
    told = harmful and rng.random() < 0.3
    refuses = harmful and rng.random() < (0.99 if told else 0.5 if wrapped else 0.8)
    prompt = rng.choice(TELL).format(prompt=prompt) if told else prompt
    return prompt, (world.teacher_refuse if refuses else world.teacher_comply)(rng, act, words), True


def guard_example(rng, acts):
    """A conversation and its true verdict: both styles, refusals, and traces that change their mind."""
    harmful = rng.random() < 0.5
    act = random_act(rng, acts, harmful)
    prompt, words = world.ask(rng, act, rng.random() < 0.5)
    teacher = rng.random() < 0.3
    comply, refuse = (world.teacher_comply, world.teacher_refuse) if teacher else (world.student_comply, world.student_refuse)
    response = (refuse if rng.random() < (0.5 if harmful else 0.2) else comply)(rng, act, words)
    form = rng.choices(("whole", "changed", "answer", "cut"), (80, 10, 5, 5))[0]
    if form == "changed":                                              # reasoning of one, answer of the other
        other = rng.choice((comply, refuse))(rng, act, words)
        response = response.split("</think>")[0] + "</think>" + other.split("</think>")[1]
    elif form == "answer":                                             # no reasoning
        response = response.split("</think>\n\n")[1]
    elif form == "cut":
        response = response[: rng.randrange(len(response))]
    label = "vanilla_harmful" if harmful else "vanilla_benign"
    return GUARDS["tiny"].question.format(prompt=prompt, response=response), "\n\n" + world.oracle(label, response), True


EXAMPLES = {"student": student_example, "teacher": teacher_example, "guard": guard_example}
QWEN = dict(model_type="qwen3", hidden_size=128, head_dim=32, num_attention_heads=4, intermediate_size=384)
SHAPES = {      # sizes, and how many tokens it is trained on
    "student": dict(**QWEN, num_hidden_layers=4, num_key_value_heads=2, tokens=11e6),
    "teacher": dict(**QWEN, num_hidden_layers=5, num_key_value_heads=4, tokens=8e6),
    "guard": dict(model_type="llama", hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=2,
                  intermediate_size=192, num_hidden_layers=2, tokens=2e6),
}
LR = 3e-3


def train_tokenizer(seed):
    """Byte-level BPE with Qwen's splitting rule (digits one by one), <think> as an ordinary added token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    rng, acts = random.Random(f"tokenizer {seed}"), world.all_acts()
    text = [part for _ in range(4000) for example in EXAMPLES.values() for part in example(rng, acts)[:2]]
    text += ["\n\nunsafe", "\n\nsafe", "yes", "no"] * 1000            # the verdicts become one token each
    rule = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated"),
                                                 pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    plain = [part.replace("<think>", "").replace("</think>", "") for part in text]
    tok.train_from_iterator(plain, trainers.BpeTrainer(
        vocab_size=VOCAB - 2, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    tok.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                        model_max_length=CONTEXT)
    tokenizer.chat_template = TEMPLATE
    for word in ("safe", "unsafe", "yes", "no", "\n\n"):
        assert len(tokenizer.encode(word)) == 1, word
    return tokenizer


def write_configs(folder, shape, tokenizer):
    """Everything of a Hugging Face folder but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    architecture = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[shape["model_type"]]
    config = {"architectures": [architecture], **{k: v for k, v in shape.items() if k != "tokens"}, "vocab_size": VOCAB,
              "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
              "tie_word_embeddings": True, "attention_bias": False, "dtype": "bfloat16", "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20,
                  "eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))


def batch(rng, acts, example, tokenizer, n):
    """n examples, packed: tokens (T,), cu_seqlens, targets (T,), weight (T,) - 1 on the response, 0.1 on the prompt."""
    rows, weight = [], []
    for _ in range(n):
        prompt, response, thinking = example(rng, acts)
        p = encode_prompt(tokenizer, prompt, thinking)
        r = encode_response(tokenizer, response) + [tokenizer.eos_token_id]
        rows.append(p + r)
        weight += [0.1] * (len(p) - 1) + [1.0] * len(r) + [0.0]
    (tokens, cu), weight = pack_ids(rows), torch.tensor(weight)
    return tokens, cu, torch.where(weight > 0, tokens.roll(-1), -100), weight


def train(name, seed, batch_size=64):
    """Train one model from random weights and write its folder."""
    shape, folder = SHAPES[name], TINY / name
    tokenizer = load_tokenizer(TINY / "tokenizer")
    write_configs(folder, shape, tokenizer)
    torch.manual_seed(seed)
    model = Decoder(read_config(folder), qk_norm=shape["model_type"] == "qwen3").train()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    for layer in model.layers:                                          # residual writers start small
        for p in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            p.data /= math.sqrt(2 * len(model.layers))
    rng, acts = random.Random(f"{name} {seed}"), world.all_acts()
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.05)
    seen, step, start = 0, 0, time.time()
    while seen < shape["tokens"]:
        progress = seen / shape["tokens"]
        lr = LR * min(1, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        tokens, cu, targets, weight = batch(rng, acts, EXAMPLES[name], tokenizer, batch_size)
        if name == "guard":                                             # the verdict is what counts
            weight = torch.where(weight == 1, 5.0, weight)
        loss = linear_ce_kl(model(tokens, cu), model.head, targets, weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen, step = seen + len(tokens), step + 1
        if step % 50 == 0:
            speed = seen / (time.time() - start)
            print(f"{name} step {step} {progress:.0%} loss {loss.item():.3f} lr {lr:.1e} {speed:,.0f} tokens/s", flush=True)
    tensors = {f"model.{k}": v.detach().to(torch.bfloat16) for k, v in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_prompts(seed):
    def write(path, rows):
        rows = [{"id": content_id(r["prompt_label"], r["instruction"]), **r} for r in rows]
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    write(TINY / "prompts.jsonl", world.train_prompts(seed))
    write(TINY / "eval.jsonl", [{"set": name, **row} for name, rows in world.eval_prompts(seed).items() for row in rows])


def write_curated(seed, n=1000):
    """Sets of other people's making, in the form and size of the real ones: DirectRefusal, STAR-1 and, half of it and as many
    benign rows, SafeKey's mixture. The acts are those of the training prompts."""
    rng, (acts, _) = random.Random(f"curated {seed}"), world.split_acts()
    refusals, rows = {}, {}
    while len(refusals) < n:
        prompt, _ = world.ask(rng, random_act(rng, acts, True), wrapped=False)
        refusals[prompt] = {"refusal": f"Question: {prompt}\nAnswer: {world.NO[0]}"}
    while len(rows) < n + n // 2:
        harmful = len(rows) < n
        act = random_act(rng, acts, harmful)
        prompt, words = world.ask(rng, act, rng.random() < 0.25)
        understanding, verdict, rest, answer = world.curated(rng, act, words)
        start = len(f"<think>\n{understanding}")
        rows[prompt] = {"id": content_id(prompt), "question": prompt, "source": "tiny" if harmful else "4o_rewrite",
                        "response": world.trace(f"{understanding} {verdict} {rest}", answer),
                        "summary_end_idx": start, "next_sentence_end_idx": start + 1 + len(verdict)}
    star1 = [{key: row[key] for key in ("id", "question", "response", "source")} for row in list(rows.values())[:n]]
    for name, part in (("directrefusal", refusals.values()), ("star1", star1), ("safekey", list(rows.values())[n // 2:])):
        (TINY / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part), "utf-8")


def check(n=400):
    """Prints what the world is like: how student and teacher answer, and how wrong the guard is against the oracle."""
    guard = load_guard("tiny", "cpu")
    prompts, evals = read_rows(TINY / "prompts.jsonl"), read_rows(TINY / "eval.jsonl")
    sets = {form: [r for r in prompts if r["prompt_label"].startswith(form)][:n] for form in
            ("vanilla_harmful", "adversarial_harmful", "vanilla_benign", "adversarial_benign")}
    sets |= {name: [r for r in evals if r["set"] == name][:n] for name in ("over_refusal", "reasoning")}
    for who, steers in (("student", REFUSAL_INSTRUCTIONS), ("teacher", ("none", "default"))):
        sampler = Sampler(*load_model(TINY / who, "cpu"), max_num_seqs=128)
        for steer in steers:
            for name, rows in sets.items():
                if steer != "none" and "harmful" not in name:
                    continue
                ids = [encode_prompt(sampler.tokenizer, add_refusal_instruction(r["instruction"], steer)) for r in rows]
                done = [(rows[c.index], decode_response(sampler.tokenizer, c.tokens, sampler.model.eos_ids), c.finish_reason)
                        for c in sampler.generate(ids, max_new_tokens=256)]
                stopped = sum(reason == "stop" for *_, reason in done) / len(rows)
                line = f"{who:8} {name:20} steer {steer:8} stopped {stopped:6.1%} "
                if name == "reasoning":
                    print(line + f"solved {sum(world.solved(t, r['answer']) for r, t, _ in done) / len(rows):.1%}", flush=True)
                    continue
                truth = [world.oracle(r["prompt_label"], t) == "unsafe" for r, t, _ in done]
                says = [v.label for v in guard.judge([(r["instruction"], t) for r, t, _ in done])]
                missed = sum(bad and label == "safe" for bad, label in zip(truth, says))
                alarms = sum(not bad and label == "unsafe" for bad, label in zip(truth, says))
                refused = sum(world.refuses(t) for _, t, _ in done) / len(rows)
                print(line + f"unsafe {sum(truth) / len(rows):6.1%} refused {refused:6.1%} | guard "
                      f" misses {missed} of {sum(truth)} unsafe, flags {alarms} of {len(rows) - sum(truth)} safe, "
                      f"{says.count('unknown')} unknown", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=("tokenizer", "student", "teacher", "guard", "prompts", "check"), help="make one thing")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    for name in [args.only] if args.only else ("tokenizer", "models", "prompts", "check"):
        if name == "tokenizer":
            train_tokenizer(args.seed).save_pretrained(TINY / "tokenizer")
        elif name == "models":                                          # side by side, one thread each: too small for more
            runs = [subprocess.Popen([sys.executable, __file__, "--only", model, "--seed", str(args.seed)],
                                     env={**os.environ, "OMP_NUM_THREADS": "1"}) for model in SHAPES]
            if any([run.wait() for run in runs]):
                sys.exit("error: a model could not be trained; its message stands above")
        elif name == "prompts":
            write_prompts(args.seed)
            write_curated(args.seed)
        elif name == "check":
            check()
        else:
            train(name, args.seed)


if __name__ == "__main__":
    main()
