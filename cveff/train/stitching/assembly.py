"""The edit that takes stages out of several networks and joins them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from cveff.errors import CheckpointError
from cveff.model import ModelSpec, build
from cveff.train.stitching.adapter import Adapter
from cveff.train.stitching.layout import Layout
from cveff.train.stitching.pieces import pieces

Section = tuple[int, str, str]
"""Which network, the module behind which the section begins ("" for the image), and the one it ends with ("" for the
logits)."""


class Assembled(nn.Module):
    """Sections of networks with an adapter between each two.

    Args:
        sections: in the order they run; the first takes images (N, C, H, W), the last gives logits (N, classes).
        adapters: one fewer.
    """

    def __init__(self, sections: Iterable[nn.Module], adapters: Iterable[nn.Module]) -> None:
        super().__init__()
        self.sections, self.adapters = nn.ModuleList(sections), nn.ModuleList(adapters)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) float → (N, classes) logits."""
        return self.until(len(self.adapters), x)

    def until(self, index: int, x: Tensor) -> Tensor:
        """What section `index` gives for images (N, C, H, W) float."""
        x = self.sections[0](x)
        for adapter, section in zip(self.adapters[:index], self.sections[1 : index + 1], strict=True):
            x = section(adapter(x))
        return x


@dataclass(frozen=True)
class Assembly:
    """Keep the network's first section, and continue with sections of others.

    Attributes:
        parents: specs of the other networks, as JSON; network 0 is the one that is changed.
        sections: see `Section`; the first is network 0's.
        joints: what comes into each adapter and what goes out of it.

    Raises:
        CheckpointError: at construction, for lists whose lengths do not fit.
        StepError: when applied: a network has no such section.
    """

    parents: tuple[Mapping[str, Any], ...]
    sections: tuple[Section, ...]
    joints: tuple[tuple[Layout, Layout], ...]
    kind: ClassVar[str] = "assembly"

    def __post_init__(self) -> None:
        used = {network for network, _, _ in self.sections}
        if len(self.joints) != len(self.sections) - 1 or not used <= set(range(len(self.parents) + 1)):
            raise CheckpointError(
                f"an assembly has {len(self.sections)} sections, {len(self.joints)} joints and {len(self.parents)} "
                "other networks, which do not fit together; the model's description is damaged"
            )

    def apply(self, module: nn.Module) -> nn.Module:
        """The joined network, with fresh weights but for `module`'s own."""
        return self.join([module, *(build(ModelSpec.from_json(spec)).module for spec in self.parents)])

    def join(self, networks: Sequence[nn.Module]) -> Assembled:
        """The joined network of `networks`, whose weights it shares, with fresh adapters."""
        sections = [section_of(networks[index], start, end) for index, start, end in self.sections]
        adapters = [Adapter(Layout(*source), Layout(*target)) for source, target in self.joints]
        return Assembled(sections, adapters)


def section_of(network: nn.Module, start: str, end: str) -> nn.Module:
    """What a network does behind `start` ("": from the image on) up to `end` ("": to the logits)."""
    found = pieces(network, [cut for cut in (start, end) if cut])
    return found[1 if start else 0]
