"""Is an ONNX file what TensorRT turns into the engine that was meant? Checked without TensorRT, rule by rule.

TensorRT 11 takes strongly typed graphs only: what is 8 bits wide is said by QuantizeLinear and DequantizeLinear,
everything else by the tensors' types. What is known of single operators is a table, `trt_limits`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from cveff.errors import ExportError, TargetError
from cveff.export.trt_graph import FLOATS, TrtGraph, label, type_name
from cveff.export.trt_limits import LIMITS, OTHER_RULES, Severity
from cveff.export.trt_rules import RULES
from cveff.runtime.errors import first_line
from cveff.runtime.tensorrt_settings import TensorRT
from cveff.target import Target

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
        severity: "fails" or "slow" (`trt_limits.Severity`).
        source: where that is documented.
    """

    rule: str
    node: str
    tensor: str
    problem: str
    hint: str
    severity: Severity
    source: str

    def __str__(self) -> str:
        return f"[{self.rule}] {self.node}, tensor {self.tensor}: {self.problem}; {self.hint}"


def check_tensorrt(
    model: str | Path | onnx.ModelProto, version: int = 11, *, dla: bool = False
) -> list[Finding]:
    """Every finding, rule after rule, in the order of the nodes.

    Args:
        model: a file or a graph. What is inside of If, Loop and Scan is not looked at.
        version: TensorRT's major version, 10 or 11.
        dla: also what the deep learning accelerator leaves to the GPU.

    Raises:
        ExportError: the version is unknown or the file cannot be read.
    """
    if version not in OPSETS:
        raise ExportError(f"TensorRT version {version} is unknown; give one of {sorted(OPSETS)}")
    graph = TrtGraph(model if isinstance(model, onnx.ModelProto) else _read(Path(model)))
    found = [*_opset(graph, version), *_types(graph)]
    for rule, check in RULES.items():
        found += [_finding(rule, label(node), tensor, *rest) for node, tensor, *rest in check(graph)]
    return [*found, *_limits(graph, dla)]


def check_target(model: str | Path | onnx.ModelProto, target: Target) -> list[Finding]:
    """`check_tensorrt` by the target's settings, and whether the file takes the batches that plans are built for.

    Raises:
        ExportError: the file cannot be read.
        TargetError: the target has no TensorRT candidate.
    """
    settings = tensorrt_of(target)
    proto = model if isinstance(model, onnx.ModelProto) else _read(Path(model))
    found = check_tensorrt(proto, settings.version, dla=settings.dla is not None)
    return [*found, *_batches(proto, settings.batches)]


def tensorrt_of(target: Target) -> TensorRT:
    """How a target builds plans.

    Raises:
        TargetError: it builds none.
    """
    if "tensorrt" not in target.engines:
        raise TargetError(
            f"target {target.name} has no tensorrt candidate, and other engines' files are checked by running them; "
            "give a target that has one, such as rtx"
        )
    return target.tensorrt


def require_tensorrt(model: str | Path | onnx.ModelProto, version: int = 11) -> None:
    """Nothing, for a file that TensorRT runs, its rounding as fast as was meant.

    Raises:
        ExportError: naming the first findings that fail, or that are about rounding.
    """
    found = [
        item for item in check_tensorrt(model, version) if item.severity == "fails" or item.rule in RULES
    ]
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


def _finding(rule: str, node: str, tensor: str, problem: str, hint: str) -> Finding:
    return Finding(rule, node, tensor, problem, hint, *OTHER_RULES[rule])


def _limits(graph: TrtGraph, dla: bool) -> Iterator[Finding]:
    nodes = [node for node in graph.nodes if node.domain in ("", "ai.onnx")]
    for limit in LIMITS:
        if limit.dla and not dla:
            continue
        for node in nodes:
            if limit.names and node.op_type not in limit.names:
                continue
            problem = limit.condition(graph, node)
            if problem:
                where = node.output[0] if node.output else ""
                yield Finding(
                    limit.rule,
                    label(node),
                    where,
                    f"{node.op_type}: {problem}",
                    limit.remedy,
                    limit.severity,
                    limit.source,
                )


def _batches(proto: onnx.ModelProto, batches: tuple[int, int, int]) -> Iterator[Finding]:
    """An input whose first axis is fixed takes no profile of several sizes."""
    constants = {item.name for item in proto.graph.initializer}
    for item in proto.graph.input:
        axes = item.type.tensor_type.shape.dim
        if item.name in constants or not axes or not axes[0].HasField("dim_value"):
            continue
        fixed = axes[0].dim_value
        if {fixed} != set(batches):
            yield _finding(
                "batch",
                proto.graph.name or "graph",
                item.name,
                f"takes {fixed} images a call, and the target asks for {list(batches)}",
                f"export with a batch of any size, or set tensorrt.batches to {[fixed] * 3}",
            )


def _opset(graph: TrtGraph, version: int) -> Iterator[Finding]:
    low, high = OPSETS[version]
    opset, where = graph.opset(), graph.proto.graph.name or "graph"
    if not low <= opset <= high:
        yield _finding(
            "opset",
            where,
            "",
            f"opset {opset}",
            f"TensorRT {version} parses {low} to {high}; export with opset=20",
        )
    if opset < _FLOAT8_OPSET and TensorProto.FLOAT8E4M3FN in graph.types.values():
        yield _finding(
            "opset", where, "", f"float8 in opset {opset}", f"needs {_FLOAT8_OPSET}; export with opset=20"
        )
    for domain in sorted({node.domain for node in graph.nodes} - {"", "ai.onnx"}):
        node = next(node for node in graph.nodes if node.domain == domain)
        yield _finding(
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
            yield _finding(
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
        yield _finding(
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
            yield _finding("opset", label(node), node.output[0], problem, "export with a later opset")
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
                yield _finding(
                    "types", label(node), name, f"{type_name(kind)} beside {type_name(other)} ({where})",
                    "cast both to one type",
                )  # fmt: skip
                return
            if f"tensor({type_name(kind)})" not in parameter.types and letter.startswith("T"):
                yield _finding(
                    "types", label(node), name, f"{node.op_type} takes no {type_name(kind)} in opset {graph.opset()}",
                    "cast it, or export with a later opset",
                )  # fmt: skip
                return
