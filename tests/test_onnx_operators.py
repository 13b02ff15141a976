"""The ONNX operators against onnx's own tests: a model of one node, inputs and results each."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import pagoda
from pagoda.pytorch.onnx_import import load_onnx
from pagoda.pytorch.onnx_import.graph import TABLE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the reference results hold infinities
    from onnx.backend.test.loader import load_model_tests

    CASES = {case.name: case for case in load_model_tests(kind="node")}

TYPES = ("float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "bool")
REFUSED = (  # what the messages of `require` and of the reader name
    "test_bernoulli", "test_training_dropout", "test_batchnorm_example_training",
    "test_batchnorm_epsilon_training", "test_lstm_with_peepholes", "test_nonmaxsuppression",
    "test_nonzero", "test_unique", "test_maxpool_with_argmax_2d_precomputed_strides",
    "test_quantizelinear_blocked", "test_dequantizelinear_blocked", "test_if",
    "test_resize_tf_crop_and_resize", "test_lppool_2d_ceil",
)  # fmt: skip


def supported(case) -> bool:
    """Whether the case uses operators of the table only, on types that torch computes with."""
    known = {*TABLE, "Constant"}
    defined = CASES.get(case.name.removesuffix("_expanded"), case)
    arrays = [array for part in case.data_sets[0] for array in part]
    return (
        all(
            not node.domain and node.op_type in known
            for node in (*case.model.graph.node, *defined.model.graph.node)
        )
        and all(isinstance(array, (np.ndarray, np.generic)) for array in arrays)
        and all(array.dtype.name in TYPES for array in arrays)
        and not case.name.startswith(REFUSED)
    )


def run(case, prepare=None) -> None:
    """Inputs that torch needs to know beforehand are constants here, as in exported models.
    prepare: the module, ready for the device."""
    inputs, expected = case.data_sets[0]
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    fixed = {
        node.input[position]
        for node in model.graph.node
        if node.op_type in TABLE
        for position in TABLE[node.op_type].constants
        if position < len(node.input)
    }
    given = {}
    for declared, array in zip(list(model.graph.input), inputs, strict=True):
        if declared.name in fixed:
            model.graph.initializer.append(
                numpy_helper.from_array(np.asarray(array), declared.name)
            )
            model.graph.input.remove(declared)
        else:
            given[declared.name] = torch.tensor(np.asarray(array))
    found = load_onnx(model, shapes={name: tuple(t.shape) for name, t in given.items()})
    with torch.no_grad():
        if prepare is None:
            results = found.module(*given.values())
        else:
            results = prepare(found.module)(*(tensor.to("pagoda") for tensor in given.values()))
    results = results if isinstance(results, tuple) else (results,)
    for result, wanted in zip(results, expected, strict=True):
        wanted = np.asarray(wanted)
        assert str(result.dtype).removeprefix("torch.") == str(wanted.dtype)
        assert tuple(result.shape) == wanted.shape
        np.testing.assert_allclose(
            result.cpu().numpy(), wanted, rtol=case.rtol, atol=max(case.atol, 1e-6)
        )


NAMES = [name for name, case in CASES.items() if supported(case)]
# The same operators once more, written as other operators: ONNX's definitions of them.
EXPANDED = [name for name in NAMES if "_expanded" in name]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in EXPANDED])
def test_operator(name):
    run(CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPANDED)
def test_expanded_operator(name):
    run(CASES[name])


def test_which_operators_are_not_judged():
    """Those that are always refused, and one that onnx has no case for."""
    judged = {node.op_type for name in NAMES for node in CASES[name].model.graph.node}
    assert TABLE.keys() - judged == {
        "GlobalLpPool", "Bernoulli", "Multinomial", "NonMaxSuppression", "NonZero", "RandomNormal",
        "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Unique",
    }  # fmt: skip


def test_global_lp_pool():
    x = torch.randn(2, 3, 4, 5)
    got = TABLE["GlobalLpPool"].function(x, p=3)
    torch.testing.assert_close(got, torch.linalg.vector_norm(x, 3, (2, 3), keepdim=True))


# One of each kind, on the chip; every operation of torch has tests of its own there. The first ones
# are those that only ONNX's rules make: the others run on demand.
ON_CHIP = (
    "test_conv_with_autopad_same", "test_convtranspose_autopad_same",
    "test_convinteger_with_padding",
    "test_matmulinteger", "test_qlinearconv", "test_averagepool_2d_ceil",
    "test_maxpool_2d_dilations", "test_maxpool_with_argmax_2d_precomputed_pads",
    "test_gru_seq_length", "test_instancenorm_epsilon", "test_reduce_l2_keep_dims_random",
    "test_resize_downsample_scales_cubic", "test_resize_upsample_scales_linear_align_corners",
    "test_gridsample_bilinear", "test_scatternd_add", "test_gathernd_example_int32_batch_dim1",
    "test_top_k", "test_onehot_with_axis", "test_slice_neg_steps", "test_reflect_pad",
    "test_cumsum_1d_int32_exclusive", "test_einsum_batch_diagonal", "test_prelu_broadcast",
    "test_dynamicquantizelinear", "test_reversesequence_time",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if k >= 6 else []) for k, n in enumerate(ON_CHIP)],
)
def test_operator_on_the_chip(name):
    pagoda.use_chip()
    run(CASES[name], lambda module: torch.compile(module.to("pagoda"), backend="pagoda"))
