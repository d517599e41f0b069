"""
Prompts -> the student's own traces, out/samples.jsonl.

    python sample.py                                # the tiny world on a CPU, Qwen3-0.6B on a GPU
    python sample.py --model Qwen/Qwen3-0.6B --prompts safechain --out runs/mine
    python sample.py --prompts strongreject.csv --label vanilla_harmful   # a file without labels
    python sample.py --steer none --n 5             # no instruction: for rejection sampling
    python sample.py --shard 2/4 --out out/shard-2  # a quarter of the prompts

Harmful prompts are asked under a refusal instruction (--steer), benign prompts plainly. A row is
written as soon as its trace is finished. A run that was stopped goes on where it was.
"""
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from data.chat import decode_continuation, decode_response, encode_prompt, template_hash
from data.columns import add_column_flags
from data.generation import sampling_options
from data.rows import TRACE_KEYS, RowWriter, content_id, rows_to_do
from data.run_record import Stage
from data.sources import add_shard_flag, label_counts, owns, prompt_rows, take_versions
from thinksafe import (
    REFUSAL_INSTRUCTIONS, TINY, InputError, add_refusal_instruction, choose_dtype, cli, is_harmful,
    is_tiny, load_model, make_parser, pack_ids, positive, progress, seed_value)

from cpu_linear import machine_memory
from kv_cache import ContiguousKVCache, PagedKVCache, cache_bytes, default_block_size
from sample_tokens import NOT_FINITE, NOT_FOUND, Slots, draw_tokens, uniforms

class Completion(NamedTuple):
    index: int                       # of the prompt
    tokens: list                     # sampled ids, the closing eos included
    finish_reason: str               # stop (eos), length (limit, context, cache), prompt_too_long

@dataclass(eq=False)
class Sequence:
    index: int                       # of the prompt
    prompt: tuple                    # token ids
    max_tokens: int                  # to sample
    key: str                         # names the random stream
    u: torch.Tensor | None = None    # the stream: a number in [0, 1) for each token
    tokens: list = field(default_factory=list)       # sampled up to now

    def __len__(self):
        return len(self.prompt) + len(self.tokens)

class Sampler:
    """Batched generation over a preallocated key-value cache with continuous refill.

    The i-th running sequence has slot i of the cache. A step samples one token for each of them and
    reads nothing back. After a window of steps the tokens are read back, finished sequences leave,
    and waiting ones come in if enough slots are free.

    On a GPU the cache is in blocks of `block_size` tokens (kernels/kv_cache.py). Where no block is
    left, the sequence with the fewest sampled tokens is preempted: it goes on later from what it
    has. A step is a CUDA graph, one for each power of two of running sequences. Cache and graphs
    serve further calls of `generate`.

    max_num_seqs: slots, at most; a CPU has no more than half of its memory holds. kv_bits: 16 (the
    model's dtype) or 8. num_blocks: the largest number of blocks (default: what fits the GPU's free
    memory, elsewhere half of the machine's)."""

    def __init__(self, model, tokenizer, max_num_seqs=256, kv_bits=16, block_size=None,
                 num_blocks=None, window=None):
        self.model, self.tokenizer = model, tokenizer
        self.max_num_seqs, self.kv_bits, self.num_blocks = max_num_seqs, kv_bits, num_blocks
        self.cache = None
        self.cuda = model.device.type == "cuda"
        self.block_size = block_size or default_block_size(model.device)
        self.draw_device = model.device if self.cuda else torch.device("cpu")    # Macs lack fp64
        self.window = window or (16 if self.cuda else 1)
        self.prefill_tokens = 16384 if self.cuda else 4096               # in one pass, at most
        model.prepack_weights()

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.6, top_p=0.95, top_k=20, seed=0,
                 keys=None):
        """Yield a Completion for each prompt (a list of token ids), in order of finishing.

        max_new_tokens: a number, or a list of one for each prompt. keys: for each prompt a string
        that names the random stream (default: the index). With the same seed and key a prompt gets
        the same draws in any batch and order. When the GPU's memory runs out this goes on with half
        as many slots, and says so. Raises InputError when logits are not finite, or the memory is
        too small for one slot."""
        self.options, self.seed = (temperature, top_p, top_k), seed
        self.waiting, self.running, finished = [], [], []
        for i, prompt in enumerate(prompts):
            limit = max_new_tokens[i] if isinstance(max_new_tokens, list) else max_new_tokens
            room = self.model.config.max_position_embeddings - len(prompt)
            seq = Sequence(i, tuple(prompt), min(limit, room), keys[i] if keys else str(i))
            (self.waiting if prompt and room > 0 else finished).append(seq)
        self.waiting.sort(key=lambda seq: (len(seq), -seq.index))        # the last one runs first
        longest = max((len(seq.prompt) + seq.max_tokens for seq in self.waiting), default=0)
        if not self.block_size or self.cache and longest > self.max_context_len:
            self.cache = None                                  # a new one
        for slot in range(self.slots if self.cache else 0):
            self.cache.free(slot)                              # of a call that was abandoned
        while True:
            for seq in finished:
                reason = "length" if seq.tokens else "prompt_too_long"
                reason = "stop" if set(seq.tokens[-1:]) & self.model.eos_ids else reason
                yield Completion(seq.index, seq.tokens, reason)
            if not self.waiting and not self.running:
                return
            finished = None
            try:
                finished = self._advance()
            except torch.OutOfMemoryError:
                pass                         # leaving the handler frees the failed pass's tensors
            if finished is None:
                if self.max_num_seqs == 1:
                    raise InputError("the GPU's memory is too small for one sequence; use a "
                                     "smaller model")
                self.waiting += reversed(self.running)
                self.cache, self.running, finished = None, [], []
                self.max_num_seqs //= 2
                self.prefill_tokens //= 2
                print(f"sampler: out of GPU memory, going on with {self.max_num_seqs} slots",
                      file=sys.stderr)

    def _advance(self):
        """Prefill what there is room for, else decode a window -> the finished sequences."""
        if self.cache is None:
            self._allocate()
        batch = self._schedule_prefill()
        if batch:
            self._prefill(batch)
        elif self.running:
            self._allocate_blocks()
            self._decode()
        else:                                # the next one needs more than the whole cache
            return [self.waiting.pop()]
        finished = [slot for slot, seq in enumerate(self.running)
                    if len(seq.tokens) == seq.max_tokens or seq.tokens[-1] in self.model.eos_ids]
        return [self._free_slot(slot) for slot in reversed(finished)]    # the last one moves down

    def _allocate(self):
        """Allocate the cache for the sequences that wait, and what the steps of a window share."""
        c, n, device = self.model.config, self.max_num_seqs, self.model.device
        dtype, int8 = self.model.head.dtype, self.kv_bits == 8
        self.max_context_len = max(len(seq.prompt) + seq.max_tokens for seq in self.waiting)
        unit_bytes = cache_bytes(c, self.block_size or self.max_context_len, dtype, int8)
        self.graphs, self.graph_pool = {}, None
        self.eos = torch.tensor(sorted(self.model.eos_ids), device=self.draw_device).long()
        if self.block_size:
            max_blocks = self._blocks_for(self.max_context_len)
            free = self._bytes_for_cache() if self.cuda else machine_memory() // 2
            num_blocks = min(n * max_blocks + 1, free // unit_bytes)     # block 0: for empty slots
            num_blocks = min(num_blocks, self.num_blocks or num_blocks)
            if num_blocks < 2:
                raise torch.OutOfMemoryError
            self.usable_blocks = num_blocks - 1
            self.cache = PagedKVCache(c, n, max_blocks, dtype, device, num_blocks,
                                      self.block_size, int8)
        else:
            n = min(n, len(self.waiting))
            if n * unit_bytes > machine_memory() / 2:          # on a CPU nothing is preempted
                n = max(1, machine_memory() // 2 // unit_bytes)
                print(f"sampler: {n} slots, as one may take {unit_bytes / 1e9:.1f} GB",
                      file=sys.stderr)
            self.cache = ContiguousKVCache(c, n, self.max_context_len, dtype)
        self.slots = n
        device = self.draw_device
        self.rows = torch.arange(n, device=device)
        # Of each slot: tokens before the window, tokens to sample in it, tokens sampled in it, and
        # what was drawn last. A CUDA graph reads and writes these very tensors; see Slots.
        self.state = torch.zeros(4, n, device=device, dtype=torch.long)
        self.context_lens, self.max_new, self.num_new, self.last_draw = self.state        # views
        self.tokens = torch.zeros(n, self.window + 2, device=device, dtype=torch.long)
        self.u = torch.zeros(n, self.window + 1, device=device, dtype=torch.float64)

    def _bytes_for_cache(self):
        """Return the bytes for the cache: what the GPU has left beside twice a prefill and step."""
        device = self.model.device
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        # A sequence may come again with all of its tokens, and a later call with longer prompts.
        n = min(self.prefill_tokens, self.max_num_seqs * self.max_context_len)
        tokens, cu = pack_ids([[0] * n], device)
        hidden = self.model(tokens, cu)
        logits = self.model.logits(hidden[:1].expand(self.max_num_seqs, -1))     # in fp32
        needed = torch.cuda.max_memory_allocated(device) - before
        del tokens, cu, hidden, logits
        torch.cuda.empty_cache()
        return max(0, int(0.95 * torch.cuda.mem_get_info(device)[0] - 2 * needed))

    def _blocks_for(self, length):
        """Return how many blocks hold a sequence of that length and the window after it."""
        return math.ceil((length + self.window) / self.block_size) if self.block_size else 0

    def _allocate_blocks(self):
        """Give each running sequence the blocks for a window. Where there are too few, the sequence
        with the fewest sampled tokens is preempted."""
        while self.block_size:
            blocks = [self._blocks_for(len(seq)) for seq in self.running]
            if sum(blocks) <= self.usable_blocks:
                for slot, n in enumerate(blocks):
                    self.cache.allocate(slot, n)
                return
            sampled = [len(seq.tokens) for seq in self.running]
            if len(sampled) == 1:                              # it has the whole cache: it ends
                self.running[0].max_tokens = sampled[0]
                return
            self.waiting.append(self._free_slot(sampled.index(min(sampled))))

    def _free_slot(self, slot):
        """Free a slot, and move the last running sequence there -> the Sequence that was in it."""
        seq, last = self.running[slot], self.running.pop()
        if seq is not last:
            self.cache.move(len(self.running), slot, len(last))
            self.running[slot] = last
        self.cache.free(len(self.running))
        return seq

    def _schedule_prefill(self):
        """Take the waiting sequences that there is room for now -> list of Sequence."""
        batch, tokens = [], 0
        free_slots = self.slots - len(self.running)
        if self.running and free_slots <= self.slots // 16:
            return batch                                       # few at a time would be slow
        free_blocks = len(self.cache.free_blocks) - len(self.running)    # each may want one soon
        while self.waiting and len(batch) < free_slots:
            tokens += len(self.waiting[-1])
            free_blocks -= self._blocks_for(len(self.waiting[-1]))
            if batch and tokens > self.prefill_tokens or self.block_size and free_blocks < 0:
                break
            batch.append(self.waiting.pop())
        return batch

    def _prefill(self, batch):
        """Run a batch of sequences in the slots behind the running ones."""
        device, first = self.model.device, len(self.running)
        self.running += batch
        for slot, seq in enumerate(batch, first):
            self.cache.allocate(slot, self._blocks_for(len(seq)))
            # The last window may reach past the last token: it needs spare numbers.
            seq.u = uniforms(self.seed, seq.key, seq.max_tokens + self.window)
        self.cache.upload_block_table()
        tokens, cu = pack_ids([(*seq.prompt, *seq.tokens) for seq in batch], device)
        slots = torch.arange(first, len(self.running)).repeat_interleave(cu.diff())      # (T,)
        positions = torch.arange(len(tokens)) - cu[:-1].repeat_interleave(cu.diff())     # (T,)
        write = self.cache.writer(slots.to(device), positions.to(device))
        # Not `write` itself: for a PagedWriter the kernel would leave no k and v to attend to.
        hidden = self.model(tokens, cu, store=lambda *args: write(*args), at=cu[1:].to(device) - 1)
        self._begin_window(batch)
        self._draw(hidden)
        self._end_window(batch)

    def _begin_window(self, seqs):
        """Tell the device what the steps of a window need to know of some sequences. The slots
        behind them are empty: what they compute, from one token, is harmless."""
        n, w = len(seqs), self.window
        state = [[len(seq), min(w, seq.max_tokens - len(seq.tokens)), 0, 0] for seq in seqs]
        state += [[1, 0, 0, 0]] * (self.slots - n)
        self.state.copy_(torch.tensor(state).T)
        self.tokens[:n, 0] = torch.tensor([(seq.tokens or seq.prompt)[-1] for seq in seqs])
        self.u[:n, :w] = torch.stack([seq.u[len(seq.tokens):][:w] for seq in seqs])

    def _end_window(self, seqs):
        """Read back what was sampled. Raises InputError if logits were not finite."""
        _, _, num_new, last_draw = self.state[:, :len(seqs)].tolist()
        if NOT_FINITE in last_draw:
            raise InputError("the model's logits are nan or infinite on prompt "
                             f"{seqs[last_draw.index(NOT_FINITE)].key}; its weights are damaged, "
                             "or try --dtype float32")
        for seq, n, tokens in zip(seqs, num_new, self.tokens.tolist()):
            seq.tokens += tokens[1:n + 1]

    def _decode(self):
        """Sample a window of tokens for all running sequences."""
        # Few widths, so few graphs and plans of oneDNN: powers of two, on a CPU multiples of 16.
        n = len(self.running)
        n = 1 << (n - 1).bit_length() if self.cuda or n <= 8 else 16 * math.ceil(n / 16)
        n = min(n, self.slots)
        self.cache.upload_block_table()
        self._begin_window(self.running)
        key = n, self.options
        for _ in range(self.window):
            if not self.cuda:
                self._step(n)
            elif key in self.graphs:
                self.graphs[key].replay()
            else:
                self._step(n, defer=True)                      # a real step, and the warm-up
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.graph_pool):
                    self._step(n, defer=True)
                self.graphs[key] = graph
                self.graph_pool = self.graph_pool or graph.pool()
        if self.cuda and (self.last_draw[:len(self.running)] == NOT_FOUND).any():      # seldom
            self._step(n)                                      # one more than the window
        self._end_window(self.running)

    def _step(self, n, defer=False):
        """Sample one more token for each of the first n slots that is not finished."""
        num_new, rows, device = self.num_new[:n], self.rows[:n], self.model.device
        context_lens = (self.context_lens[:n] + num_new).to(device)    # the last token included
        store = self.cache.writer(rows.to(device), context_lens - 1)
        attention = self.cache.attention(context_lens)
        last_tokens = self.tokens[rows, num_new].to(device)    # (n,)
        hidden = self.model(last_tokens, positions=context_lens - 1, store=store,
                            attend=lambda layer, q, *kv: attention(layer, q))
        self._draw(hidden, defer)

    def _draw(self, hidden, defer=False):
        """Sample a token for each of the first n slots, from hidden (n, D)."""
        n = len(hidden)
        logits = self.model.logits(hidden, hidden.dtype).to(self.draw_device)    # (n, V)
        slots = Slots(*self.state[1:, :n], self.tokens[:n], self.u[:n])
        draw_tokens(logits, slots, self.eos, *self.options, defer=defer)

# --------------------------------------------------------------------------------------------------
# What other stages use too

def sample_traces(model, tokenizer, rows, max_num_seqs, kv_bits=16, *, seed, **options):
    """Yield the rows with their traces (n_prompt_tokens, response, finish_reason, n_tokens, `eos`:
    the token that ended it, if one did), in order of finishing.

    rows: prompts, each with a sample number `k`, and with `steer`, the wording of a refusal
    instruction, if any. The draws depend on (seed, id, k). options: see generate."""
    prompts = [encode_prompt(tokenizer, add_refusal_instruction(
        row["instruction"], row.get("steer", "none"))) for row in rows]
    keys = [f"{row['id']}/{row['k']}" for row in rows]
    sampler = Sampler(model, tokenizer, max_num_seqs, kv_bits)
    for c in sampler.generate(prompts, seed=seed, keys=keys, **options):
        eos = decode_continuation(tokenizer, c.tokens[-1:])
        yield {**rows[c.index], "n_prompt_tokens": len(prompts[c.index]),
               "response": decode_response(tokenizer, c.tokens, model.eos_ids),
               "finish_reason": c.finish_reason, "n_tokens": len(c.tokens),
               **({"eos": eos} if c.finish_reason == "stop" else {})}

def add_sampling_flags(p):
    g = p.add_argument_group("sampling (default: as an earlier stage, the model's "
                             "generation_config.json, the paper)")
    g.add_argument("--temperature", type=float, help="0: the most likely token; paper 0.6")
    g.add_argument("--top-p", type=float, help="share of the probability drawn from; paper 0.95")
    g.add_argument("--top-k", type=int, help="tokens drawn from, 0: all; paper 20 (Qwen3), 0 (R1)")
    g.add_argument("--max-new-tokens", type=positive,
                   help="longest trace, tokens; paper 16384, tiny world 256")
    g.add_argument("--slots", type=positive, default=256, help="sequences decoded at a time")
    g.add_argument("--seed", type=seed_value, help="of the random draws (default: 0; later stages "
                   "take over that of sample.py)")

# --------------------------------------------------------------------------------------------------
# The stage

def parse_args():
    p = make_parser(__doc__)
    p.machine.add_argument("--kv-bits", type=int, choices=(16, 8), default=16,
                           help="8: the cache as int8, on a GPU; half the memory")
    g = p.add_argument_group("prompts and traces")
    g.add_argument("--model", default="auto",
                   help="student: auto, tiny, a Hugging Face folder, or a hub name")
    g.add_argument("--prompts", help="a set of data/sources.py, such as safechain; a .jsonl .json "
                   ".csv .tsv .parquet file or URL; or owner/name[:config[:split]][@revision] on "
                   "the hub (default: the tiny world's)")
    add_column_flags(g)
    g.add_argument("--steer", choices=REFUSAL_INSTRUCTIONS, default="default",
                   help="wording of the refusal instruction on harmful prompts")
    g.add_argument("--n", type=positive, default=1, help="traces per prompt")
    g.add_argument("--limit", type=positive, help="only the first LIMIT prompts")
    add_sampling_flags(p)
    add_shard_flag(p)
    args = p.parse_args()
    args.seed = args.seed or 0
    if args.kv_bits == 8 and torch.device(args.device).type != "cuda":
        raise InputError("--kv-bits 8 is for a GPU; on a CPU the cache is in the model's dtype")
    return args

def main():
    args = parse_args()
    source = args.prompts or TINY / "prompts.jsonl"
    prompts = prompt_rows(source, args.label, args.prompt_column)[:args.limit]
    model, tokenizer = load_model(args.model, args.device, choose_dtype(args), args.quantize)
    options = sampling_options(args, model)
    stage = Stage("sample", args, "samples.jsonl", {
        "model": model.hash, "template": template_hash(tokenizer),
        "prompts": content_id(json.dumps(prompts)), "steer": args.steer,
        "wording": REFUSAL_INSTRUCTIONS[args.steer], "n": args.n, "seed": args.seed,
        "dtype": str(model.head.dtype), "kv_bits": args.kv_bits, "shard": args.shard, **options,
    }, model=model.name, sources=take_versions())
    prompts = [row for row in prompts if owns(args.shard, row["id"])]
    print(f"prompts: {label_counts(prompts)}")
    if not args.prompts and not is_tiny(model.name):
        print("prompts: those of the tiny world; name yours with --prompts", file=sys.stderr)

    writer = RowWriter(stage.path, TRACE_KEYS)
    rows, asked = writer.rows, []
    for row in prompts:
        steer = args.steer if is_harmful(row["prompt_label"]) else "none"
        asked += [{**row, "k": k, "seed": args.seed, "steer": steer} for k in range(args.n)]
    todo = rows_to_do(stage.path, rows, asked)
    with progress("sample", len(rows) + len(todo), "trace", len(rows)) as advance:
        for trace in sample_traces(model, tokenizer, todo, args.slots, args.kv_bits,
                                   seed=args.seed, **options):
            writer.write(trace)
            rows.append(trace)
            advance(tokens=trace["n_tokens"])

    reasons = Counter(row["finish_reason"] for row in rows)
    tokens = sum(row["n_tokens"] for row in rows)
    if reasons["prompt_too_long"]:
        print(f"{reasons['prompt_too_long']} prompts do not fit the context or the memory and have "
              "no trace", file=sys.stderr)
    stage.finish(f"sampled {len(rows)} traces of {len(prompts)} prompts, {tokens:,} tokens",
                 stage.path, f"python guard.py --out {args.out}", rows=len(rows), tokens=tokens,
                 **{f"finish_{k}": n for k, n in sorted(reasons.items())})

if __name__ == "__main__":
    cli(main)
