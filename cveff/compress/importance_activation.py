"""Importance as what the layers behind a unit would miss: the energy it brings to their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from cveff.compress.samples import Batches, evaluation
from cveff.compress.units import device_of, owner, per_index, per_unit, zero_scores
from cveff.errors import StepError

if TYPE_CHECKING:
    from cveff.compress.groups import Group, Member

Layer = nn.Conv2d | nn.Linear


def activation(module: nn.Module, groups: Sequence[Group], batches: Batches) -> dict[str, np.ndarray]:
    """Σ over the layers that consume the unit of E[x_c²] · ‖W[:, c]‖², x being their inputs on `batches`.

    It is the energy of what each layer would lose, its input channels taken as uncorrelated (the structured form of
    Wanda's |weight| · ‖input‖, Sun et al., ICLR 2024, and of ThiNet's reconstruction error, Luo et al., ICCV
    2017). Units that no convolution or linear layer consumes, such as channels of queries and keys, score
    the energy E[y_c²] of what produces them.

    Raises:
        StepError: an input is not finite, or a layer's weight is used without the layer being called.
    """
    consumers: dict[str, list[Member]] = {}
    producers: dict[str, list[Member]] = {}
    layers: dict[str, Layer] = {}
    for group in groups:
        consumers[group.name] = _layer_members(module, group, "in", layers)
        producers[group.name] = []
        if not consumers[group.name]:
            producers[group.name] = _layer_members(module, group, "out", layers)
            if not producers[group.name]:
                raise StepError(
                    f"group {group.name} has no convolution or linear layer in or behind it, so its activations "
                    "cannot be weighed; use importance='taylor'"
                )
    of_inputs = {owner(module, member)[0] for members in consumers.values() for member in members}
    of_outputs = {owner(module, member)[0] for members in producers.values() for member in members}
    inputs, outputs = _energies(module, layers, of_inputs, of_outputs, batches)
    scores = zero_scores(groups)
    for group in groups:
        for member in consumers[group.name]:
            path = owner(module, member)[0]
            per_channel = _consumed(layers[path], inputs[path])
            scores[group.name] += per_unit(per_channel, member.units, group.size)
        for member in producers[group.name]:
            scores[group.name] += per_unit(outputs[owner(module, member)[0]], member.units, group.size)
    return scores


def _layer_members(module: nn.Module, group: Group, role: str, layers: dict[str, Layer]) -> list[Member]:
    """The group's members of `role` that are weights of convolutions or linear layers, which join `layers`."""
    found = []
    for member in group.members:
        path, layer = owner(module, member)
        is_weight = member.role == role and member.parameter.rpartition(".")[2] == "weight"
        if is_weight and isinstance(layer, (nn.Conv2d, nn.Linear)):
            layers[path] = layer
            found.append(member)
    return found


def _consumed(layer: Layer, energy: Tensor) -> Tensor:
    """E[x_c²] · ‖W[:, c]‖² by index of the weight's dimension 1; `energy`: (input channels,)."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        return per_index(weight.float().square(), 1).cpu() * energy
    # Index j of a grouped kernel stands for the j-th channel of each of the groups.
    parts = (
        weight.float().square().flatten(2).sum(2, dtype=torch.float64).view(layer.groups, -1, weight.shape[1])
    )
    return (parts.sum(1).cpu() * energy.view(layer.groups, -1)).sum(0)


def _energies(
    module: nn.Module, layers: dict[str, Layer], of_inputs: set[str], of_outputs: set[str], batches: Batches
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean square of each channel of the layers' inputs and outputs, (channels,) float64 on the CPU."""
    inputs: dict[str, list[Tensor]] = {path: [] for path in of_inputs}
    outputs: dict[str, list[Tensor]] = {path: [] for path in of_outputs}

    def watch_input(path: str) -> Callable[..., None]:
        return lambda layer, given: inputs[path].append(_energy(layer, given[0], path, "input"))

    def watch_output(path: str) -> Callable[..., None]:
        return lambda layer, given, made: outputs[path].append(_energy(layer, made, path, "output"))

    hooks = [layers[path].register_forward_pre_hook(watch_input(path)) for path in inputs]
    hooks += [layers[path].register_forward_hook(watch_output(path)) for path in outputs]
    with removed_after(hooks), evaluation(module), torch.no_grad():
        for images, _ in batches:
            module(images.to(device_of(module)))
    return _means(inputs), _means(outputs)


def _means(found: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    for path, energies in found.items():
        if not energies:
            raise StepError(
                f"{path} was never called on the calibration images (its weight is used directly), so its "
                "activations cannot be seen; use importance='taylor'"
            )
    # Sums and counts: batches, and calls of a shared layer, may differ in size.
    return {
        path: torch.stack(parts).sum(0)[:-1] / torch.stack(parts).sum(0)[-1] for path, parts in found.items()
    }


def _energy(layer: nn.Module, values: Tensor, path: str, what: str) -> Tensor:
    """Sum of squares of each channel, and at the end the number of positions: (channels + 1,) float64."""
    rows = channels_last(layer, values)
    sums = rows.double().square().sum(0).cpu()
    if not bool(torch.isfinite(sums).all()):
        raise StepError(
            f"the {what} of {path} is not finite on the calibration images; check the weights before it"
        )
    return torch.cat([sums, torch.tensor([float(len(rows))], dtype=torch.float64)])


def channels_last(layer: nn.Module, values: Tensor) -> Tensor:
    """What goes into or comes out of a convolution or linear layer as rows: (positions, channels)."""
    if isinstance(layer, nn.Conv2d):
        values = values.movedim(-3, -1)
    return values.reshape(-1, values.shape[-1])


@contextmanager
def removed_after(hooks: Sequence[Any]) -> Iterator[None]:
    """Take the hooks off again, whatever happens."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
