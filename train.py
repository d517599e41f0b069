"""
out/guarded.jsonl -> the student fine-tuned on (original prompt -> own safe trace), out/model/.

    python train.py                        # LoRA; the paper's recipe, or the tiny world's for the tiny student
    python train.py --kl                   # forward KL to the frozen student on benign rows, instead of cross-entropy
    python train.py --full                 # all weights
    python train.py --online grpo          # on rollouts made for every step: grpo, opd --teacher MODEL, opsa; see online.py
    python train.py --quantize nf4         # QLoRA: LoRA on a base in 4 bits
    python train.py --dry-run              # configuration, memory plan and one example; writes nothing
    python train.py --export trl           # the rows as TRL's SFTTrainer wants them, out/trl.jsonl; no training
    python train.py --data star1           # other rows: a set of data.py, a file, or a data set of the hub
    torchrun --nproc_per_node 4 train.py   # on four GPUs, the rows of each step spread over them
    python train.py --strip-cot harmful    # refusals without their reasoning
    python train.py --primer --data safechain --limit 400 --epochs 4        # SafePath: the opening words alone
    python train.py --safekey --data safekey --epochs 5                     # SafeKey: two more losses

Rows are packed without padding and do not see each other. The loss of a step is summed over its target
tokens and divided by their number, however many passes it took: packing changes speed, not the loss (up to
rounding, and to which dropout mask a pass draws).
"""
import bisect
import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import random
import re
import secrets
import struct
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from data import EVAL_SETS, VERSIONS, label_counts, overlap, prompt_rows, training_rows
from kernels.ce_kl import CPU_ROWS, GPU_BUFFER, ce_kl_loss
from kernels.reverse_kl import reverse_kl_loss
from online import COSTS, RECIPE, Online, add_online_flags, as_teacher_sees, check_flags
from sample import add_sampling_flags
from thinksafe import (
    LABELS,
    TINY,
    InputError,
    RowWriter,
    Stage,
    add_lora,
    all_reduce_,
    as_markdown,
    cli,
    content_id,
    count,
    encode_prompt,
    encode_response,
    fault_of,
    flops,
    from_rank_0,
    inert,
    is_harmful,
    is_steered,
    is_tiny,
    join_ranks,
    leave_together,
    load_decoder,
    load_lora,
    load_state,
    lora_layers,
    lora_off,
    lora_tensors,
    merge_lora,
    model_hash,
    model_name,
    number,
    own_dtype,
    own_think,
    pack_ids,
    parser,
    pick_dtype,
    pinned,
    progress,
    ranks,
    read_rows,
    read_run,
    replacing,
    save_decoder,
    save_lora,
    save_state,
    split_packs,
    split_revision,
    stage_seed,
    template_hash,
    write_atomic,
)

# The paper's recipe (Table 4 and appendix), and what the tiny student needs instead.
PAPER = {"lr": 1e-5, "epochs": 3, "batch_size": 8, "max_length": 16384, "lora_r": 32, "lora_alpha": 16.0,
         "lora_dropout": 0.05, "lora_targets": "q_proj,v_proj"}
TINY_RECIPE = {**PAPER, "lr": 2e-4, "batch_size": 16, "max_length": 2048, "lora_dropout": 0.0,
               "lora_targets": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"}
PRIMER = "Let's think about safety first."                             # SafePath's
SAFEKEY_WEIGHT, SAFEKEY_EPOCHS = 0.2, 2                                # of each of its losses; in the last so many epochs
SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")


def key_sentence(row, response, ids, tokenizer):
    """Where in a response's ids SafeKey's key sentence stands, the first verdict on the prompt -> (start, end), or None.

    What comes before is the model's understanding of the prompt. By the row's columns summary_end_idx and
    next_sentence_end_idx, which count characters of row["response"]; else it is the second sentence of the reasoning."""
    if "summary_end_idx" in row:
        ends = [row["summary_end_idx"], row.get("next_sentence_end_idx")]
        if not all(type(n) is int for n in ends) or not 0 < ends[0] < ends[1] <= len(row["response"]):
            raise InputError(f"row {row['id']}: summary_end_idx {ends[0]!r}, next_sentence_end_idx {ends[1]!r} are no places in "
                             f"its response of {len(row['response'])} characters; mend them, or leave both columns out")
        ends = [n - (len(row["response"]) - len(response)) for n in ends]
    else:
        ends = [m.end() for m in SENTENCE_END.finditer(response.partition("</think>")[0])][:2]
    if len(ends) < 2:
        return None
    ends[0] = len(response[:ends[0]].rstrip())                             # a word's first token holds the space before it
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    start, end = (bisect.bisect_left(range(len(ids) + 1), n, key=lambda k: len(decode(ids[:k]))) for n in ends)
    return (start, end) if 0 < start < end <= len(ids) else None


def encode_rows(rows, tokenizer, max_length, strip_cot=None, primer=None, safekey=False):
    """-> ([{id, ids, n_prompt, label, benign}], Counter of what was left out and why).

    ids = prompt as the template renders it + response (`own_think`) + eos. strip_cot: "harmful" or "all" rows keep an empty
    reasoning. primer: the response is <think> and these words, without an end; benign rows are left out.
    safekey: items also get "key", the place in ids of `key_sentence`."""
    items, left_out, told = [], Counter(), []
    for row in rows:
        benign = not is_harmful(row["prompt_label"])
        if primer and benign:
            left_out["benign"] += 1
            continue
        label = row.get("response_label", "safe")
        if label != "safe" or row.get("keep", True) is not True:
            left_out[str(row.get("reason") or (label if label != "safe" else "not_kept"))] += 1
            continue
        response = f"<think>\n{primer}" if primer else row["response"]
        fault = None if primer else fault_of(response, row.get("finish_reason", "stop"), tokenizer)
        if is_steered(row["instruction"]):                            # it is to refuse without being told to
            fault = "has_instruction"
            told.append(str(row["id"]))
        if fault:
            left_out[fault] += 1
            continue
        if "</think>" in response and (strip_cot == "all" or strip_cot == "harmful" and not benign):
            response = "<think>\n\n</think>\n\n" + response.rpartition("</think>")[2].lstrip()
        response = own_think(response, tokenizer)
        prompt, ids = encode_prompt(tokenizer, row["instruction"]), encode_response(tokenizer, response)
        item = {"id": row["id"], "ids": prompt + ids + ([] if primer else [tokenizer.eos_token_id]), "n_prompt": len(prompt),
                "label": row["prompt_label"], "benign": benign}
        if len(item["ids"]) > max_length:
            left_out["too_long"] += 1
            continue
        if safekey and (key := key_sentence(row, response, ids, tokenizer)):
            item["key"] = [len(prompt) + k for k in key]
        items.append(item)
    if told:
        print(inert(f"left out, as the refusal instruction still stands in the prompt: rows {', '.join(told[:10])}"
                    + (f" and {len(told) - 10} more" if told[10:] else "")), file=sys.stderr)
    return items, left_out


def balanced(items, n, seed):
    """n of the items, drawn with the seed, equally many of each label as far as there are."""
    seen, ranked = Counter(), []
    for item in random.Random(seed).sample(items, len(items)):
        seen[item["label"]] += 1
        ranked.append((seen[item["label"]], item))
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])[:n]]


def length(item):
    return len(item["ids"])


def rendered(item, tokenizer):
    """The example as its ids decode, each line begun by what it is part of: the prompt, or what is trained on.

    What is not printable, but for the end of a line, stands as its escape (\\x1b, \\u202e)."""
    lines = []
    for part, ids in (("prompt ", item["ids"][:item["n_prompt"]]), ("trained", item["ids"][item["n_prompt"]:])):
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        lines += [f"{part} | {line}" for line in inert(text).split("\n")]
    return "\n".join(lines)


def export_trl(path, items, tokenizer):
    """Write {"prompt", "completion"} per row: text that TRL's SFTTrainer turns into exactly the item's ids and mask.

    The completion ends in the eos token's text, so that TRL adds none. TRL reads control tokens in text as control: rows
    that hold such text come out as other ids. They are left out and counted."""
    added = tokenizer("")["input_ids"]                                     # by TRL too, as it tokenizes the prompt: a Llama's bos
    lines, left_out = [], 0
    for item in items:
        ids, n = item["ids"], item["n_prompt"]
        start = len(added) if ids[:len(added)] == added else 0
        prompt, completion = (tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                              for part in (ids[start:n], ids[n:]))
        if tokenizer(prompt)["input_ids"] == ids[:n] and tokenizer(prompt + completion)["input_ids"] == ids:
            lines.append(json.dumps({"prompt": prompt, "completion": completion}, ensure_ascii=False) + "\n")
        else:
            left_out += 1
    write_atomic(path, "".join(lines))
    print(inert(f"wrote {len(lines)} rows, the longest of {max(map(length, items))} tokens (SFTConfig.max_length); "
                f"left out {left_out} that TRL would tokenize otherwise\n  -> {path}"))


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


def pass_loss(model, items, reference=None, ref_head=None, mixed=False, temperature=1.0):
    """Loss of one packed pass, summed over its target tokens -> (loss with gradient, its cross-entropy part, and without their
    weights KL and reverse KL), scalars. Per target token, with p of softmax(logits / temperature),

        w * -log p(target)  +  kl * KL(reference || p)  +  reverse_kl * KL(p || reference)

    An item has these weights as a number or one for each target; without, they are 1, 0, 0, or 0, 1, 0 if it is benign and
    there is a reference. A token with a kl has no w.
    reference: None, or f(items that have a KL) -> hidden states (M, D) of the frozen student, or of a teacher, at their
    targets. ref_head: its head, if it is not the student's frozen one. mixed: as in `target_states`."""
    hidden, targets = target_states(model, items, mixed)
    if temperature != 1:
        hidden = hidden / temperature
    weights = []                                                           # of each item (3, n)
    for item in items:
        by_kl = item["benign"] and reference is not None
        own = (item.get(key, usual) for key, usual in (("w", not by_kl), ("kl", by_kl), ("reverse_kl", 0)))
        weights.append(torch.stack([torch.as_tensor(x).float().expand(length(item) - item["n_prompt"]) for x in own]))
    asked = [item for item, x in zip(items, weights) if x[1:].any()]
    by_ref = torch.cat([x[1:].any().expand(x.shape[1]) for x in weights]).to(hidden.device)
    weights = torch.cat(weights, 1)
    any_kl, any_reverse = weights[1:].any(1).tolist()
    w, kl, reverse = weights.to(hidden.device)
    head, ref_hidden, back = model.head.to(hidden.dtype), None, torch.zeros_like(w)
    if asked:
        ref = reference(asked).to(hidden)
    if any_kl:
        ref_hidden = torch.zeros_like(hidden).index_put((by_ref,), ref)
    if any_reverse:
        on = reverse != 0
        back[on] = reverse_kl_loss(hidden[on], head, ref[on[by_ref]], head if ref_head is None else ref_head)
    loss = ce_kl_loss(hidden, head, targets, w, ref_hidden, kl, ref_head if any_kl else None)
    by_kl, parts = kl != 0, loss.detach()
    return (loss + reverse * back).sum(), parts[~by_kl].sum(), (parts / kl)[by_kl].sum(), back.detach().sum()


def safekey_losses(model, heads, items, mixed=False):
    """SafeKey's two losses (arXiv 2505.16186) on items with a "key" -> (summed over the key tokens, summed over the items).

    Query-mask modelling: cross-entropy of the key sentence when nothing attends to the prompt. The prompt is left out:
    rotary positions count only by their differences, so this is the same as keeping it in place and masked.
    Dual-path head: two linear heads (D -> 1) tell a harmful prompt from the mean hidden state of the understanding, and of
    all up to its end; the mean of their two cross-entropies."""
    blind = [{"ids": item["ids"][item["n_prompt"]:item["key"][1]], "n_prompt": item["key"][0] - item["n_prompt"]}
             for item in items]
    hidden, targets = target_states(model, blind, mixed)
    masked = ce_kl_loss(hidden, model.head.to(hidden.dtype), targets).sum()
    tokens, cu = pack_ids([item["ids"][:item["key"][0]] for item in items], model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
        hidden = model(tokens, cu)
    read = [h.float() for h in hidden.split(cu.diff().tolist())]
    pooled = [h[item["n_prompt"]:].mean(0) for h, item in zip(read, items)], [h.mean(0) for h in read]
    harmful = torch.tensor([[not item["benign"]] for item in items], device=hidden.device).float()
    paths = [F.binary_cross_entropy_with_logits(head(torch.stack(h)), harmful, reduction="sum") for head, h in zip(heads, pooled)]
    return masked, sum(paths) / 2


def cached_reference(path, reference, items, pack_tokens, limit, identity):
    """Compute what `reference` says of every benign item once, into one file on disk -> a function like it that reads there.

    The hidden state is kept and not g = softmax(h W^T) W: at the same size its KL gradient is several times more exact
    (`python kernels/ce_kl.py` measures it). limit: GB. Raises InputError for more than that or than the disk has, or a file
    of another run."""
    rows = [item for item in items if item["benign"]]
    if not rows:
        return reference
    n = [len(item["ids"]) - item["n_prompt"] for item in rows]
    first = reference(rows[:1])
    size = sum(n) * first.shape[1] * first.element_size()
    if size > limit * 1e9:
        raise InputError(f"--cache-reference: {size / 1e9:.2f} GB are needed, {limit:g} allowed; allow more, or train without it")
    while ranks()[0] and not path.exists():                                # rank 0 makes it, however long that takes
        time.sleep(1)
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
        try:
            with replacing(path) as beside, open(beside, "wb") as f, progress("reference", len(rows), "row") as advance:
                os.posix_fallocate(f.fileno(), 0, 8 + len(header) + size)  # a disk that is too small says so at once
                f.write(struct.pack("<Q", len(header)) + header)
                for part in split_packs(rows, length, pack_tokens):
                    f.write(reference(part).cpu().contiguous().view(torch.uint8).numpy())
                    advance(len(part), sum(map(length, part)))
        except OSError as e:
            raise InputError(f"{path}: cannot be written ({e.strerror}); make room, or train without --cache-reference")
    hidden = safe_open(path, "pt").get_slice("hidden")
    for item, k, end in zip(rows, n, itertools.accumulate(n)):
        item["cached"] = slice(end - k, end)
    return lambda items: torch.cat([hidden[item["cached"]] for item in items])


def stored_bytes(tensors):
    """Bytes of the memory behind tensors, what they share counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def kept_bytes(model, items, mixed=False):
    """Bytes of activations that a packed pass keeps for its backward pass, as autograd is seen to ask for them
    -> (all together, those of one layer).

    Only the first two layers run: the second is like all that follow, the first may need no gradient of its input."""
    layers = model.layers
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def kept(n):
        model.layers, tensors = layers[:n], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            target_states(model, items, mixed)
        return stored_bytes(t for t in tensors if t.untyped_storage().data_ptr() not in own)
    try:
        one, two = kept(1), kept(2)
    finally:
        model.layers = layers
    return one + (len(layers) - 1) * (two - one), two - one


def memory_plan(model, items, sizes, optimizer, kept, kl=False):
    """Bytes that training needs at its peak beside the weights, with all activations kept for the backward pass, and with those
    of the layers recomputed there -> {"state", "activations", "inputs", "loss"}, which are parts, and {"kept", "recomputed"}.

    items: of the largest pass, T tokens of which N are targets; sizes: elements of each trained tensor; kept: from
    `kept_bytes`; kl: with a reference. An estimate in two places: gradients inside of a layer count as half of what it kept
    (a fifth to a half was seen), and the allocator rounds up."""
    D, V, b = model.config.hidden_size, model.config.vocab_size, model.head.element_size()
    T, N = sum(map(length, items)), sum(length(item) - item["n_prompt"] for item in items)
    activations, layer = kept
    # fp32 gradient and two moments; in 8 bits moments of a byte with a scale (fp32) per 256, from 4096 elements on
    state = sum(n * (4 + (2 + 8 / 256 if optimizer == "adamw8bit" and n >= 4096 else 8)) for n in sizes)
    # hidden states at the targets and their gradient, with a reference its states twice; blocks of logits (kernels/ce_kl.py)
    loss = (4 if kl else 2) * N * D * b
    loss += GPU_BUFFER if model.device.type == "cuda" else min(N, 2 * CPU_ROWS) * V * 4 * (2 if kl else 1)
    if model.head.requires_grad:                                           # its fp32 gradient, here and on the way to there
        loss += 3 * V * D * 4
    inputs = len(model.layers) * T * D * b                                 # of the layers: all there is to recompute from
    plan = {"state": state, "activations": activations, "inputs": inputs, "loss": loss,
            "kept": state + activations + max(loss, layer / 2), "recomputed": state + inputs + max(loss, 1.5 * layer)}
    return {part: int(size) for part, size in plan.items()}


def choose_recompute(plan, weights, tokens, free):
    """Print the plan -> whether activations are recomputed: only where they do not fit into nine tenths of the free bytes."""
    recompute = plan["kept"] > 0.9 * free
    gb = {part: f"{size / 1e9:.3g}" for part, size in {**plan, "weights": weights, "free": free}.items()}
    each = [f"{plan[part] / tokens / 1e3:.3g}" for part in ("activations", "inputs")]
    print(f"memory in GB: weights {gb['weights']}, gradients and optimizer {gb['state']}, loss {gb['loss']}, activations of "
          f"{tokens:,} tokens {gb['activations']} ({each[0]} kB each, {each[1]} if recomputed); beside the weights {gb['kept']}, "
          f"if recomputed {gb['recomputed']}; free {gb['free']}: {'recomputed' if recompute else 'kept'}")
    if plan["recomputed"] > 0.9 * free:
        print("warning: this may not fit; fewer --pack-tokens need less, or --quantize nf4, or with --full --optimizer adamw8bit",
              file=sys.stderr)
    return recompute


def free_bytes(device):
    """What can still be allocated."""
    if device.type == "cuda":                                              # torch keeps freed memory to use again
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])


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
    return {name: v.to("cpu", copy=True).contiguous() for name, v in tensors.items()}     # bitsandbytes shares some of them


def is_whole(tensors, meta, trainable, steps):
    """Whether a checkpoint has what `restore_checkpoint` and the loop take from it: all weights, their optimizer's state (that
    of SafeKey's heads begins late), and the metrics of each step so far."""
    shapes = {f"param.{name}": p.shape for name, p in trainable.items()}
    numbers = {name.split(".")[1] for name in tensors if name.startswith("optim.")}
    stepped = {str(i) for i, name in enumerate(trainable) if not name.startswith("safekey.")}
    step, metrics = meta.get("step"), meta.get("metrics")
    return (type(step) is int and 0 < step <= steps and stepped <= numbers <= set(map(str, range(len(trainable))))
            and {name: t.shape for name, t in tensors.items() if name.startswith("param.")} == shapes
            and isinstance(metrics, list) and len(metrics) >= step
            and all(isinstance(row, dict) and {"tokens", "loss"} <= row.keys() for row in metrics))


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


@contextlib.contextmanager
def tracking(name, out, run_id, config):
    """-> send(row): a row of metrics.jsonl goes to wandb or trackio too, as a run of the project thinksafe, or into
    OUT/tensorboard; name None: nowhere."""
    if name is None:
        yield lambda row: None
    elif name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        with SummaryWriter(out / name / run_id) as writer:
            def send(row):
                for key in row.keys() - {"step"}:
                    writer.add_scalar(key, row[key], row["step"])
                writer.flush()                                             # what is in the file is not sent again
            yield send
    else:
        try:
            tracker = importlib.import_module(name)
            tracker.init(project="thinksafe", name=run_id, config=config, resume="allow",
                         **({"id": run_id[-8:], "dir": out} if name == "wandb" else {}))
        except Exception as e:                                             # no account, no network, ...
            raise InputError(f"--track {name}: {e}")
        yield lambda row: tracker.log({key: row[key] for key in row.keys() - {"step"}}, step=row["step"])
        tracker.finish()


def model_card(out):
    """Text of OUT/model/README.md: what OUT/run.json says of that model, and OUT/eval.json if it is of that model."""
    run, folder = read_run(out), Path(out) / "model"
    train, recipe = run["train"], run["train"]["identity"]
    adapter, on_hub = (folder / "adapter_config.json").exists(), not Path(train["model"]).is_absolute()

    def name(model):                                                       # not where it lies on somebody's disk, and inert
        return re.sub(r"[^\w.,:/@+= -]", "?", Path(model).name if Path(model).is_absolute() else split_revision(model)[0])

    def table(*rows):
        return "\n".join(f"| {' | '.join(map(as_markdown, row))} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))
    base, source = name(train["model"]), f"`{name(train['arguments']['data'] or '')}`"
    method, what = "ThinkSafe", "pairs of a prompt and a safe trace (arXiv 2601.23143)"
    if recipe.get("online"):
        method, what = recipe["online"].upper(), "its own rollouts"
        source = f"prompts, {recipe['rollouts']} rollouts of each in every epoch"
    elif train["arguments"]["data"] is None:
        source = (f"traces of `{name(run['sample']['model'])}` (refusal instruction: {run['sample']['identity']['steer']}), "
                  f"kept by {', '.join(f'`{name(guard)}`' for guard in run['guard']['guards'])}")
    left_out = ", ".join(as_markdown(f"{n} {why}") for why, n in train["left_out"].items()) or "none"
    results = "None here yet."
    if (Path(out) / "eval.json").exists() and model_hash(folder) in json.dumps(run.get("eval", {}).get("identity")):
        report = json.loads((Path(out) / "eval.json").read_text("utf-8"))
        cell = "{percent} [{low}, {high}]".format_map
        results = f"Percent with 95% interval; harm and refusal judged by {as_markdown(report['judge'])}.\n\n" + table(
            ("figure", "before", "after", "n"),
            *((key, cell(report["before"][key]), cell(after), after["n"]) for key, after in report["after"].items()))
    return f"""---
{f"base_model: {base}{chr(10)}" if on_hub else ""}library_name: {"peft" if adapter else "transformers"}
pipeline_tag: text-generation
tags: [thinksafe, safety]
---
# {base}, fine-tuned with {method}

{"LoRA adapter for" if adapter else "Weights of"} `{base}`, trained on {what}.
{f"With vLLM: `--enable-lora --max-lora-rank {recipe['lora_r']}`." if adapter else ""}

## Data

{train["rows"]} rows: {source}. Left out: {left_out}.

{table(("label", "rows"), *train["labels"].items())}

## Recipe

{table(("what", "value"), ("steps", train["steps"]), *recipe.items())}

## Results

{results}

## Use and licence

For research on the safety of reasoning models. Nothing was measured but what stands above. The weights derive from `{base}` and
stay under its licence; the rows have that of their source.
"""


def main():
    p = parser(__doc__)
    g = p.add_argument_group("student and rows")
    g.add_argument("--model", help="student (default: the model that sample.py used)")
    g.add_argument("--data", help="rows to train on: star1, directrefusal, thinksafe-qwen3-0.6b, ...: a set of data.py; or a "
                   "file, URL or hub name as for sample.py --prompts (default: OUT/guarded.jsonl)")
    g.add_argument("--label", choices=LABELS, help="what prompts of --data are that have no label of their own")
    g.add_argument("--limit", type=count, help="only so many rows, drawn with the seed, equally many of each prompt_label")
    method = p.add_argument_group("method")
    g = method.add_mutually_exclusive_group()
    g.add_argument("--strip-cot", choices=("harmful", "all"), help="train these rows to answer after an empty reasoning")
    g.add_argument("--primer", nargs="?", const=PRIMER, help="SafePath: harmful prompts get <think> and these words as their "
                   f"whole target, without an end; benign ones are left out; no responses are needed (without words: {PRIMER})")
    g.add_argument("--safekey", action="store_true", help=f"SafeKey: {SAFEKEY_WEIGHT} of two more losses in the last "
                   f"{SAFEKEY_EPOCHS} epochs: a key sentence without its prompt, harm told from hidden states; the sentence is "
                   "where summary_end_idx and next_sentence_end_idx of the row say, else the second of the reasoning")
    g = method
    g.add_argument("--kl", action="store_true", help="benign rows: forward KL to the frozen student instead of cross-entropy")
    g.add_argument("--full", action="store_true", help="train all weights instead of LoRA (in fp32, whatever --dtype says)")
    g.add_argument("--cache-reference", type=number(float, 0), default=0, metavar="GB",
                   help="with --kl: compute the frozen student's hidden states once, onto disk, if they fit into so many GB")
    g = p.add_argument_group("recipe (default: the paper's; for the tiny student its own)")
    bounds = {"lr": (1e-12, 100), "lora_alpha": (1e-6, 1e6), "lora_dropout": (0, 0.99)}
    what = {"lr": "highest learning rate", "epochs": "passes over the rows", "batch_size": "rows in an optimizer step",
            "max_length": "tokens; longer rows are left out", "lora_r": "rank", "lora_alpha": "LoRA is scaled by alpha / r",
            "lora_dropout": "share of a layer's inputs", "lora_targets": "which linear layers"}
    for key, value in PAPER.items():
        kind = str if key == "lora_targets" else number(type(value), *bounds.get(key, (1,)))
        g.add_argument("--" + key.replace("_", "-"), type=kind, help=f"{what[key]}; paper {value}, tiny {TINY_RECIPE[key]}")
    g.add_argument("--warmup", type=number(float, 0, 1), default=0.1, help="share of the steps in which the learning rate rises")
    g.add_argument("--weight-decay", type=number(float, 0), default=0.0, help="of AdamW")
    g.add_argument("--clip", type=number(float, 1e-9), default=1.0, help="largest norm of the gradient")
    g.add_argument("--optimizer", choices=("adamw", "adamw8bit"), default="adamw", help="torch's, or bitsandbytes' in 8 bits")
    p.machine.add_argument("--pack-tokens", type=count, default=16384,
                           help="tokens in one pass: fewer need less memory, the loss stays")
    g = p.add_argument_group("what is written")
    g.add_argument("--merge", action="store_true", help="write a merged model that transformers loads, instead of an adapter")
    g.add_argument("--save-every", type=count, default=50, help="optimizer steps between checkpoints")
    g.add_argument("--track", choices=("wandb", "tensorboard", "trackio"), help="send the rows of metrics.jsonl there too; "
                   "tensorboard: OUT/tensorboard")
    g.add_argument("--dry-run", action="store_true", help="show configuration, memory plan and one example; write nothing")
    g.add_argument("--export", choices=("trl",), help="write the rows for TRL's SFTTrainer, OUT/trl.jsonl, and stop")
    add_online_flags(p)
    add_sampling_flags(p)
    args = p.parse_args()

    check_flags(args)
    if args.track and not importlib.util.find_spec(args.track):
        raise InputError(f"--track {args.track}: it is not installed here; pip install {args.track}")
    rank, world = join_ranks(args.device)
    if args.online and world > 1:
        raise InputError("--online works in one process; start it without torchrun")
    run = read_run(args.out)
    if args.online:
        if args.prompts is None and not run.get("sample", {}).get("finished"):
            raise InputError(f"{args.out}: sample.py has not finished there; run it first, or give prompts with --prompts FILE")
    elif args.data is None and not run.get("guard", {}).get("finished"):
        raise InputError(f"{args.out}: guard.py has not finished there; run it first, or give rows with --data FILE")
    args.seed = stage_seed(args, run)
    if args.model is None and "sample" not in run:
        raise InputError(f"{args.out}: no sample.py run to take the model from; give --model")
    name = model_name(args.model or run["sample"]["model"])
    recipe = {**(TINY_RECIPE if is_tiny(name) else PAPER), **RECIPE.get(args.online, {})}
    recipe |= {k: getattr(args, k) for k in recipe if getattr(args, k) is not None}
    if args.online:
        path = args.prompts or args.out / "samples.jsonl"
    else:
        path = args.data or args.out
    checkpoint, metrics = args.out / "checkpoint.safetensors", args.out / "metrics.jsonl"
    read = prompt_rows if args.online or args.primer else training_rows
    rows, again = from_rank_0(None if rank else (read(path, args.label), not metrics.exists()))      # to start again
    if rank and (args.export or args.dry_run):
        return
    if read is training_rows and args.data is None and len(rows) < run["guard"].get("rows", 0):
        raise InputError(f"{path}/guarded.jsonl: {len(rows)} of the {run['guard']['rows']} rows that guard.py wrote are there; "
                         "run it again, or give the rows that you want with --data FILE")
    if args.quantize and args.full:
        raise InputError("--quantize keeps the weights as they are and --full trains them; leave one of them out")
    if args.export and (args.primer or args.safekey):
        raise InputError("--export is for plain training on whole responses; leave --primer and --safekey out")
    if args.cache_reference and not args.kl:
        raise InputError("--cache-reference keeps the reference of --kl, which is not asked for")
    dtype = torch.float32 if args.full else pick_dtype(args)               # bf16 weights would lose steps of 1e-5
    model, tokenizer = load_decoder(name, args.device, dtype, args.quantize)
    name = pinned(name, model)
    if lora_layers(model):
        raise InputError(f"{name} is an adapter; merge it first (train.py --merge), or train its base model")
    online = Online(args, run, recipe, model, tokenizer) if args.online else None
    if online:
        items, left_out = online.encode(rows)
    else:
        items, left_out = encode_rows(rows, tokenizer, min(recipe["max_length"], model.config.max_position_embeddings),
                                      args.strip_cot, args.primer, args.safekey)
    if not items:
        raise InputError(f"{path}: none of its {len(rows)} rows can be trained on ({dict(left_out)})")
    if args.limit and args.limit < len(items):
        left_out["not_drawn"] = len(items) - args.limit
        items = balanced(items, args.limit, args.seed)
    if args.safekey and not any("key" in item for item in items):
        raise InputError(f"{path}: --safekey finds no row whose reasoning has two sentences")
    if world > (most := min(recipe["batch_size"], len(items))):
        raise InputError(f"{world} ranks for steps of {most} rows: use fewer, or a larger --batch-size")
    if args.export:
        args.out.mkdir(parents=True, exist_ok=True)
        return export_trl(args.out / "trl.jsonl", items, tokenizer)
    torch.manual_seed(args.seed)
    frozen = online and online.teacher or model                            # LoRA: the model itself, switched off
    if args.full:
        model.requires_grad_(True)
        frozen = load_decoder(name, args.device, dtype)[0] if args.kl else model
    else:
        add_lora(model, recipe["lora_r"], recipe["lora_alpha"], recipe["lora_dropout"], recipe["lora_targets"].split(","))
    trainable = {n: q for n, q in model.named_parameters() if q.requires_grad}
    if args.safekey:
        heads = torch.nn.ModuleList(torch.nn.Linear(model.config.hidden_size, 1) for _ in range(2)).to(args.device)
        trainable |= {f"safekey.{n}": q for n, q in heads.named_parameters()}
    optimizer = make_optimizer(args.optimizer, trainable.values(), recipe["lr"], args.weight_decay)
    identity = {"model": model.hash, "dtype": str(model.head.dtype), "template": template_hash(tokenizer),
                "rows": content_id(json.dumps([[item[k] for k in ("ids", "n_prompt", "benign", "key") if k in item]
                                               for item in items])),
                **{k: v for k, v in recipe.items() if not (args.full and k.startswith("lora_"))},
                **{k: getattr(args, k) for k in ("kl", "full", "warmup", "weight_decay", "clip", "optimizer", "seed",
                                                 "strip_cot", "primer", "safekey")}}
    if args.kl:                                                            # read back or made again: the same up to rounding
        identity["cache_reference"] = args.cache_reference > 0
    if online:
        identity |= online.identity
    if not args.full and recipe["lora_dropout"]:                           # the masks are drawn pass by pass
        identity |= {"pack_tokens": args.pack_tokens, "ranks": world}
    state = load_state(checkpoint) if checkpoint.exists() and not again else None
    before = {} if again else run.get("train", {})
    tracked = before.get("tracked") if args.track == before.get("arguments", {}).get("track") else None
    run_id = tracked or f"{args.out.resolve().name}-{secrets.token_hex(4)}"                # of the run at the tracker
    if args.dry_run:
        show = {"student": name, "data": path, "device": args.device, "pack_tokens": args.pack_tokens, **identity}
        print(inert("\n".join(f"{key:16}{value}" for key, value in show.items())))
    elif not rank:
        stage = Stage("train", args, identity, "metrics.jsonl", model=name, sources=VERSIONS, tracked=args.track and run_id)
    steps = list(batches(len(items), recipe["batch_size"], recipe["epochs"], args.seed))
    if not rank:
        print(inert(f"data: {label_counts(rows)}\n{overlap(rows, [TINY / 'eval.jsonl'] if is_tiny(name) else EVAL_SETS)}"))
    n_harmful = sum(not item["benign"] for item in items)
    print(f"train: {len(items)} rows ({n_harmful} harmful, {len(items) - n_harmful} benign), {len(steps)} steps, "
          f"{sum(q.numel() for q in trainable.values()):,} weights"
          + (f", {sum('key' in item for item in items)} rows with a key sentence" if args.safekey else "")
          + inert("".join(f"; left out {n} {why}" for why, n in sorted(left_out.items()))))
    model.train()
    for m in {model, frozen}:                                              # those of its weights that stay as they are
        m.pack(train=m is model)
    mixed = args.full and model.device.type == "cuda"
    weights = stored_bytes(t for m in {model, frozen} for t in (*m.parameters(), *m.buffers()))
    if online:
        largest = online.largest(items, recipe["batch_size"])
    else:
        packs = (pack for step in steps for pack in split_packs([items[i] for i in step[rank::world]], length, args.pack_tokens))
        largest = max(packs, key=lambda pack: sum(map(length, pack)))
    plan = memory_plan(model, largest, [q.numel() for q in trainable.values()], args.optimizer,
                       kept_bytes(model, largest, mixed), args.kl or bool(online))
    model.recompute = choose_recompute(plan, weights, sum(map(length, largest)), free_bytes(model.device))
    if args.dry_run:
        return print(rendered(items[steps[0][0]], tokenizer))

    meta = here = {"step": 0, "identity": json.loads(json.dumps(identity))}
    kept = []                                                              # rows of the steps that an earlier run took
    if not rank:
        if again:
            checkpoint.unlink(missing_ok=True)
        old = RowWriter(metrics).rows                                      # a last line that was cut is mended
        sent = len(old) if tracked else 0                                  # that the tracker has
        if state:
            if state[1].get("identity") != here["identity"]:
                raise InputError(f"{checkpoint} belongs to another run; delete it to start again")
            if not is_whole(*state, trainable, len(steps)):
                raise InputError(f"{checkpoint}: damaged; delete it to start again")
            old = state[1]["metrics"]                                      # the file may have lost the end of its last line
            meta = {key: state[1][key] for key in here}
        kept = old[:meta["step"]]
        write_atomic(metrics, "".join(json.dumps(row) + "\n" for row in kept))
        writer = RowWriter(metrics)
    meta = from_rank_0(meta)
    start = meta["step"]
    if meta["identity"] != here["identity"] or start and not (state and meta.items() <= state[1].items()):
        raise InputError(f"rank {rank} has another model, other flags or another {checkpoint} than rank 0; --out must be shared")
    if start:
        restore_checkpoint(trainable, optimizer, state[0])
    from_rank_0(None, *(q.data for q in trainable.values()))               # initial weights of another kind of GPU may differ

    def student(items):
        hidden = target_states(model, items)[0]
        stage.spend(flops=flops(model, map(length, items), len(hidden)))
        return hidden

    def reference(items):
        with torch.no_grad(), lora_off(model):                             # a teacher's own LoRA stays on
            seen = list(map(as_teacher_sees, items))
            hidden = target_states(frozen, seen, mixed)[0]
            if not rank:
                stage.spend(flops=flops(frozen, map(length, seen), len(hidden)))
            return hidden
    if not (args.kl or online):
        reference = None
    elif args.cache_reference:
        reference = cached_reference(args.out / "reference.safetensors", reference, items, args.pack_tokens, args.cache_reference,
                                     {key: identity[key] for key in ("model", "dtype", "template", "rows")} | {"mixed": mixed})

    def save(step):
        save_state(checkpoint, checkpoint_tensors(trainable, optimizer),
                   {"step": step, "identity": identity, "metrics": read_rows(metrics)})
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    with progress("train", len(steps), "step", start, silent=rank > 0) as advance, \
         tracking(None if rank else args.track, args.out, run_id, identity) as send:
        def log(row):
            if row["step"] > start:
                writer.write(row)
            if row["step"] > sent:
                send(row)
        for row in kept:
            log(row)
        for step in range(start, len(steps)):
            began, batch, figures = time.time(), [items[i] for i in steps[step]], {}
            if online:
                batch, figures = online.step(batch, step, student, reference)
                made = figures["generated"]
                stage.spend(tokens=made, flops=flops(model, [length(item) - 1 for item in batch], made))
                stage.spend(**online.guard_cost())                             # flops too, so apart
            torch.manual_seed(args.seed * 1_000_003 + step + (rank << 52))     # dropout belongs to the step: resuming is exact
            n_targets = sum(len(item["ids"]) - item["n_prompt"] for item in batch)
            lr = learning_rate(step, len(steps), recipe["lr"], args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums, extra = torch.zeros(4, device=args.device), torch.zeros(2, device=args.device)
            for part in split_packs(batch[rank::world], length, args.pack_tokens):
                losses = pass_loss(model, part, reference, frozen.head if frozen is not model else None, mixed,
                                   online.temperature if online else 1.0)
                (losses[0] / n_targets).backward()
                sums += torch.stack(losses).detach()
            late = args.safekey and step * recipe["epochs"] // len(steps) >= recipe["epochs"] - SAFEKEY_EPOCHS
            keyed = [item for item in batch if late and "key" in item]
            n_key = sum(item["key"][1] - item["key"][0] for item in keyed)
            for part in split_packs(keyed[rank::world], length, args.pack_tokens):
                losses = torch.stack(safekey_losses(model, heads, part, mixed)) / sums.new_tensor([n_key, len(keyed)])
                (SAFEKEY_WEIGHT * losses.sum()).backward()
                extra += losses.detach()
            if world > 1:                                                      # n_targets is that of all ranks already
                for q in trainable.values():
                    q.grad = torch.zeros_like(q) if q.grad is None else q.grad      # a last step may have no row for this rank
                all_reduce_(sums, extra, *(q.grad for q in trainable.values()))
            norm = torch.nn.utils.clip_grad_norm_(trainable.values(), args.clip).item()
            loss, ce, kl, reverse_kl = (sums / n_targets).tolist()
            masked_key, harm_head = extra.tolist()
            loss += SAFEKEY_WEIGHT * (masked_key + harm_head)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise InputError(f"step {step + 1}: loss {loss}, gradient norm {norm}; stopped before this step was taken. "
                                 f"Its rows: {', '.join(str(item['id']) for item in batch)}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            n_tokens = sum(len(item["ids"]) for item in batch)
            if keyed:
                figures |= {"masked_key": masked_key, "harm_head": harm_head}
            if online:
                rest = time.time() - began - figures["sample_s"] - figures.get("guard_s", 0)
                figures = {"reverse_kl": reverse_kl, **figures, "train_s": round(rest, 3)}
            if rank:
                continue
            log({"step": step + 1, "loss": loss, "ce": ce, "kl": kl, "lr": lr, "grad_norm": norm,
                 "tokens": n_tokens, "tokens_per_second": round(n_tokens / (time.time() - began)), **figures})
            stage.spend(train_tokens=n_tokens, flops=flops(model, map(length, batch), n_targets, train=True))
            if keyed:                                                          # the two passes of safekey_losses
                stage.spend(flops=flops(model, [item["key"][1] - item["n_prompt"] for item in keyed], n_key, train=True)
                            + flops(model, [item["key"][0] for item in keyed], 0, train=True))
            advance(tokens=n_tokens, note=f"loss {loss:.3f}")
            if (step + 1) % args.save_every == 0 and step + 1 < len(steps):
                save(step + 1)
    if rank:
        return leave_together()
    if start < len(steps):
        save(len(steps))
    if model.device.type == "cuda" and start < len(steps) and not online:  # the sampler takes what is free
        need = weights + plan["recomputed" if model.recompute else "kept"]
        print(f"memory: {need / 1e9:.2f} GB planned, {torch.cuda.max_memory_allocated(model.device) / 1e9:.2f} GB seen")
    if not args.full and args.merge:
        if args.quantize:
            print(inert(f"merging into {name} as it was before it was quantised"))
            adapter, lora = lora_tensors(model), model.lora
            model, _ = load_decoder(name, "cpu", own_dtype(model.config))
            add_lora(model, *lora.values())
            load_lora(model, adapter)
        merge_lora(model)
    if args.full or args.merge:
        save_decoder(model, args.out / "model")
    else:
        save_lora(model, args.out / "model", name)
    done = read_rows(metrics)
    counts = {"rows": len(items), "steps": len(steps), "train_tokens": sum(r["tokens"] for r in done),
              "left_out": dict(sorted(left_out.items()))}
    if online:
        counts |= {name: round(sum(row.get(key, 0) for row in done), 2) for name, key in COSTS.items()}
    stage.save(labels=dict(sorted(Counter(item["label"] for item in items).items())), **counts)
    write_atomic(args.out / "model" / "README.md", model_card(args.out))
    stage.finish(f"trained {len(steps)} steps on {len(items)} rows, last loss {done[-1]['loss']:.4f}", args.out / "model",
                 f"python eval.py --out {args.out}", **counts)
    leave_together()


if __name__ == "__main__":
    cli(main)
