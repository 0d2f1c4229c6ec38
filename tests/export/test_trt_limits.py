"""Each row of the table is found in a tiny graph that meets it, and in none that does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.helper import make_node

import cveff
from cveff.errors import ExportError, TargetError
from cveff.export.trt_check import Finding, check_target, check_tensorrt
from cveff.export.trt_limits import LIMITS, OTHER_RULES
from cveff.export.trt_rules import RULES
from cveff.target import Target, TensorRT, load_target

FLOAT, HALF, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
INT64, DOUBLE, UINT8 = TensorProto.INT64, TensorProto.DOUBLE, TensorProto.UINT8


def graph(
    *nodes: onnx.NodeProto,
    kind: int = FLOAT,
    shape: Sequence[int | str] = ("N", 8, 16, 16),
    opset: int = 20,
    outputs: Sequence[str] = (),
    **constants: Any,
) -> onnx.ModelProto:
    """`x` of this type and shape goes in; each node's first output that nobody reads comes out."""
    read = {name for node in nodes for name in node.input}
    names = [*outputs, *(node.output[0] for node in nodes if node.output[0] not in read)]
    return helper.make_model(
        helper.make_graph(
            list(nodes),
            "tiny",
            [helper.make_tensor_value_info("x", kind, list(shape))],
            [helper.make_empty_tensor_value_info(name) for name in names],
            [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )


def node(kind: str, *inputs: str, out: Sequence[str] = ("y",), **attributes: Any) -> onnx.NodeProto:
    return make_node(kind, list(inputs), list(out), name=f"the_{kind}", **attributes)


def cast(source: str, kind: int, out: str) -> onnx.NodeProto:
    return make_node("Cast", [source], [out], name=f"cast_{out}", to=kind)


def found(proto: onnx.ModelProto, rule: str, **settings: Any) -> list[Finding]:
    return [item for item in check_tensorrt(proto, **settings) if item.rule == rule]


SCALAR = np.array(3, np.int64)
LIST = np.array([1, 2], np.int64)
EIGHT = np.ones((8, 8, 3, 3), np.float32)
SUM = node("ReduceMax", "x", out=["m"], keepdims=0)
"""A value of the image, from which nothing may take its size."""
COUNT = (SUM, cast("m", INT64, "c"), node("Unsqueeze", "c", "zero", out=["n"]))
ZERO = np.array([0], np.int64)

MEETS: dict[str, tuple[str, onnx.ModelProto]] = {
    "unsupported": ("unsupported", graph(node("Det", "x"))),
    "unlisted": ("unsupported", graph(node("Swish", "x"), opset=24)),
    "uint16": ("type", graph(cast("x", TensorProto.UINT16, "y"))),
    "uint8 inside": ("type", graph(node("Transpose", "x"), kind=UINT8)),
    "uint8 shape": ("type", graph(node("Shape", "x"), kind=UINT8)),
    "double": ("type", graph(cast("x", DOUBLE, "d"), node("Exp", "d"))),
    "integer product": ("type", graph(cast("x", INT64, "i"), node("MatMul", "i", "i"))),
    "bfloat16 sampling": ("type", graph(node("Mish", "x"), kind=BF16, opset=22)),
    "half spectrum": ("type", graph(node("STFT", "x", "step", "w"), kind=HALF, step=SCALAR, w=np.ones(4, np.float16))),
    "int64": ("int64", graph(cast("x", INT64, "i"), node("Add", "i", "big"), big=np.array([2**40]))),
    "axes": ("argument", graph(*COUNT, node("ReduceMean", "x", "n"), zero=ZERO)),
    "depth": ("argument", graph(*COUNT, cast("x", INT64, "i"), node("OneHot", "i", "n", "v"), zero=ZERO,
                                v=np.array([0.0, 1.0], np.float32))),
    "window": ("argument", graph(*COUNT, node("STFT", "x", "c", "w"), zero=ZERO, w=np.ones(4, np.float32))),
    "training": ("argument", graph(SUM, cast("m", TensorProto.BOOL, "t"), node("Dropout", "x", "r", "t"),
                                   r=np.array(0.5, np.float32))),
    "topk": ("variant", graph(node("TopK", "x", "k", out=["v", "i"]), shape=("N", 4000), k=np.array([3840]))),
    "unsorted": ("variant", graph(node("TopK", "x", "k", out=["v", "i"], sorted=0), k=np.array([4]))),
    "scatter nd": ("variant", graph(node("ScatterND", "x", "i", "u", reduction="add"), shape=(8,), i=np.array([[1]]),
                                    u=np.ones(1, np.float32))),
    "scatter": ("variant", graph(node("ScatterElements", "x", "i", "u", reduction="max"), shape=(8,), i=np.array([1]),
                                 u=np.ones(1, np.float32))),
    "indices": ("variant", graph(node("MaxPool", "x", out=["y", "i"], kernel_shape=[2, 2]))),
    "dilated pool": ("variant", graph(node("MaxPool", "x", kernel_shape=[2, 2], dilations=[2, 2]))),
    "cubic": ("variant", graph(node("Resize", "x", "", "s", mode="cubic"), s=np.array([1, 1, 2, 2], np.float32))),
    "antialias": ("variant", graph(node("Resize", "x", "", "s", mode="linear", antialias=1),
                                   s=np.array([1, 1, 2, 2], np.float32))),
    "aspect": ("variant", graph(node("Resize", "x", "", "", "s", keep_aspect_ratio_policy="not_larger"),
                                s=np.array([1, 8, 9, 9]))),
    "crop": ("variant", graph(node("Resize", "x", "r", "s", coordinate_transformation_mode="tf_crop_and_resize"),
                              r=np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32), s=np.array([1, 1, 2, 2], np.float32))),
    "norm": ("variant", graph(node("LayerNormalization", "x", "w", out=["y", "mean"]), w=np.ones(16, np.float32))),
    "forget": ("variant", graph(node("LSTM", "x", "w", "r", input_forget=1, hidden_size=2), shape=(3, "N", 4),
                                w=np.ones((1, 8, 4), np.float32), r=np.ones((1, 8, 2), np.float32))),
    "layout": ("variant", graph(node("LSTM", "x", "w", "r", layout=1, hidden_size=2), shape=("N", 3, 4),
                                w=np.ones((1, 8, 4), np.float32), r=np.ones((1, 8, 2), np.float32))),
    "volume": ("variant", graph(node("GridSample", "x", "g"), shape=(1, 2, 3, 3, 3),
                                g=np.zeros((1, 3, 3, 3, 3), np.float32))),
    "uneven": ("variant", graph(node("DeformConv", "x", "w", "o", pads=[1, 1, 0, 1]), w=EIGHT,
                                o=np.zeros((1, 18, 15, 16), np.float32))),
    "flat attention": ("variant", graph(node("Attention", "x", "x", "x", q_num_heads=2, kv_num_heads=2),
                                        shape=(1, 4, 8), opset=23)),
    "cache": ("variant", graph(node("Attention", "x", "x", "x", "", "x", "x"), shape=(1, 2, 4, 8), opset=23)),
    "presents": ("variant", graph(node("Attention", "x", "x", "x", "", "x", "x", out=["y", "k", "v"]),
                                  shape=(1, 2, 4, 8), opset=23)),
    "softcap": ("variant", graph(node("Attention", "x", "x", "x", softcap=30.0), shape=(1, 2, 4, 8), opset=23)),
    "strings": ("variant", graph(node("Relu", "x"), make_node("Constant", [], ["s"], value_strings=["a"]))),
    "reshape": ("shape-from-values", graph(*COUNT, node("Reshape", "x", "n"), zero=ZERO)),
    "range": ("shape-from-values", graph(*COUNT, node("Range", "z", "c", "one"), zero=ZERO, z=np.array(0),
                                         one=np.array(1))),
    "slice": ("shape-from-values", graph(*COUNT, node("Slice", "x", "zero", "n"), zero=ZERO)),
    "resize": ("shape-from-values", graph(*COUNT, node("Concat", "n", "n", "n", "n", out=["s"], axis=0),
                                          node("Resize", "x", "", "", "s"), zero=ZERO)),
    "nonzero": ("size-from-values", graph(node("NonZero", "x"))),
    "loop": ("control-flow", graph(node("If", "b", then_branch=helper.make_graph([], "t", [], []),
                                        else_branch=helper.make_graph([], "e", [], [])), b=np.array(True))),
}  # fmt: skip
"""What is wrong -> the rule, and a graph with it."""

FINE: dict[str, onnx.ModelProto] = {
    "convolution": graph(node("Conv", "x", "w"), w=EIGHT),
    "uint8 images": graph(cast("x", FLOAT, "f"), node("Relu", "f"), kind=UINT8),
    "uint8 out": graph(node("Relu", "x", out=["f"]), cast("f", UINT8, "y")),
    "int64": graph(cast("x", INT64, "i"), node("Add", "i", "small"), small=np.array([2**31 - 1])),
    "to the end": graph(node("Slice", "x", "one", "end"), one=np.array([1]), end=np.array([2**63 - 1])),
    "topk": graph(node("TopK", "x", "k", out=["v", "i"]), shape=("N", 4000), k=np.array([3839])),
    "scatter": graph(
        node("ScatterND", "x", "i", "u"), shape=(8,), i=np.array([[1]]), u=np.ones(1, np.float32)
    ),
    "pool": graph(node("MaxPool", "x", kernel_shape=[2, 2], dilations=[1, 1])),
    "resize": graph(node("Resize", "x", "", "s", mode="linear"), s=np.array([1, 1, 2, 2], np.float32)),
    "norm": graph(node("LayerNormalization", "x", "w"), w=np.ones(16, np.float32)),
    "axes": graph(node("ReduceMean", "x", "a"), a=LIST),
    "reshape by shape": graph(
        node("Shape", "x", out=["s"]),
        node("Gather", "s", "zero", out=["n"]),
        node("Concat", "n", "rest", out=["t"], axis=0),
        node("Reshape", "x", "t"),
        zero=ZERO,
        rest=np.array([-1]),
    ),
    "reshape by a constant node": graph(
        make_node("Constant", [], ["t"], value=numpy_helper.from_array(np.array([-1, 8]))),
        node("Reshape", "x", "t"),
    ),
    "attention": graph(node("Attention", "x", "x", "x"), shape=(1, 2, 4, 8), opset=23),
    "mish in half": graph(node("Mish", "x"), kind=HALF),
}


@pytest.mark.parametrize("case", MEETS)
def test_a_limit_that_is_met_is_found(case: str) -> None:
    rule, proto = MEETS[case]
    items = found(proto, rule)
    assert items, check_tensorrt(proto)
    assert all(item.node and item.problem and item.hint and item.source for item in items)


@pytest.mark.parametrize("case", FINE)
def test_a_graph_within_the_limits_has_no_findings(case: str) -> None:
    assert check_tensorrt(FINE[case]) == []


def test_every_row_is_met_by_a_graph_here() -> None:
    """A row that no graph meets is a row that nobody has seen work."""
    from cveff.export.trt_graph import TrtGraph

    graphs = [TrtGraph(proto) for _, proto in MEETS.values()] + [TrtGraph(proto) for proto in DLA.values()]

    def is_met(row: Any) -> bool:
        return any(
            (not row.names or node.op_type in row.names) and row.condition(item, node)
            for item in graphs
            for node in item.nodes
        )

    missed = [(row.rule, row.operators[:40], row.remedy) for row in LIMITS if not is_met(row)]
    assert not missed


def test_rows_name_operators_that_onnx_has() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    assert {name for row in LIMITS for name in row.names} <= known
    assert set(RULES) <= set(OTHER_RULES)


def test_the_page_names_every_rule() -> None:
    page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
    assert not [row.rule for row in LIMITS if f"| `{row.rule}` |" not in page]


def test_findings_say_how_bad_they_are() -> None:
    (slow,) = found(MEETS["nonzero"][1], "size-from-values")
    (fails,) = found(MEETS["topk"][1], "variant")
    assert (slow.severity, fails.severity) == ("slow", "fails")
    assert fails.node == "the_TopK" and "K is 3840" in fails.problem and "operators.md" in fails.source


DLA: dict[str, onnx.ModelProto] = {
    "operator": graph(node("Erf", "x"), kind=HALF),
    "long": graph(node("Relu", "x"), kind=HALF, shape=(1, 9000, 1, 1)),
    "one axis": graph(node("Conv", "x", "w", kernel_shape=[3]), kind=HALF, shape=(1, 8, 9),
                      w=np.ones((8, 8, 3), np.float16)),
    "kernel": graph(node("Conv", "x", "w", kernel_shape=[33, 1]), kind=HALF, shape=(1, 8, 40, 40),
                    w=np.ones((8, 8, 33, 1), np.float16)),
    "stride": graph(node("Conv", "x", "w", kernel_shape=[1, 1], strides=[9, 9]), kind=HALF,
                    w=np.ones((8, 8, 1, 1), np.float16)),
    "padded": graph(node("ConvTranspose", "x", "w", pads=[1, 1, 1, 1]), kind=HALF, w=EIGHT.astype(np.float16)),
    "grouped": graph(node("ConvTranspose", "x", "w", group=8), kind=HALF, w=EIGHT[:, :1].astype(np.float16)),
    "rows": graph(node("Concat", "x", "x", axis=-1), kind=HALF),
    "float32": graph(node("Conv", "x", "w"), w=EIGHT),
}  # fmt: skip


@pytest.mark.parametrize("case", DLA)
def test_what_the_accelerator_leaves_to_the_gpu_is_found_for_it_alone(case: str) -> None:
    items = found(DLA[case], "dla", dla=True)
    assert items and {item.severity for item in items} == {"slow"}
    assert check_tensorrt(DLA[case]) == []


def test_the_accelerator_runs_plain_convolutions_in_half() -> None:
    proto = graph(
        node("Conv", "x", "w", out=["c"]),
        node("Relu", "c", out=["r"]),
        node("Concat", "r", "r", axis=1),
        kind=HALF,
        w=EIGHT.astype(np.float16),
    )
    assert check_tensorrt(proto, 10, dla=True) == []


def test_a_targets_settings_decide() -> None:
    proto = DLA["float32"]
    assert check_target(proto, load_target("rtx")) == []
    assert [item.rule for item in check_target(proto, load_target("jetson-orin-dla"))] == ["dla"]
    newer = graph(node("Relu", "x"), opset=22)
    assert [item.rule for item in check_target(newer, load_target("jetson-orin"))] == ["opset"]
    with pytest.raises(TargetError, match="edge-cpu has no tensorrt candidate"):
        check_target(proto, load_target("edge-cpu"))
    with pytest.raises(ExportError, match="not a readable ONNX file"):
        check_target("missing.onnx", load_target("rtx"))


def test_a_fixed_batch_takes_no_other() -> None:
    proto = graph(node("Relu", "x"), shape=(4, 8, 16, 16))
    (finding,) = check_target(proto, load_target("rtx"))
    assert (finding.rule, finding.severity, finding.tensor) == ("batch", "fails", "x")
    assert "[4, 4, 4]" in finding.hint
    fixed = Target(
        "four", "", (("tensorrt", "fp32"),), batch_sizes=(4,), tensorrt=TensorRT(batches=(4, 4, 4))
    )
    assert check_target(proto, fixed) == []


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32),
        ("mobilenetv3_small_100", 32),
        ("convnext_atto", 32),
        ("vit_tiny_patch16_224", 32),
        ("ghostnet_100", 32),
    ],
)
def test_what_we_export_builds(name: str, size: int, tmp_path: Path) -> None:
    path = cveff.export(
        cveff.create(name, num_classes=3, image_size=size), tmp_path / "model.onnx", check=False
    )
    assert check_target(path, load_target("rtx")) == []
    proto = onnx.load(path)
    readers = {node.op_type for node in proto.graph.node if "images" in node.input}
    assert readers == {"Cast"}, "uint8 goes to a conversion and nowhere else"
    onnx.checker.check_model(proto, full_check=True)
