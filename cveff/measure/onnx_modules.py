"""Which PyTorch module each node of an ONNX file came from, kept as node metadata `module`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MODULE = "module"
SCOPES = "pkg.torch.onnx.name_scopes"
"""What torch's exporter writes: the modules a node came from, outermost first, then the node itself."""


def read_modules(proto: Any) -> dict[str, str]:
    """Tensor -> path of the innermost module that computed it, for every node of a `ModelProto` that says.

    Simplifiers and quantizers drop node metadata but keep the names of tensors, so read before and write
    after:

        modules = read_modules(proto)
        proto = simplify(proto)
        write_modules(proto, modules)
    """
    return {
        name: module
        for node in proto.graph.node
        if (module := node_module(node))
        for name in node.output
        if name
    }


def write_modules(proto: Any, modules: Mapping[str, str]) -> None:
    """Note the module of every node whose first output is a key of `modules`, in place of any older note."""
    for node in proto.graph.node:
        module = modules.get(node.output[0]) if node.output else None
        if module:
            kept = [(item.key, item.value) for item in node.metadata_props if item.key != MODULE]
            del node.metadata_props[:]
            for key, value in (*kept, (MODULE, module)):
                node.metadata_props.add(key=key, value=value)


def node_module(node: Any) -> str:
    """Path of the innermost module a node came from; "" where it does not say."""
    properties = {item.key: item.value for item in node.metadata_props}
    if MODULE in properties:
        return str(properties[MODULE])
    if SCOPES not in properties:
        return ""
    try:
        scopes = json.loads(properties[SCOPES].replace("'", '"'))  # written as a Python list of plain names
    except json.JSONDecodeError:
        return ""
    return str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""
