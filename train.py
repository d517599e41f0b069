"""
out/guarded.jsonl -> the student fine-tuned on (original prompt -> own safe trace), out/model/.

    python train.py                        # LoRA; the paper's recipe, or the tiny world's own
    python train.py --kl                   # benign rows: forward KL to the frozen student
    python train.py --full                 # all weights
    python train.py --quantize nf4         # QLoRA: LoRA on a base in 4 bits
    python train.py --strip-cot harmful    # refusals without their reasoning
    python train.py --data star1           # other rows: a known set, a file, or a set of the hub

Rows are packed without padding and do not see each other. The loss of a step is summed over its
target tokens and divided by their number, so packing changes speed, not the loss (up to rounding,
and to which dropout mask a pass draws).
"""
import functools
import json
import math
import sys
import time
from collections import Counter
from typing import NamedTuple

import torch

from data.benchmarks import describe_rows
from data.chat import encode_training_pair, normalize_think_tags, rejection_reason, template_hash
from data.columns import add_column_flags
from data.rows import RowWriter, atomic_path, content_id, refuse_link, write_rows
from data.run_record import Stage, check_checkpoint, check_fingerprint, read_run, stage_seed
from data.sources import draw_examples, read_training_rows, take_versions, training_rows
from thinksafe import (
    InputError, add_lora, balance_packs, bounded, choose_dtype, cli, default_dtype,
    escape_control_chars, free_memory, has_refusal_instruction, is_harmful, is_tiny, load_lora,
    load_model, lora_disabled, lora_layers, lora_tensors, make_parser, merge_lora, pack_ids,
    positive, progress, save_lora, save_model, seed_value, training_pair)

from linear_ce_kl import linear_ce_kl
from merged_linear import merge_linear_layers

# The paper's recipe (Table 4 and appendix), and what the tiny student needs instead.
PAPER_CONFIG = {"lr": 1e-5, "epochs": 3, "batch_size": 8, "max_length": 16384, "lora_r": 32,
                "lora_alpha": 16.0, "lora_dropout": 0.05, "lora_targets": "q_proj,v_proj"}
ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
TINY_CONFIG = {**PAPER_CONFIG, "lr": 2e-4, "batch_size": 16, "max_length": 2048,
               "lora_dropout": 0.0, "lora_targets": ALL_LINEAR}

# --------------------------------------------------------------------------------------------------
# Rows -> examples: {id, ids, n_prompt, label, benign, ce_weight, kl_weight}

def encode_rows(rows, tokenizer, max_length, strip_cot=None, kl=False):
    """Encode rows as training examples -> (examples, Counter of skipped rows by reason). strip_cot:
    "harmful" or "all" rows keep an empty reasoning. kl: the loss of benign examples is the KL to
    the frozen student instead of cross-entropy."""
    examples, skipped = [], Counter()
    for row in rows:
        benign = not is_harmful(row["prompt_label"])
        response = normalize_think_tags(row["response"], tokenizer)
        label = row.get("response_label", "safe")
        if label != "safe" or row.get("keep", True) is not True:
            skipped[str(row.get("reason") or (label if label != "safe" else "not_kept"))] += 1
            continue
        reason = rejection_reason(response, row.get("finish_reason", "stop"), tokenizer)
        if has_refusal_instruction(row["instruction"]):      # the student is to refuse without it
            reason = "has_instruction"
        if "</think>" in response and (strip_cot == "all" or strip_cot == "harmful" and not benign):
            answer = response.rpartition("</think>")[2].lstrip()
            response = f"<think>\n\n</think>\n\n{answer}"
        pair = training_pair({**row, "response": response})
        prompt, target = encode_training_pair(tokenizer, *pair, row.get("eos"))
        if not reason and len(prompt) + len(target) > max_length:
            reason = "too_long"
        if reason:
            skipped[reason] += 1
            continue
        by_kl = kl and benign
        examples.append({
            "id": row["id"], "ids": prompt + target, "n_prompt": len(prompt), "benign": benign,
            "label": row["prompt_label"], "ce_weight": float(not by_kl), "kl_weight": float(by_kl)})
    return examples, skipped

def length(example):
    return len(example["ids"])

def n_targets(example):
    return len(example["ids"]) - example["n_prompt"]

def make_batches(examples, batch_size, epochs, seed):
    """Return the examples of each optimizer step: a new order every epoch."""
    batches = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed * 1000 + epoch)
        order = torch.randperm(len(examples), generator=generator)
        for batch in order.split(batch_size):
            batches.append([examples[i] for i in batch])
    return batches

# --------------------------------------------------------------------------------------------------
# The loss

class Losses(NamedTuple):
    """Sums over the targets of a pass. Only `total` has a gradient; ce is weighted, KLs are not."""
    total: torch.Tensor
    ce: torch.Tensor
    kl: torch.Tensor
    reverse_kl: torch.Tensor        # of the methods in extras/online.py

def target_hidden_states(model, examples):
    """Run one packed pass -> hidden (N, D) that predicts the N target tokens, targets (N,). If
    model.mixed, by bf16 arithmetic on fp32 weights (autocast), and hidden is in bf16."""
    where, start = [], 0
    for example in examples:                         # position i predicts token i + 1
        where += range(start + example["n_prompt"] - 1, start + length(example) - 1)
        start += length(example)
    tokens, cu_seqlens = pack_ids([example["ids"] for example in examples], model.device)
    where = torch.tensor(where).to(model.device, non_blocking=True)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.mixed):
        hidden = model(tokens, cu_seqlens)[where]                                # (N, D)
    return hidden.bfloat16() if model.mixed else hidden, tokens[where + 1]

def target_weights(examples, key, device):
    """Return the weights (N,) fp32 of the targets. An example has a number, or one per target."""
    weights = [torch.as_tensor(example.get(key, 0.0)).float().expand(n_targets(example))
               for example in examples]
    return torch.cat(weights).to(device, non_blocking=True)

def packed_loss(model, examples, reference=None, ref_head=None):
    """Return the Losses of one packed pass. A target has the loss

        ce_weight * -log p(target)  +  kl_weight * KL(reference || p)

    reference: f(the examples whose kl_weight, one number, is not 0; they have no ce_weight) ->
    hidden states (M, D) of the frozen student at their targets, or what linear_ce_kl takes instead.
    ref_head: its head, if trained."""
    hidden, targets = target_hidden_states(model, examples)                      # (N, D), (N,)
    ce_weight = target_weights(examples, "ce_weight", hidden.device)
    kl_weight = target_weights(examples, "kl_weight", hidden.device)
    ref_hidden, rows = None, kl_weight != 0
    if asked := [example for example in examples if example.get("kl_weight")]:
        of_asked = reference(asked).to(hidden)
        ref_hidden = hidden.new_zeros(len(hidden), of_asked.shape[1])
        ref_hidden[rows] = of_asked
    head = model.head.to(hidden.dtype) if model.mixed else model.head
    loss = linear_ce_kl(hidden, head, targets, ce_weight, ref_hidden,
                        kl_weight if asked else None, ref_head if asked else None)    # (N,)
    plain = loss.detach()
    return Losses(loss.sum(), plain.where(~rows, 0).sum(), (plain / kl_weight).where(rows, 0).sum(),
                  plain.new_zeros(()))

def frozen_reference(model):
    """Return f(examples) -> hidden states (N, D) of a model with its LoRA layers switched off."""
    def reference(examples):
        with torch.no_grad(), lora_disabled(model):
            return target_hidden_states(model, examples)[0]
    return reference

# --------------------------------------------------------------------------------------------------
# The training loop

def make_optimizer(name, params, lr, weight_decay):
    """Return AdamW (betas 0.9, 0.999) of torch, or of bitsandbytes with its state in 8 bits."""
    params = list(params)
    if name == "adamw":
        fused = params[0].is_cuda or None
        return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay, fused=fused)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes")
    return AdamW8bit(params, lr=lr, weight_decay=weight_decay)

def learning_rate(step, steps, peak, warmup):
    """Return the learning rate of step 0, 1, ...: linear from 0 to the peak over a share `warmup`
    of the steps, then a cosine to 0, exactly as transformers' schedule."""
    rise = math.ceil(steps * warmup)
    if step < rise:
        return peak * step / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

def load_checkpoint(path, trainable, optimizer, fingerprint):
    """Go on from OUT/checkpoint.pt, if it and OUT/metrics.jsonl are there: load the parameters and
    the optimizer -> metrics of the steps so far. Raises InputError for a checkpoint that is damaged
    or of another run."""
    if not (path.exists() and path.with_name("metrics.jsonl").exists()):
        return []
    try:
        refuse_link(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_fingerprint(path.with_name("metrics.jsonl"), state["fingerprint"], fingerprint)
        check_checkpoint(state, trainable, optimizer)
        for name, value in state["params"].items():
            trainable[name].data.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        return state["metrics"]
    except InputError:
        raise
    except Exception as e:                           # whatever torch raises for a damaged file
        raise InputError(f"{path}: damaged ({type(e).__name__}); delete it to start again")

def save_checkpoint(path, trainable, optimizer, fingerprint, metrics):
    """Write OUT/checkpoint.pt. Raises InputError if the disk is full."""
    state = {"fingerprint": fingerprint, "metrics": metrics, "optimizer": optimizer.state_dict(),
             "params": {name: p.detach() for name, p in trainable.items()}}
    try:
        with atomic_path(path) as beside:
            torch.save(state, beside)
    except RuntimeError as e:                        # what torch raises for a full disk
        raise InputError(f"{path}: cannot be written ({e}); make room and run the same command "
                         "again")

def fit(args, config, model, trainable, optimizer, batches, loss, *, metrics, fingerprint,
        extra_loss=None, make_batch=None):
    """Train to the last step -> metrics of all steps. Every step is a line of OUT/metrics.jsonl,
    and every --save-every steps there is a checkpoint.

    trainable: {name: parameter}. batches: the examples of each optimizer step. loss: f(examples of
    one packed pass) -> Losses. metrics: of the steps that were taken before.
    extra_loss: f(step, batch) runs a backward pass of its own and returns {name: scalar}, of which
    "extra" is added to the logged loss. make_batch: f(step, batch) -> (examples, metrics), for
    methods that make rows at each step. Raises InputError before a step whose loss is not finite.
    """
    start = len(metrics)
    write_rows(args.out / "metrics.jsonl", metrics)
    writer = RowWriter(args.out / "metrics.jsonl")

    def backward(batch, step):
        """Run forward and backward passes -> sums (4,) of the Losses, {name: extra scalar}."""
        torch.manual_seed(args.seed * 1_000_003 + step)      # dropout: exact resuming
        n, sums = sum(map(n_targets, batch)), torch.zeros(4, device=args.device)
        for pack in balance_packs(batch, length, args.pack_tokens):
            losses = loss(pack)
            (losses.total / n).backward()
            sums += torch.stack(losses).detach()
        return sums, extra_loss(step, batch) if extra_loss else {}

    def gradients(batch, step):
        """Set the gradients, clipped -> sums (4,), extras, and the norm before."""
        try:
            sums, extra = backward(batch, step)
            norm = torch.nn.utils.clip_grad_norm_(trainable.values(), args.clip).item()
            if math.isfinite(norm) or model.head.dtype != torch.float16 or model.grad_scale == 1:
                return sums, extra, norm
            model.grad_scale /= 2                    # float16 overflowed
        except torch.OutOfMemoryError as e:
            if model.activation_checkpointing:
                raise InputError(f"step {step + 1}: out of GPU memory, though activations are "
                                 "recomputed; use fewer --pack-tokens, --quantize nf4, or, if "
                                 f"one row is too long, a smaller --max-length ({e})")
            print("out of GPU memory: from here on activations are recomputed", file=sys.stderr)
            model.activation_checkpointing = True
        optimizer.zero_grad(set_to_none=True)        # outside of the handler its tensors are gone
        free_memory()
        return gradients(batch, step)                # once more

    with progress("train", len(batches), "step", start) as advance:
        for step, batch in enumerate(batches[start:], start):
            began = time.time()
            batch, made = make_batch(step, batch) if make_batch else (batch, {})
            lr = learning_rate(step, len(batches), config["lr"], args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums, extra, norm = gradients(batch, step)
            n_tokens, targets = sum(map(length, batch)), sum(map(n_targets, batch))
            total, ce, kl, reverse_kl = (sums / targets).tolist()
            extra = {name: value.item() for name, value in extra.items()}
            total += extra.pop("extra", 0.0)
            if not (math.isfinite(total) and math.isfinite(norm)):
                raise InputError(f"step {step + 1}: loss {total}, gradient norm {norm}; stopped "
                                 "before this step was taken. Its rows: "
                                 + ", ".join(str(example["id"]) for example in batch))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)    # sampling may want the memory
            metrics.append({"step": step + 1, "loss": total, "ce": ce, "kl": kl,
                            "reverse_kl": reverse_kl, "lr": lr, "grad_norm": norm,
                            "tokens": n_tokens, "targets": targets, **extra, **made,
                            "tokens_per_second": round(n_tokens / (time.time() - began))})
            writer.write(metrics[-1])
            advance(tokens=n_tokens, note=f"loss {total:.3f}")
            if (step + 1) % args.save_every == 0 or step + 1 == len(batches):
                save_checkpoint(args.out / "checkpoint.pt", trainable, optimizer, fingerprint,
                                metrics)
    return metrics

# --------------------------------------------------------------------------------------------------
# The stage, also for the methods in extras/

def add_training_flags(p):
    """Add the flags of every script that trains: student, recipe and what is written."""
    g = p.add_argument_group("student")
    g.add_argument("--model", help="student (default: the model that sample.py used)")
    g.add_argument("--full", action="store_true",
                   help="train all weights instead of LoRA (in fp32, whatever --dtype says)")
    g.add_argument("--limit", type=positive, help="only so many rows, drawn with the seed, equally "
                   "many of each prompt_label")
    g = p.add_argument_group("recipe (default: the paper's; for the tiny student another)")
    for key, kind, what in (
            ("lr", bounded(float, 1e-12, 100), "highest learning rate"),
            ("epochs", positive, "passes over the rows"),
            ("batch_size", positive, "rows in an optimizer step"),
            ("max_length", positive, "tokens; longer rows are skipped"),
            ("lora_r", positive, "rank"),
            ("lora_alpha", bounded(float, 1e-6, 1e6), "LoRA is scaled by alpha / r"),
            ("lora_dropout", bounded(float, 0, 0.99), "share of a layer's inputs"),
            ("lora_targets", str, "which linear layers")):
        g.add_argument("--" + key.replace("_", "-"), type=kind,
                       help=f"{what}; paper {PAPER_CONFIG[key]}, tiny {TINY_CONFIG[key]}")
    g.add_argument("--warmup", type=bounded(float, 0, 1), default=0.1,
                   help="share of the steps in which the learning rate rises")
    g.add_argument("--weight-decay", type=bounded(float, 0), default=0.0, help="of AdamW")
    g.add_argument("--clip", type=bounded(float, 1e-9), default=1.0, help="largest gradient norm")
    g.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw",
                   help="torch's, or bitsandbytes' in 8 bits")
    g.add_argument("--seed", type=seed_value, help="of the order of rows, of LoRA's first weights "
                   "and of the draws (default: the seed of sample.py)")
    p.machine.add_argument("--pack-tokens", type=positive, default=16384,
                           help="tokens in one pass: fewer need less memory, the loss stays")
    g = p.add_argument_group("what is written")
    g.add_argument("--merge", action="store_true",
                   help="write a merged model that transformers loads, instead of an adapter")
    g.add_argument("--save-every", type=positive, default=50, help="steps between checkpoints")

def add_row_flags(p):
    g = p.add_argument_group("rows and method")
    g.add_argument("--data", help="rows: a set of data/sources.py, such as star1; or a file, URL "
                   "or hub name as for sample.py --prompts (default: OUT/guarded.jsonl)")
    return add_column_flags(g)

def load_student(args, run, defaults=None):
    """Load the student, with LoRA on it unless --full -> (model, tokenizer, config). config: the
    recipe, from the flags, else from `defaults`, else the paper's or the tiny one."""
    if args.quantize and args.full:
        raise InputError("--quantize keeps the weights and --full trains them; leave one out")
    name = args.model or run.get("sample", {}).get("model")
    if name is None:
        raise InputError(f"{args.out}: no sample.py run to take the model from; give --model")
    args.seed = stage_seed(args, run)
    dtype = torch.float32 if args.full else choose_dtype(args)   # bf16 weights lose steps of 1e-5
    model, tokenizer = load_model(name, args.device, dtype, args.quantize)
    if lora_layers(model):
        raise InputError(f"{model.name} is an adapter; merge it first (train.py --merge), or train "
                         "its base model")
    config = {**(TINY_CONFIG if is_tiny(model.folder) else PAPER_CONFIG), **(defaults or {})}
    config |= {key: getattr(args, key) for key in config if getattr(args, key) is not None}
    torch.manual_seed(args.seed)
    if args.full:
        model.requires_grad_(True)
        model.mixed = default_dtype(args.device) == torch.bfloat16
    else:
        add_lora(model, config["lora_r"], config["lora_alpha"], config["lora_dropout"],
                 config["lora_targets"].split(","))
    return model, tokenizer, config

def frozen_student(args, model):
    """Return the student as it was: with LoRA the model itself, see `frozen_reference`."""
    frozen = load_model(model.name, args.device, model.head.dtype)[0] if args.full else model
    frozen.mixed = model.mixed
    merge_linear_layers(frozen)
    return frozen

def load_examples(args, encode, read=training_rows):
    """Read rows, load the student, encode rows -> (model, tokenizer, config, examples, skipped).
    encode: f(rows, tokenizer, max_length), such as `encode_rows`. read: see read_training_rows."""
    run = read_run(args.out)
    rows = read_training_rows(args, run.get("guard", {}), read)
    model, tokenizer, config = load_student(args, run)
    print(escape_control_chars(describe_rows(rows, model.folder)))
    max_length = min(config["max_length"], model.config.max_position_embeddings)
    examples, skipped = encode(rows, tokenizer, max_length)
    examples = draw_examples(examples, skipped, args.limit, args.seed)
    return model, tokenizer, config, examples, skipped

def train(args, model, tokenizer, config, examples, skipped, loss=None, *, fingerprint=None,
          extra_loss=None, extra_parameters=None, make_batch=None):
    """Run the stage: fit the student to examples, write OUT/model, end the record in run.json.

    loss (default: cross-entropy), extra_loss, make_batch: see `fit`. fingerprint: what the result
    depends on beyond add_training_flags. extra_parameters: {name: parameter} to train too."""
    loss = loss or functools.partial(packed_loss, model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trainable |= extra_parameters or {}
    keys = "ids", "n_prompt", "benign", "ce_weight", "kl_weight"
    rows = [list(map(example.get, keys)) for example in examples]
    fingerprint = {
        "model": model.hash, "dtype": str(model.head.dtype), "template": template_hash(tokenizer),
        "rows": content_id(json.dumps(rows, default=torch.Tensor.tolist)),
        **{key: value for key, value in config.items() if not (args.full and "lora_" in key)},
        **{key: getattr(args, key) for key in (
            "full", "warmup", "weight_decay", "clip", "optimizer", "seed")}, **(fingerprint or {})}
    if not args.full and config["lora_dropout"]:     # the masks are drawn pass by pass
        fingerprint["pack_tokens"] = args.pack_tokens
    batches = make_batches(examples, config["batch_size"], config["epochs"], args.seed)
    n, n_benign = len(examples), sum(example["benign"] for example in examples)
    print(escape_control_chars(
        f"train: {n} rows ({n - n_benign} harmful, {n_benign} benign), {len(batches)} steps, "
        f"{sum(p.numel() for p in trainable.values()):,} weights"
        + "".join(f"; skipped {count} {why}" for why, count in sorted(skipped.items()))))
    fingerprint = json.loads(json.dumps(fingerprint))            # as a checkpoint gives it back
    optimizer = make_optimizer(args.optimizer, trainable.values(), config["lr"], args.weight_decay)
    metrics = load_checkpoint(args.out / "checkpoint.pt", trainable, optimizer, fingerprint)
    if len(metrics) == len(batches):
        print("train: all steps were taken before; changed code wants another --out")
    labels = Counter(sorted(example["label"] for example in examples))
    stage = Stage("train", args, "metrics.jsonl", fingerprint, model=model.name,
                  sources=take_versions(), labels=labels)
    model.train()
    merge_linear_layers(model)
    metrics = fit(args, config, model, trainable, optimizer, batches, loss, metrics=metrics,
                  fingerprint=fingerprint, extra_loss=extra_loss, make_batch=make_batch)
    write_model(args, model)
    summary = f"trained {len(batches)} steps on {n} rows, last loss {metrics[-1]['loss']:.4f}"
    stage.finish(summary, args.out / "model", f"python eval.py --out {args.out}", rows=n,
                 steps=len(batches), train_tokens=sum(row["tokens"] for row in metrics),
                 skipped=dict(sorted(skipped.items())))

def write_model(args, model):
    """Write OUT/model: the adapter, or with --full or --merge a full model."""
    name = model.name
    if args.merge and args.quantize:
        print(escape_control_chars(f"merging into {name} as it was before it was quantized"))
        adapter, lora = lora_tensors(model), model.lora
        model, _ = load_model(name, "cpu", model.config.dtype)
        add_lora(model, *lora.values())
        load_lora(model, adapter)
    if args.merge:
        merge_lora(model)
    if args.full or args.merge:
        save_model(model, args.out / "model")
    else:
        save_lora(model, args.out / "model", name)

def main():
    p = make_parser(__doc__)
    g = add_row_flags(p)
    g.add_argument("--strip-cot", choices=("harmful", "all"), help="which rows learn to answer "
                   "after an empty reasoning")
    g.add_argument("--kl", action="store_true", help="benign rows: forward KL to the frozen "
                   "student instead of cross-entropy")
    add_training_flags(p)
    args = p.parse_args()
    encode = functools.partial(encode_rows, strip_cot=args.strip_cot, kl=args.kl)
    model, tokenizer, config, examples, skipped = load_examples(args, encode)
    frozen = frozen_student(args, model) if args.kl else model
    loss = functools.partial(packed_loss, model, reference=frozen_reference(frozen),
                             ref_head=None if frozen is model else frozen.head)
    train(args, model, tokenizer, config, examples, skipped, loss,
          fingerprint={"kl": args.kl, "strip_cot": args.strip_cot})

if __name__ == "__main__":
    cli(main)
