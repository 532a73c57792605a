"""`peft-kernels tune` on tiny random models and toy data: what it writes, what it says, what it refuses."""

import gzip
import json
import lzma
import sys

import pytest
import torch
from models import fits
from texts import SPECIAL, WORDS, WRITTEN, gpt2, numbers, refused, run, same, toy, tune, values, write
from torch import nn

import peft_kernels as pk
from peft_kernels import hf, report, tasks, train
from peft_kernels.batches import Batches
from peft_kernels.data import read_data
from peft_kernels.settings import method_from

for module in ("transformers", "sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(module)
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "toy.tsv", toy())


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(model_dir, data_file, tmp_path_factory):
    """(summary, directory) of one run."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    method = method_from("lora", ["rank=4", "alpha=8"])
    job = train.Job(
        str(model_dir), str(data_file), method, str(out), epochs=12, batch_size=8, lr=1e-2, model_dropout=0.0
    )
    return train.tune(job, progress=False), out


def test_tune_writes_everything(tuned):
    summary, out = tuned
    assert {p.name for p in out.iterdir()} == WRITTEN == set(summary["files"])
    assert json.loads((out / "summary.json").read_text()) == summary
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = -(-summary["data"]["train"] // 8)
    assert sum("step" in row for row in log) == 12 * steps and sum("test_accuracy" in row for row in log) == 12
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in out.parent.iterdir() if p != out], "a temporary directory or a checkpoint was left"


def test_tune_reports_what_is_true(tuned):
    summary, out = tuned
    assert summary["data"]["train"] + summary["data"]["test"] == 160 and summary["data"]["test"] == 32
    assert summary["test"]["accuracy"] > 0.8 and summary["baseline"]["converged"]
    assert summary["test"] == {k.removeprefix("test_"): v for k, v in summary["epochs"][-1].items() if "test_" in k}
    assert summary["counts"]["trainable"] == summary["counts"]["stored"]
    assert summary["merge"]["merged"] and summary["merge"]["same"] == summary["merge"]["of"] == 32
    assert summary["adapter_bytes"] == (out / "adapter_model.safetensors").stat().st_size
    words = ("linear probe", "accuracy, tuned", "macro F1, tuned", "trainable", "adapter file", "peak memory")
    for word in (*words, "32 of 32"):
        assert word in report.table(summary)


@pytest.mark.parametrize("settings", [["init=labels"], ["init=text", "text=animal or food"]])
def test_a_prompt_begins_with_words(settings, model_dir, data_file, tmp_path):
    method = method_from("prompt", ["length=3", *settings])
    job = train.Job(str(model_dir), str(data_file), method, str(tmp_path / "out"), batch_size=8)
    saved = train.tune(job, progress=False)["method"]
    word = {name: i for i, name in enumerate(WORDS)}
    assert saved["classes"] == ([[word["animal"]], [word["food"]]] if method.init == "labels" else [])
    assert saved["tokens"] == ([word["animal"], word["[UNK]"], word["food"]] if method.init == "text" else [])


def test_adapter_reloads_into_a_fresh_model(tuned, model_dir, data_file):
    summary, out = tuned
    data = read_data(str(data_file))
    task = tasks.Classify(data)
    torch.manual_seed(99)  # another random head than the run began with: the saved one must replace it
    model, tokenizer = task.load(str(model_dir), None)
    pk.load(model, out)
    test = Batches(data.test, task.encode(tokenizer, data.test, 32), tokenizer, 8, 0)
    assert task.evaluate(model, test)[0]["accuracy"] == summary["test"]["accuracy"]


def test_same_seed_same_numbers(capsys, model_dir, data_file, tmp_path):
    runs = [tune(capsys, model_dir, data_file, tmp_path / name) for name in "ab"]
    assert runs[0]["epochs"] == runs[1]["epochs"] and runs[0]["baseline"] == runs[1]["baseline"]


def test_prints_json_or_one_table(capsys, model_dir, data_file, tmp_path):
    summary = tune(capsys, model_dir, data_file, tmp_path / "a", "--set", "rank=2", "--targets", "q", "o")
    assert summary["method"]["rank"] == 2 and summary["targets"] == ["q", "o"]
    options = ("--data", data_file, "--method", "bitfit", "--out", tmp_path / "b")
    code, out, _ = run(capsys, "tune", "--model", model_dir, *options)
    assert code == 0 and out.startswith("bitfit on ") and "merged model" in out


OF_OTHERS = {
    "adapterdrop": "drop=1",  # the model has two layers
    "compacter": "reduction_factor=4",  # the model is narrow
    "compacterpp": "reduction_factor=4",
    "qlora": "rank=8",  # no layer of the model takes the default
    "ipt": "length=8",  # the model has few positions
    "spot": "length=8",
    "warp": "mask_token=4",  # its tokenizer has none
    "gated": "inner=lora",
    "s4": "budget=20",  # the model is small
    "union": "members=lora,ia3",
    "bylayer": 'members=[{"method": {"method": "lora", "rank": 2}, "layers": [0]}, "ia3"]',
}


@pytest.mark.parametrize("method", pk.methods())
def test_tune_offers_every_method(capsys, model_dir, data_file, tmp_path, method):
    settings = ("--set", OF_OTHERS[method]) if method in OF_OTHERS else ()
    model_dir = model_dir if fits(method, "bert") else gpt2(tmp_path / "gpt2")
    summary = tune(capsys, model_dir, data_file, tmp_path / "out", "--method", method, "--epochs", 1, *settings)
    assert summary["method"]["method"] == method


def test_a_sparse_adapter_stores_its_numbers_and_where_they_belong(capsys, model_dir, data_file, tmp_path):
    settings = ("--method", "fishmask", "--train", "--set", "keep_ratio=0.1")
    summary = tune(capsys, model_dir, data_file, tmp_path / "out", *settings)
    kept = values(tmp_path / "out")
    assert {(key.rpartition(".")[2], t.dtype) for key, t in kept.items()} == {
        ("positions", torch.int32),
        ("vals", torch.float32),
    }
    n = summary["counts"]["stored"]
    assert n == sum(t.numel() for t in kept.values()) // 2
    assert (summary["index_bytes"], summary["counts"]["bytes"]) == (4 * n, 8 * n)
    assert summary["merge"]["same"] == 32
    one = report.size(4 * n)
    assert f"numbers in the adapter, {one}, and {one} that say which numbers they are" in report.table(summary)


def test_tune_takes_a_decoder_without_padding_token(capsys, data_file, tmp_path):
    summary = tune(capsys, gpt2(tmp_path / "gpt2"), data_file, tmp_path / "out")
    assert summary["merge"]["same"] == 32


def test_existing_output_needs_force(capsys, model_dir, data_file, tmp_path):
    out = tmp_path / "out"
    tune(capsys, model_dir, data_file, out)
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    words = ("tune", "--model", model_dir, "--data", data_file, "--method", "lora", "--out", out)
    assert "--force" in refused(capsys, tmp_path, *words)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    tune(capsys, model_dir, data_file, out, "--force", "--seed", 1)
    assert json.loads((out / "summary.json").read_text())["settings"]["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_replaces_results_only(capsys, model_dir, data_file, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    words = ("tune", "--model", model_dir, "--data", data_file, "--method", "lora", "--force")
    assert "summary.json" in refused(capsys, tmp_path, *words, "--out", tmp_path / "precious")


# -- settings ---------------------------------------------------------------------------------------------------------


def test_train_says_what_is_trained_whole(capsys, model_dir, data_file, tmp_path):
    def trained(name, *words):
        tune(capsys, model_dir, data_file, tmp_path / name, "--epochs", 1, *words)
        return {key.split(".layer.")[0] for key in values(tmp_path / name)}

    assert {"classifier.copy.weight", "bert.pooler.copy.dense.weight", "bert.encoder"} < trained("default")
    assert trained("nothing", "--train") == {"bert.encoder"}
    assert trained("head", "--train", "head") == {"bert.encoder", "classifier.copy.weight", "classifier.copy.bias"}


def test_precision_accumulation_and_checkpointing(capsys, model_dir, data_file, tmp_path, monkeypatch):
    quiet = ("--model-dropout", 0, "--epochs", 1)
    tune(capsys, model_dir, data_file, tmp_path / "plain", *quiet)
    tune(capsys, model_dir, data_file, tmp_path / "bf16", *quiet, "--precision", "bf16")
    assert {t.dtype for t in values(tmp_path / "bf16").values()} == {torch.float32}
    assert not same(tmp_path / "plain", tmp_path / "bf16")
    tune(capsys, model_dir, data_file, tmp_path / "two", *quiet, "--batch-size", 8, "--accumulate", 2)
    log = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    assert sum("lr" in line for line in log) == 8
    tune(capsys, model_dir, data_file, tmp_path / "saving", *quiet, "--checkpointing")
    assert same(tmp_path / "plain", tmp_path / "saving")


def test_checkpointing_runs_the_blocks_again(model_dir):
    model, _ = hf.load_for("SequenceClassification", str(model_dir))
    hf.checkpoint_blocks(model)
    pk.attach(model, pk.LoRA(rank=2))
    calls = []
    model.bert.encoder.layer[0].attention.self.query.register_forward_hook(lambda *args: calls.append(1))
    model.train()
    model(input_ids=torch.tensor([[2, 5, 3]]), labels=torch.tensor([0])).loss.backward()
    assert len(calls) == 2


def test_checkpointing_needs_a_model_that_has_it():
    model = nn.Linear(2, 2)
    model.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="leave --checkpointing out"):
        hf.checkpoint_blocks(model)


# -- further data, and rows held out for choosing ---------------------------------------------------------------------


def test_further_data_are_scored_before_and_after(capsys, model_dir, data_file, tmp_path):
    known = write(tmp_path / "known.tsv", toy(30))
    other = write(tmp_path / "other.tsv", toy(20, seed=5))
    words = ("--eval-data", f"known={known}", "--eval-data", f"other={other}")
    summary = tune(capsys, model_dir, data_file, tmp_path / "out", *words)
    found = summary["eval_data"]
    assert [found[name]["rows"] for name in found] == [30, 20]
    training = {text for text, _ in read_data(str(data_file)).train}
    assert found["known"]["trained_on"] == sum(text in training for text, _ in toy(30))
    torch.manual_seed(0)  # as the run began: the same new head
    model, tokenizer = tasks.Classify(read_data(str(data_file))).load(str(model_dir), None)

    def accuracy():
        right = 0
        for text, label in toy(20, seed=5):
            scores = model.eval()(**tokenizer(text, return_tensors="pt")).logits
            right += model.config.id2label[scores.argmax().item()] == label
        return right / 20

    assert accuracy() == found["other"]["before"]["accuracy"]
    pk.load(model, tmp_path / "out")
    assert accuracy() == found["other"]["after"]["accuracy"]
    assert "accuracy, other" in report.table(summary) and "of them trained on" in report.table(summary)


def test_the_test_rows_choose_nothing(capsys, model_dir, tmp_path):
    """Other labels of the test rows, the same adapter."""
    rows = toy(120)
    for name in "ab":
        lines = [f"{text}\t{label}\ttrain\n" for text, label in rows[:100]]
        for text, label in rows[100:]:
            lines.append(f"{text}\t{label if name == 'a' else {'animal': 'food', 'food': 'animal'}[label]}\ttest\n")
        (tmp_path / f"{name}.tsv").write_text("text\tlabel\tsplit\n" + "".join(lines))
    words = ("--validation", 0.2, "--patience", 1, "--epochs", 6, "--lr", 1, "--sweep", "rank=1,2")
    a, b = (tune(capsys, model_dir, tmp_path / f"{n}.tsv", tmp_path / n, *words) for n in "ab")
    assert a["best"] == b["best"] is not None
    for one, two in zip(a["runs"], b["runs"], strict=True):
        assert one["validation"] == two["validation"] and one["test"] != two["test"]
        assert same(tmp_path / "a" / one["directory"], tmp_path / "b" / two["directory"])


def test_patience_keeps_the_best_epoch(capsys, model_dir, data_file, tmp_path):
    words = ("--validation", 0.25, "--patience", 1, "--epochs", 30, "--lr", 1)
    summary = tune(capsys, model_dir, data_file, tmp_path / "out", *words)
    losses = [row["validation_loss"] for row in summary["epochs"]]
    assert len(losses) < 30 and losses[-1] > min(losses)
    assert summary["validation"]["loss"] == min(losses)
    assert "test_loss" not in summary["epochs"][0], "the test rows are scored once, at the end"
    assert f"stopped early of {30}" in report.table(summary) and "accuracy, validation" in report.table(summary)


# -- bad input --------------------------------------------------------------------------------------------------------

GOOD = "".join(f"{t}\t{y}\n" for t, y in toy(40))
BAD_DATA = {
    "missing_column": ("d.tsv", "sentence\tlabel\n" + GOOD, "no column 'text'"),
    "empty_file": ("d.tsv", "", "no rows"),
    "header_only": ("d.tsv", "text\tlabel\n", "no rows"),
    "one_class": ("d.tsv", "text\tlabel\na cat\tanimal\na dog\tanimal\nthe hen\tanimal\n", "one class"),
    "ragged_row": ("d.tsv", "text\tlabel\n" + GOOD + "a cat\n", "line 42"),
    "no_label": ("d.tsv", "text\tlabel\n" + GOOD + "a cat\t\n", "row 41"),
    "too_few": ("d.tsv", "text\tlabel\na cat\tanimal\na pie\tfood\n", "too few"),
    "not_json": ("d.jsonl", '{"text": "a cat", "label": "animal"}\n{oops\n', "line 2"),
    "not_an_object": ("d.jsonl", '["a cat", "animal"]\n', "line 1"),
    "strange_name": ("d.parquet", "text\tlabel\n" + GOOD, ".tsv, .csv or .jsonl"),
    "truncated_xz": ("d.tsv.xz", "text\tlabel\n" + GOOD, ".xz"),
    "truncated_gz": ("d.tsv.gz", "text\tlabel\n" + GOOD, ".gz"),
    "strange_split": ("d.tsv", "text\tlabel\tsplit\na cat\tanimal\tleft\na pie\tfood\tright\n", "holds left, right"),
    "unseen_class": (
        "d.tsv",
        "text\tlabel\tsplit\na cat\tanimal\ttrain\na pie\tfood\ttrain\nthe sky\tplace\ttest\n",
        "'place'",
    ),
    "all_in_common": (
        "d.tsv",
        "text\tlabel\tsplit\n" + "".join(f"a cat\tanimal\t{s}\na pie\tfood\t{s}\n" for s in ("train", "test")),
        "nothing is left",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line(capsys, model_dir, tmp_path, case):
    name, text, says = BAD_DATA[case]
    path = tmp_path / name
    if "truncated" in case:
        whole = (gzip if "gz" in case else lzma).compress(text.encode())
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_text(text)
    words = ("tune", "--model", model_dir, "--data", path, "--method", "lora", "--out", tmp_path / "out")
    line = refused(capsys, tmp_path, *words)
    assert says in line and name in line


BAD_WORDS = {
    "unknown_method": (("--method", "lorra"), "expected one of"),
    "unknown_field": (("--set", "rnak=4"), "it has rank, alpha"),
    "field_without_value": (("--set", "rank"), "field=value"),
    "no_inner_method": (("--method", "gated"), "--method gated needs --set inner=..."),
    "inner_method_unknown": (("--method", "union", "--set", "members=lorra"), "--set members=lorra"),
    "field_of_wrong_type": (("--set", "rank=four"), "expected int"),
    "rank_zero": (("--set", "rank=0"), "at least 1"),
    "rank_too_large": (("--set", "rank=1000"), "at most"),
    "role_that_matches_nothing": (("--targets", "gate"), "gate"),
    "glob_that_matches_nothing": (("--targets", "*.nothing"), "matches nothing"),
    "trained_role_that_matches_nothing": (("--train", "gate"), "gate"),
    "no_data_file": (("--data", "absent.tsv"), "absent.tsv"),
    "no_parent_directory": (("--out", "absent/deep/out"), "no directory"),
    "no_model_directory": (("--model", "./absent"), "no model directory"),
    "absent_split_column": (("--split-column", "side"), "'side'"),
    "epochs_zero": (("--epochs", "0"), "--epochs 0"),
    "batch_size_zero": (("--batch-size", "0"), "--batch-size 0"),
    "accumulate_zero": (("--accumulate", "0"), "--accumulate 0"),
    "checkpoint_every_zero": (("--checkpoint-every", "0"), "--checkpoint-every 0"),
    "negative_lr": (("--lr", "-1"), "--lr -1"),
    "dropout_one": (("--model-dropout", "1"), "--model-dropout 1"),
    "threads_zero": (("--threads", "0"), "--threads 0"),
    "max_length_too_long": (("--max-length", "33"), "at most 32"),
    "max_length_zero": (("--max-length", "0"), "--max-length 0"),
    "word_for_a_number": (("--epochs", "two"), "--epochs"),
    "unknown_option": (("--epoch-count", "2"), "--epoch-count"),
    "strange_device": (("--device", "abacus"), "abacus"),
    "unknown_task": (("--task", "summarise"), "summarise"),
    "unknown_precision": (("--precision", "fp8"), "fp8"),
    "half_on_the_cpu": (("--precision", "fp16", "--device", "cpu"), "needs a GPU"),
    "validation_of_everything": (("--validation", "1"), "--validation 1.0"),
    "validation_of_too_little": (("--validation", "0.001"), "--validation 0.001"),
    "patience_without_validation": (("--patience", "2"), "--validation FRACTION"),
    "patience_zero": (("--patience", "0", "--validation", "0.1"), "--patience 0"),
    "further_data_without_name": (("--eval-data", "more.tsv"), "NAME=FILE"),
    "further_data_absent": (("--eval-data", "more=more.tsv"), "no data file more.tsv"),
    "further_data_twice": (("--eval-data", "a=b.tsv", "--eval-data", "a=c.tsv"), "name of its own"),
    "further_data_called_test": (("--eval-data", "test=b.tsv"), "name of its own"),
    "encoder_for_lm": (("--task", "lm"), "needs a causal model"),
    "encoder_for_seq2seq": (("--task", "seq2seq"), "cannot load"),
    "labels_for_lm": (("--task", "lm", "--label-column", "label"), "reads no labels"),
    "words_for_regression": (("--task", "regress"), "row 1: label"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_words_are_one_line(capsys, model_dir, data_file, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    words, says = BAD_WORDS[case]
    base = ("--model", model_dir, "--data", data_file, "--method", "lora", "--out", "out")
    assert says in refused(capsys, tmp_path, "tune", *base, *words)


def test_further_data_with_an_unknown_class_are_refused(capsys, model_dir, data_file, tmp_path):
    more = write(tmp_path / "more.tsv", [("the sky", "place"), *toy(3)])
    base = ("--model", model_dir, "--data", data_file, "--method", "lora", "--out", tmp_path / "out")
    line = refused(capsys, tmp_path, "tune", *base, "--eval-data", f"more={more}")
    assert "more.tsv" in line and "'place'" in line


def test_numbers_without_spread_are_refused(capsys, model_dir, tmp_path):
    data = write(tmp_path / "flat.tsv", [(text, "1.5") for text, _ in numbers(40)])
    base = ("--model", model_dir, "--data", data, "--method", "lora", "--out", tmp_path / "out")
    assert "every label is 1.5" in refused(capsys, tmp_path, "tune", *base, "--task", "regress")


def test_a_text_of_one_token_is_no_language(capsys, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = gpt2(tmp_path / "gpt2", **SPECIAL)
    bare = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="[UNK]", eos_token="[SEP]").save_pretrained(model)
    data = write(tmp_path / "d.tsv", [("cat", "animal"), *toy(40)])
    base = ("--model", model, "--data", data, "--method", "lora", "--out", tmp_path / "out")
    assert "text 'cat' is one token" in refused(capsys, tmp_path, "tune", *base, "--task", "lm")


def test_bad_model_directories_are_one_line(capsys, model_dir, data_file, tmp_path):
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    for file in model_dir.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[:100] if file.suffix == ".safetensors" else content)
    for path in (empty, broken):
        words = ("--data", data_file, "--method", "lora", "--out", tmp_path / "out")
        assert str(path) in refused(capsys, tmp_path, "tune", "--model", path, *words)
        assert str(path) in refused(capsys, tmp_path, "explain", path)


@pytest.mark.parametrize(("task", "module"), [("classify", "sklearn"), ("regress", "scipy"), ("seq2seq", "sacrebleu")])
def test_missing_extra_is_one_line(capsys, model_dir, data_file, tmp_path, monkeypatch, task, module):
    monkeypatch.setitem(sys.modules, module, None)
    words = ("--data", data_file, "--method", "lora", "--out", tmp_path / "out", "--task", task)
    assert 'pip install "peft-kernels[cli]"' in refused(capsys, tmp_path, "tune", "--model", model_dir, *words)
