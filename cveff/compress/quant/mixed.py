"""Mixed precision: which layers are left in floats, so that the file is as fast as can be and accurate enough.

A network is cut into eight segments or so. What each costs in floats is measured: a file with that one left in floats
is timed in turns with the file that is rounded throughout. What each loses rounded is priced by one backward pass
(`sensitivity`). Segments that are faster in floats stay there; then those that buy most accuracy for their time follow,
until the limit holds. The result is calibrated anew and measured as a whole, since neither times nor losses add up
exactly; floats throughout and 8 bits throughout are measured beside it, and the best of the three is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from cveff.compress.quant.partial import without
from cveff.compress.quant.points import Points
from cveff.compress.quant.post_training import PostTraining, Quantized
from cveff.compress.quant.segments import Segment, segments
from cveff.compress.quant.sensitivity import Costs, rounding_costs
from cveff.model import Model
from cveff.steps import ModelTimer

SAME = 0.01
"""Times that differ by less of the file's are the same: it may be noise."""
PRICED = 64
"""Images that prices are made from."""
FP32, INT8, MIXED = "fp32", "int8", "mixed"


@dataclass(frozen=True)
class Part:
    """A segment, what it costs either way, and what was decided.

    Attributes:
        name, layers: the segment's.
        milliseconds: what the file takes more with this one alone in floats; less than 0: it is faster in floats.
        nats: divergence of the answers that rounding it causes, by itself.
        why: it is in floats; "" where it is rounded.
    """

    name: str
    layers: tuple[str, ...]
    milliseconds: float
    nats: float
    why: str = ""


@dataclass(frozen=True)
class Mixed:
    """What was found.

    Attributes:
        chosen: "fp32", "int8" or "mixed".
        quantized: the network of the last two; None: it stays in floats.
        parts: every segment.
        milliseconds: of the three, timed in turns; "mixed" only where some segments are in floats and some are not.
        lost: points that they lose against floats.
    """

    chosen: str
    quantized: Quantized | None
    parts: tuple[Part, ...]
    milliseconds: Mapping[str, float]
    lost: Mapping[str, float]

    def lines(self) -> list[str]:
        """What was measured, and why each segment that is in floats is."""
        measured = [
            f"{name}: {time:.3g} ms, {self.lost[name]:.2f} points lost"
            for name, time in self.milliseconds.items()
        ]
        found = [f"{'; '.join(measured)}: {self.chosen} is taken"]
        if self.chosen == MIXED:
            found += [f"{part.name} stays in floats: {part.why}" for part in self.parts if part.why]
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "chosen": self.chosen,
            "milliseconds": dict(self.milliseconds),
            "lost": dict(self.lost),
            "parts": [asdict(part) for part in self.parts],
        }


@runtime_checkable
class PartsTimer(Protocol):
    """A timer that need not export each of several networks that differ in what is rounded."""

    def use_parts(self, model: Model, found: Quantized, parts: Sequence[Quantized]) -> None:
        """Make ready to time `parts`.

        Args:
            model: in floats.
            found: the same, rounded throughout.
            parts: of it, as `without` returns them.
        """
        ...


@dataclass
class MixedPrecision:
    """The search.

    Attributes:
        work: how the network is rounded.
        timer: on the engine that the file is for; a `PartsTimer` is quicker.
        points: what losses are measured by.
        max_accuracy_drop: points that may be lost.
        enough: where 8 bits throughout take this share of floats' time or less, and keep to the limit, nothing is
            searched.
    """

    work: PostTraining
    timer: ModelTimer
    points: Points
    max_accuracy_drop: float
    enough: float = 0.0
    _lost: dict[str, float] = field(default_factory=dict, init=False, repr=False)

    def search(self, model: Model, found: Quantized, batches: Sequence[Tensor]) -> Mixed:
        """Choose.

        Args:
            model: in floats, its branches merged.
            found: the same, rounded throughout by `work` on `batches`, images (B, C, H, W), normalised.

        Raises:
            CveffError: a file cannot be exported, opened or timed.
        """
        self._lost = {FP32: 0.0, INT8: self.points.lost(found.graph)}
        if self.enough > 0 and self._lost[INT8] <= self.max_accuracy_drop:
            times = self.timer.milliseconds({FP32: model, INT8: found.of(model)})
            if times[INT8] <= self.enough * times[FP32]:
                return Mixed(INT8, found, (), times, dict(self._lost))
        parts = self._parts(found)
        variants = {part.name: without(found, part.operators) for part in parts} if len(parts) > 1 else {}
        models = {FP32: model, INT8: found.of(model)}
        if isinstance(self.timer, PartsTimer) and variants:
            self.timer.use_parts(model, found, list(variants.values()))
        self.work.progress.message(f"timing {len(variants)} segments in floats, each with the rest in 8 bits")
        alone = {f"{name} in floats": variant.of(model) for name, variant in variants.items()}
        times = self.timer.milliseconds({**models, **alone})
        costs = rounding_costs(
            found.exact, found.graph, found.roundings, _first(batches, PRICED), seed=self.work.seed
        )
        rated = [
            Part(
                part.name,
                part.layers,
                times[f"{part.name} in floats"] - times[INT8],
                _nats(costs, found) - _nats(costs, variants[part.name]),
            )
            for part in parts
            if part.name in variants
        ]
        decided = self._decide(found, parts, rated, times[INT8])
        operators = [name for part in parts if decided.get(part.name) for name in part.operators]
        rated = [replace(part, why=decided.get(part.name, "")) for part in rated]
        networks = {INT8: found}
        if decided and len(decided) < len(parts):
            networks[MIXED] = self._calibrated(model, found, operators, batches)
            self._lost[MIXED] = self.points.lost(networks[MIXED].graph)
            times = self.timer.milliseconds({**models, MIXED: networks[MIXED].of(model)})
        times = {name: times[name] for name in (*models, *networks) if name in times}
        chosen = self._best(times)
        return Mixed(chosen, networks.get(chosen), tuple(rated), times, dict(self._lost))

    def _parts(self, found: Quantized) -> list[Segment]:
        layers = [site.reader for site in found.placement.weights]
        return [part for part in segments(found.exact, layers) if part.layers]

    def _decide(
        self, found: Quantized, parts: Sequence[Segment], rated: Sequence[Part], int8_ms: float
    ) -> dict[str, str]:
        """Segment -> why it is in floats."""
        noise = SAME * int8_ms
        decided = {
            part.name: f"is {-part.milliseconds:.3g} ms faster in floats"
            for part in rated
            if part.milliseconds < -noise
        }
        rest = [part for part in rated if part.name not in decided]
        rest.sort(key=lambda part: -part.nats / max(part.milliseconds, noise))
        while len(decided) < len(parts):
            operators = [name for part in parts if part.name in decided for name in part.operators]
            lost = self.points.lost(without(found, operators).graph) if decided else self._lost[INT8]
            if lost <= self.max_accuracy_drop or not rest:
                break
            part = rest.pop(0)
            decided[part.name] = (
                f"{lost:.2f} points are lost without it in floats, which costs {max(part.milliseconds, 0):.3g} ms; "
                f"its rounding moves the answers by {part.nats:.2g} nats"
            )
        return decided

    def _calibrated(
        self, model: Model, found: Quantized, operators: Sequence[str], batches: Sequence[Tensor]
    ) -> Quantized:
        """With `operators` in floats from the start, or as it was calibrated, whichever is nearer to floats."""
        # What equalization was tried and did not help is not tried again.
        equalize = self.work.equalize if found.equalized else False
        work = replace(self.work, exclude=(*self.work.exclude, *operators), equalize=equalize)
        anew = work.quantize(model.module, model.spec.input, batches)
        as_is = without(found, operators)
        return min((anew, as_is), key=lambda item: self.points.lost(item.graph))

    def _best(self, times: Mapping[str, float]) -> str:
        """The fastest that keeps to the limit; of those as fast, the one that loses least."""
        kept = {name: time for name, time in times.items() if self._lost[name] <= self.max_accuracy_drop}
        fastest = min(kept.values())
        tied = [name for name, time in kept.items() if time <= fastest * (1 + SAME)]
        return min(tied, key=lambda name: (self._lost[name], times[name]))


def _nats(costs: Costs, found: Quantized) -> float:
    """What the roundings of `found` cost together, if they were independent."""
    tensors = (costs.tensors.get(name) for name in found.roundings.tensors)
    weights = (costs.weights.get(name) for name in found.roundings.weights)
    return sum(cost.nats for cost in (*tensors, *weights) if cost is not None and math.isfinite(cost.nats))


def _first(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    taken: list[Tensor] = []
    for images in batches:
        if sum(map(len, taken)) >= count:
            break
        taken.append(images)
    return taken
