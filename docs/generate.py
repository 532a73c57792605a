"""The pages that follow from the code: methods, ops, the command line, the API and the model families.

mkdocs runs the three `on_` functions of this file as hooks (mkdocs.yml). Nothing is written beside the sources, so no
page can go stale. `pages()` needs peft_kernels, torch and transformers, and no mkdocs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peft_kernels as pk
from peft_kernels import cli, comparison
from peft_kernels.bench import results
from peft_kernels.engine.families import FAMILIES, Family
from peft_kernels.engine.method import Method, Part, Tuner, fields
from peft_kernels.engine.recipe import Recipe
from peft_kernels.ops._op import BACKENDS, KERNELS, Op, _has
from peft_kernels.overview import COUNTED, field_comments, grouped, on_copy, overview

ROOT = Path(__file__).parents[1]
RUN = ROOT / "benchmarks" / "results" / "cpu.jsonl"
COMPARED = ROOT / "benchmarks" / "results" / "comparison.json"

# Names of `pk` by what they are for; the methods themselves come by the registry.
GROUPS = {
    "Attaching": "attach detach active set_active disabled rename",
    "Routing": "route shared_trunk AdapterBank checkpoint_context",
    "Training": "fit search Distillation calibrate penalty hf.Callback",
    "Models of Hugging Face PEFT": "hf.accelerate hf.Report",
    "Saving": "save load hf.save hf.load similar_prompts",
    "Quantising": "quantize NF4Linear Int8Linear footprint Footprint",
    "Merging and combining": "eject merge unmerge MergeReport combine CombineReport shrink",
    "Masks": "Mask",
    "Factors": "truncated_svd nearest_kronecker",
    "Looking": "counts Counts explain",
    "Layers": "PHMLinear",
    "Kernels": "backend BackendError ops",
    "Recipes": "methods at recipe",
    "Writing a method": "Method Tuner Phase Stats",
}


@functools.cache
def pages() -> dict[str, str]:
    """Path under docs/ -> Markdown of every generated page."""
    return {
        "methods/index.md": methods_overview(),
        **{f"methods/{key}.md": method_page(cls) for key, cls in pk.methods().items()},
        "ops/index.md": ops_overview(),
        **{f"ops/{family}.md": op_page(family) for family in op_families()},
        "cli.md": cli_page(),
        "api.md": api_page(),
        "families.md": families_page(),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
    }


# -- hooks of mkdocs --------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """`methods/` in the nav stands for all pages below it."""
    config.nav = expanded(config.nav)
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return included(markdown)


def expanded(nav: Any) -> Any:
    """The nav with a folder of generated pages (a path ending in "/") replaced by those pages, its index first."""
    if isinstance(nav, dict):
        return {title: expanded(below) for title, below in nav.items()}
    if isinstance(nav, list):
        return [expanded(item) for item in nav]
    return [path for path in pages() if path.startswith(nav)] if nav.endswith("/") else nav


def included(markdown: str) -> str:
    """`<!-- readme: bench -->` becomes the README's section of that name, which a test holds against the code.

    `<!-- lost -->` becomes the table of the cases that a rival won in the committed run, `<!-- comparison -->` the
    committed comparison of all methods.
    """
    compared = comparison.markdown(json.loads(COMPARED.read_text())) if COMPARED.exists() else "No run is committed.\n"
    markdown = markdown.replace("<!-- comparison -->\n", compared)
    markdown = re.sub(r"<!-- readme: (\w+) -->", lambda match: readme_section(match[1]), markdown)
    return markdown.replace("<!-- lost -->\n", results.table(results.read(RUN), lost=True))


def readme_section(name: str) -> str:
    return re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]


# -- methods ----------------------------------------------------------------------------------------------------------


def methods_overview() -> str:
    rows = []
    for row in grouped(overview(model=reference_models()["BERT-base"])):
        merges = {True: "yes", False: "no", None: "as its parts"}[row["mergeable"]]
        counts = [_number(row[name]) for name in ("trainable", "changed", "rank", "stored")]
        if row["why"]:
            counts = [f"not here: {escaped(row['why'])}", "", "", ""]
        elif row["settings"]:
            counts[0] += "".join(f" (`{name}={call(value)}`)" for name, value in row["settings"].items())
        paper = re.sub(r"^\d{4}\.\d{4,5}$", r"arXiv:\g<0>", row["paper"])
        cells = (f"[{row['class']}]({row['key']}.md)", f"`{row['key']}`", row["family"])
        cells += (" ".join(f"[{name}](../ops/{name}.md)" for name in row["kernel"]), merges, *counts)
        cells += (" ".join(map(code, row["roles"])), f"{row['lr']:g}", escaped(paper), prose(row["what"]))
        rows.append(cells)
    header = ("class", "key", "family", "kernel", "merges", "trainable", "changed", "rank", "stored")
    header += ("default targets", "lr", "paper", "what it is")
    text = (
        "Every method by its family, with what it takes unless it is told otherwise, and its "
        "[counts](../concepts.md#counts) on BERT-base, without those of a head: trainable is the most in one phase of "
        "a training, the others are at its end. On the command line `peft-kernels methods --model MODEL` prints the "
        "table for another model, `--log FILE` adds what a comparison measured, and a key shows the fields."
    )
    return f"# Methods\n\n{text}\n\n{table(header, rows)}\n"


def method_page(cls: type[Method]) -> str:
    example, settings = _example(cls)
    needed = "".join(f" --set {f.name}=lora" for f in fields(cls)) if settings else ""
    parts = [
        f"# {cls.__name__}",
        f"`{example}` in Python, `--method {cls.key}{needed}` on the command line.",
        prose(inspect.getdoc(cls)),
    ]
    if doc := inspect.getmodule(cls).__doc__:
        parts += ["## What it computes", prose(doc)]
    if not cls.__dataclass_params__.init:  # its arguments are others than its fields
        parts += ["## Arguments", fence(signature(f"pk.{cls.__name__}", cls), "python")]
    elif known := fields(cls):
        comments = field_comments(cls)
        rows = [(f"`{f.name}`", code(f.type), _default(f), prose(comments.get(f.name, ""))) for f in known]
        parts += ["## Fields", table(("field", "type", "default", ""), rows)]
    kinds = "those of its parts" if issubclass(cls, Recipe) else ", ".join(cls.kinds) if cls.kinds else "any"
    facts = [
        ("default targets", " ".join(f"`{role}`" for role in cls.roles) or "those of the methods it is made of"),
        ("learning rate", f"{cls.lr:g}"),
        ("kinds of sites", kinds),
    ]
    models = reference_models()
    counted = COUNTED.get(cls.key, settings)
    found = [_measured(model, cls(**counted)) for model in models.values()]
    text = (
        f"`{_call(cls, counted)}` on two models, a classifier and a decoder "
        "([what the counts mean](../concepts.md#counts), [merging and combining](../concepts.md#merging)):"
    )
    rows = [(what, *(column[what] for column in found)) for what in found[0]]
    parts += ["## Where it sits", table(("", ""), facts), "## Counts", text, table(("", *models), rows)]
    return "\n\n".join(parts) + "\n"


def _example(cls: type[Method]) -> tuple[str, dict[str, Any]]:
    """(the call that shows the method, its arguments): the defaults, or those of its tests if it has no defaults."""
    try:
        cls()
        return f"pk.{cls.__name__}()", {}
    except (TypeError, ValueError):
        return _call(cls, cls.tiny), cls.tiny


def _call(cls: type[Method], settings: dict[str, Any]) -> str:
    return f"pk.{cls.__name__}({', '.join(f'{k}={call(v)}' for k, v in settings.items())})"


def call(value: Any) -> str:
    """A field as it is written in Python, without what is default."""
    if isinstance(value, Method):
        given = {f.name: getattr(value, f.name) for f in fields(value)}
        shown = [f"{f.name}={call(given[f.name])}" for f in fields(value) if given[f.name] != _default_value(f)]
        return f"pk.{type(value).__name__}({', '.join(shown)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {call(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(call, value)) + ("," if len(value) == 1 else "") + ")"
    return call(value.method) if isinstance(value, Part) else repr(value)


def _default_value(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _default(field: dataclasses.Field) -> str:
    value = _default_value(field)
    return "required" if value is dataclasses.MISSING else code(value)


@functools.cache
def reference_models() -> dict[str, nn.Module]:
    """What methods are counted on: no weights, only shapes."""
    import transformers

    with torch.device("meta"):
        return {
            "BERT-base": transformers.BertForSequenceClassification(transformers.BertConfig()),
            "Llama 7B": transformers.LlamaForCausalLM(transformers.LlamaConfig()),
        }


def _measured(model: nn.Module, method: Method) -> dict[str, str]:
    """Counts of the method on a copy of a reference model, whether it merges there and what combines it, in words."""
    total = sum(p.numel() for p in model.parameters())
    columns = ("trainable", "changed", "rank", "stored")
    try:
        counts, own = on_copy(model, method)
    except (ValueError, RuntimeError) as error:  # it is not made for this model, and says so
        refused = f"not here: {prose(str(error))}"
        return {**dict.fromkeys((*columns, "merges", "combines by"), refused), "total": f"{total:,}"}
    low_rank = [tuner.factors() is not None for tuner in own]
    additive = [tuner.additive for tuner in own]
    cells = {name: _number(counts[name]) for name in columns}
    for name in ("trainable", "changed", "stored"):
        if (n := counts[name]) is not None:
            cells[name] += f" ({100 * n / total:.3g} %)"
    hows = "cat, svd, sum, average, ties, dare" if any(low_rank) else "sum, average, ties, dare"
    if not all(map(operator.or_, low_rank, additive)):
        hows = "nothing"
    merges = "yes" if all(t.mergeable for t in own) else "no"
    return {**cells, "total": f"{total:,}", "merges": merges, "combines by": hows}


def _number(n: int | None) -> str:
    return "by the values" if n is None else f"{n:,}"


# -- ops --------------------------------------------------------------------------------------------------------------


def op_families() -> dict[str, list[Op]]:
    """Family (module under ops, folder under csrc) -> its ops."""
    out: dict[str, list[Op]] = {}
    for op in pk.ops.all_ops().values():
        out.setdefault(op.family, []).append(op)
    return out


def _backend_module(family: str, suffix: str) -> Any:
    """The module of kernels, or None where the family has none."""
    name = f"{KERNELS}.{family}.{family}_{suffix}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def ops_overview() -> str:
    rows = []
    for family, ops in op_families().items():
        for op in ops:
            has = [_has(_backend_module(family, suffix), op.name, name) for name, suffix, _ in BACKENDS]
            rows.append((f"[{op.name}]({family}.md)", *("yes" if h else "" for h in has), "yes"))
    text = (
        "Which kernels exist for each op. The one that serves a call is the first of a row whose rules the call meets, "
        "the reference (plain torch) if there is none; `pk.explain(model)` says which and why."
    )
    header = ("op", *(name for name, _, _ in BACKENDS), "reference")
    return f"# Operations\n\n{text}\n\n{table(header, rows)}\n"


def op_modules() -> dict[str, str]:
    """Module of contracts -> family, those of a family in the order of their ops; then what has none, as <op>_state."""
    found = {op.reference.__module__: family for family, ops in op_families().items() for op in ops}
    beside = {getattr(pk.ops, name).__module__ for name in pk.ops.__all__} - found.keys()
    return found | {m: family for m in sorted(beside) for own, family in found.items() if m.startswith(f"{own}_")}


def op_page(family: str) -> str:
    ops = op_families()[family]
    parts = [f"# {family}"]
    for module in (name for name, its in op_modules().items() if its == family):
        parts += [f"## {module.rpartition('.')[2]}", prose(importlib.import_module(module).__doc__)]
        for name in pk.ops.__all__:
            if getattr(pk.ops, name).__module__ == module:
                parts += documented(f"pk.ops.{name}", getattr(pk.ops, name), 3)
    parts += ["## Dispatcher ops", "What `torch.compile` and the profiler see, as `torch.ops.peft_kernels.<name>`:"]
    parts += [fence("\n".join(f"{op.name}{op.schema}" for op in ops), "text"), "## When a backend is chosen"]
    for suffix in dict.fromkeys(suffix for _, suffix, _ in BACKENDS):
        parts += _kernels(family, suffix, ops)
    readme = (ROOT / "csrc" / family / "README.md").read_text()
    return "\n\n".join([*parts, "## The kernels", lowered(readme.partition("\n")[2].strip())]) + "\n"


def _kernels(family: str, suffix: str, ops: list[Op]) -> Iterator[str]:
    """Of one module of kernels: the ops it has, and the functions that say why it does not serve a call."""
    module = _backend_module(family, suffix)
    if module is None:
        return
    own = [op.name for op in ops if hasattr(module, op.name)]
    backends = [name for name, its, _ in BACKENDS if its == suffix]
    lacks = {name: [op for op in own if not _has(module, op, name)] for name in backends}
    but = "".join(f", {name} all but {', '.join(map(code, ops))}" for name, ops in lacks.items() if ops)
    yield f"### {', '.join(backends)}"
    yield f"`csrc/{family}/{family}_{suffix}.py` has {', '.join(map(code, own))}{but}."
    verified = ", ".join(sorted(module.VERIFIED_ON))
    yield (
        f"GPUs with a correct run on record, by compute capability: {verified or 'none'}. On another GPU they are "
        "chosen only under `PEFT_KERNELS_UNVERIFIED=1`."
    )
    yield "A call is refused, with the reason, unless its rule returns an empty text:"
    rules = {getattr(module, f"why_not_{op}", None) or module.why_not: None for op in own}
    yield fence("\n\n\n".join(inspect.getsource(rule).rstrip() for rule in rules), "python")


# -- the command line -------------------------------------------------------------------------------------------------


def cli_page() -> str:
    parser = cli._parser()
    parts = [f"# The command `{cli.PROGRAM}`", prose(parser.description), prose(inspect.getdoc(cli.main))]
    for name, sub in commands(parser).items():
        actions = [a for a in sub._actions if not isinstance(a, argparse._HelpAction)]
        needed = [usage(a) for a in actions if a.required or not a.option_strings]
        parts += [f"## {name}", prose(sub.description), fence(" ".join([cli.PROGRAM, name, *needed]), "text")]
        rows = [(code(usage(a)), prose(_help(a))) for a in actions]
        parts.append(table(("option", ""), rows))
    return "\n\n".join(parts) + "\n"


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Command -> its parser."""
    (group,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return group.choices


def usage(action: argparse.Action) -> str:
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
    if not action.option_strings:
        return value or action.dest
    takes = "" if action.nargs == 0 else value or action.dest.upper()
    more = " ..." if action.nargs in ("+", "*") else ""
    return f"{', '.join(action.option_strings)} {takes}{more}".rstrip()


def _help(action: argparse.Action) -> str:
    return (action.help or "") % {**vars(action), "prog": cli.PROGRAM} + ("; required" if action.required else "")


# -- the API ----------------------------------------------------------------------------------------------------------


def api_page() -> str:
    parts = ["# API", f"`import peft_kernels as pk`, version {pk.__version__}."]
    for title, names in GROUPS.items():
        parts.append(f"## {title}")
        for name in names.split():
            parts += documented(f"pk.{name}", operator.attrgetter(name)(pk), 3)
    parts += ["## Methods", "Each has [a page of its own](methods/index.md)."]
    rows = [(f"[`pk.{c.__name__}`](methods/{k}.md)", prose(c.__doc__.splitlines()[0])) for k, c in pk.methods().items()]
    return "\n\n".join([*parts, table(("", ""), rows)]) + "\n"


def documented(name: str, thing: Any, level: int) -> Iterator[str]:
    """Heading, signature and docstring; what a method may override has its own lines."""
    yield f"{'#' * level} {name}"
    if not inspect.ismodule(thing) and not (inspect.isclass(thing) and issubclass(thing, BaseException)):
        yield fence(signature(name, thing), "python")
    yield prose(inspect.getdoc(thing))
    if inspect.ismodule(thing):
        families = {n: op_modules().get(getattr(thing, n).__module__) for n in thing.__all__}
        rows = [
            (f"[`{name}.{n}`](ops/{family}.md)" if family else f"`{name}.{n}`", _first(getattr(thing, n)))
            for n, family in families.items()
        ]
        yield table(("", ""), rows)
    if thing in (Method, Tuner, pk.AdapterBank):
        for member, function in vars(thing).items():
            own = function.__func__ if isinstance(function, (classmethod, staticmethod)) else function
            if inspect.isfunction(own) and own.__doc__ and not member.startswith("_"):
                yield from documented(f"{thing.__name__}.{member}", own, level + 1)


def _first(thing: Any) -> str:
    return prose(inspect.getdoc(thing).splitlines()[0])


class _Written:
    """An annotation or default, printed as it stands in the source."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(name: str, thing: Callable) -> str:
    """`name(parameters) -> result`, over several lines if it is long."""
    found = inspect.signature(thing)

    def written(annotation: Any) -> Any:
        return _Written(annotation) if isinstance(annotation, str) else annotation

    params = [p.replace(annotation=written(p.annotation)) for p in found.parameters.values()]
    result = inspect.Signature.empty if inspect.isclass(thing) else written(found.return_annotation)
    line = f"{name}{found.replace(parameters=params, return_annotation=result)}"
    if len(line) <= 88:
        return line
    shown, keyword = [], False
    for p in params:
        if p.kind is p.KEYWORD_ONLY and not keyword:
            keyword = True
            shown.append("*")
        keyword = keyword or p.kind is p.VAR_POSITIONAL
        shown.append(str(p))
    arrow = "" if result is inspect.Signature.empty else f" -> {result if isinstance(result, _Written) else 'None'}"
    return f"{name}(\n" + "".join(f"    {s},\n" for s in shown) + f"){arrow}"


# -- model families ---------------------------------------------------------------------------------------------------


def families_page() -> str:
    rows: dict[int, tuple[Family, list[str]]] = {}
    for kind, row in FAMILIES.items():
        rows.setdefault(id(row), (row, []))[1].append(kind)
    text = (
        "Where the roles are in each family of transformers models, by `config.model_type`. `#` is a number in a path, "
        "`path[q]` the q rows of a fused linear, `entry>exit` the span between two linears. A pattern is matched "
        "against the end of a module's path. `stack` is each module with a list of blocks in it, "
        "`backbone` the nearest one from there upward that takes embeddings, `model` the whole. "
        "On other models targets are globs over module paths."
    )
    parts = ["# Model families", text]
    for row, kinds in rows.values():
        cells = [(f"`{role}`", " ".join(map(code, patterns))) for role, patterns in row.roles.items()]
        when = "by the config" if callable(row.prenorm) else "before it" if row.prenorm else "after it"
        cells += [(f"LayerNorm of `{sub}`, {when}", " ".join(map(code, own))) for sub, own in row.norms.items()]
        parts += [f"## {', '.join(kinds)}", table(("role", "modules"), cells)]
    return "\n\n".join(parts) + "\n"


# -- Markdown ---------------------------------------------------------------------------------------------------------


def code(value: Any) -> str:
    text = value if isinstance(value, str) else call(value)
    return f"`{text}`"


def fence(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [[_outside_code(cell, lambda text: text.replace("|", "\\|")) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def lowered(markdown: str) -> str:
    """Its headings one level lower."""
    return re.sub(r"^(#+ )", r"#\1", markdown, flags=re.MULTILINE)


# "name: text", "name(args) -> result: text" and "name [shape] text".
_ITEM = re.compile(r"([a-z_]\w*(?:\([^()]*\))?(?:, [a-z_]\w*)*(?: -> \w+)?): (?=\S)|([a-z_]\w* \[[\w., ]*\])")


def prose(doc: str | None) -> str:
    """A docstring as Markdown: what is indented after a blank line stays as it is, "name: text" becomes an item."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(doc or ""))
    return "\n\n".join(block if block.startswith("    ") else _paragraph(block) for block in blocks)


def _paragraph(block: str) -> str:
    out: list[str] = []
    item = False
    for line in block.splitlines():
        inside, pieces = line.startswith("  "), re.split(r"\s{3,}(?=\S)", line.strip())
        for piece in pieces:
            match = _ITEM.match(piece)
            if match or len(pieces) > 1:
                term = f"`{match[1] or match[2]}`{':' if match[1] else ''} " if match else ""
                out += [] if item else [""]
                out.append(f"- {term}{escaped(piece[match.end() :].lstrip() if match else piece)}")
                item = True
            elif item and not inside:
                out += ["", escaped(piece)]
                item = False
            else:
                out.append(("    " if item else "") + escaped(piece))
    return "\n".join(out).strip()


def escaped(text: str) -> str:
    """No emphasis and no tags by accident, and papers are links."""
    return _outside_code(text, _plain)


def _plain(text: str) -> str:
    text = re.sub(r"([*_])", r"\\\1", text.replace("<", "&lt;"))
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    pieces = re.split(r"(`+[^`]*`+)", text)
    pieces[::2] = map(change, pieces[::2])
    return "".join(pieces)
