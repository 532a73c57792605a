"""AdapterBank: LoRA adapters of different rank that come and go under one graph, in several threads."""

import copy
import json
import pickle
import random
import threading

import pytest
import torch
import torch._dynamo.testing
from models import FAMILIES, assert_same, close, make, perturb, snapshot, targets_of
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

import peft_kernels as pk
from peft_kernels.engine.attach import state_of, tuners
from peft_kernels.engine.slots import Slots

RANKS = {"a": 2, "b": 5, "c": 3, "d": 1, "e": 7, "f": 4, "g": 6, "h": 2}
BOTH = ("first", "second")  # of the MLP


def lora(name, **changes):
    return pk.LoRA(rank=RANKS[name], alpha=2.5 * RANKS[name], **changes)


def trained(family, names="ab", targets=None, dtype=torch.float32, seed=0, methods=None):
    """(the family's case, a model with these adapters attached, None and each name -> what it alone computes)."""
    case, other = make(family, dtype), make(family, dtype)
    for inputs in (case.inputs, other.inputs):
        inputs.update({key: value[:2] for key, value in inputs.items()})
    targets = targets or targets_of("lora", family)
    for i, name in enumerate(names):
        method = (methods or {}).get(name, lora(name))
        pk.attach(other.model, method, targets, name=name, seed=seed + i)
        with torch.no_grad():
            for _, tuner in tuners(other.model, name):
                made = torch.Generator().manual_seed(seed + i)
                for p in tuner.parameters():
                    p.add_(torch.randn(p.shape, generator=made).to(p) * 0.2)
    single = {}
    for name in (None, *names):
        pk.set_active(other.model, [] if name is None else [name])
        single[name] = run(other)
    return case, other.model, single


def run(case, model=None, names=None):
    with torch.no_grad():
        if names is None:
            return case.call(case.model if model is None else model)
        with pk.route(case.model, names):
            return case.call(case.model if model is None else model)


def check(case, single, *routes, model=None):
    for names in routes:
        out = run(case, model, names)
        for i, name in enumerate(names):
            if name is None and model is None:
                assert torch.equal(out[i], single[None][i])
            close(out[i], single[name][i])


def only(model, name):
    """A copy of the model with this adapter alone."""
    model = copy.deepcopy(model)
    for other in set(state_of(model).adapters) - {name}:
        pk.detach(model, other)
    return model


def banked(family, names="ab", *, targets=None, slots=4, max_rank=8, dtype=torch.float32, **kwargs):
    """The same with all these adapters in a bank of the first model."""
    case, source, single = trained(family, names, targets, dtype)
    bank = pk.AdapterBank(case.model, slots, max_rank, targets or targets_of("lora", family) or ("q", "v"), **kwargs)
    for name in names:
        bank.load(name, source)
    return case, bank, single


# -- what rows compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_as_if_its_adapter_were_alone(family):
    case, _, single = banked(family)
    before = snapshot(case.model)
    check(case, single, ["a", "b"], ["b", None], [None, "a"], [None, None], ["b", "b"])
    assert torch.equal(run(case), single[None])
    assert_same(case.model, before)


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "falcon"])
def test_targets_that_are_parts_of_one_linear(family):
    """Scales that differ from part to part, and an adapter of one of them alone."""
    methods = {
        "a": lora("a", rank_pattern={"k": 3}, alpha_pattern={"q": 1.0}, rslora=True),
        "b": pk.Union(pk.at("q", lora("b")), pk.at(("q", "v"), pk.LoRA(rank=1))),
    }
    case, source, single = trained(family, "ab", ("q", "k", "v"), methods=methods)
    bank = pk.AdapterBank(case.model, 2, 6, ("q", "k", "v"))
    bank.load("a", source)
    bank.load("b", source)
    check(case, single, ["a", "b"], [None, "a"], ["b", None])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    case, source, single = trained("llama", dtype=dtype)
    bank = pk.AdapterBank(case.model, max_rank=8)
    for name in "ab":
        bank.load(name, source)
    out = run(case, names=["a", "b"])
    wide = {torch.float64: torch.float64, torch.bfloat16: torch.float32}[dtype]
    assert {t.dtype for _, tuner in tuners(case.model, "bank") for t in (tuner.a, tuner.bt)} == {wide}
    for i, name in enumerate("ab"):
        torch.testing.assert_close(out[i], single[name][i])
    bank.close()
    bank = pk.AdapterBank(case.model, max_rank=8, dtype=torch.bfloat16)
    for name in "ab":
        bank.load(name, source)
    out = run(case, names=["a", "b"])
    for i, name in enumerate("ab"):
        torch.testing.assert_close(out[i], single[name][i], atol=3e-2, rtol=3e-2)


def test_an_adapter_of_some_of_the_layers():
    case, source, single = trained("bert", targets=("q", "up"))
    bank = pk.AdapterBank(case.model, 2, 8, ("q", "k", "v", "o", "up", "down"))
    bank.load("a", source)
    bank.load("b", source)
    check(case, single, ["a", "b"], ["b", None])


def test_generate_with_cache_and_beams():
    case, source, _ = trained("gpt2")
    bank = pk.AdapterBank(case.model, max_rank=8)
    for name in "ab":
        bank.load(name, source)
    ids = case.inputs["input_ids"]
    for beams in (1, 3):
        options = dict(num_beams=beams, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        with pk.route(case.model, ["a", "b"]):
            both = case.model.generate(ids, **options)
        for i, name in enumerate("ab"):
            pk.set_active(source, [name])
            assert torch.equal(both[i], source.generate(ids[i : i + 1], **options)[0])


def test_beside_attached_adapters():
    """At the same modules, in the same route; attached ones can be trained meanwhile."""
    case, source, single = trained("llama", "abc")
    bank = pk.AdapterBank(case.model, 2, 8)
    pk.attach(case.model, pk.LoRA(rank=4), ("q", "o"), name="own")
    perturb(case.model, "own")
    pk.attach(case.model, pk.IA3(), name="scales")
    perturb(case.model, "scales")
    bank.load("a", source)
    bank.load("b", source)
    for name in ("own", "scales"):
        pk.set_active(case.model, [name])
        single[name] = run(case)
    check(case, single, ["a", "own"], ["own", "b"], ["scales", "a"], ["own", "scales"], ["b", None])
    assert pk.active(case.model) == ["scales"]
    assert torch.equal(run(case), single["scales"])
    with pk.disabled(case.model):
        assert torch.equal(run(case), single[None])
        check(case, single, ["b", "scales"])
    with pk.route(case.model, ["own", None]):
        case.loss(case.model).backward()
    assert all(p.grad is not None for _, t in tuners(case.model, "own") for p in t.parameters())
    with pk.route(case.model, ["own", "b"]), pytest.raises(RuntimeError, match="no gradients"):
        case.call(case.model)
    pk.merge(case.model, "scales")
    with pytest.raises(RuntimeError, match="unmerge"), pk.route(case.model, ["a", "a"]):
        pass


# -- what is loaded ---------------------------------------------------------------------------------------------------


def test_directories_written_by_save(tmp_path):
    case, source, single = trained("gpt2", "abc")
    pk.save(source, tmp_path / "each", "a")
    pk.save(source, tmp_path / "all")
    bank = pk.AdapterBank(case.model, max_rank=8)
    bank.load("a", tmp_path / "each")
    bank.load("b", tmp_path / "all")  # the one that is called so there
    bank.load("last", str(tmp_path / "all" / "c"))
    check(case, single | {"last": single["c"]}, ["a", "b"], ["last", "a"])
    bank.evict("a")
    values = {f"{path}.{k}": v for path, tuner in tuners(source, "c") for k, v in tuner.state_dict().items()}
    bank.load("a", values, json.loads((tmp_path / "all" / "c" / "adapter_config.json").read_text()))
    check(case, single | {"a": single["c"]}, ["a", "b"])


@pytest.mark.parametrize(
    ("family", "targets", "settings"),
    [
        ("gpt2", ("q", "v"), dict(target_modules=["c_attn"], r=7, use_rslora=True)),
        (
            "llama",
            ("q", "v", "down"),
            dict(
                target_modules=["q_proj", "v_proj", "down_proj"],
                rank_pattern={"layers.0.self_attn.q_proj": 3, r"layers\.1\..*": 5},
                alpha_pattern={"v_proj": 9},
                lora_dropout=0.1,
            ),
        ),
        ("bert", ("q", "k"), dict(target_modules=["query"], init_lora_weights=False)),
        ("t5", ("q", "v", "o"), dict(target_modules=["q", "o"])),
    ],
)
def test_directories_written_by_hugging_face_peft(family, targets, settings, tmp_path):
    case, other = make(family), make(family)
    model = get_peft_model(other.model, LoraConfig(**{"r": 4, "lora_alpha": 6, **settings})).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    bank = pk.AdapterBank(case.model, 2, 8, targets)
    bank.load("theirs", tmp_path)
    single = {None: run(case), "theirs": run(other, model)}
    check(case, single, ["theirs", None], ["theirs", "theirs"])
    bank.load("again", get_peft_model_state_dict(model), model.peft_config["default"].to_dict())
    check(case, single | {"again": single["theirs"]}, [None, "again"])


# -- while it serves --------------------------------------------------------------------------------------------------


def test_a_running_route_keeps_what_it_began_with():
    case, bank, single = banked("bert", "ab", slots=2)
    _, newer, later = trained("bert", "ab", seed=50)
    where = [t.data_ptr() for _, tuner in tuners(case.model, "bank") for t in tuner.buffers()]
    with torch.no_grad(), pk.route(case.model, ["a", "b"]):
        bank.load("a", newer)
        bank.evict("b")
        out = case.call(case.model)
        with pk.route(case.model, ["a", None]):
            inside = case.call(case.model)
        again = case.call(case.model)
        assert bank.names == ["a"]
        assert bank.free == 0  # both slots behind the names that are gone still run
        with pytest.raises(RuntimeError, match=r"no slot for 'c' yet: .*\(a in 1, b in 1\).*wait=seconds"):
            bank.load("c", only(newer, "a"), wait=0.01)
    close(out[0], single["a"][0])
    close(out[1], single["b"][1])
    assert torch.equal(out, again)
    close(inside[0], later["a"][0])
    assert bank.free == 1
    bank.load("b", newer)
    check(case, later, ["a", "b"])
    assert where == [t.data_ptr() for _, tuner in tuners(case.model, "bank") for t in tuner.buffers()]


def test_a_load_waits_for_a_route_to_end():
    case, bank, single = banked("bert", "ab", slots=2)
    _, newer, later = trained("bert", "ab", seed=50)
    with pk.route(case.model, ["a", None]):
        bank.load("a", newer)
        thread = threading.Thread(target=bank.load, args=("b", newer), kwargs=dict(wait=60))
        thread.start()
        check(case, single, ["b", "b"])
    thread.join()
    check(case, later, ["a", "b"])


def test_capacity():
    case, bank, single = banked("mlp", "ab", targets=BOTH, slots=2)
    _, source, _ = trained("mlp", "abc", BOTH)
    assert (len(bank), bank.free, bank.names, "a" in bank, "c" in bank, list(bank)) == (
        2,
        0,
        ["a", "b"],
        1,
        0,
        ["a", "b"],
    )
    with pytest.raises(RuntimeError, match="no room for 'c': the bank's 2 slots hold a, b; evict one"):
        bank.load("c", source)
    for _ in range(3):
        bank.load("a", source)  # a full bank swaps
    bank.evict("b")
    bank.load("c", source)
    assert bank.names == ["a", "c"]
    check(case, {**single, "c": run_alone(source, case, "c")}, ["a", "c"])
    assert str(bank).splitlines()[1:] == [
        "   ranks  layers  numbers  routes",
        "a      2       2      128       0",
        "c      3       2      192       0",
    ]
    assert repr(bank).startswith("AdapterBank(2 of 2 slots, 2 layers, ")
    with pk.route(case.model, ["a", None]):
        assert str(bank).splitlines()[2].endswith("1")


def run_alone(model, case, name):
    pk.set_active(model, [name])
    return run(case, model)


def test_a_slot_that_is_used_again_keeps_nothing_of_before():
    """A smaller rank, and fewer layers, in the place of a larger one."""
    case, source, single = trained("llama", "ea")
    _, few, fewer = trained("llama", "a", ("q",), seed=9)
    bank = pk.AdapterBank(case.model, 1, 8)
    for _ in range(2):  # both slots
        bank.load("x", only(source, "e"))
    for model, name, outs in ((source, "a", single), (few, "a", fewer)):
        for _ in range(2):
            bank.load("x", only(model, name))
            check(case, {None: single[None], "x": outs[name]}, ["x", None], ["x", "x"])


@pytest.mark.parametrize("dynamic", [False, None])
def test_one_graph_for_all_that_comes_and_goes(dynamic):
    case, source, single = trained("llama", "abce")
    bank = pk.AdapterBank(case.model, 3, 8)
    bank.load("a", source)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.model, fullgraph=True, backend=counter, dynamic=dynamic)
    check(case, single, [None, "a"], model=compiled)
    bank.load("e", source)
    check(case, single, ["a", "e"], ["e", "e"], [None, None], model=compiled)
    bank.evict("a")
    bank.load("b", source)
    bank.load("c", source)
    check(case, single, ["b", "c"], ["c", "e"], model=compiled)
    swapped = {**single, "c": single["b"]}
    bank.load("c", only(source, "b"))
    check(case, swapped, ["b", "c"], ["c", None], model=compiled)
    assert counter.frame_count == 1
    assert torch.equal(run(case), single[None])


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_that_route_while_another_loads_and_evicts(compiled):
    """Names a to d stay and get new versions, u and w come and go; each row is some version of its own adapter."""
    case, source, single = trained("bert", "abcd")
    _, newer, later = trained("bert", "abcd", seed=50)
    bank = pk.AdapterBank(case.model, 8, 8)
    for name in "abcd":
        bank.load(name, source)
    model = case.model
    if compiled:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        model = torch.compile(case.model, fullgraph=True, backend=counter)
        run(case, model, ["a", "b"])
    routes = [["a", "b"], ["c", None], [None, "d"], ["b", "b"], ["d", "a"], ["a", "c"], ["b", None], ["d", "c"]]
    wrong, errors, done, start = [], [], threading.Event(), threading.Barrier(9)

    def serve(names):
        try:
            start.wait()
            rounds = 0
            while rounds < 6 or not done.is_set():
                rounds += 1
                with torch.no_grad(), pk.route(case.model, names):
                    first, second = case.call(model), case.call(model)
                if not torch.equal(first, second):
                    wrong.append((names, "changed within a route"))
                for i, name in enumerate(names):
                    if not any(torch.allclose(first[i], s[name][i], atol=1e-5, rtol=1e-5) for s in (single, later)):
                        wrong.append((names, i))
        except Exception as error:
            errors.append(error)

    visitors = [only(source, "a"), only(newer, "b")]

    def load():
        try:
            start.wait()
            for turn in range(12):
                for name in "abcd":
                    bank.load(name, (newer, source)[turn % 2], wait=60)
                bank.load("u", visitors[turn % 2], wait=60)
                bank.load("w", visitors[1 - turn % 2], wait=60)
                bank.evict("u")
                bank.evict("w")
        except Exception as error:
            errors.append(error)
        finally:
            done.set()

    threads = [threading.Thread(target=serve, args=(names,)) for names in routes] + [threading.Thread(target=load)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    assert not wrong
    assert bank.names == list("abcd")
    assert bank.free == 4
    check(case, single, ["a", "b"], ["c", "d"])
    if compiled:
        assert counter.frame_count == 1


def test_slots_that_are_read_are_never_written():
    """A random walk over loads, evictions and routes."""
    slots, chance, holds, routes = Slots(4), random.Random(0), {}, []
    for turn in range(3000):
        name, what = chance.choice("abcdefg"), chance.choice(("load", "load", "evict", "route", "end", "fail"))
        if what in ("load", "fail"):
            try:
                with slots.filling(name, 0) as slot:
                    assert slot not in slots.held.values()
                    assert not any(slot in taken.values() for _, taken, _ in routes)
                    holds[slot] = turn
                    if what == "fail":
                        raise KeyError
            except (KeyError, RuntimeError):
                pass
        elif what == "evict" and name in slots.held:
            slots.evict(name)
        elif what == "route" and len(routes) < 4:
            lease = slots.leased(chance.sample("abcdefg", 2))
            taken = lease.__enter__()
            routes.append((lease, taken, {slot: holds[slot] for slot in taken.values()}))
        elif what == "end" and routes:
            lease, _, seen = routes.pop(chance.randrange(len(routes)))
            assert all(holds[slot] == value for slot, value in seen.items())
            lease.__exit__(None, None, None)
    for lease, *_ in routes:
        lease.__exit__(None, None, None)
    for name in list(slots.held):
        slots.evict(name)
    assert (slots.room(), slots.running, len(slots._free), slots.outlived) == (4, 0, 5, {})


# -- the model around it ----------------------------------------------------------------------------------------------


def test_closing_restores_the_model():
    case = make("gpt2")
    before, classes = snapshot(case.model), [type(m) for m in case.model.modules()]
    flags = [p.requires_grad for p in case.model.parameters()]
    keys = list(case.model.state_dict())
    bank = pk.AdapterBank(case.model)
    assert list(case.model.state_dict()) == keys
    with pk.route(case.model, [None, None]):
        for off in (bank.close, lambda: pk.detach(case.model)):
            with pytest.raises(RuntimeError, match="inside pk.route"):
                off()
    bank.close()
    assert [type(m) for m in case.model.modules()] == classes
    assert [p.requires_grad for p in case.model.parameters()] == flags
    assert_same(case.model, before)
    with pytest.raises(RuntimeError, match="closed"):
        bank.close()
    with pytest.raises(RuntimeError, match="closed"):
        bank.load("a", case.model)
    assert repr(bank) == "AdapterBank(0 of 16 slots, 0 layers, 0 B)"
    pk.attach(case.model, pk.LoRA(rank=2), name="a")
    bank = pk.AdapterBank(case.model)
    pk.detach(case.model, "bank")
    assert pk.active(case.model) == ["a"]


def test_a_route_of_another_thread_keeps_the_bank_on():
    case, bank, single = banked("bert")
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with pk.route(case.model, ["a", "b"]):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(60)
    with pytest.raises(RuntimeError, match="detach while 1 routes of other threads run"):
        bank.close()
    leave.set()
    thread.join()
    bank.close()
    assert torch.equal(run(case), single[None])


def test_files_and_counts_leave_the_bank_out(tmp_path):
    case, bank, single = banked("llama")
    with pytest.raises(ValueError, match="a bank is not saved"):
        pk.save(case.model, tmp_path / "none")
    pk.attach(case.model, pk.LoRA(rank=2), name="own")
    pk.save(case.model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["own"]
    assert pk.counts(case.model) == pk.counts(case.model, "own")
    assert {row["adapter"] for row in pk.explain(case.model)} == {"own"}
    check(case, single, ["a", "b"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_has_a_bank_of_its_own(copied):
    case, bank, single = banked("bert")
    with pk.route(case.model, ["b", "b"]):
        bank.evict("b")
        other = copied(case.model)
    twin = pk.AdapterBank.of(other)
    assert (twin.names, twin.free, twin.running) == (["a"], 3, 0)
    bank.evict("a")
    with torch.no_grad(), pk.route(other, ["a", None]):
        close(case.call(other)[0], single["a"][0])
    _, source, later = trained("bert", "ab", seed=50)
    twin.load("a", source)
    bank.load("a", trained("bert")[1])
    check(case, single, ["a", None])
    with torch.no_grad(), pk.route(other, ["a", None]):
        close(case.call(other)[0], later["a"][0])


def test_half_precision_leaves_scales_as_they_are():
    case, bank, single = banked("llama")
    before = [t.scaling.clone() for _, t in tuners(case.model, "bank")]
    case.model.bfloat16()
    assert all(torch.equal(t.scaling, b) for (_, t), b in zip(tuners(case.model, "bank"), before, strict=True))
    out = run(case, names=["a", None])
    torch.testing.assert_close(out[0].float(), single["a"][0], atol=0.1, rtol=0.1)


def test_inference_mode():
    case, source, single = trained("bert")
    with torch.inference_mode():
        bank = pk.AdapterBank(case.model, max_rank=8)
        bank.load("a", source)
    bank.load("b", source)
    with torch.inference_mode(), pk.route(case.model, ["a", "b"]):
        out = case.call(case.model)
        bank.load("a", source)
    for i, name in enumerate("ab"):
        close(out[i], single[name][i])


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(bank, message, *args, error=ValueError, **kwargs):
    names, free = bank.names, bank.free
    with pytest.raises(error, match=message) as caught:
        bank.load("new", *args, **kwargs)
    assert "\n" not in str(caught.value)
    assert (bank.names, bank.free) == (names, free)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    case, bank, single = banked("bert")
    for method, targets, train, message in (
        (pk.DoRA(rank=2), None, (), "has dora at .*query .linear.; a bank takes LoRA of linears; attach it"),
        (pk.LoRA(rank=2), ("embed",), (), r"has lora at .*embeddings.* \(embedding\)"),
        (pk.LoRA(rank=2), None, ("head",), "has head at classifier"),
        (
            pk.LoRA(rank=2),
            ("q", "up", "o"),
            (),
            r"tunes 4 layers that the bank's targets \('q', 'v'\) leave out.*'\*\.dense'",
        ),
        (pk.LoRA(rank=9), None, (), "has rank 9 at .*, the bank room for 8; make it with more max_rank"),
    ):
        other = make("bert").model
        pk.attach(other, method, targets, train=train, name="x")
        refused(bank, message, other)
    small = make("bert")
    small.model.bert.encoder.layer[0].attention.self.query = torch.nn.Linear(12, 16)
    pk.attach(small.model, pk.LoRA(rank=2))
    refused(
        bank, r"a \(2, 12\) .* at bert.encoder.layer.0.attention.self.query; expected numbers \[r, 16\]", small.model
    )
    llama = trained("llama", "a")[1]
    pk.save(llama, tmp_path / "llama", "a")
    refused(bank, "does not fit this model: it lacks bert", tmp_path / "llama" / "a")
    refused(bank, "load 'new': the model has the adapters a, b; expected", trained("bert")[1])
    refused(bank, "has no adapter", make("bert").model)
    refused(bank, "holds no adapter", tmp_path / "nowhere", error=FileNotFoundError)
    refused(bank, "need `config`", {})
    refused(bank, "not a complete adapter configuration", {}, {})
    refused(bank, "not a complete adapter configuration", {}, {"parts": [], "seed": 0, "name": "x"})
    refused(bank, "got a int; expected a directory, a model or tensors", 3)
    check(case, single, ["a", "b"])


def test_peft_adapters_that_do_not_fit_are_refused(tmp_path):
    case, bank, _ = banked("llama")
    plain = dict(r=2, target_modules=["q_proj"], lora_alpha=2)
    for number, (settings, message) in enumerate(
        (
            (dict(use_dora=True), "is LORA of PEFT with use_dora; a bank takes plain LORA"),
            (dict(lora_bias=True), "with lora_bias"),
            (dict(modules_to_save=["lm_head"]), "with modules_to_save"),
            (dict(bias="all"), "with bias='all'"),
            (dict(target_modules=["embed_tokens"]), "embed_tokens.*no LoRA of a linear layer"),
            (dict(target_modules=["k_proj"]), r"tunes 2 layers .*'\*\.k_proj'"),
            (dict(r=9), "has rank 9"),
        )
    ):
        model = get_peft_model(make("llama").model, LoraConfig(**{**plain, **settings}))
        model.save_pretrained(tmp_path / str(number))
        refused(bank, message, tmp_path / str(number))
    good = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    path = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{path}.lora_A.weight": torch.ones(2, 16), f"{path}.lora_B.weight": torch.ones(16, 2)}
    bank.load("new", pair, good)
    bank.evict("new")
    refused(bank, "init_lora_weights='pissa_niter_4'", pair, {**good, "init_lora_weights": "pissa_niter_4"})
    refused(bank, "is IA3 of PEFT", pair, {**good, "peft_type": "IA3"})
    refused(bank, "has 2 ranks at .*, where its config says 3", pair, {**good, "r": 3})
    refused(bank, "rank or alpha None", pair, {**good, "lora_alpha": None})
    refused(bank, "no regular expression", pair, {**good, "rank_pattern": {"(": 2}})
    refused(bank, "lora_A of .* alone", {f"{path}.lora_A.weight": torch.ones(2, 16)}, good)
    refused(
        bank, "which the model has not", {k.replace("model.layers.0", "layers.7"): v for k, v in pair.items()}, good
    )
    refused(bank, "holds no LoRA", {}, good)
    refused(bank, "torch.int8", {k: v.to(torch.int8) for k, v in pair.items()}, good)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text(json.dumps(good))
    torch.save(pair, tmp_path / "pickled" / "adapter_model.bin")
    refused(bank, "pickled files are not read", tmp_path / "pickled", error=FileNotFoundError)


def test_bad_names_and_values():
    case, bank, _ = banked("bert")
    source = trained("bert", "a")[1]
    pk.attach(case.model, pk.LoRA(rank=2), name="own")
    for name, message in (
        ("own", "is attached to the model"),
        ("bank", "is attached"),
        ("x y", "expected letters"),
        (3, "3"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.load(name, source)
    for call, message in (
        (lambda: pk.attach(case.model, pk.LoRA(), name="a"), "'a' is in the model's bank"),
        (lambda: pk.rename(case.model, "own", "a"), "'a' is in the model's bank"),
        (lambda: pk.rename(case.model, "bank", "other"), "keeps its name"),
        (lambda: bank.evict("z"), "no adapter 'z' in the bank; it holds a, b"),
        (lambda: pk.AdapterBank(case.model), "has a bank already"),
        (lambda: pk.AdapterBank("bert"), "got a str"),
        (lambda: pk.AdapterBank(make("bert").model, 0), "slots = 0"),
        (lambda: pk.AdapterBank(make("bert").model, max_rank=1.5), "max_rank = 1.5"),
        (lambda: pk.AdapterBank(make("bert").model, dtype=torch.int8), "floating point"),
        (lambda: pk.AdapterBank(make("bert").model, targets=("norm",)), "no linear layer among"),
        (lambda: pk.AdapterBank(make("bert").model.to("meta")), "meta device"),
        (lambda: pk.AdapterBank.of(make("bert").model), "has no bank"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for names, message in (
        (["a", "z"], "no adapter 'z'; attached are bank, own; the bank holds a, b"),
        (["bank", "a"], "'bank' is the bank itself; expected a name in it: a, b"),
    ):
        with pytest.raises(ValueError, match=message), pk.route(case.model, names):
            pass
    assert bank.running == 0
    with pk.route(case.model, ["a", "b", None]), pytest.raises(ValueError, match="3 names, but"), torch.no_grad():
        case.call(case.model)
    linear = case.model.bert.encoder.layer[0].attention.self.query
    with pk.route(case.model, ["a", "b"]), pytest.raises(ValueError, match="needs a tensor with batch rows"):
        linear(torch.ones(16))


def test_checkpointing_is_refused():
    case, _, _ = banked("bert")
    case.model.train()
    case.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": pk.checkpoint_context})
    with pk.route(case.model, ["a", "b"]), pytest.raises(RuntimeError, match="no gradients"):
        case.call(case.model)
