"""ONNX models of several nodes: weights, shape arithmetic, quantised graphs, the device, and what
is said of models that cannot be read."""

from __future__ import annotations

import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import pagoda
from pagoda.compiler.errors import ModelFileError
from pagoda.pytorch.onnx_import import load_onnx

P = "pagoda"
RNG = np.random.default_rng(5)


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def weight(name, array):
    return numpy_helper.from_array(np.asarray(array), name)


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32) * 0.3


def model(nodes, inputs, outputs, weights=(), opset=21, domains=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports)


def node(kind, inputs, outputs, **attributes):
    return helper.make_node(kind, inputs, outputs, **attributes)


def convolutional():
    """As torch exports it: names with slashes, flatten through Shape, Gather, Concat, Reshape."""
    nodes = [
        node("Conv", ["x", "conv1.weight", "conv1.bias"], ["c"], name="/conv1/Conv",
             pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Clip", ["c", "low", "high"], ["r"], name="/act/Clip"),
        node("MaxPool", ["r"], ["p"], name="/pool/MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Shape", ["p"], ["s"]),
        node("Gather", ["s", "zero"], ["n"]),
        node("Unsqueeze", ["n", "first"], ["nu"]),
        node("Concat", ["nu", "rest"], ["shape"], axis=0),
        node("Reshape", ["p", "shape"], ["f"], name="/Reshape"),
        node("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], name="/fc/Gemm", transB=1),
    ]  # fmt: skip
    weights = [
        weight("conv1.weight", floats(8, 3, 3, 3)), weight("conv1.bias", floats(8)),
        weight("low", np.float32(0)), weight("high", np.float32(6)), weight("zero", np.int64(0)),
        weight("first", np.array([0])), weight("rest", np.array([-1])),
        weight("fc.weight", floats(5, 32)), weight("fc.bias", floats(5)),
    ]  # fmt: skip
    return model(nodes, [value("x", ["batch", 3, 8, 8])], [value("y", ["batch", 5])], weights)


def quantised():
    """Activations and weights of a product between QuantizeLinear and DequantizeLinear."""
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        node("MatMul", ["xd", "wd"], ["m"], name="/fc/MatMul"),
        node("Add", ["m", "b"], ["y"], name="/fc/Add"),
    ]
    weights = [
        weight("xs", np.float32(0.02)), weight("xz", np.uint8(128)),
        weight("w", RNG.integers(-127, 128, (16, 6)).astype(np.int8)),
        weight("ws", (0.01 * RNG.random(6) + 0.001).astype(np.float32)),
        weight("wz", np.zeros(6, np.int8)), weight("b", floats(6)),
    ]  # fmt: skip
    return model(nodes, [value("x", [4, 16])], [value("y", [4, 6])], weights)


def recurrent():
    nodes = [
        node("LSTM", ["x", "w", "r", "b"], ["", "h"], name="/lstm/LSTM", hidden_size=8),
        node("Squeeze", ["h", "axes"], ["y"]),
    ]
    weights = [
        weight("w", floats(1, 32, 4)), weight("r", floats(1, 32, 8)), weight("b", floats(1, 64)),
        weight("axes", np.array([0])),
    ]  # fmt: skip
    return model(nodes, [value("x", [3, 2, 4])], [value("y", [2, 8])], weights)


MODELS = {"convolutional": convolutional, "quantised": quantised, "recurrent": recurrent}


def judged(made, shape):
    """(module, input, result of onnx's own reference)."""
    x = RNG.normal(size=shape).astype(np.float32)
    (wanted,) = ReferenceEvaluator(made).run(None, {"x": x})
    return load_onnx(made, shapes={"x": shape}).module, torch.tensor(x), torch.tensor(wanted)


@pytest.mark.parametrize("name", MODELS)
def test_models_on_the_chip(name):
    made = MODELS[name]()
    shape = [d.dim_value or 2 for d in made.graph.input[0].type.tensor_type.shape.dim]
    module, x, wanted = judged(made, tuple(shape))
    torch.pagoda.reset_fallbacks()
    with torch.no_grad():
        torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-5)
        module.to(P)
        torch.testing.assert_close(module(x.to(P)).cpu(), wanted, rtol=1e-4, atol=1e-5)
        with pagoda.profile() as found:
            got = torch.compile(module, backend=P, fullgraph=True)(x.to(P))
        torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-5)
    layers = {layer.name for layer in found.layers}
    assert layers & {"conv1.Conv", "fc.MatMul", "lstm.LSTM"}
    assert torch.pagoda.fallbacks() == {}


def test_training():
    """Weights are parameters; those of the file's own types only."""
    module, x, _ = judged(convolutional(), (2, 3, 8, 8))
    assert {name for name, _ in module.named_parameters()} == {
        "conv1_weight", "conv1_bias", "fc_weight", "fc_bias",
    }  # fmt: skip
    module.to(P)
    loss = torch.compile(module, backend=P)(x.to(P)).square().mean()
    loss.backward()
    expected = load_onnx(convolutional(), dims={"batch": 2})
    assert expected.shapes == {"x": (2, 3, 8, 8)} and expected.outputs == ("y",)
    assert all(p.grad is not None and bool(p.grad.cpu().any()) for p in module.parameters())


def test_int8_weights_stay_int8():
    module, x, _ = judged(quantised(), (4, 16))
    assert {name: b.dtype for name, b in module.named_buffers() if b.dim() == 2} == {
        "w_turned": torch.int8
    }
    exported = str(torch.export.export(module, (x,)).graph)
    for operation in ("quantize_per_tensor", "dequantize_per_tensor", "dequantize_per_channel"):
        assert f"quantized_decomposed.{operation}.default" in exported
    assert "aten.linear.default" in exported  # what int8 kernels are made from


def test_an_older_opset_is_converted():
    made = model([node("Softmax", ["x"], ["y"], axis=1)], [value("x", [2, 3, 4])],
                 [value("y", [2, 3, 4])], opset=11)  # fmt: skip
    x = torch.randn(2, 3, 4)
    got = load_onnx(made).module(x)
    torch.testing.assert_close(got, x.reshape(2, -1).softmax(1).reshape(x.shape))


def test_a_constant_condition_is_chosen():
    def branch(kind):
        return helper.make_graph([node(kind, ["x"], [kind])], kind, [], [value(kind, [2])])

    made = model(
        [node("If", ["c"], ["y"], then_branch=branch("Neg"), else_branch=branch("Abs"))],
        [value("x", [2])], [value("y", [2])], [weight("c", np.array(True))],
    )  # fmt: skip
    assert load_onnx(made).module(torch.tensor([1.0, -2.0])).tolist() == [-1, 2]


# What cannot be read ------------------------------------------------------------------------------

X, Y = value("x", [2, 3]), value("y", None)
EXPORT = "export the model without it, or rewrite that part of it"
REFUSED = {
    "unknown operator": (
        model([node("Frobnicate", ["x"], ["y"], name="/a/F")], [X], [Y], opset=17),
        ("the ONNX model: node '/a/F' (Frobnicate): no operator 'Frobnicate' of domain 'ai.onnx', "
        f"opset 17, is known; {EXPORT}"),
    ),
    "unknown domain": (
        model([node("FusedMatMul", ["x"], ["y"], domain="com.microsoft")], [X], [Y],
              domains=["com.microsoft"]),
        ("the ONNX model: node 'y' (FusedMatMul): no operator 'FusedMatMul' of domain "
        f"'com.microsoft', opset 21, is known; {EXPORT}"),
    ),
    "unknown attribute": (
        model([node("Relu", ["x"], ["y"], name="r", slope=0.5)], [X], [Y]),
        f"the ONNX model: node 'r' (Relu): attribute 'slope' is not known; {EXPORT}",
    ),
    "loop": (
        model([node("Loop", ["", "", "x"], ["y"], name="l")], [X], [Y]),
        ("the ONNX model: node 'l' (Loop): control flow that depends on data cannot be compiled; "
        "export the model with the loop unrolled, or run its body step by step from Python"),
    ),
    "newer opset": (
        model([node("Relu", ["x"], ["y"])], [X], [Y], opset=99),
        ("the ONNX model: opset 99; Pagoda reads ONNX opsets 13 to 28 and converts older ones: "
        "export the model with opset_version=28, or convert it with onnx.version_converter"),
    ),
    "open dimension": (
        model([node("Relu", ["x"], ["y"])], [value("x", ["batch", 3])], [Y]),
        ("the ONNX model: the file leaves the shape of its input x: float32[batch, 3] open; give "
        "--dim batch=SIZE, or the input itself: --input x=FILE.npy"),
    ),
    "shape from data": (
        model([node("Reshape", ["x", "s"], ["y"], name="r")],
              [X, value("s", [2], TensorProto.INT64)], [Y]),
        ("the ONNX model: node 'r' (Reshape): its shape, 's', must be known when the model is "
        "compiled, but is computed from data; export the model with fixed shapes"),
    ),
    "size from data": (
        model([node("NonZero", ["x"], ["y"], name="n")], [X], [Y]),
        ("the ONNX model: node 'n' (NonZero): the size of its result depends on data, which a "
        "graph for the chip cannot have; export the model without it, and do this step in Python"),
    ),
    "shapes that do not fit": (
        model([node("MatMul", ["x", "w"], ["y"], name="m")], [X], [Y],
              [weight("w", floats(4, 5))]),
        ("the ONNX model: node 'm' (MatMul): cannot be computed on float32[2, 3], float32[4, 5]: a "
        "and b must have same reduction dim, but got [2, 3] X [4, 5].; check the model with "
        "onnx.checker, and the shapes of its inputs"),
    ),
    "a value from nowhere": (
        model([node("Relu", ["z"], ["y"])], [X], [Y]),
        ("the ONNX model: nothing computes 'z', which the graph uses; the file is damaged: "
        "export it again"),
    ),
    "types that are not read": (
        model([node("Relu", ["x"], ["y"])], [value("x", [2], TensorProto.FLOAT8E5M2)], [Y]),
        ("the ONNX model: input 'x': tensors of type FLOAT8E5M2 are not read; export the model "
        "with float32, bfloat16 or int8"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    made, message = REFUSED[what]
    with pytest.raises(ModelFileError, match=re.escape(message) + "$"):
        load_onnx(made)


def test_dimensions_and_shapes_are_checked():
    made = convolutional()
    for options, message in (
        ({"dims": {"seq": 3}}, "has no open dimension 'seq'; its open dimensions are batch"),
        ({"shapes": {"z": (1,)}},
         "has no input 'z'; its inputs are x: float32[batch, 3, 8, 8]"),
        ({"shapes": {"x": (2, 4, 8, 8)}},
         ("the input given has shape [2, 4, 8, 8], but the model takes x: float32[batch, 3, 8, 8]; "
         "give an array of that shape")),
    ):  # fmt: skip
        with pytest.raises(ModelFileError) as raised:
            load_onnx(made, **options)
        assert str(raised.value) == f"the ONNX model: {message}"


def test_files_that_are_no_models(tmp_path):
    path = tmp_path / "m.onnx"
    damaged = "the file may be damaged or of another kind: export or download it again"
    path.write_bytes(b"hello, this is no model")
    with pytest.raises(ModelFileError) as raised:
        load_onnx(path)
    assert str(raised.value) == (
        f"{path}: must be an ONNX model (a protobuf message ModelProto), but it cannot be decoded; "
        f"{damaged}"
    )
    path.write_bytes(b"")
    with pytest.raises(ModelFileError) as raised:
        load_onnx(path)
    assert str(raised.value) == f"{path}: must be an ONNX model, but holds no graph; {damaged}"
    with pytest.raises(ModelFileError) as raised:
        load_onnx(tmp_path / "gone.onnx")
    assert str(raised.value) == f"{tmp_path / 'gone.onnx'}: no such file; check the path"


def test_external_data(tmp_path):
    path = tmp_path / "m.onnx"
    made = convolutional()
    onnx.save(made, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert load_onnx(path, dims={"batch": 1}).shapes == {"x": (1, 3, 8, 8)}
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelFileError) as raised:
        load_onnx(path)
    start, end = str(raised.value).split("folder: ")
    assert start == (
        f"{path}: keeps weights in files of their own (external data), and one is missing or "
        "outside of its "
    )
    assert "w.bin" in end and end.endswith("; put them beside the model")
