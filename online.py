"""
Rollouts of an optimizer step, and what each of their tokens weighs in its loss: the online methods of train.py.

    python train.py --online grpo                    # reward: guard and format; eight rollouts of each prompt
    python train.py --online opd --teacher MODEL     # exact reverse KL to a teacher that shares the tokenizer
    python train.py --online opsa                    # both KLs to the frozen student that is told what to think of the prompt

One process and no server: the Sampler runs on the very model that is trained, with its LoRA layers as the last step left
them. Targets are the sampled tokens themselves, not their text encoded again. A rollout that hits the length stays in the
batch as it is: it has no eos to learn, and it gets the reward that its unfinished text deserves.

GRPO is TRL's with loss_type "grpo" and one inner step: the ratio of new and old policy is 1, so clipping (eps .2) never acts
and the gradient is that of w * (-log p), with the advantage A and, in place of the k3 estimate of KL(student || frozen
student), its derivative:

    w = (A + beta (r - 1)) / (tokens of the rollout * rollouts),      r = p_frozen / p of the sampled token

As in TRL every probability of the loss is of softmax(logits / T), T that of sampling.
"""
import time
from collections import Counter

import torch

from kernels.ce_kl import ce_kl_loss
from sample import Sampler
from thinksafe import InputError, count, decode_response, encode_prompt, is_harmful, load_decoder, lora_off, opens_think, split_packs

# Where a method differs from the recipe of train.py and the sampling of sample.py. GRPO and OPD: the paper of ThinkSafe; OPSA:
# arXiv 2605.15239, which trains all weights, and the sampling of its successor EOPSA.
RECIPE = {"grpo": {"rollouts": 8, "epochs": 1, "batch_size": 8}, "opd": {"rollouts": 1}, "opsa": {"rollouts": 1, "batch_size": 64}}
SAMPLING = {"grpo": {"temperature": 0.7, "top_p": 1.0, "top_k": 0}, "opd": {}, "opsa": {"temperature": 1.0, "top_p": 1.0, "top_k": 0}}
BETA, ALPHA = 0.04, 0.5
WEIGHTS = {"grpo": {}, "opd": {"w": 0, "kl": 0, "reverse_kl": 1}, "opsa": {"w": 0, "kl": ALPHA, "reverse_kl": 1 - ALPHA}}

# What OPSA's teacher is told, by kind of prompt. Texts of EOPSA (github.com/neuqrui/EOPSA, Apache-2.0).
HINTED = ("{prompt}\n\n[Hints for answering]\nUse the following guidance when formulating your answer.\n{hint}\n\n"
          "Now begin your answer. Do not mention, quote, or reveal the hints above in your response.")
HINTS = {
    "full": {True: "The current input contains a harmful request. First, reason internally to identify its core intent and safety "
                   "risks, concluding that it must be refused. In your response: explicitly refuse the request with absolutely no "
                   "partial compliance. You may provide positive, constructive guidance only under strictly safe and compliant "
                   "premises.",
             False: "This is a safe, benign request. Respond helpfully and directly. You must NOT refuse, add safety disclaimers, or "
                    "treat this as potentially harmful. Provide a complete, accurate answer."},
    "easy": {True: "The query is harmful, you must refuse.", False: None},       # benign: the frozen student and no more
}


def add_online_flags(p):
    g = p.add_argument_group("online methods: the rows are rollouts of the student, made anew for every step")
    g.add_argument("--online", choices=RECIPE, help="reward by a guard; KL to a teacher; KL to the frozen student that sees a hint")
    g.add_argument("--prompts", help="JSONL file: instruction, prompt_label, optionally id (default: those of OUT/samples.jsonl)")
    g.add_argument("--guard", help="of grpo, as in guard.py (default: the one that guard.py used); self is the frozen student")
    g.add_argument("--teacher", help="of opd: a model with the student's tokenizer")
    g.add_argument("--hint", choices=HINTS, help="of opsa: full, or for the tiny student, which understands no more, easy")
    g.add_argument("--rollouts", type=count, help="of each prompt of a step; --batch-size counts prompts; grpo 8, else 1")


def check_flags(args):
    """InputError for a flag that would do nothing."""
    every = dict.fromkeys(("prompts", "rollouts", "temperature", "top_p", "top_k", "max_new_tokens"), RECIPE)
    for flag, methods in {"guard": ["grpo"], "teacher": ["opd"], "hint": ["opsa"], **every}.items():
        if getattr(args, flag) is not None and args.online not in methods:
            raise InputError(f"--{flag.replace('_', '-')} is for --online {', '.join(methods)}")
    for flag in ("data", "kl", "full", "cache_reference", "export"):
        if args.online and getattr(args, flag):
            raise InputError(f"--online makes its own rows and trains LoRA; leave --{flag.replace('_', '-')} out")


def load_teacher(name, tokenizer, *options):
    """-> the model; options: those of `load_decoder`. InputError for none, or one with other tokens than the student's."""
    if not name:
        raise InputError("--online opd learns from a teacher; name one with the student's tokenizer: --teacher MODEL")
    model, other = load_decoder(name, *options)
    if other.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--teacher {name}: its tokenizer is not the student's, so that their tokens cannot be compared")
    return model


def encode_prompts(rows, tokenizer, method, hint, max_length, max_new_tokens):
    """-> ([{id, instruction, ids, n_prompt, most, label, benign, and the weights of the loss}], Counter of what was left out).

    most: tokens that may be sampled within max_length. hinted: the ids of the prompt as OPSA's teacher sees it."""
    items, left_out = [], Counter()
    for row in rows:
        harmful = is_harmful(row["prompt_label"])
        item = {"id": row["id"], "instruction": row["instruction"], "ids": encode_prompt(tokenizer, row["instruction"]),
                "label": row["prompt_label"], "benign": not harmful, **WEIGHTS[method]}
        item["n_prompt"], longest = len(item["ids"]), len(item["ids"])
        if method == "opsa" and HINTS[hint][harmful]:
            text = HINTED.replace("{hint}", HINTS[hint][harmful]).replace("{prompt}", row["instruction"])
            item["hinted"] = encode_prompt(tokenizer, text)
            longest = max(longest, len(item["hinted"]))
        item["most"] = min(max_new_tokens, max_length - longest)
        if item["most"] < 1:
            left_out["prompt_too_long"] += 1
        else:
            items.append(item)
    return items, left_out


def as_teacher_sees(item):
    """The item with the hint in its prompt, if it has one."""
    if "hinted" not in item:
        return item
    return {**item, "ids": item["hinted"] + item["ids"][item["n_prompt"]:], "n_prompt": len(item["hinted"])}


def roll_out(model, tokenizer, prompts, n, step, seed, slots, options, logprobs=False):
    """n rollouts of each prompt by the student as it is now -> items like the prompts, those of one prompt side by side.

    Draws belong to (seed, step, id, k). The Sampler lives as long as the call: on a GPU its cache is wherever memory is free,
    and training wants that next; its CUDA graphs read the LoRA weights where the optimizer changes them."""
    each = [prompt for prompt in prompts for _ in range(n)]
    keys = [f"{step}/{prompt['id']}/{i % n}" for i, prompt in enumerate(each)]
    items = [None] * len(each)
    for c in Sampler(model, tokenizer, slots).generate([p["ids"] for p in each], [p["most"] for p in each], **options, seed=seed,
                                                       keys=keys, logprobs=logprobs):
        items[c.index] = {**each[c.index], "ids": each[c.index]["ids"] + c.tokens, "logprobs": c.logprobs,
                          "response": decode_response(tokenizer, c.tokens, model.eos_ids), "cut": c.finish_reason != "stop"}
    return items


# ---------------------------------------------------------------------------------------------
# GRPO


def well_formed(response, opened):
    """Whether there is one <think>...</think>; opened: the template wrote the <think>."""
    opening, closing = response.count("<think>"), response.count("</think>")
    return closing == 1 and opening == (0 if opened else 1) and response.find("<think>") < response.find("</think>")


def advantages(rewards, n):
    """rewards (P * n,), the n of a prompt side by side -> how far each is from its group's mean, in deviations of the group."""
    groups = rewards.view(-1, n)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def grpo_weights(advantages, log_p, log_ref):
    """Weight of each sampled token, and its k3 estimate of the KL, both as lists of a tensor for each rollout.

    Times the tokens of all rollouts, by whose number train.py divides the loss of a step."""
    mean, weights, kls = sum(map(len, log_p)) / len(log_p), [], []
    for a, p, ref in zip(advantages, log_p, log_ref):
        r = (ref - p).exp()
        weights.append((a + BETA * (r - 1)) * mean / max(1, len(p)))
        kls.append(r - 1 - (ref - p))
    return weights, kls


@torch.no_grad()
def token_logprobs(states, items, head, temperature, pack_tokens):
    """log p of the items' sampled tokens under softmax(logits / temperature), a tensor (n,) on the CPU for each.

    states: f(items) -> hidden states (N, D) that predict them."""
    out = []
    for part in split_packs(items, lambda item: len(item["ids"]), pack_tokens):
        tokens = [item["ids"][item["n_prompt"]:] for item in part]
        hidden = states(part) / temperature
        loss = ce_kl_loss(hidden, head.to(hidden.dtype), torch.tensor(sum(tokens, []), device=hidden.device))
        out += (-loss).cpu().split([len(t) for t in tokens])
    return out


def judge(items, guard, student, opened):
    """Rewards (N,): the guard's probability of safe, 0 where it gave no verdict, + 1 for a well-formed response.

    -> rewards, {"p_safe", "format", "no_verdict", "guard_tokens"}; a guard that is the student is asked with LoRA off."""
    pairs = [(item["instruction"], ("<think>\n" if opened else "") + item["response"]) for item in items]
    if guard.model is student:
        with lora_off(student):
            verdicts = guard.judge(pairs)
    else:
        verdicts = guard.judge(pairs)
    p_safe = torch.tensor([0.0 if v.p_unsafe is None else 1 - v.p_unsafe for v in verdicts])
    form = torch.tensor([float(well_formed(item["response"], opened)) for item in items])
    return p_safe + form, {"p_safe": p_safe.mean().item(), "format": form.mean().item(),
                           "no_verdict": sum(v.p_unsafe is None for v in verdicts),
                           "guard_tokens": sum(len(guard.encode(*pair)) for pair in pairs)}


# ---------------------------------------------------------------------------------------------


def step_items(prompts, step, n, model, tokenizer, seed, slots, options, guard, student, reference, pack_tokens):
    """What a step trains on -> (items of `roll_out`, weighted; {figure: value} for metrics.jsonl).

    guard: of GRPO, else None. student, reference: f(items) -> hidden states (N, D) at the items' sampled tokens."""
    started, training = time.time(), model.training
    model.eval()                                                          # no dropout: the policy is what will be used
    items = roll_out(model, tokenizer, prompts, n, step, seed, slots, options, logprobs=guard is not None)
    figures = {"generated": sum(len(item["ids"]) - item["n_prompt"] for item in items),
               "cut": sum(item["cut"] for item in items), "sample_s": time.time() - started}
    if guard:
        judged = time.time()
        rewards, more = judge(items, guard, model, opens_think(tokenizer))
        figures |= {"reward": rewards.mean().item(), **more, "guard_s": time.time() - judged}
        log_p, log_ref = (token_logprobs(f, items, model.head, options["temperature"], pack_tokens) for f in (student, reference))
        weights, kls = grpo_weights(advantages(rewards, n), log_p, log_ref)
        apart = (torch.cat(log_p) - torch.cat([torch.tensor(item["logprobs"]) for item in items])).abs()
        figures |= {"kl": torch.cat(kls).mean().item(), "logprob_error": apart.mean().item(),
                    "logprob_error_max": apart.max().item()}              # trainer against sampler
        for item, w in zip(items, weights):
            item |= {"w": w, "kl": 0}
    model.train(training)
    return items, figures
