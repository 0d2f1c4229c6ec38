"""`FastGen`: each head keeps the smallest of five sets that recovers its attention (arXiv:2310.01801)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cveff.errors import CacheError
from cveff.kv.checks import check_count, check_share
from cveff.kv.marks import IMAGE, PUNCTUATION, SPECIAL
from cveff.kv.prompt import Prompt, Selection, keep_once
from cveff.kv.rule import Rule, amount, keep_mask, largest


@dataclass(frozen=True)
class FastGen:
    """Profile every head on the prompt, and keep what it looks at (Ge et al., ICLR 2024, Eq. 1 and 2, Algorithm 2).

    Of the sets special ⊂ special + punctuation ⊂ … + frequent ⊂ … + local and full, a key-value head takes the one
    with the fewest tokens that holds a share `recovery` of its attention. Attention that is renormalised after
    eviction is off by 1 - (kept mass) in total variation, so the kept mass, recomputed row by row, is what is
    compared. With grouped queries each query head of the group has to reach `recovery`. The choice is made once;
    while generating, the sets are formed anew at every step.

    Where the prompt has image tokens, the recovery is that of the other tokens' queries, and `image` adds a set.

    Attributes:
        recovery: T of the paper, in (0, 1]; 1 keeps everything.
        frequent: r_f, share of the length so far that is kept by attention received.
        local: r_l, share of the length so far that is kept as the most recent tokens.
        image: share of the image tokens, by attention received from text, that is kept in a set between punctuation
            and frequent; 0 leaves that set out.
        reduce: over the rows of a head: "mean", "min", or "last", the mean of the last `num_last` rows.
        num_last: rows of "last".
        normalize: divide attention received by the number of queries that could see the token. The paper's plain
            sums favour early tokens.
        max_length: shares are of this many tokens; None, the paper's choice, means of the length so far.

    Raises:
        CacheError: at construction, for a value out of range.
    """

    recovery: float = 0.95
    frequent: float = 0.3
    local: float = 0.3
    image: float = 0.0
    reduce: Literal["mean", "min", "last"] = "mean"
    num_last: int = 32
    normalize: bool = False
    max_length: int | None = None

    kind: ClassVar[str] = "fastgen"
    needs_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("fastgen.recovery", self.recovery)
        check_share("fastgen.frequent", self.frequent, allow_zero=True)
        check_share("fastgen.local", self.local, allow_zero=True)
        check_share("fastgen.image", self.image, allow_zero=True)
        check_count("fastgen.num_last", self.num_last, least=1)
        if self.max_length is not None:
            check_count("fastgen.max_length", self.max_length, least=1)
        if self.reduce not in ("mean", "min", "last"):
            raise CacheError(f"fastgen.reduce is {self.reduce!r}; give 'mean', 'min' or 'last'")

    def select(self, prompt: Prompt) -> Selection:
        """Choose each head's set by its recovery on the prompt. Memory: O(128 · n) for every query head."""
        heads, num_tokens = prompt.num_heads, prompt.num_tokens
        if self.recovery >= 1:
            return keep_once(torch.ones_like(prompt.keys[..., 0], dtype=torch.bool), "full")
        text = (prompt.tags & IMAGE) == 0
        received = prompt.received()
        labels, rules, pins = self._sets(prompt, received, text)
        codes = [prompt.codes(pinned) for pinned in pins]
        seen = [num_tokens] * heads
        keeps = torch.stack(
            [keep_mask(code, received, [rule] * heads, seen) for code, rule in zip(codes, rules, strict=True)]
        )  # (sets, H, n)
        recovered = self._recovery(prompt, rules, pins, received, text)
        costs = keeps.sum(-1)  # (sets, H)
        chosen = [len(rules)] * heads
        for head in range(heads):
            feasible = [
                (int(costs[index, head]), index)
                for index in range(len(rules))
                if float(recovered[index, head]) >= self.recovery and int(costs[index, head]) < num_tokens
            ]
            if feasible:
                chosen[head] = min(feasible)[1]
        everything = torch.ones(num_tokens, dtype=torch.bool, device=keeps.device)
        nothing = torch.zeros_like(everything)
        # "full" is the last resort by construction: a comparison could fail by rounding.
        return Selection(
            keep=torch.stack([keeps[c, h] if c < len(rules) else everything for h, c in enumerate(chosen)]),
            pinned=torch.stack([pins[c][h] if c < len(rules) else nothing for h, c in enumerate(chosen)]),
            rules=tuple(rules[c] if c < len(rules) else Rule() for c in chosen),
            labels=tuple(labels[c] if c < len(rules) else "full" for c in chosen),
            scores=received,
        )

    def _sets(
        self, prompt: Prompt, received: Tensor, text: Tensor
    ) -> tuple[list[str], list[Rule], list[Tensor]]:
        """Names, rules and pinned tokens (H, n) of the sets but "full", in the paper's order."""
        both = SPECIAL | PUNCTUATION
        special = ((prompt.tags & SPECIAL) != 0).expand(prompt.num_heads, -1)
        marked = ((prompt.tags & both) != 0).expand(prompt.num_heads, -1)
        rules = [
            Rule(tags=SPECIAL, only_pinned=True, length=self.max_length),
            Rule(tags=both, only_pinned=True, length=self.max_length),
        ]
        labels, pins = ["special", "punctuation"], [special, marked]
        if self.image and not bool(text.all()):
            from_text = prompt.received(text).masked_fill(text, -torch.inf)
            count = amount(float(self.image), int((~text).sum()))
            marked = marked | largest(from_text, [count] * prompt.num_heads)
            rules.append(Rule(tags=both, only_pinned=True, length=self.max_length))
            labels.append("image")
            pins.append(marked)
        frequent = Rule(
            tags=both, frequent=float(self.frequent), normalize=self.normalize, length=self.max_length
        )
        local = Rule(
            tags=both,
            frequent=float(self.frequent),
            local=float(self.local),
            normalize=self.normalize,
            length=self.max_length,
        )
        return [*labels, "frequent", "local"], [*rules, frequent, local], [*pins, marked, marked]

    def _recovery(
        self, prompt: Prompt, rules: Sequence[Rule], pins: Sequence[Tensor], received: Tensor, text: Tensor
    ) -> Tensor:
        """Attention that each set keeps, (sets, H): the least of the group's query heads."""
        num_tokens = prompt.num_tokens
        seen = [num_tokens] * prompt.num_heads
        fixed = torch.stack(
            [
                keep_mask(prompt.codes(pinned), received, [_without_window(rule)] * prompt.num_heads, seen)
                for rule, pinned in zip(rules, pins, strict=True)
            ]
        ).float()  # (sets, H, n)
        windows = [rule.window(num_tokens) for rule in rules]
        begin = max(0, num_tokens - self.num_last) if self.reduce == "last" else 0
        rows = text if bool(text.any()) else torch.ones_like(text)
        total: Tensor | None = None
        for first, last, probabilities in prompt.attention(begin):
            width = probabilities.shape[-1]
            # (H, g, rows, m) @ (H, m, sets): every fixed set at once
            mass = torch.einsum("hgrm,shm->shgr", probabilities, fixed[..., :width])
            places = torch.arange(width, device=probabilities.device)
            for index, window in enumerate(windows):
                if window:
                    row = torch.arange(first, last, device=probabilities.device)[:, None]
                    band = ((row - places) < window).float()
                    extra = probabilities * (band * (1 - fixed[index, :, None, None, :width]))
                    mass[index] += extra.sum(-1)
            counted = mass[..., rows[first:last]]
            if counted.shape[-1]:
                part = counted.amin(-1) if self.reduce == "min" else counted.sum(-1)
                total = (
                    part
                    if total is None
                    else torch.minimum(total, part)
                    if self.reduce == "min"
                    else total + part
                )
        if total is None:  # the last rows are all of an image
            return torch.zeros(len(rules), prompt.num_heads)
        if self.reduce != "min":
            total = total / int(rows[begin:].sum())
        return total.amin(-1)


def _without_window(rule: Rule) -> Rule:
    return Rule(
        tags=rule.tags, frequent=rule.frequent, normalize=rule.normalize, only_pinned=True, length=rule.length
    )
