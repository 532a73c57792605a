"""The command line on a tiny random BERT and a toy data set: what it writes, what it says, what it refuses."""

import json
import random

import pytest
import torch

import peft_kernels as pk
from peft_kernels import cli, hf, train

pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

ANIMALS, FOODS = ["cat", "dog", "cow", "hen", "ant", "bee"], ["pie", "jam", "rye", "tea", "soup", "rice"]
FILLER = ["the", "one", "big", "old"]
WRITTEN = {"adapter_config.json", "adapter_model.safetensors", "log.jsonl", "curves.png", "summary.json"}


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *ANIMALS, *FOODS, *FILLER]


def save_tokenizer(directory, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special).save_pretrained(directory)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    from transformers import BertConfig, BertModel

    directory = tmp_path_factory.mktemp("model")
    save_tokenizer(directory, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.1,  # wider than usual: random features that a few steps can put to use
    )
    BertModel(config).save_pretrained(directory)
    return directory


def toy(n=160, seed=0):
    """Unique texts with one animal or one food among filler words."""
    rng = random.Random(seed)
    rows = {}
    while len(rows) < n:
        label = rng.choice(["animal", "food"])
        words = [rng.choice(FILLER) for _ in range(rng.randint(2, 6))]
        words.insert(rng.randint(0, len(words)), rng.choice(ANIMALS if label == "animal" else FOODS))
        rows[" ".join(words)] = label
    return list(rows.items())


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "toy.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in toy()))
    return path


def run(capsys, *words):
    """(exit code, stdout, stderr) of one command."""
    capsys.readouterr()
    try:
        code = cli.main([str(w) for w in words])
    except SystemExit as stop:  # argparse
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def tune(capsys, model_dir, data_file, out, *more):
    options = ("--method", "lora", "--epochs", 2, "--batch-size", 16, "--json")
    return run(capsys, "tune", "--model", model_dir, "--data", data_file, "--out", out, *options, *more)


def refused(capsys, tmp_path, *words):
    """The one line of a refusal that left nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("peft-kernels"), err
    assert sorted(tmp_path.rglob("*")) == before
    return err


# -- tune -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(model_dir, data_file, tmp_path_factory):
    """(summary, directory) of one run."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    method = cli.method_from("lora", ["rank=4", "alpha=8"])
    job = train.Job(
        str(model_dir), str(data_file), method, str(out), epochs=12, batch_size=8, lr=1e-2, model_dropout=0.0
    )
    return train.tune(job, progress=False), out


def test_tune_writes_everything(tuned):
    summary, out = tuned
    assert {p.name for p in out.iterdir()} == WRITTEN
    assert json.loads((out / "summary.json").read_text()) == summary
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = -(-summary["data"]["train"] // 8)
    assert sum("step" in row for row in log) == 12 * steps and sum("accuracy" in row for row in log) == 12
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [p for p in out.parent.iterdir() if p != out], "a temporary directory was left"


def test_tune_reports_what_is_true(tuned):
    summary, out = tuned
    assert summary["data"]["train"] + summary["data"]["test"] == 160 and summary["data"]["test"] == 32
    assert summary["accuracy"]["tuned"] > 0.8 and summary["probe"]["converged"]
    assert summary["counts"]["trainable"] == summary["counts"]["stored"]
    assert summary["merge"]["merged"] and summary["merge"]["same"] == summary["merge"]["of"] == 32
    assert summary["adapter_bytes"] == (out / "adapter_model.safetensors").stat().st_size
    for word in ("linear probe", "tuned", "trainable", "adapter file", "peak memory", "32 of 32"):
        assert word in train.table(summary)


def test_adapter_reloads_into_a_fresh_model(tuned, model_dir, data_file):
    summary, out = tuned
    torch.manual_seed(99)  # another random head than the run began with: the saved one must replace it
    model, tokenizer = hf.load_classifier(str(model_dir), summary["data"]["classes"])
    pk.load(model, out)
    rows = train.read_data(str(data_file)).test
    test = train.Batches(rows, tokenizer, max_length=32, batch_size=8, seed=0)
    assert train.accuracy(train.logits(model, test), test.labels) == summary["accuracy"]["tuned"]


def test_same_seed_same_numbers(capsys, model_dir, data_file, tmp_path):
    runs = [json.loads(tune(capsys, model_dir, data_file, tmp_path / name)[1]) for name in "ab"]
    assert runs[0]["epochs"] == runs[1]["epochs"] and runs[0]["probe"] == runs[1]["probe"]


def test_prints_json_or_one_table(capsys, model_dir, data_file, tmp_path):
    code, out, _ = tune(capsys, model_dir, data_file, tmp_path / "a", "--set", "rank=2", "--targets", "q", "o")
    assert code == 0 and json.loads(out)["method"]["rank"] == 2 and json.loads(out)["targets"] == ["q", "o"]
    options = ("--data", data_file, "--method", "bitfit", "--out", tmp_path / "b")
    code, out, _ = run(capsys, "tune", "--model", model_dir, *options)
    assert code == 0 and out.startswith("bitfit on ") and "merged model" in out


@pytest.mark.parametrize("method", pk.methods())
def test_tune_offers_every_method(capsys, model_dir, data_file, tmp_path, method):
    code, out, err = tune(capsys, model_dir, data_file, tmp_path / "out", "--method", method, "--epochs", 1)
    assert code == 0, err
    assert json.loads(out)["method"]["method"] == method


def test_tune_takes_a_decoder_without_padding_token(capsys, data_file, tmp_path):
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=2, n_positions=32, eos_token_id=3)
    GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2", eos_token="[SEP]")
    code, out, err = tune(capsys, tmp_path / "gpt2", data_file, tmp_path / "out")
    assert code == 0, err
    assert json.loads(out)["merge"]["same"] == 32


def test_existing_output_needs_force(capsys, model_dir, data_file, tmp_path):
    out = tmp_path / "out"
    assert tune(capsys, model_dir, data_file, out)[0] == 0
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    words = ("tune", "--model", model_dir, "--data", data_file, "--method", "lora", "--out", out)
    assert "--force" in refused(capsys, tmp_path, *words)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    assert tune(capsys, model_dir, data_file, out, "--force", "--seed", 1)[0] == 0
    assert json.loads((out / "summary.json").read_text())["settings"]["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_replaces_results_only(capsys, model_dir, data_file, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years of work")
    words = ("tune", "--model", model_dir, "--data", data_file, "--method", "lora", "--force")
    assert "summary.json" in refused(capsys, tmp_path, *words, "--out", tmp_path / "precious")


def test_interrupt_leaves_nothing(capsys, model_dir, data_file, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", stop)
    code, out, err = tune(capsys, model_dir, data_file, tmp_path / "out")
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert not list(tmp_path.iterdir())


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
    "strange_split": ("d.tsv", "text\tlabel\tsplit\na cat\tanimal\tleft\na pie\tfood\tright\n", "'split'"),
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
        import gzip
        import lzma

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
    "field_of_wrong_type": (("--set", "rank=four"), "expected int"),
    "rank_zero": (("--set", "rank=0"), "at least 1"),
    "rank_too_large": (("--set", "rank=1000"), "at most"),
    "role_that_matches_nothing": (("--targets", "gate"), "gate"),
    "glob_that_matches_nothing": (("--targets", "*.nothing"), "matches nothing"),
    "no_data_file": (("--data", "absent.tsv"), "absent.tsv"),
    "no_parent_directory": (("--out", "absent/deep/out"), "no directory"),
    "no_model_directory": (("--model", "./absent"), "no model directory"),
    "absent_split_column": (("--split-column", "side"), "'side'"),
    "epochs_zero": (("--epochs", "0"), "--epochs 0"),
    "batch_size_zero": (("--batch-size", "0"), "--batch-size 0"),
    "negative_lr": (("--lr", "-1"), "--lr -1"),
    "dropout_one": (("--model-dropout", "1"), "--model-dropout 1"),
    "threads_zero": (("--threads", "0"), "--threads 0"),
    "max_length_too_long": (("--max-length", "33"), "at most 32"),
    "max_length_zero": (("--max-length", "0"), "--max-length 0"),
    "word_for_a_number": (("--epochs", "two"), "--epochs"),
    "unknown_option": (("--epoch-count", "2"), "--epoch-count"),
    "strange_device": (("--device", "abacus"), "abacus"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_bad_words_are_one_line(capsys, model_dir, data_file, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    words, says = BAD_WORDS[case]
    base = ("--model", model_dir, "--data", data_file, "--method", "lora", "--out", "out")
    assert says in refused(capsys, tmp_path, "tune", *base, *words)


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


def test_missing_extra_is_one_line(capsys, model_dir, data_file, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    words = ("--data", data_file, "--method", "lora", "--out", tmp_path / "out")
    assert 'pip install "peft-kernels[cli]"' in refused(capsys, tmp_path, "tune", "--model", model_dir, *words)


# -- data -------------------------------------------------------------------------------------------------------------


def test_held_out_part_shares_no_text(tmp_path):
    path = tmp_path / "d.csv"
    rows = [*toy(100), *toy(100)]  # every text twice
    path.write_text("text,label\n" + "".join(f'"{t}",{y}\n' for t, y in rows))
    data = train.read_data(str(path))
    assert not {t for t, _ in data.train} & {t for t, _ in data.test}
    assert len(data.test) == 20 and len(data.train) == 160 and data.classes == ["animal", "food"]
    assert train.read_data(str(path), seed=1).test != data.test


def test_given_split_drops_texts_in_common(tmp_path):
    import gzip

    path = tmp_path / "d.jsonl.gz"
    rows = [(t, y, "train") for t, y in toy(40)]
    rows += [(t, y, "test") for t, y in [*toy(40)[:5], ("one ant", "animal")]]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"words": t, "kind": y, "part": s}) + "\n" for t, y, s in rows)
    data = train.read_data(str(path), "words", "kind", "part")
    assert (len(data.train), len(data.test), data.dropped) == (35, 6, 5)


def test_batches_depend_on_seed_and_epoch_alone(model_dir, data_file):
    rows = train.read_data(str(data_file)).train
    _, tokenizer = hf.load_classifier(str(model_dir), ["animal", "food"])
    one, two = (train.Batches(rows, tokenizer, max_length=32, batch_size=8, seed=0) for _ in range(2))
    assert one.shuffled() == two.shuffled() and len(one) == len(one.shuffled())
    assert sorted(i for members in one.shuffled() for i in members) == list(range(len(rows)))
    two.set_epoch(2)
    assert one.shuffled() != two.shuffled()


def test_model_dropout_reaches_every_dropout(model_dir):
    for p in (0.0, 0.25):
        model, _ = hf.load_classifier(str(model_dir), ["animal", "food"], dropout=p)
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {p}


# -- the other commands -----------------------------------------------------------------------------------------------


def test_info(capsys):
    code, out, _ = run(capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["torch"] == torch.__version__
    assert facts["ops"].keys() == pk.ops.all_ops().keys()
    assert all(backends["reference"] == "" for backends in facts["ops"].values())
    assert "reference" in run(capsys, "info")[1]


def test_methods(capsys):
    code, out, _ = run(capsys, "methods", "--json")
    assert code == 0 and [m["key"] for m in json.loads(out)] == list(pk.methods())
    text = run(capsys, "methods")[1]
    assert all(key in text for key in pk.methods()) and "rank=8" in text


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (int, "3", 3),
        (float, "1e-3", 1e-3),
        (bool, "true", True),
        (bool, "0", False),
        (str, "relu", "relu"),
        (int | None, "none", None),
        (int | None, "3", 3),
        (str | float, "0.5", 0.5),
        (tuple[str, ...], "q,v", ("q", "v")),
        (tuple[int, ...], "[1, 2]", (1, 2)),
        (dict[str, int], '{"q": 4}', {"q": 4}),
    ],
)
def test_field_values_follow_their_type(hint, text, value):
    got = cli.parse(hint, text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("hint", "text"), [(int, "2.5"), (bool, "perhaps"), (int | None, "x"), (dict[str, int], "[1]")]
)
def test_field_values_of_another_type_are_refused(hint, text):
    with pytest.raises((ValueError, TypeError)):
        cli.parse(hint, text)


def test_import_stays_light():
    """What only the command line needs is not imported with the package."""
    import subprocess
    import sys

    heavy = "{'transformers', 'sklearn', 'matplotlib'}"
    code = f"import sys, peft_kernels; print({heavy} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout.strip(), ran.stderr) == ("set()", "")
