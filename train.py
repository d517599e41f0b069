"""
out/guarded.jsonl -> the student fine-tuned on (original prompt -> own safe trace), out/model/.

    python train.py                        # LoRA; the paper's recipe, or the tiny world's for the tiny student
    python train.py --kl                   # forward KL to the frozen student on benign rows, instead of cross-entropy
    python train.py --full                 # all weights
    python train.py --data my_rows.jsonl   # any rows with instruction, response, prompt_label

Rows are packed without padding and do not see each other. The loss of a step is summed over its target
tokens and divided by their number, however many passes it took: packing changes speed, not the result.
"""
import json
import math
import time
from collections import Counter

import torch
from tqdm import tqdm

from kernels.ce_kl import ce_kl_loss
from thinksafe import (
    InputError,
    Stage,
    add_lora,
    check_row,
    cli,
    content_id,
    encode_prompt,
    encode_response,
    fault_of,
    is_harmful,
    is_tiny,
    load_decoder,
    load_state,
    lora_layers,
    lora_off,
    merge_lora,
    model_name,
    opens_think,
    parser,
    pick_dtype,
    read_rows,
    read_run,
    save_decoder,
    save_lora,
    save_state,
    stage_seed,
    thinks,
    write_atomic,
)

# The paper's recipe (Table 4 and appendix), and what the tiny student needs instead.
PAPER = {"lr": 1e-5, "epochs": 3, "batch_size": 8, "max_length": 16384, "lora_r": 32, "lora_alpha": 16.0,
         "lora_dropout": 0.05, "lora_targets": "q_proj,v_proj"}
TINY_RECIPE = {**PAPER, "lr": 1e-3, "batch_size": 16, "max_length": 2048, "lora_dropout": 0.0,
               "lora_targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"}


def encode_rows(rows, tokenizer, max_length):
    """-> ([{id, ids, n_prompt, benign}], Counter of what was left out and why).

    ids = prompt as the template renders it + response + eos. A template that opens <think> itself has it already,
    so a response (of another tool) that starts with one loses it."""
    opened, reasons = opens_think(tokenizer), thinks(tokenizer)
    items, left_out = [], Counter()
    for row in rows:
        if not row.get("keep", row.get("response_label", "safe") == "safe"):
            left_out[row.get("reason") or row.get("response_label", "not kept")] += 1
            continue
        fault = fault_of(row["response"], row.get("finish_reason", "stop"), opened, reasons)
        if fault:
            left_out[fault] += 1
            continue
        response = row["response"].removeprefix("<think>").lstrip("\n") if opened else row["response"]
        prompt = encode_prompt(tokenizer, row["instruction"])
        ids = prompt + encode_response(tokenizer, response) + [tokenizer.eos_token_id]
        if len(ids) > max_length:
            left_out["too_long"] += 1
            continue
        items.append({"id": row["id"], "ids": ids, "n_prompt": len(prompt), "benign": not is_harmful(row["prompt_label"])})
    return items, left_out


def batches(n, batch_size, epochs, seed):
    """The row numbers of each optimizer step: every epoch a new order, its last step may be smaller."""
    for epoch in range(epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1000 + epoch)).tolist()
        yield from (order[i:i + batch_size] for i in range(0, n, batch_size))


def pack(items, pack_tokens):
    """Split a step's rows into passes of at most pack_tokens tokens (a longer row has a pass of its own)."""
    passes, size = [[]], 0
    for item in items:
        if passes[-1] and size + len(item["ids"]) > pack_tokens:
            passes.append([])
            size = 0
        passes[-1].append(item)
        size += len(item["ids"])
    return passes


def step_loss(model, reference, items, kl, device):
    """Summed loss of one packed pass -> (loss, ce sum, kl sum); loss has the gradient.

    reference: f(tokens, cu_seqlens) -> hidden of the frozen student, called on the benign rows alone, or None."""
    items = sorted(items, key=lambda item: kl and item["benign"])              # KL rows stand behind the others
    lengths = torch.tensor([len(item["ids"]) for item in items])
    tokens = torch.tensor([t for item in items for t in item["ids"]])
    is_target = torch.cat([torch.arange(1, len(item["ids"]) + 1) >= item["n_prompt"] for item in items])
    is_target[lengths.cumsum(0) - 1] = False                                   # nothing follows a row's eos
    where = is_target.nonzero().flatten()                                      # positions whose next token is learned
    benign = torch.tensor([kl and item["benign"] for item in items]).repeat_interleave(lengths)[where]
    cu = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    tokens, cu, where, benign, targets = (x.to(device) for x in (tokens, cu, where, benign, tokens[where + 1]))
    hidden = model(tokens, cu)[where]
    ref_hidden = None
    if benign.any():
        first = sum(not item["benign"] for item in items)
        start = int(cu[first])
        with torch.no_grad():
            ref = reference(tokens[start:], cu[first:] - start)
        ref_hidden = torch.zeros_like(hidden)
        ref_hidden[benign] = ref[where[benign] - start]
    loss = ce_kl_loss(hidden, model.head, targets, (~benign).float(), ref_hidden, benign.float())
    return loss.sum(), loss.detach()[~benign].sum(), loss.detach()[benign].sum()


def make_optimizer(name, params, lr, weight_decay):
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
    return {name: v.contiguous() for name, v in tensors.items()}


def restore(trainable, optimizer, tensors):
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
    p.add_argument("--data", help="rows to train on (default: OUT/guarded.jsonl)")
    p.add_argument("--kl", action="store_true", help="benign rows: forward KL to the frozen student instead of cross-entropy")
    p.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    p.add_argument("--merge", action="store_true", help="write a merged model that transformers loads, instead of an adapter")
    g = p.add_argument_group("recipe (default: the paper's; for the tiny student its own)")
    for key, value in PAPER.items():
        what = {"batch_size": "rows per optimizer step; ", "max_length": "tokens; longer rows are left out; "}.get(key, "")
        g.add_argument("--" + key.replace("_", "-"), type=type(value), help=f"{what}paper {value}, tiny {TINY_RECIPE[key]}")
    g.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    g.add_argument("--weight-decay", type=float, default=0.0, help="of AdamW")
    g.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    g.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="torch's, or bitsandbytes' in 8 bits")
    p.add_argument("--pack-tokens", type=int, default=16384, help="tokens in one pass: less needs less memory, the result stays")
    p.add_argument("--save-every", type=int, default=50, help="optimizer steps between checkpoints")
    p.add_argument("--seed", type=int, help="of order, initial LoRA weights and dropout (default: that of sample.py)")
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
    for key in ("lr", "epochs", "batch_size", "max_length", "lora_r"):
        if recipe[key] <= 0:
            raise InputError(f"--{key.replace('_', '-')} must be above 0")
    path = args.data or args.out / "guarded.jsonl"
    rows = read_rows(path)
    for i, row in enumerate(rows, 1):
        check_row(row, f"{path}, row {i}")
        if not isinstance(row.get("response"), str):
            raise InputError(f"{path}, row {i}: no text under 'response'")
        row.setdefault("id", content_id(row["prompt_label"], row["instruction"], row["response"]))

    dtype = torch.float32 if args.full else pick_dtype(args)               # bf16 weights would lose steps of 1e-5
    model, tokenizer = load_decoder(name, args.device, dtype)
    if lora_layers(model):
        raise InputError(f"{name} is an adapter; merge it first (train.py --merge), or train its base model")
    items, left_out = encode_rows(rows, tokenizer, recipe["max_length"])
    if not items:
        raise InputError(f"{path}: none of its {len(rows)} rows can be trained on ({dict(left_out)})")
    identity = {"model": model.hash, "template": content_id(tokenizer.chat_template),
                "rows": content_id(json.dumps([(item["ids"], item["n_prompt"], item["benign"]) for item in items])),
                **{k: v for k, v in recipe.items() if not (args.full and k.startswith("lora_"))},
                **{k: getattr(args, k) for k in ("kl", "full", "warmup", "weight_decay", "clip", "optimizer", "seed")}}
    stage = Stage("train", args, identity, "metrics.jsonl")
    stage.save(model=name)

    torch.manual_seed(args.seed)
    if args.full:
        model.requires_grad_(True)
        reference = load_decoder(name, args.device, dtype)[0] if args.kl else None
    else:
        add_lora(model, recipe["lora_r"], recipe["lora_alpha"], recipe["lora_dropout"], recipe["lora_targets"].split(","))

        def reference(tokens, cu):
            with lora_off(model):
                return model(tokens, cu)
    trainable = {n: q for n, q in model.named_parameters() if q.requires_grad}
    optimizer = make_optimizer(args.optimizer, trainable.values(), recipe["lr"], args.weight_decay)
    steps = list(batches(len(items), recipe["batch_size"], recipe["epochs"], args.seed))
    n_harmful = sum(not item["benign"] for item in items)
    print(f"train: {len(items)} rows ({n_harmful} harmful, {len(items) - n_harmful} benign), {len(steps)} steps, "
          f"{sum(q.numel() for q in trainable.values()):,} weights"
          + "".join(f"; left out {n} {why}" for why, n in sorted(left_out.items())))

    checkpoint, metrics, start = args.out / "checkpoint.safetensors", args.out / "metrics.jsonl", 0
    old = read_rows(metrics) if metrics.exists() else []
    if checkpoint.exists() and old:
        tensors, meta = load_state(checkpoint)
        if meta["identity"] != json.loads(json.dumps(identity)):
            raise InputError(f"{checkpoint} belongs to another run; delete it to start again")
        restore(trainable, optimizer, tensors)
        start = meta["step"]
    write_atomic(metrics, "".join(json.dumps(row) + "\n" for row in old[:start]))

    def save(step):
        save_state(checkpoint, checkpoint_tensors(trainable, optimizer), {"step": step, "identity": identity})
    model.train()
    with open(metrics, "a") as log, tqdm(total=len(steps), initial=start, unit="step", desc="train", disable=None) as bar:
        for step in range(start, len(steps)):
            began, batch = time.time(), [items[i] for i in steps[step]]
            torch.manual_seed(args.seed * 1_000_003 + step)                    # dropout belongs to the step: resuming is exact
            n_targets = sum(len(item["ids"]) - item["n_prompt"] for item in batch)
            lr = learning_rate(step, len(steps), recipe["lr"], args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums = torch.zeros(3, device=args.device)
            for part in pack(batch, args.pack_tokens):
                with torch.autocast("cuda", torch.bfloat16, enabled=args.full and torch.device(args.device).type == "cuda"):
                    losses = step_loss(model, reference, part, args.kl, args.device)
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
            log.write(json.dumps({"step": step + 1, "loss": loss, "ce": ce, "kl": kl, "lr": lr, "grad_norm": norm,
                                  "tokens": n_tokens, "tokens_per_second": round(n_tokens / (time.time() - began))}) + "\n")
            log.flush()
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}")
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
