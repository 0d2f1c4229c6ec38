"""The edit that gives attentions another number of heads than their width asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from cveff.errors import StepError


@dataclass(frozen=True)
class AttentionHeads:
    """Give every attention of a timm VisionTransformer `heads` heads of `head_dim` dimensions each.

    timm makes heads by cutting the width in equal parts, so that more heads are smaller heads; a network that is to
    grow heads needs fewer of the size they will have. New projections are initialised as timm's are (Dosovitskiy et
    al., arXiv:2010.11929: normal, σ = 0.02).

    Raises:
        StepError: when applied: there is no attention, or one that also normalises what its heads give.
    """

    heads: int
    head_dim: int
    kind: ClassVar[str] = "attention_heads"

    def apply(self, module: nn.Module) -> nn.Module:
        """Change `module` in place and return it."""
        found = [(path, part) for path, part in module.named_modules() if is_attention(part)]
        if not found:
            raise StepError(
                f"{type(module).__name__} has no attention with qkv and proj layers to give heads to"
            )
        for path, part in found:
            self._resize(path, part)
        return module

    def _resize(self, path: str, part: Any) -> None:
        identities = [name for name in ("norm", "q_norm", "k_norm", "gate") if _is_used(part, name)]
        if identities and (part.num_heads, part.head_dim) != (self.heads, self.head_dim):
            raise StepError(
                f"attention {path} has a {identities[0]} between its heads, whose size would change; grow its width "
                "and heads together"
            )
        inner = self.heads * self.head_dim
        part.qkv = _like(part.qkv, part.qkv.in_features, 3 * inner)
        part.proj = _like(part.proj, inner, part.proj.out_features)
        part.num_heads, part.head_dim, part.attn_dim = self.heads, self.head_dim, inner
        part.scale = self.head_dim**-0.5


def is_attention(part: nn.Module) -> bool:
    """Whether a module is timm's self-attention: qkv and proj as linear layers, heads of any size between."""
    layers = (getattr(part, "qkv", None), getattr(part, "proj", None))
    return all(isinstance(layer, nn.Linear) for layer in layers) and hasattr(part, "attn_dim")


def _is_used(part: nn.Module, name: str) -> bool:
    return not isinstance(getattr(part, name, None), (nn.Identity, type(None)))


def _like(layer: nn.Linear, inputs: int, outputs: int) -> nn.Linear:
    made = nn.Linear(inputs, outputs, layer.bias is not None, layer.weight.device, layer.weight.dtype)
    nn.init.trunc_normal_(made.weight, std=0.02)
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    return made.train(layer.training)
