"""`pagoda.coverage`: which operations a model has and how each would run, before anything runs.

The model runs once on fake tensors: sizes and types only, no memory and no arithmetic. Each
operation is then rewritten as for the chip (`decompositions`), and every part looked up: Inductor
makes a loop nest of it, the kernel library has it, or nobody has.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pagoda.pytorch import composed, decompositions, device, eager, grouped

aten = torch.ops.aten

NOTHING, LOOPS, LIBRARY = "no arithmetic", "loop nest", "library kernel"
HOST, UNSUPPORTED = "host", "unsupported"
_WORST_FIRST = (
    UNSUPPORTED,
    HOST,
    LIBRARY,
    LOOPS,
    NOTHING,
)  # an operation runs as its worst part does

_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default)
# Allocation, views that torch does not call so, and reading one element back.
_MEMORY = (
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
    aten._unsafe_view, aten.lift_fresh, aten._local_scalar_dense,
)  # fmt: skip
_DATA_DEPENDENT = (DataDependentOutputException, GuardOnDataDependentSymNode)
_GRADIENTS = "backward pass"
_NOT_THE_USERS = tuple(
    str(Path(package.__file__).parent) for package in (torch, sys.modules["pagoda"])
)


@dataclass(frozen=True)
class OperationUse:
    """One operation of a model."""

    name: str  # as torch has it: "aten.addmm"
    count: int
    runs_as: str  # one of the five above
    where: tuple[str, ...]  # the lines that call it, "file.py:12", none of them torch's
    reason: str = ""  # why it is unsupported, and what to do


@dataclass(frozen=True)
class Coverage:
    """What `coverage` found; printing it gives a table."""

    operations: tuple[OperationUse, ...]
    stopped: str = ""  # why the model could not be followed to its end; empty: it could

    @property
    def supported(self) -> tuple[OperationUse, ...]:
        return tuple(use for use in self.operations if use.runs_as != UNSUPPORTED)

    @property
    def unsupported(self) -> tuple[OperationUse, ...]:
        return tuple(use for use in self.operations if use.runs_as == UNSUPPORTED)

    def __str__(self) -> str:
        bad = len(self.unsupported)
        verdict = f"{bad} unsupported" if bad else "all supported"
        wide = max([len("operation"), *(len(use.name) for use in self.operations)])
        lines = [
            f"{len(self.operations)} operations, {verdict}",
            f"{'operation':{wide}} {'times':>6}  {'runs as':14}  where",
        ]
        for use in self.operations:
            first, *others = use.where
            place = f"{first} and {len(others)} more" if others else first
            lines.append(f"{use.name:{wide}} {use.count:6}  {use.runs_as:14}  {place}")
            lines += textwrap.wrap(use.reason, 100, initial_indent="    ", subsequent_indent="    ")
        return "\n".join(lines + textwrap.wrap(self.stopped, 100))


def coverage(model: nn.Module, inputs: Any, *, backward: bool = False) -> Coverage:
    """The operations of `model(*inputs)`; nothing is computed, and the model does not change.

    model: on any device, in the mode (training or not) that is meant. inputs: a tensor, a sequence
    of positional arguments or a mapping of keyword arguments. backward: also the operations of the
    gradients of all floating-point results. Raises what the model raises for such inputs.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with mode:
            made = torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=device.NAME
            )
        return made.requires_grad_(value.requires_grad)

    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: fake(value) for name, value in state.items()}
    named = isinstance(inputs, Mapping)
    given = inputs if isinstance(inputs, (tuple, list, Mapping)) else (inputs,)
    given = pytree.tree_map(fake, dict(given) if named else tuple(given))
    recorder = _Recorder()
    stopped = ""
    try:
        with mode, recorder, torch.set_grad_enabled(backward):
            arguments = ((), given) if named else (given, {})
            out = torch.func.functional_call(model, state, *arguments)
            if backward:
                recorder.place = _GRADIENTS
                _sum(out).backward()
    except _DATA_DEPENDENT:
        stopped = (
            f"Followed to {recorder.last} only: what comes next depends on data. Eager code goes "
            "on there; compiled code is interrupted."
        )
    with mode:
        uses = [found.use(name) for name, found in recorder.found.items()]
    uses.sort(key=lambda use: (_WORST_FIRST.index(use.runs_as), -use.count))
    return Coverage(tuple(uses), stopped)


def _sum(out: Any) -> torch.Tensor:
    tensors = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    return sum(t.sum() for t in tensors if t.requires_grad)  # type: ignore[return-value]


@dataclass
class _Found:
    """An operation and how it was called: once for each overload and structure of arguments."""

    calls: dict[tuple, tuple[Any, tuple, dict[str, Any], Any]] = field(default_factory=dict)
    count: int = 0
    places: dict[str, None] = field(default_factory=dict)

    def use(self, name: str) -> OperationUse:
        verdicts = [_judge(*call) for call in self.calls.values()]
        runs_as, reason = min(verdicts, key=lambda verdict: _WORST_FIRST.index(verdict[0]))
        return OperationUse(name, self.count, runs_as, tuple(self.places), reason)


class _Recorder(TorchDispatchMode):
    """Notes every operation on fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, _Found] = {}
        self.place = ""  # where operations are called; empty: look at the stack
        self.last = "its beginning"

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.last = self.place or _place()
        # torch's rule for grouped products is that of CUDA's kernel: bfloat16 only.
        rule = grouped.grouped_mm if op is aten._grouped_mm.default else op
        out = rule(*args, **kwargs)
        if _on_device((args, kwargs, out)) and op.namespace not in ("prim", "profiler"):
            found = self.found.setdefault(str(op.overloadpacket), _Found())
            found.count += 1
            found.places[self.last] = None
            structure = repr(pytree.tree_map(_structure, (args, kwargs)))
            found.calls.setdefault((op, structure), (op, args, kwargs, out))
        return out


def _on_device(values: Any) -> bool:
    tensors = (t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor))
    return any(t.device.type == device.NAME for t in tensors)


def _structure(value: Any) -> Any:
    return (value.dtype, value.dim()) if isinstance(value, torch.Tensor) else value


def _place() -> str:
    """The innermost line of the stack that is neither torch's nor ours."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(("<", *_NOT_THE_USERS)):
            return f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch itself"


def _judge(op: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> tuple[str, str]:
    """How it runs; for unsupported ones why, and what to do."""
    if op.is_view or op.overloadpacket in _MEMORY:
        return NOTHING, ""
    try:
        eager.require_types(op, (*args, out), kwargs)
    except NotImplementedError as error:
        return UNSUPPORTED, str(error).partition(": ")[2]
    if eager.runs_on_host(op, args, kwargs) or _finds_positions(op, args):
        return HOST, ""
    if op in composed.REWRITTEN:
        return LOOPS, ""
    parts = {part: _part(part) for part in _parts(op, args, kwargs)}
    missing = [str(part) for part, runs_as in parts.items() if runs_as == UNSUPPORTED]
    if missing:
        return UNSUPPORTED, (
            f"{', '.join(missing)} is neither a loop nest nor a library kernel. Rewrite the model "
            "without it, or compute it on the CPU with .cpu()."
        )
    return min(parts.values(), key=_WORST_FIRST.index, default=NOTHING), ""


def _finds_positions(op: Any, args: tuple) -> bool:
    """Whether a mask is an index: the positions where it holds are found on the host."""
    if op.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
        return False
    masked = any(index is not None and index.dtype == torch.bool for index in args[1])
    return masked and not (op is aten.index_put_.default and composed.fills_mask(args))


def _parts(op: Any, args: tuple, kwargs: dict[str, Any]) -> set[Any]:
    """The operations that are left after rewriting this one; itself, if that cannot be traced."""
    flat, spec = pytree.tree_flatten((args, kwargs))
    where = [k for k, value in enumerate(flat) if isinstance(value, torch.Tensor)]

    def call(*tensors: torch.Tensor) -> Any:
        values = list(flat)
        for k, tensor in zip(where, tensors, strict=True):
            values[k] = tensor
        given, named = pytree.tree_unflatten(values, spec)
        return op(*given, **named)

    functional = torch.func.functionalize(call, remove="mutations_and_views")
    tensors = [flat[k].detach() for k in where]
    try:
        with torch.no_grad():
            traced = make_fx(functional, decomposition_table=decompositions.table())(*tensors)
    except Exception:  # noqa: BLE001 - whatever torch's rules for an operation raise
        return {op}
    return {node.target for node in traced.graph.nodes if node.op == "call_function"}


def _part(op: Any) -> str:
    from torch._inductor import lowering

    if not isinstance(op, torch._ops.OpOverload) or op.is_view:
        return NOTHING
    if op in _PRODUCTS or op.namespace == "pagoda":
        return LIBRARY
    if op in lowering.fallbacks or op not in lowering.lowerings:
        return UNSUPPORTED
    return LOOPS
