"""The command line: arguments in, tables or --json out. Slow imports wait for the command that needs them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import sys
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ._version import __version__
from .engine.text import columns, shown

PROGRAM = "peft-kernels"
MODEL = "PATH_OR_HUB_ID"
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
    "cma",
)
# What --sweep can vary besides the fields of the method.
SWEPT = ("lr", "epochs", "batch_size", "temperature", "teacher_weight", "sigma")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    0: done; 1: `check` or `bench` found a wrong result; 2: bad input, one line on stderr; 130: interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt as stop:
        print(f"{PROGRAM}: interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    from .quant import KINDS

    parser = _Parser(prog=PROGRAM, description="Parameter-efficient fine-tuning on fused kernels.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(
        name: str, run: Callable[[argparse.Namespace], int | None], text: str, json_lines: bool = False
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if json_lines:
            kept = "also write the rows as JSON lines; without FILE, print them instead of a table"
            sub.add_argument("--json", nargs="?", const="-", metavar="FILE", help=kept)
        else:
            sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        sub.set_defaults(run=run)
        return sub

    _add_tune(command("tune", _tune, "fine-tune a model and write the adapter, a log, a picture and a summary"))

    merge = command("merge", _merge, "write a model with its adapter merged, for plain transformers to load")
    merge.add_argument("--adapter", required=True, metavar="DIR", help="what tune or pk.save wrote")
    merge.add_argument("--model", metavar=MODEL, help="default the one that the adapter names")
    merge.add_argument("--out", required=True, metavar="DIR", help="directory to write; must not exist")
    merge.add_argument("--force", action="store_true", help="replace an earlier result in DIR")
    merge.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default as the model's are"
    )

    merge.add_argument("--packed", action="store_true", help="of a quantised model: pack it again; default dense")
    merge.add_argument("--small", action="store_true", help="after structured pruning: without the pruned units")

    convert = command("convert", _convert, "write a model with its linear layers quantised, file by file")
    convert.add_argument("source", metavar="MODEL_DIR", help="a transformers model in safetensors files")
    convert.add_argument("--to", required=True, choices=KINDS, help="4 bits with block scales, 8 with row scales")
    convert.add_argument("--out", required=True, metavar="DIR", help="directory to write; must not exist")
    convert.add_argument("--force", action="store_true", help="replace an earlier result in DIR")
    convert.add_argument("--blocksize", type=int, default=64, help="of nf4: weights to a scale; default %(default)s")
    convert.add_argument("--single-quant", action="store_true", help="of nf4: keep the scales in fp32")
    convert.add_argument(
        "--skip", nargs="*", default=["head", "embed"], metavar="ROLE", help="what stays dense; default head embed"
    )

    explain = command(
        "explain", _explain, "show what a method or an adapter trains, which kernel serves each layer, and why"
    )
    explain.add_argument("source", metavar="MODEL_OR_ADAPTER", help="a transformers model, or an adapter's directory")
    explain.add_argument("--model", metavar=MODEL, help="the model of an adapter; default the one that it names")
    _add_method(explain, required=False)

    check = command("check", _check, "compare every backend that runs here with the fp64 reference of its op")
    check.add_argument("--op", nargs="+", metavar="NAME", help="default every op")
    check.add_argument("--backend", nargs="+", metavar="NAME", help="default every backend")
    _add_bench(command("bench", _bench, "time the kernels against their rivals, checking every result", True))
    methods = command("methods", _methods, "show what each method is, costs on a model and did when it was measured")
    methods.add_argument("key", nargs="*", metavar="KEY", help="these alone, with their fields")
    methods.add_argument(
        "--model", metavar=MODEL, help="count each with its defaults on this model; only its config is read"
    )
    methods.add_argument(
        "--log", metavar="FILE", help="show the figures of comparison.json, which tune --method all wrote"
    )
    rank = "instead, of a SIZE x SIZE layer, how many numbers each method trains and the rank of its change"
    methods.add_argument("--rank", nargs="?", type=int, const=768, metavar="SIZE", help=f"{rank}; default %(const)s")
    command("info", _info, "show the environment, and which backends each op has here or why not")
    return parser


def _add_tune(tune: argparse.ArgumentParser) -> None:
    from .tasks import tasks
    from .train import PRECISIONS

    tune.add_argument("--model", metavar=MODEL, help="a transformers model; a comparison's default is the demo's")
    several = "; or all, keys with commas or globs: a comparison, each with its defaults in its own process"
    _add_method(tune, required=True, more=several)
    tune.add_argument("--data", required=True, metavar="FILE", help="rows of text: .tsv, .csv or .jsonl [.gz, .xz]")
    tune.add_argument(
        "--out", metavar="DIR", help="directory to write; must not exist; a comparison's default comparison"
    )
    tune.add_argument("--force", action="store_true", help="replace an earlier result in DIR, discard its checkpoint")
    resumed = "continue from DIR.checkpoint if a run was interrupted, a comparison from DIR"
    tune.add_argument("--resume", action="store_true", help=resumed)
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
    second = "of a comparison: another task, whose texts show what a method leaves of the base's features"
    tune.add_argument("--second", metavar="FILE", help=second)
    tune.add_argument("--teacher", metavar="PATH", help="learn from this model, or adapter of tune, beside the labels")
    tune.add_argument("--temperature", type=float, metavar="T", help="of the teacher's predictions; default 2")
    tune.add_argument("--teacher-weight", type=float, metavar="W", help="the teacher's part of the loss; default 0.5")
    tune.add_argument("--validation", type=float, metavar="FRACTION", help="training rows held out for choosing")
    tune.add_argument("--patience", type=int, metavar="EPOCHS", help="stop after so many without a lower loss there")
    tune.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=V1,V2,...",
        help=f"one run per value of a field of the method, or of {', '.join(SWEPT)}; repeatable: every combination",
    )
    tune.add_argument(
        "--search",
        metavar="N",
        help="no gradients: CMA-ES within N evaluations, or seconds as 60s; for few numbers",
    )
    tune.add_argument("--sigma", type=float, help="of --search: the first distance of candidates; default 0.1")
    tune.add_argument("--draw", type=int, metavar="BATCHES", help="of --search: anew for each generation; default all")
    tune.add_argument("--epochs", type=int, help="default 1")
    tune.add_argument("--budget", metavar="LENGTH", help="of training instead: 60s or 2m of wall time, or 100steps")
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


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("words", nargs="*", metavar="WORD", help="only cases with all of these in their name, as nf4")
    bench.add_argument("--resume", action="store_true", help="go on with the cases that --json FILE has not yet")
    size = bench.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the headline cases, about a minute")
    size.add_argument("--all", action="store_true", help="every case; default those that take twenty minutes on a CPU")
    bench.add_argument("--list", action="store_true", help="only print the names of the cases")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default cuda if there is one")
    bench.add_argument("--backend", nargs="+", metavar="NAME", help="of ours; default every one that is here")
    bench.add_argument("--seconds", type=float, help="for each case; default 4, with --quick 1")
    bench.add_argument("--no-rivals", action="store_true", help="time ours and the yardstick alone")
    bench.add_argument("--compile", action="store_true", help="HF PEFT and ours under torch.compile too; slow")
    bench.add_argument("--from", dest="source", metavar="FILE", help="show the rows of an earlier --json FILE instead")
    bench.add_argument("--plot", metavar="FILE", help="draw time and memory against the number of rows, .png or .svg")


def _add_method(parser: argparse.ArgumentParser, required: bool, more: str = "") -> None:
    from .methods import methods

    default = "" if required else "; default lora"
    known = f"one of {', '.join(methods())}, or a recipe file (.yaml, .json){default}{more}"
    parser.add_argument("--method", required=required, metavar="NAME_OR_FILE", help=known)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the method, such as rank=16; repeatable",
    )
    parser.add_argument("--targets", nargs="+", metavar="ROLE", help="roles or globs; default the method's own")


# -- commands ---------------------------------------------------------------------------------------------------------


def _tune(args: argparse.Namespace) -> int | None:
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}; expected at least 1")
        import torch

        torch.set_num_threads(args.threads)
    from .recipes import is_recipe

    if args.method == "all" or not is_recipe(args.method) and any(mark in args.method for mark in ",*?["):
        return _compare(args)
    for option in ("model", "out"):
        if getattr(args, option) is None:
            raise ValueError(f"--{option} is missing; only a comparison, --method all, has a default")
    if args.second is not None:
        raise ValueError(f"--second {args.second} is for a comparison, --method all or several; leave it out")
    grid = _grid(args)  # before torch loads a model: a wrong word fails at once
    job, runs = _job(args, {}), [(values, _job(args, values)) for values in grid]
    from . import report, sweep, train

    if runs:
        summary, table = sweep.sweep(job, runs, progress=not args.json), report.sweep_table
    else:
        summary, table = train.tune(job, progress=not args.json), report.table
    _print(args, summary, lambda: f"{table(summary)}\n\n{args.out}: {', '.join(summary['files'])}")
    return None


# Options of tune that a comparison has no use for.
_OF_ONE = ("set", "targets", "sweep", "eval_data", "teacher", "validation", "patience", "checkpoint_every", "lr")


def _compare(args: argparse.Namespace) -> int:
    from . import compare, comparison, hf
    from .settings import method_from

    for option in _OF_ONE:
        if getattr(args, option) not in (None, []):
            raise ValueError(
                f"--{option.replace('_', '-')} is for one method; a comparison takes each with its defaults"
            )
    if args.task != "classify":
        raise ValueError(f"--task {args.task}; a comparison needs classes, --task classify")
    keys = compare.chosen(args.method)
    name = args.model or hf.DEMO
    args.model, args.out = args.model or hf.demo_model(), args.out or "comparison"
    jobs, left_out = [], {}
    for key in dict.fromkeys((*compare.BESIDE, *keys)):
        try:
            method = method_from(key, ())
        except ValueError as error:  # it has no defaults
            left_out[key] = str(error).removeprefix(f"--method {key} ")
            continue
        jobs.append(_job(args, {}, method))
    summary = compare.compare(
        jobs, left_out, model=name, second=args.second, threads=args.threads, progress=not args.json
    )
    files = f"{args.out}: {compare.LOG}, {compare.PICTURE}"
    _print(args, summary, lambda: f"{comparison.table(summary)}\n\n{files}")
    return int(any("failed" in row for row in summary["rows"]))


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


def _job(args: argparse.Namespace, values: dict[str, str], method: Any = None) -> Any:
    """The train.Job of the arguments, with `values` in place of some fields of the method or of itself.

    method: None takes --method.
    """
    from .engine.method import fields
    from .settings import method_from, method_of_word, parse
    from .train import Job

    hints = typing.get_type_hints(Job)
    own = {f.name for f in fields(method_of_word(args.method))} if method is None else set()
    words = {f.name: getattr(args, f.name) for f in dataclasses.fields(Job) if f.name != "method"}
    settings = list(args.set)
    for name, text in values.items():
        if name not in SWEPT or name in own:
            settings.append(f"{name}={text}")
            continue
        try:
            words[name] = parse(hints[name], text)
        except (ValueError, TypeError):
            raise ValueError(f"--sweep {name}={text}: expected {shown(hints[name])}") from None
    pairs = [word.partition("=") for word in args.eval_data]
    if wrong := [word for word, (_, _, file) in zip(args.eval_data, pairs, strict=True) if not file]:
        raise ValueError(f"--eval-data {wrong[0]}: expected NAME=FILE")
    words["eval_data"] = tuple((name, file) for name, _, file in pairs)
    for name in ("targets", "train"):
        words[name] = None if words[name] is None else tuple(words[name])
    return Job(method=method or method_from(args.method, settings), **words)


def _merge(args: argparse.Namespace) -> None:
    import torch

    from .standalone import standalone, table

    dtype = getattr(torch, args.dtype) if args.dtype else None
    report = standalone(args.adapter, args.out, args.model, dtype, args.force, args.packed, args.small)
    _print(args, report, lambda: f"{table(report)}\n\n{args.out}: {', '.join(report['files'])}")


def _convert(args: argparse.Namespace) -> None:
    from .convert import convert, table

    settings = {"double_quant": not args.single_quant, "blocksize": args.blocksize}
    report = convert(
        args.source, args.out, args.to, skip=tuple(args.skip), force=args.force, progress=not args.json, **settings
    )
    _print(args, report, lambda: f"{table(report)}\n\n{args.out}: {', '.join(report['files'])}")


def _explain(args: argparse.Namespace) -> None:
    from . import hf
    from .engine.attach import attach, state_of
    from .engine.counts import counts
    from .engine.life import all_tuners
    from .engine.parts import parts_of
    from .engine.store import CONFIG, load
    from .explain import explain
    from .methods import SVD
    from .settings import method_from

    if (Path(args.source) / CONFIG).is_file():
        if args.method or args.set or args.targets:
            raise ValueError(
                f"{args.source} is an adapter, which says its method; leave --method, --set, --targets out"
            )
        model, _ = hf.load_base(args.source, args.model)
        load(model, args.source, trainable=True)  # counted as it was trained
    else:
        if args.model:
            raise ValueError(f"--model goes with an adapter, and {args.source} is none (it has no {CONFIG})")
        method = method_from(args.method or "lora", args.set)
        model, _ = hf.load_model(args.source)
        attach(model, method, args.targets)
    ((name, adapter),) = state_of(model).adapters.items()
    n, factors, kernels = counts(model), SVD.report(model), explain(model)
    first = next(filter(None, (tuner.ready() for tuner in all_tuners(model, name))), "")  # what it trains is not chosen
    report = {
        "model": model.name_or_path,
        "adapter": [
            {**p.method.to_json(), "targets": p.targets, "exclude": p.exclude, "layers": p.layers}
            for p in adapter.parts
        ],
        "counts": dataclasses.asdict(n),
        "not_ready": first,
        "factors": factors,
        "kernels": kernels,
    }
    parts = [part for part, _ in parts_of(adapter)]
    texts = ("\n".join(map(_part, parts)), str(n), first, str(factors) if factors else "", str(kernels))
    _print(args, report, lambda: "\n\n".join(filter(None, texts)))


def _part(part: Any) -> str:
    """One line: the method, where it is, its fields."""
    limits = [f"without {' '.join(part.exclude)}"] if part.exclude else []
    limits += [f"in layers {' '.join(map(str, part.layers))}"] if part.layers is not None else []
    fields = [f"{name}={value!r}" for name, value in part.method.to_json().items() if name != "method"]
    line = " ".join((part.method.key, "on", *part.targets, *limits))
    return f"{line}: {', '.join(fields)}" if fields else line


def _check(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .check import check, rows, verdict
    from .ops import all_ops
    from .ops._op import NAMES

    ops = all_ops()
    for option, given, known in (("--op", args.op or (), ops), ("--backend", args.backend or (), NAMES)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"{option} {unknown[0]}; expected one of {', '.join(known)}")
    chosen = [op for name, op in ops.items() if args.op is None or name in args.op]
    bar = tqdm(chosen, desc=PROGRAM, unit="op", delay=3, leave=False)  # on stderr, and only if it takes longer
    results = [result for op in bar for result in check(op, args.backend)]
    _print(args, [dataclasses.asdict(r) for r in results], lambda: f"{columns(rows(results))}\n\n{verdict(results)}")
    return int(any(r.state == "failed" for r in results))


def _bench(args: argparse.Namespace) -> int:
    import torch

    from .bench import results, runner
    from .ops._op import NAMES

    if unknown := [name for name in args.backend or () if name not in NAMES]:
        raise ValueError(f"--backend {unknown[0]}; expected one of {', '.join(NAMES)}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device")
    options = runner.Options(
        selection="quick" if args.quick else "all" if args.all else "default",
        words=tuple(args.words),
        device=device,
        backends=tuple(args.backend) if args.backend else None,
        seconds=args.seconds or (1.0 if args.quick else 4.0),
        rivals=not args.no_rivals,
        compiled=args.compile,
    )
    if args.resume and args.json in (None, "-"):
        raise ValueError("--resume goes on with a --json FILE; name that")
    kept = results.read(args.json) if args.resume and os.path.exists(args.json) else []
    if args.source:
        found = [row for row in results.read(args.source) if all(word in row["case"] for word in args.words)]
        source: Iterable[dict[str, Any]] = found
    else:
        chosen = runner.selected(options)
        if args.list:
            print("\n".join(case.name for case in chosen))
            return 0
        done = {row["case"] for row in kept} - {row["case"] for row in kept[-1:]}  # the last may lack rivals
        source = runner.run([case for case in chosen if case.name not in done], options)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        mode = "a" if args.resume else "w"
        file = stack.enter_context(open(args.json, mode)) if args.json not in (None, "-") else None
        for row in source:
            if args.json == "-":
                print(results.dumps(row), flush=True)
            else:
                _show(row, rows[-1] if rows else None)
            if file and "failed" not in row:
                print(results.dumps(row), file=file, flush=True)
            rows.append(row)
    if args.plot:
        results.plot([*kept, *rows], args.plot)
    return int(any("failed" in row for row in rows))


def _show(row: dict[str, Any], before: dict[str, Any] | None) -> None:
    from .bench import results

    if before is None:
        print(results.heading(row))
    if before is None or before["case"] != row["case"]:
        print(f"\n{row['case']}")
    print(results.line(row), flush=True)


def _methods(args: argparse.Namespace) -> None:
    from .overview import details, grouped, overview, table

    if args.rank is not None:
        if args.key or args.model or args.log:
            raise ValueError("--rank measures every method on a layer of its own; leave KEY, --model and --log out")
        return _ranks(args)
    model = None
    if args.model:
        from . import hf

        model = hf.skeleton(os.path.expanduser(args.model))
    found = overview(args.key, model, args.log)

    def text() -> str:
        lines = [table(grouped(found)), *(map(details, found) if args.key else ())]
        if model is not None:
            total = sum(p.numel() for p in model.parameters())
            lines.append(f"{args.model}: {type(model).__name__}, {total:,} numbers; counts without a head")
        return "\n\n".join(lines)

    _print(args, found, text)


def _ranks(args: argparse.Namespace) -> None:
    from .ranks import ranks, table

    found = ranks(args.rank)
    _print(args, found, lambda: table(found))


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


def _print(args: argparse.Namespace, data: Any, text: Callable[[], str]) -> None:
    print(json.dumps(data, indent=1) if args.json else text())
