"""What `deploy` measured of each (engine, precision), and the rule that picks one. Pure functions, no files.

The rule. A candidate is out when it could not be built, gives values that are not finite, loses more than the
limit, or needs more memory than the target has. Of the rest the fastest at the target's first batch size
wins. Candidates within `SAME_RATIO` of the fastest, or within `TIE_RATIO` and indistinguishable from it (the
paired ratio's 95% interval reaches 1), are tied with it; a tie goes to the more accurate, then the smaller
file, then the smaller median.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cveff.errors import TargetError
from cveff.export.clipping import Clipping
from cveff.measure.latency import Latency, Ratio, paired_ratio

SAME_RATIO = 1.01
"""Up to this median ratio to the fastest nobody notices the difference, even where it can be measured."""
TIE_RATIO = 1.03
"""Past this median ratio to the fastest a candidate is slower, however wide the confidence interval is."""

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Candidate:
    """One (engine, precision): what was built, what was measured, and what was decided.

    Attributes:
        file: name inside the bundle; `path`: where it was built.
        accuracy: top-1 share (0..1) on the selection images; None without labels.
        agreement: share of the selection images on which its top-1 equals the original module's.
        relative_difference: `max|a - b| / max|b|` of its logits against the original module's.
        timings: by batch size.
        size_bytes: of every file the engine needs.
        peak_rss_bytes: of a fresh process that opens the file and predicts; None where not measured.
        meaning_gap: for int8 on ONNX Runtime, the engine's answers against the file computed as written.
        rounding: for int8 that cveff made itself: every layer's precision, range and cost
            (`cveff.compress.quant.describe`).
        saturation: for int8 and a target whose integer kernels clip, what was done about it.
        error: why it could not be built or run; "" when it could.
        is_prepared: its file is made and ships, for a device that can run it; here it was not run by its engine, and
            accuracy, agreement and difference are ONNX Runtime's.
        chosen, rejected, why: the decision and its reason, filled in by `choose`. A candidate that is neither
            chosen nor rejected kept to the limits and lost on time.
    """

    engine: str
    precision: str
    file: str = ""
    path: Path | None = None
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    accuracy: float | None = None
    agreement: float | None = None
    relative_difference: float | None = None
    timings: Mapping[int, Latency] = field(default_factory=dict)
    size_bytes: int = 0
    peak_rss_bytes: int | None = None
    meaning_gap: Mapping[str, Any] | None = None
    rounding: Mapping[str, Any] | None = None
    saturation: Clipping | None = None
    error: str = ""
    is_prepared: bool = False
    chosen: bool = False
    rejected: bool = False
    why: str = ""

    @property
    def name(self) -> str:
        """ "engine precision", as tables show it."""
        return f"{self.engine} {self.precision}"

    def to_json(self, batch: int) -> dict[str, Any]:
        """The manifest's entry; `latency_ms` is the median at `batch`, `latencies` holds every batch size."""
        return {
            "engine": self.engine,
            "precision": self.precision,
            "accuracy": self.accuracy,
            "agreement": self.agreement,
            "relative_difference": finite(self.relative_difference),
            "latency_ms": self.timings[batch].median_ms if batch in self.timings else None,
            "latencies": [latency_json(timing) for timing in self.timings.values()],
            "size_bytes": self.size_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "meaning_gap": dict(self.meaning_gap) if self.meaning_gap is not None else None,
            "rounding": dict(self.rounding) if self.rounding is not None else None,
            **({} if self.saturation is None else {"saturation": self.saturation.to_json()}),
            "chosen": self.chosen,
            "rejected": self.rejected,
            "why": self.why,
        }


@dataclass(frozen=True)
class Limits:
    """What a candidate must keep to.

    Attributes:
        max_accuracy_drop: points (hundredths) of top-1 accuracy under `reference_accuracy`; without labels,
            points of top-1 disagreement with the original.
        reference_accuracy: the original module's on the selection images; None without labels.
        memory_mb: MiB of peak resident memory; 0: no limit.
    """

    max_accuracy_drop: float
    reference_accuracy: float | None = None
    memory_mb: int = 0


def choose(candidates: Sequence[Candidate], limits: Limits, batch: int) -> tuple[Candidate, ...]:
    """Decide: the same candidates with `chosen` and `why` filled in, exactly one of them chosen.

    Args:
        batch: batch size whose time decides; every candidate without an error has a timing for it.

    Raises:
        TargetError: none is left; the message lists each and why.
    """
    reasons = [rejection(candidate, limits) for candidate in candidates]
    kept = [candidate for candidate, reason in zip(candidates, reasons, strict=True) if not reason]
    if not kept:
        lines = [f"  {c.name}: {reason}" for c, reason in zip(candidates, reasons, strict=True)]
        raise TargetError(
            "no candidate meets the target's limits, so nothing was written:\n"
            + "\n".join(lines or ["  the target has no candidates"])
            + "\nRaise max_accuracy_drop, give more calibration images, or a target with other candidates."
        )
    winner = _winner(kept, batch)
    decided = []
    for candidate, reason in zip(candidates, reasons, strict=True):
        if reason:
            decided.append(replace(candidate, chosen=False, rejected=True, why=reason))
        elif candidate is winner:
            why = _why_chosen(candidate, kept, limits, batch)
            decided.append(replace(candidate, chosen=True, rejected=False, why=why))
        else:
            decided.append(
                replace(candidate, chosen=False, rejected=False, why=_why_lost(candidate, winner, batch))
            )
    return tuple(decided)


def rejection(candidate: Candidate, limits: Limits) -> str:
    """Why this candidate may not ship, or "" when it may."""
    if candidate.error:
        return candidate.error
    for value in (candidate.accuracy, candidate.agreement, candidate.relative_difference):
        if value is not None and not math.isfinite(value):
            return "its answers are not finite numbers"
    if limits.reference_accuracy is not None:
        if candidate.accuracy is None:
            return "its accuracy was not measured"
        drop = 100 * (limits.reference_accuracy - candidate.accuracy)
        if drop > limits.max_accuracy_drop + _ROUNDING:
            return (
                f"loses {drop:.2f} points of accuracy ({100 * candidate.accuracy:.2f}% against "
                f"{100 * limits.reference_accuracy:.2f}%), the limit is {limits.max_accuracy_drop:g}"
                f"{_gap(candidate)}"
            )
    else:
        if candidate.agreement is None:
            return "its agreement with the original was not measured"
        disagreement = 100 * (1 - candidate.agreement)
        if disagreement > limits.max_accuracy_drop + _ROUNDING:
            return (
                f"disagrees with the original on {disagreement:.2f}% of the images, "
                f"the limit is {limits.max_accuracy_drop:g}{_gap(candidate)}"
            )
    if limits.memory_mb and candidate.peak_rss_bytes is not None:
        used = candidate.peak_rss_bytes / 2**20
        if used > limits.memory_mb:
            return f"needs {used:.0f} MiB of memory, the target has {limits.memory_mb}"
    return ""


def is_tied(candidate: Candidate, fastest: Candidate, batch: int) -> bool:
    """Whether the candidate's time cannot be told from the fastest's."""
    ratio = _ratio(candidate, fastest, batch)
    return ratio.median <= SAME_RATIO or (ratio.low <= 1 and ratio.median <= TIE_RATIO)


def latency_json(timing: Latency) -> dict[str, Any]:
    """`{batch, threads, median, p10, p90, images_per_second, rounds}`, times in milliseconds a call."""
    return {
        "batch": timing.batch,
        "threads": timing.threads,
        "median": timing.median_ms,
        "p10": timing.p10,
        "p90": timing.p90,
        "images_per_second": timing.throughput,
        "rounds": len(timing.rounds_ms),
    }


def finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _ratio(candidate: Candidate, other: Candidate, batch: int) -> Ratio:
    return paired_ratio(candidate.timings[batch].rounds_ms, other.timings[batch].rounds_ms)


def _winner(kept: Sequence[Candidate], batch: int) -> Candidate:
    fastest = min(kept, key=lambda c: c.timings[batch].median_ms)
    tied = [c for c in kept if c is fastest or is_tied(c, fastest, batch)]
    return min(tied, key=lambda c: (-_quality(c), c.size_bytes, c.timings[batch].median_ms))


def _quality(candidate: Candidate) -> float:
    for value in (candidate.accuracy, candidate.agreement):
        if value is not None:
            return value
    return 0.0


def _why_chosen(winner: Candidate, kept: Sequence[Candidate], limits: Limits, batch: int) -> str:
    fastest = min(kept, key=lambda c: c.timings[batch].median_ms)
    if len(kept) == 1:
        lead = "the only one within the limits"
    elif winner is fastest:
        lead = "fastest within the limits"
    else:
        better = "more accurate" if _quality(winner) > _quality(fastest) else "smaller"
        lead = f"as fast as {fastest.name} within noise, and {better}"
    lead += f": {winner.timings[batch].median_ms:.3g} ms at batch {batch}"
    if limits.reference_accuracy is not None and winner.accuracy is not None:
        return f"{lead}, {100 * (winner.accuracy - limits.reference_accuracy):+.2f} points of accuracy"
    return f"{lead}, agrees with the original on {100 * (winner.agreement or 0):.2f}% of the images"


def _why_lost(candidate: Candidate, winner: Candidate, batch: int) -> str:
    ratio = _ratio(candidate, winner, batch)
    if is_tied(candidate, winner, batch) or ratio.median < 1:
        worse = (
            "less accurate"
            if _quality(candidate) < _quality(winner)
            else "larger"
            if candidate.size_bytes > winner.size_bytes
            else "not better in anything"
        )
        return f"as fast as the chosen within noise (ratio {ratio.median:.2f}), but {worse}"
    return f"{ratio.median:.2f}× the chosen's time (95% {ratio.low:.2f}–{ratio.high:.2f})"


def _gap(candidate: Candidate) -> str:
    """A clause on the engine's part in the loss, where ONNX Runtime's answers are not what the file says."""
    gap = candidate.meaning_gap
    if gap is None or not gap.get("large"):
        return ""
    return (
        "; the file computed as written agrees with the engine's answer on only "
        f"{100 * gap['agreement']:.1f}% of the images: this CPU's integer kernels saturate"
    )
