"""Attention and its gradients on the device, eager and compiled, against torch on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pagoda
from pagoda.llm.attention import attend
from pagoda.pytorch import call

P = "pagoda"
sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(autouse=True, scope="module")
def tiny():
    pagoda.use_chip("tiny")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def operands(b=1, h=2, g=2, q=5, s=7, d=16, e=None, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    shapes = ((b, h, q, d), (b, g, s, d), (b, g, s, e or d), (b, h, q, e or d))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def gradients(function, tensors, weight, place=P, **options):
    """The result of `function` and the gradients of all tensors for the gradient `weight`."""
    leaves = [t.detach().to(place).requires_grad_() for t in tensors]
    moved = {n: x.to(place) if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    out = function(*leaves, **moved)
    out.backward(weight.to(place))
    return [out.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves)]


def largest_error(found, expected) -> float:
    """The largest error by the largest element, over all tensors."""
    pairs = zip(found, expected, strict=True)
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-2))
        for a, b in pairs
    )


def steps(since: int) -> list[str]:
    """Names of the library kernels in regions compiled since."""
    names = (str(s.kernel).split("(")[0] for r in call.compiled[since:] for s in r.steps)
    return sorted({name for name in names if not name.startswith(("nest", "loop"))})


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_random(data):
    groups, shared = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    shape = dict(
        b=data.draw(st.integers(1, 2)), h=groups * shared, g=groups,
        q=data.draw(st.integers(2, 24)), s=data.draw(st.integers(2, 40)),
        d=data.draw(st.sampled_from((16, 20))), e=data.draw(st.sampled_from((None, 12))),
        dtype=data.draw(st.sampled_from((torch.float32, torch.bfloat16))),
        seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    *tensors, weight = operands(**shape)
    options = {"enable_gqa": True, "scale": data.draw(st.sampled_from((None, 0.5)))}
    kind = data.draw(st.sampled_from(("none", "causal", "bool", "float")))
    if kind == "causal":
        options["is_causal"] = True
    elif kind != "none":
        shown = torch.rand(shape["b"], 1, shape["q"], shape["s"]) < 0.7
        shown[..., 0] = True
        added = torch.where(shown, 0.5, -torch.inf)
        options["attn_mask"] = shown if kind == "bool" else added
    wide = {n: x.double() if n == "attn_mask" and kind == "float" else x
            for n, x in options.items()}  # fmt: skip
    exact = gradients(sdpa, [t.double() for t in tensors], weight.double(), "cpu", **wide)
    if kind == "float":
        options["attn_mask"] = options["attn_mask"].to(shape["dtype"])
    found = gradients(sdpa, tensors, weight, **options)
    limit = 1e-5 if shape["dtype"] is torch.float32 else 2**-5
    assert largest_error(found, exact) < limit


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_compiled_has_the_bits_of_eager(options, dynamic):
    compiled = torch.compile(lambda *a: sdpa(*a, enable_gqa=True, **options), backend=P,
                             dynamic=dynamic)  # fmt: skip
    for s in (9, 21):
        *tensors, weight = operands(h=4, g=2, q=s, s=s)
        before = len(call.compiled)
        found = gradients(compiled, tensors, weight)
        assert not {"mm", "bmm", "sdpa"} & set(steps(before))
        expected = gradients(sdpa, tensors, weight, enable_gqa=True, **options)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_inference_keeps_no_statistics():
    *tensors, _ = operands(q=3, s=11)
    before = len(call.compiled)
    with torch.no_grad():
        sdpa(*(t.to(P) for t in tensors))
    assert steps(before) == ["sdpa"]


def test_gradients_that_are_not_contiguous():
    """`out.sum()` hands back one number seen as a whole tensor."""
    *tensors, weight = operands(b=2)
    one = torch.ones(()).expand(weight.shape)
    expected = gradients(sdpa, tensors, one, "cpu")
    assert largest_error(gradients(sdpa, tensors, one), expected) < 1e-5
    swapped = weight.mT.contiguous().mT
    expected = gradients(sdpa, tensors, swapped, "cpu")
    assert largest_error(gradients(sdpa, tensors, swapped), expected) < 1e-5


def test_some_gradients_only():
    q, k, v, weight = operands()
    key = k.to(P).requires_grad_()
    sdpa(q.to(P), key, v.to(P)).backward(weight.to(P))
    expected = gradients(sdpa, (q, k, v), weight, "cpu")[2]
    assert largest_error([key.grad.cpu()], [expected]) < 1e-5


def test_other_ranks():
    *tensors, weight = (t[0] for t in operands())
    expected = gradients(sdpa, tensors, weight, "cpu")
    assert largest_error(gradients(sdpa, tensors, weight), expected) < 1e-5


def test_a_mask_that_wants_a_gradient():
    *tensors, weight = operands(b=2, h=2, q=5, s=7)
    bias = torch.randn(1, 2, 5, 7)

    def biased(q, k, v, mask):
        return sdpa(q, k, v, attn_mask=mask)

    expected = gradients(biased, [*tensors, bias], weight, "cpu")
    assert largest_error(gradients(biased, [*tensors, bias], weight), expected) < 1e-5


def test_no_keys_and_no_queries():
    for shape in (dict(s=0), dict(q=0)):
        *tensors, weight = operands(**shape)
        found = gradients(sdpa, tensors, weight)
        assert all(not x.any() for x in found)


def kept_weights(place, dropout, function=sdpa):
    """The weights after dropout, with values that are the unit matrix; and their gradients."""
    torch.manual_seed(3)
    q, k, _, _ = operands(b=2, h=2, q=40, s=24, d=16)
    values = torch.eye(24).expand(2, 2, 24, 24).contiguous()
    weight = torch.randn(2, 2, 40, 24)
    return gradients(function, (q, k, values), weight, place, dropout_p=dropout), weight


def test_dropout():
    """What is dropped is so in the backward pass as well, and the rest is scaled."""
    (out, dq, dk, dv), weight = kept_weights(P, 0.25)
    (full, *_), _ = kept_weights("cpu", 0.0)
    dropped = out == 0
    assert abs(float(dropped.double().mean()) - 0.25) < 0.03
    torch.testing.assert_close(out, torch.where(dropped, 0.0, full / 0.75), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dv, out.mT @ weight, rtol=1e-5, atol=1e-5)

    def with_known_drops(q, k, v, dropout_p):
        weights = (q @ k.mT / 4).softmax(-1)
        return torch.where(dropped, 0.0, weights / 0.75) @ v

    (_, *expected), _ = kept_weights("cpu", 0.25, with_known_drops)
    assert largest_error((dq, dk, dv), expected) < 1e-5


def test_compiled_dropout():
    compiled = torch.compile(sdpa, backend=P)
    (out, _, _, dv), weight = kept_weights(P, 0.25, compiled)
    assert abs(float((out == 0).double().mean()) - 0.25) < 0.03
    torch.testing.assert_close(dv, out.mT @ weight, rtol=1e-5, atol=1e-5)
    (again, *_), _ = kept_weights(P, 0.25, compiled)
    assert torch.equal(out, again)  # the seed decides


def test_lower_right_corner_in_transformers():
    q, k, v, weight = operands(h=4, g=2, q=5, s=9)
    module = SimpleNamespace(is_causal=True)

    def last_sees_all(*tensors):
        return attend(module, *tensors)[0].transpose(1, 2)

    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    expected = gradients(sdpa, (q, k, v), weight, "cpu", attn_mask=mask, enable_gqa=True)
    assert largest_error(gradients(last_sees_all, (q, k, v), weight), expected) < 1e-5
