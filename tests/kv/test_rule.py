"""The rule that every policy shares, against loops."""

from __future__ import annotations

import pytest
import torch

from cveff.kv.rule import PINNED, Rule, keep_mask

RULES = (
    Rule(),
    Rule(only_pinned=True),
    Rule(local=0.2),
    Rule(frequent=0.3),
    Rule(local=4, frequent=5, apart=True),
    Rule(local=0.25, frequent=0.25),
    Rule(local=0.25, frequent=0.25, normalize=True, length=100),
    Rule(local=0, frequent=0),
    Rule(local=500, frequent=500),
)


@pytest.mark.parametrize("with_gaps", [False, True])
def test_masks_equal_loops(with_gaps) -> None:
    generator = torch.Generator().manual_seed(0)
    count = len(RULES)
    seen = [60 + 3 * index for index in range(count)]
    codes = torch.stack([torch.randperm(n, generator=generator)[:40] for n in seen]).int()
    pinned = torch.rand(count, 40, generator=generator) < 0.1
    scores = torch.rand(count, 40, generator=generator)
    alive = torch.rand(count, 40, generator=generator) < 0.8 if with_gaps else None
    keep = keep_mask(torch.where(pinned, codes | PINNED, codes), scores, RULES, seen, alive)
    for index, (rule, n) in enumerate(zip(RULES, seen, strict=True)):
        here = [slot for slot in range(40) if alive is None or alive[index, slot]]
        if not rule.evicts:
            expected = set(here)
        else:
            length = rule.length or n
            window = rule.local if isinstance(rule.local, int) else int((rule.local or 0) * length)
            heavy = rule.frequent if isinstance(rule.frequent, int) else int((rule.frequent or 0) * length)
            recent = {slot for slot in here if int(codes[index, slot]) >= n - window}
            others = [slot for slot in here if not (rule.apart and slot in recent)]

            def value(slot: int, index: int = index, rule: Rule = rule, n: int = n) -> float:
                worth = float(scores[index, slot])
                return worth / (n - int(codes[index, slot])) if rule.normalize else worth

            frequent = set(sorted(others, key=value, reverse=True)[:heavy])
            expected = recent | frequent | {slot for slot in here if pinned[index, slot]}
        assert set(keep[index].nonzero()[:, 0].tolist()) == expected, rule
