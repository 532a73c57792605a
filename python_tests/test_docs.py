"""What the documents show is run: the README's Python, its generated tables, the CONTRIBUTING example."""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from models import make

import peft_kernels as pk
from peft_kernels import tasks
from peft_kernels.bench import results
from peft_kernels.engine import method as registry
from peft_kernels.engine.roles import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_kernels"


def blocks(file, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL)


def test_the_method_of_contributing_is_complete():
    (code,) = blocks("CONTRIBUTING.md", "python")
    try:
        names = {"Method": pk.Method, "Tuner": pk.Tuner, "dataclass": dataclass, "__name__": "shift"}
        exec(code, names)
        case = make("bert")
        base = case.call(case.model)
        pk.attach(case.model, names["Shift"]())
        torch.testing.assert_close(case.call(case.model), base)
        for p in case.model.parameters():
            if p.requires_grad:
                p.data.add_(0.3)
        adapted = case.call(case.model)
        assert not torch.allclose(adapted, base)
        pk.merge(case.model)
        torch.testing.assert_close(case.call(case.model), adapted)
    finally:
        registry._registry.pop("shift", None)


def section(name):
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]


def methods_table():
    rows = ["| `--method` | class | default targets | what it is |", "|---|---|---|---|"]
    for key, cls in pk.methods().items():
        rows.append(
            f"| {key} | `pk.{cls.__name__}` | {' '.join(cls.roles)} | {cls.__doc__.splitlines()[0]} |".replace(
                "*", "`*`"
            )
        )
    return "\n".join(rows) + "\n"


def test_the_table_of_methods_is_the_registry():
    assert section("methods") == methods_table()


def test_the_model_types_of_the_readme_are_the_table():
    assert section("families") == textwrap.fill(", ".join(FAMILIES), 120, break_on_hyphens=False) + "\n"


def tasks_table():
    rows = ["| `--task` | what it learns | figures, the main one first | compared with |", "|---|---|---|---|"]
    for key, task in tasks.tasks().items():
        figures = ", ".join(m.label + ("" if m.higher else " (lower is better)") for m in task.metrics)
        rows.append(f"| {key} | {task.__doc__} | {figures} | {task.rival} |")
    return "\n".join(rows) + "\n"


def test_the_table_of_tasks_is_the_registry():
    assert section("tasks") == tasks_table()


def test_the_table_of_times_is_the_committed_run():
    assert section("bench") == results.table(results.read(ROOT / "benchmarks" / "results" / "cpu-avx2.jsonl"))


def test_the_demo_shown_is_what_tune_prints():
    """The labels of the README's table are those of the command today."""
    source = (PACKAGE / "report.py").read_text() + (PACKAGE / "tasks.py").read_text()
    shown = section("demo").split("```")[1].splitlines()
    labels = [re.split(r"\s{2,}", line)[0].split(", ")[0] for line in shown if re.search(r"\S\s{2,}\S", line)]
    assert len(labels) >= 10
    for label in labels:
        assert f'"{label}' in source, label


def test_the_three_lines_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case = make("bert")
    batches = [{**case.inputs, "labels": torch.tensor([0, 2])}]
    code = blocks("README.md", "python")[0]
    names = {"model": case.model, "batches": batches}
    exec(code, names)
    fresh = pk.load(make("bert").model, tmp_path / "adapter")
    torch.testing.assert_close(case.call(fresh), case.call(case.model))
    assert names["log"][-1]["epoch"] == 2


def test_every_make_target_is_in_the_help():
    makefile = (ROOT / "Makefile").read_text()
    shown = set(re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.MULTILINE))
    assert shown >= {"demo", "test", "test-all", "build", "lint", "bench", "gpu", "wheel", "clean", "help"}
    first_screen = (ROOT / "README.md").read_text().splitlines()[:20]
    assert any("make demo" in line for line in first_screen)
    assert any("make test" in line for line in first_screen)


def test_links_and_paths_of_the_documents_exist():
    for file in ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/README.md"))]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / file).read_text()):
            assert ((ROOT / file).parent / target).exists(), f"{file}: {target}"


def test_nothing_here_depends_on_the_machine_it_was_written_on():
    words = re.compile(r"/(?:" + "|".join(("root", "home", "tmp", "work")) + r")/[a-z]")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("csrc/**/*.*"), *PACKAGE.rglob("*.py"), *ROOT.glob("benchmarks/*.py")]:
        if path.suffix in (".md", ".py", ".cpp", ".h", ".cu", ".cuh"):
            assert not words.search(path.read_text()), path
