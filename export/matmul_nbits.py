"""Layers of packed integers in an exported graph: `MatMulNBits` of the domain com.microsoft, whose layout they keep.

ONNX Runtime multiplies with float32 unless `accuracy_level` says otherwise: 4 lets it round activations to 8 bits,
in blocks as the weights are, which is faster where the CPU has integer dot products and is no longer what PyTorch
computes.

https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch

import cveff.compress.quant.packed_linear  # noqa: F401  (registers the operator that is translated here)
from cveff.errors import ExportError

DOMAIN = "com.microsoft"
ACCURACY_LEVELS = (0, 1, 4)
"""What activations are computed in: the engine's default (float32), float32, at least int8."""


def translations() -> dict[Any, Callable[..., Any]]:
    """For `torch.onnx.export(custom_translation_table=...)`."""
    from onnxscript.values import Op, Opset

    write = Op(Opset(DOMAIN, 1), "MatMulNBits", _schema())

    def matmul_nbits(
        x: Any, packed: Any, scales: Any, zero_points: Any, inputs: int, bits: int, group_size: int
    ) -> Any:
        return write(
            x,
            packed,
            scales,
            *([] if zero_points is None else [zero_points]),
            K=inputs,
            N=int(packed.shape[0]),
            bits=bits,
            block_size=group_size,
        )

    return {torch.ops.cveff.matmul_nbits.default: matmul_nbits}


def _schema() -> onnx.defs.OpSchema:
    """What the exporter must know of an operator that ONNX itself does not have."""
    schema = onnx.defs.OpSchema
    parameter, optional = schema.FormalParameter, schema.FormalParameterOption.Optional
    return schema(
        "MatMulNBits",
        DOMAIN,
        1,
        inputs=[
            parameter("A", "T1"),
            parameter("B", "T2"),
            parameter("scales", "T1"),
            parameter("zero_points", "T2", param_option=optional),
        ],
        outputs=[parameter("Y", "T1")],
        type_constraints=[("T1", ["tensor(float)"], ""), ("T2", ["tensor(uint8)"], "")],
        attributes=[
            schema.Attribute(name, schema.AttrType.INT, required=True)
            for name in ("K", "N", "bits", "block_size")
        ],
    )


def set_accuracy_level(proto: onnx.ModelProto, level: int) -> int:
    """Say what every `MatMulNBits` computes in, in place.

    Args:
        level: one of `ACCURACY_LEVELS`.

    Returns:
        How many there are.

    Raises:
        ExportError: another level, or a graph without such a node.
    """
    if level not in ACCURACY_LEVELS:
        raise ExportError(
            f"accuracy level {level!r} is unknown; give one of {', '.join(map(str, ACCURACY_LEVELS))}"
        )
    nodes = [node for node in proto.graph.node if node.op_type == "MatMulNBits" and node.domain == DOMAIN]
    if not nodes:
        raise ExportError("the graph has no MatMulNBits; quantize its weights first")
    for node in nodes:
        for attribute in [item for item in node.attribute if item.name == "accuracy_level"]:
            node.attribute.remove(attribute)
        node.attribute.append(onnx.helper.make_attribute("accuracy_level", level))
    return len(nodes)
