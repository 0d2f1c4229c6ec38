"""Images on which a network computes values far past those of others are found, in windows and shared layers too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cveff.compress.odd_images import FEWEST, Reaches, odd_images, usual
from cveff.compress.quant.calibration_images import odd_images as odd_of_graph
from cveff.compress.quant.capture import capture
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(8, 8), channels=1, mean=(0.0,), std=(1.0,))


class Windows(nn.Module):
    """As Swin: its layers see (images · windows, positions, channels); one of them is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(1, 8, 2, 2)
        self.twice, self.once, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)  # (N, 8, 4, 4)
        x = x.reshape(-1, 8, 2, 2, 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, 8)
        x = self.once(self.twice(self.twice(x).relu()))
        return self.head(x.reshape(-1, 16, 8).mean(1))


def images(count: int, loud: tuple[int, ...] = ()) -> Tensor:
    found = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    found[list(loud)] *= 200
    return found


@pytest.mark.parametrize("loud", [(), (3, 77)])
def test_odd_images_are_found_in_windows(loud: tuple[int, ...]) -> None:
    module, batches = Windows().eval(), images(100, loud).split(32)
    assert odd_images(module, [(part, None) for part in batches]).nonzero().flatten().tolist() == list(loud)
    assert odd_of_graph(capture(module, SPEC), batches).nonzero().flatten().tolist() == list(loud)
    assert not any(part._forward_pre_hooks for part in module.modules()), "it leaves no hooks behind"


def test_few_images_and_values_that_are_of_no_image_tell_nothing() -> None:
    few = Reaches([FEWEST - 1])
    few.look("a", torch.ones(FEWEST - 1, 4), 0)
    assert not few.odd().any()
    reaches = Reaches([20, 10])
    for name in ("a", "b"):
        reaches.look(name, torch.cat([torch.ones(19, 2), torch.full((1, 2), 50.0)]), 0)
        reaches.look(name, torch.ones(10, 2), 1)
    reaches.look("positions", torch.ones(7, 3), 0)
    assert reaches.odd().nonzero().flatten().tolist() == [19]


def test_the_usual_keep_their_order_and_their_classes() -> None:
    batches = [(part, torch.arange(2) + 2 * index) for index, part in enumerate(images(6).split(2))]
    kept = usual(batches, torch.tensor([False, True, True, True, False, False]))
    assert [len(part) for part, _ in kept] == [1, 2], "an empty batch goes"
    assert torch.equal(torch.cat([part for part, _ in kept]), images(6)[[0, 4, 5]])
    assert torch.cat([classes for _, classes in kept if classes is not None]).tolist() == [0, 4, 5]
    assert usual([(images(2), None)], torch.tensor([True, False]))[0][1] is None
