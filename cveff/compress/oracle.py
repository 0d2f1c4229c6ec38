"""The law of structured pruning: the small network computes what the dense one does with those channels at zero.

The dense side runs the exported graph with every share of the removed channels set to zero; statistics over
channels (layer norm, a mean over channels) are taken over those that stay, as the small network takes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from cveff.compress.groups import Analysis
from cveff.compress.layout import stays
from cveff.compress.operators import MOVES, operator_name


@torch.no_grad()
def zeroed(
    analysis: Analysis,
    keep: Mapping[str, np.ndarray],
    images: torch.Tensor,
    module: nn.Module | None = None,
) -> torch.Tensor:
    """Output of the dense network with the contributions of removed channels at zero.

    Args:
        keep: group name -> bool (size,): which units stay.
        images: (N, C, H, W) float, normalised.
        module: the dense network whose weights to use; by default they are those it was traced with.

    Returns:
        (N, classes) float.
    """
    masks = analysis.masks(keep)
    tensors = _tensors(analysis, module)
    written = _written(analysis)
    values: list[Any] = []
    for node in analysis.trace.nodes:
        if node.op != "placeholder":
            continue
        path = analysis.trace.parameters.get(node.name)
        if path is not None:
            value: torch.Tensor | None = _without(
                tensors[path].detach(), analysis.parameters.get(path, {}), masks
            )
        else:
            value = analysis.trace.constants.get(node.name)
        values.append((value, node.name in written))
    position = next(index for index, (value, _) in enumerate(values) if value is None)
    outputs = []
    for image in images:
        arguments = [
            value.clone() if is_written and value is not None else value for value, is_written in values
        ]
        arguments[position] = image[None]
        result = _Masked(analysis, masks).run(*arguments)
        outputs.append(result[0] if isinstance(result, (tuple, list)) else result)
    return torch.cat(outputs)


def _tensors(analysis: Analysis, module: nn.Module | None) -> Mapping[str, torch.Tensor]:
    """Parameters and buffers by path."""
    if module is None:
        return {**analysis.trace.program.constants, **analysis.trace.program.state_dict}
    return {
        **dict(module.named_buffers(remove_duplicate=False)),
        **dict(module.named_parameters(remove_duplicate=False)),
    }


def _written(analysis: Analysis) -> set[str]:
    """Names of inputs that an operator may write into, in place."""
    found = set()
    for node in analysis.trace.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        pending = list(node.all_input_nodes)
        while pending:
            item = pending.pop()
            if item.op == "placeholder":
                found.add(item.name)
            elif operator_name(item) in MOVES:
                pending += item.all_input_nodes
    return found


def _without(tensor: torch.Tensor, dims: Mapping[int, np.ndarray], masks: list[np.ndarray]) -> torch.Tensor:
    gone = {dim: np.flatnonzero(~stays(layout, masks)) for dim, layout in dims.items()}
    gone = {dim: indices for dim, indices in gone.items() if len(indices)}
    result = tensor.clone() if gone else tensor
    for dim, indices in gone.items():
        result.index_fill_(dim, torch.from_numpy(indices).to(tensor.device), 0)
    return result


class _Masked(fx.Interpreter):
    """The dense graph, with statistics over the channels that stay."""

    def __init__(self, analysis: Analysis, masks: list[np.ndarray]) -> None:
        super().__init__(analysis.trace.program.graph_module)
        self._analysis, self._masks = analysis, masks

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; those that normalise see only what stays."""
        layouts: Mapping[int, np.ndarray] = {}
        if n.name in self._analysis.normalizers and isinstance(n.args[0], fx.Node):
            layouts = self._analysis.values.get(n.args[0].name, {})
        if not layouts:
            return super().run_node(n)
        ((dim, layout),) = layouts.items()
        left = torch.from_numpy(np.flatnonzero(stays(layout, self._masks)))
        arguments, options = self.fetch_args_kwargs_from_env(n)
        whole = arguments[0]
        small = [whole.index_select(dim, left), *arguments[1:]]
        if operator_name(n) in ("layer_norm", "rms_norm"):
            small[1] = [len(left)]
        for position, argument in enumerate(small[1:], 1):
            if isinstance(argument, torch.Tensor) and argument.shape == (len(layout),):
                small[position] = argument.index_select(0, left)
        result = n.target(*small, **options)  # type: ignore[operator]
        if result.ndim != whole.ndim or result.shape[dim] != len(left) or result.shape[dim] == 1:
            return result
        return torch.zeros_like(whole).index_copy_(dim, left, result)
