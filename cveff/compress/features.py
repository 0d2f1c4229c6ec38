"""Feature matching: which layers of two networks correspond, and the adapters between their widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cveff.compress.distill_losses import feature_error
from cveff.compress.teacher import Teacher
from cveff.errors import StepError
from cveff.runtime.input_spec import InputSpec


@dataclass(frozen=True)
class Stage:
    """The last layer of a network that computes at one resolution.

    Attributes:
        path: of the module whose output is taken.
        positions: pixels or tokens of the output.
        channels: of each.
        channels_last: whether a 4-d output is (N, H, W, C), as Swin's are.
        is_tokens: whether the output is 3-d, (N, positions, channels).
    """

    path: str
    positions: int
    channels: int
    channels_last: bool
    is_tokens: bool = False

    def tokens(self, feature: Tensor) -> Tensor:
        """The module's output as (N, positions, channels) float32."""
        if feature.ndim == 4:
            feature = feature.flatten(1, 2) if self.channels_last else feature.flatten(2).transpose(1, 2)
        return feature.float()


def stages(module: nn.Module, size: tuple[int, int], channels: int) -> tuple[Stage, ...]:
    """One `Stage` a resolution, in the order of computation; found by running one blank image.

    Layers in the middle of a block that changes the resolution, such as the expansion before a strided convolution,
    are passed over for the output of the block before.

    Args:
        size, channels: of the images `module` takes.
    """
    seen: dict[str, Stage] = {}

    def note(path: str, output: Any) -> None:
        stage = stage_of(path, output, size)
        if stage is not None:
            seen.pop(path, None)  # so that the dictionary's order is that of the last calls
            seen[path] = stage

    like = next(module.parameters())
    was_training = module.training
    hooks = [
        part.register_forward_hook(lambda _, __, output, path=path: note(path, output))
        for path, part in module.named_modules()
        if path
    ]
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, channels, *size, device=like.device, dtype=like.dtype))
    finally:
        module.train(was_training)
        for hook in hooks:
            hook.remove()
    found: dict[int, Stage] = {}
    for stage in seen.values():
        if not _is_within_a_change(stage, seen, module):
            found.pop(stage.positions, None)
            found[stage.positions] = stage
    return tuple(found.values())


class FeatureMatching(nn.Module):
    """Pairs of stages with as many positions, and a linear map (a 1×1 convolution) from student to teacher each.

    An adapter between equal widths starts as the identity.

    Args:
        student: the network and the images it takes.
        teacher_input: the images the teacher takes.
        seed: of the adapters' first weights.

    Raises:
        StepError: no two stages match; both lists of resolutions are shown.
    """

    def __init__(
        self,
        student: nn.Module,
        student_input: InputSpec,
        teacher: Teacher,
        teacher_input: InputSpec,
        seed: int,
    ) -> None:
        super().__init__()
        ours = stages(student, student_input.size, student_input.channels)
        theirs = stages(teacher.module, teacher_input.size, teacher_input.channels)
        by_positions = {stage.positions: stage for stage in theirs}
        self.pairs = [(own, by_positions[own.positions]) for own in ours if own.positions in by_positions]
        if not self.pairs:
            raise StepError(
                f"no layer of the student ({_list(ours)}) has as many positions as one of the teacher "
                f"({_list(theirs)}); use method 'logits' or 'dist'"
            )
        self._teacher = [teacher]  # in a list, so that its weights are no part of this module
        random = torch.Generator().manual_seed(seed)
        self.adapters = nn.ModuleList(
            _adapter(own.channels, other.channels, random) for own, other in self.pairs
        )

    def forward(self, student: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """The student's logits, and the mean over pairs of the relative feature error, summed over images."""
        teacher = self._teacher[0]
        with captured(teacher.module, [other.path for _, other in self.pairs]) as theirs, torch.no_grad():
            teacher.module(teacher.view(images))
        with captured(student, [own.path for own, _ in self.pairs]) as ours:
            logits = student(images)
        errors = [
            feature_error(adapter(own.tokens(ours[own.path])).float(), other.tokens(theirs[other.path]))
            for (own, other), adapter in zip(self.pairs, self.adapters, strict=True)
        ]
        return logits, torch.stack(errors).mean()


@contextmanager
def captured(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of the modules at `paths`, filled in by calls of `module` within the block."""
    outputs: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        return lambda _, __, output: outputs.__setitem__(path, output)

    hooks = [module.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def stage_of(path: str, output: Any, size: tuple[int, int]) -> Stage | None:
    """What `output` (of one image) is as a stage; None for vectors, attention maps and everything else."""
    if not isinstance(output, Tensor):
        return None
    shape = tuple(output.shape)
    if len(shape) == 3 and shape[1] > 1:
        return Stage(path, shape[1], shape[2], channels_last=False, is_tokens=True)
    if len(shape) == 4 and shape[2] * shape[3] > 1 and _is_grid(shape[2:], size):
        return Stage(path, shape[2] * shape[3], shape[1], channels_last=False)
    if len(shape) == 4 and shape[1] * shape[2] > 1 and _is_grid(shape[1:3], size):
        return Stage(path, shape[1] * shape[2], shape[3], channels_last=True)
    return None


def _is_within_a_change(stage: Stage, seen: Mapping[str, Stage], module: nn.Module) -> bool:
    """Whether a block around `stage` gives another resolution; a sequence of blocks does so without being one."""
    parts = stage.path.split(".")
    around = [".".join(parts[:length]) for length in range(1, len(parts))]
    return any(
        path in seen
        and seen[path].positions != stage.positions
        and not isinstance(module.get_submodule(path), nn.Sequential)
        for path in around
    )


def _is_grid(grid: Sequence[int], size: tuple[int, int]) -> bool:
    """Whether `grid` is the image divided by one whole stride, give or take a border."""
    strides = [round(side / cells) for side, cells in zip(size, grid, strict=True)]
    return strides[0] == strides[1] >= 1 and all(
        abs(side / stride - cells) <= 1 for side, stride, cells in zip(size, strides, grid, strict=True)
    )


def _adapter(inputs: int, outputs: int, random: torch.Generator) -> nn.Linear:
    adapter = nn.Linear(inputs, outputs)
    with torch.no_grad():
        adapter.bias.zero_()
        if inputs == outputs:
            nn.init.eye_(adapter.weight)
        else:
            adapter.weight.normal_(std=inputs**-0.5, generator=random)
    return adapter


def _list(found: Sequence[Stage]) -> str:
    return ", ".join(f"{stage.path}: {stage.positions}" for stage in found) or "none with positions"
