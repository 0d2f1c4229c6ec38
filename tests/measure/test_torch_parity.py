"""Parity by module between a network and its exported file, and by layer with OpenVINO."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from cveff.errors import CveffError, EngineError
from cveff.measure import (
    first_large_difference,
    module_parity,
    openvino_layer_parity,
    read_modules,
    torch_predictor,
    write_modules,
)
from cveff.model import Model, ModelSpec
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


class Block(nn.Module):
    """A residual block whose ReLU runs in place and is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x + self.mix(self.act(self.norm(self.conv(x)))))


class Wrapper(nn.Module):
    """What an exporter wraps around a network: uint8 NHWC in."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(3, 8, 3, padding=1))
    network.add_module("first", Block())
    network.add_module("second", Block())
    network.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return Model(ModelSpec("tiny", {}, SPEC), network.eval())


@pytest.fixture(scope="module")
def file(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torch") / "tiny.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Wrapper(model.module).eval(),
            (torch.from_numpy(IMAGES),),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
    assert program is not None
    program.save(str(path))
    return path


def damaged(model: Model, module: str) -> Model:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.module.get_submodule(module).weight.mul_(1.5)
    return other


def test_a_network_agrees_with_its_file_in_every_module(model: Model, file: Path) -> None:
    layers = module_parity(model, file, IMAGES, threads=1)
    assert max(layer.relative_difference for layer in layers) < 1e-5
    names = [layer.name for layer in layers]
    # conv is fused with its norm, act runs twice: neither has an output of its own in the file.
    for name in ("stem", "first.norm", "first.mix", "first", "second.norm", "second.mix", "second", "head.2"):
        assert name in names
    assert not {"first.conv", "first.act"} & set(names)
    assert names.index("first.norm") < names.index("first") < names.index("second.mix")
    assert {layer.name: layer.op for layer in layers}["first"] == "Block"


@pytest.mark.parametrize("module", ["stem", "first.norm", "first.mix", "second.norm", "head.2"])
def test_the_module_that_changed_is_named(model: Model, file: Path, module: str) -> None:
    found = first_large_difference(module_parity(damaged(model, module), file, IMAGES, threads=1), 1e-3)
    assert found is not None
    assert found.module == module


def test_notes_survive_a_rewrite(model: Model, file: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(file))
    modules = read_modules(proto)
    assert modules["logits"] == "network.head.2"
    for node in proto.graph.node:
        del node.metadata_props[:]
    onnx.save(proto, str(tmp_path / "bare.onnx"))
    assert read_modules(proto) == {}
    write_modules(proto, modules)
    assert read_modules(proto) == modules
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, str(tmp_path / "noted.onnx"))
    noted = module_parity(model, tmp_path / "noted.onnx", IMAGES, threads=1)
    assert noted == module_parity(model, file, IMAGES, threads=1)
    bare = module_parity(model, tmp_path / "bare.onnx", IMAGES, threads=1)
    assert [layer.name for layer in bare] == ["logits"]  # a file that does not say is compared by its logits


def test_no_hook_stays_behind(model: Model, file: Path) -> None:
    module_parity(model, file, IMAGES, threads=1)
    assert all(not module._forward_hooks for module in model.module.modules())


def test_the_logits_compared_are_the_predictors(model: Model, file: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    expected = torch_predictor(model, threads=1)(IMAGES)
    np.testing.assert_allclose(session.run(None, {"images": IMAGES})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def intermediate(file: Path) -> Path:
    openvino = pytest.importorskip("openvino")
    path = file.with_suffix(".xml")
    openvino.save_model(openvino.convert_model(str(file)), str(path), compress_to_fp16=False)
    return path


def test_openvino_agrees_layer_by_layer(file: Path, intermediate: Path) -> None:
    layers = openvino_layer_parity(file, intermediate, IMAGES, threads=1)
    assert len(layers) >= 8
    assert layers[-1].name == "logits"
    assert max(layer.relative_difference for layer in layers) < 1e-4


def test_openvino_damage_is_found(model: Model, file: Path, intermediate: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(file))
    stem = next(node for node in proto.graph.node if node.op_type == "Conv")
    weight = next(item for item in proto.graph.initializer if item.name == stem.input[1])
    weight.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(2), weight.name)
    )
    onnx.save(proto, str(tmp_path / "other.onnx"))
    found = first_large_difference(
        openvino_layer_parity(tmp_path / "other.onnx", intermediate, IMAGES, threads=1), 1e-3
    )
    assert found is not None
    assert found.name == stem.output[0]


def test_openvino_bad_files(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(EngineError, match="does not exist"):
        openvino_layer_parity(file, tmp_path / "none.xml", IMAGES, threads=1)
    (tmp_path / "bad.xml").write_text("<net>")
    with pytest.raises(EngineError, match="OpenVINO cannot open"):
        openvino_layer_parity(file, tmp_path / "bad.xml", IMAGES, threads=1)
    with pytest.raises(CveffError, match="no images"):
        openvino_layer_parity(file, file, IMAGES[:0], threads=1)
