"""The command line: arguments in, tables or --json out. Slow imports wait for the command that needs them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from ._version import __version__

PROGRAM = "peft-kernels"
RELATED = (
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "scikit-learn",
    "sacrebleu",
    "matplotlib",
    "tqdm",
    "triton",
    "peft",
)
SWEPT = ("lr", "epochs", "batch_size")  # what --sweep can vary besides the fields of the method


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. 0: done; 2: bad input, one line on stderr; 130: interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt as stop:
        print(f"{PROGRAM}: interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Parameter-efficient fine-tuning on fused kernels.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        sub.set_defaults(run=run)
        return sub

    _add_tune(command("tune", _tune, "fine-tune a model and write the adapter, a log, a picture and a summary"))
    explain = command("explain", _explain, "show which kernel serves each tuned layer of a model, and why not another")
    _add_method(explain, required=False)
    command("methods", _methods, "list the methods with their fields and defaults")
    command("info", _info, "show the environment, and which backends each op has here or why not")
    return parser


def _add_tune(tune: argparse.ArgumentParser) -> None:
    from .tasks import tasks
    from .train import PRECISIONS

    _add_method(tune, required=True)
    tune.add_argument("--data", required=True, metavar="FILE", help="rows of text: .tsv, .csv or .jsonl [.gz, .xz]")
    tune.add_argument("--out", required=True, metavar="DIR", help="directory to write; must not exist")
    tune.add_argument("--force", action="store_true", help="replace an earlier result in DIR, discard its checkpoint")
    tune.add_argument("--resume", action="store_true", help="continue from DIR.checkpoint if a run was interrupted")
    tune.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="default at the end of each epoch")
    tune.add_argument("--task", default="classify", choices=tasks(), help="default %(default)s")
    tune.add_argument("--train", nargs="*", metavar="ROLE", help="modules trained whole; default a new head, if any")
    tune.add_argument(
        "--eval-data",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="more rows, scored before and after tuning; repeatable",
    )
    tune.add_argument("--validation", type=float, metavar="FRACTION", help="training rows held out for choosing")
    tune.add_argument("--patience", type=int, metavar="EPOCHS", help="stop after so many without a lower loss there")
    tune.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=V1,V2,...",
        help=f"one run per value of a field of the method, or of {', '.join(SWEPT)}; repeatable: every combination",
    )
    tune.add_argument("--epochs", type=int, default=1, help="default %(default)s")
    tune.add_argument("--batch-size", type=int, default=32, help="default %(default)s")
    tune.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches per step; default %(default)s")
    tune.add_argument("--lr", type=float, help="peak learning rate; default the method's own (the head keeps its own)")
    tune.add_argument("--max-length", type=int, metavar="TOKENS", help="longer texts are cut; default 128")
    tune.add_argument(
        "--model-dropout", type=float, metavar="P", help="dropout of the model itself; default as its config has it"
    )
    tune.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of the forward in training")
    tune.add_argument("--checkpointing", action="store_true", help="compute blocks again in backward to save memory")
    tune.add_argument("--seed", type=int, default=0, help="default %(default)s")
    tune.add_argument("--threads", type=int, help="CPU threads; default torch's choice")
    tune.add_argument("--device", help="cpu, cuda or cuda:N; default cuda if there is one")
    tune.add_argument("--text-column", default="text", metavar="NAME", help="default %(default)s")
    tune.add_argument("--label-column", metavar="NAME", help="class, number or target text; default label")
    tune.add_argument(
        "--split-column", metavar="NAME", help="holds train and test; default split; without one a fifth is held out"
    )


def _add_method(parser: argparse.ArgumentParser, required: bool) -> None:
    from .methods import methods

    default = {} if required else {"default": "lora"}
    parser.add_argument("--model", required=True, metavar="PATH_OR_HUB_ID", help="a transformers model")
    parser.add_argument("--method", required=required, metavar="NAME", help=f"one of {', '.join(methods())}", **default)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the method, such as rank=16; repeatable",
    )
    parser.add_argument("--targets", nargs="+", metavar="ROLE", help="roles or globs; default the method's own")


# -- method fields from text ------------------------------------------------------------------------------------------


def method_from(key: str, settings: Sequence[str]) -> Any:
    """The method `key` with its fields set from "field=value" words; ValueError names the known methods or fields."""
    from .engine.method import fields, method_of

    cls = method_of(key)
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    values = {}
    for word in settings:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"--set {word}: expected field=value")
        if name not in known:
            raise ValueError(f"--set {word}: {key} has no field {name!r}; it has {', '.join(known) or 'none'}")
        try:
            values[name] = parse(hints[name], text)
        except (ValueError, TypeError):  # of json and int too, whose text says less than the line below
            raise ValueError(f"--set {word}: expected {_shown(hints[name])}") from None
    return cls(**values)


def parse(hint: Any, text: str) -> Any:
    """`text` as a value of the type `hint`; ValueError if it is none.

    bool: true, false, 1 or 0; a tuple: a,b,c or a JSON list; a dict: a JSON object; an optional value: none.
    """
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for choice in sorted(inner, key=lambda t: t is str):  # any text is a str, so that comes last
            with contextlib.suppress(ValueError, TypeError):
                return parse(choice, text)
    elif origin is typing.Literal and text in map(str, inner):
        return next(choice for choice in inner if str(choice) == text)
    elif origin is type(None) and text.lower() in ("none", "null"):
        return None
    elif origin is bool and text.lower() in _BOOL:
        return _BOOL[text.lower()]
    elif origin in (tuple, list):
        items = json.loads(text) if text.startswith("[") else [word for word in text.split(",") if word]
        return origin(parse(inner[0], str(item)) if inner else item for item in items)
    elif origin is dict:
        items = json.loads(text)
        return {name: parse(inner[1], str(item)) if inner else item for name, item in dict(items).items()}
    elif origin in (int, float, str):
        return origin(text)
    raise ValueError(f"{text!r} is no {_shown(hint)}")


_BOOL = {"true": True, "1": True, "false": False, "0": False}


def _shown(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


# -- commands ---------------------------------------------------------------------------------------------------------


def _tune(args: argparse.Namespace) -> None:
    grid = _grid(args)  # before torch loads a model: a wrong word fails at once
    job, runs = _job(args, {}), [(values, _job(args, values)) for values in grid]
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}; expected at least 1")
        import torch

        torch.set_num_threads(args.threads)
    from . import report, sweep, train

    if runs:
        summary, table = sweep.sweep(job, runs, progress=not args.json), report.sweep_table
    else:
        summary, table = train.tune(job, progress=not args.json), report.table
    _print(args, summary, lambda: f"{table(summary)}\n\n{args.out}: {', '.join(summary['files'])}")


def _grid(args: argparse.Namespace) -> list[dict[str, str]]:
    """Every combination of the values of --sweep, as field -> value; empty without one."""
    axes: dict[str, list[str]] = {}
    for word in args.sweep:
        name, equals, text = word.partition("=")
        name, values = name.replace("-", "_"), text.split(",")
        if not equals or not all(values):
            raise ValueError(f"--sweep {word}: expected field=value,value,...")
        if name in axes or any(word.partition("=")[0] == name for word in args.set):
            raise ValueError(f"--sweep {word}: {name} is given twice")
        axes[name] = values
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())] if axes else []


def _job(args: argparse.Namespace, values: dict[str, str]) -> Any:
    """The train.Job of the arguments, with `values` in place of some fields of the method or of itself."""
    from .train import Job

    hints = typing.get_type_hints(Job)
    words = {f.name: getattr(args, f.name) for f in dataclasses.fields(Job) if f.name != "method"}
    settings = list(args.set)
    for name, text in values.items():
        if name not in SWEPT:
            settings.append(f"{name}={text}")
            continue
        try:
            words[name] = parse(hints[name], text)
        except (ValueError, TypeError):
            raise ValueError(f"--sweep {name}={text}: expected {_shown(hints[name])}") from None
    pairs = [word.partition("=") for word in args.eval_data]
    if wrong := [word for word, (_, _, file) in zip(args.eval_data, pairs, strict=True) if not file]:
        raise ValueError(f"--eval-data {wrong[0]}: expected NAME=FILE")
    words["eval_data"] = tuple((name, file) for name, _, file in pairs)
    for name in ("targets", "train"):
        words[name] = None if words[name] is None else tuple(words[name])
    return Job(method=method_from(args.method, settings), **words)


def _explain(args: argparse.Namespace) -> None:
    method = method_from(args.method, args.set)
    from . import hf
    from .engine.attach import attach
    from .explain import explain

    rows = explain(attach(hf.load_model(args.model), method, args.targets))
    _print(args, rows, lambda: str(rows))


def _methods(args: argparse.Namespace) -> None:
    from .methods import methods

    found = [_described(key, cls) for key, cls in methods().items()]

    def text() -> str:
        rows = [(m["key"], m["class"], " ".join(m["roles"]), f"{m['lr']:g}", m["summary"]) for m in found]
        lines = columns([("method", "class", "targets", "lr", ""), *rows]).splitlines()
        fields = [", ".join(f"{f['name']}={f['default']!r}" for f in m["fields"]) for m in found]
        below = [f"    --set {line}" if line else "" for line in ["", *fields]]
        return "\n".join(line for pair in zip(lines, below, strict=True) for line in pair if line)

    _print(args, found, text)


def _described(key: str, cls: Any) -> dict[str, Any]:
    return {
        "key": key,
        "class": cls.__name__,
        "roles": list(cls.roles),
        "lr": cls.lr,
        "summary": cls.__doc__.strip().splitlines()[0],
        "fields": [{"name": name, "type": _shown(hint), "default": default} for name, hint, default in _fields(cls)],
    }


def _fields(cls: Any) -> list[tuple[str, Any, Any]]:
    hints = typing.get_type_hints(cls)
    out = []
    for f in dataclasses.fields(cls):
        made = None if f.default_factory is dataclasses.MISSING else f.default_factory()
        out.append((f.name, hints[f.name], made if f.default is dataclasses.MISSING else f.default))
    return out


def _info(args: argparse.Namespace) -> None:
    import platform
    from importlib import metadata

    import torch

    from .ops import all_ops

    try:
        from . import _C  # type: ignore[attr-defined]  # the binary may be absent

        build, isa = _C.build_info(), _C.cpu_isa()
    except (ImportError, ValueError) as error:
        build, isa = None, str(error)
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    packages: dict[str, str | None] = {}
    for name in RELATED:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    facts = {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cuda_devices": cuda,
        "cpu_isa": isa,
        "threads": torch.get_num_threads(),
        "build": build,
        "packages": packages,
    }
    ops = {op.name: op.backends() for op in all_ops().values()}

    def text() -> str:
        shown = {
            **facts,
            "cuda_devices": ", ".join(cuda) or "none",
            "build": "not built" if build is None else _flat(build),
        }
        shown["packages"] = ", ".join(f"{name} {version or 'not installed'}" for name, version in packages.items())
        rows = [("op", "backend", "")]
        for name, backends in ops.items():
            rows += [(name, backend, why or "available") for backend, why in backends.items()]
        return columns([(k, str(v)) for k, v in shown.items()]) + "\n\n" + columns(rows)

    _print(args, {**facts, "ops": ops}, text)


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value).lower()


def columns(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows in aligned columns; the last one runs free."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    padded = [[*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[-1]] for row in rows]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def _print(args: argparse.Namespace, data: Any, text: Callable[[], str]) -> None:
    print(json.dumps(data, indent=1) if args.json else text())
