"""Attention of one token to ragged caches: time against the tokens kept, PyTorch's attention, and memory's speed.

Every key-value head keeps a length of its own, spread evenly by up to half around the mean. PyTorch's attention reads a
padded dense cache of the full context. Caches are rotated over more than 64 MB; ratios are medians over rounds.

python tools/benchmarks/decode_attention.py            # about 2 minutes on two quiet cores
python tools/benchmarks/decode_attention.py --quick
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import kernel_timing
import torch
from torch.nn import functional as F

from cveff.kernels.decode_attention import decode_attention

SHAPES = {
    "batch 1, 32 heads on 8, 128 wide": (1, 32, 8, 128),
    "batch 4, 4 heads on 4, 64 wide": (4, 4, 4, 64),
}
BARRED, CONTEXT = "batch 1, 32 heads on 8, 128 wide float32", "8192"
KEPT = (1.0, 0.5, 0.25)
AT_MOST = 0.65
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--quick", action="store_true", help="a context of 512, few rounds")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument(
        "--out", type=Path, help="JSON file; by default model_zoo/results/decode_attention.json"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds, contexts = (5, [512]) if arguments.quick else (arguments.rounds, arguments.contexts)
    settings = {"threads": arguments.threads, "rounds": rounds, "contexts": contexts}
    out = arguments.out or common.output("decode_attention.json", arguments.quick)
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    if "read_gb_per_second" not in results.values:
        results.values["read_gb_per_second"] = kernel_timing.read_bandwidth(rounds)
    speed = results.values["read_gb_per_second"]
    cells = results.values.setdefault("cells", {})
    for shape in SHAPES:
        for kind in TYPES:
            for context in contexts:
                own = cells.setdefault(f"{shape} {kind}", {})
                if str(context) not in own:
                    own[str(context)] = measure(SHAPES[shape], kind, context, rounds, speed)
                    results.values["summary"] = summary(cells)
                    results.save()
    results.save()
    for name, own in cells.items():
        for context, ways in own.items():
            common.table(
                f"{name}, context {context}; memory is read at {speed:.1f} GB/s",
                ("", "ms", "times as fast", "GB/s", "of memory's"),
                [
                    (way, t["ms"], t["times_as_fast"], t["gb_per_second"], t["of_memory"])
                    for way, t in ways.items()
                ],
            )
    if results.values.get("summary"):
        bar = results.values["summary"]
        verdict = "met" if bar["passes"] else "MISSED"
        common.console.print(f"half kept takes {bar['ratio']:.2f} of all, at most {AT_MOST}: {verdict}")


@torch.no_grad()
def measure(
    shape: tuple[int, int, int, int], kind: str, context: int, rounds: int, speed: float
) -> dict[str, dict[str, float]]:
    """PyTorch's attention to everything, and ours at each share kept."""
    batch, heads, kv_heads, head_dim = shape
    dtype, segments = TYPES[kind], batch * kv_heads
    once = 2 * segments * context * head_dim * dtype.itemsize
    count = kernel_timing.copies(once)
    torch.manual_seed(0)
    keys, values = (
        [torch.randn(batch, kv_heads, context, head_dim).to(dtype) for _ in range(count)] for _ in range(2)
    )
    q = torch.randn(batch, heads, head_dim).to(dtype)
    calls: dict[str, Callable[[int], Any]] = {
        "PyTorch": lambda i: F.scaled_dot_product_attention(
            q[:, :, None], keys[i], values[i], enable_gqa=heads != kv_heads
        )
    }
    read = {"PyTorch": once}
    for kept in KEPT:
        flat_keys, flat_values, offsets, lengths = ragged(keys, values, kept)
        name = f"ours, {kept} kept"
        calls[name] = lambda i, k=flat_keys, v=flat_values, o=offsets, n=lengths: decode_attention(
            q, k[i], v[i], o, n, head_dim**-0.5
        )
        read[name] = 2 * int(lengths.sum()) * head_dim * dtype.itemsize
    dense, ours = calls["PyTorch"](0)[:, :, 0].float(), calls["ours, 1.0 kept"](0).float()
    if (dense - ours).abs().max() > 0.05 * dense.abs().max():  # bfloat16's weights are rounded in PyTorch's
        raise SystemExit("the answers differ")
    times = kernel_timing.in_turns(calls, "PyTorch", rounds, count)
    for name, way in times.items():
        way["gb_per_second"] = read[name] / way["ms"] / 1e6
        way["of_memory"] = way["gb_per_second"] / speed
    return times


def ragged(
    keys: list[torch.Tensor], values: list[torch.Tensor], kept: float
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Flat caches of which each segment keeps its first tokens, `kept` of them in the mean."""
    batch, heads, context, _ = keys[0].shape
    spread = torch.linspace(-0.5, 0.5, batch * heads) if kept < 1 else torch.zeros(batch * heads)
    lengths = (kept * context * (1 + spread)).round().int()
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    offsets[1:] = lengths.cumsum(0)
    flat = [
        [
            torch.cat([part[:length] for part, length in zip(cache.flatten(0, 1), lengths, strict=True)])
            for cache in caches
        ]
        for caches in (keys, values)
    ]
    return flat[0], flat[1], offsets, lengths


def summary(cells: dict[str, dict[str, dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """The bar: half the tokens kept, at the longest context."""
    ways = cells.get(BARRED, {}).get(CONTEXT)
    if ways is None:
        return {}
    ratio = ways["ours, 0.5 kept"]["ms"] / ways["ours, 1.0 kept"]["ms"]
    return {"ratio": ratio, "at_most": AT_MOST, "passes": ratio <= AT_MOST}


if __name__ == "__main__":
    main()
