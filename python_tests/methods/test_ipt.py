"""IPT: the autoencoder of prompts, what it leaves, and the vector that is trained in its place."""

import shutil

import pytest
import torch
from models import close, make, perturb
from prompts import decoder, prompt, rows, write
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, linear, mse_loss

import peft_kernels as pk
from peft_kernels.engine.attach import attach, is_attached, tuners
from peft_kernels.methods.ipt import _Autoencoder

TINY = {"length": 3, "k": 4, "inner": 5}


def tuner(model):
    return next(t for _, t in tuners(model, "default") if isinstance(t, pk.IPT.tuner))


def batches(n=3, seed=0):
    made = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(3, 50, (2, 7), generator=made), "labels": torch.randint(3, (2,), generator=made)}
        for _ in range(n)
    ]


def encoded(out, n=2, model=None, **training):
    tasks = {prompt(i): batches(3 - i, seed=i) for i in range(n)}
    model = make("bert").model if model is None else model
    return pk.IPT.autoencode(model, tasks, out, k=4, inner=5, **{"progress": False, **training})


# -- the paper's sizes ------------------------------------------------------------------------------------------------


def test_the_sizes_of_the_paper(tmp_path):
    """BART-base, l = 100, k = 250: an autoencoder of 78,452,218 numbers, its decoder of 59,251,968."""
    from transformers import BartConfig, BartForConditionalGeneration

    with torch.device("meta"):
        model = BartForConditionalGeneration(
            BartConfig(d_model=768, encoder_layers=1, decoder_layers=1, vocab_size=50, encoder_ffn_dim=8)
        )
    attach(model, _Autoencoder())
    assert pk.counts(model).trainable == 78_452_218
    pk.detach(model)
    pk.attach(model, pk.IPT())
    assert (pk.counts(model).trainable, pk.counts(model).stored) == (250, 250)
    assert sum(b.numel() for b in tuner(model).buffers()) == 59_251_968


# -- stage 2 ----------------------------------------------------------------------------------------------------------


def test_the_prompt_is_decoded_from_the_vector():
    model = pk.attach(make("bert").model, pk.IPT(**TINY, decoder=decoder()))
    own = tuner(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"bert.peft.default.z"}
    assert own.z.shape == (4,)
    assert 0 < own.z.abs().max() < 0.1
    truth = linear(torch.tanh(linear(own.z, own.w0, own.b0)), own.w1, own.b1).reshape(3, 16)
    close(own.prompt(), truth)


def test_the_vector_is_drawn_from_a_narrow_normal():
    z = tuner(pk.attach(make("bert").model, pk.IPT(length=1, k=4000, inner=2))).z
    assert abs(z.mean()) < 0.002
    assert abs(z.std() - 0.02) < 0.002


def test_a_saved_adapter_holds_its_decoder(tmp_path):
    """And says so in what is stored, though a vector is all that is trained."""
    place = tmp_path / "decoder"
    shutil.copytree(decoder(), place)
    case = make("bert")
    pk.attach(case.model, pk.IPT(**TINY, decoder=str(place)))
    perturb(case.model)
    expected, counts = case.call(case.model), pk.counts(case.model)
    numbers = 4 * 5 + 5 + 5 * 48 + 48
    assert (counts.trainable, counts.stored) == (4, 4 + numbers)
    where = pk.save(case.model, tmp_path / "adapter")
    shutil.rmtree(place)
    again = make("bert")
    pk.load(again.model, where, trainable=True)
    assert torch.equal(again.call(again.model), expected)
    assert pk.counts(again.model) == counts
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        pk.attach(make("bert").model, pk.IPT(**TINY, decoder=str(place)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_random_decoder_follows_from_the_seed(dtype, tmp_path):
    """Nothing but the vector is saved, and a model of another dtype draws the same decoder."""
    case = make("bert")
    pk.attach(case.model, pk.IPT(**TINY), seed=7)
    assert pk.counts(case.model).stored == 4
    where = pk.save(case.model, tmp_path / "adapter")
    again = pk.load(make("bert", dtype).model, where)
    close(tuner(again).prompt(), tuner(case.model).prompt().to(dtype))
    other = pk.attach(make("bert").model, pk.IPT(**TINY), seed=8)
    assert not torch.allclose(tuner(other).w1, tuner(case.model).w1)


def test_training_moves_the_vector_alone():
    model = pk.attach(make("bert").model, pk.IPT(**TINY, decoder=decoder()))
    own = tuner(model)
    before = {name: t.clone() for name, t in own.state_dict().items()}
    log = pk.fit(model, batches(1) * 40, lr=0.3, progress=False)
    assert log[-1]["loss"] < log[0]["loss"]
    changed = {name for name, t in own.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"z"}


def test_a_decoder_for_something_else_is_refused(tmp_path):
    model = make("bert").model
    with pytest.raises(ValueError, match="is for length = 3, k = 4, inner = 5, width = 16; IPT here has length = 2"):
        pk.attach(model, pk.IPT(length=2, k=4, inner=5, decoder=decoder()))
    with pytest.raises(ValueError, match="holds no decoder; give a directory that pk.IPT.autoencode wrote"):
        pk.attach(model, pk.IPT(**TINY, decoder=prompt(0)))
    with pytest.raises(ValueError, match="at least 1 of each"):
        pk.IPT(k=0)
    assert not is_attached(model)


# -- stage 1 ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_task_and_of_the_reconstruction(tmp_path):
    """Of the task whose turn it is, through its reconstructed prompt."""
    log = encoded(tmp_path / "decoder", lr=1e-12)
    model = pk.attach(make("bert").model, _Autoencoder(**TINY, sources=(prompt(0), prompt(1))))
    first, second = batches(3, seed=0), batches(2, seed=1)
    turns = [(0, first[0]), (1, second[0]), (0, first[1]), (1, second[1]), (0, first[2])]
    found = [row["loss"] for row in log if "step" in row]
    assert len(found) == len(turns)
    (auto,) = [t for _, t in tuners(model, "default")]
    for value, (task, batch) in zip(found, turns, strict=True):
        auto.task = task
        flat = rows(task).flatten()
        z = linear(flat, auto.w, auto.b)
        p = linear(torch.tanh(linear(z, auto.w0, auto.b0)), auto.w1, auto.b1)
        close(auto.prompt().flatten(), p)
        ce = cross_entropy(model(input_ids=batch["input_ids"]).logits, batch["labels"])
        assert value == pytest.approx((ce + 200 * mse_loss(p, flat)).item(), rel=1e-4)


def test_the_autoencoder_learns_to_reconstruct(tmp_path):
    log = encoded(tmp_path / "decoder", epochs=60, lr=1e-2)
    steps = [row["loss"] for row in log if "step" in row]
    assert sum(steps[-5:]) < 0.2 * sum(steps[:5])


def test_the_model_is_left_as_it_was(tmp_path):
    model = make("bert").model
    keys = list(model.state_dict())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    encoded(tmp_path / "decoder", model=model)
    assert not is_attached(model)
    assert keys == list(model.state_dict())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_it_resumes_to_the_same_bits(tmp_path):
    """An interrupted first stage goes on where it was, as pk.fit does."""
    whole = encoded(tmp_path / "whole", epochs=4)

    class Stop(Exception):
        pass

    def stop(epoch, model):
        if epoch == 3:
            raise Stop
        return {}

    checkpoint = {"checkpoint": tmp_path / "progress", "epochs": 4}
    with pytest.raises(Stop):
        encoded(tmp_path / "resumed", **checkpoint, on_epoch=stop)
    assert not (tmp_path / "resumed").exists()
    log = encoded(tmp_path / "resumed", **checkpoint, resume=True)
    assert [row["loss"] for row in log] == [row["loss"] for row in whole]
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert first.keys() == second.keys() == {"w0", "b0", "w1", "b1"}
    assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_what_autoencode_refuses(tmp_path):
    model, out = make("bert").model, tmp_path / "decoder"
    with pytest.raises(ValueError, match="tasks is empty"):
        pk.IPT.autoencode(model, {}, out)
    other = write(tmp_path / "other", rows(0, length=2))
    with pytest.raises(ValueError, match=r"prompts differ in shape: .*\(3, 16\).*\(2, 16\)"):
        pk.IPT.autoencode(model, {prompt(0): batches(), other: batches()}, out)
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        pk.IPT.autoencode(model, {tmp_path / "nowhere": batches()}, out)
    encoded(out)
    with pytest.raises(FileExistsError, match="force=True"):
        encoded(out)
    encoded(out, force=True)
    pk.attach(model, pk.LoRA())
    with pytest.raises(ValueError, match="a model without adapters"):
        encoded(tmp_path / "more", model=model)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_both_stages_in_other_families(family, tmp_path):
    case = make(family)
    sources = [write(tmp_path / str(i), rows(i), family=family) for i in range(2)]
    ids = case.inputs.get("decoder_input_ids", case.inputs["input_ids"])
    batch = {**case.inputs, "labels": ids}
    pk.IPT.autoencode(
        case.model, {s: [batch] for s in sources}, tmp_path / "decoder", k=4, inner=5, epochs=2, progress=False
    )
    pk.attach(case.model, pk.IPT(**TINY, decoder=str(tmp_path / "decoder")))
    perturb(case.model)
    case.loss(case.model).backward()
    assert tuner(case.model).z.grad.any()
