"""Non-maximum suppression as a part of the network: static shapes around one operator, which exports as ONNX's own."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.ops import nms

from cveff.runtime.detections import Suppression


@torch.library.custom_op("cveff::suppress", mutates_args=())
def suppress(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, score_threshold: float
) -> torch.Tensor:
    """Greedy suppression of each row of scores by itself.

    Args:
        boxes: (B, M, 4) float32, left, top, right, bottom.
        scores: (B, C, M) float32; what is not above `score_threshold` is suppressed.

    Returns:
        `scores`, 0 where suppressed.
    """
    kept = torch.zeros_like(scores)
    for image in range(scores.shape[0]):
        for row in range(scores.shape[1]):
            (above,) = torch.where(scores[image, row] > score_threshold)
            best = above[nms(boxes[image, above], scores[image, row, above], iou_threshold)]
            kept[image, row, best] = scores[image, row, best]
    return kept


@suppress.register_fake
def _(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, score_threshold: float
) -> torch.Tensor:
    return torch.empty_like(scores)


class Suppressed(nn.Module):
    """A detector that returns detections, as many rows for every image, and what they were made from.

    Args:
        network: (N, 3, H, W) -> boxes (N, A, 4), scores (N, A, classes).
        settings: torchvision's rule for it.
    """

    def __init__(self, network: nn.Module, settings: Suppression) -> None:
        super().__init__()
        self.network, self.settings = network, settings

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x: (N, 3, H, W) float, normalised.

        Returns:
            boxes (N, D, 4), scores (N, D), labels (N, D) int64, most certain first, rows without a detection 0 and
            labelled -1; then the network's own boxes and scores.
        """
        all_boxes, all_scores = self.network(x)
        by_group = self._by_class if self.settings.group_by == "class" else self._by_level
        boxes, scores, labels = by_group(all_boxes, all_scores)
        scores, order = scores.topk(min(self.settings.max_detections, scores.shape[1]))
        is_found = scores > 0
        labels = torch.where(is_found, labels.gather(1, order), -1)
        boxes = torch.where(is_found[..., None], _rows(boxes, order), 0)
        return boxes, scores, labels, all_boxes, all_scores

    def _by_class(
        self, boxes: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(N, M, 4), (N, M), (N, M): the best of each class in turn, scores 0 where suppressed."""
        first, settings = self.settings.first_class, self.settings
        num_classes, num_boxes = scores.shape[2] - first, scores.shape[1]
        count = min(settings.max_candidates, num_boxes)
        best, rows = scores[..., first:].transpose(1, 2).topk(count)  # (N, C, count)
        boxes = _rows(boxes, rows.flatten(1))  # (N, C·count, 4)
        kept = suppress(
            boxes.reshape(-1, count, 4),
            best.reshape(-1, 1, count),
            settings.iou_threshold,
            settings.score_threshold,
        )
        labels = torch.arange(first, first + num_classes).repeat_interleave(count)
        kept = kept.reshape(-1, num_classes * count)
        return boxes, kept, labels[None].expand_as(kept)

    def _by_level(
        self, boxes: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same of each level, whose classes compete for its places."""
        settings, num_classes = self.settings, scores.shape[2]
        values, rows, start = [], [], 0
        for size in settings.levels:
            level = scores[:, start : start + size].flatten(1)
            best, index = level.topk(min(settings.max_candidates, size * num_classes))
            values.append(best)
            rows.append(index + start * num_classes)
            start += size
        best, index = torch.cat(values, 1), torch.cat(rows, 1)  # (N, M)
        labels = index % num_classes
        boxes = _rows(boxes, index // num_classes)
        # A row of scores a class over the same boxes: exact, where moving classes apart would round coordinates.
        is_class = labels[:, None] == torch.arange(num_classes)[:, None]  # (N, C, M)
        kept = suppress(boxes, best[:, None] * is_class, settings.iou_threshold, settings.score_threshold)
        return boxes, kept.amax(1), labels


def _rows(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """values: (N, A, 4), rows: (N, M) -> (N, M, 4)."""
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[2]))
