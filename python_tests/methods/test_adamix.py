"""AdaMix: which expert a pass draws, the term of the second pass, and the mean that is left."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from models import close, make
from safetensors.torch import load_file
from torch import nn

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.losses import symmetric_kl
from peft_kernels.methods.adamix import AdaMixTuner

NAMES = ("down_weight", "down_bias", "up_weight", "up_bias")


def found(model):
    return [t for _, t in tuners(model, "default") if isinstance(t, AdaMixTuner)]


def scattered(model, std=0.1, seed=3):
    """Experts that are far from each other, and up-projections that are not zero."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in found(model):
            for p in t.parameters():
                p.copy_(torch.randn(p.shape, generator=made, dtype=torch.float64) * std)
    return model


def mlp(dtype=torch.float64, **fields):
    model = make("mlp", dtype).model
    pk.attach(model, pk.AdaMix(**{"size": 4, "experts": 3, **fields}), ("first", "second"), train=("out",))
    return scattered(model, 0.5)


def texts(n=6):
    ids = torch.randint(3, 50, (n, 7), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": t, "labels": t[:, 0] % 3} for t in ids.split(2)]


def expert(adapter, h, down, up):
    """What one expert makes of h; of a shared projection there is one."""

    def of(name, number):
        p = getattr(adapter, name)
        return p if p.dim() == (1 if name.endswith("bias") else 2) else p[number]

    a = F.linear(h, of("down_weight", down), of("down_bias", down))
    a = a if adapter.activation == "identity" else F.gelu(a)
    return h + F.linear(a, of("up_weight", up), of("up_bias", up))


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_counts_of_the_paper():
    """RoBERTa-large: in each of 24 layers 4 down-projections of 16 x 1024 + 16, and one up of 1024 x 16 + 1024."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    with torch.device("meta"):
        model = RobertaModel(config)
    method = pk.AdaMix()
    pk.attach(model, method)
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == 1_992_192
    assert [(p.name, p.steps) for p in method.phases(100)] == [("train", 100), ("average", 0)]
    method.enter(found(model), "average")
    counts = pk.counts(model)
    assert counts.trainable == counts.stored == 811_392
    for fields, total in (({"share_up": False}, 4 * 811_392), ({"experts": 1}, 811_392)):
        pk.attach(pk.detach(model), pk.AdaMix(**fields))
        assert pk.counts(model).trainable == total


def test_experts_differ_and_the_model_starts_as_it_was():
    case = make("bert")
    before = case.call(case.model)
    pk.attach(case.model, pk.AdaMix(size=4, share_up=False))
    for t in found(case.model):
        down = t.adapter.down_weight
        assert down.shape == (4, 4, 16) and len(down[:, 0, 0].unique()) == 4
        assert t.adapter.up_weight.shape == (4, 16, 4) and not t.adapter.up_weight.any()
    for mode in (True, False):
        for m in case.model.modules():
            if isinstance(m, AdaMixTuner):
                m.train(mode)
        torch.testing.assert_close(case.call(case.model), before)


# -- draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["up", "down", "nothing"])
def test_a_pass_runs_one_expert_of_each_projection(shared):
    model = mlp(share_up=shared == "up", share_down=shared == "down")
    adapter, h = found(model)[0].adapter, torch.randn(5, 20, dtype=torch.float64)
    numbers = {"up": [(i, 0) for i in range(3)], "down": [(0, i) for i in range(3)]}
    choices = numbers.get(shared, [(i, j) for i in range(3) for j in range(3)])
    outputs = [expert(adapter, h, *c) for c in choices]
    adapter.train()
    seen = []
    for _ in range(90):
        y = adapter(h)
        seen.append(next(i for i, o in enumerate(outputs) if torch.allclose(o, y)))
    assert set(seen) == set(range(len(choices))), "each is drawn, of both projections independently"
    with torch.no_grad():
        adapter.eval()
        before = adapter(h)
        adapter.average()
    assert torch.equal(adapter(h), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_repeats_the_draw(reentrant):
    """Gradients of a checkpointed model are those of a plain one with the same seed, and others with another."""
    case = make("bert")
    pk.attach(case.model, pk.AdaMix(size=4, share_up=False, dropout=0.25), seed=1)
    scattered(case.model).train()
    assert any(m.p > 0 for m in case.model.modules() if isinstance(m, nn.Dropout))

    def gradients(seed):
        case.model.zero_grad()
        torch.manual_seed(seed)
        case.loss(case.model).backward()
        return [p.grad.clone() for t in found(case.model) for p in t.parameters()]

    plain, other = gradients(7), gradients(8)
    enable = getattr(case.model, "activation_checkpointing_enable", None) or case.model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        case.model.enable_input_require_grads()
    runs = []
    handle = found(case.model)[0].register_forward_hook(lambda *_: runs.append(1))
    again = gradients(7)
    handle.remove()
    assert len(runs) == 2, "forward and recomputation"
    for a, b in zip(plain, again, strict=True):
        close(b, a)
    assert any(not torch.allclose(a, b) for a, b in zip(plain, other, strict=True))
    for t in found(case.model):  # one expert of each projection has a gradient in a pass
        for name in NAMES:
            grad = getattr(t.adapter, name).grad.flatten(1).abs().sum(1)
            assert int((grad > 0).sum()) <= 1


# -- consistency ------------------------------------------------------------------------------------------------------


class Saying(nn.Module):
    """Says the given logits, one after the other."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = [torch.tensor(own, dtype=torch.float64, requires_grad=True) for own in logits]
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.logits[self.calls - 1]


def test_the_term_of_the_second_pass():
    first, second = [[0.0, 0.0]], [[0.0, math.log(3)]]
    for weight in (1.0, 100.0):
        model, batch = Saying(first, second), (torch.zeros(1, 1), torch.zeros(1))
        term = pk.AdaMix(consistency=weight).loss(model, batch, model(batch[0]))
        assert model.calls == 2 and term.item() == pytest.approx(weight * 0.1373265, abs=1e-7 * weight)
        term.backward()
        p, q = (torch.tensor(own, dtype=torch.float64).softmax(-1) for own in (first, second))
        for logits, expected in zip(model.logits, (p - q, q - p), strict=True):  # the other one stands still
            torch.testing.assert_close(logits.grad, weight * expected / 2)
    for method, logits in ((pk.AdaMix(consistency=0.0), first), (pk.AdaMix(), [[0.5]])):
        model = Saying(logits, logits)
        assert method.loss(model, batch, model(batch[0])) is None and model.calls == 1


def test_positions_without_a_label_do_not_count():
    """The loss of a padded batch is that of its rows apart, weighted by how many tokens they predict."""
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    labels, lengths = ids.clone(), (7, 4)
    labels[1, 4:] = -100
    case = make("gpt2", torch.float64)
    method = pk.AdaMix(size=4)
    pk.attach(case.model, method)
    scattered(case.model).eval()
    moved = []

    def move(module, args, outputs):
        outputs.logits = outputs.logits * (0.5 if moved else 1.0)

    case.model.register_forward_hook(move)

    def term(rows, n):
        batch = {"input_ids": ids[rows, :n], "labels": labels[rows, :n], "attention_mask": (labels != -100)[rows, :n]}
        moved.clear()
        outputs = case.model(**batch)
        moved.append(1)  # the second pass predicts something else
        return method.loss(case.model, batch, outputs)

    apart = [term(slice(i, i + 1), n) * (n - 1) for i, n in enumerate(lengths)]
    torch.testing.assert_close(term(slice(0, 2), 7), sum(apart) / sum(n - 1 for n in lengths))


def test_a_training_takes_both_passes_with_draws_of_their_own():
    calls = []
    for weight, passes in ((1.0, 2), (0.0, 1)):
        model = make("bert").model
        pk.attach(model, pk.AdaMix(size=4, consistency=weight), train=("head",))
        scattered(model)
        handle = model.register_forward_hook(lambda m, args, out: calls.append(out.logits.detach()))
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
        log = pk.fit(model, texts()[:1], progress=False, seed=2)
        handle.remove()
        assert len(calls) == passes
        if passes == 2:
            assert not torch.allclose(*calls)
            loss = F.cross_entropy(calls[0], texts()[0]["labels"]) + symmetric_kl(*calls)
            assert log[1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        calls.clear()


# -- the mean ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["up", "down"])
def test_averaging_is_exact_where_it_is_linear(shared):
    """Without a nonlinearity and with one projection shared, the mean's output is the mean of the outputs."""
    model = mlp(share_up=shared == "up", share_down=shared == "down", activation="identity")
    adapter, h = found(model)[0].adapter, torch.randn(5, 20, dtype=torch.float64)
    each = [expert(adapter, h, i, i) for i in range(3)]
    close(adapter(h), sum(each) / 3, torch.float64)
    curved = mlp(share_up=shared == "up", share_down=shared == "down")
    adapter = found(curved)[0].adapter
    each = sum(expert(adapter, h, i, i) for i in range(3)) / 3
    assert torch.allclose(adapter(h), each) == (shared == "down"), "a shared down-projection comes before what bends"


def test_fit_leaves_the_mean_that_evaluation_has_run(tmp_path):
    model = make("bert").model
    pk.attach(model, pk.AdaMix(size=4, share_up=False), train=("head",))
    scattered(model)
    x, outputs, kept = texts()[0]["input_ids"], [], []

    def on_epoch(epoch, model):
        assert not model.training
        outputs.append(model(x).logits.detach())
        kept.append(copy.deepcopy(found(model)[0].adapter))
        return {}

    log = pk.fit(model, texts(), epochs=2, progress=False, on_epoch=on_epoch)
    assert torch.equal(model(x).logits, outputs[-1])
    trained = [row["trainable"] for row in log if "phase" in row]
    assert len(trained) == 2 and trained[0] > trained[1] == pk.counts(model).stored
    for name in NAMES:
        assert torch.equal(getattr(found(model)[0].adapter, name), getattr(kept[-1], name).mean(0))
    where = pk.save(model, tmp_path / "adapter")
    held = load_file(where / "adapter_model.safetensors")
    assert {t.shape for key, t in held.items() if key.endswith("adapter.down_weight")} == {(4, 16)}
    fresh = pk.load(make("bert").model, where)
    assert torch.equal(fresh(x).logits, outputs[-1])
    again = pk.load(make("bert").model, where, trainable=True)  # one expert, trained on
    pk.fit(again, texts(), progress=False)
    assert pk.counts(again).trainable == pk.counts(model).trainable


def test_experts_may_be_kept_and_looked_at(tmp_path):
    """What averaging costs, with the lines of the method's documentation."""
    model = make("bert").model
    pk.attach(model, pk.AdaMix(size=4, average=False), train=("head",))
    scattered(model)
    x = texts()[0]["input_ids"]
    pk.fit(model, texts(), progress=False)
    mean = model(x).logits
    where = pk.save(model, tmp_path / "adapter")
    fresh = pk.load(make("bert").model, where)
    assert torch.equal(fresh(x).logits, mean)
    lines = pk.AdaMix.__doc__.partition("\n\n        for")[2].partition("\n\n")[0]
    exec("for" + lines.replace("\n        ", "\n"), {"model": fresh, "pk": pk})  # noqa: S102
    drawn = [fresh(x).logits for _ in range(8)]
    assert any(not torch.allclose(y, mean) for y in drawn) and len({float(y.sum()) for y in drawn}) > 1
    assert not any(m.training for m in fresh.modules() if isinstance(m, nn.Dropout))
    assert torch.equal(fresh.eval()(x).logits, mean)


def test_a_resume_ends_bit_equal(tmp_path):
    class Broken(list):
        def __iter__(self):
            yield from self[:2]
            raise KeyboardInterrupt

    def run(place, data):
        model = make("bert").model
        pk.attach(model, pk.AdaMix(size=4), train=("head",))
        pk.fit(model, data, epochs=2, checkpoint=tmp_path / place, checkpoint_every=1, resume=True, progress=False)
        return {k: v.clone() for t in found(model) for k, v in t.state_dict(prefix=t.site_name).items()}

    whole = run("whole", texts())
    with pytest.raises(KeyboardInterrupt):
        run("broken", Broken(texts()))
    resumed = run("broken", texts())
    assert whole.keys() == resumed.keys() and all(torch.equal(t, resumed[key]) for key, t in whole.items())


def test_transformers_trainer_trains_the_experts_or_says_what_would(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": y} for batch in texts() for ids, y in zip(*batch.values(), strict=True)]
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    for method in (pk.AdaMix(size=4), pk.AdaMix(size=4, average=False)):
        model = pk.attach(make("bert").model, method, train=("head",))
        before = copy.deepcopy(found(model)[0].state_dict())
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[pk.hf.Callback()])
        if method.average:
            with pytest.raises(RuntimeError, match=r"phases \(average\).* train it with pk.fit"):
                trainer.train()
            continue
        trainer.train()
        after = found(model)[0].state_dict()
        assert after["adapter.down_weight"].shape == (4, 4, 16)
        assert not torch.equal(after["adapter.up_weight"], before["adapter.up_weight"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 0}, "experts = 0, consistency = 1.0; expected at least 1 and 0"),
        ({"consistency": -1.0}, "consistency = -1.0; expected at least 1 and 0"),
        ({"share_down": True}, "share_down = True leave one adapter; share one of the two"),
    ],
)
def test_errors_name_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        pk.AdaMix(**fields)
