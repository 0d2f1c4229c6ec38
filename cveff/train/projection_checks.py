"""What a group of a projected optimizer may ask for, which sides of its matrices that projects, and state that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from torch import Tensor

from cveff.errors import CheckpointError, TrainingError
from cveff.train import state8bit
from cveff.train.projector import Method, ProjType, Side, sides_of

_CHOICES = {
    "proj_type": get_args(ProjType),
    "projector": get_args(Method),
    "refresh": ("fixed", "lazy"),
    "carry": ("keep", "rotate"),
    "residual": (False, True),
    "state_bits": (32, 8),
    "convention": ("torch", "galore"),
}


def check_projection(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse values of a group's keys, or of settings, that cannot be.

    Raises:
        TrainingError: the first one, called with `prefix` before its name.
    """
    for key, choices in _CHOICES.items():
        if key in settings and settings[key] not in choices:
            raise TrainingError(f"{prefix}{key} is {settings[key]!r}; give {' or '.join(map(repr, choices))}")
    gap = settings["update_proj_gap"]
    if isinstance(gap, bool) or not isinstance(gap, int) or gap < 1:
        raise TrainingError(f"{prefix}update_proj_gap is {gap!r}; give 1 or more steps")
    if not settings["scale"] > 0:
        raise TrainingError(f"{prefix}scale is {settings['scale']!r}; give a positive number")


def check_group(group: Mapping[str, Any], name_of: Callable[[Tensor], str]) -> None:
    """Refuse a parameter group that cannot be projected as it asks.

    Raises:
        TrainingError: a value out of range, or a parameter that is no matrix, or smaller than the rank.
        MissingDependencyError: `state_bits` 8 without bitsandbytes.
    """
    check_projection(group)
    rank = group["rank"]
    for key in ("lr", "eps", "weight_decay", "momentum"):
        if key in group and not group[key] >= 0:
            raise TrainingError(f"{key} is {group[key]!r}; give 0 or more")
    if not all(0 <= beta < 1 for beta in group.get("betas", ())):
        raise TrainingError(f"betas are {group['betas']!r}; give two numbers in [0, 1)")
    if group["state_bits"] == 8:
        state8bit.require_library()
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise TrainingError(
            f"rank is {rank!r}; give 1 or more, or leave it out for a group without projection"
        )
    for parameter in group["params"]:
        if parameter.ndim < 2 or not parameter.is_floating_point():
            raise TrainingError(
                f"{name_of(parameter)}, {parameter.dtype}, is no matrix of floats, its group has rank {rank}; "
                "put it into a group without"
            )
        rows, columns = matrix_shape(parameter)
        if rank > min(rows, columns):
            raise TrainingError(
                f"rank {rank} is larger than the {rows}×{columns} matrix of {name_of(parameter)}; "
                f"give at most {min(rows, columns)}"
            )


def sides_in(parameter: Tensor, group: Mapping[str, Any]) -> tuple[Side, ...]:
    """The sides a parameter is projected from; none without a rank, or where nothing would be left out."""
    rank = group["rank"]
    if rank is None:
        return ()
    rows, columns = matrix_shape(parameter)
    sides = sides_of(group["proj_type"], rows, columns)
    if group["convention"] == "galore":
        return sides
    lengths = {"left": rows, "right": columns}
    return tuple(side for side in sides if lengths[side] > rank)


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """A kernel (out, in, h, w) is the matrix (out, in·h·w)."""
    rows = parameter.shape[0]
    return rows, parameter.numel() // max(1, rows)


def check_state(
    state: Mapping[str, Any],
    parameter: Tensor,
    group: Mapping[str, Any],
    moments: Iterable[str],
    name_of: Callable[[Tensor], str],
) -> None:
    """Refuse a parameter's state whose tensors are not those of its group's rank.

    Raises:
        CheckpointError: the first one.
    """
    sides = sides_in(parameter, group)
    if not sides:
        return
    rows, columns = matrix_shape(parameter)
    rank = group["rank"]
    wanted: dict[str, tuple[int, ...]] = {}
    if "left" in sides:
        wanted["left"] = (rows, rank)
    if "right" in sides:
        wanted["right"] = (rank, columns)
    low = (rank if "left" in sides else rows, rank if "right" in sides else columns)
    wanted |= {name: low for name in moments if name in state}
    for name, shape in wanted.items():
        if name not in state or tuple(state[name].shape) != shape:
            found = tuple(state[name].shape) if name in state else "missing"
            raise CheckpointError(
                f"optimizer state {name!r} of {name_of(parameter)} is {found}, rank {rank} needs {shape}; "
                "load it with the rank and proj_type it was written with"
            )
