"""Which channels live and die together: owners carried through the graph, operator by operator.

Operators that move values (reshape, permute, cat, roll, window partition, …) are *executed* on tensors of owners,
so they need no rule. Operators that compute have one (`rules.py`): they merge owners (an addition), make new ones (a
convolution's outputs) or use them up (its inputs). An operator without a rule freezes what enters and leaves it.

Rules that would have to guess wait: the graph is walked until nothing merges any more, then once strictly.
"""

from __future__ import annotations

import operator
from typing import Any, Literal

import numpy as np
import torch

from cveff.compress.operators import IGNORED, WEIGHTED, operator_name
from cveff.compress.owners import along, canonical, columns, compact, has_owner, nobody, varying
from cveff.compress.rules import RULES
from cveff.compress.trace import Trace
from cveff.compress.union_find import NONE, UnionFind, count_merged
from cveff.runtime.errors import first_line

Attention = Literal["heads", "head_dims"]
Role = Literal["out", "in", "scale"]

LARGEST_TABLE = 2_000_000
"""Elements of a parameter that may be followed one by one."""


class Ownership:
    """The owners of every value and parameter of a traced network.

    Args:
        attention: what is one unit of an attention layer: a whole head, or one dimension of every head.

    Attributes:
        values: node name -> owners of its value (int64 of its shape), or a tuple of them.
        weights: (state dict path, dimension) -> owners along it, for parameters used as weights.
        tables: state dict path -> owners of every element, for parameters added to or multiplied with values.
        roles: (path, dimension) -> "out", "in" or "scale".
        normalizers: names of nodes that take statistics over channels (layer norm, mean over channels, …).
        grouped: node name -> (path of the weight, number of groups), for convolutions whose groups are units.
        norm_groups: node name -> number of groups of a group norm.
    """

    def __init__(self, trace: Trace, attention: Attention = "heads") -> None:
        self.trace, self.attention = trace, attention
        self.sets = UnionFind()
        self.values: dict[str, Any] = {}
        self.weights: dict[tuple[str, int], np.ndarray] = {}
        self.tables: dict[str, torch.Tensor] = {}
        self.roles: dict[tuple[str, int], Role] = {}
        self.normalizers: set[str] = set()
        self.grouped: dict[str, tuple[str, int]] = {}
        self.norm_groups: dict[str, int] = {}
        self.concrete: dict[str, Any] = dict(trace.constants)
        self._known: set[tuple[str, int]] = set()
        self._fresh: dict[str, np.ndarray] = {}
        self._computed = self._computed_weights()
        self.is_strict = False
        self._settle()
        self.is_strict = True
        self._settle()
        while self._make_rectangular():
            self._settle()

    def _settle(self) -> None:
        before = -1
        while before != self.sets.version:
            before = self.sets.version
            for facts in (self.normalizers, self.grouped, self.norm_groups):
                facts.clear()  # what held while less was known need not hold in the end
            for node in self.trace.program.graph.nodes:
                self._visit(node)

    def _visit(self, node: torch.fx.Node) -> None:
        if node.op == "placeholder":
            if node.name not in self.trace.parameters and node.name not in self.concrete:
                self.values[node.name] = nobody(self.trace.shapes.get(node.name, ()))
        elif node.op == "call_function":
            if node.target is operator.getitem:
                self._getitem(node)
            elif not self._evaluate(node):
                result = self._apply_rule(node)
                self.values[node.name] = (
                    tuple(self.canonical(item) for item in result)
                    if isinstance(result, (tuple, list))
                    else self.canonical(result)
                )
        elif node.op == "output":
            for value in self.tensors(node):
                self.freeze(value, "it is the network's output")

    def _apply_rule(self, node: torch.fx.Node) -> Any:
        name = operator_name(node)
        if name in IGNORED:
            return None
        try:
            return RULES.get(name, Ownership.unknown)(self, node)
        except Exception as error:  # noqa: BLE001 - an operator used as no rule foresaw stops its groups, not the run
            return self.unknown(node, f"is used in a way no rule foresaw ({first_line(error)[:100]})")

    def _getitem(self, node: torch.fx.Node) -> None:
        source, index = node.args
        assert isinstance(source, torch.fx.Node) and isinstance(index, int)
        if source.name in self.concrete:
            self.concrete[node.name] = self.concrete[source.name][index]
            return
        value = self.values[source.name]
        self.values[node.name] = value[index] if isinstance(value, tuple) else value

    def _evaluate(self, node: torch.fx.Node) -> bool:
        """Compute a node that depends on constants only (position tables, indices); whether it does."""
        inputs = node.all_input_nodes
        if any(item.name not in self.concrete for item in inputs):
            return False
        if node.name not in self.concrete:
            with torch.no_grad():
                arguments, options = torch.fx.node.map_arg(
                    (node.args, node.kwargs), lambda item: self.concrete[item.name]
                )
                self.concrete[node.name] = node.target(*arguments, **options)  # type: ignore[operator]
        return True

    def merge(self, first: np.ndarray, second: np.ndarray) -> None:
        """Make owners live and die together, and follow what that means through the graph."""
        self.sets.union(first, second)
        self._settle()
        while self._make_rectangular():
            self._settle()

    def value(self, node: torch.fx.Node) -> torch.Tensor:
        """Owners of a node's value, canonical and tight."""
        if node.name in self.concrete:
            found = self.concrete[node.name]
            return nobody(tuple(found.shape)) if isinstance(found, torch.Tensor) else nobody(())
        if node.name in self.trace.parameters:
            return self.table(node)
        return self.canonical(self.values.get(node.name, nobody(self.trace.shapes.get(node.name, ()))))

    def table(self, node: torch.fx.Node) -> torch.Tensor:
        path, shape = self.trace.parameters[node.name], self.trace.shapes[node.name]
        if path not in self.tables:
            count = int(np.prod(shape))
            reason = self._computed.get(node.name, "")
            if count > LARGEST_TABLE or (path, 0) in self.weights:
                reason = reason or f"parameter {path} is computed with before it is used"
            if reason:
                atom = self.frozen_atom(reason)
                self.tables[path] = torch.from_numpy(atom).expand(shape or (1,)).reshape(shape)
            else:
                self.tables[path] = torch.from_numpy(self.sets.new(count, is_made=False)).reshape(shape)
        return self.canonical(self.tables[path])

    def _computed_weights(self) -> dict[str, str]:
        """Placeholders that weights are computed from (standardised, scaled), with the reason why they stay."""
        found: dict[str, str] = {}
        for node in self.trace.nodes:
            if operator_name(node) not in WEIGHTED or len(node.args) < 2:
                continue
            sources, pending = set(), [node.args[1]]
            while pending:
                item = pending.pop()
                if isinstance(item, torch.fx.Node) and item not in sources:
                    sources.add(item)
                    pending += item.all_input_nodes
            inputs = {item.name for item in sources if item.op == "placeholder"}
            if len(sources) > 1 and inputs <= {*self.trace.parameters, *self.trace.constants}:
                found |= dict.fromkeys(inputs, f"{self.where(node)} computes its weight")
        return found

    def tensors(self, node: torch.fx.Node) -> list[torch.Tensor]:
        return [
            self.value(item)
            for item in node.all_input_nodes
            if not isinstance(self.values.get(item.name), tuple)
        ]

    def canonical(self, owners: Any) -> Any:
        return canonical(owners, self.sets) if isinstance(owners, torch.Tensor) else owners

    def weight(self, path: str, dim: int, size: int, role: Role = "out") -> np.ndarray:
        """The owners that a parameter's dimension brings into being."""
        key = (path, dim)
        if key not in self.weights:
            self.weights[key] = self.sets.new(size)
            self.roles[key] = role
        return self.sets.find(self.weights[key])

    def use(self, path: str, dim: int, owners: np.ndarray, role: Role) -> None:
        """A parameter's dimension follows `owners`."""
        key = (path, dim)
        self.roles.setdefault(key, role)
        if key in self.weights and len(self.weights[key]) == len(owners):
            self._merge_or_freeze(self.weights[key], owners, key in self._known)
            owners = np.where(self.weights[key] == NONE, owners, self.weights[key])
        self.weights[key] = owners.copy()
        if self.is_strict:
            self._known.add(key)

    def _merge_or_freeze(self, first: np.ndarray, second: np.ndarray, is_known: bool) -> None:
        self.sets.union(first, second)
        # Before the strict walk nobody may only mean that the owners were not known yet.
        alone = (first != NONE) & (second == NONE) | (first == NONE) & (second != NONE) & is_known
        if self.is_strict and alone.any():
            self.sets.freeze(
                np.concatenate([first[alone], second[alone]]), "it shares a weight with a constant"
            )

    def parameter(self, node: Any) -> str | None:
        return self.trace.parameters.get(node.name) if isinstance(node, torch.fx.Node) else None

    def freeze(self, owners: torch.Tensor | np.ndarray, reason: str) -> None:
        atoms = compact(owners).reshape(-1).numpy() if isinstance(owners, torch.Tensor) else owners
        self.sets.freeze(atoms, reason)

    def frozen_atom(self, reason: str) -> np.ndarray:
        if reason not in self._fresh:
            self._fresh[reason] = self.sets.new(1)
            self.sets.freeze(self._fresh[reason], reason)
        return self._fresh[reason]

    def collapse(self, owners: torch.Tensor, dim: int, reason: str) -> np.ndarray | None:
        """Owners along `dim` alone; those at the same index merge. None while that would be a guess."""
        others = [other for other in varying(owners) if other != dim % owners.ndim]
        if others and not self.is_strict:
            return None
        if others:
            table = columns(owners, dim % owners.ndim)
            self.sets.union(table[1:], np.broadcast_to(table[:1], table[1:].shape))
            mixed = (table == NONE).any(0) & (table != NONE).any(0)
            if mixed.any():
                self.sets.freeze(table[:, mixed].ravel(), reason)
            table = self.sets.find(table)
            return np.asarray(table.max(0))
        return along(owners, dim)

    def where(self, node: torch.fx.Node) -> str:
        module = self.trace.modules.get(node.name, "")
        return f"{node.target} in {module}" if module else str(node.target)

    def unknown(self, node: torch.fx.Node, why: str = "has no rule") -> Any:
        """Freeze what crosses an operator that has no rule."""
        reason = f"{self.where(node)} {why}"
        for value in self.tensors(node):
            self.freeze(value, reason)
        shape = node.meta.get("val")
        atom = torch.from_numpy(self.frozen_atom(reason))
        if isinstance(shape, torch.Tensor):
            return atom.expand(tuple(shape.shape) or (1,)).reshape(tuple(shape.shape))
        if isinstance(shape, (tuple, list)):
            return tuple(
                atom.expand(tuple(item.shape) or (1,)).reshape(tuple(item.shape))
                if isinstance(item, torch.Tensor)
                else item
                for item in shape
            )
        return None

    def _make_rectangular(self) -> bool:
        """Merge owners until what goes is a slab of every value; whether anything merged."""
        before = self.sets.version
        tables = [self.canonical(table) for table in self.tables.values()]
        values = [
            self.canonical(item)
            for value in self.values.values()
            for item in (value if isinstance(value, tuple) else (value,))
            if isinstance(item, torch.Tensor)
        ]
        for owners in (*values, *tables):
            changing = varying(owners)
            if len(changing) > 1:
                if not has_owner(owners):
                    continue
                # Along which dimension do units lie? Where merging the others leaves the most of them.
                table = max(
                    (columns(owners, dim) for dim in reversed(changing)),
                    key=lambda table: (count_merged(table), table.shape[1]),
                )
                mixed = (table == NONE).any(0) & (table != NONE).any(0)
                self.sets.union(table[1:], np.broadcast_to(table[:1], table[1:].shape))
                if mixed.any():
                    self.sets.freeze(table[:, mixed].ravel(), "only part of a tensor could go")
        return before != self.sets.version
