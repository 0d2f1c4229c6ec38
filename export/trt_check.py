"""Is an ONNX file what TensorRT turns into the engine that was meant? Checked without TensorRT, rule by rule.

TensorRT 11 takes strongly typed graphs only: what is 8 bits wide is said by QuantizeLinear and DequantizeLinear,
everything else by the tensors' types. A pair that nothing fuses is no error there, only slow; so it is one here. Rules
from NVIDIA's "Explicit Quantization" and "ONNX Opset Guide" (TensorRT 11 documentation).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from cveff.errors import ExportError
from cveff.export.trt_graph import FLOATS, TrtGraph, label, type_name
from cveff.export.trt_rules import RULES
from cveff.runtime.errors import first_line

OPSETS = {10: (9, 20), 11: (9, 25)}
"""First and last opset that every release of a major version parses."""
_FLOAT8_OPSET = 19
_MAY_MIX = {"Resize": (0,), "Cast": (0,), "CastLike": (0,)}
"""Operators whose other float inputs are no data: the places that are."""


@dataclass(frozen=True)
class Finding:
    """Something that TensorRT would refuse, or would run in another type or slower than the file means.

    Attributes:
        rule: its name.
        node, tensor: where.
        problem, hint: what is wrong, with which value, and what to do.
    """

    rule: str
    node: str
    tensor: str
    problem: str
    hint: str

    def __str__(self) -> str:
        return f"[{self.rule}] {self.node}, tensor {self.tensor}: {self.problem}; {self.hint}"


def check_tensorrt(model: str | Path | onnx.ModelProto, version: int = 11) -> list[Finding]:
    """Every finding, in the order of the nodes, rule after rule.

    Args:
        model: a file or a graph.
        version: TensorRT's major version, 10 or 11.

    Raises:
        ExportError: the version is unknown or the file cannot be read.
    """
    if version not in OPSETS:
        raise ExportError(f"TensorRT version {version} is unknown; give one of {sorted(OPSETS)}")
    graph = TrtGraph(model if isinstance(model, onnx.ModelProto) else _read(Path(model)))
    found = [*_opset(graph, version), *_types(graph)]
    for rule, check in RULES.items():
        found += [Finding(rule, label(node), tensor, *rest) for node, tensor, *rest in check(graph)]
    return found


def require_tensorrt(model: str | Path | onnx.ModelProto, version: int = 11) -> None:
    """Nothing, for a file without findings.

    Raises:
        ExportError: naming the first findings.
    """
    found = check_tensorrt(model, version)
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise ExportError(f"the graph is not for TensorRT {version}: {'; '.join(map(str, found[:3]))}{more}")


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ExportError(f"{path} is not a readable ONNX file: {first_line(error)}") from error
    except Exception as error:  # protobuf's own error class has moved between versions
        if type(error).__name__ != "DecodeError":
            raise
        raise ExportError(f"{path} is not a readable ONNX file: {first_line(error)}") from error


def _opset(graph: TrtGraph, version: int) -> Iterator[Finding]:
    low, high = OPSETS[version]
    opset, where = graph.opset(), graph.proto.graph.name or "graph"
    if not low <= opset <= high:
        yield Finding(
            "opset",
            where,
            "",
            f"opset {opset}",
            f"TensorRT {version} parses {low} to {high}; export with opset=20",
        )
    if opset < _FLOAT8_OPSET and TensorProto.FLOAT8E4M3FN in graph.types.values():
        yield Finding(
            "opset", where, "", f"float8 in opset {opset}", f"needs {_FLOAT8_OPSET}; export with opset=20"
        )
    for domain in sorted({node.domain for node in graph.nodes} - {"", "ai.onnx"}):
        node = next(node for node in graph.nodes if node.domain == domain)
        yield Finding(
            "opset", label(node), node.output[0], f"{node.op_type} is of domain {domain}",
            "TensorRT knows ONNX's own operators; export without it",
        )  # fmt: skip


def _types(graph: TrtGraph) -> Iterator[Finding]:
    """A strongly typed network converts nothing by itself: a node's float inputs have one type, and so has each of
    the types that ONNX's own definition of the operator says are the same."""
    for node in graph.nodes:
        places = _MAY_MIX.get(node.op_type, range(len(node.input)))
        floats = {
            graph.types[node.input[place]]: node.input[place]
            for place in places
            if place < len(node.input) and graph.types.get(node.input[place]) in FLOATS
        }
        if len(floats) > 1:
            kinds = " and ".join(sorted(type_name(kind) for kind in floats))
            yield Finding(
                "types",
                label(node),
                list(floats.values())[-1],
                f"reads {kinds} at once",
                "cast all inputs to one type",
            )
        else:
            yield from _of_schema(graph, node)
    try:
        onnx.shape_inference.infer_shapes(graph.proto, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        yield Finding(
            "types",
            graph.proto.graph.name or "graph",
            "",
            first_line(error),
            "types or shapes contradict each other",
        )


def _of_schema(graph: TrtGraph, node: onnx.NodeProto) -> Iterator[Finding]:
    if not onnx.defs.has(node.op_type, graph.opset(), node.domain):
        if node.domain in ("", "ai.onnx"):
            problem = f"opset {graph.opset()} has no {node.op_type}"
            yield Finding("opset", label(node), node.output[0], problem, "export with a later opset")
        return
    schema = onnx.defs.get_schema(node.op_type, graph.opset(), node.domain)
    seen: dict[str, tuple[int, str]] = {}
    for formal, names in ((schema.inputs, node.input), (schema.outputs, node.output)):
        for place, name in enumerate(names):
            if not formal or name not in graph.types:
                continue
            parameter = formal[min(place, len(formal) - 1)]
            kind, letter = graph.types[name], parameter.type_str
            if not parameter.is_homogeneous:
                continue
            if seen.setdefault(letter, (kind, name))[0] != kind:
                other, where = seen[letter]
                yield Finding(
                    "types", label(node), name, f"{type_name(kind)} beside {type_name(other)} ({where})",
                    "cast both to one type",
                )  # fmt: skip
                return
            if f"tensor({type_name(kind)})" not in parameter.types and letter.startswith("T"):
                yield Finding(
                    "types", label(node), name, f"{node.op_type} takes no {type_name(kind)} in opset {graph.opset()}",
                    "cast it, or export with a later opset",
                )  # fmt: skip
                return
