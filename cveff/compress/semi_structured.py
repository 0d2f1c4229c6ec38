"""2:4 weights on NVIDIA's sparse tensor cores, through PyTorch's own semi-structured tensors."""

from __future__ import annotations

import torch
from torch import nn

from cveff.compress.sparse_masks import is_two_of_four
from cveff.errors import StepError

# Rows and columns that CUTLASS's kernels want a multiple of; torch/sparse/semi_structured.py, since torch 2.5.
_MULTIPLES = {
    torch.int8: (16, 128),
    torch.float16: (32, 64),
    torch.bfloat16: (32, 64),
    torch.float32: (32, 32),
}
_AMPERE = (8, 0)


def semi_structured(module: nn.Module) -> dict[str, str]:
    """Pack the 2:4 weights of a network's linear layers, in place, for inference on a GPU.

    What `Sparsify` zeroed in the 2:4 pattern is stored without its zeros and multiplied by sparse tensor cores. Packed
    weights can be neither trained nor saved with `cveff.save`: save first.

    Returns:
        Layers that stay dense, with the reason: their weight is not 2:4, or its shape is none of the kernels'.

    Raises:
        StepError: the network is not on a GPU of compute capability 8.0 or later, or no layer can be packed.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        raise StepError(
            f"2:4 weights are packed for NVIDIA GPUs, and the network is on {device}; move it to one"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _AMPERE:
        raise StepError(
            f"the GPU has compute capability {capability[0]}.{capability[1]}; 2:4 needs 8.0 or later"
        )
    layers = {path: layer for path, layer in module.named_modules() if type(layer) is nn.Linear}
    dense = {
        path: reason for path, layer in layers.items() if (reason := why_dense(layer.weight)) is not None
    }
    if len(dense) == len(layers):
        path, reason = next(iter(dense.items()), ("the network", "it has no linear layer"))
        raise StepError(f"no layer can be packed; {path}: {reason}")
    for path in layers.keys() - dense.keys():
        weight = layers[path].weight.detach().contiguous()
        packed = torch.sparse.to_sparse_semi_structured(weight)
        layers[path].weight = nn.Parameter(packed, requires_grad=False)
    return dense


def why_dense(weight: torch.Tensor) -> str | None:
    """Why a linear layer's weight (out, in) cannot be packed; None if it can."""
    if weight.dtype not in _MULTIPLES:
        return f"{weight.dtype} is none of {', '.join(map(str, _MULTIPLES))}"
    rows, columns = _MULTIPLES[weight.dtype]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"{tuple(weight.shape)} is no multiple of ({rows}, {columns})"
    if not is_two_of_four(weight):
        return "the weight is not 2:4; apply Sparsify first"
    return None
