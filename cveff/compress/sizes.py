"""Shapes of a pruned network as a linear function of how many units each group keeps: fast enough to search with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cveff.compress.groups import Analysis


class Sizes:
    """Evaluates shapes, and from them costs, for counts of units instead of masks.

    Args:
        analysis: its groups give the counts their order.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self._index = {group.name: index for index, group in enumerate(analysis.groups)}
        trace = analysis.trace
        layouts = {
            **analysis.values,
            **{
                name: analysis.parameters[path]
                for name, path in trace.parameters.items()
                if path in analysis.parameters
            },
        }
        self._rows: list[tuple[str, int]] = []
        shares, fixed = [], []
        for name, dims in layouts.items():
            for dim, layout in dims.items():
                share = np.zeros(len(analysis.groups))
                for index in np.unique(layout[:, 0]):
                    if index >= 0:
                        mine = layout[layout[:, 0] == index, 1]
                        share[index] = len(mine) / analysis.groups[index].size
                self._rows.append((name, dim))
                shares.append(share)
                fixed.append(int((layout[:, 0] < 0).sum()))
        self._shares = np.asarray(shares).reshape(len(fixed), len(analysis.groups))
        self._fixed = np.asarray(fixed)

    @property
    def full(self) -> dict[str, int]:
        """Every group's size."""
        return {group.name: group.size for group in self.analysis.groups}

    def shapes(self, counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Node name -> shape, parameters included.

        Args:
            counts: group name -> units it keeps; all groups.
        """
        vector = np.zeros(len(self._index))
        for name, index in self._index.items():
            vector[index] = counts[name]
        sizes = np.rint(self._shares @ vector + self._fixed).astype(int)
        changed: dict[str, list[int]] = {}
        shapes = self.analysis.trace.shapes
        for (name, dim), size in zip(self._rows, sizes.tolist(), strict=True):
            changed.setdefault(name, list(shapes[name]))[dim] = size
        return {**shapes, **{name: tuple(shape) for name, shape in changed.items()}}

    def parameters(self, counts: Mapping[str, int]) -> int:
        """Number of parameters, buffers not counted."""
        shapes, trace = self.shapes(counts), self.analysis.trace
        buffers = set(trace.program.graph_signature.buffers)
        return sum(
            int(np.prod(shapes[name])) for name, path in trace.parameters.items() if path not in buffers
        )
