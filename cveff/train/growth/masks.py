"""Masks that keep a grown network's function: what is new counts `value` times, from 0 (the old function) to 1.

As in MSG (arXiv:2305.02869, section 3.2): new units are multiplied by `value` where they are read, norms are taken over
the units as far as they are let in, and a new block gives x + value · (block(x) - x). At 0 the output is the old one's
for any new weights; at 1 it is that of the plain network, and the masks are taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cveff.errors import StepError
from cveff.train.growth.placement import Placement

_BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


class Masks:
    """What multiplies a grown network's new units. The network's modules and weights stay those of the plain one.

    Args:
        old: the network before; only its structure is looked at.
        new: the larger one.
        placement: of `old` in `new`.

    Attributes:
        value: how far what is new is let in, in [0, 1].

    Raises:
        StepError: units are added where no mask keeps the function; the module is named.
    """

    def __init__(self, old: nn.Module, new: nn.Module, placement: Placement) -> None:
        self.value = 0.0
        self._handles: list[RemovableHandle] = []
        self._inputs: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}
        self._queries: dict[str, tuple[Tensor, int, int]] = {}
        self._blocks = placement.blocks
        known = dict(old.named_modules())
        for path, part in new.named_modules():
            if path not in known or path.startswith(tuple(f"{block}." for block in placement.blocks)):
                continue
            self._plan(path, known[path], part, placement)

    def attach(self, module: nn.Module) -> None:
        """Mask `module`, a network of the larger structure, until `detach`."""
        for path, units in self._inputs.items():
            part = module.get_submodule(path)
            dim = -1 if isinstance(part, nn.Linear) else 1
            self._handles.append(part.register_forward_pre_hook(self._mask_input(units, dim)))
        for path, units in self._norms.items():
            self._handles.append(module.get_submodule(path).register_forward_hook(self._mask_norm(units)))
        for path, (units, old_dim, new_dim) in self._queries.items():
            hook = self._mask_queries(units, old_dim, new_dim)
            self._handles.append(module.get_submodule(path).register_forward_hook(hook))
        for path in self._blocks:
            self._handles.append(module.get_submodule(path).register_forward_hook(self._fade_in))

    def detach(self) -> None:
        """Leave the plain networks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _plan(self, path: str, old: nn.Module, new: nn.Module, placement: Placement) -> None:
        if isinstance(new, (nn.Linear, *_CONVOLUTIONS)):
            self._plan_weight(path, old, new, placement)
        elif hasattr(new, "head_dim") and new.head_dim != old.head_dim:
            self._plan_queries(path, old, new)
        elif not isinstance(new, _BATCH_NORMS) and (size := _norm_size(new)) is not None:
            if size == _norm_size(old):
                return
            groups = getattr(new, "num_groups", 1)
            if groups > 1 and size % groups == 0 and size // groups == _norm_size(old) // old.num_groups:  # type: ignore[operator]
                return
            positions = placement.units(f"{path}.weight", 0)
            if groups > 1 or positions is None:
                raise StepError(
                    f"{path} ({type(new).__name__}) normalises over units that grow, in a way no mask is known for; "
                    "keep its width"
                )
            self._norms[path] = _is_old(positions, size)

    def _plan_weight(self, path: str, old: Any, new: Any, placement: Placement) -> None:
        name = f"{path}.weight"
        if old.weight.shape[2:] != new.weight.shape[2:]:
            raise StepError(
                f"{path} would get another kernel size, which changes what it computes; keep its width"
            )
        positions = placement.units(name, 1)
        if positions is None:
            return
        if getattr(new, "groups", 1) > 1:
            raise StepError(
                f"{path} has {new.groups} groups that would each grow, so that units change groups; keep its width"
            )
        self._inputs[path] = _is_old(positions, new.weight.shape[1])

    def _plan_queries(self, path: str, old: Any, new: Any) -> None:
        """Larger heads: new dimensions of queries are let in, and scores divided by the root of those that are in."""
        heads, before, after = int(new.num_heads), int(old.head_dim), int(new.head_dim)
        mine = torch.arange(after) < before
        everywhere = torch.ones(heads * after, dtype=torch.bool)
        if not isinstance(getattr(new, "q_norm", nn.Identity()), nn.Identity):
            self._queries[f"{path}.q_norm"] = (torch.stack([mine, torch.ones_like(mine)]), before, after)
        elif isinstance(getattr(new, "qkv", None), nn.Linear):
            others = everywhere.repeat(
                2
            )  # keys and values, which queries' zeros and the projection's mask take care of
            units = torch.stack([torch.cat([mine.repeat(heads), others]), torch.cat([everywhere, ~others])])
            self._queries[f"{path}.qkv"] = (units, before, after)
        elif isinstance(getattr(new, "q", None), nn.Linear):
            self._queries[f"{path}.q"] = (torch.stack([mine.repeat(heads), everywhere]), before, after)

    def _mask_input(self, units: Tensor, dim: int) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def hook(part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0] * _along(self._mask(units, args[0]), args[0], dim), *args[1:])

        return hook

    def _mask_queries(self, units: Tensor, old_dim: int, new_dim: int) -> Hook:
        def hook(part: nn.Module, args: tuple[Any, ...], made: Tensor) -> Tensor:
            inside = old_dim + self.value * (new_dim - old_dim)
            is_query = units[1].to(made.device)
            mask = self._mask(units[0], made)
            return made * torch.where(is_query, mask * (new_dim / inside) ** 0.5, mask)

        return hook

    def _mask_norm(self, units: Tensor) -> Hook:
        def hook(part: nn.Module, args: tuple[Any, ...], made: Tensor) -> Tensor:
            x: Tensor = args[0]
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            return masked_norm(part, x, self._mask(units, x)).to(made.dtype)

        return hook

    def _fade_in(self, part: nn.Module, args: tuple[Any, ...], made: Tensor) -> Tensor:
        if not isinstance(made, Tensor) or made.shape != args[0].shape:
            raise StepError(
                f"a new {type(part).__name__} changes its input's shape, so it cannot fade in; grow depth where blocks "
                "repeat"
            )
        return args[0] + self.value * (made - args[0])

    def _mask(self, units: Tensor, like: Tensor) -> Tensor:
        """1 for old units, `value` for new ones."""
        units = units.to(like.device)
        return torch.where(units, 1.0, self.value).to(like.dtype)


def masked_norm(part: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """A layer norm, an RMS norm or a global response norm over units weighted by `mask`.

    Args:
        part: the norm, whose scale, shift and epsilon are used.
        x: float, units last; second if `part` takes (N, C, H, W).
        mask: (C,) weights; their sum takes the place of the number of units.
    """
    dim = 1 if _is_channels_first(part, x) else -1
    weight: Tensor | None = getattr(part, "weight", None)
    bias: Tensor | None = getattr(part, "bias", None)
    eps: float = part.eps if getattr(part, "eps", None) is not None else torch.finfo(x.dtype).eps  # type: ignore[assignment]
    units, count = _along(mask, x, dim), mask.sum()
    if type(part).__name__ == "GlobalResponseNorm":
        spread = x.norm(p=2, dim=part.spatial_dim, keepdim=True)  # type: ignore[arg-type]
        share = spread / ((units * spread).sum(dim, keepdim=True) / count + eps)
        assert weight is not None and bias is not None
        return x + _along(bias, x, dim) + _along(weight, x, dim) * x * share
    over = list(range(1, x.ndim)) if isinstance(part, nn.GroupNorm) else [dim]
    # A group norm's one group is all units at all places.
    size = count * (x[0, 0].numel() if isinstance(part, nn.GroupNorm) else 1)
    if "rms" in type(part).__name__.lower():
        made = x * torch.rsqrt((units * x.square()).sum(over, keepdim=True) / size + eps)
    else:
        centred = x - (units * x).sum(over, keepdim=True) / size
        made = centred * torch.rsqrt((units * centred.square()).sum(over, keepdim=True) / size + eps)
    if weight is not None:
        made = made * _along(weight, x, dim)
    return made if bias is None else made + _along(bias, x, dim)


def _norm_size(part: nn.Module) -> int | None:
    """Units that a norm is taken over; None for what is no norm."""
    if isinstance(part, nn.GroupNorm):
        return part.num_channels
    if type(part).__name__ == "GlobalResponseNorm":
        return int(part.weight.numel())  # type: ignore[union-attr, operator]
    shape = getattr(part, "normalized_shape", None)
    if shape is None:
        return None
    return int(torch.Size(shape).numel())


def _is_channels_first(part: nn.Module, x: Tensor) -> bool:
    if type(part).__name__ == "GlobalResponseNorm":
        return bool(part.channel_dim == 1)
    return isinstance(part, nn.GroupNorm) or (x.ndim == 4 and "2d" in type(part).__name__)


def _along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """(C,) values, shaped to multiply `x` along `dim`."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return values.view(shape)


def _is_old(positions: Tensor, size: int) -> Tensor:
    units = torch.zeros(size, dtype=torch.bool)
    units[positions] = True
    return units


def masked_paths(module: nn.Module) -> Iterator[str]:
    """Paths of the modules that still have hooks of any mask."""
    for path, part in module.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        if any(getattr(hook, "__module__", "") == __name__ for hook in hooks):
            yield path
