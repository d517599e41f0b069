"""
Prompts -> the student's own traces, out/samples.jsonl.

    python sample.py                                   # the tiny world on a CPU, Qwen3-0.6B on a GPU
    python sample.py --model Qwen/Qwen3-0.6B --prompts my_prompts.jsonl --out runs/mine
    python sample.py --steer none --n 5                # no instruction: the material of rejection sampling

Harmful prompts are asked under a refusal instruction (--steer), benign ones plainly. A row is written
when its trace is finished; a run that was stopped goes on where it was.

As a library: `Sampler(model, tokenizer, slots=64).generate(list_of_ids, ...)` yields a Completion for
each prompt, in order of finishing.
"""
import hashlib
import json
import sys
import time
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from thinksafe import (
    LABELS,
    STEER,
    TINY,
    InputError,
    RowWriter,
    Stage,
    check_trace,
    cli,
    content_id,
    count,
    decode_response,
    encode_prompt,
    generation_defaults,
    is_harmful,
    is_tiny,
    load_decoder,
    model_name,
    pack_ids,
    packed_attention,
    parser,
    pick_dtype,
    read_prompts,
    row_key,
    seed_value,
    steered,
    template_hash,
)


class Completion(NamedTuple):
    index: int            # of the prompt
    tokens: list          # sampled token ids, the closing eos included
    finish_reason: str    # "stop" (eos), "length" (budget or context spent), "prompt_too_long" (no token sampled)


def pick_tokens(logits, u, temperature, top_p, top_k):
    """One token per row by inverting the distribution function at the row's own uniform number.

    logits (n, V) fp32, u (n,) fp64 in [0, 1) -> (n,) int64. Filters in the order of transformers: temperature,
    top_k (0 for all), then the smallest set of most likely tokens whose probability reaches top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k == 0 and top_p >= 1:
        ids, p = None, (logits / temperature).softmax(-1).double()
    else:
        best, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), sorted=True)     # (n, k), falling
        p = (best / temperature).softmax(-1).double()
        p = p.where(p.cumsum(-1) - p < top_p, 0)                       # what came before had not reached top_p yet
    cdf = p.cumsum(-1)
    cdf = cdf / cdf[:, -1:]                    # ends in exactly 1, and u < 1: the place is always a token of the set
    place = torch.searchsorted(cdf, u[:, None], right=True)
    return (place if ids is None else ids.gather(-1, place)).squeeze(-1)


def uniforms(seed, key, n):
    """The row's own stream of n fp64 numbers in [0, 1): it depends on seed and key, not on the batch."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return torch.rand(n, generator=torch.Generator().manual_seed(int.from_bytes(digest) >> 1), dtype=torch.float64)


class Sampler:
    """Batched generation over a preallocated KV cache with continuous refill.

    The first n of the `slots` rows of every tensor below are busy. A finished row is overwritten by the
    last busy one, so that all work is on contiguous slices; the next prompt takes the place behind them."""

    def __init__(self, model, tokenizer, slots=64):
        self.model, self.tokenizer, self.slots = model, tokenizer, slots          # the tokenizer is for callers

    def _allocate(self, capacity, budget):
        """Room for `capacity` tokens and `budget` sampled ones per slot; fewer slots where the GPU's memory is short."""
        c, device, dtype, slots = self.model.config, self.model.device, self.model.head.dtype, self.slots
        self.k = self.v = None
        if device.type == "cuda":
            per_slot = 2 * c.num_hidden_layers * c.num_key_value_heads * capacity * c.head_dim * dtype.itemsize
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            slots = max(1, min(slots, int(0.8 * (torch.cuda.mem_get_info(device)[0] + cached)) // per_slot))
            if slots < self.slots:
                print(f"sampler: {slots} slots of {capacity} tokens fit in memory, not {self.slots}", file=sys.stderr)
        shape = c.num_hidden_layers, slots, c.num_key_value_heads, capacity, c.head_dim
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.length = torch.zeros(slots, device=device, dtype=torch.long)          # tokens whose k and v are cached
        self.index = torch.zeros_like(self.length)                                 # of the prompt
        self.made = torch.zeros_like(self.length)                                  # sampled tokens
        self.limit = torch.zeros_like(self.length)                                 # most tokens to sample
        self.tokens = torch.zeros(slots, budget, device=device, dtype=torch.long)
        self.u = torch.zeros(slots, budget, device=device, dtype=torch.float64)
        self.busy = 0

    def _prefill(self, prompts):
        """Run the prompts as one pack, filling the slots behind the busy ones -> logits of their last tokens (B, V)."""
        device = self.model.device
        tokens, cu = pack_ids(prompts, device)
        lengths = cu.diff()
        slot = torch.arange(self.busy, self.busy + len(prompts), device=device).repeat_interleave(lengths)   # (T,)
        positions = torch.arange(len(tokens), device=device) - cu[:-1].repeat_interleave(lengths)
        packed = packed_attention(cu)

        def attend(layer, q, k, v):
            self.k[layer][slot, :, positions], self.v[layer][slot, :, positions] = k, v
            return packed(layer, q, k, v)
        hidden = self.model(tokens, positions=positions, attend=attend)
        self.length[self.busy:self.busy + len(prompts)] = lengths
        return self.model.logits(hidden[cu[1:] - 1])

    def _decode(self):
        """One more token for each busy slot -> logits (n, V)."""
        n = self.busy
        rows, length = torch.arange(n, device=self.model.device), self.length[:n]
        last = self.tokens[rows, self.made[:n] - 1]
        reach = int(length.max()) + 1
        mask = (torch.arange(reach, device=self.model.device) <= length[:, None])[:, None, None]      # (n, 1, 1, reach)

        def attend(layer, q, k, v):
            self.k[layer][rows, :, length], self.v[layer][rows, :, length] = k, v
            # The G query heads of a kv head stand where SDPA expects query positions: no copy of k and v per head.
            heads = q.unflatten(1, (k.shape[1], -1))                                                  # (n, Hkv, G, d)
            k, v = self.k[layer, :n, :, :reach], self.v[layer, :n, :, :reach]
            return F.scaled_dot_product_attention(heads, k, v, attn_mask=mask).flatten(1, 2)
        hidden = self.model(last, positions=length, attend=attend)
        self.length[:n] += 1
        return self.model.logits(hidden)

    def _release(self, slot):
        """Free a slot: the last busy one moves in."""
        self.busy = last = self.busy - 1
        if slot != last:
            n = int(self.length[last])
            for cache in (self.k, self.v):
                cache[:, slot, :, :n] = cache[:, last, :, :n]
            for x in (self.length, self.index, self.made, self.limit, self.tokens, self.u):
                x[slot] = x[last]

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.6, top_p=0.95, top_k=20, seed=0, keys=None):
        """Yield a Completion per prompt, in order of finishing.

        prompts: lists of token ids. keys: one string per prompt that names its random stream (default: its index);
        with the same seed and key a prompt gets the same draws in whatever batch and order it runs.
        Raises InputError when the model's logits are not finite."""
        context = self.model.config.max_position_embeddings
        keys = keys or [str(i) for i in range(len(prompts))]
        waiting = []
        for i, prompt in enumerate(prompts):
            if 0 < len(prompt) < context:
                waiting.append(i)
            else:
                yield Completion(i, [], "prompt_too_long")
        if not waiting:
            return
        limits = {i: min(max_new_tokens, context - len(prompts[i])) for i in waiting}
        self._allocate(max(len(prompts[i]) + limits[i] for i in waiting), max(limits.values()))
        eos = torch.tensor(sorted(self.model.eos_ids), dtype=torch.long, device=self.model.device)
        waiting.reverse()
        while waiting or self.busy:
            first = 0
            if waiting and self.busy < len(self.length):               # refill: these rows get their first token
                new = [waiting.pop() for _ in range(min(len(waiting), len(self.length) - self.busy))]
                logits, first = self._prefill([prompts[i] for i in new]), self.busy
                self.busy += len(new)
                self.index[first:self.busy] = torch.tensor(new)
                self.limit[first:self.busy] = torch.tensor([limits[i] for i in new])
                self.made[first:self.busy] = 0
                for slot, i in enumerate(new, first):
                    self.u[slot, :limits[i]] = uniforms(seed, keys[i], limits[i])
            else:
                logits = self._decode()
            if not torch.isfinite(logits).all():
                bad = self.index[first:self.busy][~torch.isfinite(logits).all(-1)]
                raise InputError(f"the model's logits are nan or infinite on prompt {keys[bad[0]]}; "
                                 "its weights are damaged, or try --dtype float32")
            rows, made = torch.arange(first, self.busy, device=logits.device), self.made[first:self.busy]
            token = pick_tokens(logits, self.u[rows, made], temperature, top_p, top_k)
            self.tokens[rows, made] = token
            made += 1                                                  # a view: counts in self.made
            stopped = torch.isin(token, eos)
            # From the top, because a release moves the last busy slot down.
            for i in reversed((stopped | (made >= self.limit[rows])).nonzero().flatten().tolist()):
                slot = first + i
                tokens = self.tokens[slot, :int(self.made[slot])].tolist()
                done = Completion(int(self.index[slot]), tokens, "stop" if stopped[i] else "length")
                self._release(slot)
                yield done


# ---------------------------------------------------------------------------------------------


def sampling_options(args, model, earlier=None):
    """{temperature, top_p, top_k, max_new_tokens}: the flag, else what an earlier stage used, else the model's
    generation_config.json (without its max_new_tokens, a demo's length), else the paper's."""
    paper = {"temperature": 0.6, "top_p": 0.95, "top_k": 20 if model.config.raw["model_type"] == "qwen3" else 0,
             "max_new_tokens": 256 if is_tiny(model.folder) else 16384}
    own = {k: v for k, v in generation_defaults(model.folder).items() if k != "max_new_tokens"}
    options = {}
    for name, default in paper.items():
        options[name] = getattr(args, name)
        if options[name] is None:
            options[name] = (earlier or {}).get(name, own.get(name, default))
    t, p, k, n = options.values()
    if not (isinstance(t, int | float) and (t == 0 or 0.001 <= t <= 100) and isinstance(p, int | float) and 0 < p <= 1
            and type(k) is int and k >= 0 and type(n) is int and n >= 1):
        raise InputError(f"sampling with {options}: need temperature 0 or 0.001 to 100, top_p above 0 up to 1, top_k >= 0, "
                         f"max_new_tokens >= 1 (flags, or {model.folder}/generation_config.json)")
    return options


def add_sampling_flags(p):
    g = p.add_argument_group("sampling (default: what an earlier stage used, the model's generation_config.json, the paper's)")
    g.add_argument("--temperature", type=float, help="0 for the most likely token; paper 0.6")
    g.add_argument("--top-p", type=float, help="paper 0.95")
    g.add_argument("--top-k", type=int, help="0 for all; paper 20 (Qwen3), 0 (R1)")
    g.add_argument("--max-new-tokens", type=count, help="paper 16384; tiny world 256")
    g.add_argument("--slots", type=count, default=64, help="sequences decoded at a time")
    g.add_argument("--seed", type=seed_value, help="of the random draws (default: 0; later stages take over that of sample.py)")


def main():
    p = parser(__doc__)
    p.add_argument("--model", default="auto", help="student: auto, tiny, a Hugging Face folder, or a hub name")
    p.add_argument("--prompts", help="JSONL file: instruction, prompt_label, optionally id (default: the tiny world's)")
    p.add_argument("--steer", choices=STEER, default="default", help="wording of the refusal instruction on harmful prompts")
    p.add_argument("--n", type=count, default=1, help="traces per prompt")
    p.add_argument("--limit", type=count, help="only the first LIMIT prompts")
    add_sampling_flags(p)
    args = p.parse_args()
    args.seed = args.seed or 0

    prompts = read_prompts(args.prompts or TINY / "prompts.jsonl")[:args.limit]
    name = model_name(args.model)
    model, tokenizer = load_decoder(name, args.device, pick_dtype(args))
    options = sampling_options(args, model)
    stage = Stage("sample", args, {
        "model": model.hash, "template": template_hash(tokenizer), "prompts": content_id(json.dumps(prompts)),
        "steer": args.steer, "wording": STEER[args.steer], "n": args.n, "seed": args.seed, "dtype": str(model.head.dtype),
        **options}, "samples.jsonl", model=name)
    if not args.prompts and not is_tiny(name):
        print(f"prompts: those of the tiny world, {len(prompts)}; name yours with --prompts", file=sys.stderr)
    writer = RowWriter(args.out / "samples.jsonl")
    for i, row in enumerate(writer.rows, 1):
        check_trace(row, f"{writer.path}:{i}")
    done = {row_key(row) for row in writer.rows}
    todo = [(row, k) for row in prompts for k in range(args.n) if (row["id"], k) not in done]
    steer = {label: args.steer if is_harmful(label) else "none" for label in LABELS}
    ids = [encode_prompt(tokenizer, steered(row["instruction"], steer[row["prompt_label"]])) for row, _ in todo]
    keys = [f"{row['id']}/{k}" for row, k in todo]

    total = len(prompts) * args.n
    counts = Counter(row["finish_reason"] for row in writer.rows)
    tokens = sum(row["n_tokens"] for row in writer.rows)
    with tqdm(total=total, initial=len(done), unit="trace", desc="sample", disable=None) as bar:
        for c in Sampler(model, tokenizer, args.slots).generate(ids, seed=args.seed, keys=keys, **options):
            row, k = todo[c.index]
            writer.write({**row, "response": decode_response(tokenizer, c.tokens, model.eos_ids), "k": k, "seed": args.seed,
                          "steer": steer[row["prompt_label"]], "finish_reason": c.finish_reason, "n_tokens": len(c.tokens)})
            counts[c.finish_reason] += 1
            tokens += len(c.tokens)
            bar.update()
            bar.set_postfix_str(f"{tokens / (time.time() - stage.started):,.0f} tokens/s")
    if counts["prompt_too_long"]:
        print(f"{counts['prompt_too_long']} prompts do not fit the model's context; they have no trace", file=sys.stderr)
    stage.finish(f"sampled {total} traces of {len(prompts)} prompts, {tokens:,} tokens", args.out / "samples.jsonl",
                 f"python guard.py --out {args.out}", rows=total, tokens=tokens,
                 **{f"finish_{k}": v for k, v in sorted(counts.items())})


if __name__ == "__main__":
    cli(main)
