"""--sweep: each run equals the run alone, validation rows choose, and nothing is trained where a value is bad."""

import json

import pytest
from texts import WRITTEN, interrupted, refused, run, same, stop_at, toy, tune, write

from peft_kernels import report, sweep, train

for module in ("transformers", "sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(module)
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "toy.tsv", toy(100))


def test_each_run_is_the_run_alone(capsys, model_dir, data_file, tmp_path):
    more = ("--validation", 0.2, "--epochs", 1)
    summary = tune(capsys, model_dir, data_file, tmp_path / "out", *more, "--sweep", "rank=4,1")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"rank-4", "rank-1", "summary.json", "sweep.png"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [r["values"] for r in summary["runs"]] == [{"rank": "4"}, {"rank": "1"}]
    for row in summary["runs"]:
        directory = tmp_path / "out" / row["directory"]
        assert {p.name for p in directory.iterdir()} == WRITTEN
        alone = tune(
            capsys, model_dir, data_file, tmp_path / row["directory"], *more, "--set", f"rank={row['values']['rank']}"
        )
        assert same(directory, tmp_path / row["directory"])
        assert row["test"] == alone["test"] and row["validation"] == alone["validation"]
        assert row["trainable"] == alone["counts"]["trainable"] and summary["baseline"] == alone["baseline"]
    best = max(summary["runs"], key=lambda r: r["validation"]["accuracy"])
    assert summary["best"] == best["directory"]
    table = report.sweep_table(summary)
    assert f"best: {best['directory']}, chosen on" in table and "accuracy, validation" in table


def test_a_grid_without_validation_chooses_nothing(capsys, model_dir, data_file, tmp_path):
    words = ("--sweep", "rank=1,2", "--sweep", "lr=1e-3,1e-2", "--epochs", 1)
    summary = tune(capsys, model_dir, data_file, tmp_path / "out", *words)
    names = ["rank-1_lr-1e-3", "rank-1_lr-1e-2", "rank-2_lr-1e-3", "rank-2_lr-1e-2"]
    assert [r["directory"] for r in summary["runs"]] == names
    settings = json.loads((tmp_path / "out" / names[2] / "summary.json").read_text())
    assert settings["method"]["rank"] == 2 and settings["settings"]["lr"] == 1e-3
    assert summary["best"] is None and "add --validation" in report.sweep_table(summary)
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_direction_of_the_metric_decides():
    rows = [{"directory": n, "validation": {"perplexity": p, "accuracy": p}} for n, p in (("a", 3.0), ("b", 2.0))]
    assert sweep.best("lm", rows) == "b" and sweep.best("classify", rows) == "a"


def test_an_interrupted_sweep_goes_on(capsys, model_dir, data_file, tmp_path, monkeypatch):
    words = ("tune", "--model", model_dir, "--data", data_file, "--method", "lora", "--json", "--batch-size", 16)
    words += ("--epochs", 2, "--sweep", "rank=1,2,4")
    assert run(capsys, *words, "--out", tmp_path / "whole")[0] == 0
    stop_at(monkeypatch, 14)  # in the second of three runs of ten batches
    line = interrupted(capsys, *words, "--out", tmp_path / "out")
    checkpoint = tmp_path / "out.checkpoint"
    assert f"{checkpoint};" in line and "--resume" in line and not (tmp_path / "out").exists()
    assert {p.name for p in checkpoint.iterdir()} == {"job.json", "rank-1", "rank-2.checkpoint"}
    assert "sweep = " in refused(capsys, tmp_path, *words[:-2], "--out", tmp_path / "out", "--resume")
    trained, fit = [], train.fit
    monkeypatch.setattr(train, "fit", lambda *args, **kwargs: trained.append(1) or fit(*args, **kwargs))
    assert run(capsys, *words, "--out", tmp_path / "out", "--resume")[0] == 0
    assert len(trained) == 2 and not checkpoint.exists()
    for name in ("rank-1", "rank-2", "rank-4"):
        assert same(tmp_path / "out" / name, tmp_path / "whole" / name)


def test_a_run_that_fails_is_a_row(capsys, model_dir, data_file, tmp_path):
    words = ("--validation", 0.2, "--set", "rank=2", "--epochs", 3)
    summary = tune(capsys, model_dir, data_file, tmp_path / "out", *words, "--sweep", "lr=1e-3,1e30,1e-2")
    assert [row.get("failed", "")[:11] for row in summary["runs"]] == ["", "the loss is", ""]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"lr-1e-3", "lr-1e-2", "summary.json", "sweep.png"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    tune(capsys, model_dir, data_file, tmp_path / "alone", *words, "--lr", 1e-2)
    assert same(tmp_path / "out" / "lr-1e-2", tmp_path / "alone"), "the failed run left something in the model"
    assert "the loss is" in report.sweep_table(summary)
    words = ("--model", model_dir, "--data", data_file, "--method", "lora", "--out", tmp_path / "none")
    assert "every run failed" in refused(capsys, tmp_path, "tune", *words, "--json", "--sweep", "lr=1e29,1e30")


BAD = {
    "rank_too_large": (("rank=2,1000",), "rank-1000: LoRA rank = 1000"),
    "rank_zero": (("rank=2,0",), "at least 1"),
    "no_value": (("rank=",), "field=value,value"),
    "no_equals_sign": (("rank",), "field=value,value"),
    "unknown_field": (("rnak=1,2",), "no field 'rnak'"),
    "word_for_a_number": (("rank=1,two",), "expected int"),
    "word_for_a_rate": (("lr=fast",), "expected float"),
    "rate_below_zero": (("lr=1e-3,-1",), "--lr -1"),
    "same_field_twice": (("rank=1", "rank=2"), "given twice"),
    "set_and_swept": (("alpha=1,2",), "given twice"),
    "same_value_twice": (("rank=2,2",), "rank-2 twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_fails_before_any_training(capsys, model_dir, data_file, tmp_path, monkeypatch, case):
    monkeypatch.setattr(train, "fit", lambda *args, **kwargs: pytest.fail("trained"))
    words, says = BAD[case]
    base = (
        "--model",
        model_dir,
        "--data",
        data_file,
        "--method",
        "lora",
        "--set",
        "alpha=4",
        "--out",
        tmp_path / "out",
    )
    line = refused(capsys, tmp_path, "tune", *base, *(w for word in words for w in ("--sweep", word)))
    assert says in line
