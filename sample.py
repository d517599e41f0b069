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
from collections import Counter
from types import SimpleNamespace
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
    cli,
    content_id,
    decode_response,
    encode_prompt,
    generation_defaults,
    is_harmful,
    is_tiny,
    load_decoder,
    model_name,
    packed_attention,
    parser,
    pick_dtype,
    read_prompts,
    row_key,
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
    # Where u * total rounds up to total, the first of the places that reach it is still a token of the set.
    place = torch.minimum(torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True),
                          torch.searchsorted(cdf, cdf[:, -1:].contiguous()))
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
        self.model, self.tokenizer, self.slots = model, tokenizer, slots

    def _allocate(self, capacity, budget):
        c, device, slots = self.model.config, self.model.device, self.slots
        shape = c.num_hidden_layers, slots, c.num_key_value_heads, capacity, c.head_dim
        self.k = torch.zeros(shape, device=device, dtype=self.model.head.dtype)
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
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        cu = F.pad(lengths.cumsum(0), (1, 0))
        slot = torch.arange(self.busy, self.busy + len(prompts), device=device).repeat_interleave(lengths)   # (T,)
        positions = torch.arange(len(slot), device=device) - cu[:-1].repeat_interleave(lengths)
        packed = packed_attention(cu)

        def attend(layer, q, k, v):
            self.k[layer][slot, :, positions], self.v[layer][slot, :, positions] = k, v
            return packed(layer, q, k, v)
        tokens = torch.tensor([t for p in prompts for t in p], device=device)
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
            if waiting and self.busy < self.slots:                     # refill: these rows get their first token
                new = [waiting.pop() for _ in range(min(len(waiting), self.slots - self.busy))]
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
            made += 1
            stopped = torch.isin(token, eos)
            for i in reversed((stopped | (made >= self.limit[rows])).nonzero().flatten().tolist()):
                slot = first + i
                tokens = self.tokens[slot, :int(self.made[slot])].tolist()
                done = Completion(int(self.index[slot]), tokens, "stop" if stopped[i] else "length")
                self._release(slot)
                yield done


# ---------------------------------------------------------------------------------------------


def sampling_options(args, folder):
    """temperature, top_p, top_k, max_new_tokens: the flag, else the model's generation_config.json, else the paper's."""
    own = generation_defaults(folder)
    paper = {"temperature": 0.6, "top_p": 0.95, "top_k": 20 if "qwen3" in str(folder).lower() else 0,
             "max_new_tokens": 256 if is_tiny(folder) else 16384}
    own.pop("max_new_tokens", None)                         # a demo's length, not the method's
    options = {}
    for name, default in paper.items():
        given = getattr(args, name)
        value = given if given is not None else own.get(name, default)
        options[name] = value
    o = SimpleNamespace(**options)
    if o.temperature < 0 or not 0 < o.top_p <= 1 or o.top_k < 0 or o.max_new_tokens < 1 or args.slots < 1:
        raise InputError("need --temperature >= 0, 0 < --top-p <= 1, --top-k >= 0, --max-new-tokens and --slots of at least 1")
    return options


def add_sampling_flags(p):
    g = p.add_argument_group("sampling (default: the model's generation_config.json, else the paper's)")
    g.add_argument("--temperature", type=float, help="0 for the most likely token; paper 0.6")
    g.add_argument("--top-p", type=float, help="paper 0.95")
    g.add_argument("--top-k", type=int, help="0 for all; paper 20 (Qwen3), 0 (R1)")
    g.add_argument("--max-new-tokens", type=int, help="paper 16384; tiny world 256")
    g.add_argument("--slots", type=int, default=64, help="sequences decoded at a time")
    g.add_argument("--seed", type=int, help="of the random draws (default: 0 in sample.py, later stages take over its seed)")


def main():
    p = parser(__doc__)
    p.add_argument("--model", default="auto", help="student: auto, tiny, a Hugging Face folder, or a hub name")
    p.add_argument("--prompts", default=TINY / "prompts.jsonl", help="JSONL file: instruction, prompt_label, optionally id")
    p.add_argument("--steer", choices=STEER, default="default", help="wording of the refusal instruction on harmful prompts")
    p.add_argument("--n", type=int, default=1, help="traces per prompt")
    p.add_argument("--limit", type=int, help="only the first LIMIT prompts")
    add_sampling_flags(p)
    args = p.parse_args()

    args.seed = args.seed or 0
    prompts = read_prompts(args.prompts)[:args.limit]
    name = model_name(args.model)
    model, tokenizer = load_decoder(name, args.device, pick_dtype(args))
    options = sampling_options(args, model.folder)
    todo = [(row, k) for row in prompts for k in range(args.n)]
    if not todo:
        raise InputError("need --n and --limit of at least 1")
    encode_prompt(tokenizer, "")                            # refuses a missing chat template before anything is written
    stage = Stage("sample", args, {
        "model": model.hash, "template": content_id(tokenizer.chat_template), "prompts": content_id(json.dumps(prompts)),
        "steer": args.steer, "n": args.n, "seed": args.seed, **options}, "samples.jsonl")
    stage.save(model=name)
    writer = RowWriter(args.out / "samples.jsonl")
    done = {row_key(row) for row in writer.rows}
    keep = [i for i, (row, k) in enumerate(todo) if (row["id"], k) not in done]
    steer = {label: args.steer if is_harmful(label) else "none" for label in LABELS}

    def encode(row):
        return encode_prompt(tokenizer, STEER[steer[row["prompt_label"]]].replace("{prompt}", row["instruction"]))
    ids = [encode(todo[i][0]) for i in keep]
    keys = [f"{row['id']}/{k}" for row, k in (todo[i] for i in keep)]

    counts = Counter(row["finish_reason"] for row in writer.rows)
    tokens = sum(row["n_tokens"] for row in writer.rows)
    with tqdm(total=len(todo), initial=len(done), unit="trace", desc="sample", disable=None) as bar:
        for c in Sampler(model, tokenizer, args.slots).generate(ids, seed=args.seed, keys=keys, **options):
            row, k = todo[keep[c.index]]
            writer.write({**row, "response": decode_response(tokenizer, c.tokens, model.eos_ids), "k": k, "seed": args.seed,
                          "steer": steer[row["prompt_label"]], "finish_reason": c.finish_reason, "n_tokens": len(c.tokens)})
            counts[c.finish_reason] += 1
            tokens += len(c.tokens)
            bar.update()
            bar.set_postfix_str(f"{tokens:,} tokens")
    if counts["prompt_too_long"]:
        print(f"{counts['prompt_too_long']} prompts do not fit the model's context; they have no trace", file=sys.stderr)
    stage.finish(f"sampled {len(todo)} traces of {len(prompts)} prompts, {tokens:,} tokens", args.out / "samples.jsonl",
                 f"python guard.py --out {args.out}", rows=len(todo), tokens=tokens,
                 **{f"finish_{k}": v for k, v in sorted(counts.items())})


if __name__ == "__main__":
    cli(main)
