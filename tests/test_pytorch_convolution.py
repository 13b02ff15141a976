"""Convolutions through PyTorch on the simulated chip: torch on the CPU is the judge of values and
memory formats; gradients, compiled networks, float32 precision, errors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

import pagoda
import pagoda.pytorch.inductor
from pagoda.pytorch import call, device, eager

P = "pagoda"


@pytest.fixture(autouse=True, scope="module")
def chip(tmp_path_factory):
    """The chip of the tests of this file; what the process used before comes back."""
    before = (device.state.executor, device.state.allocator)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield pagoda.use_chip("tiny")
    device.state.executor, device.state.allocator = before


@pytest.fixture(autouse=True)
def no_fallbacks():
    torch.pagoda.reset_fallbacks()


@dataclass(frozen=True)
class Case:
    """One convolution; sizes without channels and images are (height, width) or (width,)."""

    images: int
    channels: int  # of each group
    outputs: int  # of each group
    groups: int
    space: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    extra: tuple[int, ...] | None  # output padding of a transposed one
    bias: bool
    channels_last: bool
    dtype: torch.dtype

    def tensors(self) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)

        def draw(*sizes: int) -> torch.Tensor:
            drawn = torch.randn(sizes, generator=generator).to(self.dtype)
            last = self.channels_last and len(sizes) == 4
            return drawn.to(memory_format=torch.channels_last) if last else drawn

        x = draw(self.images, self.groups * self.channels, *self.space)
        first, second = self.groups * self.outputs, self.channels
        if self.extra is not None:
            first, second = self.groups * self.channels, self.outputs
        tensors = [x, draw(first, second, *self.kernel)]
        return [*tensors, draw(self.groups * self.outputs)] if self.bias else tensors

    def run(self, x, w, bias=None):
        form = dict(stride=self.stride, padding=self.padding, groups=self.groups)
        form["dilation"] = self.dilation
        if self.extra is not None:
            op = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.dim() - 3]
            return op(x, w, bias, output_padding=self.extra, **form)
        return (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3](x, w, bias, **form)


@st.composite
def cases(draw, ranks=(1, 2, 2, 2)):
    rank = draw(st.sampled_from(ranks))

    def sizes(least, most):
        return tuple(draw(st.integers(least, most)) for _ in range(rank))

    groups, channels, outputs = (draw(st.integers(1, n)) for n in (3, 5, 5))
    if draw(st.integers(0, 3)) == 0:  # depthwise
        groups, channels, outputs = draw(st.integers(2, 6)), 1, 1
    space, kernel, stride, padding = sizes(1, 8), sizes(1, 4), sizes(1, 3), sizes(0, 3)
    dilation, extra = sizes(1, 3), None
    if draw(st.booleans()):
        extra = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    for n, k, s, p, d in zip(space, kernel, stride, padding, dilation, strict=True):
        if extra is None:
            assume(n + 2 * p >= d * (k - 1) + 1)
        else:
            assume((n - 1) * s - 2 * p + d * (k - 1) + 1 > 0)
    return Case(
        draw(st.integers(1, 2)), channels, outputs, groups, space, kernel, stride, padding,
        dilation, extra, draw(st.booleans()), draw(st.booleans()),
        draw(st.sampled_from((torch.bfloat16, torch.float32))),
    )  # fmt: skip


def close(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """exact: in float64. bfloat16 results are rounded once; float32 ones are within 1e-6 of the
    largest."""
    assert found.shape == exact.shape and found.dtype == dtype
    scale = float(exact.abs().max()) if exact.numel() else 1.0
    bound = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    difference = (found.cpu().double() - exact).abs()
    assert float(difference.max()) <= bound * max(scale, 1e-3), float(difference.max())


def check_forward(case: Case, compiled: bool = False) -> None:
    tensors = case.tensors()
    exact = case.run(*(t.double() for t in tensors))
    function = torch.compile(case.run, backend=P) if compiled else case.run
    found = function(*(t.to(P) for t in tensors))
    close(found, exact, case.dtype)
    assert found.stride() == case.run(*tensors).stride() or 1 in found.shape or found.dim() != 4
    assert torch.pagoda.fallbacks() == {}


@settings(max_examples=4)
@given(cases())
def test_forward(case):
    check_forward(case)


@pytest.mark.slow
@settings(max_examples=150)
@given(cases())
def test_forward_of_many(case):
    check_forward(case)


def check_gradients(case: Case, compiled: bool = False) -> None:
    tensors = case.tensors()
    given = [t.to(P).requires_grad_() for t in tensors]
    exact = [t.double().requires_grad_() for t in tensors]
    out = case.run(*exact)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(case.dtype)
    out.backward(grad.double())
    function = torch.compile(case.run, backend=P) if compiled else case.run
    function(*given).backward(grad.to(P))
    for found, wanted in zip(given, exact, strict=True):
        close(found.grad, wanted.grad, case.dtype)
    assert torch.pagoda.fallbacks() == {}


@settings(max_examples=4)
@given(cases())
def test_gradients(case):
    check_gradients(case)


@pytest.mark.slow
@settings(max_examples=150)
@given(cases())
def test_gradients_of_many(case):
    check_gradients(case)


ONE, TWO, BF16, F32 = (1, 1), (2, 2), torch.bfloat16, torch.float32
COMPILED = {
    "3x3": Case(2, 6, 5, 1, (9, 8), (3, 3), ONE, ONE, ONE, None, True, True, BF16),
    "strided": Case(2, 3, 4, 2, (9, 8), (3, 2), TWO, (1, 0), (1, 2), None, True, False, F32),
    "transposed": Case(1, 4, 3, 2, (5, 6), (3, 3), TWO, ONE, ONE, (1, 0), True, True, BF16),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    torch._dynamo.reset()
    check_forward(COMPILED[name], compiled=True)
    check_gradients(COMPILED[name], compiled=True)


def test_same_bits_on_every_chip():
    """Forward and all gradients, array and vector engine, with strides and phases."""
    depthwise = replace(COMPILED["3x3"], channels=1, outputs=1, groups=9, stride=TWO)
    cases = [COMPILED["strided"], depthwise]
    found: dict[str, list[bytes]] = {}
    for name in ("edge", "car", "tiny"):
        pagoda.use_chip(name)
        found[name] = []
        for case in cases:
            tensors = [t.to(P).requires_grad_() for t in case.tensors()]
            out = case.run(*tensors)
            out.float().square().sum().backward()
            results = [out.detach(), *(t.grad for t in tensors)]
            data = [t.cpu().contiguous().view(torch.uint8).numpy() for t in results]
            found[name] += [array.tobytes() for array in data]
    assert found["edge"] == found["car"] == found["tiny"]


FEW_CHANNELS = [  # images, channels, size, outputs, kernel, padding, bias, type
    (2, 3, 37, 16, 7, 3, True, torch.bfloat16),
    (1, 1, 12, 8, 3, 1, False, torch.bfloat16),
    (1, 3, 9, 4, 4, 0, True, torch.float32),
]


@pytest.mark.parametrize("sizes", FEW_CHANNELS)
def test_few_channels_and_stride_2(sizes):
    """Squares of pixels become channels; weights of any size, margins of both signs."""
    n, channels, size, outputs, kernel, padding, bias, dtype = sizes
    case = Case(
        n, channels, outputs, 1, (size, size), (kernel, kernel), (2, 2), (padding, padding),
        (1, 1), None, bias, True, dtype,
    )  # fmt: skip
    check_forward(case)
    steps = {str(step.kernel) for step in call.compiled[-1].steps}
    assert any("cells=2" in step for step in steps)


def test_inner_layers_are_not_copied():
    """Convolution, batch norm, ReLU and the residual sum are a step each at most: nothing is
    rearranged between layers, whatever the module's memory format."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in "ab")
            self.a, self.b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

        def forward(self, x):
            y = torch.relu(self.a(self.first(x)))
            return torch.relu(self.b(self.second(y)) + x)

    torch._dynamo.reset()
    torch.manual_seed(0)
    block = nn.Sequential(Block(), Block()).eval().to(torch.bfloat16)
    x = torch.randn(2, 8, 6, 7).to(torch.bfloat16)
    for form in (torch.channels_last, torch.contiguous_format):
        block, x = block.to(memory_format=form), x.to(memory_format=form)
        with torch.no_grad():
            exact = block.double()(x.double())
            block.to(torch.bfloat16).to(P)
            found = torch.compile(block, backend=P)(x.to(P))
        close(found, exact, torch.bfloat16)
        region = call.compiled[-1]
        nests = [s for s in region.steps if "convolution" not in str(s.kernel)]
        at_the_ends = 0 if form == torch.channels_last else 2 + 4  # input, result, kernels
        assert len(region.steps) - len(nests) == 4
        assert len(nests) <= 4 + at_the_ends, region.describe(kernels=False)
        block.to("cpu")


def test_gradients_stay_channels_last():
    """No tensor of a training step lies otherwise, though batch norm's operands are open."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in "ab")
            self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            y = torch.relu(self.a(self.first(x)))
            return torch.relu(self.b(self.second(y)) + x)

    torch._dynamo.reset()
    torch.manual_seed(0)
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    net = nn.Sequential(Block(), Block(), *ends).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    net(x).square().sum().backward()
    exact = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net.to(P)
    before = len(call.compiled)
    torch.compile(net, backend=P)(x.to(P)).square().sum().backward()
    for parameter, wanted in zip(net.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), wanted, rtol=1e-3, atol=1e-3)
    forward, backward = (r for r in call.compiled[before:] if len(r.steps) > 8)
    for region in (forward, backward):
        views = {v for step in region.steps for v in step.args if v and len(v.sizes) == 4}
        images = [v for v in views if [s.value for s in v.sizes] == [2, 4, 5, 6]]
        assert len(images) > 5 and all(v.strides[1].value == 1 for v in images)


PRECISIONS = [("highest", 1e-6), ("high", 1e-4), ("medium", 2e-2)]


@pytest.mark.parametrize(("precision", "bound"), PRECISIONS)
def test_float32_precision(precision, bound):
    torch.manual_seed(0)
    x, w = torch.randn(1, 16, 8, 8), torch.randn(8, 16, 3, 3)
    exact = F.conv2d(x.double(), w.double())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = F.conv2d(x.to(P), w.to(P)).cpu()
    finally:
        torch.set_float32_matmul_precision(before)
    error = float((found - exact).abs().max() / exact.abs().max())
    assert error <= bound
    assert precision == "highest" or error > bound / 100


def test_infinities_as_in_float32():
    x, w = torch.ones(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    x[0, 1, 0, 0] = torch.inf
    x[0, 0, 3, 3] = torch.nan
    found = F.conv2d(x.to(P), w.to(P)).cpu()
    torch.testing.assert_close(found, F.conv2d(x, w), equal_nan=True)


@pytest.mark.parametrize("extra", [None, (1, 1, 0)])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_three_dimensions(dtype, extra):
    sizes, kernel, steps = (5, 6, 7), (3, 2, 3), ((2, 1, 2), (1, 0, 2), (1, 2, 1))
    sizes = sizes if extra is None else (2, 4, 3)
    case = Case(2, 2, 3, 2, sizes, kernel, *steps, extra, True, False, dtype)
    check_forward(case)
    check_gradients(case)


def test_transposed_in_three_dimensions_compiled():
    steps = (2, 2, 2), (1, 1, 1), (1, 1, 1)
    case = Case(1, 3, 2, 1, (2, 3, 3), (3, 3, 3), *steps, (1, 1, 1), False, False, BF16)
    check_forward(case, compiled=True)
    check_gradients(case, compiled=True)


@pytest.mark.slow
@settings(max_examples=30)
@given(cases(ranks=(3,)))
def test_many_in_three_dimensions(case):
    check_forward(case)
    check_gradients(case)


def test_cached_versions_serve_only_the_sizes_they_have_fixed():
    """The second round finds the graphs of the first in torch's caches, keyed by symbols alone."""
    with fresh_cache():
        for _ in range(2):
            eager._operations.clear()
            for channels, outputs in ((2, 8), (8, 3), (3, 12)):
                x, w = torch.randn(1, channels, 4, 4), torch.randn(outputs, channels, 1, 1)
                torch.testing.assert_close(
                    F.conv2d(x.to(P), w.to(P)).cpu(), F.conv2d(x, w), rtol=1e-5, atol=1e-5
                )
