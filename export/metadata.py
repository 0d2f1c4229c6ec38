"""What an ONNX file says about itself: `metadata_props`, read back by any ONNX tool without cveff."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import onnx

import cveff
from cveff.measure.onnx_modules import read_modules, write_modules
from cveff.model import ModelSpec


def write_metadata(
    proto: onnx.ModelProto,
    spec: ModelSpec,
    unsimplified: str | None = None,
    task_values: Mapping[str, Any] | None = None,
) -> None:
    """Put version, architecture, task, input and labels into `proto`, in place, and remove the exporter's notes.

    The exporter records the Python source lines of every node: they would leak the paths of the machine that
    exported, and on a small model outweigh the graph. Of each node only the PyTorch module it came from stays,
    so that a difference found in the file can be named in the network.

    Args:
        unsimplified: why the graph was not simplified; None where it was.
        task_values: what tasks other than classification add, as JSON values.
    """
    modules = read_modules(proto)
    for item in (*proto.graph.node, *proto.graph.initializer, *proto.graph.value_info, proto.graph):
        del item.metadata_props[:]
        item.doc_string = ""
    for item in (*proto.graph.input, *proto.graph.output):
        del item.metadata_props[:]
    write_modules(proto, modules)
    proto.producer_name, proto.producer_version = "cveff", cveff.__version__
    proto.doc_string = ""
    proto.graph.name = spec.architecture
    values = {
        "cveff_version": cveff.__version__,
        "architecture": spec.architecture,
        "task": spec.task,
        "input": json.dumps(spec.input.to_json()),
        "labels": json.dumps(list(spec.labels), ensure_ascii=False),
    }
    values |= {key: json.dumps(value) for key, value in (task_values or {}).items()}
    if unsimplified is not None:
        values["unsimplified"] = unsimplified
    onnx.helper.set_model_props(proto, values)


def read_metadata(proto: onnx.ModelProto) -> dict[str, Any]:
    """`{"cveff_version", "architecture", "task", "input", "labels"}` and, of a detector, `"suppression"`, JSON
    decoded; empty for a foreign file."""
    values: dict[str, Any] = {item.key: item.value for item in proto.metadata_props}
    for key in ("input", "labels", "suppression"):
        if key in values:
            values[key] = json.loads(values[key])
    return values
