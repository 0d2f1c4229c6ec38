"""`Growing`: a growth schedule laid over a training run: which network stands at which step, and how it takes over."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from cveff.errors import StepError, TrainingError
from cveff.model import Model, ModelSpec, build
from cveff.train.flops import training_flops
from cveff.train.growth.carry import carry_weights
from cveff.train.growth.event import Growth, check_schedule, steps_of
from cveff.train.growth.masks import Masks
from cveff.train.growth.placement import Placement, place
from cveff.train.growth.sizes import specs_of

TOLERANCE = 1e-6
"""Largest difference of outputs that an event may make, in float64 on the CPU."""
_PROBES = 2


@dataclass(frozen=True)
class Grown:
    """A network that took another's place.

    Attributes:
        model: the larger one, with the old weights in it; it computes what the old one did under `masks`.
        placement: where the old weights lie.
        masks: of what is new, of value 0 and on no network.
        difference: largest absolute difference of the two networks' outputs on random images, in float64.
    """

    model: Model
    placement: Placement
    masks: Masks
    difference: float

    def carry(self, old: Model, new: nn.Module) -> None:
        """Put the weights of `old`, another network of the old spec, into `new`, one of the larger spec, in place."""
        carry_weights(_at_size(old, self.model.spec), new, self.placement)


class Growing:
    """The networks of a run, one after the other.

    Args:
        model: the run's model; with an event at 0 the one it ends with, else the one it begins with.
        events: the schedule; none: the model stays as it is.
        total_steps: optimizer steps of the run.
        seed: new weights derive from it.

    Attributes:
        start: what the run begins with.

    Raises:
        TrainingError, StepError: the schedule does not fit the run or the model; every network is built to find out.
    """

    def __init__(self, model: Model, events: Sequence[Growth], total_steps: int, seed: int) -> None:
        check_schedule(events)
        self._seed, self._steps = seed, steps_of(events, total_steps)
        self._events, self._total_steps = list(events), total_steps
        self._masks: Masks | None = None
        self.start = model
        if not events:
            self._specs = [model.spec]
            return
        specs = specs_of(model, events)
        if events[0].at == 0:
            self._specs = [*specs[:-1], _final(specs[-1], model)]
            self._events, self._steps = self._events[1:], self._steps[1:]
            self.start = self._build(0)
        else:
            self._specs = [model.spec, *specs]
        networks = [self.start, *(self._build(index) for index in range(1, len(self._specs)))]
        for before, after in itertools.pairwise(networks):
            old = _at_size(before, after.spec)
            Masks(old, after.module, place(old, after.module))

    def spec_at(self, step: int) -> ModelSpec:
        """The network that made optimizer step `step - 1`: a state written after it is of that network."""
        return self._specs[self._index(step)]

    def is_due(self, step: int) -> bool:
        """Whether an event happens before optimizer step `step` (from 0)."""
        return step in self._steps

    def is_complete(self, step: int) -> bool:
        """Whether after `step` steps the network is the last one, without masks."""
        return not self._events or step >= self._steps[-1] + self._events[-1].mask_steps

    def flops(self, images_per_step: int) -> float:
        """Floating-point operations of the whole run, as `training_flops` counts them; those of masks are left out."""
        ends = [*self._steps, self._total_steps]
        begins = [0, *self._steps]
        return sum(
            (end - begin) * images_per_step * training_flops(self._build(index).module, spec.input)
            for index, (begin, end, spec) in enumerate(zip(begins, ends, self._specs, strict=True))
        )

    def grow(self, model: Model, step: int) -> Grown:
        """The larger network that takes `model`'s place before `step`, checked to compute the same.

        Raises:
            StepError: it does not, so that the masks do not fit this architecture.
        """
        grown = grown_from(
            model, self._specs[self._index(step) + 1], self._weights_seed(self._index(step) + 1)
        )
        self._masks = grown.masks
        return grown

    def resume(self, module: nn.Module, step: int) -> None:
        """Go on after `step` steps with `module`, a network of `spec_at(step)`; its weights do not matter."""
        index = self._index(step)
        if index == 0 or step >= self._steps[index - 1] + self._events[index - 1].mask_steps:
            return
        old = _at_size(build(self._specs[index - 1]), self._specs[index])
        self._masks = Masks(old, module, place(old, module))
        self._set_value(step - 1)

    def mask(self, module: nn.Module) -> None:
        """Put the present masks, if there are any, on a copy of the network."""
        if self._masks is not None:
            self._masks.attach(module)

    def before_step(self, step: int) -> None:
        """Let in what is due at optimizer step `step`, and take masks off that let all in."""
        if self._masks is None:
            return
        self._set_value(step)
        if self._masks.value >= 1:
            self._masks.detach()
            self._masks = None

    def _set_value(self, step: int) -> None:
        assert self._masks is not None
        begin, event = [
            (begin, event) for begin, event in zip(self._steps, self._events, strict=True) if begin <= step
        ][-1]
        self._masks.value = (step - begin + 1) / event.mask_steps

    def _index(self, step: int) -> int:
        return sum(begin < step for begin in self._steps)

    def _weights_seed(self, index: int) -> int:
        return int(np.random.SeedSequence([self._seed, index]).generate_state(1)[0])

    def _build(self, index: int) -> Model:
        return fresh(self._specs[index], self._weights_seed(index))


def grown_from(model: Model, spec: ModelSpec, seed: int) -> Grown:
    """Build `spec`, put `model`'s weights into it, mask the rest, and check that it computes what `model` does.

    Args:
        model: in any mode, on any device; left as it is, but for weights that are resampled to another image size.
        seed: of the new weights, initialised as the architecture does.

    Raises:
        StepError: `spec` is smaller somewhere, or the two differ by more than `TOLERANCE`.
    """
    device = next(model.module.parameters()).device
    old = _at_size(model, spec)
    larger = fresh(spec, seed)
    placement = place(old, larger.module)
    masks = Masks(old, larger.module, placement)
    carry_weights(old, larger.module, placement)
    masks.attach(larger.module)
    difference = _difference(old, larger)
    masks.detach()
    if not difference <= TOLERANCE:
        raise StepError(
            f"{spec.architecture} would compute something else once grown (outputs differ by {difference:.2g}): it "
            "mixes units in a way no mask is known for; grow its depth alone, or grow another architecture"
        )
    larger.module.to(device)
    return Grown(larger, placement, masks, difference)


def fresh(spec: ModelSpec, seed: int) -> Model:
    """`spec` built with initial weights of their own generator, so that torch's own goes on undisturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return build(spec)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            reason = str(error) or type(error).__name__
            raise StepError(
                f"{spec.architecture} cannot have these sizes ({reason}); choose others"
            ) from error


def _at_size(model: Model, spec: ModelSpec) -> nn.Module:
    """`model`'s network for images of `spec`'s size: a copy with resampled positions where it depends on the size."""
    before, after = model.spec.input.size, spec.input.size
    module = model.module
    if after == before:
        return module
    if after[0] < before[0] or after[1] < before[1]:
        raise StepError(f"images would shrink from {before} to {after}; growth only adds")
    if spec.arguments.get("img_size") == model.spec.arguments.get("img_size"):
        return module  # convolutions take any size
    if not hasattr(module, "set_input_size"):
        raise StepError(f"{spec.architecture} is built for one image size; leave image_size out")
    resized: Any = copy.deepcopy(module)
    resized.set_input_size(img_size=after)
    return cast(nn.Module, resized)


def _final(spec: ModelSpec, model: Model) -> ModelSpec:
    """The model's own spec, if `spec` is the same network."""
    made = build(spec).module.state_dict()
    wanted = model.module.state_dict()
    differing = [name for name in wanted if name not in made or made[name].shape != wanted[name].shape]
    if differing or spec.input.size != model.spec.input.size:
        what = f"{differing[0]}" if differing else f"the image size {spec.input.size}"
        raise TrainingError(
            f"train.grow ends with another network than {model.spec.architecture} as it was given ({what} differs); "
            "name each size of the event at 0 again, where it reaches the model's own"
        )
    return model.spec


def _difference(old: nn.Module, larger: Model) -> float:
    """Largest absolute difference of outputs on random images, in float64 on the CPU; NaN counts as infinite."""
    spec = larger.spec.input
    images = torch.randn(_PROBES, spec.channels, *spec.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [
            copy.deepcopy(module).cpu().double().eval()(images.double()) for module in (old, larger.module)
        ]
    difference = float((outputs[0] - outputs[1]).abs().max())
    return difference if difference == difference else float("inf")
