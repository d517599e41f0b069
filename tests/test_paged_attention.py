"""Attention over the cache: the Triton kernel (through the interpreter without a GPU), the plain definition, the CPU's own;
and the blocks of a paged cache."""
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import paged_attention as pa
from fused import quantize_kv
from kv_cache import ContiguousKVCache, PagedKVCache, cache_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def make(n, heads, group, d, block_size, longest, dtype=torch.float32, seed=0):
    """q, paged k and v with the blocks of all sequences shuffled, block table, lengths."""
    gen = torch.Generator().manual_seed(seed)
    length = torch.randint(1, longest + 1, (n,), generator=gen)
    length[0] = longest
    per = -(-longest // block_size)
    table = (torch.randperm(n * per, generator=gen) + 1).view(n, per).int()
    q = torch.randn(n, heads * group, d, generator=gen).to(dtype)
    k, v = (torch.randn(n * per + 1, block_size, heads, d, generator=gen).to(dtype) for _ in range(2))
    return [t.to(DEVICE) for t in (q, k, v, table, length)]


def truth(q, k, v, table, length):
    """One sequence at a time, in fp64."""
    out = []
    for i, n in enumerate(length.tolist()):
        keys, values = (x[table[i].long()].flatten(0, 1)[:n].double().repeat_interleave(q.shape[1] // k.shape[2], 1) for x in (k, v))
        p = (torch.einsum("hd,nhd->hn", q[i].double(), keys) / q.shape[-1]**0.5).softmax(-1)
        out.append(torch.einsum("hn,nhd->hd", p, values))
    return torch.stack(out)


@pytest.fixture(params=["kernel", "plain"])
def attention(request, monkeypatch):
    if request.param == "plain":
        return pa._plain
    if pa.triton is None:
        pytest.skip("triton is not installed: the kernel cannot be tested here, only the plain path")
    return pa._kernel


SHAPES = [(3, 2, 2, 32, 16, 70), (1, 1, 1, 16, 16, 1), (5, 2, 3, 24, 16, 33), (2, 1, 20, 64, 32, 96), (40, 2, 1, 16, 16, 40)]


@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(attention, shape):
    args = make(*shape)
    got = attention(*args, None, None)
    torch.testing.assert_close(got.double(), truth(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits_are_the_quantized_cache_exactly(attention, shape):
    q, k, v, table, length = make(*shape)
    (k8, ks), (v8, vs) = quantize_kv(k), quantize_kv(v)
    assert (k8 * ks[..., None] - k).abs().max() <= 0.501 * ks.max()
    got = attention(q, k8, v8, table, length, ks, vs)
    want = truth(q, k8 * ks[..., None], v8 * vs[..., None], table, length)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_nan_is_not_hidden(attention):
    q, k, v, table, length = make(3, 2, 2, 16, 16, 40)
    q[1] = float("nan")
    assert attention(q, k, v, table, length, None, None).isnan().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("of", ["k", "v"])
def test_nan_of_one_token_is_not_hidden_by_other_chunks(attention, of):
    q, k, v, table, length = make(1, 1, 2, 16, 16, 200)
    {"k": k, "v": v}[of][table[0, 5]] = float("nan")                        # a block in the middle of several chunks
    assert attention(q, k, v, table, length, None, None).isnan().all()


def test_chunks():
    """They fill the processors, and wide batches of short sequences are not cut."""
    for n in (1, 4, 64, 256, 1000):
        chunks, min_blocks = pa.cut(n, 8, 132)
        assert chunks & (chunks - 1) == 0 and 4 <= chunks <= 64
        assert n * 8 * chunks >= 4 * 132 or chunks == 64
        assert min_blocks == (1 if n <= 64 else 8)


@pytest.mark.parametrize("min_blocks", [1, 2, 100])
@pytest.mark.parametrize("chunks", [1, 4, 16])
def test_however_sequences_are_cut(attention, monkeypatch, chunks, min_blocks):
    monkeypatch.setattr(pa, "cut", lambda *args: (chunks, min_blocks))
    args = make(3, 1, 2, 16, 16, 150)
    torch.testing.assert_close(attention(*args, None, None).double(), truth(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, heads, group, d, longest", [(1, 2, 3, 16, 90), (7, 1, 1, 24, 24), (70, 2, 2, 32, 200), (300, 1, 4, 8, 50)])
def test_slots_of_a_cpu(n, heads, group, d, longest, dtype):
    """What is written token by token, moved and moved back over other tokens is attended to, and nothing else."""
    q, k, v, table, length = (t.cpu() for t in make(n, heads, group, d, longest, longest, dtype))
    config = SimpleNamespace(num_hidden_layers=2, num_key_value_heads=heads, num_attention_heads=heads * group, head_dim=d)
    cache = ContiguousKVCache(config, n + 1, longest, dtype)
    slot = torch.arange(n).repeat_interleave(length)
    position = torch.cat([torch.arange(x) for x in length])
    write = cache.writer(slot, position)
    write(0, *(torch.randn(2, len(slot), heads, d, dtype=dtype)))                     # of another layer
    write(1, *(x[table[:, 0].long()][slot, position] for x in (k, v)))
    cache.move(0, n, longest)
    cache.writer(torch.zeros(longest).long(), torch.arange(longest))(1, *torch.randn(2, longest, heads, d, dtype=dtype))
    cache.move(n, 0, int(length[0]))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(cache.attention(length)(1, q).double(), truth(q, k, v, table, length), rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell the memory of a process")
def test_a_slot_costs_what_its_sequence_needs():
    """Memory goes to what is written, not to what is read beside it."""
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    config = SimpleNamespace(num_hidden_layers=4, num_key_value_heads=8, num_attention_heads=16, head_dim=128)
    before = resident()
    cache = ContiguousKVCache(config, 64, 4096, torch.float32)                        # 8.6 GB
    k, v = torch.randn(2, 2000, 8, 128)
    cache.writer(torch.full((2000,), 3), torch.arange(2000))(2, k, v)
    assert cache.attention(torch.ones(64).long().index_fill(0, torch.tensor(3), 2000))(2, torch.randn(64, 16, 128)).isfinite().all()
    assert resident() - before < 12 * k.nbytes                                        # all that is read has 64 times k.nbytes


@pytest.mark.parametrize("int8", [False, True])
def test_blocks_of_a_paged_cache(int8):
    """Sequences that get their blocks in turns, change places and leave: each still reads what was written for it."""
    n, heads, group, d, size, longest = 4, 2, 2, 16, 16, 60
    q, k, v, table, length = make(n, heads, group, d, size, longest)
    config = SimpleNamespace(num_hidden_layers=2, num_key_value_heads=heads, num_attention_heads=heads * group, head_dim=d)
    cache = PagedKVCache(config, n + 1, 4, torch.float32, DEVICE, 4 * n + 1, size, int8)
    numbers = cache.k.nbytes + cache.v.nbytes + (cache.k_scale.nbytes + cache.v_scale.nbytes if int8 else 0)
    assert numbers == (4 * n + 1) * cache_bytes(config, size, torch.float32, int8)
    for blocks in range(1, 5):
        for slot in range(n):
            cache.allocate(slot, min(blocks, -(-int(length[slot]) // size)))
    assert sorted([*sum(cache.slot_blocks, []), *cache.free_blocks]) == list(range(1, 4 * n + 1))
    cache.upload_block_table()
    rows = [x[table.long()].flatten(1, 2) for x in (k, v)]                           # (n, tokens, heads, d) each
    slot = torch.arange(n, device=DEVICE).repeat_interleave(length)
    position = torch.cat([torch.arange(x, device=DEVICE) for x in length.tolist()])
    cache.writer(slot, position)(1, *(x[slot, position] for x in rows))
    want = truth(q, k, v, table, length)
    if int8:
        (k, ks), (v, vs) = quantize_kv(k), quantize_kv(v)
        want = truth(q, k * ks[..., None], v * vs[..., None], table, length)
    torch.testing.assert_close(cache.attention(length)(1, q).double(), want, rtol=1e-5, atol=1e-5)
    cache.move(3, 0, int(length[3]))                                                 # the last takes the place of the first
    cache.free(3)
    cache.upload_block_table()
    order = torch.tensor([3, 1, 2], device=DEVICE)
    torch.testing.assert_close(cache.attention(length[order])(1, q[order]).double(), want[order], rtol=1e-5, atol=1e-5)
    for slot in range(3):
        cache.free(slot)
    assert sorted(cache.free_blocks) == list(range(1, 4 * n + 1)) and not cache.host_table.any()


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("n, longest", [(1, 16000), (256, 1500), (64, 9000)])
def test_bf16_at_real_shapes(n, longest, int8):
    args = make(n, 8, 2, 128, 64, longest, torch.bfloat16)
    q, k, v, table, length = args
    scales = None, None
    if int8:
        (k, ks), (v, vs) = quantize_kv(k), quantize_kv(v)
        args, scales = (q, k.float() * ks[..., None], v.float() * vs[..., None], table, length), (ks, vs)
    got = pa.paged_attention(q, k, v, table, length, *scales)
    few = slice(0, 4)
    want = truth(q[few], args[1], args[2], table[few], length[few])
    assert (got[few].double() - want).norm() < 1e-2 * want.norm()
