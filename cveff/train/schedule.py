"""Learning rate as a share of its peak, by step."""

from __future__ import annotations

import math

ONE_CYCLE_RISE = 0.3
TRIANGULAR_RISE = 0.2


def learning_rate_factor(schedule: str, step: float, total_steps: int, warmup_steps: int) -> float:
    """Factor in [0, 1] for optimizer step `step` (from 0) of `total_steps`; a step may lie between two.

    "cosine": linear warm-up, then half a cosine to 0 (Loshchilov & Hutter, SGDR, ICLR 2017). "constant": warm-up,
    then 1. "one-cycle": half a cosine from 1/25 up to 1 for 30% of the steps, half a cosine down to 0 (Smith &
    Topin 2018). "triangular": linear up for 20%, linear down to 0 (Jordan, airbench 2024). The last two have
    their own rise and take no warm-up.
    """
    progress = step / max(1, total_steps)
    if schedule == "one-cycle":
        if progress < ONE_CYCLE_RISE:
            return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * progress / ONE_CYCLE_RISE))
        return 0.5 * (1 + math.cos(math.pi * (progress - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE)))
    if schedule == "triangular":
        # From one step's worth up: a first step of 0 would be wasted.
        rise = max(1, round(TRIANGULAR_RISE * total_steps))
        return (
            min(1.0, (step + 1) / rise) if step < rise else (total_steps - step) / max(1, total_steps - rise)
        )
    if step < warmup_steps:
        return min(1.0, (step + 1) / warmup_steps)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
