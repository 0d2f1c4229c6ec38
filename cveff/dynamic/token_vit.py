"""The two halves of timm's transformer blocks, and attention that shows its queries and keys.

timm's own forward is used wherever nothing is reduced; these are for the blocks in which something is.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.errors import StepError

BLOCKS = (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm)
ATTENTIONS = (Attention, AttentionRope, EvaAttention)


class Attended(NamedTuple):
    """Attention's output (B, N, C), and its queries and keys (B, heads, N, D) as they met.

    `content` are the keys before rotary embedding: alike for like patches wherever they are.
    """

    output: Tensor
    queries: Tensor
    keys: Tensor
    content: Tensor


def require_vit(module: nn.Module) -> nn.Module:
    """`module`, if tokens can be reduced between its blocks.

    Raises:
        StepError: not one of timm's plain vision transformers, or one with positions that belong to blocks.
    """
    name = type(module).__name__
    if not isinstance(module, (VisionTransformer, Eva)) or not isinstance(
        module.blocks, (nn.Sequential, nn.ModuleList)
    ):
        raise StepError(
            f"{name} is not a vision transformer that keeps a list of tokens; ReduceTokens takes timm's "
            "VisionTransformer (ViT, DeiT, DINOv2, SigLIP, …) and Eva"
        )
    if getattr(module, "rope_mixed", False):
        raise StepError(
            f"{name} has rotary embeddings of each block's own, which reduced tokens would lose; "
            "take an architecture without 'mixed' rope"
        )
    return module


def require_block(block: nn.Module, index: int) -> None:
    """Refuse a block whose attention cannot be looked into.

    Raises:
        StepError: naming the block and what it is.
    """
    if type(block) not in BLOCKS:
        raise StepError(
            f"block {index} is a {type(block).__name__}, in which attention and MLP cannot be told apart; "
            "leave it out of `at`, or take another architecture"
        )
    if type(block.attn) not in ATTENTIONS:
        raise StepError(
            f"block {index} attends by {type(block.attn).__name__}, whose keys are not known; leave it out of `at`"
        )


def attention_half(
    block: nn.Module, x: Tensor, bias: Tensor | None, rope: Tensor | None
) -> tuple[Tensor, Attended]:
    """What `block` does to `x` (B, N, C) up to its MLP, and what attention saw."""
    is_post_norm = isinstance(block, (ResPostBlock, EvaBlockPostNorm))
    attended = attend(cast(nn.Module, block.attn), x if is_post_norm else _call(block.norm1, x), bias, rope)
    y = attended.output
    if is_post_norm:
        y = _call(block.norm1, y)
    elif isinstance(block, EvaBlock):
        y = y if block.gamma_1 is None else block.gamma_1 * y
    else:
        y = _call(block.ls1, y)
    return x + _call(block.drop_path1, y), attended


def mlp_half(block: nn.Module, x: Tensor) -> Tensor:
    """What `block` does to `x` (B, N, C) from its MLP on."""
    if isinstance(block, (ResPostBlock, EvaBlockPostNorm)):
        y = _call(block.norm2, _call(block.mlp, x))
    else:
        y = _call(block.mlp, _call(block.norm2, x))
        if not isinstance(block, EvaBlock):
            y = _call(block.ls2, y)
        elif block.gamma_2 is not None:
            y = block.gamma_2 * y
    return x + _call(block.drop_path2, y)


def attend(attn: nn.Module, x: Tensor, bias: Tensor | None, rope: Tensor | None) -> Attended:
    """`attn` of `x` (B, N, C), fused where timm's would be.

    Args:
        bias: added to the logits, (B, 1, 1 or N, N).
        rope: rotary embeddings of the patch tokens, (n, 2·D) or (B, 1, n, 2·D).
    """
    query, key, value = _project(attn, x)
    query, content = _call(attn.q_norm, query), _call(attn.k_norm, key)
    key = content
    if rope is not None:
        query, key = _rotate(attn, query, rope, value), _rotate(attn, key, rope, value)
    groups = cast(int, getattr(attn, "num_kv_groups", 1))
    if groups > 1:
        key, value = (item.repeat_interleave(groups, dim=1) for item in (key, value))
    output = _mix(attn, query, key, value, bias).transpose(1, 2).flatten(2)
    if getattr(attn, "norm", None) is not None:
        output = _call(attn.norm, output)
    if getattr(attn, "gate", None) is not None:
        output = output * _call(attn.gate, x).sigmoid()
    return Attended(_call(attn.proj_drop, _call(attn.proj, output)), query, key, content)


def _mix(attn: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """`softmax(q kᵀ / √D + bias) v`, (B, heads, N, D)."""
    dropout = cast(nn.Dropout, attn.attn_drop)
    if attn.fused_attn:
        p = dropout.p if attn.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=p)
    logits = (query * cast(float, attn.scale)) @ key.transpose(-2, -1)  # (B, heads, N, N)
    return _call(dropout, (logits if bias is None else logits + bias).softmax(dim=-1)) @ value


def _project(attn: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, heads, N, D); keys and values may have fewer heads."""
    batch, count, _ = x.shape
    head_dim = cast(int, attn.head_dim)
    if attn.qkv is not None:
        qkv = _call(attn.qkv, x)
        if getattr(attn, "q_bias", None) is not None:
            biases = cast("tuple[Tensor, Tensor, Tensor]", (attn.q_bias, attn.k_bias, attn.v_bias))
            qkv = qkv + torch.cat(biases)
        qkv = qkv.reshape(batch, count, 3, -1, head_dim).permute(2, 0, 3, 1, 4)
        return cast("tuple[Tensor, Tensor, Tensor]", qkv.unbind(0))
    query, key, value = (
        _call(layer, x).reshape(batch, count, -1, head_dim).transpose(1, 2)
        for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    return query, key, value


def _rotate(attn: nn.Module, x: Tensor, rope: Tensor, like: Tensor) -> Tensor:
    first = cast(int, attn.num_prefix_tokens)
    rotated = apply_rot_embed_cat(x[:, :, first:], rope, half=bool(getattr(attn, "rotate_half", False)))
    return torch.cat((x[:, :, :first], rotated), dim=2).type_as(like)


def _call(module: object, x: Tensor) -> Tensor:
    return cast(Tensor, cast(nn.Module, module)(x))
