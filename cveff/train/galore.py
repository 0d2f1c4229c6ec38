"""GaLore: Adam's or SGD's state kept for a low-rank projection of each gradient (Zhao et al., arXiv:2403.03507).

R = Uᵀ G or G Vᵀ; moments of R; W ← W − lr · scale · (U N or N V), N the normalised R.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from cveff.train import state8bit
from cveff.train.projected import ProjectedOptimizer
from cveff.train.projector import Method, ProjType

Convention = Literal["torch", "galore"]


class GaLoreAdamW(ProjectedOptimizer):
    """AdamW whose moments live in the subspace of each gradient's first singular vectors.

    Groups with a `rank` are projected, the others get plain AdamW. Such a group may hold `update_proj_gap`, `scale`
    and `proj_type` as `galore-torch` takes them, and each of the arguments below. Its parameters have two or more
    dimensions; a kernel (out, in, h, w) is the matrix (out, in·h·w). State of a matrix (m, n), in elements: the basis
    r·min(m, n) and two moments r·max(m, n), in the parameter's dtype (float32 for float16).

    Args:
        params: parameters or groups; `cveff.train.galore_groups` makes them from a network.
        eps: by default 1e-8 under convention "torch", 1e-6 under "galore".
        weight_decay: decoupled; by default 0.01 and 0.0, as the two libraries have it.
        update_proj_gap: steps between two projections.
        scale: factor of a projected update.
        proj_type: "std" keeps moments of the long side, "reverse_std" of the short one, "left" and "right" project
            that side, "full" both.
        projector: "svd" is exact, "subspace" a randomised subspace iteration that starts from the old basis;
            "auto" is exact for matrices whose short side is at most 512.
        refresh: "fixed" refreshes every `update_proj_gap` steps; "lazy" doubles a matrix's gap after five refreshes
            in a row that kept at least 0.4 of the subspace (Q-GaLore, arXiv:2407.08296, section 3.2).
        carry: "keep" leaves the moments as they are when the basis changes, as the paper does; "rotate" turns them
            into the new basis: the first by the matrix of cosines, the second by its squares, which is exact where
            coordinates are uncorrelated.
        residual: also use what the projection leaves out, each row or column of the long side scaled by ‖N‖ / ‖R‖ and
            its growth limited to 1% a step (Fira, arXiv:2410.01390, section 4).
        state_bits: 8 keeps moments of 4096 or more elements in 8 bits, block-wise; the square root of the second
            one, whose range would not fit. Bases stay as they are. Needs bitsandbytes.
        convention: "torch" is `torch.optim.AdamW` (eps after bias correction, decay before the update), and a side
            whose length is the rank is not projected, so that full rank and scale 1 are AdamW; "galore" is
            `galore_torch.GaLoreAdamW` (eps before bias correction, decay after the update).
        layerwise: update each parameter as its gradient arrives and free it: gradients never exist all at once.
            Not with accumulated gradients, clipping by the norm of all, loss scaling or several processes.
        synchronize: in a process group all ranks take rank 0's bases, since signs of singular vectors may differ
            between devices. False where ranks train different networks.

    Raises:
        TrainingError: at construction, for a value out of range, a parameter with one dimension in a group with a
            rank, or a rank larger than its matrix; at a refresh, for a gradient that is not finite.
        MissingDependencyError: `state_bits` 8 without bitsandbytes.
    """

    moments: ClassVar[Mapping[str, int]] = {"exp_avg": 1, "exp_avg_sq": 2}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float | None = None,
        *,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: ProjType = "std",
        projector: Method = "auto",
        refresh: Literal["fixed", "lazy"] = "fixed",
        carry: Literal["keep", "rotate"] = "keep",
        residual: bool = False,
        state_bits: Literal[32, 8] = 32,
        convention: Convention = "torch",
        layerwise: bool = False,
        synchronize: bool = True,
    ) -> None:
        is_torch = convention == "torch"
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": (1e-8 if is_torch else 1e-6) if eps is None else eps,
            "weight_decay": (0.01 if is_torch else 0.0) if weight_decay is None else weight_decay,
            "rank": None,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "projector": projector,
            "refresh": refresh,
            "carry": carry,
            "residual": residual,
            "state_bits": state_bits,
            "convention": convention,
        }
        super().__init__(params, defaults, layerwise=layerwise, synchronize=synchronize)

    def direction(
        self, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None, float]:
        """Adam's m, √v + ε and the correction of the learning rate."""
        beta1, beta2 = group["betas"]
        bits = group["state_bits"]
        first = state8bit.read(state, "exp_avg", gradient, bits)
        second = state8bit.read(state, "exp_avg_sq", gradient, bits)
        gradient = gradient.to(first.dtype)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state8bit.write(state, "exp_avg", first)
        state8bit.write(state, "exp_avg_sq", second)
        root = second.sqrt()
        correction1, correction2 = 1 - beta1 ** state["step"], math.sqrt(1 - beta2 ** state["step"])
        if group["convention"] == "galore":
            return first, root.add_(group["eps"]), correction1 / correction2
        return first, (root / correction2).add_(group["eps"]), correction1

    def prepare(self, parameter: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        if group["convention"] == "torch":
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        return gradient

    def finish(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        if group["convention"] == "galore" and group["weight_decay"]:
            parameter.add_(parameter, alpha=-group["lr"] * group["weight_decay"])


class GaLoreSGD(ProjectedOptimizer):
    """SGD whose momentum lives in the subspace of each gradient's first singular vectors.

    Args:
        params, update_proj_gap, scale, proj_type, projector, refresh, carry, layerwise, synchronize: as `GaLoreAdamW`.
            `scale` is 1 by default: without normalisation the update has the gradient's size.
        momentum, nesterov, weight_decay: as `torch.optim.SGD`, which this is at full rank and scale 1.

    Raises:
        TrainingError: as `GaLoreAdamW`.
    """

    moments: ClassVar[Mapping[str, int]] = {"momentum_buffer": 1}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        proj_type: ProjType = "std",
        projector: Method = "auto",
        refresh: Literal["fixed", "lazy"] = "fixed",
        carry: Literal["keep", "rotate"] = "keep",
        layerwise: bool = False,
        synchronize: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "rank": None,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
            "projector": projector,
            "refresh": refresh,
            "carry": carry,
            "residual": False,
            "state_bits": 32,
            "convention": "torch",
        }
        super().__init__(params, defaults, layerwise=layerwise, synchronize=synchronize)

    def direction(
        self, gradient: Tensor, state: dict[str, Any], group: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None, float]:
        """The momentum, or the gradient without any."""
        if not group["momentum"]:
            return gradient, None, 1.0
        buffer = state8bit.read(state, "momentum_buffer", gradient, 32)
        buffer.mul_(group["momentum"]).add_(gradient)
        if group["nesterov"]:
            return gradient.add(buffer, alpha=group["momentum"]), None, 1.0
        return buffer, None, 1.0

    def prepare(self, parameter: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        if group["weight_decay"]:
            return gradient.add(parameter.to(gradient.dtype), alpha=group["weight_decay"])
        return gradient
