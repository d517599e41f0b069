"""
Where the sampler keeps keys and values: a slot for each sequence on a CPU, pages on a GPU.

Both have the same methods: a `writer` of new tokens, `attention` of one token per sequence, `copy` and `move` sequences
between slots, `give`, `empty` and `sync`. A layer's k and v of n tokens are (n, Hkv, d).
"""
import math
import mmap

import torch

from kernels.decode_attention import decode_attention, quantise


def _lazy_zeros(shape, dtype):
    """On a CPU; memory is taken when it is first written to: a slot for the longest trace costs what its trace needs."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def _weighted_sums(table, rows, starts, weights):
    """From each start to the next, the sum of weight * table[row]: table (N, d), rows (n,) and starts (B,) int32, weights of
    n numbers -> (B, d).

    A layer made for bags of words is what reads a cache at the memory's speed on a CPU: a batched product with one or two
    rows on the left takes up to six times as long."""
    return torch.embedding_bag(table, rows, starts, False, 0, False, weights.reshape(-1))[0]


class SlotCache:
    """On a CPU. A slot is a row of square blocks of d tokens: a block of values has a row for each token, a block of keys
    a row for each dimension. So scores are sums of rows of keys weighted by the query, the output is a sum of rows of
    values weighted by the softmax, and both go by the same row numbers.

    longest: most tokens of a sequence."""
    free = ()                                                                  # pages, of which it has none

    def __init__(self, config, slots, longest, dtype):
        c, self.d = config, config.head_dim
        shape = c.num_hidden_layers, slots, c.num_key_value_heads, -(-longest // self.d), self.d, self.d
        self.k, self.v = (_lazy_zeros(shape, dtype) for _ in range(2))
        self.heads, self.group = c.num_attention_heads, c.num_attention_heads // c.num_key_value_heads

    def writer(self, slot, position):
        """-> write(layer, k, v) of tokens at position (n,) of slot (n,)."""
        block, place = position // self.d, position % self.d

        def write(layer, k, v):
            self.k[layer][slot, :, block, :, place], self.v[layer][slot, :, block, place] = k, v
        return write

    def attention(self, length, reach=None):
        """-> attend(layer, q): attention of the first slots, of length (n,) >= 1; q (n, H, d) -> (n, H, d).
        reach is for the pages of a GPU; here each part reads as far as its longest sequence."""
        d, parts = self.d, []
        for slots in length.argsort(descending=True).split(max(32, len(length) // 8)):     # of about one length: little padding
            blocks = -(-int(length[slots[0]]) // d)
            heads = (slots[:, None] * self.heads + torch.arange(self.heads)).flatten()                 # (h,) rows of q
            first = (heads // self.group * (self.k[0, 0, 0].numel() // d)).int()
            rows = (first[:, None] + torch.arange(blocks * d, dtype=torch.int32)).flatten()            # (h * blocks * d,)
            starts = torch.arange(0, len(rows), d, dtype=torch.int32)
            shortest = int(length[slots[-1]])
            unseen = torch.arange(shortest, blocks * d) >= length[slots, None]
            parts.append((heads, heads.repeat_interleave(blocks), rows, starts, starts[::blocks].contiguous(), shortest,
                          unseen.repeat_interleave(self.heads, 0)))

        def attend(layer, q):
            k, v, q = self.k[layer].view(-1, d), self.v[layer].view(-1, d), (q / math.sqrt(d)).view(-1, d)
            out = torch.empty_like(q)
            for heads, head_of_block, rows, blocks, sequences, shortest, unseen in parts:
                scores = _weighted_sums(k, rows, blocks, q.index_select(0, head_of_block)).view(len(heads), -1)
                scores[:, shortest:].masked_fill_(unseen, float("-inf"))
                out.index_copy_(0, heads, _weighted_sums(v, rows, sequences, scores.softmax(-1)))
            return out.view(-1, self.heads, d)
        return attend

    def copy(self, source, slot, length):
        """The first `length` tokens of a slot into another one."""
        blocks = -(-length // self.d)
        for x in (self.k, self.v):
            x[:, slot, :, :blocks] = x[:, source, :, :blocks]

    move = copy

    def give(self, slot, pages):
        """Nothing to do: a slot has room for the longest sequence."""

    def empty(self, slot):
        """Nothing to do."""

    def sync(self):
        """Nothing to do."""


class PagedCache:
    """On a GPU. A sequence holds as many pages of `page` tokens as it needs; see kernels/decode_attention.py.

    longest: most pages of a sequence. pages: how many there are; page 0 is for slots without a sequence. int8: one byte
    per number and a scale per token and head."""

    def __init__(self, config, slots, longest, dtype, device, pages, page, int8):
        c, self.page = config, page
        shape = c.num_hidden_layers, pages, page, c.num_key_value_heads, c.head_dim
        self.k, self.v = (torch.zeros(shape, dtype=torch.int8 if int8 else dtype, device=device) for _ in range(2))
        self.k_scale, self.v_scale = (torch.zeros(shape[:-1], device=device) if int8 else None for _ in range(2))
        self.free, self.owned = list(range(1, pages)), [[] for _ in range(slots)]           # pages: free, of each slot
        self.host_table = torch.zeros(slots, longest, dtype=torch.int32)
        self.table = self.host_table.to(device, copy=True)                     # the first is filled, the second used; see sync

    @staticmethod
    def page_bytes(config, page, dtype, int8):
        """Memory of one page."""
        c = config
        return 2 * c.num_hidden_layers * page * c.num_key_value_heads * (c.head_dim + 4 if int8 else c.head_dim * dtype.itemsize)

    def writer(self, slot, position):
        """-> write(layer, k, v) of tokens at position (n,) of slot (n,)."""
        page, offset = self.table[slot, position // self.page].long(), position % self.page

        def write(layer, k, v):
            for cache, scales, x in ((self.k, self.k_scale, k), (self.v, self.v_scale, v)):
                if scales is not None:
                    x, scales[layer][page, offset] = quantise(x)
                cache[layer][page, offset] = x
        return write

    def attention(self, length, reach):
        """-> attend(layer, q): attention of the first slots, of length (n,) from 1 to reach; q (n, H, d) -> (n, H, d)."""
        def attend(layer, q):
            scales = (x if x is None else x[layer] for x in (self.k_scale, self.v_scale))
            return decode_attention(q, self.k[layer], self.v[layer], self.table[:len(length)], length, reach, *scales)
        return attend

    def give(self, slot, pages):
        """The first `pages` pages of the slot's sequence are there afterwards; the caller knows that enough are free."""
        owned = self.owned[slot]
        while len(owned) < pages:
            self.host_table[slot, len(owned)] = self.free[-1]
            owned.append(self.free.pop())

    def copy(self, source, slot, length):
        """The first `length` tokens of a slot into another one, which owns the pages for them."""
        n = -(-length // self.page)
        for x in (self.k, self.v, self.k_scale, self.v_scale):
            if x is not None:
                x[:, self.owned[slot][:n]] = x[:, self.owned[source][:n]]

    def move(self, source, slot, length):
        """The sequence of a slot changes places with that of another one."""
        self.owned[slot], self.owned[source] = self.owned[source], self.owned[slot]
        self.host_table[[slot, source]] = self.host_table[[source, slot]]

    def empty(self, slot):
        """Its pages are free."""
        self.free += self.owned[slot]
        self.owned[slot], self.host_table[slot] = [], 0

    def sync(self):
        """What was given and moved since holds from here on."""
        self.table.copy_(self.host_table)
