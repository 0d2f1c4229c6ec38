"""Files cut from one export are those that exporting each network writes: the same operators, reading the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import cveff
from cveff.compress.quant.partial import without
from cveff.compress.quant.post_training import PostTraining, Quantized
from cveff.compress.quant.segments import segments
from cveff.export import timer as timer_module
from cveff.export.float_parts import FloatParts
from cveff.export.onnx import export
from cveff.export.timer import EngineTimer
from cveff.model import Model
from cveff.runtime.engines import open_file
from cveff.target import Target

WORK = PostTraining(weights="nearest", method="minmax", equalize=False, correction="none")


class Forked(nn.Module):
    """Logits are what is returned and what is read on; a tensor has several readers, and a linear has no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = torch.cat([x + self.second(x), x.mul(x.sigmoid())], 1)
        logits = self.head(y.mean((2, 3)))
        return logits + logits.sigmoid()


def network(name: str) -> Model:
    if name != "forked":
        return cveff.create(name, num_classes=4, image_size=32)
    model = cveff.create("test_efficientnet", num_classes=4, image_size=32)
    return Model(model.spec, Forked().eval())


def rounded(model: Model) -> tuple[Quantized, list[Quantized]]:
    """`model` rounded throughout, and with each segment in floats."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, *model.spec.input.size)
    found = WORK.quantize(model.module, model.spec.input, list(images.split(8)))
    parts = segments(found.exact, [site.reader for site in found.placement.weights], 4)
    return found, [without(found, part.operators) for part in parts if part.layers]


def operators(path: Path) -> Counter[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """What each operator is, what made its inputs, and what reads its results."""
    graph = onnx.load(path).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    made |= {item.name: "constant" for item in graph.initializer}
    readers: dict[str, list[str]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node.op_type)
    return Counter(
        (
            node.op_type,
            tuple(made.get(name, "none") for name in node.input),
            tuple(sorted(reader for name in node.output for reader in readers[name])),
        )
        for node in graph.node
    )


def steps(path: Path) -> list[bytes]:
    """Scales of every QuantizeLinear."""
    graph = onnx.load(path).graph
    constants = {item.name: item for item in graph.initializer}
    scales = [constants[node.input[1]] for node in graph.node if node.op_type == "QuantizeLinear"]
    return sorted(numpy_helper.to_array(scale).tobytes() for scale in scales)


@pytest.mark.parametrize("name", ["small_resnet_s", "test_vit", "test_efficientnet", "forked"])
def test_a_cut_file_is_the_exported_one(name: str, tmp_path: Path) -> None:
    model = network(name)
    found, parts = rounded(model)
    assert len(parts) > 1
    files = FloatParts(
        model, found, [part.placement for part in parts]
    )  # all: their pairs stand beside one another
    everything = files.write(found.placement, tmp_path / "all.onnx")
    assert operators(everything) == operators(export(found.of(model), tmp_path / "int8.onnx"))
    for part in (parts[0], parts[-1]):
        cut = files.write(part.placement, tmp_path / "cut.onnx")
        exported = export(part.of(model), tmp_path / "exported.onnx", check=False)
        assert operators(cut) == operators(exported) != operators(everything)
        assert steps(cut) == steps(exported)
        with open_file("onnxruntime", cut, threads=1) as session:
            logits = session(np.zeros((2, 32, 32, 3), np.uint8))
        assert logits.shape == (2, 4) and np.isfinite(logits).all()


def test_parts_are_timed_without_being_exported(monkeypatch: pytest.MonkeyPatch, tiny_target: Target) -> None:
    model = network("test_efficientnet")
    found, parts = rounded(model)
    with EngineTimer(tiny_target, seconds=0.05) as timer:
        timer.use_parts(model, found, parts)
        monkeypatch.setattr(timer_module, "export", None)
        times = timer.milliseconds({str(index): part.of(model) for index, part in enumerate(parts)})
    assert len(times) == len(parts) and min(times.values()) > 0
