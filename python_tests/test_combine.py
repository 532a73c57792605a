"""pk.combine: each way of making one adapter of several, against its definition in dense plain torch."""

import dataclasses
import json
import math
import zlib

import pytest
import torch
from models import METHODS, TIED_HEADS, assert_same, attached, close, make, over, snapshot, targets_of
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import state_of
from peft_kernels.engine.combine import _sites

FAMILIES = ("mlp", "gpt2", "bert")
HOWS = ("cat", "sum", "average", "ties", "dare", "svd")
BLOCK = {"q": 0, "k": 1, "v": 2}  # of GPT-2's fused linear
WEIGHTS = (0.5, -1.5)

families = pytest.mark.parametrize("family", FAMILIES)


def draw(model, name, seed):
    """Every number of the adapter moves, in a direction of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tuner in _sites(model, name):
            for p in tuner.parameters():
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * 0.1)


def several(method, family, dtype=torch.float64, names="ab", targets=None, **kwargs):
    """A model with adapters of a method, each with numbers of its own; method: index -> Method."""
    case = make(family, dtype)
    for i, name in enumerate(names):
        cfg = method(i)
        pk.attach(case.model, cfg, targets or targets_of(cfg.key, family), name=name, seed=i, **kwargs)
        draw(case.model, name, i)
    return case


def loras(family, dtype=torch.float64, ranks=(2, 2), **kwargs):
    """Adapters "a", "b", ... with scales of their own."""
    names = "abc"[: len(ranks)]
    return several(
        lambda i: pk.LoRA(rank=ranks[i], alpha=3.0 * (i + 1), rslora=bool(i % 2)), family, dtype, names, **kwargs
    )


def pair(key, family):
    return several(lambda _: METHODS[key](**METHODS[key].tiny), family)


def change(model, name):
    """What a merge of this adapter alone adds to each base parameter."""
    active, before = pk.active(model), snapshot(model)
    pk.set_active(model, name)
    pk.merge(model)
    after = snapshot(model)
    pk.unmerge(model)
    pk.set_active(model, active)
    return {key: after[key] - before[key] for key in before}


def total(changes, weights):
    return {key: sum(w * c[key] for w, c in zip(weights, changes, strict=True)) for key in changes[0]}


def matrix(changes, label):
    """The change of the weight of one site, [out, in]."""
    role, _, path = label.rpartition("@")
    weight = changes[f"{path}.weight"]
    return weight.T.chunk(3)[BLOCK[role]] if role else weight


def numbers(model, name):
    return {(site.name, site.rows): tuner for site, tuner in _sites(model, name)}


def ratio(off, wanted):
    return (off.norm() / wanted.norm()).item()


# -- what a method promises -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "family"), over(FAMILIES))
def test_factors_and_additive_tell_the_truth_about_fold(key, family):
    """factors: fold adds b @ a. additive: fold of the middle is the middle of the folds."""
    case = pair(key, family)
    pk.attach(case.model, METHODS[key](**METHODS[key].tiny), targets_of(key, family), name="new")
    for (site, one), two, new in zip(
        _sites(case.model, "a"),
        numbers(case.model, "b").values(),
        numbers(case.model, "new").values(),
        strict=True,
    ):
        with torch.no_grad():
            if one.factors() is not None:
                weight, bias = site.weight, site.bias
                a, b = one.factors()
                close(one.fold(weight, bias)[0], weight + b @ a, torch.float64)
                new.set_factors(a, b)
                close(new.fold(weight, bias)[0], weight + b @ a, torch.float64)
            if one.additive:
                params = dict(site.module.named_parameters())
                params = {k: p for k, p in params.items() if "peft" not in k}
                for p, q, r in zip(one.parameters(), two.parameters(), new.parameters(), strict=True):
                    r.copy_((p + q) / 2)
                folds = [t.folded(site, params) for t in (one, two, new)]
                for k in folds[0]:
                    close(folds[2][k], (folds[0][k] + folds[1][k]) / 2, torch.float64)


# -- cat and svd ------------------------------------------------------------------------------------------------------


@families
def test_cat_is_the_weighted_sum_of_the_changes(family):
    case = loras(family, ranks=(1, 2, 3))
    weights = (0.5, -1.5, 0.0)
    wanted = total([change(case.model, n) for n in "abc"], weights)
    report = pk.combine(case.model, ["a", "b", "c"], weights=weights)
    made = change(case.model, "combined")
    for key, value in wanted.items():
        torch.testing.assert_close(made[key], value, atol=1e-12, rtol=1e-12)
    assert report.exact
    assert report.error < 1e-12
    assert all(t.a.shape[0] == 6 for _, t in _sites(case.model, "combined"))


@families
def test_cat_runs_like_the_stack(family):
    case = loras(family, torch.float32)
    stack = case.call(case.model)
    report = pk.combine(case.model, ["a", "b"])
    assert report.exact
    assert 0 < report.error < 1e-6
    assert torch.equal(case.call(case.model), stack)  # inactive
    close(case.call(pk.set_active(case.model, "combined")), stack)


@families
def test_svd_is_the_best_of_its_rank(family):
    case = loras(family)
    wanted = total([change(case.model, n) for n in "ab"], WEIGHTS)
    for rank in (1, 2, 3, 4, 9):
        report = pk.combine(case.model, ["a", "b"], "svd", name=f"r{rank}", rank=rank, weights=WEIGHTS)
        made = change(case.model, f"r{rank}")
        for label, error in report.errors.items():
            dense = matrix(wanted, label)
            s = torch.linalg.svdvals(dense)
            optimum = (s[rank:].norm() / s.norm()).item()
            assert error == pytest.approx(optimum, abs=1e-12)
            assert ratio(matrix(made, label) - dense, dense) == pytest.approx(optimum, abs=1e-12)
        assert report.exact == (rank >= 4)
        assert {len(t.a) for _, t in _sites(case.model, f"r{rank}")} == {min(rank, 4)}
    assert pk.combine(case.model, ["a", "b"], "svd", weights=WEIGHTS).errors == pytest.approx(
        pk.combine(case.model, ["a", "b"], "svd", name="two", rank=2, weights=WEIGHTS).errors
    )


def test_ranks_targets_and_scales_may_differ_from_site_to_site():
    """GPT-2 q and v of one layer, with ranks by layer and by role: nothing but the address tells the sites apart."""
    case = make("gpt2", torch.float64)
    pk.attach(case.model, pk.LoRA(rank=1, rank_pattern={"v": 3, "*.1.*": 2}), name="a")
    pk.attach(case.model, pk.LoRA(rank=4, alpha_pattern={"o": 1.0}), ("q", "o"), layers=0, name="b", seed=1)
    for name in "ab":
        draw(case.model, name, ord(name))
    wanted = total([change(case.model, n) for n in "ab"], (1, 1))
    report = pk.combine(case.model, ["a", "b"])
    assert report.exact
    made = change(case.model, "combined")
    for key, value in wanted.items():
        torch.testing.assert_close(made[key], value, atol=1e-12, rtol=1e-12)
    layer = "transformer.h.{}.attn.c_attn".format
    assert {(s.role, s.name): len(t.a) for s, t in _sites(case.model, "combined")} == {
        ("q", layer(0)): 5,
        ("v", layer(0)): 3,
        ("q", layer(1)): 2,
        ("v", layer(1)): 2,
        ("o", "transformer.h.0.attn.c_proj"): 4,
    }
    assert set(report.errors) == {f"{r}@{layer(i)}" for r in "qv" for i in (0, 1)} | {"transformer.h.0.attn.c_proj"}


def test_a_site_is_picked_by_its_whole_path():
    """`first` is also the end of another path: only what the adapters tuned is tuned."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.block = nn.ModuleDict({"first": nn.Linear(4, 4)})

    model = Twice()
    pk.attach(model, pk.LoRA(rank=1), ("first",), exclude=("block.first",), name="a")
    pk.combine(model, "a")
    assert [site.name for site, _ in _sites(model, "combined")] == ["first"]


# -- number by number -------------------------------------------------------------------------------------------------

ADDITIVE = ("bitfit", "ia3", "head", "full")


@pytest.mark.parametrize("how", ["sum", "average"])
@pytest.mark.parametrize("key", ADDITIVE)
@families
def test_sum_and_average_are_exact_for_methods_linear_in_their_numbers(key, family, how):
    case = pair(key, family)
    given, weights = ((1, 3), (0.25, 0.75)) if how == "average" else (WEIGHTS, WEIGHTS)
    tied = key == "head" and family in TIED_HEADS  # cannot be merged
    changes = None if tied else [change(case.model, n) for n in "ab"]
    report = pk.combine(case.model, ["a", "b"], how, weights=given)
    assert report.exact
    assert report.error < 1e-12
    if tied:
        base = case.model.lm_head.weight
        made, a, b = (numbers(case.model, n)["lm_head", None].copy.weight - base for n in ("combined", "a", "b"))
        close(made, weights[0] * a + weights[1] * b, torch.float64)
        return
    made = change(case.model, "combined")
    for name, value in total(changes, weights).items():
        torch.testing.assert_close(made[name], value, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("how", ["sum", "average"])
@families
def test_sums_and_averages_of_factors_report_their_cross_terms(family, how):
    case = loras(family)
    given, weights = ((1, 3), (0.25, 0.75)) if how == "average" else (WEIGHTS, WEIGHTS)
    wanted = total([change(case.model, n) for n in "ab"], weights)
    report = pk.combine(case.model, ["a", "b"], how, weights=given)
    made = change(case.model, "combined")
    assert not report.exact
    assert report.error == max(report.errors.values()) == report.errors[report.site]
    for label, error in report.errors.items():
        dense = matrix(wanted, label)
        assert error == pytest.approx(ratio(matrix(made, label) - dense, dense), rel=1e-9)
    for key, tuner in numbers(case.model, "combined").items():
        rights, lefts = [], []
        for w, t in zip(weights, (numbers(case.model, n)[key] for n in "ab"), strict=True):
            right, left = (w, w) if how == "average" else (math.sqrt(abs(w)), math.copysign(math.sqrt(abs(w)), w))
            rights.append(right * math.sqrt(t.scale) * t.a)
            lefts.append(left * math.sqrt(t.scale) * t.b)
        close(tuner.scale * tuner.b @ tuner.a, sum(lefts) @ sum(rights), torch.float64)


def test_the_average_of_adapters_that_agree_is_what_they_agree_on():
    case = loras("mlp")
    assert pk.combine(case.model, ["a", "a"], "average", weights=(1, 3)).exact
    before, after = change(case.model, "a"), change(case.model, "combined")
    for key, value in before.items():
        close(after[key], value, torch.float64)


def ties(tensors, density):
    """Yadav et al. 2023, algorithm 1: trim, elect, disjoint mean."""
    trimmed = []
    for t in tensors:
        kept = t.flatten().abs().argsort(descending=True)[: max(1, round(density * t.numel()))]
        mask = torch.zeros(t.numel(), dtype=torch.bool)
        mask[kept] = True
        trimmed.append((t.flatten() * mask).tolist())
    out = []
    for column in zip(*trimmed, strict=True):
        sign = math.copysign(1, sum(column)) if sum(column) else 0
        agreeing = [v for v in column if v * sign > 0]
        out.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(out, dtype=torch.float64).view(tensors[0].shape)


def dare(tensors, density, seed, where):
    """Yu et al. 2023: drop and rescale, then add."""
    total = torch.zeros_like(tensors[0])
    for i, t in enumerate(tensors):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{where}/{i}".encode()))
        for j, u in enumerate(torch.rand(t.shape, generator=generator).flatten().tolist()):
            if u < density:
                total.view(-1)[j] += t.flatten()[j] / density
    return total


def mixed(how, tensors, density, seed, where):
    return ties(tensors, density) if how == "ties" else dare(tensors, density, seed, where)


@pytest.mark.parametrize("density", [0.2, 0.55])
@pytest.mark.parametrize("how", ["ties", "dare"])
@pytest.mark.parametrize("family", ["mlp", "gpt2"])
def test_ties_and_dare_of_factors(how, density, family):
    case = loras(family)
    wanted = total([change(case.model, n) for n in "ab"], WEIGHTS)
    report = pk.combine(case.model, ["a", "b"], how, weights=WEIGHTS, density=density, seed=3)
    made = change(case.model, "combined")
    for site, tuner in _sites(case.model, "combined"):
        members = [numbers(case.model, n)[site.name, site.rows] for n in "ab"]
        roots = [math.sqrt(abs(w) * t.scale) for w, t in zip(WEIGHTS, members, strict=True)]
        rights = [r * t.a.detach() for r, t in zip(roots, members, strict=True)]
        lefts = [math.copysign(r, w) * t.b.detach() for r, w, t in zip(roots, WEIGHTS, members, strict=True)]
        a = mixed(how, rights, density, 3, f"{site.address}/a")
        b = mixed(how, lefts, density, 3, f"{site.address}/b")
        close(tuner.scale * tuner.b.detach() @ tuner.a.detach(), b @ a, torch.float64)
    for label, error in report.errors.items():
        dense = matrix(wanted, label)
        assert error == pytest.approx(ratio(matrix(made, label) - dense, dense), rel=1e-9)
    assert not report.exact


@pytest.mark.parametrize("how", ["ties", "dare"])
@pytest.mark.parametrize("key", ["bitfit", "ia3", "head"])
def test_ties_and_dare_of_distances_from_a_new_adapter(how, key):
    case = pair(key, "bert")
    pk.attach(case.model, METHODS[key](), name="new")
    wanted = total([change(case.model, n) for n in "ab"], WEIGHTS)
    report = pk.combine(case.model, ["a", "b"], how, weights=WEIGHTS, density=0.4, seed=3)
    for site, tuner in _sites(case.model, "combined"):
        new, *members = (dict(numbers(case.model, n)[site.name, None].named_parameters()) for n in ("new", "a", "b"))
        for name, p in tuner.named_parameters():
            distances = [w * (m[name] - new[name]).detach() for w, m in zip(WEIGHTS, members, strict=True)]
            close(p - new[name], mixed(how, distances, 0.4, 3, f"{site.address}/{name}"), torch.float64)
    made = change(case.model, "combined")
    for path, error in report.errors.items():
        keys = [k for k in wanted if k.rpartition(".")[0] == path]
        dense = torch.cat([wanted[k].flatten() for k in keys])
        achieved = torch.cat([made[k].flatten() for k in keys])
        assert error == pytest.approx(ratio(achieved - dense, dense), rel=1e-9)


def test_dare_that_keeps_all_is_the_sum():
    case = loras("bert")
    pk.combine(case.model, ["a", "b"], "sum", name="sum", weights=WEIGHTS)
    pk.combine(case.model, ["a", "b"], "dare", name="dare", weights=WEIGHTS, density=1)
    for one, two in zip(numbers(case.model, "sum").values(), numbers(case.model, "dare").values(), strict=True):
        assert torch.equal(one.a, two.a)
        assert torch.equal(one.b, two.b)


def test_dare_depends_on_the_seed_alone():
    case = loras("bert")
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        torch.manual_seed(len(name))
        pk.combine(case.model, ["a", "b"], "dare", name=name, seed=seed)
    one, same, other = ([t.a.detach() for t in numbers(case.model, name).values()] for name in ("one", "same", "other"))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0] == 0, one[1] == 0)  # every site draws its own


def test_running_statistics_of_a_head_are_combined():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))
    for name in "ab":
        pk.attach(model, pk.Head(), ("1",), name=name)
        copy = numbers(model, name)["1", None].copy
        copy.train()(torch.randn(8, 4) * 3)
    assert pk.combine(model, ["a", "b"], "average").exact
    made, a, b = (numbers(model, n)["1", None].copy[0].running_var for n in ("combined", "a", "b"))
    torch.testing.assert_close(made, (a + b) / 2)


# -- several methods, different sites, an adapter as any other --------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
def test_a_head_beside_lora_comes_along(how):
    case = loras("bert", train=("head",))
    wanted = total([change(case.model, n) for n in "ab"], WEIGHTS)
    report = pk.combine(case.model, ["a", "b"], how, weights=None if how == "average" else WEIGHTS)
    assert len(report.errors) == 5
    if how in ("cat", "svd", "sum"):
        close(change(case.model, "combined")["classifier.weight"], wanted["classifier.weight"], torch.float64)
        assert report.errors["classifier"] < 1e-12
    assert report.exact == (how == "cat")


@pytest.mark.parametrize("how", ["sum", "ties", "dare"])
def test_adapters_on_different_sites_come_together(how):
    case = make("gpt2", torch.float64)
    pk.attach(case.model, pk.IA3(), ("k",), name="a")
    pk.attach(case.model, pk.IA3(), ("v", "down"), name="b")
    draw(case.model, "a", 1)
    draw(case.model, "b", 2)
    stack = case.call(case.model)
    report = pk.combine(case.model, ["a", "b"], how, density=None if how == "sum" else 1.0)
    assert report.exact  # one adapter at each site: nothing disagrees
    close(case.call(pk.set_active(case.model, "combined")), stack, torch.float64)


@pytest.mark.parametrize("method", [pk.BitFit(), pk.LoRA(rank=2)], ids=lambda m: m.key)
def test_an_absent_adapter_counts_in_the_average(method):
    case = make("mlp", torch.float64)
    pk.attach(case.model, method, ("first",), name="a")
    pk.attach(case.model, method, ("out",), name="b")
    draw(case.model, "a", 1)
    assert pk.combine(case.model, ["a", "b"], "average").exact
    made, alone = change(case.model, "combined"), change(case.model, "a")
    for key in ("first.weight", "first.bias"):
        close(made[key], alone[key] / 2, torch.float64)


def test_biases_that_a_base_lacks_stay_with_those_it_has():
    """BitFit leaves layers without a bias alone when others have one; an adapter that made one is kept."""
    case = make("mlp", torch.float64)
    pk.attach(case.model, pk.BitFit(), ("first",), name="a")
    pk.attach(case.model, pk.BitFit(), ("second",), name="b")
    draw(case.model, "a", 1)
    draw(case.model, "b", 2)
    stack = case.call(case.model)
    assert pk.combine(case.model, ["a", "b"], "sum").exact
    close(case.call(pk.set_active(case.model, "combined")), stack, torch.float64)


@pytest.mark.parametrize("how", HOWS)
@families
def test_the_combined_adapter_lives_like_any_other(how, family, tmp_path):
    case = loras(family, torch.float32)
    stack, before = case.call(case.model), snapshot(case.model)
    report = pk.combine(case.model, ["a", "b"], how, name="both", rank=3 if how == "svd" else None)
    assert pk.active(case.model) == ["a", "b"]
    assert torch.equal(case.call(case.model), stack)
    assert f"'both' by {how}" in str(report)
    assert "\n" not in str(report)
    assert ("exact" in str(report)) == report.exact == (how == "cat")

    expected = case.call(pk.set_active(case.model, "both"))
    counts = pk.counts(case.model, "both")
    assert counts.stored == sum(p.numel() for _, t in _sites(case.model, "both") for p in t.parameters())
    pk.save(case.model, tmp_path, "both")
    fresh = make(family)
    pk.load(fresh.model, tmp_path / "both")
    close(fresh.call(fresh.model), expected)
    assert pk.counts(fresh.model) == dataclasses.replace(counts, trainable=0)
    pk.merge(case.model)
    close(case.call(case.model), expected)
    pk.detach(case.model, "both")
    assert torch.equal(case.call(pk.set_active(case.model, ["a", "b"])), stack)
    pk.detach(case.model)
    assert_same(case.model, before)


def test_it_trains_and_combines_again(tmp_path):
    case = loras("gpt2", ranks=(1, 2))
    pk.combine(case.model, ["a", "b"])
    pk.set_active(case.model, "combined")
    case.loss(case.model).backward()
    assert all(p.grad.abs().sum() > 0 for t in numbers(case.model, "combined").values() for p in t.parameters())
    assert pk.combine(case.model, ["combined", "a"], name="again", weights=(1, -1)).exact
    for key, value in change(case.model, "b").items():
        close(change(case.model, "again")[key], value, torch.float64)
    config = json.loads((pk.save(case.model, tmp_path, "again") / "again/adapter_config.json").read_text())
    assert [part["method"]["method"] for part in config["parts"]] == ["lora"]


def test_changes_that_cancel_are_no_error():
    case = loras("bert", torch.float32)
    for how in ("cat", "sum"):
        report = pk.combine(case.model, ["a", "a"], how, name=how, weights=(1, -1))
        assert report.exact
        assert report.error == 0
    assert pk.combine(case.model, ["a", "a"], "ties", weights=(1, -1)).exact


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown": (dict(names=["a", "x"]), "no adapter 'x'"),
    "none": (dict(names=[]), "names is empty"),
    "how": (dict(how="mean"), "expected one of cat, sum"),
    "taken": (dict(name="b"), "attached already"),
    "name": (dict(name="a.b"), "letters, digits"),
    "weights_length": (dict(weights=[1.0]), "expected 2 finite numbers"),
    "weights_finite": (dict(weights=[1.0, math.nan]), "expected 2 finite numbers"),
    "weights_negative": (dict(how="average", weights=[2.0, -1.0]), "at least 0"),
    "weights_zero": (dict(how="average", weights=[0.0, 0.0]), "not all 0"),
    "density_zero": (dict(how="ties", density=0.0), r"share in \(0, 1\]"),
    "density_large": (dict(how="dare", density=1.5), r"share in \(0, 1\]"),
    "density_elsewhere": (dict(density=0.5), "with ties or dare"),
    "rank_zero": (dict(how="svd", rank=0), "positive int"),
    "rank_elsewhere": (dict(how="sum", rank=2), "with svd"),
    "rank_differs": (dict(names=["a", "c"], how="sum"), "use 'cat' or 'svd'"),
    "rank_too_large": (dict(names=["a", "b", "c"]), "use how='svd'"),
    "methods": (dict(names=["a", "scales"], how="sum"), r"'a' has LoRA\(.*'scales' IA3\("),
    "not_low_rank": (dict(names=["scales"], how="cat"), "ia3 supports sum, average, ties, dare"),
    "settings": (dict(names=["scales", "inputs"], how="sum"), r"'inputs' IA3\(feedforward=\('q',\)\)"),
    "rows": (dict(names=["a", "whole"]), "with the same targets"),
    "not_finite": (dict(names=["broken"]), "not finite"),
}


@pytest.fixture(scope="module")
def crowded():
    case = make("gpt2")
    for name, rank in (("a", 2), ("b", 2), ("c", 14)):
        pk.attach(case.model, pk.LoRA(rank=rank), name=name)
    pk.attach(case.model, pk.IA3(), ("q",), name="scales")
    pk.attach(case.model, pk.IA3(feedforward=("q",)), ("q",), name="inputs")
    pk.attach(case.model, pk.LoRA(rank=2), ("*.c_attn",), name="whole")
    pk.attach(case.model, pk.LoRA(rank=2), name="broken")
    next(iter(numbers(case.model, "broken").values())).a.data.fill_(math.nan)
    return case.model


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_alone(case, crowded):
    arguments, message = REFUSED[case]
    before, names = list(crowded.state_dict()), pk.active(crowded)
    with pytest.raises(ValueError, match=message) as error:
        pk.combine(crowded, **{"names": ["a", "b"], **arguments})
    assert "\n" not in str(error.value)
    assert list(crowded.state_dict()) == before
    assert pk.active(crowded) == names


def test_a_merged_model_and_a_failure_half_way(monkeypatch):
    case = loras("mlp")
    pk.merge(case.model)
    with pytest.raises(RuntimeError, match="merged"):
        pk.combine(case.model, ["a", "b"])
    pk.unmerge(case.model)
    before = case.model.state_dict().keys()
    monkeypatch.setattr(torch.linalg, "qr", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pk.combine(case.model, ["a", "b"])
    assert case.model.state_dict().keys() == before
    assert list(state_of(case.model).adapters) == pk.active(case.model) == ["a", "b"]


@pytest.mark.parametrize(
    ("folds", "message"), [(False, "no weight-space form"), (True, "neither low-rank nor linear in its numbers")]
)
def test_methods_that_cannot_be_combined_say_why(folds, message):
    class Odd(pk.Tuner):
        def __init__(self, cfg, site):
            super().__init__(cfg, site)
            self.p = site.param(site.n_out)

        if folds:

            def fold(self, weight, bias):
                return weight * (1 + self.p[:, None]) ** 2, bias
        else:

            def forward(self, base, x):
                return base(x) + torch.tanh(self.p)

    case = attached("lora", "mlp")
    original = pk.LoRA.tuner
    try:
        pk.LoRA.tuner = Odd
        pk.attach(case.model, pk.LoRA(rank=2), ("first",), name="odd")
    finally:
        pk.LoRA.tuner = original
    with pytest.raises(ValueError, match=message):
        pk.combine(case.model, ["odd"], "sum")


def test_a_parametrized_weight_cannot_be_read():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    pk.attach(model, pk.BitFit(), ("0",))
    with pytest.raises(ValueError, match="parametrized"):
        pk.combine(model, "default", "sum")


def test_a_model_without_values_cannot_be_combined():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    pk.attach(model, pk.LoRA(rank=1), ("0",))
    with pytest.raises(RuntimeError, match="meta device"):
        pk.combine(model, "default")
