"""The segmentation network returns torchvision's `out`."""

from __future__ import annotations

import torch
from torch import nn

from cveff.model import Model
from cveff.tasks.segmenter import Mask


def test_logits_are_torchvisions_bit_for_bit(segmenter: tuple[Model, nn.Module]) -> None:
    model, network = segmenter
    images = torch.randn(2, 3, 64, 80)
    with torch.inference_mode():
        logits = model.module(images)
        assert torch.equal(logits, network(images)["out"])
        labels, again = Mask(model.module)(images)
    assert torch.equal(again, logits)
    assert labels.dtype == torch.uint8 and torch.equal(labels, logits.argmax(1).to(torch.uint8))
    assert len(labels.unique()) > 1
