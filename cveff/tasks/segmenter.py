"""Segmentation networks that return one tensor: LR-ASPP and DeepLab v3, as torchvision builds and names them.

Howard et al., "Searching for MobileNetV3" (ICCV 2019), section 6.4; Chen et al., "Rethinking Atrous Convolution for
Semantic Image Segmentation" (2017).
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models.segmentation import DeepLabV3
from torchvision.models.segmentation.lraspp import LRASPP


class Segmenter(nn.Module):
    """Backbone and classifier of a torchvision segmentation network; its state dicts fit.

    `aux_classifier`, where there is one, is a part of the weights and not of the answer.
    """

    def __init__(self, network: LRASPP | DeepLabV3) -> None:
        super().__init__()
        self.backbone, self.classifier = network.backbone, network.classifier
        self.aux_classifier = getattr(network, "aux_classifier", None)
        self.takes_all_features = isinstance(network, LRASPP)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (N, 3, H, W) float, normalised -> logits (N, classes, H, W), enlarged bilinearly (`align_corners` off)."""
        features = self.backbone(x)
        logits = self.classifier(features if self.takes_all_features else features["out"])
        return nn.functional.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)


class Mask(nn.Module):
    """The most probable class of each pixel: (N, 3, H, W) -> labels (N, H, W) uint8, and the logits they are from."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (N, 3, H, W) float, normalised."""
        logits = self.network(x)
        return logits.argmax(1).to(torch.uint8), logits
