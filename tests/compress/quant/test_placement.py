"""What is rounded, on networks small enough to say it by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cveff.compress.quant.capture import capture
from cveff.compress.quant.placement import place
from cveff.errors import StepError
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec((8, 8), 3, (0.5,) * 3, (0.5,) * 3)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.body(x) + x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.norm = nn.LayerNorm(16)
        self.qkv, self.proj, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)
        return self.head(x.mean(1))


def tensors(
    module: nn.Module, scheme: str = "cpu", exclude: tuple[str, ...] = ()
) -> dict[str, tuple[str, ...]]:
    found = place(capture(module.eval(), SPEC), scheme, exclude)  # type: ignore[arg-type]
    return {site.tensor: site.readers for site in found.sites}


def test_convolutional_networks_stay_in_integers() -> None:
    found = tensors(Residual())
    assert list(found) == ["input", ":relu:0", "body:conv2d:0", ":relu:1", ":mean:0"]
    assert found[":relu:0"] == (), "both the convolution and the addition read it rounded"


def test_weights_have_a_step_for_each_output_channel() -> None:
    placement = place(capture(Residual().eval(), SPEC))
    assert [(site.reader, site.axis) for site in placement.weights] == [
        ("stem:conv2d:0", 0),
        ("body:conv2d:0", 0),
        ("head:linear:0", 0),
    ]
    assert all(site.grid.low == -127 and site.grid.high == 127 for site in placement.weights)


def test_residual_streams_of_transformers_stay_in_floats() -> None:
    found = tensors(Attention())
    assert found["norm:layer_norm:0"] == ("qkv:linear:0",)
    assert not any(":add:" in name or ":softmax:" in name or name.startswith("qkv") for name in found)


def test_tensorrt_rounds_products_and_one_branch_of_an_addition() -> None:
    found = tensors(Attention(), "tensorrt")
    assert any(":softmax:" in name for name in found)
    found = tensors(Residual(), "tensorrt")
    assert ":relu:0" in found and "body:conv2d:0" not in found, "the addition is fused into the convolution"
    assert all(
        site.signed and site.symmetric for site in place(capture(Residual().eval(), SPEC), "tensorrt").sites
    )


def test_what_is_excluded_stays_in_floats() -> None:
    graph = capture(Residual().eval(), SPEC)
    found = place(graph, exclude=["body:conv2d:0"])
    assert [site.reader for site in found.weights] == ["stem:conv2d:0", "head:linear:0"]
    assert found.excluded == ("body:conv2d:0",)


def test_bad_requests_are_named() -> None:
    graph = capture(Residual().eval(), SPEC)
    with pytest.raises(StepError, match="scheme 'gpu' is unknown"):
        place(graph, "gpu")  # type: ignore[arg-type]
    with pytest.raises(StepError, match="'nowhere' is no operator"):
        place(graph, exclude=["nowhere"])
    with pytest.raises(StepError, match="no layer with weights"):
        place(graph, exclude=["stem:conv2d:0", "body:conv2d:0", "head:linear:0"])
