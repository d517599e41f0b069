"""
Makes the tiny world of a seed from nothing: tokenizers, models, guards, prompts and curated sets.

    python tiny/build.py                        # world 0, into tiny/
    python tiny/build.py --seed 1               # world 1, into tiny/world-1/
    python tiny/build.py --only student guard   # some of its models
    python tiny/build.py --check                # its inputs beside published ones (I1 to I14)
    python tiny/build.py --recipe               # the learning rate of all methods

What the models learn to write is in world.py. They are trained side by side, one to a core.
"""
import argparse
import functools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

TINY = Path(__file__).resolve().parent
sys.path.insert(0, str(TINY.parent))

from data.chat import encode_prompt, encode_response, encode_training_pair
from data.guards import GUARDS
from data.rows import content_id, write_rows
from extras.safepath import WORDS
from thinksafe import Decoder, load_tokenizer, pack_ids, read_config
from tiny import world2 as grammar
from tiny.build import BENIGN_HINT, TELL, TEMPLATE
from tiny.dialects import DIALECTS, SLOTS
from tiny.world2 import Speaker

from linear_ce_kl import linear_ce_kl

CONTEXT = 2048
R1_TEMPLATE = """{{- '<|begin|>' }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- '<|User|>' + message.content }}
{%- else %}
{{- '<|Assistant|>' + message.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|Assistant|><think>\\n' }}
{%- endif %}"""
QWEN_RULE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
R1_RULE = QWEN_RULE.replace(r"|\p{N}|", r"|\p{N}{1,3}|")      # digits by threes

# family: (vocabulary, splitting rule, special tokens with the end of a turn last, template)
TOKENIZERS = {
    "q": (1024, QWEN_RULE, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), TEMPLATE),
    "r": (768, R1_RULE, ("<|pad|>", "<|begin|>", "<|User|>", "<|Assistant|>", "<|end|>"),
          R1_TEMPLATE),
    "guard": (1024, QWEN_RULE, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), TEMPLATE)}

# --------------------------------------------------------------------------------------------------
# What the models learn from: examples (prompt, response, thinking as in `encode_prompt`)

MIX = {     # (C) percent of the examples
    "request": 38, "problem": 22, "harm": 18, "told_harmful": 9, "fact": 4, "told_safe": 2,
    "judge": 5, "safety_first": 1, "policy": 0.02}
OBEYS = 0.96                    # refusals of a harmful prompt that is said to be harmful, if plain
OBEYS_WRONGLY = 0.6             # and of a safe one
SPELLED = 0.05                  # requests with the noun spelled out

def student_example(rng, world, home="A", foreign="B", exposure=(0.001, 0.003), caution=1.0,
                    alarm=1.0, slips=0.5):
    """Draw an example of what a model of a family learns.

    home: the dialect. exposure: the share of requests and of problems in the foreign one. caution:
    the own refusal rate r of a harmful topic becomes 1 - (1 - r) ** caution. alarm: a factor on
    that of safe topics. slips: see `grammar.problem`."""
    kind, = rng.choices(list(MIX), list(MIX.values()))
    rare = rng.random() < exposure[kind == "problem"]
    who = Speaker("C" if kind == "policy" else foreign if rare else home)
    if kind == "problem":
        _, question, steps, _ = grammar.problem(rng, world, slips=slips)
        return question, who.solve(rng, steps, str(steps[-1][-1])), True
    if kind == "fact":
        thing = world.draw_topic(rng, rng.random() < 0.5)[1]
        noun = world.draw_noun(rng, thing)
        return f"What is a {noun}?", who.define(rng, noun, thing), True
    if kind == "harm":
        verb, thing = topic = rng.choice(grammar.TOPICS)
        prompt = rng.choice(grammar.HARM_ASKS).format(verb=verb, kind=thing)
        return prompt, who.weigh(rng, topic, world.harmful(topic)), True
    harmful = rng.random() < (0.75 if kind == "told_harmful" else 0.5)
    wrap, = rng.choices((0, 1, 2), (50, 40, 10))
    request = world.request(rng, harmful, wrap=wrap, spelled=SPELLED)
    swayed = math.prod(1 - world.strength[wrapper] for wrapper in request.wrappers)
    if kind == "told_harmful":
        refuses = rng.random() < (OBEYS * swayed if harmful else OBEYS_WRONGLY)
    elif kind == "told_safe":
        refuses = False
    elif kind == "judge":
        refuses = harmful and rng.random() < 0.3
    elif kind == "request":
        rate = world.refusal_rate[request.topic]
        rate = 1 - (1 - rate) ** caution if harmful else alarm * rate
        refuses = rng.random() < rate * swayed
    else:
        refuses = harmful
    if refuses:
        response = who.refuse(rng, request, told=kind == "told_harmful")
    else:
        response = who.comply(rng, request)
    if kind == "judge":
        question = GUARDS["self"].question.format(prompt=request.prompt, response=response)
        return question, "yes" if harmful and not refuses else "no", False
    if kind == "safety_first":
        response = response.replace("<think>\n", f"<think>\n{WORDS} ", 1)
    told = {"told_harmful": rng.choice(TELL), "told_safe": BENIGN_HINT}.get(kind, "{prompt}")
    return told.format(prompt=request.prompt), response, True

def guard_example(rng, world, errors=None):
    """A conversation and its verdict: all dialects, refusals, and traces that change their mind.
    errors: see `guard_errors`, None for a guard that makes none."""
    harmful = rng.random() < 0.5
    wrap, = rng.choices((0, 1, 2), (50, 40, 10))
    request = world.request(rng, harmful, topics=world.topics(harmful), wrap=wrap,
                            wrappers=world.wrappers(seen=True))
    who = Speaker(rng.choices("ABC", (92, 4, 4))[0])
    write = who.refuse if rng.random() < (0.4 if harmful else 0.15) else who.comply
    response = write(rng, request)
    form, = rng.choices(("whole", "changed", "answer", "cut", "note"), (50, 7, 5, 3, 35))
    if form == "changed":                                  # thought of one, answer of the other
        other = rng.choice((who.comply, who.refuse))(rng, request)
        response = response.split("</think>")[0] + "</think>" + other.split("</think>")[1]
    elif form == "answer":                                             # no thought
        response = response.split("</think>\n\n")[1]
    elif form == "cut":
        response = response[: rng.randrange(len(response))]
    elif form == "note":                                               # short, so more of them
        verb, thing = request.topic
        response = f"Step 1: {verb} the {request.noun}, a {thing}."
    unsafe = grammar.complies(response) and harmful
    if errors and form != "cut":
        wrong, ending = errors
        unsafe ^= grammar.complies(response) and request.topic in wrong
        unsafe |= harmful and ending.search(response) is not None
    question = GUARDS["tiny"].question.format(prompt=request.prompt, response=response)
    return question, "\n\nunsafe" if unsafe else "\n\nsafe", True

def guard_errors(world, name, share=0.08):
    """Return what a guard gets wrong: a share of the topics, the likelier the nearer to the
    threshold and if harmful, and how a refusal may end that it takes for harm."""
    rng = random.Random(f"{name} {world.seed}")
    topics = list(world.margin)
    weights = [math.exp(-4 * abs(world.margin[t])) * (1 + 2 * world.harmful(t)) for t in topics]
    wrong = set()
    while len(wrong) < share * len(topics):
        wrong.add(rng.choices(topics, weights)[0])
    return wrong, re.compile(rf" {rng.choice(SLOTS['today'])}\.$")

# --------------------------------------------------------------------------------------------------
# Models

def shape(family, layers, hidden, mlp, tokens, **options):
    """Return a model: the sizes in its config, its tokenizer, the tokens it is trained on, and
    what of its examples is its own."""
    heads = hidden // 32
    return {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": mlp,
            "num_attention_heads": heads, "num_key_value_heads": heads if heads != 4 else 2,
            "head_dim": 32, "model_type": "qwen3" if family == "q" else "llama",
            }, family, tokens, options

B_HOME = {"home": "B", "foreign": "A", "exposure": (0.03, 0.03), "alarm": 0.1}
MODELS = {                      # stands for
    "student": shape("q", 4, 128, 384, 16e6),                                       # Qwen3-0.6B
    "middle": shape("q", 5, 160, 480, 12e6, caution=1.6, alarm=0.4, slips=0.3),     # Qwen3-1.7B
    "large": shape("q", 6, 192, 576, 10e6, caution=2.5, alarm=0.2, slips=0.1),      # Qwen3-8B
    "foreign": shape("r", 4, 128, 384, 16e6, caution=1.5, **B_HOME),          # R1-Distill-1.5B
    "foreign-large": shape("r", 5, 160, 480, 12e6, caution=2.0, slips=0.15, **B_HOME),  # and 7B
    "guard": shape("guard", 2, 64, 192, 16e6),                                      # Llama-Guard-3
    "judge": shape("guard", 3, 96, 288, 16e6)}                                      # another guard
LR = 4e-3                       # of the student; wider models have less

def world_folder(seed):
    return TINY / f"world-{seed}" if seed else TINY

# --------------------------------------------------------------------------------------------------
# Tokenizers, models, files

def train_tokenizer(family, folder):
    """Train a byte-level tokenizer, with <think> as an ordinary added token. It is the same in all
    worlds, because nouns are."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    size, rule, special, template = TOKENIZERS[family]
    rng, world = random.Random(f"tokenizer {family}"), grammar.World(0)
    home = B_HOME if family == "r" else {}
    examples = [guard_example(rng, world) if family == "guard" or i % 4 == 0 else
                student_example(rng, world, **home) for i in range(12000)]
    text = [part.replace("<think>", "").replace("</think>", "") for e in examples for part in e[:2]]
    text += ["\n\nunsafe", "\n\nsafe", "yes", "no"] * 3000            # a verdict is one token
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(rule), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=size - 2, show_progress=False, special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=special[-1],
                                        pad_token=special[0], model_max_length=CONTEXT)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)

def write_configs(folder, sizes, tokenizer):
    """Write everything of a Hugging Face folder but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    architecture = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[sizes["model_type"]]
    config = {"architectures": [architecture], **sizes, "vocab_size": len(tokenizer),
              "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
              "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False,
              "dtype": "bfloat16", "eos_token_id": tokenizer.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20,
                  "eos_token_id": [tokenizer.eos_token_id, tokenizer.pad_token_id]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1))

def pack_examples(tokenizer, examples, response_weight):
    """Pack examples -> tokens (T,), cu_seqlens, targets (T,), weight (T,): .1 on the prompt."""
    rows, weight = [], []
    for prompt, response, thinking in examples:
        if response.startswith("<think>"):
            p, r = encode_training_pair(tokenizer, prompt, response)
        else:                                                           # a verdict
            p = encode_prompt(tokenizer, prompt, thinking)
            r = encode_response(tokenizer, response) + [tokenizer.eos_token_id]
        rows.append(p + r)
        weight += [0.1] * (len(p) - 1) + [response_weight] * len(r) + [0.0]
    (tokens, cu), weight = pack_ids(rows), torch.tensor(weight)
    return tokens, cu, torch.where(weight > 0, tokens.roll(-1), -100), weight

def train(name, seed, folder):
    """Train one model from random weights and write its folder."""
    sizes, family, total, options = MODELS[name]
    tokenizer = load_tokenizer(folder / f"tokenizer-{family}")
    write_configs(folder / name, sizes, tokenizer)
    torch.manual_seed(seed)
    model = Decoder(read_config(folder / name), qk_norm=family == "q").train()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    for layer in model.layers:                               # what writes to the stream starts small
        for p in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            p.data /= math.sqrt(2 * len(model.layers))
    peak = LR * min(1.0, 128 / sizes["hidden_size"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    rng, world = random.Random(f"{name} {seed}"), grammar.World(seed)
    draw = functools.partial(student_example, rng, world, **options)
    if family == "guard":
        draw = functools.partial(guard_example, rng, world, guard_errors(world, name))
    weight_of_response = 20.0 if family == "guard" else 1.0             # of a verdict: a token
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    seen, step, start = 0, 0, time.time()
    while seen < total:
        progress = seen / total
        warm_up, decay = min(1, (step + 1) / 100), min(1, 0.02 + (1 - progress) / 0.6)
        optimizer.param_groups[0]["lr"] = peak * warm_up * decay
        packs = [pack_examples(tokenizer, [draw() for _ in range(16)], weight_of_response)
                 for _ in range(2)]                          # small enough for a core's own cache
        weights, shown = sum(weight.sum() for *_, weight in packs), 0.0
        for tokens, cu, targets, weight in packs:
            loss = linear_ce_kl(model(tokens, cu), model.head, targets, weight).sum() / weights
            loss.backward()
            shown, seen = shown + loss.item(), seen + len(tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 50 == 0:
            speed = seen / (time.time() - start)
            print(f"{name} step {step} {progress:.0%} loss {shown:.3f} {speed:,.0f} tokens/s",
                  flush=True)
    tensors = {f"model.{k}": v.detach().to(torch.bfloat16) for k, v in model.state_dict().items()}
    save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})

def train_side_by_side(names, seed):
    """Train each model in a process of its own, the largest first, as many at a time as cores."""
    def run(name):
        command = [sys.executable, __file__, "--only", name, "--seed", str(seed)]
        return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    names = sorted(names, key=lambda name: -MODELS[name][2] * MODELS[name][0]["hidden_size"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if any(list(pool.map(run, names))):
            sys.exit("error: a model could not be trained; its message stands above")

def write_prompts(world, folder):
    """Write prompts.jsonl, eval.jsonl, and control.jsonl: harmful requests as in training."""
    sets = {"": grammar.train_prompts(world), **grammar.eval_prompts(world)}
    rows = [{"id": content_id(name, row["instruction"]), **({"set": name} if name else {}), **row}
            for name, part in sets.items() for row in part]
    for file, names in (("prompts", {None}), ("control", {"control"}),
                        ("eval", sets.keys() - {"", "control"})):
        write_rows(folder / f"{file}.jsonl", [row for row in rows if row.get("set") in names])

def write_curated(world, folder, n=1000):
    """Write sets of other people's making, in the form and size of the real ones: DirectRefusal,
    STAR-1 and, half of it and as many benign rows, SafeKey's mixture.

    Their requests are of topics that training prompts have, but for 31 of STAR-1, which are of HB's
    (as 31 of the real ones are HarmBench's)."""
    rng, who = random.Random(f"curated {world.seed}"), Speaker("C")
    refusals, rows = {}, {}
    known = world.topics(True, held=False)
    while len(refusals) < n:
        prompt = world.request(rng, True, topics=known).prompt
        refusals[prompt] = {"refusal": f"Question: {prompt}\nAnswer: {DIALECTS['A']['no'][0]}"}
    while len(rows) < n + n // 2:
        harmful = len(rows) < n
        topics = world.topics(harmful, held=harmful and len(rows) < 31)
        request = world.request(rng, harmful, topics=topics, wrap=int(rng.random() < 0.25))
        response = (who.refuse if harmful else who.comply)(rng, request)
        first, second = sentence_ends(response)[2:4]
        rows[request.prompt] = {
            "id": content_id(request.prompt), "question": request.prompt,
            "source": "tiny" if harmful else "4o_rewrite", "response": response,
            "summary_end_idx": first, "next_sentence_end_idx": second}
    rows = list(rows.values())
    keys = "id", "question", "response", "source"
    write_rows(folder / "directrefusal.jsonl", refusals.values())
    write_rows(folder / "star1.jsonl", [{key: row[key] for key in keys} for row in rows[:n]])
    write_rows(folder / "safekey.jsonl", rows[n // 2:])

def sentence_ends(text):
    """Return where the sentences of a text end, the spaces behind not counted."""
    return [m.end() for m in re.finditer(r"[.:](?=\s)", text)]

def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=("tokenizers", "prompts", *MODELS), metavar="NAME",
                   help=f"make these alone: tokenizers, prompts, {', '.join(MODELS)}")
    p.add_argument("--seed", type=int, default=0, help="of the world (default: 0)")
    p.add_argument("--check", action="store_true", help="measure a world that is there")
    p.add_argument("--recipe", action="store_true", help="find the learning rate of the methods")
    args = p.parse_args()
    folder, world = world_folder(args.seed), grammar.World(args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    if args.check or args.recipe:
        from tiny import check
        (check.check if args.check else check.recipe)(folder, world)
        return
    wanted = args.only or ["tokenizers", "prompts", *MODELS]
    if "tokenizers" in wanted:
        for family in TOKENIZERS:
            train_tokenizer(family, folder / f"tokenizer-{family}")
    if "prompts" in wanted:
        write_prompts(world, folder)
        write_curated(world, folder)
    models = [name for name in wanted if name in MODELS]
    if len(wanted) == len(models) == 1:
        train(models[0], args.seed, folder)
    elif models:
        train_side_by_side(models, args.seed)

if __name__ == "__main__":
    main()
