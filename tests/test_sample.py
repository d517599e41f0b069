"""The sampler: exact draws, draws that belong to the row, refill, limits."""
import functools
import json

import pytest
import torch

from sample import NOT_FINITE, NOT_FOUND, Sampler, uniforms
from data.chat import encode_prompt
from thinksafe import InputError, load_model

import sample
import sample_tokens as sample_tokens_module
from kv_cache import cache_bytes
from sample_tokens import sample_tokens


def exact(logits, temperature, top_p, top_k):
    """The distribution after temperature, top-k, top-p, by transformers' own warpers."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
    x = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        x = TopKLogitsWarper(top_k)(None, x)
    if top_p < 1:
        x = TopPLogitsWarper(top_p)(None, x)
    return x[0].softmax(-1)


@pytest.mark.parametrize("temperature, top_p, top_k", [(0.6, 0.95, 20), (1.0, 1.0, 0), (0.7, 0.8, 0), (1.3, 1.0, 5), (1.0, 0.01, 0), (0.6, 0.95, 10**6)])
def test_frequencies(temperature, top_p, top_k):
    """20,000 draws against the exact probabilities: chi-square with p > 0.001, and nothing outside of the set."""
    logits = 2 * torch.randn(60, generator=torch.Generator().manual_seed(1))
    n = 20_000
    want = exact(logits, temperature, top_p, min(top_k, 60))
    u = torch.cat([uniforms(0, str(i), 4) for i in range(n // 4)])
    drawn = sample_tokens(logits.expand(n, -1), u, temperature, top_p, top_k).bincount(minlength=60).double()
    assert drawn[want == 0].sum() == 0
    big = want * n >= 5
    seen = torch.cat((drawn[big], drawn[~big].sum()[None]))
    expected = torch.cat((want[big], want[~big].sum()[None])).double() * n
    seen, expected = seen[expected > 0], expected[expected > 0]
    chi2, df = ((seen - expected) ** 2 / expected).sum(), len(expected) - 1
    if df:
        p = 1 - torch.special.gammainc(torch.tensor(df / 2).double(), chi2 / 2)
        assert p > 0.001


def test_the_last_uniform_stays_in_the_set():
    """u just below 1 must not fall off the end, nor onto a token that was filtered out."""
    logits = torch.tensor([[3.0, 2.0, 1.0, -50.0, -60.0]])
    u = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(logits, u, 1.0, 0.9, 0).item() in (0, 1)
    assert sample_tokens(logits, u, 1.0, 1.0, 3).item() == 2
    assert sample_tokens(torch.tensor([[0.0, float("-inf")]]), u, 1.0, 1.0, 0).item() == 0


@pytest.mark.parametrize("scale", [0.1, 2, 30])
def test_top_k_with_all_of_the_probability_always_finds_a_token(scale):
    """Rounding of the running sum must not leave a row without a token, which would be drawn again without end."""
    logits = scale * torch.randn(3000, 300, generator=torch.Generator().manual_seed(3))
    u = torch.rand(3000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert (sample_tokens(logits, u, 0.6, 1.0, 20) >= 0).all()


def test_greedy():
    assert sample_tokens(torch.tensor([[1.0, 3.0, 2.0]]), torch.zeros(1).double(), 0, 0.95, 20).item() == 1


PROMPTS = [f"How do I {verb} a {thing}?" for verb in ("paint", "kill", "steal", "greet") for thing in ("weed", "teacher", "passport", "drum")]


def completions(tiny, slots, order=None, sampler=None, **kw):
    model, tokenizer = tiny
    order = order or range(len(PROMPTS))
    ids = [encode_prompt(tokenizer, PROMPTS[i]) for i in order]
    options = dict(max_new_tokens=100, seed=5, keys=[str(i) for i in order]) | kw
    found = list((sampler or Sampler(model, tokenizer, slots)).generate(ids, **options))
    assert sorted(c.index for c in found) == list(range(len(ids)))          # each once
    return {order[c.index]: (c.tokens, c.finish_reason) for c in found}


def test_draws_belong_to_the_row(tiny):
    one = completions(tiny, 64)
    assert completions(tiny, 64) == one                                     # the same run twice
    assert completions(tiny, 8) == one and completions(tiny, 1) == one      # other batches
    assert completions(tiny, 5, list(reversed(range(len(PROMPTS))))) == one
    assert completions(tiny, 64, seed=6) != one
    assert len({tuple(t) for t, _ in one.values()}) == len(PROMPTS)


def test_log_probabilities_are_those_of_transformers(tiny):
    """What was sampled, teacher-forced through transformers: the same log-probabilities as ours."""
    from transformers import AutoModelForCausalLM
    model, tokenizer = tiny
    hf = AutoModelForCausalLM.from_pretrained(model.folder).float()
    for i, (tokens, _) in completions(tiny, 4).items():
        prompt = encode_prompt(tokenizer, PROMPTS[i])
        ids = torch.tensor(prompt + tokens)
        ours = model.logits(model(ids, torch.tensor([0, len(ids)]))).log_softmax(-1)
        theirs = hf(ids[None]).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt) - 1, len(ids) - 1)
        torch.testing.assert_close(ours[at, ids[at + 1]], theirs[at, ids[at + 1]], atol=1e-3, rtol=0)


def test_limits_are_recorded(tiny):
    model, tokenizer = tiny
    context = model.config.max_position_embeddings
    prompts = [[5] * context, [5] * (context - 3), encode_prompt(tokenizer, PROMPTS[0]), []]
    found = {c.index: c for c in Sampler(model, tokenizer, 2).generate(prompts, max_new_tokens=4)}
    assert [found[i].finish_reason for i in range(4)] == ["prompt_too_long", "length", "length", "prompt_too_long"]
    assert [len(found[i].tokens) for i in range(4)] == [0, 3, 4, 0]
    done = next(iter(Sampler(model, tokenizer).generate([prompts[2]], max_new_tokens=256)))
    assert done.finish_reason == "stop" and done.tokens[-1] in model.eos_ids and not set(done.tokens[:-1]) & model.eos_ids


def test_several_eos_tokens(tiny):
    model, tokenizer = tiny
    first = completions(tiny, 8)[0][0]
    model.eos_ids, old = frozenset([*model.eos_ids, first[3]]), model.eos_ids
    try:
        tokens, reason = completions(tiny, 8)[0]
        assert reason == "stop" and tokens == first[:first.index(first[3]) + 1]
    finally:
        model.eos_ids = old


def test_nan_is_an_error():
    model, tokenizer = load_model("tiny", "cpu")
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="nan"):
        list(Sampler(model, tokenizer).generate([[5, 6]], max_new_tokens=3))


def test_a_set_larger_than_was_looked_at_is_reported_and_then_found():
    logits = torch.randn(400, 300, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 3, 400)[:, None]
    u = uniforms(0, "x", 400)
    want = sample_tokens(logits, u, 0.8, 0.9, 0, max_candidates=300)
    got = sample_tokens(logits, u, 0.8, 0.9, 0, max_candidates=40)
    assert (want >= 0).all() and 0 < (got == NOT_FOUND).sum() < 400
    assert torch.equal(got[got != NOT_FOUND], want[got != NOT_FOUND])


@pytest.mark.parametrize("options", [(0.6, 0.95, 20), (0.6, 0.95, 0), (1.0, 1.0, 0), (0, 1.0, 0)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_reported(options, bad):
    logits = torch.randn(3, 2000)
    logits[1, 7] = bad
    token = sample_tokens(logits, torch.rand(3).double(), *options)
    assert (token == NOT_FINITE).tolist() == [False, True, False]


@pytest.mark.parametrize("block_size, num_blocks, window", [(16, None, 1), (16, None, 4), (8, 40, 3), (8, 25, 1), (32, 9, 16)])
def test_blocks_change_nothing(tiny, block_size, num_blocks, window):
    """Also where there are too few of them: a sequence is preempted and goes on later from what it has."""
    sampler = Sampler(*tiny, 6, block_size=block_size, num_blocks=num_blocks, window=window)
    preempted = []

    def prefill(batch):
        preempted.extend(seq for seq in batch if seq.tokens)
        Sampler._prefill(sampler, batch)
    sampler._prefill = prefill
    assert completions(tiny, 6, sampler=sampler) == completions(tiny, 64)
    assert bool(preempted) == (num_blocks is not None)
    assert sorted(sampler.cache.free_blocks) == list(range(1, sampler.cache.k.shape[1]))       # every block came back


def test_a_request_larger_than_the_whole_cache(tiny):
    """It ends with what fits; one whose prompt does not fit has no token. The others are whole."""
    model, tokenizer = tiny
    prompts = [encode_prompt(tokenizer, p) for p in PROMPTS[:4]] + [[5] * 300]
    model.eos_ids, eos = frozenset(), model.eos_ids
    try:
        found = {c.index: c for c in Sampler(*tiny, 3, block_size=16, num_blocks=13, window=2).generate(prompts, [20, 500, 20, 20, 20])}
    finally:
        model.eos_ids = eos
    assert sorted(found) == [0, 1, 2, 3, 4] and [len(found[i].tokens) for i in (0, 2, 3)] == [20, 20, 20]
    assert found[1].finish_reason == "length" and 100 < len(found[1].tokens) < 192
    assert found[4] == (4, [], "prompt_too_long")


def test_eight_bit_cache(tiny):
    """Close to the 16-bit one: the first tokens, which see a prompt of either kind, are mostly the same."""
    exact, rough = (completions(tiny, 8, sampler=Sampler(*tiny, 8, kv_bits=bits, block_size=16), temperature=0) for bits in (16, 8))
    assert sum(exact[i][0][:8] == rough[i][0][:8] for i in exact) > 0.8 * len(exact)


@pytest.mark.parametrize("block_size", [None, 16])
def test_a_cache_takes_at_most_half_of_the_machines_memory(tiny, monkeypatch, capsys, block_size):
    """Slots of a CPU and blocks of a Mac become fewer, with the same rows. Without need nothing is said."""
    want = completions(tiny, 64)
    assert not capsys.readouterr().err
    monkeypatch.setattr(sample, "machine_memory", lambda: 2 * 5 * cache_bytes(tiny[0].config, 300, torch.float32))
    sampler = Sampler(*tiny, block_size=block_size)
    assert completions(tiny, 64, sampler=sampler) == want
    assert sampler.cache.k.nbytes + sampler.cache.v.nbytes <= sample.machine_memory() / 2
    assert (f"sampler: {sampler.slots} slots, as one may take" in capsys.readouterr().err) == (block_size is None) == (sampler.slots < len(PROMPTS))


def test_equal_prompts_have_draws_of_their_own(tiny):
    _, tokenizer = tiny
    ids = [encode_prompt(tokenizer, PROMPTS[0]), encode_prompt(tokenizer, PROMPTS[1])]
    prompts, options = [ids[0]] * 5 + [ids[1]] + [ids[0]] * 3, dict(max_new_tokens=40, seed=3)
    alone = [next(iter(Sampler(*tiny).generate([p], keys=[str(i)], **options))).tokens for i, p in enumerate(prompts)]
    for block_size in (None, 16):
        found = {c.index: c.tokens for c in Sampler(*tiny, 9, block_size=block_size).generate(prompts, **options)}
        assert [found[i] for i in range(9)] == alone and len(set(map(tuple, alone))) > 5


@pytest.mark.parametrize("block_size", [None, 16])
def test_out_of_memory_at_any_step_loses_nothing(tiny, block_size, capsys):
    """It strikes in the n-th pass of the model, for many n, at its begin or at its end: same rows, same tokens."""
    model, want = tiny[0], completions(tiny, 64)
    forward, logits = type(model).forward, type(model).logits
    for strike in (2, 75) if block_size else (20,):
        for name, method in (("forward", forward), ("logits", logits)):
            calls = []

            def fail(*args, method=method, calls=calls, strike=strike, **kw):
                calls.append(1)
                if len(calls) in (strike, strike + 7):
                    raise torch.OutOfMemoryError("faked")
                return method(model, *args, **kw)
            setattr(model, name, fail)
            try:
                sampler = Sampler(*tiny, 8, block_size=block_size)
                assert completions(tiny, 8, sampler=sampler) == want and sampler.max_num_seqs == 2
            finally:
                delattr(model, name)
    assert "going on with 4 slots" in capsys.readouterr().err
    sampler = Sampler(*tiny, 1)
    sampler._prefill = lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError())
    with pytest.raises(InputError, match="memory"):
        completions(tiny, 1, sampler=sampler)


def test_graphs(tiny, monkeypatch):
    """The way of a GPU with a stand-in for CUDA graphs: capture records a step without doing it, replay does it."""
    captured = []

    class Graph:
        def replay(self):
            Sampler._step(*self.step)

        def pool(self):
            return "pool"

    class capture:
        def __init__(self, graph, pool):
            self.graph, self.step = graph, Sampler._step

        def __enter__(self):
            captured.append(self.graph)
            Sampler._step = lambda *args, defer: setattr(self.graph, "step", (*args, defer))

        def __exit__(self, *error):
            Sampler._step = self.step
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(Sampler, "_bytes_for_cache", lambda self: 10**9)
    options = dict(top_k=0, top_p=0.999, temperature=1.2)
    want = completions(tiny, 64, **options)
    monkeypatch.setattr(sample_tokens_module, "sample_tokens", functools.partial(sample_tokens, max_candidates=30))      # many have to wait
    for slots in (3, 16):
        sampler, used = Sampler(*tiny, slots, block_size=16, window=5), set()
        sampler.cuda = True

        def end_window(seqs, sampler=sampler, used=used):
            used.add(tuple(x.data_ptr() for x in (sampler.state, sampler.context_lens, sampler.max_new, sampler.num_new,
                                                  sampler.last_draw, sampler.tokens, sampler.u, sampler.cache.block_table)))
            Sampler._end_window(sampler, seqs)
        sampler._end_window = end_window
        assert completions(tiny, slots, sampler=sampler, **options) == want
        n = len(captured)
        assert slots == 16 or completions(tiny, slots, sampler=sampler, **options) == want and len(captured) == n       # the second call captures none
        assert len(used) == 1                                              # a graph's memory is that of every window
        assert all(n <= slots for n, *_ in sampler.graphs) and slots in {n for n, *_ in sampler.graphs}


def test_a_stream_begins_with_the_numbers_of_a_shorter_one():
    for n in (1, 2, 15, 16, 17, 64, 1000):
        assert torch.equal(uniforms(3, "a/0", n + 16)[:n], uniforms(3, "a/0", n))
    assert not torch.equal(uniforms(3, "a/0", 5), uniforms(3, "a/1", 5)) and not torch.equal(uniforms(3, "a/0", 5), uniforms(4, "a/0", 5))


def test_the_bench(capsys):
    import bench_sample
    bench_sample.main(["--requests", "6", "--prompt-tokens", "20", "--new-tokens", "30", "--rounds", "1", "--batch", "6"])
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert said["best"].keys() == {"ours", "ours, new sampler", "transformers", "transformers, static cache"} and said["ratio"] > 0
    assert said["8-bit cache"]["same_top1"] > 0.9 and 0 < said["8-bit cache"]["kl"] < 0.01
