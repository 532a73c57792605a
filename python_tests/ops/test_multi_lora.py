"""Many LoRA adapters in one op: facts beyond the laws of test_ops.py."""

import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import OPS, backends

import peft_kernels as pk
from peft_kernels.check import DTYPES, compare
from peft_kernels.ops import _philox

BACKENDS = backends("multi_lora_add", "reference", "cpu", "triton")
RANKS = (3, 0, 8, 1, 24, 70)


def problem(rows=(90,), k=50, n=37, ranks=RANKS, dtype=torch.float32, seed=0):
    """(x, w, bias, lists of a [r, k] and b [n, r], r_indptr, scaling, ids); every number from -1 on serves some row."""
    made = torch.Generator().manual_seed(seed)
    x, w, bias = (torch.randn(s, generator=made, dtype=dtype) for s in ((*rows, k), (n, k), (n,)))
    a = [torch.randn(r, k, generator=made, dtype=dtype) for r in ranks]
    b = [torch.randn(n, r, generator=made, dtype=dtype) for r in ranks]
    ids = torch.randint(-1, len(ranks), (x[..., 0].numel(),), generator=made)
    return x, w, bias, a, b, torch.tensor((0, *ranks)).cumsum(0), torch.linspace(-1, 2, len(ranks)), ids


def flat(a, b):
    return torch.cat(a), torch.cat([f.T for f in b])


def by_hand(x, w, bias, a, b, scaling, ids, p=0.0, rng=None):
    """One adapter after the other."""
    y = F.linear(x, w, bias)
    dropped = _philox.dropout(x, p, rng)
    for l, scale in enumerate(scaling.tolist()):
        update = scale * (dropped @ a[l].T) @ b[l].T
        y = y + torch.where((ids == l)[:, None], update, 0)
    return y


@pytest.mark.parametrize("p", (0.0, 0.3))
@pytest.mark.parametrize("name", BACKENDS)
def test_equals_one_adapter_after_the_other(name, p):
    sizes = dict(k=300, n=70) if name == "triton" else dict(k=900, n=410)  # the interpreter is slow
    x, w, bias, a, b, r_indptr, scaling, ids = problem(**sizes)
    rng = torch.tensor([5, 6])
    leaves = [t.requires_grad_() for t in (x, *a, *b)]
    with pk.backend(name):
        y = pk.ops.multi_lora_linear(x, w, bias, a, b, r_indptr, scaling, ids, p=p, rng=rng)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    xd, ad, bd = exact[0], exact[1 : 1 + len(a)], exact[1 + len(a) :]
    truth = by_hand(xd, w.double(), bias.double(), ad, bd, scaling, ids, p, rng)
    torch.testing.assert_close(y.double(), truth, atol=2e-3, rtol=1e-5)
    g = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves, g)
    for got, expected in zip(ours, torch.autograd.grad(truth, exact, g.double()), strict=True):
        torch.testing.assert_close(got.double(), expected, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_without_an_adapter_keep_the_bits_of_the_linear(name, dtype):
    """-1, rank 0 and numbers beyond the last adapter; also where x is not contiguous, and -0."""
    x, w, bias, a, b, r_indptr, scaling, ids = problem((6, 15), dtype=dtype)
    x, ids = x.transpose(0, 1), torch.where(ids == 2, 99, ids)
    x[0, 0], bias[:] = 0, -0.0
    ids[0] = -1
    base = (ids < 0) | (ids == 1) | (ids == 99)
    with pk.backend(name):
        y = pk.ops.multi_lora_linear(x, w, bias, *flat(a, b), r_indptr, scaling, ids).flatten(0, 1)
    plain = F.linear(x, w, bias).flatten(0, 1)
    assert torch.equal(y[base], plain[base])
    assert torch.equal(y[base].signbit(), plain[base].signbit())
    assert (y[~base] != plain[~base]).any(1).all()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_nan_stays_with_its_row_and_adapter(name):
    x, w, _, a, b, r_indptr, scaling, ids = problem()
    row = int((ids == 4).nonzero()[0])
    grads = []
    for bad in (0.0, torch.nan, torch.inf):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *flat(a, b))]
        with torch.no_grad():
            leaves[0][row, 3] += bad
        with pk.backend(name):
            y = pk.ops.multi_lora_linear(leaves[0], w, None, *leaves[1:], r_indptr, scaling, ids)
            grads.append((y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))))
    own = torch.zeros(len(leaves[1]), dtype=torch.bool)
    own[r_indptr[4] : r_indptr[5]] = True
    for y, dx, da, dbt in grads[1:]:
        others = torch.arange(len(x)) != row
        assert torch.equal(y[others], grads[0][0][others])
        assert torch.equal(dx[others], grads[0][1][others])
        assert torch.equal(da[~own], grads[0][2][~own])
        assert torch.equal(dbt[~own], grads[0][3][~own])
        assert not y[row].isfinite().any()
        assert not da[own].isfinite().all(0)[3]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_diverged_adapter_harms_its_rows_alone(name):
    x, w, bias, a, b, r_indptr, scaling, ids = problem()
    with pk.backend(name):
        expected = pk.ops.multi_lora_linear(x, w, bias, a, b, r_indptr, scaling, ids)
        a[2][0], b[2][:, 0] = torch.nan, torch.inf
        y = pk.ops.multi_lora_linear(x, w, bias, a, b, r_indptr, scaling, ids)
    assert torch.equal(y[ids != 2], expected[ids != 2])
    assert y[ids == 2].isnan().all()


def test_lists_are_the_flat_bank():
    x, w, bias, a, b, *rest = problem()
    lists = [t.clone().requires_grad_() for t in (*a, *b)]
    bank = [t.requires_grad_() for t in flat(a, b)]
    one = pk.ops.multi_lora_linear(x, w, bias, lists[: len(a)], lists[len(a) :], *rest)
    two = pk.ops.multi_lora_linear(x, w, bias, *bank, *rest)
    assert torch.equal(one, two)
    da, dbt = torch.autograd.grad(two.square().sum(), bank)
    grads = torch.autograd.grad(one.square().sum(), lists)
    assert torch.equal(torch.cat(grads[: len(a)]), da)
    assert torch.equal(torch.cat([g.T for g in grads[len(a) :]]), dbt)
    none = pk.ops.multi_lora_linear(x, w, bias, [], [], torch.tensor([0]), torch.empty(0), rest[-1])
    assert torch.equal(none, F.linear(x, w, bias))


def test_one_number_for_each_index_of_the_leading_dim():
    x, w, bias, a, b, r_indptr, scaling, _ = problem((5, 2, 3))
    ids = torch.tensor([4, -1, 0, 2, 4], dtype=torch.int32)
    bank = *flat(a, b), r_indptr, scaling
    y = pk.ops.multi_lora_linear(x, w, bias, *bank, ids)
    assert torch.equal(y, pk.ops.multi_lora_linear(x, w, bias, *bank, ids.repeat_interleave(6)))


def test_threads_and_row_counts_do_not_change_a_bit():
    """Groups of few and of many rows, dealt out to up to eight threads."""
    x, _, _, a, b, r_indptr, scaling, ids = problem((300,), k=800, n=500, ranks=(4, 16, 70) + (8,) * 40)
    ids[:100] = 1
    bank, y, rng = (*flat(a, b), r_indptr, scaling, ids, None, 70, 0.1), torch.randn(300, 500), torch.tensor([1, 2])
    before, outs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            with pk.backend("cpu"):
                added = OPS["multi_lora_add"].run(y, x, *bank, rng)
                outs.append((added, *OPS["multi_lora_add_backward"].run(y, x, *bank, rng, (True, True, True))))
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(torch.equal(p, q) for p, q in zip(outs[0], other, strict=True))


@pytest.mark.parametrize("name", BACKENDS)
def test_one_adapter_for_all_rows_is_lora(name):
    """x is wide enough for Triton to split its sums."""
    x, w, bias, (a, *_), (b, *_), *_ = problem(k=300)
    rng, ids = torch.tensor([3, 4]), torch.zeros(len(x), dtype=torch.int64)
    index = torch.tensor([0, 3]), torch.tensor([0.5]), ids
    with pk.backend(name):
        many = pk.ops.multi_lora_linear(x, w, bias, a, b.T, *index, p=0.2, rng=rng)
        torch.testing.assert_close(
            many, pk.ops.lora_linear(x, w, bias, a, b, 0.5, p=0.2, rng=rng), atol=1e-4, rtol=1e-5
        )


def test_one_graph_for_every_distribution_of_rows():
    x, w, bias, a, b, r_indptr, scaling, _ = problem((64,))
    bank = [t.requires_grad_() for t in flat(a, b)]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def call(ids, r_indptr):
        plan = pk.ops.lora_plan(ids, r_indptr, 16)
        return pk.ops.multi_lora_linear(x, w, bias, *bank, r_indptr, scaling, ids, plan=plan), plan

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for seed in range(4):
        ids = torch.randint(-1, len(RANKS), (64,), generator=torch.Generator().manual_seed(seed)).clamp(max=seed)
        (y, plan), (expected, eager_plan) = compiled(ids, r_indptr), call(ids, r_indptr)
        assert torch.equal(plan, eager_plan)
        torch.testing.assert_close(y, expected)
        for ours, eager in zip(
            torch.autograd.grad(y.sum(), bank), torch.autograd.grad(expected.sum(), bank), strict=True
        ):
            torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(-2, 6), max_size=60),
    ranks=st.lists(st.sampled_from((0, 1, 8)), max_size=5),
    block=st.sampled_from((1, 4, 16, 32, 64)),
    dtype=st.sampled_from((torch.int32, torch.int64)),
)
def test_a_plan_has_every_row_of_an_adapter_once(ids, ranks, block, dtype):
    m, adapters = len(ids), len(ranks)
    plan = pk.ops.lora_plan(torch.tensor(ids, dtype=dtype), torch.tensor([0, *ranks]).cumsum(0), block)
    assert plan.dtype == torch.int32
    assert plan.shape == (-(-m // block) + min(adapters, m), 1 + block)
    owners, rows = plan[:, 0].tolist(), []
    assert owners == sorted(owners)
    for owner, tile in zip(owners, plan[:, 1:].tolist(), strict=True):
        own = [i for i in tile if i >= 0]
        assert tile == own + [-1] * (block - len(own))
        assert bool(own) == (owner < adapters)
        assert {ids[i] for i in own} <= {owner}
        rows += own
    served = [i for i in range(m) if 0 <= ids[i] < adapters and ranks[ids[i]]]
    assert rows == sorted(served, key=lambda i: ids[i])
    full = [len([i for i in tile if i >= 0]) == block for tile in plan[:, 1:].tolist()]
    assert all(f for f, owner, after in zip(full, owners, owners[1:], strict=False) if owner == after < adapters)


@pytest.mark.parametrize(
    ("ids", "r_indptr", "block_m", "message"),
    [
        (torch.zeros(2), torch.tensor([0, 2]), 16, "ids is torch.float32"),
        (torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0, 2]), 16, "one dimension"),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 16, r"expected at least 1, \[L \+ 1\]"),
        (torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]), 0, "block_m is 0"),
        (torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2], device="meta"), 16, "on meta"),
    ],
)
def test_what_no_plan_can_be_made_of_is_named(ids, r_indptr, block_m, message):
    with pytest.raises(ValueError, match=message):
        pk.ops.lora_plan(ids, r_indptr, block_m)


def test_apply_writes_into_y_and_has_no_gradient():
    x, _, _, a, b, *rest = problem()
    y = torch.randn(90, 37)
    bank = flat(a, b)
    expected = pk.ops.multi_lora_add(y, x, *bank, *rest)
    for out in (y.clone(), y.T.contiguous().T):
        assert pk.ops.lora_apply_(out, x, *bank, *rest) is None
        assert torch.equal(out, expected)
    with pytest.raises(RuntimeError, match="no gradient"):
        pk.ops.lora_apply_(y, x.requires_grad_(), *bank, *rest)
    with torch.no_grad():
        pk.ops.lora_apply_(y, x, *bank, *rest)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("slice_n", ((37,), (30, 7)))
def test_apply_does_not_round_y_in_autocast(slice_n):
    (y, x, *bank), _ = sliced(slice_n, RANKS)
    with torch.autocast("cpu", torch.bfloat16):
        out = y.clone()
        pk.ops.lora_apply_(out, x, *bank, slice_n=slice_n)
    pk.ops.lora_apply_(y, x, *bank, slice_n=slice_n)
    assert torch.equal(out, y)
    pk.ops.lora_apply_(*(t.to("meta") for t in (y, x, *bank)), slice_n=slice_n)  # which autocast does not know


def test_trainable_base_weights_are_trained_and_scaling_is_not():
    x, w, bias, a, b, r_indptr, scaling, ids = problem()
    w.requires_grad_(), bias.requires_grad_()
    y = pk.ops.multi_lora_linear(x, w, bias, a, b, r_indptr, scaling, ids)
    dw, dbias = torch.autograd.grad(y.sum(), (w, bias))
    torch.testing.assert_close(dw, x.sum(0).expand_as(w))
    torch.testing.assert_close(dbias, torch.full_like(bias, len(x)))
    y = pk.ops.multi_lora_linear(x, w, bias, a, b, r_indptr, scaling.requires_grad_(), ids)
    with pytest.raises(RuntimeError, match="scaling are frozen"):
        y.sum().backward()


BAD = {
    "bank": (dict(a_flat=torch.ones(3, 49)), r"expected \[R, 50\]"),
    "lists": (dict(a_flat=[torch.ones(106, 50)], bt_flat=[torch.ones(37, 106)]), "1 adapters are listed"),
    "dtypes": (dict(a_flat=torch.ones(106, 50).double()), "same dtype"),
    "indptr": (dict(r_indptr=torch.zeros(7)), "expected int32 or int64"),
    "scaling": (dict(scaling=torch.ones(5)), r"expected \[L\], \[L \+ 1\]"),
    "ids": (dict(ids=torch.zeros(89, dtype=torch.int64)), "90 rows"),
    "plan": (
        dict(plan=pk.ops.lora_plan(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 2]))),
        "no plan of 90 rows",
    ),
    "plan_dtype": (dict(plan=torch.zeros(8, 65, dtype=torch.int64)), "plan is torch.int64"),
    "plan_device": (dict(plan=torch.zeros(8, 65, dtype=torch.int32, device="meta")), "ids and plan there"),
    "r_max": (dict(r_max=-1), "at least the rank"),
    "w": (dict(w=torch.ones(37, 51)), r"expected \[out, 50\]"),
    "device": (dict(scaling=torch.ones(6, device="meta")), "move the bank"),
    "p": (dict(p=0.5), "needs rng"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    x, w, bias, a, b, r_indptr, scaling, ids = problem()
    a_flat, bt_flat = flat(a, b)
    good = dict(x=x, w=w, bias=bias, a_flat=a_flat, bt_flat=bt_flat, r_indptr=r_indptr, scaling=scaling, ids=ids)
    bad, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        pk.ops.multi_lora_linear(**{**good, **bad})


def test_a_bank_shorter_than_its_ranks_is_refused():
    x, w, bias, a, b, r_indptr, scaling, ids = problem()
    with pytest.raises(RuntimeError, match="rise from 0 to the 105 ranks"):
        pk.ops.multi_lora_linear(x, w, bias, *(t[1:] for t in flat(a, b)), r_indptr, scaling, ids)


# -- a given plan, any shapes, slices ---------------------------------------------------------------------------------

ANY_RANK = (0, 1, 3, 4, 8, 12, 16, 24, 64, 100)


def outputs(name, y, x, bank, plan, r_max, p=0.0, rng=None):
    """(y, dx, da, dbt) of the sum's op and its backward, y being the gradient too."""
    args = (*bank, plan, r_max, p, rng)
    with pk.backend(name):
        added = OPS["multi_lora_add"].run(y, x, *args)
        return added, *OPS["multi_lora_add_backward"].run(y, x, *args, (True, True, True))


def close(ours, plain, truth, what):
    for i, tensors in enumerate(zip(ours, plain, truth, strict=True)):
        _, wrong = compare(*tensors)
        assert not wrong, f"{what}, output {i}: {wrong}"


def against_fp64(name, y, x, bank, plan, r_max, p=0.0, rng=None, what=""):
    """The outputs of a backend, held to the law of check.py."""
    ours, plain = (outputs(n, y, x, bank, plan, r_max, p, rng) for n in (name, "reference"))
    exact = [t.double() if t.is_floating_point() else t for t in (y, x, *bank)]
    close(ours, plain, outputs("reference", *exact[:2], exact[2:], None, r_max, p, rng), what)
    return ours


@pytest.mark.parametrize("block_m", (5, 16, 32, 64, 96))
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_a_given_plan_changes_nothing(name, block_m):
    """Bit for bit where it is the plan that a backend makes by itself, and on the CPU, which makes none."""
    x, _, _, a, b, *index = problem((70,))
    bank, y = (*flat(a, b), *index), torch.randn(70, 37)
    made = 16  # what Triton takes for 70 rows of 6 adapters
    ours = against_fp64(name, y, x, bank, pk.ops.lora_plan(index[2], index[0], block_m), 70)
    if name == "cpu" or block_m == made:
        for given, none in zip(ours, outputs(name, y, x, bank, None, 70), strict=True):
            assert torch.equal(given, none)


@pytest.mark.parametrize("r_max", (100, 106))
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_a_wide_bound_of_the_ranks_changes_nothing(name, r_max):
    x, _, _, a, b, *index = problem((20,))
    bank, y = (*flat(a, b), *index), torch.randn(20, 37)
    against_fp64(name, y, x, bank, None, r_max)


# id: ids of the rows, ranks
PATTERNS = {
    "ids_out_of_range": ((-5, 9, 2, -1, 3, 2**31 - 1, 1), (2, 3, 4)),
    "no_adapters": ((0, -1, 3), ()),
    "one_adapter": ((0,) * 40, (5,)),
    "257_adapters": (tuple(range(0, 257, 16)), (1, 2) * 128 + (1,)),
    "empty_first_middle_last": ((3, 1, 3, 1, 1), (2, 3, 4, 5, 6)),
    "all_base": ((-1,) * 7, (2, 3)),
    "every_rank": (tuple(range(len(ANY_RANK))) * 3, ANY_RANK),
    "no_rows": ((), (2, 3)),
}


@pytest.mark.parametrize("case", PATTERNS)
@pytest.mark.parametrize("name", BACKENDS[1:])
def test_ids_and_ranks_of_every_kind(name, case):
    ids, ranks = PATTERNS[case]
    x, _, _, a, b, r_indptr, scaling, _ = problem((len(ids),), 33, 18, ranks or (0,))
    a, bt = (t[: sum(ranks)] for t in flat(a, b))
    numbers = torch.tensor(ids, dtype=torch.int64)
    bank = a, bt, r_indptr[: len(ranks) + 1], scaling[: len(ranks)], numbers
    y = torch.randn(len(ids), 18)
    added, dx, da, dbt = against_fp64(name, y, x, bank, None, max(ranks, default=0), what=case)
    base = torch.tensor([not (0 <= i < len(ranks)) or ranks[i] == 0 for i in ids], dtype=torch.bool)
    assert torch.equal(added[base], y[base])
    assert not dx[base].any()
    for l, (first, last) in enumerate(itertools.pairwise(bank[2].tolist())):
        assert l in ids or not (da[first:last].any() or dbt[first:last].any()), f"adapter {l} has no rows"


@st.composite
def any_problem(draw, rows):
    ranks = draw(st.lists(st.sampled_from(ANY_RANK[:-2]), max_size=6))
    ids = draw(st.lists(st.integers(-1, len(ranks)), max_size=rows))
    k, n, seed = (draw(st.integers(1, high)) for high in (90, 90, 1000))
    dtype, low = draw(st.sampled_from([(d, low) for d in DTYPES for low in {d, torch.float32}]))
    block_m, wider = draw(st.sampled_from((None, 16, 64))), draw(st.integers(0, 5))
    x, _, _, a, b, r_indptr, scaling, _ = problem((len(ids),), k, n, ranks or (0,), seed=seed)
    y = torch.randn(len(ids), n, generator=torch.Generator().manual_seed(seed))
    a, bt = (t.to(low) for t in flat(a, b))
    ids = torch.tensor(ids, dtype=draw(st.sampled_from((torch.int32, torch.int64))))
    r_indptr, scaling = r_indptr[: len(ranks) + 1], scaling[: len(ranks)]
    plan = pk.ops.lora_plan(ids, r_indptr, block_m) if block_m else None
    p = draw(st.sampled_from((0.0, 0.3)))
    rng = torch.tensor([seed, 3]) if p else None
    return y.to(dtype), x.to(dtype), (a, bt, r_indptr, scaling, ids), plan, max(ranks, default=0) + wider, p, rng


@settings(max_examples=80, deadline=None, derandomize=True)
@given(any_problem(rows=60))
def test_any_problem(drawn):
    """Forward and the three gradients on the CPU kernels against fp64; two runs give the same bits."""
    for ours, again in zip(against_fp64("cpu", *drawn), outputs("cpu", *drawn), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize("name", BACKENDS[2:])
@settings(max_examples=12, deadline=None, derandomize=True)
@given(drawn=any_problem(rows=20))
def test_any_problem_on_a_gpu(name, drawn):
    for ours, again in zip(against_fp64(name, *drawn), outputs(name, *drawn), strict=True):
        assert torch.equal(ours, again)


def sliced(slice_n, ranks, rows=40, k=50, dtype=torch.float32):
    """(y, x, a_flat, bt_flat, r_indptr, scaling, ids) and, for each slice, its own (a_flat, bt_flat)."""
    own = [problem((rows,), k, n, ranks, dtype, seed) for seed, n in enumerate(slice_n)]
    x, r_indptr, scaling, ids = own[0][0], *own[0][5:]
    a = torch.cat([factor for adapter in zip(*(o[3] for o in own), strict=True) for factor in adapter])
    bt = torch.cat([flat(*o[3:5])[1] for o in own], 1)
    y = torch.randn(rows, sum(slice_n), generator=torch.Generator().manual_seed(9), dtype=dtype)
    return (y, x, a, bt, r_indptr, scaling, ids), [flat(*o[3:5]) for o in own]


@pytest.mark.parametrize("slice_n", ((37,), (24, 8, 8), (400, 1)))
@pytest.mark.parametrize("ranks", (RANKS, (4,) * 5 + (100,)))
@pytest.mark.parametrize("name", BACKENDS)
def test_slices_are_separate_calls(name, slice_n, ranks):
    if name == "triton":
        slice_n = tuple(min(n, 70) for n in slice_n)
    (y, x, a, bt, r_indptr, scaling, ids), own = sliced(slice_n, ranks)
    index = r_indptr, scaling, ids
    truth = [
        OPS["multi_lora_add"].reference(
            part.double(), x.double(), *(f.double() for f in factors), *index, None, 0, 0.0, None
        )
        for part, factors in zip(y.split(slice_n, 1), own, strict=True)
    ]
    plain = [
        OPS["multi_lora_add"].reference(part, x, *factors, *index, None, 0, 0.0, None)
        for part, factors in zip(y.split(slice_n, 1), own, strict=True)
    ]
    base = (ids < 0) | (ids >= len(ranks)) | (r_indptr.diff()[ids.clamp(0, len(ranks) - 1)] == 0)
    for out in (y.clone(), y.T.contiguous().T):
        with pk.backend(name):
            assert pk.ops.lora_apply_(out, x, a, bt, *index, slice_n=slice_n, r_max=max(ranks)) is None
        close([out], [torch.cat(plain, 1)], [torch.cat(truth, 1)], slice_n)
        assert torch.equal(out[base], y[base])


def test_slices_on_threads_and_by_lists():
    (y, x, a, bt, *index), own = sliced((300, 200), (4, 70) + (8,) * 20, rows=200, k=800)
    index[2][:100] = 1
    before, outs = torch.get_num_threads(), []
    lists = a.split([2 * r for r in index[0].diff().tolist()]), [f.T for f in bt.split(index[0].diff().tolist())]
    try:
        for threads, bank in ((1, (a, bt)), (8, (a, bt)), (2, lists)):
            torch.set_num_threads(threads)
            outs.append(y.clone())
            pk.ops.lora_apply_(outs[-1], x, *bank, *index, slice_n=[300, 200])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_bad_slices_are_named():
    (y, x, a, bt, *index), _ = sliced((20, 17), RANKS)
    for slice_n in ((20, 16), (37, 0)):
        with pytest.raises(ValueError, match="add up to the 37 of y"):
            pk.ops.lora_apply_(y, x, a, bt, *index, slice_n=slice_n)
    with pytest.raises(ValueError, match=r"expected \[2 \* R, 50\]"):
        pk.ops.lora_apply_(y, x, a[1:], bt, *index, slice_n=(20, 17))
    with pytest.raises(RuntimeError, match="no gradient"):
        pk.ops.lora_apply_(y, x, a.requires_grad_(), bt, *index, slice_n=(20, 17))
