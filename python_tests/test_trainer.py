"""transformers' Trainer with pk.hf.Callback: adapter-only checkpoints, bit-equal resumes, and the hooks of methods."""

import copy
import os

import pytest
import torch
from models import MLP, make
from toys import Toy, toys  # noqa: F401  # a fixture
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import peft_kernels as pk
from peft_kernels.engine.attach import tuners

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def rows(n=6, seed=3):
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (n, 7), generator=made)
    return [{"input_ids": ids[i], "labels": int(ids[i, 0]) % 3} for i in range(n)]


def adapted(method=None, **kwargs):
    kwargs = {"train": ("head",), **kwargs}
    return pk.attach(make("bert").model, method or pk.LoRA(rank=2, dropout=0.25), **kwargs)


def trainer(model, out, callbacks=(), teacher=None, **kwargs):
    options = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-2,
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(output_dir=str(out), **{**options, **kwargs})
    return Trainer(
        model=model,
        args=args,
        train_dataset=rows(),
        eval_dataset=rows(4, seed=4),
        callbacks=[pk.hf.Callback(teacher), *callbacks],
    )


def values(model, name="default"):
    return {f"{path}.{k}": v.clone() for path, t in tuners(model, name) for k, v in t.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


class Stop(TrainerCallback):
    """Ends the training after a step, as a lost machine would: without an end."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_checkpoints_hold_the_adapter_alone(tmp_path):
    model = adapted()
    before = {k: v.clone() for k, v in model.state_dict().items() if "peft" not in k}
    trainer(model, tmp_path).train()
    files = set(os.listdir(tmp_path / "checkpoint-6"))
    assert files >= ADAPTER | {"optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors"}
    assert "config.json" not in files
    size = pk.counts(model).bytes
    assert os.path.getsize(tmp_path / "checkpoint-6" / "model.safetensors") < size + 4096
    assert_equal(values(pk.load(make("bert").model, tmp_path / "checkpoint-6")), values(model))
    assert_equal({k: v for k, v in model.state_dict().items() if "peft" not in k}, before)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (pk.LoRA(rank=2, dropout=0.25), {}),
        (pk.LoRA(rank=2), {"gradient_accumulation_steps": 2, "save_steps": 1}),
        (Toy(penalty=0.1, term=0.1), {}),
        (pk.FullTuning(), {}),
        (pk.LoRA(rank=2), {"teacher": pk.Distillation(make("bert").model)}),
    ],
    ids=["lora", "accumulated", "toy", "full", "taught"],
)
def test_a_resume_ends_bit_equal(method, options, tmp_path, caplog):
    head = {"train": ()} if isinstance(method, pk.FullTuning) else {}
    whole = adapted(method, **head)
    trainer(whole, tmp_path / "whole", **options).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(adapted(method, **head), tmp_path / "broken", [Stop(2)], **options).train()
    resumed = adapted(method, **head)
    trainer(resumed, tmp_path / "broken", **options).train(resume_from_checkpoint=True)
    assert_equal(values(resumed), values(whole))
    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text


@pytest.mark.parametrize("split", [1, 3], ids=["whole", "accumulated"])
def test_a_teacher_is_a_part_of_the_loss(split, tmp_path):
    wise = make("bert").model.train()
    with torch.no_grad():
        wise.classifier.weight.add_(torch.randn(wise.classifier.weight.shape))

    def loss(teacher):
        model = adapted(pk.LoRA(rank=2))
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout):
                m.p = 0.0
        options = {"per_device_train_batch_size": 6 // split, "gradient_accumulation_steps": split, "max_steps": 1}
        run = trainer(model, tmp_path, teacher=teacher, logging_strategy="steps", logging_steps=1, **options)
        run.train()
        assert run.evaluate()["eval_loss"] == pytest.approx(model(**_batch(4, seed=4)).loss.item(), abs=1e-5)
        return run.state.log_history[0]["loss"]

    teacher, fresh = pk.Distillation(wise, 3.0, 0.75), make("bert").model
    term = teacher.term(fresh, _batch(), fresh(**_batch())).item()
    assert not wise.training and term > 0.01
    assert loss(teacher) == pytest.approx(0.75 * term + 0.25 * loss(None), abs=1e-4)


def _batch(n=6, seed=3):
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows(n, seed)]) for key in rows()[0]}


def test_a_teacher_of_weight_1_reads_no_labels_and_one_of_0_is_none(tmp_path):
    wise = make("bert").model
    with torch.no_grad():
        wise.classifier.weight.add_(1)
    found = []
    for name, weight, shift in (("plain", 0, 0), ("one", 1, 0), ("other", 1, 1)):
        run = trainer(adapted(), tmp_path / name, teacher=pk.Distillation(wise, weight=weight))
        run.train_dataset = [{**row, "labels": (row["labels"] + shift) % 3} for row in rows()]
        run.train()
        found.append(values(run.model))
    without = trainer(adapted(), tmp_path / "without")
    without.train()
    assert_equal(values(without.model), found[0])
    assert_equal(found[1], found[2])


def test_an_adapter_of_the_model_teaches(tmp_path):
    model = adapted()
    pk.attach(model, pk.LoRA(rank=1), train=("head",), name="wise")
    pk.set_active(model, "default")
    kept = values(model, "wise")
    trainer(model, tmp_path, teacher=pk.Distillation("wise")).train()
    assert pk.active(model) == ["default"]
    assert_equal(values(model, "wise"), kept)
    with pytest.raises(ValueError, match=r"expected pk.Distillation"):
        pk.hf.Callback("wise")


def test_a_mask_is_chosen_once_and_resumed_from_the_checkpoint(tmp_path):
    def masked(calibrate=True):
        model = adapted(pk.FishMask(keep_ratio=0.3))
        return pk.calibrate(model, [_batch()], progress=False) if calibrate else model

    with pytest.raises(RuntimeError, match="FishMask has no mask yet"):
        trainer(masked(calibrate=False), tmp_path / "none").train()
    whole, resumed = masked(), masked(calibrate=False)
    trainer(whole, tmp_path / "whole").train()
    with pytest.raises(KeyboardInterrupt):
        trainer(masked(), tmp_path / "broken", [Stop(2)]).train()
    trainer(resumed, tmp_path / "broken").train(resume_from_checkpoint=True)
    assert_equal(values(resumed), values(whole))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = adapted()
    run = trainer(
        model,
        tmp_path,
        [EarlyStoppingCallback(1)],
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.5,
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None
    assert_equal(values(model), values(pk.load(make("bert").model, best)))


def test_save_model_writes_the_adapter_until_the_model_is_plain_again(tmp_path):
    model = adapted()
    run = trainer(model, tmp_path / "run", save_strategy="no", max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "a"))
    assert_equal(values(pk.load(make("bert").model, tmp_path / "a")), values(model))
    other = copy.deepcopy(model)
    other.classifier.peft.tuners["default"].copy.bias.data.fill_(7.0)
    other.save_pretrained(tmp_path / "b")
    assert_equal(values(pk.load(make("bert").model, tmp_path / "b")), values(other))
    pk.merge(model, stash=False)
    pk.detach(model)
    model.save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert_equal(merged.state_dict(), model.state_dict())


def test_loading_anything_else_still_says_what_is_missing():
    model = adapted()
    trainer(model, "unused", save_strategy="no")
    assert "bert.pooler.dense.weight" in model.load_state_dict({}, strict=False).missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


def test_model_init_makes_a_new_model_for_every_training(tmp_path):
    args = trainer(adapted(), tmp_path, max_steps=2).args
    run = Trainer(model_init=lambda: adapted(), args=args, train_dataset=rows(), callbacks=[pk.hf.Callback()])
    run.train()
    first = values(run.model)
    run.train()
    assert_equal(values(run.model), first)
    assert set(os.listdir(tmp_path / "checkpoint-2")) >= ADAPTER


# -- the hooks of methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_terms_of_the_loss_are_those_of_a_loop_by_hand(family, accumulate, tmp_path):
    """With plain SGD, no dropout and a batch left over at the end of the epoch.

    GPT-2's loss is divided by the items of the whole step, BERT's here by the number of batches.
    """
    method = Toy(penalty=0.05, term=0.1)

    def model():
        model = pk.attach(make(family).model, method, ("q",))
        model.accepts_loss_kwargs = family == "gpt2"
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    ours, by_hand = model(), model()
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no"}
    run = trainer(ours, tmp_path, gradient_accumulation_steps=accumulate, num_train_epochs=1, **options)
    batches = list(run.get_train_dataloader())
    if family == "gpt2":
        batches = [{"input_ids": batch["input_ids"], "labels": batch["input_ids"]} for batch in batches]
    run.get_train_dataloader = lambda: batches
    run.train()

    params = [p for p in by_hand.parameters() if p.requires_grad]
    by_hand.train()
    steps = [batches[i : i + accumulate] for i in range(0, 3, accumulate)]
    for step, group in enumerate(steps, 1):
        loss = 0
        for batch in group:
            outputs = by_hand(**batch)
            loss = loss + (outputs.loss + method.loss(by_hand, batch, outputs) + pk.penalty(by_hand)) / len(group)
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= 1e-2 * g
        for module in by_hand.modules():
            if isinstance(module, Toy.tuner):
                module.step(step / len(steps))
    start = values(model())
    for key, value in values(by_hand).items():
        torch.testing.assert_close(values(ours)[key], value, msg=key)
    assert any(not torch.equal(start[key], value) for key, value in values(ours).items() if "shift" in key)
    assert not ours._forward_hooks


def test_evaluation_is_the_task_loss(tmp_path):
    model = adapted(Toy(penalty=100.0))
    losses = []
    run = trainer(model, tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, save_strategy="no")
    run.log = lambda logs, *args: losses.append(logs)
    run.train()
    model.eval()
    batch = {
        "input_ids": torch.stack([r["input_ids"] for r in rows(4, seed=4)]),
        "labels": torch.tensor([r["labels"] for r in rows(4, seed=4)]),
    }
    assert losses[0]["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert losses[-1]["train_loss"] > 100


def test_what_does_not_fit_trainer_is_refused(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"phases \(prime, train\).*pk.fit"):
        trainer(adapted(Toy(prime=0.5)), tmp_path).train()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="learning rates of its own.*pk.fit"):
        patch.setattr(Toy.tuner, "rates", {"shift": 0.5})
        trainer(adapted(Toy()), tmp_path).train()
    with pytest.raises(RuntimeError, match="returned no loss to add a term to"):
        trainer(adapted(Toy(penalty=1.0)), tmp_path, label_smoothing_factor=0.1).train()
    with pytest.raises(ValueError, match="has no adapter"):
        trainer(make("bert").model, tmp_path)
    with pytest.raises(ValueError, match="expected a transformers model"):
        trainer(pk.attach(MLP(), pk.LoRA(rank=2), ("first",)), tmp_path)
    model = adapted()
    pk.merge(model)
    with pytest.raises(RuntimeError, match="is merged"):
        trainer(model, tmp_path).train()


def test_a_phase_that_changes_what_is_trained_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Toy.tuner, "enter", lambda self, phase: self.late.requires_grad_(False))
    with pytest.raises(RuntimeError, match="after Trainer has made its optimizer"):
        trainer(adapted(Toy()), tmp_path).train()


def test_hf_has_nothing_else():
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        pk.hf.Trainer  # noqa: B018
