"""Networks of packed integers as torchao's tensors: the same integers, scales and zero points in torchao's classes.

torchao 0.18: `IntxUnpackedToInt8Tensor` holds a byte a weight, computes anywhere and can be exported;
`Int4OpaqueTensor` holds half a byte and computes with PyTorch's int4 kernel on a CPU. Extra: torchao.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, get_args

import torch
from torch import nn

from cveff.compress.low_rank_edit import replace
from cveff.compress.quant.packed_linear import PackedLinear
from cveff.compress.quant.weight_choice import packed_layers
from cveff.errors import MissingDependencyError, StepError

Kernel = Literal["plain", "int4-cpu"]


def to_torchao(module: nn.Module, kernel: Kernel = "plain") -> nn.Module:
    """A copy of `module` whose packed layers are `nn.Linear` with torchao's tensors as weights.

    Args:
        kernel: "plain": 4 or 8 bits, any device, the weights are made floats at every call; "int4-cpu": 4 bits, CPU.

    Raises:
        MissingDependencyError: torchao is not installed, or has no such tensor.
        StepError: no packed layer; a layer whose inputs are no multiple of the group size, or that the kernel cannot
            compute (the layer is named).
    """
    if kernel not in get_args(Kernel):
        raise StepError(f"kernel is {kernel!r}; give one of {', '.join(get_args(Kernel))}")
    module = copy.deepcopy(module)
    layers = dict(packed_layers(module))
    if not layers:
        raise StepError(f"{type(module).__name__} has no packed layer; quantize its weights first")
    for path, layer in layers.items():
        reason = _not_convertible(layer, kernel)
        if reason:
            raise StepError(f"layer {path!r} {reason}; exclude it, or use another kernel or group size")
    for path, layer in layers.items():
        with torch.device("meta"):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        tensor = _plain(layer) if kernel == "plain" else _int4_cpu(layer)
        linear.weight = nn.Parameter(tensor, requires_grad=False)
        linear.register_parameter("bias", layer.bias)
        replace(module, path, linear.train(layer.training))
    return module


def _not_convertible(layer: PackedLinear, kernel: Kernel) -> str:
    if layer.in_features % layer.grid.group_size:
        return f"has {layer.in_features} inputs, no multiple of its groups of {layer.grid.group_size}"
    if kernel == "plain":
        return ""
    if layer.grid.bits != 4:
        return f"has {layer.grid.bits} bits, int4-cpu takes 4"
    if layer.packed.device.type != "cpu":
        return f"is on {layer.packed.device}, int4-cpu takes layers on the CPU"
    if layer.out_features % 16:
        return f"has {layer.out_features} outputs, int4-cpu takes multiples of 16"
    return ""


def _plain(layer: PackedLinear) -> torch.Tensor:
    """Integers from -2^(bits-1); a symmetric grid's zero point is 0 then."""
    tensor = _import("torchao.quantization", "IntxUnpackedToInt8Tensor")
    middle, bits = layer.grid.middle, layer.grid.bits
    found: torch.Tensor = tensor(
        qdata=(layer.integers().short() - middle).to(torch.int8),
        scale=layer.scales.clone(),
        zero_point=(layer.zeros().short() - middle).to(torch.int8),
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=(1, layer.grid.group_size),
        dtype=layer.scales.dtype,
        activation_quantization=None,
    )
    return found


def _int4_cpu(layer: PackedLinear) -> torch.Tensor:
    """w = (q - 8) · s + z: the kernel's zero point is a float."""
    tensor = _import("torchao.prototype.quantization.int4.int4_opaque_tensor", "Int4OpaqueTensor")
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(layer.integers().int(), 1)
    except (RuntimeError, AttributeError) as error:
        raise MissingDependencyError(
            f"torch {torch.__version__} has no int4 kernel for this CPU: {error}; use kernel='plain'"
        ) from error
    zeros = (layer.grid.middle - layer.zeros().float()) * layer.scales
    found: torch.Tensor = tensor(
        qdata=packed,
        scale_and_zero=torch.stack([layer.scales, zeros], 2)
        .transpose(0, 1)
        .contiguous(),  # (groups, outputs, 2)
        block_size=[1, layer.grid.group_size],
        shape=torch.Size((layer.out_features, layer.in_features)),
    )
    return found


def _import(module: str, name: str) -> Any:
    import importlib

    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(
            f"torchao with {name} is needed, such as 0.18 ({error}); pip install 'cveff[torchao]'"
        ) from error
