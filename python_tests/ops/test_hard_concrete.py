"""Hard-concrete gates: the numbers of the paper, their distribution, and the same gates on every backend."""

import importlib
import math

import pytest
import torch
from laws import backends

import peft_kernels as pk
from peft_kernels.ops import _philox

CONTRACT = importlib.import_module("peft_kernels.ops.hard_concrete")  # the name in pk.ops is the function
every_backend = pytest.mark.parametrize("name", backends("hard_concrete"))


def gates(alpha, **kw):
    return pk.ops.hard_concrete(torch.zeros_like(alpha), torch.ones_like(alpha), alpha, **kw)


@every_backend
def test_known_gates(name):
    """At u = 1/2, which is what the deterministic gate has: closed at 0, and open at 5, where training starts."""
    with pk.backend(name):
        z = gates(torch.tensor([0.0, 1.0, 5.0, -3.0, 200.0, -200.0]))
    torch.testing.assert_close(z, torch.tensor([0.0, 0.693176, 1.0, 0.0, 1.0, 0.0]), atol=1e-6, rtol=0)


@every_backend
def test_the_noise_has_its_distribution(name):
    """P(z != 0) = sigmoid(alpha - log(-l / r)), the term of the L0 penalty: .731059 at alpha = 1."""
    n = 40_000 if name in ("reference", "cpu") else 4000
    for alpha, open_share in ((1.0, 0.731059), (0.0, 0.5), (-2.0, 0.119203)):
        with pk.backend(name):
            z = gates(torch.full((n,), alpha), rng=torch.tensor([5, int(10 * alpha)]))
        assert abs((z != 0).double().mean().item() - open_share) < 4 * (open_share * (1 - open_share) / n) ** 0.5
        assert z.min() >= 0
        assert z.max() <= 1
    with pk.backend(name):
        z = gates(torch.full((n,), 1.0), rng=torch.tensor([5, 3]))
    whole = math.e / (5 + math.e)  # z = 1 where s > 5/6, u / (1 - u) e > 5
    assert abs((z == 1).double().mean().item() - whole) < 4 * (whole * (1 - whole) / n) ** 0.5


def test_u_keeps_away_from_zero_and_one():
    logit = CONTRACT._logit(torch.tensor([0, 2**32 - 1]), torch.float64)
    u = logit.sigmoid()
    torch.testing.assert_close(u, torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64), atol=1e-7, rtol=0)
    assert CONTRACT._logit(torch.tensor([2**31]), torch.float32) == 0


@every_backend
@pytest.mark.parametrize("rng", [(2**40 + 1, 5), (-7, -(2**50))], ids=str)
def test_every_backend_has_the_same_gates(name, rng):
    alpha, group, rng = torch.randn(61, 67) * 2, torch.tensor(1.2), torch.tensor(rng)
    for kw in (dict(rng=rng), dict(rng=rng, alpha_group=group), {}):
        with pk.backend("reference"):
            expected = gates(alpha, **kw)
        with pk.backend(name):
            ours = gates(alpha, **kw)
        assert torch.equal(ours == 0, expected == 0)
        assert torch.equal(ours == 1, expected == 1)
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


@every_backend
def test_elements_and_group_have_noise_of_their_own(name):
    """Element e has word e % 4 of the counter (e // 4, 0), the group word 0 of (0, 1)."""
    rng, alpha = torch.tensor([11, 13]), torch.zeros(30)
    words = torch.stack(_philox.words(rng, 2, 8), -1)  # [2, 8, 4]
    u = 1e-4 + (1 - 2e-4) * (words >> 8).double() * 2.0**-24
    z = (u * 3 - 1.5).clamp(0, 1)
    with pk.backend(name):
        torch.testing.assert_close(gates(alpha, rng=rng).double(), z[0].flatten()[:30], atol=1e-6, rtol=0)
        whole = gates(torch.full((3,), 50.0), rng=rng, alpha_group=torch.tensor(0.0))
    torch.testing.assert_close(whole.double(), z[1, 0, 0].expand(3), atol=1e-6, rtol=0)


@every_backend
def test_gradient_of_a_gate_by_hand(name):
    """dz / dalpha = (r - l) s (1 - s) inside, and 0 where the gate is closed or whole open."""
    alpha = torch.tensor([1.0, 0.2, -1.0, 5.0], requires_grad=True)
    w = torch.tensor([2.0, -1.0, 3.0, 4.0], requires_grad=True)
    with pk.backend(name):
        out = pk.ops.hard_concrete(torch.zeros(4), w, alpha)
    dw, dalpha = torch.autograd.grad(out.sum(), (w, alpha))
    s = alpha.detach().sigmoid()
    torch.testing.assert_close(dw, (3 * s - 1.5).clamp(0, 1))
    torch.testing.assert_close(dalpha, w.detach() * 3 * s * (1 - s) * torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_nothing_is_kept_but_w_alpha_and_the_seed():
    w0, w, alpha = torch.randn(16, 9), torch.randn(16, 9, requires_grad=True), torch.randn(16, 9, requires_grad=True)
    group, rng = torch.ones((), requires_grad=True), torch.tensor([1, 2])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pk.ops.hard_concrete(w0, w, alpha, alpha_group=group, rng=rng)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (w, alpha, group, rng)}


def test_a_long_group_gradient_does_not_depend_on_threads():
    n, before = 100_003, torch.get_num_threads()
    w0, w, alpha, g = torch.zeros(n), torch.randn(n), torch.randn(n), torch.randn(n)
    group, rng = torch.tensor(0.3, requires_grad=True), torch.tensor([1, 2])
    try:
        grads = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = pk.ops.hard_concrete(w0, w, alpha, alpha_group=group, rng=rng)
            grads.append((out.detach(), *torch.autograd.grad(out, group, g)))
        assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(alpha=torch.zeros(3)), "expected one shape"),
        (dict(alpha_group=torch.zeros(1)), "expected 0-d"),
        (dict(rng=torch.zeros(2)), r"expected int64 \[2\]"),
        (dict(rng=torch.zeros(2, dtype=torch.int64, device="meta")), "one device"),
    ],
    ids=["shape", "group", "rng", "device"],
)
def test_bad_arguments_are_named(change, message):
    args = {**dict(w0=torch.zeros(4), w=torch.zeros(4), alpha=torch.zeros(4)), **change}
    with pytest.raises(ValueError, match=message):
        pk.ops.hard_concrete(**args)
