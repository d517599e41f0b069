"""The sampler: exact draws, draws that belong to the row, refill, limits."""
import pytest
import torch

from sample import Sampler, pick_tokens, uniforms
from thinksafe import InputError, encode_prompt, load_decoder


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
    drawn = pick_tokens(logits.expand(n, -1), u, temperature, top_p, top_k).bincount(minlength=60).double()
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
    assert pick_tokens(logits, u, 1.0, 0.9, 0).item() in (0, 1)
    assert pick_tokens(logits, u, 1.0, 1.0, 3).item() == 2
    assert pick_tokens(torch.tensor([[0.0, float("-inf")]]), u, 1.0, 1.0, 0).item() == 0


def test_greedy():
    assert pick_tokens(torch.tensor([[1.0, 3.0, 2.0]]), torch.zeros(1).double(), 0, 0.95, 20).item() == 1


PROMPTS = [f"How do I {verb} a {thing}?" for verb in ("paint", "kill", "steal", "greet") for thing in ("weed", "teacher", "passport", "drum")]


def completions(tiny, slots, order=None, **kw):
    model, tokenizer = tiny
    order = order or range(len(PROMPTS))
    ids = [encode_prompt(tokenizer, PROMPTS[i]) for i in order]
    options = dict(max_new_tokens=100, seed=5, keys=[str(i) for i in order]) | kw
    found = list(Sampler(model, tokenizer, slots).generate(ids, **options))
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
    model, tokenizer = load_decoder("tiny", "cpu")
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="nan"):
        list(Sampler(model, tokenizer).generate([[5, 6]], max_new_tokens=3))
