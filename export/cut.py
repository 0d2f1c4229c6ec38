"""One ONNX graph with several answers cut into files, each of which goes on from what those before it computed.

Cutting the exported graph, and not the network, works for any architecture: what flows over a cut is whatever later
nodes read. Shape computations are repeated in every file from the batch that arrives there, which has shrunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from cveff.errors import ExportError
from cveff.runtime.errors import first_line
from cveff.runtime.session import CARRIED

LOGITS = "logits"


class Cut:
    """The nodes of a graph by the first of its answers that needs them.

    Args:
        proto: a graph with one input, whose batch is its first dimension; it stays as it is.
        answers: names of outputs, in the order they are computed; other outputs are dropped.

    Raises:
        ExportError: a value that flows over a cut does not have the batch as its first dimension.
    """

    def __init__(self, proto: onnx.ModelProto, answers: Sequence[str]) -> None:
        self.proto = onnx.ModelProto()
        self.proto.CopyFrom(proto)
        self.answers = tuple(answers)
        graph = self.proto.graph
        self.image = graph.input[0]
        self._constants = {item.name: item for item in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output if name}
        self._order = {id(node): index for index, node in enumerate(graph.node)}
        self._types = _types(self.proto)
        self._values = self._sees_image()
        self.nodes = self._divide()
        self.carried = self._crossing()

    def stage(self, index: int) -> onnx.ModelProto:
        """The file of one stage.

        Returns:
            a graph that takes `images`, or the carried values it reads, and gives `logits` and the carried values that
            later stages read and that it computes.

        Raises:
            ExportError: the file is not valid ONNX.
        """
        nodes = self.nodes[index]
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in node.input}
        taken = [name for name in self.carried if name in read and name not in made]
        given = [name for name in self.carried if name in made]
        inputs = [self.image] if index == 0 else [self._info(name) for name in taken]
        if index and not taken:
            raise ExportError(
                f"stage {index + 1} of {self.proto.graph.name} reads nothing of the stages before it"
            )
        batch = inputs[0].name
        repeated = self._shapes(nodes, made | {item.name for item in inputs}, batch)
        body = [*repeated, *(_copy(node) for node in nodes)]
        answer = self.answers[index]
        outputs = [self._info(answer), *(self._info(name) for name in given if name != answer)]
        names = {name: CARRIED + name for name in self.carried} | {answer: LOGITS}
        if index == 0:
            names.pop(self.image.name, None)
        if index == 0 and self.image.name in self.carried:
            body.append(helper.make_node("Identity", [self.image.name], [CARRIED + self.image.name]))
            outputs.append(_renamed(self.image, CARRIED + self.image.name))
        if answer in given:  # an answer that is read on keeps both names
            body.append(helper.make_node("Identity", [answer], [CARRIED + answer]))
            outputs.append(_renamed(self._info(answer), CARRIED + answer))
        return self._model(body, inputs, outputs, names)

    def shape_nodes(self, index: int, known: set[str]) -> list[onnx.NodeProto]:
        """What computes shapes for a stage that stands in one graph with the others, but for what is `known` there."""
        made = {name for node in self.nodes[index] for name in node.output}
        return self._shapes(self.nodes[index], made | known, self.image.name)

    def _model(
        self,
        body: list[onnx.NodeProto],
        inputs: list[onnx.ValueInfoProto],
        outputs: list[onnx.ValueInfoProto],
        names: Mapping[str, str],
    ) -> onnx.ModelProto:
        for node in body:
            _rename(node, names)
        used = {name for node in body for name in node.input}
        graph = helper.make_graph(
            body,
            self.proto.graph.name,
            [_renamed(item, names.get(item.name, item.name)) for item in inputs],
            [_renamed(item, names.get(item.name, item.name)) for item in outputs],
            [item for item in self.proto.graph.initializer if item.name in used],
        )
        model = helper.make_model(
            graph, opset_imports=list(self.proto.opset_import), ir_version=self.proto.ir_version
        )
        model.producer_name, model.producer_version = self.proto.producer_name, self.proto.producer_version
        model.metadata_props.extend(self.proto.metadata_props)
        check(model)
        return model

    def _sees_image(self) -> set[str]:
        """Values that depend on the pixels, and not only on how many images there are."""
        seen = {self.image.name}
        for node in self.proto.graph.node:
            if node.op_type not in ("Shape", "Size") and not seen.isdisjoint(node.input):
                seen.update(node.output)
        return seen

    def _divide(self) -> list[list[onnx.NodeProto]]:
        taken: set[int] = set()
        stages = []
        for answer in self.answers:
            if answer not in self._makers:
                raise ExportError(f"{self.proto.graph.name} has no answer {answer!r} to cut at")
            needed = [node for node in self._ancestors(answer) if id(node) not in taken]
            taken |= {id(node) for node in needed}
            stages.append(sorted(needed, key=lambda node: self._order[id(node)]))
        return stages

    def _ancestors(self, name: str) -> list[onnx.NodeProto]:
        """Nodes that compute pixels' values for `name`; shape computations are added by `_shapes`."""
        found: dict[int, onnx.NodeProto] = {}
        waiting = [name]
        while waiting:
            node = self._makers.get(waiting.pop())
            if node is None or id(node) in found or self._values.isdisjoint(node.output):
                continue
            found[id(node)] = node
            waiting += node.input
        return list(found.values())

    def _crossing(self) -> tuple[str, ...]:
        """Values that a later stage reads, in the order they are computed."""
        made_in = {
            name: index for index, nodes in enumerate(self.nodes) for node in nodes for name in node.output
        }
        crossing = {
            name: None
            for index, nodes in enumerate(self.nodes)
            for node in nodes
            for name in node.input
            if name in self._values and made_in.get(name, 0) < index
        }
        for name in crossing:
            shape = self._types[name].tensor_type.shape.dim if name in self._types else []
            if not shape or shape[0].dim_param != self.image.type.tensor_type.shape.dim[0].dim_param:
                raise ExportError(
                    f"{self.proto.graph.name} cannot be cut: {name} flows over a cut and its first "
                    f"dimension is not the "
                    "batch; leave the network behind another block"
                )
        return tuple(sorted(crossing, key=lambda name: self._order.get(id(self._makers.get(name)), -1)))

    def _shapes(
        self, nodes: Sequence[onnx.NodeProto], available: set[str], batch: str
    ) -> list[onnx.NodeProto]:
        """Copies of the nodes that compute shapes for `nodes`, reading the batch size from `batch`."""
        found: dict[int, onnx.NodeProto] = {}
        waiting = [name for node in nodes for name in node.input]
        while waiting:
            name = waiting.pop()
            node = self._makers.get(name)
            if node is None or name in self._values or name in available or id(node) in found:
                continue
            found[id(node)] = node
            if node.op_type not in ("Shape", "Size"):
                waiting += node.input
        ordered = sorted(found.values(), key=lambda node: self._order[id(node)])
        # A shape may be that of a value computed in this very stage, so such a copy comes where its input is known:
        # all shapes are read off the stage's first input instead, whose batch is the same.
        return [copied for node in ordered for copied in self._from_batch(node, batch)]

    def _from_batch(self, node: onnx.NodeProto, batch: str) -> list[onnx.NodeProto]:
        if node.op_type not in ("Shape", "Size"):
            return [_copy(node)]
        source, output = node.input[0], node.output[0]
        dims = list(self._types[source].tensor_type.shape.dim) if source in self._types else []
        symbol = self.image.type.tensor_type.shape.dim[0].dim_param
        attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        chosen = dims[attributes.get("start", 0) : attributes.get("end", len(dims))]
        if (
            node.op_type == "Size"
            or not dims
            or any(
                dim.dim_param != symbol if dim.dim_param else not dim.HasField("dim_value") for dim in chosen
            )
        ):
            raise ExportError(
                f"{self.proto.graph.name} cannot be cut: the shape of {source} is not known but for the batch"
            )
        parts, found = [], []
        for position, dim in enumerate(chosen):
            name = f"{output}:{position}"
            parts.append(name)
            if dim.dim_param:
                found.append(helper.make_node("Shape", [batch], [name], start=0, end=1))
            else:
                value = helper.make_tensor(name, TensorProto.INT64, [1], [dim.dim_value])
                found.append(helper.make_node("Constant", [], [name], value=value))
        return [*found, helper.make_node("Concat", parts, [output], axis=0)]

    def _info(self, name: str) -> onnx.ValueInfoProto:
        return onnx.ValueInfoProto(name=name, type=self._types[name])


def check(model: onnx.ModelProto) -> None:
    """
    Raises:
        ExportError: the graph is not valid ONNX.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{model.graph.name}: a stage is not valid ONNX: {first_line(error)}") from error


def _types(proto: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    items = (*inferred.value_info, *inferred.input, *inferred.output, *proto.graph.value_info)
    return {item.name: item.type for item in items}


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    return copied


def _rename(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    for values in (node.input, node.output):
        for index, name in enumerate(values):
            values[index] = names.get(name, name)


def _renamed(item: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    return onnx.ValueInfoProto(name=name, type=item.type)
