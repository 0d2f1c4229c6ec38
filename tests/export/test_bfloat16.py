"""bfloat16 graphs run in ONNX Runtime through float32 kernels, with every result rounded."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from cveff.export.bfloat16 import has_bfloat16, in_float32


def graph() -> onnx.ModelProto:
    """y = relu(bfloat16(x) @ w) + b, in bfloat16."""
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    bias = torch.randn(4, generator=torch.Generator().manual_seed(1)).bfloat16()
    constants = [
        helper.make_tensor(name, TensorProto.BFLOAT16, list(value.shape), value.float().flatten().tolist())
        for name, value in (("w", weight), ("b", bias))
    ]
    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["narrow", "w"], ["product"]),
        helper.make_node("Relu", ["product"], ["positive"]),
        helper.make_node("Add", ["positive", "b"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    made = helper.make_graph(
        nodes,
        "narrow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 4])],
        constants,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def test_every_result_is_rounded_once() -> None:
    proto = graph()
    onnx.checker.check_model(proto, full_check=True)
    runnable = in_float32(proto)
    onnx.checker.check_model(runnable, full_check=True)
    session = onnxruntime.InferenceSession(runnable.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    (found,) = session.run(None, {"x": x.numpy()})
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    bias = torch.randn(4, generator=torch.Generator().manual_seed(1)).bfloat16()
    product = (x.bfloat16().double() @ weight.double()).float().bfloat16()
    expected = (torch.relu(product) + bias).float()
    np.testing.assert_array_equal(found, expected.numpy())
    assert not np.array_equal(found, (torch.relu(x @ weight.float()) + bias.float()).numpy())


def test_the_graph_given_is_left_as_it_was() -> None:
    proto = graph()
    before = proto.SerializeToString()
    assert has_bfloat16(proto)
    in_float32(proto)
    assert proto.SerializeToString() == before


def test_float32_graphs_have_none() -> None:
    proto = graph()
    proto.graph.node[0].attribute[0].i = TensorProto.FLOAT
    for item in proto.graph.initializer:
        item.data_type = TensorProto.FLOAT
    assert not has_bfloat16(proto)
