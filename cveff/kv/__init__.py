"""Key-value caches that keep what attention uses: policies, ragged and packed storage, for transformers' models."""

from __future__ import annotations

from cveff.kv.ada_kv import AdaKV
from cveff.kv.compress import compress
from cveff.kv.fastgen import FastGen
from cveff.kv.full import Full
from cveff.kv.h2o import H2O
from cveff.kv.image_prefix import ImagePrefix
from cveff.kv.kivi import KIVI
from cveff.kv.marks import Marks
from cveff.kv.prompt import Policy, Prompt, Selection
from cveff.kv.pyramid_kv import PyramidKV
from cveff.kv.random_tokens import Random
from cveff.kv.rule import Rule
from cveff.kv.snapkv import SnapKV
from cveff.kv.streaming_llm import StreamingLLM

__all__ = [
    "H2O",
    "KIVI",
    "AdaKV",
    "FastGen",
    "Full",
    "ImagePrefix",
    "Marks",
    "Policy",
    "Prompt",
    "PyramidKV",
    "Random",
    "Rule",
    "Selection",
    "SnapKV",
    "StreamingLLM",
    "compress",
]
