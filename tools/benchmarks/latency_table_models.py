"""The networks that `latency_table.py` measures, with random weights: times do not depend on them."""

from __future__ import annotations

from typing import Any

import torch

import cveff
from cveff.backbones import Reparameterize, has_branches
from cveff.model import Model

MODELS = (
    "mobilenetv3_small_100",
    "mobilenetv3_large_100",
    "mobilenetv4_conv_small",
    "mobilenetv2_100",
    "efficientnet_lite0",
    "efficientnet_b0",
    "tinynet_b",
    "mnasnet_100",
    "hardcorenas_a",
    "lcnet_100",
    "ghostnetv2_100",
    "mobileone_s0",
    "repvgg_a0",
    "repvit_m1",
    "resnet18",
    "resnet34",
    "resnet50",
    "regnetx_004",
    "regnety_002",
    "regnety_004",
    "regnety_008",
    "densenet121",
    "convnext_atto",
    "convnext_femto",
    "starnet_s1",
    "edgenext_xx_small",
    "mobilevitv2_050",
    "fastvit_t8",
    "poolformerv2_s12",
    "efficientformerv2_s0",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "levit_128s",
    "swin_tiny_patch4_window7_224",
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mobilenetv3_small_050": ("mobilenetv3_small_050", {}),
    "lcnet_050": ("lcnet_050", {}),
    "mobilenetv2_050": ("mobilenetv2_050", {}),
    "resnet10t": ("resnet10t", {}),
    "resnet50 slim": ("resnet50", {"base_width": 32}),
    "convnext slim": ("convnext_atto", {"dims": [24, 48, 96, 192]}),
    "vit slim": ("vit_tiny_patch16_224", {"embed_dim": 128, "num_heads": 2, "depth": 8}),
}
QUICK = (
    "mobilenetv3_small_100",
    "lcnet_100",
    "mobilenetv4_conv_small",
    "resnet18",
    "convnext_atto",
    "levit_128s",
)


def build(name: str) -> Model:
    """A model with random weights, its branches merged as `deploy` does."""
    torch.manual_seed(0)
    architecture, given = VARIANTS.get(name, (name, {}))
    model = cveff.create(architecture, **given)
    return cveff.apply(model, Reparameterize(), device="cpu") if has_branches(model.module) else model
