"""Bottleneck adapters against plain torch, a hand-written BERT layer and adapter-hub; the papers' counts."""

import copy
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from models import EVERY, FAMILIES, Case, close, make, perturb
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.fit import param_groups
from peft_kernels.engine.roles import layer_of
from peft_kernels.methods._bottleneck import ACTIVATIONS

METHODS = {cls.key: cls for cls in (pk.Houlsby, pk.Pfeiffer, pk.AdapterL, pk.ParallelAdapter, pk.AdapterDrop)}
every_method = pytest.mark.parametrize("key", METHODS)
ACTS = {
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: z * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z * torch.sigmoid(z),
    "tanh": torch.tanh,
    "leaky_relu": lambda z: torch.where(z > 0, z, 0.01 * z),
    "identity": lambda z: z,
}


def small(key, **fields):
    return METHODS[key](**{**METHODS[key].tiny, **fields})


def adapters(model, name="default"):
    """path -> the tuner there that has a bottleneck"""
    inside = ((path, t) for path, tuner in tuners(model, name) for t in tuner.modules())
    return {path: t for path, t in inside if hasattr(t, "adapter")}


def delta(t, x):
    """What the bottleneck of a tuner makes of x, without its residual and scale, in plain torch."""
    a = t.adapter
    z = x @ a.down_weight.T + a.down_bias
    return ACTS[a.activation](z) @ a.up_weight.T + a.up_bias


def assert_same_gradients(ours, truth, inputs):
    for got, wanted in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (ours, truth)), strict=True):
        close(got, wanted, torch.float64)


# -- formulas ---------------------------------------------------------------------------------------------------------


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 12)).double()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_houlsby_is_its_definition(activation):
    """After the linear: o + up(act(down(o))), gradients included."""
    model, x = mlp(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    pk.attach(model, pk.Houlsby(reduction_factor=4, activation=activation, norms=False), ("0",))
    perturb(model)
    ((_, t),) = tuners(model, "default")
    o = F.linear(x, model[0].weight, model[0].bias)
    truth, y = o + delta(t, o), model[0](x)
    close(y, truth, torch.float64)
    assert_same_gradients(y, truth, [x, *t.parameters()])


def test_adapterl_is_its_definition():
    """o + up(relu(down(LN(o)))) with a LayerNorm of its own."""
    model, x = mlp(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    pk.attach(model, pk.AdapterL(size=3), ("0",))
    perturb(model)
    ((_, t),) = tuners(model, "default")
    o = F.linear(x, model[0].weight, model[0].bias)
    centred = o - o.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    truth, y = o + delta(t, unit * t.norm_weight + t.norm_bias), model[0](x)
    close(y, truth, torch.float64)
    assert_same_gradients(y, truth, [x, *t.parameters()])


@pytest.mark.parametrize("fields", [{}, {"scale": -0.5}, {"learned": True}], ids=str)
def test_a_parallel_adapter_is_its_definition(fields):
    """FFN(x) + s up(relu(down(x))), without an inner residual."""
    model, x = mlp(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    pk.attach(model, pk.ParallelAdapter(**fields), ("0>2",))
    ((_, spanned),) = tuners(model, "default")
    t = spanned.tuner
    assert (t.scale.item() == 1.0 and t.scale.requires_grad) if fields.get("learned") else t.scale == t.cfg.scale
    perturb(model)
    assert t.adapter.down_weight.shape == (3, 6) and t.adapter.up_weight.shape == (12, 3)
    y = model(x)
    truth = (x @ model[0].weight.T + model[0].bias).tanh() @ model[2].weight.T + model[2].bias + t.scale * delta(t, x)
    close(y, truth, torch.float64)
    assert_same_gradients(y, truth, [x, *t.parameters()])


def test_a_parallel_adapter_writes_into_a_result_that_nobody_else_holds():
    """Of two that stack, the upper one gets the lower one's result; gradients stay right."""
    model, x = mlp(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    for name in ("one", "two"):
        pk.attach(model, pk.ParallelAdapter(), ("0>2",), name=name, seed=len(name))
        perturb(model, name)
    one, two = (next(tuners(model, name))[1].tuner for name in ("one", "two"))
    ffn = (x @ model[0].weight.T + model[0].bias).tanh() @ model[2].weight.T + model[2].bias
    truth, y = ffn + 4 * delta(one, x) + 4 * delta(two, x), model(x)
    close(y, truth, torch.float64)
    assert_same_gradients(y, truth, [x, *one.parameters(), *two.parameters()])


def test_pfeiffer_against_a_hand_written_bert_layer():
    """out = LN(A(LN(o + res); skip = o) + res), the same LN both times; gradients included."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50)
    model = BertModel(BertConfig(**sizes, attn_implementation="eager"), add_pooling_layer=False).double().eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    pk.attach(model, pk.Pfeiffer(reduction_factor=4))
    perturb(model)
    ((path, t),) = tuners(model, "default")
    assert path == "encoder.layer.0.output.dense"
    ids, layer = torch.randint(50, (2, 7)), model.encoder.layer[0]

    def linear(module, x):
        return x @ module.weight.T + module.bias

    def norm(module, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt() * module.weight + module.bias

    x = model.embeddings(input_ids=ids)
    own = layer.attention.self
    q, k, v = (linear(m, x).view(2, 7, 2, 8).transpose(1, 2) for m in (own.query, own.key, own.value))
    context = ((q @ k.mT / math.sqrt(8)).softmax(-1) @ v).transpose(1, 2).reshape(2, 7, 16)
    res = norm(layer.attention.output.LayerNorm, linear(layer.attention.output.dense, context) + x)
    o = linear(layer.output.dense, ACTS["gelu"](linear(layer.intermediate.dense, res)))
    truth = norm(layer.output.LayerNorm, o + delta(t, norm(layer.output.LayerNorm, o + res)) + res)
    y = model(input_ids=ids).last_hidden_state
    close(y, truth, torch.float64)
    assert_same_gradients(y, truth, list(t.parameters()))


# A block's output is its feed-forward layer's + the residual, in the others with what attention beside it adds.
SERIAL = ("gpt2", "llama", "t5", "opt", "mistral", "qwen2", "gemma", "phi3", "vit", "whisper", "bloom", "mbart")


@pytest.mark.parametrize("family", [*SERIAL, "gpt_neox serial", "falcon serial", "t5 gated"])
def test_pfeiffer_without_a_layernorm_after_the_addition(family):
    """The adapter sees o + residual, which is what the block would return without it."""
    case = make(family, torch.float64)
    pk.attach(case.model, small("pfeiffer"))
    perturb(case.model)
    seen = watched(case)
    for path, t in adapters(case.model).items():
        x, o, y, out = seen[path]
        close(x, out - y + o, torch.float64)
        close(y, o + delta(t, x), torch.float64)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "bart", "opt postnorm"])
def test_pfeiffer_with_a_layernorm_after_the_addition(family):
    """The adapter sees what that LayerNorm makes of o + residual; it is called with y + residual afterwards."""
    case = make(family, torch.float64)
    pk.attach(case.model, small("pfeiffer"))
    perturb(case.model)
    seen = watched(case)
    for path, t in adapters(case.model).items():
        x, o, y, _ = seen[path]
        before, after = seen[t.norm]
        close(before - o, after.view(y.shape) - y, torch.float64)  # OPT's layer is flat inside
        close(x, t.norm(before), torch.float64)
        close(y, o + delta(t, x), torch.float64)


def watched(case):
    """path -> (input of its adapter, o, y, output of its block); LayerNorm -> the inputs of its calls."""
    found, blocks, hooks = {}, {}, []
    modules = dict(case.model.named_modules())
    for path, t in adapters(case.model).items():
        stack = path[: path.index(f".{layer_of(path)}.")]
        block = f"{stack}.{layer_of(path)}"
        hooks.append(
            t.adapter.register_forward_hook(lambda m, args, y, path=path: found.update({path: [args[0], args[1], y]}))
        )
        hooks.append(
            modules[block].register_forward_hook(
                lambda m, args, out, path=path: blocks.update({path: out if isinstance(out, torch.Tensor) else out[0]})
            )
        )
        if t.norm is not None:
            hooks.append(t.norm.register_forward_pre_hook(lambda m, args: found.setdefault(m, []).append(args[0])))
    with torch.no_grad():
        case.call(case.model)
    for hook in hooks:
        hook.remove()
    for path, out in blocks.items():
        found[path].append(out.view(found[path][2].shape))
    return found


# -- places -----------------------------------------------------------------------------------------------------------


OTHERS = [pytest.param(f, marks=pytest.mark.slow) for f in EVERY if f not in FAMILIES]


@every_method
@pytest.mark.parametrize("family", [*FAMILIES[1:], *OTHERS])
@torch.no_grad()  # with gradients T5's attention takes another kernel while its bias is trained
def test_zero_up_is_an_exact_identity_in_every_family(key, family):
    case = make(family)
    before = case.call(case.model)
    pk.attach(case.model, small(key))
    assert torch.equal(case.call(case.model), before)
    stacks = 2 if family in ("t5", "bart", "whisper") else 1
    per_stack = {"houlsby": 4, "adapterdrop": 1}.get(key, 2)
    assert len(adapters(case.model)) == stacks * per_stack
    for init in ("normal", "bert"):
        case = make(family)
        pk.attach(case.model, small(key, init=init))
        moved = (case.call(case.model) - before).abs().max()
        assert moved > 0


@pytest.mark.parametrize("family", ["t5", "bart", "whisper", "bert cross"])
def test_cross_attention_is_a_target_of_houlsby_only_by_name(family):
    paths = set(adapters(pk.attach(make(family).model, small("houlsby", norms=False))))
    cross = set(adapters(pk.attach(make(family).model, small("houlsby", norms=False), "cross.o")))
    assert cross and not paths & cross
    named = pk.attach(make(family).model, small("houlsby", norms=False), ("o", "cross.o", "down"))
    assert set(adapters(named)) == paths | cross


def test_houlsby_trains_the_layernorms_at_its_own_rate():
    model = pk.attach(make("bert").model, small("houlsby"))
    norms = {path for path, _ in tuners(model, "default")} - set(adapters(model))
    assert norms == {path for path, m in make("bert").model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert {g["lr"] for g in param_groups(model)} == {pk.Houlsby.lr}
    plain = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(
        ValueError, match=r"Houlsby norms = True, but no target layer has a LayerNorm; pass norms=False"
    ):
        pk.attach(plain, pk.Houlsby(), ("0",))


def test_initial_values():
    site_of = pk.attach(nn.Sequential(nn.Linear(8, 256)), pk.AdapterL(size=128, init="normal"), ("0",), seed=3)
    ((_, t),) = tuners(site_of, "default")
    for weight in (t.adapter.down_weight, t.adapter.up_weight):  # two standard deviations cut, 0.8796 of it is left
        assert weight.abs().max() <= 0.02 and weight.std().item() == pytest.approx(0.0088, rel=0.02)
    bert = pk.attach(nn.Sequential(nn.Linear(8, 256)), pk.AdapterL(size=128, init="bert"), ("0",), seed=3)
    ((_, t),) = tuners(bert, "default")
    for weight in (t.adapter.down_weight, t.adapter.up_weight):
        assert weight.abs().max() > 0.06 and weight.std().item() == pytest.approx(0.02, rel=0.02)
    zero = pk.attach(nn.Sequential(nn.Linear(8, 256)), pk.AdapterL(size=128), ("0",), seed=3)
    ((_, t),) = tuners(zero, "default")
    assert 0.99 / 16 < t.adapter.down_weight.abs().max() <= 1 / 16 and not t.adapter.up_weight.any()
    assert not t.adapter.down_bias.any() and not t.adapter.up_bias.any()
    assert pk.Houlsby(activation="swish") == pk.Houlsby(activation="silu")


def test_the_bottleneck_is_at_least_one_wide():
    model = pk.attach(nn.Sequential(nn.Linear(8, 6)), pk.AdapterL(reduction_factor=100), ("0",))
    assert [t.adapter.down_weight.shape for _, t in tuners(model, "default")] == [(1, 6)]


def test_dropout_of_the_bottleneck():
    """In training only; in expectation it changes nothing."""
    model, x = mlp().float(), torch.randn(3, 6)
    pk.attach(model, pk.Houlsby(size=64, dropout=0.5, activation="identity", init="bert", norms=False), ("0",))
    expected = model.eval()[0](x)
    assert torch.equal(model[0](x), expected)
    model.train()
    with torch.no_grad():
        draws = torch.stack([model[0](x) for _ in range(2000)])
    assert draws.std(0).min() > 0
    torch.testing.assert_close(draws.mean(0), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pk.Houlsby(activation="wing"), r"Houlsby activation = 'wing'; expected one of relu"),
        (lambda: pk.Pfeiffer(init="one"), r"Pfeiffer init = 'one'; expected one of zero, normal, bert"),
        (
            lambda: pk.AdapterL(reduction_factor=0),
            r"AdapterL reduction_factor = 0, size = 0; expected at least 1 and 0",
        ),
        (lambda: pk.ParallelAdapter(dropout=1.5), r"ParallelAdapter dropout = 1.5; expected a probability from 0 to 1"),
        (lambda: pk.AdapterDrop(drop=-1), r"AdapterDrop drop = -1; expected at least 0"),
        (
            lambda: pk.attach(make("mlp").model, pk.Pfeiffer(), ("first",)),
            r"Pfeiffer at first: what the model adds to that output is not known; give a role .* or take Houlsby",
        ),
        (
            lambda: pk.attach(bloom_that_adds_the_layernorm_s_output(), pk.Pfeiffer()),
            r"Pfeiffer at transformer.h.0.mlp.dense_4h_to_h: what the model adds to that output is not known",
        ),
        (
            lambda: pk.attach(make("bert").model, pk.AdapterDrop(drop=2)),
            r"AdapterDrop drop = 2 leaves no adapter; expected at most 1",
        ),
        (
            lambda: pk.attach(make("bert").model, pk.AdapterDrop(drop=2, random=True)),
            r"AdapterDrop drop = 2 leaves no adapter; expected at most 1",
        ),
    ],
)
def test_errors_name_the_fix(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def bloom_that_adds_the_layernorm_s_output():
    from transformers import BloomConfig, BloomForCausalLM

    sizes = dict(hidden_size=16, n_layer=1, n_head=2, vocab_size=50)
    return BloomForCausalLM(BloomConfig(**sizes, apply_residual_connection_post_layernorm=True))


# -- counts -----------------------------------------------------------------------------------------------------------


@cache
def meta(kind):
    import transformers

    with torch.device("meta"):
        if kind == "bert":
            return transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
        if kind == "t5":
            sizes = dict(d_model=768, d_ff=3072, num_layers=12, num_heads=12, d_kv=64)
            return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
        if kind == "bart":
            return transformers.BartForConditionalGeneration(transformers.BartConfig())  # large
        width, layers = {"gpt2-m": (1024, 24), "gpt2-l": (1280, 36)}[kind]
        sizes = dict(n_embd=width, n_layer=layers, n_head=width // 64)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


@pytest.mark.parametrize(
    ("kind", "method", "count"),
    [
        ("bert", pk.Houlsby(size=64, norms=False), 2_379_264),
        ("bert", pk.Houlsby(size=64), 2_379_264 + 25 * 2 * 768),
        ("bert", pk.Pfeiffer(), 894_528),
        # Hu et al. 2022, arXiv:2106.09685, table 3: AdapterL of 0.37M, 11.09M, 0.88M and 23.00M
        ("gpt2-m", pk.AdapterL(size=6), 368_784),
        ("gpt2-m", pk.AdapterL(size=224), 11_089_152),
        ("gpt2-l", pk.AdapterL(size=8), 875_808),
        ("gpt2-l", pk.AdapterL(size=248), 23_002_848),
        # Mahabadi et al. 2021, arXiv:2106.04647, table 1: 0.832 %, 0.427 % and (with layers 0 to 4 dropped) 0.494 % of
        # T5-base's 222,903,552 with the 47,616 numbers of the LayerNorms
        ("t5", pk.Houlsby(reduction_factor=32), 1_807_488 + 47_616),
        ("t5", pk.Pfeiffer(reduction_factor=32), 951_360 - 47_616),
        ("t5", pk.AdapterDrop(reduction_factor=32), 14 * 37_656),
        ("t5", pk.AdapterDrop(reduction_factor=32, random=True), 24 * 37_656),
        ("bart", pk.ParallelAdapter(size=512), 24 * 1_050_112),
        ("bart", pk.ParallelAdapter(size=512, learned=True), 24 * 1_050_113),
    ],
    ids=str,
)
def test_counts_of_the_papers(kind, method, count):
    model = pk.attach(copy.deepcopy(meta(kind)), method)
    counts = pk.counts(model)
    assert counts.trainable == count
    assert counts.changed == (count - sum(p.numel() for t in adapters(model).values() for p in t.parameters()))
    assert counts.rank == 0


def test_percentages_of_compacter_s_table():
    total = 222_903_552
    assert sum(p.numel() for p in meta("t5").parameters()) == total
    of = {name: round(100 * n / total, 3) for name, n in (("h", 1_855_104), ("p", 951_360), ("d", 1_101_984))}
    assert of == {"h": 0.832, "p": 0.427, "d": 0.494}
    dropped = pk.attach(copy.deepcopy(meta("t5")), pk.Houlsby(reduction_factor=32, norms=False), layers=range(5, 12))
    assert pk.counts(dropped).trainable + 47_616 == 1_101_984


# -- against the reference --------------------------------------------------------------------------------------------

HUB = {
    "houlsby": (pk.Houlsby(size=4, norms=False), "DoubleSeqBnConfig", {}),
    "pfeiffer": (pk.Pfeiffer(size=4), "SeqBnConfig", {}),
    "adapterl": (pk.AdapterL(size=4), "SeqBnConfig", {"original_ln_before": False, "ln_before": True}),
    "parallel": (pk.ParallelAdapter(size=4), "ParBnConfig", {}),
    "learned": (pk.ParallelAdapter(size=4, learned=True), "ParBnConfig", {"scaling": "learned"}),
}


# Beside a feed-forward layer behind a LayerNorm adapter-hub gives a parallel adapter what is before that LayerNorm.
POSTNORM, PRENORM = ("bert", "roberta", "distilbert", "bart"), ("gpt2", "t5", "mbart")


@pytest.mark.parametrize(
    ("key", "family"),
    [(k, f) for k in HUB for f in (*POSTNORM, *(PRENORM if k not in ("parallel", "learned") else ()))],
)
def test_parity_with_adapter_hub(key, family):
    """The whole model with the same numbers in its adapters: outputs, and the gradients of each number."""
    library = pytest.importorskip("adapters", exc_type=ImportError)
    modeling = pytest.importorskip("adapters.methods.modeling", exc_type=ImportError)
    method, config, fields = HUB[key]
    case = make(family)
    theirs = Case(copy.deepcopy(case.model), case.inputs)
    library.init(theirs.model)
    theirs.model.add_adapter("x", config=getattr(library, config)(reduction_factor=4, **fields))
    theirs.model.train_adapter("x")
    theirs.model.eval()
    pk.attach(case.model, method)
    perturb(case.model)

    def place(path):
        stack = "decoder" in path.split(".")
        return stack, layer_of(path), "attention" not in path and "attn" not in path and "SelfAttention" not in path

    found = {p: m for p, m in theirs.model.named_modules() if isinstance(m, modeling.Adapter)}
    other, own = ([m for _, m in sorted(d.items(), key=lambda i: place(i[0]))] for d in (found, adapters(case.model)))
    pairs = []
    for ours, reference in zip(own, other, strict=True):
        a, (*norm, linear, _) = ours.adapter, reference.adapter_down
        pairs += [(a.down_weight, linear.weight), (a.down_bias, linear.bias)]
        pairs += [(a.up_weight, reference.adapter_up.weight), (a.up_bias, reference.adapter_up.bias)]
        pairs += [(ours.norm_weight, norm[0].weight), (ours.norm_bias, norm[0].bias)] if norm else []
        pairs += [(ours.scale, reference.scaling)] if method == HUB["learned"][0] else []
    with torch.no_grad():
        for p, q in pairs:
            q.copy_(p.view(q.shape))
    close(case.call(case.model), theirs.call(theirs.model))
    for c in (case, theirs):
        c.loss(c.model).backward()
    for p, q in pairs:
        torch.testing.assert_close(p.grad.view(q.shape), q.grad, rtol=1e-4, atol=1e-4)
