"""Eager operations: each is compiled once for the chip as a graph of one operation.

A compiled operation is kept per operation and sizes. When an operation comes again with another
size, that size is made symbolic, so a growing key/value cache compiles a handful of times, not once
per token. Nothing is computed on the host but the operations of `HOST_ALLOWED`, which are counted:
`torch.pagoda.fallbacks()`.
"""

from __future__ import annotations

import logging
import re
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils import _pytree as pytree

from pagoda.pytorch import composed, device, guards, mixing
from pagoda.pytorch.errors import Unsupported
from pagoda.pytorch.grouped import grouped_mm
from pagoda.pytorch.matmul_precision import matmul_precision
from pagoda.pytorch.storage import host_alias

aten = torch.ops.aten

# Computed on the host, and counted. Random numbers: torch's own generator gives the same draws as
# on the CPU; but masks of dropout are drawn on the chip, unless a generator is given. The rest is
# bookkeeping on a few integers around a model, never part of one.
HOST_ALLOWED: dict[str, str] = {
    **dict.fromkeys(
        ("aten.normal_", "aten.uniform_", "aten.random_", "aten.exponential_", "aten.bernoulli_",
         "aten.bernoulli", "aten.multinomial", "aten.normal", "aten.randperm"),
        "random numbers come from the host's generator",
    ),
    **dict.fromkeys(
        ("aten.nonzero", "aten._unique", "aten._unique2", "aten.unique_dim",
         "aten.unique_consecutive"),
        "bookkeeping on small tensors",
    ),
}  # fmt: skip
HOST_ELEMENTS = 1 << 20  # bookkeeping on more elements than this is refused


@dataclass
class _Compiled:
    """One compiled version of an operation. `guard` says whether it serves some arguments."""

    function: Callable[[list[Any]], list[Any]]
    guard: Callable[[list[Any]], bool]
    symbolic: bool = False


@dataclass
class _Operation:
    """All versions of an operation for one structure of arguments (types, ranks, constants) and
    one float32 matmul precision."""

    versions: list[_Compiled] = field(default_factory=list)
    exact: dict[tuple, _Compiled] = field(default_factory=dict)
    seen: tuple | None = None  # sizes of the first call
    dynamic: set[tuple[int, int]] = field(default_factory=set)  # (argument, dimension) that varied


_operations: dict[tuple, _Operation] = {}
# Compiling needs a thread that is in no autograd, tracing or dispatch mode of its caller.
_WORKER = "pagoda-eager-compile"
_worker = ThreadPoolExecutor(1, _WORKER)
# There torch would print the stack of every wrong argument, which is raised anyway.
logging.getLogger("torch._subclasses.fake_tensor").addFilter(
    lambda record: not str(record.threadName).startswith(_WORKER)
)
# Set (`active`) in a thread that compiles: Inductor then folds constants by computing on real
# tensors, which is the compiler's work and stays on the host.
compiling = threading.local()


def run(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Computes one ATen operation on device tensors. Raises NotImplementedError, naming the
    operation, if it has no kernel on the chip."""
    if _has_empty_result(op, kwargs):
        return _resized(op, args, kwargs)
    if getattr(compiling, "active", False):
        return _host_compute(op, args, kwargs)
    if op in composed.REWRITTEN:
        return composed.REWRITTEN[op](*args, **kwargs)
    if runs_on_host(op, args, kwargs):
        return _on_host(op, args, kwargs)
    if op.overloadpacket in mixing.INDEXED:
        indices = [None if i is None else i.to(device.NAME) for i in args[1]]
        args = (args[0], indices, *args[2:])
    mixing.require_one_device(op, args, kwargs)
    if op is aten._index_put_impl_.default:  # what `index_put_` is on most devices
        op, args = aten.index_put_.default, args[:4]
    if op is aten.index_put_.default and composed.fills_mask(args):
        return composed.fill_mask_(*args[:3])
    if op.overloadpacket in mixing.INDEXED:
        args = (args[0], composed.positions(args[1]), *args[2:])
    require_types(op, args, kwargs)
    args = mixing.tensors_for_numbers(op, args)
    flat, spec = pytree.tree_flatten((args, kwargs))
    flat = _separate([_place(a) for a in flat], _written(op, args, kwargs))
    dynamic_ok = _symbolic_arguments(op)
    leaves = _leaf_arguments(op, args, kwargs)
    twins = _twins(flat)
    varying = [
        k for k, a in enumerate(flat)
        if k not in twins
        and (isinstance(a, torch.Tensor) or (type(a) is int and leaves[k] in dynamic_ok))
    ]  # fmt: skip
    passed = [flat[k] for k in varying]
    rest = tuple(
        ("twin", twins[k]) if k in twins
        else _structure(a) if k in set(varying)
        else (type(a), repr(a))
        for k, a in enumerate(flat)
    )  # fmt: skip
    operation = _operations.setdefault((op, spec, rest, matmul_precision()), _Operation())
    exact = tuple(_exact(a) for a in passed)
    version = operation.exact.get(exact)
    if version is None:
        version = next((v for v in operation.versions if v.guard(passed)), None)
        if version is None:
            version = _compile_version(operation, op, flat, spec, varying, twins)
        if len(operation.exact) > 256:
            operation.exact.clear()
        operation.exact[exact] = version
    # `data` has a version counter of its own: what autograd has to know of writes, it knows from
    # the schema. (Batch norm writes its statistics without its schema saying so.)
    given = [a.data if isinstance(a, torch.Tensor) else a for a in passed]
    try:
        results = version.function(list(given))
    except Unsupported as error:  # raised before anything runs
        if not version.symbolic:
            raise NotImplementedError(_explain(op, error)) from error
        operation.versions.remove(version)
        version = _worker.submit(_compile, op, flat, spec, varying, twins, frozenset()).result()
        operation.versions.append(version)
        operation.exact[exact] = version
        try:
            results = version.function(list(given))
        except Unsupported as again:
            raise NotImplementedError(_explain(op, again)) from again
    return _returned(op, args, kwargs, results)


# Types that can be stored, not computed with, and what to take instead.
_STORED_ONLY = {
    torch.float64: "float32", torch.float16: "float32 or bfloat16", torch.int16: "int32",
}  # fmt: skip


def runs_on_host(op: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether this is one of the operations that are allowed on the host."""
    if op is aten.bernoulli_.float and not any(
        isinstance(a, torch.Generator) for a in (*args, *kwargs.values())
    ):
        return False
    return _packet(op) in HOST_ALLOWED


def require_types(op: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError, saying what to take instead, for types that can only be
    stored."""
    for value in pytree.tree_leaves((args, kwargs)):
        on_host = isinstance(value, torch.Tensor) and value.device.type != device.NAME
        kind = value.dtype if isinstance(value, torch.Tensor) and not on_host else value
        if isinstance(kind, torch.dtype) and kind in _STORED_ONLY:
            raise NotImplementedError(
                f"operation {op} cannot run on device pagoda: the chip stores {kind} but cannot "
                f"compute with it. Use {_STORED_ONLY[kind]}: convert tensors with .to(dtype) "
                "before they are moved to the device."
            )


def _has_empty_result(op: Any, kwargs: dict[str, Any]) -> bool:
    empty = {n for n, a in kwargs.items() if isinstance(a, torch.Tensor) and a.numel() == 0}
    return bool(empty) and any(a.is_out and a.name in empty for a in op._schema.arguments)


def _resized(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operation whose `out` is empty and takes the size of the result (`arange` does this)."""
    outs = [kwargs[a.name] for a in op._schema.arguments if a.is_out]
    taken = [(a.name, str(a.type)) for a in op._schema.arguments if not a.is_out]
    written = {a.name for a in op._schema.arguments if a.is_out}
    given = {k: v for k, v in kwargs.items() if k not in written}
    for name in op.overloadpacket.overloads():
        overload = getattr(op.overloadpacket, name)
        arguments = [(a.name, str(a.type)) for a in overload._schema.arguments]
        extra = {name for name, _ in arguments[len(taken) :]}
        if arguments[: len(taken)] == taken and extra <= _FACTORY:
            made = {"dtype": outs[0].dtype, "device": outs[0].device}
            result = run(overload, args, given | {k: v for k, v in made.items() if k in extra})
            parts = result if isinstance(result, (tuple, list)) else (result,)
            for out, part in zip(outs, parts, strict=True):
                if part.shape != out.shape:
                    out.set_(part.to(out.dtype))
            return outs[0] if len(outs) == 1 else tuple(outs)
    raise NotImplementedError(
        f"operation {op} cannot run on device pagoda: its empty `out` tensor would have to be "
        "resized. Give it an `out` tensor of the result's size, or none."
    )


_FACTORY = {"dtype", "layout", "device", "pin_memory"}


def _place(a: Any) -> Any:
    """Scalar tensors on the CPU are moved to the device; strides that do not matter, those of
    dimensions of size 1, are made equal, so that they never cause a new compilation."""
    if not isinstance(a, torch.Tensor):
        return a
    if a.device.type != device.NAME:  # its type says only that it is a float, as torch has it
        return a.to(device.NAME, torch.float32 if a.dtype == torch.float64 else a.dtype)
    if 1 not in a.shape:
        return a
    strides, below = list(a.stride()), 1
    for d in range(a.dim() - 1, -1, -1):
        if a.shape[d] == 1:
            strides[d] = below
        below = strides[d] * max(a.shape[d], 1)
    return a if tuple(strides) == a.stride() else a.as_strided(a.shape, strides)


def _separate(flat: list[Any], written: dict[str, Any]) -> list[Any]:
    """Arguments that share memory with one that is written are copied, unless they are that very
    tensor: AOTAutograd cannot describe them with symbolic sizes."""
    targets = [t for t in pytree.tree_leaves(written) if isinstance(t, torch.Tensor) and t.numel()]
    if not targets:
        return flat
    same = {_extent(t) for t in targets}
    storages = {t.untyped_storage().data_ptr() for t in targets}

    def apart(a: Any) -> Any:
        shares = isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() in storages
        return a.clone() if shares and _extent(a) not in same else a

    return [apart(a) for a in flat]


def _extent(t: torch.Tensor) -> tuple:
    return t.data_ptr(), tuple(t.shape), t.dtype, _place(t).stride()


def _twins(flat: list[Any]) -> dict[int, int]:
    """Arguments that are the same tensor as an earlier one: position -> position of the first."""
    first: dict[tuple, int] = {}
    twins = {}
    for k, a in enumerate(flat):
        if isinstance(a, torch.Tensor) and a.numel() and k != first.setdefault(_extent(a), k):
            twins[k] = first[_extent(a)]
    return twins


def _structure(a: Any) -> Any:
    return ("tensor", a.dtype, a.dim()) if isinstance(a, torch.Tensor) else "int"


def _exact(a: Any) -> Any:
    return (tuple(a.shape), a.stride()) if isinstance(a, torch.Tensor) else a


def _symbolic_arguments(op: Any) -> set[str]:
    """Names of the arguments that may be symbolic integers."""
    if op.overloadpacket is aten.arange:
        return {"start", "end"}
    if op.overloadpacket in (aten.convolution, aten.convolution_backward):
        return set()  # strides, padding and so on are compile-time constants of the kernels
    return set(re.findall(r"SymInt\S* (\w+)", str(op._schema)))


def _leaf_arguments(op: Any, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """For each flattened argument value, the name of the argument it belongs to."""
    names = [a.name for a in op._schema.arguments]
    leaves: list[str] = []
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        leaves += [name] * len(pytree.tree_leaves(value))
    return leaves


def _sizes(values: list[Any]) -> tuple:
    return tuple(tuple(a.shape) if isinstance(a, torch.Tensor) else (a,) for a in values)


def _compile_version(
    operation: _Operation,
    op: Any,
    flat: list[Any],
    spec: Any,
    varying: list[int],
    twins: dict[int, int],
) -> _Compiled:
    passed = [flat[k] for k in varying]
    sizes = _sizes(passed)
    if operation.seen is None:
        operation.seen = sizes
    for number, (old, new) in enumerate(zip(operation.seen, sizes, strict=True)):
        operation.dynamic |= {
            (number, d) for d, (a, b) in enumerate(zip(old, new, strict=True)) if a != b
        }
    arguments = (op, flat, spec, varying, twins, frozenset(operation.dynamic))
    try:
        version = _worker.submit(_compile, *arguments).result()
    except NotImplementedError:
        if not operation.dynamic:
            raise
        # torch's rules for some operations need to know sizes: one version per size, then.
        version = _worker.submit(_compile, *arguments[:-1], frozenset()).result()
    operation.versions.append(version)
    return version


def _compile(
    op: Any,
    flat: list[Any],
    spec: Any,
    varying: list[int],
    twins: dict[int, int],
    dynamic: frozenset,
) -> _Compiled:
    from pagoda.pytorch.inductor import compile_graph

    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    graph = torch.fx.Graph()
    values, fakes = list(flat), []
    fixed = {
        number: flat[k] for number, k in enumerate(varying)
        if type(flat[k]) is int and (number, 0) not in dynamic
    }  # fmt: skip
    for number, k in enumerate(varying):
        if number in fixed:
            continue
        fake = _fake(mode, shapes, flat[k], number, dynamic)
        values[k] = graph.placeholder(f"a{number}")
        values[k].meta["val"] = fake
        fakes.append(fake)
    sizes = _symbols(fakes)
    for number, (_, size) in enumerate(sizes):
        graph.placeholder(f"s{number}").meta["val"] = size
    for k, first in twins.items():
        values[k] = values[first]
    args, kwargs = pytree.tree_unflatten(values, spec)
    result = graph.call_function(op, tuple(args), kwargs)
    graph.output((result,) if len(op._schema.returns) == 1 else _parts(graph, op, result))
    module = torch.fx.GraphModule({}, graph)
    try:
        with torch.no_grad(), tracing(TracingContext(mode)):
            function = compile_graph(module, [*fakes, *(size for _, size in sizes)])
    except Exception as error:
        if not dynamic and (wrong := _wrong_argument(error)):
            raise wrong from None
        raise NotImplementedError(_explain(op, error)) from error
    conditions = guards.expression(shapes, fakes, ignore_static=False)

    def traced(arguments: list[Any]) -> list[Any]:
        return [a for number, a in enumerate(arguments) if number not in fixed]

    def guard(arguments: list[Any]) -> bool:
        if any(arguments[number] != value for number, value in fixed.items()):
            return False
        return conditions is None or shapes.evaluate_guards_expression(
            conditions, traced(arguments)
        )

    def call(arguments: list[Any]) -> Any:
        given = traced(arguments)
        with torch.no_grad():
            return function(*given, *(read(given) for read, _ in sizes))

    return _Compiled(call, guard, bool(dynamic))


def _fake(mode: Any, shapes: ShapeEnv, value: Any, number: int, dynamic: frozenset) -> Any:
    source = LocalSource(f"a{number}")
    if isinstance(value, torch.Tensor):
        kinds = [
            DimDynamic.DYNAMIC if (number, d) in dynamic else DimDynamic.STATIC
            for d in range(value.dim())
        ]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        return mode.from_tensor(value.detach(), symbolic_context=context, source=source)
    symbol = shapes.create_symbol(
        value, source, DimDynamic.DYNAMIC, positive=None, do_not_specialize_zero_one=True
    )
    return shapes.create_symintnode(symbol, hint=value, source=source)


def _symbols(fakes: list[Any]) -> list[tuple[Callable[[list[Any]], int], torch.SymInt]]:
    """Every symbolic size, stride and offset of the arguments, with how to read its value.

    They are arguments of the graph too: torch's caches of compiled graphs keep conditions on
    arguments that are integers, and on nothing else."""
    found: dict[Any, tuple[Callable[[list[Any]], int], torch.SymInt]] = {}

    def note(value: Any, read: Callable[[list[Any]], int]) -> None:
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            found.setdefault(value.node.expr, (read, value))

    for number, fake in enumerate(fakes):
        if not isinstance(fake, torch.Tensor):
            continue
        for d in range(fake.dim()):
            note(fake.shape[d], lambda given, n=number, d=d: given[n].shape[d])
            note(fake.stride(d), lambda given, n=number, d=d: given[n].stride(d))
        note(fake.storage_offset(), lambda given, n=number: given[n].storage_offset())
    return list(found.values())


def _parts(graph: torch.fx.Graph, op: Any, result: torch.fx.Node) -> tuple:
    import operator

    count = len(op._schema.returns)
    return tuple(graph.call_function(operator.getitem, (result, k)) for k in range(count))


def _wrong_argument(error: BaseException) -> BaseException | None:
    """What torch's own check of an operation's arguments has raised, if that is why."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    checks = codes[-1:] == [torch._check_with.__code__]
    return type(error)(_words(error)) if checks else None


def _words(error: BaseException) -> str:
    """Its message without what torch's interpreter of graphs adds."""
    return str(error).partition("\n\nWhile executing %")[0]


def _explain(op: Any, error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Unsupported):
        cause = cause.__cause__ or cause.__context__
    reason = _words(cause) if cause is not None else f"{type(error).__name__}: {_words(error)}"
    return (
        f"operation {op} cannot run on device pagoda: {reason.strip().rstrip('.')}. It is never "
        "computed on the CPU in silence; if that is what you want, move its inputs with .cpu() and "
        "the result back."
    )


def _returned(op: Any, args: tuple, kwargs: dict[str, Any], results: Any) -> Any:
    """What the operation returns: arguments it wrote are returned themselves."""
    written = _written(op, args, kwargs)
    results = list(results) if isinstance(results, (tuple, list)) else [results]
    out = []
    for position, declared in enumerate(op._schema.returns):
        info = declared.alias_info
        if info is not None and info.is_write:
            out.append(written[next(iter(info.before_set))])
        else:
            out.append(results[position])
    if not out:
        return None
    return out[0] if len(out) == 1 else tuple(out)


def _written(op: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the operation writes, by the schema's alias names."""
    written = {}
    for position, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for name in argument.alias_info.before_set:
                written[name] = value
    return written


def _on_host(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    large = max((t.numel() for t in tensors), default=0)
    if large > HOST_ELEMENTS and "random" not in HOST_ALLOWED[_packet(op)]:
        raise NotImplementedError(
            f"operation {op} cannot run on device pagoda: it is allowed on the host only for up to "
            f"{HOST_ELEMENTS} elements, got {large}. Move its input with .cpu()."
        )
    device.state.fallbacks[str(op)] += 1
    return _host_compute(op, args, kwargs)


def _host_compute(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    def host(a: Any) -> Any:
        if isinstance(a, torch.device):
            return torch.device("cpu")
        return host_alias(a) if isinstance(a, torch.Tensor) else a

    def back(a: Any) -> Any:
        return a.to(device.NAME) if isinstance(a, torch.Tensor) else a

    results = op(*pytree.tree_map(host, args), **pytree.tree_map(host, kwargs))
    if _written(op, args, kwargs):
        return _returned(op, args, kwargs, results)
    return pytree.tree_map(back, results)


def _packet(op: Any) -> str:
    return str(op.overloadpacket) if isinstance(op, torch._ops.OpOverload) else str(op)


# Operations that torch would turn into others that only other devices have, or into host work.
_library = torch.library.Library("aten", "IMPL")


def _register() -> None:
    def forward(x, weight, bias, *rest):
        return run(aten.convolution.default, (x, weight, bias, *rest), {})

    def backward(grad, x, weight, stride, padding, dilation, transposed, extra, groups, mask):
        rest = ([grad.shape[1]], stride, padding, dilation, transposed, extra, groups, mask)
        return run(aten.convolution_backward.default, (grad, x, weight, *rest), {})

    def grouped(*args, **kwargs):
        # torch's own would read the groups' ends on the host, and its rule for the result's shape
        # is that of CUDA's kernel: bfloat16 only.
        result = grouped_mm(*args, **kwargs)
        return run(aten._grouped_mm.default, args, kwargs) if result is NotImplemented else result

    disabled = torch._disable_dynamo
    _library.impl("_grouped_mm", disabled(grouped), "PrivateUse1")
    _library.impl("convolution_overrideable", disabled(forward), "PrivateUse1")
    _library.impl("convolution_backward_overrideable", disabled(backward), "PrivateUse1")


_register()
