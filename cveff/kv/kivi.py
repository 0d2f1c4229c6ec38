"""`KIVI`: keys and values in 2 or 4 bits, keys by channel and values by token (arXiv:2402.02750)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cveff.errors import CacheError
from cveff.kv.checks import check_count


@dataclass(frozen=True)
class Packed:
    """Asymmetric integers of a few bits: x ≈ code · scale + zero.

    Attributes:
        codes: uint8, several to a byte along the last axis.
        scale: one for each group, in the dtype of what was packed.
        zero: the groups' least values.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is stored."""
        return self.codes, self.scale, self.zero

    def index(self, index: Tensor | int) -> Packed:
        """Along the first axis."""
        return Packed(self.codes[index], self.scale[index], self.zero[index])


@dataclass(frozen=True)
class KIVI:
    """Storage that composes with every policy but StreamingLLM: evict first, then pack (Liu et al., ICML 2024).

    A block is `group_size` tokens. Its keys have a scale and a zero for each channel, its values for each token and
    `group_size` channels. The newest tokens stay as they are until a block beyond `residual` of them is full. A token
    that is evicted from a block is no longer seen; the block is freed when the last of its tokens is evicted, as
    packing the others anew would round them twice.

    Attributes:
        bits: 2 or 4.
        group_size: tokens of a block of keys, and channels of a group of values.
        residual: newest tokens that are never packed.
        keys_by: "channel", as the paper; "token" is there to compare with.

    Raises:
        CacheError: at construction, for a value out of range; at the first prompt, for a head size that does not
            divide into bytes and groups.
    """

    bits: Literal[2, 4] = 4
    group_size: int = 32
    residual: int = 128
    keys_by: Literal["channel", "token"] = "channel"

    kind: ClassVar[str] = "kivi"

    def __post_init__(self) -> None:
        if self.bits not in (2, 4):
            raise CacheError(f"kivi.bits is {self.bits!r}; give 2 or 4")
        if self.keys_by not in ("channel", "token"):
            raise CacheError(f"kivi.keys_by is {self.keys_by!r}; give 'channel' or 'token'")
        check_count("kivi.group_size", self.group_size, least=1)
        check_count("kivi.residual", self.residual)

    def check(self, head_dim: int) -> None:
        """Raise unless heads of this size can be packed.

        Raises:
            CacheError: the size is no multiple of the codes in a byte, or of the group size if that is smaller.
        """
        if head_dim % (8 // self.bits) or head_dim % min(self.group_size, head_dim):
            raise CacheError(
                f"heads of {head_dim} channels do not divide into bytes of {8 // self.bits} codes and groups of "
                f"{self.group_size}; give a kivi.group_size that divides {head_dim}"
            )

    def pack_keys(self, keys: Tensor) -> Packed:
        """Keys (b, group_size, D) of b blocks."""
        return self._pack(keys, dim=1) if self.keys_by == "channel" else self.pack_values(keys)

    def pack_values(self, values: Tensor) -> Packed:
        """Values (b, group_size, D) of b blocks: groups along D."""
        width = min(self.group_size, values.shape[-1])
        packed = self._pack(values.unflatten(-1, (-1, width)), dim=-1)
        return Packed(packed.codes.flatten(-2), packed.scale, packed.zero)

    def unpack_keys(self, packed: Packed) -> Tensor:
        """Keys (…, group_size, D) again."""
        return self._unpack(packed) if self.keys_by == "channel" else self.unpack_values(packed)

    def unpack_values(self, packed: Packed) -> Tensor:
        """Values (…, group_size, D) again."""
        groups = packed.scale.shape[-2]
        codes = packed.codes.unflatten(-1, (groups, -1))
        return self._unpack(Packed(codes, packed.scale, packed.zero)).flatten(-2)

    def _pack(self, x: Tensor, dim: int) -> Packed:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        scale = (high - low) / (2**self.bits - 1)
        # A constant group has no range; its codes are 0 and the zero alone says what it is.
        codes = (
            ((x - low) / torch.where(scale > 0, scale, 1))
            .round_()
            .clamp_(0, 2**self.bits - 1)
            .to(torch.uint8)
        )
        per_byte = 8 // self.bits
        parts = codes.unflatten(-1, (-1, per_byte))
        packed = parts[..., 0].clone()
        for index in range(1, per_byte):
            packed |= parts[..., index] << (index * self.bits)
        return Packed(packed, scale, low)

    def _unpack(self, packed: Packed) -> Tensor:
        mask = 2**self.bits - 1
        parts = [(packed.codes >> shift) & mask for shift in range(0, 8, self.bits)]
        codes = torch.stack(parts, dim=-1).flatten(-2)
        return codes.to(packed.scale.dtype) * packed.scale + packed.zero
