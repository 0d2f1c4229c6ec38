"""Which layers are rounded, that compensation pays in a network, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cveff
from cveff.compress.quant.replay import MEMORY
from cveff.compress.quant.weight_choice import choose, is_packed, packed_layers
from cveff.compress.quant.weight_edit import QuantizeWeights
from cveff.compress.quant.weight_only import WeightOnly, quantize_weights
from cveff.edits import edit_from_json, edit_to_json
from cveff.errors import CheckpointError, StepError
from cveff.model import Model, with_module

VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}


def vit() -> Model:
    torch.manual_seed(0)
    model = cveff.create("vit_tiny_patch16_224", num_classes=5, **VIT)
    model.module.eval()
    return model


def images(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, (32, 32), mode="bicubic")


class Decoder(nn.Module):
    """A language model with a tied head, called by keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 128)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(128, 2, 256, batch_first=True) for _ in range(2)
        )
        self.project = nn.Linear(128, 128)
        self.lm_head = nn.Linear(128, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.project(x))


class Named(Decoder):
    """The same, which says what its head is."""

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_large_linear_layers_but_the_head() -> None:
    chosen, skipped = choose(vit().module)
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert chosen == [f"blocks.{index}.{name}" for index in range(2) for name in names]
    assert skipped == {"head": "is the output head"}


def test_what_stays_says_why() -> None:
    module = Named()
    chosen, skipped = choose(module, exclude=("layers.0",))
    assert chosen == ["layers.1.linear1", "layers.1.linear2", "project"]
    assert skipped["layers.0.linear1"] == "is excluded"
    assert skipped["lm_head"] == "is the output head"
    assert "NonDynamicallyQuantizableLinear" in skipped["layers.1.self_attn.out_proj"]
    # Without a name for it, the last linear layer is the head, and this one is tied.
    module = Decoder()
    module.after = nn.Linear(128, 128)
    assert choose(module)[1]["lm_head"] == "shares its weight with embed"
    assert choose(module, min_weights=128 * 256)[1]["project"] == "has 16384 weights, fewer than 32768"


@pytest.mark.parametrize("bits", [4, 8])
def test_compensation_brings_the_networks_answers_closer(bits: int) -> None:
    model, unseen = vit(), images(32, seed=1)
    expected = model.module(unseen).detach()
    errors = {}
    for weights in ("nearest", "compensated"):
        module = copy.deepcopy(model.module)
        settings = WeightOnly(bits=bits, group_size=32, weights=weights)
        done = quantize_weights(module, settings, images(128).split(64) if weights == "compensated" else None)
        errors[weights] = float((module(unseen).detach() - expected).norm() / expected.norm())
        assert len(done.errors) == 8 and done.bytes_after < 0.35 * done.bytes_before
    assert errors["compensated"] < 0.8 * errors["nearest"]


def test_later_layers_see_the_quantized_earlier_ones() -> None:
    settings = WeightOnly(group_size=32)
    whole, last = vit().module, vit().module
    batches = images(16).split(8)
    done = quantize_weights(whole, settings, batches)
    # The last layer alone, in a network whose other layers are the quantized ones.
    path = "blocks.1.mlp.fc2"
    others = tuple(other for other in done.errors if other != path)
    for other in others:
        layer = whole.get_submodule(other)
        with torch.no_grad():
            last.get_submodule(other).weight.copy_(layer.weight)
    quantize_weights(last, WeightOnly(group_size=32, exclude=others), batches)
    assert torch.equal(last.get_submodule(path).packed, whole.get_submodule(path).packed)


def test_memory_for_replays_changes_nothing() -> None:
    states = []
    for memory in (0, MEMORY):
        module = vit().module
        quantize_weights(module, WeightOnly(), images(16).split(8), memory=memory)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_language_model_is_called_by_keywords() -> None:
    torch.manual_seed(0)
    module = Named().eval()
    batches = [{"input_ids": torch.randint(0, 50, (2, 20))} for _ in range(3)]
    expected = module(**batches[0])
    done = quantize_weights(module, WeightOnly(bits=8), batches)
    # PyTorch's encoder layer reads its linear layers' weights in a fused kernel when it can.
    assert "project" in done.errors and done.errors["project"] < 1e-4
    assert {path for path, _ in packed_layers(module)} == set(done.errors)
    assert float((module(**batches[0]) - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_saved_and_loaded_it_is_bit_equal(tmp_path: Path, bits: int, symmetric: bool) -> None:
    model = vit()
    done = quantize_weights(model.module, WeightOnly(bits, 64, symmetric, weights="nearest"))
    quantized = with_module(model, model.module, done.edit)
    cveff.save(quantized, tmp_path / "m")
    loaded = cveff.load(tmp_path / "m")
    x = images(3)
    assert torch.equal(loaded.module(x), quantized.module(x))
    assert edit_from_json(edit_to_json(done.edit)) == done.edit


def test_a_network_that_reads_the_weight_computes_with_it() -> None:
    torch.manual_seed(0)
    module = timm.create_model(
        "beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=128, depth=1, num_heads=2, num_classes=5
    ).eval()
    x = images(2)
    expected = module(x)
    done = quantize_weights(module, WeightOnly(bits=8, weights="nearest"))
    assert "blocks.0.attn.qkv" in done.errors
    assert 0 < float((module(x) - expected).norm() / expected.norm()) < 0.02


def test_with_data_layers_that_are_only_read_stay() -> None:
    module = timm.create_model(
        "beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=128, depth=1, num_heads=2, num_classes=5
    ).eval()
    done = quantize_weights(module, WeightOnly(), [images(4)])
    assert "is never called" in done.skipped["blocks.0.attn.qkv"]
    assert isinstance(module.blocks[0].attn.qkv, nn.Linear)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"bits": 5}, "5 bits"),
        ({"group_size": 100}, "group size is 100"),
        ({"weights": "best"}, "weights is 'best'; give one of nearest, compensated"),
        ({"exclude": "head"}, "exclude is the text 'head'"),
        ({"damping": 0.0}, "damping is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(StepError, match=text):
        WeightOnly(**values)


def test_compensation_needs_data() -> None:
    for batches in (None, []):
        with pytest.raises(StepError, match="give calibration data, or weights='nearest'"):
            quantize_weights(vit().module, WeightOnly(), batches)


def test_no_layer_that_is_large_enough_is_refused() -> None:
    with pytest.raises(StepError, match=r"none of the 2 linear layers.*0 has 64 weights, fewer than 16384"):
        quantize_weights(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), WeightOnly(weights="nearest"))
    with pytest.raises(StepError, match="no linear layer"):
        quantize_weights(nn.Conv2d(3, 3, 3), WeightOnly(weights="nearest"))


def test_an_unknown_exclusion_is_refused() -> None:
    with pytest.raises(StepError, match=r"exclude names 'blocks\.7'"):
        quantize_weights(vit().module, WeightOnly(exclude=("blocks.7",), weights="nearest"))


def test_a_quantized_network_is_refused() -> None:
    module = vit().module
    quantize_weights(module, WeightOnly(weights="nearest"))
    assert is_packed(module)
    with pytest.raises(StepError, match="quantized already"):
        quantize_weights(module, WeightOnly(weights="nearest"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_layer(value: float) -> None:
    batch = images(4)
    batch[1, 0, 3, 3] = value
    with pytest.raises(StepError, match=r"'blocks\.0\.attn\.qkv' is not finite on the calibration data"):
        quantize_weights(vit().module, WeightOnly(), [batch])
    module = vit().module
    with torch.no_grad():
        module.blocks[1].mlp.fc1.weight[0, 0] = value
    with pytest.raises(StepError, match=r"weight of layer 'blocks\.1\.mlp\.fc1' is not finite"):
        quantize_weights(module, WeightOnly(weights="nearest"))


@pytest.mark.parametrize(
    ("layers", "error", "text"),
    [
        ({"head": {"bits": 4}}, StepError, "give bits, group_size, symmetric"),
        (
            {"head": {"bits": 4, "group_size": 7, "symmetric": True}},
            StepError,
            "layer 'head': group size is 7",
        ),
        ({"tail": {"bits": 4, "group_size": 64, "symmetric": True}}, CheckpointError, "no layer 'tail'"),
        ({"norm": {"bits": 4, "group_size": 64, "symmetric": True}}, CheckpointError, "is a LayerNorm"),
    ],
)
def test_an_edit_of_another_network_is_refused(layers: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        QuantizeWeights(layers).apply(vit().module)


def test_an_edit_applied_twice_is_refused() -> None:
    module = vit().module
    edit = QuantizeWeights({"head": {"bits": 4, "group_size": 64, "symmetric": True}})
    with pytest.raises(CheckpointError, match="is quantized already"):
        edit.apply(edit.apply(module))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    model = vit()
    done = quantize_weights(model.module, WeightOnly(weights="nearest"))
    cveff.save(with_module(model, model.module, done.edit), tmp_path / "m")
    path = tmp_path / "m" / "weights.safetensors"
    state = load_file(path)
    for name, value, text in (
        ("packed", lambda t: t.float(), "packed holds torch.float32"),
        ("scales", lambda t: t * float("inf"), "scales holds zeros, NaN or infinity"),
        ("packed", lambda t: t[:-1], "instead of"),
    ):
        key = f"blocks.0.attn.proj.{name}"
        save_file({**state, key: value(state[key]).contiguous()}, path)
        with pytest.raises(CheckpointError, match=text):
            cveff.load(tmp_path / "m")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        cveff.load(tmp_path / "m")
