"""Exported detectors and segmentation networks answer as torchvision's own networks do, on photographs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

import cveff
import cveff.runtime
from cveff.errors import BundleError, DataError, EngineError, ExportError, StepError
from cveff.export import task_outputs
from cveff.export.bundle import write_bundle
from cveff.export.metadata import read_metadata
from cveff.export.task_outputs import nms_for
from cveff.measure.detections import agreement
from cveff.model import Model
from cveff.runtime.run import main
from cveff.target import load_target


@pytest.mark.parametrize("nms", ["onnx", "none"])
@pytest.mark.parametrize("kind", ["ssd", "retinanet"])
def test_detections_are_torchvisions(kind: str, nms: str, detector: Any, batch: Any, exported: Any) -> None:
    model, network = detector(kind)
    images = batch(model)
    with torch.inference_mode():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        expected = [{key: value.numpy() for key, value in image.items()} for image in network(list(pixels))]
    assert min(len(image["scores"]) for image in expected) >= 5
    with cveff.runtime.open(exported(kind, nms)) as engine:
        result = agreement(engine.detect(images), expected)
        assert result.share == 1 and result.found == result.expected
        answer = engine(images)
        assert [len(boxes) for boxes in answer["boxes"]] == [len(image["scores"]) for image in expected]
        assert engine.detect(images[:0]) == []


@pytest.mark.parametrize(("nms", "shapes"), [("onnx", [[40, 4], [40], [40]]), ("none", [[792, 4], [792, 5]])])
def test_shapes_are_fixed_but_for_the_batch(nms: str, shapes: list[list[int]], exported: Any) -> None:
    proto = onnx.load(exported("ssd", nms))
    found = [[dim.dim_value for dim in item.type.tensor_type.shape.dim[1:]] for item in proto.graph.output]
    assert found == shapes
    assert all(item.type.tensor_type.shape.dim[0].dim_param for item in proto.graph.output)
    kinds = {node.op_type for node in proto.graph.node}
    assert ("NonMaxSuppression" in kinds) == (nms == "onnx")
    values = read_metadata(proto)
    assert values["task"] == "detection" and values["suppression"]["group_by"] == "class"


@pytest.mark.parametrize("output", ["logits", "labels"])
def test_masks_are_torchvisions(
    output: str, segmenter: tuple[Model, nn.Module], batch: Any, exported: Any
) -> None:
    model, network = segmenter
    images = batch(model)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.spec.input.mean, model.spec.input.std))
    with torch.inference_mode():
        pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
        expected = network(pixels)["out"].argmax(1).numpy()
    assert len(np.unique(expected)) > 1
    with cveff.runtime.open(exported("lraspp", output)) as engine:
        masks = engine.segment(images)
    assert masks.dtype == np.uint8 and (masks == expected).mean() > 0.999


def test_openvino_gives_the_same(exported: Any, detector: Any, batch: Any) -> None:
    pytest.importorskip("openvino")
    from cveff.runtime.engines import open_file

    images = batch(detector("ssd")[0])
    with (
        open_file("onnxruntime", exported("ssd", "none"), threads=1) as one,
        open_file("openvino", exported("ssd", "none"), threads=1) as two,
    ):
        ours, theirs = one.outputs(images), two.outputs(images)
        assert ours.keys() == theirs.keys()
        assert np.abs(ours["scores"] - theirs["scores"]).max() < 1e-4
        assert two.outputs(images[:0])["boxes"].shape == (0, 792, 4)


def test_run_prints_boxes_of_the_photograph(
    exported: Any, tmp_path: Path, photographs: Any, capsys: Any
) -> None:
    path = tmp_path / "astronaut.png"
    Image.fromarray(photographs[0]).save(path)
    assert (
        main([str(exported("ssd", "onnx")), str(path), "--json", "--min-score", "0.6", "--top-k", "3"]) == 0
    )
    (image,) = json.loads(capsys.readouterr().out)["images"]
    found = image["detections"]
    assert 1 <= len(found) <= 3 and all(item["score"] >= 0.6 for item in found)
    boxes = np.array([item["box"] for item in found])
    assert boxes.max() > 96 and boxes.max() <= 512  # in the photograph's pixels, not in the model's
    assert main([str(exported("ssd", "onnx")), str(path), "--min-score", "1"]) == 0
    assert "nothing" in capsys.readouterr().out


def test_run_writes_masks(exported: Any, tmp_path: Path, photographs: Any, capsys: Any) -> None:
    for index in (0, 1):
        (tmp_path / str(index)).mkdir()
        Image.fromarray(photographs[index]).save(tmp_path / str(index) / "photo.png")
    file, masks = str(exported("lraspp", "labels")), tmp_path / "masks"
    assert main([file, str(tmp_path / "0"), str(tmp_path / "1"), "--masks", str(masks), "--json"]) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    assert sorted(path.name for path in masks.iterdir()) == ["photo-2.png", "photo.png"]
    for image, pixels in zip(images, photographs, strict=False):
        mask = np.asarray(Image.open(image["mask"]))
        assert mask.shape == pixels.shape[:2] and mask.max() < 5
        shares = {item["index"]: item["share"] for item in image["classes"]}
        assert sum(shares.values()) == pytest.approx(1)
        assert shares[0] == pytest.approx((mask == 0).mean()) if 0 in shares else not (mask == 0).any()


def test_options_of_another_task_are_refused(
    tmp_path: Path, detector: Any, segmenter: tuple[Model, nn.Module], exported: Any, capsys: Any
) -> None:
    classifier = cveff.create("small_resnet_s", num_classes=3)
    for model, options, words in (
        (classifier, {"nms": "onnx"}, "nms is for detection; small_resnet_s is a classification model"),
        (classifier, {"output": "labels"}, "output is for segmentation"),
        (segmenter[0], {"nms": "none"}, "nms is for detection"),
        (detector("ssd")[0], {"nms": "soft"}, "nms is 'soft'; use one of onnx, none"),
        (segmenter[0], {"output": "colours"}, "output is 'colours'"),
    ):
        with pytest.raises(ExportError, match=words):
            cveff.export(model, tmp_path / "model.onnx", **options)
    assert not (tmp_path / "model.onnx").exists()
    assert main([str(exported("ssd", "onnx")), str(exported("ssd", "onnx")), "--masks", str(tmp_path)]) == 2
    assert "--masks is for segmentation" in capsys.readouterr().err


def test_another_task_is_said(exported: Any, segmenter: tuple[Model, nn.Module], batch: Any) -> None:
    images = batch(segmenter[0])
    with cveff.runtime.open(exported("lraspp", "logits")) as engine:
        with pytest.raises(EngineError, match="only detection models detect"):
            engine.detect(images)
        with pytest.raises(EngineError, match="no class probabilities"):
            engine.logits(images)


@pytest.mark.parametrize(("kind", "option"), [("ssd", "none"), ("ssd", "onnx"), ("lraspp", "logits")])
def test_too_few_labels_are_refused(
    kind: str, option: str, exported: Any, tmp_path: Path, detector: Any, segmenter: Any, batch: Any
) -> None:
    proto = onnx.load(exported(kind, option))
    next(item for item in proto.metadata_props if item.key == "labels").value = json.dumps(["one", "two"])
    onnx.save(proto, tmp_path / "model.onnx")
    model = segmenter[0] if kind == "lraspp" else detector(kind)[0]
    with cveff.runtime.open(tmp_path / "model.onnx") as engine:
        with pytest.raises(BundleError, match="there are 2 labels"):
            engine(batch(model))


def test_a_file_that_says_nothing_or_nonsense_is_refused(exported: Any, tmp_path: Path) -> None:
    for key, value, words in (
        ("task", None, "no task"),
        ("suppression", "{}", "suppression is"),
        ("labels", "[", "its description is damaged"),
        ("input", "3", "its description is damaged"),
    ):
        proto = onnx.load(exported("ssd", "none"))
        item = next(item for item in proto.metadata_props if item.key == key)
        if value is None:
            proto.metadata_props.remove(item)
        else:
            item.value = value
        onnx.save(proto, tmp_path / "model.onnx")
        with pytest.raises(BundleError, match=words):
            cveff.runtime.open(tmp_path / "model.onnx")
    with pytest.raises(EngineError, match="opens with onnxruntime, not 'openvino'"):
        cveff.runtime.open(exported("ssd", "none"), engine="openvino")


def test_a_graph_that_suppresses_otherwise_is_not_written(
    detector: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = detector("ssd", (64, 64))
    rule = task_outputs.suppress
    other = lambda boxes, scores, settings: rule(  # noqa: E731
        boxes, scores, dataclasses.replace(settings, iou_threshold=0.05)
    )
    monkeypatch.setattr(task_outputs, "suppress", other)
    with pytest.raises(ExportError, match="of the ONNX file's detections are what its own"):
        cveff.export(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_where_targets_suppress() -> None:
    target = load_target("edge-cpu")
    assert nms_for(target) == "onnx"
    assert nms_for(dataclasses.replace(target, candidates=(("tensorrt", "fp16"),))) == "none"


def test_steps_are_for_classifiers(detector: Any) -> None:
    from cveff.backbones import FoldBatchNorm

    model, _ = detector("ssd")
    with pytest.raises(StepError, match="tiny_ssd is a detection model; steps are for classification"):
        cveff.apply(model, FoldBatchNorm())


def test_deploy_is_for_classifiers(detector: Any, tmp_path: Path) -> None:
    with pytest.raises(StepError, match=r"deploy is for classification, cveff\.export writes its file"):
        cveff.deploy(detector("ssd")[0], calibration=tmp_path, out=tmp_path / "out")


@pytest.mark.parametrize("nms", ["onnx", "none"])
def test_bench_and_verify_take_detectors(nms: str, detector: Any, exported: Any) -> None:
    model, _ = detector("ssd")
    figures = cveff.bench({"torch": model, "file": exported("ssd", nms)}, rounds=2, memory=False)
    assert [item.name for item in figures] == ["torch", "file"]
    found = cveff.verify(exported("ssd", nms), against=model)
    assert found.ok and found.agreement == 1
    other, _ = detector("retinanet")
    assert not cveff.verify(exported("ssd", nms), against=other).ok
    with pytest.raises(DataError, match="is a detection model"):
        cveff.verify(exported("ssd", nms), data="digits")
    with pytest.raises(DataError, match="is a detection model"):
        cveff.bench(exported("ssd", nms), data="digits", rounds=2, memory=False)


def test_verify_compares_masks_with_logits(segmenter: tuple[Model, nn.Module], exported: Any) -> None:
    for output in ("labels", "logits"):
        found = cveff.verify(exported("lraspp", output), against=segmenter[0])
        assert found.ok and found.agreement is not None and found.agreement > 0.999


def test_a_bundle_of_a_detector_runs(
    exported: Any, tmp_path: Path, manifest_maker: Any, photographs: Any
) -> None:
    values = read_metadata(onnx.load(exported("ssd", "none")))
    keys = ("task", "input", "labels", "suppression")
    manifest = manifest_maker(**{key: values[key] for key in keys})
    bundle = write_bundle(
        tmp_path / "my.bundle",
        manifest=manifest,
        files={"model.onnx": exported("ssd", "none")},
        report_html="<p>figures</p>",
    )
    with cveff.runtime.open(bundle) as engine:
        found = engine.detect(engine.preprocess(photographs))
    assert all(len(image["scores"]) for image in found)
    Image.fromarray(photographs[0]).save(tmp_path / "photo.png")
    command = [sys.executable, str(bundle / "run.py"), str(tmp_path / "photo.png"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(result.stdout)["images"][0]["detections"]
