"""kernels/linear_ce_kl.py against fp64 for whatever shapes and values hypothesis comes up with, on both paths."""
import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st
from test_linear_ce_kl import PATHS, on, run, textbook

from linear_ce_kl import linear_ce_kl

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")] + [pytest.mark.gpu] * torch.cuda.is_available()

# Few values of D: on a GPU each is a compilation.
PROBLEM = st.fixed_dictionaries(dict(
    N=st.integers(1, 150), V=st.integers(1, 300), D=st.sampled_from((2, 70)), seed=st.integers(0, 2**20),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)), scale=st.sampled_from((0.0, 1e-30, 0.1, 5.0, 40.0, 1e3, 1e6)),
    common=st.sampled_from((0.0, 100.0, -3000.0)),          # a massive activation that all logits share, up to a little
    target=st.sampled_from(("most likely", "least likely", "any")),
    apart=st.sampled_from((0.0, 1e-4, 1e-2, 1.0, 10.0)), own_head=st.booleans(), upstream=st.booleans()))


def build(N, V, D, seed, dtype, scale, common, target, apart, own_head, upstream):
    """-> [h, head, y, w, r, lambda, upstream gradient or None], the reference's head or None."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen)

    def some(values, x):
        """A third of the numbers become one of the values."""
        chosen = torch.tensor(values)[torch.randint(len(values), x.shape, generator=gen)]
        return torch.where(torch.rand(x.shape, generator=gen) < 1 / 3, chosen, x)
    head, h = normal(V, D) / D**0.5, normal(N, D) * scale
    if common:
        head[:, 0], h[:, 0] = 1 + 0.01 * head[:, 0], common + h[:, 0]
    y = {"most likely": (h @ head.T).argmax(1), "least likely": (h @ head.T).argmin(1), "any": torch.randint(V, (N,), generator=gen)}
    r = h + h.abs().mean() * apart * normal(N, D)
    head_r = (head + 0.05 * normal(V, D)).to(dtype) if own_head else None
    return [h.to(dtype), head.to(dtype), some((-100,), y[target]), some((0.0, 1.0, -1.0), normal(N)), r.to(dtype),
            some((0.0, 1.0, -2.0), normal(N)), some((0.0, 1.0), normal(N)) if upstream else None], head_r


def on_device(device, args, head_r):
    return [t if t is None else t.to(device) for t in args], head_r if head_r is None else head_r.to(device)


def fuzz(**more):
    def wrap(test):
        settings = hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
        return PATHS(settings(hypothesis.given(problem=PROBLEM, trained=st.booleans(), **more)(test)))
    return wrap


@fuzz()
def test_every_row_is_as_exact_as_its_logits_allow(path, problem, trained):
    """Bounds from the sizes of what is summed: a logit is off by eps sqrt(D) sum_k |h_k W_jk|, a probability by that factor."""
    with on(path) as device:
        args, head_r = on_device(device, *build(**problem))
        h, head, y, w, r, lam, upstream = args
        truth = run(textbook, *args, dtype=torch.float64, head_r=head_r)
        kl = run(textbook, h, head, y, 0 * w, r, 0 * lam + 1, dtype=torch.float64, head_r=head_r, trained=False)[0]
        got = run(linear_ce_kl, *args, trained=trained, head_r=head_r)
        wide = [t.double().abs() for t in (h, head, r, head if head_r is None else head_r)]
        slack = sum((a @ W.T).amax(1) for a, W in (wide[:2], wide[2:]))                                     # (N,)
        off = 2.0**-22 * (1 + h.shape[1]**0.5 * slack)
        size = (w.abs() + 2 * lam.abs()).double() * (y != -100)
        assert ((got[0] - truth[0]).abs() <= size * off * (1 + kl) + 2.0**-22 * truth[0].abs()).all()
        off = off.clamp(max=2) + (2**-7 if h.dtype == torch.bfloat16 else 2**-20)                           # no probability is above 1
        size = size * (1 if upstream is None else upstream.double().abs())
        assert ((got[1] - truth[1]).norm(dim=1) <= 2 * wide[1].norm(dim=1).amax() * size * off).all()
        if trained:
            assert (got[2] - truth[2]).norm() <= (2 * wide[0].norm(dim=1) * size * off).sum()


@fuzz(at=st.sampled_from((0, 1, 3, 4, 5)), where=st.integers(0, 2**20), value=st.sampled_from((float("nan"), float("inf"), float("-inf"))))
def test_what_is_not_finite_is_seen(path, problem, trained, at, where, value):
    """Anywhere in any input: the rows that it can reach and that count are not finite, all others are as they were."""
    with on(path) as device:
        args, head_r = on_device(device, *build(**problem))
        clean = run(linear_ce_kl, *args, trained=trained, head_r=head_r)
        args[at].view(-1)[where % args[at].numel()] = value
        got = run(linear_ce_kl, *args, trained=trained, head_r=head_r)
        h, _, y, w, _, lam, _ = args
        counts = (y != -100) & ((lam != 0) if at == 4 else (w != 0) | (lam != 0))                           # at 4: the reference
        if at != 1:                                                                                         # at 1: the head
            counts &= torch.arange(len(h), device=device) == where % args[at].numel() // (args[at].numel() // len(h))
        assert (~got[0].isfinite() | ~got[1].isfinite().all(1))[counts].all()
        for a, b in zip(got[:2], clean):
            torch.testing.assert_close(a[~counts], b[~counts], rtol=1e-2, atol=1e-4)
