"""`Growth`: one event of a growth schedule, and what makes a list of them a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from cveff.errors import TrainingError

SIZES = ("depth", "width", "heads", "mlp_ratio", "image_size")


@dataclass(frozen=True)
class Growth:
    """What the network grows to, and when. Sizes that are not named stay; one at least is.

    Attributes:
        at: share of the run's optimizer steps after which it happens, in [0, 1). An event at 0 says instead what the
            run begins with: it may be smaller than the model, and the last event must reach the model's own sizes.
        depth: blocks (ViT), or blocks of each stage (ResNet, ConvNeXt).
        width: of the residual stream: a ViT's embed_dim, or channels of each stage.
        heads: of every attention. The dimension of a head never shrinks.
        mlp_ratio: hidden units of an MLP over its width.
        image_size: side in pixels, or (height, width); of all sizes the only one that changes what is computed.
        mask_steps: optimizer steps in which what is new is let in, linearly.

    Raises:
        TrainingError: at construction, for a value out of range, or no size.
    """

    at: float
    depth: int | tuple[int, ...] | None = None
    width: int | tuple[int, ...] | None = None
    heads: int | None = None
    mlp_ratio: float | None = None
    image_size: int | tuple[int, int] | None = None
    mask_steps: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.at < 1:
            raise TrainingError(f"growth.at is {self.at!r}; give a share of the run from 0 up to, without, 1")
        if self.mask_steps < 1:
            raise TrainingError(f"growth.mask_steps is {self.mask_steps!r}; give 1 or more optimizer steps")
        if not self.sizes:
            raise TrainingError(f"growth at {self.at} names no size; give one or more of {', '.join(SIZES)}")
        for name, value in self.sizes.items():
            values = value if isinstance(value, tuple) else (value,)
            if not values or min(values) <= 0:
                raise TrainingError(f"growth.{name} is {value!r}; give positive sizes")

    @property
    def sizes(self) -> dict[str, int | float | tuple[int, ...]]:
        """The sizes that this event names."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name in SIZES}
        return {name: value for name, value in values.items() if value is not None}


def check_schedule(events: Sequence[Growth]) -> None:
    """Refuse a schedule that shrinks or goes back in time.

    Raises:
        TrainingError: events out of order, or a size smaller than an earlier event's.
    """
    reached: dict[str, int | float | tuple[int, ...]] = {}
    for index, event in enumerate(events):
        if index and event.at <= events[index - 1].at:
            raise TrainingError(
                f"train.grow[{index}].at is {event.at}, not after the event before it "
                f"(at {events[index - 1].at}); put events in the order they happen"
            )
        for name, value in event.sizes.items():
            if name in reached and _is_smaller(value, reached[name]):
                raise TrainingError(
                    f"train.grow[{index}].{name} is {value!r}, smaller than {reached[name]!r} before it; "
                    "networks only grow"
                )
            reached[name] = value
    if len(events) == 1 and events[0].at == 0:
        raise TrainingError(
            "train.grow has an event at 0, which says what to begin with, and no other; add one that grows"
        )


def steps_of(events: Sequence[Growth], total_steps: int) -> list[int]:
    """The optimizer step (from 0) before which each event happens.

    Raises:
        TrainingError: what one event lets in is not in when the next begins or the run ends, or an event rounds to
            the first step.
    """
    steps = [round(event.at * total_steps) for event in events]
    for index, (event, step) in enumerate(zip(events, steps, strict=True)):
        if event.at == 0:
            continue
        end = steps[index + 1] if index + 1 < len(steps) else total_steps
        if step < 1 or step + event.mask_steps > end:
            raise TrainingError(
                f"train.grow[{index}] begins before step {step} of {total_steps} and lets new weights in for "
                f"mask_steps = {event.mask_steps}, until after step {end}, where "
                f"{'the run ends' if end == total_steps else 'the next event is'}; lower mask_steps, move the event, "
                "or train for longer"
            )
    return steps


def _is_smaller(value: float | tuple[int, ...], before: float | tuple[int, ...]) -> bool:
    now, then = ([*item] if isinstance(item, tuple) else [item] for item in (value, before))
    if len(now) != len(then):  # one image side for two
        now, then = (item * 2 if len(item) == 1 else item for item in (now, then))
    return any(new < old for new, old in zip(now, then, strict=False))
