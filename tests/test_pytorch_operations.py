"""Operations, eager and compiled, forward and backward, against torch on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

import pagoda
from pagoda.pytorch import guards, inductor  # noqa: F401 - the latter mends torch's guards

P = "pagoda"


@pytest.fixture(autouse=True)
def tiny():
    pagoda.use_chip("tiny")
    torch.manual_seed(0)


def moved(value, place):
    if isinstance(value, torch.Tensor):
        leaf = value.detach().to(place)
        return leaf.requires_grad_(value.requires_grad)
    return value


def both(function, *args, compiled=False, rtol=2e-5, atol=2e-6):
    """`function` and the gradients of its first result's weighted sum, here and there."""
    results = []
    for place in ("cpu", P):
        here = [moved(a, place) for a in args]
        run = torch.compile(function, backend=P) if compiled and place == P else function
        out = run(*here)
        out = out if isinstance(out, tuple) else (out,)
        if out[0].requires_grad:
            weights = torch.arange(out[0].numel(), dtype=torch.float32).reshape(out[0].shape)
            (out[0] * (weights / out[0].numel()).to(place)).sum().backward()
        found = [t.detach().cpu() for t in out]
        found += [a.grad.cpu() for a in here if isinstance(a, torch.Tensor) and a.grad is not None]
        results.append(found)
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def values(*shape, grad=True):
    return torch.randn(*shape, requires_grad=grad)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("function", "args"),
    {
        "cross entropy with an ignored class": (
            lambda x, t: F.cross_entropy(x, t), (values(6, 5), torch.tensor([1, -100, 2, 0, 4, 3]))
        ),
        "embedding with padding": (
            lambda w, i: F.embedding(i, w, padding_idx=1), (values(7, 3), torch.tensor([1, 4, 4]))
        ),
        "roll": (lambda x: x.roll(-1, 0), (values(5, 3),)),
        "matrix bias": (lambda c, a, b: torch.addmm(c, a, b), (values(3, 4), values(3, 5),
                                                              values(5, 4))),
        "alpha and beta": (
            lambda c, a, b: torch.addmm(c, a, b, alpha=0.5, beta=2.0),
            (values(4), values(3, 5), values(5, 4)),
        ),
        "batched bias": (
            lambda c, a, b: torch.baddbmm(c, a, b, alpha=0.5, beta=2.0),
            (values(2, 3, 4), values(2, 3, 5), values(2, 5, 4)),
        ),
        "sign of a real number": (lambda x: x.sgn(), (values(3, 4),)),
        "elements put where a mask says": (
            lambda x, s: x.masked_scatter(torch.arange(9, device=x.device) % 3 == 1, s),
            (values(8, 9), values(5, 7)),
        ),
        "bilinear product": (
            lambda a, b, w: F.bilinear(a, b, w), (values(3, 4), values(3, 5), values(2, 4, 5))
        ),
        "reflected padding": (lambda x: F.pad(x, (2, 1), mode="reflect"), (values(2, 3, 6),)),
        "overlapping windows summed": (
            lambda x: F.fold(x, (5, 6), (3, 3), padding=1), (values(1, 18, 30),)
        ),
        "bits of integers": (lambda x: (x & 3) | (x ^ 5), (torch.arange(-6, 9),)),
        "fmod of integers": (
            lambda x: torch.fmod(x, torch.full_like(x, 6)), (torch.arange(-9, 9),)
        ),
        "fmod by a number": (lambda x: torch.fmod(x, 2), (values(9),)),
        "cumprod": (lambda x: x.cumprod(1), (values(3, 7),)),
        "bilinear": (
            lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (values(1, 2, 4, 5),)
        ),
        "adaptive average pooling": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
                                     (values(1, 2, 5, 7),)),
        "bags of embeddings": (
            lambda w, i, o: F.embedding_bag(i, w, o, mode="mean", padding_idx=2),
            (values(7, 3), torch.tensor([1, 2, 4, 5, 4, 3]), torch.tensor([0, 0, 4])),
        ),
        "ctc": (
            lambda x, t: F.ctc_loss(x.log_softmax(-1), t, (6, 5), (3, 2), reduction="none"),
            (values(6, 2, 5), torch.tensor([[1, 2, 1], [2, 2, 3]])),
        ),
        "distances": (torch.cdist, (values(3, 4), values(5, 4))),
        "largest of what goes to a place": (
            lambda x, i: x.new_zeros(3, 4).scatter_reduce(1, i, x, "amax"),
            (values(3, 5), torch.tensor([[0, 1, 1, 3, 0]] * 3)),
        ),
        "quantile": (lambda x: x.quantile(0.3, 1), (values(3, 9),)),
        "median": (lambda x: x.median(1), (values(3, 9),)),
        "topk": (lambda x: torch.topk(x, 3), (values(4, 9),)),
        "sort": (lambda x: x.sort(0, descending=True), (values(8, 3),)),
    }.values(),
)  # fmt: skip
def test_operation(function, args, compiled):
    both(function, *args, compiled=compiled)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 1), (1, 4), (3, 1), (3, 4)])
def test_every_bias_is_broadcast(shape):
    """The kernel adds one row; a scalar or a column is not one."""
    both(torch.addmm, torch.randn(shape, requires_grad=True), values(3, 5), values(5, 4))


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_cells(cell):
    module = cell(3, 5)
    both(lambda x: module.to(x.device)(x)[0], values(4, 2, 3))


def test_a_batch_norm_leaves_its_input_usable():
    """Its statistics are written without its schema saying so, as on other devices."""
    norm = nn.BatchNorm2d(3)

    def twice(x):
        here = norm.to(x.device)
        return here(here(x))

    both(twice, values(4, 3, 5, 5), rtol=1e-4, atol=2e-5)


def test_the_fused_encoder_layer_is_taken_apart():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        both(lambda x: layer.to(x.device)(x), values(2, 5, 8, grad=False))


def test_masks_as_indices_are_counted():
    x, mask = torch.arange(6.0), torch.tensor([True, False, True, True, False, False])
    d = x.to(P)
    torch.pagoda.reset_fallbacks()
    assert d[mask.to(P)].tolist() == [0, 2, 3]
    assert torch.masked_select(d, mask.to(P)).tolist() == [0, 2, 3]
    d[mask.to(P)] = -1.0
    assert d.tolist() == [-1, 1, -1, -1, 4, 5]
    assert set(torch.pagoda.fallbacks()) == {"aten.nonzero.default"}


def test_a_result_whose_size_depends_on_data_is_refused_when_compiled():
    x = torch.arange(6.0, device=P)
    with pytest.raises(Exception) as raised:
        torch.compile(lambda x: x[x > 2] * 2, backend=P, fullgraph=True)(x)
    assert "Use torch.where or a mask of fixed size." in str(raised.value)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padding, counted", [(0, True), (1, True), (1, False)])
def test_gradients_of_averages_over_parts_of_windows(padding, counted, compiled):
    options = {"padding": padding, "ceil_mode": True, "count_include_pad": counted}
    both(lambda x: F.avg_pool1d(x, 4, 3, **options), values(1, 2, 9), compiled=compiled)
    both(lambda x: F.avg_pool2d(x, 3, 2, **options), values(1, 2, 8, 10), compiled=compiled)
    both(lambda x: F.avg_pool3d(x, 2, 3, **options), values(1, 1, 6, 7, 9), compiled=compiled)
    both(lambda x: F.avg_pool2d(x, 2, 2, **options), values(1, 2, 6, 8), compiled=compiled)


@pytest.mark.parametrize("reduce", ["add", "multiply"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_scatters_that_reduce(dtype, reduce):
    x, index = torch.randint(0, 4, (3, 4)).to(dtype), torch.tensor([[0, 1, 0], [2, 0, 0]])
    source = torch.randint(0, 3, (2, 3)).to(dtype)
    for compiled in (False, True):
        for given in (source, 2):
            both(lambda x, i, s: x.scatter(0, i, s, reduce=reduce), x, index, given,
                 compiled=compiled)  # fmt: skip
        both(lambda x, i, s: x.clone().scatter_(-1, i, s, reduce=reduce), x.T, index, source,
             compiled=compiled)  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
def test_positions_in_a_tensor_without_elements(compiled):
    both(lambda x: x.nonzero_static(size=3, fill_value=7), torch.zeros(2, 0, 3), compiled=compiled)


def test_position_of_the_third_smallest():
    both(lambda x: tuple(torch.kthvalue(x, 3, 1)), values(4, 9))


@pytest.mark.parametrize("length", [9, 3000])
def test_most_frequent_value_and_one_of_its_places(length):
    x = torch.randint(-length // 8, length // 8, (2, length), dtype=torch.float32)
    value, place = x.to(P).mode(-1)
    assert torch.equal(value.cpu(), x.mode(-1).values)
    assert torch.equal(x.gather(-1, place.cpu()[:, None])[:, 0], value.cpu())


def test_counts_by_class():
    x = torch.tensor([0.0, 1, 2, 3.5, 9.9, 10, 11, -1])
    both(lambda x: torch.histc(x, 5, 0, 10), x)
    both(lambda x: torch.histc(x, 6), x)  # from the smallest to the largest
    both(lambda x: torch.histc(x, 4, 3, 3), torch.full((3,), 2.0))
    both(lambda x: torch.histc(x, 4), torch.zeros(0))


@pytest.mark.parametrize("compiled", [False, True])
def test_grouped_products(compiled):
    offsets = torch.tensor([2, 2, 7], dtype=torch.int32)

    def products(a, b, offs):
        return torch._grouped_mm(a, b, offs)

    a, b = torch.randn(7, 16).bfloat16(), torch.randn(3, 16, 8).bfloat16()
    run = torch.compile(products, backend=P) if compiled else products
    got = run(a.to(P), b.to(P), offsets.to(P)).cpu().float()
    parts = [a[0:2].float() @ b[0].float(), a[2:7].float() @ b[2].float()]
    torch.testing.assert_close(got, torch.cat(parts), rtol=1e-2, atol=1e-2)


def test_a_condition_with_or_stays_one_condition(monkeypatch):
    assert ShapeEnv.produce_guards_expression is guards.expression
    conditions = ["a or b", "c"]
    monkeypatch.setattr(ShapeEnv, "produce_guards", lambda self, *args, **more: conditions)
    assert ShapeEnv().produce_guards_expression([]) == "(a or b) and (c)"
    conditions.clear()
    assert ShapeEnv().produce_guards_expression([]) is None


def test_sizes_and_negative_numbers_vary():
    """Positions and shifts that change from call to call, below zero too."""
    x = torch.arange(12.0).reshape(3, 4)
    for shift in (-2, 1, -1, 2, 0):
        assert torch.equal(x.to(P).roll(shift, 1).cpu(), x.roll(shift, 1)), shift
    for classes in (3, 5, 9):
        logits, target = torch.randn(classes, classes), torch.arange(classes)
        target[0] = -100
        want = F.cross_entropy(logits, target)
        torch.testing.assert_close(F.cross_entropy(logits.to(P), target.to(P)).cpu(), want)


def test_a_wrong_argument_is_told_as_torch_does(caplog):
    with pytest.raises(RuntimeError) as raised:
        torch.histc(torch.ones(3, device=P), min=3, max=1)
    assert type(raised.value) is RuntimeError
    assert str(raised.value) == "histc(): max must be larger than min"
    assert not caplog.records
    assert torch.histc(torch.ones(3, device=P), 1, 0, 1).tolist() == [3.0]  # nothing is left of it


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16])
def test_weighted_counts_that_torch_makes_float64_are_refused(dtype):
    x, weights = torch.tensor([0, 2, 2]).to(P), torch.tensor([1, 2, 3]).to(P)
    with pytest.raises(NotImplementedError) as raised:
        torch.bincount(x, weights.to(dtype))
    assert str(raised.value) == (
        f"operation aten.bincount cannot run on device pagoda: its sums of {dtype} weights are "
        "torch.float64, which the chip stores but cannot compute with. Use float32: convert the "
        "weights with .float()."
    )
    assert torch.bincount(x, weights.float()).tolist() == [1.0, 0.0, 5.0]


def test_empty_tensors():
    both(lambda x: x.clamp(max=x), torch.zeros(0, 3))
    both(lambda x: torch.clamp_min(x, x), torch.zeros(0, 3))
    both(lambda x: torch.cdist(x, x, p=math.inf), torch.zeros(4, 0))


@pytest.mark.parametrize("beta, alpha", [(0.6, 0.2), (2.5, 3.7)])
def test_factors_of_integer_products_are_cut(beta, alpha):
    x, a, b = (torch.arange(n).reshape(2, 2, -1) for n in (12, 8, 12))
    both(lambda x, a, b: torch.baddbmm(x, a, b, beta=beta, alpha=alpha), x, a, b)
    both(lambda x, a, b: torch.addbmm(x[0], a, b, beta=beta, alpha=alpha), x, a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("ends", ["numbers", "tensors", "start", "end"])
def test_evenly_spaced(ends, dtype):
    def evenly(start, end, device):
        return torch.linspace(start, end, 7, dtype=dtype, device=device)

    start, end = -7.7, 9.2  # torch cuts them for integers, too
    if ends in ("tensors", "start"):
        start = torch.tensor(start)
    if ends in ("tensors", "end"):
        end = torch.tensor(end)
    wanted = evenly(start, end, "cpu")
    here = [a.to(P) if isinstance(a, torch.Tensor) else a for a in (start, end)]
    for function in (evenly, torch.compile(evenly, backend="pagoda")):
        torch.testing.assert_close(function(*here, P).cpu(), wanted)


def test_a_list_as_index_compiled_with_gradients():
    x = torch.arange(12.0).reshape(4, 3)
    here = x.to(P).requires_grad_()
    torch.compile(lambda x: x[[1, 3, 1]], backend="pagoda")(here).sum().backward()
    assert here.grad.tolist() == [[0.0] * 3, [2.0] * 3, [0.0] * 3, [1.0] * 3]


def test_powers_cut_to_integers_are_refused():
    with pytest.raises(NotImplementedError) as raised:
        torch.logspace(0, 3, 4, dtype=torch.int64, device=P)
    assert str(raised.value) == (
        "operation aten.logspace.out cannot run on device pagoda: logspace of torch.int64 needs "
        "powers that are exact before they are cut to integers, and the chip computes them in "
        "float32. Use dtype=torch.float32 and .round() before .to(torch.int64). It is never "
        "computed on the CPU in silence; if that is what you want, move its inputs with .cpu() and "
        "the result back."
    )
    powers = torch.logspace(0, 3, 4, device=P).round().to(torch.int64)
    assert powers.tolist() == [1, 10, 100, 1000]


@pytest.mark.parametrize(
    ("dtype", "instead"),
    [(torch.float64, "float32"), (torch.float16, "float32 or bfloat16"), (torch.int16, "int32")],
)
def test_types_that_are_only_stored(dtype, instead):
    x = torch.ones(3, dtype=dtype)
    assert torch.equal(x.to(P).cpu(), x)
    with pytest.raises(NotImplementedError) as raised:
        x.to(P) + x.to(P)
    assert str(raised.value) == (
        f"operation aten.add.out cannot run on device pagoda: the chip stores {dtype} but cannot "
        f"compute with it. Use {instead}: convert tensors with .to(dtype) before they are moved to "
        "the device."
    )


def test_constants_fold_while_compiling():
    run = torch.compile(lambda x: torch.full_like(x, -2.0).abs() + x, backend=P)
    assert run(torch.ones(3, device=P)).tolist() == [3, 3, 3]
