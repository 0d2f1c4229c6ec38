"""The number format a network is trained in."""

from __future__ import annotations

import torch

from cveff.errors import TrainingError
from cveff.runtime.machine import describe

_BF16_ISA = ("avx512_bf16", "amx_bf16", "bf16")


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `Train.precision` on `device`.

    Raises:
        TrainingError: fp16 on the CPU, which has none.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if set(describe()["isa"]) & set(_BF16_ISA) else torch.float32
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name == "fp16" and device.type == "cpu":
        raise TrainingError(
            "train.precision is 'fp16' and the device is the CPU, which has none; use 'auto' or 'bf16'"
        )
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
