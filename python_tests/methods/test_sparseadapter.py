"""SparseAdapter: its scores against computations by hand, what it keeps, and that the rest stays away."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import close, make
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.methods._select import erk
from peft_kernels.methods.sparseadapter import SparseAdapterTuner

PARALLEL = ("first>second",)


def found(model, name="default"):
    """Its tuners in model order, those inside a stack or span too."""
    inside = (t for _, tuner in tuners(model, name) for t in tuner.modules())
    return [t for t in inside if isinstance(t, SparseAdapterTuner)]


def projections(model):
    return [w for t in found(model) for w in t.projections]


def batches(rows=(3, 2)):
    made = torch.Generator().manual_seed(4)
    x, labels = torch.randn(sum(rows), 12, generator=made, dtype=torch.float64), torch.arange(sum(rows)) % 3
    return list(zip(x.split(rows), labels.split(rows), strict=True))


def mlp(**fields):
    """(the plain MLP in fp64 with adapters after its two inner linears, their four projections as they were drawn)"""
    fields = {"placement": "houlsby", "reduction_factor": 3, "activation": "gelu", "keep_ratio": 0.3, **fields}
    case = make("mlp", torch.float64)
    pk.attach(case.model, pk.SparseAdapter(**{**fields, "score": "snip"}), ("first", "second"), seed=5)
    drawn = [w.values.detach().clone() for w in projections(case.model)]
    pk.detach(case.model)
    model = pk.attach(case.model, pk.SparseAdapter(**fields), ("first", "second"), seed=5)
    return model, drawn


def loss_by_hand(model, weights):
    """The mean loss over the rows of `batches`, of dense adapters with zero biases and these projections."""
    x, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    plain = dict(model.named_parameters())

    def linear(name, h):
        return F.linear(h, plain[f"{name}.weight"], plain.get(f"{name}.bias"))

    def adapter(h, down, up):
        return h + F.gelu(h @ down.T) @ up.T

    h = adapter(linear("first", x), *weights[:2])
    h = F.layer_norm(h, h.shape[-1:], plain["ln.weight"], plain["ln.bias"])
    return F.cross_entropy(linear("out", x + adapter(linear("second", h.relu()), *weights[2:])), labels)


def scores_by_hand(score, model, weights):
    weights = [w.clone().requires_grad_() for w in weights]
    if score == "magnitude":
        return [w.detach().abs() for w in weights]
    if score == "synflow":
        ones = [torch.ones(w.shape[1], dtype=w.dtype) for w in weights[::2]]
        flow = sum((up.abs() @ (down.abs() @ one)).sum() for one, down, up in zip(ones, *pairs(weights), strict=True))
        return [(w * g).abs().detach() for w, g in zip(weights, torch.autograd.grad(flow, weights), strict=True)]
    grads = torch.autograd.grad(loss_by_hand(model, weights), weights, create_graph=True)
    if score == "snip":
        return [(w * g).abs().detach() for w, g in zip(weights, grads, strict=True)]
    along = sum((g * g.detach()).sum() for g in grads)
    return [(w * h).detach() for w, h in zip(weights, torch.autograd.grad(along, weights), strict=True)]


def pairs(weights):
    return weights[::2], weights[1::2]


def top(scores, k):
    """Masks of the k largest of all together."""
    threshold = torch.cat([s.flatten() for s in scores]).sort(descending=True).values[k - 1]
    return [s >= threshold for s in scores]


def assert_kept(model, masks, drawn):
    for w, mask, before in zip(projections(model), masks, drawn, strict=True):
        assert torch.equal(w.mask, mask)
        assert torch.equal(w.values.detach(), before[mask])
        assert torch.equal(w().detach(), before * mask)


# -- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("score", ["magnitude", "snip", "grasp", "synflow"])
def test_scores_are_those_computed_by_hand(score, scope):
    model, drawn = mlp(score=score, scope=scope, rounds=1)
    scores = scores_by_hand(score, model, drawn)
    pk.calibrate(model, batches(), F.cross_entropy, progress=False)
    total = sum(w.numel() for w in drawn)
    if scope == "global":
        assert_kept(model, top(scores, round(0.3 * total)), drawn)
    else:
        assert_kept(model, [top([s], round(0.3 * s.numel()))[0] for s in scores], drawn)


@pytest.mark.parametrize("rounds", [2, 7])
def test_synflow_prunes_in_rounds(rounds):
    """Of what the rounds before have left: on the way, numbers whose flow they cut off lose their scores."""
    model, drawn = mlp(score="synflow", rounds=rounds, keep_ratio=0.05)
    masks = [torch.ones_like(w, dtype=torch.bool) for w in drawn]
    total = sum(w.numel() for w in drawn)
    for n in range(1, rounds + 1):
        scores = scores_by_hand("synflow", model, [w * m for w, m in zip(drawn, masks, strict=True)])
        scores = [s.masked_fill(~m, -1) for s, m in zip(scores, masks, strict=True)]
        masks = top(scores, round(total * 0.05 ** (n / rounds)))
    assert_kept(model, masks, drawn)
    once, _ = mlp(score="synflow", rounds=1, keep_ratio=0.05)
    assert any(not torch.equal(a.mask, b.mask) for a, b in zip(projections(once), projections(model), strict=True))


def test_the_densities_of_erk():
    assert erk([(64, 768), (64, 64)], 0.2) == pytest.approx([0.187778, 0.346667], abs=1e-6)
    assert erk([(64, 768), (768, 64)] * 3, 0.2) == pytest.approx([0.2] * 6)
    for ratio in (0.1, 0.5, 0.9, 0.99, 1.0):
        shapes = [(64, 768), (2, 3), (64, 64), (768, 16)]
        parts, sizes = erk(shapes, ratio), [a * b for a, b in shapes]
        assert max(parts) <= 1 and sum(p * n for p, n in zip(parts, sizes, strict=True)) / sum(sizes) == pytest.approx(
            ratio
        )
        free = [p * n / sum(s) for p, n, s in zip(parts, sizes, shapes, strict=True) if p < 1]
        assert free == pytest.approx([free[0]] * len(free) if free else [])


def test_erk_gives_the_adapters_of_narrow_layers_a_larger_part():
    model, drawn = mlp(score="erk", size=4, keep_ratio=0.5)
    parts = erk([w.shape for w in drawn], 0.5)
    assert parts[0] == parts[1] < 0.5 < parts[2] == parts[3], "20 features, then 12"
    assert [w.kept for w in projections(model)] == [round(p * w.numel()) for p, w in zip(parts, drawn, strict=True)]


@pytest.mark.parametrize("score", ["random", "erk"])
def test_random_masks_follow_the_seed(score):
    masks = []
    for seed in (1, 1, 2):
        model = make("bert").model
        pk.attach(model, pk.SparseAdapter(score=score, reduction_factor=2, init="zero"), seed=seed)
        masks.append(torch.cat([w.mask.flatten() for w in projections(model)]))
        assert not any(t.drawn for t in found(model))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert masks[0].sum() == (307 if score == "random" else 4 * round(0.6 * 128)), "of 512 together, or of each 128"


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_keeping_all_is_the_dense_method(placement, family):
    fields = {"reduction_factor": 2, "init": "bert"}
    outputs, masks = [], []
    dense = {"pfeiffer": pk.Pfeiffer, "houlsby": pk.Houlsby, "parallel": pk.ParallelAdapter}[placement]
    sparse = pk.SparseAdapter(placement=placement, keep_ratio=1.0, score="magnitude", activation="gelu", **fields)
    half = pk.SparseAdapter(placement=placement, keep_ratio=0.5, score="magnitude", activation="gelu", **fields)
    for method in (dense(activation="gelu", **fields), sparse, half):
        case = make(family)
        pk.attach(case.model, method, seed=1)
        outputs.append(case.call(case.model))
        masks.append(pk.counts(case.model).trainable)
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])
    assert masks[0] == masks[1] > masks[2]


def bert_base(method):
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    return pk.attach(model, method)


def test_large_adapters_have_as_many_weights():
    assert 2 * 768 * 64 == 2 * 768 * 256 // 4 == 98_304
    for fields in ({"size": 64}, {"reduction_factor": 12}):
        large = pk.SparseAdapter.large(4, **fields)
        assert large.keep_ratio == 0.25
        counts = pk.counts(bert_base(large))
        assert counts.trainable == counts.stored == 12 * (98_304 + 256 + 768)
        dense = pk.counts(bert_base(pk.Pfeiffer(**fields))).trainable
        assert dense == 12 * (98_304 + 64 + 768)
    with pytest.raises(ValueError, match="reduction_factor = 16; expected a multiple of 3"):
        pk.SparseAdapter.large(3)


@pytest.mark.parametrize("score", ["snip", "random", "erk"])
def test_counts_without_weights_are_those_with_them(score):
    """On the meta device, where no score can be known."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=36, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, vocab_size=50)
    method, counts = pk.SparseAdapter(score=score, reduction_factor=5, keep_ratio=0.37), []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = BertModel(config)
        pk.attach(model, method)
        if device == "cpu":
            ids = torch.randint(3, 50, (4, 7), generator=torch.Generator().manual_seed(0))
            data = [(ids, torch.zeros(4, dtype=torch.int64))]
            pk.calibrate(model, data, lambda out, y: F.cross_entropy(out.pooler_output, y), progress=False)
        counts.append(pk.counts(model))
    assert counts[0] == counts[1]


def values(model):
    return {
        f"{path}.{key}": t.clone() for path, tuner in tuners(model, "default") for key, t in tuner.state_dict().items()
    }


@pytest.mark.parametrize("score", ["magnitude", "snip"])
def test_what_is_pruned_stays_away_in_training(score, tmp_path):
    model, drawn = mlp(score=score, scope="tensor")
    options = dict(loss_fn=F.cross_entropy, epochs=3, lr=0.05, weight_decay=0.3, progress=False)
    if score == "snip":
        with pytest.raises(RuntimeError, match=r"first: SparseAdapter is not pruned yet; call pk.calibrate"):
            pk.fit(model, batches(), **options)
    pk.calibrate(model, batches(), F.cross_entropy, progress=False)
    masks = [w.mask.clone() for w in projections(model)]
    before = values(model)
    pk.calibrate(model, batches((1, 4))[:1], F.cross_entropy, progress=False)
    assert all(torch.equal(t, before[key]) for key, t in values(model).items()), "it is done once"
    pk.fit(model, batches(), **options)
    for w, mask, first in zip(projections(model), masks, drawn, strict=True):
        assert torch.equal(w.mask, mask) and w.values.dim() == 1 and w.kept == round(0.3 * mask.numel())
        now = w().detach()
        assert not now[~mask].any() and (now[mask] != first[mask]).all()
    where = pk.save(model, tmp_path / "adapter")
    fresh = pk.load(make("mlp", torch.float64).model, where)
    x = batches()[0][0]
    assert torch.equal(fresh(x), model(x))
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(projections(fresh), projections(model), strict=True))


def test_a_resume_needs_no_calibration_and_ends_bit_equal(tmp_path):
    class Broken(list):
        def __iter__(self):
            yield self[0]
            raise KeyboardInterrupt

    def run(place, data, calibrated=True):
        model, _ = mlp(score="grasp", dropout=0.2)
        if calibrated:
            pk.calibrate(model, batches(), F.cross_entropy, progress=False)
        options = dict(loss_fn=F.cross_entropy, epochs=2, lr=0.01, progress=False)
        pk.fit(model, data, checkpoint=tmp_path / place, checkpoint_every=1, resume=True, **options)
        return values(model)

    whole = run("whole", batches())
    with pytest.raises(KeyboardInterrupt):
        run("broken", Broken(batches()))
    resumed = run("broken", batches(), calibrated=False)
    assert whole.keys() == resumed.keys() and all(torch.equal(t, resumed[key]) for key, t in whole.items())


def test_a_file_that_contradicts_itself_is_refused(tmp_path):
    model, _ = mlp(score="magnitude")
    where = pk.save(model, tmp_path / "adapter") / "adapter_model.safetensors"
    with safe_open(where, "pt") as file:
        metadata = file.metadata()
    held = load_file(where)
    key = next(key for key in held if key.endswith("up.values"))
    save_file({**held, key: held[key][1:].clone()}, where, metadata)
    with pytest.raises(
        ValueError, match=r"up.values is \(\d+,\); expected \(\d+, \d+\) or what the mask keeps, \(\d+,\)"
    ):
        pk.load(make("mlp", torch.float64).model, where.parent)


def test_a_gate_around_it_and_members_beside_it():
    case = make("bert")
    inner = pk.SparseAdapter(reduction_factor=2, score="synflow", rounds=3)
    pk.attach(case.model, pk.Union(pk.Gated(inner), pk.LoRA(rank=2)))
    own = projections(case.model)
    kept = sum(w.kept for w in own)
    assert all(w.chosen for w in own) and kept == round(0.6 * sum(math.prod(w.shape) for w in own))
    case.loss(case.model).backward()
    assert all(w.values.grad is not None for w in own)


def test_rows_of_a_batch_with_their_own_adapters():
    case, methods = make("bert"), {"a": "magnitude", "b": "random"}
    for name, score in methods.items():
        pk.attach(case.model, pk.SparseAdapter(reduction_factor=2, score=score), name=name, seed=len(name + score))
    pk.set_active(case.model, "a")
    a = case.call(case.model)
    pk.set_active(case.model, "b")
    b = case.call(case.model)
    with pk.route(case.model, ["b", "a"]):
        both = case.call(case.model)
    close(both, torch.stack([b[0], a[1]]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "above"}, "placement = 'above'; expected one of pfeiffer, houlsby, parallel"),
        ({"score": "luck"}, "score = 'luck'; expected one of random, erk"),
        ({"scope": "layer"}, "scope = 'layer'; expected one of global, tensor"),
        ({"keep_ratio": 0.0}, "keep_ratio = 0.0; expected more than 0"),
        ({"rounds": 0}, "rounds = 0, samples = 256; expected at least 1"),
        ({"init": "zero"}, "init = 'zero' with score = 'snip', which is 0 where a number is; give init='bert'"),
    ],
)
def test_errors_name_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        pk.SparseAdapter(**fields)
