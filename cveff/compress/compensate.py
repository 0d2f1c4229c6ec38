"""Least-squares repair of the layers behind dropped channels: the kept channels stand in for the dropped ones.

He et al., "Channel Pruning for Accelerating Very Deep Neural Networks" (ICCV 2017), section 3.1, step (ii), solved in
closed form from second moments, so that calibration images are seen once and never stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from cveff.compress.importance_activation import Layer, channels_last, removed_after
from cveff.compress.samples import Batches, evaluation, require_batches
from cveff.compress.units import check_groups, device_of, owner
from cveff.errors import StepError

if TYPE_CHECKING:
    from cveff.compress.groups import Group
    from cveff.compress.trace import Trace

MAX_CHANNELS = 4096
"""Inputs of a layer up to which its second moments, (channels, channels) float64, are gathered."""

_RESHAPES = ("aten.flatten.", "aten.reshape.", "aten.view.")
_SHAPES_ALIKE = ("aten.reshape_as.", "aten.view_as.")


@dataclass(frozen=True)
class Compensation:
    """What `compensate` found.

    Attributes:
        state: the parameters and buffers that change, by state-dict path, in their old shapes; columns of
            dropped channels are zero, so the dense network with this state computes what the pruned one will.
        errors: layer -> (before, after) relative output error on the calibration images, of dropping alone and
            of dropping with repair: E‖y − ŷ‖² / E‖y‖².
        skipped: layer -> why it was left as it is (its dropped columns are not in `state` then).
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def compensate(
    module: nn.Module,
    groups: Sequence[Group],
    keep: Mapping[str, np.ndarray],
    batches: Batches,
    *,
    damping: float = 1e-4,
    trace: Trace | None = None,
) -> Compensation:
    """Repair every convolution and linear layer that loses inputs: W'[:, K] = W C[:, K] C[K, K]⁻¹.

    C is the covariance of the layer's inputs where its mean error can go somewhere (its bias, or the running
    mean of a batch norm that alone reads it), else their uncentred second moments. A k×k kernel is mapped tap by tap
    by the channels' moments. Layers are repaired for the dense network's inputs, one by one. `module` is left as it
    was.

    Args:
        keep: group name -> bool (size,), True for units that stay (groups left out keep everything).
        damping: ridge on C[K, K], relative to its mean diagonal.
        trace: of `module`; finds the batch norms that take up mean errors.

    Raises:
        StepError: no images, groups of another network, masks that do not fit or keep nothing, or inputs that are
            not finite.
    """
    return Compensator(module, groups, batches, damping=damping, trace=trace, masks=keep)(keep)


class Compensator:
    """Repairs of one network for many masks: what layers read is gathered once.

    Args:
        module: the network; left as it was.
        groups: that masks may be given for.
        damping, trace: as of `compensate`.
        masks: the only ones that will be asked for; by default any.

    Raises:
        StepError: no images, groups of another network, or inputs that are not finite.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[Group],
        batches: Batches,
        *,
        damping: float = 1e-4,
        trace: Trace | None = None,
        masks: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        given = require_batches(batches, "compensation")
        check_groups(module, groups)
        if not damping >= 0:
            raise StepError(f"damping {damping} is negative; give 0 or more, such as 1e-4")
        self._module, self._groups, self._damping = module, groups, damping
        self._norms = {} if trace is None else norms_behind(trace)
        self._skipped: dict[str, str] = {}
        self._layers: dict[str, Layer] = {}
        for path, mask in _kept_inputs(module, groups, masks or {}).items():
            if masks is not None and bool(mask.all()):
                continue
            layer = module.get_submodule(path)
            assert isinstance(layer, (nn.Conv2d, nn.Linear))
            channels = layer.weight.shape[1]
            if channels > MAX_CHANNELS:
                self._skipped[path] = f"its {channels} inputs to a channel exceed {MAX_CHANNELS}"
            else:
                self._layers[path] = layer
        self._moments = _moments(module, self._layers, given)

    def __call__(self, keep: Mapping[str, np.ndarray]) -> Compensation:
        """The repair for one choice of what stays.

        Args:
            keep: as of `compensate`.

        Raises:
            StepError: masks that do not fit or keep nothing.
        """
        result = Compensation()
        for path, mask in _kept_inputs(self._module, self._groups, keep).items():
            if bool(mask.all()):
                continue
            if path in self._skipped:
                result.skipped[path] = self._skipped[path]
            elif path not in self._moments:
                raise StepError(
                    f"{path} loses inputs by these masks and not by those given first; give them first"
                )
            elif self._moments[path].count == 0:
                result.skipped[path] = "it was never called: its weight is used directly"
            else:
                self._repair(path, mask, result)
        return result

    def _repair(self, path: str, kept: np.ndarray, result: Compensation) -> None:
        layer = self._layers[path]
        shift = self._norms.get(f"{path}.weight") if layer.bias is None else f"{path}.bias"
        repaired = _repair(layer, kept, self._moments[path], self._damping, shift is not None)
        rows = repaired.rows.movedim(2, 3).reshape(layer.weight.shape)
        result.state[f"{path}.weight"] = rows.to(layer.weight.device, layer.weight.dtype)
        result.errors[path] = repaired.errors
        if shift is not None:
            owner_path, _, name = shift.rpartition(".")
            value = getattr(self._module.get_submodule(owner_path), name).detach()
            # A bias is added; a batch norm subtracts its running mean, so there the mean error leaves it.
            sign = 1 if name == "bias" else -1
            result.state[shift] = value + sign * repaired.lost.to(value)


def moment_bytes(module: nn.Module, groups: Sequence[Group]) -> int:
    """Bytes that a `Compensator` of these groups holds."""
    total = 0
    for path in _kept_inputs(module, groups, {}):
        layer = module.get_submodule(path)
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        channels = layer.weight.shape[1]
        count = layer.groups if isinstance(layer, nn.Conv2d) else 1
        total += 8 * count * channels**2 if channels <= MAX_CHANNELS else 0
    return total


class _Moments:
    """Sums of x and x xᵀ of a layer's inputs, one matrix a group of its channels: (groups, C, C) float64."""

    def __init__(self, layer: Layer) -> None:
        self.num_groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        self.count = 0
        self.total: Tensor | None = None
        self.products: Tensor | None = None

    def add(self, layer: Layer, values: Tensor, path: str) -> None:
        rows = channels_last(layer, values)
        rows = rows.reshape(len(rows), self.num_groups, -1).movedim(1, 0).double()  # (groups, positions, C)
        total, products = rows.sum(1), rows.mT @ rows
        if not bool(torch.isfinite(products).all()):
            raise StepError(
                f"the input of {path} is not finite on the calibration images; check the weights before it"
            )
        self.count += rows.shape[1]
        self.total = total if self.total is None else self.total + total
        self.products = products if self.products is None else self.products + products

    def means(self) -> tuple[Tensor, Tensor]:
        """E[x], (groups, C), and E[x xᵀ], (groups, C, C)."""
        assert self.total is not None and self.products is not None
        return self.total / self.count, self.products / self.count


def _moments(module: nn.Module, layers: Mapping[str, Layer], batches: Batches) -> dict[str, _Moments]:
    moments = {path: _Moments(layer) for path, layer in layers.items()}

    def watch(path: str) -> Any:
        return lambda layer, given: moments[path].add(layer, given[0], path)

    hooks = [layer.register_forward_pre_hook(watch(path)) for path, layer in layers.items()]
    with removed_after(hooks), evaluation(module), torch.no_grad():
        for images, _ in batches:
            module(images.to(device_of(module)))
    return moments


def _kept_inputs(
    module: nn.Module, groups: Sequence[Group], keep: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Layer -> bool (inputs,), along dimension 1 of its weight, over all groups that feed it."""
    unknown = sorted(keep.keys() - {group.name for group in groups})
    if unknown:
        raise StepError(f"masks are given for {unknown}, which are no groups of this network")
    kept: dict[str, np.ndarray] = {}
    for group in groups:
        mask = np.asarray(keep.get(group.name, np.ones(group.size, bool)), bool)
        if mask.shape != (group.size,) or not mask.any():
            raise StepError(
                f"the mask of group {group.name} has shape {mask.shape} and keeps {int(mask.sum())} units; "
                f"give ({group.size},) with at least one True"
            )
        for member in group.members:
            path, layer = owner(module, member)
            is_weight = member.role == "in" and member.dim == 1 and member.parameter.endswith("weight")
            if is_weight and isinstance(layer, (nn.Conv2d, nn.Linear)):
                stays = np.where(member.units >= 0, mask[member.units], True)
                kept[path] = kept.get(path, np.ones(len(stays), bool)) & stays
    return kept


@dataclass(frozen=True)
class _Repaired:
    """New rows (groups, out, taps, C), the mean error (out,) they leave, and relative errors before and after."""

    rows: Tensor
    lost: Tensor
    errors: tuple[float, float]


def _repair(layer: Layer, kept: np.ndarray, moments: _Moments, damping: float, is_centred: bool) -> _Repaired:
    """Solve one layer. `is_centred`: its mean error will be taken up elsewhere, so only the rest is minimised."""
    mean, second = moments.means()  # (groups, C), (groups, C, C)
    stay, gone = (torch.from_numpy(np.flatnonzero(mask)).to(mean.device) for mask in (kept, ~kept))
    centred = second - mean[:, :, None] * mean[:, None, :] if is_centred else second
    among = centred[:, stay][:, :, stay]  # (groups, K, K)
    between = centred[:, stay][:, :, gone]  # (groups, K, D)
    ridge = damping * among.diagonal(dim1=1, dim2=2).mean(1)
    # Channels that are always 0 would leave the matrix singular: the smallest ridge that float64 resolves.
    ridge = ridge.clamp_min(1e-12 * float(centred.diagonal(dim1=1, dim2=2).mean()) + 1e-30)
    damped = among + torch.diag_embed(ridge[:, None].expand(-1, len(stay)))
    stand_in = torch.linalg.solve(damped, between).mT  # x_D ≈ A x_K, up to its mean error: (groups, D, K)

    weight = layer.weight.detach().to(mean)  # (groups · out, C, …)
    rows = weight.reshape(moments.num_groups, -1, weight.shape[1], weight[0, 0].numel()).movedim(3, 2)
    lost_rows = rows[..., gone].flatten(1, 2)  # (groups, out · taps, D)
    new = torch.zeros_like(rows)
    new[..., stay] = rows[..., stay] + (lost_rows @ stand_in).view(*rows.shape[:3], -1)
    residual = mean[:, gone] - (stand_in @ mean[:, stay, None])[..., 0]  # E[x_D − A x_K]: (groups, D)
    lost = torch.einsum("gotd,gd->go", rows[..., gone], residual).reshape(-1)

    # Taps are taken as uncorrelated: the energy of an output is Σ over taps of wᵀ E[x xᵀ] w.
    gram = lost_rows.mT @ lost_rows
    mixed = stand_in @ between
    left = centred[:, gone][:, :, gone] - mixed - mixed.mT + stand_in @ among @ stand_in.mT  # of x_D − A x_K
    whole = rows.flatten(1, 2).float()
    energy = max(float(((whole @ second.float()) * whole).sum()), 1e-300)
    before, after = ((gram * errors).sum() for errors in (second[:, gone][:, :, gone], left))
    return _Repaired(new, lost, (float(before) / energy, max(float(after), 0.0) / energy))


def norms_behind(trace: Trace) -> dict[str, str]:
    """Path of a layer's weight -> path of the running mean of the batch norm that alone reads its output."""
    found = {}
    for node in trace.program.graph.nodes:
        if node.op != "call_function" or not str(node.target).startswith("aten.batch_norm."):
            continue
        source, running_mean = node.args[0], node.args[3]
        while str(source.target).startswith(_RESHAPES) and _num_readers(source) == 1:
            source = source.args[0]
        if _num_readers(source) != 1 or not str(source.target).startswith(("aten.conv2d.", "aten.linear.")):
            continue
        weight = trace.parameters.get(source.args[1].name)
        statistic = trace.parameters.get(getattr(running_mean, "name", ""))
        # A reshape may have moved other numbers to where the norm expects channels.
        channels, dim = trace.shapes[source.args[1].name][0], 1 if "conv2d" in str(source.target) else -1
        seen = trace.shapes[node.args[0].name]
        is_whole = source is node.args[0] or (dim == -1 and len(seen) == 2)
        if weight is not None and statistic is not None and is_whole and seen[1] == channels:
            found[weight] = statistic
    return found


def _num_readers(node: fx.Node) -> int:
    """Users of a value's numbers; `reshape_as` reads only the shape of its second argument."""
    return sum(
        not (str(user.target).startswith(_SHAPES_ALIKE) and user.args[0] is not node) for user in node.users
    )
