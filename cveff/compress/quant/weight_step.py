"""What the step `Quantize` does for "int8-weights" and "int4-weights"."""

from __future__ import annotations

from cveff.compress.quant.weight_choice import choose
from cveff.compress.quant.weight_only import WeightOnly, WeightsRounded, quantize_weights
from cveff.compress.samples import samples
from cveff.data.dataset import Split
from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.steps import Run

WEIGHT_BITS = {"int8-weights": 8, "int4-weights": 4}
"""Precisions of weights alone -> bits a weight."""


def round_model_weights(
    model: Model, run: Run, settings: WeightOnly, images: int, split: Split | None = None
) -> Model:
    """Round the weights of `model`'s large linear layers; its module is changed in place.

    Args:
        images: most calibration images; "nearest" looks at none.
        split: where they are from; by default the training split.

    Raises:
        StepError: as `quantize_weights`; or "compensated" without data.
    """
    # What is wrong with the network is said before images are read.
    choose(model.module, exclude=settings.exclude, min_weights=settings.min_weights)
    batches = None
    if settings.weights == "compensated":
        split = split if split is not None or run.data is None else run.data.train
        if split is None:
            raise StepError("compensated rounding looks at images; pass data=…, or choose weights='nearest'")
        found = samples(split, model.spec.input, images, seed=run.seed, device=str(run.device))
        batches = [pixels for pixels, _ in found]
    model.module.to(run.device)
    done = quantize_weights(model.module, settings, batches, progress=run.progress)
    run.progress.message(describe(done))
    return with_module(model, model.module, done.edit)


def describe(done: WeightsRounded) -> str:
    """One line: how many layers, what they weigh, the largest error, what stayed."""
    worst = max(done.errors, key=lambda path: done.errors[path])
    text = (
        f"{len(done.errors)} layers rounded: {done.bytes_before / 1e6:.1f} to {done.bytes_after / 1e6:.1f} MB; "
        f"largest error {done.errors[worst]:.1e} of the energy of {worst}"
    )
    if not done.skipped:
        return text
    stayed = "; ".join(f"{path} {reason}" for path, reason in list(done.skipped.items())[:3])
    return f"{text}. {len(done.skipped)} stay floats: {stayed}{'; …' if len(done.skipped) > 3 else ''}"
