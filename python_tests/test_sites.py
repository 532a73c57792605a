"""Sites beyond the linear layer: convolutions, embeddings, spans, and what a site knows of its sublayer."""

import copy

import pytest
import torch
from models import EVERY, METHODS, Case, assert_same, attached, close, make, perturb, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import Beside, Onto, toys  # noqa: F401  # a fixture

import peft_kernels as pk
from peft_kernels.engine import taps
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.roles import resolve


class Mixed(nn.Module):
    """An embedding, convolutions of each kind and a linear head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.one = nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular")
        self.depthwise = nn.Conv1d(8, 8, 3, stride=2, groups=4, bias=False)
        self.two = nn.Conv2d(1, 5, (2, 3), dilation=2)
        self.three = nn.Conv3d(1, 4, 2)
        self.out = nn.Linear(9, 3)

    def forward(self, x):
        h = self.depthwise(torch.relu(self.one(self.embed(x).mT)))  # [n, 8, t]
        maps = self.two(h[:, None])  # [n, 5, 6, t]
        volume = self.three(h[:, None, None].expand(-1, -1, 2, -1, -1))
        return self.out(torch.cat([maps.mean((2, 3)), volume.mean((2, 3, 4))], -1))


SITES = ("embed", "one", "depthwise", "two", "three")


def mixed(dtype=torch.float64):
    torch.manual_seed(0)
    return Case(Mixed().to(dtype).eval(), {"x": torch.randint(0, 11, (4, 15))})


@pytest.mark.parametrize("site", [*SITES, "all"])
@pytest.mark.parametrize("key", ["lora", "bitfit"])
def test_convolutions_and_embeddings(key, site, tmp_path):
    """The laws of a linear site hold here: identity, the fold, merging, saving, detaching, 16 bit."""
    targets = SITES if site == "all" else (site,)
    case = mixed()
    before, plain = snapshot(case.model), case.call(case.model)
    cfg = METHODS[key](**METHODS[key].tiny)
    pk.attach(case.model, cfg, targets)
    close(case.call(case.model), plain, torch.float64)
    perturb(case.model)
    adapted = case.call(case.model)
    assert not torch.allclose(adapted, plain)
    params = [p for p in case.model.parameters() if p.requires_grad]
    fast = torch.autograd.grad(case.loss(case.model), params)
    definition = copy.deepcopy(case.model)
    for _, tuner in tuners(definition, "default"):
        tuner.forward = pk.Tuner.forward.__get__(tuner)
    slow = torch.autograd.grad(case.loss(definition), [p for p in definition.parameters() if p.requires_grad])
    for f, s in zip(fast, slow, strict=True):
        assert s.abs().sum() > 0
        close(f, s, torch.float64)
    changed = pk.counts(case.model).changed
    pk.merge(case.model)
    close(case.call(case.model), adapted, torch.float64)
    moved = sum(int((p != before[n]).sum()) for n, p in case.model.named_parameters() if n in before)
    assert moved == changed
    pk.unmerge(case.model)
    assert_same(case.model, before)
    fresh = mixed()
    pk.load(fresh.model, pk.save(case.model, tmp_path / "adapter"))
    close(fresh.call(fresh.model), adapted, torch.float64)
    pk.detach(case.model)
    assert torch.equal(case.call(case.model), plain)


def test_the_padding_row_is_not_trained():
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0))
    pk.attach(model, pk.LoRA(rank=2), ("0",))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.tensor([[0, 1, 2]])
    for _ in range(3):
        model(ids).square().sum().backward()
        optimizer.step()
    before = model[0].weight.detach().clone()
    pk.merge(model)
    assert (model[0].weight != before).any(-1).tolist() == [False, True, True, False, False]


def test_convolutions_in_16_bit_and_in_training():
    case = mixed(torch.bfloat16)
    pk.attach(case.model, pk.LoRA(rank=2, dropout=0.5), SITES)
    perturb(case.model).train()
    assert {p.dtype for p in case.model.parameters() if p.requires_grad} == {torch.float32}
    draws = [case.call(case.model) for _ in range(2)]
    assert draws[0].dtype == torch.bfloat16
    assert not torch.equal(*draws)
    case.loss(case.model).backward()
    assert all(p.grad.abs().sum() > 0 for p in case.model.parameters() if p.requires_grad)


def test_a_bias_above_a_convolution_keeps_its_dropout():
    model = nn.Sequential(nn.Conv1d(3, 4, 2)).eval()
    pk.attach(model, pk.LoRA(rank=2, dropout=0.5), ("0",), name="low")
    perturb(model, "low")
    pk.attach(model, pk.BitFit(), ("0",), name="bias")
    x = torch.randn(2, 3, 8)
    plain = model(x)
    model[0].peft.tuners["bias"].bias.data += torch.arange(4.0)
    close(model(x), plain + torch.arange(4.0)[:, None])
    model.train()
    assert not torch.equal(model(x), model(x))


def test_unbatched_convolution():
    conv = nn.Sequential(nn.Conv2d(2, 3, 2)).double()
    pk.attach(conv, pk.LoRA(rank=2), ("0",))
    perturb(conv)
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    close(torch.stack([conv(one) for one in x]), conv(x), torch.float64)


def test_a_star_means_layers_and_an_embedding_is_named():
    sites = {path for path, _ in tuners(attached("lora", "bert").model, "default")}
    assert not any("embeddings" in path for path in sites)
    case = make("bert")
    pk.attach(case.model, pk.LoRA(rank=2), ("*",))
    assert not any("embeddings" in path for path, _ in tuners(case.model, "default"))
    pk.detach(case.model)
    pk.attach(case.model, pk.LoRA(rank=2), ("embed", "q"))
    assert any("word_embeddings" in path for path, _ in tuners(case.model, "default"))


@pytest.mark.parametrize("scaled", [False, True])
def test_scaled_embeddings(scaled):
    """BART multiplies the rows of its table afterwards; the update is multiplied alike."""
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    embed = BartScaledWordEmbedding(9, 4, 0, embed_scale=3.0) if scaled else nn.Embedding(9, 4)
    model = nn.Sequential(embed.double())
    pk.attach(model, pk.LoRA(rank=2), ("0",))
    perturb(model)
    ids = torch.tensor([[1, 2, 8]])
    adapted = model(ids)
    pk.merge(model)
    close(model(ids), adapted, torch.float64)
    renormed = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0))
    pk.attach(renormed, pk.LoRA(rank=2), ("0",))
    with pytest.raises(RuntimeError, match="forward of its own"):
        pk.merge(renormed)


# -- spans and residuals ----------------------------------------------------------------------------------------------

TRANSFORMERS = [f for f in EVERY if f != "mlp"]


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_tuner_around_the_ffn(family, tmp_path):
    """Identity at first; then its output moves by exactly x A; all of a life: save, stack, detach."""
    case = make(family, torch.float64)
    before, plain = snapshot(case.model), case.call(case.model)
    pk.attach(case.model, Beside())
    close(case.call(case.model), plain, torch.float64)
    with torch.no_grad():
        for _, tuner in tuners(case.model, "default"):
            for p in tuner.parameters():
                p.copy_(torch.eye(*p.shape, dtype=p.dtype) * 0.3)
    adapted = case.call(case.model)

    # The same by hand: a forward hook on the sublayer's last module, which knows the input of the first.
    hand = make(family, torch.float64)
    inputs = {}
    for site in resolve(hand.model, ("ffn",)):
        (site.entry or site.module).register_forward_pre_hook(
            lambda m, args, n=site.name: inputs.update({n: args[0]}),
        )
        site.module.register_forward_hook(lambda m, args, y, n=site.name: y + 0.3 * inputs[n])
    close(adapted, hand.call(hand.model), torch.float64)
    assert not torch.allclose(adapted, plain)
    assert not taps._local.inputs  # nothing outlives the call

    case.loss(case.model).backward()
    assert all(p.grad.abs().sum() > 0 for p in case.model.parameters() if p.requires_grad)
    fresh = make(family, torch.float64)
    pk.load(fresh.model, pk.save(case.model, tmp_path / "a"))
    assert torch.equal(fresh.call(fresh.model), adapted)
    pk.attach(case.model, pk.LoRA(rank=2), ("up", "down"), name="second")
    assert torch.equal(case.call(case.model), adapted)
    pk.detach(case.model, "default")
    close(case.call(case.model), plain, torch.float64)
    pk.detach(case.model)
    assert torch.equal(case.call(case.model), plain)
    assert_same(case.model, before)
    assert not any(isinstance(h, taps.Tap) for m in case.model.modules() for h in m._forward_pre_hooks.values())


def test_a_span_compiles_is_copied_routed_and_checkpointed():
    case = make("bert")
    for seed, name in enumerate(("a", "b")):
        pk.attach(case.model, Beside(), name=name, seed=seed)
        perturb(case.model, name)
    single = {}
    for name in ("a", "b"):
        pk.set_active(case.model, [name])
        single[name] = case.call(case.model)
    with pk.route(case.model, ["b", "a"]):
        out = case.call(case.model)
    close(out[0], single["b"][0])
    close(out[1], single["a"][1])
    twin = copy.deepcopy(case.model)
    close(case.call(twin), single["b"])
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    close(case.call(compiled), single["b"])

    def gradients():
        case.model.zero_grad()
        case.loss(case.model).backward()
        return [p.grad.clone() for p in case.model.parameters() if p.grad is not None]

    case.model.train()
    for m in case.model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    plain = gradients()
    case.model.gradient_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(gradients(), plain, strict=True):
        close(a, b)


def test_a_recomputation_that_stops_early_keeps_no_input():
    """OPT's block ends with the last linear of the span: all that backward needs is there inside its tuner."""
    case = make("opt")
    pk.attach(case.model, pk.Union(Beside(), Onto()))
    perturb(case.model).train()
    for layer in case.model.model.decoder.layers:
        layer.dropout = 0.0  # whose mask would be what backward needs last
    case.model.gradient_checkpointing_enable({"use_reentrant": False})
    case.loss(case.model).backward()
    assert not taps._local.inputs


def test_a_span_of_globs_and_its_errors():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5))
    pk.attach(model, Beside(), ("0>2",))
    perturb(model)
    (site, tuner), *_ = tuners(model, "default")
    x = torch.randn(3, 4)
    inner = tuner.tuner
    pk.set_active(model, [])
    base = model(x)
    pk.set_active(model, ["default"])
    close(model(x), base + x @ inner.a.T)
    with pytest.raises(RuntimeError, match="entry of 2 was not computed"):
        model[2](torch.randn(3, 6))
    with pytest.raises(RuntimeError, match="no weight-space form"):
        pk.merge(model)
    with pytest.raises(ValueError, match="cannot tune"):
        pk.attach(make("bert").model, pk.LoRA(rank=2), ("ffn",))
    assert model(x).shape == checkpoint(model, x, use_reentrant=False).shape


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_the_residual_is_what_the_model_adds(family):
    """y + c r with c = 1 doubles the residual: the same as a model whose sublayer's input is added once more."""
    case = make(family, torch.float64)
    sites = [s for s in resolve(case.model, ("o", "down")) if s.residual is not None]
    assert len(sites) == len(resolve(case.model, ("o", "down")))
    pk.attach(case.model, Onto())
    plain = case.call(case.model)
    with torch.no_grad():
        for _, tuner in tuners(case.model, "default"):
            tuner.c.fill_(1.0)
    doubled = case.call(case.model)
    assert not torch.allclose(doubled, plain, atol=1e-6)
    seen = {}
    hand = make(family, torch.float64)
    for site in resolve(hand.model, ("o", "down")):
        site.residual.register_forward_pre_hook(
            lambda m, args, kwargs, n=site.name: seen.update({n: args[0] if args else kwargs["hidden_states"]}),
            with_kwargs=True,
        )
        site.module.register_forward_hook(lambda m, args, y, n=site.name: y + seen[n])
    close(doubled, hand.call(hand.model), torch.float64)
    with pytest.raises(ValueError, match="needs the residual"):
        pk.attach(make("mlp").model, Onto(), ("second",))


def test_a_gate_around_a_tuner_that_sees_the_residual():
    """Open, it is the gated tuner; what that sees is noted for the gate too."""
    outputs = []
    for method in (Onto(), pk.Gated(Onto())):
        case = make("bert", torch.float64)
        pk.attach(case.model, method)
        with torch.no_grad():
            for name, p in case.model.named_parameters():
                if p.requires_grad:
                    p.fill_({"c": 0.7, "w": 0.0, "b": 60.0}[name.rpartition(".")[2]])
        outputs.append(case.call(case.model))
    close(outputs[1], outputs[0], torch.float64)


def test_explain_runs_tuners_that_see_other_modules():
    case = make("gpt2")
    pk.attach(case.model, pk.Union(Beside(), Onto(), pk.at("down", pk.LoRA(rank=2))))
    assert {row["op"] for row in pk.explain(case.model)} == {"torch", "lora_add"}
    assert not taps._local.inputs


def test_the_residual_of_bert_by_its_own_code():
    """BertOutput adds its second argument r: where its linear gives 0, c = 1 makes it LN(2 r)."""
    case = make("bert", torch.float64)
    output = case.model.bert.encoder.layer[0].output
    pk.attach(case.model, Onto(), ("down",))
    with torch.no_grad():
        output.dense.weight.zero_()
        output.dense.bias.zero_()
        for _, tuner in tuners(case.model, "default"):
            tuner.c.fill_(1.0)
    seen = {}
    output.register_forward_hook(lambda m, args, y: seen.update(r=args[1], y=y))
    case.call(case.model)
    close(seen["y"], output.LayerNorm(2 * seen["r"]), torch.float64)


def test_widths_of_modules_and_spans():
    for family in ("bert", "gpt2", "llama", "t5", "opt"):
        for site in resolve(make(family).model, ("ffn", "attn", "block")):
            assert (site.n_in, site.n_out) == (16, 16), site
    norm = resolve(make("bert").model, ("norm",))[0]
    assert norm.kind == "norm"
