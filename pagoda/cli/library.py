"""The kernels that `pagoda run` and `pagoda dump` know by name, with their sizes, seeded data and
what numpy says about the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields

import click
import numpy as np

from pagoda.compiler.errors import CompileError
from pagoda.compiler.index_expr import Const, Var
from pagoda.compiler.language import TensorType
from pagoda.compiler.loop_nest import Builder, LoopNest
from pagoda.compiler.loop_nest_oracle import (
    bfloat16_to_float32,
    evaluate,
    float32_to_bfloat16,
)
from pagoda.compiler.nest_blocks import choose_blocks
from pagoda.compiler.nest_lowering import lower
from pagoda.compiler.region import KernelCall, LibraryCall, View
from pagoda.compiler.tile_ir import Kernel
from pagoda.isa import accumulation
from pagoda.isa.chip import Chip
from pagoda.isa.numbers import DType
from pagoda.kernels.attention_call import attention_arguments, attention_for
from pagoda.kernels.matmul import build_matmul

LARGEST_SIZE = 1 << 20
DTYPES = {"bf16": DType.BF16, "int8": DType.I8, "f32": DType.F32}
_REFERENCE_ELEMENTS = 1 << 18
_NEST_DTYPES = {"bf16": "bfloat16", "f32": "float32"}
# bf16 is kept as bit patterns: numpy has no such type.
STORAGE = {DType.BF16: np.uint16, DType.F32: np.float32, DType.I8: np.int8, DType.I32: np.int32}

# Of the attention weights: rounded to bf16, normalised by their rounded sum, and the result rounded
# again; float32 is computed in three bf16 terms (see `kernels.attention`). Relative to sum p |v|.
_ATTENTION_ERROR = {"bf16": 3.1 * 2**-9, "f32": 2**-19}
# Of a loop nest: relative, absolute; it adds in another order than numpy and rounds once.
_NEST_ERROR = {"bf16": (2**-7, 1e-3), "f32": (2e-5, 2e-6)}


@dataclass(frozen=True)
class Verdict:
    """How a result compares with the reference. rule: what an element must do to be right."""

    rule: str
    elements: int
    wrong: int
    largest_error: float


def values(array: np.ndarray) -> np.ndarray:
    """Stored elements as numbers: bf16 patterns become float32, others stay."""
    return bfloat16_to_float32(array) if array.dtype == np.uint16 else array


def seeded(layout: TensorType, rng: np.random.Generator) -> np.ndarray:
    """A tensor in its layout: standard normal floats, int8 over its whole range."""
    count = int(np.prod(layout.sizes))
    if layout.dtype is DType.I8:
        stored = rng.integers(-128, 128, count).astype(np.int8)
    elif layout.dtype is DType.I32:
        stored = rng.integers(-1000, 1000, count).astype(np.int32)
    else:
        stored = rng.standard_normal(count, np.float32)
        stored = float32_to_bfloat16(stored) if layout.dtype is DType.BF16 else stored
    return np.ndarray(layout.sizes, stored.dtype, stored, strides=layout.strides)


def _size(default: int, least: int = 0, most: int = LARGEST_SIZE) -> int:
    return field(default=default, metadata={"range": (least, most)})


def _choice(*choices: str) -> str:
    return field(default=choices[0], metadata={"choices": choices})


@dataclass(frozen=True)
class Problem(ABC):
    """A kernel of the library with its sizes; a subclass's fields are what NAME=VALUE sets."""

    def parameters(self) -> dict[str, int | str | bool]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @abstractmethod
    def tensors(self) -> dict[str, TensorType]:
        """Layouts by the kernel's names, the result first."""

    @abstractmethod
    def build(self, chip: Chip) -> tuple[Kernel, dict[str, int]]:
        """The kernel for a chip and its scalar arguments. Raises CompileError."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiply-adds of the mathematics, without padding."""

    @abstractmethod
    def check(self, inputs: dict[str, np.ndarray], found: np.ndarray) -> Verdict:
        """Compare a result with numpy's; arrays are in storage types and the tensors' layouts."""


def _within(rule: str, found: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> Verdict:
    error = np.abs(found.astype(np.float64) - expected)
    # Written so that a NaN counts as wrong.
    wrong = int(np.count_nonzero(~(error <= bound)))
    return Verdict(rule, found.size, wrong, float(error.max(initial=0.0)))


@dataclass(frozen=True)
class Matmul(Problem):
    """c[g] = a[g] b[g] (+ bias); b as nn.Linear stores it, [n, k], unless transpose_b=no."""

    m: int = _size(128)
    n: int = _size(128)
    k: int = _size(128)
    batch: int = _size(1)
    dtype: str = _choice("bf16", "int8")
    bias: bool = False
    transpose_a: bool = False
    transpose_b: bool = True

    def tensors(self) -> dict[str, TensorType]:
        dtype, integer = DTYPES[self.dtype], self.dtype == "int8"
        found = {
            "c": _matrices(DType.I32 if integer else dtype, self.batch, self.m, self.n, False),
            "a": _matrices(dtype, self.batch, self.m, self.k, self.transpose_a),
            "b": _matrices(dtype, self.batch, self.k, self.n, self.transpose_b),
        }
        if self.bias:
            found["bias"] = TensorType.fixed(DType.I32 if integer else DType.F32, self.n)
        return found

    def build(self, chip: Chip) -> tuple[Kernel, dict[str, int]]:
        if self.dtype not in chip.matrix_types:
            raise CompileError(
                "matmul", f"dtype is one that the array of chip {chip.name} multiplies "
                f"({', '.join(chip.matrix_types)})", f"it is {self.dtype}",
                f"use dtype={chip.matrix_types[0]}, or another chip",
            )  # fmt: skip
        expected = self.batch, self.m, self.n, self.k
        return build_matmul(chip, **self.tensors(), expected=expected), {}

    @property
    def macs(self) -> int:
        return self.batch * self.m * self.n * self.k

    def check(self, inputs: dict[str, np.ndarray], found: np.ndarray) -> Verdict:
        integer = self.dtype == "int8"
        product = accumulation.matmul_i8 if integer else accumulation.matmul
        expected = np.zeros(found.shape, np.int32 if integer else np.float32)
        for g in range(self.batch):
            a, b = values(inputs["a"][g]), values(inputs["b"][g])
            for rows in _row_blocks(self.m, self.n):
                expected[g, rows] = product(a[rows], b, expected[g, rows])
        if self.bias:
            expected += inputs["bias"]
        if found.dtype == np.uint16:
            expected = float32_to_bfloat16(expected)
        wrong = int(np.count_nonzero(found != expected))
        error = np.abs(values(found).astype(np.float64) - values(expected))
        rule = "equal numpy's sum over k = 0, 1, 2, ... in order, bit for bit"
        return Verdict(rule, found.size, wrong, float(error.max(initial=0.0)))


def _row_blocks(rows: int, cols: int) -> Iterator[slice]:
    """Rows in blocks that keep numpy's temporary arrays small."""
    step = max(_REFERENCE_ELEMENTS // max(cols, 1), 1)
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def _matrices(dtype: DType, batch: int, rows: int, cols: int, transposed: bool) -> TensorType:
    if not transposed:
        return TensorType.fixed(dtype, batch, rows, cols)
    stored = TensorType.fixed(dtype, batch, cols, rows)
    outer, row, col = stored.strides
    return TensorType(dtype, (batch, rows, cols), (outer, col, row))


@dataclass(frozen=True)
class Attention(Problem):
    """softmax(q k^T / sqrt(head_dim)) v; heads share kv_heads; causal: the last query sees every
    key, as in decoding with a cache."""

    queries: int = _size(128)
    keys: int = _size(128)
    heads: int = _size(8, 1)
    kv_heads: int = _size(2, 1)
    head_dim: int = _size(64, 1, 256)
    batch: int = _size(1)
    causal: bool = True
    dtype: str = _choice("bf16", "f32")

    def tensors(self) -> dict[str, TensorType]:
        def tensor(heads: int, length: int) -> TensorType:
            return TensorType.fixed(DTYPES[self.dtype], self.batch, heads, length, self.head_dim)

        shared = tensor(self.kv_heads, self.keys)
        own = tensor(self.heads, self.queries)
        return {"out": own, "q": own, "k": shared, "v": shared}

    @property
    def offset(self) -> int:
        """Keys before query 0."""
        return max(self.keys - self.queries, 0)

    def build(self, chip: Chip) -> tuple[Kernel, dict[str, int]]:
        if self.heads % self.kv_heads:
            raise CompileError(
                "attention", "heads is a multiple of kv_heads",
                f"heads={self.heads} and kv_heads={self.kv_heads}", "change one of them",
            )  # fmt: skip
        views = (_view(n, t) for n, t in enumerate(self.tensors().values()))
        attributes = (("causal", self.causal), ("scale", self.head_dim**-0.5))
        call = KernelCall(LibraryCall("sdpa", attributes), (*views, None))
        kernel, blocks = attention_for(call, chip)
        _, scalars = attention_arguments(call, blocks, self.offset, chip.cores)
        return kernel, {name: int(value.evaluate({})) for name, value in scalars.items()}

    @property
    def macs(self) -> int:
        first = min(self.offset + 1, self.keys)
        seen = self.queries * self.keys
        if self.causal:
            growing = min(self.keys - first, max(self.queries - 1, 0))
            seen = first * self.queries + growing * (growing + 1) // 2
            seen += growing * max(self.queries - 1 - growing, 0)
        return self.batch * self.heads * seen * 2 * self.head_dim

    def check(self, inputs: dict[str, np.ndarray], found: np.ndarray) -> Verdict:
        q, k, v = (values(inputs[name]).astype(np.float64) for name in "qkv")
        shared, position = self.heads // self.kv_heads, np.arange(self.keys)
        expected, size = np.zeros(found.shape), np.zeros(found.shape)
        everything = found.size and self.keys  # a query that sees no key gives 0
        for b, h in np.ndindex(self.batch, self.heads) if everything else ():
            for rows in _row_blocks(self.queries, self.keys):
                scores = q[b, h, rows] @ k[b, h // shared].T * self.head_dim**-0.5
                if self.causal:
                    last = np.arange(rows.start, rows.stop)[:, None] + self.offset
                    scores = np.where(position <= last, scores, -np.inf)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                expected[b, h, rows] = weights @ v[b, h // shared]
                size[b, h, rows] = weights @ np.abs(v[b, h // shared])
        bound = _ATTENTION_ERROR[self.dtype]
        rule = f"lie within {bound:.2g} * sum(p |v|) of numpy's float64 attention"
        return _within(rule, values(found), expected, bound * size + 1e-30)


def _view(number: int, layout: TensorType) -> View:
    item = layout.dtype.bits // 8
    strides = tuple(Const(stride // item) for stride in layout.strides)
    sizes = tuple(map(Const, layout.sizes))
    name = "bfloat16" if layout.dtype is DType.BF16 else "float32"
    return View(number, Const(0), sizes, strides, name)


@dataclass(frozen=True)
class _Rows(Problem):
    """A loop nest over rows of `cols` elements, as PyTorch's models hand them down."""

    rows: int = _size(128)
    cols: int = _size(576, 1)
    dtype: str = _choice("bf16", "f32")

    @abstractmethod
    def emit(self, b: Builder, x: int) -> int:
        """The result of one element as a value of the builder; x: the element."""

    def nest(self) -> tuple[LoopNest, list[str]]:
        """The nest and its parameters' names, the result last."""
        b = Builder([Const(self.rows), Const(self.cols)], 1)
        element = Var(0) * self.cols + Var(1)
        name = _NEST_DTYPES[self.dtype]
        y = self.emit(b, b.load("x", name, element))
        b.store("y", name, element, y)
        nest, names, _ = b.build()
        return nest, names

    def tensors(self) -> dict[str, TensorType]:
        names = self.nest()[1]
        whole = TensorType.fixed(DTYPES[self.dtype], self.rows, self.cols)
        row = TensorType.fixed(DTYPES[self.dtype], self.cols)
        found = {f"p{n}": row if name == "w" else whole for n, name in enumerate(names)}
        result = f"p{names.index('y')}"
        return {result: found[result], **found}

    def build(self, chip: Chip) -> tuple[Kernel, dict[str, int]]:
        nest, _ = self.nest()
        return lower(nest, choose_blocks(nest, {}, chip)).kernel, {}

    @property
    def macs(self) -> int:
        return 0  # of the matrix engine

    def check(self, inputs: dict[str, np.ndarray], found: np.ndarray) -> Verdict:
        nest, names = self.nest()
        result = names.index("y")
        buffers = [
            np.zeros(found.size, found.dtype) if n == result else inputs[f"p{n}"].ravel()
            for n in range(len(names))
        ]
        if found.size:
            evaluate(nest, buffers)
        expected = values(buffers[result]).reshape(found.shape).astype(np.float64)
        relative, absolute = _NEST_ERROR[self.dtype]
        rule = f"lie within {relative:.2g} |y| + {absolute:.2g} of numpy's result"
        return _within(rule, values(found), expected, relative * np.abs(expected) + absolute)


@dataclass(frozen=True)
class RmsNorm(_Rows):
    """y = x / sqrt(mean(x^2) + 1e-5) * w, row by row."""

    def emit(self, b: Builder, x: int) -> int:
        total = b.reduce("sum", b.pointwise("mul", x, x))
        mean = b.pointwise("div", total, b.constant(float(self.cols), "float32"))
        root = b.pointwise("rsqrt", b.pointwise("add", mean, b.constant(1e-5, "float32")))
        weight = b.load("w", _NEST_DTYPES[self.dtype], Var(1))
        return b.pointwise("mul", b.pointwise("mul", x, root), weight)


@dataclass(frozen=True)
class Softmax(_Rows):
    """y = exp(x - max) / sum of them, row by row."""

    def emit(self, b: Builder, x: int) -> int:
        power = b.pointwise("exp", b.pointwise("sub", x, b.reduce("max", x)))
        return b.pointwise("div", power, b.reduce("sum", power))


@dataclass(frozen=True)
class SiluMul(_Rows):
    """y = x * sigmoid(x) * u: the gate of a Llama-class feed-forward layer."""

    def emit(self, b: Builder, x: int) -> int:
        gate = b.pointwise("mul", x, b.pointwise("sigmoid", x))
        up = b.load("u", _NEST_DTYPES[self.dtype], Var(0) * self.cols + Var(1))
        return b.pointwise("mul", gate, up)


LIBRARY: dict[str, Callable[..., Problem]] = {
    "matmul": Matmul,
    "attention": Attention,
    "rms_norm": RmsNorm,
    "softmax": Softmax,
    "silu_mul": SiluMul,
}


def library_help() -> str:
    """The kernels with their sizes and defaults, for `--help`."""
    return "\b\nKernels, and what NAME=VALUE may set:\n" + "\n".join(_describe())


def _describe() -> Iterator[str]:
    for name, kind in LIBRARY.items():
        defaults = kind().parameters()
        shown = [f"{key}={_text(value)}" for key, value in defaults.items()]
        lines = [""]
        for item in shown:
            if len(lines[-1]) + len(item) > 62:
                lines.append("")
            lines[-1] += f" {item}"
        yield f"  {name:10}{lines[0]}"
        yield from (f"  {'':10}{line}" for line in lines[1:])


def _text(value: int | str | bool) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def problem(name: str, settings: Sequence[str]) -> Problem:
    """A kernel of the library by name, with NAME=VALUE settings. Raises click.UsageError."""
    kind = LIBRARY.get(name)
    if kind is None:
        raise click.UsageError(
            f"kernel {name!r}: the library has {', '.join(LIBRARY)}; name one of those "
            "(pagoda dump also takes FILE.py:NAME)."
        )
    known = {f.name: f for f in fields(kind)}
    given = {}
    for key, text in split_settings(settings).items():
        if key not in known:
            raise click.UsageError(
                f"{name}: {key} is none of its parameters; they are {', '.join(known)}."
            )
        given[key] = _parse(name, known[key], text)
    return kind(**given)


def split_settings(settings: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words as a dictionary. Raises click.UsageError."""
    found: dict[str, str] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (equals and key and text):
            raise click.UsageError(
                f"setting {setting!r}: it has the form NAME=VALUE; write for example m=128."
            )
        if key in found:
            raise click.UsageError(f"setting {setting!r}: {key} is given twice; drop one.")
        found[key] = text
    return found


def _parse(name: str, parameter: Field, text: str) -> int | str | bool:
    if "choices" in parameter.metadata:
        choices = parameter.metadata["choices"]
        if text in choices:
            return text
        rule = " or ".join(choices)
    elif isinstance(parameter.default, bool):
        if text in ("yes", "no"):
            return text == "yes"
        rule = "yes or no"
    else:
        least, most = parameter.metadata["range"]
        if text.isascii() and text.isdigit() and least <= int(text) <= most:
            return int(text)
        rule = f"a whole number from {least} to {most}"
    raise click.UsageError(
        f"{name}: {parameter.name} is {rule}, but it is {text!r}; "
        f"the default is {_text(parameter.default)}."
    )
