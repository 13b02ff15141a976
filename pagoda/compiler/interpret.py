"""Reads a kernel function's syntax tree and emits tile IR; the machinery behind `language`.

Statements are visited in order with an environment of values: Python numbers (known now), scalars
(known at run time), and the values of `values.py`. What a builtin does is in `builtin.py`.
"""

from __future__ import annotations

import ast
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pagoda.compiler.builder import KernelBuilder, TensorHandle
from pagoda.compiler.builtin import BUILTINS, METHODS, Builtins
from pagoda.compiler.errors import CompileError
from pagoda.compiler.scalar import ZERO, Int, Scalar, Variable, binary, scalar, select
from pagoda.compiler.tile_ir import For, If, Kernel
from pagoda.compiler.values import (
    Constant,
    Expression,
    Product,
    Range,
    ReductionState,
    Shape,
    ShapeError,
    TileValue,
    Window,
)
from pagoda.isa.numbers import DType

if TYPE_CHECKING:
    from pagoda.compiler.language import KernelFunction

_ARITHMETIC = {
    ast.Add: ("+", "add"),
    ast.Sub: ("-", "sub"),
    ast.Mult: ("*", "mul"),
    ast.Div: ("/", "div"),
    ast.FloorDiv: ("//", "div"),
    ast.Mod: ("%", "mod"),
    ast.BitAnd: ("&", "and"),
    ast.BitOr: ("|", "or"),
    ast.BitXor: ("^", "xor"),
}
_COMPARISONS = {
    ast.Lt: ("<", "lt"),
    ast.LtE: ("<=", "le"),
    ast.Gt: (">", "gt"),
    ast.GtE: (">=", "ge"),
    ast.Eq: ("==", "eq"),
    ast.NotEq: ("!=", "ne"),
}
_PYTHON = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
    "/": lambda a, b: a / b, "//": lambda a, b: a // b, "%": lambda a, b: a % b,
    "&": lambda a, b: a & b, "|": lambda a, b: a | b, "^": lambda a, b: a ^ b,
    "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b, "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
}  # fmt: skip
_TILE_VALUES = (TileValue, Constant, Expression)


class Interpreter:
    """Builds one kernel from one function."""

    def __init__(self, function: KernelFunction, values: dict[str, Any]):
        self.function = function
        self.builder = KernelBuilder(function.name, function.location(function.tree))
        self.node: ast.AST = function.tree
        self.environment: dict[str, Any] = {}
        self.depth = 0  # open loops and run-time branches
        self.tile_depth: dict[str, int] = {}  # name -> depth at which its tile was made
        self.mutable: set[str] = set()  # variables that are bound more than once
        self.loops: list[Range | None] = []
        self.builtins = Builtins(self)
        for name in function.annotations:
            if function.is_tensor(name):
                self.environment[name] = self._tensor(name, values[name])
            else:
                value: Any = self.builder.scalar(name)
                if function.annotations[name] is float:
                    value = self.builtins.float_argument(value)
                self.environment[name] = value
        for name in function.blocks:
            self.environment[name] = values[name]
            if isinstance(values[name], int):
                self.builder.block(name, int(values[name]))

    def _tensor(self, name: str, value: Any) -> TensorHandle | None:
        if value is None:
            if not self.function.is_optional(name):
                self.fail(
                    f"parameter {name}", "only a parameter `Tensor | None` may be absent",
                    "None was given", "pass a TensorType",
                )  # fmt: skip
            return None
        tensor = value.named(name)
        return self.builder.tensor(
            name, tensor.dtype, tensor.rank, sizes=tensor.sizes, strides=tensor.strides
        )

    def run(self) -> Kernel:
        self.block(self.function.tree.body)
        return self.builder.build()

    def fail(self, what: str, rule: str, value: str, remedy: str) -> None:
        raise CompileError(what, rule, value, remedy, self.function.location(self.node))

    # Statements ----------------------------------------------------------------------------------

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.node = statement
            self.builder.location = self.function.location(statement)
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Expr(ast.Constant()) | ast.Pass():
                pass
            case ast.Expr(ast.Call() as call):
                self.call(call)
            case ast.Assign([target], value):
                self._assign_target(target, self.expression(value))
            case ast.AnnAssign(ast.Name(name), _, value) if value is not None:
                self.assign(name, self.expression(value))
            case ast.AugAssign(ast.Name(name), operator, value):
                self._augment(name, operator, self.expression(value))
            case ast.If():
                self._if(node)
            case ast.For(ast.Name(name), iterable, body, []):
                self._for(name, iterable, body)
            case ast.Assert(test, message):
                if not self.expression(test):
                    rule = self.expression(message) if message else ast.unparse(test)
                    self.fail(
                        f"kernel {self.function.name}", str(rule), "it does not hold",
                        "choose other compile-time values",
                    )  # fmt: skip
            case _:
                self.fail(
                    f"`{ast.unparse(node).splitlines()[0]}`",
                    "a kernel consists of assignments, for, if, assert and calls",
                    f"this is {type(node).__name__}", "write it with those",
                )  # fmt: skip

    def _assign_target(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.assign(target.id, value)
        elif isinstance(target, ast.Tuple) and isinstance(value, tuple):
            for part, item in zip(target.elts, value, strict=True):
                self._assign_target(part, item)
        else:
            self.fail(
                f"assignment to `{ast.unparse(target)}`", "only names are assigned",
                f"this is {type(target).__name__}", "use store(...) for tensors",
            )  # fmt: skip

    def assign(self, name: str, value: Any) -> None:
        """Bind a name; a tile or run-time integer of an outer loop is changed in place."""
        old = self.environment.get(name)
        if isinstance(value, (Expression, Product)) or (
            isinstance(value, TileValue) and self._carried(name, old)
        ):
            if self._carried(name, old) and not isinstance(value, Product):
                self.builtins.compute_into(old, value)
                return
            value = self.builtins.materialise(value, name)
        elif isinstance(value, Scalar):
            if name in self.mutable and isinstance(old, Variable):
                self.builder.emit(self.builtins.let_again(old.name, value))
                return
            if value.children() or value.variables() & self._mutable_names():
                value = self._let(name, value)
        elif isinstance(value, int) and name in self.mutable and isinstance(old, Variable):
            self.builder.emit(self.builtins.let_again(old.name, scalar(value)))
            return
        if isinstance(value, TileValue):
            self.tile_depth[name] = self.depth
        self.environment[name] = value

    def _mutable_names(self) -> set[str]:
        return {
            value.name
            for name in self.mutable
            if isinstance(value := self.environment.get(name), Variable)
        }

    def _let(self, name: str, value: Scalar) -> Variable:
        fresh = self.builder.fresh(name)
        self.builder.emit(self.builtins.let_again(fresh, value))
        return Variable(fresh)

    def _carried(self, name: str, old: Any) -> bool:
        """Is `name` a tile that was made outside the innermost open loop or branch?"""
        return isinstance(old, TileValue) and self.tile_depth.get(name, self.depth) < self.depth

    def _augment(self, name: str, operator: ast.operator, value: Any) -> None:
        old = self.environment.get(name)
        if isinstance(value, Product):
            if not isinstance(operator, ast.Add) or not isinstance(old, TileValue):
                self.fail(
                    f"`{name}`", "a product is added to zeros(...)", f"`{name}` is {_kind(old)}",
                    f"write `{name} = zeros(i, j)` before the loop and `{name} += dot(...)` in it",
                )  # fmt: skip
            self.builtins.accumulate(old, value)
            return
        self.assign(name, self.binary(type(operator), old, value))

    def _if(self, node: ast.If) -> None:
        condition = self.expression(node.test)
        if not isinstance(condition, Scalar) or isinstance(condition, Int):
            known = condition.value if isinstance(condition, Int) else condition
            self.block(node.body if known else node.orelse)
            return
        self._make_mutable(node.body + node.orelse)
        location = self.function.location(node)
        bodies = []
        for branch in (node.body, node.orelse):
            with self.builder.body() as body, self._scope(None):
                self.block(branch)
            bodies.append(tuple(body))
        self.builder.emit(If(condition, *bodies, location=location))

    def _make_mutable(self, statements: list[ast.stmt]) -> None:
        """Integers bound before a loop or branch and assigned in it become variables first."""
        for name in _assigned_names(statements):
            value = self.environment.get(name)
            if isinstance(value, bool) or not isinstance(value, (int, Scalar)):
                continue
            if name not in self.mutable:
                self.environment[name] = self._let(name, scalar(value))
                self.mutable.add(name)

    @contextmanager
    def _scope(self, index: Range | None):
        before = dict(self.environment)
        self.depth += 1
        self.loops.append(index)
        yield
        self.loops.pop()
        self.depth -= 1
        self.environment = before

    def _for(self, name: str, iterable: ast.expr, body: list[ast.stmt]) -> None:
        loop = self.builtins.iteration(iterable)
        self._make_mutable(body)
        variable = Variable(self.builder.fresh(name))
        location = self.builder.location
        with self.builder.body() as inside:
            index: Any = variable
            if loop.block is not None:
                room = self.builder.let(f"{variable.name}.size", loop.room(variable))
                index = Range(variable, room, loop.block, variable.eq(loop.start))
            with self._scope(index if isinstance(index, Range) else Range(variable, ZERO, 0)):
                self.environment[name] = index
                self.block(body)
                carries_product = self.builtins.left_loop(index)
        stop = loop.at_least_one() if carries_product else loop.stop
        emitted = For(
            variable.name, loop.start, stop, loop.step, tuple(inside), loop.ahead,
            location=location,
        )  # fmt: skip
        self.builder.emit(emitted)

    # Expressions ---------------------------------------------------------------------------------

    def expression(self, node: ast.expr) -> Any:
        outer, self.node = self.node, node
        try:
            return self._expression(node)
        except ShapeError as problem:
            self.fail(
                f"`{ast.unparse(node)}`", "operands have equal block sizes, or 1", str(problem),
                "index them with the same ranges",
            )  # fmt: skip
        finally:
            self.node = outer

    def _expression(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                return self._name(name)
            case ast.Attribute(ast.Name() as owner, attribute) if not self._is_value(owner):
                return self._module_attribute(owner, attribute)
            case ast.Attribute(value, attribute):
                return self._attribute(self.expression(value), attribute)
            case ast.Call():
                return self.call(node)
            case ast.Subscript(value, index):
                return self._subscript(self.expression(value), index)
            case ast.BinOp(left, operator, right):
                return self.binary(
                    type(operator), self.expression(left), self.expression(right)
                )
            case ast.UnaryOp(operator, operand):
                return self._unary(operator, self.expression(operand))
            case ast.Compare(left, [operator], [right]):
                return self._compare(operator, self.expression(left), self.expression(right))
            case ast.BoolOp(operator, values):
                return self._boolean(operator, [self.expression(value) for value in values])
            case ast.IfExp(test, yes, no):
                condition = self.expression(test)
                if isinstance(condition, Scalar):
                    return select(condition, self.expression(yes), self.expression(no))
                return self.expression(yes if condition else no)
            case ast.Tuple(elements):
                return tuple(self.expression(element) for element in elements)
        return self.fail(
            f"`{ast.unparse(node)}`", "an expression is arithmetic, comparison, call or index",
            f"this is {type(node).__name__}", "write it with those",
        )  # fmt: skip

    def _is_value(self, node: ast.Name) -> bool:
        return node.id in self.environment

    def _name(self, name: str) -> Any:
        if name in self.environment:
            return self.environment[name]
        value = self.function.namespace.get(name)
        if isinstance(value, (int, float, str, DType)):
            return value
        known = [n for n in self.environment if not n.startswith("_")]
        return self.fail(
            f"name `{name}`", "a name is a parameter, a variable assigned before, or a number "
            "of the module", "it is none of them here", f"in scope are {', '.join(known)}",
        )  # fmt: skip

    def _module_attribute(self, owner: ast.Name, attribute: str) -> Any:
        value = getattr(self.function.namespace.get(owner.id), attribute, None)
        if isinstance(value, (int, float, str, DType)):
            return value
        return self.fail(
            f"`{owner.id}.{attribute}`", "an attribute of a module or class is a number or DType",
            f"it is {value!r}", "compute it outside the kernel and pass it after *",
        )  # fmt: skip

    def _attribute(self, value: Any, attribute: str) -> Any:
        if isinstance(value, Range) and attribute in ("start", "size", "block", "first"):
            return getattr(value, attribute)
        if isinstance(value, TileValue) and attribute == "T":
            shape = value.shape
            turned = Shape(shape.max_cols, shape.max_rows, shape.cols, shape.rows)
            return replace(value, shape=turned, transposed=not value.transposed)
        if isinstance(value, TensorHandle) and attribute == "dtype":
            return value.tensor.dtype
        return self.fail(
            f"`.{attribute}`", "ranges have start, size, block, first; tiles have T; tensors have "
            "dtype, size(), stride()", f"this is {_kind(value)}", "use one of those",
        )  # fmt: skip

    def _subscript(self, value: Any, index: ast.expr) -> Any:
        parts = index.elts if isinstance(index, ast.Tuple) else [index]
        found = tuple(
            self._whole(value, dim) if ast.unparse(part) == ":" else self.expression(part)
            for dim, part in enumerate(parts)
        )
        if isinstance(value, tuple):
            return value[found[0]]
        if isinstance(value, TensorHandle):
            return self._window(value, found)
        if isinstance(value, TileValue) and len(found) == 2:
            return self.builtins.part(value, *found)
        return self.fail(
            "index", "tensors are indexed per dimension, tiles by two ranges",
            f"this is {_kind(value)} with {len(found)} indices", "index a tensor or a tile",
        )  # fmt: skip

    def _whole(self, value: Any, dim: int) -> Any:
        """The range that `:` stands for."""
        if isinstance(value, TileValue) and dim < 2:
            shape = value.shape
            if dim == 0:
                return Range(ZERO, shape.rows, shape.max_rows)
            return Range(ZERO, shape.cols, shape.max_cols)
        if isinstance(value, TensorHandle) and dim < value.tensor.rank:
            return self.builtins.do_full(value.size(dim))
        return self.fail(
            "`:`", "it indexes a tile, or a dimension of a tensor", f"this is {_kind(value)}",
            "index a tensor or a tile",
        )  # fmt: skip

    def _window(self, tensor: TensorHandle, index: tuple[Any, ...]) -> Window:
        name, rank = tensor.tensor.name, tensor.tensor.rank
        if len(index) != rank:
            self.fail(
                f"index of {name}", f"it has one index per dimension, {rank}",
                f"there are {len(index)}", "index every dimension",
            )  # fmt: skip
        fixed = [scalar(i) if isinstance(i, int) else i for i in index]
        for part in fixed:
            if not isinstance(part, (Range, Scalar, TileValue)):
                self.fail(
                    f"index of {name}", "an index is a range, an integer or an int32 tile",
                    f"this is {_kind(part)}", "use the variable of a tiles(...) loop",
                )  # fmt: skip
        return Window(tensor, tuple(fixed))

    def call(self, node: ast.Call) -> Any:
        outer, self.node = self.node, node
        try:
            arguments = [self.expression(argument) for argument in node.args]
            keywords = {k.arg or "": self.expression(k.value) for k in node.keywords}
            match node.func:
                case ast.Name(name) if name in BUILTINS:
                    action = getattr(self.builtins, f"do_{name}")
                case ast.Attribute(owner, name) if name in METHODS:
                    action = getattr(self.builtins, f"method_{name}")
                    arguments.insert(0, self.expression(owner))
                case _:
                    self.fail(
                        f"call of `{ast.unparse(node.func)}`",
                        "a kernel calls functions of the kernel language",
                        "it is none", f"use one of {', '.join(sorted(BUILTINS))}",
                    )  # fmt: skip
            try:
                return action(*arguments, **keywords)
            except TypeError as problem:
                if "argument" not in str(problem):
                    raise
                return self.fail(
                    f"`{ast.unparse(node)}`", "a call has the arguments its function takes",
                    str(problem).split("do_")[-1].replace("()", ""), "see pagoda.compiler.language",
                )  # fmt: skip
        finally:
            self.node = outer

    def binary(self, operator: type[ast.operator], left: Any, right: Any) -> Any:
        if operator not in _ARITHMETIC:
            self.fail(
                f"operator {operator.__name__}", "the operators are + - * / // % & | ^",
                "it is another one", "write it with those",
            )  # fmt: skip
        symbol, name = _ARITHMETIC[operator]
        if isinstance(left, _TILE_VALUES) or isinstance(right, _TILE_VALUES):
            return self.builtins.arithmetic(name, symbol, left, right)
        self._expect_numbers(symbol, left, right)
        if isinstance(left, Scalar) or isinstance(right, Scalar):
            if symbol not in ("+", "-", "*", "//", "%"):
                self.fail(
                    f"operator {symbol}", "run-time integers have + - * // %",
                    "it is applied to one", "use those, or a compile-time value",
                )  # fmt: skip
            return binary(symbol, left, right)
        return self._compute(symbol, left, right)

    def _compute(self, symbol: str, left: Any, right: Any) -> Any:
        """The value of two compile-time values and an operator."""
        try:
            return _PYTHON[symbol](left, right)
        except (ArithmeticError, TypeError, ValueError) as problem:
            return self.fail(
                f"`{ast.unparse(self.node)}`", "a compile-time expression has a value",
                f"{left!r} {symbol} {right!r} raised {type(problem).__name__}: {problem}",
                "correct its operands",
            )  # fmt: skip

    def _expect_numbers(self, symbol: str, *values: Any) -> None:
        for value in values:
            if not isinstance(value, (int, float, str, DType, Scalar)):
                self.fail(
                    f"operator {symbol}", "its operands are integers, numbers or tiles",
                    f"one is {_kind(value)}", "use .start or .size of a range, load(...) of a "
                    "window",
                )  # fmt: skip

    def _unary(self, operator: ast.unaryop, value: Any) -> Any:
        if isinstance(operator, ast.USub):
            if isinstance(value, _TILE_VALUES):
                return self.builtins.negative(value)
            return -value
        if isinstance(operator, ast.Not):
            return value.eq(ZERO) if isinstance(value, Scalar) else not value
        return self.fail(
            f"operator {type(operator).__name__}", "the unary operators are - and not",
            "it is another one", "write it with those",
        )  # fmt: skip

    def _compare(self, operator: ast.cmpop, left: Any, right: Any) -> Any:
        if isinstance(operator, (ast.Is, ast.IsNot)):
            return (left is right) == isinstance(operator, ast.Is)
        symbol, name = _COMPARISONS.get(type(operator), ("", ""))
        if not symbol:
            self.fail(
                f"comparison {type(operator).__name__}", "comparisons are < <= > >= == != is",
                "it is another one", "write it with those",
            )  # fmt: skip
        if isinstance(left, _TILE_VALUES) or isinstance(right, _TILE_VALUES):
            return self.builtins.arithmetic(name, symbol, left, right)
        self._expect_numbers(symbol, left, right)
        if isinstance(left, Scalar) or isinstance(right, Scalar):
            return binary(symbol, left, right)
        return self._compute(symbol, left, right)

    def _boolean(self, operator: ast.boolop, values: list[Any]) -> Any:
        if any(isinstance(value, Scalar) for value in values):
            op = "min" if isinstance(operator, ast.And) else "max"
            result = scalar(int(values[0])) if isinstance(values[0], bool) else values[0]
            for value in values[1:]:
                result = binary(op, result.ne(ZERO), scalar(value).ne(ZERO))
            return result
        return all(values) if isinstance(operator, ast.And) else any(values)


def _kind(value: Any) -> str:
    names = {
        TensorHandle: "a tensor", Range: "a range", TileValue: "a tile", Window: "a window",
        Expression: "a tile expression", Product: "a product", ReductionState: "a state",
    }  # fmt: skip
    if isinstance(value, Scalar):
        return "a run-time integer"
    return names.get(type(value), repr(value))


def _assigned_names(statements: list[ast.stmt]) -> list[str]:
    names = []
    for statement in statements:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.append(node.id)
    return list(dict.fromkeys(names))
