"""Prefix tuning: keys and values in every attention that goes through transformers' AttentionInterface."""

import copy
import io
import sys

import pytest
import torch
from models import KINDS, close, make, perturb
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import state_of, tuners
from peft_kernels.methods import _attention
from peft_kernels.methods.prefix import PrefixTuner

SEAMS = [kind for kind in KINDS if not kind.startswith(("falcon", "bloom"))]
GENERATE = ["gpt2", "llama", "gpt_neox", "opt", "gemma3_text", "t5", "bart", "whisper"]


def prefixed(family, *, name="default", case=None, scale=5.0, dtype=torch.float32, **fields):
    """A case with prefixes large enough to matter."""
    case = case or make(family, dtype)
    pk.attach(case.model, pk.PrefixTuning(**{"length": 3, "hidden": 0, **fields}), name=name, seed=len(name))
    perturb(case.model, name)
    with torch.no_grad():
        for tuner in own(case.model, name):
            for p in tuner.parameters():
                p.mul_(scale)
    return case


def own(model, name="default"):
    return [tuner for _, tuner in tuners(model, name) if isinstance(tuner, PrefixTuner)]


def interface():
    return sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS


def configs(model):
    return {path: m.config for path, m in model.named_modules() if "config" in vars(m)}


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_counts_of_gpt2_medium():
    """Li & Liang's: 25.75 million while it trains, 2 L l d of them deployed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
    pk.attach(model, pk.PrefixTuning(length=10, hidden=512))
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == 25_750_016
    assert counts.changed == counts.rank == 0
    pk.eject(model)
    assert pk.counts(model).trainable == pk.counts(model).stored == 2 * 24 * 10 * 1024 == 491_520


def test_each_kind_of_attention_has_its_own_network():
    case = prefixed("bart", hidden=4)
    shared = {tuner.site_name for tuner in own(case.model) if tuner.lender is tuner}
    assert shared == {
        "model.encoder.layers.0.self_attn",
        "model.decoder.layers.0.self_attn",
        "model.decoder.layers.0.encoder_attn",
    }
    assert all(tuner.width == 16 for tuner in own(case.model))
    assert {tuner.width for tuner in own(prefixed("llama").model)} == {8}  # of the one key-value head


@pytest.mark.parametrize("family", ["bert", "gpt2", "phi3", "t5", "whisper"])
def test_eject_keeps_every_bit(family, tmp_path):
    case = prefixed(family, hidden=4)
    before, trained = case.call(case.model), pk.counts(case.model).trainable
    assert pk.eject(case.model) is case.model
    assert torch.equal(case.call(case.model), before)
    assert pk.counts(case.model).trainable == sum(2 * 3 * tuner.width for tuner in own(case.model)) < trained
    pk.save(case.model, tmp_path / "flat")
    fresh = make(family)
    pk.load(fresh.model, tmp_path / "flat")
    assert torch.equal(fresh.call(fresh.model), before)
    assert state_of(fresh.model).adapters["default"].parts[0].method == pk.PrefixTuning(length=3, hidden=0)


def test_eject_reaches_into_recipes():
    case = make("bert")
    pk.attach(case.model, pk.Union(pk.LoRA(rank=2), pk.Gated(pk.PrefixTuning(length=3, hidden=4))))
    perturb(case.model)
    before = case.call(case.model)
    pk.eject(case.model)
    assert torch.equal(case.call(case.model), before)
    inner = state_of(case.model).adapters["default"].parts[0].method.members[1].method.inner
    assert inner == pk.PrefixTuning(length=3, hidden=0)


def test_eject_of_a_frozen_adapter_leaves_it_frozen(tmp_path):
    where = pk.save(prefixed("bert", hidden=4).model, tmp_path / "adapter")
    model = pk.eject(pk.load(make("bert").model, where))
    assert [name for tuner in own(model) for name, _ in tuner.named_parameters()] == ["k", "v"] * len(own(model))
    assert pk.counts(model).trainable == 0


# -- HF PEFT ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "roberta", "opt", "gpt_neox", "gemma3_text", "bart", "t5"])
def test_equal_to_hf_peft(family):
    """The same numbers give the same logits. HF leaves out encoders and cross-attention, and has T5's bias for P."""
    from peft import PrefixTuningConfig, get_peft_model

    case, decodes = make(family), family in ("bart", "t5")
    for name, p in case.model.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.zeros_(p)
    task = "SEQ_2_SEQ_LM" if decodes else "SEQ_CLS" if "bert" in family else "CAUSAL_LM"
    theirs = get_peft_model(case.model, PrefixTuningConfig(task_type=task, num_virtual_tokens=3)).eval()
    flat = nn.init.normal_(theirs.prompt_encoder["default"].embedding.weight).detach()
    ones = torch.ones_like(case.inputs["input_ids"])
    expected = theirs(**case.inputs, attention_mask=ones).logits
    model = theirs.get_base_model()
    exclude = ("encoder.*", "cross.attn") if decodes else ()
    pk.attach(model, pk.PrefixTuning(length=3, hidden=0, shift=family != "t5"), exclude=exclude)
    depth = len(own(model))
    pairs = flat.view(3, depth, 2, -1)
    with torch.no_grad():
        for i, tuner in enumerate(own(model)):
            at = 2 * i % depth if decodes else i  # HF gives a decoder each pair twice, one behind the other
            tuner.k.copy_(pairs[:, at, 0])
            tuner.v.copy_(pairs[:, at, 1])
    close(model(**case.inputs).logits, expected)


def test_shift_needs_positions():
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has no position embeddings and no rotation"):
        pk.attach(make("t5").model, pk.PrefixTuning(shift=True))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "bart"])
def test_shifted_positions_in_a_route(family):
    case = prefixed(family, shift=True, length=2)
    prefixed(family, case=case, name="far", shift=True, length=4)
    expected = []
    for row, names in enumerate((["far"], ["default"])):
        pk.set_active(case.model, names)
        expected.append(case.call(case.model)[row])
    with pk.route(case.model, ["far", "default"]):
        close(case.call(case.model), torch.stack(expected))


# -- where it works ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SEAMS)
def test_sdpa_and_eager_agree_and_detach_restores(family):
    case = make(family)
    before, base, out = configs(case.model), case.call(case.model), {}
    prefixed(family, case=case)
    for kind in ("eager",) if family == "gemma2" else ("sdpa", "eager"):
        case.model.set_attn_implementation(kind)
        out[kind] = case.call(case.model)
        assert not torch.allclose(out[kind], base)
    torch.testing.assert_close(out.get("sdpa", out["eager"]), out["eager"], atol=1e-5, rtol=1e-4)
    pk.detach(case.model)
    assert {path: config is before[path] for path, config in configs(case.model).items()} == dict.fromkeys(before, True)


@pytest.mark.parametrize("family", ["bert", "t5", "whisper", "bert cross"])
def test_every_attention_has_a_prefix_that_matters(family):
    """Encoders, decoders and cross-attention alike."""
    case = prefixed(family, dtype=torch.float64)
    expected = case.call(case.model)
    for tuner in own(case.model):
        tuner.v.data.add_(1.0)
        changed = case.call(case.model)
        assert not torch.allclose(changed, expected), tuner.site_name
        expected = changed


@pytest.mark.parametrize("family", ["gpt2", "t5", "whisper"])
def test_attentions_are_those_of_the_tokens(family):
    case = prefixed(family)
    case.model.set_attn_implementation("eager")
    with pk.disabled(case.model):
        expected = case.model(**case.inputs, output_attentions=True)
    out = case.model(**case.inputs, output_attentions=True)
    for name in ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions"):
        for ours, theirs in zip(out.get(name) or (), expected.get(name) or (), strict=True):
            assert ours.shape == theirs.shape
            assert ours.sum(-1).max() < 1  # the rest went to the prefix


def test_what_has_no_seam_says_so():
    for family in ("falcon", "bloom"):
        with pytest.raises(ValueError, match="does not call transformers' AttentionInterface"):
            pk.attach(make(family).model, pk.PrefixTuning())
    with pytest.raises(ValueError, match="prefix cannot tune what"):
        pk.attach(make("mlp").model, pk.PrefixTuning(), "first")
    with pytest.raises(ValueError, match="length = 0, hidden = 512; expected at least 1 and 0"):
        pk.PrefixTuning(length=0)
    case = prefixed("bert")
    case.model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="a prefix does not work with flex_attention"):
        case.call(case.model)


@pytest.mark.parametrize("routes", [False, True])
def test_flash_attention_gets_its_mask_of_keys(routes, monkeypatch):
    """Stands in for flash attention, which needs a GPU: what it is given, and by which module."""
    case = prefixed("llama", length=2)
    prefixed("llama", case=case, name="long", length=4)
    pk.set_active(case.model, "default")
    expected, seen = case.call(case.model), []
    sdpa = interface()["sdpa"]

    def flash(module, query, key, value, mask, **kwargs):
        seen.append(mask)
        assert module.config._attn_implementation == "flash_attention_2"
        rows, n, keys = query.shape[0], query.shape[2], key.shape[2]
        causal = torch.ones(n, keys, dtype=torch.bool).tril(keys - n)  # aligned at the bottom right
        mask = causal.expand(rows, 1, n, keys) if mask is None else causal & mask.bool()[:, None, None]
        return sdpa(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(type(interface())._global_mapping, "flash_attention_2", flash)
    case.model.config._attn_implementation_internal = "flash_attention_2"
    close(case.call(case.model), expected)
    padded = torch.ones(2, 7, dtype=torch.long)
    padded[0, :2] = 0
    case.model(**case.inputs, attention_mask=padded)
    assert seen[-1].tolist() == [[1, 1, 0, 0, 1, 1, 1, 1, 1], [1] * 9]
    if routes:
        with pk.route(case.model, [None, "long"]):
            case.model(**case.inputs, attention_mask=padded)
        assert seen[-1].tolist() == [[0] * 6 + [1] * 5, [1] * 11]
    with pytest.raises(ValueError, match="would slide its window of 8 over the prefix"):
        _attention._check_flash("flash_attention_2", 9, {"sliding_window": 8})
    with pytest.raises(ValueError, match="on packed sequences has no place"):
        _attention._check_flash("flash_attention_2", 9, {"position_ids": torch.tensor([[0, 1, 0, 1]])})


# -- generation -------------------------------------------------------------------------------------------------------


def generated(case, **options):
    words = {k: v for k, v in case.inputs.items() if k != "decoder_input_ids"}
    if "input_ids" in words:
        words["attention_mask"] = torch.ones_like(words["input_ids"])
        words["attention_mask"][0, :2] = 0
    length = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
    return case.model.generate(**words, **length, output_logits=True, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("family", GENERATE)
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_cached_generation_equals_uncached(family, kind):
    case = prefixed(family, shift=family != "t5", length=2)
    case.model.set_attn_implementation(kind)
    for options in ({}, {"num_beams": 2}):
        plain, cached = (generated(case, use_cache=cache, **options) for cache in (False, True))
        assert torch.equal(plain.sequences, cached.sequences)
        for a, b in zip(plain.logits, cached.logits, strict=True):
            close(b, a)
    if family != "whisper":
        static = generated(case, cache_implementation="static", disable_compile=True)
        for a, b in zip(generated(case, use_cache=False).logits, static.logits, strict=True):
            close(b, a)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_padding_does_not_matter(family):
    case = prefixed(family)
    ids, n = case.inputs["input_ids"], 7
    alone = case.call(case.model)
    wide = torch.cat([ids, torch.ones(2, 2, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(2, n), torch.zeros(2, 2)], dim=1).long()
    out = case.model(input_ids=wide, attention_mask=mask).logits
    close(out if family == "bert" else out[:, :n], alone)


# -- several ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_two_at_once_are_one_of_both(family):
    case = prefixed(family, length=2)
    prefixed(family, case=case, name="more", length=4)
    both, (first, second) = case.call(case.model), (own(case.model, name) for name in ("default", "more"))
    one = prefixed(family, length=6)
    with torch.no_grad():
        for tuner, a, b in zip(own(one.model), first, second, strict=True):
            tuner.k.copy_(torch.cat([a.k, b.k]))
            tuner.v.copy_(torch.cat([a.v, b.v]))
    close(one.call(one.model), both)
    pk.detach(case.model, "default")
    alone = prefixed(family, name="more", length=4)
    close(case.call(case.model), alone.call(alone.model))
    pk.detach(case.model)
    assert not any(isinstance(config, _attention.Config) for config in configs(case.model).values())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "whisper"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_batch_of_prefixes_of_several_lengths(family, kind):
    """In one call, beside rows of another method and of none; their gradients too."""
    case = make(family, torch.float64)
    case.model.set_attn_implementation(kind)
    prefixed(family, case=case, length=2)
    prefixed(family, case=case, name="long", length=5, hidden=4)
    pk.attach(case.model, pk.LoRA(rank=2), name="lora")
    perturb(case.model, "lora")
    names = ["long", None, "default", "lora", "long", "default"]
    inputs = {k: v.repeat(3, *[1] * (v.dim() - 1)) for k, v in case.inputs.items()}
    params = [p for t in own(case.model, "long") for p in t.parameters()]
    expected, calls = [], []
    for row, name in enumerate(names):
        pk.set_active(case.model, [name] if name else [])
        expected.append(case.model(**inputs).logits[row])
    handle = own(case.model)[0].register_forward_hook(lambda *_: calls.append(1))
    with pk.route(case.model, names):
        out = case.model(**inputs).logits
        grads = torch.autograd.grad(out.square().sum(), params)
    handle.remove()
    assert not calls  # all prefixes went into one call of attention
    close(out, torch.stack(expected), torch.float64)
    for got, want in zip(grads, torch.autograd.grad(torch.stack(expected).square().sum(), params), strict=True):
        close(got, want, torch.float64)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_routed_generation_with_a_cache(family):
    case = prefixed(family, length=2)
    prefixed(family, case=case, name="long", length=5)
    with pk.route(case.model, ["long", "default"]):
        routed = generated(case, num_beams=2).sequences
    for row, name in enumerate(["long", "default"]):
        pk.set_active(case.model, name)
        assert torch.equal(routed[row], generated(case, num_beams=2).sequences[row])


def test_a_compiled_graph_serves_every_route():
    case = prefixed("llama", length=2)
    prefixed("llama", case=case, name="long", length=5)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    for names in (["long", "default"], [None, "long"]):
        with pk.route(case.model, names):
            close(case.call(compiled), case.call(case.model))


@pytest.mark.parametrize("family", ["bert", "t5", "bart", "gemma3_text"])
def test_compiled_in_one_graph(family):
    if family in ("t5", "bart") and torch.__version__ < "2.12":
        pytest.skip("this torch does not trace the caches of these models")
    case = prefixed(family, hidden=4, shift=family != "t5")
    torch._dynamo.reset()
    close(case.call(torch.compile(case.model, fullgraph=True, backend="aot_eager")), case.call(case.model))


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family, reentrant):
    case = prefixed(family, hidden=4)
    for m in case.model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    case.model.train()
    if family != "bert":
        case.model.config.use_cache = False
    case.model.enable_input_require_grads()  # without it, reentrant checkpointing has no gradients

    def gradients():
        torch.manual_seed(7)  # attention draws its own dropout
        case.model.zero_grad()
        case.loss(case.model).backward()
        return {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}

    plain = gradients()
    case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, g in gradients().items():
        close(g, plain.pop(name))
    assert not plain


def test_on_a_quantised_base():
    case = make("llama")
    pk.quantize(case.model, "nf4")
    prefixed("llama", case=case, hidden=4)
    case.loss(case.model).backward()
    assert all(p.grad is not None for tuner in own(case.model) for p in tuner.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prefixes_are_trained_in_fp32_beside_16_bits(dtype):
    case = prefixed("gpt2", dtype=dtype)
    assert case.call(case.model).dtype == dtype
    assert {p.dtype for tuner in own(case.model) for p in tuner.parameters()} == {torch.float32}


def test_a_gate_multiplies_the_prefix():
    """Gated: y + g (tuned - y), of an output that must be computed anew; and the factor of each row of the batch."""
    case = prefixed("bert")
    gate = torch.tensor([0.5, 2.0]).view(2, 1, 1)

    def gating(tuner, args, kwargs):
        return args, {**kwargs, "gate": gate}

    hooks = [tuner.register_forward_pre_hook(gating, with_kwargs=True) for tuner in own(case.model)]
    gated = case.call(case.model)
    for hook in hooks:
        hook.remove()
    flat = {tuner: (tuner.k.data, tuner.v.data) for tuner in own(case.model)}
    for row, g in enumerate((0.5, 2.0)):
        for tuner, (k, v) in flat.items():
            tuner.k.data, tuner.v.data = k * g, v * g
        close(case.call(case.model)[row], gated[row])
    other = make("bert")
    base = other.call(other.model)
    pk.attach(other.model, pk.Gated(pk.PrefixTuning(length=3, hidden=0)))
    perturb(other.model)
    assert not torch.allclose(other.call(other.model), base)


# -- loans ------------------------------------------------------------------------------------------------------------


def test_the_stand_in_is_the_config_but_for_one_word():
    case = make("gpt2")
    module, true = case.model.transformer.h[0].attn, case.model.config
    prefixed("gpt2", case=case)
    assert module.config._attn_implementation == "peft_kernels" and true._attn_implementation == "sdpa"
    assert module.config.n_embd == true.n_embd and case.model.config is true
    module.config.n_embd = 17
    assert true.n_embd == 17
    with pytest.raises(AttributeError):
        module.config.nothing  # noqa: B018
    twin = copy.deepcopy(case.model)
    assert twin.transformer.h[0].attn.config.true is twin.config is not true
    pk.detach(twin)
    assert twin.transformer.h[0].attn.config is twin.config


def test_a_pickle_registers_the_implementation_again():
    case = prefixed("gpt2")
    expected, file = case.call(case.model), io.BytesIO()
    torch.save(case.model, file)
    file.seek(0)
    _attention._files.clear()  # as in a process of its own
    del type(interface())._global_mapping[_attention.NAME]
    thawed = torch.load(file, weights_only=False)
    assert torch.equal(case.call(thawed), expected)


def test_the_implementation_alone_is_none():
    case = prefixed("gpt2")
    pk.detach(case.model)
    case.model.config._attn_implementation_internal = _attention.NAME
    with pytest.raises(ValueError, match="'peft_kernels' is no implementation of its own"):
        case.call(case.model)


def test_an_adapter_under_another_name_gives_its_loan_back():
    case = make("gpt2")
    before = configs(case.model)
    prefixed("gpt2", case=case)
    pk.engine.attach.rename(case.model, "default", "new")
    pk.detach(case.model, "new")
    assert all(config is before[path] for path, config in configs(case.model).items())
