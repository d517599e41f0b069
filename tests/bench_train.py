"""
train.py against TRL's SFTTrainer in the same run: the same rows, order, LoRA weights and schedule, cross-entropy.

    pip install --no-deps trl accelerate                      # a peer, not a requirement
    python tests/bench_train.py                               # the tiny student on traces of its own
    python tests/bench_train.py --model FOLDER --data ROWS    # any model, rows as guard.py writes them
    python tests/bench_train.py --shape qwen3-4b --quantize nf4 --kl --recompute     # our steps alone, on random weights

TRL gets the rows as `python -m extras.export trl` writes them. It runs in three settings: a batch padded to its longest row
without gradient checkpointing (its fastest here), its defaults (with checkpointing), and as the paper's code runs it
(one row a pass, accumulated, with checkpointing). Tokens are those of the rows, padding is not counted. All run by
turns; the speed of a run is the median of its steps, without the first three. Dropout is 0: the masks would differ.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")                  # nothing is wanted from there
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "tools")]
import torch

from bench_linear_ce_kl import gemm_rate
from random_model import SHAPES, random_model, write_rows

from data.rows import read_rows
from thinksafe import add_lora, balance_packs, load_model, resolve_model, save_lora
from train import encode_rows, frozen_reference, length, make_batches, make_optimizer, packed_loss

from merged_linear import merge_linear_layers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {                                                  # -> arguments of SFTConfig for a batch
    "padded batch": lambda n: dict(per_device_train_batch_size=n, gradient_checkpointing=False),
    "defaults": lambda n: dict(per_device_train_batch_size=n, gradient_checkpointing=True),
    "row by row": lambda n: dict(per_device_train_batch_size=1, gradient_accumulation_steps=n, gradient_checkpointing=True),
}


def script(*command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:3]))}: {done.stderr}")


def sft_trainer(rows, adapter, base, tokenizer, device, dtype, out, **config):
    """Train on rows {"prompt", "completion"} in their order from the LoRA weights in the folder `adapter` -> [{"loss", "grad_norm",
    "seconds"}] per step, and the ids and labels that TRL made of the rows."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    steps = []

    class Log(TrainerCallback):
        def on_step_begin(self, *args, **kw):
            self.began = time.time()

        def on_step_end(self, *args, **kw):
            if device == "cuda":
                torch.cuda.synchronize()
            self.seconds = time.time() - self.began

        def on_log(self, args, state, control, logs, **kw):
            if "loss" in logs:
                steps.append({"loss": logs["loss"], "grad_norm": float(logs["grad_norm"]), "seconds": self.seconds})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter, is_trainable=True)
    config = SFTConfig(output_dir=str(out), lr_scheduler_type="cosine", optim="adamw_torch", train_sampling_strategy="sequential",
                       num_train_epochs=1, max_length=None, bf16=False, use_cpu=device == "cpu", logging_steps=1, save_strategy="no",
                       report_to="none", disable_tqdm=True, dataloader_pin_memory=False, weight_decay=0.0, max_grad_norm=1.0, **config)
    trainer = SFTTrainer(model=model.to(device), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Log])
    trainer.train()
    return steps, trainer.train_dataset["input_ids"], trainer.train_dataset["labels"]


def compare(name, data, folder, steps, batch, device="cpu", dtype="float32", lr=2e-4, rounds=1, settings=tuple(SETTINGS)):
    """-> {"train.py": runs, setting: runs, ...}, a run being [{"loss", "grad_norm", "tokens_per_second"}] per step, and whether
    TRL trained on exactly our ids, from the responses on. `rounds` runs of each, by turns."""
    model, tokenizer = load_model(name, device, getattr(torch, dtype))
    rows = [row for row in read_rows(data) if row.get("response_label", "safe") == "safe" and row.get("keep", True)]
    n = min(len(rows) // batch, steps) * batch                # whole batches
    epochs = -(-steps * batch // n)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:n]))
    flags = ["--model", name, "--data", folder / "rows.jsonl", "--device", device, "--dtype", dtype, "--epochs", epochs, "--batch-size", batch,
             "--lr", lr, "--seed", 0, "--lora-dropout", 0, "--lora-targets", ",".join(TARGETS)]
    torch.manual_seed(0)                                      # as train.py does
    add_lora(model, 32, 16.0, 0.0, TARGETS)
    save_lora(model, folder / "start", model.name)
    script("-m", "extras.export", "trl", *flags[:4], "--max-length", 2**20, "--out", folder)
    texts, items = read_rows(folder / "trl.jsonl"), encode_rows(rows[:n], tokenizer, 2**30)[0]
    if not len(texts) == len(items) == n:
        sys.exit(f"{data}: of its first {n} safe rows {n - len(texts)} cannot be trained on, or TRL would tokenize them otherwise")
    order = [i for step in make_batches(range(n), batch, epochs, seed=0) for i in step]
    tokens = [sum(len(items[i]["ids"]) for i in order[at:at + batch]) for at in range(0, len(order), batch)]
    runs, same = {"train.py": [], **{key: [] for key in settings}}, True
    for i in range(rounds):
        script("train.py", *flags, "--out", folder / f"ours{i}")
        runs["train.py"].append(read_rows(folder / f"ours{i}" / "metrics.jsonl"))
        for key in settings:
            run, ids, labels = sft_trainer(
                [texts[j] for j in order], folder / "start", name, tokenizer, device, getattr(torch, dtype), folder / "trl",
                learning_rate=lr, warmup_steps=-(-len(tokens) // 10), seed=0, **SETTINGS[key](batch))
            runs[key].append([{**step, "tokens_per_second": k / step["seconds"]} for step, k in zip(run, tokens)])
            for j, x, y in zip(order, ids, labels):
                want, at = items[j]["ids"], items[j]["n_prompt"]
                same &= x == want and y == [-100] * at + want[at:]
    return runs, same


def busy_share(step):
    """Share of the time of step() in which the GPU runs a kernel."""
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return sum(event.device_time_total for event in trace.key_averages()) / 1e6 / seconds


def alone(args):
    """Print one JSON line: our steps on a random model of a shape, with the median time of a step, tokens/s, the share of the rate of
    a large bf16 product that they reach (recomputed passes do not count), how busy the GPU is, and the peak memory."""
    device, cuda = torch.device(args.device), args.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = random_model(args.shape, device, dtype, args.quantize)
        rows = write_rows(Path(folder) / "rows.jsonl", 4 * args.batch_size, 150 if cuda else 10)
    add_lora(model, 32, 16.0, args.dropout)
    model.activation_checkpointing = args.recompute
    examples, _ = encode_rows(rows, tokenizer, 2**30, kl=args.kl)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer, batches = make_optimizer("adamw", params, 1e-5, 0.0), make_batches(examples, args.batch_size, args.steps, 0)
    model.train()
    merge_linear_layers(model)
    reference = frozen_reference(model)

    def step(batch):
        for pack in balance_packs(batch, length, args.pack_tokens):
            packed_loss(model, pack, reference).total.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = []
    for batch in batches[:args.steps]:
        began = time.perf_counter()
        step(batch)                                           # ends with a value that is read back
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    tokens = statistics.median(sum(map(length, batch)) for batch in batches[:args.steps])
    second = statistics.median(seconds[3:] or seconds)
    body = sum(m.in_features * m.out_features for m in model.layers.modules() if hasattr(m, "in_features") and not hasattr(m, "lora_A"))
    # Weights times activations forward, and times gradients backward, but the first layer's; the head's 4VD; for the half of the rows that have a
    # reference 4VD more, and its pass.
    flop = tokens * (4 * body + 4 * model.head.numel() + args.kl * (body + 2 * model.head.numel()))
    row = {"shape": args.shape, "lora": "q,v r 32", "quantize": args.quantize, "kl": args.kl, "recompute": args.recompute, "tokens a step": tokens,
           "pack_tokens": args.pack_tokens, "step_ms": round(1e3 * second, 1), "tokens/s": round(tokens / second),
           "share of rate": round(flop / second / gemm_rate(dtype, args.device), 3)}
    if cuda:
        row |= {"peak GB": round(torch.cuda.max_memory_reserved() / 1e9, 2), "busy": round(busy_share(lambda: step(batches[0])), 3),
                "device": torch.cuda.get_device_name()}
    print(json.dumps(row), flush=True)
    return row


def largest_gap(ours, theirs, key):
    """Of all steps, relative."""
    return max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(ours, theirs))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="tiny", help="folder or hub name")
    p.add_argument("--data", help="rows with instruction, response, prompt_label (default: 160 traces of the tiny student, made here)")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--rounds", type=int, default=3, help="runs of each, by turns")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", default="float32", help="of the weights")
    p.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="of TRL")
    p.add_argument("--shape", choices=SHAPES, help="instead: our own steps on random weights of a named shape, with:")
    p.add_argument("--quantize", choices=("nf4",))
    p.add_argument("--kl", action="store_true")
    p.add_argument("--recompute", action="store_true", help="activation checkpointing")
    p.add_argument("--dropout", type=float, default=0.0)
    p.add_argument("--pack-tokens", type=int, default=16384)
    args = p.parse_args(argv)
    if args.shape:
        return alone(args)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if not args.data:
            script("sample.py", "--model", "tiny", "--limit", 160, "--out", folder)
            script("guard.py", "--out", folder)
        runs, same = compare(resolve_model(args.model).name, args.data or folder / "guarded.jsonl", folder, args.steps, args.batch_size,
                             args.device, args.dtype, rounds=args.rounds, settings=args.settings)
    ours = runs["train.py"][0]
    print(f"{args.model}, {len(ours)} steps of {args.batch_size} rows, {args.dtype}, {args.device}, torch {torch.__version__}; "
          f"TRL has our ids and masks: {same}; loss {ours[0]['loss']:.4f} -> {ours[-1]['loss']:.4f}")
    speed = {key: [statistics.median(step["tokens_per_second"] for step in run[3:]) for run in mine] for key, mine in runs.items()}
    for key, mine in runs.items():
        print(f"{key:14}{statistics.median(speed[key]):8,.0f} tokens/s ({min(speed[key]):,.0f} to {max(speed[key]):,.0f})" + (
            "" if key == "train.py" else
            f", train.py {statistics.median(a / b for a, b in zip(speed['train.py'], speed[key])):.2f} times; largest gap of a step: "
            f"loss {largest_gap(ours, mine[0], 'loss'):.0e}, gradient norm {largest_gap(ours, mine[0], 'grad_norm'):.0e}"))


if __name__ == "__main__":
    main()
