"""
The sampler against `transformers.generate` in the same run, on requests of random length.

    python tests/bench_sample.py                              # the tiny world on a CPU; Qwen3-0.6B's shape on a GPU
    python tests/bench_sample.py --model FOLDER               # any model
    python tests/bench_sample.py --shape qwen3-0.6b           # random weights of a named shape, nothing is downloaded
    python tests/bench_sample.py --widths 1 16 64 256         # one decoding step alone, context 600
    python tests/bench_sample.py --profile trace.json         # and a trace of our decoding

On a GPU the workload is that of nano-vllm's bench.py (seed 0, 256 requests, prompts and outputs of 100 to 1,024
tokens), on a CPU a smaller one of its kind, for the tiny world with as many requests as it has prompts. Every request
has its own output length, as if it had stopped there, so generate, which ends with the longest of a batch, is counted
by the same useful tokens. Each is run at several batch sizes, ours and theirs by turns, generate also with its static
cache, and the best one counts. Ours is run twice with one Sampler: the second call finds cache and graphs. The floor is
weights and cache read once per step.
"""
import argparse
import functools
import gc
import json
import random
import resource
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]
import torch
from random_model import SHAPES, random_model
from replay import replay_ms

from sample import Sampler
from thinksafe import choose_dtype, is_tiny, load_model

SAMPLING = dict(temperature=0.6, top_p=0.95, top_k=20)


def requests(n, longest_prompt, most_tokens, vocabulary, seed=0):
    """nano-vllm's: uniform lengths from about a tenth of the longest on -> prompts, output lengths."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(vocabulary) for _ in range(rng.randint(longest_prompt // 10, longest_prompt))] for _ in range(n)]
    return prompts, [rng.randint(most_tokens // 10, most_tokens) for _ in range(n)]


def timed(f, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mb(device):
    return torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def bandwidth(device):
    """Bytes per second of reading, seen in a sum over 1 GB."""
    x = torch.ones(2**28, device=device)
    return x.nbytes / min(timed(lambda: x.sum(), device) for _ in range(5))


def floor_seconds(model, prompts, lengths, bits=16):
    """All requests side by side: in each step the weights once, and what is cached of each sequence."""
    c, dtype = model.config, model.head.dtype
    weights = (sum(p.numel() for p in model.layers.parameters()) + model.head.numel()) * dtype.itemsize
    per_head = c.head_dim * dtype.itemsize if bits == 16 else c.head_dim + 4
    cached = sum(n * len(p) + n * (n - 1) // 2 for p, n in zip(prompts, lengths))
    cache = cached * 2 * c.num_hidden_layers * c.num_key_value_heads * per_head
    return (max(lengths) * weights + cache) / bandwidth(model.device)


@torch.inference_mode()
def step_times(model, tokenizer, widths, context=600, kv_bits=16):
    """Print the median time of one decoding step of so many sequences on a GPU, its floor, and how many kernels it has."""
    for n in widths:
        sampler = Sampler(model, tokenizer, n, kv_bits)
        prompts = [[5 + i % 1000] * (context - 20) for i in range(n)]
        list(sampler.generate(prompts, 40, **SAMPLING))
        sampler.context_lens[:], sampler.num_new[:], sampler.max_new[:] = context, 0, 0     # every replay is the same step
        sampler.cache.block_table[:] = 1 + torch.arange(sampler.cache.block_table.numel(), device="cuda").view_as(
            sampler.cache.block_table) % sampler.usable_blocks
        graph = next(graph for (width, *_), graph in sampler.graphs.items() if width == n)
        step = statistics.median(replay_ms(graph, 30))
        from torch.profiler import ProfilerActivity, profile
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            graph.replay()
            torch.cuda.synchronize()
        kernels = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())
        floor = 1e3 * floor_seconds(model, [[0] * context] * n, [1] * n, kv_bits)
        print(json.dumps({"width": n, "context": context, "kv_bits": kv_bits, "step_ms": round(step, 3), "floor_ms": round(floor, 3),
                          "share": round(floor / step, 3), "kernels": kernels}), flush=True)


def generate_padded(peer, prompts, lengths, batch, **options):
    """transformers: batches in the order given, padded on the left, each until its longest request is done."""
    for a in range(0, len(prompts), batch):
        part, most = prompts[a:a + batch], max(lengths[a:a + batch])
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in part], device=peer.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=peer.device)
        peer.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=most, do_sample=True,
                      pad_token_id=0, **SAMPLING, **options)


class Forced(Sampler):
    """Feeds given tokens instead of sampled ones and keeps the logits. Its window is one step."""

    def _draw(self, hidden, defer=False):
        n, step = len(hidden), len(self.seen)
        self.seen.append(self.model.logits(hidden).cpu())
        self.tokens[:n, 1] = self.given[:n, step]
        self.num_new[:n] = self.max_new[:n]


@torch.inference_mode()
def effect_of_8_bits(model, tokenizer, prompts, length=64):
    """-> share of steps whose most likely token is the same with an 8-bit cache, and mean KL in nats, same tokens fed."""
    logits = []
    for bits in (16, 8):
        sampler = Forced(model, tokenizer, len(prompts), kv_bits=bits, block_size=64, window=1)
        sampler.cuda, sampler.seen = False, []                # no graphs: every step is to be seen
        sampler.given = torch.tensor([p[:1] * (length + 1) for p in prompts], device=model.device)
        if not logits:
            sampler.given.random_(len(tokenizer), generator=torch.Generator(model.device).manual_seed(0))
            given = sampler.given
        sampler.given = given
        list(sampler.generate(prompts, length))
        logits.append(torch.cat(sampler.seen[1:]).double().log_softmax(-1))        # the prefill's are the same
    a, b = logits
    return (a.argmax(-1) == b.argmax(-1)).double().mean().item(), (a.exp() * (a - b)).sum(-1).mean().item()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="tiny", help="folder or hub name")
    p.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    p.add_argument("--requests", type=int, help="default: 256; 48 for a model on a CPU, 1200 for the tiny world")
    p.add_argument("--prompt-tokens", type=int, help="longest prompt (default: 1024; 128 on a CPU)")
    p.add_argument("--new-tokens", type=int, help="longest output (default: 1024; 256 on a CPU)")
    p.add_argument("--batch", type=int, nargs="+", help="batch sizes to try (default: all requests, and a quarter)")
    p.add_argument("--rounds", type=int, default=2, help="runs of each, by turns")
    p.add_argument("--no-peer", action="store_true", help="ours alone")
    p.add_argument("--widths", type=int, nargs="+", help="instead: the time of one decoding step of so many sequences on a GPU")
    p.add_argument("--profile", metavar="FILE", help="also write a chrome trace of our decoding")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="auto: as in sample.py")
    args = p.parse_args(argv)
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    if cuda and args.model == "tiny" and not args.shape:
        args.shape = "qwen3-0.6b"
    if args.shape:
        model, tokenizer = random_model(args.shape, device, choose_dtype(args))
    else:
        model, tokenizer = load_model(args.model, device, choose_dtype(args))
    if args.widths:
        for bits in (16, 8):
            step_times(model, tokenizer, args.widths, kv_bits=bits)
        return
    tiny = not args.shape and is_tiny(model.folder)
    n = args.requests or (256 if cuda else 1200 if tiny else 48)
    prompts, lengths = requests(n, args.prompt_tokens or (1024 if cuda else 128), args.new_tokens or (1024 if cuda else 256),
                                len(tokenizer))
    model.eos_ids = frozenset()                                            # lengths are given
    peer = None
    if not args.no_peer:
        from transformers import AutoModelForCausalLM
        with device:
            peer = AutoModelForCausalLM.from_config(model.config, dtype=model.head.dtype).eval()
        peer.load_state_dict({name if name == "lm_head.weight" else f"model.{name}": p for name, p in model.state_dict().items()}, strict=False)
        peer.tie_weights()
        peer.generation_config.eos_token_id = None
    useful, rows, batches = sum(lengths), {}, args.batch or [n, max(1, n // 4)]
    floor = floor_seconds(model, prompts, lengths)
    print(f"{args.shape or args.model} on {torch.cuda.get_device_name() if cuda else 'a CPU'}, {model.head.dtype}: {n} requests, "
          f"{sum(map(len, prompts)):,} tokens in, {useful:,} out; floor {useful / floor:,.0f} tokens/s", flush=True)

    same, kl = effect_of_8_bits(model, tokenizer, prompts[:8])
    print(f"8-bit cache: same most likely token in {same:.2%} of steps, KL {kl:.1e} nats", flush=True)
    samplers = {}

    def ours(batch, bits=16, again=False):
        if not again:
            samplers.clear()                               # gives its cache's memory back
            samplers[batch, bits] = Sampler(model, tokenizer, batch, bits)
        for _ in samplers[batch, bits].generate(prompts, lengths, **SAMPLING):
            pass
    methods = {}
    for b in batches:
        methods["ours, new sampler", b], methods["ours", b] = (ours, (b,)), (ours, (b, 16, True))
    if cuda:
        methods["ours, 8-bit cache, new sampler", n], methods["ours, 8-bit cache", n] = (ours, (n, 8)), (ours, (n, 8, True))
    if peer:
        static = functools.partial(generate_padded, cache_implementation="static")
        for b in batches:
            methods["transformers", b] = generate_padded, (peer, prompts, lengths, b)
            methods["transformers, static cache", b] = static, (peer, prompts, lengths, b)
    for turn in range(args.rounds):
        for key, (method, arguments) in methods.items():
            if turn and rows[key]["tokens/s"][0] is None:
                continue
            try:
                speed = useful / timed(functools.partial(method, *arguments), device)
            except Exception as error:                     # a peer that does not fit is a result too
                if key[0].startswith("ours"):
                    raise
                rows[key] = {"tokens/s": [None], "failed": f"{type(error).__name__}: {error}".splitlines()[0][:80]}
                continue
            rows.setdefault(key, {"tokens/s": []})["tokens/s"].append(round(speed, 1))
            rows[key]["peak MB"] = round(peak_mb(device))
            print(f"{key[0]}, batch {key[1]}: {speed:,.0f} tokens/s, {speed * floor / useful:.0%} of the floor", flush=True)
            gc.collect()
    samplers.clear()
    best = {}
    for (name, _), row in rows.items():
        speeds = sorted(s for s in row["tokens/s"] if s)
        if speeds:
            best[name] = max(best.get(name, 0), speeds[len(speeds) // 2])
    if args.profile:
        from torch.profiler import profile
        with profile() as trace:
            for _ in Sampler(model, tokenizer, n).generate(prompts, [min(64, k) for k in lengths], **SAMPLING):
                pass
        trace.export_chrome_trace(args.profile)
    print(json.dumps({"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__,
                      "model": args.shape or args.model, "dtype": str(model.head.dtype), "requests": n, "tokens": useful,
                      "floor": round(useful / floor, 1), "runs": [{"method": k[0], "batch": k[1], **row} for k, row in rows.items()],
                      "best": best, "8-bit cache": {"same_top1": same, "kl": kl},
                      **({"ratio": round(best["ours"] / max(v for k, v in best.items() if k.startswith("transformers")), 2)}
                         if any(k.startswith("transformers") for k in best) else {})}))


if __name__ == "__main__":
    main()
