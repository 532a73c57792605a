"""The laws of every op on every backend: op x backend x dtype over the samples of its contract."""

import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

import peft_kernels as pk
from peft_kernels.check import DTYPES, compare, double, forward, gradients, outputs, with_leaves
from peft_kernels.ops import _philox
from peft_kernels.ops._op import Sample

OPS = pk.ops.all_ops()
DIFFERENTIABLE = [op for op in OPS.values() if op.gradient is not None]


def _runnable():
    """(op, backend, device): what can run in this process; on the CPU, "triton" is interpreted and "cuda" emulated."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for op, device in itertools.product(OPS.values(), devices):
        op._load(device)
        for name in ["reference", *(kernel.name for kernel in op._kernels[device])]:
            marks = [pytest.mark.gpu] if device == "cuda" else []
            yield pytest.param(op, name, device, id=f"{op.name}-{name}-{device}", marks=marks)


def _slowly(params, slow):
    return [
        pytest.param(*p.values, id=p.id, marks=[*p.marks, pytest.mark.slow] if slow(*p.values) else p.marks)
        for p in params
    ]


def _long(op, name, device, *dtype):
    """Laws that run several kernels, of ops whose kernels take long in the interpreter."""
    return name == "triton" and device == "cpu" and op.name.startswith(("nf4_l", "multi_lora", "lora_linear_slices"))


def _in_every_dtype(params):
    """What is interpreted runs in fp16 only among the slow tests: its kernels do with it what they do with bf16."""
    each = [
        pytest.param(*p.values, dtype, id=f"{str(dtype)[6:]}-{p.id}", marks=p.marks) for dtype in DTYPES for p in params
    ]
    return _slowly(each, lambda op, name, device, dtype: (name, device, dtype) == ("triton", "cpu", torch.float16))


RUNNABLE = list(_runnable())
RUNNABLE_BACK = [p for p in RUNNABLE if p.values[0].gradient is not None]
LORA_BACKENDS = [p.values[1] for p in RUNNABLE if p.values[0].name == "lora_add" and p.values[2] == "cpu"]
every_kernel = pytest.mark.parametrize(("op", "name", "device"), RUNNABLE)
every_dtype = pytest.mark.parametrize(("op", "name", "device", "dtype"), _in_every_dtype(RUNNABLE))
differentiable_kernels = pytest.mark.parametrize(("op", "name", "device"), RUNNABLE_BACK)
gradients_of_kernels = pytest.mark.parametrize(("op", "name", "device"), _slowly(RUNNABLE_BACK, _long))
gradients_in_every_dtype = pytest.mark.parametrize(
    ("op", "name", "device", "dtype"), _in_every_dtype(_slowly(RUNNABLE_BACK, _long))
)
every_differentiable = pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)


def _assert_as_good(out, plain, truth, what):
    _, wrong = compare(out, plain, truth)
    assert not wrong, f"{what}: {wrong}"


def test_the_kernels_are_here():
    """Neither the binary nor Triton may be missing where the laws below are claimed to have run."""
    names = {(p.values[0].family, p.values[1]) for p in RUNNABLE}
    assert {("lora", "cpu"), ("lora", "triton"), ("nf4", "triton"), ("rescale", "cpu"), ("sparse", "triton")} <= names


@every_dtype
def test_error(op, name, device, dtype):
    """Neither are inputs modified or handed out; and in fp32 a second run gives the same bits."""
    for sample in op.samples(dtype, device):
        before = tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, sample.args)
        with pk.backend(name):
            outs = outputs(op.run(*sample.args))
            again = outputs(op.run(*sample.args)) if dtype == torch.float32 else outs
        for a, b in zip(before, sample.args, strict=True):
            assert not isinstance(a, Tensor) or torch.equal(a, b), sample.id
        plain, truth = forward(op.reference, sample), forward(op.reference, sample, torch.float64)
        for i, (out, other, p, t) in enumerate(zip(outs, again, plain, truth, strict=True)):
            assert out.is_contiguous()
            assert torch.equal(out.nan_to_num(7.0), other.nan_to_num(7.0)), sample.id
            assert all(out.data_ptr() != a.data_ptr() for a in sample.args if isinstance(a, Tensor) and a.numel())
            _assert_as_good(out, p, t, f"{sample.id}, output {i}")


@gradients_in_every_dtype
def test_gradient_is_the_vjp_of_the_reference(op, name, device, dtype):
    for sample in op.samples(dtype, device):
        with pk.backend(name):
            grads = gradients(op, sample)
        plain = gradients(op.reference, sample)
        truth = gradients(op.reference, sample, torch.float64)
        for i, (g, p, t) in enumerate(zip(grads, plain, truth, strict=True)):
            _assert_as_good(g, p, t, f"{sample.id}, gradient of argument {sample.differentiable[i]}")


@differentiable_kernels
def test_an_output_may_be_written_into(op, name, device):
    """As Falcon does with what its layers return."""
    sample = next(iter(op.samples(torch.float32, device)))
    args, _ = with_leaves(sample)
    with pk.backend(name):
        made = op(*args)
        for out in made if isinstance(made, (list, tuple)) else (made,):
            if out.requires_grad:
                before = out.detach().clone()
                assert torch.equal(out.add_(1), before + 1)


@gradients_of_kernels
def test_each_gradient_alone(op, name, device):
    """Asking for one gradient gives the bits that asking for all gives; of kernels that are interpreted, in turn."""
    slow = device == "cpu" and name in ("triton", "cuda")
    for number, sample in enumerate(op.samples(torch.float32, device)):
        with pk.backend(name):
            together = gradients(op, sample)
            for i, position in enumerate(sample.differentiable):
                if slow and i != number % len(sample.differentiable):
                    continue
                (alone,) = gradients(op, sample._replace(differentiable=(position,)))
                assert torch.equal(alone, together[i]), f"{sample.id}, argument {position}"


@every_differentiable
def test_gradcheck(op):
    for sample in op.samples(torch.float64, "cpu"):
        args, leaves = with_leaves(sample)
        positions = sample.differentiable

        def call(*leaves, args=args, positions=positions):
            full = list(args)
            for i, leaf in zip(positions, leaves, strict=True):
                full[i] = leaf
            return outputs(op(*full))[0]

        leaves = [leaf if leaf.is_contiguous() else leaf.detach().contiguous().requires_grad_() for leaf in leaves]
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True), sample.id
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True), sample.id


@differentiable_kernels
def test_create_graph(op, name, device):
    """Second derivatives through a kernel are those of the reference, not silently wrong."""

    def second(call, sample, dtype=None):
        args, leaves = with_leaves(sample, dtype)
        out = outputs(call(*args))[0]
        first = torch.autograd.grad((out * out).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    for sample in itertools.islice(op.samples(torch.float32, device), 3):
        with pk.backend(name):
            ours = second(op, sample)
        plain, truth = second(op.reference, sample), second(op.reference, sample, torch.float64)
        for o, p, t in zip(ours, plain, truth, strict=True):
            _assert_as_good(o, p, t, sample.id)


@pytest.mark.parametrize(("rows", "k", "n"), [(300, 768, 700), (1, 4096, 4096), (2000, 96, 3000)])
def test_thread_count_does_not_change_a_bit_of_a_large_call(rows, k, n):
    """Large enough that every loop is really dealt out to threads."""
    x, g, y = torch.randn(rows, k), torch.randn(rows, n), torch.zeros(rows, n)
    a, b, rng, before = torch.randn(16, k), torch.randn(n, 16), torch.tensor([1, 2]), torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with pk.backend("cpu"):
                added, t = OPS["lora_add"].run(y, x, a, b, 1.0, 0.1, rng)
                back = OPS["lora_add_backward"].run(g, x, a, b, t, 1.0, 0.1, rng, (True, True, True))
                outs.append((added, t, *back, *OPS["rescale_backward"].run(g, g, g[0], (True, True))))
        for other in outs[1:]:
            assert all(torch.equal(p, q) for p, q in zip(outs[0], other, strict=True))
    finally:
        torch.set_num_threads(before)


@every_differentiable
def test_functorch(op):
    sample = next(iter(op.samples(torch.float32, "cpu")))
    i = sample.differentiable[0]

    def call(a):
        return outputs(op(*sample.args[:i], a, *sample.args[i + 1 :]))[0]

    def plain(a):
        return outputs(op.reference(*sample.args[:i], a, *sample.args[i + 1 :]))[0]

    a = sample.args[i]
    tangent = torch.randn_like(a)
    leaf = a.clone().requires_grad_()
    (kernel_grad,) = torch.autograd.grad(call(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda a: call(a).sum())(a), kernel_grad)
    for ours, theirs in zip(
        torch.func.jvp(call, (a,), (tangent,)), torch.func.jvp(plain, (a,), (tangent,)), strict=True
    ):
        assert torch.equal(ours, theirs)
    stacked = torch.stack([a, tangent])
    assert torch.allclose(torch.func.vmap(call)(stacked), torch.stack([plain(a), plain(tangent)]), atol=1e-6)


# The bits of torch's own GEMM, inside lora_linear, do depend on the thread count.
@pytest.mark.parametrize("op", [op for name, op in OPS.items() if "linear" not in name], ids=lambda op: op.name)
def test_thread_count_does_not_change_a_bit(op):
    before = torch.get_num_threads()
    try:
        for sample in op.samples(torch.float32, "cpu"):
            outs = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                with pk.backend("cpu"):
                    outs.append(outputs(op.run(*sample.args)))
            for other in outs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(outs[0], other, strict=True)), sample.id
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_opcheck(op):
    for sample in itertools.islice(op.samples(torch.float32, "cpu"), 5):
        args = with_leaves(sample)[0]
        checks = ["test_schema", "test_faketensor"]
        if op.gradient is not None:
            checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
        torch.library.opcheck(op.dispatch, op.grouped(tuple(args)), test_utils=checks)


@every_differentiable
def test_compiled_in_one_graph(op):
    torch._dynamo.reset()  # every op has the lambda's code, whose graphs are counted together
    compiled = torch.compile(lambda *args: outputs(op(*args))[0], fullgraph=True, backend="aot_eager")
    for sample in itertools.islice(op.samples(torch.float32, "cpu"), 2):
        for ours, eager in zip(gradients(compiled, sample), gradients(op, sample), strict=True):
            torch.testing.assert_close(ours, eager)


@every_kernel
def test_a_backend_asked_for_by_name_says_why_not(op, name, device):
    if name == "reference":
        with pytest.raises(ValueError, match="expected one of reference"), pk.backend("nonsense"):
            pass
        return
    sample = next(iter(op.samples(torch.float64, device)))
    with pk.backend(name), pytest.raises(pk.BackendError, match="float64"):
        op.run(*sample.args)
    if device == "cpu":
        with pk.backend("cuda"), pytest.raises(pk.BackendError, match="cuda"):
            op.run(*sample.args)


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_explain_and_cost(op):
    sample = next(iter(op.samples(torch.float32, "cpu")))
    row = op.explain(*sample.args)
    assert row["op"] == op.name
    assert row["backend"] == "cpu"
    assert "cuda" in op.backends()
    cost = op.cost(*sample.args)
    assert cost.flops >= 0
    assert cost.bytes > 0


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    m=st.integers(0, 40),
    k=st.integers(1, 90),
    n=st.integers(1, 90),
    r=st.integers(0, 20),
    p=st.sampled_from((0.0, 0.3)),
    dtypes=st.sampled_from([(d, low) for d in DTYPES for low in {d, torch.float32}]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_lora_on_any_shape(m, k, n, r, p, dtypes, seed):
    """Forward and backward on the CPU kernels, odd sizes and mixed dtypes, against fp64."""
    dtype, low = dtypes
    made = torch.Generator().manual_seed(m * 91 + k)
    y, x, a, b = (torch.randn(s, generator=made) for s in ((m, n), (m, k), (r, k), (n, r)))
    args = (y.to(dtype), x.to(dtype), a.to(low), b.to(low), 0.7, p, torch.tensor([seed, 3]) if p else None)
    sample = Sample("any", args, (0, 1, 2, 3))
    op = OPS["lora_add"]
    with pk.backend("cpu"):
        ours = (op.run(*args)[0], *gradients(op, sample))
    plain = (op.reference(*args)[0], *gradients(op.reference, sample))
    truth = (op.reference(*double(args))[0], *gradients(op.reference, sample, torch.float64))
    for out, other, exact in zip(ours, plain, truth, strict=True):
        _assert_as_good(out, other, exact, f"{m=} {k=} {n=} {r=} {p=} {dtypes=}")


# -- dropout ----------------------------------------------------------------------------------------------------------


def test_philox_known_answers():
    """The first vectors of the Random123 distribution's kat_vectors for philox4x32 with 10 rounds."""
    zero = [int(w[0, 0]) for w in _philox.words(torch.zeros(2, dtype=torch.int64), 1, 1)]
    assert zero == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_dropout_rate():
    rng = torch.tensor([3, 4])
    for p in (0.05, 0.5, 0.9):
        keep = _philox.keep_mask(rng, 512, 512, p)
        n = keep.numel()
        assert abs(keep.sum().item() - (1 - p) * n) < 4 * (n * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("name", LORA_BACKENDS)
def test_every_backend_drops_the_same_elements(name):
    rows, columns, p = 9, 43, 0.4
    for rng in (torch.tensor([2**40 + 1, 5]), torch.tensor([-7, -(2**50)])):
        keep = _philox.keep_mask(rng, rows, columns, p)
        x, eye = torch.ones(rows, columns), torch.eye(columns)
        with pk.backend(name):
            _, t = OPS["lora_add"].run(torch.zeros(rows, 1), x, eye, torch.zeros(1, columns), 1.0, p, rng)
            dx, da, _ = OPS["lora_add_backward"].run(
                torch.ones(rows, 1),
                x,
                torch.ones(1, columns),
                torch.ones(1, 1),
                t[:, :1],
                1.0,
                p,
                rng,
                (True, True, False),
            )
        assert torch.equal(t != 0, keep)
        assert torch.equal(dx != 0, keep)
        torch.testing.assert_close(da[0], keep.sum(0) * _philox.keep_scale(p))


def test_a_dropped_element_contributes_nothing_even_when_it_is_not_finite():
    rng = torch.tensor([1, 1])
    keep = _philox.keep_mask(rng, 4, 16, 0.5)
    x = torch.where(keep, 1.0, torch.nan)
    for name in LORA_BACKENDS:
        with pk.backend(name):
            y = pk.ops.lora_add(torch.zeros(4, 3), x, torch.ones(2, 16), torch.ones(3, 2), 1.0, p=0.5, rng=rng)
        assert y.isfinite().all(), name


@pytest.mark.parametrize("name", LORA_BACKENDS)
def test_a_nan_stays_in_its_row(name):
    x, w = torch.randn(5, 12), torch.randn(7, 12)
    a, b = torch.randn(3, 12), torch.randn(7, 3)
    clean = torch.ones(5, dtype=torch.bool)
    clean[2] = False
    bad = x.clone()
    bad[2, 4] = torch.nan
    with pk.backend(name):
        expected, got = (pk.ops.lora_linear(v, w, None, a, b, 1.0) for v in (x, bad))
    torch.testing.assert_close(got[clean], expected[clean])
    assert got[2].isnan().all()


# -- the roads --------------------------------------------------------------------------------------------------------


def test_nothing_is_kept_but_x_t_and_the_seed():
    x = torch.randn(64, 32, requires_grad=True)
    w, bias, rng = torch.randn(48, 32), torch.randn(48), torch.tensor([1, 2])
    a, b = torch.randn(4, 32, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pk.ops.lora_linear(x, w, bias, a, b, 2.0, p=0.1, rng=rng)
    known = {t.data_ptr() for t in (x, w, a, b, rng)}
    extra = [tuple(t.shape) for t in saved if t.data_ptr() not in known]
    assert extra == [(64, 4)]


def test_autocast_casts_x_and_leaves_the_adapter_in_fp32():
    x, w = torch.randn(6, 16, requires_grad=True), torch.randn(8, 16)
    a, b = torch.randn(2, 16, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.ops.lora_linear(x, w, None, a, b, 1.0)
        added = pk.ops.lora_add(torch.zeros(6, 8), x, a, b, 1.0)
    expected = pk.ops.lora_linear(x.bfloat16(), w.bfloat16(), None, a, b, 1.0)
    assert y.dtype == added.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), (x, a, b)), torch.autograd.grad(expected.sum(), (x, a, b)), strict=True
    ):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_the_in_place_form_equals_the_functional_one():
    x = torch.randn(6, 16, requires_grad=True)
    a, b = torch.randn(2, 16, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    w = torch.randn(8, 16, requires_grad=True)
    results = []
    for add in (pk.ops.lora_add, pk.ops.lora_add_):
        y = add(torch.nn.functional.linear(x, w), x, a, b, 0.5)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, w, a, b))))
    for functional, inplace in zip(*results, strict=True):
        torch.testing.assert_close(functional, inplace)
    y = torch.zeros(6, 8)
    with torch.no_grad():
        assert pk.ops.lora_add_(y, x, a, b, 0.5) is y


def test_trainable_base_weights_are_trained_too():
    x, w, bias = torch.randn(6, 16), torch.randn(8, 16, requires_grad=True), torch.randn(8, requires_grad=True)
    a, b = torch.randn(2, 16, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    ours = torch.autograd.grad(pk.ops.lora_linear(x, w, bias, a, b, 2.0).square().sum(), (w, bias, a, b))
    plain = x @ (w + 2.0 * b @ a).T + bias
    for got, expected in zip(ours, torch.autograd.grad(plain.square().sum(), (w, bias, a, b)), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_tensor_scale_is_differentiated():
    x, a, b = torch.randn(6, 16), torch.randn(2, 16), torch.randn(8, 2)
    scale = torch.tensor(0.7, requires_grad=True)
    y = pk.ops.lora_add(torch.zeros(6, 8), x, a, b, scale)
    torch.testing.assert_close(y, 0.7 * (x @ a.T) @ b.T)
    (grad,) = torch.autograd.grad(y.sum(), scale)
    torch.testing.assert_close(grad, ((x @ a.T) @ b.T).sum())


def test_threads_keep_their_backends_apart():
    """One thread's `with backend` is not seen by another."""
    args = next(iter(OPS["lora_add"].samples(torch.float32, "cpu"))).args
    seen, inside, done = [], threading.Event(), threading.Event()

    def other():
        inside.wait()
        seen.append(OPS["lora_add"].explain(*args)["backend"])
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with pk.backend("reference"):
        inside.set()
        done.wait()
        seen.append(OPS["lora_add"].explain(*args)["backend"])
    thread.join()
    assert seen == ["cpu", "reference"]


@pytest.mark.parametrize(
    ("variable", "shown"),
    [
        ("STRICT", "every backend (PEFT_KERNELS_STRICT=1) refused"),
        ("EXPLAIN", "lora_add: reference; not cpu: no kernel"),
    ],
)
def test_environment(variable, shown):
    """fp64 has no kernel: STRICT raises instead of falling back, EXPLAIN says that it does."""
    code = """
import torch
import peft_kernels as pk
x = torch.ones(2, 3, dtype=torch.float64)
pk.ops.lora_add(x, x, x[:1], x[:1].T.contiguous(), 1.0)
"""
    environment = {**os.environ, f"PEFT_KERNELS_{variable}": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode != 0) == (variable == "STRICT")
    assert shown in done.stderr


BAD = {
    "a_shape": (lambda x, w, a, b: pk.ops.lora_linear(x, w, None, a[:, 1:], b, 1.0), r"expected a \[r, 16\]"),
    "b_shape": (lambda x, w, a, b: pk.ops.lora_add(x @ w.T, x, a, b[:, :1], 1.0), "do not fit"),
    "y_shape": (lambda x, w, a, b: pk.ops.lora_add(x, x, a, b, 1.0), r"expected \(6, 8\)"),
    "w_shape": (lambda x, w, a, b: pk.ops.lora_linear(x, w.T, None, a, b, 1.0), r"expected \[8, 16\]"),
    "dtypes": (lambda x, w, a, b: pk.ops.lora_linear(x, w, None, a.bfloat16(), b, 1.0), "same dtype"),
    "device": (lambda x, w, a, b: pk.ops.lora_linear(x, w, None, a.to("meta"), b.to("meta"), 1.0), "one device"),
    "p": (lambda x, w, a, b: pk.ops.lora_linear(x, w, None, a, b, 1.0, p=1.5, rng=torch.zeros(2)), "from 0 to 1"),
    "rng": (lambda x, w, a, b: pk.ops.lora_linear(x, w, None, a, b, 1.0, p=0.5), "needs rng"),
    "l": (lambda x, w, a, b: pk.ops.rescale(x, a[0, 1:]), r"expected \[16\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call(torch.randn(6, 16), torch.randn(8, 16), torch.randn(2, 16), torch.randn(8, 2))
