"""A kernel of the user's as a torch operation: docs/kernels.md, executed, and what it refuses."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import pagoda
from pagoda.compiler.language import Tensor, kernel, load, store, tiles

PAGE = Path(__file__).parents[1] / "docs/kernels.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the page defines, from a file: a kernel's source must be readable."""
    pagoda.use_chip("edge")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks[0].split("op = ")[0].count("\n") < 40
    path = tmp_path_factory.mktemp("page") / "snake.py"
    path.write_text("\n\n".join(blocks))
    return runpy.run_path(str(path))


def snake(x, a):
    return x + torch.sin(a * x) ** 2 / a


def operands(rows=40, cols=200):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, cols, generator=generator)
    return x, torch.rand(cols, generator=generator) + 0.5


def check(function):
    """Result and both gradients against torch's on the CPU."""
    found, wanted = [], []
    for device, computed, into in (("pagoda", function, found), ("cpu", snake, wanted)):
        x, a = (t.to(device).requires_grad_() for t in operands())
        y = computed(x, a)
        y.backward(torch.ones_like(y))
        into += [y.detach(), x.grad, a.grad]
    for mine, exact in zip(found, wanted, strict=True):
        assert (mine.cpu() - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_eager(page):
    check(page["op"])


def test_compiled(page):
    check(torch.compile(lambda x, a: page["op"](x * 1.0, a), backend="pagoda"))


def test_the_model_of_the_page_has_gradients(page):
    assert all(p.grad.isfinite().all().item() for p in page["layer"].parameters())


def test_same_bits_on_another_chip(page):
    x, a = operands()
    here = page["op"](x.to("pagoda"), a.to("pagoda")).cpu()
    pagoda.use_chip("car")
    try:
        assert torch.equal(page["op"](x.to("pagoda"), a.to("pagoda")).cpu(), here)
    finally:
        pagoda.use_chip("edge")


# What it refuses ---------------------------------------------------------------------------------


@kernel
def copied(y: Tensor, x: Tensor, *, B):
    for i in tiles(x.size(0), B):
        store(y[i], load(x[i]))


@kernel
def counted(y: Tensor, x: Tensor, n: int, *, B):
    for i in tiles(n, B):
        store(y[i], load(x[i]))


def test_on_the_cpu():
    op = pagoda.kernel_op("test_kernel_op::cpu", copied, torch.empty_like, B=64)
    with pytest.raises(RuntimeError) as error:
        op(torch.ones(3))
    assert str(error.value) == (
        "test_kernel_op::cpu: it runs on device pagoda, but its operands are on the CPU. Move them "
        'with .to("pagoda"), or give kernel_op a reference.'
    )
    op = pagoda.kernel_op(
        "test_kernel_op::reference", copied, torch.empty_like, torch.clone, B=64
    )
    assert op(torch.ones(3)).tolist() == [1, 1, 1]


def test_types_that_kernels_do_not_take():
    op = pagoda.kernel_op("test_kernel_op::types", copied, torch.empty_like, B=64)
    with pytest.raises(Exception, match="is int64") as error:
        op(torch.ones(3, dtype=torch.int64).to("pagoda"))
    assert (
        "kernel test_kernel_op::types, tensor y: a kernel's tensors are float32, bfloat16, int32, "
        "int8, but this one is int64; convert it first"
    ) in str(error.value)


def test_a_function_that_is_no_kernel():
    with pytest.raises(TypeError) as error:
        pagoda.kernel_op("test_kernel_op::none", len, torch.empty_like)
    assert str(error.value) == (
        "kernel_op test_kernel_op::none: the kernel is a function decorated with "
        "@pagoda.compiler.language.kernel, but this is <built-in function len>. Decorate it."
    )


def test_parameters_that_are_no_tensors():
    with pytest.raises(ValueError) as error:
        pagoda.kernel_op("test_kernel_op::scalar", counted, torch.empty_like, B=64)
    assert str(error.value) == (
        "kernel_op test_kernel_op::scalar: the kernel's run-time parameters are tensors, but n is "
        "int. Pass a tensor, or make it a compile-time parameter behind *."
    )


def test_a_name_without_a_namespace():
    with pytest.raises(ValueError) as error:
        pagoda.kernel_op("copied", copied, torch.empty_like, B=64)
    assert str(error.value) == (
        'kernel_op copied: the name is "namespace::name", but it has no namespace. Put one before '
        "it."
    )
