"""Which channels live and die together: owners carried through the graph, operator by operator.

Operators that move values (reshape, permute, cat, roll, window partition, …) are *executed* on tensors of owners,
so they need no rule. Operators that compute have one: they merge owners (an addition), make new ones (a
convolution's outputs) or use them up (its inputs). An operator without a rule freezes what enters and leaves it.

Rules that would have to guess wait: the graph is walked until nothing merges any more, then once strictly.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from cveff.compress.owners import (
    along,
    canonical,
    columns,
    compact,
    has_owner,
    nobody,
    pairs,
    tight,
    varies,
    varying,
)
from cveff.compress.trace import Trace
from cveff.compress.union_find import NONE, UnionFind

Attention = Literal["heads", "head_dims"]
Role = Literal["out", "in", "scale"]

LARGEST_TABLE = 2_000_000
"""Elements of a parameter that may be followed one by one."""

MOVES = frozenset(
    [
        "view",
        "reshape",
        "permute",
        "transpose",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "cat",
        "stack",
        "contiguous",
        "clone",
        "alias",
        "detach",
        "roll",
        "flip",
        "t",
        "narrow",
        "repeat",
        "tile",
        "index",
        "index_select",
        "pixel_shuffle",
        "pixel_unshuffle",
        "im2col",
        "view_as",
        "reshape_as",
        "expand_as",
        "movedim",
        "swapaxes",
        "hsplit",
        "concat",
        "concatenate",
        "repeat_interleave",
        "rot90",
        "lift_fresh_copy",
        "diagonal",
        "channel_shuffle",
        "unfold",
        "tensor_split",
    ]
)
POINTWISE = frozenset(
    [
        "relu",
        "relu6",
        "gelu",
        "silu",
        "sigmoid",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "tanh",
        "exp",
        "exp2",
        "expm1",
        "sqrt",
        "rsqrt",
        "abs",
        "neg",
        "square",
        "log",
        "log2",
        "log1p",
        "clamp",
        "clamp_min",
        "clamp_max",
        "softplus",
        "mish",
        "leaky_relu",
        "elu",
        "selu",
        "celu",
        "erf",
        "sin",
        "cos",
        "reciprocal",
        "round",
        "floor",
        "ceil",
        "sign",
        "logsigmoid",
        "dropout",
        "feature_dropout",
        "to",
        "type_as",
        "_to_copy",
        "float",
        "half",
        "pow",
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "maximum",
        "minimum",
        "where",
        "addcmul",
        "addcdiv",
        "lerp",
        "fmod",
        "remainder",
        "masked_fill",
        "logical_not",
        "bitwise_not",
        "logical_and",
        "logical_or",
        "eq",
        "ne",
        "gt",
        "lt",
        "ge",
        "le",
        "nan_to_num",
        "threshold",
        "hardshrink",
        "softsign",
        "tanhshrink",
        "true_divide",
        "multiply",
        "subtract",
    ]
)
SPATIAL = frozenset(
    [
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "adaptive_avg_pool3d",
        "adaptive_max_pool2d",
        "upsample_nearest1d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_linear1d",
        "_upsample_nearest_exact2d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
        "lp_pool2d",
    ]
)
REDUCTIONS = frozenset(
    [
        "mean",
        "sum",
        "amax",
        "amin",
        "linalg_vector_norm",
        "norm",
        "var",
        "std",
        "logsumexp",
        "all",
        "any",
        "prod",
    ]
)
SUMS = frozenset(["sum", "linalg_vector_norm", "norm"])
"""Reductions to which a channel of zeros adds nothing; the others are taken over the channels that stay."""
BALANCED = frozenset(["chunk", "split", "tensor_split"])
"""Cuts into equal parts, which stay equal only if every part loses as many channels."""
CREATIONS = frozenset(
    [
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "rand_like",
        "randn_like",
        "new_zeros",
        "new_ones",
        "new_full",
    ]
)
IGNORED = frozenset(
    ["_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "_assert_async"]
)


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
        self._concrete: dict[str, Any] = dict(trace.constants)
        self._fresh: dict[str, np.ndarray] = {}
        self._strict = False
        self._rules: dict[str, Callable[[torch.fx.Node], Any]] = self._table_of_rules()
        self._settle()
        self._strict = True
        self._settle()
        while self._make_rectangular():
            self._settle()

    # ---------------------------------------------------------------- the walk

    def _settle(self) -> None:
        before = -1
        while before != self.sets.version:
            before = self.sets.version
            for node in self.trace.program.graph.nodes:
                self._visit(node)

    def _visit(self, node: torch.fx.Node) -> None:
        if node.op == "placeholder":
            if node.name not in self.trace.parameters and node.name not in self._concrete:
                self.values[node.name] = nobody(self.trace.shapes.get(node.name, ()))
        elif node.op == "call_function":
            if node.target is operator.getitem:
                self._getitem(node)
            elif not self._evaluate(node):
                name = operator_name(node)
                result = None if name in IGNORED else self._rules.get(name, self._unknown)(node)
                self.values[node.name] = (
                    tuple(self._canonical(item) for item in result)
                    if isinstance(result, (tuple, list))
                    else self._canonical(result)
                )
        elif node.op == "output":
            for value in self._tensors(node):
                self._freeze(value, "it is the network's output")

    def _getitem(self, node: torch.fx.Node) -> None:
        source, index = node.args
        assert isinstance(source, torch.fx.Node) and isinstance(index, int)
        if source.name in self._concrete:
            self._concrete[node.name] = self._concrete[source.name][index]
            return
        value = self.values[source.name]
        self.values[node.name] = value[index] if isinstance(value, tuple) else value

    def _evaluate(self, node: torch.fx.Node) -> bool:
        """Compute a node that depends on constants only (position tables, indices); whether it does."""
        inputs = node.all_input_nodes
        if any(item.name not in self._concrete for item in inputs):
            return False
        if node.name not in self._concrete:
            with torch.no_grad():
                arguments, options = torch.fx.node.map_arg(
                    (node.args, node.kwargs), lambda item: self._concrete[item.name]
                )
                self._concrete[node.name] = node.target(*arguments, **options)  # type: ignore[operator]
        return True

    def merge(self, first: np.ndarray, second: np.ndarray) -> None:
        """Make owners live and die together, and follow what that means through the graph."""
        self.sets.union(first, second)
        self._settle()
        while self._make_rectangular():
            self._settle()

    # ---------------------------------------------------------------- values

    def value(self, node: torch.fx.Node) -> torch.Tensor:
        """Owners of a node's value, canonical and tight."""
        if node.name in self._concrete:
            found = self._concrete[node.name]
            return nobody(tuple(found.shape)) if isinstance(found, torch.Tensor) else nobody(())
        if node.name in self.trace.parameters:
            return self._table(node)
        return self._canonical(self.values[node.name])

    def _table(self, node: torch.fx.Node) -> torch.Tensor:
        path, shape = self.trace.parameters[node.name], self.trace.shapes[node.name]
        if path not in self.tables:
            count = int(np.prod(shape))
            if count > LARGEST_TABLE or (path, 0) in self.weights:
                atom = self._frozen_atom(f"parameter {path} is computed with before it is used")
                self.tables[path] = torch.from_numpy(atom).expand(shape or (1,)).reshape(shape)
            else:
                self.tables[path] = torch.from_numpy(self.sets.new(count, is_made=False)).reshape(shape)
        return self._canonical(self.tables[path])

    def _tensors(self, node: torch.fx.Node) -> list[torch.Tensor]:
        return [
            self.value(item)
            for item in node.all_input_nodes
            if not isinstance(self.values.get(item.name), tuple)
        ]

    def _canonical(self, owners: Any) -> Any:
        return canonical(owners, self.sets) if isinstance(owners, torch.Tensor) else owners

    def _weight(self, path: str, dim: int, size: int, role: Role = "out") -> np.ndarray:
        """The owners that a parameter's dimension brings into being."""
        key = (path, dim)
        if key not in self.weights:
            self.weights[key] = self.sets.new(size)
            self.roles[key] = role
        return self.sets.find(self.weights[key])

    def _use(self, path: str, dim: int, owners: np.ndarray, role: Role) -> None:
        """A parameter's dimension follows `owners`."""
        key = (path, dim)
        self.roles.setdefault(key, role)
        if key in self.weights:
            if len(self.weights[key]) == len(owners):
                self._merge_or_freeze(self.weights[key], owners)
                owners = np.where(self.weights[key] == NONE, owners, self.weights[key])
        self.weights[key] = owners.copy()

    def _merge_or_freeze(self, first: np.ndarray, second: np.ndarray) -> None:
        self.sets.union(first, second)
        alone = (first == NONE) ^ (second == NONE)
        if self._strict and alone.any():
            self.sets.freeze(
                np.concatenate([first[alone], second[alone]]), "it shares a weight with a constant"
            )

    def _parameter(self, node: Any) -> str | None:
        return self.trace.parameters.get(node.name) if isinstance(node, torch.fx.Node) else None

    def _freeze(self, owners: torch.Tensor | np.ndarray, reason: str) -> None:
        atoms = compact(owners).reshape(-1).numpy() if isinstance(owners, torch.Tensor) else owners
        self.sets.freeze(atoms, reason)

    def _frozen_atom(self, reason: str) -> np.ndarray:
        if reason not in self._fresh:
            self._fresh[reason] = self.sets.new(1)
            self.sets.freeze(self._fresh[reason], reason)
        return self._fresh[reason]

    def _collapse(self, owners: torch.Tensor, dim: int, reason: str) -> np.ndarray | None:
        """Owners along `dim` alone; those at the same index merge. None while that would be a guess."""
        others = [other for other in varying(owners) if other != dim % owners.ndim]
        if others and not self._strict:
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

    def _where(self, node: torch.fx.Node) -> str:
        module = self.trace.modules.get(node.name, "")
        return f"{node.target} in {module}" if module else str(node.target)

    # ---------------------------------------------------------------- rules

    def _table_of_rules(self) -> dict[str, Callable[[torch.fx.Node], Any]]:
        rules: dict[str, Callable[[torch.fx.Node], Any]] = {}
        rules |= dict.fromkeys(MOVES, self._move)
        rules |= dict.fromkeys(POINTWISE, self._pointwise)
        rules |= dict.fromkeys(SPATIAL, self._spatial)
        rules |= dict.fromkeys(REDUCTIONS, self._reduce)
        return rules | {
            "conv1d": self._convolve,
            "conv2d": self._convolve,
            "conv3d": self._convolve,
            "linear": self._linear,
            "addmm": self._addmm,
            "batch_norm": self._batch_norm,
            "instance_norm": self._batch_norm,
            "layer_norm": self._layer_norm,
            "rms_norm": self._layer_norm,
            "group_norm": self._group_norm,
            "matmul": self._matmul,
            "bmm": self._matmul,
            "mm": self._matmul,
            "scaled_dot_product_attention": self._attention,
            "softmax": self._softmax,
            "log_softmax": self._softmax,
            "_softmax": self._softmax,
            "pad": self._pad,
            "constant_pad_nd": self._pad,
            "glu": self._glu,
            "prelu": self._prelu,
            **dict.fromkeys(CREATIONS, self._create),
        }

    def _unknown(self, node: torch.fx.Node) -> Any:
        """Freeze what crosses an operator that has no rule."""
        reason = f"{self._where(node)} has no rule"
        for value in self._tensors(node):
            self._freeze(value, reason)
        shape = node.meta.get("val")
        atom = torch.from_numpy(self._frozen_atom(reason))
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

    def _move(self, node: torch.fx.Node) -> Any:
        def owners(item: torch.fx.Node) -> Any:
            if item.name in self._concrete and not _is_data(node, item):
                return self._concrete[item.name]
            if isinstance(self.values.get(item.name), tuple):
                return [self._canonical(part) for part in self.values[item.name]]
            return self.value(item)

        name = operator_name(node)
        arguments, options = torch.fx.node.map_arg((list(node.args), dict(node.kwargs)), owners)
        if name in ("cat", "concat", "concatenate", "stack"):
            return self._concatenate(arguments, options, name == "stack")
        if any(
            isinstance(item, torch.fx.Node) and item.name not in self._concrete for item in _indices(node)
        ):
            return self._unknown(node)
        with torch.no_grad():
            result = node.target(*arguments, **options)  # type: ignore[operator]
        if name in BALANCED and isinstance(result, (tuple, list)):
            for part in result[1:]:
                if part.shape == result[0].shape:
                    self.sets.union(*pairs(tight(part), tight(result[0])))
                elif self._strict and varying(self.value(node.args[0])) != varying(tight(part)):  # type: ignore[arg-type]
                    self._freeze(part, f"{self._where(node)} cuts into unequal parts")
        return result

    def _concatenate(self, arguments: Sequence[Any], options: dict[str, Any], is_stack: bool) -> torch.Tensor:
        parts: list[torch.Tensor] = list(arguments[0])
        dim = options.get("dim", arguments[1] if len(arguments) > 1 else 0)
        if is_stack:
            dim %= parts[0].ndim + 1
            parts = [part.unsqueeze(dim) for part in parts]
        dim %= parts[0].ndim
        shape = list(parts[0].shape)
        shape[dim] = sum(part.shape[dim] for part in parts)
        for other in range(len(shape)):
            if other != dim and all(part.stride(other) == 0 for part in parts if part.shape[other] > 1):
                parts = [part.narrow(other, 0, 1) for part in parts]
        return torch.cat(parts, dim).expand(shape)

    def _pointwise(self, node: torch.fx.Node) -> torch.Tensor:
        shape = self.trace.shapes[node.name]
        values = [self.value(item) for item in node.all_input_nodes]
        return self._combine(values, shape, self._where(node))

    def _combine(self, values: Sequence[torch.Tensor], shape: tuple[int, ...], where: str) -> torch.Tensor:
        """Owners of values that are combined element by element."""
        owned = [tight(value.expand(shape)) for value in values if has_owner(value)]
        if not owned:
            return nobody(shape)
        result = owned[0]
        for value in owned[1:]:
            result = self._combine_two(result, value, where)
        # A constant that differs from channel to channel cannot follow when channels go.
        changing = varying(result)
        for value in values:
            if (
                self._strict
                and not has_owner(value)
                and any(_size(value, dim, len(shape)) > 1 for dim in changing)
            ):
                self._freeze(result, f"{where} combines it with a constant")
        return result

    def _combine_two(self, first: torch.Tensor, second: torch.Tensor, where: str) -> torch.Tensor:
        changing = set(varying(first)), set(varying(second))
        only_first, only_second = changing[0] - changing[1], changing[1] - changing[0]
        if only_first and only_second and self._is_made(first) != self._is_made(second):
            return first if self._is_made(first) else second  # a table that all channels share
        # Entries of a table (relative positions) go with the one channel they are added to.
        table = (only_first and not self._is_made(first)) or (only_second and not self._is_made(second))
        if (only_first or only_second) and not table:
            if not self._strict:
                return first if len(changing[0]) >= len(changing[1]) else second
            # One value meets several channels of the other: it has to stay while they may go.
            if only_first and not only_second:
                self._freeze(second, f"{where} spreads it over channels")
                return first
            if only_second and not only_first:
                self._freeze(first, f"{where} spreads it over channels")
                return second
        a, b = pairs(first, second)
        self.sets.union(a, b)
        alone = (a == NONE) ^ (b == NONE)
        if self._strict and alone.any():
            self.sets.freeze(np.concatenate([a[alone], b[alone]]), f"{where} combines it with a constant")
        return self._canonical(torch.maximum(first, second))

    def _is_made(self, owners: torch.Tensor) -> bool:
        """Whether a weight makes any of a value's channels."""
        return bool(self.sets.is_made(compact(owners).reshape(-1).numpy()).any())

    def _convolve(self, node: torch.fx.Node) -> torch.Tensor:
        path = self._parameter(node.args[1])
        if path is None:
            return self._unknown(node)
        groups = int(node.args[6]) if len(node.args) > 6 else int(node.kwargs.get("groups", 1))  # type: ignore[arg-type]
        shape = self.trace.shapes[node.args[1].name]  # type: ignore[union-attr]
        owners = self.value(node.args[0])  # type: ignore[arg-type]
        outputs = self._weight(path, 0, shape[0])
        inputs = self._collapse(owners, 1, "") if set(varying(owners)) <= {1} else None
        if self._strict and any(dim != 1 for dim in varying(owners)):
            return self._unknown(node)  # it slides over channels
        if inputs is not None:
            if groups == 1:
                self._use(path, 1, inputs, "in")
            else:
                self._group(node, path, inputs, outputs, groups, shape)
        self._bias(node, 2, outputs)
        return _channel(self.sets.find(outputs), 1, self.trace.shapes[node.name])

    def _group(
        self,
        node: torch.fx.Node,
        path: str,
        inputs: np.ndarray,
        outputs: np.ndarray,
        groups: int,
        shape: tuple[int, ...],
    ) -> None:
        """Couple the two sides of a grouped convolution."""
        if not (inputs != NONE).any():
            self.sets.freeze(outputs, f"{self._where(node)} has groups of constants")
            return
        by_group = outputs.reshape(groups, -1)
        into = inputs.reshape(groups, -1)
        is_depthwise = shape[1] == 1
        self.roles[(path, 0)] = "scale" if is_depthwise else "out"
        if is_depthwise or groups >= 8:
            # Whole groups go: their width is what makes the kernel fast, and what was trained.
            everyone = np.concatenate([by_group, into], axis=1)
            self.sets.union(everyone[:, 1:], np.broadcast_to(everyone[:, :1], everyone[:, 1:].shape))
            self.grouped[node.name] = (path, groups)
        else:
            for table in (by_group, into):
                self.sets.union(table[1:], np.broadcast_to(table[:1], table[1:].shape))
            self._use(path, 1, into[0], "in")
        if (inputs == NONE).any():
            self.sets.freeze(inputs, f"{self._where(node)} mixes it with constants")

    def _bias(self, node: torch.fx.Node, position: int, outputs: np.ndarray, name: str = "bias") -> None:
        bias = node.args[position] if len(node.args) > position else node.kwargs.get(name)
        if bias is None:
            return
        path = self._parameter(bias)
        if path is None:
            value = self.value(bias)  # type: ignore[arg-type]
            made = _channel(self.sets.find(outputs), 0, (len(outputs),))
            self._combine([made, value], (len(outputs),), self._where(node))
        else:
            self._use(path, 0, outputs, "out")

    def _consumed(self, owners: torch.Tensor, outputs: np.ndarray, node: torch.fx.Node) -> np.ndarray | None:
        """Owners along the last dimension, which a weight sums over; None where not known yet, or never."""
        if not varies(owners, -1) and varying(owners):
            if self._strict:
                # It sums over positions, not channels: each output belongs to the input's channel as well.
                self.sets.freeze(outputs, f"{self._where(node)} mixes positions")
            return None
        return self._collapse(owners, -1, f"{self._where(node)} mixes it with constants")

    def _linear(self, node: torch.fx.Node) -> torch.Tensor:
        return self._project(node, node.args[0], node.args[1], out_dim=0)  # type: ignore[arg-type]

    def _addmm(self, node: torch.fx.Node) -> torch.Tensor:
        bias, value, weight = node.args[:3]
        outputs = self._project(node, value, weight, out_dim=1)  # type: ignore[arg-type]
        return self._combine([outputs, self.value(bias)], tuple(outputs.shape), self._where(node))  # type: ignore[arg-type]

    def _project(
        self, node: torch.fx.Node, value: torch.fx.Node, weight: torch.fx.Node, out_dim: int
    ) -> torch.Tensor:
        path = self._parameter(weight)
        if path is None:
            return self._unknown(node)
        owners, shape = self.value(value), self.trace.shapes[node.name]
        outputs = self._weight(path, out_dim, self.trace.shapes[weight.name][out_dim])
        inputs = self._consumed(owners, outputs, node)
        if inputs is not None:
            self._use(path, 1 - out_dim, inputs, "in")
        if out_dim == 0:
            self._bias(node, 2, outputs)
        if not varies(owners, -1) and varying(owners):
            return owners.select(-1, 0).unsqueeze(-1).expand(shape)
        return _channel(self.sets.find(outputs), len(shape) - 1, shape)

    def _batch_norm(self, node: torch.fx.Node) -> torch.Tensor:
        owners = self.value(node.args[0])  # type: ignore[arg-type]
        if operator_name(node) == "batch_norm" and bool(node.args[5]):
            return self._unknown(
                node
            )  # statistics of the batch: it is a standardised weight, or training mode
        channels = self._collapse(owners, 1, f"{self._where(node)} mixes it with constants")
        if channels is not None:
            for item in node.args[1:5]:
                path = self._parameter(item)
                if path is not None:
                    self._use(path, 0, channels, "scale")
        return owners

    def _layer_norm(self, node: torch.fx.Node) -> torch.Tensor:
        owners = self.value(node.args[0])  # type: ignore[arg-type]
        count = len(node.args[1])  # type: ignore[arg-type]
        for item in node.args[2:4]:
            path = self._parameter(item)
            if path is None:
                continue
            if count > 1:
                self._combine([owners, self._table(item)], tuple(owners.shape), self._where(node))  # type: ignore[arg-type]
            elif varies(owners, -1) or not varying(owners):
                channels = self._collapse(owners, -1, f"{self._where(node)} mixes it with constants")
                if channels is not None:
                    self._use(path, 0, channels, "scale")
        if any(varies(owners, -1 - index) for index in range(count)):
            self.normalizers.add(node.name)
        return owners

    def _group_norm(self, node: torch.fx.Node) -> torch.Tensor:
        owners = self.value(node.args[0])  # type: ignore[arg-type]
        groups = int(node.args[1])  # type: ignore[arg-type]
        channels = self._collapse(owners, 1, f"{self._where(node)} mixes it with constants")
        if channels is None:
            return owners
        if groups > 1:
            table = channels.reshape(groups, -1)
            self.sets.union(table[:, 1:], np.broadcast_to(table[:, :1], table[:, 1:].shape))
            self.norm_groups[node.name] = groups
        else:
            self.normalizers.add(node.name)
        for item in node.args[2:4]:
            path = self._parameter(item)
            if path is not None:
                self._use(path, 0, channels, "scale")
        return owners

    def _matmul(self, node: torch.fx.Node) -> torch.Tensor:
        first, second = node.args[:2]
        assert isinstance(first, torch.fx.Node) and isinstance(second, torch.fx.Node)
        if self._parameter(second) is not None and len(self.trace.shapes[second.name]) == 2:
            return self._project(node, first, second, out_dim=1)
        a, b = self.value(first), self.value(second)
        if a.ndim < 2 or b.ndim < 2:
            return self._unknown(node)
        return self._contract(a, b, self.trace.shapes[node.name], self._where(node))

    def _contract(self, a: torch.Tensor, b: torch.Tensor, shape: tuple[int, ...], where: str) -> torch.Tensor:
        """Owners of a (…, n, k) @ b (…, k, m)."""
        if varies(a, -1) or varies(b, -2):
            batch = max(a.ndim, b.ndim) - 2
            left = a.transpose(-1, -2)[..., :1].expand(*_lead(a, b), a.shape[-1], 1)  # (…, k, 1)
            right = b[..., :1].expand(*_lead(a, b), b.shape[-2], 1)
            if varies(a, -2) or varies(b, -1):
                if self._strict:
                    for value in (a, b):
                        self._freeze(value, f"{where} multiplies channels with channels")
                return nobody(shape)
            left, right = tight(left), tight(right)
            heads = [dim for dim in range(batch) if varies(left, dim) or varies(right, dim)]
            if self.attention == "heads" and heads and self._is_shared(left, right, batch, where):
                both = left if any(varies(left, dim) for dim in heads) else right
            else:
                both = self._combine([left, right], tuple(left.shape), where)
            if heads and self.attention == "heads":
                first = both.narrow(-2, 0, 1).expand(both.shape)
                self.sets.union(*pairs(tight(both), tight(first)))
                return self._canonical(first[..., :1, :].expand(shape))
            if heads:
                self._merge_along(both, both.ndim - 2)
            return nobody(shape)
        rows = a.select(-1, 0).unsqueeze(-1)  # (…, n, 1)
        cols = b.select(-2, 0).unsqueeze(-2)  # (…, 1, m)
        left, right = tight(rows.expand(shape)), tight(cols.expand(shape))
        if not has_owner(left) or not has_owner(right):
            return right if has_owner(right) else left
        batch = range(len(shape) - 2)
        if self.attention == "heads" and any(varies(left, dim) or varies(right, dim) for dim in batch):
            if self._is_shared(left, right, len(shape) - 2, where):
                owner = left if any(varies(left, dim) for dim in batch) else right
                self._tie_batches(owner, owner, shape)
                return self._canonical(owner)
            self._tie_batches(left, right, shape)
            return self._canonical(left)
        if varies(left, -2) and varies(right, -1) and self._strict:
            for value in (left, right):
                self._freeze(value, f"{where} multiplies channels with channels")
            return left
        return self._combine([left, right], shape, where)

    def _is_shared(self, left: torch.Tensor, right: torch.Tensor, batch: int, where: str) -> bool:
        """Whether all heads of one side use the same channels of the other (multi-query); those then stay."""
        own = [any(varies(value, dim) for dim in range(batch)) for value in (left, right)]
        if own[0] == own[1]:
            return False
        shared = right if own[0] else left
        if not varying(shared):
            return False
        self._freeze(shared, f"{where} shares it among heads")
        return True

    def _tie_batches(self, left: torch.Tensor, right: torch.Tensor, shape: tuple[int, ...]) -> None:
        """Merge all owners within each batch entry (head) of two values of `shape`."""
        for value in (left, right):
            first = left[..., :1, :1].expand(shape)
            self.sets.union(*pairs(tight(value), tight(first)))

    def _merge_along(self, owners: torch.Tensor, dim: int) -> None:
        """Merge owners that share an index along `dim`."""
        table = columns(tight(owners), dim)
        self.sets.union(table[1:], np.broadcast_to(table[:1], table[1:].shape))

    def _attention(self, node: torch.fx.Node) -> torch.Tensor:
        query, key, value = (self.value(item) for item in node.args[:3])  # type: ignore[arg-type]
        where = self._where(node)
        lead = (*torch.broadcast_shapes(query.shape[:-2], key.shape[:-2]),)
        if query.shape[:-2] != key.shape[:-2] and all(
            q != k and k > 1 for q, k in zip(query.shape[:-2], key.shape[:-2], strict=True)
        ):
            return self._unknown(node)
        scores = (*lead, query.shape[-2], key.shape[-2])
        if self._strict and node.kwargs.get("scale") is None and (varies(query, -1) or varies(key, -1)):
            for item in (query, key):
                self._freeze(item, f"{where} scales by the head's width")
        found = self._contract(query, key.transpose(-1, -2), scores, where)
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if isinstance(mask, torch.fx.Node):
            found = self._combine([found, self.value(mask)], scores, where)
        return self._contract(found, value, self.trace.shapes[node.name], where)

    def _softmax(self, node: torch.fx.Node) -> torch.Tensor:
        owners = self.value(node.args[0])  # type: ignore[arg-type]
        if varies(owners, int(node.args[1])):  # type: ignore[arg-type]
            self.normalizers.add(node.name)
        return owners

    def _spatial(self, node: torch.fx.Node) -> Any:
        owners = self.value(node.args[0])  # type: ignore[arg-type]
        shape = self.trace.shapes.get(node.name)
        if shape is None:
            return self._unknown(node)
        name = operator_name(node)
        spatial = 1 if "1d" in name else 3 if "3d" in name else 2
        if any(varies(owners, -1 - index) for index in range(spatial)):
            if not self._strict:
                return nobody(shape)
            return self._unknown(node)
        for index in range(spatial):
            owners = owners.narrow(-1 - index, 0, 1)
        return owners.expand(shape)

    def _reduce(self, node: torch.fx.Node) -> Any:
        owners, shape = self.value(node.args[0]), self.trace.shapes.get(node.name)  # type: ignore[arg-type]
        name = operator_name(node)
        if shape is None:
            return self._unknown(node)
        dims = _reduced_dims(node, owners.ndim)
        gone = [dim for dim in dims if varies(owners, dim)]
        if not gone:
            for dim in dims:
                owners = owners.narrow(dim, 0, 1)
            return owners.reshape(shape)
        if set(varying(owners)) <= set(gone):
            if name not in SUMS:
                self.normalizers.add(node.name)
            return nobody(shape)
        if not self._strict:
            return nobody(shape)
        first = owners
        for dim in dims:
            first = first.narrow(dim, 0, 1)
        self.sets.union(*pairs(owners, tight(first.expand(owners.shape))))
        return self._canonical(first).reshape(shape)

    def _pad(self, node: torch.fx.Node) -> torch.Tensor:
        owners = self.value(node.args[0])  # type: ignore[arg-type]
        amounts: list[int] = list(node.args[1])  # type: ignore[arg-type]
        shape = list(owners.shape)
        for index in range(len(amounts) // 2):
            dim = owners.ndim - 1 - index
            before, after = amounts[2 * index], amounts[2 * index + 1]
            if before == after == 0:
                continue
            shape[dim] += before + after
            if varies(owners, dim):
                owners = torch.nn.functional.pad(
                    owners.movedim(dim, -1).contiguous(), (before, after), value=NONE
                ).movedim(-1, dim)
            else:
                owners = owners.narrow(dim, 0, 1).expand(shape)
        return owners

    def _glu(self, node: torch.fx.Node) -> torch.Tensor:
        owners = self.value(node.args[0])  # type: ignore[arg-type]
        dim = int(node.args[1]) if len(node.args) > 1 else -1  # type: ignore[arg-type]
        first, second = owners.chunk(2, dim)
        self.sets.union(*pairs(tight(first), tight(second)))
        return first

    def _prelu(self, node: torch.fx.Node) -> torch.Tensor:
        owners, path = self.value(node.args[0]), self._parameter(node.args[1])  # type: ignore[arg-type]
        channels = self._collapse(owners, 1, f"{self._where(node)} mixes it with constants")
        if path is None:
            return self._unknown(node)
        if channels is not None and self.trace.shapes[node.args[1].name] == (len(channels),):  # type: ignore[union-attr]
            self._use(path, 0, channels, "scale")
        return owners

    def _create(self, node: torch.fx.Node) -> torch.Tensor:
        return nobody(self.trace.shapes[node.name])

    # ---------------------------------------------------------------- shape of what can be cut

    def _make_rectangular(self) -> bool:
        """Merge owners until what goes is a slab of every value; whether anything merged."""
        before = self.sets.version
        tables = [self._canonical(table) for table in self.tables.values()]
        values = [
            self._canonical(item)
            for value in self.values.values()
            for item in (value if isinstance(value, tuple) else (value,))
            if isinstance(item, torch.Tensor)
        ]
        for owners in (*values, *tables):
            changing = varying(owners)
            if len(changing) > 1:
                largest = max(changing, key=lambda dim: (owners.shape[dim], dim))
                if not has_owner(owners):
                    continue
                table = columns(owners, largest)
                mixed = (table == NONE).any(0) & (table != NONE).any(0)
                self.sets.union(table[1:], np.broadcast_to(table[:1], table[1:].shape))
                if mixed.any():
                    self.sets.freeze(table[:, mixed].ravel(), "only part of a tensor could go")
        return before != self.sets.version


def operator_name(node: torch.fx.Node) -> str:
    """An operator's name without its overload and without the mark of in-place forms."""
    packet = getattr(node.target, "overloadpacket", None)
    name = getattr(packet, "__name__", None) or getattr(node.target, "__name__", str(node.target))
    return name if name.startswith("_") and name.endswith("__") else name.rstrip("_")


def _channel(owners: np.ndarray, dim: int, shape: tuple[int, ...]) -> torch.Tensor:
    """A value of `shape` whose owners are given along `dim`."""
    view = [1] * len(shape)
    view[dim] = len(owners)
    return torch.from_numpy(owners.copy()).reshape(view).expand(shape)


def _size(owners: torch.Tensor, dim: int, ndim: int) -> int:
    """The size, before broadcasting to `ndim` dimensions, of a value along `dim`."""
    own = dim - (ndim - owners.ndim)
    return owners.shape[own] if own >= 0 else 1


def _lead(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]))


def _reduced_dims(node: torch.fx.Node, ndim: int) -> list[int]:
    position = 2 if operator_name(node) in ("linalg_vector_norm", "norm") else 1
    found = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if found is None:
        return list(range(ndim))
    listed = found if isinstance(found, (list, tuple)) else [found]
    return [int(dim) % ndim for dim in listed] or list(range(ndim))  # type: ignore[arg-type]


def _indices(node: torch.fx.Node) -> list[Any]:
    """The nodes a move takes positions from."""
    if operator_name(node) == "index":
        return [item for item in node.args[1] if item is not None]  # type: ignore[union-attr]
    return [node.args[2]] if operator_name(node) == "index_select" else []


def _is_data(node: torch.fx.Node, item: torch.fx.Node) -> bool:
    """Whether a move takes `item` as the value that is moved, rather than as positions."""
    first = node.args[0]
    return item is first or (isinstance(first, (list, tuple)) and item in first)
