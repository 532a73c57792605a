"""An interrupted tune: where its checkpoint is, what it holds, and that going on ends at the same bits."""

import json

import pytest
from texts import gpt2, interrupted, refused, run, same, stop_at, toy, tune, write

import peft_kernels as pk
from peft_kernels import hf, train
from peft_kernels.batches import Batches

for module in ("transformers", "sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(module)
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "toy.tsv", toy(100))


def words_of(model, data, out, *more):
    options = ("--method", "lora", "--set", "dropout=0.2", "--epochs", 3, "--batch-size", 16, "--json")
    return ("tune", "--model", model, "--data", data, "--out", out, *options, *more)


def log_of(out):
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize(
    ("batch", "more"),
    [
        (8, ()),  # in the second of three epochs of five batches
        (4, ("--checkpoint-every", 1, "--accumulate", 2)),
        (8, ("--validation", 0.2, "--patience", 1, "--lr", 0.5)),
    ],
    ids=["plain", "accumulating", "with patience"],
)
def test_resumed_ends_at_the_same_bits(capsys, model_dir, data_file, tmp_path, monkeypatch, batch, more):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(capsys, *words_of(model_dir, data_file, whole, *more))[0] == 0
    stop_at(monkeypatch, batch)
    line = interrupted(capsys, *words_of(model_dir, data_file, out, *more))
    checkpoint = tmp_path / "out.checkpoint"
    assert str(checkpoint) in line and "--resume" in line
    assert checkpoint.is_dir() and not out.exists()
    base, _ = hf.load_for("SequenceClassification", str(model_dir), num_labels=2)
    pk.load(base, checkpoint)
    assert pk.active(base) == ["default"]
    code, text, err = run(capsys, *words_of(model_dir, data_file, out, *more, "--resume"))
    assert code == 0, err
    assert same(whole, out) and log_of(whole) == log_of(out)
    summary, expected = json.loads(text), json.loads((whole / "summary.json").read_text())
    assert summary["seconds"]["resumed"] and not expected["seconds"]["resumed"]
    for key in ("test", "validation", "baseline", "epochs", "merge"):
        assert summary[key] == expected[key]
    assert not checkpoint.exists()


def test_a_language_model_resumes_too(capsys, data_file, tmp_path, monkeypatch):
    source = gpt2(tmp_path / "model")
    more = ("--task", "lm", "--epochs", 2)
    assert run(capsys, *words_of(source, data_file, tmp_path / "whole", *more))[0] == 0
    stop_at(monkeypatch, 7)
    interrupted(capsys, *words_of(source, data_file, tmp_path / "out", *more))
    assert run(capsys, *words_of(source, data_file, tmp_path / "out", *more, "--resume"))[0] == 0
    assert same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("batch", [4, 8, 14])
def test_a_break_in_the_calibration_repeats_it(capsys, model_dir, data_file, tmp_path, monkeypatch, batch):
    """80 rows: the calibration reads 5 batches of 16, then so does each epoch."""

    def words(out):
        options = ("--method", "fishmask", "--set", "keep_ratio=0.5", "--epochs", 3, "--batch-size", 16, "--json")
        return ("tune", "--model", model_dir, "--data", data_file, "--out", tmp_path / out, *options)

    assert run(capsys, *words("whole"))[0] == 0
    stop_at(monkeypatch, batch)
    interrupted(capsys, *words("out"))
    assert run(capsys, *words("out"), "--resume")[0] == 0
    assert same(tmp_path / "whole", tmp_path / "out")


def test_a_checkpoint_is_resumed_or_discarded_by_request_alone(capsys, model_dir, data_file, tmp_path, monkeypatch):
    words = words_of(model_dir, data_file, tmp_path / "out")
    stop_at(monkeypatch, 8)
    interrupted(capsys, *words)
    line = refused(capsys, tmp_path, *words)
    assert "--resume" in line and "--force" in line
    assert run(capsys, *words, "--force")[0] == 0
    assert not json.loads((tmp_path / "out" / "summary.json").read_text())["seconds"]["resumed"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_other_settings_are_not_resumed(capsys, model_dir, tmp_path, monkeypatch):
    data = write(tmp_path / "d.tsv", toy(100))
    words = words_of(model_dir, data, tmp_path / "out")
    stop_at(monkeypatch, 8)
    interrupted(capsys, *words)
    for more, name in ((("--batch-size", 8), "batch_size = 16"), (("--set", "rank=2"), '"rank": 8')):
        assert name in refused(capsys, tmp_path, *words, "--resume", *more)
    write(data, toy(101))
    assert "sha256 of the data" in refused(capsys, tmp_path, *words, "--resume")


def test_resume_without_a_checkpoint_starts(capsys, model_dir, data_file, tmp_path):
    summary = tune(capsys, model_dir, data_file, tmp_path / "out", "--resume")
    assert not summary["seconds"]["resumed"] and (tmp_path / "out").is_dir()


def test_a_directory_that_is_no_checkpoint_is_left_alone(capsys, model_dir, data_file, tmp_path):
    (tmp_path / "out.checkpoint").mkdir()
    (tmp_path / "out.checkpoint" / "thesis.tex").write_text("years of work")
    for word in ("--force", "--resume"):
        assert "no checkpoint" in refused(capsys, tmp_path, *words_of(model_dir, data_file, tmp_path / "out"), word)


def test_an_interrupt_before_training_leaves_nothing(capsys, model_dir, data_file, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Batches, "sorted", stop)
    line = interrupted(capsys, *words_of(model_dir, data_file, tmp_path / "out"))
    assert "checkpoint" not in line and not list(tmp_path.iterdir())


def test_an_interrupt_of_the_last_evaluation_can_be_resumed(capsys, model_dir, data_file, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    words = words_of(model_dir, data_file, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(train, "merged_check", stop)
        assert "--resume" in interrupted(capsys, *words)
    code, text, err = run(capsys, *words, "--resume")
    assert code == 0, err
    assert run(capsys, *words_of(model_dir, data_file, tmp_path / "whole"))[0] == 0
    assert json.loads(text)["test"] == json.loads((tmp_path / "whole" / "summary.json").read_text())["test"]
