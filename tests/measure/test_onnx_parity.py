"""Layer parity finds a damaged layer; the meaning of an int8 file against the engine's answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from cveff.errors import CveffError, EngineError
from cveff.measure import first_large_difference, layer_parity, meaning_gap
from cveff.measure._onnx_graph import Exposed, Graph

GraphFile = Callable[..., Path]


def test_a_file_equals_itself_in_every_layer(graph_file: GraphFile, images: np.ndarray) -> None:
    layers = layer_parity(graph_file(), graph_file(), images, threads=1)
    assert [layer.name for layer in layers] == [
        *("permuted", "cast", "scaled", "conv1", "relu1", "conv2", "relu2", "conv3", "pool", "flat", "logits")
    ]
    assert all(layer.relative_difference == 0 and layer.cosine == 1 for layer in layers)


@pytest.mark.parametrize("damaged", ["conv1", "conv2", "conv3", "logits"])
def test_the_damaged_layer_is_the_first_that_differs(
    graph_file: GraphFile, images: np.ndarray, damaged: str
) -> None:
    layers = layer_parity(graph_file(), graph_file(damage=damaged), images, threads=1)
    found = first_large_difference(layers, 1e-5)
    assert found is not None
    assert found.name == damaged
    names = [layer.name for layer in layers]
    assert all(layer.relative_difference == 0 for layer in layers[: names.index(damaged)])


@pytest.mark.parametrize("graph_optimizations", [False, True])
def test_int8_layers_are_found_and_close(
    graph_file: GraphFile, int8_file: Path, images: np.ndarray, graph_optimizations: bool
) -> None:
    layers = layer_parity(graph_file(), int8_file, images, graph_optimizations=graph_optimizations, threads=1)
    names = {layer.name for layer in layers}
    # The quantizer folds each ReLU into its convolution's zero point: the ReLU's output is what is left.
    assert {"relu1", "relu2", "conv3", "logits"} <= names
    assert not {"conv1", "conv2"} & names
    assert all(layer.relative_difference < 0.2 and layer.cosine > 0.99 for layer in layers)
    assert any(layer.relative_difference > 0 for layer in layers)


def test_int8_made_from_a_damaged_file_is_traced_to_the_damage(
    graph_file: GraphFile, int8_file: Path, images: np.ndarray
) -> None:
    found = first_large_difference(
        layer_parity(graph_file(damage="conv2"), int8_file, images, threads=1), 0.3
    )
    assert found is not None
    assert found.name == "relu2"


def test_restored_integers_equal_the_files_own_dequantization(int8_file: Path, images: np.ndarray) -> None:
    graph = Graph(int8_file)
    restored = {
        node.input[0]: node.output[0] for node in graph.model.graph.node if node.op_type == "DequantizeLinear"
    }
    twins = [twin for twin in graph.quantized.values() if twin.tensor in restored]
    assert len(twins) >= 5
    names = [twin.tensor for twin in twins] + [restored[twin.tensor] for twin in twins]
    values = Exposed(graph, names, graph_optimizations=False, threads=1).run(images)
    for twin in twins:
        np.testing.assert_array_equal(twin.dequantize(values[twin.tensor]), values[restored[twin.tensor]])


def test_watching_stored_integers_does_not_change_the_engines_answers(
    int8_file: Path, images: np.ndarray
) -> None:
    graph = Graph(int8_file)
    plain = Exposed(graph, (), graph_optimizations=True, threads=1)
    watched = Exposed(graph, graph.watchable(), graph_optimizations=True, threads=1)
    np.testing.assert_array_equal(plain.run(images)["logits"], watched.run(images)["logits"])


def test_meaning_gap_of_an_int8_file(int8_file: Path, images: np.ndarray) -> None:
    gap = meaning_gap(int8_file, images, threads=1)
    # How large it is depends on the processor; that it is measured in every stored layer does not.
    assert gap.layers_are_exact
    assert {"relu1", "relu2"} & {layer.name for layer in gap.layers} or len(gap.layers) >= 5
    assert gap.num_images == len(images)
    assert 0 <= gap.agreement <= 1
    json.dumps(gap.to_json())


def test_a_float_file_means_what_the_engine_says(graph_file: GraphFile, images: np.ndarray) -> None:
    gap = meaning_gap(graph_file(), images, threads=1)
    assert gap.layers == ()
    assert gap.agreement == 1.0
    assert gap.relative_difference < 1e-5


def test_files_without_a_common_tensor_are_refused(
    graph_file: GraphFile, images: np.ndarray, tmp_path: Path
) -> None:
    model = onnx.load(str(graph_file(prefix="other_")))
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
    model.graph.output[0].name = "scores"
    onnx.save(model, str(tmp_path / "renamed.onnx"))
    with pytest.raises(CveffError, match="no tensor name in common"):
        layer_parity(graph_file(), tmp_path / "renamed.onnx", images, threads=1)


def test_unreadable_and_missing_files(graph_file: GraphFile, images: np.ndarray, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(graph_file().read_bytes()[:200])
    with pytest.raises(EngineError, match="not a readable ONNX file"):
        layer_parity(graph_file(), damaged, images, threads=1)
    with pytest.raises(EngineError, match="does not exist"):
        meaning_gap(tmp_path / "none.onnx", images, threads=1)


def test_images_of_the_wrong_size_and_none_at_all(graph_file: GraphFile, images: np.ndarray) -> None:
    with pytest.raises(EngineError, match="failed on"):
        layer_parity(graph_file(), graph_file(), images[:, :5], threads=1)
    with pytest.raises(CveffError, match="no images"):
        layer_parity(graph_file(), graph_file(), images[:0], threads=1)
