"""Triton's kernels in its interpreter, which is chosen when Triton is imported: in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MLP = """
import torch
from cveff.kernels.gather_mlp import ACTIVATIONS, choice, gather_mlp

torch.manual_seed(0)
for batch, inputs, hidden, outputs, kept in ((1, 40, 24, 33, 24), (3, 600, 20, 300, 11), (2, 16, 9, 16, 1)):
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2**-8)):
        for place, activation in enumerate(ACTIVATIONS if inputs == 16 else ACTIVATIONS[:3]):
            x, up, gate = (torch.randn(n, inputs).to(dtype) for n in (batch, hidden, hidden))
            down = torch.randn(hidden, 2 * outputs).to(dtype)[:, :outputs]
            neurons = torch.randperm(hidden)[:kept].int()
            more = {}
            if place % 3 == 0:
                more = {"gate": gate, "gate_bias": torch.randn(hidden).to(dtype)}
            if place % 3 == 1:
                more = {"gated": torch.randn(batch, kept).to(dtype), "up_bias": torch.randn(hidden).to(dtype)}
            assert choice(x, up, down, implementation="triton").implementation == "triton"
            found, expected = (
                gather_mlp(x, neurons, up, down, activation=activation, implementation=way, **more).double()
                for way in ("triton", "reference")
            )
            assert (found - expected).abs().max() <= tolerance * max(1, expected.abs().max()), (activation, dtype)
print("agrees")
"""
ATTENTION = """
import torch
from cveff.kernels.decode_attention import decode_attention

torch.manual_seed(0)
for batch, heads, group, size in ((1, 2, 1, 16), (2, 1, 4, 40)):
    # The interpreter multiplies the bits of bfloat16 matrices as integers; float16 stands in for them.
    half = torch.bfloat16 if group < 4 else torch.float16
    for dtype, tolerance in ((torch.float32, 2e-6), (half, 2**-7)):
        segments = batch * heads
        lengths = torch.randint(0, 140, (segments,), dtype=torch.int32)
        lengths[-1] = 0
        offsets = torch.zeros(segments + 1, dtype=torch.int32)
        offsets[1:] = (lengths + 5).cumsum(0)
        k, v = (torch.randn(int(offsets[-1]), size).to(dtype) for _ in range(2))
        for begin, length in zip(offsets.tolist(), lengths.tolist()):
            k[begin + length : begin + length + 5] = v[begin + length : begin + length + 5] = float("nan")
        q = torch.randn(batch, heads * group, size).to(dtype)
        found, expected = (
            decode_attention(q, k, v, offsets, lengths, size**-0.5, implementation=way).double()
            for way in ("triton", "reference")
        )
        assert (found - expected).abs().max() <= tolerance, (batch, heads, group, dtype)
print("agrees")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("code", [MLP, ATTENTION], ids=["gather_mlp", "decode_attention"])
def test_triton_agrees_with_the_reference(code: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "agrees\n"
