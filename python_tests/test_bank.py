"""AdapterBank: LoRA adapters of different rank that come and go under one graph, in several threads."""

import copy
import pickle
import random
import threading

import pytest
import torch
import torch._dynamo.testing
from banked import BOTH, banked, check, lora, only, run, trained
from models import FAMILIES, assert_same, close, make, perturb, snapshot

import peft_kernels as pk
from peft_kernels.engine.attach import tuners
from peft_kernels.engine.slots import Slots

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
