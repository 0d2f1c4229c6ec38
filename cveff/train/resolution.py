"""Small images first, then larger ones (progressive learning of EfficientNetV2: Tan & Le, arXiv:2104.00298, section 4),
without its growing regularisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.errors import StepError, TrainingError


@dataclass(frozen=True)
class Resolution:
    """Sides of the training images; validation and the model's input stay as they are.

    Attributes:
        start: the first stage's side, as a share of the input's.
        stages: equal parts of the run, each with a larger side; the last has the input's.
    """

    start: float = 0.5
    stages: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.start <= 1:
            raise TrainingError(f"resolution.start is {self.start!r}; give a share of the side in (0, 1]")
        if self.stages < 2:
            raise TrainingError(f"resolution.stages is {self.stages!r}; give 2 or more")

    def sizes(self, size: tuple[int, int], multiple: tuple[int, int]) -> list[tuple[int, int]]:
        """(height, width) of each stage, in multiples of `multiple` but for the last, which is `size`."""
        shares = [
            self.start + (1 - self.start) * stage / (self.stages - 1) for stage in range(self.stages - 1)
        ]
        height, width = (
            [max(step, round(side * share / step) * step) for share in shares]
            for side, step in zip(size, multiple, strict=True)
        )
        return [*zip(height, width, strict=True), size]


class Resizer:
    """Shrinks batches to the present stage's size.

    Args:
        module: tried on every size, in evaluation mode.
        images: (B, C, H, W) float of the full size, on the module's device.
        name: what to call the network.

    Raises:
        StepError: the network takes images of one size only.
    """

    def __init__(self, settings: Resolution, module: nn.Module, images: Tensor, name: str) -> None:
        patch = getattr(getattr(module, "patch_embed", None), "patch_size", (1, 1))
        height, width = images.shape[2:]
        self.sizes = settings.sizes((height, width), patch)
        was_training = module.training
        for size in sorted(set(self.sizes)):
            try:
                with torch.no_grad():
                    module.eval()(shrink(images, size))
            except (RuntimeError, AssertionError, ValueError, IndexError) as error:
                reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
                raise StepError(
                    f"resolution: {name} does not take images of {size[0]}×{size[1]} ({reason}); a ViT does with "
                    "dynamic_img_size = true in [model.arguments]; networks with windows or token-mixing layers of a "
                    "fixed size do not: leave it out for them"
                ) from error
            finally:
                module.train(was_training)

    def size(self, share: float) -> tuple[int, int]:
        """(height, width) once `share` of the run is over."""
        return self.sizes[min(len(self.sizes) - 1, int(share * len(self.sizes)))]


def shrink(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, H, W) to (B, C, *size), averaged where pixels merge; the same tensor where nothing changes."""
    if tuple(images.shape[2:]) == size:
        return images
    smaller = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    return smaller.contiguous(memory_format=torch.channels_last)
