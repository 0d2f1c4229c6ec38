"""Merging branches keeps the function, is replayed at load, and says when there is nothing to merge."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import cveff
from cveff.backbones import FoldBatchNorm, Reparameterize, has_branches
from cveff.errors import StepError
from cveff.model import Model

BRANCHED = ["repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9"]


def settle(model: Model, batches: int = 2) -> Model:
    """Give batch norms statistics of their own, so that folding them is not a no-op."""
    generator = torch.Generator().manual_seed(1)
    spec = model.spec.input
    for module in model.module.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    model.module.train()
    with torch.no_grad():
        for _ in range(batches):
            model.module(torch.randn(4, spec.channels, *spec.size, generator=generator))
    model.module.eval()
    return model


def logits(model: Model) -> torch.Tensor:
    spec = model.spec.input
    images = torch.randn(2, spec.channels, *spec.size, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        return model.module.eval()(images)


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("architecture", BRANCHED)
def test_merged_network_computes_the_same_with_fewer_parameters(architecture: str, tmp_path) -> None:
    model = settle(cveff.create(architecture, num_classes=5, image_size=64))
    before = logits(model)
    merged = cveff.apply(model, Reparameterize())
    assert merged.num_parameters < model.num_parameters
    assert not has_branches(merged.module)
    # Float32 sums in another order; 1e-5 is what the families show.
    assert relative_difference(logits(merged), before) < 1e-4
    assert torch.equal(logits(model), before)  # the old model is untouched

    cveff.save(merged, tmp_path / "merged")
    loaded = cveff.load(tmp_path / "merged")
    assert loaded.spec == merged.spec
    assert torch.equal(logits(loaded), logits(merged))


def test_a_plain_network_has_nothing_to_merge() -> None:
    model = cveff.create("small_resnet_s", num_classes=3, image_size=16)
    with pytest.raises(StepError, match="no branches"):
        cveff.apply(model, Reparameterize())


def test_merging_twice_is_refused() -> None:
    model = cveff.apply(cveff.create("mobileone_s0", num_classes=3, image_size=32), Reparameterize())
    with pytest.raises(StepError, match="merged already"):
        cveff.apply(model, Reparameterize())


@pytest.mark.parametrize(
    "architecture", ["small_resnet_s", "test_resnet", "mobilenetv3_small_050", "tf_efficientnet_lite0"]
)
def test_folded_batch_norms_compute_the_same(architecture: str, tmp_path) -> None:
    model = settle(cveff.create(architecture, num_classes=5, image_size=64))
    before = logits(model)
    folded = cveff.apply(model, FoldBatchNorm())
    norms = [module for module in folded.module.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not norms
    assert relative_difference(logits(folded), before) < 1e-4
    cveff.save(folded, tmp_path / "folded")
    assert torch.equal(logits(cveff.load(tmp_path / "folded")), logits(folded))


def test_folding_needs_a_batch_norm_behind_a_convolution() -> None:
    model = cveff.create("test_vit", num_classes=3)
    with pytest.raises(StepError, match="no batch norm"):
        cveff.apply(model, FoldBatchNorm())


def test_a_convolution_read_twice_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return (self.bn(y) + y).mean((2, 3))

    model = cveff.create("small_resnet_s", num_classes=4, image_size=16)
    with pytest.raises(StepError, match="no batch norm"):
        FoldBatchNorm()(Model(model.spec, Shared()), None)


def test_edits_compose_and_are_kept_in_order() -> None:
    # fastvit's stem and branches merge; batch norms elsewhere stay for the second edit.
    model = settle(cveff.create("fastvit_t8", num_classes=3, image_size=64))
    before = logits(model)
    changed = cveff.apply(model, [Reparameterize(), FoldBatchNorm()])
    assert [edit.kind for edit in changed.spec.edits] == ["reparameterize", "fold_batch_norm"]
    assert relative_difference(logits(changed), before) < 1e-4
    assert copy.deepcopy(changed.spec) == changed.spec


def test_folding_after_merging_may_have_nothing_left() -> None:
    model = cveff.apply(cveff.create("mobileone_s0", num_classes=3, image_size=32), Reparameterize())
    with pytest.raises(StepError, match="no batch norm"):
        cveff.apply(model, FoldBatchNorm())
