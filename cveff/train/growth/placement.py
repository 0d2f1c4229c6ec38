"""Where a network's weights lie in a larger one of the same architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cveff.errors import StepError

Places = tuple[Tensor | None, ...]
"""For each dimension of a tensor: the old indices' positions in the new tensor, or None where nothing grew."""


@dataclass(frozen=True)
class Placement:
    """How a network sits in a larger one.

    Attributes:
        places: name in the state dict -> where the old tensor lies in the new one.
        blocks: paths of the blocks that only the larger one has.
    """

    places: Mapping[str, Places]
    blocks: tuple[str, ...]

    def put(self, name: str, old: Tensor, new: Tensor) -> None:
        """Write `old`, the tensor `name` of the old network or of its shape, into `new` in place."""
        with torch.no_grad():
            new[_grid(self.places[name], new)] = old.to(new)

    def holds(self, name: str, old: Tensor, new: Tensor) -> bool:
        """Whether `old` has the shape of what `put` would write into `new`."""
        places = self.places.get(name, ())
        return old.shape == tuple(
            size if positions is None else len(positions)
            for size, positions in zip(new.shape, places, strict=False)
        )

    def units(self, name: str, dim: int) -> Tensor | None:
        """Positions of the old indices along one dimension; None where none were added."""
        return self.places[name][dim] if name in self.places else None


def place(old: nn.Module, new: nn.Module) -> Placement:
    """Find `old`'s weights in `new`: units keep their order and come first, in attention within each head and within
    queries, keys and values.

    Raises:
        StepError: `new` is smaller somewhere, has modules that are no added blocks, or kernels of another size.
    """
    before, after = old.state_dict(), new.state_dict()
    gone = [name for name in before if name not in after]
    if gone:
        raise StepError(
            f"the larger network has no {gone[0]}, which the present one has ({len(gone)} tensors in all); growth "
            "only adds: give depths that are no smaller, and widths at which both have the same layers"
        )
    inner_old, inner_new = _layouts(old), _layouts(new)
    places = {}
    for name, value in before.items():
        wanted = after[name]
        if value.ndim != wanted.ndim:
            raise StepError(f"{name} has {value.ndim} dimensions, and {wanted.ndim} in the larger network")
        places[name] = tuple(
            _positions(
                name,
                dim,
                inner_old.get((name, dim), (value.shape[dim],)),
                inner_new.get((name, dim), (wanted.shape[dim],)),
            )
            for dim in range(value.ndim)
        )
    return Placement(places, _new_blocks(old, new))


def _positions(name: str, dim: int, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor | None:
    if old == new:
        return None
    if len(old) != len(new) or any(a > b for a, b in zip(old, new, strict=False)):
        raise StepError(
            f"{name} has {' × '.join(map(str, old))} units along dimension {dim}, and {' × '.join(map(str, new))} in "
            "the larger network; growth only adds"
        )
    numbers = torch.arange(int(torch.tensor(new).prod())).reshape(new)
    return numbers[tuple(slice(size) for size in old)].flatten()


def _layouts(module: nn.Module) -> dict[tuple[str, int], tuple[int, ...]]:
    """(name, dimension) -> what its units consist of, where that is more than a list: (3, heads, dimensions), …"""
    found: dict[tuple[str, int], tuple[int, ...]] = {}

    def out(path: str, layer: nn.Module, lead: tuple[int, ...]) -> None:
        for name, value in layer.named_parameters(recurse=False):
            count = int(torch.tensor(lead).prod())
            if value.shape[0] % count == 0:
                found[f"{path}.{name}", 0] = (*lead, value.shape[0] // count)

    for path, part in module.named_modules():
        heads = getattr(part, "num_heads", None)
        if isinstance(heads, int):
            for child, lead in (("qkv", (3,)), ("kv", (2,)), ("q", ()), ("k", ()), ("v", ()), ("gate", ())):
                layer = getattr(part, child, None)
                if isinstance(layer, nn.Linear):
                    out(f"{path}.{child}", layer, (*lead, heads))
            if isinstance(layer := getattr(part, "proj", None), nn.Linear) and layer.in_features % heads == 0:
                found[f"{path}.proj.weight", 1] = (heads, layer.in_features // heads)
            if hasattr(part, "attn_dim") and isinstance(getattr(part, "norm", None), nn.Module):
                out(f"{path}.norm", part.norm, (heads,))
        elif hasattr(part, "chunk_dim") and isinstance(getattr(part, "fc1", None), nn.Module):
            out(f"{path}.fc1", part.fc1, (2,))  # timm's GluMlp: gates behind values
    return found


def _new_blocks(old: nn.Module, new: nn.Module) -> tuple[str, ...]:
    """The outermost modules that only `new` has."""
    known = {path for path, _ in old.named_modules()}
    found: list[str] = []
    for path, part in new.named_modules():
        parent_path = path.rpartition(".")[0]
        if path in known or parent_path not in known:
            continue
        if not isinstance(new.get_submodule(parent_path), (nn.Sequential, nn.ModuleList)):
            raise StepError(
                f"the larger network has a {path} ({type(part).__name__}), which is no block added behind others; "
                "choose sizes at which both networks have the same layers"
            )
        found.append(path)
    added = [
        name
        for name in new.state_dict()
        if name not in old.state_dict() and not name.startswith(tuple(f"{path}." for path in found))
    ]
    if added:
        raise StepError(
            f"the larger network has a tensor {added[0]} outside added blocks; choose other sizes"
        )
    return tuple(found)


def _grid(places: Places, new: Tensor) -> tuple[Tensor, ...]:
    """Index tensors that broadcast over every dimension of `new`."""
    grid = []
    for dim, positions in enumerate(places):
        index = torch.arange(new.shape[dim]) if positions is None else positions
        shape = [1] * new.ndim
        shape[dim] = -1
        grid.append(index.to(new.device).view(shape))
    return tuple(grid)
