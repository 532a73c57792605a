"""The benchmark on tiny shapes: its statistics, what it refuses, its rows, table and picture."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from texts import refused, run

import peft_kernels as pk
from peft_kernels.bench import case as parts
from peft_kernels.bench import cases, lora_cases, measure, results, rivals, runner

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FIGURES = {
    *(
        "wall_p20",
        "wall_p50",
        "wall_p80",
        "cpu_p20",
        "cpu_p50",
        "cpu_p80",
        "ratio",
        "ratio_cpu",
        "rounds",
        "peak_bytes",
    ),
}
FACTS = {
    *("case", "op", "shape", "mode", "dtype", "rows", "n_in", "n_out", "rank", "p", "popularity", "selection", "cold"),
    *("time", "commit", "versions", "device", "device_name", "threads", "isa", "load", "rival", "over", "backend"),
}
RATES = {"gb_s", "tflop_s", "roofline", "ceiling_tflop_s", "ceiling_gb_s"}


def tiny(found):
    """One case of each op, mode, dtype, dropout and popularity, cold or not, on shapes that take no time."""
    chosen = {}
    for case in found:
        rank = (1, 2) if isinstance(case.rank, tuple) else min(case.rank, 2)
        small = dataclasses.replace(case, shape="tiny", rows=32, n_in=8, n_out=8, rank=rank)
        chosen.setdefault((small.name, case.cold), case if case.shape.startswith("sample") else small)
    return list(chosen.values())


TINY = tiny(cases.cases("cpu"))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings that nobody waits for, and a pool of two."""
    monkeypatch.setattr(measure, "copy_rate", lambda device: 1e10)
    monkeypatch.setattr(measure, "gemm_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(parts, "cache_bytes", lambda device: 512)
    monkeypatch.setattr(measure, "ROUND", 1e-5)


def lora_case(**changes):
    return dataclasses.replace(
        next(c for c in TINY if c.op == "lora_linear" and c.mode == "full" and c.rank), **changes
    )


def rows_of(*chosen, **options):
    return list(runner.run(chosen, runner.Options(seconds=1e-3, **options)))


# -- statistics -------------------------------------------------------------------------------------------------------


def test_quantiles():
    assert measure.quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 0.0]) == (1.0, 2.5, 4.0)


def test_a_ratio_is_the_median_over_rounds():
    """A round that a busy machine slows as a whole changes nothing, nor does one disturbed call."""
    assert measure.ratio([2.0, 20.0, 2.0, 2.0, 50.0], [1.0, 10.0, 1.0, 1.0, 1.0]) == 2.0


def test_rivals_take_turns_and_go_through_their_pool():
    seen = []
    calls = {name: [lambda name=name, i=i: seen.append((name, i)) for i in range(3)] for name in "ab"}
    times = measure.measure(calls, 0.0, "cpu")
    assert {len(own) for pair in times.values() for own in pair} == {measure.ROUNDS}
    assert set(seen) == {(name, i) for name in "ab" for i in range(3)}


def test_peak_memory_counts_what_is_live_at_once():
    def call():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return second, torch.empty(400)

    assert measure.peak_bytes(call, "cpu") == 6000
    assert measure.peak_bytes(lambda: None, "cpu") == 0


# -- cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_has_a_case_and_every_name_is_one_case(device):
    found = cases.cases(device)
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert {case.op for case in found} == {*pk.ops.all_ops(), *runner.LAYERS}
    assert {case.mode for case in found} == set(parts.MODES)
    assert {case.selection for case in found} == set(parts.SELECTIONS)


def test_popularity():
    assert {name: deal(6) for name, deal in rivals.POPULARITY.items()} == {
        "distinct": [0, 1, 2, 3, 4, 5],
        "uniform": [0, 1, 2, 0, 1, 2],
        "skewed": [0, 1, 1, 2, 2, 2],
        "identical": [0] * 6,
        "uniform, a fifth base": [0, 1, 2, 0, -1, 2],
        "8 adapters": [0, 1, 2, 3, 4, 5],
    }


def test_a_selection_holds_the_smaller_ones():
    quick, default, every = ({c.name for c in runner.selected(runner.Options(s))} for s in parts.SELECTIONS)
    assert quick < default < every
    with pytest.raises(ValueError, match="no case of the quick ones"):
        runner.selected(runner.Options("quick", ("nothing",)))


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_case_runs_and_its_rows_are_whole(case):
    rows = rows_of(case)
    figures = [row for row in rows if "wall_p50" in row]
    assert not [row for row in rows if "failed" in row]
    ours = "ours (cpu)" if runner.LAYERS.get(case.op, case.op) else "ours (reference)"
    assert {ours, figures[0]["over"]} <= {row["rival"] for row in figures}
    for row in figures:
        assert row.keys() == FACTS | FIGURES | {"error"} | (RATES if row["rival"] not in rivals.OTHERS else set())
        assert 0 < row["wall_p20"] <= row["wall_p50"] <= row["wall_p80"] and row["rounds"] >= measure.ROUNDS
        assert json.loads(results.dumps(row)) == row
        assert results.line(row)
    yardstick = next(row for row in figures if row["rival"] == row["over"])
    assert yardstick["ratio"] == yardstick["ratio_cpu"] == 1.0
    assert all(0 <= row["error"] <= 1 for row in figures if row["rival"].startswith("ours"))


def test_a_pool_of_weights_is_larger_than_the_cache():
    case = next(c for c in TINY if c.cold and c.op == "lora_linear")
    made = parts.pooled(case, "cpu", lambda: parts.lora_layer(case, "cpu"))
    held = sum(t.numel() * t.element_size() for t in rivals.tensors(made))
    assert len(made) > 1 and held >= 4 * 512
    assert len({t.data_ptr() for t in rivals.tensors(made)}) == len(list(rivals.tensors(made)))


# -- what gets no figures ---------------------------------------------------------------------------------------------


def wrong_lora(*args, **kwargs):
    return pk.ops.lora_linear(*args, **kwargs) * 1.01


def test_a_wrong_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(lora_cases, "lora_linear", wrong_lora)
    ours = next(row for row in rows_of(lora_case()) if row["rival"] == "ours (cpu)")
    assert "output: error" in ours["failed"] and "gradient 0" in ours["failed"] and "wall_p50" not in ours
    assert "FAILED" in results.line(ours)


def test_a_kernel_that_raises_costs_the_others_nothing(monkeypatch):
    def broken(*args, **kwargs):
        raise IndexError("out of\nbounds")

    monkeypatch.setattr(lora_cases, "lora_linear", broken)
    rows = {row["rival"]: row for row in rows_of(lora_case())}
    assert rows["ours (cpu)"]["failed"] == "IndexError: out of bounds" and "wall_p50" in rows["frozen"]


def test_a_rival_that_computes_something_else_is_refused(monkeypatch):
    right = rivals.lora
    monkeypatch.setattr(rivals, "lora", lambda *args: right(*args) * 1.1)
    rows = {row["rival"]: row for row in rows_of(lora_case())}
    assert "largest number" in rows["plain torch"]["failed"] and "wall_p50" in rows["ours (cpu)"]


def test_what_is_not_here_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(rivals, "missing", lambda package: f"{package} is not installed")
    rows = {row["rival"]: row for row in rows_of(lora_case())}
    assert rows["HF PEFT"]["missing"] == "peft is not installed" and "wall_p50" in rows["ours (cpu)"]
    far = next(c for c in TINY if c.op == "far_linear")
    rows = {row["rival"]: row for row in rows_of(far, backends=("cpu", "triton"))}
    assert "backend 'triton' refused" in rows["ours (triton)"]["missing"] and "wall_p50" in rows["ours (cpu)"]


def test_a_case_that_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(measure, "gemm_rate", lambda device, dtype: 1.0)
    (row,) = rows_of(lora_case())
    assert row["rival"] == "all" and "raise --seconds" in row["missing"]


def test_the_yardstick_and_ours_alone():
    assert [row["rival"] for row in rows_of(lora_case(), rivals=False)] == ["frozen", "ours (cpu)"]


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """The command sees three cases: two sizes of one, and another."""
    first = lora_case(selection="quick")
    found = [first, dataclasses.replace(first, rows=64), lora_case(op="lora_linear", p=0.5, selection="default")]
    monkeypatch.setattr(runner, "cases", lambda device: found)
    return found


def test_the_command_writes_rows_and_a_picture(capsys, tmp_path, few):
    file, picture = tmp_path / "rows.jsonl", tmp_path / "rows.png"
    words = ("--device", "cpu", "--quick", "--seconds", "0.01", "--json", file, "--plot", picture)
    code, out, err = run(capsys, "bench", *words)
    assert (code, err) == (0, "")
    rows = results.read(file)
    assert {row["case"] for row in rows} == {case.name for case in few[:2]}
    assert all(row["case"] in out for row in rows) and "ours (cpu)" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    results.plot(rows, picture.with_suffix(".svg"))
    assert "<svg" in picture.with_suffix(".svg").read_text()

    code, out, _ = run(capsys, "bench", "rows=64", "--from", file, "--json")
    assert code == 0 and [json.loads(line) for line in out.splitlines()] == [row for row in rows if row["rows"] == 64]


def test_an_interrupted_run_goes_on(capsys, tmp_path, few):
    """Its last case is run again, for it may have been cut off; of two rows the later one counts."""
    file = tmp_path / "rows.jsonl"
    words = ("--device", "cpu", "--seconds", "0.01", "--json", file, "--resume")
    assert run(capsys, "bench", "--quick", *words)[0] == 0
    before = results.read(file)
    file.write_text("".join(f"{results.dumps(row)}\n" for row in before[:-1]))
    code, out, _ = run(capsys, "bench", *words)
    assert code == 0 and [case.name for case in few if case.name in out.splitlines()] == [c.name for c in few[1:]]
    rows = results.read(file)
    assert rows[: len(before) - 1] == before[:-1]
    assert list(results.by_case(rows)) == [case.name for case in few]
    assert results.by_case(rows)[few[1].name].keys() == {r["rival"] for r in before if r["case"] == few[1].name}
    assert "--resume" in refused(capsys, tmp_path, "bench", "--resume")


def test_a_failed_check_is_shown_not_written_and_the_exit_code(capsys, tmp_path, few, monkeypatch):
    monkeypatch.setattr(lora_cases, "lora_linear", wrong_lora)
    file = tmp_path / "rows.jsonl"
    code, out, _ = run(capsys, "bench", "--device", "cpu", "--quick", "--seconds", "0.01", "--json", file)
    assert code == 1 and "FAILED" in out
    assert {row["rival"] for row in results.read(file)}.isdisjoint({"ours (cpu)"})


def test_the_command_lists_and_refuses(capsys, tmp_path, few):
    assert run(capsys, "bench", "--list", "--device", "cpu")[1].split("\n")[:-1] == [case.name for case in few]
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\n')
    assert "no case" in refused(capsys, tmp_path, "bench", "nothing")
    assert "--backend fast" in refused(capsys, tmp_path, "bench", "--backend", "fast")
    assert "line 1: not a row" in refused(capsys, tmp_path, "bench", "--from", bad)
    one = ("p=0.5", "--seconds", "0.01", "--device", "cpu", "--plot", tmp_path / "one.png")
    code, _, err = run(capsys, "bench", *one)
    assert code == 2 and "several numbers of rows" in err


# -- documents and comparisons ----------------------------------------------------------------------------------------


PLACE = {"device_name": "A CPU", "versions": {"torch": "2"}, "commit": "abc", "load": 0.5}


def row(case, rival, ratio, selection="default"):
    times = {f"{kind}_{p}": ratio * 1e-3 for kind in ("wall", "cpu") for p in ("p20", "p50", "p80")}
    known = {"case": case, "rival": rival, "ratio": ratio, "ratio_cpu": ratio, "over": "frozen", "peak_bytes": 1000}
    return {**known, **times, **PLACE, "selection": selection}


def test_the_table_shows_the_headlines_and_where_we_lose():
    rows = [
        *(
            row("headline", name, x, "quick")
            for name, x in (("frozen", 1.0), ("plain torch", 1.5), ("ours (cpu)", 1.1))
        ),
        *(row("lost", name, x) for name, x in (("frozen", 1.0), ("plain torch", 1.2), ("ours (cpu)", 1.3))),
        *(row("won", name, x) for name, x in (("frozen", 1.0), ("plain torch", 1.2), ("ours (cpu)", 1.1))),
        {"case": "headline", "rival": "HF PEFT", "missing": "peft is not installed", **PLACE},
    ]
    shown = results.table(rows)
    assert shown.splitlines()[0] == "A CPU; torch 2; abc; load 0.5"
    assert shown.splitlines()[4:] == [
        "| headline | frozen | ours (cpu) **1.10** (1.10) 1.0 kB | plain torch 1.50 (1.50) 1.0 kB |",
    ]
    assert results.table(rows, lost=True).splitlines()[4:] == [
        "| lost | frozen | ours (cpu) 1.30 (1.30) 1.0 kB | plain torch **1.20** (1.20) 1.0 kB |",
    ]


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_goes_between_the_markers():
    assert script("table").written("a\n<!-- bench -->\nold\n<!-- /bench -->\nb", "new\n") == (
        "a\n<!-- bench -->\nnew\n<!-- /bench -->\nb"
    )


def test_a_comparison_of_two_versions_is_of_medians_over_turns(tmp_path):
    compare = script("compare")
    base = [[row("c", "frozen", 1.0), row("c", "ours (cpu)", x)] for x in (2.0, 2.0, 8.0)]
    head = [[row("c", "frozen", 1.0), row("c", "ours (cpu)", x)] for x in (1.0, 1.0, 4.0)]
    assert list(compare.compared({"base": base, "head": head}))[1:] == [
        ("c", "ours (cpu)", "2 ms", "1 ms", "0.500", "0.500")
    ]
    gone = list(compare.compared({"base": base, "head": [rows[:1] for rows in head]}))[1]
    assert gone[-1] == "only in some of the runs"
    with pytest.raises(SystemExit, match="no-such-ref"):
        compare.checkout("no-such-ref", tmp_path)
