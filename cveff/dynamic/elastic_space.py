"""What of a network may be made smaller, as data: the edit that says which sub-nets its weights hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from cveff.dynamic.shrink_kernels import convolution
from cveff.errors import CheckpointError, StepError

Levels = tuple[int, ...]
"""One number a dimension of a space: 0 is its largest value, then smaller and smaller."""

TRANSFORMS = "elastic_kernels"
"""Name under which a network keeps the matrices of its kernels."""


@dataclass(frozen=True)
class SubNet:
    """One network of an `ElasticSpace`.

    Attributes:
        widths: (group of channels, units it keeps), every elastic group.
        dropped: paths of the residual blocks it does without.
        kernels: (path of a convolution, side of its kernel), every elastic one.
        size: (height, width) of its images, in pixels.
    """

    widths: tuple[tuple[str, int], ...]
    dropped: tuple[str, ...]
    kernels: tuple[tuple[str, int], ...]
    size: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is its inverse."""
        return {
            "widths": dict(self.widths),
            "dropped": list(self.dropped),
            "kernels": dict(self.kernels),
            "size": list(self.size),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SubNet:
        """What `to_json` gave. Whether a network holds it is `ElasticSpace.check`'s to say.

        Raises:
            StepError: a key is missing, or a value is of another kind.
        """
        try:
            height, width = values["size"]
            return cls(
                tuple((str(name), int(count)) for name, count in values["widths"].items()),
                tuple(str(path) for path in values["dropped"]),
                tuple((str(path), int(side)) for path, side in values["kernels"].items()),
                (int(height), int(width)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StepError(
                f"this describes no sub-net ({type(error).__name__}: {error}); give what SubNet.to_json made"
            ) from error


@dataclass(frozen=True)
class ElasticSpace:
    """The sub-nets that a network's weights hold, as `Elastic` trained them. The network itself is the largest.

    Attributes:
        shares: of a group's units, descending from 1.
        widths: group of channels -> units it keeps at each of `shares`.
        order: group of channels -> its units, the most important first: those that stay are the leading ones.
        depth: the most blocks a stage loses.
        stages: first block that may go -> paths of all of its stage that may, in the order in which they go.
        sides: of depthwise kernels, descending, none where none is elastic; the first stands for what each has.
        kernels: path of a depthwise convolution -> its side at each of `sides`.
        sizes: (height, width) of images, descending.
        apart: every group, stage and convolution has its own level; otherwise one share, one depth and one side hold
            for all.
        transform: smaller kernels are the centres of larger ones times a matrix, which the network keeps below
            `elastic_kernels`.

    Raises:
        CheckpointError: at construction, for lists that do not fit each other.
    """

    shares: Sequence[float]
    widths: Mapping[str, Sequence[int]]
    order: Mapping[str, Sequence[int]]
    depth: int
    stages: Mapping[str, Sequence[str]]
    sides: Sequence[int]
    kernels: Mapping[str, Sequence[int]]
    sizes: Sequence[Sequence[int]]
    apart: bool = True
    transform: bool = False
    kind: ClassVar[str] = "elastic"

    def objection(self, kind: str) -> str | None:
        """The sub-nets share the weights, and only `Elastic` trains all of them."""
        if kind not in ("train", "distill", "tune"):
            return None
        return f"{kind} comes after elastic, whose smaller sub-nets it would spoil; extract one first (ExtractSubNet)"

    def __post_init__(self) -> None:
        try:
            for name in ("shares", "sides"):
                object.__setattr__(self, name, tuple(getattr(self, name)))
            object.__setattr__(self, "sizes", tuple(tuple(size) for size in self.sizes))
            for name in ("widths", "order", "stages", "kernels"):
                table = {key: tuple(values) for key, values in getattr(self, name).items()}
                object.__setattr__(self, name, table)
            fits = bool(self.shares) and bool(self.sizes) and all(len(size) == 2 for size in self.sizes)
            fits &= self.widths.keys() == self.order.keys()
            for name, counts in self.widths.items():
                units = self.order[name]
                fits &= len(counts) == len(self.shares) and sorted(units) == list(range(len(units)))
                fits &= all(1 <= count <= len(units) for count in counts)
            for sides in self.kernels.values():
                fits &= len(sides) == len(self.sides) and all(side >= 1 for side in sides)
        except (TypeError, AttributeError, KeyError) as error:
            raise CheckpointError(f"the elastic space is damaged ({error}); save the model again") from error
        if not fits:
            raise CheckpointError("the elastic space is damaged: its lists do not fit; save the model again")

    def apply(self, module: nn.Module) -> nn.Module:
        """Add the kernels' matrices, where there are any; else nothing changes.

        Raises:
            CheckpointError: a convolution does not exist: the space is another network's.
        """
        if not self.transform:
            return module
        matrices: dict[str, nn.Parameter] = {}
        for index, (path, sides) in enumerate(self.kernels.items()):
            try:
                like = convolution(module, path).weight
            except StepError as error:
                raise CheckpointError(f"the elastic space is another network's: {error}") from error
            for side in sorted(set(sides) - {sides[0]}):
                zeros = torch.zeros(side**2, side**2, device=like.device, dtype=like.dtype)
                matrices[f"{index}_{side}"] = nn.Parameter(zeros)
        module.register_module(TRANSFORMS, nn.ParameterDict(matrices))
        return module

    def matrix_of(self, path: str, side: int) -> str:
        """State-dict path of the matrix that makes a kernel of this side, less the identity: (side², side²)."""
        return f"{TRANSFORMS}.{list(self.kernels).index(path)}_{side}"

    @property
    def alternatives(self) -> Levels:
        """How many levels each dimension has: of widths, stages, kernels, and last the images' size."""
        widths, depths, sides = len(self.shares), self.depth + 1, max(1, len(self.sides))
        if not self.apart:
            return (widths, depths, sides, len(self.sizes))
        stages = [1 + len(blocks) for blocks in self.stages.values()]
        return (*[widths] * len(self.widths), *stages, *[sides] * len(self.kernels), len(self.sizes))

    def subnet(self, levels: Sequence[int]) -> SubNet:
        """The sub-net with these levels, one for each of `alternatives`.

        Raises:
            StepError: levels that do not exist.
        """
        wanted = self.alternatives
        if len(levels) != len(wanted) or not all(
            0 <= level < count for level, count in zip(levels, wanted, strict=True)
        ):
            raise StepError(f"levels {list(levels)} do not exist: there are {list(wanted)} of each")
        if not self.apart:
            return self._uniform(*levels)
        first, second = len(self.widths), len(self.widths) + len(self.stages)
        return self._of(levels[:first], levels[first:second], levels[second:-1], levels[-1])

    @property
    def largest(self) -> SubNet:
        """The network itself."""
        return self.subnet([0] * len(self.alternatives))

    @property
    def smallest(self) -> SubNet:
        """Everything at its least."""
        return self.subnet([count - 1 for count in self.alternatives])

    def uniform(
        self,
        width: float = 1.0,
        depth: int = 0,
        kernel: int | None = None,
        size: Sequence[int] | None = None,
    ) -> SubNet:
        """The sub-net with one share, one depth and one kernel for all.

        Args:
            width: one of `shares`.
            depth: blocks that every stage does without, as far as it has so many that may go.
            kernel: one of `sides`; convolutions with a smaller kernel keep theirs.
            size: one of `sizes`; by default the network's own.

        Raises:
            StepError: a value that was not trained; the message says which were.
        """
        sizes = [tuple(known) for known in self.sizes]
        return self._uniform(
            _level("width", width, self.shares),
            _level("depth", depth, range(self.depth + 1)),
            0 if kernel is None else _level("kernel", kernel, self.sides),
            0 if size is None else _level("size", tuple(size), sizes),
        )

    def check(self, subnet: SubNet) -> None:
        """
        Raises:
            StepError: the network does not hold this sub-net; the message names what was not trained.
        """
        _check_table("channels", dict(subnet.widths), self.widths)
        _check_table("kernels", dict(subnet.kernels), self.kernels)
        if subnet.size not in [tuple(size) for size in self.sizes]:
            _level("size", subnet.size, [tuple(size) for size in self.sizes])
        leading = {path for blocks in self.stages.values() for path in blocks}
        for blocks in self.stages.values():
            gone = [path in subnet.dropped for path in blocks]
            if gone != sorted(gone, reverse=True):
                raise StepError(
                    f"blocks go in the order {', '.join(blocks)}, not {', '.join(subnet.dropped)}"
                )
        unknown = [path for path in subnet.dropped if path not in leading]
        if unknown:
            raise StepError(f"block {unknown[0]} may not go; those that may: {', '.join(sorted(leading))}")

    def _uniform(self, width: int, depth: int, kernel: int, size: int) -> SubNet:
        return self._of(
            [width] * len(self.widths), [depth] * len(self.stages), [kernel] * len(self.kernels), size
        )

    def _of(self, widths: Sequence[int], depths: Sequence[int], kernels: Sequence[int], size: int) -> SubNet:
        height, width = self.sizes[size]
        stages = zip(self.stages.values(), depths, strict=True)
        return SubNet(
            tuple((name, self.widths[name][level]) for name, level in zip(self.widths, widths, strict=True)),
            tuple(path for blocks, level in stages for path in blocks[:level]),
            tuple(
                (path, self.kernels[path][level]) for path, level in zip(self.kernels, kernels, strict=True)
            ),
            (height, width),
        )


def space_of(edits: Sequence[Any], architecture: str) -> ElasticSpace:
    """The space among a model's edits.

    Raises:
        StepError: there is none, or something was changed after it.
    """
    found = [index for index, edit in enumerate(edits) if isinstance(edit, ElasticSpace)]
    if not found:
        raise StepError(
            f"{architecture} is not elastic: apply Elastic to it first, which trains its sub-nets"
        )
    later = [edit.kind for edit in edits[found[0] + 1 :]]
    if later:
        raise StepError(
            f"{architecture} was changed after Elastic ({', '.join(later)}), so its sub-nets are gone; extract one "
            "first and change that"
        )
    space: ElasticSpace = edits[found[0]]
    return space


def _level(name: str, value: Any, known: Sequence[Any]) -> int:
    """Position of `value` among `known`."""
    if value not in known:
        shown = ", ".join(str(item) for item in known) or "none"
        raise StepError(f"{name} {value} was not trained; trained are {shown}")
    return list(known).index(value)


def _check_table(what: str, chosen: Mapping[str, int], known: Mapping[str, Sequence[int]]) -> None:
    if chosen.keys() != known.keys():
        odd = sorted(chosen.keys() ^ known.keys())
        raise StepError(f"{what}: {odd[0]} is missing, or not elastic; name each of {', '.join(known)}")
    for name, value in chosen.items():
        _level(f"{what} of {name}:", value, sorted(set(known[name])))
