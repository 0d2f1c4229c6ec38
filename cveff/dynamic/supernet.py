"""The networks inside one network: their structure as edits, and their weights as slices of the shared ones.

A sub-net in training, in a search and extracted is one and the same: the plain network that these edits make, run with
these slices.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from cveff.compress.analysis import analyze
from cveff.compress.drop_blocks import DropBlocks
from cveff.compress.groups import Analysis
from cveff.compress.prune_channels import PruneChannels
from cveff.dynamic.elastic_space import ElasticSpace, SubNet, space_of
from cveff.dynamic.image_sizes import POSITIONS, at_size, resized_positions
from cveff.dynamic.shrink_kernels import ShrinkKernels, centre
from cveff.edits import Edit
from cveff.errors import StepError
from cveff.model import Model, ModelSpec, build

REMEMBERED = 64
"""Structures of sub-nets that are kept, without weights."""

State = Mapping[str, Tensor]
"""State dict of the shared weights; tensors that carry gradients in training."""


@dataclass(frozen=True, eq=False)
class _Structure:
    """A sub-net without weights.

    Attributes:
        module: its parameters are on the meta device.
        slices: state-dict path -> (dimension, indices that stay), for what is sliced.
    """

    module: nn.Module
    slices: Mapping[str, tuple[tuple[int, Tensor], ...]]


class Supernet:
    """Structure of every sub-net of one network; the weights are given each time.

    Args:
        spec: of the network without its elastic edit.
        space: its sub-nets.
        analysis: of the network.
        device: where sub-nets are computed.

    Raises:
        StepError: the space names groups that the network does not have.
    """

    def __init__(
        self, spec: ModelSpec, space: ElasticSpace, analysis: Analysis, device: torch.device | None = None
    ) -> None:
        self.spec, self.space, self.analysis = spec, space, analysis
        self.device = device or torch.device("cpu")
        sizes = {group.name: group.size for group in analysis.groups}
        for name, order in space.order.items():
            if sizes.get(name) != len(order):
                raise StepError(
                    f"the network has no group {name} of {len(order)} units, which its elastic space names; train it "
                    "again with this version of cveff"
                )
        self._structure = lru_cache(REMEMBERED)(self._make_structure)
        self._base = lru_cache(None)(self._make_base)
        self.at_size = lru_cache(None)(lambda size: at_size(self.spec, size))

    @classmethod
    def of(cls, model: Model, device: torch.device | None = None) -> Supernet:
        """Of a model that `Elastic` trained.

        Raises:
            StepError: it is none, or was changed afterwards.
        """
        space = space_of(model.spec.edits, model.spec.architecture)
        spec = replace(model.spec, edits=model.spec.edits[:-1])
        return cls(spec, space, analyze(build(spec).module, spec.input), device)

    def edits(self, subnet: SubNet) -> tuple[Edit, ...]:
        """What makes the plain network into this sub-net, at its image size.

        Raises:
            StepError: the space does not hold it.
        """
        self.space.check(subnet)
        edits: list[Edit] = []
        if subnet.dropped:
            edits.append(DropBlocks(subnet.dropped))
        keep = {}
        for name, count in subnet.widths:
            order = self.space.order[name]
            if count < len(order):
                keep[name] = np.zeros(len(order), bool)
                keep[name][list(order[:count])] = True
        if keep:
            edits.append(_without(self.analysis.edit(keep, self._base(self.spec.input.size)), subnet.dropped))
        sides = {
            path: side
            for path, side in subnet.kernels
            if side < self.space.kernels[path][0] and not _is_gone(path, subnet.dropped)
        }
        if sides:
            edits.append(ShrinkKernels(sides))
        return tuple(edits)

    def spec_of(self, subnet: SubNet) -> ModelSpec:
        """Of the sub-net as a plain model."""
        spec = self.at_size(subnet.size)
        return replace(spec, edits=(*spec.edits, *self.edits(subnet)))

    def weights(self, state: State, subnet: SubNet) -> dict[str, Tensor]:
        """The sub-net's parameters and statistics, by the names they have in it; gradients flow back into `state`.

        Args:
            state: of the shared network, by path; what is missing is left out.
        """
        structure = self._structure(subnet)
        sides = dict(subnet.kernels)
        found: dict[str, Tensor] = {}
        for name in structure.module.state_dict():
            if name not in state:
                continue
            value = state[name]
            for dim, indices in structure.slices.get(name, ()):
                value = value.index_select(dim, indices)
            path = name.removesuffix(".weight")
            if path in sides and path != name:
                value = self._kernel(value, path, sides[path], state)
            elif name == POSITIONS:
                value = resized_positions(value, self._base(self.spec.input.size), structure.module)
            found[name] = value
        return found

    def run(self, module: nn.Module, subnet: SubNet, images: Tensor) -> Tensor:
        """Logits of a sub-net with the weights of `module`, and in its mode; statistics stay as they are.

        Args:
            module: the shared network.
            images: (N, C, H, W) float at the sub-net's size.

        Returns:
            (N, classes).
        """
        state = module.state_dict(keep_vars=True)
        structure = self._structure(subnet)
        found = self.weights(state, subnet)
        for name, _ in structure.module.named_buffers():
            if name in found and found[name] is state[name]:
                found[name] = state[name].clone()  # batch norms write to what they are given
        structure.module.train(module.training)
        logits: Tensor = functional_call(structure.module, found, (images,))
        return logits

    def model(self, state: State, subnet: SubNet) -> Model:
        """The sub-net as a plain model with weights of its own, in evaluation mode; its batch norms have the shared
        network's statistics, which are not its own.
        """
        with torch.no_grad():
            weights = {
                name: value.detach().clone(memory_format=torch.contiguous_format)
                for name, value in self.weights(state, subnet).items()
            }
        module = copy.deepcopy(self._structure(subnet).module)
        module.load_state_dict(weights, assign=True)
        return Model(self.spec_of(subnet), module.eval())

    @cached_property
    def elastic_parts(self) -> str:
        """What is elastic, in a line for people."""
        space = self.space
        shares = "/".join(f"{share:g}" for share in space.shares)
        parts = [
            f"{len(space.widths)} groups of channels ({shares})" if space.widths else "",
            f"{len(space.stages)} stages (up to {space.depth} blocks less)" if space.stages else "",
            f"{len(space.kernels)} kernels ({'/'.join(map(str, space.sides))})" if space.kernels else "",
            f"{len(space.sizes)} image sizes" if len(space.sizes) > 1 else "",
        ]
        return ", ".join(part for part in parts if part)

    def _kernel(self, weight: Tensor, path: str, side: int, state: State) -> Tensor:
        """(O, 1, side, side) from the whole kernels, by way of all sides between (OFA: Cai et al., arXiv:1908.09791,
        section 3.2).
        """
        own = self.space.kernels[path]
        if side == own[0]:
            return weight
        if not self.space.transform:
            return centre(weight, side)
        for step in sorted({step for step in own if side <= step < own[0]}, reverse=True):
            small = centre(weight, step).flatten(2)
            matrix = state[self.space.matrix_of(path, step)]
            weight = (small + small @ matrix).unflatten(2, (step, step))
        return weight

    def _make_base(self, size: tuple[int, int]) -> nn.Module:
        """The whole network at an image size, with nothing in its parameters, none of which are tied any more: each
        gets its own slice.
        """
        module = build(self.at_size(size)).module.to(self.device)
        for inner in module.modules():
            for name, parameter in inner.named_parameters(recurse=False):
                hollow = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
                inner._parameters[name] = hollow  # type: ignore[assignment]
        return module

    def _make_structure(self, subnet: SubNet) -> _Structure:
        module = _light_copy(self._base(subnet.size))
        slices: dict[str, tuple[tuple[int, Tensor], ...]] = {}
        for edit in self.edits(subnet):
            module = edit.apply(module)
            if isinstance(edit, PruneChannels):
                slices = {
                    path: tuple(
                        (int(dim), torch.tensor(list(indices), device=self.device))
                        for dim, indices in dims.items()
                    )
                    for path, dims in edit.keep.items()
                }
        return _Structure(module, slices)


def _light_copy(module: nn.Module) -> nn.Module:
    """A copy for edits that shares tensors and empty tables of hooks, which are most of what a copy takes time for: in
    training there are new sub-nets every step. Nobody hooks onto it.
    """
    shared: dict[int, object] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    for inner in module.modules():
        for name, value in vars(inner).items():
            if "_hooks" in name and isinstance(value, dict) and not value:
                shared[id(value)] = value
    return copy.deepcopy(module, shared)


def _is_gone(path: str, dropped: tuple[str, ...]) -> bool:
    return any(path == block or path.startswith(f"{block}.") for block in dropped)


def _without(edit: PruneChannels, dropped: tuple[str, ...]) -> PruneChannels:
    """The edit for the network that these blocks are gone from."""

    def rest(table: Mapping[str, Any]) -> dict[str, Any]:
        return {path: values for path, values in table.items() if not _is_gone(path, dropped)}

    return PruneChannels(rest(edit.keep), rest(edit.attributes), rest(edit.flexible))
