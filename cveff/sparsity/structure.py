"""Where a network's MLPs are: found by the names and kinds of their layers, and proven by computing one token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.errors import StepError
from cveff.kernels.gather_mlp.reference import ACTIVATIONS
from cveff.sparsity.collect import evaluating

_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_FUSED = ("gate_up_proj", "down_proj")
_PLAIN = ("fc1", "fc2")
_ACTIVATION = ("act_fn", "activation_fn", "act", "activation")


@dataclass(frozen=True)
class Mlp:
    """One MLP: down(act(gate(x)) · up(x)), or down(act(up(x))).

    Attributes:
        path: of the module that has the layers, in the network.
        owner: that module.
        whole: whether calling `owner` is calling the MLP; in OPT the layers stand in the decoder's layer.
        first: the layers that read the MLP's input: gate and up, both in one (Phi-3), or up alone.
        down: the last layer.
        gated: whether there is a gate.
        activation: its name in `cveff.kernels.gather_mlp.ACTIVATIONS`.
    """

    path: str
    owner: nn.Module
    whole: bool
    first: tuple[nn.Linear, ...]
    down: nn.Linear
    gated: bool
    activation: str

    @property
    def inputs(self) -> int:
        """Width of the MLP's input."""
        return self.first[0].in_features

    @property
    def hidden(self) -> int:
        """Number of neurons."""
        return self.down.in_features

    @property
    def up(self) -> tuple[Tensor, Tensor | None]:
        """Weight (hidden, inputs) and bias (hidden,) of what the activation does not touch, or of the only layer."""
        last = self.first[-1]
        return last.weight[-self.hidden :], None if last.bias is None else last.bias[-self.hidden :]

    @property
    def gate(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight (hidden, inputs) and bias (hidden,) of the gate."""
        if not self.gated:
            return None, None
        layer = self.first[0]
        return layer.weight[: self.hidden], None if layer.bias is None else layer.bias[: self.hidden]

    def gates(self, x: Tensor) -> Tensor:
        """act(gate(x)), (N, hidden), for x (N, inputs); of an MLP with a gate."""
        weight, bias = self.gate
        assert weight is not None
        return ACTIVATIONS[self.activation](F.linear(x, weight, bias))

    def values(self, x: Tensor) -> Tensor:
        """What the last layer reads, (N, hidden), for x (N, inputs)."""
        found = F.linear(x, *self.up)
        return self.gates(x) * found if self.gated else ACTIVATIONS[self.activation](found)


def find_mlps(model: nn.Module) -> tuple[Mlp, ...]:
    """The network's MLPs, in the order of its modules.

    Raises:
        StepError: there is none, or one computes something else than its layers' names promise.
    """
    found = tuple(mlp for path, module in model.named_modules() if (mlp := _mlp(path, module)) is not None)
    if not found:
        raise StepError(
            f"{type(model).__name__} has no MLP of linear layers called gate_proj/up_proj/down_proj, "
            "gate_up_proj/down_proj, w1/w3/w2 or fc1/fc2"
        )
    for mlp in found:
        if mlp.whole:
            _prove(mlp)
    return found


def _mlp(path: str, module: nn.Module) -> Mlp | None:
    layers = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
    for names in _GATED:
        if all(name in layers for name in names):
            gate, up, down = (layers[name] for name in names)
            if gate.out_features == up.out_features == down.in_features:
                return _made(path, module, (gate, up), down, gated=True)
    if all(name in layers for name in _FUSED):
        both, down = (layers[name] for name in _FUSED)
        if both.out_features == 2 * down.in_features:
            return _made(path, module, (both,), down, gated=True)
    if all(name in layers for name in _PLAIN):
        up, down = (layers[name] for name in _PLAIN)
        if up.out_features == down.in_features:
            return _made(path, module, (up,), down, gated=False)
    return None


def _made(path: str, owner: nn.Module, first: tuple[nn.Linear, ...], down: nn.Linear, gated: bool) -> Mlp:
    own = {id(layer) for layer in (*first, down)}
    whole = all(id(layer) in own for layer in owner.modules() if list(layer.parameters(recurse=False)))
    function = next(
        (getattr(owner, name) for name in _ACTIVATION if callable(getattr(owner, name, None))), None
    )
    return Mlp(path, owner, whole, first, down, gated, _activation(path, function))


def _activation(path: str, function: Callable[[Tensor], Tensor] | None) -> str:
    """Its name, by what it computes."""
    if function is None:
        raise StepError(f"{path} has no activation called {', '.join(_ACTIVATION)}")
    x = torch.linspace(-8, 8, 257)
    with torch.no_grad():
        y = function(x.clone())
        for name, known in ACTIVATIONS.items():
            if torch.allclose(y, known(x), rtol=1e-5, atol=1e-6):
                return name
    raise StepError(f"{path}'s activation {function} is none of {', '.join(ACTIVATIONS)}")


@torch.no_grad()
def _prove(mlp: Mlp) -> None:
    weight = mlp.down.weight
    x = torch.randn(1, 1, mlp.inputs, generator=torch.Generator().manual_seed(0))
    x = x.to(weight.device, weight.dtype)
    with evaluating(mlp.owner):
        found = mlp.owner(x)
    expected = F.linear(mlp.values(x[0]), weight, mlp.down.bias)
    tolerance = 1e-4 if weight.dtype == torch.float32 else 0.05
    if (found[0] - expected).abs().max() > tolerance * expected.abs().max().clamp(min=1e-6):
        raise StepError(
            f"{mlp.path} ({type(mlp.owner).__name__}) does not compute down(act(gate(x)) · up(x))"
        )
