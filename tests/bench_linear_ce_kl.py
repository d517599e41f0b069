"""
Check kernels/linear_ce_kl.py against fp64, and time it against what is installed.

    python tests/bench_linear_ce_kl.py                  # Qwen3's vocabulary on a GPU, a smaller one on a CPU

Without a GPU the kernel runs in Triton's interpreter and only the CPU path is timed. The last line is JSON; the exit code
is 1 if an error is out of its bound: half of that of eager code in bf16, twice of it in fp32, or what rounding in fp32 must
leave there. A logit z is a sum of D products whose partial sums grow to z and are each rounded by up to 2^-24 of themselves:
about 2^-24 |z| sqrt(D / 3) in all, in whatever order a library adds. The gradient of a KL is made of differences of logits of
about sqrt(2 KL), and so has that error divided by this.
"""
import argparse
import atexit
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS.parent / "kernels"), str(TESTS / "tools")]
if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                # read when the kernel is decorated

from interpreter import like_a_gpu

import linear_ce_kl as ck
from linear_ce_kl import linear_ce_kl, mm

PEERS = 45              # seconds, after which the bench on a GPU leaves out what is not ours


def eager_loss(hidden, head, targets, ce_weight, ref_hidden=None, kl_weight=None):
    """The textbook's loss of each token, in the dtype of its inputs: logits are bf16 if they are, and fp64 is the truth.

    ce_weight None: no cross-entropy."""
    def logits(x):
        z = F.linear(x, head)
        return z if z.dtype == torch.float64 else z.float()
    z = logits(hidden)
    loss = 0 if ce_weight is None else ce_weight * F.cross_entropy(z, targets, reduction="none")
    if ref_hidden is not None:
        with torch.no_grad():
            log_ref = logits(ref_hidden).log_softmax(-1)
        loss = loss + kl_weight * (log_ref.exp() * (log_ref - z.log_softmax(-1))).sum(-1)
    return loss


def make_data(N, V, D, dtype, device, distance):
    """hidden (N, D), head (V, D), targets (N,) that most rows are sure of, ref_hidden (N, D) at a KL of about distance^2."""
    gen = torch.Generator(device).manual_seed(0)
    head = (torch.randn(V, D, generator=gen, device=device) / D**0.5).to(dtype)
    targets = torch.randint(0, V, (N,), generator=gen, device=device)
    noise = torch.randn(2, N, D, generator=gen, device=device)
    hidden = ((math.log(V) + 6) * head[targets].float() + 2.5 * noise[0]).to(dtype)
    return hidden, head, targets, (hidden.float() + 2.5 * distance * noise[1]).to(dtype)


def gradient(loss, hidden, *args):
    """The loss of each row and the gradient to hidden, in fp64."""
    hidden = hidden.detach().requires_grad_()
    value = loss(hidden, *args)
    value.sum().backward()
    return value.detach().double(), hidden.grad.double()


def errors(actual, expected):
    """Relative errors, rounded for print."""
    return [short((a - b).norm() / b.norm()) for a, b in zip(actual, expected)]


def short(x):
    return float(f"{x:.3g}")


def show(row):
    print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return row


@contextlib.contextmanager
def through_the_kernel():
    """In this context CPU tensors go through the kernel too, by Triton's interpreter."""
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(like_a_gpu())
        ck.INTERPRET = True
        try:
            yield
        finally:
            ck.INTERPRET = False


def check(device, N, V, D):
    """Print a line of relative errors against fp64 for every loss -> the rows, and whether each is within its bound."""
    rows, good = [], True
    print(f"relative error against fp64 of loss and gradient to hidden, {N} rows, V={V}, D={D}")
    for dtype, distance in itertools.product((torch.float32, torch.bfloat16), (None, 0.01, 0.03, 0.1, 0.3)):
        h, head, y, r = make_data(N, V, D, dtype, device, distance or 0)
        ce_weight = torch.full((N,), float(distance is None), device=device)
        args = (head, y, ce_weight) if distance is None else (head, y, ce_weight, r, 1 - ce_weight)
        wide = [a.double() if a.is_floating_point() else a for a in args]
        truth = gradient(eager_loss, h.double(), *wide)
        row = {"dtype": str(dtype)[6:], "loss": "CE" if distance is None else f"KL {truth[0].mean():.0e}"}
        if ck.triton:
            with through_the_kernel():
                row["kernel"] = errors(gradient(linear_ce_kl, h, *args), truth)
        if device == "cpu":
            row["CPU path"] = errors(gradient(linear_ce_kl, h, *args), truth)
        row["eager"] = errors(gradient(eager_loss, h, *args), truth)
        bound, least = (2, 2**-24 * (D / 3)**0.5) if dtype == torch.float32 else (0.5, 0)
        if distance:
            target_logit = (wide[0][y] * h.double()).sum(1).abs().mean().item()
            least *= target_logit / (2 * truth[0].mean().item())**0.5
        for name in row.keys() & {"kernel", "CPU path"}:
            good &= all(a <= max(bound * b, least) for a, b in zip(row[name], row["eager"]))
        if distance and dtype == torch.bfloat16:        # had g = softmax(h_ref W^T) W been cached instead of h_ref
            z = h.float() @ head.float().T
            e = (z - z.gather(1, y[:, None])).exp().bfloat16()
            g = mm(e, head) / e.float().sum(1, keepdim=True)
            g_ref = ((r.double() @ wide[0].T).softmax(1) @ wide[0]).float()
            row |= {"g fp32": errors([g - g_ref], truth[1:]), "g bf16": errors([g - g_ref.bfloat16()], truth[1:])}
        rows.append(show(row))
    return rows, good


def methods(kl):
    """name -> f(hidden, head, targets, ref_hidden) -> mean CE or KL, of what is installed."""
    def ours(h, head, y, r):
        one = h.new_ones(len(h), dtype=torch.float32)
        return (linear_ce_kl(h, head, y, 0 * one, r, one) if kl else linear_ce_kl(h, head, y)).mean()

    def eager(h, head, y, r):
        one = h.new_ones(len(h), dtype=torch.float32)
        return (eager_loss(h, head, y, None, r, one) if kl else eager_loss(h, head, y, one)).mean()

    def eager_fp32(h, head, y, r):
        return eager(h.float(), head.float(), y, r.float()) * len(h)

    def chunked(h, head, y, r):                         # TRL's default: fp32 copies of 256 rows and of the head
        parts = zip(h.split(256), y.split(256), r.split(256))
        return sum(checkpoint(eager_fp32, a, head, b, c, use_reentrant=False) for a, b, c in parts) / len(h)

    kept = []

    def ours_kept(h, head, y, r):                       # with softmax(r W^T) W beside r, made in the first call, which is not timed
        if not kept:
            from extras.cached_kl import with_head_mean
            kept.append(with_head_mean(lambda examples: r, head)([]))
        return ours(h, head, y, kept[0])

    found = {"ours": ours, "eager": eager}
    if kl and torch.cuda.is_available():
        found["ours, g kept"] = ours_kept
    if not kl and hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch chunked"] = lambda h, head, y, r: F.linear_cross_entropy(h, head, y, options=options)
    if not torch.cuda.is_available():
        return found
    found |= {"torch.compile": torch.compile(eager, dynamic=False), "fp32 chunks, as TRL": chunked}
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD
        found["Liger"] = ((lambda h, head, y, r: LigerFusedLinearJSD(jsd_beta=0.0)(h, head, r, head, y)) if kl else
                          (lambda h, head, y, r: LigerFusedLinearCrossEntropyLoss()(head, h, y)))
    if not kl and find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy
        found["cut-cross-entropy"] = lambda h, head, y, r: linear_cross_entropy(h, head, y)
    return found


def peak_memory():
    """Peak memory of this process, MB."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM")) / 1e3


def clock(f):
    """f(), seconds, peak MB above what is held: the median of up to 5 calls; on a CPU the CPU time of one call."""
    if not torch.cuda.is_available():
        Path("/proc/self/clear_refs").write_text("5")   # resets VmHWM
        before, start = peak_memory(), time.process_time()
        return f(), time.process_time() - start, peak_memory() - before
    f()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    while len(times) < 5 and sum(times) < 1:
        result = None                                   # frees the memory of the last one
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return result, statistics.median(times), (torch.cuda.max_memory_allocated() - before) / 1e6


@functools.cache
def gemm_rate(dtype, device):
    """FLOP per second of a large product: what the floor is made of."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / min(clock(lambda: a @ a)[1] for _ in range(3))


def measure(loss, trained, name, N, V, D):
    """One method on one loss -> its row: time, share of the floor, extra memory, error of 64 rows' gradient against fp64."""
    kl, few = loss == "KL", 64
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    h, head, y, r = make_data(N, V, D, dtype, device, 0.03)
    head.requires_grad_(trained)
    method = methods(kl)[name]
    row = {"D": D, "loss": loss, "head": "trained" if trained else "frozen", "method": name}
    floor = N * V * D * (4 + 2 * kl + 2 * trained) / gemm_rate(dtype, device)          # KL: logits twice, gradient once
    try:
        torch._dynamo.reset()                           # a compiled graph for this shape, not for any
        wanted = [h.requires_grad_(), head] if trained else [h.requires_grad_()]
        grads, seconds, extra = clock(lambda: torch.autograd.grad(method(h, head, y, r), wanted))
        row |= {"ms": short(seconds * 1e3), "share of floor": short(floor / seconds), "extra MB": short(extra)}
        one = torch.ones(few, device=device, dtype=torch.float64)
        wide = h[:few].detach().double(), head.detach().double(), y[:few]
        weights = (None, r[:few].double(), one) if kl else (one,)
        truth = gradient(eager_loss, *wide, *weights)[1]
        row["gradient error"] = errors([N * grads[0][:few].double()], [truth])[0]
    except Exception as error:                  # a peer that does not fit or does not run is a result too
        row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        if name == "ours":
            raise
    return row


def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Check and time the fused loss against what is installed.")
    parser.add_argument("--n", type=int, default=32768 if cuda else 4096, help="tokens")
    parser.add_argument("--v", type=int, default=151936 if cuda else 32768, help="vocabulary")
    parser.add_argument("--d", type=int, nargs="+", default=[1024, 2560] if cuda else [512], help="hidden sizes")
    args = parser.parse_args()
    start, device = time.time(), torch.cuda.get_device_name() if cuda else "cpu"
    if not cuda:
        print("no GPU here:", "the kernel runs in Triton's interpreter," if ck.triton else "no Triton either,",
              "only the CPU path is timed")
    table, good = check("cuda", 64, 20011, 1000) if cuda else check("cpu", 48, 3001, 200)
    print(f"forward and backward on {device}, N={args.n} V={args.v}, {'bf16' if cuda else 'fp32, CPU time'}")
    bench = []

    @atexit.register                            # also after a time limit, or a peer that broke the GPU's context
    def summary():
        print(json.dumps({"device": device, "torch": torch.__version__, "triton": ck.triton and ck.triton.__version__,
                          "good": good, "errors": table, "bench": bench, "seconds": round(time.time() - start, 1)}))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for d, (loss, trained) in itertools.product(args.d, (("CE", False), ("KL", False), ("CE", True))):
        for name in methods(loss == "KL"):
            job = loss, trained, name, args.n, args.v, d
            if cuda and name != "ours" and time.time() - start > PEERS:
                row = {"D": d, "loss": loss, "method": name, "failed": "left out, for lack of time"}
            elif cuda:
                row = measure(*job)
                torch.cuda.empty_cache()
            else:                                       # a process each, for an honest peak
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = pool.apply(measure, job)
            bench.append(show(row))
    print("every error is within its bound" if good else "AN ERROR IS OUT OF ITS BOUND")
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
