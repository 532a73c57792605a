"""`tune --method all`: what a comparison measures, writes and says, and that an interrupted one goes on."""

import json

import pytest
import torch
from texts import interrupted, refused, run, toy, write

import peft_kernels as pk
from peft_kernels import compare, comparison, train, trial

for module in ("transformers", "sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(module)

MEASURED = [
    "accuracy",
    "trainable",
    "changed",
    "rank",
    "stored",
    "bytes",
    "peak_bytes",
    "train_cpu_s",
    "train_wall_s",
    "inference_ratio",
    "merged_ratio",
    "second_task",
]


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "toy.tsv", toy(100))


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Whether the animal or the food of the other texts is a big one."""
    rows = [(text, "big" if "big" in text else "other") for text, _ in toy(80, seed=3)]
    return write(tmp_path_factory.mktemp("second") / "second.tsv", rows)


DRAW = comparison.draw


class Tried(list):
    """The trials so far."""

    interrupt = ""  # the one in which a Ctrl-C comes


@pytest.fixture
def inside(monkeypatch):
    """Trials in this process, quick ones, and which they were."""
    tried = Tried()

    def own(words, tell):
        tried.append("baselines" if words["baselines"] else words["job"]["method"]["method"])
        if tried[-1] == tried.interrupt:
            raise KeyboardInterrupt
        try:
            return {"found": trial.run({**words, "seconds": 0.01}, tell)}
        except ValueError as error:
            return {"failed": str(error)}

    monkeypatch.setattr(compare, "trial", own)
    monkeypatch.setattr(comparison, "draw", lambda path, summary: path.touch())  # it takes longer than the trials
    return tried


def words_of(model, data, out, *more):
    options = ("--budget", "3steps", "--batch-size", 8, "--json")
    return ("tune", "--model", model, "--data", data, "--out", out, *options, *more)


def test_a_comparison(capsys, model_dir, data_file, second, tmp_path, inside):
    out = tmp_path / "out"
    words = words_of(model_dir, data_file, out, "--second", second, "--method", "lora,bitfit,houlsby,adapterdrop,gated")
    code, text, err = run(capsys, *words)
    assert code == 1, "adapterdrop wants more layers than there are"
    summary = json.loads(text)
    assert summary == json.loads((out / "comparison.json").read_text())
    assert summary["model"] == str(model_dir) and {"device_name", "commit"} <= summary["machine"].keys()
    assert {p.name for p in out.iterdir()} == {"comparison.json", "comparison.png"}
    DRAW(tmp_path / "drawn.png", summary)
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["method"]: row for row in summary["rows"]}
    assert rows.keys() == {"class_mean", "linear_probe", "full", "head", "lora", "bitfit", "houlsby", "adapterdrop"}
    failed = rows.pop("adapterdrop")
    assert "leaves no adapter" in failed["failed"] and "accuracy" not in failed
    assert [own["method"] for own in summary["left_out"]] == ["gated"]
    for name in ("full", "head", "lora", "bitfit", "houlsby"):
        row = rows[name]
        assert row.keys() >= {"settings", "family", *MEASURED} and row["steps"] == 3
        assert row["merged_ratio"] is None if name == "houlsby" else row["merged_ratio"] > 0
        assert row["second_task"] == pytest.approx(row["second_accuracy"] / summary["second"])
    assert rows["lora"]["settings"]["rank"] == pk.LoRA().rank and rows["lora"]["family"] == "reparametrised"
    assert rows["head"]["second_task"] == 1.0, "its adapter is behind the features"
    inside.clear()
    assert run(capsys, *words, "--resume")[0] == 1 and inside == ["adapterdrop"], "what failed is tried again"
    table = comparison.table(summary)
    for word in (*comparison.COLUMNS, "head only", "nearest class mean", "failed: ", "left out: gated: needs"):
        assert word in table
    assert comparison.markdown(summary).count("\n| ") == 2 + 8


def test_the_counts_are_those_without_the_head(capsys, model_dir, data_file, tmp_path, inside):
    words = words_of(model_dir, data_file, tmp_path / "out", "--method", "lor?")
    summary = json.loads(run(capsys, *words)[1])
    rows = {row["method"]: row for row in summary["rows"]}
    alone = pk.attach(trial.Setup(job(model_dir, data_file)).model, pk.LoRA())
    assert rows["lora"]["trainable"] == pk.counts(alone).trainable
    head = summary["head"]
    assert rows["head"]["trainable"] == head["trainable"] == 32 * 32 + 32 + 2 * 32 + 2
    assert rows["full"]["trainable"] + head["trainable"] == pk.counts(alone).total


def test_the_counts_of_a_method_without_a_head_are_whole(model_dir, data_file):
    given = job(model_dir, data_file, pk.WARP(length=3, mask_token=4), budget="3steps", batch_size=8)
    words = {"job": trial.job_to(given), "second": None, "threads": None, "seconds": 0.01, "baselines": False}
    row = trial.run(words, lambda stage, done: None)
    assert row["trainable"] == row["stored"] == (3 + 2) * 32 and row["bytes"] > 0


def job(model, data, method=None, **settings):
    return train.Job(str(model), str(data), method or pk.LoRA(), "out", **settings)


def test_the_nearest_class_mean():
    x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [0.1, 1.0]]), dim=-1)
    test = torch.tensor([[0.9, 0.2], [0.1, 0.8]])
    assert trial.class_mean((x, torch.tensor([1, 1, 0])), test).tolist() == [1, 0]


def test_a_trial_is_a_process_of_its_own(model_dir, data_file):
    """Its events and figures come through; what is wrong is a reason; a process that is killed is one too."""
    heard = []
    words = {"second": None, "threads": 1, "seconds": 0.01, "baselines": False}
    mine = compare.job_to(job(model_dir, data_file, budget="20steps", batch_size=8))
    found = compare.trial({**words, "job": mine}, lambda stage, done: heard.append((stage, done)))["found"]
    assert found["steps"] == 20 and found["peak_bytes"] >= 0 and found["train_wall_s"] > 0
    assert heard[0] == ("loading", 0.0) and all(0 <= done <= 1 for _, done in heard)


def test_a_process_that_dies_is_a_reason(monkeypatch):
    import subprocess
    import sys

    start = subprocess.Popen

    def dying(argv, **kwargs):
        return start([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **kwargs)

    monkeypatch.setattr(subprocess, "Popen", dying)
    assert compare.trial({}, print) == {"failed": "the process ended with signal SIGKILL"}


def test_an_interrupted_comparison_goes_on(capsys, model_dir, data_file, tmp_path, inside):
    out = tmp_path / "out"
    words = words_of(model_dir, data_file, out, "--method", "lora,bitfit,ia3")
    inside.interrupt = "lora"
    line = interrupted(capsys, *words)
    assert "has 4 of 5 methods" in line and "--resume" in line
    assert "--resume" in refused(capsys, tmp_path, *words)
    assert "batch_size = 8" in refused(capsys, tmp_path, *words, "--resume", "--batch-size", 4)
    before = json.loads((out / "comparison.json").read_text())["rows"]
    inside.interrupt = ""
    inside.clear()
    code, text, _ = run(capsys, *words, "--resume")
    assert code == 0 and inside == ["lora"]
    assert json.loads(text)["rows"][: len(before)] == before
    inside.clear()
    run(capsys, *words, "--resume", "--method", "lora,fishm*")
    assert inside == ["fishmask"], "what other methods found stays"
    assert run(capsys, *words, "--force")[0] == 0 and len(inside) == 7


def test_an_interrupt_before_the_first_row_leaves_nothing(capsys, model_dir, data_file, tmp_path, inside):
    inside.interrupt = "baselines"
    interrupted(capsys, *words_of(model_dir, data_file, tmp_path / "out", "--method", "all"))
    assert not list(tmp_path.iterdir())


def test_every_method_is_chosen_or_says_why_not():
    assert compare.chosen("all") == list(pk.methods())
    assert compare.chosen("ia3,lora") == [key for key in pk.methods() if key in ("ia3", "lora")]
    assert compare.chosen("compacter*") == ["compacter", "compacterpp"]


BAD = {
    "no_method": (("--method", "lora,lorra"), "--method lorra"),
    "no_glob": (("--method", "x*"), "--method x*"),
    "budget": (("--method", "all", "--budget", "60"), "such as 60s, 2m or 1h"),
    "half_a_step": (("--method", "all", "--budget", "1.5steps"), "100steps"),
    "nothing": (("--method", "all", "--budget", "0s"), "--budget 0s"),
    "epochs_too": (("--method", "all", "--epochs", "2"), "expected one of them"),
    "settings": (("--method", "all", "--set", "rank=2"), "--set is for one method"),
    "another_task": (("--method", "all", "--task", "lm"), "--task classify"),
    "second_of_one": (("--method", "lora", "--second", "x.tsv"), "leave it out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_words(capsys, model_dir, data_file, tmp_path, inside, case):
    words, says = BAD[case]
    assert says in refused(capsys, tmp_path, *words_of(model_dir, data_file, tmp_path / "out"), *words)
    assert not inside


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("60s", {"seconds": 60.0}), ("1.5m", {"seconds": 90.0}), ("1h", {"seconds": 3600.0}), ("7steps", {"steps": 7})],
)
def test_budgets(text, wanted):
    assert train.budget(text) == wanted


def test_a_far_outlier_takes_no_room():
    crowd = [0.70 + 0.01 * n for n in range(9)]
    assert comparison._floor([*crowd, 0.3], [0.66, 0.77]) == 0.66
    assert comparison._floor([*crowd, 0.69], [0.8]) == 0.69
    assert comparison._floor([0.7, 0.3], [0.8]) == 0.3, "too few to say"


def test_labels_do_not_cover_each_other():
    """As many points as there are methods, half of them in one place."""
    from matplotlib.text import Text

    figure, axes = comparison.new_figure((13, 8))
    axes.set(xscale="log")
    points = [(1000.0 * (n // 20 * n + 1), 50.0, f"method{n}", "C0") for n in range(45)]
    axes.plot([p[0] for p in points], [p[1] for p in points], "o")
    figure.canvas.draw()
    comparison.label(axes, points)
    figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # an annotation's own has the line to its point in it
    assert len(boxes) == 45
    for n, one in enumerate(boxes):
        for other in boxes[:n]:
            assert not (one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1)
