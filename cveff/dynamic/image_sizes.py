"""One network at several image sizes: what of it depends on the size, and how that is carried over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from cveff.errors import CveffError, StepError
from cveff.model import ModelSpec, build, create
from cveff.runtime.errors import first_line

POSITIONS = "pos_embed"
"""The one parameter that may depend on the image's size: (1, prefix tokens + grid, channels)."""


def at_size(spec: ModelSpec, size: tuple[int, int]) -> ModelSpec:
    """The same model for images of `size` (height, width).

    Raises:
        StepError: the architecture has weights of another kind that depend on the size, or cannot take it.
    """
    if size == spec.input.size:
        return spec
    arguments: dict[str, Any] = {key: value for key, value in spec.arguments.items() if key != "img_size"}
    name, shown = spec.architecture, f"{size[0]}×{size[1]}"
    try:
        smaller = create(name, input=replace(spec.input, size=size), timm_arguments=arguments)
        with torch.no_grad():
            smaller.module.eval()(torch.zeros(1, spec.input.channels, *size))
    except CveffError as error:
        raise StepError(f"{name} cannot take images of {shown}: {error}") from error
    except Exception as error:  # whatever the network's own code raises
        raise StepError(f"{name} cannot take images of {shown}: {first_line(error)}") from error
    plain = build(replace(spec, edits=()))
    before, after = plain.module.state_dict(), smaller.module.state_dict()
    odd = [
        key
        for key in {**before, **after}
        if key not in before or key not in after or before[key].shape != after[key].shape
    ]
    if odd and (odd != [POSITIONS] or _grid(smaller.module) is None):
        raise StepError(
            f"{name}: {odd[0]} depends on the size of images, and is not carried over from one to another; leave "
            f"{shown} out"
        )
    return replace(spec, arguments=smaller.spec.arguments, input=smaller.spec.input)


def resized_positions(positions: Tensor, module: nn.Module, smaller: nn.Module) -> Tensor:
    """Position embeddings (1, N, C) of `module`, interpolated (bicubic) to `smaller`'s grid of patches: (1, n, C)."""
    old, new = _grid(module), _grid(smaller)
    if old is None or new is None or old == new:
        return positions
    prefix = positions.shape[1] - old[0] * old[1]
    resized: Tensor = resample_abs_pos_embed(
        positions, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix
    )
    return resized


def _grid(module: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of patches."""
    grid = getattr(getattr(module, "patch_embed", None), "grid_size", None)
    return None if grid is None else (int(grid[0]), int(grid[1]))
