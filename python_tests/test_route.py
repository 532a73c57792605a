"""Routing: each row of a batch runs its own adapter, whatever the methods, the direction and the thread."""

import copy
import pickle
import threading
from dataclasses import dataclass

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, METHODS, assert_same, calibrated, close, entered, make, over, perturb, snapshot, targets_of
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.engine import method as registry
from peft_kernels.engine.attach import tuners

ROUTES = (["a", "b"], [None, "a"], ["b", None], [None, None], ["b", "b"])


def two(key, family, other=None, dtype=torch.float32):
    """A model with adapters a and b, of one method or of two."""
    case = make(family, dtype)
    for seed, (name, method) in enumerate((("a", key), ("b", other or key))):
        cfg = METHODS[method](**METHODS[method].tiny)
        pk.attach(case.model, cfg, targets_of(method, family), name=name, seed=seed)
    entered(calibrated(case))
    for name in "ab":
        perturb(case.model, name)
    if family == "mlp":
        case.inputs["x"] = case.inputs["x"][:2]
    for module in case.model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False  # a block trained whole cannot take rows of a cache
    return case


def alone(case, name):
    pk.set_active(case.model, [] if name is None else [name])
    return case.call(case.model)


@pytest.mark.parametrize(("key", "family"), over(FAMILIES))
def test_each_row_is_as_if_its_adapter_were_alone(key, family):
    case = two(key, family)
    single = {name: alone(case, name).detach() for name in ("a", "b", None)}
    before = snapshot(case.model)
    pk.set_active(case.model, ["a"])
    for names in ROUTES:
        with pk.route(case.model, names):
            out = case.call(case.model)
        for i, name in enumerate(names):
            close(out[i], single[name][i])
    close(case.call(case.model), single["a"])
    assert_same(case.model, before)


@pytest.mark.parametrize(("key", "family"), over(FAMILIES))
def test_gradients_of_a_mixed_batch(key, family):
    """Every adapter gets the gradient of its own rows, with backward outside the `with`."""
    # Nothing else can sit in a module trained whole.
    other = {"ia3": "lora", "full": "full", "toplayers": "toplayers"}.get(key, "ia3")
    case = two(key, family, other, torch.float64)
    params = {n: p for n, p in case.model.named_parameters() if p.requires_grad}
    weight = torch.randn(case.call(case.model).shape, dtype=torch.float64)
    slow = {n: torch.zeros_like(p) for n, p in params.items()}
    for i, name in enumerate(("a", "b")):
        out = alone(case, name)
        grads = torch.autograd.grad((out[i] * weight[i]).sum(), list(params.values()), allow_unused=True)
        for n, g in zip(params, grads, strict=True):
            if g is not None:
                slow[n] += g
    with pk.route(case.model, ["a", "b"]):
        out = case.call(case.model)
    fast = torch.autograd.grad((out * weight).sum(), list(params.values()), allow_unused=True)
    for s, f in zip(slow.values(), fast, strict=True):
        close(torch.zeros_like(s) if f is None else f, s, torch.float64)


def test_rows_without_an_adapter_are_bit_equal_to_the_base():
    case = two("lora", "llama", "bitfit")
    with torch.no_grad():
        base = alone(case, None)
        with pk.route(case.model, [None, None]):
            assert torch.equal(case.call(case.model), base)
        linear = case.model.model.layers[0].self_attn.q_proj
        x = torch.randn(2, 3, 16)
        plain = linear(x)
        with pk.route(case.model, ["a", None]):
            out = linear(x)
        assert torch.equal(out[1], plain[1])
        assert not torch.equal(out[0], plain[0])


@pytest.mark.parametrize("key", ["lora", "dora", "ia3"])
def test_the_second_call_of_a_route_copies_nothing_to_the_device(key, monkeypatch):
    """What follows from the names is made once, and may be kept for a backward after a call in inference mode."""
    case, made, tensor = two(key, "llama"), [], torch.tensor
    with pk.route(case.model, ["a", "b"]):
        with torch.inference_mode():
            case.call(case.model)
        case.loss(case.model).backward()
        monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: made.append(args) or tensor(*args, **kwargs))
        case.call(case.model)
        with torch.no_grad():
            case.call(case.model)
    assert not made


@pytest.mark.parametrize(("key", "other"), [("lora", "ia3"), ("dora", "dora"), ("lora", "dora")])
def test_one_graph_under_changing_routes(key, other):
    case = two(key, "llama", other)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.model, fullgraph=True, backend=counter)
    single = {name: alone(case, name).detach() for name in ("a", "b", None)}
    for names in ROUTES:
        with pk.route(case.model, names):
            out = case.call(compiled)
        for i, name in enumerate(names):
            close(out[i], single[name][i])
    assert counter.frame_count == 1
    with pk.route(case.model, ["a", "b"]):
        case.loss(compiled).backward()
    assert counter.frame_count == 1


def test_a_tuner_that_calls_another_tuned_module():
    """Pfeiffer's adapter runs its sublayer's LayerNorm a second time: on its own rows, with their tuners."""
    case = make("bert")
    for seed, name in enumerate("ab"):
        method = pk.Union(pk.Pfeiffer(reduction_factor=2), pk.LayerType(types=("norm",)))
        pk.attach(case.model, method, name=name, seed=seed)
        perturb(case.model, name)
    single = {name: alone(case, name).detach() for name in ("a", "b", None)}
    for names in ROUTES:
        with pk.route(case.model, names):
            out = case.call(case.model)
        for i, name in enumerate(names):
            close(out[i], single[name][i])


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_do_not_mix(compiled):
    """Eight at once, each with another adapter in every step, in eager mode and in one graph."""
    case, names, numbers = make("mlp"), "abcdefgh", range(8)
    for seed, name in enumerate(names):
        method = pk.BitFit() if name == "h" else (pk.DoRA if name == "g" else pk.LoRA)(rank=1 + seed)
        pk.attach(case.model, method, targets_of("bitfit" if name == "h" else "lora", "mlp"), name=name, seed=seed)
        perturb(case.model, name)
    single = {name: alone(case, name).detach() for name in (*names, None)}
    model, counter = case.model, torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model, fullgraph=True, backend=counter)
        with torch.no_grad(), pk.route(case.model, [None] * 5):
            case.call(model)
    wrong, done, start = [], [], threading.Barrier(8)

    def work(number):
        start.wait()
        for step in range(20):
            route = [names[number]] * 5 if step % 2 else [names[(number + step) % 8], None, names[number], "a", "h"]
            with torch.no_grad(), pk.route(case.model, route):
                out = case.call(model)
            if not all(torch.allclose(out[i], single[n][i], atol=1e-5) for i, n in enumerate(route)):
                wrong.append(route)
        done.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in numbers]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(done) == list(numbers)
    assert not wrong
    assert counter.frame_count == compiled


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    widths=st.tuples(*[st.integers(3, 19)] * 3),
    tokens=st.integers(1, 4),
    adapters=st.lists(st.tuples(st.sampled_from((pk.LoRA, pk.DoRA)), st.integers(1, 3)), min_size=1, max_size=5),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    data=st.data(),
)
def test_any_route_over_any_shapes(widths, tokens, adapters, dtype, data):
    model = torch.nn.Sequential(torch.nn.Linear(*widths[:2]), torch.nn.Tanh(), torch.nn.Linear(*widths[1:])).to(dtype)
    names = [f"a{i}" for i in range(len(adapters))]
    for seed, (name, (method, rank)) in enumerate(zip(names, adapters, strict=True)):
        pk.attach(model, method(rank=rank, alpha=2.0 - seed), ("0", "2"), name=name, seed=seed)
        perturb(model, name)
    route = data.draw(st.lists(st.sampled_from([None, *names]), min_size=1, max_size=9))
    x = torch.randn(len(route), tokens, widths[0], dtype=dtype)
    with pk.route(model, route):
        out = model(x)
    for i, name in enumerate(route):
        pk.set_active(model, [] if name is None else [name])
        close(out[i], model(x)[i], dtype)


def test_beams_repeat_each_name():
    case = two("lora", "gpt2")
    ids = case.inputs["input_ids"]
    single = {name: alone(case, name) for name in ("a", "b")}
    with torch.no_grad(), pk.route(case.model, ["a", "b"]):
        out = case.model(ids.repeat_interleave(3, 0)).logits
    for row in range(6):
        close(out[row], single["ab"[row // 3]][row // 3])
    options = dict(num_beams=2, max_new_tokens=4, do_sample=False, pad_token_id=0)
    pk.set_active(case.model, ["b"])
    alone_b = case.model.generate(ids[1:], **options)
    with pk.route(case.model, ["a", "b"]):
        both = case.model.generate(ids, **options)
    length = alone_b.shape[1]
    assert torch.equal(both[1, :length], alone_b[0])


@pytest.mark.parametrize(("key", "where"), [("lora", "here"), ("lora", "another thread"), ("dora", "here")])
def test_checkpointed_and_routed(key, where):
    case = two(key, "llama", "ia3")
    case.model.train()

    def gradients():
        torch.manual_seed(3)
        case.model.zero_grad()
        with pk.route(case.model, ["a", "b"]):
            loss = case.loss(case.model)
        if where == "here":
            loss.backward()
        else:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        return {n: p.grad.clone() for n, p in case.model.named_parameters() if p.grad is not None}

    plain = gradients()
    options = {"use_reentrant": False, "context_fn": pk.checkpoint_context}
    case.model.gradient_checkpointing_enable(options)
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for n, g in plain.items():
        close(checkpointed[n], g)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_checkpointing_that_would_lose_the_route_is_refused(options, training):
    case = two("lora", "mlp")
    x = torch.randn(2, 12, requires_grad=True)
    case.model.train(training)
    with pk.route(case.model, ["a", None]), pytest.raises(RuntimeError, match="context_fn=pk.checkpoint_context"):
        checkpoint(case.model, x, **options)
    assert checkpoint(case.model, x, **options).requires_grad


def test_routes_that_end_out_of_order_leave_none_behind():
    case = two("lora", "mlp")
    pk.set_active(case.model, ["a"])
    a, b = case.call(case.model), alone(case, "b")
    pk.set_active(case.model, ["a"])

    def routed(name):
        with pk.route(case.model, [name, name]):
            yield case.call(case.model)

    first, second = routed("a"), routed("b")
    close(next(first), a)
    close(next(second), b)
    first.close()
    close(case.call(case.model), b)
    second.close()
    pk.set_active(case.model, ["b"])
    close(case.call(case.model), b)


def test_an_offloaded_base_is_routed():
    from accelerate import cpu_offload

    case = make("mlp")
    cpu_offload(case.model, torch.device("cpu"))
    assert {p.device.type for p in case.model.parameters()} == {"meta"}
    for seed, name in enumerate(("a", "b")):
        pk.attach(case.model, pk.LoRA(rank=2), ("first",), name=name, seed=seed)
        perturb(case.model, name)
    single = {name: alone(case, name) for name in ("a", "b", None)}
    names = ["b", "a", None, "a", "b"]
    with pk.route(case.model, names):
        out = case.call(case.model)
    for i, name in enumerate(names):
        close(out[i], single[name][i])


def test_two_models_and_a_copy_have_their_own_routes():
    case, twin = two("lora", "mlp"), two("ia3", "mlp")
    other = copy.deepcopy(case.model)
    a, b = alone(case, "a"), alone(twin, "b")
    pk.set_active(other, ["a"])
    with pk.route(case.model, ["a", "a"]), pk.route(twin.model, ["b", "b"]):
        close(case.call(case.model), a)
        close(twin.call(twin.model), b)
        with pk.route(other, ["b", None]):
            close(case.call(case.model), a)
    with pk.route(case.model, ["b", "b"]):
        close(case.call(other), a)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_after_a_route_has_its_own(copied):
    case = two("lora", "mlp")
    pk.set_active(case.model, ["a"])
    a, b = case.call(case.model), alone(case, "b")
    pk.set_active(case.model, ["a"])
    with pk.route(case.model, ["b", "b"]):
        other = copied(case.model)
        close(case.call(other), a)
        with pk.route(other, ["a", "a"]):
            close(case.call(case.model), b)
            close(case.call(other), a)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_output_with_one_row_for_all_is_that_of_each_adapter(compiled):
    """T5's first block hands its position bias, of one row, to the blocks above it."""
    case = make("t5")
    for name in ("a", "b"):
        pk.attach(case.model, pk.LayerType(types=("attn",)), name=name)
        perturb(case.model, name)
        with torch.no_grad():
            for _, tuner in tuners(case.model, name):
                for p in tuner.parameters():
                    p.mul_(1.2 if name == "a" else 0.7)
    case.inputs.update({k: torch.cat([v, v[:1]]) for k, v in case.inputs.items()}, use_cache=False)
    single = {name: alone(case, name).detach() for name in ("a", "b")}
    torch._dynamo.reset()
    model = torch.compile(case.model, fullgraph=True, backend="aot_eager") if compiled else case.model
    with torch.no_grad(), pk.route(case.model, ["a", "b", "a"]):
        out = case.call(model)
    for i, name in enumerate("aba"):
        close(out[i], single[name][i])


class Score(torch.nn.Module):
    """One number per row."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, x):
        return self.linear(x)[:, 0]


@pytest.mark.parametrize("compiled", [False, True])
def test_an_output_of_one_number_per_row(compiled):
    model, x = Score(), torch.randn(3, 4)
    for bias, name in enumerate(("a", "b"), start=1):
        pk.attach(model, pk.FullTuning(), name=name)
        model.peft.tuners[name].copy.linear.bias.data += bias
    torch._dynamo.reset()
    with pk.disabled(model):
        base = model(x)
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for names in ((None, "b", "a"), ("b", "a", "b"), ("a", "a", "a")):
        with pk.route(model, names):
            close(call(x), base + torch.tensor([{None: 0, "a": 1, "b": 2}[n] for n in names]))


def test_what_has_no_rows_is_refused():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4))
    for name in ("a", "b"):
        pk.attach(model, pk.LoRA(rank=2), ("0",), name=name)
        perturb(model, name)
    positions = torch.arange(2)
    with pk.route(model, ["a", "b"]), pytest.raises(ValueError, match="no tensor with batch rows"):
        model(positions)
    with pk.route(model, ["a", "a"]):
        routed = model(positions)
    pk.set_active(model, ["a"])
    close(routed, model(positions))
    cached = two("toplayers", "gpt2").model  # GPT-2 hands its cache over by position
    with pk.route(cached, ["a", "b"]), pytest.raises(RuntimeError, match="use_cache=False"):
        cached(torch.tensor([[1, 2], [3, 4]]), use_cache=True)


@dataclass(frozen=True)
class Twice(pk.Method, roles=("ffn",), lr=1e-3, tiny={}, family="additive", kinds=("module",)):
    """A sublayer of (1 + c) x."""


class TwiceTuner(pk.Tuner, method=Twice):
    def __init__(self, cfg, site):
        super().__init__(cfg, site)
        self.c = site.param(1, init="ones")

    def forward(self, base, x):
        return base(x * (1 + self.c))


registry._registry.pop("twice")


@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_inside_a_module_whose_input_is_changed(compiled, monkeypatch):
    """The rows of a go through the module once more by themselves, where b has tuners: they are no rows of b."""
    monkeypatch.setitem(registry._registry, "twice", Twice)
    case = make("llama")
    pk.attach(case.model, Twice(), name="a")
    pk.attach(case.model, pk.LoRA(rank=2), ("up", "down"), name="b")
    perturb(case.model, "b")
    ids = case.inputs["input_ids"]
    single = {name: alone(case, name).detach() for name in ("a", "b", None)}
    torch._dynamo.reset()
    model = torch.compile(case.model, fullgraph=True, backend="aot_eager") if compiled else case.model
    for names, rows in ((["a", "b"], (0, 1)), (["b", "a", None, "a"], (0, 1, 0, 1)), (["a", "b"], (0, 0, 1, 1))):
        with pk.route(case.model, names):
            out = model(ids[list(rows)]).logits
        for i, row in enumerate(rows):
            close(out[i], single[names[i * len(names) // len(rows)]][row])


def test_bad_routes():
    case = two("lora", "mlp")
    for names, message in (
        (["a", "c"], "no adapter 'c'"),
        ([], "expected a list"),
        ("a", "expected a list"),
        ([["a"]], "expected a list"),
        ([3], "expected a list"),
    ):
        with pytest.raises(ValueError, match=message), pk.route(case.model, names):
            pass
    with pk.route(case.model, ["a", "b", None]), pytest.raises(ValueError, match="3 names, but first sees 2 rows"):
        case.call(case.model)
    with pk.route(case.model, ["a", "b"]):
        for forbidden in (lambda: pk.merge(case.model, "a"), lambda: pk.detach(case.model, "a")):
            with pytest.raises(RuntimeError, match="inside pk.route"):
                forbidden()
        with pytest.raises(RuntimeError, match="export"):
            torch.export.export(case.model, (case.inputs["x"],))
    pk.set_active(case.model, ["a"])
    pk.merge(case.model, "a")
    with pytest.raises(RuntimeError, match="unmerge"), pk.route(case.model, ["a", "b"]):
        pass


def test_a_leading_one_serves_every_row():
    """GPT-2's positions come once for the whole batch; a tuner there is routed all the same."""
    case = make("gpt2")
    for seed, name in enumerate(("a", "b")):
        pk.attach(case.model, pk.LoRA(rank=2), ("wpe",), name=name, seed=seed)
        perturb(case.model, name)
    single = {name: alone(case, name) for name in ("a", "b")}
    with pk.route(case.model, ["b", "a"]):
        out = case.call(case.model)
    close(out[0], single["b"][0])
    close(out[1], single["a"][1])


def test_the_tuners_are_called_on_their_rows_alone():
    case = two("ia3", "mlp")
    seen = {}
    for name in ("a", "b"):
        (_, tuner), *_ = tuners(case.model, name)
        tuner.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[1].shape[0]}))
    with pk.route(case.model, ["a", None]):
        case.call(case.model)
    assert seen == {"a": 1}
