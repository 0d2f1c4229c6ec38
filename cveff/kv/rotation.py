"""Rotating keys that are rotated already, by the model's own rotary embedding."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from cveff.errors import CacheError

_FIXED = {"default", "linear", "llama3", "yarn"}


class Rotation:
    """Moves keys to later positions, in whichever layout the model rotates (halves or pairs, all channels or some).

    Args:
        attention: an attention module of the model, whose file has `apply_rotary_pos_emb`.
        rotary: the model's embedding: (x, position_ids (B, n)) -> cosines and sines (B, n, R).
        arguments: what else it takes, such as a layer's type.

    Raises:
        CacheError: the frequencies change with the length, or the model rotates in a way of its own.
    """

    def __init__(self, attention: nn.Module, rotary: Any, arguments: tuple[Any, ...] = ()) -> None:
        kinds = rotary.rope_type if isinstance(rotary.rope_type, str) else rotary.rope_type.get(*arguments)
        apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if kinds not in _FIXED or apply is None or "cos" not in inspect.signature(apply).parameters:
            raise CacheError(
                f"{type(attention).__name__} rotates keys in a way ({kinds!r}) in which they cannot be moved on; "
                "use a policy without re-rotation, such as H2O"
            )
        self._apply, self._rotary, self._arguments = apply, rotary, arguments

    def __call__(self, keys: Tensor, shifts: Tensor) -> Tensor:
        """Keys moved on by `shifts` positions.

        Args:
            keys: (S, n, D), rotated.
            shifts: (S,) whole numbers.
        """
        # Positions 0 give the scale that some embeddings put into cosines; it is in the keys already.
        cos, sin = self._rotary(keys.float(), shifts[:, None], *self._arguments)
        scale = self._rotary(keys.float(), torch.zeros_like(shifts[:1, None]), *self._arguments)[0][0, 0, 0]
        width = cos.shape[-1]
        turned, _ = self._apply(
            keys[:, None, :, :width].float(), keys[:, None, :, :width].float(), cos / scale, sin / scale
        )
        return torch.cat([turned[:, 0].to(keys.dtype), keys[..., width:]], dim=-1)


def rotation_of(model: Any, attention: nn.Module, layer_type: str) -> Rotation:
    """The rotation of a transformers model.

    Args:
        model: the model; its one embedding that names `rope_type` is taken, the decoder's own where there are more.
        attention: a full-attention module of it.
        layer_type: that module's type, for embeddings that differ by it.

    Raises:
        CacheError: there is no rotary embedding, or it cannot be moved on.
    """
    here = type(attention).__module__
    found = [m for m in model.modules() if hasattr(m, "rope_type") and type(m).__module__ == here]
    if not found:
        raise CacheError(
            f"{type(model).__name__} has no rotary embedding, so tokens cannot be given positions within the cache; "
            "use a policy that keeps positions, such as H2O"
        )
    takes_type = "layer_type" in inspect.signature(found[0].forward).parameters
    return Rotation(attention, found[0], (layer_type,) if takes_type else ())
