"""The table of families: every role finds the modules it should, and nothing else."""

import sys
from collections import OrderedDict

import pytest
import torch
from models import KINDS, assert_same, close, make, perturb, snapshot
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.families import FAMILIES as TABLE
from peft_kernels.engine.roles import ROLES, family, layer_of, resolve
from peft_kernels.engine.site import Rows, Site
from peft_kernels.engine.stack import _assemble

LINEARS = ("q", "k", "v", "o", "up", "gate", "down")
CROSS = {role for role in ROLES if role.startswith("cross.")}
FUSED = [kind for kind in KINDS if kind.split()[0] in ("gpt2", "gpt_neox", "falcon", "bloom", "phi3")]

every_kind = pytest.mark.parametrize("kind", KINDS)
fused = pytest.mark.parametrize("kind", FUSED)


def roles_of(model):
    """The roles this very model has: those of its family, less what its config leaves out."""
    config = model.config
    roles = set(family(model).roles)
    if not (config.is_encoder_decoder or getattr(config, "add_cross_attention", False)):
        roles -= CROSS
    return roles if getattr(config, "is_gated_act", True) else roles - {"gate"}


def linears_of(model):
    return tuple(role for role in LINEARS if role in roles_of(model))


# -- the table --------------------------------------------------------------------------------------------------------


def test_every_row_is_complete():
    for row in TABLE.values():
        roles = set(row.roles)
        assert roles - CROSS - {"gate"} == set(ROLES) - CROSS - {"gate", "model", "stack", "backbone"}
        assert roles & CROSS in (set(), CROSS)
        assert set(row.norms) == {"attn", "ffn"} | ({"cross.attn"} & roles)


def test_every_model_type_exists_and_is_tested():
    from transformers import CONFIG_MAPPING

    assert set(TABLE) <= set(CONFIG_MAPPING)
    assert set(TABLE) == {make(kind).model.config.model_type for kind in KINDS}


# -- what the roles find ----------------------------------------------------------------------------------------------


@every_kind
def test_every_role_finds_modules_that_run(kind):
    case = make(kind)
    called = set()
    for path, module in case.model.named_modules():
        module.register_forward_hook(lambda *_, path=path: called.add(path))
    case.call(case.model)
    for role in family(case.model).roles:
        if role not in roles_of(case.model):
            with pytest.raises(ValueError, match="matches nothing"):
                resolve(case.model, (role,))
            continue
        sites = resolve(case.model, (role,))
        assert {site.name for site in sites} <= called
        assert {site.role for site in sites} == {role}
        if role not in ("norm", "embed", "head"):
            assert {layer_of(site.name) for site in sites} == {0, 1}


@every_kind
def test_a_stack_is_what_holds_the_blocks(kind):
    model = make(kind).model
    blocks, stacks = resolve(model, ("block",)), resolve(model, ("stack",))
    assert {s.name for s in stacks} == {b.name.rpartition(".")[0].rpartition(".")[0] for b in blocks}
    assert {s.role for s in stacks} == {"stack"}
    assert len(stacks) == (2 if model.config.is_encoder_decoder else 1)
    for part in ("encoder", "decoder") if len(stacks) == 2 else ():
        (one,) = resolve(model, ("stack",), exclude=(f"*{part}",))
        assert not one.name.endswith(part)


@every_kind
def test_the_bare_model_has_the_same_roles(kind):
    model = make(kind).model
    inside = set(model.base_model.modules())
    for role in roles_of(model) - {"head"}:
        bare = resolve(model.base_model, (role,))
        assert [s.module for s in bare] == [s.module for s in resolve(model, (role,)) if s.module in inside]


@every_kind
def test_roles_find_every_linear_of_every_layer_once(kind):
    """q k v o up gate down together are all output rows of all linears of the blocks, each once."""
    model = make(kind).model
    found = {}
    for site in resolve(model, linears_of(model)):
        assert site.kind == "linear"
        numbers = torch.arange(Site(site.name, site.module).n_out)
        numbers = numbers if site.rows is None else site.rows.of(numbers)
        assert site.weight.shape == (len(numbers), site.n_in) == (site.n_out, site.n_in)
        found.setdefault(site.name, []).append(numbers)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or hasattr(m, "nf")}
    assert set(found) == {n for n in linears if layer_of(n) is not None}
    for name, numbers in found.items():
        numbers = torch.cat(numbers).sort()[0]
        assert torch.equal(numbers, torch.arange(Site(name, model.get_submodule(name)).n_out))


@every_kind
def test_the_other_roles_are_what_they_are_called(kind):
    model = make(kind).model
    norms = {n for n, m in model.named_modules() if type(m).__name__.endswith(("LayerNorm", "RMSNorm"))}
    assert {site.name for site in resolve(model, ("norm",))} == norms
    assert all(isinstance(site.module, (nn.Embedding, nn.Conv2d)) for site in resolve(model, ("embed",)))
    for site in resolve(model, ("head",)):
        assert layer_of(site.name) is None
        assert any(isinstance(m, nn.Linear) for m in site.module.modules())
    attention = resolve(model, ("attn",))
    for role in ("q", "k", "v", "o"):
        for site, module in zip(resolve(model, (role,)), attention, strict=True):
            assert site.name.startswith(f"{module.name}.")
    ups, downs = resolve(model, ("up",)), resolve(model, ("down",))
    for ffn, up, down in zip(resolve(model, ("ffn",)), ups, downs, strict=True):
        if ffn.entry is None:
            assert {up.module, down.module} < set(ffn.module.modules())
        else:
            assert (ffn.entry, ffn.module) == (up.module, down.module)
    for block in resolve(model, ("block",)):
        assert {s.name for s in (*attention, *ups) if s.name.startswith(f"{block.name}.")}


@every_kind
def test_the_layernorm_of_a_sublayer(kind):
    """A norm that comes first makes the sublayer's input; one that comes last gets input plus output."""
    case = make(kind)
    seen = {}
    for module in case.model.modules():
        module.register_forward_hook(lambda m, args, out: seen.update({m: (args, out)}))
    case.call(case.model)
    for first, last, others in (("q", "o", ("k", "v", "attn")), ("up", "down", ("gate", "ffn"))):
        sites = resolve(case.model, (first,))
        for role in {last, *others} & roles_of(case.model):
            assert [site.norm for site in resolve(case.model, (role,))] == [site.norm for site in sites]
        for enter, leave in zip(sites, resolve(case.model, (last,)), strict=True):
            (x,), (before,) = seen[enter.module][0], seen[enter.norm][0]
            after, y = seen[enter.norm][1], seen[leave.module][1]
            assert enter.prenorm is leave.prenorm
            assert isinstance(enter.prenorm, bool)
            expected, found = (after, x) if enter.prenorm else (x + y, before)
            close(found.reshape(expected.shape), expected)
    if sites[0].prenorm and "post_feedforward" not in str(case.model):  # Gemma 2 and 3 normalise the output once more
        serial = resolve(case.model, ("o",))[-1].module
        block, up, down = (resolve(case.model, (role,))[-1] for role in ("block", "up", "down"))
        out = seen[block.module][1]
        out = out if isinstance(out, torch.Tensor) else out[0]
        residual = seen[up.norm][0][0]
        residual, y = residual.reshape(out.shape), seen[down.module][1].reshape(out.shape)
        parallel = residual + y + seen[serial][1].reshape(out.shape)
        assert torch.allclose(out, residual + y, atol=1e-5) or torch.allclose(out, parallel, atol=1e-5)


def test_the_layernorm_where_there_is_none():
    assert all(site.norm is site.prenorm is None for site in resolve(make("mlp").model, ("first", "ln")))
    model = make("bert").model
    assert all(site.norm is site.prenorm is None for site in resolve(model, ("embed", "head", "norm", "block")))
    layer = model.bert.encoder.layer[0]
    (site,) = resolve(model, ("layer.0.*.query",))
    assert (site.role, site.norm, site.prenorm) == ("q", layer.attention.output.LayerNorm, False)
    model = make("gpt2").model
    assert resolve(model, ("c_attn",))[0].norm is model.transformer.h[0].ln_1
    model = make("bloom").model
    model.config.apply_residual_connection_post_layernorm = True
    (site,) = resolve(model, ("q",), layers=[0])
    assert (site.norm, site.prenorm) == (model.transformer.h[0].input_layernorm, None)


# -- rows of fused linears --------------------------------------------------------------------------------------------


def own_split(model, monkeypatch):
    """A list that gets q, k, v [batch, tokens, rows] of each layer, as the model's own code splits the fused output."""
    code, taken = sys.modules[type(model).__module__], []

    def take(*heads):  # each [batch, tokens, heads, head size]
        taken.append([part.detach() for part in heads])

    if hasattr(code, "eager_attention_forward"):
        attend = code.eager_attention_forward

        def attention(module, *heads, **kwargs):
            take(*(part.transpose(1, 2) for part in heads[:3]))
            return attend(module, *heads, **kwargs)

        monkeypatch.setattr(code, "eager_attention_forward", attention)
        monkeypatch.setattr(code, "apply_rotary_pos_emb", lambda q, k, *_: (q, k), raising=False)
        model.config._attn_implementation = "eager"
        return taken
    cls = type(resolve(model, ("attn",))[0].module)
    name = "_split_heads" if hasattr(cls, "_split_heads") else "_reshape"
    method = getattr(cls, name)

    def split(self, y):
        heads = method(self, y)
        take(*(heads if name == "_split_heads" else (part.transpose(1, 2) for part in heads)))
        return heads

    monkeypatch.setattr(cls, name, split)
    return taken


def heads_as_rows(part, n):
    """Falcon repeats keys and values for every query head of their group: each is taken once."""
    return part[:, :, :: part.shape[2] * part.shape[3] // n].flatten(2)


@fused
def test_rows_are_those_the_model_splits_off(kind, monkeypatch):
    case = make(kind)
    taken, seen = own_split(case.model, monkeypatch), {}
    for module in case.model.modules():
        module.register_forward_hook(lambda m, args, out: seen.update({m: (args, out)}))
    case.call(case.model)
    for i, role in enumerate("qkv"):
        for layer, site in zip(taken, resolve(case.model, (role,)), strict=True):
            (x,), y = seen[site.module]
            own = heads_as_rows(layer[i], site.n_out)
            assert torch.equal(site.rows.of(y, dim=-1), own)
            close(site.apply(site.weight, site.bias, x), own)


@fused
def test_a_tuner_on_rows_changes_those_rows_alone(kind, monkeypatch):
    case = make(kind)
    taken = own_split(case.model, monkeypatch)
    case.call(case.model)
    for i, role in enumerate("qkv"):
        pk.attach(case.model, pk.LoRA(rank=2), (role,), layers=0)
        perturb(case.model)
        size = next(t for _, t in tuners(case.model, "default"))._modules[role].b.shape[0]
        adapted = case.call(case.model)
        pk.merge(case.model)
        close(case.call(case.model), adapted)
        for run in (taken[2], taken[4]):
            for j in range(3):
                assert torch.equal(run[j], taken[0][j]) == (j != i)
            changed = heads_as_rows(run[i] != taken[0][i], size)
            assert changed.all()  # of every head
        pk.detach(case.model)
        del taken[2:]


def test_gate_and_up_of_one_linear():
    case = make("phi3")
    seen = {}
    for module in case.model.modules():
        module.register_forward_hook(lambda m, args, out: seen.update({m: (args, out)}))
    case.call(case.model)
    gates, ups, downs = (resolve(case.model, (role,)) for role in ("gate", "up", "down"))
    for gate, up, down, ffn in zip(gates, ups, downs, resolve(case.model, ("ffn",)), strict=True):
        (activated,), act = seen[ffn.module.activation_fn]
        y = seen[up.module][1]
        assert torch.equal(gate.rows.of(y, dim=-1), activated)
        assert torch.equal(up.rows.of(y, dim=-1) * act, seen[down.module][0][0])


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_rows_and_assemble_are_inverse(groups, dim):
    whole = torch.randn(12, 12)
    bounds = [(0, 1), (1, 3)] if groups == 3 else [(0, 4), (4, 9)]  # the last ones stay
    parts = [(rows, rows.of(whole, dim)) for rows in (Rows(*b, groups) for b in bounds)]
    assert torch.equal(_assemble(whole, parts[::-1], dim), whole)
    changed = _assemble(whole, [(rows, part + 1) for rows, part in parts], dim)
    for rows, part in parts:
        assert torch.equal(rows.of(changed, dim), part + 1)
    assert int((changed != whole).sum()) == sum(part.numel() for _, part in parts)
    if groups == 1:
        assert all(part._is_view() for _, part in parts)


# -- spans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "opt", "whisper"])
def test_a_span_is_a_role_or_two_globs(kind):
    model = make(kind).model
    glob = {"bert": "*.intermediate.dense>*.output.dense"}.get(kind, "*.fc1>*.fc2")
    sites = resolve(model, ("ffn",))
    by_glob = resolve(model, (glob,))
    assert [(s.entry, s.module, s.role) for s in by_glob] == [(s.entry, s.module, "ffn") for s in sites]
    assert [s.entry for s in sites] == [s.module for s in resolve(model, ("up",))]
    assert len(resolve(model, ("ffn", "down", glob))) == 2 * len(sites)  # the exit by itself is another site
    assert [s.entry is None for s in resolve(model, ("down", "ffn"))] == [True, False] * len(sites)
    assert len(resolve(model, ("ffn", "down"), exclude=("ffn",))) == len(sites)
    assert {layer_of(s.name) for s in resolve(model, ("ffn",), layers=[1])} == {1}


def test_a_span_of_a_plain_module():
    model = make("mlp").model
    (site,) = resolve(model, ("first>second",))
    assert (site.entry, site.module, site.role) == (model.first, model.second, "")
    with pytest.raises(ValueError, match="second has no exit after it in its layer"):
        resolve(model, ("second>first",))
    with pytest.raises(ValueError, match="first has no exit"):
        resolve(model, ("*>second",))
    with pytest.raises(ValueError, match="matches nothing"):
        resolve(model, ("third>second",))
    with pytest.raises(ValueError, match="layers.1.fc2 has no exit"):
        resolve(make("opt").model, ("layers.1.fc2>fc1",))


# -- targets ----------------------------------------------------------------------------------------------------------


def test_cross_attention_is_a_qualifier():
    model = make("t5").model
    cross = {s.name for s in resolve(model, ("cross.q",))}
    assert cross == {f"decoder.block.{i}.layer.1.EncDecAttention.q" for i in (0, 1)}
    assert cross < {s.name for s in resolve(model, ("q",))}


def test_excluding_a_role_that_a_model_does_not_have():
    """It leaves out nothing, so that a method may exclude cross-attention everywhere."""
    for kind, target, n in (("bert", "o", 2), ("t5", "o", 4), ("bert cross", "o", 2), ("mlp", "*t", 2)):
        assert len(resolve(make(kind).model, (target,), exclude=("cross.o",))) == n, kind
    named = nn.Sequential(OrderedDict(up=nn.Linear(2, 2), down=nn.Linear(2, 2)))
    assert [s.name for s in resolve(named, ("*",), exclude=("down", "norm"))] == ["up"]


def test_layers_exclude_and_globs():
    model = make("bert").model
    names = [s.name for s in resolve(model, ("q", "v"), layers=[-1])]
    assert names == [f"bert.encoder.layer.1.attention.self.{n}" for n in ("query", "value")]
    assert [s.name for s in resolve(model, ("query", "v"), exclude=("v", "layer.0.*"))] == [
        "bert.encoder.layer.1.attention.self.query"
    ]
    assert {s.name for s in resolve(model, ("*.dense",))} >= {
        "bert.encoder.layer.0.intermediate.dense",
        "bert.pooler.dense",
    }


@every_kind
def test_star_leaves_the_head_out(kind):
    model = make(kind).model
    heads = {s.name for s in resolve(model, ("head",))}
    assert heads
    assert not {s.name for s in resolve(model, ("*",))} & heads


@every_kind
def test_lora_lives_on_every_model(kind):
    case = make(kind)
    base, before = case.call(case.model), snapshot(case.model)
    pk.attach(case.model, pk.LoRA(rank=2), ("q", "v", "up", "down"))
    perturb(case.model)
    adapted = case.call(case.model)
    assert not torch.allclose(adapted, base, atol=1e-4)
    pk.merge(case.model)
    close(case.call(case.model), adapted)
    pk.unmerge(case.model)
    assert_same(case.model, before)
    assert torch.equal(case.call(case.model), adapted)
    pk.detach(case.model)
    assert_same(case.model, before)
    assert torch.equal(case.call(case.model), base)


def test_an_address_picks_one_site():
    model = make("gpt2").model
    (site,) = resolve(model, ["v@transformer.h.1.attn.c_attn"])
    assert (site.name, site.role, site.rows) == ("transformer.h.1.attn.c_attn", "v", (32, 48, 1))
    for address in ("v@transformer.h.1.attn.c_attn", "@transformer.h.0.mlp", "head@lm_head", "model@"):
        (site,) = resolve(model, [address])
        assert site.matches((address,))
    assert [s.rows for s in resolve(model, ["k", "v"], layers=[0], exclude=["k@transformer.h.0.attn.c_attn"])] == [
        (32, 48, 1)
    ]
    for wrong in ("@attn.c_attn", "o@transformer.h.0.attn.c_attn"):
        with pytest.raises(ValueError, match="matches nothing"):
            resolve(model, [wrong])


def test_a_glob_gives_every_module_its_own_role():
    roles = {s.name.rpartition(".")[2]: s.role for s in resolve(make("bert").model, ["attention.self.*"])}
    assert (roles["query"], roles["key"], roles["value"], roles["dropout"]) == ("q", "k", "v", "")
