"""calibrate: the statistics are those of a loop by hand, and nothing but the tuners that asked notices."""

import pytest
import torch
from models import make
from torch import nn
from toys import Observe, Toy, Watch, toys  # noqa: F401  # a fixture

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

cross_entropy = nn.functional.cross_entropy


def watched(family, dtype=torch.float64, **kwargs):
    """(model, batches, loss_fn): 5 rows in two batches of different size."""
    case = make(family, dtype)
    made = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (5,), generator=made)
    if family == "mlp":
        x = torch.randn(5, 12, generator=made, dtype=dtype)
        pk.attach(case.model, Watch(**kwargs), ("first", "second"))
        return case.model, [(x[:3], labels[:3]), (x[3:], labels[3:])], cross_entropy
    ids = torch.randint(3, 50, (5, 7), generator=made)
    if family == "bert":
        pk.attach(case.model, Watch(**kwargs), ("q", "down"))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        return case.model, [_rows(slice(0, 3), ids, mask, labels), _rows(slice(3, 5), ids, mask, labels)], None
    pk.attach(case.model, Watch(**kwargs), ("q", "v"))
    return case.model, [{"input_ids": ids, "labels": ids}], None


def _rows(part, ids, mask, labels):
    return {"input_ids": ids[part], "attention_mask": mask[part], "note": "whole", "labels": labels[part]}


class Noting(nn.Module):
    """A model that also takes what a collator left in the batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, note=None, **batch):
        return self.model(**batch)


def by_hand(model, batches, loss_fn, tensors):
    """(mean gradient, mean squared gradient, rows) of a loop over rows."""
    for t in tensors:
        t.requires_grad_(True)
    sums, squares, n = [0] * len(tensors), [0] * len(tensors), 0
    for batch in batches:
        size = len(batch["labels"] if isinstance(batch, dict) else batch[1])
        for i in range(size):
            if isinstance(batch, dict):
                loss = model(**{k: v[i : i + 1] for k, v in batch.items() if k != "note"}).loss
            else:
                loss = loss_fn(model(batch[0][i : i + 1]), batch[1][i : i + 1])
            for k, g in enumerate(torch.autograd.grad(loss, tensors)):
                sums[k], squares[k] = sums[k] + g, squares[k] + g**2
            n += 1
    for t in tensors:
        t.requires_grad_(False)
    return [s / n for s in sums], [s / n for s in squares], n


def same(ours, expected):
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ["mlp", "bert"])
def test_statistics_are_those_of_a_loop_over_rows(family):
    model, batches, loss_fn = watched(family)
    given = model if loss_fn else Noting(model)
    vars(given)["_peft_kernels"] = vars(model)["_peft_kernels"]
    assert pk.calibrate(given, batches, loss_fn, progress=False) is given
    pairs = [(t, s.weight) for t, s in _sites(model)]
    grads, _, n = by_hand(model, batches, loss_fn, [p for t, w in pairs for p in (w, t.shift)])
    assert n == 5
    for i, (tuner, _) in enumerate(pairs):
        assert tuner.stats.samples == 5
        for k, name in enumerate(("weight", "shift")):
            same(tuner.stats.grad[name], grads[2 * i + k])


def _sites(model):
    for path, tuner in tuners(model, "default"):
        yield tuner, model.get_submodule(path)


def test_a_view_of_a_parameter_gets_its_part_of_the_gradient():
    """q and v are rows of one transposed matrix in GPT-2: watched as [out, in] or whole, the numbers are the same."""
    as_view, batches, _ = watched("gpt2", view=True)
    whole, _, _ = watched("gpt2")
    for model in (as_view, whole):
        pk.calibrate(model, batches, progress=False)
    for (_, viewing), (_, seeing) in zip(tuners(as_view, "default"), tuners(whole, "default"), strict=True):
        for (site, _, part), (_, _, other) in zip(viewing.parts(), seeing.parts(), strict=True):
            assert part.stats.grad["weight"].shape == (16, 16)
            expected, _ = site.read(other.stats.grad)
            torch.testing.assert_close(part.stats.grad["weight"], expected)
            assert expected.abs().sum() > 0


@pytest.mark.parametrize("family", ["mlp", "bert", "gpt2"])
def test_a_method_may_ask_for_the_hessian_times_the_mean_gradient(family, monkeypatch):
    """As of one batch of all rows, by differences of its gradient; also of rows of a fused matrix."""
    monkeypatch.setattr(Watch, "curvature", True)
    model, batches, loss_fn = watched(family, view=family == "gpt2")
    pk.calibrate(model, iter(batches), loss_fn, progress=False)
    found = [
        (part, site.weight if family == "gpt2" else module.weight)
        for tuner, module in _sites(model)
        for site, part in ([(s, t) for s, _, t in tuner.parts()] if family == "gpt2" else [(None, tuner)])
    ]
    assert all(part.stats.curved.keys() == {"weight", "shift"} for part, _ in found)

    def moved(step):
        with torch.no_grad():
            for part, weight in found:
                for name, t in (("weight", weight), ("shift", part.shift)):
                    t.add_(first[id(part)].grad[name].double(), alpha=step)

    first = {id(part): part.stats for part, _ in found}
    gradients = []
    for step in (1e-3, -2e-3):
        moved(step)
        pk.calibrate(model, batches, loss_fn, progress=False)
        gradients.append({id(part): part.stats.grad for part, _ in found})
    for part, _ in found:
        for name, ours in first[id(part)].curved.items():
            slope = (gradients[0][id(part)][name] - gradients[1][id(part)][name]) / 2e-3
            torch.testing.assert_close(ours, slope, rtol=1e-2, atol=1e-3 * float(slope.abs().max()) + 1e-6)
            assert ours.dtype == torch.float32 and (family != "mlp" or ours.abs().sum() > 0)


@pytest.mark.parametrize("stop", [None, RuntimeError, KeyboardInterrupt])
def test_everything_is_left_as_it_was(stop):
    model, batches, loss_fn = watched("mlp")
    pk.attach(model, pk.LoRA(rank=2, dropout=0.5), ("first",), name="other")
    model.second.eval(), model.first.train(), model.ln.train()
    model.out.weight.requires_grad_(True)
    model.out.weight.grad = torch.ones_like(model.out.weight)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    modes = {k: m.training for k, m in model.named_modules()}
    seen = []

    def loss(out, target):
        seen.append((model.training, model.first.training, torch.is_grad_enabled()))
        if stop and len(seen) == 2:
            raise stop
        return loss_fn(out, target)

    random = torch.get_rng_state()
    with torch.no_grad():
        if stop:
            with pytest.raises(stop):
                pk.calibrate(model, batches, loss, progress=False)
        else:
            pk.calibrate(model, batches, loss, progress=False)
    assert set(seen) == {(False, False, True)}
    assert torch.equal(torch.get_rng_state(), random)
    assert flags == {k: p.requires_grad for k, p in model.named_parameters()}
    assert modes == {k: m.training for k, m in model.named_modules()}
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    grads = {k for k, p in model.named_parameters() if p.grad is not None}
    assert grads == {"out.weight"}
    assert torch.equal(model.out.weight.grad, torch.ones_like(model.out.weight))


def test_steps_and_activity_decide_what_is_read():
    model, batches, loss_fn = watched("mlp")
    pk.calibrate(model, iter(batches), loss_fn, steps=1, progress=False)
    assert model.first.peft.tuners["default"].stats.samples == 3
    pk.set_active(model, [])
    pk.calibrate(model, None, progress=False)  # nobody watches: the batches are not touched


def test_a_tensor_that_the_loss_does_not_see_has_zeros():
    model, batches, _ = watched("mlp")
    pk.calibrate(model, batches, lambda out, target: model.ln.weight.sum() + model.first.weight.sum(), progress=False)
    assert model.second.peft.tuners["default"].stats.grad["weight"].abs().sum() == 0
    assert torch.equal(model.first.peft.tuners["default"].stats.grad["weight"], torch.ones(20, 12))


def test_what_is_wrong_is_said(monkeypatch):
    model, batches, loss_fn = watched("mlp")
    for args, message in (
        (([], loss_fn), "at least one batch"),
        (([3],), "expected a dict"),
        (([3], loss_fn), "expected a pair"),
        (([{"labels": torch.zeros(())}],), "has no rows"),
    ):
        with pytest.raises(ValueError, match=message):
            pk.calibrate(model, *args, progress=False)
    with pytest.raises(ValueError, match="steps = 0"):
        pk.calibrate(model, batches, loss_fn, steps=0)
    with pytest.raises(RuntimeError, match="the loss is inf at row 1"):
        pk.calibrate(model, batches, lambda out, target: out.sum() * torch.inf, progress=False)
    monkeypatch.setattr(Watch.tuner, "watched", lambda self, site: {"twice": site.weight * 2})
    with pytest.raises(ValueError, match="WatchTuner watches 'twice', which is no parameter"):
        pk.calibrate(model, batches, loss_fn, progress=False)
    pk.merge(model)
    with pytest.raises(RuntimeError, match="before calibrating"):
        pk.calibrate(model, batches, loss_fn)


# -- Tuner.observe ----------------------------------------------------------------------------------------------------


def observed(family, rows=5, dtype=torch.float64, **kwargs):
    case = make(family, dtype)
    made = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 3, (rows,), generator=made)
    if family == "mlp":
        x = torch.randn(rows, 12, generator=made, dtype=dtype)
        pk.attach(case.model, Observe(**kwargs), ("first", "second"))
        return case.model, [(x[:3], labels[:3]), (x[3:], labels[3:])], cross_entropy
    ids = torch.randint(3, 50, (rows, 7), generator=made)
    pk.attach(case.model, Observe(**kwargs), ("q", "v", "down"))
    batches = [{"input_ids": ids[i : i + 3], "labels": labels[i : i + 3]} for i in range(0, rows, 3)]
    if family != "bert":
        batches = [{**b, "labels": b["input_ids"]} for b in batches]
    return case.model, batches, None


def all_tuners(model):
    for path, adapters in pk.engine.attach.all_adapters(model):
        for tuner in adapters.tuners["default"].modules():
            if isinstance(tuner, Observe.tuner):
                yield path, adapters.site, tuner


@pytest.mark.parametrize(("family", "passes"), [("mlp", 2), ("bert", 2), ("llama", 5), ("gpt2", 5)])
def test_what_a_tuner_observes_gives_the_gradient_of_each_row(family, passes):
    """A classifier takes one pass for a batch, a language model one per row; both are those of a loop over rows."""
    model, batches, loss_fn = observed(family)
    pk.calibrate(model, batches, loss_fn, progress=False)
    for path, _, tuner in all_tuners(model):
        weight = model.get_submodule(path).weight
        _, squares, _ = by_hand(model, batches, loss_fn, [weight])
        own = squares[0] * 5
        if family == "gpt2":
            own = own.T  # [out, in]
            rows = next(s.rows for _, s, t in _parts(model) if t is tuner) if own.shape[0] == 48 else None
            own = own if rows is None else rows.of(own)
        assert tuner.passes == passes
        assert own.abs().sum() > 0
        torch.testing.assert_close(tuner.fisher, own, rtol=1e-5, atol=1e-9)


def _parts(model):
    for path, adapters in pk.engine.attach.all_adapters(model):
        top = adapters.tuners["default"]
        for label, site in getattr(top, "sites", {}).items():
            yield path, site, top._modules[label]


def test_expected_is_weighted_over_the_classes():
    model, batches, loss_fn = observed("bert", expected=True)
    pk.calibrate(model, batches, loss_fn, progress=False)
    for path, _, tuner in all_tuners(model):
        weight = model.get_submodule(path).weight.requires_grad_(True)
        expected = 0
        for batch in batches:
            for ids in batch["input_ids"]:
                log = model(input_ids=ids[None]).logits[0].log_softmax(0)
                for c in range(3):
                    (g,) = torch.autograd.grad(log[c], weight, retain_graph=True)
                    expected = expected + log[c].exp().detach() * g**2
        weight.requires_grad_(False)
        assert tuner.passes == 6
        torch.testing.assert_close(tuner.fisher, expected, rtol=1e-5, atol=1e-9)
    model, batches, loss_fn = observed("llama", expected=True)
    with pytest.raises(ValueError, match=r"probabilities of \[3, classes\], the model returned \(3, 7, 50\)"):
        pk.calibrate(model, batches, loss_fn, progress=False)


class Twice(nn.Module):
    """One linear that runs twice, each time before an activation that writes into its output."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        for _ in range(2):
            x = torch.relu_(self.inner(x))
        return self.out(x)


def test_a_layer_that_runs_twice_has_one_gradient_per_row():
    model = Twice().double()
    pk.attach(model, Observe(), ("inner",))
    x, labels = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    pk.calibrate(model, [(x, labels)], cross_entropy, progress=False)
    _, squares, _ = by_hand(model, [(x, labels)], cross_entropy, [model.inner.weight])
    tuner = model.inner.peft.tuners["default"]
    assert tuner.passes == 1
    torch.testing.assert_close(tuner.fisher, squares[0] * 6)


def test_a_method_sees_all_its_tuners_at_once(monkeypatch):
    monkeypatch.setattr(Observe, "together", [])
    monkeypatch.setattr(Observe, "beside", [])
    model, batches, loss_fn = observed("mlp")
    pk.attach(model, Observe(), ("out",), name="other", train=("ln",))
    pk.calibrate(model, batches, loss_fn, progress=False)
    first, second, out = (getattr(model, n).peft.tuners for n in ("first", "second", "out"))
    assert Observe.together == [[first["default"], second["default"]], [out["other"]]]
    assert Observe.beside == [0, 40]  # the LayerNorm of the other


def test_a_method_says_how_many_rows_are_enough():
    model, batches, loss_fn = observed("mlp", samples=2)
    first = model.first.peft.tuners["default"]
    pk.calibrate(model, batches, loss_fn, progress=False)
    assert first.passes == 1  # the first batch has 3
    pk.calibrate(model, batches, loss_fn, steps=2, progress=False)
    assert first.passes == 3


def test_training_waits_for_what_must_come_first():
    model, batches, loss_fn = observed("mlp")
    with pytest.raises(RuntimeError, match="Observe has seen nothing; call pk.calibrate"):
        pk.fit(model, batches, loss_fn=loss_fn, progress=False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    pk.calibrate(model, batches, loss_fn, progress=False)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert len(pk.fit(model, batches, loss_fn=loss_fn, progress=False)) == 3
