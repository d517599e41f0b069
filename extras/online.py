"""
Train on rollouts that the student makes for every optimizer step: GRPO, OPD and OPSA.

    python -m extras.online grpo                    # rewards of a guard and for the format; eight
                                                    # rollouts of each prompt
    python -m extras.online opd --teacher MODEL     # exact reverse KL to a teacher that shares the
                                                    # tokenizer
    python -m extras.online opsa                    # both KLs to the frozen student that is told
                                                    # what to think of the prompt

One process and no server: the Sampler runs on the model that is trained, with its LoRA layers as
the last step left them. Targets are the sampled tokens themselves, not their text encoded again. A
rollout that hits the length stays in the batch as it is: it has no eos to learn, and gets the
reward that its unfinished text deserves. Everything else is as in train.py.

GRPO is TRL's with loss_type "grpo" and one inner step: the ratio of new to old policy is 1, so
clipping (eps 0.2) never acts and the gradient is that of w * (-log p), with the advantage A and the
derivative of the k3 estimate of KL(student || frozen student):

    w = (A + beta (r - 1)) / (tokens of the rollout * rollouts)
    r = p_frozen / p of the sampled token

As in TRL all probabilities of the loss are of softmax(logits / T), T that of sampling. (Later
versions than the paper's 0.21 multiply the k3 estimate by the ratio unless
use_bias_correction_kl=False, which is another gradient.)
"""
import contextlib
import functools
import time
from collections import Counter
from pathlib import Path

import torch

import train
from data.benchmarks import describe_rows
from data.columns import add_column_flags
from data.sources import draw_examples, prompt_rows
from extras.linear_reverse_kl import linear_reverse_kl
from guard import load_guard
from sample import Sampler, add_sampling_flags
from data.chat import decode_response, encode_prompt
from data.generation import sampling_options
from data.run_record import read_run
from thinksafe import (
    InputError, cli, escape_control_chars, is_harmful, is_tiny, load_model, lora_disabled,
    make_parser, positive, split_packs)

from linear_ce_kl import linear_ce_kl

# Where a method differs from the recipe of train.py and the sampling of sample.py. GRPO and OPD:
# the paper of ThinkSafe (which cuts OPD's rollouts at 4,096 tokens). OPSA: arXiv 2605.15239 (which
# trains all weights), and the sampling of its successor, EOPSA.
ROLLOUTS = {"grpo": 8, "opd": 1, "opsa": 1}
CONFIG = {"grpo": {"epochs": 1, "batch_size": 8}, "opd": {}, "opsa": {"batch_size": 64}}
SAMPLING = {"grpo": {"temperature": 0.7, "top_p": 1.0, "top_k": 0},
            "opd": {},
            "opsa": {"temperature": 1.0, "top_p": 1.0, "top_k": 0}}
BETA, ALPHA = 0.04, 0.5
WEIGHTS = {"grpo": {},
           "opd": {"ce_weight": 0, "kl_weight": 0, "reverse_kl_weight": 1},
           "opsa": {"ce_weight": 0, "kl_weight": ALPHA, "reverse_kl_weight": 1 - ALPHA}}
METHOD_FLAGS = {"guard": "grpo", "teacher": "opd", "hint": "opsa"}

# What OPSA's teacher is told, by kind of prompt. Texts of EOPSA (github.com/neuqrui/EOPSA,
# Apache-2.0).
HINTED = ("{prompt}\n\n[Hints for answering]\nUse the following guidance when formulating your "
          "answer.\n{hint}\n\nNow begin your answer. Do not mention, quote, or reveal the hints "
          "above in your response.")
HINTS = {
    "full": {
        "harmful": "The current input contains a harmful request. First, reason internally to "
                   "identify its core intent and safety risks, concluding that it must be refused. "
                   "In your response: explicitly refuse the request with absolutely no partial "
                   "compliance. You may provide positive, constructive guidance only under "
                   "strictly safe and compliant premises.",
        "benign": "This is a safe, benign request. Respond helpfully and directly. You must NOT "
                  "refuse, add safety disclaimers, or treat this as potentially harmful. Provide a "
                  "complete, accurate answer."},
    "easy": {"harmful": "The query is harmful, you must refuse.", "benign": None},
}

# --------------------------------------------------------------------------------------------------
# GRPO

def well_formed(response):
    """Tell whether a whole response has exactly one <think>, and one </think> behind it."""
    counts = response.count("<think>"), response.count("</think>")
    return counts == (1, 1) and response.find("<think>") < response.find("</think>")

def advantages(rewards, n):
    """Compare rollouts with the others of their prompt.

    rewards (P * n,), the n of a prompt side by side -> how far each is from the mean of the group,
    in standard deviations of the group (P * n,)."""
    groups = rewards.view(-1, n)
    apart = groups - groups.mean(1, keepdim=True)
    return (apart / (groups.std(1, keepdim=True) + 1e-4)).flatten()

def grpo_weights(advantages, log_p, log_ref):
    """Weigh the tokens of R rollouts -> R tensors of ce_weight, R of k3 estimates of the KL.

    Args:
        log_p, log_ref: R tensors, a log-probability for each token of the rollout.

    The weights are multiplied by the number of all tokens, by which train.py divides the loss of a
    step."""
    mean_length, weights, kls = sum(map(len, log_p)) / len(log_p), [], []
    for a, p, ref in zip(advantages, log_p, log_ref):
        r = (ref - p).exp()
        weights.append((a + BETA * (r - 1)) * mean_length / max(1, len(p)))
        kls.append(r - 1 - (ref - p))
    return weights, kls

@torch.no_grad()
def token_logprobs(states, examples, head, temperature, pack_tokens):
    """Return log p of the sampled tokens under softmax(logits / temperature): for each example a
    tensor (n,) on the CPU.

    states: f(examples) -> hidden states (N, D) that predict the tokens."""
    logprobs = []
    for pack in split_packs(examples, train.length, pack_tokens):
        tokens = [example["ids"][example["n_prompt"]:] for example in pack]
        hidden = states(pack) / temperature
        targets = torch.tensor(sum(tokens, []), device=hidden.device)
        loss = linear_ce_kl(hidden, head.to(hidden.dtype), targets)              # (N,)
        logprobs += (-loss).cpu().split([len(t) for t in tokens])
    return logprobs

def rollout_loss(model, examples, reference, ref_head=None, temperature=1.0):
    """Return the Losses of one packed pass, as train.packed_loss does, of p that is the softmax of
    logits / temperature, and with reverse_kl_weight * KL(p || reference) on top.

    The weights are numbers, or tensors with a number for each target. A target with a kl_weight
    has no ce_weight. ref_head: a teacher's output head."""
    hidden, targets = train.target_hidden_states(model, examples)                # (N, D), (N,)
    hidden = hidden / temperature if temperature != 1 else hidden
    ce_weight, kl_weight, reverse_weight = (
        train.target_weights(examples, key, hidden.device)
        for key in ("ce_weight", "kl_weight", "reverse_kl_weight"))
    ref_hidden, reverse_kl = None, torch.zeros_like(ce_weight)
    if reverse_weight.any() or kl_weight.any():      # of a method that has a reference for all
        ref_hidden = reference(examples).to(hidden)                              # (N, D_ref)
    if reverse_weight.any():
        reverse_kl = linear_reverse_kl(hidden, model.head, ref_hidden,
                                       model.head if ref_head is None else ref_head)
    rows = kl_weight != 0
    has_kl = bool(rows.any())
    loss = linear_ce_kl(hidden, model.head, targets, ce_weight, ref_hidden if has_kl else None,
                        kl_weight, ref_head if has_kl else None)                 # (N,)
    plain = loss.detach()
    return train.Losses((loss + reverse_weight * reverse_kl).sum(), plain[~rows].sum(),
                        (plain / kl_weight)[rows].sum(),
                        reverse_kl.detach()[reverse_weight != 0].sum())

def judge_rollouts(rollouts, guard):
    """Return rewards (R,), and metrics as a dict.

    A reward is the guard's probability of safe, 0 without a verdict, and 1 more if well-formed."""
    verdicts = guard.judge([(rollout["instruction"], rollout["response"]) for rollout in rollouts])
    p_safe = torch.tensor([0.0 if v.p_unsafe is None else 1 - v.p_unsafe for v in verdicts])
    form = torch.tensor([float(well_formed(rollout["response"])) for rollout in rollouts])
    rewards = p_safe + form
    return rewards, {"reward": rewards.mean().item(), "p_safe": p_safe.mean().item(),
                     "format": form.mean().item(),
                     "guard_tokens": sum(v.n_tokens for v in verdicts)}

# --------------------------------------------------------------------------------------------------

def as_teacher_sees(example):
    """Return the example with the hint in its prompt, if it has one."""
    if "hinted" not in example:
        return example
    target = example["ids"][example["n_prompt"]:]
    return {**example, "ids": example["hinted"] + target, "n_prompt": len(example["hinted"])}

class Online:
    """A method at work: makes the examples of each optimizer step.

    Args:
        args: flags. n: rollouts of each prompt.
        sampling: see sampling_options.
        guard, teacher: what the method needs of them, else None."""

    def __init__(self, args, n, config, sampling, model, tokenizer, guard=None, teacher=None):
        self.method, self.n, self.sampling = args.method, n, sampling
        self.seed, self.slots, self.pack_tokens = args.seed, args.slots, args.pack_tokens
        self.model, self.tokenizer, self.guard, self.teacher = model, tokenizer, guard, teacher
        self.max_length = min(config["max_length"], model.config.max_position_embeddings)
        hint = args.hint or ("easy" if is_tiny(model.folder) else "full")
        self.hints = HINTS[hint] if self.method == "opsa" else {}
        self.temperature = sampling["temperature"] if self.method == "grpo" else 1.0  # of the loss

    def encode(self, rows):
        """Encode prompts -> (examples as in train.encode_rows without targets, Counter of skipped
        rows by reason).

        An example also has `instruction`, the prompt's text, `max_tokens`, how many may be
        sampled, and `hinted`, the ids of the prompt as OPSA's teacher sees it."""
        examples, skipped = [], Counter()
        for row in rows:
            ids = encode_prompt(self.tokenizer, row["instruction"])
            benign = not is_harmful(row["prompt_label"])
            example = {"id": row["id"], "instruction": row["instruction"], "ids": ids,
                       "n_prompt": len(ids), "label": row["prompt_label"], "benign": benign,
                       "ce_weight": 1.0, **WEIGHTS[self.method]}
            longest, hint = len(ids), self.hints.get("benign" if benign else "harmful")
            if hint:
                text = HINTED.replace("{hint}", hint).replace("{prompt}", row["instruction"])
                example["hinted"] = encode_prompt(self.tokenizer, text)
                longest = max(longest, len(example["hinted"]))
            room = self.max_length - longest
            example["max_tokens"] = min(self.sampling["max_new_tokens"], room)
            if room < 1:
                skipped["prompt_too_long"] += 1
            else:
                examples.append(example)
        return examples, skipped

    def student(self, examples):
        """Return hidden states (N, D) of the student at the sampled tokens of examples."""
        return train.target_hidden_states(self.model, examples)[0]

    def reference(self, examples):
        """Return hidden states (N, D) of the teacher, or of the frozen student that sees the hint.

        LoRA of the student is off, a teacher's own stays on."""
        seen = [as_teacher_sees(example) for example in examples]
        with torch.no_grad(), lora_disabled(self.model):
            return train.target_hidden_states(self.teacher or self.model, seen)[0]

    def roll_out(self, prompts, step):
        """Sample rollouts by the student as it is now -> examples with a response, those of one
        prompt side by side.

        Draws belong to (seed, step, id, k). The Sampler lives as long as the call: on a GPU its
        cache takes the memory that is free, which training wants next."""
        examples = [prompt for prompt in prompts for _ in range(self.n)]
        keys = [f"{step}/{example['id']}/{i % self.n}" for i, example in enumerate(examples)]
        options = {**self.sampling, "seed": self.seed, "keys": keys,
                   "max_new_tokens": [example["max_tokens"] for example in examples]}
        rollouts = [None] * len(examples)
        sampler = Sampler(self.model, self.tokenizer, self.slots)
        prompt_ids = [example["ids"] for example in examples]
        for c in sampler.generate(prompt_ids, **options):
            rollouts[c.index] = {
                **examples[c.index], "ids": prompt_ids[c.index] + c.tokens,
                "cut": c.finish_reason != "stop",
                "response": decode_response(self.tokenizer, c.tokens, self.model.eos_ids)}
        return rollouts

    def weigh(self, rollouts):
        """Give GRPO's rollouts their weights -> (rollouts, metrics)."""
        began = time.time()
        frozen = lora_disabled(self.model)           # the guard `self` is the frozen student
        with frozen if self.guard.model is self.model else contextlib.nullcontext():
            rewards, metrics = judge_rollouts(rollouts, self.guard)
        metrics["guard_s"] = round(time.time() - began, 3)
        log_p, log_ref = (
            token_logprobs(states, rollouts, self.model.head, self.temperature, self.pack_tokens)
            for states in (self.student, self.reference))
        weights, kls = grpo_weights(advantages(rewards, self.n), log_p, log_ref)
        rollouts = [{**rollout, "ce_weight": w} for rollout, w in zip(rollouts, weights)]
        return rollouts, {**metrics, "kl": torch.cat(kls).mean().item()}

    def make_batch(self, step, prompts):
        """Make what a step trains on -> (rollouts of the prompts with their weights, metrics)."""
        self.model.eval()                            # no dropout: the policy is what will be used
        began = time.time()
        rollouts = self.roll_out(prompts, step)
        metrics = {"generated": sum(map(train.n_targets, rollouts)),
                   "cut": sum(rollout["cut"] for rollout in rollouts),
                   "sample_s": round(time.time() - began, 3)}
        if self.guard:
            rollouts, more = self.weigh(rollouts)
            metrics |= more
        self.model.train()
        return rollouts, metrics

# --------------------------------------------------------------------------------------------------

def load_teacher(args, model, tokenizer):
    """Load OPD's teacher. Raises InputError when its tokens are not the student's."""
    if not args.teacher:
        raise InputError("opd learns from a teacher; name one with the student's tokenizer: "
                         "--teacher MODEL")
    teacher, other = load_model(args.teacher, args.device, model.head.dtype, args.quantize)
    if other.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--teacher {args.teacher}: its tokenizer is not the student's, so their "
                         "tokens cannot be compared")
    teacher.prepack_weights()
    return teacher

def load_rewarding_guard(args, run, n, sampling, model, tokenizer):
    """Load GRPO's guard: --guard, or the one that guard.py used."""
    name = args.guard or run.get("guard", {}).get("guards", [None])[0]
    if not name:
        raise InputError("grpo is rewarded by a guard; name one with --guard (self is the frozen "
                         "student)")
    if n < 2 or sampling["temperature"] == 0:
        raise InputError("grpo compares the rollouts of a prompt: --rollouts 2 or more, "
                         "--temperature above 0")
    return load_guard(name, args.device, model.head.dtype, (model, tokenizer), args.quantize)

def parse_args():
    p = make_parser(__doc__)
    p.add_argument("method", choices=CONFIG, help="rewards, KL to a teacher, or KL to the frozen "
                   "student that sees a hint")
    g = p.add_argument_group("rollouts")
    g.add_argument("--prompts", help="as for sample.py (default: those that it used)")
    add_column_flags(g)
    g.add_argument("--rollouts", type=positive,
                   help="of each prompt of a step; --batch-size counts prompts; grpo 8, else 1")
    g.add_argument("--guard", help="of grpo, as for guard.py (default: the one that it used); self "
                   "is the frozen student")
    g.add_argument("--teacher", help="of opd: a model with the student's tokenizer")
    g.add_argument("--hint", choices=HINTS, help="of opsa: full, or for the tiny student, which "
                   "understands no more, easy")
    add_sampling_flags(p)
    p.conflict_handler = "resolve"                   # --seed is a flag of both groups
    train.add_training_flags(p)
    args = p.parse_args()
    for flag, method in METHOD_FLAGS.items():
        if getattr(args, flag) is not None and args.method != method:
            raise InputError(f"--{flag} is for {method}")
    if args.full:
        raise InputError("online methods train LoRA; leave --full out")
    return args

def main():
    args = parse_args()
    run = read_run(args.out)
    if args.prompts is None and not run.get("sample", {}).get("finished"):
        raise InputError(f"{args.out}: sample.py has not finished there; run it first, or give "
                         "prompts with --prompts FILE")
    rows = prompt_rows(args.prompts or args.out / "samples.jsonl", args.label, args.prompt_column)
    model, tokenizer, config = train.load_student(args, run, CONFIG[args.method])
    print(escape_control_chars(describe_rows(rows, model.folder)))
    n = args.rollouts or ROLLOUTS[args.method]
    earlier = run.get("sample", {}).get("fingerprint", {})
    sampling = sampling_options(args, model, {**earlier, **SAMPLING[args.method]})
    guard = teacher = None
    if args.method == "grpo":
        guard = load_rewarding_guard(args, run, n, sampling, model, tokenizer)
    if args.method == "opd":
        teacher = load_teacher(args, model, tokenizer)
    online = Online(args, n, config, sampling, model, tokenizer, guard, teacher)
    examples, skipped = online.encode(rows)
    examples = draw_examples(examples, skipped, args.limit, args.seed)
    fingerprint = {"online": args.method, "rollouts": n, **sampling, "hints": online.hints,
                   "teacher": teacher and teacher.hash,
                   "guard": guard and [Path(guard.name).name, guard.model.hash]}
    loss = functools.partial(rollout_loss, model, reference=online.reference,
                             ref_head=teacher and teacher.head, temperature=online.temperature)
    train.train(args, model, tokenizer, config, examples, skipped, loss, fingerprint=fingerprint,
                make_batch=online.make_batch)

if __name__ == "__main__":
    cli(main)
