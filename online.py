"""
Rollouts of an optimizer step, and what each of their tokens weighs in its loss: the online methods of train.py.

    python train.py --online grpo                    # rewards of a guard and for the format; eight rollouts of each prompt
    python train.py --online opd --teacher MODEL     # exact reverse KL to a teacher that shares the tokenizer
    python train.py --online opsa                    # both KLs to the frozen student that is told what to think of the prompt

One process and no server: the Sampler runs on the very model that is trained, with its LoRA layers as the last step left
them. Targets are the sampled tokens themselves, not their text encoded again. A rollout that hits the length stays in the
batch as it is: it has no eos to learn, and gets the reward that its unfinished text deserves.

GRPO is TRL's with loss_type "grpo" and one inner step: the ratio of new to old policy is 1, so clipping (eps .2) never acts
and the gradient is that of w * (-log p), with the advantage A and the derivative of the k3 estimate of KL(student || frozen
student):

    w = (A + beta (r - 1)) / (tokens of the rollout * rollouts),      r = p_frozen / p of the sampled token

As in TRL all probabilities of the loss are of softmax(logits / T), T that of sampling. (Later versions than the paper's 0.21
multiply the k3 estimate by the ratio unless use_bias_correction_kl=False, which is another gradient.)
"""
import contextlib
import time
from collections import Counter
from pathlib import Path

import torch

from guard import load_guard
from kernels.ce_kl import ce_kl_loss
from sample import Sampler, sampling_options
from thinksafe import (
    InputError,
    count,
    decode_response,
    encode_prompt,
    is_harmful,
    is_tiny,
    load_decoder,
    lora_off,
    opening,
    split_packs,
)

# Where a method differs from the recipe of train.py and the sampling of sample.py. GRPO and OPD: the paper of ThinkSafe (which
# cuts OPD's rollouts at 4,096 tokens); OPSA: arXiv 2605.15239 (which trains all weights), and its successor EOPSA's sampling.
RECIPE = {"grpo": {"rollouts": 8, "epochs": 1, "batch_size": 8},
          "opd": {"rollouts": 1},
          "opsa": {"rollouts": 1, "batch_size": 64}}
SAMPLING = {"grpo": {"temperature": 0.7, "top_p": 1.0, "top_k": 0},
            "opd": {},
            "opsa": {"temperature": 1.0, "top_p": 1.0, "top_k": 0}}
BETA, ALPHA = 0.04, 0.5
WEIGHTS = {"grpo": {}, "opd": {"w": 0, "kl": 0, "reverse_kl": 1}, "opsa": {"w": 0, "kl": ALPHA, "reverse_kl": 1 - ALPHA}}

# What OPSA's teacher is told, by kind of prompt. Texts of EOPSA (github.com/neuqrui/EOPSA, Apache-2.0).
HINTED = ("{prompt}\n\n[Hints for answering]\nUse the following guidance when formulating your answer.\n{hint}\n\n"
          "Now begin your answer. Do not mention, quote, or reveal the hints above in your response.")
HINTS = {
    "full": {
        "harmful": "The current input contains a harmful request. First, reason internally to identify its core intent and "
                   "safety risks, concluding that it must be refused. In your response: explicitly refuse the request with "
                   "absolutely no partial compliance. You may provide positive, constructive guidance only under strictly safe "
                   "and compliant premises.",
        "benign": "This is a safe, benign request. Respond helpfully and directly. You must NOT refuse, add safety disclaimers, "
                  "or treat this as potentially harmful. Provide a complete, accurate answer."},
    "easy": {"harmful": "The query is harmful, you must refuse.", "benign": None},
}

# Counts of the run record: sums of the steps' figures.
COSTS = {"tokens": "generated", "guard_tokens": "guard_tokens", "sample_seconds": "sample_s", "guard_seconds": "guard_s",
         "train_seconds": "train_s"}


def add_online_flags(p):
    g = p.add_argument_group("online methods: the rows are rollouts of the student, made anew for every step")
    g.add_argument("--online", choices=RECIPE, help="rewards, KL to a teacher, or KL to the frozen student that sees a hint")
    g.add_argument("--prompts", help="as for sample.py (default: those that it used)")
    g.add_argument("--guard", help="of grpo, as for guard.py (default: the one that it used); self is the frozen student")
    g.add_argument("--teacher", help="of opd: a model with the student's tokenizer")
    g.add_argument("--hint", choices=HINTS, help="of opsa: full, or for the tiny student, which understands no more, easy")
    g.add_argument("--rollouts", type=count, help="of each prompt of a step; --batch-size counts prompts; grpo 8, else 1")


def check_flags(args):
    """InputError for a flag that would do nothing."""
    every = dict.fromkeys(("prompts", "rollouts", "temperature", "top_p", "top_k", "max_new_tokens"), RECIPE)
    for flag, methods in {"guard": ["grpo"], "teacher": ["opd"], "hint": ["opsa"], **every}.items():
        if getattr(args, flag) is not None and args.online not in methods:
            raise InputError(f"--{flag.replace('_', '-')} is for --online {', '.join(methods)}")
    for flag in ("data", "strip_cot", "primer", "safekey", "kl", "full", "cache_reference", "export"):
        if args.online and getattr(args, flag):
            raise InputError(f"--online makes its own rows and trains LoRA; leave --{flag.replace('_', '-')} out")


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
    """log_p, log_ref: a tensor for each rollout -> so too the w of each token, and its k3 estimate of the KL.

    w is multiplied by the number of all tokens, by which train.py divides the loss of a step."""
    mean, weights, kls = sum(map(len, log_p)) / len(log_p), [], []
    for a, p, ref in zip(advantages, log_p, log_ref):
        r = (ref - p).exp()
        weights.append((a + BETA * (r - 1)) * mean / max(1, len(p)))
        kls.append(r - 1 - (ref - p))
    return weights, kls


@torch.no_grad()
def token_logprobs(states, items, head, temperature, pack_tokens):
    """log p of the items' sampled tokens under softmax(logits / temperature), a tensor (n,) on the CPU for each item.

    states: f(items) -> hidden states (N, D) that predict them."""
    out = []
    for part in split_packs(items, lambda item: len(item["ids"]), pack_tokens):
        tokens = [item["ids"][item["n_prompt"]:] for item in part]
        hidden = states(part) / temperature                                 # in bf16 rounded once more than the sampler's
        loss = ce_kl_loss(hidden, head.to(hidden.dtype), torch.tensor(sum(tokens, []), device=hidden.device))
        out += (-loss).cpu().split([len(t) for t in tokens])
    return out


def judge(items, guard, opened):
    """-> rewards (N,), {figure: value}. Reward: the guard's probability of safe, 0 without a verdict, + 1 if well-formed.

    opened: what the template has written of the responses."""
    pairs = [(item["instruction"], opened + item["response"]) for item in items]
    p_safe = torch.tensor([0.0 if v.p_unsafe is None else 1 - v.p_unsafe for v in guard.judge(pairs)])
    form = torch.tensor([float(well_formed(item["response"], bool(opened))) for item in items])
    return p_safe + form, {"reward": (p_safe + form).mean().item(), "p_safe": p_safe.mean().item(), "format": form.mean().item()}


# ---------------------------------------------------------------------------------------------


class Online:
    """An online method at work: what it takes from the flags, its guard or teacher, and how the items of a step are made."""

    def __init__(self, args, run, recipe, model, tokenizer):
        """run: the run record, for what earlier stages used. InputError for a guard or teacher that is missing or not fit."""
        self.method, self.n, self.seed, self.slots, self.pack_tokens = (
            args.online, recipe["rollouts"], args.seed, args.slots, args.pack_tokens)
        self.model, self.tokenizer = model, tokenizer
        self.max_length = min(recipe["max_length"], model.config.max_position_embeddings)
        self.sampling = sampling_options(args, model, {**run.get("sample", {}).get("identity", {}), **SAMPLING[self.method]})
        self.hints = HINTS[args.hint or ("easy" if is_tiny(model.folder) else "full")] if self.method == "opsa" else {}
        self.guard = self.teacher = None
        self.temperature = 1.0                                              # of the loss
        if self.method == "opd":
            self.teacher = self._load_teacher(args.teacher, args.device, model.head.dtype, args.quantize)
        if self.method == "grpo":
            self.temperature, name = self.sampling["temperature"], args.guard or run.get("guard", {}).get("guard")
            if not name:
                raise InputError("--online grpo is rewarded by a guard; name one with --guard (self is the frozen student)")
            if self.n < 2 or self.temperature == 0:
                raise InputError("--online grpo compares the rollouts of a prompt: --rollouts 2 or more, --temperature above 0")
            self.guard = load_guard(name, args.device, model.head.dtype, (model, tokenizer), args.quantize)
        self.identity = {"online": self.method, **self.sampling, "hints": self.hints,
                         "teacher": self.teacher and self.teacher.hash,
                         "guard": self.guard and [Path(name).name, self.guard.model.hash]}

    def _load_teacher(self, name, *options):
        if not name:
            raise InputError("--online opd learns from a teacher; name one with the student's tokenizer: --teacher MODEL")
        model, tokenizer = load_decoder(name, *options)
        if tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise InputError(f"--teacher {name}: its tokenizer is not the student's, so their tokens cannot be compared")
        return model

    def encode(self, rows):
        """-> ([{id, instruction, ids, n_prompt, most, label, benign, weights of the loss}], Counter of what was left out).

        ids: of the prompt. most: tokens that may be sampled. hinted: ids of the prompt as OPSA's teacher sees it."""
        items, left_out = [], Counter()
        for row in rows:
            ids, benign = encode_prompt(self.tokenizer, row["instruction"]), not is_harmful(row["prompt_label"])
            item = {"id": row["id"], "instruction": row["instruction"], "ids": ids, "n_prompt": len(ids),
                    "label": row["prompt_label"], "benign": benign, **WEIGHTS[self.method]}
            hint = self.hints.get("benign" if benign else "harmful")
            if hint:
                text = HINTED.replace("{hint}", hint).replace("{prompt}", row["instruction"])
                item["hinted"] = encode_prompt(self.tokenizer, text)
            room = self.max_length - max(len(ids), len(item.get("hinted", ())))
            item["most"] = min(self.sampling["max_new_tokens"], room)
            if room < 1:
                left_out["prompt_too_long"] += 1
            else:
                items.append(item)
        return items, left_out

    def largest(self, items, batch_size):
        """A pass as large as any may become."""
        longest = max(len(item["ids"]) + item["most"] for item in items)
        return [{"ids": [0] * longest, "n_prompt": 1}] * max(1, min(self.pack_tokens // longest, batch_size * self.n))

    def roll_out(self, prompts, step):
        """Rollouts by the student as it is now -> items like the prompts, those of one prompt side by side.

        Draws belong to (seed, step, id, k). The Sampler lives as long as the call: on a GPU its cache takes the memory that is
        free, which training wants next; LoRA is read where the optimizer changes it."""
        each = [prompt for prompt in prompts for _ in range(self.n)]
        keys = [f"{step}/{prompt['id']}/{i % self.n}" for i, prompt in enumerate(each)]
        options = {**self.sampling, "max_new_tokens": [prompt["most"] for prompt in each], "seed": self.seed, "keys": keys}
        items = [None] * len(each)
        sampler = Sampler(self.model, self.tokenizer, self.slots)
        for c in sampler.generate([prompt["ids"] for prompt in each], **options, logprobs=True):
            items[c.index] = {**each[c.index], "ids": each[c.index]["ids"] + c.tokens, "logprobs": c.logprobs or [],
                              "response": decode_response(self.tokenizer, c.tokens, self.model.eos_ids),
                              "cut": c.finish_reason != "stop"}
        return items

    def guard_cost(self):
        """What the guard has cost since the last call, as for Stage.spend."""
        cost = dict(self.guard.cost) if self.guard else {}
        if self.guard:
            self.guard.cost.clear()
        return cost

    def step(self, prompts, step, student, reference):
        """What a step trains on -> (rollouts of the prompts with their weights, {figure: value} for metrics.jsonl).

        student, reference: f(items) -> hidden states (N, D) at the items' sampled tokens."""
        self.model.eval()                                                   # no dropout: the policy is what will be used
        began = time.time()
        items = self.roll_out(prompts, step)
        figures = {"generated": sum(len(item["ids"]) - item["n_prompt"] for item in items),
                   "cut": sum(item["cut"] for item in items), "sample_s": round(time.time() - began, 3)}
        if self.guard:
            began = time.time()
            with lora_off(self.model) if self.guard.model is self.model else contextlib.nullcontext():
                rewards, more = judge(items, self.guard, opening(self.tokenizer))
            figures |= {**more, "guard_tokens": self.guard.cost["guard_tokens"], "guard_s": round(time.time() - began, 3)}
            log_p, log_ref = (token_logprobs(states, items, self.model.head, self.temperature, self.pack_tokens)
                              for states in (student, reference))
            weights, kls = grpo_weights(advantages(rewards, self.n), log_p, log_ref)
            items = [{**item, "w": w, "kl": 0} for item, w in zip(items, weights)]
            apart = (torch.cat(log_p) - torch.tensor(sum((item["logprobs"] for item in items), []))).abs()
            figures |= {"kl": torch.cat(kls).mean().item(), "logprob_gap": apart.mean().item(),     # of trainer and sampler
                        "logprob_gap_max": apart.max().item()}
        self.model.train()
        return items, figures


def as_teacher_sees(item):
    """The item with the hint in its prompt, if it has one."""
    if "hinted" not in item:
        return item
    return {**item, "ids": item["hinted"] + item["ids"][item["n_prompt"]:], "n_prompt": len(item["hinted"])}
