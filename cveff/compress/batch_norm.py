"""Running statistics of batch norms, estimated again after the layers before them changed."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cveff.compress.samples import Batches, evaluation, require_batches
from cveff.compress.units import device_of
from cveff.errors import StepError

BATCH = 128
"""Images that statistics are taken of at a time."""


def recalibrate_batch_norm(module: nn.Module, batches: Batches) -> int:
    """Replace every batch norm's running mean and variance by their averages over `batches`, in place.

    Pruning shifts what reaches a batch norm; a hundred batches of plain images repair it without training (Li et
    al., "EagleEye", ECCV 2020, section 3.2). Everything else, dropout included, runs in evaluation mode, and
    modes and momenta are put back. All batch norms are estimated in one pass, each behind those in front of it
    normalising by the batch, as in training: of `BATCH` images, because a smaller one does not normalise as its
    averages will (a late layer has one position an image).

    Args:
        batches: unaugmented images, at least 16 in all; `BATCH` or more make the estimate as good as training's.

    Returns:
        how many batch norms were re-estimated; 0 where the network has none.

    Raises:
        StepError: no images, a batch too small to have a variance, or statistics that are not finite; the old
            ones are then kept.
    """
    given = require_batches(batches, "re-estimating batch norms")
    norms = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats and part.running_mean is not None
    }
    if not norms:
        return 0
    for norm in norms.values():
        _own(norm)
    before = {name: _state(norm) for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    done = False
    try:
        with evaluation(module), torch.no_grad():
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # the plain average of all batches
                norm.training = True
            for images in _large(given):
                _run(module, images)
        _require_finite(norms)
        done = True
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            if not done:
                norm.load_state_dict({**norm.state_dict(), **before[name]})
    return len(norms)


def _large(batches: Batches) -> tuple[torch.Tensor, ...]:
    """The same images in even batches of `BATCH` or up to twice that; one batch where there are fewer."""
    images = torch.cat([part for part, _ in batches])
    return images.tensor_split(max(1, len(images) // BATCH))


def _run(module: nn.Module, images: torch.Tensor) -> None:
    try:
        module(images.to(device_of(module)))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise StepError(
            f"{len(images)} image(s) are too few for a batch norm's variance; give 16 or more"
        ) from error


def _own(norm: _BatchNorm) -> None:
    """Statistics that are not shared with the network that this one is a shallow copy of."""
    for name, value in _state(norm).items():
        setattr(norm, name, value)


def _state(norm: _BatchNorm) -> dict[str, torch.Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value.clone() for name, value in norm.named_buffers() if name in names}


def _require_finite(norms: dict[str, _BatchNorm]) -> None:
    for name, norm in norms.items():
        for statistic in (norm.running_mean, norm.running_var):
            if statistic is not None and not bool(torch.isfinite(statistic).all()):
                raise StepError(
                    f"batch norm {name} sees values that are not finite; check the weights before it"
                )
