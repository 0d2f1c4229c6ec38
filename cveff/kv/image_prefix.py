"""`ImagePrefix`: of an image's tokens keep those that the text looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from cveff.errors import CacheError
from cveff.kv.checks import check_share
from cveff.kv.marks import IMAGE
from cveff.kv.prompt import Prompt, Selection, keep_once
from cveff.kv.rule import largest


@dataclass(frozen=True)
class ImagePrefix:
    """For decoders of vision-language models: keep all text, and the image tokens with most attention from text.

    Only text queries that come after an image token are asked: those of the image see each other in both directions
    in some models, and say nothing about the question. Without image tokens nothing is evicted.

    Attributes:
        ratio: share of the image tokens that stays, for each head.

    Raises:
        CacheError: at construction, for a share out of range; while generating, where images have no text after them.
    """

    ratio: float = 0.25

    kind: ClassVar[str] = "image-prefix"
    needs_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("image_prefix.ratio", self.ratio)

    def select(self, prompt: Prompt) -> Selection:
        """Keep the text and the best image tokens of each head."""
        image = (prompt.tags & IMAGE) != 0
        if not bool(image.any()):
            return keep_once(torch.ones_like(prompt.keys[..., 0], dtype=torch.bool), "full")
        asking = ~image & (image.cumsum(0) > 0)
        if not bool(asking.any()):
            raise CacheError(
                "the prompt has no text after its image tokens, so none asks about them; put the question last"
            )
        received = prompt.received(asking).masked_fill(~image, -torch.inf)
        count = max(1, int(self.ratio * int(image.sum())))
        return keep_once(largest(received, [count] * prompt.num_heads) | ~image, self.kind)
