"""
kernels/linear_ce_kl.py against fp64, on the plain path and through the kernel: on a GPU where there is one, otherwise in
Triton's interpreter.
"""
import contextlib
import math
import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                     # before anything imports triton

from bench_linear_ce_kl import make_data
from interpreter import like_a_gpu

import linear_ce_kl as ck
from linear_ce_kl import linear_ce_kl

PATHS = pytest.mark.parametrize("path", ["plain", "kernel"])
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]       # numpy's, where inf and nan are meant to be
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)                       # the whole file is worth running there


@contextlib.contextmanager
def on(path):
    """-> the device whose tensors take this path."""
    if path == "plain":
        yield "cpu"
    elif ck.triton is None:
        pytest.skip("triton is not installed: the kernel cannot be tested here, only the plain path")
    elif torch.cuda.is_available():
        yield "cuda"
    else:
        from triton.runtime import interpreter
        assert isinstance(ck._head_kernel, interpreter.InterpretedFunction), "TRITON_INTERPRET=1 came too late"
        with like_a_gpu(), mock.patch.object(ck, "INTERPRET", True):
            yield "cpu"


def textbook(h, head, y, w, r=None, lam=None, head_r=None):
    """fp64 from fp64, fp32 from fp32, and from bf16 what most trainers do: bf16 logits, the rest in fp32."""
    def logits(t, head=head):
        z = F.linear(t, head)
        return z.float() if z.dtype == torch.bfloat16 else z
    loss = w * F.cross_entropy(logits(h), y, reduction="none", ignore_index=-100)
    if r is not None:
        log_r = logits(r, head if head_r is None else head_r).log_softmax(-1).detach()
        kl = (log_r.exp() * (log_r - logits(h).log_softmax(-1))).sum(-1)
        loss = loss + torch.where((y == -100) | (lam == 0), 0, lam * kl)
    return loss


def run(loss_of, h, head, y, w, r=None, lam=None, upstream=None, dtype=None, trained=True, head_r=None):
    """-> loss, gradient to h, gradient to head, in fp64; inputs are cast to dtype first."""
    small = torch.float64 if dtype == torch.float64 else torch.float32
    h, head = (t.to(dtype or t.dtype).detach().requires_grad_(grad) for t, grad in ((h, True), (head, trained)))
    r, lam, head_r = (t if t is None else t.to(to) for t, to in ((r, h.dtype), (lam, small), (head_r, head.dtype)))
    loss = loss_of(h, head, y, w.to(small), r, lam, head_r)
    (loss * (torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))).sum().backward()
    assert dtype == torch.float64 or loss.dtype == torch.float32
    assert h.grad.dtype == h.dtype and (not trained or head.grad.dtype == head.dtype)
    return [t if t is None else t.detach().double() for t in (loss, h.grad, head.grad)]


def error(got, truth):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, truth) if a is not None]


def make(N, V, D, apart=0.05, dtype=torch.float32, device="cpu", seed=0):
    """h, head, y, w and lambda of any sign, r: CE, KL and mixed rows, some masked; values exact in dtype."""
    gen = torch.Generator().manual_seed(seed)
    head = torch.randn(V, D, generator=gen) / D**0.5
    y = torch.randint(0, V, (N,), generator=gen)
    h = 18 * head[y] + 5 * torch.randn(N, D, generator=gen)                # logits up to 25, as models have
    r = h.to(dtype) + 5 * apart * torch.randn(N, D, generator=gen)         # KL about 10 apart^2 nats
    w, lam = torch.randn(N, generator=gen), torch.rand(N, generator=gen)
    w[::3], lam[1::3], lam[::5] = 0, 0, -lam[::5]
    y[::7] = -100
    return [t.to(device) for t in (h.to(dtype), head.to(dtype), y, w, r.to(dtype), lam)]


# --------------------------------------------------------------------------------------------- accuracy

@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ce", "kl near", "kl", "kl far", "mixed", "own head"])
def test_error_against_fp64(path, dtype, kind):
    """At most twice eager's in fp32, at most half of the bf16-logit path's in bf16: loss, both gradients."""
    with on(path) as device:
        apart = {"kl near": 0.003, "kl far": 0.5}.get(kind, 0.05)
        h, head, y, w, r, lam = make(160, 611, 70, apart, dtype, device)
        if kind == "ce":
            r = lam = None
        elif kind != "mixed":
            w, lam = torch.zeros_like(w), torch.ones_like(lam)
        upstream = torch.linspace(-1, 2, len(h), device=device)
        head_r = (1.01 * head.float()).to(dtype) + 0.01 if kind == "own head" else None     # the student's has been trained
        args = h, head, y, w, r, lam, upstream
        truth = run(textbook, *args, dtype=torch.float64, head_r=head_r)
        ours, eager = (error(run(loss, *args, head_r=head_r), truth) for loss in (linear_ce_kl, textbook))
        bound = 2 if dtype == torch.float32 else 0.5
        assert all(a <= bound * b for a, b in zip(ours, eager)), (ours, eager)
        if dtype == torch.bfloat16:
            assert max(ours[1:]) < 6e-3                     # rounding of the output, whatever the distance


@PATHS
@pytest.mark.parametrize("shape", [(1, 611, 70), (1, 1, 1), (129, 257, 65), (130, 2, 33), (2, 99, 16), (127, 259, 129)])
def test_odd_shapes(path, shape):
    with on(path) as device:
        args = list(make(*shape, device=device))
        args[2][0] = 0                                      # at least one row counts
        args[3][0] = 1
        truth = run(textbook, *args, dtype=torch.float64)
        for got, want in zip(run(linear_ce_kl, *args), truth):
            assert (got - want).norm() <= 1e-5 * want.norm() + 1e-6


@PATHS
def test_any_strides_and_integer_targets(path):
    with on(path) as device:
        h, head, y, w, r, lam = make(40, 100, 30, device=device)
        want = run(linear_ce_kl, h, head, y, w, r, lam)
        for lay in (lambda x: x.T.contiguous().T,                                          # by columns
                    lambda x: torch.cat((x, x), 1)[:, :30],                                # rows apart
                    lambda x: x.repeat_interleave(2, 1)[:, ::2]):                          # columns apart
            for got, expected in zip(run(linear_ce_kl, lay(h), lay(head), y.int(), w, lay(r), lam), want):
                torch.testing.assert_close(got, expected)
        h, head = h[:1], head[:1]                                                          # all rows in one place
        for got, expected in zip(run(linear_ce_kl, h.expand(40, 30), head.expand(100, 30), y, w, r, lam),
                                 run(linear_ce_kl, h.repeat(40, 1), head.repeat(100, 1), y, w, r, lam)):
            torch.testing.assert_close(got, expected)


@PATHS
def test_mixed_dtypes_are_widened(path):
    with on(path) as device:
        h, head, y, w, r, lam = make(40, 100, 30, device=device, dtype=torch.bfloat16)
        truth = run(textbook, h, head, y, w, r, lam, dtype=torch.float64)
        for args in ((h.float(), head), (h, head.float())):
            loss, d_hidden, d_head = error(run(linear_ce_kl, *args, y, w, r, lam), truth)
            assert loss < 1e-6
            assert (d_hidden if args[0].dtype == torch.float32 else d_head) < 1e-5      # the fp32 one is not rounded
        want = linear_ce_kl(h, head, y, w, r, lam)
        assert torch.equal(linear_ce_kl(h, head, y.short(), w.double(), r.float(), lam.double()), want)


@PATHS
def test_autocast_changes_nothing(path):
    """The caller's autocast would run the products in bf16."""
    with on(path) as device:
        args = make(40, 100, 30, device=device)
        upstream = torch.linspace(-1, 1, 40, device=device)
        want = run(linear_ce_kl, *args, upstream)
        with torch.autocast(device, torch.bfloat16):
            assert all(torch.equal(a, b) for a, b in zip(run(linear_ce_kl, *args, upstream), want))


@PATHS
def test_backward_twice_and_of_itself(path):
    """Gradients add up over calls and over backward passes; there is none of the gradient."""
    with on(path) as device:
        h, head, y, w, r, lam = make(40, 100, 30, device=device)
        _, *want = run(linear_ce_kl, h, head, y, w, r, lam)
        h.requires_grad_(), head.requires_grad_()
        loss = linear_ce_kl(h, head, y, w, r, lam).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        for part in torch.arange(40, device=device).split(17):
            linear_ce_kl(h[part], head, y[part], w[part], r[part], lam[part]).sum().backward()
        for got, expected in zip((h.grad, head.grad), want):
            torch.testing.assert_close(got.double(), 3 * expected, rtol=1e-4, atol=1e-5)
        grad, = torch.autograd.grad(linear_ce_kl(h, head, y).sum(), h, create_graph=True)
        with pytest.raises(RuntimeError):
            grad.sum().backward()


# --------------------------------------------------------------------------------------------- exactness and range

@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_student_equal_to_reference_is_exactly_zero(path, dtype):
    with on(path) as device:
        h, head, y, w, r, lam = make(160, 270, 70, dtype=dtype, device=device)
        h[:50] *= 8                                         # and with targets far below the largest logit
        y[:50] = (h[:50].float() @ head.float().T).argmin(1)
        for upstream in (None, torch.randn(160, generator=torch.Generator().manual_seed(0)).to(device)):
            for head_r in (None, head.clone()):
                got = run(linear_ce_kl, h, head, y, 0 * w, h.clone(), lam, upstream, head_r=head_r)
                assert all((t == 0).all() for t in got)
        near = h.clone()
        near[117, 3] += 1                                   # one coordinate of one row is seen
        loss, grad, _ = run(linear_ce_kl, h, head, y, 0 * w, near, 0 * lam + 1)
        assert loss[117] > 0 and (loss[:117] == 0).all() and (loss[118:] == 0).all() and (grad[117] != 0).any()


@PATHS
@pytest.mark.parametrize("unlikely", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.4, 2.0, 30.0])
def test_a_common_shift_of_the_logits_costs_no_accuracy(path, shift, unlikely):
    """KL does not see it: near the reference the gradient stays as exact as without, wherever the target's logit is."""
    with on(path) as device:
        h, head, y, w, r, lam = make(160, 611, 70, 0, torch.bfloat16, device)
        if unlikely:                                        # 100 nats and more below the largest
            h, r = 5 * h, 5 * r
            y = torch.where(y == -100, y, (h.float() @ head.float().T).argmin(1))
        head[:, 0], h[:, 0], r[:, 0] = 1, 0, shift          # one column of ones carries a pure shift
        h[:, 1] += 0.125
        args = h, head, y, 0 * w, r, 0 * lam + 1
        truth = run(textbook, *args, dtype=torch.float64)[1]
        kept = truth.norm(dim=1) > 0
        got = run(linear_ce_kl, *args)[1]
        assert 0 < kept.sum() < 160 and ((got - truth)[kept].norm() / truth[kept].norm()) < 6e-3


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_around_80(path, dtype):
    """Logits from -80 to 80, targets at the top, in the middle and 160 nats below it, references near and far."""
    with on(path) as device:
        h, head, y, w, r, lam = make(150, 400, 64, 0.02, dtype, device)
        z = h.double() @ head.double().T
        h = (h.double() * 80 / z.abs().amax(1, keepdim=True)).to(dtype)
        order = (h.double() @ head.double().T).argsort(1)
        y[:60], y[60:90], y[90:] = order[:60, -1], order[60:90, 200], order[90:, 0]
        r = torch.where(torch.arange(150, device=device)[:, None] % 2 == 0, h + r - r.roll(1, 1) * 0.99, h.roll(1, 0))
        w, lam = w.abs() + 0.1, lam + 0.1
        truth = run(textbook, h, head, y, w, r, lam, dtype=torch.float64)
        assert (h.double() @ head.double().T).abs().amax() > 75 and truth[0].max() > 100
        got = run(linear_ce_kl, h, head, y, w, r, lam)
        for a, b in zip(got, truth):
            assert (a - b).norm() <= (6e-3 if dtype == torch.bfloat16 else 1e-5) * b.norm()
        rows = (got[1] - truth[1]).norm(dim=1) / truth[1].norm(dim=1).clamp(min=1e-2)      # no single bad row either
        assert rows.max() < (2e-2 if dtype == torch.bfloat16 else 1e-4)


@PATHS
def test_same_target_logit_but_far_reference(path):
    """alpha = 1 would be chosen from the target's logit alone, and e - e_ref would bury e: the row is done again."""
    with on(path) as device:
        head = torch.eye(8, 16, device=device).bfloat16()
        h = torch.zeros(1, 16, device=device).bfloat16()
        h[0, 1], h[0, 2] = 3, 2.5
        r = h.clone()
        r[0, 3] = 30
        args = h, head, torch.tensor([0], device=device), h.new_ones(1).float(), r, h.new_ones(1).float()
        assert max(error(run(linear_ce_kl, *args), run(textbook, *args, dtype=torch.float64))) < 6e-3
        with torch.no_grad(), mock.patch.object(ck, "_launch", wraps=ck._launch) as launch:
            linear_ce_kl(*args)                               # for the loss alone it does not matter
            assert launch.call_count == (path == "kernel")


@PATHS
def test_upstream_gradient_may_differ_by_row(path):
    """Rows with upstream gradient 0 add nothing; the trained head sees each row's own factor."""
    with on(path) as device:
        args = make(60, 90, 20, device=device)
        upstream = torch.zeros(60, device=device)
        upstream[4:9] = torch.tensor([3.0, -1, 0.5, 2, 1], device=device)
        _, d_hidden, d_head = run(linear_ce_kl, *args, upstream)
        rows = slice(4, 9)
        part = [t if t.shape == args[1].shape else t[rows] for t in args]
        _, d_part, d_head_part = run(linear_ce_kl, *part, upstream[rows])
        torch.testing.assert_close(d_head, d_head_part, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(d_hidden[rows], d_part, rtol=1e-5, atol=1e-6)
        assert (d_hidden[:4] == 0).all() and (d_hidden[9:] == 0).all()


# --------------------------------------------------------------------------------------------- what is not computed

@PATHS
def test_masked_and_weightless_rows_cost_nothing(path, monkeypatch):
    with on(path) as device:
        h, head, y, w, r, lam = make(50, 90, 20, device=device)
        monkeypatch.setattr(ck, "_launch", None)            # any work would fail
        monkeypatch.setattr(ck, "_plain_dlogits", None)
        h[:] = float("nan")                                 # and whatever is in such rows is not read
        for args in ((0 * y - 100, w, r, lam), (y, 0 * w, r, 0 * lam)):
            for t in run(linear_ce_kl, h, head, *args):
                assert (t == 0).all()
        assert linear_ce_kl(h[:0], head, y[:0]).shape == (0,)


@PATHS
def test_only_counting_rows_reach_a_gemm_and_logits_are_never_whole(path, monkeypatch):
    with on(path) as device:
        h, head, y, w, r, lam = make(700, 90, 20, device=device)
        sizes, name = [], "_plain_dlogits" if path == "plain" else "_launch"
        real = getattr(ck, name)

        def spy(*args):
            rows, ref = (args[2], args[5]) if path == "plain" else (args[3], args[5])
            sizes.append((len(rows), ref is not None))
            return real(*args)

        monkeypatch.setattr(ck, name, spy)
        monkeypatch.setattr(ck, "PLAIN_ROWS", 128)
        monkeypatch.setattr(ck, "GPU_BUFFER", 0)            # the least: chunks of 128 rows
        linear_ce_kl(h, head, y, w, r, lam)
        kept = y != -100
        assert max(n for n, _ in sizes) <= 128
        assert sum(n for n, ref in sizes if ref) == (kept & (lam != 0)).sum()
        assert sum(n for n, ref in sizes if not ref) == (kept & (lam == 0) & (w != 0)).sum()


@PATHS
def test_loss_without_gradient_is_the_same_loss(path):
    with on(path) as device:
        h, head, y, w, r, lam = make(40, 300, 20, device=device)
        alone = linear_ce_kl(h, head, y, w, r, lam)
        exact = dict(rtol=1e-6, atol=1e-6) if device == "cuda" else dict(rtol=0, atol=0)       # two compilations there
        torch.testing.assert_close(linear_ce_kl(h.requires_grad_(), head, y, w, r, lam).detach(), alone, **exact)
        with torch.no_grad(), mock.patch.object(ck, "mm", ck.mm if path == "plain" else None):      # no e W
            torch.testing.assert_close(linear_ce_kl(h, head, y, w, r, lam), alone, **exact)
        head.requires_grad_()                               # and the head alone may be trained
        linear_ce_kl(h.detach(), head, y, w, r, lam).sum().backward()
        truth = run(textbook, h, head, y, w, r, lam, dtype=torch.float64)[2]
        assert (head.grad - truth).norm() < 1e-5 * truth.norm()


# --------------------------------------------------------------------------------------------- offsets, nan, errors

def sparse(folder, shape, stride, dtype, device):
    """A tensor whose rows lie far apart: on a CPU in a file full of holes."""
    size = (shape[0] - 1) * stride + shape[1]
    if device == "cuda":
        return torch.empty(size, dtype=dtype, device=device).as_strided(shape, (stride, 1))
    return torch.from_file(str(folder / "holes"), shared=True, size=size, dtype=dtype).as_strided(shape, (stride, 1))


@PATHS
def test_head_and_hidden_beyond_2_31_elements(path, tmp_path):
    with on(path) as device:
        h, head, y, w, r, lam = make(4, 4, 20, device=device)
        far = sparse(tmp_path, (4, 20), 3 * 2**28 + 8, torch.float32, device)
        assert 3 * far.stride(0) > 2**31
        want = linear_ce_kl(h, head, y, w, r, lam)
        torch.testing.assert_close(linear_ce_kl(h, far.copy_(head), y, w, r, lam), want)
        torch.testing.assert_close(linear_ce_kl(far.copy_(h), head, y, w, r, lam), want)


@pytest.mark.parametrize("ref", [False, True])
def test_buffer_of_e_beyond_2_31_elements(tmp_path, ref):
    with on("kernel") as device:
        C = 2 if ref else 4
        h, head, y, _, r, _ = make(C, 70, 16, device=device)
        y[:] = 3
        shift = torch.zeros(3, C, device=device)
        want, stat, target_logit = ck._launch(True, head, head, h, y, r if ref else None, shift)
        out = sparse(tmp_path, (4, 70), 3 * 2**28 + 8, torch.float32, device)
        ck._head_kernel[(2,)](h, r, head, head, y.int(), shift, out, stat, target_logit, C, 70, 16, 16, out.stride(0), D=16,
                              REF=ref, REF_HEAD=False, GRAD=True, REF_OUT=ref, BN=64, BV=64, BD=16)
        torch.testing.assert_close(out.clone(), want.clone(), rtol=1e-5, atol=1e-5)


def test_a_target_that_is_no_column_is_not_silent():
    """-1 is no ignored target here: the kernel says nan, the plain path raises."""
    h, head, y, w, r, lam = make(5, 100, 30)
    y[:] = 3
    y[2] = -1
    with on("kernel") as device:
        loss = linear_ce_kl(*(t.to(device) for t in (h, head, y)))
        assert loss.isnan().tolist() == [False, False, True, False, False]
    with on("plain"), pytest.raises((RuntimeError, IndexError)):
        linear_ce_kl(h, head, y)


@PATHS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_are_not_hidden(path, bad, dtype):
    with on(path) as device:
        clean = make(40, 130, 20, dtype=dtype, device=device)
        clean[2][clean[2] == -100] = 5
        clean[3], clean[5] = clean[3] + 3, clean[5] + 1
        clean[5][::2] = 0
        want = run(linear_ce_kl, *clean)
        for at, row in ((0, 30), (0, 31), (4, 31), (3, 30), (5, 31)):          # h of a CE and a KL row, r, w, lambda
            args = [t.clone() for t in clean]
            args[at].reshape(40, -1)[row, -1] = bad
            loss, grad, d_head = run(linear_ce_kl, *args)
            assert not loss[row].isfinite() and not grad[row].isfinite().all() and not d_head.isfinite().all()
            others = torch.arange(40, device=device) != row
            torch.testing.assert_close(loss[others], want[0][others])
            torch.testing.assert_close(grad[others], want[1][others])
        for row in (5, 129):                                                    # the head, in a target's row or not
            args = [t.clone() for t in clean]
            args[1][row, 2] = bad
            loss, grad, _ = run(linear_ce_kl, *args)
            assert not (loss.isfinite() & grad.isfinite().all(1)).any()
            assert loss.isnan().all() or not math.isnan(bad)                    # -inf is a logit like any other, of probability 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["kl", "kl near", "kl far", "mixed", "same"])
@pytest.mark.parametrize("trained", [False, True])
def test_what_the_reference_makes_of_the_head_can_be_kept(kind, dtype, trained):
    """As (N, 2D): the same loss, a gradient that is nearly as exact, and exactly 0 where the student is the reference. A trained head does without it."""
    with on("kernel") as device:
        h, head, y, w, r, lam = make(160, 611, 70, {"kl near": 0.003, "kl far": 0.5}.get(kind, 0.05), dtype, device)
        if kind != "mixed":
            w, lam = torch.zeros_like(w), torch.ones_like(lam)
        r = h.clone() if kind == "same" else r
        mean = ((r.double() @ head.double().T).softmax(1) @ head.double()).to(dtype)
        found = []
        for ref in (r, torch.cat((r, mean), 1)):
            h_, head_ = h.detach().requires_grad_(), head.detach().requires_grad_(trained)
            loss = linear_ce_kl(h_, head_, y, w, ref, lam)
            loss.sum().backward()
            found.append((loss.detach(), h_.grad, head_.grad))
        assert torch.equal(found[0][0], found[1][0]) or kind == "kl far"        # there alpha may be found in another attempt
        if kind == "same":
            assert (found[1][1] == 0).all()
            return
        truth = run(textbook, h, head, y, w, r, lam, dtype=torch.float64)
        errors = [((grads[1].double() - truth[1]).norm() / truth[1].norm()).item() for grads in found]
        assert errors[1] < 2.5 * errors[0] + 1e-6 and errors[1] < 8e-3          # eager code in bf16 has .1 and more
        assert not trained or torch.equal(found[0][2], found[1][2])


def test_what_does_not_fit_is_refused():
    h, head, y, w, r, lam = make(6, 9, 4)
    for args in ((h, head[:, :3], y), (h, head, y[:5]), (h, head, y, w[:5]), (h, head, y, w, r[:5], lam), (h, head, y, w, r[:, :3], lam),
                 (h, head, y, w, None, lam), (h, head, y, w, r, lam[:5]), (h.double(), head, y), (h, head, y.float()), (h, head, y, w, r, lam, head[:5])):
        with pytest.raises(AssertionError):
            linear_ce_kl(*args)
    assert torch.equal(linear_ce_kl(h, head, y, w, None, 0 * lam), linear_ce_kl(h, head, y, w))      # lambda 0 needs none
    with pytest.raises((IndexError, RuntimeError)):
        linear_ce_kl(h, head, y * 0 + 9)


# --------------------------------------------------------------------------------------------- real shapes

@pytest.mark.gpu
@pytest.mark.parametrize("D", [1024, 2560])
def test_real_shapes(D):
    """Qwen3's vocabulary, 32k tokens: memory, determinism, exact zero, and 64 rows against fp64."""
    h, head, y, r = make_data(32768, 151936, D, torch.bfloat16, "cuda", 0.03)
    one = torch.ones(len(h), device="cuda")
    results = []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results.append(run(linear_ce_kl, h, head, y, one / 2, r, one, trained=False)[:2])
        assert torch.cuda.max_memory_allocated() - before < 2 * h.numel() * 8 + 8e8        # run() makes fp64 copies
    assert all(torch.equal(a, b) for a, b in zip(*results))
    few = h[:64], head, y[:64], one[:64] / 2, r[:64], one[:64]
    truth = run(textbook, *few, dtype=torch.float64, trained=False)[:2]
    eager = error(run(textbook, *few, trained=False)[:2], truth)
    assert all(a <= b / 2 for a, b in zip(error([t[:64] for t in results[0]], truth), eager))
    assert all((t == 0).all() for t in run(linear_ce_kl, h, head, y, 0 * one, h, one, trained=False)[:2])
    few = [t[:64] if len(t) == len(h) else t for t in (h, head, y, one, r, one)]
    truth = run(textbook, *few, dtype=torch.float64)
    assert error(run(linear_ce_kl, *few), truth)[2] < 6e-3
