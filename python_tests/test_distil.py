"""Distillation: its losses, and teachers in a training."""

import copy
import math
import shutil

import pytest
import torch
from models import make
from safetensors.torch import load_file, save_file
from texts import WORDS, gpt2, interrupted, refused, run, same, save_tokenizer, stop_at, t5, toy, tune, write
from toys import Toy, signs, toys  # noqa: F401  # a fixture

import peft_kernels as pk
from peft_kernels import cli, report, sweep, train
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.distil import digest
from peft_kernels.engine.losses import counted, distillation, symmetric_kl
from peft_kernels.settings import method_from

cross_entropy = torch.nn.functional.cross_entropy
FLAT, TILTED = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])

# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, expected", [(1.0, 0.130812), (2.0, 0.145363)])
def test_distillation_value(temperature, expected):
    assert distillation(FLAT, TILTED, temperature).item() == pytest.approx(expected, abs=1e-6)


def test_symmetric_value():
    assert symmetric_kl(FLAT, TILTED).item() == pytest.approx(0.1373265, abs=1e-6)
    assert torch.equal(symmetric_kl(TILTED, FLAT), symmetric_kl(FLAT, TILTED))
    p = torch.tensor([0.25, 0.75])
    assert symmetric_kl(FLAT, TILTED).item() == pytest.approx(((0.5 - p) * (0.5 / p).log()).sum().item() / 2, abs=1e-6)


@pytest.mark.parametrize("loss", [lambda s, t, m=None: distillation(s, t, 3.0, m), symmetric_kl])
def test_rows_and_masks(loss):
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    rows = torch.stack([loss(a, b) for a, b in zip(s.flatten(0, 1), t.flatten(0, 1), strict=True)]).view(2, 3)
    torch.testing.assert_close(loss(s, t), rows.mean())
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    torch.testing.assert_close(loss(s, t, mask), rows[mask.bool()].mean())
    s[0, 1], t[1, 0] = math.nan, math.inf  # of rows that do not count
    s.requires_grad_()
    found = loss(s, t, mask)
    found.backward()
    torch.testing.assert_close(found, rows[mask.bool()].mean())
    assert s.grad.isfinite().all() and not s.grad[~mask.bool()].any()


@pytest.mark.parametrize("loss", [distillation, symmetric_kl])
def test_no_rows_are_no_loss(loss):
    s = torch.randn(2, 3, requires_grad=True)
    found = loss(s, torch.randn(2, 3), mask=torch.zeros(2, dtype=torch.bool))
    found.backward()
    assert found.item() == 0 and not s.grad.any()


def test_gradients():
    torch.manual_seed(0)
    s, t = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    distillation(s, t, 2.0).backward()
    torch.testing.assert_close(s.grad, 2 * ((s / 2).softmax(-1) - (t / 2).softmax(-1)).detach() / 4)
    assert t.grad is None
    s.grad = None
    symmetric_kl(s, t).backward()
    apart = (s.softmax(-1) - t.softmax(-1)).detach() / 8
    torch.testing.assert_close(s.grad, apart)
    torch.testing.assert_close(t.grad, -apart)


@pytest.mark.parametrize("loss", [lambda s, t: distillation(s, t, 3.0), symmetric_kl])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computed_in_fp32(loss, dtype):
    torch.manual_seed(0)
    s, t = torch.randn(64, 100, dtype=dtype), torch.randn(64, 100, dtype=dtype)
    assert loss(s, t).dtype == torch.float32
    torch.testing.assert_close(loss(s, t), loss(s.float(), t.float()), rtol=1e-6, atol=0)


def test_classes_ruled_out_count_nothing():
    """Logits of -inf, as generation masks give them, in both."""
    s = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    found = distillation(s, torch.tensor([[0.0, math.log(3), -math.inf]]), 1.0)
    found.backward()
    assert found.item() == pytest.approx(0.130812, abs=1e-6) and s.grad.isfinite().all()


def test_losses_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"logits \(1, 2\) and \(1, 3\); expected the same shape"):
        distillation(FLAT, torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"mask \(2,\) for logits \(1, 2\); expected \(1,\)"):
        symmetric_kl(FLAT, TILTED, torch.ones(2))
    with pytest.raises(ValueError, match="temperature = 0"):
        distillation(FLAT, TILTED, 0.0)


# -- which rows count -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart", "bert", "tokens"])
def test_the_rows_that_count_are_those_of_the_models_own_loss(name):
    model = tagger() if name == "tokens" else make(name).model
    ids, labels = torch.randint(3, 50, (3, 4)), torch.tensor([[-100, 1, 2, -100], [-100, -100, 0, 2], [1, 1, 1, 1]])
    batch = {"input_ids": ids, "labels": labels[:, 1] if name == "bert" else labels}
    outputs = model(**batch)
    outputs.logits.retain_grad()
    outputs.loss.backward()
    assert torch.equal(counted(model, batch, outputs.logits), outputs.logits.grad.any(-1))


def tagger():
    from transformers import BertConfig, BertForTokenClassification

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return BertForTokenClassification(BertConfig(vocab_size=50, **sizes, num_labels=3)).eval()


def test_rows_without_labels_count_by_the_attention_mask():
    padded = {"attention_mask": torch.tensor([[1, 1, 1, 0]]), "input_ids": torch.ones(1, 4)}
    assert counted(make("gpt2").model, padded, torch.zeros(1, 4, 9)).tolist() == [[True, True, True, False]]
    bert = make("bert").model
    assert counted(bert, padded, torch.zeros(1, 3)) is None
    assert counted(bert, {"labels": torch.randn(1, 3)}, torch.zeros(1, 3)) is None, "numbers, not classes"
    assert counted(make("mlp").model, (torch.zeros(2, 12), torch.tensor([1, -100])), torch.zeros(2, 3)).sum() == 1


# -- a teacher in pk.fit ----------------------------------------------------------------------------------------------


def teacher_of(name="bert", seed=7):
    """A model like the student with other weights."""
    model, made = make(name).model, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=made))
    return model.train()  # which it must not stay


def texts(n=6, seed=3):
    ids = torch.randint(3, 50, (n, 7), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": t, "labels": t[:, 0] % 3} for t in ids.split(2)]


def student(method=None, name="bert", **kwargs):
    head = {"train": ("head",), **kwargs} if name == "bert" else kwargs
    return pk.attach(make(name).model, method or pk.LoRA(rank=2, dropout=0.25), **head)


def values(model, name="default"):
    return {f"{path}.{k}": v.clone() for path, t in tuners(model, name) for k, v in t.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def fitted(teacher, batches=None, model=None, **options):
    model = student() if model is None else model
    log = pk.fit(model, texts() if batches is None else batches, teacher=teacher, epochs=2, progress=False, **options)
    return model, [{key: value for key, value in row.items() if key != "seconds"} for row in log]


def test_the_loss_is_the_formula():
    wise, model = teacher_of("mlp"), pk.attach(make("mlp").model, pk.LoRA(rank=2), ("first",))
    x, labels = signs()[0]
    with torch.no_grad():
        t, s = wise.eval()(x), model(x)
    log = pk.fit(model, [(x, labels)], loss_fn=cross_entropy, teacher=pk.Distillation(wise, 3.0, 0.7), progress=False)
    p, q = (t / 3).softmax(-1), (s / 3).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    expected = 0.7 * 9 * divergence + 0.3 * cross_entropy(s, labels)
    assert log[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_weight_0_is_plain_training():
    plain, log = fitted(None)
    taught, same = fitted(pk.Distillation(teacher_of(), weight=0))
    assert log == same
    assert_equal(values(plain), values(taught))


def test_weight_1_reads_no_labels():
    batches, teacher = texts(), teacher_of()
    model, _ = fitted(pk.Distillation(teacher, weight=1), batches)
    for other in (
        [{**batch, "labels": (batch["labels"] + 1) % 3} for batch in batches],
        [{"input_ids": batch["input_ids"]} for batch in batches],
    ):
        again, _ = fitted(pk.Distillation(teacher, weight=1), other)
        assert_equal(values(again), values(model))


def test_the_teacher_and_the_random_numbers_are_left_alone(tmp_path):
    teacher = teacher_of()
    before = {k: t.clone() for k, t in teacher.state_dict().items()}
    wants = [p.requires_grad for p in teacher.parameters()]
    seen = []
    teacher.register_forward_hook(lambda m, args, out: seen.append((m.training, out.logits.requires_grad)))
    states = []
    for one in (None, pk.Distillation(teacher)):
        model, _ = fitted(one, checkpoint=tmp_path / str(one is None))
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "the teacher has drawn random numbers"
    assert_equal(dict(teacher.state_dict()), before)
    assert [p.requires_grad for p in teacher.parameters()] == wants and all(
        p.grad is None for p in teacher.parameters()
    )
    assert seen == [(False, False)] * 6
    for file in ("adapter_model.safetensors", "training.safetensors"):
        saved = [set(load_file(tmp_path / side / file)) for side in ("True", "False")]
        assert saved[0] == saved[1], "the teacher is in the checkpoint"


def test_the_student_becomes_the_teacher():
    torch.manual_seed(1)
    teacher, batches = teacher_of(), texts(24)
    model = student(pk.FullTuning(), train=())

    def apart():
        with torch.no_grad():
            pairs = [(model.eval()(b["input_ids"]).logits, teacher.eval()(b["input_ids"]).logits) for b in batches]
        return sum(distillation(s, t, 1.0).item() for s, t in pairs)

    before = apart()
    pk.fit(model, batches, teacher=pk.Distillation(teacher, 1.0, 1.0), epochs=20, lr=3e-3, progress=False)
    assert apart() < 0.2 * before


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_language_models(name):
    """Positions of padding do not count; a decoder's inputs come from the labels."""
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(3))
    teacher, found = teacher_of(name), []
    for filler in (1, 2):
        padded = ids.clone()
        padded[1, 4:] = filler
        labels = ids.clone()
        labels[1, 4:] = -100
        batch = {"input_ids": padded, "attention_mask": (labels != -100).long(), "labels": labels}
        model, _ = fitted(pk.Distillation(teacher), [batch], student(name=name))
        found.append(values(model))
    assert_equal(*found)


def test_pairs_and_methods_with_terms():
    wise, batches = make("mlp").model, signs()
    model = make("mlp").model
    pk.attach(model, Toy(term=0.1, penalty=0.1), ("first", "second"), train=("out",))
    pk.fit(model, batches, loss_fn=cross_entropy, teacher=pk.Distillation(wise), progress=False)
    (x, target), fresh = batches[0], make("mlp").model
    pk.attach(fresh, Toy(), ("first",))
    log = pk.fit(fresh, [(x, target)], loss_fn=cross_entropy, teacher=pk.Distillation(wise, 2.0, 0.5), progress=False)
    shifted = pk.attach(make("mlp").model, Toy(), ("first",))(x)
    expected = 0.5 * distillation(shifted, wise(x), 2.0) + 0.5 * cross_entropy(shifted, target)
    assert log[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_an_adapter_of_the_same_model_teaches():
    """As a model of its own with that adapter would."""
    (batch,) = texts(2)
    wise = pk.attach(make("bert").model, pk.LoRA(rank=4, dropout=0.5), train=("head",), seed=5)
    with torch.no_grad():
        for _, t in tuners(wise, "default"):
            for p in t.parameters():
                p.add_(0.2)
    first, log = fitted(pk.Distillation(wise), [batch])
    model = student()
    pk.attach(model, pk.LoRA(rank=4, dropout=0.5), train=("head",), seed=5, name="wise")
    with torch.no_grad():
        for _, t in tuners(model, "wise"):
            for p in t.parameters():
                p.add_(0.2)
    with pytest.raises(ValueError, match="'wise' is to be trained, so it cannot teach"):
        fitted(pk.Distillation("wise"), [batch], model)
    pk.set_active(model, "default")
    kept = values(model, "wise")
    second, same = fitted(pk.Distillation("wise"), [batch], model)
    assert log == same and pk.active(model) == ["default"]
    assert_equal(values(first), values(second))
    assert_equal(values(model, "wise"), kept)


def test_the_teacher_keeps_its_dtype_under_autocast():
    seen = []
    teacher = teacher_of().to(torch.float16)
    teacher.register_forward_hook(lambda m, args, out: seen.append(out.logits.dtype))
    net, wise = make("mlp").model, make("mlp").model.double()
    fitted(pk.Distillation(teacher), precision="bf16")
    pk.attach(net, pk.LoRA(rank=2), ("first",))
    pk.fit(net, signs(), loss_fn=cross_entropy, teacher=pk.Distillation(wise), precision="bf16", progress=False)
    assert set(seen) == {torch.float16}, "float inputs are in the teacher's dtype, the student's autocast is not its"


def test_a_resume_ends_bit_equal_and_knows_its_teacher(tmp_path):
    teacher = teacher_of()

    class Broken(list):
        def __iter__(self):
            yield from self[:2]
            raise KeyboardInterrupt

    def run(place, batches, one):
        return fitted(one, batches, checkpoint=tmp_path / place, checkpoint_every=1, resume=True)

    whole, log = run("whole", texts(), pk.Distillation(teacher))
    with pytest.raises(KeyboardInterrupt):
        run("run", Broken(texts()), pk.Distillation(teacher))
    for other in (
        None,
        pk.Distillation(teacher_of(seed=8)),
        pk.Distillation(teacher, 3.0),
        pk.Distillation(teacher, 2.0, 1),
    ):
        with pytest.raises(ValueError, match="was written with teacher="):
            run("run", texts(), other)
    resumed, same = run("run", texts(), pk.Distillation(copy.deepcopy(teacher)))
    assert log == same
    assert_equal(values(whole), values(resumed))


def test_digests_tell_teachers_apart():
    a = {"w": torch.randn(3, 4).T, "n": torch.tensor(3), "b": torch.zeros(2, dtype=torch.bfloat16), "extra": None}
    assert digest(a) == digest({key: None if t is None else t.clone() for key, t in a.items()})
    for key, t in (("w", a["w"] + 1e-6), ("w", a["w"].T), ("n", torch.tensor(4)), ("b", torch.zeros(2).half())):
        assert digest({**a, key: t}) != digest(a)


def test_a_head_that_an_adapter_replaces_is_no_part_of_the_teacher():
    wise, again = student(), student()
    said = pk.Distillation(wise).described(wise)
    with torch.no_grad():
        again.classifier.weight.add_(1)  # random, where the files of the base have no head
    assert pk.Distillation(again).described(wise) == said
    next(t for path, t in tuners(again, "default") if t.opaque).copy.weight.data.add_(1)
    assert pk.Distillation(again).described(wise) != said
    whole = [pk.attach(make("bert").model, pk.FullTuning()) for _ in range(2)]
    whole[1].bert.embeddings.word_embeddings.weight.data.add_(1)
    said = [pk.Distillation(model).described(wise) for model in whole]
    assert said[0] == said[1]


def test_a_teacher_that_does_not_fit_is_one_line():
    with pytest.raises(ValueError, match="teacher is a int; expected a model"):
        pk.Distillation(3)
    with pytest.raises(ValueError, match="weight = 1.5"):
        pk.Distillation("x", weight=1.5)
    with pytest.raises(ValueError, match="temperature = 0"):
        pk.Distillation("x", temperature=0)
    assert repr(pk.Distillation("x")) == "Distillation('x', temperature=2.0, weight=0.5)"
    model = student()
    for one, message in (
        (pk.Distillation(model), "the teacher is the student"),
        (pk.Distillation("x"), "no adapter 'x'"),
        (teacher_of(), "expected pk.Distillation"),
        (pk.Distillation(with_classes(5)), r"teacher's logits are \(2, 5\), the student's \(2, 3\)"),
        (pk.Distillation(teacher_of().bert), "without logits; expected a model with a head"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted(one, model=model)
    net = pk.attach(torch.nn.Sequential(torch.nn.Linear(12, 1)), pk.LoRA(rank=1), ("0",))
    with pytest.raises(ValueError, match="one class"):
        teacher = pk.Distillation(torch.nn.Linear(12, 1))
        pk.fit(net, signs(), loss_fn=lambda y, t: y.mean(), teacher=teacher, progress=False)


def with_classes(classes):
    """A teacher of as many classes."""
    from transformers import BertForSequenceClassification

    config = copy.deepcopy(make("bert").model.config)
    config.num_labels = classes
    return BertForSequenceClassification(config)


# -- tune --teacher ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "toy.tsv", toy())


@pytest.fixture(scope="module")
def wise(model_dir, data_file, tmp_path_factory):
    """(the directory of a tuned adapter, that of the same as a model, its summary)"""
    place = tmp_path_factory.mktemp("wise")
    method = method_from("lora", ["rank=8"])
    job = train.Job(str(model_dir), str(data_file), method, str(place / "adapter"), epochs=12, batch_size=8, lr=1e-2)
    summary = train.tune(job, progress=False)
    assert cli.main(["merge", "--adapter", str(place / "adapter"), "--out", str(place / "model")]) == 0
    return place / "adapter", place / "model", summary


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("form", ["adapter", "model"])
def test_tune_learns_from_a_teacher(capsys, model_dir, data_file, wise, tmp_path, form):
    """The teacher alone, whose wisdom reaches the student; what is written is the student's."""
    directory = wise[form == "model"]
    words = ("--teacher", directory, "--teacher-weight", 1, "--epochs", 12, "--batch-size", 8, "--lr", 1e-2)
    summary = tune(capsys, model_dir, data_file, tmp_path / "out", *words)
    assert summary["teacher"] == {
        "source": str(directory),
        "temperature": 2.0,
        "weight": 1.0,
        "test": pytest.approx(wise[2]["test"], abs=1e-4),
    }
    assert summary["teacher"]["test"]["accuracy"] > 0.8 and summary["test"]["accuracy"] > 0.8
    line = next(line for line in report.table(summary).splitlines() if line.startswith("accuracy, teacher"))
    assert f"{summary['teacher']['test']['accuracy']:.1%}  {form}; temperature 2, weight 1" in line
    plain = tune(capsys, model_dir, data_file, tmp_path / "plain")
    assert plain["teacher"] is None and "teacher" not in report.table(plain)
    assert plain["counts"] == summary["counts"] and plain["adapter_bytes"] == summary["adapter_bytes"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(summary["files"])


@pytest.mark.usefixtures("undrawn")
def test_a_teacher_of_weight_0_leaves_no_trace(capsys, model_dir, data_file, wise, tmp_path):
    plain = tune(capsys, model_dir, data_file, tmp_path / "plain")
    taught = tune(capsys, model_dir, data_file, tmp_path / "out", "--teacher", wise[0], "--teacher-weight", 0)
    assert same(tmp_path / "plain", tmp_path / "out") and taught["epochs"] == plain["epochs"]


def test_the_teacher_takes_no_second_base(model_dir, data_file, wise):
    job = train.Job(str(model_dir), str(data_file), pk.LoRA(), "out", teacher=str(wise[0]))
    setup = train.Setup(job)
    own = {p.data_ptr() for p in setup.model.bert.encoder.parameters()}
    theirs = {p.data_ptr() for name, p in setup.teacher.model.bert.encoder.named_parameters() if "peft" not in name}
    assert own == theirs


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("task", "model"), [("lm", gpt2), ("seq2seq", t5)])
def test_language_models_learn_from_a_teacher(capsys, data_file, tmp_path, task, model):
    words = ("--task", task, "--max-length", 12)
    source = model(tmp_path / "model")
    tune(capsys, source, data_file, tmp_path / "wise", *words, "--lr", 1e-2)
    summary = tune(capsys, source, data_file, tmp_path / "out", *words, "--teacher", tmp_path / "wise")
    assert summary["teacher"]["test"]["loss"] < summary["baseline"].get("loss", 1e9)
    line = refused(
        capsys, tmp_path, *_words(source, data_file, tmp_path), *words, "--teacher", source, "--set", "rank=0"
    )
    assert "rank" in line, "a model as it came may teach"


def _words(model, data, tmp_path):
    return ("tune", "--model", model, "--data", data, "--method", "lora", "--out", tmp_path / "new")


@pytest.mark.usefixtures("undrawn")
def test_a_broken_run_goes_on_with_the_same_teacher_alone(capsys, model_dir, data_file, wise, tmp_path, monkeypatch):
    def words(out, *more):
        options = ("--method", "lora", "--epochs", 3, "--batch-size", 16, "--json", "--teacher", tmp_path / "wise")
        return ("tune", "--model", model_dir, "--data", data_file, "--out", tmp_path / out, *options, *more)

    shutil.copytree(wise[0], tmp_path / "wise")
    assert run(capsys, *words("whole"))[0] == 0
    stop_at(monkeypatch, 12)
    interrupted(capsys, *words("out"))
    line = refused(capsys, tmp_path, *words("out", "--resume", "--temperature", 3))
    assert "temperature = null, this one has 3.0" in line
    shutil.copytree(tmp_path / "wise", tmp_path / "kept")
    shutil.rmtree(tmp_path / "wise")
    tune(capsys, model_dir, data_file, tmp_path / "wise", "--seed", 3)
    assert "was written with teacher=" in refused(capsys, tmp_path, *words("out", "--resume"))
    shutil.rmtree(tmp_path / "wise")
    shutil.move(tmp_path / "kept", tmp_path / "wise")
    code, _, err = run(capsys, *words("out"), "--resume")
    assert code == 0, err
    assert same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.usefixtures("undrawn")
def test_temperatures_can_be_swept(capsys, model_dir, data_file, wise, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep.report, "draw_sweep", lambda path, summary: path.touch())
    words = ("--sweep", "temperature=1,4", "--sweep", "teacher_weight=0.5,1", "--validation", 0.2)
    summary = tune(capsys, model_dir, data_file, tmp_path / "out", "--teacher", wise[0], *words)
    assert len(summary["runs"]) == 4 and summary["teacher"]["test"]["accuracy"] > 0.8
    assert "accuracy, test, teacher: " in report.sweep_table(summary)
    assert len({row["test"]["loss"] for row in summary["runs"]}) == 4


def test_a_sweep_of_temperature_is_that_of_a_method_that_has_one():
    words = ("tune", "--model", "m", "--data", "d.tsv", "--out", "o", "--teacher", "t", "--method")
    for method, own, taught in (("lst", 0.5, None), ("lora", None, 0.5)):
        job = cli._job(cli._parser().parse_args([*words, method]), {"temperature": "0.5"})
        assert (getattr(job.method, "temperature", None), job.temperature) == (own, taught)


def test_the_teacher_is_in_the_picture(wise, model_dir, data_file, tmp_path):
    job = train.Job(str(model_dir), str(data_file), pk.LoRA(), str(tmp_path / "out"), teacher=str(wise[0]))
    train.tune(job, progress=False)
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_bad_teachers_are_one_line(capsys, model_dir, data_file, wise, tmp_path):
    adapter, model, _ = wise
    other = write(tmp_path / "other.tsv", [(text, {"animal": "beast", "food": "food"}[y]) for text, y in toy(60)])
    more = write(tmp_path / "more.tsv", [(text, f"{y}{i % 2}") for i, (text, y) in enumerate(toy(60))])
    numbers = write(tmp_path / "numbers.tsv", [(text, str(len(text))) for text, _ in toy(60)])
    foreign, decoder = tmp_path / "foreign", gpt2(tmp_path / "gpt2", pad_token="[PAD]")
    shutil.copytree(model, foreign)
    shutil.copytree(model, headless := tmp_path / "headless")
    kept = {key: t for key, t in load_file(model / "model.safetensors").items() if key != "classifier.weight"}
    save_file(kept, headless / "model.safetensors", metadata={"format": "pt"})
    WORDS.reverse()
    save_tokenizer(foreign)
    WORDS.reverse()
    for data, words, says in (
        (data_file, ("--teacher", tmp_path / "absent"), "no model directory"),
        (data_file, ("--teacher", model_dir), "it is a BertModel; expected a model for SequenceClassification"),
        (data_file, ("--teacher", headless), "it has no classifier.weight"),
        (data_file, ("--teacher", decoder), "expected a model for SequenceClassification"),
        (data_file, ("--teacher", foreign), "need one vocabulary"),
        (other, ("--teacher", adapter), "knows the classes animal, food; expected beast, food"),
        (more, ("--teacher", model), "knows the classes animal, food; expected animal0, animal1, food0, food1"),
        (numbers, ("--teacher", model, "--task", "regress"), "--task regress has none"),
        (data_file, ("--temperature", 3), "--temperature 3 needs --teacher PATH"),
        (data_file, ("--teacher-weight", 0.1), "--teacher-weight 0.1 needs --teacher PATH"),
        (data_file, ("--teacher", adapter, "--teacher-weight", 2), "expected a number from 0 to 1"),
        (data_file, ("--teacher", adapter, "--temperature", 0), "--temperature 0; expected a positive number"),
    ):
        assert says in refused(capsys, tmp_path, *_words(model_dir, data, tmp_path), *words)


def test_vocabularies_that_differ_are_one_line(capsys, data_file, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    source, wide = gpt2(tmp_path / "gpt2", pad_token="[PAD]"), tmp_path / "wide"
    config = GPT2Config(vocab_size=len(WORDS) + 8, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(wide)
    words = (*_words(source, data_file, tmp_path), "--task", "lm", "--teacher", wide)
    assert "vocabulary in both" in refused(capsys, tmp_path, *words)
    assert f"{wide} takes at most 16 tokens" in refused(capsys, tmp_path, *words, "--max-length", 20)
