"""What `verify` checks of a staged bundle besides its accuracy: that the stages are the network, and where images
leave."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cveff.export.scoring import SCORING_BATCH, first_images
from cveff.export.subjects import Subject
from cveff.measure.parity import relative_difference
from cveff.runtime.cascade import Cascade

if TYPE_CHECKING:
    from cveff.data.dataset import Data
    from cveff.export.verify import Verification


def check_stages(
    found: Verification,
    cascade: Cascade,
    reference: Subject | None,
    data: Data | None,
    tolerance: float,
) -> Verification:
    """`found`, with problems where stages do not compute what they should.

    With thresholds that nothing reaches, the stages must answer as the whole network's file does but for rounding; and
    images must leave where they did when thresholds were chosen.

    Args:
        reference: the whole network, or what the user compares with.
        tolerance: relative difference of logits that rounding explains.
    """
    problems, notes = list(found.problems), list(found.notes)
    for alarm in cascade.alarms[:1]:
        notes.append(f"{str(alarm)[0].upper()}{str(alarm)[1:]}.")
    if reference is not None and reference.spec is not None:
        images = (
            reference.example(SCORING_BATCH)
            if data is None
            else first_images(data.evaluation, reference.input, SCORING_BATCH)
        )
        never = [np.inf] * (len(cascade.stages) - 1)
        difference = relative_difference(cascade.answer(images, never)[0], reference.predictor(images))
        if found.precision == "fp32" and not difference <= tolerance:
            problems.append(
                f"with no image leaving early its logits differ from {found.reference}'s by a relative "
                f"{difference:.1e}; "
                f"float32 rounding explains {tolerance:g} at most, so the stages are another network"
            )
    if data is not None:
        shares = ", ".join(
            f"{item.name} {100 * item.share:.1f}% ({100 * item.calibrated:.1f}%)"
            for item in cascade.statistics()
        )
        notes.append(f"Images left at, and did when thresholds were chosen: {shares}.")
    return replace(found, problems=tuple(problems), notes=tuple(notes))
