"""Torch's own operator database as a judge of device "pagoda".

`torch.testing._internal.common_methods_invocations.op_db` has sample inputs for every operation,
made by torch's authors. `judge` runs some of them here and on the CPU, forward and backward, and
gives one verdict per operation and type.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils import _pytree as pytree

from pagoda.runtime import DeviceFault

P = "pagoda"
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)  # int64 is computed as int32

# What the table leaves out. Matrix decompositions and what is made of them:
_DECOMPOSITIONS = """cholesky cholesky_inverse cholesky_solve geqrf logdet lu lu_solve lu_unpack
    matrix_exp ormqr pca_lowrank pinverse qr svd svd_lowrank triangular_solve norm.nuc"""
_LINALG = "cross diagonal multi_dot vecdot vector_norm matrix_norm norm matrix_power vander"
# Complex numbers, sparse tensors, Fourier transforms, functions of mathematics rarely met in
# networks, operations on storage, quantised products of other devices, and what prints or compares.
_OTHERS = """H mH imag real complex cdouble cfloat chalf polar view_as_complex view_as_real
    nn.functional.silu.complex to_sparse istft stft igamma igammac i0 frexp nextafter cauchy
    geometric log_normal hash_tensor histogram histogramdd broadcast_shapes
    torch._scaled_mm torch._scaled_mm_v2 torch.ops.aten._efficient_attention_forward
    torch.ops.aten._flash_attention_forward bmm.triton_optimized _segment_reduce.lengths
    _segment_reduce.offsets _chunk_cat double half short resize_ resize_as_"""
_FAMILIES = ("fft.", "signal.windows.", "jiterator_", "sparse.", "polygamma.", "mvlgamma.")
_SPECIAL = "entr log_ndtr ndtr xlog1py"
# Kernels of their own, with tests of their own (`test_convolution`, `test_attention`).
_ELSEWHERE = ("nn.functional.conv", "nn.functional.scaled_dot_product_attention")
# Only sizes and types can be compared: what they draw or leave uninitialised is not defined.
_DRAWN = """bernoulli empty empty_like empty_permuted empty_strided exponential multinomial
    new_empty new_empty_strided nn.functional.alpha_dropout nn.functional.dropout
    nn.functional.dropout2d nn.functional.dropout3d nn.functional.feature_alpha_dropout.with_train
    nn.functional.fractional_max_pool2d nn.functional.fractional_max_pool3d
    nn.functional.multi_head_attention_forward nn.functional.rrelu normal normal.in_place
    normal.number_mean rand_like randint randint_like randn randn_like uniform"""
SHAPE_ONLY = frozenset(_DRAWN.split())
# Only the first result is compared: the others are what a device keeps for its own backward pass,
# or positions, of which equal values have several.
FIRST_ONLY = (
    "mode",
    "_batch_norm_with_update", "_native_batch_norm_legit", "native_batch_norm",
    "native_group_norm", "native_layer_norm",
)  # fmt: skip
_FIRST_OF_EQUALS = ("kthvalue", "topk")  # if there are equal values


def name_of(op: OpInfo) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def _left_out(name: str) -> bool:
    family, _, rest = name.partition(".")
    listed = {"linalg": _LINALG, "special": _SPECIAL}.get(family)
    if listed is not None:
        return rest not in listed.split()
    named = name in f"{_DECOMPOSITIONS} {_OTHERS}".split()
    return named or name.startswith((*_FAMILIES, *_ELSEWHERE))


OPERATIONS: dict[str, OpInfo] = {
    name_of(op): op for op in op_db if not _left_out(name_of(op))
}


@dataclass(frozen=True)
class Verdict:
    """What an operation does for one type.

    outcome: "passes", "refused" (NotImplementedError that names the operation), "wrong" (other
    values, sizes or types than the CPU's) or "crashes" (any other exception). gradient: whether
    gradients were compared. host: operations that were computed on the host. remark: the first
    difference or the message.
    """

    outcome: str
    gradient: bool = False
    host: tuple[str, ...] = ()
    remark: str = ""


class Difference(AssertionError):
    """The device's result is not the CPU's."""


def dtypes_of(op: OpInfo) -> list[torch.dtype]:
    return [dtype for dtype in DTYPES if dtype in op.supported_dtypes("cpu")]


def leaves(sample: SampleInput) -> list[Any]:
    return pytree.tree_leaves((sample.input, sample.args, sample.kwargs))


def _elements(sample: SampleInput) -> int:
    return sum(a.numel() for a in leaves(sample) if isinstance(a, torch.Tensor))


def samples(op: OpInfo, dtype: torch.dtype, count: int) -> list[SampleInput]:
    """`count` samples: the smallest one that has elements and gives some, and others from all over
    torch's list, which begins with common arguments and ends with rare ones."""
    torch.manual_seed(0)
    gradient = op.supports_autograd and dtype.is_floating_point
    made: Iterator[SampleInput] = op.sample_inputs("cpu", dtype, requires_grad=gradient)
    before = random.getstate()
    random.seed(0)  # margins and scales are drawn from there: the same in every run
    every = list(itertools.islice(made, 200))
    random.setstate(before)
    found = [s for s in every if _elements(s) <= 5000] or every
    if not found:
        return []
    ordered = sorted(found, key=lambda s: (not _elements(s), _elements(s)))
    smallest = next((s for s in ordered if _gives_elements(op, s)), ordered[0])
    others = [s for s in found if s is not smallest]
    step = max(len(others) / max(count - 1, 1), 1)
    places = (int((k + 0.5) * step) for k in range(count - 1))
    return [smallest, *(others[place] for place in places if place < len(others))]


def _gives_elements(op: OpInfo, sample: SampleInput) -> bool:
    return any(t.numel() for t in _on_cpu(op, sample) or ())


# Samples that ask for types the chip has none of, by name or as the type of a tensor, ask for these
# instead.
_INSTEAD = {torch.float64: torch.float32, torch.float16: torch.bfloat16, torch.int16: torch.int32}


LAYOUTS = ("contiguous", "strided", "transposed", "offset")


def layouts(op: OpInfo) -> tuple[str, ...]:
    """Those in which a sample asks the same: what as_strided gives is a matter of the layout, and
    native_group_norm takes no other."""
    fixed = op.name.startswith("as_strided") or op.name == "native_group_norm"
    return LAYOUTS[:1] if fixed else LAYOUTS


def placed(
    sample: SampleInput, place: str, change: Callable = lambda t: t, layout: str = "contiguous"
) -> SampleInput:
    """The sample with all its tensors and devices there; leaves of autograd stay leaves. layout:
    how its tensors lie in memory there; see `_laid_out`."""

    def move(a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            with torch.no_grad():
                moved = a.detach().clone(memory_format=torch.preserve_format)
                moved = change(moved.to(_INSTEAD.get(a.dtype, a.dtype)))
                moved = _laid_out(moved, place, layout)
            return moved.requires_grad_(a.requires_grad)
        if isinstance(a, torch.dtype):
            return _INSTEAD.get(a, a)
        return place if isinstance(a, torch.device) or a == "cpu" else a

    input_, args, kwargs = pytree.tree_map(move, (sample.input, sample.args, sample.kwargs))
    return SampleInput(input_, args=args, kwargs=kwargs)


def _laid_out(t: torch.Tensor, place: str, layout: str) -> torch.Tensor:
    """A view on a device of t in memory that holds more or in another order: "strided" skips every
    other element, "transposed" has the last two dimensions swapped, "offset" begins in the middle.
    Where that is not possible, as it is."""
    if layout == "strided" and t.dim() and t.numel() > 1:
        return t.repeat_interleave(2, -1).to(place)[..., ::2]
    if layout == "transposed" and t.dim() > 1 and t.numel() > 1:
        return t.mT.contiguous().to(place).mT
    if layout == "offset" and t.numel():
        return torch.cat([t.new_zeros(3), t.flatten()]).to(place)[3:].view(t.shape)
    return t.to(place)


def _tensors(result: Any) -> list[Any]:
    leaves = pytree.tree_leaves(result)
    return [a if isinstance(a, torch.Tensor) else torch.as_tensor(a) for a in leaves]


def results(
    function: Callable, sample: SampleInput, several: int | None = None
) -> tuple[list[Any], list[Any]]:
    """Values, and gradients of the sum of the first `several` (None: of all), weighted with fixed
    random numbers."""
    torch.manual_seed(1)
    out = _tensors(function(sample.input, *sample.args, **sample.kwargs))
    given = [a for a in leaves(sample) if isinstance(a, torch.Tensor) and a.requires_grad]
    through = [t for t in out if t.requires_grad and t.numel()][:several]
    if not given or not through:
        return out, []
    draw = torch.Generator().manual_seed(2)
    weights = [
        torch.randn(t.shape, generator=draw).to(t.dtype).to(t.device) for t in through
    ]  # fmt: skip
    gradients = torch.autograd.grad(
        through, given, weights, allow_unused=True, materialize_grads=True
    )
    return out, list(gradients)


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.to({torch.bfloat16: torch.float32, torch.float32: torch.float64}.get(t.dtype, t.dtype))


def more_exact(op: OpInfo, sample: SampleInput) -> tuple[list[Any], list[Any]]:
    """The CPU's results and gradients in the next wider type; none if it cannot."""
    try:
        return results(op.op, placed(sample, "cpu", _wide))
    except Exception:  # noqa: BLE001 - it mixes types, or torch refuses this one
        return [], []


def compare(what: str, got: Any, want: Any, exact: Any) -> None:
    """Raises Difference unless `got`, on the device, is what the CPU says.

    want: the CPU's result of that type, which says size and type. exact: what the CPU finds in the
    next wider type. Floats must be near either of the two, an element within 1e-4 of itself or 1e-5
    of the largest one; for bfloat16 1.6e-2, torch's own bound for the type, and 2^-8. All else must
    be equal.
    """
    if (got is None) != (want is None):
        raise Difference(f"{what} is {got}, not {want}")
    if want is None:
        return
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        raise Difference(
            f"{what} is {got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
        )
    here, want = got.detach().cpu(), want.detach()
    if not want.numel():
        return
    if not want.is_floating_point():
        right = here == want
    else:
        low = want.dtype == torch.bfloat16
        exact = exact.detach() if exact is not None and exact.shape == want.shape else want
        exact, want, here = exact.float(), want.float(), here.float()
        finite = exact[exact.isfinite()].abs()
        largest = max(1.0, float(finite.max()) if finite.numel() else 1.0)
        rtol, atol = (1.6e-2, 2.0**-8 * largest) if low else (1e-4, 1e-5 * largest)
        right = torch.isclose(here, exact, rtol, atol, equal_nan=True)
        right |= torch.isclose(here, want, rtol, atol, equal_nan=True)
    if not bool(right.all()):
        first = tuple((~right).nonzero()[0].tolist())
        wrong = int((~right).sum())
        raise Difference(
            f"{what}{list(first)} is {here[first].item()}, not {want[first].item()}; "
            f"{wrong} of {want.numel()} differ"
        )


def check(
    op: OpInfo, sample: SampleInput, function: Callable | None = None, layout: str = "contiguous",
    gradients: bool = True,
) -> bool:  # fmt: skip
    """Compares one sample; whether gradients were compared. Raises Difference or what torch raises.
    `function`: what the device computes, unless it is the operation itself. layout: of its tensors
    on the device, one of LAYOUTS. gradients: compare values of theirs, not only their number."""
    here = placed(sample, P, layout=layout)
    want, want_grads = results(op.op, placed(sample, "cpu"))
    exact, exact_grads = more_exact(op, sample)
    got, got_grads = results(function or op.op, here)
    if name_of(op) in FIRST_ONLY or op.name in _FIRST_OF_EQUALS and _has_equals(sample.input):
        got, want, exact = got[:1], want[:1], exact[:1]
    if len(got) != len(want) or len(got_grads) != len(want_grads):
        raise Difference(f"{len(got)} results, not {len(want)}")
    if name_of(op) in SHAPE_ONLY:
        got, want, exact = ([torch.zeros_like(t, device="cpu") for t in r]
                            for r in (got, want, want))  # fmt: skip
        want_grads = []
    for number, values in enumerate(zip(got, want, _same(exact, want), strict=True)):
        compare(f"result {number}", *values)
    if want_grads and gradients:
        wide = _same(exact_grads, want_grads)
        for number, values in enumerate(zip(got_grads, want_grads, wide, strict=True)):
            compare(f"gradient {number}", *values)
    return any(g is not None for g in want_grads)


def _same(exact: Sequence[Any], want: Sequence[Any]) -> Sequence[Any]:
    return exact if len(exact) == len(want) else want


def _has_equals(t: torch.Tensor) -> bool:
    return t.unique().numel() < t.numel()


def _on_cpu(op: OpInfo, sample: SampleInput, layout: str = "contiguous") -> list[Any] | None:
    """The CPU's results; None if it cannot compute them."""
    try:
        return results(op.op, placed(sample, "cpu", layout=layout))[0]
    except Exception:  # noqa: BLE001 - whatever torch raises for arguments it does not take
        return None


def accepted(op: OpInfo, sample: SampleInput) -> bool:
    """Whether the CPU can compute it."""
    return _on_cpu(op, sample) is not None


def fits(op: OpInfo, sample: SampleInput, layout: str) -> bool:
    """Whether the CPU can compute it from tensors that lie so in memory, in types that the chip
    computes with too, and the results can be compared. They cannot if they are floats that were cut
    to integers: one whose last bit differs may give another integer. Nor if they are small
    differences of large logits that were rounded to bfloat16. And tensor_split takes its places
    from the CPU only."""
    found = _on_cpu(op, sample, layout)
    if found is None:
        return False
    types = {t.dtype for t in found}
    if op.name == "nn.functional.linear_cross_entropy" and torch.bfloat16 in types:
        return False
    cut = op.name == "linspace" and not all(t.is_floating_point for t in types)
    places = op.name == "tensor_split" and isinstance(sample.args[0], torch.Tensor)
    return not cut and not places and types.isdisjoint(_INSTEAD)


def too_wide(error: BaseException) -> bool:
    """Whether the chip found an integer beyond 32 bits: some samples have such values."""
    return isinstance(error, DeviceFault) and "INT64_OVERFLOW" in str(error)


def is_decomposition(error: BaseException) -> bool:
    """Whether it is refused for the decomposition of a matrix, which the table leaves out."""
    return is_refusal(error) and "operation _linalg_" in str(error)


def is_refusal(error: BaseException) -> bool:
    """Whether the message says what cannot run, where and what to do, in words for users: not what
    some assertion inside of torch or of us says."""
    text = str(error)
    inside = re.search(r"device pagoda: \w*(Error|Exception)\b", text)
    named = "on device pagoda" in text or "one of the chip's" in text
    return isinstance(error, (NotImplementedError, TypeError)) and named and not inside


def judge(op: OpInfo, dtype: torch.dtype, count: int = 2) -> Verdict:
    """The verdict over `count` samples, of which the second has strided tensors."""
    chosen = [s for s in samples(op, dtype, count) if accepted(op, s)]
    if not chosen:
        return Verdict("no samples")
    gradient = False
    torch.pagoda.reset_fallbacks()
    remark = ""
    try:
        for number, sample in enumerate(chosen):
            remark = f"sample {number}: "
            layout = "strided" if number == 1 and "strided" in layouts(op) else "contiguous"
            gradient |= check(op, sample, layout=layout)
    except Difference as difference:
        return Verdict("wrong", gradient, _host(), remark + str(difference))
    except Exception as error:  # noqa: BLE001 - the verdict is about them
        outcome = "refused" if is_refusal(error) else "crashes"
        text = " ".join(str(error).split())
        return Verdict(outcome, gradient, _host(), f"{remark}{type(error).__name__}: {text}"[:600])
    return Verdict("passes", gradient, _host())


def _host() -> tuple[str, ...]:
    names = (name.removeprefix("aten.").split(".")[0] for name in torch.pagoda.fallbacks())
    return tuple(sorted(set(names)))
