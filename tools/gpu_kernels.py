"""Own kernels at the sizes of a network of 7 billion weights: which share of memory's speed they read at."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cveff.kernels import decode_attention as attention
from cveff.kernels import gather_mlp as mlp

AT_LEAST = 0.70
_Timer = Callable[[Mapping[str, Callable[[torch.Tensor], Any]], torch.Tensor, float], dict[str, list[float]]]


@torch.no_grad()
def measure(device: torch.device, quick: bool, seconds: float, in_turns: _Timer) -> dict[str, Any]:
    """Memory's speed, then every kernel's time, bytes a second and share of it; and the bar's verdict."""
    dtype = torch.bfloat16
    size = 2**22 if quick or device.type == "cpu" else 2**30
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    copied = statistics.median(in_turns({"copy": lambda _: target.copy_(source)}, target, seconds)["copy"])
    rate = 2 * size / copied / 1e6  # read and written
    found: dict[str, Any] = {"copy_gb_per_second": rate, "cells": {}}
    inputs, hidden = (64, 128) if quick else (4096, 11008)
    gate, up, down = (torch.randn(hidden, inputs, device=device).to(dtype) for _ in range(3))
    for kept in (1.0, 0.5, 0.25):
        listed = torch.randperm(hidden)[: round(kept * hidden)].sort().values.int().to(device)
        for batch in (1, 4):
            x = torch.randn(batch, inputs, device=device).to(dtype)
            choice = mlp.choice(x, up, down, gate)
            call = lambda _, x=x, n=listed: mlp.gather_mlp(x, n, up, down, gate=gate)  # noqa: E731
            name = f"gather_mlp {inputs}x{hidden}, batch {batch}, {kept} kept"
            found["cells"][name] = _cell(
                call, x, 3 * len(listed) * inputs * 2, rate, seconds, in_turns, choice
            )
    context, head_dim = (64, 16) if quick else (8192, 128)
    for heads, kv_heads, batch in ((32, 32, 1), (32, 8, 1), (32, 8, 8)):
        segments = batch * kv_heads
        lengths = (context * torch.linspace(0.25, 0.75, segments)).int()
        offsets = torch.zeros(segments + 1, dtype=torch.int32)
        offsets[1:] = (lengths + 64).cumsum(0)
        k, v = (torch.randn(int(offsets[-1]), head_dim, device=device).to(dtype) for _ in range(2))
        q = torch.randn(batch, heads, head_dim, device=device).to(dtype)
        o, n = offsets.to(device), lengths.to(device)
        call = lambda _, q=q, k=k, v=v, o=o, n=n: attention.decode_attention(q, k, v, o, n, 0.1)  # noqa: E731
        name = f"decode_attention {heads}/{kv_heads} heads, batch {batch}, half of {context} kept"
        read = 2 * int(lengths.sum()) * head_dim * 2
        found["cells"][name] = _cell(call, q, read, rate, seconds, in_turns, attention.choice(q, k, v))
    shares = [cell["of_memory"] for cell in found["cells"].values()]
    found["bar"] = {"least": min(shares), "at_least": AT_LEAST, "passes": min(shares) >= AT_LEAST}
    return found


def _cell(
    call: Callable[[torch.Tensor], Any],
    x: torch.Tensor,
    read: int,
    rate: float,
    seconds: float,
    in_turns: _Timer,
    choice: Any,
) -> dict[str, Any]:
    median = statistics.median(in_turns({"ours": call}, x, seconds)["ours"])
    speed = read / median / 1e6
    return {
        "implementation": choice.implementation,
        "ms": median,
        "bytes": read,
        "gb_per_second": speed,
        "of_memory": speed / rate,
    }


def show(found: Mapping[str, Any]) -> None:
    """Print a line for each kernel and size."""
    print(f"\nmemory is copied at {found['copy_gb_per_second']:.0f} GB/s")
    for name, cell in found["cells"].items():
        print(
            f"  {name:<58}{cell['implementation']:>10}{1000 * cell['ms']:>10.1f} µs"
            f"{100 * cell['of_memory']:>7.1f}% of memory's speed"
        )
    verdict = "passes" if found["bar"]["passes"] else "does not pass"
    print(
        f"  the least is {100 * found['bar']['least']:.0f}%, at least {100 * AT_LEAST:.0f}% wanted: {verdict}"
    )
