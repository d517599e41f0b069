"""
Prompts -> the student's own traces, out/samples.jsonl.

    python sample.py                                   # the tiny world on a CPU, Qwen3-0.6B on a GPU
    python sample.py --model Qwen/Qwen3-0.6B --prompts safechain --out runs/mine
    python sample.py --prompts strongreject.csv --label vanilla_harmful    # a file without a column of labels
    python sample.py --steer none --n 5                # no instruction: the material of rejection sampling
    python sample.py --retries 3                       # after guard.py: once more for prompts without a kept trace
    python sample.py --shard 2/4                       # a quarter of the prompts; three more processes do the others

Harmful prompts are asked under a refusal instruction (--steer), benign ones plainly. A row is written
when its trace is finished; a run that was stopped goes on where it was.

As a library: `Sampler(model, tokenizer, slots=64).generate(list_of_ids, ...)` yields a Completion for
each prompt, in order of finishing.
"""
import hashlib
import json
import math
import sys
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import VERSIONS, label_counts, prompt_rows
from kernels.cache import PagedCache, SlotCache
from thinksafe import (
    LABELS,
    STEER,
    TINY,
    InputError,
    RowWriter,
    Stage,
    add_shard_flag,
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
    owns,
    pack_ids,
    packed_attention,
    parser,
    pick_dtype,
    pinned,
    progress,
    read_run,
    read_shards,
    row_key,
    sampling_cost,
    seed_value,
    split_packs,
    steered,
    template_hash,
)


class Completion(NamedTuple):
    index: int                        # of the prompt
    tokens: list                      # sampled token ids, the closing eos included
    finish_reason: str                # "stop" (eos), "length" (budget, context or memory spent), "prompt_too_long"
    logprobs: list | None = None      # of each token under softmax(logits / temperature), if asked for


NOT_FINITE, NOT_FOUND = -1, -2        # in place of a token


def _place(p, u):
    """Where the running sum of p (n, k) fp64, scaled to end in 1, passes u (n,) -> place (n,), and u's share of that step.

    The sum ends in exactly 1 and u < 1, so the place is never one whose p is 0."""
    cdf = p.cumsum(-1)
    cdf = cdf / cdf[:, -1:]
    place = torch.searchsorted(cdf, u[:, None], right=True).clamp(max=p.shape[-1] - 1)       # nan: k
    high, step = cdf.gather(-1, place)[:, 0], (p / p.sum(-1, keepdim=True)).gather(-1, place)[:, 0]
    return place[:, 0], (1 - (high - u) / step).clamp(0, 1 - 2**-53)


def _topk(x, k):
    """torch.topk over rows of many thousands: the k best lie in the k blocks of 64 with the best maxima."""
    n, V = x.shape
    if V % 64 or V < 64 * 4 * k:
        return x.topk(k)
    blocks = x.view(n, -1, 64)
    place = blocks.amax(-1).topk(k).indices                                                   # (n, k)
    best, i = blocks.gather(1, place[..., None].expand(-1, -1, 64)).flatten(1).topk(k)
    return best, 64 * place.gather(1, i // 64) + i % 64


def pick_tokens(logits, u, temperature, top_p, top_k, most=1024):
    """One token per row by inverting the distribution function at the row's own uniform number.

    logits (n, V) fp32, u (n,) fp64 in [0, 1) -> (n,) int64. Filters in the order of transformers: temperature,
    top_k (0 for all), then the smallest set of most likely tokens whose probability reaches top_p. The
    vocabulary is never sorted: with top_k 0 that set is looked for among the `most` likely tokens, and a row
    whose set is larger is NOT_FOUND (most=V finds all). A row with nan or inf is NOT_FINITE."""
    if temperature == 0:
        best, token = logits.max(-1)
        return token.where(best.isfinite(), NOT_FINITE)
    if top_k == 0 and top_p >= 1:                              # by blocks of 256: few sums in fp64
        p = F.pad((logits / temperature).softmax(-1), (0, -logits.shape[-1] % 256)).unflatten(-1, (-1, 256))
        mass = p.sum(-1, dtype=torch.float64)
        block, rest = _place(mass, u)
        token = 256 * block + _place(p[torch.arange(len(p), device=p.device), block].double(), rest)[0]
        return token.where(mass.sum(-1).isfinite(), NOT_FINITE)
    best, ids = _topk(logits, min(top_k or most, logits.shape[-1]))                           # (n, k), falling
    p = ((best - best[:, :1]) / temperature).exp().double()
    total = p.sum(-1) if top_k else ((logits - best[:, :1]) / temperature).exp().sum(-1, dtype=torch.float64)
    before = p.cumsum(-1) - p
    found = before[:, -1] + p[:, -1] >= top_p * total if ids.shape[-1] < logits.shape[-1] else torch.ones_like(u).bool()
    p = p.where(before < top_p * total[:, None], 0)            # what came before had not reached top_p yet
    token = ids.gather(-1, _place(p, u)[0][:, None])[:, 0]
    return token.where(found, NOT_FOUND).where(best[:, 0].isfinite(), NOT_FINITE)


def uniforms(seed, key, n):
    """The row's own stream of n fp64 numbers in [0, 1): it depends on seed and key, not on the batch."""
    digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest()
    return torch.rand(n, generator=torch.Generator().manual_seed(int.from_bytes(digest) >> 1), dtype=torch.float64)


class Sampler:
    """Batched generation over a preallocated key-value cache with continuous refill.

    Sequences live in slots. The first `busy` slots are at work; when one is finished the last of them moves into
    its place, so that all work is on contiguous slices. A step samples one token for each slot and reads nothing
    back; every `window` steps finished slots are emptied and, when enough of them are, filled again.

    On a GPU the cache is in pages of `page` tokens (kernels/cache.py): a sequence holds what it needs, and where no page
    is left the one with the fewest tokens is put back, to go on later from what it has. A step is a CUDA graph, one for
    each bucket of slots and of reach.

    kv_bits: 16 (the model's dtype) or 8. pages: most pages to hold (default: what fits the GPU's free memory)."""

    def __init__(self, model, tokenizer, slots=64, kv_bits=16, page=None, pages=None, window=None):
        self.model, self.tokenizer, self.slots, self.kv_bits = model, tokenizer, slots, kv_bits     # tokenizer: for callers
        self.cuda = model.device.type == "cuda"
        self.page, self.most_pages = page or (64 if self.cuda else None), pages
        self.window = window or (16 if self.cuda else 1)
        self.prefill_tokens = 16384 if self.cuda else 4096     # in one pass, at most
        model.pack()

    # ---- memory

    def _allocate(self, prompts, limits, logprobs):
        """The cache and the state of each slot, for prompts {index: ids} and the most tokens to sample for each."""
        c, device, dtype, slots = self.model.config, self.model.device, self.model.head.dtype, self.slots
        longest, budget = max(len(p) + limits[i] for i, p in prompts.items()), max(limits.values())
        self.cache, self.graphs, self.graph_pool = None, {}, None
        if self.page:
            most, int8 = self._pages_needed(longest), self.kv_bits == 8
            pages = slots * most + 1                                               # page 0 is for slots without a sequence
            if self.cuda:
                pages = min(pages, self._free_memory(prompts) // PagedCache.page_bytes(c, self.page, dtype, int8))
                if pages < 2:
                    raise torch.OutOfMemoryError
            self.cache = PagedCache(c, slots, most, dtype, device, min(pages, self.most_pages or pages), self.page, int8)
        else:
            self.cache = SlotCache(c, slots, longest, dtype)
        self.rows = torch.arange(slots, device=device)
        self.prompt_length = torch.ones(slots, device=device, dtype=torch.long)
        self.made = torch.zeros_like(self.prompt_length)                           # sampled tokens
        self.limit = torch.zeros_like(self.made)                                   # most tokens to sample
        self.done = torch.ones(slots, device=device, dtype=torch.bool)             # finished, or empty
        self.picked = torch.zeros_like(self.made)                                  # what pick_tokens said last
        self.tokens = torch.zeros(slots, budget + 1, device=device, dtype=torch.long)
        self.u = torch.zeros(slots, budget + 1, device=device, dtype=torch.float64)
        self.hidden = torch.zeros(slots, c.hidden_size, device=device, dtype=dtype)      # of the prompt's last token
        self.logprobs = torch.zeros(slots, budget + 1, device=device) if logprobs else None
        self.index, self.busy = [], 0                                              # prompt of each busy slot

    def _free_memory(self, prompts):
        """Bytes for the cache: what the GPU has left beside a prefill and a step as they were seen to need, both twice."""
        device = self.model.device
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        tokens, cu = pack_ids(split_packs(prompts.values(), len, self.prefill_tokens)[0], device)
        hidden = self.model(tokens, cu)
        logits = self.model.logits(hidden[:1].expand(self.slots, -1))
        pick_tokens(logits, torch.zeros(self.slots, device=device, dtype=torch.float64), *self.options)
        need = torch.cuda.max_memory_allocated(device) - before
        del tokens, cu, hidden, logits
        torch.cuda.empty_cache()
        return max(0, int(0.95 * torch.cuda.mem_get_info(device)[0] - 2 * need))

    def _pages_needed(self, length):
        """Pages for a sequence of that length and the window after it; none without paging."""
        return -(-(length + self.window) // self.page) if self.page else 0

    def _release(self, slot):
        """Empty a slot: the last busy one moves in."""
        self.busy = last = self.busy - 1
        if slot != last:
            self.cache.move(last, slot, int(self.prompt_length[last] + self.made[last]))
            for x in (self.prompt_length, self.made, self.limit, self.done, self.tokens, self.u, self.hidden, self.logprobs):
                if x is not None:
                    x[slot] = x[last]
            self.index[slot] = self.index[last]
        self.index.pop()
        self.done[last], self.made[last], self.prompt_length[last] = True, 0, 1        # what an empty slot computes is harmless
        self.cache.empty(last)

    # ---- one pass of the model

    def _prefill(self, prompts, kept, group, limits, draws):
        """Fill the slots behind the busy ones with prompts {index: ids}, each followed by what was sampled for it before.

        group[index] is the same for equal prompts; one that some slot has already run is copied from there.
        limits[index]: most tokens to sample; draws(index): uniform numbers for them."""
        known = {group[i]: slot for slot, i in enumerate(self.index) if i not in kept}
        packed, copied = {}, {}                                # slot -> ids, slot -> slot
        for slot, (i, ids) in enumerate(prompts.items(), self.busy):
            made, logprobs = kept.get(i, ([], []))
            self.cache.give(slot, self._pages_needed(len(ids) + len(made)))
            if group[i] in known and not made:
                copied[slot] = known[group[i]]
            else:
                packed[slot] = ids + made
                if not made:
                    known[group[i]] = slot
            self.prompt_length[slot], self.made[slot], self.limit[slot], self.done[slot] = len(ids), len(made), limits[i], False
            self.u[slot, :limits[i]] = draws(i)
            self.tokens[slot, :len(made)] = torch.tensor(made, dtype=torch.long)
            if self.logprobs is not None:
                self.logprobs[slot, :len(made)] = torch.tensor(logprobs)
        self.cache.sync()
        if packed:
            tokens, cu = pack_ids(packed.values(), self.model.device)
            lengths = cu.diff()
            new = torch.tensor(list(packed), device=tokens.device)
            slot, attention = new.repeat_interleave(lengths), packed_attention(cu)                  # slot (T,)
            positions = torch.arange(len(tokens), device=tokens.device) - cu[:-1].repeat_interleave(lengths)
            write = self.cache.writer(slot, positions)

            def attend(layer, q, k, v):
                write(layer, k, v)
                return attention(layer, q, k, v)
            self.hidden[new] = self.model(tokens, positions=positions, attend=attend, at=cu[1:] - 1)
        for slot, source in copied.items():
            self.cache.copy(source, slot, int(self.prompt_length[slot]))
            self.hidden[slot] = self.hidden[source]

    def _step(self, n, reach, wait=False):
        """One more token for the first n slots that are not done; no sequence is longer than reach."""
        made, rows = self.made[:n], self.rows[:n]
        position = self.prompt_length[:n] + made - 1           # of the last sampled token
        write, attention = self.cache.writer(rows, position), self.cache.attention(position + 1, reach)

        def attend(layer, q, k, v):
            write(layer, k, v)
            return attention(layer, q)
        self._draw(slice(0, n), self.model(self.tokens[rows, made - 1], positions=position, attend=attend), wait)

    def _draw(self, at, hidden, wait=False):
        """Sample a token for each slot of a slice from its hidden state (n, D); one that is done stays as it is.

        wait: without a look at the result, so that a row that is NOT_FOUND also stays as it is."""
        logits, rows, made, done = self.model.logits(hidden), self.rows[at], self.made[at], self.done[at]
        u = self.u[rows, made]
        token = pick_tokens(logits, u, *self.options)
        if not wait and (token == NOT_FOUND).any():
            token = pick_tokens(logits, u, *self.options, most=logits.shape[-1])
        self.picked[at] = token
        going = (token >= 0) & ~done
        ended = going & ((token[:, None] == self.eos).any(-1) | (made + 1 >= self.limit[at]))
        self.tokens[rows, made] = token.where(going, self.tokens[rows, made])
        if self.logprobs is not None:
            scaled = logits / (self.options[0] or 1)
            chosen = scaled.gather(-1, token.clamp(min=0)[:, None])[:, 0] - scaled.logsumexp(-1)
            self.logprobs[rows, made] = chosen.where(going, self.logprobs[rows, made])
        made += going                                          # views: these count in self.made, self.done
        done |= ended

    def _run(self):
        """`window` steps for all busy slots."""
        reach = int((self.prompt_length + self.made)[:self.busy].max()) + self.window - 1
        self.cache.sync()
        # Few shapes, so few graphs, and on a CPU few plans of oneDNN: 1, 2, 4, 8 slots, multiples of 16, all of them;
        # a reach of 1024, 4096, 16384.
        n = min(1 << (self.busy - 1).bit_length() if self.busy <= 8 else -(-self.busy // 16) * 16, len(self.made))
        if not self.cuda:
            for _ in range(self.window):
                self._step(n, reach)
            return
        reach = max(1024, 4 ** math.ceil(math.log(reach, 4)))   # chunks beyond a sequence's end cost next to nothing
        for _ in range(self.window):
            if (n, reach) in self.graphs:
                self.graphs[n, reach].replay()
                continue
            self._step(n, reach, wait=True)                    # a step like others, and the warm-up of the capture
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.graph_pool):
                self._step(n, reach, wait=True)
            self.graph_pool = self.graph_pool or graph.pool()
            self.graphs[n, reach] = graph
        if (self.picked[:self.busy] == NOT_FOUND).any():       # seldom: the whole vocabulary for those who wait
            self._step(n, reach + 1)                           # one more than the window

    # ---- the loop

    def _admit(self, waiting, prompts, kept):
        """Take from waiting what there is room for -> {index: ids}."""
        new, tokens, free = {}, 0, len(self.cache.free) - self.busy               # each busy slot may want a page soon
        while waiting and self.busy + len(new) < len(self.made):
            length = len(prompts[waiting[-1]]) + len(kept.get(waiting[-1], ([], []))[0])
            tokens, free = tokens + length, free - self._pages_needed(length)
            if new and tokens > self.prefill_tokens or self.page and free < 0:
                break
            i = waiting.pop()
            new[i] = prompts[i]
        return new

    def _grow(self, waiting, kept):
        """Pages for the next window of each busy slot; while they do not suffice the slot with the fewest tokens is put back."""
        while self.page:
            wanted = [self._pages_needed(n) for n in (self.prompt_length + self.made)[:self.busy].tolist()]
            if sum(max(0, n - len(pages)) for n, pages in zip(wanted, self.cache.owned)) <= len(self.cache.free):
                for slot, n in enumerate(wanted):
                    self.cache.give(slot, n)
                return
            if self.busy == 1:                                              # the cache is all its own: it ends here
                self.done[0] = True
                return
            self._put_back(int(self.made[:self.busy].argmin()), waiting, kept)

    def _put_back(self, slot, waiting, kept):
        """A sequence leaves its slot, to go on later from the tokens it has."""
        index, (tokens, logprobs) = self.index[slot], self._sampled(slot)
        kept[index] = tokens, logprobs or []
        waiting.append(index)
        self._release(slot)

    def _sampled(self, slot):
        """-> its tokens, and their log-probabilities or None."""
        made = int(self.made[slot])
        return self.tokens[slot, :made].tolist(), None if self.logprobs is None else self.logprobs[slot, :made].tolist()

    def _finished(self, keys):
        """Completions of the slots that are done, which are emptied."""
        bad = (self.picked[:self.busy] == NOT_FINITE).nonzero()
        if len(bad):
            raise InputError(f"the model's logits are nan or infinite on prompt {keys[self.index[bad[0]]]}; "
                             "its weights are damaged, or try --dtype float32")
        for slot in reversed(self.done[:self.busy].nonzero().flatten().tolist()):      # a release moves the last one down
            tokens, logprobs = self._sampled(slot)
            yield Completion(self.index[slot], tokens, "stop" if tokens[-1] in self.model.eos_ids else "length", logprobs)
            self._release(slot)

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.6, top_p=0.95, top_k=20, seed=0, keys=None, logprobs=False):
        """Yield a Completion per prompt, in order of finishing.

        prompts: lists of token ids; equal ones share a prefill where they can. max_new_tokens: a number, or one per prompt.
        keys: one string per prompt that names its random stream (default: its index); with the same seed and key a prompt
        gets the same draws in whatever batch and order it runs. logprobs: give those of the tokens too.
        When the GPU's memory runs out this goes on with half as many slots, and says so.
        Raises InputError when the model's logits are not finite, or the memory does not do for a single slot."""
        self.options = temperature, top_p, top_k
        self.eos = torch.tensor(sorted(self.model.eos_ids), dtype=torch.long, device=self.model.device)
        context = self.model.config.max_position_embeddings
        keys = keys or [str(i) for i in range(len(prompts))]
        first = {}
        group = [first.setdefault(tuple(p), i) for i, p in enumerate(prompts)]
        most = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
        limits = {i: min(most[i], context - len(p)) for i, p in enumerate(prompts) if 0 < len(p) < context}
        waiting = sorted(limits, key=lambda i: (len(prompts[i]), -i))       # taken from the end: long ones first
        kept = {}                                                           # index -> tokens, logprobs so far
        yield from (Completion(i, [], "prompt_too_long") for i in range(len(prompts)) if i not in limits)
        self.cache, self.busy, self.index = None, 0, []
        while waiting or self.busy:
            new, out_of_memory = {}, False
            try:
                if self.cache is None:
                    self._allocate({i: prompts[i] for i in waiting}, limits, logprobs)
                if not self.busy or waiting and len(self.made) - self.busy > len(self.made) // 16:
                    new = self._admit(waiting, prompts, kept)
                if new:
                    self._prefill(new, kept, group, limits, lambda i: uniforms(seed, keys[i], limits[i]))
                    at = slice(self.busy, self.busy + len(new))
                    self._draw(at, self.hidden[at])
                    self.busy, self.index = at.stop, self.index + list(new)
                elif self.busy:
                    self._grow(waiting, kept)
                    self._run()
            except torch.OutOfMemoryError:
                out_of_memory = True                                        # outside of the handler its tensors are gone
            if out_of_memory:
                if self.busy:                                               # those that have ended before it
                    yield from self._finished(keys)
                waiting += reversed(new)
                while self.busy:
                    self._put_back(self.busy - 1, waiting, kept)
                if self.slots == 1:
                    raise InputError("the GPU's memory does not do for one sequence; use a smaller model")
                self.slots, self.prefill_tokens, self.cache = self.slots // 2, self.prefill_tokens // 2, None
                print(f"sampler: out of GPU memory, going on with {self.slots} slots", file=sys.stderr)
            elif not self.busy:                                             # more than all of the cache
                i = waiting.pop()
                tokens, logs = kept.get(i, ([], []))
                yield Completion(i, tokens, "length" if tokens else "prompt_too_long", logs if logprobs else None)
            else:
                yield from self._finished(keys)


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
    g.add_argument("--temperature", type=float, help="0: always the most likely token; paper 0.6")
    g.add_argument("--top-p", type=float, help="share of the probability that is drawn from; paper 0.95")
    g.add_argument("--top-k", type=int, help="tokens that are drawn from, 0 for all; paper 20 (Qwen3), 0 (R1)")
    g.add_argument("--max-new-tokens", type=count, help="longest trace, tokens; paper 16384, tiny world 256")
    g.add_argument("--slots", type=count, default=64, help="sequences decoded at a time")
    g.add_argument("--seed", type=seed_value, help="of the random draws (default: 0; later stages take over that of sample.py)")


def rejected(guarded, prompts, done, most):
    """[(prompt, number of its traces), ...] of the prompts that have fewer than `most` traces, all judged and none kept.

    A prompt waits while the guard has not seen its last trace, so the same call again adds nothing. guarded: rows of guard.py;
    done: {(id, k), ...} of all traces."""
    kept, judged = {row["id"] for row in guarded if row["keep"]}, Counter(row["id"] for row in guarded)
    traces = Counter(i for i, _ in done)
    return [(row, k) for row in prompts if row["id"] not in kept and judged[row["id"]] == (k := traces[row["id"]]) < most]


def main():
    if "--bench" in sys.argv:
        from tests.bench_sample import bench
        return bench([a for a in sys.argv[1:] if a != "--bench"])
    p = parser(__doc__)
    p.add_argument("--bench", action="store_true", help="time the sampler against transformers.generate (--bench --help)")
    p.machine.add_argument("--kv-bits", type=int, choices=(16, 8), default=16,
                           help="8: the cache as int8, on a GPU; half the memory")
    g = p.add_argument_group("prompts and traces")
    g.add_argument("--model", default="auto", help="student: auto, tiny, a Hugging Face folder, or a hub name")
    g.add_argument("--prompts", help="safechain, eopsa, ...: a set of data.py; a .jsonl .json .csv .tsv .parquet file or URL; or "
                   "owner/name[:config[:split]][@revision] on the hub (default: the tiny world's)")
    g.add_argument("--label", choices=LABELS, help="what prompts are that have no label of their own")
    g.add_argument("--steer", choices=STEER, default="default", help="wording of the refusal instruction on harmful prompts")
    g.add_argument("--n", type=count, default=1, help="traces per prompt")
    g.add_argument("--limit", type=count, help="only the first LIMIT prompts")
    g.add_argument("--retries", type=count, metavar="N", help="after guard.py, which is to run again then: one more trace for "
                   "each prompt of which none was kept, up to N. Prompts that are seldom answered safely weigh more by it, "
                   "and of their kept traces more are the guard's mistakes")
    add_sampling_flags(p)
    add_shard_flag(p)
    args = p.parse_args()
    args.seed = args.seed or 0
    if args.kv_bits == 8 and torch.device(args.device).type != "cuda":
        raise InputError("--kv-bits 8 is for a GPU; on a CPU the cache is in the model's dtype")

    prompts = prompt_rows(args.prompts or TINY / "prompts.jsonl", args.label)[:args.limit]
    name = model_name(args.model)
    model, tokenizer = load_decoder(name, args.device, pick_dtype(args), args.quantize)
    options = sampling_options(args, model)
    judge = read_run(args.out).get("guard", {})
    if args.retries and not (judge.get("finished") and judge["arguments"]["keep"] == "safe"):
        raise InputError(f"{args.out}: --retries goes by what guard.py kept; run it first, with --keep safe")
    guarded = read_shards(args.out / "guarded.jsonl") if args.retries else []
    stage = Stage("sample", args, {
        "model": model.hash, "template": template_hash(tokenizer), "prompts": content_id(json.dumps(prompts)),
        "steer": args.steer, "wording": STEER[args.steer], "n": args.n, "seed": args.seed, "dtype": str(model.head.dtype),
        "kv_bits": args.kv_bits, **options}, "samples.jsonl", model=pinned(name, model), sources=VERSIONS)
    print(f"prompts: {label_counts(prompts)}")
    if not args.prompts and not is_tiny(name):
        print("prompts: those of the tiny world; name yours with --prompts", file=sys.stderr)
    writer = RowWriter(stage.path)
    done = {row_key(row) for row in read_shards(args.out / "samples.jsonl", check_trace)}
    missing = [(row, k) for row in prompts for k in range(args.n) if (row["id"], k) not in done]
    if args.retries:
        missing += rejected(guarded, prompts, done, args.n + args.retries)
    todo = [(row, k) for row, k in missing if owns(args.shard, row["id"])]
    steer = {label: args.steer if is_harmful(label) else "none" for label in LABELS}
    ids = [encode_prompt(tokenizer, steered(row["instruction"], steer[row["prompt_label"]])) for row, _ in todo]
    keys = [f"{row['id']}/{k}" for row, k in todo]

    n_done = sum(owns(args.shard, i) for i, _ in done)
    with progress("sample", n_done + len(todo), "trace", n_done) as advance:
        for c in Sampler(model, tokenizer, args.slots, args.kv_bits).generate(ids, seed=args.seed, keys=keys, **options):
            row, k = todo[c.index]
            writer.write({**row, "response": decode_response(tokenizer, c.tokens, model.eos_ids), "k": k, "seed": args.seed,
                          "steer": steer[row["prompt_label"]], "finish_reason": c.finish_reason, "n_tokens": len(c.tokens)})
            stage.spend(**sampling_cost(model, ids[c.index], c.tokens))
            advance(tokens=len(c.tokens))
    rows = stage.all_rows("samples.jsonl", len(done) + len(missing))
    if rows is None:
        return
    counts, tokens = Counter(row["finish_reason"] for row in rows), sum(row["n_tokens"] for row in rows)
    if counts["prompt_too_long"]:
        print(f"{counts['prompt_too_long']} prompts do not fit the model's context; they have no trace", file=sys.stderr)
    retried = len(rows) - len(prompts) * args.n
    stage.finish(f"sampled {len(rows)} traces of {len(prompts)} prompts, {tokens:,} tokens"
                 + (f"; {retried} traces are retries" if retried else ""), stage.paths,
                 f"python guard.py --out {args.out}", rows=len(rows), tokens=tokens, retries=retried,
                 **{f"finish_{k}": v for k, v in sorted(counts.items())})


if __name__ == "__main__":
    cli(main)
