"""What the documents show is run: their Python, their commands, the generated tables and pages."""

import argparse
import ast
import dataclasses
import importlib.util
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
import yaml
from models import make

import peft_kernels as pk
from peft_kernels import cli, tasks
from peft_kernels.bench import results, runner
from peft_kernels.engine import method as registry
from peft_kernels.engine.families import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_kernels"
DOCS = ROOT / "docs"
WRITTEN = sorted(p.name for p in DOCS.glob("*.md"))

_spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


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


section = generate.readme_section


def methods_table():
    rows = ["| `--method` | class | family | default targets | what it is |", "|---|---|---|---|---|"]
    for key, cls in pk.methods().items():
        cells = (key, f"`pk.{cls.__name__}`", cls.family, " ".join(cls.roles), cls.__doc__.splitlines()[0])
        rows.append(f"| {' | '.join(cells)} |".replace("*", "`*`"))
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
    assert section("bench") == results.table(results.read(ROOT / "benchmarks" / "results" / "cpu.jsonl"))


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
    assert shown >= {"demo", "test", "test-all", "build", "lint", "bench", "docs", "gpu", "wheel", "clean", "help"}
    first_screen = (ROOT / "README.md").read_text().splitlines()[:20]
    assert any("make demo" in line for line in first_screen)
    assert any("make test" in line for line in first_screen)


def test_links_and_paths_of_the_documents_exist():
    for file in ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/README.md"))]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / file).read_text()):
            assert ((ROOT / file).parent / target).exists(), f"{file}: {target}"
    for path in ROOT.glob("csrc/*/README.md"):
        assert f"]({path.relative_to(ROOT)})" in (ROOT / "README.md").read_text()


def test_nothing_here_depends_on_the_machine_it_was_written_on():
    words = re.compile(r"/(?:" + "|".join(("root", "home", "tmp", "work")) + r")/[a-z]")
    for path in [
        *ROOT.glob("*.md"),
        *DOCS.glob("*"),
        *ROOT.glob("csrc/**/*.*"),
        *PACKAGE.rglob("*.py"),
        *ROOT.glob("benchmarks/*.py"),
    ]:
        if path.suffix in (".md", ".py", ".cpp", ".h", ".cu", ".cuh"):
            assert not words.search(path.read_text()), path


# -- the site ---------------------------------------------------------------------------------------------------------


def every_page():
    """Path -> Markdown of the hand-written and the generated pages."""
    return {**{name: generate.included((DOCS / name).read_text()) for name in WRITTEN}, **generate.pages()}


def outside_fences(markdown):
    return re.sub(r"```.*?```", "", markdown, flags=re.DOTALL)


def anchors(markdown):
    headings = re.findall(r"^#+ (.*)", outside_fences(markdown), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", WRITTEN)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in blocks(f"docs/{page}", "python"):
        exec(code, names)


def test_the_commands_of_the_pages_exist():
    """What the shell blocks call is there: subcommands with their options, make targets, scripts, extras."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))
    lines = [line for page in WRITTEN for block in blocks(f"docs/{page}", "sh") for line in block.splitlines()]
    assert len(lines) >= 10
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        if program == cli.PROGRAM:
            args = cli._parser().parse_args(words)
            assert callable(args.run), line
            assert words[0] != "bench" or runner.selected(runner.Options("all", tuple(args.words))), line
        elif program == "make":
            assert targets.issuperset(words), line
        elif program == "python":
            assert (ROOT / words[0]).is_file(), line
        else:
            assert (program, words[0]) == ("pip", "install"), line
            assert extras.issuperset(re.findall(r"\[(\w+)\]", line)), line


def test_the_nav_names_every_page_once():
    def paths(nav):
        if isinstance(nav, dict):
            nav = list(nav.values())
        return [path for item in nav for path in paths(item)] if isinstance(nav, list) else [nav]

    nav = generate.expanded(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(paths(nav)) == sorted(every_page())


def test_links_between_the_pages_lead_somewhere():
    pages = every_page()
    found = 0
    for path, text in pages.items():
        for target in re.findall(r"\]\((?!http)([^)\s]+)\)", outside_fences(text)):
            file, _, anchor = target.partition("#")
            place = (DOCS / path).parent / file if file else DOCS / path
            aim = str(place.resolve().relative_to(DOCS))
            assert aim in pages, f"{path}: {target}"
            assert not anchor or anchor in anchors(pages[aim]), f"{path}: {target}"
            found += 1
    assert found > 50


@pytest.mark.parametrize("key", pk.methods())
def test_the_page_of_a_method_tells_its_fields_and_counts(key):
    cls, page = pk.methods()[key], generate.pages()[f"methods/{key}.md"]
    assert f"[{cls.__name__}]({key}.md)" in generate.pages()["methods/index.md"]
    comments = generate.field_comments(cls)
    for field in dataclasses.fields(cls) if cls.__dataclass_params__.init else ():
        assert f"| `{field.name}` | `{field.type}` |" in page
        assert comments[field.name], f"{cls.__name__}.{field.name} has no comment"
    total = sum(p.numel() for p in generate.reference_models()["BERT-base"].parameters())
    assert f"| total | {total:,} |" in page
    assert re.search(r"\| merges \| (yes|no|not here)", page)


def test_the_table_of_the_methods_tells_each_with_its_counts():
    rows = {
        line.split(" | ")[1]: line
        for line in generate.pages()["methods/index.md"].splitlines()
        if line.startswith("| [")
    }
    for key, cls in pk.methods().items():
        cells = rows[f"`{key}`"].split(" | ")
        assert cells[2] == cls.family
        assert all(f"[{name}](../ops/{name}.md)" in cells[3] for name in cls.kernel)
        assert re.match(r"[\d,]+( \(`.*`\))?$|not here: \S", cells[5])
    assert f"| yes | {12 * 2 * 8 * (768 + 768):,} | {12 * 2 * 768 * 768:,} | {12 * 2 * 8} |" in rows["`lora`"]
    assert "[arXiv:2106.09685](" in rows["`lora`"]


def test_the_recipes_of_the_pages_can_be_attached():
    found = [text for page in WRITTEN for text in blocks(f"docs/{page}", "yaml")]
    assert found
    for text in found:
        pk.attach(make("bert").model, pk.recipe(text))


def test_counts_on_a_page_are_those_of_the_model():
    """LoRA of rank 8 on q and v of BERT-base: 12 layers, two 768 x 768 matrices each."""
    page = generate.pages()["methods/lora.md"]
    assert f"| trainable | {12 * 2 * 8 * (768 + 768):,} (" in page
    assert f"| changed | {12 * 2 * 768 * 768:,} (" in page
    assert f"| rank | {12 * 2 * 8} |" in page
    assert "| combines by | cat, svd, sum, average, ties, dare |" in page


def test_the_pages_of_ops_tell_schemas_and_rules():
    for op in pk.ops.all_ops().values():
        page = generate.pages()[f"ops/{op.family}.md"]
        assert f"\n{op.name}{op.schema}\n" in page
        assert "def why_not" in page
        assert f"[{op.name}]({op.family}.md)" in generate.pages()["ops/index.md"]
    assert "| [lora_apply](lora.md) |  | yes | yes | yes |" in generate.pages()["ops/index.md"]  # no CUDA launcher
    assert "cuda all but `lora_apply`." in generate.pages()["ops/lora.md"]
    for name in set(pk.ops.__all__) - {"BackendError", "all_ops", "backend"}:
        assert f"### pk.ops.{name}\n" in "".join(generate.pages().values()), name
        assert f"[`pk.ops.{name}`](ops/" in generate.pages()["api.md"], name


def test_the_page_of_the_command_line_tells_every_option():
    page = generate.pages()["cli.md"]
    for name, parser in generate.commands(cli._parser()).items():
        own = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                assert f"| `{generate.usage(action)}` |" in own, f"{name}: {action.dest}"
    assert "%(" not in page


def test_the_page_of_the_api_has_every_public_name_once():
    page = generate.pages()["api.md"]
    named = re.findall(r"^### pk\.([\w.]+)", page, re.M) + re.findall(r"^\| \[`pk\.(\w+)`\]\(methods", page, re.M)
    assert len(set(named)) == len(named)
    own = {name.partition(".")[0] for name in named}  # of pk.hf several functions
    assert own == set(pk.__all__) - {"__version__"}, "every name of __all__ belongs into a GROUP"


def test_the_page_of_families_has_every_model_type_and_role():
    page = generate.pages()["families.md"]
    for kind, family in FAMILIES.items():
        (own,) = (p for p in page.split("\n## ") if kind in p.splitlines()[0].split(", "))
        assert all(f"| `{role}` |" in own for role in family.roles), kind


def messages():
    """The texts in the sources, but for docstrings; "..." where a value is put in."""
    torchs = Path(torch.utils.checkpoint.__file__)
    for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("csrc/*/*.py"), ROOT / "setup.py", torchs]:
        tree = ast.parse(path.read_text())
        skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                yield "".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                yield node.value


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    headings = re.findall(r"^### (.*)", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    texts = list(messages())
    assert len(headings) >= 20
    assert len(set(headings)) == len(headings)
    for heading in headings:
        stable = ".*".join(map(re.escape, heading.strip("`").split("...")))
        assert any(re.search(stable, text, flags=re.DOTALL) for text in texts), heading
