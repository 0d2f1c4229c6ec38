"""The edit that takes whole residual blocks out of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from cveff.errors import StepError


class Skip(nn.Module):
    """What stays of a dropped block: returns its first argument, whatever else the parent hands it (masks, sizes)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x`, unchanged."""
        return x


@dataclass(frozen=True)
class DropBlocks:
    """Replace each of `modules` by `Skip`. The other modules keep their names.

    Which modules can go is `cveff.compress.depth.removable_blocks`' to say.

    Raises:
        StepError: when applied: a module does not exist, or is dropped already.
    """

    modules: tuple[str, ...]
    kind: ClassVar[str] = "drop_blocks"

    def apply(self, module: nn.Module) -> nn.Module:
        """Change `module` in place and return it."""
        for path in self.modules:
            parent_path, _, name = path.rpartition(".")
            try:
                parent, block = module.get_submodule(parent_path), module.get_submodule(path)
            except AttributeError:
                raise StepError(
                    f"the network has no block {path!r} to drop; find blocks in it again"
                ) from None
            if isinstance(block, Skip) or block is module:
                raise StepError(
                    f"block {path!r} is dropped already, or the network itself; remove it from the list"
                )
            parent._modules[name] = Skip().train(block.training)
        return module
