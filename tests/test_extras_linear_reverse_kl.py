"""extras/linear_reverse_kl.py against fp64 and against eager code."""
import pytest
import torch

from extras.linear_reverse_kl import linear_reverse_kl


@pytest.mark.parametrize("N, V, D, teacher", [(700, 501, 32, (520, 48)), (1, 3, 2, (3, 2)), (257, 1000, 16, (900, 8))])
def test_against_fp64(N, V, D, teacher):
    gen = torch.Generator().manual_seed(N)
    h, W, r, W_r, upstream = (torch.randn(*shape, generator=gen) for shape in ((N, D), (V, D), (N, teacher[1]), teacher, (N,)))
    h.requires_grad_()
    loss = linear_reverse_kl(h, W, r, W_r)
    loss.backward(upstream)
    wide, n = h.detach().double().requires_grad_(), min(V, teacher[0])
    log_p, log_q = (wide @ W[:n].double().T).log_softmax(1), (r.double() @ W_r[:n].double().T).log_softmax(1)
    want = (log_p.exp() * (log_p - log_q)).sum(1)
    want.backward(upstream.double())
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=1e-5, atol=1e-5)
    assert (h.grad - wide.grad).norm() < 1e-5 * wide.grad.norm()


def test_itself_as_teacher_is_zero_and_bad_inputs():
    h, W = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4)
    loss = linear_reverse_kl(h, W, h.detach(), W)
    loss.sum().backward()
    assert (loss == 0).all() and (h.grad == 0).all()
    for args, message in (((h, W, h[:3], W), "3 of the teacher"), ((h, W, h, W[:, :3]), "does not fit head"),
                          ((h, W.bfloat16(), h, W), "does not fit head"), ((h, W.clone().requires_grad_(), h, W), "no gradient to the head")):
        with pytest.raises(ValueError, match=message):
            linear_reverse_kl(*args)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bf16_is_no_worse_than_eager(device):
    """Gradient against fp64 of the same bf16 tensors; eager has its logits in bf16."""
    gen = torch.Generator().manual_seed(0)
    h, W, r = (torch.randn(*shape, generator=gen).to(device, torch.bfloat16) for shape in ((300, 64), (2000, 64), (300, 64)))

    def eager(h, r, W):
        log_p, log_q = ((x @ W.T).float().log_softmax(1) if x.dtype == torch.bfloat16 else (x @ W.T).log_softmax(1) for x in (h, r))
        return (log_p.exp() * (log_p - log_q)).sum(1)

    def gradient(f, h):
        h = h.detach().requires_grad_()
        f(h).sum().backward()
        return h.grad.double()
    truth = gradient(lambda h: eager(h, r.double(), W.double()), h.double())
    ours, theirs = ((gradient(f, h) - truth).norm() / truth.norm() for f in (lambda h: linear_reverse_kl(h, W, r, W), lambda h: eager(h, r, W)))
    assert ours < 0.01 and ours <= 1.1 * theirs
