"""`Block`: a piece of a network that an engine runs as one step, described well enough to be timed alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

FUSED = ("", "relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "tanh", "leaky_relu")
"""Activations that ONNX Runtime computes inside its blocked convolution, without leaving that layout."""


@dataclass(frozen=True)
class Block:
    """What an engine runs as one fused step.

    Attributes:
        kind: "conv", "linear", "matmul", "norm", "elementwise", "pool", "softmax", "move" (copies that change the order
            of values), "reorder" (into or out of the layout an engine's convolutions work in) or "input" (uint8 NHWC
            pixels to normalised float NCHW).
        inputs: shapes of the activations; a second one of a conv or a linear is added to the result.
        weight: shape of the weight, as PyTorch lays it out; of a pool, the window; () if none.
        stride, padding, dilation: (vertical, horizontal); groups: of a convolution or a group norm.
        activation: computed on the result: "" or one of `block_graph.UNARY`.
        op: the operator, where the kind has several: "batch", "layer", "group" (norm); a name of `block_graph.UNARY`
            or "add", "sub", "mul", "div" (elementwise); "max", "average", "mean" (pool); "copy", "resize" or
            "transpose:2,0,1" with the permutation (move).
    """

    kind: str
    inputs: tuple[tuple[int, ...], ...]
    weight: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    groups: int = 1
    activation: str = ""
    op: str = ""
    dilation: tuple[int, ...] = ()

    @cached_property
    def key(self) -> str:
        """One line that names this block and no other, in the table's file."""
        parts = [f"{self.kind}:{self.op}" if self.op else self.kind, *map(_times, self.inputs)]
        parts += [f"w{_times(self.weight)}"] if self.weight else []
        for letter, values in (("s", self.stride), ("p", self.padding), ("d", self.dilation)):
            parts += [f"{letter}{_times(values)}"] if values else []
        parts += [f"g{self.groups}"] if self.groups != 1 else []
        return " ".join([*parts, self.activation]).rstrip()

    @property
    def channel_dim(self) -> int:
        """Dimension of the first input that channels lie along: 1 of (N, C, H, W), else the last."""
        shape = self.inputs[0]
        is_planes = len(shape) == 4 and self.kind != "matmul" and self.op != "layer"
        # Maps are nearly always square: (N, H, W, C) shows by its equal second and third dimension.
        return 1 if is_planes and not (shape[1] == shape[2] != shape[3]) else len(shape) - 1

    def widths(self) -> tuple[int, ...]:
        """The numbers of channels that pruning changes, each on its own; () where there are none to speak of.

        (in, out) of a dense convolution or a linear, (channels,) of a depthwise one, (groups,) of a grouped one,
        (channels,) of what works channel by channel.
        """
        if self.kind == "linear" or (self.kind == "conv" and self.groups == 1):
            return self.weight[1], self.weight[0]
        if self.kind == "conv":
            return (self.groups,)
        if self.kind in ("matmul", "softmax", "input") or self.op.startswith("transpose"):
            return ()
        if self.op == "group":
            return ()
        return (self.inputs[0][self.channel_dim],)

    def resized(self, widths: tuple[int, ...]) -> Block:
        """The same block with other `widths`."""
        before = self.widths()
        if widths == before:
            return self
        if self.kind in ("conv", "linear") and len(widths) == 2:
            dim = 1 if self.kind == "conv" else len(self.inputs[0]) - 1
            inputs = tuple(
                _with(shape, dim, width) for shape, width in zip(self.inputs, widths, strict=False)
            )
            return replace(self, inputs=inputs, weight=(widths[1], widths[0], *self.weight[2:]))
        if self.kind == "conv":
            groups, per_in, per_out = widths[0], self.weight[1], self.weight[0] // self.groups
            inputs = tuple(
                _with(shape, 1, width)
                for shape, width in zip(self.inputs, (groups * per_in, groups * per_out), strict=False)
            )
            weight = (groups * per_out, *self.weight[1:])
            return replace(self, inputs=inputs, weight=weight, groups=groups)
        old, new = before[0], widths[0]
        offset = self.channel_dim - len(self.inputs[0])  # broadcasting aligns dimensions from the last
        inputs = tuple(
            _with(shape, offset, new) if len(shape) >= -offset and shape[offset] == old else shape
            for shape in self.inputs
        )
        weight = self.weight
        if self.kind != "pool":
            weight = tuple(new if size == old else size for size in weight)
        return replace(self, inputs=inputs, weight=weight)


def _times(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values)) or "1"


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    changed = list(shape)
    changed[dim] = size
    return tuple(changed)
