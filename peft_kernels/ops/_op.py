"""The dispatcher: an `Op` is a contract with backends, and every call goes the same way.

A call takes one of two roads to the same kernel. The short road (eager, plain tensors) reaches it through one
`autograd.Function`, or none without gradients; the other is the dispatcher op `torch.ops.peft_kernels.<name>`, which
torch.compile, autocast, dispatch modes and tensor subclasses need. Under functorch the reference itself runs, because
plain torch is what `grad`, `jvp` and `vmap` know how to transform.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

KERNELS = "peft_kernels.kernels"
# In the order in which choose() asks them: name, file suffix of the module, device it serves.
BACKENDS = (("cuda", "native", "cuda"), ("triton", "triton", "cuda"), ("cpu", "native", "cpu"))
NAMES = ("reference", *(name for name, _, _ in BACKENDS))

_STRICT = os.environ.get("PEFT_KERNELS_STRICT") == "1"
_EXPLAIN = os.environ.get("PEFT_KERNELS_EXPLAIN") == "1"
_UNVERIFIED = os.environ.get("PEFT_KERNELS_UNVERIFIED") == "1"

_library = torch.library.Library("peft_kernels", "FRAGMENT")
_registry: dict[str, Op] = {}
_said: set[str] = set()  # what _EXPLAIN has printed already: one line per op and backend


class BackendError(RuntimeError):
    """A backend asked for by name cannot serve a call; the text lists every reason."""


class _Thread(threading.local):
    def __init__(self) -> None:  # in each thread
        self.backend: str | None = None  # pk.backend(...)
        self.record: list | None = None  # explain() collects the choices of a probe here


_thread = _Thread()


def _known(name: str, origin: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{origin} {name!r} is not a backend; expected one of {', '.join(NAMES)}")
    return name


_default = os.environ.get("PEFT_KERNELS_BACKEND") or None
if _default:
    _known(_default, "PEFT_KERNELS_BACKEND")
_plain_settings = not (_default or _STRICT or _EXPLAIN)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the `with`, every op of this thread runs on backend `name` or raises BackendError with its reasons.

    name: "reference", "cpu", "triton" or "cuda". Backward passes keep the choice of their forward.
    """
    before, _thread.backend = _thread.backend, _known(name, "backend")
    try:
        yield
    finally:
        _thread.backend = before


@contextmanager
def recording() -> Iterator[list[dict]]:
    """Collects dict(op, backend, reasons) for every kernel that runs in this thread."""
    before, _thread.record = _thread.record, []
    try:
        yield _thread.record
    finally:
        _thread.record = before


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated.

    keep(args, outputs) -> (tensors, constants): what backward needs; a tensor may be None.
    backward(tensors, constants, grads, needs) -> tuple: one gradient (or None) per argument; `needs` says which are
    wanted. It calls backward ops, which have no Gradient of their own: with grad mode on (create_graph) those run as
    their reference, so second derivatives are those of plain torch. Kept outputs carry no history, hence must not be
    used then.
    """

    keep: Callable[[tuple, Any], tuple[tuple, tuple]]
    backward: Callable[[tuple, tuple, tuple, tuple], tuple]


class Sample(NamedTuple):
    """One test input of an op: an id, the op's arguments, and which of them are differentiated."""

    id: str
    args: tuple
    differentiable: tuple[int, ...] = ()


class Cost(NamedTuple):
    """What the roofline needs: floating point operations and the bytes that must move."""

    flops: int
    bytes: int


class _Kernel(NamedTuple):
    name: str
    why_not: Callable[..., str]
    run: Callable[..., Any]
    wanted: bool  # False for a GPU kernel that runs on the CPU, which is for tests: asked for by name only
    run_: Callable[..., Any] | None  # the form of call_, which writes into the first argument


def _contiguous(out: Any) -> Any:
    return out.contiguous() if isinstance(out, Tensor) else type(out)(_contiguous(o) for o in out)


class Op:
    """A contract and its backends.

    name: also the dispatcher name, `torch.ops.peft_kernels.<name>`.
    schema: the dispatcher schema without the name; arguments are positional, outputs past the first are auxiliary
        (not differentiable, private to backward).
    reference: plain differentiable torch over the same arguments. It is the documentation, the fallback, the fake
        kernel and the oracle of the tests.
    samples(dtype, device): the test inputs.   cost(*args) -> Cost.
    gradient: None for ops that are themselves a backward; those are differentiated through the reference.
    autocast: positions in the schema of what autocast casts; the others keep their dtype.
    Outputs are contiguous and alias no input. A first output that is a list is several results.

    Lists of tensors stand last in the schema and are equally long. Python spreads them, here, in kernels, samples and
    gradients: their members follow the other arguments one by one, as autograd.Function tracks no tensor in a list.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        family: str,
        reference: Callable[..., Any],
        samples: Callable[[torch.dtype, str], Iterable[Sample]],
        cost: Callable[..., Cost],
        gradient: Gradient | None = None,
        autocast: tuple[int, ...] = (),
    ):
        self.name, self.schema, self.family = name, schema, family
        self.reference, self.samples, self.cost = reference, samples, cost
        self.gradient, self.autocast = gradient, autocast
        arguments = torch._C.parse_schema(name + schema).arguments
        self._lists = sum(isinstance(a.type, torch.ListType) and "Tensor" in str(a.type) for a in arguments)
        self._fixed = len(arguments) - self._lists
        self._first = next(i for i, a in enumerate(arguments) if str(a.type) in ("Tensor", "List[Tensor]"))
        self._kernels: dict[str, list[_Kernel]] = {}  # device type -> kernels, loaded at the first call there
        self._absent: dict[str, str] = {}  # backend -> why it serves no call in this process
        self._register()
        _registry[name] = self

    def __repr__(self) -> str:
        return f"Op({self.name}{self.schema})"

    # -- calling ------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any) -> Any:
        """The result: without the auxiliary outputs, which differentiable ops have for their own backward."""
        return self._call(args, inplace=False)

    def call_(self, *args: Any) -> Any:
        """As `__call__`, but may overwrite args[0] and return it; the caller must own it and use only the result.

        Without a gradient and with several outputs, it may overwrite as many of the first arguments.
        """
        return self._call(args, inplace=True)

    def _result(self, out: Any) -> Any:
        return out if self.gradient is None or isinstance(out, Tensor) else out[0]

    def grouped(self, args: tuple) -> tuple:
        """The arguments as the schema has them, in lists what Python spreads."""
        if not self._lists:
            return args
        size = (len(args) - self._fixed) // self._lists
        return *args[: self._fixed], *(list(args[i : i + size]) for i in range(self._fixed, len(args), size))

    def spread(self, args: tuple) -> tuple:
        """The inverse of grouped."""
        return *args[: self._fixed], *itertools.chain.from_iterable(args[self._fixed :])

    def _call(self, args: tuple, inplace: bool) -> Any:
        if torch.compiler.is_compiling():
            return self._result(self.dispatch(*self.grouped(args)))
        # Transforms, and dual numbers outside of them, know how to differentiate plain torch only.
        if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            return self._result(self.reference(*args))
        grad = torch.is_grad_enabled()
        needed = False
        plain = torch._C._len_torch_dispatch_stack() == 0 and not torch._C._is_any_autocast_enabled()
        for a in args:
            kind = type(a)
            if kind is Tensor or kind is torch.nn.Parameter:
                needed = needed or (grad and a.requires_grad)
            elif isinstance(a, Tensor):
                plain, needed = False, needed or (grad and a.requires_grad)
        if needed and self.gradient is None:
            return self.reference(*args)
        if not plain:
            return self._result(self.dispatch(*self.grouped(args)))
        if needed:
            out = _Short.apply(self, inplace and not args[0]._is_view(), *args)
            return list(out) if isinstance(out, tuple) else out
        return self._result(self.run(*args, inplace=inplace))

    def run(self, *args: Any, inplace: bool = False) -> Any:
        """Chooses a backend and runs it, below autograd."""
        if _thread.backend is None and _thread.record is None and _plain_settings:  # choose() for the usual case
            for k in self._kernels.get(args[self._first].device.type, ()):
                if k.wanted and not k.why_not(*args):
                    return k.run_(*args) if inplace and k.run_ is not None else k.run(*args)
        kernel, reasons = self.choose(*args)
        if _thread.record is not None or _EXPLAIN:
            self._tell(kernel, reasons)
        if kernel is None:
            return _contiguous(self.reference(*args))
        if inplace and kernel.run_ is not None:
            return kernel.run_(*args)
        return kernel.run(*args)

    # -- choosing -----------------------------------------------------------------------------------------------------

    def choose(self, *args: Any) -> tuple[_Kernel | None, dict[str, str]]:
        """The first backend with no reason not to serve these arguments (None: the reference), and the reasons met."""
        device = _device(args)
        name = _thread.backend or _default
        reasons: dict[str, str] = {}
        if name == "reference":
            return None, reasons
        kernels = self._kernels.get(device)
        if kernels is None:
            kernels = self._load(device)
        for kernel in kernels:
            if name is not None and kernel.name != name:
                continue
            if name is None and not kernel.wanted:
                continue
            reason = kernel.why_not(*args)
            if not reason:
                return kernel, reasons
            reasons[kernel.name] = reason
        if name is not None or _STRICT:
            why = {**{k: v for k, v in self._absent.items() if name in (None, k)}, **reasons}
            if name is not None and not why:
                why = {name: f"it does not serve {device} tensors"}
            asked = f"backend {name!r}" if name else "every backend (PEFT_KERNELS_STRICT=1)"
            raise BackendError(f"{self.name}: {asked} refused: " + "; ".join(f"{k}: {v}" for k, v in why.items()))
        if device == "cpu":
            _warn_without_binary()
        return None, reasons

    def explain(self, *args: Any) -> dict:
        """dict(op, backend, reasons): which backend serves these arguments and why the others do not."""
        kernel, reasons = self.choose(*args)
        return self._row(kernel, reasons)

    def backends(self, device: str | None = None) -> dict[str, str]:
        """Backend -> "" if it can serve calls on `device` (default: any device) in this process, else the reason."""
        out = {}
        for name, _, serves in BACKENDS:
            if device in (None, serves):
                if serves not in self._kernels:
                    self._load(serves)
                out[name] = self._absent.get(name, "")
        return {**out, "reference": ""}

    def _row(self, kernel: _Kernel | None, reasons: dict[str, str]) -> dict:
        name = kernel.name if kernel else "reference"
        why = {b: f"it serves {serves} tensors" for b, _, serves in BACKENDS} if kernel else {}
        why = {b: reason for b, reason in {**why, **self._absent, **reasons}.items() if b != name}
        return {"op": self.name, "backend": name, "reasons": why}

    def _tell(self, kernel: _Kernel | None, reasons: dict[str, str]) -> None:
        row = self._row(kernel, reasons)
        if _thread.record is not None:
            _thread.record.append(row)
        line = f"{row['op']}: {row['backend']}" + "".join(f"; not {k}: {v}" for k, v in row["reasons"].items())
        if _EXPLAIN and line not in _said:
            _said.add(line)
            print(f"peft_kernels: {line}", file=sys.stderr)

    def _load(self, device: str) -> list[_Kernel]:
        kernels = []
        for name, suffix, serves in BACKENDS:
            if serves != device and not _runs_on_cpu(name):
                continue
            module, reason = _module(self.family, suffix, emulated=name == "cuda" and device == "cpu")
            if module is not None and device == "cuda" and not torch.cuda.is_available():
                reason = "torch sees no CUDA device"
            elif module is not None and not _has(module, self.name, name):
                reason = f"{self.family} has no {name} kernel for this op"
            elif module is not None:
                reason = module.unavailable(device) or (_unverified(module) if device == "cuda" else "")
            if reason:
                if serves == device:
                    self._absent[name] = reason
                continue
            why_not = getattr(module, f"why_not_{self.name}", None) or module.why_not
            run, run_ = getattr(module, self.name), getattr(module, self.name + "_", None)
            kernels.append(_Kernel(name, why_not, run, serves == device, run_))
        self._kernels[device] = kernels
        return kernels

    # -- the dispatcher op --------------------------------------------------------------------------------------------

    def _register(self) -> None:
        name, qualname = self.name, f"peft_kernels::{self.name}"
        _library.define(name + self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        run = (lambda *args: self.run(*self.spread(args))) if self._lists else self.run
        _library.impl(name, run, "CompositeExplicitAutograd")
        fake = lambda *args: _contiguous(self.reference(*self.spread(args)))  # noqa: E731
        torch.library.register_fake(qualname, fake, lib=_library)
        self.dispatch = getattr(torch.ops.peft_kernels, name).default
        if self.gradient is not None:

            def setup_context(ctx, inputs, output):
                _keep(ctx, self, self.spread(inputs), output)

            torch.library.register_autograd(qualname, _backward, setup_context=setup_context, lib=_library)
        if self.autocast:
            for device in ("cpu", "cuda"):
                _library.impl(name, self._autocast(device), f"Autocast{device.upper()}")

    def _autocast(self, device: str) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def cast(i: int, a: Any, dtype: torch.dtype) -> Any:
            if isinstance(a, list):
                return [cast(i, member, dtype) for member in a]
            eligible = i in self.autocast and isinstance(a, Tensor) and a.is_floating_point()
            return a.to(dtype) if eligible and a.dtype != torch.float64 else a

        def autocast(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return self.dispatch(*(cast(i, a, dtype) for i, a in enumerate(args)))

        return autocast


def _keep(ctx, op: Op, args: tuple, out: Any) -> None:
    assert op.gradient is not None  # only differentiable ops come here
    tensors, constants = op.gradient.keep(args, out)
    ctx.kept = op, constants, _thread.backend
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, *grads):
    op, needs = ctx.kept[0], ctx.needs_input_grad
    if not op._lists:
        return _differentiate(ctx, needs, grads)
    # torch takes a list with None in it for no list of tensors: one answer, one gradient.
    size = max(len(n) for n in needs if isinstance(n, list))
    listed = (*needs[: op._fixed], *(n if isinstance(n, list) else [n] * size for n in needs[op._fixed :]))
    out = op.grouped(_differentiate(ctx, op.spread(listed), grads))
    return tuple(
        None if isinstance(g, list) and not isinstance(n, list) else g for g, n in zip(out, needs, strict=True)
    )


def _differentiate(ctx, needs: tuple, grads: tuple) -> tuple:
    if grads[0] is None:
        return (None,) * len(needs)
    op, constants, backend = ctx.kept
    before, _thread.backend = _thread.backend, backend
    try:
        return op.gradient.backward(ctx.saved_tensors, constants, grads, needs)
    finally:
        _thread.backend = before


class _Short(torch.autograd.Function):
    """The short road with gradients: one Function for all ops."""

    @staticmethod
    def forward(ctx, op: Op, inplace: bool, *args):
        out = op.run(*args, inplace=inplace)
        _keep(ctx, op, args, out)
        first = op._result(out)
        if inplace and first is args[0]:
            ctx.mark_dirty(first)
            return first
        return tuple(_owned(t, args) for t in first) if isinstance(first, list) else _owned(first, args)

    @staticmethod
    def backward(ctx, *grads):
        grads = (list(grads),) if ctx.kept[0]._lists else grads
        return None, None, *_differentiate(ctx, ctx.needs_input_grad[2:], grads)


def _owned(out: Tensor, args: tuple) -> Tensor:
    """The output as no view of what the kernel made: autograd lets nobody write into a view from inside a Function."""
    if not out._is_view() or any(isinstance(a, Tensor) and (out._base is a or out._base is a._base) for a in args):
        return out
    return out.data


def write(target: Tensor, out: Tensor) -> None:
    """Puts what `call_` returned into the tensor that it may have overwritten already."""
    if out is not target:
        target.copy_(out)
    elif not target.is_inference():
        torch.autograd.graph.increment_version(target)  # kernels write behind autograd's back


def all_ops() -> dict[str, Op]:
    """Every registered op by name."""
    return dict(_registry)


def _device(args: tuple) -> str:
    for a in args:
        if isinstance(a, Tensor):
            return a.device.type
    raise ValueError("an op needs at least one tensor argument")


def _runs_on_cpu(name: str) -> bool:
    """Do the tests run this GPU backend on the CPU, Triton in its interpreter and CUDA C++ through csrc/emulate?"""
    return {
        "triton": os.environ.get("TRITON_INTERPRET") == "1",
        "cuda": bool(os.environ.get("PEFT_KERNELS_EMULATED")),
    }.get(name, False)


def _has(module: Any, op: str, backend: str) -> bool:
    return hasattr(module, op) and (backend != "cuda" or op in module.ON_CUDA)


def _module(family: str, suffix: str, emulated: bool = False) -> tuple[Any, str]:
    """The backend module of an op family, or the reason why there is none."""
    name = f"{KERNELS}.{family}.{family}_{suffix}"
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        return None, f"{family} has no {suffix} kernels"
    if suffix == "triton" and importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed: pip install triton"
    if emulated:
        return importlib.import_module(f"{KERNELS}.common.library").emulated(name), ""
    return importlib.import_module(name), ""


def _unverified(module: Any) -> str:
    capability = "{}.{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    if _UNVERIFIED or not capability or capability in module.VERIFIED_ON:
        return ""
    return (
        f"no correct run on compute capability {capability} is on record; "
        "PEFT_KERNELS_UNVERIFIED=1 takes the kernel all the same"
    )


def _warn_without_binary() -> None:
    native = importlib.import_module(f"{KERNELS}.common.library")
    reason = native.unavailable("cpu")
    if reason and "binary" not in _said:
        _said.add("binary")
        warnings.warn(f"peft_kernels runs without its C++ kernels, in plain torch: {reason}", stacklevel=2)
