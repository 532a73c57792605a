"""Sites beyond the linear layer: convolutions, embeddings, spans, and what a site knows of its sublayer."""

import copy

import pytest
import torch
from models import METHODS, Case, assert_same, attached, close, make, perturb, snapshot
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners


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
