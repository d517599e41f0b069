"""Where the sampler keeps keys and values: slots on a CPU, blocks of tokens on a GPU.

    cache.allocate(slot, blocks)                        # a slot is a place for one sequence
    cache.upload_block_table()                          # allocations and swaps hold from here on
    cache.writer(slots, positions)(layer, k, v)         # store k, v (n, Hkv, d) of n tokens
    cache.attention(context_lens)(layer, q)             # q (n, H, d) of the first n slots
    cache.move(source, slot, length)                    # then cache.free(source)
    cache.free(slot)
"""
import math
import mmap

import torch

from fused import PagedWriter
from paged_attention import grouped_attention, paged_attention

def cache_bytes(config, tokens, dtype, int8=False):
    """Memory of so many tokens in the cache of all layers."""
    head_bytes = config.head_dim + 4 if int8 else config.head_dim * dtype.itemsize
    return 2 * config.num_hidden_layers * tokens * config.num_key_value_heads * head_bytes

def _lazy_zeros(shape, dtype):
    """Zeros on a CPU that take memory where they are written to, not where they are read: a slot
    costs what its sequence needs."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, mmap.MAP_PRIVATE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)

def default_block_size(device):
    """Tokens of a block; None on a CPU, for a contiguous cache. Registers of older GPUs hold 32."""
    if device.type == "cpu":
        return None
    old = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
    return 32 if old else 64

class ContiguousKVCache:
    """The cache on a CPU, for the config of a decoder: each slot has room for max_len tokens."""

    free_blocks = ()

    def __init__(self, config, slots, max_len, dtype):
        shape = (config.num_hidden_layers, slots, config.num_key_value_heads, max_len,
                 config.head_dim)
        self.k, self.v = _lazy_zeros(shape, dtype), _lazy_zeros(shape, dtype)

    def writer(self, slots, positions):
        """Return write(layer, k, v), which stores n tokens at positions (n,) of slots (n,)."""
        def write(layer, k, v):
            self.k[layer][slots, :, positions] = k
            self.v[layer][slots, :, positions] = v
        return write

    def attention(self, context_lens):
        """Return attend(layer, q) for the first n slots, which hold context_lens (n,) >= 1."""
        n, longest = len(context_lens), int(context_lens.max())

        def attend(layer, q):
            k, v = self.k[layer, :n, :, :longest], self.v[layer, :n, :, :longest]
            return grouped_attention(q, k, v, context_lens)
        return attend

    def move(self, source, slot, length):
        """Copy the first length tokens of source to slot."""
        for x in (self.k, self.v):
            x[:, slot, :, :length] = x[:, source, :, :length]

    def allocate(self, *args):
        """Do nothing, like free and upload_block_table: a slot always has all of its memory."""

    free = upload_block_table = allocate

class PagedKVCache:
    """The cache on a GPU: a sequence holds as many blocks as it needs, see paged_attention.py.

    max_blocks: of one sequence, of block_size tokens each. num_blocks: in all; block 0 is for slots
    without a sequence. int8: one byte per number, and one fp32 scale per token and head."""

    def __init__(self, config, slots, max_blocks, dtype, device, num_blocks, block_size, int8):
        self.block_size = block_size
        shape = (config.num_hidden_layers, num_blocks, block_size, config.num_key_value_heads,
                 config.head_dim)
        self.k = torch.zeros(shape, dtype=torch.int8 if int8 else dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.k_scale = self.v_scale = [None] * config.num_hidden_layers
        if int8:
            self.k_scale, self.v_scale = torch.zeros(2, *shape[:-1], device=device)
        self.free_blocks = list(range(1, num_blocks))
        self.slot_blocks = [[] for _ in range(slots)]
        self.host_table = torch.zeros(slots, max_blocks, dtype=torch.int32)
        self.block_table = self.host_table.to(device, copy=True)

    def writer(self, slots, positions):
        """Return write(layer, k, v), which stores n tokens at positions (n,) of slots (n,)."""
        block = self.block_table[slots, positions // self.block_size].long()
        rows = block * self.block_size + positions % self.block_size
        return PagedWriter(self.k, self.v, self.k_scale, self.v_scale, rows)

    def attention(self, context_lens):
        """Return attend(layer, q) for the first n slots, which hold context_lens (n,) >= 1."""
        def attend(layer, q):
            return paged_attention(q, self.k[layer], self.v[layer], self.block_table[:len(q)],
                                   context_lens, self.k_scale[layer], self.v_scale[layer])
        return attend

    def allocate(self, slot, blocks):
        """Let a slot own that many blocks in all; the caller knows that enough are free."""
        owned = self.slot_blocks[slot]
        while len(owned) < blocks:
            self.host_table[slot, len(owned)] = self.free_blocks[-1]
            owned.append(self.free_blocks.pop())

    def move(self, source, slot, length):
        """Exchange the sequences of two slots."""
        owned, table = self.slot_blocks, self.host_table
        owned[slot], owned[source] = owned[source], owned[slot]
        table[[slot, source]] = table[[source, slot]]

    def free(self, slot):
        """Take back the blocks of a slot."""
        self.free_blocks += self.slot_blocks[slot]
        self.slot_blocks[slot] = []
        self.host_table[slot] = 0

    def upload_block_table(self):
        """Copy the block table to the GPU."""
        self.block_table.copy_(self.host_table)
