"""FAR's linear layer beyond the laws of test_ops: panels, what is held, what is written, bad arguments."""

import threading

import pytest
import torch
import torch.nn.functional as F

import peft_kernels as pk
from peft_kernels.kernels.split import split_native
from peft_kernels.ops import far_linear, row_scatter_


def layer(n_out=40, n_in=24, h=11, dtype=torch.float32):
    w, bias, rows = torch.randn(n_out, n_in).to(dtype), torch.randn(n_out).to(dtype), torch.randperm(n_out)[:h]
    return w, bias, torch.randn(h, n_in, requires_grad=True), torch.randn(h, requires_grad=True), rows


def plain(x, w, bias, wt, bt, rows):
    return F.linear(x, w.index_copy(0, rows, wt), bias.index_copy(0, rows, bt))


@pytest.mark.parametrize("tokens", [0, 1, 17, 200])
@pytest.mark.parametrize("panel", [1, 24 * 4 * 7, 1 << 20])
@pytest.mark.parametrize("h", [0, 1, 11, 40])
@pytest.mark.parametrize("transposed", [False, True])
def test_panels_of_any_size_give_the_definition(monkeypatch, tokens, panel, h, transposed):
    monkeypatch.setattr(split_native, "_PANEL_BYTES", panel)
    monkeypatch.setattr(split_native, "_PANEL_PAYS", 0)
    w, bias, wt, bt, rows = layer(h=h)
    w = w.T.contiguous().T if transposed else w
    x, g = torch.randn(tokens, 24, requires_grad=True), torch.randn(tokens, 40)
    y, expected = far_linear(x, w, wt, rows, bias=bias, bt=bt), plain(x, w, bias, wt, bt, rows)
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(out, (x, wt, bt), g) for out in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_rows_that_equal_the_base_change_nothing_but_rounding():
    """Bit-equal where every product is exact, as those of small integers are."""
    w, x = torch.randint(-8, 8, (40, 24)).float(), torch.randint(-8, 8, (100, 24)).float()
    rows = torch.randperm(40)[:9]
    for tokens in (1, 100):
        assert torch.equal(far_linear(x[:tokens], w, w[rows], rows), F.linear(x[:tokens], w))


def test_x_is_held_for_the_trained_rows_alone():
    w, bias, wt, bt, rows = layer()
    x = torch.randn(5, 24, requires_grad=True)

    def held(wt):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            far_linear(x, w, wt, rows, bias=bias)
        return x.data_ptr() in {t.data_ptr() for t in saved}

    assert held(wt) and not held(wt.detach())


def test_biases_train_where_they_are_asked_to():
    w, bias, wt, bt, rows = layer()
    bias.requires_grad_()
    x, g = torch.randn(6, 24), torch.randn(6, 40)
    ours, theirs = (
        torch.autograd.grad(y, (bias, wt, bt), g)
        for y in (far_linear(x, w, wt, rows, bias=bias, bt=bt), plain(x, w, bias, wt, bt, rows))
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert not ours[0][rows].any()


def test_a_trainable_weight_is_trained_too():
    w, bias, wt, bt, rows = layer()
    w.requires_grad_()
    x = torch.randn(6, 24)
    ours = torch.autograd.grad(far_linear(x, w, wt, rows, bias=bias, bt=bt).square().sum(), (w, wt, bt))
    theirs = torch.autograd.grad(plain(x, w, bias, wt, bt, rows).square().sum(), (w, wt, bt))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_threads_share_a_weight_that_is_never_written(monkeypatch):
    monkeypatch.setattr(split_native, "_PANEL_PAYS", 0)
    w = torch.randn(200, 64)
    before, x, wrong = w.clone(), torch.randn(50, 64), []

    def run(seed):
        made = torch.Generator().manual_seed(seed)
        rows, wt = torch.randperm(200, generator=made)[:60], torch.randn(60, 64, generator=made)
        expected = far_linear(x, w, wt, rows)
        wrong.extend(seed for _ in range(20) if not torch.equal(far_linear(x, w, wt, rows), expected))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.equal(w, before)


def test_row_scatter_writes_rows_alone():
    w = torch.randn(9, 4).bfloat16()
    before, rows, src = w.clone(), torch.tensor([7, 0, 3], dtype=torch.int32), torch.randn(3, 4)
    assert row_scatter_(w, rows, src) is w
    assert torch.equal(w[[7, 0, 3]], src.bfloat16())
    rest = [1, 2, 4, 5, 6, 8]
    assert torch.equal(w[rest], before[rest])


BAD = {
    "wt": (lambda x, w, wt, rows: far_linear(x, w, wt[:, 1:], rows), ValueError, r"expected \[out, in\]"),
    "rows": (lambda x, w, wt, rows: far_linear(x, w, wt, rows.float()), ValueError, "expected int32 or int64"),
    "x": (lambda x, w, wt, rows: far_linear(x[:, 1:], w, wt, rows), ValueError, r"expected \[..., 24\] on cpu"),
    "bt": (lambda x, w, wt, rows: far_linear(x, w, wt, rows, bt=wt[:, 0]), ValueError, r"expected \[40\] or None"),
    "bias": (lambda x, w, wt, rows: far_linear(x, w, wt, rows, bias=wt[:, 0]), ValueError, r"expected \[40\]"),
    "device": (lambda x, w, wt, rows: far_linear(x, w, wt.to("meta"), rows), ValueError, "use one device"),
    "too_large": (lambda x, w, wt, rows: far_linear(x, w, wt, rows + 35), IndexError, "index"),
    "too_large_panels": (
        lambda x, w, wt, rows: far_linear(x.repeat(99, 1), w, wt, rows + 35),
        IndexError,
        "that has 40",
    ),
    "src": (lambda x, w, wt, rows: row_scatter_(w, rows, wt[1:]), ValueError, "row_scatter_"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    call, error, message = BAD[case]
    w, _, wt, _, rows = layer()
    with pytest.raises(error, match=message):
        call(torch.randn(6, 24), w, wt, rows)


def test_explain_names_the_backend():
    w, _, wt, _, rows = layer()
    row = pk.ops.all_ops()["far_linear"].explain(torch.randn(6, 24), w, None, wt, None, rows)
    assert row["backend"] == "cpu"
    assert "cuda" in row["reasons"]
