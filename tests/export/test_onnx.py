"""Laws of the exported ONNX file: one uint8 input, PyTorch's logits at any batch, nothing half-written."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import cveff
from cveff.errors import CveffError, ExportError
from cveff.export import onnx as subject
from cveff.export.metadata import read_metadata
from cveff.export.normalize import deployable
from cveff.export.onnx import difference, example_images, export
from cveff.export.simplify import fold_scale
from cveff.measure.parity import relative_difference
from cveff.model import Model
from cveff.runtime.engines import open_file
from cveff.runtime.input_spec import InputSpec

ARCHITECTURES = ("small_resnet_s", "test_efficientnet", "test_vit", "test_convnext", "test_byobnet")


def _model(name: str) -> Model:
    torch.manual_seed(0)
    if name == "small_resnet_s":
        model = cveff.create(name, num_classes=5, labels=list("abcdé"), channels=1, image_size=28)
    else:
        model = cveff.create(name, num_classes=5, image_size=64)
    for module in model.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request, tmp_path_factory) -> tuple[Model, Path]:
    model = _model(request.param)
    return model, export(model, tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_logits_equal_pytorchs_at_every_batch(exported):
    model, path = exported
    spec = model.spec.input
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (spec.mean, spec.std))
    with open_file("onnxruntime", path, threads=1) as session:
        for batch in (1, 2, 5):
            images = example_images(batch, model, seed=batch)
            with torch.inference_mode():
                pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float()
                expected = model.module.eval()((pixels / 255 - mean) / std).numpy()
            assert relative_difference(session(images), expected) <= 1e-4


def test_graph_takes_images_and_returns_logits(exported):
    model, path = exported
    graph = onnx.load(path).graph
    (images,), (logits,) = graph.input, graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    dims = images.type.tensor_type.shape.dim
    assert dims[0].dim_param
    assert [dim.dim_value for dim in dims[1:]] == [*model.spec.input.size, model.spec.input.channels]
    assert logits.type.tensor_type.shape.dim[1].dim_value == 5


def test_file_describes_itself_and_names_no_path(exported):
    model, path = exported
    proto = onnx.load(path)
    values = read_metadata(proto)
    assert values == {
        "cveff_version": cveff.__version__,
        "architecture": model.spec.architecture,
        "task": "classification",
        "input": model.spec.input.to_json(),
        "labels": list(model.spec.labels),
    }
    assert InputSpec.from_json(values["input"]) == model.spec.input
    data = path.read_bytes()
    assert any(item.key == "module" for node in proto.graph.node for item in node.metadata_props)
    assert b"stack_trace" not in data
    assert str(Path(cveff.__file__).parent).encode() not in data
    assert b"site-packages" not in data


def test_batch_norms_are_folded_and_pixels_are_only_shifted(exported):
    _, path = exported
    graph = onnx.load(path).graph
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "BatchNormalization":
            assert node.input[0] not in makers or makers[node.input[0]].op_type != "Conv"
    # All of these begin with a convolution, so the scale of the pixels is in its weights.
    (shift,) = [node for node in graph.node if node.op_type == "Sub"]
    assert "Mul" not in {node.op_type for node in graph.node if shift.output[0] in node.input}


def test_export_leaves_the_model_as_it_was(tmp_path):
    model = _model("test_vit")
    model.module.train()
    calls: list[int] = []
    handle = model.module.register_forward_hook(lambda *_: calls.append(1))
    attention = {
        name: module.fused_attn
        for name, module in model.module.named_modules()
        if hasattr(module, "fused_attn")
    }
    before = copy.deepcopy(model.module.state_dict())
    spec = model.spec
    export(model, tmp_path / "model.onnx")
    assert all(module.training for module in model.module.modules())
    assert model.spec is spec
    after = model.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert attention == {
        name: module.fused_attn for name, module in model.module.named_modules() if name in attention
    }
    handle.remove()
    assert len(model.module._forward_hooks) == 0


def test_package_and_function_are_one_verb_that_gives_the_same_bytes(tmp_path):
    model = _model("small_resnet_s")
    assert cveff.export(model, tmp_path / "a.onnx", check=False) == tmp_path / "a.onnx"
    importlib.import_module("cveff.export.bundle")  # binds the room over the verb
    assert cveff.export(model, tmp_path / "b.onnx", check=False) == tmp_path / "b.onnx"
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_zero_padding_means_an_average_pixel(tmp_path):
    """A picture of the mean colour, whole numbers, is zero after normalisation, at the border too."""
    spec = InputSpec(size=(8, 8), channels=3, mean=(0.2, 0.4, 0.6), std=(0.25, 0.5, 0.125))
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Flatten())
    model = Model(dataclasses.replace(_model("small_resnet_s").spec, input=spec), network)
    path = export(model, tmp_path / "model.onnx")
    picture = np.full((1, 8, 8, 3), (51, 102, 153), np.uint8)
    with open_file("onnxruntime", path, threads=1) as session:
        assert np.abs(session(picture)).max() < 1e-5


class _Other(nn.Module):
    """A stem that is not a convolution: the scale of the pixels must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.head = nn.MaxPool2d(4), nn.Linear(7 * 7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.pool(x)).flatten(1))


class _Reused(nn.Module):
    """One kernel reads the pixels and something else: it must not be scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(torch.relu(self.convolution(x))).flatten(1)[:, :5]


@pytest.mark.parametrize("network", [_Other(), _Reused()])
def test_scale_stays_where_it_cannot_be_folded(network, tmp_path):
    model = Model(_model("small_resnet_s").spec, network)
    path = export(model, tmp_path / "model.onnx")
    proto = onnx.load(path)
    assert [node.op_type for node in proto.graph.node][:3] == ["Cast", "Sub", "Mul"]
    assert fold_scale(proto) is False
    images = example_images(2, model)
    with torch.inference_mode(), open_file("onnxruntime", path, threads=1) as session:
        expected = deployable(network, model.spec.input)(torch.from_numpy(images)).numpy()
        assert relative_difference(session(images), expected) <= 1e-5


class _Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class _FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(2, -1)


@pytest.mark.parametrize("inner", [_Branching(), _FixedBatch()])
def test_unexportable_networks_are_named(inner, tmp_path):
    model = Model(_model("small_resnet_s").spec, nn.Sequential(nn.ReLU(), inner))
    with pytest.raises(ExportError, match="small_resnet_s cannot be exported") as caught:
        export(model, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value)
    assert " in 1: " in str(caught.value) or isinstance(inner, _FixedBatch)
    assert list(tmp_path.iterdir()) == []


def test_disagreement_is_refused_with_its_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "difference", lambda *_: 3.21e-3)
    with pytest.raises(ExportError, match=r"3\.21e-03"):
        export(_model("small_resnet_s"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_numbers_are_refused(tmp_path):
    model = _model("small_resnet_s")
    next(model.module.parameters()).data[0] = float("inf")
    with pytest.raises(ExportError, match="not finite"):
        export(model, tmp_path / "model.onnx")


def test_difference_sees_a_changed_weight(tmp_path):
    model = _model("small_resnet_s")
    path = export(model, tmp_path / "model.onnx")
    changed = copy.deepcopy(model)
    list(changed.module.parameters())[-2].data.mul_(1.01)
    assert difference(path.read_bytes(), deployable(changed.module, model.spec.input), model) > 1e-3


def test_a_graph_that_cannot_be_simplified_is_kept_and_says_so(tmp_path, monkeypatch, caplog):
    def fails(proto):
        raise ExportError("onnxslim cannot simplify the graph: ValueError: odd node")

    monkeypatch.setattr(subject, "simplify", fails)
    path = export(_model("small_resnet_s"), tmp_path / "model.onnx")
    assert "odd node" in read_metadata(onnx.load(path))["unsimplified"]
    assert "odd node" in caplog.text


def test_weights_beyond_two_gigabytes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(subject, "MAX_BYTES", 1000)
    with pytest.raises(ExportError, match="2 GiB"):
        export(_model("small_resnet_s"), tmp_path / "model.onnx")


def test_an_unwritable_destination_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CveffError, match="cannot write"):
        export(_model("small_resnet_s"), tmp_path / "file" / "model.onnx", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_export_is_silent(tmp_path, capfd):
    export(_model("small_resnet_s"), tmp_path / "model.onnx")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
