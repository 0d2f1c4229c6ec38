"""State dicts from files: read without running code from them, and loaded strictly."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cveff.errors import CheckpointError
from cveff.runtime.errors import first_line


def load_weights(module: nn.Module, path: str | Path, name: str = "the model") -> None:
    """Load a state dict file into `module`, strictly.

    Args:
        path: `.safetensors`, or a pickle read with `weights_only=True`; a dict under "state_dict" or "model"
            is unwrapped and a "module." prefix removed.
        name: what to call the architecture in an error.

    Raises:
        CheckpointError: missing or damaged file, or tensors that do not fit; the first few are named.
    """
    state = read_state(path)
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unexpected or wrong:
        parts = [
            f"{len(values)} {what} ({', '.join(values[:3])}{', …' if len(values) > 3 else ''})"
            for what, values in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", wrong),
            )
            if values
        ]
        raise CheckpointError(
            f"{path} does not fit {name}: tensors {'; '.join(parts)}. Check the architecture's name, "
            "num_classes, channels and image size"
        )
    module.load_state_dict(state, strict=True)


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a state dict without running any code from it; see `load_weights`."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"weights file {path} does not exist; check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated ({first_line(error)}); copy it again"
        ) from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise CheckpointError(
            f"{path} is not a plain state dict ({first_line(error)}); save model.state_dict() and load that"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path} does not hold a state dict of tensors; save model.state_dict() and load that"
        )
    return {re.sub(r"^module\.", "", key): value for key, value in state.items()}
