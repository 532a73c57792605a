"""merge, explain and check on tiny saved models: what they write and say, what they refuse."""

import json

import pytest
import torch
from models import make, perturb
from safetensors.torch import load_file
from texts import WORDS, refused, run, save_tokenizer

import peft_kernels as pk
from peft_kernels import check, hf
from peft_kernels.engine.attach import tuners

transformers = pytest.importorskip("transformers")

OPS = pk.ops.all_ops()


def saved(family, where, dtype=torch.float32):
    """A tiny model of the family in a directory of its own."""
    make(family, dtype).model.save_pretrained(where)
    return where


def adapter_of(source, cls, where, method=None, targets=None, train=(), **settings):
    """(logits of the adapted model, token ids, where its adapter was saved) of a model loaded from `source`."""
    torch.manual_seed(3)
    model = getattr(transformers, cls).from_pretrained(source, **settings)
    perturb(pk.attach(model, method or pk.LoRA(rank=2), targets, train=train))
    pk.save(model, where)
    tokens = hf.random_tokens(model)
    with torch.no_grad():
        return model.eval()(**tokens)[0], tokens


def merged(capsys, adapter, out, *more):
    code, text, err = run(capsys, "merge", "--adapter", adapter, "--out", out, "--json", *more)
    assert (code, err) == (0, "")
    return json.loads(text)


def reloaded(cls, where, tokens):
    with torch.no_grad():
        return getattr(transformers, cls).from_pretrained(where)(**tokens)[0]


# -- merge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "auto"),
    [("gpt2", "AutoModelForCausalLM"), ("llama", "AutoModelForCausalLM"), ("t5", "AutoModelForSeq2SeqLM")],
)
def test_a_merged_model_is_the_adapted_one_in_plain_transformers(capsys, tmp_path, family, auto):
    source = saved(family, tmp_path / "base")
    logits, tokens = adapter_of(source, auto, tmp_path / "adapter")
    report = merged(capsys, tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(reloaded(auto, tmp_path / "out", tokens), logits, atol=1e-5, rtol=1e-5)
    assert report["logits"]["difference"] < 1e-5 < report["logits"]["largest"]
    assert report["model"] == str(source) and report["merge"]["modules"] > 0 and report["dtype"] == "float32"
    assert set(report["files"]) == {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "merge.json"} <= set(report["files"])
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == report
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"], "a temporary directory was left"


def test_a_classifier_comes_out_with_its_head_labels_and_tokenizer(capsys, tmp_path):
    """The base is a bare encoder: class, labels and padding come from the adapter's config, the head from its file."""
    config = transformers.GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=16)
    config.eos_token_id, config.bos_token_id = 3, 2
    transformers.GPT2Model(config).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", eos_token="[SEP]")
    labels = ["animal", "food", "tool"]
    named = dict(id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})
    model, _ = hf.load_for("SequenceClassification", str(tmp_path / "base"), num_labels=3, **named)
    perturb(pk.attach(model, pk.LoRA(rank=2), train=("head",)))
    pk.save(model, tmp_path / "adapter")
    tokens = hf.random_tokens(model)
    with torch.no_grad():
        logits = model.eval()(**tokens).logits

    code, text, _ = run(capsys, "merge", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert code == 0 and "GPT2ForSequenceClassification in float32" in text
    out = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(out(**tokens).logits, logits, atol=1e-5, rtol=1e-5)
    assert out.config.id2label == {0: "animal", 1: "food", 2: "tool"} and out.config.pad_token_id == 3
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        tokenizer("the cat").input_ids
        == transformers.AutoTokenizer.from_pretrained(tmp_path / "base")("the cat").input_ids
    )
    assert tokenizer.pad_token == "[SEP]"


def test_what_structured_pruning_left_comes_out_small(capsys, tmp_path):
    saved("llama", tmp_path / "base")
    adapter_of(
        tmp_path / "base",
        "AutoModelForCausalLM",
        tmp_path / "adapter",
        pk.StructuredPruning(neurons=0.25, score="magnitude"),
    )
    whole = merged(capsys, tmp_path / "adapter", tmp_path / "whole")
    report = merged(capsys, tmp_path / "adapter", tmp_path / "small", "--small")
    assert report["logits"]["difference"] < 1e-5 < report["logits"]["largest"]
    assert report["bytes"]["model"] < whole["bytes"]["model"]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "small").intermediate_size == 6
    adapter_of(tmp_path / "base", "AutoModelForCausalLM", tmp_path / "lora", pk.LoRA(rank=2))
    code, _, err = run(capsys, "merge", "--adapter", tmp_path / "lora", "--out", tmp_path / "no", "--small")
    assert code == 2 and "nothing is pruned by default" in err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(("base", "asked"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")])
def test_dtype_is_that_of_the_weights_and_rounds_once(capsys, tmp_path, base, asked):
    saved("llama", tmp_path / "base", base)
    adapter_of(tmp_path / "base", "AutoModelForCausalLM", tmp_path / "adapter")
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    pk.merge(pk.load(wide, tmp_path / "adapter"), stash=False)
    expected = {k: v.to(getattr(torch, asked)) for k, v in pk.detach(wide).state_dict().items()}
    assert merged(capsys, tmp_path / "adapter", tmp_path / "out", "--dtype", asked)["dtype"] == asked
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() <= expected.keys()
    for name, value in written.items():
        assert torch.equal(value, expected[name]), name
    same = merged(capsys, tmp_path / "adapter", tmp_path / "same")
    assert same["dtype"] == str(base)[6:]


def test_full_tuning_merges_into_another_directory_given_by_name(capsys, tmp_path):
    saved("bert", tmp_path / "base")
    logits, tokens = adapter_of(
        tmp_path / "base", "BertForSequenceClassification", tmp_path / "adapter", pk.FullTuning()
    )
    (tmp_path / "base").rename(tmp_path / "moved")
    words = ("merge", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert "base" in refused(capsys, tmp_path, *words)
    merged(capsys, tmp_path / "adapter", tmp_path / "out", "--model", tmp_path / "moved")
    out = reloaded("BertForSequenceClassification", tmp_path / "out", tokens)
    torch.testing.assert_close(out, logits, atol=1e-5, rtol=1e-5)


def test_force_replaces_a_merged_model_only(capsys, tmp_path):
    saved("gpt2", tmp_path / "base")
    adapter_of(tmp_path / "base", "AutoModelForCausalLM", tmp_path / "adapter")
    merged(capsys, tmp_path / "adapter", tmp_path / "out")
    words = ("merge", "--adapter", tmp_path / "adapter", "--out")
    assert "--force" in refused(capsys, tmp_path, *words, tmp_path / "out")
    assert "merge.json" in refused(capsys, tmp_path, *words, tmp_path / "base", "--force")
    assert (
        merged(capsys, tmp_path / "adapter", tmp_path / "out", "--force", "--dtype", "bfloat16")["dtype"] == "bfloat16"
    )


def test_biases_that_the_class_has_no_place_for_are_refused(capsys, tmp_path):
    saved("llama", tmp_path / "base")
    adapter_of(tmp_path / "base", "AutoModelForCausalLM", tmp_path / "adapter", pk.BitFit())
    words = ("merge", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert "biases" in refused(capsys, tmp_path, *words)


def test_a_head_that_nobody_holds_is_refused(capsys, tmp_path):
    """Else the merged model would have a random one."""
    make("bert").model.bert.save_pretrained(tmp_path / "base")
    adapter_of(tmp_path / "base", "BertForSequenceClassification", tmp_path / "adapter", num_labels=3)
    words = ("merge", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert "classifier.bias" in refused(capsys, tmp_path, *words)


def test_what_cannot_be_merged_is_one_line(capsys, tmp_path, monkeypatch):
    saved("gpt2", tmp_path / "base")
    adapter_of(tmp_path / "base", "AutoModelForCausalLM", tmp_path / "adapter")
    words = ("merge", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert "holds no adapter" in refused(capsys, tmp_path, "merge", "--adapter", tmp_path, "--out", tmp_path / "out")
    saved("llama", tmp_path / "other")
    assert "made for a gpt2 model" in refused(capsys, tmp_path, *words, "--model", tmp_path / "other")
    assert "--dtype" in refused(capsys, tmp_path, *words, "--dtype", "int8")
    wide = make("gpt2").model
    wide.transformer.ln_f.weight.data[0] = 1e6
    wide.save_pretrained(tmp_path / "wide")
    large = (*words, "--model", tmp_path / "wide", "--dtype", "float16")
    assert "too large for torch.float16" in refused(capsys, tmp_path, *large)
    monkeypatch.setattr(pk.LoRA.tuner, "mergeable", False)
    assert "no weight-space form" in refused(capsys, tmp_path, *words)


def test_an_adapter_that_names_no_model_asks_for_it(capsys, tmp_path):
    pk.save(pk.attach(make("gpt2").model, pk.LoRA(rank=2)), tmp_path / "adapter")
    words = ("merge", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert "--model" in refused(capsys, tmp_path, *words)
    assert "--model" in refused(capsys, tmp_path, "explain", tmp_path / "adapter")


def test_a_class_of_ones_own_is_refused(capsys, tmp_path):
    class Mine(transformers.GPT2LMHeadModel):
        pass

    saved("gpt2", tmp_path / "base")
    pk.save(pk.attach(Mine.from_pretrained(tmp_path / "base"), pk.LoRA(rank=2)), tmp_path / "adapter")
    words = ("merge", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert "Mine" in refused(capsys, tmp_path, *words)


# -- explain ----------------------------------------------------------------------------------------------------------


def test_explain_a_model(capsys, tmp_path):
    source = saved("bert", tmp_path / "base")
    code, out, _ = run(capsys, "explain", source, "--json")
    report = json.loads(out)
    assert code == 0 and len(report["kernels"]) == 4 and report["adapter"][0]["method"] == "lora"
    assert report["kernels"][0].keys() == {"site", "adapter", "op", "backend", "reasons"}
    code, out, _ = run(capsys, "explain", source, "--method", "bitfit", "--targets", "q", "v")
    assert code == 0 and out.startswith("bitfit on q v\n") and "trainable" in out and "backend" in out
    assert "has no adapter_config.json" in refused(capsys, tmp_path, "explain", source, "--model", source)
    assert report["not_ready"] == ""
    code, out, _ = run(capsys, "explain", source, "--method", "fishmask", "--targets", "q")
    assert code == 0 and "FishMask has no mask yet; call pk.calibrate(model, batches) first\n" in out
    assert report["factors"] == []
    code, out, _ = run(capsys, "explain", source, "--method", "svd", "--set", "rank=3", "--targets", "q")
    assert code == 0 and "\nbert.encoder.layer.0.attention.self.query  3 <= 7       96  256  0." in out


def test_explain_an_adapter(capsys, tmp_path):
    source = saved("bert", tmp_path / "base")
    method = pk.LoRA(rank=3)
    adapter_of(source, "BertForSequenceClassification", tmp_path / "adapter", method, ("q", "o"), ("head",))
    code, out, _ = run(capsys, "explain", tmp_path / "adapter", "--json")
    report = json.loads(out)
    assert code == 0 and report["model"] == str(source)
    assert [(p["method"], p["targets"]) for p in report["adapter"]] == [("lora", ["q", "o"]), ("head", ["head"])]
    assert report["adapter"][0]["rank"] == 3
    model = transformers.BertForSequenceClassification.from_pretrained(source)
    pk.load(model, tmp_path / "adapter", trainable=True)
    assert report["counts"]["trainable"] == pk.counts(model).trainable > 0
    assert {row["site"] for row in report["kernels"]} == {path for path, _ in tuners(model, "default")}
    (tmp_path / "base").rename(tmp_path / "moved")
    text = run(capsys, "explain", tmp_path / "adapter", "--model", tmp_path / "moved")[1]
    assert text.startswith("lora on q o: rank=3, alpha=16.0, ") and "\nhead on head\n" in text
    assert "says its method" in refused(capsys, tmp_path, "explain", tmp_path / "adapter", "--method", "ia3")


# -- check ------------------------------------------------------------------------------------------------------------


def test_check_passes_here(capsys):
    code, out, _ = run(capsys, "check", "--json")
    results = json.loads(out)
    assert code == 0
    here = {(r["op"], r["backend"]) for r in results if r["state"] == "ok"}
    assert here >= {(op, backend) for op in OPS for backend in ("cpu", "reference")}
    for r in results:
        assert r["dtype"] in ("float32", "bfloat16", "float16") and r["ratio"] <= 1 if r["state"] == "ok" else r["why"]
    assert {r["backend"] for r in results} == {"cpu", "reference", "cuda", "triton"}


def test_check_runs_what_it_is_asked_for(capsys):
    code, out, _ = run(capsys, "check", "--op", "rescale", "--backend", "cpu", "triton")
    lines = [line.split() for line in out.splitlines()[1:-2]]
    assert code == 0 and [line[:3] for line in lines] == [["rescale", "cpu", "cpu"], ["rescale", "triton", "cuda"]]
    assert lines[0][-1] == "ok" and "0 of 3 failed" in out
    assert "expected one of" in run(capsys, "check", "--op", "nonsense")[2]
    assert run(capsys, "check", "--backend", "nonsense")[0] == 2


def _crash(out):
    raise RuntimeError("illegal instruction")


BROKEN = {
    "forward": ("rescale", lambda out: out * 1.1, "float32 one_row, output 0: error"),
    "auxiliary": ("lora_add", lambda out: (out[0], out[1] + 1), "output 1: error"),
    "backward": ("rescale_backward", lambda out: (out[0], -out[1]), "gradient 1: error"),
    "nan": ("rescale", lambda out: torch.full_like(out, torch.nan), "not finite"),
    "shape": ("rescale", lambda out: out[..., :-1], "shape (1, 15), expected (1, 16)"),
    "dtype": ("rescale", lambda out: out.double(), "dtype torch.float64"),
    "too_many": ("rescale", lambda out: (out, out), "ValueError"),
    "crash": ("rescale", _crash, "RuntimeError: illegal instruction"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_check_finds_a_broken_backend(capsys, monkeypatch, case):
    broken, change, says = BROKEN[case]
    family = broken.removesuffix("_backward")
    OPS[broken].backends("cpu")  # loads them
    (kernel,) = [k for k in OPS[broken]._kernels["cpu"] if k.name == "cpu"]
    bad = kernel._replace(run=lambda *args: change(kernel.run(*args)), run_=None)
    monkeypatch.setitem(OPS[broken]._kernels, "cpu", [bad])
    code, out, _ = run(capsys, "check", "--op", family, "--backend", "cpu", "reference")
    line, reference = out.splitlines()[1:3]
    assert code == 1 and "FAILED: float32 " in line and says in line
    assert reference.endswith("ok") and "3 of 6 failed" in out
    assert any(r["state"] == "failed" for r in json.loads(run(capsys, "check", "--op", family, "--json")[1]))


def test_check_finds_a_broken_form_in_place(monkeypatch):
    OPS["lora_add"].backends("cpu")
    (kernel,) = [k for k in OPS["lora_add"]._kernels["cpu"] if k.name == "cpu"]
    bad = kernel._replace(run_=lambda y, *rest: (y, kernel.run(y, *rest)[1]))  # forgets to add
    monkeypatch.setitem(OPS["lora_add"]._kernels, "cpu", [bad])
    results = list(check.check(OPS["lora_add"], ["cpu"]))
    assert [r.state for r in results] == ["failed"] * 3
    assert all("output in place 0: error" in r.why for r in results)


def test_check_reports_what_a_backend_refuses(monkeypatch):
    OPS["rescale"].backends("cpu")
    (kernel,) = [k for k in OPS["rescale"]._kernels["cpu"] if k.name == "cpu"]

    def only_matrices_in_fp32(x, l):
        return "" if x.dtype == torch.float32 and x.dim() == 2 else "not here"

    monkeypatch.setitem(OPS["rescale"]._kernels, "cpu", [kernel._replace(why_not=only_matrices_in_fp32)])
    results = list(check.check(OPS["rescale"], ["cpu"]))
    assert [(r.dtype, r.state) for r in results] == [("float32", "ok"), ("bfloat16", "absent"), ("float16", "absent")]
    assert all("not here" in r.why for r in results)
    assert check.rows(results)[1][-1].startswith("ok; rescale: backend 'cpu' refused")
