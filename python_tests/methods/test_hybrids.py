"""Gates, and the recipes made of several methods: MAM, UniPELT, S4, Compacter beside others."""

import re

import pytest
import torch
from models import close, make, perturb

import peft_kernels as pk
from peft_kernels.engine.attach import state_of, tuners
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
    pk.PrefixTuning.eject(model)
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == 1_410_672 and counts.changed == counts.rank == 0
    assert numbers(model, PrefixTuner) == 184_320


def test_counts_of_mam_on_bart_large():
    """An adapter in each of 24 layers, a prefix in each of 36 attentions: 12 of them look at the encoder."""
    sizes = dict(d_model=1024, encoder_layers=12, decoder_layers=12, encoder_ffn_dim=4096, decoder_ffn_dim=4096)
    model = pk.attach(meta("bart", **sizes, encoder_attention_heads=16, decoder_attention_heads=16), pk.MAM())
    pk.PrefixTuning.eject(model)
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
