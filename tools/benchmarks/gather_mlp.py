"""The MLP of some neurons against the dense one, plain indexing and torch.compile, at the sizes of language models.

Weights are rotated over more than 64 MB. "dense" is F.linear three times; "indexing" picks rows with index_select;
torch.compile is given both. Ratios are medians over rounds in which every way runs in turn.

python tools/benchmarks/gather_mlp.py            # about 4 minutes on two quiet cores
python tools/benchmarks/gather_mlp.py --quick
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import kernel_timing
import torch
from torch import Tensor
from torch.nn import functional as F

from cveff.kernels.gather_mlp import choice, gather_mlp

SIZES = ((2048, 8192), (640, 2048))
KEPT = (1.0, 0.5, 0.25, 0.1)
BARS = {"1.0": 0.95, "0.5": 1.7, "0.25": 3.0}
BARRED = "2048x8192 float32"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--quick", action="store_true", help="the small size, few rounds, no torch.compile")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/gather_mlp.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = 5 if arguments.quick else arguments.rounds
    settings = {"threads": arguments.threads, "rounds": rounds, "compiled": not arguments.quick}
    out = arguments.out or common.output("gather_mlp.json", arguments.quick)
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    cells = results.values.setdefault("cells", {})
    for inputs, hidden in SIZES[1:] if arguments.quick else SIZES:
        for kind in TYPES:
            name = f"{inputs}x{hidden} {kind}"
            if name not in cells:
                cells[name] = measure(inputs, hidden, kind, rounds, settings["compiled"])
                results.values["summary"] = summary(cells)
                results.save()
    results.save()
    for name, ways in cells.items():
        common.table(
            f"gated MLP {name}, one token, {arguments.threads} threads",
            ("", "ms", "times as fast as dense", "95%"),
            [
                (way, t["ms"], t["times_as_fast"], f"{t['low']:.2f}–{t['high']:.2f}")
                for way, t in ways.items()
            ],
        )
    for kept, bar in results.values.get("summary", {}).items():
        verdict = "met" if bar["passes"] else "MISSED"
        common.console.print(
            f"kept {kept}: {bar['times_as_fast']:.2f} of at least {bar['at_least']}, {verdict}"
        )


@torch.no_grad()
def measure(inputs: int, hidden: int, kind: str, rounds: int, compiled: bool) -> dict[str, dict[str, float]]:
    """Every way at every share kept, by name."""
    dtype = TYPES[kind]
    count = kernel_timing.copies(3 * inputs * hidden * dtype.itemsize)
    torch.manual_seed(0)
    gates, ups, downs = (
        [(torch.randn(hidden, inputs) / inputs**0.5).to(dtype) for _ in range(count)] for _ in range(3)
    )
    turned = [down.t().contiguous() for down in downs]
    x = torch.randn(1, inputs).to(dtype)
    listed = {kept: torch.randperm(hidden)[: round(kept * hidden)].sort().values for kept in KEPT}
    if choice(x, ups[0], downs[0], gates[0]).implementation != "cpu":
        raise SystemExit(choice(x, ups[0], downs[0], gates[0]).reason)

    def dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def indexed(x: Tensor, index: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        values = F.silu(F.linear(x, gate.index_select(0, index))) * F.linear(x, up.index_select(0, index))
        return values @ down.index_select(0, index)

    calls: dict[str, Callable[[int], Any]] = {"dense": lambda i: dense(x, gates[i], ups[i], turned[i])}
    ways: list[tuple[str, Callable[..., Tensor]]] = [("indexing", indexed)]
    if compiled:
        fast_dense, fast_indexed = torch.compile(dense), torch.compile(indexed, dynamic=True)
        calls["dense, compiled"] = lambda i: fast_dense(x, gates[i], ups[i], turned[i])
        ways.append(("indexing, compiled", fast_indexed))
    for kept, index in listed.items():
        numbers = index.int()
        calls[f"ours, {kept} kept"] = lambda i, n=numbers: gather_mlp(x, n, ups[i], downs[i], gate=gates[i])
        for name, call in ways:
            calls[f"{name}, {kept} kept"] = lambda i, n=index, call=call: call(
                x, n, gates[i], ups[i], downs[i]
            )
    check(calls)
    return kernel_timing.in_turns(calls, "dense", rounds, count)


def check(calls: dict[str, Callable[[int], Any]]) -> None:
    """Raise unless all that is kept is the dense answer, and ours that of indexing."""
    expected = calls["dense"](0).float()
    for kept in KEPT:
        ours, plain = calls[f"ours, {kept} kept"](0).float(), calls[f"indexing, {kept} kept"](0).float()
        for other in (plain, expected) if kept == 1.0 else (plain,):
            error = float((ours - other).abs().max() / other.abs().max())
            if error > 0.02:  # bfloat16's intermediate values are rounded in the others
                raise SystemExit(f"{kept} kept: the answers differ by {error:.3g}")


def summary(cells: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The bars, by share kept."""
    ways = cells.get(BARRED)
    if ways is None:
        return {}
    found = {}
    for kept, bar in BARS.items():
        ratio = ways[f"ours, {kept} kept"]["times_as_fast"]
        found[kept] = {"times_as_fast": ratio, "at_least": bar, "passes": ratio >= bar}
    return found


if __name__ == "__main__":
    main()
