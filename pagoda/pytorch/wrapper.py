"""Inductor's wrapper lines to a `Region`.

Inductor ends with a list of line objects (allocate, call, view, free). Its own back ends print
Python or build an FX graph from them; this one builds a `Region`. What Inductor then stores and
caches is a small Python module that holds the pickled region and calls it.
"""

from __future__ import annotations

import base64
import pickle
import zlib
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch._guards import TracingContext
from torch._inductor import config, ir
from torch._inductor.codegen import wrapper as lines
from torch._inductor.codegen.wrapper_fxir import WrapperFxCodegen
from torch._inductor.utils import LineContext, ValueWithLineMap, sympy_subs
from torch._inductor.virtualized import V
from torch.utils._sympy.solve import try_solve

from pagoda.compiler.index_expr import Const, Expr, Symbol
from pagoda.compiler.region import (
    Buffer,
    IntInput,
    KernelCall,
    LibraryCall,
    Region,
    SymbolSource,
    TensorInput,
    View,
)
from pagoda.pytorch.errors import Unsupported
from pagoda.pytorch.library import library_call
from pagoda.pytorch.matmul_precision import matmul_precision
from pagoda.pytorch.nesting import Inlining, in_layer
from pagoda.pytorch.places import operations, place
from pagoda.pytorch.scheduling import LoopNestLine
from pagoda.pytorch.storage import host_alias
from pagoda.pytorch.symbolic import dtype_name, to_expr
from pagoda.pytorch.widening import widen_temporaries

_IGNORED = (
    lines.AssertSizeStrideLine,
    lines.CommentLine,
    lines.EnterDeviceContextManagerLine,
    lines.ExitDeviceContextManagerLine,
    lines.FreeIfNotReusedLine,
    lines.FreeLine,
    lines.NullLine,
    LineContext,
)


_CONTROL_FLOW = (
    "control flow in a graph (torch.cond, while_loop, scan) cannot be compiled for device pagoda. "
    "Compile the parts on their own."
)


@dataclass
class NestedCallLine(lines.WrapperLine):
    """A call of a region that was lowered on its own."""

    node: ir.InvokeSubgraph
    region: Region


class RegionWrapper(WrapperFxCodegen):
    """Registered with Inductor as the device's wrapper code generator."""

    supports_caching = True

    region: Region  # of a subgraph, once it is generated

    def codegen_invoke_subgraph(self, node: ir.InvokeSubgraph) -> None:
        graph = node.subgraph.graph
        if graph.name not in self.already_codegened_subgraphs:
            self.already_codegened_subgraphs.add(graph.name)
            with V.set_graph_handler(graph):
                graph.codegen()
        self.writeline(NestedCallLine(node, graph.wrapper_code.region))

    def codegen_conditional(self, node: ir.Conditional) -> None:
        raise Unsupported(_CONTROL_FLOW)

    def codegen_while_loop(self, node: ir.WhileLoop, stack_output: bool) -> None:
        raise Unsupported(_CONTROL_FLOW)

    def _generate(self, is_inference: bool) -> tuple[ValueWithLineMap, ValueWithLineMap]:
        if config.allow_buffer_reuse or config.inplace_buffers:
            raise Unsupported(
                'device pagoda needs torch.compile(..., backend="pagoda"): with the backend '
                '"inductor" its settings are missing.'
            )
        self.run_wrapper_ir_passes(is_inference)
        region = _RegionBuilder(self).build()
        if self.is_subgraph:
            self.region = region
            return ValueWithLineMap("", []), ValueWithLineMap("", [])
        region = widen_temporaries(region)
        payload = base64.b85encode(zlib.compress(pickle.dumps(region))).decode()
        source = (
            f"from pagoda.pytorch.call import load_region\n\n"
            f"# {region.name}: {len(region.steps)} steps, {len(region.kernels())} kernels\n"
            f'call = load_region("{payload}")\n'
        )
        return ValueWithLineMap(source, []), ValueWithLineMap("", [])


class _RegionBuilder:
    def __init__(self, wrapper: RegionWrapper) -> None:
        self.wrapper = wrapper
        self.buffers: list[Buffer] = []
        self.views: dict[str, View] = {}  # Inductor's buffer name -> its memory
        self.symbols: list[SymbolSource] = []
        self.steps: list[KernelCall] = []
        self.seeds: list[TensorInput] = []
        self.pending: dict[str, Any] = {}  # library calls whose outputs are not yet known
        self.nested: dict[str, list[View | Expr | None]] = {}  # results of nested calls

    def build(self) -> Region:
        inputs = self._inputs()
        for name, value in V.graph.constants.items():
            self._constant(name, value)
        for line in self.wrapper.lines:
            self._line(line)
        outputs = tuple(self._output(node) for node in self.wrapper.get_graph_outputs())
        self._mark(outputs)
        context = TracingContext.try_get()
        name = context.aot_graph_name if context and context.aot_graph_name else "graph"
        if isinstance(name, (list, tuple)):
            name = "_".join(name)
        return Region(
            name=str(name),
            inputs=(*inputs, *self.seeds),
            outputs=outputs,
            symbols=tuple(self.symbols),
            buffers=tuple(self.buffers),
            steps=tuple(self.steps),
            seeds=tuple(seed.view.sizes[0].value for seed in self.seeds),
        )

    def expr(self, value: sympy.Expr | int) -> Expr:
        if not isinstance(value, int):
            value = sympy_subs(value, V.graph.sizevars.inv_precomputed_replacements)
        return to_expr(value)

    def exprs(self, values: Any) -> tuple[Expr, ...]:
        return tuple(self.expr(v) for v in values)

    # Inputs, constants, outputs

    def _inputs(self) -> list[TensorInput | IntInput]:
        context = TracingContext.try_get()
        metadata = context.fw_metadata if context is not None else None
        static = set(metadata.static_input_indices or ()) if metadata is not None else set()
        inputs: list[TensorInput | IntInput] = []
        for number, (name, node) in enumerate(self.wrapper.get_graph_inputs().items()):
            if isinstance(node, ir.TensorBox):
                self._check_device(node, f"input {number}")
                layout = node.get_layout()
                count = self._extent(layout)
                dtype = dtype_name(layout.dtype)
                self.buffers.append(
                    Buffer(f"arg{number}", dtype, count, "input", weight=number in static)
                )
                view = View(
                    len(self.buffers) - 1,
                    Const(0),
                    self.exprs(layout.size),
                    self.exprs(layout.stride),
                    dtype,
                )
                self.views[name] = view
                inputs.append(TensorInput(view))
            elif isinstance(node, sympy.Symbol):
                self._symbol(node, node, "int", number, 0)
                inputs.append(IntInput(node.name))
            elif node is None or isinstance(node, (int, sympy.Expr)):
                inputs.append(IntInput(None))  # a symbol in it is solved for below
            else:
                raise Unsupported(
                    f"argument {number} of the graph is a {type(node).__name__}; device pagoda "
                    "takes tensors and integers. Pass it as a tensor."
                )
        for number, node in enumerate(self.wrapper.get_graph_inputs().values()):
            if isinstance(node, sympy.Expr):
                self._solve(node, "int", number, 0)
            elif isinstance(node, ir.TensorBox):
                for dim, size in enumerate(node.get_size()):
                    self._solve(size, "size", number, dim)
                for dim, stride in enumerate(node.get_stride()):
                    self._solve(stride, "stride", number, dim)
        return inputs

    def _known(self) -> set[str]:
        return {s.name for s in self.symbols}

    def _symbol(self, symbol: Any, value: Any, what: Any, number: int, dim: int) -> None:
        read = sympy.Symbol("x", integer=True) if value is symbol else value
        self.symbols.append(SymbolSource(symbol.name, what, number, dim, to_expr(read)))

    def _solve(self, size: Any, what: str, number: int, dim: int) -> None:
        """Defines the one symbol in `size` that is not defined yet, if there is one."""
        if isinstance(size, (int, sympy.Integer)):
            return
        unknown = [s for s in size.free_symbols if s.name not in self._known()]
        if len(unknown) != 1:
            return
        (symbol,) = unknown
        if size == symbol:
            self._symbol(symbol, symbol, what, number, dim)
            return
        x = sympy.Symbol("x", integer=True, nonnegative=True)
        solution = try_solve(sympy.Eq(size, x), symbol)
        if solution is None:
            return
        numerator, denominator = sympy.fraction(sympy.together(solution[1]))
        value = to_expr(numerator) // to_expr(denominator)
        self.symbols.append(SymbolSource(symbol.name, what, number, dim, value))  # type: ignore[arg-type]

    def _constant(self, name: str, value: torch.Tensor) -> None:
        dtype = dtype_name(value.dtype)
        flat = host_alias(value.detach(), writes=False).reshape(-1).contiguous()
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        self.buffers.append(Buffer(name, dtype, Const(flat.numel()), "constant", data=data))
        strides = torch.empty(value.shape, device="meta").stride()
        self.views[name] = View(
            len(self.buffers) - 1, Const(0), self.exprs(value.shape), self.exprs(strides), dtype
        )

    def _output(self, node: Any) -> View | Expr | None:
        if isinstance(node, ir.NoneAsConstantBuffer):
            return None
        if isinstance(node, ir.ShapeAsConstantBuffer):
            return self.expr(node.expr)
        if isinstance(node, (int, sympy.Expr)):
            return self.expr(node)
        return self.view(node)

    def _mark(self, outputs: tuple[View | Expr | None, ...]) -> None:
        """Gives buffers their final kind, once it is known what is returned and what is written."""
        returned = {v.buffer for v in outputs if isinstance(v, View)}
        written = {b for step in self.steps for b in step.writes()}
        for number, buffer in enumerate(self.buffers):
            if buffer.kind == "temporary" and number in returned:
                self.buffers[number] = replace(buffer, kind="output")
            elif buffer.kind == "constant" and number in returned:
                raise Unsupported("a graph that returns a constant. Return a copy of it instead.")
            elif buffer.kind == "input" and number in written:
                self.buffers[number] = replace(buffer, mutated=True)

    # Memory

    def _extent(self, layout: Any) -> Expr:
        """Elements from the first to the last one of a layout."""
        sizes, strides = self.exprs(layout.size), self.exprs(layout.stride)
        if any(s == Const(0) for s in sizes):
            return Const(0)
        return sum(((n - 1) * s for n, s in zip(sizes, strides, strict=True)), Const(1))

    def _check_device(self, node: Any, what: str) -> None:
        device = node.get_device()
        if device is not None and device.type == "cpu" and tuple(node.get_size()):
            raise Unsupported(
                f"{what} of the graph is on the CPU, the rest on device pagoda. Move it with "
                '.to("pagoda").'
            )

    def _allocate(self, node: Any) -> None:
        name = node.get_name()
        if name in self.views:
            return
        layout = node.get_layout()
        device = node.get_device()
        if device is not None and device.type != "pagoda":
            raise Unsupported(
                f"{name} of the graph is computed on {device}. Keep all tensors on device pagoda."
            )
        dtype = dtype_name(layout.dtype)
        self.buffers.append(Buffer(name, dtype, self._extent(layout), "temporary"))
        self.views[name] = View(
            len(self.buffers) - 1,
            Const(0),
            self.exprs(layout.size),
            self.exprs(layout.stride),
            dtype,
        )

    def _reinterpret(self, base: View, layout: Any) -> View:
        dtype = dtype_name(layout.dtype)
        offset = self.expr(layout.offset)
        if base.dtype != dtype:
            raise Unsupported(
                f"a view of {base.dtype} memory as {dtype}. Make a tensor of that type."
            )
        return View(
            base.buffer,
            base.offset + offset,
            self.exprs(layout.size),
            self.exprs(layout.stride),
            dtype,
        )

    def view(self, node: Any) -> View:
        """The memory and layout of an IR node."""
        if isinstance(node, ir.MutableBox):
            return self.view(node.data)
        if isinstance(node, ir.ReinterpretView):
            return self._reinterpret(self.view(node.data), node.layout)
        if isinstance(node, ir.BaseView):
            return self.view(node.realize_input(node))  # type: ignore[attr-defined]
        name = node.get_name()
        if name not in self.views and isinstance(node.get_layout(), ir.MutationLayoutSHOULDREMOVE):
            return self.view(node.get_layout().get_buffer())
        return self.views[self._real_name(name)]

    def _real_name(self, name: str) -> str:
        return name if name in self.views else V.graph.scheduler.mutation_real_name.get(name, name)

    # Lines

    def _line(self, line: Any) -> None:
        match line:
            case LoopNestLine():
                self._call_nest(line)
            case NestedCallLine():
                self._call_nested(line)
            case lines.AllocateLine():
                self._allocate(line.node)
            case lines.ReinterpretLine():
                view = line.layout.view if isinstance(line.layout, ir.NonOwningLayout) else None
                layout = view.layout if view is not None else line.layout
                base = self.views[self._real_name(line.node.get_name())]
                self.views[line.reused_as.get_name()] = self._reinterpret(base, layout)
            case lines.ExternKernelOutLine() if isinstance(line.node, ir.RandomSeeds):
                view = self.view(line.node)
                self.buffers[view.buffer] = replace(self.buffers[view.buffer], kind="input")
                self.seeds.append(TensorInput(view))
            case lines.ExternKernelOutLine():
                node = line.node
                out = self.view(node.output_view if node.output_view else node)
                self._call_library(node, [out])
            case lines.ExternKernelAllocLine():
                self._extern_alloc(line.node)
            case lines.MultiOutputLine():
                self._multi_output(line)
            case lines.UnbackedSymbolDefsLine() if not line.unbacked_bindings:
                pass
            case _ if isinstance(line, _IGNORED) or (isinstance(line, str) and not line.strip()):
                pass
            case str() if line.lstrip().startswith("#"):
                pass
            case lines.UnbackedSymbolDefsLine():
                raise Unsupported(
                    "an operation whose result's size depends on data (as of nonzero, x[mask] or "
                    "unique) has no kernel. Use torch.where or a mask of fixed size."
                )
            case _:
                raise Unsupported(
                    f"Inductor's {type(line).__name__} has no counterpart on device pagoda "
                    f"({str(line)[:200]}). Rewrite that part of the model without it."
                )

    def _call_nest(self, line: LoopNestLine) -> None:
        args = tuple(self.views[self._real_name(name)] for name in line.tensors)
        symbols = tuple(Symbol(name) for name in line.symbols)
        self.steps.append(KernelCall(line.nest, args, symbols, line.origin, line.place))

    def _call_nested(self, line: NestedCallLine) -> None:
        operands = [
            self.expr(node.expr) if isinstance(node, ir.ShapeAsConstantBuffer) else self.view(node)
            for node in line.node.inputs
        ]
        name = line.node.get_name()
        call = Inlining(line.region, operands, self.buffers, name)
        self.steps += in_layer(call.steps, place(operations(line.node)).layers)
        self.seeds += call.seeds
        self.nested[name] = call.outputs

    def _extern_alloc(self, node: Any) -> None:
        if isinstance(node.layout, ir.MultiOutputLayout):
            self.pending[node.get_name()] = node
            return
        self._allocate(node)
        self._call_library(node, [self.view(node)])

    def _multi_output(self, line: Any) -> None:
        """The call of an operation with several results, when the first of them comes up."""
        if line.arg_name in self.nested:
            ((_, number),) = line.indices
            self.views[line.result_name] = self.nested[line.arg_name][number]
            return
        node = self.pending.pop(line.arg_name, None)
        if node is None:
            return
        for result in node.outputs:
            self._allocate(result)
        self._call_library(node, [self.view(result) for result in node.outputs])

    def _call_library(self, node: Any, outs: list[View]) -> None:
        name, attributes, inputs = library_call(node)
        views = [None if arg is None else self.view(arg) for arg in inputs]
        exact = all(view is None or view.dtype != "float32" for view in views)
        call = LibraryCall(name, attributes, "highest" if exact else matmul_precision())
        own = node.origin_node
        found = place(operations(node) if own is None else [own])
        self.steps.append(KernelCall(call, (*outs, *views), origin=name, place=found))
