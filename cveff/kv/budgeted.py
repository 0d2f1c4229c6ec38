"""Policies by name and budget, so that they can be compared at equal bytes."""

from __future__ import annotations

from cveff.errors import CacheError
from cveff.kv.ada_kv import AdaKV
from cveff.kv.fastgen import FastGen
from cveff.kv.full import Full
from cveff.kv.h2o import H2O
from cveff.kv.prompt import Policy
from cveff.kv.pyramid_kv import PyramidKV
from cveff.kv.random_tokens import Random
from cveff.kv.rule import Amount
from cveff.kv.snapkv import SnapKV
from cveff.kv.streaming_llm import StreamingLLM

BUDGETED = ("h2o", "streaming-llm", "snapkv", "pyramidkv", "adakv", "random")
"""Policies that keep a number of tokens they are given."""


def policy_of(name: str, budget: Amount = 0.5, *, recovery: float = 0.95, seed: int = 0) -> Policy:
    """A policy that keeps `budget` of the prompt.

    Args:
        name: a policy's `kind`.
        budget: tokens kept a head, or their share of the prompt; H2O gives half of it to heavy hitters, StreamingLLM
            4 tokens of it to sinks where it counts tokens. Ignored by "fastgen" and "full".
        recovery: of "fastgen".
        seed: of "random".

    Raises:
        CacheError: an unknown name, or a value out of range.
    """
    if name == "fastgen":
        return FastGen(recovery=recovery)
    if name == "full":
        return Full()
    if name == "h2o":
        heavy: Amount = budget // 2 if isinstance(budget, int) else budget / 2
        return H2O(heavy=heavy, recent=budget - heavy)
    if name == "streaming-llm":
        return StreamingLLM(sinks=4, window=max(1, budget - 4) if isinstance(budget, int) else budget)
    if name == "random":
        return Random(budget=budget, seed=seed)
    if name == "snapkv":
        return SnapKV(budget=budget)
    if name == "pyramidkv":
        return PyramidKV(budget=budget)
    if name == "adakv":
        return AdaKV(SnapKV(budget=budget))
    raise CacheError(f"there is no policy {name!r}; there are fastgen, full, {', '.join(BUDGETED)}")
