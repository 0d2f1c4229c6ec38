"""Residual networks for images of 8 to 64 pixels, which timm's ImageNet stems would shrink to nothing.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2: a 3×3 stem at full
resolution, stages of basic blocks, each later stage at half the resolution. Plain 3×3 convolutions, batch
norms and ReLUs: the operators every engine fuses best and int8 keeps most accurate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import register_model
from torch import nn

ARCHITECTURES = ("small_resnet_s", "small_resnet_m")


class ConvNormAct(nn.Module):
    """3×3 convolution, batch norm and, unless `is_linear`, ReLU: (N, in, H, W) → (N, out, H/stride, W/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, is_linear: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.Identity() if is_linear else nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around an identity shortcut: (N, C, H, W) → the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(channels, channels)
        self.conv2 = ConvNormAct(channels, channels, is_linear=True)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x + self.conv2(self.conv1(x)))


class SmallResNet(nn.Module):
    """A residual network of `len(widths)` stages.

    Args:
        widths: channels of each stage; the first is the stem's.
        depths: residual blocks of each stage.
        num_classes: number of logits.
        in_chans: 1 (grey) or 3 (RGB).
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if len(widths) != len(depths):
            raise ValueError(f"{len(widths)} widths were given for {len(depths)} depths; give one a stage")
        self.num_classes = num_classes
        self.num_features = widths[-1]
        self.stem = ConvNormAct(in_chans, widths[0])
        stages: list[nn.Module] = []
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks: list[nn.Module] = [] if index == 0 else [ConvNormAct(widths[index - 1], width, stride=2)]
            stages.append(nn.Sequential(*blocks, *(BasicBlock(width) for _ in range(depth))))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()
        self.pretrained_cfg = {
            "input_size": (in_chans, 32, 32),
            "mean": (0.5,) * in_chans,
            "std": (0.5,) * in_chans,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "classifier": "fc",
        }
        self.default_cfg = self.pretrained_cfg

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) → (N, widths[-1], H / 2**(stages - 1), W / 2**(stages - 1))."""
        return self.stages(self.stem(x))

    def forward_head(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward_features` gives → (N, num_classes) logits."""
        return self.fc(self.drop(self.pool(x).flatten(1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_chans, H, W) float → (N, num_classes) logits."""
        return self.forward_head(self.forward_features(x))


def _small_resnet(pretrained: bool, arguments: dict[str, Any]) -> SmallResNet:
    if pretrained:
        raise RuntimeError("small_resnet has no weights to download; `cveff models` lists trained ones")
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        arguments.pop(name, None)
    return SmallResNet(**arguments)


@register_model
def small_resnet_s(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """84 thousand parameters (grey input, 10 classes)."""
    return _small_resnet(pretrained, {"widths": (16, 32, 48), "depths": (1, 1, 1), **kwargs})


@register_model
def small_resnet_m(pretrained: bool = False, **kwargs: Any) -> SmallResNet:
    """482 thousand parameters (grey input, 10 classes)."""
    return _small_resnet(pretrained, {"widths": (32, 64, 128), "depths": (1, 1, 1), **kwargs})
