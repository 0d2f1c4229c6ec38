"""Parts of kv_cache.py that need no trained model: peak memory in a process each, attention alone in turns."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from cveff.kv import KIVI, Rule, compress
from cveff.kv.budgeted import policy_of
from cveff.kv.ragged import RaggedKV
from cveff.kv.segment import Segment
from cveff.kv.step import Step

MEMORY = ("full", "full, 4 bits", "h2o 0.5", "snapkv 0.5", "snapkv 0.25", "snapkv 0.25, 4 bits")
HEADS, GROUP, DIM, LAYERS = 8, 1, 64, 8


def peak_memory(name: str, tokens: int, batch: int) -> dict[str, Any]:
    """Peak of a fresh process over what it held before the prompt, and the cache's bytes after 16 more tokens."""
    done = subprocess.run(
        [sys.executable, __file__, name, str(tokens), str(batch)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def measure_memory(name: str, tokens: int, batch: int) -> dict[str, Any]:
    """In this process: a random Llama, a prompt and 16 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024,
            hidden_size=HEADS * DIM,
            intermediate_size=1024,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS * GROUP,
            num_key_value_heads=HEADS,
            max_position_embeddings=tokens + 32,
        )
    ).eval()
    words, _, bits = name.partition(",")
    kind, _, budget = words.partition(" ")
    policy = policy_of(kind, float(budget or 1))
    storage = KIVI() if bits else None
    ids = torch.randint(3, 1024, (batch, tokens), generator=torch.Generator().manual_seed(0))
    model(ids[:1, :8])  # what is loaded at first use is not the cache's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with compress(model, policy, storage=storage) as cache:
        model(ids, past_key_values=cache, logits_to_keep=1)
        for at in range(tokens, tokens + 16):
            model(ids[:, :1], position_ids=torch.full((batch, 1), at), past_key_values=cache)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "peak": peak - before,
        "nbytes": cache.nbytes,
        "live_nbytes": cache.live_nbytes,
        "formula": formula(cache, storage, kind == "h2o"),
        "full_nbytes": cache.full_nbytes,
    }


def formula(cache: Any, storage: KIVI | None, scored: bool) -> int:
    """Bytes by arithmetic: float32 keys and values, an int32 position, a float32 score where sums are followed."""
    total = 0
    for layer in cache.compressed.values():
        for group in layer.kv.groups:
            for length, kept in zip(group.lengths, group.kept(), strict=True):
                packed = kept - length
                total += length * (2 * DIM * 4 + 4 + 4 * scored)
                if storage is not None:
                    blocks = packed // storage.group_size
                    total += packed * (2 * DIM * storage.bits // 8 + 4 + 4 * scored)
                    total += blocks * 2 * DIM * 4 + packed * (DIM // storage.group_size) * 2 * 4
    return total


def attention_times(context: int, rounds: int) -> dict[str, Any]:
    """One layer's append, attention and eviction for a new token: full, half and a quarter kept, in turns."""
    frequent = Rule(frequent=0.3, local=0.3)
    caches = {
        "full": _layer(context, context, Rule()),
        "half": _layer(context, context // 2, Rule()),
        "quarter": _layer(context, context // 4, Rule()),
        "half, FastGen's local and frequent": _layer(context, context // 2, frequent),
    }
    generator = torch.Generator().manual_seed(1)
    times: dict[str, list[float]] = {name: [] for name in caches}
    for turn in range(rounds + 3):
        query = torch.randn(HEADS, GROUP, 1, DIM, generator=generator)
        new = torch.randn(HEADS, 1, DIM, generator=generator)
        for name, kv in caches.items():
            places = torch.tensor([kv.seen], dtype=torch.int32)
            step = Step(new, new, places, torch.zeros(1, 1, dtype=torch.uint8))
            start = time.perf_counter()
            kv.attend(query, step, DIM**-0.5)
            if turn >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    found = {}
    for name, taken in times.items():
        ratios = sorted(a / b for a, b in zip(taken, times["full"], strict=True))
        found[name] = {
            "milliseconds": statistics.median(taken),
            "ratio": statistics.median(ratios),
            "low": ratios[int(0.025 * len(ratios))],
            "high": ratios[int(0.975 * (len(ratios) - 1))],
        }
    return found


def _layer(context: int, kept: int, rule: Rule) -> RaggedKV:
    generator = torch.Generator().manual_seed(0)
    segments = []
    for head in range(HEADS):
        # As many recent tokens as FastGen's window holds, the others from anywhere before it.
        recent = torch.arange(context - min(kept, int(0.3 * context)), context)
        others = torch.randperm(context - len(recent), generator=generator)[: kept - len(recent)]
        codes = torch.cat([others, recent]).int()
        keys = torch.randn(len(codes), DIM, generator=generator)
        scores = torch.rand(len(codes), generator=generator) if rule.needs_scores else None
        segments.append(Segment(head, rule, keys, keys + 1, codes, scores))
    return RaggedKV(segments, HEADS, [context], slack=64)


if __name__ == "__main__":
    print(json.dumps(measure_memory(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
