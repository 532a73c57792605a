"""Gates, and the recipes made of several methods: MAM, UniPELT, S4, Compacter beside others."""

import inspect
import re

import pytest
import torch
from models import KINDS as MODELS
from models import close, make, perturb

import peft_kernels as pk
from peft_kernels.engine.attach import state_of, tuners
from peft_kernels.engine.fit import param_groups
from peft_kernels.engine.roles import resolve
from peft_kernels.methods.gated import GatedTuner
from peft_kernels.methods.lora import LoRATuner
from peft_kernels.methods.pfeiffer import PfeifferTuner
from peft_kernels.methods.prefix import PrefixTuner
from peft_kernels.methods.s4 import spindle

LONG = 4  # positions of padding on a side


def padded(case, left, right):
    """The inputs of an encoder or a decoder with more padding around the text, positions as in the text alone."""
    ids = case.inputs["input_ids"]
    front, behind = (ids.new_zeros(len(ids), n) for n in (left, right))
    wide = {"input_ids": torch.cat([front, ids, behind], 1)}
    wide["attention_mask"] = (torch.cat([front, torch.ones_like(ids), behind], 1) > 0).long()
    if case.model.config.model_type in ("bert", "gpt2", "llama"):
        wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if "decoder_input_ids" in case.inputs:
        wide["decoder_input_ids"] = case.inputs["decoder_input_ids"]
    return wide


def ignores_padding(family, method):
    case = make(family)
    pk.attach(case.model, method)
    perturb(case.model)
    text = case.model(**case.inputs, **({} if family == "t5" else {"use_cache": False})).logits
    for implementation in ("sdpa", "eager"):
        case.model.set_attn_implementation(implementation)
        for left, right in ((0, LONG), (LONG, 0), (2, 1)):
            if family == "bert" and left:
                continue  # the classifier reads the first position
            out = case.model(**padded(case, left, right)).logits
            own = out[:, left : left + 7] if family in ("gpt2", "llama") else out
            close(own, text)


# -- gates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", ["input", "output"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_a_gate_ignores_padding(family, reads):
    ignores_padding(
        family, pk.Union(pk.Gated(pk.LoRA(rank=2), reads=reads), pk.Gated(pk.Pfeiffer(size=2), reads=reads))
    )


@pytest.mark.parametrize("kind", MODELS)
def test_every_encoder_tells_its_padding(kind):
    """Attention takes the mask by a name that gates know, and decoders are known for what they are."""
    model = make(kind).model
    sites = resolve(model, ("q",))
    for site in sites:
        both = model.config.is_encoder_decoder
        encodes = "encoder" in site.name.split(".") if both else not model.can_generate()
        assert site.causal is not encodes
        assert (site.padding is None) is not encodes
        if encodes:
            assert {"attention_mask", "mask"} & set(inspect.signature(site.padding.forward).parameters)


# -- what the papers count --------------------------------------------------------------------------------------------


def meta(kind, **sizes):
    from transformers import CONFIG_MAPPING, AutoModel

    with torch.device("meta"):
        return AutoModel.from_config(CONFIG_MAPPING[kind](**sizes))


def numbers(model, cls):
    """Trained numbers of the tuners of one class, wherever they are."""
    inside = [t for _, top in tuners(model, "default") for t in top.modules() if type(t) is cls]
    return sum(p.numel() for t in inside for p in t.parameters())


def test_counts_of_unipelt_on_bert_base():
    """The paper's 1.3 % are what is left without the network of the prefix; training takes ten times as many."""
    model = pk.attach(meta("bert"), pk.UniPELT())
    assert pk.counts(model).trainable == 11_083_376
    assert numbers(model, LoRATuner) == 294_912 and numbers(model, PfeifferTuner) == 894_528
    gates = [t for _, top in tuners(model, "default") for t in top.modules() if isinstance(t, GatedTuner)]
    assert len(gates) == 12 * 4 and sum(t.w.numel() + t.b.numel() for t in gates) == 36_912
    counts = pk.counts(pk.eject(model))
    assert counts.trainable == counts.stored == 1_410_672 and counts.changed == counts.rank == 0
    assert numbers(model, PrefixTuner) == 184_320


def test_counts_of_mam_on_bart_large():
    """An adapter in each of 24 layers, a prefix in each of 36 attentions: 12 of them look at the encoder."""
    sizes = dict(d_model=1024, encoder_layers=12, decoder_layers=12, encoder_ffn_dim=4096, decoder_ffn_dim=4096)
    model = pk.attach(meta("bart", **sizes, encoder_attention_heads=16, decoder_attention_heads=16), pk.MAM())
    pk.eject(model)
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == 24 * 1_050_112 + 2_211_840 == 27_414_528
    assert round(100 * counts.stored / counts.total, 2) == 6.75
    assert numbers(model, PrefixTuner) == 36 * 2 * 30 * 1024


# -- S4 ---------------------------------------------------------------------------------------------------------------

KINDS = {"A": "PfeifferTuner", "L": "LoRATuner", "P": "PrefixTuner", "B": "BitFitTuner"}


def by_layer(model):
    """(stack, layer) -> (kinds of its parts, their numbers)."""
    found = {}
    for path, top in tuners(model, "default"):
        stack, number = re.match(r"(.*?)\.?(?:layer|block|layers|h)\.(\d+)\.", path).groups()
        kinds, count = found.get((stack, int(number)), (set(), 0))
        names = {type(t).__name__ for t in top.modules()}
        kinds = kinds | {kind for kind, name in KINDS.items() if name in names}
        found[stack, int(number)] = kinds, count + sum(p.numel() for p in top.parameters())
    return found


@pytest.mark.parametrize(
    ("layers", "sizes"), [(12, (2, 4, 4, 2)), (24, (4, 8, 8, 4)), (4, (1, 1, 1, 1)), (2, (0, 1, 1, 0))]
)
def test_groups_are_spindles(layers, sizes):
    assert spindle(layers) == sizes
    assert all(sum(spindle(n)) == n and spindle(n)[1] >= spindle(n)[0] for n in range(1, 100))


@pytest.mark.parametrize("budget", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_s4_gives_every_layer_its_parts_and_as_many_numbers(kind, budget):
    sizes = {"t5": dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12)}.get(kind, {})
    model = meta(kind, **sizes)
    total = sum(p.numel() for p in model.parameters())
    pk.attach(model, pk.S4(budget=budget))
    found, depth = by_layer(model), 24 if kind == "t5" else 12
    assert len(found) == depth
    target, groups = total * budget / 100 / depth, ["AL"] * 2 + ["AP"] * 4 + ["APB"] * 4 + ["PBL"] * 2
    for (_, number), (kinds, count) in found.items():
        assert kinds == set(groups[number])
        assert (
            target - 4 * 768 < count <= target
        )  # a unit of the finest part, in T5's decoder a prefix's of two attentions
    assert pk.counts(model).trainable == sum(count for _, count in found.values()) <= total * budget / 100


def test_s4_in_closed_form():
    """BERT-base: 109,482,240 * .5 % / 12 = 45,617 numbers for each layer."""
    model = pk.attach(meta("bert"), pk.S4())
    (part,) = state_of(model).adapters["default"].parts
    sizes = {}
    for own in part.method.members:
        sizes.setdefault(own.layers, {})[own.method.key] = own.method
    d, biases = 768, 4 * 768 + 3072 + 768 + 2 * 768
    first, second, third, fourth = sizes.values()
    assert list(sizes) == [(0, 1), (2, 3, 4, 5), (6, 7, 8, 9), (10, 11)]
    assert [list(group) for group in sizes.values()] == [
        ["pfeiffer", "lora"],
        ["pfeiffer", "prefix"],
        ["bitfit", "pfeiffer", "prefix"],
        ["bitfit", "prefix", "lora"],
    ]
    counts = (
        (2 * d + 1) * first["pfeiffer"].size + d + 4 * d * first["lora"].rank,
        (2 * d + 1) * second["pfeiffer"].size + d + 2 * d * second["prefix"].length,
        (2 * d + 1) * third["pfeiffer"].size + d + 2 * d * third["prefix"].length + biases,
        4 * d * fourth["lora"].rank + 2 * d * fourth["prefix"].length + biases,
    )
    assert all(45_617 - 2 * d - 1 < count <= 45_617 for count in counts)
    assert [count for _, count in by_layer(model).values()] == [counts[i] for i in (0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3)]


def test_s4_of_some_layers_in_a_union_and_from_a_file(tmp_path):
    case = make("bert")
    pk.attach(case.model, pk.Union(pk.at((), pk.S4(budget=8.0), layers=1), pk.IA3()))
    perturb(case.model)
    assert {frozenset(kinds) for kinds, _ in by_layer(case.model).values()} == {
        frozenset(),
        frozenset("AP"),
    }  # one layer: the second group alone
    expected = case.call(case.model)
    fresh = make("bert")
    pk.load(fresh.model, pk.save(case.model, tmp_path / "a"))
    close(fresh.call(fresh.model), expected)


def test_bad_hybrids():
    for make_it, message in (
        (lambda: pk.S4(budget=0.0), "a percentage above 0"),
        (lambda: pk.attach(make("bert").model, pk.S4(budget=1.0)), "one of its groups needs 81; raise budget"),
        (lambda: pk.attach(make("bert").model, pk.UniPELT(), ("q",)), "in a place of its own"),
        (lambda: pk.attach(make("bloom").model, pk.MAM()), "AttentionInterface"),
        (lambda: pk.attach(make("mlp").model, pk.S4()), "known model types"),
        (lambda: pk.Gated(pk.LoRA(), reads="y"), "expected one of input, output"),
    ):
        with pytest.raises(ValueError, match=message):
            make_it()


# -- UniPELT and MAM in a model ----------------------------------------------------------------------------------------

MIXES = {
    "mam": pk.MAM(length=3, hidden=4, size=6),
    "unipelt": pk.UniPELT(rank=2, length=3, hidden=4, reduction_factor=2),
    "s4": pk.S4(budget=20.0),
}
mixes = pytest.mark.parametrize("key", MIXES)


def mixed(key, family, dtype=torch.float32, config=None):
    case = make(family, dtype)
    if config is not None:
        case.model.set_attn_implementation(config)
    pk.attach(case.model, MIXES[key])
    perturb(case.model)
    return case


@mixes
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_a_hybrid_ignores_padding(key, family):
    ignores_padding(family, MIXES[key])


@mixes
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_cached_generation_equals_uncached(key, family):
    """Greedy, with padding on the left, and by beams, whose caches are reordered."""
    case = mixed(key, family)
    inputs = {k: v for k, v in padded(case, 2, 0).items() if k in ("input_ids", "attention_mask")}
    for how in ({}, {"num_beams": 3}):
        settings = dict(
            max_new_tokens=5, min_new_tokens=5, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        cached, whole = (case.model.generate(**inputs, **settings, **how, use_cache=use) for use in (True, False))
        assert torch.equal(cached.sequences, whole.sequences)
        for a, b in zip(cached.scores, whole.scores, strict=True):
            finite = b.isfinite()
            close(a[finite], b[finite])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_gated_prefix_is_that_of_the_paper(family, implementation):
    """softmax(q [g P_k; k]^T) [g P_v; v] of the first layer, where g is of rows or, in decoders, of queries."""
    case = make(family, torch.float64)
    case.model.set_attn_implementation(implementation)
    pk.attach(case.model, pk.Gated(pk.PrefixTuning(length=3, hidden=0)))
    perturb(case.model)
    tuner, name = {}, {"bert": "attention.self", "gpt2": "attn", "llama": "self_attn"}[family]
    path, top = next(tuners(case.model, "default"))
    tuner, module = top, next(m for n, m in case.model.named_modules() if n.endswith(f".0.{name}"))
    seen = {}
    source = case.model.get_submodule(path)
    source.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"], kwargs=kwargs),
        with_kwargs=True,
    )
    output = {"bert": "output.dense", "gpt2": "c_proj", "llama": "o_proj"}[family]
    source.get_submodule(output).register_forward_pre_hook(lambda _, args: seen.update(out=args[0]))
    case.call(case.model)
    x = seen["x"]
    if family == "gpt2":
        q, k, v = module.c_attn(x).chunk(3, dim=-1)
    else:
        q, k, v = (
            getattr(module, n)(x)
            for n in (("query", "key", "value") if family == "bert" else ("q_proj", "k_proj", "v_proj"))
        )
    gate = torch.sigmoid(x @ tuner.w + tuner.b)[..., None]  # [B, S, 1]
    d, causal = 8, family != "bert"
    gate = gate if causal else gate.mean(1, keepdim=True).expand(-1, 7, 1)
    q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q, k, v))  # [B, heads, S, d]
    if family == "llama":
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k = apply_rotary_pos_emb(q, k, *seen["kwargs"]["position_embeddings"])
    p_k, p_v = (p.unflatten(-1, (-1, d)).transpose(0, 1)[None] for p in (tuner.inner.k, tuner.inner.v))
    k, v, p_k, p_v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v, p_k, p_v))
    g = gate[:, None]
    front, own = g * (q @ p_k.mT), q @ k.mT
    if causal:
        own = own.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    weights = (torch.cat([front, own], -1) / d**0.5).softmax(-1)
    expected = g * (weights[..., :3] @ p_v) + weights[..., 3:] @ v
    close(seen["out"], expected.transpose(1, 2).flatten(2), torch.float64)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_eject_leaves_every_bit(family, tmp_path):
    for key in ("mam", "unipelt"):
        case = mixed(key, family)
        expected, before = case.call(case.model), pk.counts(case.model).stored
        pk.eject(pk.eject(case.model))  # the second time nothing is left to do
        assert torch.equal(case.call(case.model), expected) and pk.counts(case.model).stored < before
        fresh = make(family)
        pk.load(fresh.model, pk.save(case.model, tmp_path / key))
        assert torch.equal(fresh.call(fresh.model), expected)


def test_a_merge_says_which_parts_cannot_be_merged():
    for method, words in (
        (pk.MAM(length=3, hidden=4, size=6), "; of its parts prefix, parallel cannot$"),
        (MIXES["unipelt"], r"; of its parts gated\(lora\), gated\(prefix\), gated\(pfeiffer\) cannot$"),
        (
            pk.Union(pk.LoRA(rank=2), pk.Pfeiffer()),
            "; of its parts pfeiffer cannot and lora could, as an adapter of their own$",
        ),
        (pk.Pfeiffer(), "it cannot be merged$"),
    ):
        case = make("bert")
        pk.attach(case.model, method, train=("head",))
        with pytest.raises(RuntimeError, match=words):
            pk.merge(case.model)


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("other", [pk.LoRA(rank=2), pk.PrefixTuning(length=3, hidden=4)], ids=["lora", "prefix"])
def test_compacter_beside_others(other, family, tmp_path):
    """One adapter: the effects of both, a file of both, and nothing left of either."""
    case = make(family)
    plain = case.call(case.model)
    for method, name in ((pk.Compacter(n=2, reduction_factor=2), "a"), (other, "b")):
        pk.attach(case.model, method, name=name)
        perturb(case.model, name)
    expected, counted = case.call(case.model), pk.counts(case.model).trainable
    both = make(family)
    pk.attach(both.model, pk.Union(pk.Compacter(n=2, reduction_factor=2), other))
    assert pk.counts(both.model).trainable == counted
    for path, top in tuners(both.model, "default"):
        single = [dict(tuners(case.model, name)).get(path) for name in "ab"]
        own = list(top.children()) if type(top).__name__ == "Stack" else [top]
        for t, source in zip(own, [s for s in single if s is not None], strict=True):
            t.load_state_dict(source.state_dict())
    close(both.call(both.model), expected)
    fresh = make(family)
    pk.load(fresh.model, pk.save(both.model, tmp_path / "both"))
    close(fresh.call(fresh.model), expected)
    pk.detach(fresh.model)
    assert torch.equal(fresh.call(fresh.model), plain)


@pytest.mark.parametrize("method", [pk.PTuning(length=3, hidden=4), pk.LoRA(rank=2)], ids=["ptuning", "lora"])
def test_eject_of_any_adapter(method):
    case = make("bert")
    pk.attach(case.model, pk.LoRA(rank=2), name="other")
    pk.attach(case.model, method, name="own")
    perturb(case.model, "own")
    expected, before = case.call(case.model), pk.counts(case.model, "own").stored
    pk.eject(case.model, "own")
    assert torch.equal(case.call(case.model), expected)
    assert (pk.counts(case.model, "own").stored < before) == isinstance(method, pk.PTuning)
    with pytest.raises(ValueError, match="no adapter 'x'"):
        pk.eject(case.model, "x")


@pytest.mark.parametrize("cls", [pk.MAM, pk.UniPELT, pk.S4])
def test_a_hybrid_trains_at_its_own_rate(cls):
    model = pk.attach(make("bert").model, cls(**cls.tiny))
    assert {group["lr"] for group in param_groups(model)} == {cls.lr}
    model = pk.attach(make("bert").model, pk.Union(cls(**cls.tiny), pk.IA3()))
    assert {group["lr"] for group in param_groups(model)} == {cls.lr, pk.IA3.lr}
    assert {group["lr"] for group in param_groups(model, lr=0.5)} == {0.5}
