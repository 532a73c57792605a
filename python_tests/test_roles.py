"""The table of families: every role finds the modules it should, and nothing else."""

import pytest
import torch
from models import FAMILIES, make

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.roles import FAMILIES as TABLE
from peft_kernels.engine.roles import ROLES, layer_of, resolve

TRANSFORMERS = [f for f in FAMILIES if f != "mlp"]
PER_LAYER = ("q", "k", "v", "o", "up", "down")


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_every_role_of_a_family_is_a_role(family):
    assert set(TABLE[family]) <= set(ROLES)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_roles_find_every_linear_of_every_layer_once(family):
    """q k v o up gate down together are all linears of the blocks, and no module has two roles (rows aside)."""
    model = make(family).model
    sites = resolve(model, (*PER_LAYER, "gate") if family == "llama" else PER_LAYER)
    linears = {
        n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and layer_of(n) is not None
    }
    assert {s.name for s in sites} == linears
    assert len({(s.name, s.rows) for s in sites}) == len(sites)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_q_and_v_of_a_fused_linear_are_its_rows(family):
    model = make(family).model
    for site in resolve(model, ("q", "k", "v")):
        assert site.weight.shape == (site.n_out, site.n_in)
        if site.rows:
            whole = site.module.weight.T
            assert torch.equal(site.weight, whole[site.rows[0] : site.rows[1]])
            assert site.rows[1] - site.rows[0] == whole.shape[0] // 3


def test_cross_attention_is_a_qualifier():
    model = make("t5").model
    cross = {s.name for s in resolve(model, ("cross.q",))}
    assert cross == {f"decoder.block.{i}.layer.1.EncDecAttention.q" for i in (0, 1)}
    assert cross < {s.name for s in resolve(model, ("q",))}


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


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_star_leaves_the_head_out(family):
    model = make(family).model
    heads = {s.name for s in resolve(model, ("head",))}
    assert heads
    assert not heads & {s.name for s in resolve(model, ("*",))}


def test_rows_train_alone():
    """LoRA on the v rows of a fused matrix changes the v rows and no others."""
    case = make("gpt2")
    before = {n: p.clone() for n, p in case.model.named_parameters()}
    pk.attach(case.model, pk.LoRA(rank=2), ("v",), layers=0)
    with torch.no_grad():
        for _, tuner in tuners(case.model, "default"):
            for p in tuner.parameters():
                p.add_(0.1)
    pk.merge(case.model)
    changed = {n for n, p in case.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert changed == {"transformer.h.0.attn.c_attn.weight"}
    weight = case.model.transformer.h[0].attn.c_attn.weight
    assert torch.equal(weight[:, :32], before["transformer.h.0.attn.c_attn.weight"][:, :32])
    assert not torch.equal(weight[:, 32:], before["transformer.h.0.attn.c_attn.weight"][:, 32:])


def test_an_address_picks_one_site():
    model = make("gpt2").model
    (site,) = resolve(model, ["v@transformer.h.1.attn.c_attn"])
    assert (site.name, site.role, site.rows) == ("transformer.h.1.attn.c_attn", "v", (32, 48))
    for address in ("v@transformer.h.1.attn.c_attn", "@transformer.h.0.mlp", "head@lm_head", "model@"):
        (site,) = resolve(model, [address])
        assert site.matches((address,))
    assert [s.rows for s in resolve(model, ["k", "v"], layers=[0], exclude=["k@transformer.h.0.attn.c_attn"])] == [
        (32, 48)
    ]
    for wrong in ("@attn.c_attn", "o@transformer.h.0.attn.c_attn"):
        with pytest.raises(ValueError, match="matches nothing"):
            resolve(model, [wrong])


def test_a_glob_gives_every_module_its_own_role():
    roles = {s.name.rpartition(".")[2]: s.role for s in resolve(make("bert").model, ["attention.self.*"])}
    assert (roles["query"], roles["key"], roles["value"], roles["dropout"]) == ("q", "k", "v", "")
