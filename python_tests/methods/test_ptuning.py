"""P-tuning: the prompt encoder of Hugging Face PEFT, and the rows that are left of it."""

import json

import pytest
import torch
from models import close, make, perturb
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

both = pytest.mark.parametrize("encoder", ["lstm", "mlp"])


def attached(family="bert", **fields):
    case = make(family)
    pk.attach(case.model, pk.PTuning(**{"length": 5, "hidden": 6, **fields}))
    return case


def tuner(model, name="default"):
    return next(t for _, t in tuners(model, name) if isinstance(t, pk.PTuning.tuner))


def theirs(**fields):
    """PEFT's prompt encoder of the tiny models."""
    peft = pytest.importorskip("peft")
    config = peft.PromptEncoderConfig(
        task_type="SEQ_CLS", num_virtual_tokens=5, token_dim=16, num_transformer_submodules=1, **fields
    )
    return peft.PromptEncoder(config)


@pytest.mark.parametrize(
    ("ours", "fields"),
    [
        ({}, {"encoder_num_layers": 2}),
        ({"layers": 1}, {"encoder_num_layers": 1}),
        ({"layers": 3, "hidden": 7}, {"encoder_num_layers": 3, "encoder_hidden_size": 7}),
        ({"encoder": "mlp"}, {}),
    ],
)
def test_the_prompt_is_that_of_peft(ours, fields):
    """With the same weights, by the same names, and so are its gradients."""
    kind = "MLP" if "encoder" in ours else "LSTM"
    encoder = theirs(**{"encoder_reparameterization_type": kind, "encoder_hidden_size": 6, **fields})
    own = tuner(attached(**ours).model)
    assert {k: t.shape for k, t in own.state_dict().items()} == {k: t.shape for k, t in encoder.state_dict().items()}
    own.load_state_dict(encoder.state_dict())
    p, truth = own.prompt(), encoder(torch.arange(5)[None])[0]
    close(p, truth)
    weight = torch.randn(5, 16)
    (p * weight).sum().backward()
    (truth * weight).sum().backward()
    for (name, a), b in zip(own.named_parameters(), encoder.parameters(), strict=True):
        close(a.grad, b.grad)
        assert a.grad.any(), name


@both
def test_the_model_computes_what_it_does_under_peft(encoder):
    """Padding included; PEFT runs the whole classifier on the longer sequence, ours its backbone alone."""
    peft = pytest.importorskip("peft")
    config = peft.PromptEncoderConfig(
        task_type="FEATURE_EXTRACTION",
        num_virtual_tokens=5,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=6,
    )
    wrapped = peft.get_peft_model(make("bert").model.bert, config).eval()
    model = pk.attach(make("bert").model.bert, pk.PTuning(length=5, hidden=6, encoder=encoder))
    tuner(model).load_state_dict(wrapped.prompt_encoder["default"].state_dict())
    ids, mask = torch.randint(3, 50, (2, 7)), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    ours = model(input_ids=ids, attention_mask=mask).last_hidden_state
    truth = wrapped(input_ids=ids, attention_mask=mask).last_hidden_state[:, 5:]
    close(ours[0], truth[0])
    close(ours[1, :4], truth[1, :4])


@both
def test_a_new_encoder_is_drawn_as_torch_draws_its_modules(encoder):
    own = tuner(attached(encoder=encoder, hidden=200).model)
    encoder = theirs(encoder_reparameterization_type=encoder.upper(), encoder_hidden_size=200)
    for (name, ours), truth in zip(own.named_parameters(), encoder.parameters(), strict=True):
        if ours.numel() > 300:
            assert 0.8 < ours.std() / truth.std() < 1.25, name
        if name != "embedding.weight":
            assert ours.abs().max() <= 1.05 * truth.abs().max() or ours.numel() < 300, name


@both
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_eject_leaves_the_rows_and_every_bit_of_the_output(encoder, family, tmp_path):
    case = attached(family, encoder=encoder)
    perturb(case.model)
    before, counts = case.call(case.model), pk.counts(case.model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(case.call(case.model), before)
    assert pk.eject(case.model) is case.model
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(case.call(case.model), before)
    ejected = pk.counts(case.model)
    assert ejected.trainable == ejected.stored == 5 * 16 < counts.stored
    case.loss(case.model).backward()
    assert tuner(case.model).rows.grad.any()
    where = pk.save(case.model, tmp_path / "adapter")
    again = make(family)
    pk.load(again.model, where, trainable=True)
    assert torch.equal(again.call(again.model), before)
    assert pk.counts(again.model) == ejected
    frozen = make(family)
    pk.load(frozen.model, where)
    assert pk.counts(frozen.model).trainable == 0
    assert torch.equal(frozen.call(frozen.model), before)


def test_the_file_of_an_ejected_adapter_says_so(tmp_path):
    """Of one inside a union too, where a prefix has a network of its own."""
    case = attached()
    pk.save(pk.eject(case.model), tmp_path / "alone")
    (part,) = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())["parts"]
    assert part["method"]["encoder"] == "none"
    case = make("bert")
    parts = (pk.LoRA(rank=2), pk.PTuning(length=5, hidden=6), pk.PrefixTuning(length=3, hidden=4))
    pk.attach(case.model, pk.Union(*parts))
    perturb(case.model)
    expected = case.call(case.model)
    pk.save(pk.eject(case.model), tmp_path / "union")
    (part,) = json.loads((tmp_path / "union" / "adapter_config.json").read_text())["parts"]
    _, prompt, prefix = (own["method"] for own in part["method"]["members"])
    assert prompt["encoder"] == "none" and prefix["hidden"] == 0
    again = pk.load(make("bert").model, tmp_path / "union")
    assert torch.equal(case.call(again), expected)
    assert pk.counts(again).stored == pk.counts(case.model).stored


def test_eject_takes_the_named_adapter_alone():
    case = attached(dropout=0.5)
    pk.attach(case.model, pk.LoRA(), name="lora")
    pk.attach(case.model, pk.PTuning(length=2, hidden=3), name="other")
    case.model.train()
    pk.eject(case.model, "other")
    assert tuner(case.model).mlp_head is not None
    assert [name for name, _ in tuner(case.model, "other").named_parameters()] == ["rows"]
    assert tuner(case.model, "other").training


def test_eject_of_a_frozen_adapter_leaves_it_frozen(tmp_path):
    case = attached()
    pk.save(case.model, tmp_path / "adapter")
    model = pk.load(make("bert").model, tmp_path / "adapter")
    pk.eject(model)
    assert pk.counts(model).trainable == 0


def test_dropout_is_drawn_in_training_alone():
    own = tuner(attached(dropout=0.5).model)
    assert torch.equal(own.prompt(), own.prompt())
    own.train()
    assert not torch.allclose(own.prompt(), own.prompt())


def test_width_of_the_encoder():
    """By default both directions together are as wide as an embedding: the authors' encoder."""
    lstm = tuner(attached(hidden=0).model)
    assert lstm.lstm_head.hidden == 8
    assert [m.weight.shape for m in lstm.mlp_head if isinstance(m, nn.Linear)] == [(16, 16), (16, 16)]
    mlp = tuner(attached(hidden=0, encoder="mlp").model)
    assert [m.weight.shape for m in mlp.mlp_head if isinstance(m, nn.Linear)] == [(16, 16)] * 3


@both
def test_it_learns(encoder):
    case = attached(encoder=encoder)
    batch = {**case.inputs, "labels": torch.tensor([0, 2])}
    steps = pk.fit(case.model, [batch] * 30, lr=1e-2, progress=False)[:-1]
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": "gru"}, "expected 'lstm', 'mlp' or 'none'"),
        ({"length": 0}, "length = 0"),
        ({"dropout": 1.0}, "a probability below 1"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        pk.PTuning(**fields)
