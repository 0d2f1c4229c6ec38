"""Which tokens are special, punctuation or parts of an image: sets that some policies never evict."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cveff.errors import CacheError

SPECIAL, PUNCTUATION, IMAGE = 1, 2, 4
_WORD_BEGINS = " \u2581\u0120"  # how SentencePiece and byte-level vocabularies write a space


@dataclass(frozen=True)
class Marks:
    """Token ids of the sets.

    Attributes:
        special: begin and end of text, instruction brackets, image borders.
        punctuation: tokens of nothing but punctuation (Unicode categories P*).
        image: placeholders that stand for patches of an image.
    """

    special: frozenset[int] = frozenset()
    punctuation: frozenset[int] = frozenset()
    image: frozenset[int] = frozenset()

    def tags(self, ids: Tensor) -> Tensor:
        """Bits `SPECIAL`, `PUNCTUATION`, `IMAGE` of token ids of any shape, uint8."""
        found = torch.zeros_like(ids, dtype=torch.uint8)
        for bit, members in ((SPECIAL, self.special), (PUNCTUATION, self.punctuation), (IMAGE, self.image)):
            if members:
                listed = torch.tensor(sorted(members), device=ids.device, dtype=ids.dtype)
                found |= torch.isin(ids, listed).to(torch.uint8) * bit
        return found


def marks_of(model: Any, tokenizer: Any | None) -> Marks:
    """The sets of a transformers model and its tokenizer.

    Without a tokenizer there is no punctuation, and special tokens are those the model's configuration names.

    Raises:
        CacheError: the tokenizer's vocabulary has no punctuation token.
    """
    image = _named(model.config, ("image_token_id", "image_token_index", "video_token_id"))
    special = _named(model.config, ("boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index"))
    special |= _named(model.config, ("vision_start_token_id", "vision_end_token_id"))
    if tokenizer is None:
        text = model.config.get_text_config(decoder=True)
        special |= _named(text, ("bos_token_id", "eos_token_id", "pad_token_id"))
        return Marks(special - image, frozenset(), image)
    punctuation = frozenset(index for token, index in tokenizer.get_vocab().items() if _is_punctuation(token))
    special |= frozenset(tokenizer.all_special_ids)
    punctuation -= special | image
    if not punctuation:
        raise CacheError(
            f"{type(tokenizer).__name__} has no token of punctuation among {len(tokenizer.get_vocab())}; "
            "leave tokenizer out to go without that set, or give marks="
        )
    return Marks(special - image, punctuation, image)


def _named(config: Any, names: tuple[str, ...]) -> frozenset[int]:
    found: set[int] = set()
    for name in names:
        value = getattr(config, name, None)
        found |= (
            set(value) if isinstance(value, list | tuple) else {value} if isinstance(value, int) else set()
        )
    return frozenset(found)


def _is_punctuation(token: str | bytes) -> bool:
    text = token.decode("utf-8", "ignore") if isinstance(token, bytes) else token
    bare = text.strip(_WORD_BEGINS)
    return bool(bare) and all(unicodedata.category(letter).startswith("P") for letter in bare)
