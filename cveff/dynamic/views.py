"""`Views`: a network sees a small copy of the image and then crops of it, as an edit; and how that is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from cveff.dynamic.exit_objective import ExitObjective
from cveff.dynamic.exits import AFTER_EXITS
from cveff.dynamic.focus_network import FocusNetwork
from cveff.train.objective import Objective


@dataclass(frozen=True)
class Views:
    """Edit: the network sees a small copy of the image, and then crops of it.

    However the model is trained afterwards, every view's answer is trained with it.

    Attributes:
        size: (height, width) of the images.
        view: (height, width) of the small copy and of the crops.
        crops: how many crops.
        policy: what says where to look, as in `GlanceFocus`.
        method, alpha, temperature: how exits are trained, as in `GlanceFocus`.
    """

    size: tuple[int, int]
    view: tuple[int, int]
    crops: int
    policy: str = "activation"
    method: str = "joint"
    alpha: float = 0.5
    temperature: float = 4.0
    kind: ClassVar[str] = "glance_focus"

    def objection(self, kind: str) -> str | None:
        """Other steps look for the network itself, as the maker of its answer."""
        return None if kind in AFTER_EXITS else f"{kind} comes after glance_focus; put glance_focus behind it"

    def apply(self, module: nn.Module) -> nn.Module:
        """`module` behind its views, made for their size where it is made for one; a learned policy starts random."""
        if hasattr(
            module, "set_input_size"
        ):  # timm's, of networks whose weights or windows depend on the size
            cast(Any, module).set_input_size(img_size=self.view)
        learns = self.policy == "learned"
        return FocusNetwork(module, self.size, self.view, self.crops, learns).train(module.training)

    def constrained(self, objective: Objective, module: nn.Module) -> Objective:
        """`objective` for the last exit, the losses of those before it added, and that of a learned policy."""
        exits = ExitObjective(objective, self)
        return PolicyObjective(exits) if self.policy == "learned" else exits


class PolicyObjective:
    """Adds how badly the policy foretold, of the crops it chose, the probability of the right class there.

    The reward is that of the paper (Wang et al., NeurIPS 2020, section 3.3) but for what came before, which is the
    same wherever one looks; it is regressed, by cross-entropy, and not followed by policy gradients.

    Args:
        exits: what is minimised for the network.
    """

    def __init__(self, exits: Objective) -> None:
        self._exits = exits
        self.extra = exits.extra

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Summed over the images, the exits and the crops."""
        with cast(FocusNetwork, module).looking() as looks:
            total = self._exits.loss(module, images, targets)
        for look in looks:
            right = look.logits.detach().float().softmax(1).gather(1, targets[:, None])[:, 0]
            total = total + F.binary_cross_entropy_with_logits(look.interest.float(), right, reduction="sum")
        return total

    def after_step(self, module: nn.Module, step: int, total_steps: int) -> None:
        """The network's objective's."""
        self._exits.after_step(module, step, total_steps)

    def identity(self) -> Mapping[str, Any]:
        """The network's objective's; the policy is in the model's edits."""
        return self._exits.identity()
