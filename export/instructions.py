"""What this machine cannot measure of a target that has other instruction sets: said in the report."""

from __future__ import annotations

from collections.abc import Sequence

from cveff.export.candidates import Candidate
from cveff.export.clipping import Clipping
from cveff.runtime.machine import isa, saturates
from cveff.target import Target


def instruction_warnings(target: Target, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """What this machine could not measure of a target with other instruction sets, a sentence each."""
    own, assumed = isa(), target.instruction_sets
    if set(own) == set(assumed):
        return ()
    warnings = []
    if saturates(assumed) and not saturates(own):
        names: dict[Clipping, list[str]] = {}
        for candidate in candidates:
            if candidate.saturation is not None and not candidate.error:
                names.setdefault(candidate.saturation, []).append(candidate.name)
        warnings += [f"{', '.join(same)}: {_unmeasured(clipping)}" for clipping, same in names.items()]
    elif saturates(own) and not saturates(assumed):
        warnings.append(
            f"This machine has no VNNI and target {target.name} does not clip: accuracies of int8 were measured on "
            "kernels that clip and may be higher on the device; run `cveff verify` there."
        )
    warnings.append(
        f"Times were measured on a machine {_difference(own, assumed)}, unlike target {target.name}: they will differ "
        "on the device, and another candidate may be the fastest there; run `cveff bench` on it."
    )
    return tuple(warnings)


def _difference(own: Sequence[str], assumed: Sequence[str]) -> str:
    if not own:
        return "whose system does not tell its instruction sets"
    more, fewer = (
        ", ".join(name for name in names if name not in others)
        for names, others in ((own, assumed), (assumed, own))
    )
    return " and ".join(part for part in (more and f"with {more}", fewer and f"without {fewer}") if part)


def _unmeasured(clipping: Clipping) -> str:
    """What was predicted of a processor without VNNI."""
    if clipping.guard == "half_range":
        return (
            "the target has no VNNI, so weights were rounded to 7 bits, whose 16-bit sums cannot clip; this machine "
            "cannot measure the target's kernels."
        )
    what = (
        f"{_count(clipping.narrowed)} in {clipping.layers} layers got wider steps, and {clipping.clipping} still clip "
        "where that costs less"
        if clipping.guard == "narrow"
        else f"it came in quantized, and {_count(clipping.clipping)} clip"
    )
    if clipping.severe:
        what += (
            f", {clipping.severe} of them badly: its answers may be wrong there; quantize the float model for "
            "this target"
        )
    return (
        "the target has no VNNI and clips 16-bit sums, which this machine cannot measure. Predicted from "
        f"{clipping.images} calibration images: {what}. Run `cveff verify` on the device."
    )


def _count(channels: int) -> str:
    return f"{channels} channel{'' if channels == 1 else 's'}"
