"""`GaLore`: the settings of `Train(optimizer="galore")`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from torch import nn

from cveff.train.galore import GaLoreAdamW
from cveff.train.galore_groups import check_rank, galore_groups
from cveff.train.projection_checks import check_projection


@dataclass(frozen=True)
class GaLore:
    """What is projected and how; see `cveff.train.GaLoreAdamW`, whose arguments these are.

    Attributes:
        rank: of the projections, or below 1 a share of each matrix's short side.
        update_proj_gap: steps between two projections.
        scale: factor of a projected update beside the learning rate.
        proj_type: the side that is projected: "std" (the short one), "reverse_std", "left", "right" or "full" (both).
        projector: "svd", "subspace" (randomised), or "auto": exact up to a short side of 512.
        refresh: "fixed", or "lazy": less and less often where the subspace stays.
        carry: "keep" the moments when the basis changes, or "rotate" them into the new one.
        residual: also use the part of the gradient outside the subspace (Fira).
        state_bits: 8 keeps moments in 8 bits, block-wise; needs bitsandbytes.
        layerwise: update each weight as its gradient arrives, which frees the memory of gradients; not with
            accumulation, clip_norm or fp16.

    Raises:
        TrainingError: at construction, for a value out of range.
    """

    rank: float | int = 0.25
    update_proj_gap: int = 200
    scale: float = 1.0
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = "std"
    projector: Literal["auto", "svd", "subspace"] = "auto"
    refresh: Literal["fixed", "lazy"] = "fixed"
    carry: Literal["keep", "rotate"] = "keep"
    residual: bool = False
    state_bits: Literal[32, 8] = 32
    layerwise: bool = False

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_projection(vars(self), "galore.")

    def optimizer(
        self, module: nn.Module, learning_rate: float, weight_decay: float, extra: nn.Module | None = None
    ) -> GaLoreAdamW:
        """The optimizer of all trainable parameters of `module`; those of `extra` are not projected.

        Raises:
            TrainingError: no weight of `module` can be projected.
            MissingDependencyError: `state_bits` 8 without bitsandbytes.
        """
        settings = asdict(self)
        groups = galore_groups(module, settings.pop("rank"))
        if extra is not None:
            groups += [
                {"params": [parameter], "param_names": [f"extra.{name}"]}
                | ({} if parameter.ndim > 1 else {"weight_decay": 0.0})
                for name, parameter in extra.named_parameters()
                if parameter.requires_grad
            ]
        return GaLoreAdamW(groups, learning_rate, weight_decay=weight_decay, **settings)
