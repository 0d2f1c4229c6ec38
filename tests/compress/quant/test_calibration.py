"""Calibration images: which are drawn, in which order they are seen, and everything that can be wrong with them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import cveff
from cveff import model_zoo
from cveff.compress.quant.fake_quant import FakeQuantize
from cveff.compress.quant.float8 import to_float8
from cveff.compress.quant.half import to_half
from cveff.compress.quant.network import QuantizedGraph
from cveff.compress.quant.post_training import PostTraining, Quantized
from cveff.compress.quant.settle import divided
from cveff.compress.quantize import Quantize
from cveff.compress.samples import calibration_batches, mixed, samples
from cveff.data import Data, MemorySplit, load
from cveff.errors import DataError, InputSizeError, StepError
from cveff.model import Model, with_module
from cveff.progress import Silent
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(8, 8), channels=1, mean=(0.0,), std=(1.0,))


class Heard(Silent):
    """What was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


class Net(nn.Module):
    """Two convolutions and a linear layer; what is between the first two can be chosen."""

    def __init__(self, between: Any = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(self.between(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def quantized(
    images: list[Tensor], net: nn.Module | None = None, **settings: Any
) -> tuple[Quantized, list[str]]:
    heard = Heard()
    work = PostTraining(
        progress=heard, **{"method": "minmax", "weights": "nearest", "equalize": False, **settings}
    )
    return work.quantize((net or Net()).eval(), SPEC, images), heard.lines


def split_of(counts: list[int]) -> MemorySplit:
    """One image an index, its pixels all of the index's value, class by class as folders stand."""
    targets = np.repeat(np.arange(len(counts)), counts)
    images = np.broadcast_to(
        np.arange(len(targets), dtype=np.uint8)[:, None, None, None], (len(targets), 8, 8, 1)
    )
    return MemorySplit("train", np.ascontiguousarray(images), targets)


@pytest.mark.parametrize(
    ("counts", "wanted", "expected"),
    [
        ([20, 20, 20], 12, [4, 4, 4]),
        ([60, 40, 3], 21, [9, 9, 3]),  # one class is much smaller: it gives all it has
        ([2, 2, 2, 2, 2], 3, None),  # more classes than images
        ([3, 4], 100, [3, 4]),
    ],
)
def test_classes_give_equally_many_images(counts: list[int], wanted: int, expected: list[int] | None) -> None:
    split = split_of(counts)

    def drawn(seed: int) -> list[int]:
        batches = calibration_batches(split, SPEC, wanted, batch_size=4, seed=seed)
        return [round(float(value) * 255) for value in torch.cat(batches)[:, 0, 0, 0]]

    first = drawn(0)
    assert len(set(first)) == len(first) == min(wanted, sum(counts)), "no image twice"
    found = np.bincount(split.class_indices()[first], minlength=len(counts))
    assert found.tolist() == expected if expected else found.max() == 1
    assert first == drawn(0)
    assert first != drawn(1)


def test_any_stretch_of_the_images_holds_all_classes() -> None:
    """A folder's images stand class by class: ranges must not settle on the first, nor choices be made by the last."""
    split = split_of([64] * 3)
    batches = calibration_batches(split, SPEC, 192, batch_size=48, seed=0)
    assert [len(batch) for batch in batches] == [48] * 4
    for batch in batches:
        classes = split.class_indices()[(batch[:, 0, 0, 0] * 255).round().long().numpy()]
        assert np.bincount(classes, minlength=3).min() >= 8
    plain = torch.cat([images for images, _ in samples(split, SPEC, 192)])
    order = torch.cat(batches)[:, 0, 0, 0].argsort()
    assert torch.equal(torch.cat(batches)[order], plain), "the same images"
    assert torch.equal(torch.cat(mixed(plain, 48, 0)), torch.cat(batches))


def test_a_handful_of_images_is_divided_and_many_are_not() -> None:
    assert [len(part) for part in divided([pictures(16)])] == [2] * 8
    assert [len(part) for part in divided([pictures(1)])] == [1]
    assert [len(part) for part in divided([pictures(100), pictures(100)])] == [100, 100]


def test_nothing_is_calibrated_on_the_images_that_choices_are_made_by() -> None:
    calm, loud = pictures(96), 50 * pictures(32, seed=1)
    found, _ = quantized([*calm.split(32), loud])
    assert float(found.roundings.tensors["input"].scale) == pytest.approx(float(calm.max()) / 255)
    assert found.seen.images == 96
    assert found.error > 0.3, "the error is that of the loud images, which are clipped"


def test_labels_are_not_needed(tmp_path: Path) -> None:
    """The same images give the same network from a split without labels and from a folder of files."""
    digits, model = load("digits"), model_zoo.load("digits")
    pixels = first_images(digits, 40)
    for index, image in enumerate(pixels):
        Image.fromarray(image[:, :, 0]).save(tmp_path / f"{index:03}.png")
    split = MemorySplit("images", pixels, None)
    step = Quantize(images=40, weights="nearest")
    heard = Heard()
    by_data = cveff.apply(model, step, data=Data("mine", model.spec.labels, split, split), seed=3)
    by_folder = cveff.apply(model, dataclasses.replace(step, calibration=tmp_path), seed=3, progress=heard)
    states = [item.module.state_dict() for item in (by_data, by_folder)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(line.startswith("warning: 40 calibration images are few") for line in heard.lines)


def first_images(data: Data, count: int) -> np.ndarray:
    images, _ = next(iter(data.val.evaluation_batches(model_zoo.load("digits").spec.input, count)))
    return images


@pytest.mark.parametrize("precision", ["int8", "fp16", "fp8"])
def test_tensors_that_do_not_fit_are_refused_before_any_work(precision: str) -> None:
    def call(batches: list[Tensor]) -> object:
        net = Net().eval()
        if precision == "int8":
            return PostTraining().quantize(net, SPEC, batches)
        return to_half(net, SPEC, batches) if precision == "fp16" else to_float8(net, SPEC, batches)

    with pytest.raises(StepError, match=r"is 4×1×16×16, the network takes N×1×8×8"):
        call([pictures(4), torch.rand(4, 1, 16, 16)])
    with pytest.raises(StepError, match=r"is 4×3×8×8, the network takes N×1×8×8"):
        call([torch.rand(4, 3, 8, 8)])
    with pytest.raises(StepError, match=r"are torch\.uint8; normalise them"):
        call([torch.zeros(4, 1, 8, 8, dtype=torch.uint8)])
    broken = pictures(4)
    broken[2, 0, 3, 3] = torch.nan
    with pytest.raises(StepError, match="calibration image 6 holds NaN"):
        call([pictures(4), broken])
    for nothing in ([], [pictures(0)]):
        with pytest.raises(StepError, match="there are no calibration images"):
            call(nothing)


def test_an_empty_batch_among_others_is_no_image() -> None:
    found, _ = quantized([pictures(64), pictures(0), pictures(64, seed=1)])
    assert found.seen.images == 64


def test_images_of_the_wrong_size_in_a_folder_are_named(tmp_path: Path) -> None:
    for name, size in (("good", 8), ("small", 5)):
        Image.fromarray(np.full((size, size), 90, np.uint8)).save(tmp_path / f"{name}.png")
    with pytest.raises(InputSizeError, match=r"5×5.*small.png|small.png.*5×5"):
        cveff.apply(model_zoo.load("digits"), Quantize(calibration=tmp_path))


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    model = model_zoo.load("digits")
    with pytest.raises(StepError, match="absent is not a folder"):
        cveff.apply(model, Quantize(calibration=tmp_path / "absent"))
    with pytest.raises(DataError, match="holds no images"):
        cveff.apply(model, Quantize(calibration=tmp_path))
    with pytest.raises(StepError, match=r"Quantize needs data; pass data=.*calibration=FOLDER"):
        cveff.apply(model, Quantize())
    digits = load("digits")
    with pytest.raises(StepError, match="has no training images to calibrate with"):
        cveff.apply(model, Quantize(), data=dataclasses.replace(digits, train=None))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_constant_images_give_usable_steps_and_are_said(value: float, tmp_path: Path) -> None:
    model = model_zoo.load("digits")
    spec = dataclasses.replace(model.spec.input, mean=(0.0,), std=(1.0,))
    heard = Heard()
    found = PostTraining(progress=heard).quantize(model.module, spec, [torch.full((16, 1, 8, 8), value)] * 8)
    steps = [part.scale for part in found.graph.modules() if isinstance(part, FakeQuantize)]
    assert all(bool((step >= 1e-8).all() and torch.isfinite(step).all()) for step in steps)
    assert "input" in found.seen.unmoved
    said = [line for line in heard.lines if "never moved on the calibration images" in line]
    assert len(said) == 1 and "input" in said[0]
    rounded = with_module(
        Model(dataclasses.replace(model.spec, input=spec), model.module),
        found.graph,
        QuantizedGraph.of(spec, found.placement),
    )
    cveff.export(
        rounded, tmp_path / "constant.onnx"
    )  # no scale of 0 and no bias beyond 32 bits: it is compared


def test_tensors_that_move_are_not_said_to_stand_still() -> None:
    found, lines = quantized([pictures(128)] * 2)
    assert found.seen.unmoved == () and lines == []


@pytest.mark.parametrize("equalize", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda net: net.conv2.weight[0, 0].fill_(float("nan")), "parameter conv2.weight holds NaN"),
        (lambda net: net.conv2.weight.fill_(3e38), "conv2:conv2d:0 computes NaN or infinity"),
        (lambda net: net.fc.weight.fill_(3e38), "fc:linear:0 computes NaN or infinity"),
    ],
)
def test_the_layer_that_overflows_is_named(damage: Any, message: str, equalize: bool) -> None:
    net = Net(lambda x: torch.relu(x) * 100)
    with torch.no_grad():
        damage(net)
    with pytest.raises(StepError, match=message):
        quantized([pictures(8)] * 16, net, equalize=equalize)


def test_an_overflow_that_the_logits_hide_is_named() -> None:
    """The sigmoid of infinity is 1: the answers are numbers."""
    net = Net(lambda x: torch.sigmoid(x.abs() * 1e30 * 1e30))
    with pytest.raises(StepError, match=r"^:mul:1 computes NaN or infinity"):
        quantized([pictures(8)] * 16, net)


def test_too_few_images_are_said_with_how_far_ranges_moved() -> None:
    quiet, loud = 0.1 * pictures(6), pictures(2, seed=1)
    found, lines = quantized([torch.cat([quiet[:3], loud, quiet[3:]])])
    assert found.seen.moved is not None and found.seen.moved > 0.5
    (line,) = [line for line in lines if "few" in line]
    assert line.startswith("warning: 8 calibration images are few: the range of ")
    assert f"moved by {100 * found.seen.moved:.0f}% of its width" in line
    _, lines = quantized([pictures(1)])
    assert any("1 calibration image is few: there is no second half" in line for line in lines)


def test_an_unknown_operator_is_answered_with_those_that_come_close() -> None:
    for name, expected in (
        ("conv2", r"'conv2' is no operator of this network; did you mean 'conv2:conv2d:0'\?"),
        ("conv2:conv2:0", "did you mean 'conv2:conv2d:0'"),
        ("zzz", "'zzz' is no operator of this network; one is 'conv1:conv2d:0'"),
    ):
        with pytest.raises(StepError, match=expected):
            quantized([pictures(8)], exclude=(name,))
    found, _ = quantized([pictures(8)], exclude=("conv2:conv2d:0",))
    assert [site.reader for site in found.placement.weights] == ["conv1:conv2d:0", "fc:linear:0"]


def test_what_was_found_out_is_told() -> None:
    model, data = model_zoo.load("digits"), load("digits")
    run = cveff.steps.Run(data=data)
    for precision, images, method, has_error in (("int8", 48, "minmax", True), ("fp16", 64, None, False)):
        _, found = Quantize(precision=precision, images=64, method="minmax", weights="nearest").quantized(
            model, run
        )  # type: ignore[arg-type]
        assert (found.source, found.images, found.method) == ("train", images, method)
        assert (found.error is not None) == has_error
