"""Segments: every layer once, in order, cut where modules meet."""

from __future__ import annotations

import pytest
import timm

from cveff.compress.quant.capture import capture, identify
from cveff.compress.quant.placement import place
from cveff.compress.quant.segments import segments
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(64, 64))


def _cut(name: str, most: int = 12):
    arguments = {"img_size": 64} if name.startswith("vit") else {}
    graph = capture(timm.create_model(name, num_classes=10, **arguments).eval(), SPEC)
    layers = [site.reader for site in place(graph).weights]
    return graph, layers, segments(graph, layers, most)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv4_conv_small", "repvgg_a0"])
def test_stretches_hold_every_operator_once_and_in_order(name: str) -> None:
    graph, layers, found = _cut(name)
    order = {node: index for index, node in enumerate(graph.graph.nodes)}
    nodes = identify(graph)
    names = sorted((other for other in nodes if other != "input"), key=lambda other: order[nodes[other]])
    assert [other for part in found for other in part.operators] == names
    assert sorted(layer for part in found for layer in part.layers) == sorted(layers)
    assert 8 <= len(found) <= 12
    # None holds more than a third of the layers: what is decided of it would be decided of the whole network.
    assert max(len(part.layers) for part in found) <= len(layers) / 3


def test_layers_between_norms_are_cut_by_their_role() -> None:
    _, layers, found = _cut("vit_tiny_patch16_224")
    assert sorted(layer for part in found for layer in part.layers) == sorted(layers)
    for part in found:
        roles = {layer.partition(":")[0].rpartition(".")[2] for layer in part.layers}
        assert len(roles) == 1, part.name
    assert [part.name for part in found if "fc1" in part.name] == [
        "blocks.0.mlp.fc1 … blocks.5.mlp.fc1",
        "blocks.6.mlp.fc1 … blocks.11.mlp.fc1",
    ]


def test_as_few_as_are_asked_for() -> None:
    _, _, found = _cut("resnet18", most=2)
    assert [len(part.layers) for part in found] in ([10, 11], [11, 10], [9, 12], [12, 9])
    assert len(_cut("resnet18", most=1)[2]) == 1
