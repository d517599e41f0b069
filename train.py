"""
out/guarded.jsonl -> the student fine-tuned on (original prompt -> own safe trace), out/model/.

    python train.py                        # LoRA; the paper's recipe, or the tiny world's for the tiny student
    python train.py --kl                   # forward KL to the frozen student on benign rows, instead of cross-entropy
    python train.py --full                 # all weights
    python train.py --data star1           # other rows: a set of data.py, a file, or a data set of the hub

Rows are packed without padding and do not see each other. The loss of a step is summed over its target
tokens and divided by their number, however many passes it took: packing changes speed, not the loss (up to
rounding, and to which dropout mask a pass draws).
"""
import itertools
import json
import math
import struct
import sys
import time
from collections import Counter

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from data import EVAL_SETS, VERSIONS, label_counts, overlap, training_rows
from kernels.ce_kl import ce_kl_loss
from thinksafe import (
    LABELS,
    TINY,
    InputError,
    RowWriter,
    Stage,
    add_lora,
    cli,
    content_id,
    count,
    encode_prompt,
    encode_response,
    fault_of,
    inert,
    is_harmful,
    is_steered,
    is_tiny,
    load_decoder,
    load_state,
    lora_layers,
    lora_off,
    merge_lora,
    model_name,
    number,
    opens_think,
    pack_ids,
    parser,
    pick_dtype,
    pinned,
    read_rows,
    read_run,
    replacing,
    save_decoder,
    save_lora,
    save_state,
    seed_value,
    split_packs,
    stage_seed,
    template_hash,
    write_atomic,
)

# The paper's recipe (Table 4 and appendix), and what the tiny student needs instead.
PAPER = {"lr": 1e-5, "epochs": 3, "batch_size": 8, "max_length": 16384, "lora_r": 32, "lora_alpha": 16.0,
         "lora_dropout": 0.05, "lora_targets": "q_proj,v_proj"}
TINY_RECIPE = {**PAPER, "lr": 2e-4, "batch_size": 16, "max_length": 2048, "lora_dropout": 0.0,
               "lora_targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"}


def encode_rows(rows, tokenizer, max_length):
    """-> ([{id, ids, n_prompt, benign}], Counter of what was left out and why).

    ids = prompt as the template renders it + response + eos. A template that opens <think> itself has it already,
    so a response (of another tool) that starts with one loses it."""
    items, left_out, told = [], Counter(), []
    for row in rows:
        label = row.get("response_label", "safe")
        if label != "safe" or row.get("keep", True) is not True:
            left_out[str(row.get("reason") or (label if label != "safe" else "not_kept"))] += 1
            continue
        fault = fault_of(row["response"], row.get("finish_reason", "stop"), tokenizer)
        if is_steered(row["instruction"]):                            # it is to refuse without being told to
            fault = "has_instruction"
            told.append(str(row["id"]))
        if fault:
            left_out[fault] += 1
            continue
        response = row["response"]
        if opens_think(tokenizer):
            response = response.removeprefix("<think>").lstrip("\n")
        prompt = encode_prompt(tokenizer, row["instruction"])
        ids = prompt + encode_response(tokenizer, response) + [tokenizer.eos_token_id]
        if len(ids) > max_length:
            left_out["too_long"] += 1
            continue
        items.append({"id": row["id"], "ids": ids, "n_prompt": len(prompt), "benign": not is_harmful(row["prompt_label"])})
    if told:
        print(inert(f"left out, as the refusal instruction still stands in the prompt: rows {', '.join(told[:10])}"
                    + (f" and {len(told) - 10} more" if told[10:] else "")), file=sys.stderr)
    return items, left_out


def batches(n, batch_size, epochs, seed):
    """The row numbers of each optimizer step: every epoch a new order, its last step may be smaller."""
    for epoch in range(epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()
        yield from (order[i:i + batch_size] for i in range(0, n, batch_size))


def target_states(model, items, mixed=False):
    """One packed pass -> hidden (N, D) at the positions that predict the items' N response tokens, and those tokens (N,).

    mixed: bf16 arithmetic on fp32 weights (autocast), and hidden in bf16."""
    where, start = [], 0
    for item in items:
        where += range(start + item["n_prompt"] - 1, start + len(item["ids"]) - 1)       # position i predicts token i + 1
        start += len(item["ids"])
    tokens, cu = pack_ids([item["ids"] for item in items], model.device)
    where = torch.tensor(where, device=model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
        hidden = model(tokens, cu)[where]
    return hidden.bfloat16() if mixed else hidden, tokens[where + 1]


def pass_loss(model, items, reference=None, ref_head=None, mixed=False):
    """Loss of one packed pass, summed over its target tokens -> (loss with gradient, cross-entropy part, KL part), scalars.

    reference: None, or f(benign items) -> hidden states (M, D) of the frozen student at their targets: benign rows then
    get KL to it instead of cross-entropy. ref_head: its head, if the student's own is trained. mixed: as in `target_states`."""
    hidden, targets = target_states(model, items, mixed)
    by_kl = [item["benign"] and reference is not None for item in items for _ in item["ids"][item["n_prompt"]:]]
    by_kl, ref_hidden = torch.tensor(by_kl, device=hidden.device), None
    if by_kl.any():
        ref = reference([item for item in items if item["benign"]]).to(hidden)
        ref_hidden = torch.zeros_like(hidden).index_put((by_kl,), ref)
    loss = ce_kl_loss(hidden, model.head.to(hidden.dtype), targets, (~by_kl).float(), ref_hidden, by_kl.float(), ref_head)
    return loss.sum(), loss.detach()[~by_kl].sum(), loss.detach()[by_kl].sum()


def cached_reference(path, reference, items, pack_tokens, limit, identity):
    """Compute what `reference` says of every benign item once, into one file on disk -> a function like it that reads there.

    The hidden state is kept and not g = softmax(h W^T) W: at the same size its KL gradient is several times more exact
    (`python kernels/ce_kl.py` measures it). limit: GB. Raises InputError for more than that, or a file of another run."""
    rows = [item for item in items if item["benign"]]
    if not rows:
        return reference
    n = [len(item["ids"]) - item["n_prompt"] for item in rows]
    first = reference(rows[:1])
    size = sum(n) * first.shape[1] * first.element_size()
    if size > limit * 1e9:
        raise InputError(f"--cache-reference: {size / 1e9:.2f} GB are needed, {limit:g} allowed; allow more, or train without it")
    if path.exists():
        try:
            with safe_open(path, "pt") as f:
                meta = json.loads(f.metadata()["meta"])
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise InputError(f"{path}: damaged; delete it to make it again")
        if meta != identity:
            raise InputError(f"{path} was made by another model or from other rows; delete it to make it again")
    else:                                                                  # safetensors by hand: never whole in memory
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16"}[first.dtype]
        header = json.dumps({"__metadata__": {"meta": json.dumps(identity)}, "hidden": {
            "dtype": dtype, "shape": [sum(n), first.shape[1]], "data_offsets": [0, size]}}).encode()
        header += b" " * (-len(header) % 8)
        with replacing(path) as beside, open(beside, "wb") as f:
            f.write(struct.pack("<Q", len(header)) + header)
            for part in tqdm(split_packs(rows, lambda item: len(item["ids"]), pack_tokens), "reference", disable=None):
                f.write(reference(part).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    hidden = safe_open(path, "pt").get_slice("hidden")
    for item, k, end in zip(rows, n, itertools.accumulate(n)):
        item["cached"] = slice(end - k, end)
    return lambda items: torch.cat([hidden[item["cached"]] for item in items])


def make_optimizer(name, params, lr, weight_decay):
    """AdamW of torch, or of bitsandbytes with its state in 8 bits (InputError if that is not installed)."""
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise InputError("--optimizer adamw8bit needs bitsandbytes: pip install bitsandbytes")
    return AdamW8bit(params, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)


def learning_rate(step, steps, peak, warmup):
    """Of step 0, 1, ...: linear from 0 over the first share of the steps, then a cosine to 0; transformers' schedule exactly."""
    rise = math.ceil(steps * warmup)
    if step < rise:
        return peak * step / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def checkpoint_tensors(trainable, optimizer):
    """All state of the training as {name: tensor}: param.NAME, and optim.I.KEY of the I-th parameter's optimizer state.

    Numbers become int64 tensors; the dict that bitsandbytes keeps its 8-bit state in becomes KEY/INNER."""
    tensors = {f"param.{name}": p.detach() for name, p in trainable.items()}
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            for inner, v in value.items() if isinstance(value, dict) else [(None, value)]:
                name = f"optim.{i}.{key}" + (f"/{inner}" if inner else "")
                tensors[name] = v if torch.is_tensor(v) else torch.tensor(v, dtype=torch.int64)
    return {name: v.clone().contiguous() for name, v in tensors.items()}        # bitsandbytes shares some between parameters


def restore_checkpoint(trainable, optimizer, tensors):
    """Undo `checkpoint_tensors`."""
    saved = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("param."):
            trainable[name.removeprefix("param.")].data.copy_(value)
            continue
        _, i, key = name.split(".", 2)
        key, _, inner = key.partition("/")
        state = saved["state"].setdefault(int(i), {})
        if value.dim() == 0 and value.dtype == torch.int64:
            value = value.item()
        if inner:
            state.setdefault(key, {})[inner] = value
        else:
            state[key] = value
    optimizer.load_state_dict(saved)


def main():
    p = parser(__doc__)
    p.add_argument("--model", help="student (default: the model that sample.py used)")
    p.add_argument("--data", help="rows to train on: star1, directrefusal, thinksafe-qwen3-0.6b, ...: a set of data.py; or a "
                   "file, URL or hub name as for sample.py --prompts (default: OUT/guarded.jsonl)")
    p.add_argument("--label", choices=LABELS, help="what prompts of --data are that have no label of their own")
    p.add_argument("--kl", action="store_true", help="benign rows: forward KL to the frozen student instead of cross-entropy")
    p.add_argument("--full", action="store_true", help="train all weights instead of LoRA (in fp32, whatever --dtype says)")
    p.add_argument("--merge", action="store_true", help="write a merged model that transformers loads, instead of an adapter")
    p.add_argument("--cache-reference", type=number(float, 0), default=0, metavar="GB",
                   help="with --kl: compute the frozen student's hidden states once, onto disk, if they fit into so many GB")
    g = p.add_argument_group("recipe (default: the paper's; for the tiny student its own)")
    bounds = {"lr": (1e-12, 100), "lora_alpha": (1e-6, 1e6), "lora_dropout": (0, 0.99)}
    for key, value in PAPER.items():
        kind = str if key == "lora_targets" else number(type(value), *bounds.get(key, (1,)))
        what = {"batch_size": "rows per optimizer step; ", "max_length": "tokens; longer rows are left out; "}.get(key, "")
        g.add_argument("--" + key.replace("_", "-"), type=kind, help=f"{what}paper {value}, tiny {TINY_RECIPE[key]}")
    g.add_argument("--warmup", type=number(float, 0, 1), default=0.1, help="share of the steps")
    g.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="of AdamW")
    g.add_argument("--clip", type=number(float, 1e-9), default=1.0, help="largest norm of the gradient")
    g.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="torch's, or bitsandbytes' in 8 bits")
    p.add_argument("--pack-tokens", type=count, default=16384, help="tokens in one pass: fewer need less memory, the loss stays")
    p.add_argument("--save-every", type=count, default=50, help="optimizer steps between checkpoints")
    p.add_argument("--seed", type=seed_value, help="of order, initial LoRA weights and dropout (default: that of sample.py)")
    args = p.parse_args()

    run = read_run(args.out)
    if args.data is None and not run.get("guard", {}).get("finished"):
        raise InputError(f"{args.out}: guard.py has not finished there; run it first, or give rows with --data FILE")
    args.seed = stage_seed(args, run)
    if args.model is None and "sample" not in run:
        raise InputError(f"{args.out}: no sample.py run to take the model from; give --model")
    name = model_name(args.model or run["sample"]["model"])
    recipe = dict(TINY_RECIPE if is_tiny(name) else PAPER)
    recipe |= {k: getattr(args, k) for k in recipe if getattr(args, k) is not None}
    path = args.data or args.out / "guarded.jsonl"
    rows = training_rows(path, args.label)
    if args.cache_reference and not args.kl:
        raise InputError("--cache-reference keeps the reference of --kl, which is not asked for")
    dtype = torch.float32 if args.full else pick_dtype(args)               # bf16 weights would lose steps of 1e-5
    model, tokenizer = load_decoder(name, args.device, dtype)
    name = pinned(name, model)
    if lora_layers(model):
        raise InputError(f"{name} is an adapter; merge it first (train.py --merge), or train its base model")
    items, left_out = encode_rows(rows, tokenizer, min(recipe["max_length"], model.config.max_position_embeddings))
    if not items:
        raise InputError(f"{path}: none of its {len(rows)} rows can be trained on ({dict(left_out)})")
    torch.manual_seed(args.seed)
    frozen = model                                                         # LoRA: the model itself, switched off
    if args.full:
        model.requires_grad_(True)
        frozen = load_decoder(name, args.device, dtype)[0] if args.kl else model
    else:
        add_lora(model, recipe["lora_r"], recipe["lora_alpha"], recipe["lora_dropout"], recipe["lora_targets"].split(","))
    trainable = {n: q for n, q in model.named_parameters() if q.requires_grad}
    optimizer = make_optimizer(args.optimizer, trainable.values(), recipe["lr"], args.weight_decay)
    identity = {"model": model.hash, "dtype": str(model.head.dtype), "template": template_hash(tokenizer),
                "rows": content_id(json.dumps([(item["ids"], item["n_prompt"], item["benign"]) for item in items])),
                **{k: v for k, v in recipe.items() if not (args.full and k.startswith("lora_"))},
                **{k: getattr(args, k) for k in ("kl", "full", "warmup", "weight_decay", "clip", "optimizer", "seed")}}
    if args.kl:                                                            # read back or made again: the same up to rounding
        identity["cache_reference"] = args.cache_reference > 0
    if not args.full and recipe["lora_dropout"]:                           # the masks are drawn pass by pass
        identity["pack_tokens"] = args.pack_tokens
    checkpoint, metrics = args.out / "checkpoint.safetensors", args.out / "metrics.jsonl"
    again = not metrics.exists()                                           # deleted to start again
    state = load_state(checkpoint) if checkpoint.exists() and not again else None
    stage = Stage("train", args, identity, "metrics.jsonl", model=name, sources=VERSIONS)
    steps = list(batches(len(items), recipe["batch_size"], recipe["epochs"], args.seed))
    print(f"data: {label_counts(rows)}\n{overlap(rows, [TINY / 'eval.jsonl'] if is_tiny(name) else EVAL_SETS)}")
    n_harmful = sum(not item["benign"] for item in items)
    print(f"train: {len(items)} rows ({n_harmful} harmful, {len(items) - n_harmful} benign), {len(steps)} steps, "
          f"{sum(q.numel() for q in trainable.values()):,} weights"
          + inert("".join(f"; left out {n} {why}" for why, n in sorted(left_out.items()))))

    if again:
        checkpoint.unlink(missing_ok=True)
    old, start = RowWriter(metrics).rows, 0                                # a last line that was cut is mended
    if state:
        tensors, meta = state
        if meta["identity"] != json.loads(json.dumps(identity)):
            raise InputError(f"{checkpoint} belongs to another run; delete it to start again")
        restore_checkpoint(trainable, optimizer, tensors)
        old, start = meta.get("metrics", old), meta["step"]                # the file may have lost the end of its last line
    write_atomic(metrics, "".join(json.dumps(row) + "\n" for row in old[:start]))
    log = RowWriter(metrics)

    mixed = args.full and model.device.type == "cuda"

    def reference(items):
        with torch.no_grad(), lora_off(frozen):
            return target_states(frozen, items, mixed)[0]
    if not args.kl:
        reference = None
    elif args.cache_reference:
        reference = cached_reference(args.out / "reference.safetensors", reference, items, args.pack_tokens, args.cache_reference,
                                     {key: identity[key] for key in ("model", "dtype", "template", "rows")} | {"mixed": mixed})

    def save(step):
        save_state(checkpoint, checkpoint_tensors(trainable, optimizer),
                   {"step": step, "identity": identity, "metrics": read_rows(metrics)})
    model.train()
    model.recompute = model.device.type == "cuda"
    with tqdm(total=len(steps), initial=start, unit="step", desc="train", disable=None) as bar:
        for step in range(start, len(steps)):
            began, batch = time.time(), [items[i] for i in steps[step]]
            torch.manual_seed(args.seed * 1_000_003 + step)                    # dropout belongs to the step: resuming is exact
            n_targets = sum(len(item["ids"]) - item["n_prompt"] for item in batch)
            lr = learning_rate(step, len(steps), recipe["lr"], args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums = torch.zeros(3, device=args.device)
            for part in split_packs(batch, lambda item: len(item["ids"]), args.pack_tokens):
                losses = pass_loss(model, part, reference, frozen.head if frozen is not model else None, mixed)
                (losses[0] / n_targets).backward()
                sums += torch.stack(losses).detach()
            norm = torch.nn.utils.clip_grad_norm_(trainable.values(), args.clip).item()
            loss, ce, kl = (sums / n_targets).tolist()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise InputError(f"step {step + 1}: loss {loss}, gradient norm {norm}; stopped before this step was taken. "
                                 f"Its rows: {', '.join(str(item['id']) for item in batch)}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            n_tokens = sum(len(item["ids"]) for item in batch)
            log.write({"step": step + 1, "loss": loss, "ce": ce, "kl": kl, "lr": lr, "grad_norm": norm,
                       "tokens": n_tokens, "tokens_per_second": round(n_tokens / (time.time() - began))})
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {n_tokens / (time.time() - began):,.0f} tokens/s")
            if (step + 1) % args.save_every == 0 and step + 1 < len(steps):
                save(step + 1)
    if start < len(steps):
        save(len(steps))
    if not args.full and args.merge:
        merge_lora(model)
    if args.full or args.merge:
        save_decoder(model, args.out / "model")
    else:
        save_lora(model, args.out / "model", name)
    done = read_rows(metrics)
    stage.finish(f"trained {len(steps)} steps on {len(items)} rows, last loss {done[-1]['loss']:.4f}", args.out / "model",
                 f"python eval.py --out {args.out}", rows=len(items), steps=len(steps),
                 train_tokens=sum(r["tokens"] for r in done), left_out=dict(sorted(left_out.items())))


if __name__ == "__main__":
    cli(main)
