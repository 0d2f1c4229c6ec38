"""A few images that reach far past all others must not cost those their steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cveff.compress.odd_images import FEWEST
from cveff.compress.quant.calibration_images import odd_images
from cveff.compress.quant.capture import capture
from cveff.compress.quant.error import relative_error
from cveff.compress.quant.post_training import PostTraining, Quantized
from cveff.progress import Silent
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(8, 8), channels=1, mean=(0.0,), std=(1.0,))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)]
    return nn.Sequential(*layers).eval()


def images(count: int, loud: tuple[int, ...] = (), times: float = 200.0) -> Tensor:
    found = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    found[list(loud)] *= times
    return found


def quantized(batches: list[Tensor], **settings: object) -> tuple[Quantized, list[str]]:
    said: list[str] = []
    progress = Silent()
    progress.message = said.append  # type: ignore[method-assign]
    work = PostTraining(weights="nearest", equalize=False, progress=progress, **settings)  # type: ignore[arg-type]
    return work.quantize(network(), SPEC, batches), said


def test_images_that_reach_far_past_the_others_are_found() -> None:
    exact = capture(network(), SPEC)
    assert odd_images(exact, images(100, (3, 77)).split(32)).nonzero().flatten().tolist() == [3, 77]
    assert not odd_images(exact, images(100).split(32)).any()
    assert not odd_images(exact, images(100, (5,), times=2.0).split(32)).any(), (
        "twice is within what is usual"
    )
    assert not odd_images(exact, images(100, tuple(range(20))).split(32)).any(), "a fifth of them is usual"
    assert not odd_images(exact, images(FEWEST - 1, (3,)).split(8)).any(), "too few to tell"


def test_ranges_are_those_of_the_other_images() -> None:
    held = images(40)
    calm = images(120)
    loud = calm.clone()
    loud[[5, 60]] *= 200
    usual = torch.cat([calm[:5], calm[6:60], calm[61:]])
    expected, said = quantized([usual, held], method="minmax")
    assert expected.left_out == 0 and not said
    found, said = quantized([loud, held], method="minmax")
    assert found.left_out == 2
    assert {name: float(item.scale) for name, item in found.roundings.tensors.items()} == {
        name: float(item.scale) for name, item in expected.roundings.tensors.items()
    }
    assert found.error == pytest.approx(expected.error)
    (line,) = said
    assert line.startswith("2 of 160 calibration images reach far larger values than the others")


def test_all_images_are_used_where_that_is_better() -> None:
    """A fifth of what the choices are made by is loud: then loud images matter."""
    loud = images(120, (5, 60, 100))
    held = images(40, tuple(range(0, 40, 5)))
    found, said = quantized([loud, held], method="minmax")
    assert found.left_out == 0
    assert float(found.roundings.tensors["input"].scale) == pytest.approx(float(loud.max()) / 255)
    assert len(said) == 1


def test_an_image_with_huge_logits_counts_once() -> None:
    exact = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1000.0, -1000.0]])
    assert relative_error(exact, exact) == 0
    other = exact.clone()
    other[2] = 0  # its energy is lost
    assert relative_error(other, exact) == pytest.approx(1 / 3)
    other = exact.clone()
    other[0] = torch.tensor([-1.0, 1.0])  # turned around: four times its energy
    assert relative_error(other, exact) == pytest.approx(4 / 3)
    assert relative_error(exact + 5, exact) == pytest.approx(0, abs=1e-9), (
        "what all classes share changes nothing"
    )
