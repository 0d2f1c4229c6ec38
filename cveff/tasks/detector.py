"""One-stage detectors with their boxes decoded: SSD and RetinaNet without suppression, which is another module's.

Liu et al., "SSD: Single Shot MultiBox Detector" (ECCV 2016); Lin et al., "Focal Loss for Dense Object Detection"
(ICCV 2017). torchvision builds and names the layers, so its state dicts fit.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.func import functional_call
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from cveff.runtime.detections import Suppression

_MAX_LOG_SCALE = math.log(1000 / 16)
"""torchvision's bound on the logarithm of how much larger than its anchor a box may be."""


class AnchorDetector(nn.Module):
    """Backbone, head and box decoding of a torchvision detector, for images of one size.

    Args:
        network: torchvision's, which resizes and normalises its images itself; its backbone and head are used.
        size: (height, width) of the images.

    Attributes:
        anchors: (A, 4) float32, centre x, centre y, width, height in pixels; not in the state dict.
        suppression: how torchvision makes detections of the result.
    """

    anchors: torch.Tensor

    def __init__(self, network: SSD | RetinaNet, size: tuple[int, int]) -> None:
        super().__init__()
        self.backbone, self.head = network.backbone, network.head
        self.size = size
        self.has_background = isinstance(network, SSD)
        self.box_weights: tuple[float, ...] = network.box_coder.weights
        shapes = _feature_shapes(self.backbone, size)
        self.register_buffer("anchors", _anchors(network, shapes, size), persistent=False)
        per_location = network.anchor_generator.num_anchors_per_location()
        self.suppression = Suppression(
            score_threshold=network.score_thresh,
            iou_threshold=network.nms_thresh,
            max_candidates=network.topk_candidates,
            max_detections=network.detections_per_img,
            group_by="class" if self.has_background else "level",
            levels=tuple(
                count * height * width for count, (height, width) in zip(per_location, shapes, strict=True)
            ),
            first_class=1 if self.has_background else 0,
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (N, 3, H, W) float, normalised.

        Returns:
            boxes (N, A, 4): left, top, right, bottom in pixels, inside the image.
            scores (N, A, classes) in [0, 1]: a softmax whose first class is background (SSD), or a sigmoid each.
        """
        outputs = self.head(list(self.backbone(x).values()))
        logits = outputs["cls_logits"]
        scores = logits.softmax(-1) if self.has_background else logits.sigmoid()
        return self.decode(outputs["bbox_regression"]), scores

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Offsets from the anchors, (N, A, 4) of dx, dy, log dw, log dh times `box_weights` -> boxes (N, A, 4)."""
        wx, wy, ww, wh = self.box_weights
        x, y, width, height = self.anchors.unbind(-1)
        center_x = codes[..., 0] / wx * width + x
        center_y = codes[..., 1] / wy * height + y
        half_width = (codes[..., 2] / ww).clamp(max=_MAX_LOG_SCALE).exp() * width / 2
        half_height = (codes[..., 3] / wh).clamp(max=_MAX_LOG_SCALE).exp() * height / 2
        rows, columns = self.size
        left, right = (center_x - half_width).clamp(0, columns), (center_x + half_width).clamp(0, columns)
        top, bottom = (center_y - half_height).clamp(0, rows), (center_y + half_height).clamp(0, rows)
        return torch.stack((left, top, right, bottom), -1)


def _feature_shapes(backbone: nn.Module, size: tuple[int, int]) -> list[tuple[int, int]]:
    """(height, width) of each feature map, computed without computing the features."""
    state = {name: value.to("meta") for name, value in backbone.state_dict().items()}
    was_training = backbone.training
    backbone.eval()
    features = functional_call(backbone, state, (torch.empty(1, 3, *size, device="meta"),))
    backbone.train(was_training)
    return [(value.shape[-2], value.shape[-1]) for value in features.values()]


def _anchors(network: SSD | RetinaNet, shapes: list[tuple[int, int]], size: tuple[int, int]) -> torch.Tensor:
    """torchvision's anchors for one image, as centres and sides: (A, 4) float32."""
    image = ImageList(torch.empty(1, 3, *size), [size])
    (corners,) = network.anchor_generator(image, [torch.empty(1, 1, *shape) for shape in shapes])
    sides = corners[:, 2:] - corners[:, :2]
    return torch.cat((corners[:, :2] + 0.5 * sides, sides), 1)
