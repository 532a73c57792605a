"""Reading data files, cutting them, and making batches."""

import gzip
import json

import pytest
import torch
from texts import bert, toy, write

from peft_kernels import hf, tasks
from peft_kernels.batches import IGNORED, Batches
from peft_kernels.data import Columns, read_data, read_test

pytest.importorskip("transformers")


def texts(rows):
    return {text for text, _ in rows}


def test_held_out_part_shares_no_text(tmp_path):
    path = tmp_path / "d.csv"
    rows = [*toy(100), *toy(100)]  # every text twice
    path.write_text("text,label\n" + "".join(f'"{t}",{y}\n' for t, y in rows))
    data = read_data(str(path))
    assert not texts(data.train) & texts(data.test)
    assert len(data.test) == 20 and len(data.train) == 160
    assert {label for _, label in data.test} == {"animal", "food"}
    assert read_data(str(path), seed=1).test != data.test


def test_given_split_drops_texts_in_common(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    rows = [(t, y, "train") for t, y in toy(40)]
    rows += [(t, y, "test") for t, y in [*toy(40)[:5], ("one ant", "animal")]]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps({"words": t, "kind": y, "part": s}) + "\n" for t, y, s in rows)
    data = read_data(str(path), Columns("words", "kind", "part"))
    assert (len(data.train), len(data.test), data.dropped) == (35, 6, 5)
    assert read_test(str(path), Columns("words", "kind", "part")) == data.test
    assert len(read_test(str(path), Columns("words", "kind"))) == 46, "no split column: all rows"


def test_validation_rows_come_from_the_training_rows_of_each_class(tmp_path):
    path = str(write(tmp_path / "d.tsv", toy(100)))
    whole, cut = read_data(path), read_data(path, validation=0.25)
    assert cut.test == whole.test
    assert texts(cut.train) | texts(cut.validation) == texts(whole.train)
    assert not texts(cut.train) & texts(cut.validation)
    for label in ("animal", "food"):
        count = sum(own == label for _, own in whole.train)
        assert sum(own == label for _, own in cut.validation) == round(0.25 * count)


def test_labels_are_optional_and_parsed(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": f"cat {n}", "label": n}) + "\n" for n in range(10)))
    data = read_data(str(path), parse=tasks.Regress.parse, by_label=False)
    assert sorted(label for _, label in data.train + data.test) == list(map(float, range(10))) and len(data.test) == 2
    assert {label for _, label in read_data(str(path), Columns(label=None), by_label=False).train} == {None}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return hf.load_for("SequenceClassification", str(bert(tmp_path_factory.mktemp("model"))))[1]


def test_batches_depend_on_seed_and_epoch_alone(tokenizer):
    rows = toy(100)
    examples = [{"input_ids": ids, "labels": 0} for ids in tokenizer([t for t, _ in rows])["input_ids"]]
    one, two = (Batches(rows, examples, tokenizer, 8, seed=0) for _ in range(2))
    assert one.shuffled() == two.shuffled() and len(one) == len(one.shuffled())
    assert sorted(i for members in one.shuffled() for i in members) == list(range(len(rows)))
    two.set_epoch(2)
    assert one.shuffled() != two.shuffled()


def test_padding_is_masked_in_inputs_and_labels(tokenizer):
    examples = [{"input_ids": [5, 6], "labels": [7]}, {"input_ids": [5, 6, 8, 9], "labels": [7, 8, 9]}]
    batch = Batches([], examples, tokenizer, 2, seed=0).collate([0, 1])
    assert torch.equal(batch["input_ids"], torch.tensor([[5, 6, 0, 0], [5, 6, 8, 9]]))
    assert torch.equal(batch["attention_mask"], torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
    assert torch.equal(batch["labels"], torch.tensor([[7, IGNORED, IGNORED], [7, 8, 9]]))


def test_model_dropout_reaches_every_dropout(tmp_path):
    directory = bert(tmp_path / "model")
    for p in (0.0, 0.25):
        model, _ = hf.load_for("SequenceClassification", str(directory), dropout=p)
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {p}
