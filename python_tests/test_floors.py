"""The house rules that a reader could not see at a glance: who imports whom, and how long a file may be."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_kernels"

# Lower floors never import higher ones; the two rooms of floor 1 do not know each other.
FLOORS = {
    **{
        "files": 0,
        "shards": 0,
        "kernels": 0,
        "ops": 1,
        "engine": 1,
        "quant": 2,
        "methods": 3,
        "explain": 3,
        "check": 3,
    },
    **{
        "hf_trainer": 3,
        "hf": 4,
        "bank": 4,
        "mask": 4,
        "ranks": 4,
        "recipes": 4,
        "overview": 4,
        "shrink": 4,
        "data": 4,
        "resume": 4,
    },
    **{"standalone": 5, "convert": 5, "batches": 5, "settings": 5},
    **{
        "bench": 5,
        "probe": 6,
        "tasks": 7,
        "report": 8,
        "teacher": 8,
        "comparison": 9,
        "train": 9,
        "sweep": 10,
        "trial": 10,
        "compare": 11,
        "cli": 12,
        "__main__": 13,
    },
}
EXTERNAL = {
    "kernels": {"torch", "triton"},
    "ops": {"torch"},
    "engine": {"torch", "safetensors", "tqdm", "cma"},
    "quant": {"torch", "tqdm"},
    "methods": {"torch"},
}
BUDGETS = {"peft_kernels/methods/*.py": 150, "peft_kernels/ops/[a-z]*.py": 200, "csrc/*/*.py": 600, "setup.py": 150}


def _sources():
    yield from PACKAGE.rglob("*.py")
    yield from (ROOT / "csrc").rglob("*.py")


def _room(path):
    if path.is_relative_to(ROOT / "csrc"):
        return "kernels"
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if parts[0] in FLOORS else None  # __init__ and _version belong to no floor


def _package(path):
    if path.is_relative_to(ROOT / "csrc"):
        return ("peft_kernels", "kernels", *path.relative_to(ROOT / "csrc").parent.parts)
    return ("peft_kernels", *path.relative_to(PACKAGE).parent.parts)


def _imports(path):
    """Absolute names of everything a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _package(path)[: len(_package(path)) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sorted(_sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path):
    room = _room(path)
    if room is None:
        return
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] == "peft_kernels":
            target = parts[1] if len(parts) > 1 else ""
            if target in FLOORS and target != room:
                assert FLOORS[target] < FLOORS[room] or (room, target) == ("methods", "engine"), (
                    f"{path.name} imports {name}"
                )
        elif room in EXTERNAL and parts[0] not in sys.stdlib_module_names:
            assert parts[0] in EXTERNAL[room], f"{path.name} imports {name}"
        allowed = {"transformers": ("hf", "hf_trainer", "bench"), "peft": ("bench",)}.get(parts[0], (room,))
        assert room in allowed, f"{path.name} imports {name}; only {' and '.join(allowed)} may"


def _code_lines(path):
    """Lines with code: docstrings, comments and blank lines are free."""
    text = path.read_text()
    free = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            free.update(range(body[0].lineno, body[0].end_lineno + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - free)


@pytest.mark.parametrize("pattern", BUDGETS)
def test_files_stay_short(pattern):
    for path in ROOT.glob(pattern):
        assert _code_lines(path) <= BUDGETS[pattern], f"{path.relative_to(ROOT)} has {_code_lines(path)} lines of code"


def test_kernel_sources_stay_short():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".cu", ".h", ".cuh"):
            code = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
            lines = [line for line in code.splitlines() if line.strip() and not line.strip().startswith("//")]
            assert len(lines) <= 600, path


def test_import_is_quiet_and_light():
    """No output, no network, and none of the heavy optional packages."""
    code = (
        "import sys, peft_kernels; "
        "heavy = {'transformers', 'triton', 'matplotlib', 'sklearn', 'peft', 'cma'}; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_every_public_name_exists_and_is_documented():
    import peft_kernels as pk

    for name in pk.__all__:
        assert getattr(getattr(pk, name), "__doc__", None), name
    for name in pk.ops.__all__:
        assert getattr(pk.ops, name).__doc__, name


def test_gpu_kernels_claim_only_what_was_run():
    """A compute capability in VERIFIED_ON needs a result file from it."""
    results = "".join(p.read_text() for p in (ROOT / "benchmarks" / "results").glob("*.json*"))
    for path in (ROOT / "csrc").glob("*/*_*.py"):
        for claim in re.findall(r"^VERIFIED_ON.*?\"(\d+\.\d+)\"", path.read_text(), flags=re.MULTILINE):
            assert f'"capability": "{claim}"' in results, path.name
