"""The training loop: what it learns, what methods may ask of it, and that a break leaves no trace."""

import itertools
import json
import os
import random
import signal

import pytest
import torch
from models import MLP, attached, make
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toys import Toy, toys  # noqa: F401  # a fixture

import peft_kernels as pk
from peft_kernels.engine import store
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.fit import param_groups

cross_entropy = nn.functional.cross_entropy


def data(rows=20):
    made = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 12, generator=made)
    return x, (x[:, 0] > 0).long()


def values(model, name="default"):
    return {f"{path}.{k}": v.clone() for path, t in tuners(model, name) for k, v in t.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


# -- the loop ---------------------------------------------------------------------------------------------------------


def test_fit_learns_and_logs():
    case = make("mlp")
    x, target = data(64)
    pk.attach(case.model, pk.LoRA(rank=4), ("first", "second"), train=("out",))
    batches = [(x[i : i + 16], target[i : i + 16]) for i in range(0, 64, 16)]
    log = pk.fit(
        case.model,
        batches,
        epochs=15,
        lr=2e-2,
        loss_fn=cross_entropy,
        progress=False,
        on_epoch=lambda epoch, model: {"accuracy": (model(x).argmax(-1) == target).float().mean().item()},
    )
    steps, epochs = [r for r in log if "step" in r], [r for r in log if "step" not in r]
    assert [r["step"] for r in steps] == list(range(1, 61))
    assert len(epochs) == 15
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
    assert epochs[-1]["accuracy"] > 0.95
    assert {"epoch", "loss", "lr", "seconds"} <= steps[0].keys()


def test_fit_is_repeatable_and_says_what_is_wrong():
    def run():
        case = attached("lora", "bert", train=("head",))
        labels = torch.tensor([0, 2])
        pk.fit(case.model, [{**case.inputs, "labels": labels}], epochs=3, progress=False)
        return values(case.model)

    assert_equal(run(), run())
    case = attached("lora", "bert")
    for batches, message in (([], "at least one batch"), ([case.inputs], "returned no loss"), ([3], "expected a dict")):
        with pytest.raises(ValueError, match=message):
            pk.fit(case.model, batches, progress=False)


def test_fit_takes_what_users_have():
    x, y = torch.randn(8, 12), torch.zeros(8, dtype=torch.long)
    case = make("mlp")
    pk.attach(case.model, pk.Head(), ("out",))
    with pytest.raises(ValueError, match="an iterator"):
        pk.fit(case.model, ((x, y) for _ in range(2)), loss_fn=cross_entropy, progress=False)
    log = pk.fit(case.model, [(x, y)], loss_fn=cross_entropy, progress=False, lr=0.5, warmup=0)
    assert log[0]["lr"] == 0.5


def test_the_schedule_rises_and_falls():
    case = make("mlp")
    pk.attach(case.model, pk.Head(), ("out",))
    log = pk.fit(case.model, [data()] * 5, loss_fn=cross_entropy, progress=False, lr=1.0, warmup=0.4)
    assert [row["lr"] for row in log[:5]] == pytest.approx([0.5, 1, 1, 2 / 3, 1 / 3])


def test_accumulated_batches_are_the_mean_of_their_losses():
    """Against a loop by hand; the last step of an epoch takes what is left."""
    x, y = data()
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 20, 4)]

    def model():
        case = make("mlp")
        return pk.attach(case.model, pk.LoRA(rank=2), ("first",))

    ours, by_hand = model(), model()
    log = pk.fit(ours, batches, epochs=2, lr=1e-2, warmup=0, accumulate=2, loss_fn=cross_entropy, progress=False)
    assert [r["step"] for r in log if "step" in r] == [1, 2, 3, 4, 5, 6]

    params = [p for p in by_hand.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, weight_decay=0.0)
    for step in range(6):
        group = batches[2 * (step % 3) :][:2]
        optimizer.zero_grad()
        sum(cross_entropy(by_hand(inputs), target) / len(group) for inputs, target in group).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.param_groups[0]["lr"] = 1e-2 * min(step + 1, (6 - step) / 5)
        optimizer.step()
    for key, value in values(ours).items():
        torch.testing.assert_close(value, values(by_hand)[key])


def test_bf16_is_the_precision_of_the_forward_alone():
    seen = []
    case = make("mlp")
    pk.attach(case.model, pk.LoRA(rank=2), ("first", "second"))
    case.model.first.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    log = pk.fit(case.model, [data()] * 3, epochs=8, lr=5e-2, precision="bf16", loss_fn=cross_entropy, progress=False)
    assert set(seen) == {torch.bfloat16}
    assert {v.dtype for v in values(case.model).values()} == {torch.float32}
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize(
    ("device", "precision"), [("cpu", "bf16"), pytest.param("cuda", "fp16", marks=pytest.mark.gpu)]
)
def test_a_precision_survives_a_resume(device, precision, tmp_path):
    """With dropout on the device's own generator, and for fp16 the scale of the loss."""

    def run(**options):
        model = pk.attach(make("mlp").model.to(device), pk.LoRA(rank=2, dropout=0.5), ("first",))
        options = {"loss_fn": cross_entropy, "progress": False, **options}
        pk.fit(model, [data()] * 3, epochs=3, precision=precision, **options)
        return values(model)

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=tmp_path / "c", on_epoch=Interrupt().epoch_of(2))
    assert_equal(run(checkpoint=tmp_path / "c", resume=True), run())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate = 0"),
        ({"patience": 0}, "patience = 0"),
        ({"patience": 1}, "give an on_epoch"),
        ({"patience": 1, "on_epoch": lambda epoch, model: {"accuracy": 1}}, "on_epoch returned epoch, loss, accuracy"),
        ({"precision": "fp8"}, "expected None, 'bf16' or 'fp16'"),
        ({"precision": "fp16"}, "needs CUDA"),
        ({"resume": True}, "need checkpoint="),
        ({"checkpoint_every": 2}, "need checkpoint="),
    ],
)
def test_bad_options(options, message):
    case = make("mlp")
    pk.attach(case.model, pk.LoRA(rank=2), ("first",))
    with pytest.raises(ValueError, match=message):
        pk.fit(case.model, [data()], loss_fn=cross_entropy, progress=False, **options)


def test_only_what_is_active_and_trainable_is_trained(tmp_path):
    case = make("mlp")
    pk.save(pk.attach(case.model, pk.LoRA(rank=2), ("first",)), tmp_path)
    model = pk.load(make("mlp").model, tmp_path, "frozen")
    for names in (["frozen"], []):
        pk.set_active(model, names)
        with pytest.raises(ValueError, match="nothing is trainable"):
            pk.fit(model, [data()], loss_fn=cross_entropy, progress=False)
    pk.attach(model, pk.LoRA(rank=2), ("first",), name="new", train=("out",))
    pk.set_active(model, ["frozen", "new"])
    before = values(model, "frozen")
    pk.fit(model, [data()], loss_fn=cross_entropy, progress=False, checkpoint=tmp_path / "c")
    assert_equal(values(model, "frozen"), before)
    pk.load(make("mlp").model, tmp_path / "c" / "new")  # the checkpoint holds what was trained


class Pair(pk.Tuner):
    """Two tuners in one, as compositions make them."""

    def __init__(self, first, second):
        nn.Module.__init__(self)
        self.members = nn.ModuleList([first, second])


def test_param_groups_of_nested_tuners():
    case = make("mlp")
    pk.attach(case.model, pk.LoRA(rank=2), ("first",), train=("out",))
    adapters = case.model.first.peft.tuners
    lora, head = adapters["default"], case.model.out.peft.tuners["default"]
    adapters["default"] = Pair(lora, head)
    groups = param_groups(case.model, lr=0.5)
    assert {g["lr"]: {id(p) for p in g["params"]} for g in groups} == {
        0.5: {id(lora.a), id(lora.b)},
        pk.Head.lr: {id(p) for p in head.parameters()},
    }
    lora.a.requires_grad_(False)
    assert sum(p.numel() for g in param_groups(case.model) for p in g["params"]) == lora.b.numel() + 39


# -- what methods ask for ---------------------------------------------------------------------------------------------


def toy_model(toy=None, **kwargs):
    return pk.attach(make("mlp").model, toy or Toy(**kwargs), ("first", "second"))


@pytest.mark.parametrize("own", [{"train_lr": 0.25}, {"prime_lr": 0.25}], ids=str)
def test_phases_begin_when_they_should_with_their_own_schedule(own):
    model = toy_model(prime=0.5, **own)
    log = pk.fit(model, [data()] * 8, lr=1.0, warmup=0, loss_fn=cross_entropy, progress=False)
    phases = [{"phase": "prime", "step": 1, "trainable": 32}, {"phase": "train", "step": 5, "trainable": 64}]
    assert [r for r in log if "phase" in r] == phases
    falling, prime, train = (1, 1, 2 / 3, 1 / 3), own.get("prime_lr", 1), own.get("train_lr", 1)
    expected = [f * prime for f in falling] + [f * train for f in falling]
    assert [r["lr"] for r in log if "lr" in r] == pytest.approx(expected)
    for _, tuner in tuners(model, "default"):
        assert tuner.entered == ["prime", "train"]
        assert tuner.mask.sum() == len(tuner.mask) // 2
        assert tuner.late.abs().sum() > 0
    single = pk.fit(toy_model(), [data()], loss_fn=cross_entropy, progress=False)
    assert not any("phase" in r for r in single)


def test_phases_add_up():
    model = toy_model(prime=2.0)
    with pytest.raises(ValueError, match=r"toy \(prime 2, train -1\) do not add up to 1 steps"):
        pk.fit(model, [data()], loss_fn=cross_entropy, progress=False)


def test_phases_without_steps_are_entered_too(monkeypatch):
    phases = [pk.Phase("before", 0), pk.Phase("train", 2), pk.Phase("after", 0)]
    monkeypatch.setattr(Toy, "phases", lambda self, total: phases)
    model = toy_model()
    log = pk.fit(model, [data()] * 2, loss_fn=cross_entropy, progress=False)
    assert next(tuners(model, "default"))[1].entered == ["before", "train", "after"]
    assert [(r["phase"], r["step"]) for r in log if "phase" in r] == [("before", 1), ("train", 1), ("after", 3)]


def test_step_hears_of_the_progress():
    model = toy_model()
    heard = []
    for _, tuner in tuners(model, "default"):
        tuner.register_forward_hook(lambda m, i, o: heard.append(m.progress.item()))
    pk.fit(model, [data()] * 4, loss_fn=cross_entropy, progress=False)
    assert heard == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert next(tuners(model, "default"))[1].progress == 1


def gradients(model, monkeypatch):
    """The gradients of the first step of fit, before they are clipped."""
    seen = []
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda params, clip: seen.append([p.grad.clone() for p in params]))
    pk.fit(model, [data()], loss_fn=cross_entropy, progress=False)
    return seen[0]


@pytest.mark.parametrize("options", [{"penalty": 0.3}, {"term": 0.3}, {"penalty": 0.2, "term": 0.1}], ids=str)
def test_penalty_and_loss_enter_the_gradient(options, monkeypatch):
    model, (x, y) = toy_model(**options), data()
    params = param_groups(model)[0]["params"]
    out = model(x)
    loss = cross_entropy(out, y) + options.get("term", 0) * (model(x) - out.detach() + 1).square().mean()
    shifts = [t.shift for _, t in tuners(model, "default")]
    loss = loss + options.get("penalty", 0) * sum(s.square().sum() for s in shifts)
    expected = torch.autograd.grad(loss, params)
    torch.testing.assert_close(gradients(model, monkeypatch), list(expected))


def test_penalty_sums_over_active_tuners():
    case = make("gpt2")  # q, k and v are parts of one linear: tuners inside a tuner
    pk.attach(case.model, Toy(penalty=0.5), ("q", "v"), name="one")
    pk.attach(case.model, Toy(penalty=1.0), ("q",), name="two")
    pk.attach(case.model, pk.LoRA(rank=2), ("q",), name="three")
    for names, expected in ((["one"], 0.5 * 64), (["one", "two"], 0.5 * 64 + 32), (["three"], 0), ([], 0)):
        pk.set_active(case.model, names)
        penalty = pk.penalty(case.model)
        assert penalty.shape == ()
        assert penalty.item() == expected


# -- early stopping ---------------------------------------------------------------------------------------------------


class Scores:
    """An on_epoch that reports given losses and remembers the weights it saw."""

    def __init__(self, *scores):
        self.scores, self.seen = scores, []

    def __call__(self, epoch, model):
        assert not model.training
        self.seen.append(values(model))
        return {"validation_loss": self.scores[epoch - 1]}


@pytest.mark.parametrize(
    ("scores", "epochs", "best"),
    [((3, 2, 2.5, 2, 1), 4, 2), ((3, 2, 1), 3, 3), ((3, float("nan"), 4), 3, 1), ((1, 2, 0.5, 3), 4, 3)],
)
def test_early_stopping_ends_with_the_best_weights(scores, epochs, best):
    model = make("mlp").model
    pk.attach(model, pk.LoRA(rank=2), ("first",))
    on_epoch = Scores(*scores)
    log = pk.fit(
        model, [data()], epochs=len(scores), patience=2, loss_fn=cross_entropy, on_epoch=on_epoch, progress=False
    )
    assert len(on_epoch.seen) == epochs == log[-1]["epoch"]
    assert_equal(values(model), on_epoch.seen[best - 1])


def test_early_stopping_restores_the_buffers_of_the_base():
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    pk.attach(model, pk.LoRA(rank=2), ("0",))
    seen = []

    def on_epoch(epoch, model):
        seen.append(model[1].running_mean.clone())
        return {"validation_loss": [1, 0, 2][epoch - 1]}

    pk.fit(model, [data()], epochs=3, patience=5, loss_fn=cross_entropy, on_epoch=on_epoch, progress=False)
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(model[1].running_mean, seen[1])


def test_only_the_last_phase_can_stop_early():
    model = toy_model(prime=0.5)
    on_epoch = Scores(1, 2, 3, 5, 4, 6)
    pk.fit(model, [data()], epochs=6, patience=2, loss_fn=cross_entropy, on_epoch=on_epoch, progress=False)
    assert len(on_epoch.seen) == 6
    assert_equal(values(model), on_epoch.seen[4])


# -- checkpoints ------------------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """The MLP with dropout and BatchNorm before it: a forward that draws and a base that moves."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.drop, self.body = nn.BatchNorm1d(12), nn.Dropout(0.3), MLP()

    def forward(self, x):
        return self.body(self.drop(self.norm(x)))


class Interrupt:
    """A loss that ends with Ctrl-C the n-th time it is asked for, after it drew from both generators."""

    def __init__(self, n=None):
        self.n, self.calls, self.epochs = n, 0, []

    def __call__(self, out, target):
        self.calls += 1
        noise = random.random() + torch.rand(())
        if self.calls == self.n:
            raise KeyboardInterrupt
        return cross_entropy(out, target) * (1 + noise)

    def on_epoch(self, epoch, model):
        self.epochs.append(epoch)
        torch.rand(3)
        return {"validation_loss": [3.0, 1.0, 2.0][epoch - 1]}

    def epoch_of(self, n):
        def on_epoch(epoch, model):
            if epoch == n:
                raise KeyboardInterrupt
            return {}

        return on_epoch


METHODS = {
    "lora": pk.LoRA(rank=2, dropout=0.25),
    "phases": Toy(penalty=0.01, term=0.01, prime=0.45),  # begins the second in the middle of the second epoch
    "diffpruning": pk.DiffPruning(keep_ratio=0.2, alpha=0.5, finetune=0.55),
    "far": pk.FAR(ratio=0.2, prime=0.45),
    "ltsft": pk.LTSFT(keep_ratio=0.1, prime=0.45, l1=0.1),
    "movement": pk.MovementPruning(keep_ratio=0.2, mode="soft", threshold=0.4),
}
OPTIONS = {"epochs": 3, "accumulate": 2, "patience": 3, "weight_decay": 0.1, "lr": 1e-2}  # 3 steps of 5 batches


def run(method, loss_fn, **options):
    model = pk.attach(Dropping(), METHODS[method], ("body.first", "body.second"))
    torch.manual_seed(77)  # a resume must not depend on what was drawn before
    random.seed(torch.initial_seed())
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    log = pk.fit(model, loader, loss_fn=loss_fn, on_epoch=loss_fn.on_epoch, progress=False, **{**OPTIONS, **options})
    return model, [{k: v for k, v in row.items() if k != "seconds"} for row in log]


@pytest.fixture(scope="module")
def whole_runs():
    return {}


@pytest.mark.parametrize("n", range(1, 16))
@pytest.mark.parametrize("method", METHODS)
def test_a_break_leaves_no_trace(method, n, tmp_path, whole_runs):
    """Interrupted in any batch, within an accumulation too, and resumed: weights, buffers and log are bit-equal."""
    if method not in whole_runs:
        whole_runs[method] = run(method, Interrupt())
    whole, log = whole_runs[method]
    first, second = Interrupt(n), Interrupt()
    with pytest.raises(KeyboardInterrupt):
        run(method, first, checkpoint=tmp_path / "c", checkpoint_every=n % 2 or None)
    taken = [
        r["step"]
        for r in json.loads((tmp_path / "c" / "training.json").read_text())["log"]
        if "loss" in r and "step" in r
    ]
    assert len(taken) == (n - 1) // 5 * 3 + (n - 1) % 5 // 2
    assert "adapter_model.safetensors" in os.listdir(tmp_path / "c")
    random.seed(5)
    resumed, again = run(method, second, checkpoint=tmp_path / "c", resume=True)
    assert again == log
    assert_equal(resumed.state_dict(), whole.state_dict())
    assert first.epochs + second.epochs == [1, 2, 3]
    assert second.calls == 15 - (n - 1) // 5 * 5 - (n - 1) % 5 // 2 * 2


def test_a_break_in_the_evaluation_repeats_it_alone(tmp_path, whole_runs):
    whole, log = whole_runs.get("lora") or run("lora", Interrupt())
    first, second = Interrupt(), Interrupt()
    with pytest.raises(KeyboardInterrupt):
        stopping = Interrupt()
        stopping.on_epoch = lambda epoch, model: first.epoch_of(2)(epoch, model) or first.on_epoch(epoch, model)
        run("lora", stopping, checkpoint=tmp_path / "c")
    resumed, again = run("lora", second, checkpoint=tmp_path / "c", resume=True)
    assert again == log
    assert (second.calls, second.epochs) == (5, [2, 3])
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_a_finished_training_resumes_to_its_end(tmp_path):
    whole, log = run("phases", Interrupt(), checkpoint=tmp_path / "c")
    nothing = Interrupt()
    resumed, again = run("phases", nothing, checkpoint=tmp_path / "c", resume=True)
    assert (nothing.calls, nothing.epochs) == (0, [])
    assert again == log
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_ctrl_c_waits_for_the_end_of_a_step(tmp_path, monkeypatch):
    """A real signal between the optimizer's step and the schedule: the checkpoint has both."""
    model = toy_model()
    target = next(tuners(model, "default"))[1]

    def step(progress):
        if progress == 0.5:
            os.kill(os.getpid(), signal.SIGINT)
        target.progress.fill_(progress)

    monkeypatch.setattr(type(target), "step", lambda self, progress: step(progress))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            pk.fit(model, [data()] * 4, loss_fn=cross_entropy, progress=False, checkpoint=tmp_path / "c")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    record = json.loads((tmp_path / "c" / "training.json").read_text())
    assert record["position"]["step"] == 2 == record["log"][-1]["step"]
    assert_equal(values(pk.load(make("mlp").model, tmp_path / "c")), values(model))


def test_the_checkpoint_of_an_interrupt_is_an_adapter(tmp_path):
    case = attached("lora", "bert", train=("head",))
    batch = {**case.inputs, "labels": torch.tensor([0, 2])}
    with pytest.raises(KeyboardInterrupt):
        pk.fit(
            case.model,
            [batch] * 4,
            epochs=2,
            progress=False,
            checkpoint=tmp_path / "c",
            on_epoch=Interrupt().epoch_of(2),
        )
    assert sorted(os.listdir(tmp_path / "c")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
        "training.safetensors",
    ]
    assert_equal(values(pk.load(make("bert").model, tmp_path / "c")), values(case.model))


@pytest.mark.parametrize("renames", [1, 2, 3, 4])
def test_a_process_that_dies_while_writing_can_resume(tmp_path, renames, monkeypatch, whole_runs):
    """Whatever file was the last to take its place, the checkpoint is the one before or the new one."""
    whole, log = whole_runs.get("lora") or run("lora", Interrupt())
    with pytest.raises(KeyboardInterrupt):
        run("lora", Interrupt(8), checkpoint=tmp_path / "c")

    class Died(Exception):
        pass

    replace, left = os.replace, itertools.count(1)

    def dying(source, target):
        if next(left) == renames:
            raise Died
        replace(source, target)

    monkeypatch.setattr(store.os, "replace", dying)
    with pytest.raises(Died):
        run("lora", Interrupt(), checkpoint=tmp_path / "c", resume=True)
    monkeypatch.setattr(store.os, "replace", replace)
    assert not [f for f in os.listdir(tmp_path / "c") if f.startswith(".")]
    pk.load(Dropping(), tmp_path / "c")
    resumed, again = run("lora", Interrupt(), checkpoint=tmp_path / "c", resume=True)
    assert again == log
    assert_equal(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("epochs", {"epochs": 4}),
        ("lr", {"lr": 0.5}),
        ("seed", {"seed": 1}),
        ("accumulate", {"accumulate": 1}),
        ("precision", {"precision": "bf16"}),
        ("warmup", {"warmup": 0.2}),
        ("patience", {"patience": 9}),
        ("clip", {"clip": 0.5}),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, field, options):
    run("lora", Interrupt(), checkpoint=tmp_path / "c")
    with pytest.raises(ValueError, match=f"was written with {field}=") as error:
        run("lora", Interrupt(), checkpoint=tmp_path / "c", resume=True, **options)
    assert "\n" not in str(error.value)


def test_other_methods_and_batches_are_refused(tmp_path):
    def go(method, n, **options):
        model = pk.attach(make("mlp").model, method, ("first",))
        pk.fit(model, [data()] * n, loss_fn=cross_entropy, progress=False, checkpoint=tmp_path / "c", **options)

    go(pk.LoRA(rank=2), 2)
    with pytest.raises(FileExistsError, match="resume=True"):
        go(pk.LoRA(rank=2), 2)
    with pytest.raises(ValueError, match="with batches=2"):
        go(pk.LoRA(rank=2), 3, resume=True)
    with pytest.raises(ValueError, match="with method="):
        go(pk.LoRA(rank=3), 2, resume=True)


def test_checkpoint_directories_that_hold_something_else(tmp_path):
    model = pk.attach(make("mlp").model, pk.LoRA(rank=2), ("first",))
    options = {"loss_fn": cross_entropy, "progress": False, "resume": True}
    pk.save(model, tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="an adapter but no checkpoint"):
        pk.fit(model, [data()], checkpoint=tmp_path / "adapter", **options)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a model"):
        pk.fit(model, [data()], checkpoint=tmp_path, **options)
    pk.fit(model, [data()], checkpoint=tmp_path / "c", **options)  # nothing there yet: from the start
    (tmp_path / "c" / "training.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ValueError, match="truncated or not a safetensors"):
        pk.fit(model, [data()], checkpoint=tmp_path / "c", **options)
    with pytest.raises(ValueError, match="let on_epoch return numbers"):
        pk.fit(
            model, [data()], checkpoint=tmp_path / "d", on_epoch=lambda epoch, model: {"out": torch.ones(1)}, **options
        )


def test_batches_that_end_early_are_an_error():
    class Short(list):
        def __iter__(self):
            return itertools.islice(super().__iter__(), 1)

    model = pk.attach(make("mlp").model, pk.LoRA(rank=2), ("first",))
    with pytest.raises(ValueError, match=r"len\(batches\) is 2"):
        pk.fit(model, Short([data()] * 2), loss_fn=cross_entropy, progress=False)
