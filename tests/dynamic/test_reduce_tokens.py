"""Laws of token reduction: nothing reduced changes nothing, counts are the schedule's, sizes add up, files agree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn

import cveff
from cveff.compress import Distill, Quantize
from cveff.data import Data
from cveff.data import load as load_data
from cveff.dynamic import ReduceTokens
from cveff.dynamic.token_blocks import ReducedBlocks
from cveff.dynamic.token_edit import reduced_blocks
from cveff.dynamic.token_state import Tokens
from cveff.dynamic.token_vit import attention_half, mlp_half
from cveff.edits import edit_from_json, edit_to_json
from cveff.errors import StepError
from cveff.export.normalize import deployable
from cveff.model import Model
from cveff.pipeline import evaluate
from cveff.progress import Silent
from cveff.recipe import parse_recipe
from cveff.runtime.engines import open_file
from cveff.runtime.input_spec import InputSpec
from cveff.train import Train

METHODS = ("tome", "evit", "dynamicvit")
INPUT = InputSpec(size=(8, 8), channels=1, mean=(0.3,), std=(0.35,))
TRAIN = Train(
    epochs=4,
    batch_size=64,
    optimizer="adamw",
    learning_rate=2e-3,
    precision="fp32",
    warmup_epochs=0,
    label_smoothing=0.0,
)
# Class token; distillation token; registers and layer scale; no position for the class token; attention pooling;
# average pooling; norms after the branches; q/k norms; rotary embeddings with and without a fused projection.
FAMILY: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"patch_size": 16, "init_values": 0.5},
    "deit3_small_patch16_224": {"init_values": 0.5},
    "vit_base_patch16_siglip_224": {},
    "vit_medium_patch16_gap_240": {"global_pool": "avg"},
    "vit_relpos": {"architecture": "vit_tiny_patch16_224", "block_fn": "post", "init_values": 0.5},
    "qk_norm": {"architecture": "vit_tiny_patch16_224", "qk_norm": True},
    "eva02_tiny_patch14_224": {"patch_size": 16},
    "eva02_base_patch14_224": {"patch_size": 16, "init_values": 0.5},
    "vit_small_patch16_dinov3": {"init_values": 0.5},
}


def network(name: str, **more: Any) -> nn.Module:
    """A tiny network of that kind for 48×64 pixels in 12 patches, with weights of some size everywhere."""
    settings = {**FAMILY[name], **more}
    architecture = settings.pop("architecture", name)
    if settings.get("block_fn") == "post":
        settings["block_fn"] = timm.models.vision_transformer.ResPostBlock
    torch.manual_seed(0)
    module = timm.create_model(
        architecture, num_classes=5, img_size=(48, 64), depth=4, embed_dim=48, num_heads=3, **settings
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def pixels(count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 48, 64, generator=torch.Generator().manual_seed(seed))


def blocks_of(module: nn.Module) -> ReducedBlocks:
    blocks = reduced_blocks(module)
    assert blocks is not None
    return blocks


@pytest.mark.parametrize("name", FAMILY)
def test_nothing_reduced_is_timm_to_the_bit(name: str) -> None:
    dense = network(name)
    with torch.no_grad():
        expected = dense(pixels())
        for step in (ReduceTokens(r=0), *(ReduceTokens(method, keep_rate=1.0) for method in METHODS[1:])):
            assert torch.equal(step.attach(dense)(pixels()), expected)
            # Also where tokens are followed: the last block merges none.
            follows = ReduceTokens(at=(3,), r=0, restore=True).attach(dense)
            assert torch.equal(follows(pixels()), expected)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("fused", [True, False])
def test_the_halves_of_a_block_are_the_block(name: str, fused: bool) -> None:
    module = network(name)
    x = torch.randn(2, 16, 48)
    for block in module.blocks:
        block.attn.fused_attn = fused
    prefix = module.num_prefix_tokens
    bias = torch.randn(2, 1, 1, 16)
    rope = torch.randn(16 - prefix, 32) if hasattr(module, "rope") else None
    more = {} if rope is None else {"rope": rope}
    with torch.no_grad():
        half, attended = attention_half(module.blocks[1], x, bias, rope)
        found = mlp_half(module.blocks[1], half)
        expected = module.blocks[1](x, attn_mask=bias, **more)
    assert torch.allclose(
        found, expected, rtol=1e-5, atol=1e-5
    )  # the same sums, one of them in another order
    assert attended.content.shape[2] == 16


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("method", METHODS)
def test_the_whole_family_is_reduced(name: str, method: str) -> None:
    dense = network(name)
    before = {key: value.clone() for key, value in dense.state_dict().items()}
    seen: list[int] = []
    reduced = ReduceTokens(method, r=2, keep_rate=0.6).attach(dense)  # type: ignore[arg-type]
    blocks = blocks_of(reduced)
    prefix = dense.num_prefix_tokens
    for layer in blocks.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1] - prefix))
    with torch.no_grad():
        logits = reduced(pixels())
    assert seen == list(blocks.counts(12))
    expected = {"tome": [10, 8, 6, 4], "evit": [12, 9, 7, 6], "dynamicvit": [12, 7, 4, 2]}[method]
    assert seen == expected
    assert logits.shape == (3, 5) and logits.isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    with torch.no_grad():
        dense_map = (
            ReduceTokens(method, r=2, keep_rate=0.6, restore=True).attach(dense).forward_features(pixels())
        )  # type: ignore[arg-type]
        assert dense_map.shape == dense.forward_features(pixels()).shape


@pytest.mark.parametrize("method", METHODS)
def test_batches_do_not_mix(method: str) -> None:
    reduced = ReduceTokens(method, r=3, keep_rate=0.5, restore=True).attach(network("eva02_tiny_patch14_224"))  # type: ignore[arg-type]
    with torch.no_grad():
        together = reduced(pixels(5))
        alone = torch.cat([reduced(pixels(5)[i : i + 1]) for i in range(5)])
    assert torch.allclose(together, alone, atol=1e-5)  # matrix products of other sizes round otherwise


def test_images_of_another_size_are_reduced_by_the_same_schedule() -> None:
    reduced = ReduceTokens(r=4, restore=True).attach(network("vit_tiny_patch16_224", dynamic_img_size=True))
    with torch.no_grad():
        features = reduced.forward_features(torch.randn(2, 3, 80, 64))
    assert features.shape == (2, 1 + 20, 48)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"r": 3}, (3, 3, 3, 3)),
        ({"r": 4, "inflect": -1.0}, (8, 5, 2, 0)),
        ({"r": 4, "inflect": 1.0}, (0, 2, 5, 8)),
        ({"r": 4, "inflect": 0.5}, (2, 3, 4, 6)),
        ({"r": (5, 0, 2, 1)}, (5, 0, 2, 1)),
    ],
)
def test_schedules(settings: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert ReduceTokens(**settings).schedule(4) == expected


def test_more_than_half_cannot_go_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    reduced = ReduceTokens(r=5).attach(network("vit_tiny_patch16_224"))
    assert blocks_of(reduced).counts(12) == (7, 4, 2, 1)
    assert "r is 3 in block 1, 2 in block 2, 1 in block 3" in caplog.text
    with torch.no_grad():
        assert reduced.forward_features(pixels()).shape == (3, 1 + 1, 48)


@pytest.mark.parametrize("method", ["evit", "dynamicvit"])
def test_shares_are_not_misled_by_floating_point(method: str) -> None:
    # 0.1 · 30 is more than 3 and 0.7 · 0.7 · 100 less than 49 in floating point.
    module = ReduceTokens(method, keep_rate=0.7, at=(0, 1), fuse=False).attach(network("qk_norm"))
    assert blocks_of(module).counts(100)[1] == 49
    module = ReduceTokens(method, keep_rate=0.1, at=(0,), fuse=False).attach(network("qk_norm"))
    assert blocks_of(module).counts(30)[0] == 3


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, val=data.val.subset(np.arange(100)))


@pytest.fixture(scope="module")
def dense(digits: Data) -> Model:
    """Trained; 16 patches of 2×2 pixels, and a class token."""
    torch.manual_seed(0)
    model = cveff.create(
        "vit_tiny_patch16_224",
        labels=digits.labels,
        input=INPUT,
        patch_size=2,
        embed_dim=32,
        depth=2,
        num_heads=2,
    )
    return cveff.apply(model, replace(TRAIN, epochs=16, learning_rate=3e-3), data=digits)


STEPS = {
    "tome": ReduceTokens(r=4),
    "evit": ReduceTokens("evit", keep_rate=0.7, at=(1,)),
    "dynamicvit": ReduceTokens(
        "dynamicvit", keep_rate=0.8, at=(1,), recover=Distill(alpha=1 / 3, temperature=1.0, train=TRAIN)
    ),
}


@pytest.fixture(scope="module", params=METHODS)
def reduced(request: pytest.FixtureRequest, digits: Data, dense: Model) -> Model:
    return cveff.apply(dense, STEPS[request.param], data=digits)


def test_loading_gives_the_same_bits(reduced: Model, tmp_path: Path) -> None:
    cveff.save(reduced, tmp_path / "model")
    loaded = cveff.load(tmp_path / "model")
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(loaded.module(x), reduced.module(x))
    (edit,) = reduced.spec.edits
    assert edit_from_json(json.loads(json.dumps(edit_to_json(edit)))) == edit


def test_the_file_has_static_shapes_and_agrees(reduced: Model, digits: Data, tmp_path: Path) -> None:
    path = cveff.export(reduced, tmp_path / "model.onnx")
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "TopK" in kinds
    assert not kinds & {"Loop", "If", "Scan", "NonZero", "Unique", "GatherElements", "ScatterND"} - {
        "GatherElements"  # of indices, never of tokens
    }
    outputs = [item.name for item in onnx.load(path).graph.output]
    assert outputs == ["logits"]
    predicted = []
    with open_file("onnxruntime", path, threads=1) as session:
        for images, _ in digits.val.evaluation_batches(INPUT, 33):
            network = deployable(reduced.module, INPUT)
            with torch.no_grad():
                expected = network(torch.from_numpy(images)).argmax(1).numpy()
            predicted.append(session(images).argmax(1) == expected)
    assert np.concatenate(predicted).mean() >= 0.99


def test_it_compiles_without_a_break(reduced: Model) -> None:
    explanation = torch._dynamo.explain(reduced.module)(torch.randn(2, 1, 8, 8))
    assert explanation.graph_break_count == 0 and explanation.graph_count == 1


def test_training_goes_on_with_fewer_tokens(reduced: Model, digits: Data) -> None:
    tuned = cveff.apply(reduced, replace(TRAIN, epochs=1), data=digits)
    changed = [
        name
        for name, value in tuned.module.state_dict().items()
        if not torch.equal(value, reduced.module.state_dict()[name])
    ]
    assert any("layers.1" in name for name in changed)
    assert blocks_of(tuned.module).counts(16) == blocks_of(reduced.module).counts(16)


def test_short_tuning_keeps_accuracy(reduced: Model, dense: Model, digits: Data) -> None:
    tuned = cveff.apply(reduced, replace(TRAIN, epochs=2, learning_rate=5e-4), data=digits)
    before = evaluate(dense, digits)
    assert before > 0.5
    assert evaluate(tuned, digits) > before - 0.1


def test_rounding_to_int8_may_follow(digits: Data, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cveff.create(
        "vit_tiny_patch16_224",
        labels=digits.labels,
        input=INPUT,
        patch_size=2,
        embed_dim=16,
        depth=1,
        num_heads=1,
    )
    rounded = cveff.apply(model, [ReduceTokens(r=4), Quantize()], data=digits)
    path = cveff.export(rounded, tmp_path / "int8.onnx")
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert {"QuantizeLinear", "TopK"} <= kinds


def test_messages_count_the_tokens(dense: Model) -> None:
    lines: list[str] = []

    class Listening(Silent):
        def message(self, text: str) -> None:
            lines.append(text)

    cveff.apply(dense, ReduceTokens(r=9), progress=Listening())
    assert "of 16 patch tokens 4 are left" in lines[-1] and "r is 8 in block 0, 4 in block 1" in lines[-1]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"method": "pool"}, "method is 'pool'"),
        ({"r": -1}, "r is -1"),
        ({"r": ()}, r"r is \(\)"),
        ({"inflect": 1.5}, "inflect is 1.5"),
        ({"inflect": 0.5, "r": (1, 2)}, "r is a list"),
        ({"keep_rate": 0.0}, "keep_rate is 0.0"),
        ({"keep_rate": 1.1}, "keep_rate is 1.1"),
        ({"at": (3, 1)}, "ascending order"),
        ({"token_weight": -1.0}, "0 or more"),
        ({"recover": Distill(train=replace(TRAIN, epochs=0))}, "epochs is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(StepError, match=words):
        ReduceTokens(**settings)


def test_what_cannot_be_reduced_is_refused(dense: Model, digits: Data) -> None:
    with pytest.raises(StepError, match="ResNet is not a vision transformer"):
        ReduceTokens().attach(timm.create_model("test_resnet"))
    with pytest.raises(StepError, match="there is no block 4; the network has 0 to 1"):
        cveff.apply(dense, ReduceTokens("evit", at=(1, 4)))
    with pytest.raises(StepError, match="r has 3 numbers for 2 blocks"):
        cveff.apply(dense, ReduceTokens(r=(1, 2, 3)))
    with pytest.raises(StepError, match="reduced already"):
        cveff.apply(dense, [ReduceTokens(), ReduceTokens()])
    with pytest.raises(StepError, match="predictors would drop tokens at random"):
        cveff.apply(dense, ReduceTokens("dynamicvit"))
    with pytest.raises(StepError, match="needs data"):
        cveff.apply(dense, STEPS["dynamicvit"])
    parallel = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        depth=1,
        block_fn=timm.models.vision_transformer.ParallelScalingBlock,
    )
    with pytest.raises(StepError, match="block 0 is a ParallelScalingBlock"):
        ReduceTokens().attach(parallel)
    with pytest.raises(StepError, match="attends by DiffAttention"):
        ReduceTokens().attach(
            timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_heads=4, attn_layer="diff")
        )
    mixed = timm.create_model("vit_small_patch16_rope_mixed_224", img_size=32, depth=1)
    with pytest.raises(StepError, match="rotary embeddings of each block's own"):
        ReduceTokens().attach(mixed)
    with pytest.raises(StepError, match="exclude each other"):
        ReduceTokens(r=1).attach(dense.module).forward_features(
            torch.zeros(1, 1, 8, 8), attn_mask=torch.zeros(17, 17)
        )


def test_a_recipe_reduces() -> None:
    values = {
        "data": {"source": "digits"},
        "train": {},
        "steps": [{"kind": "reduce_tokens", "r": [1, 2], "at": [0, 2]}],
    }
    recipe = parse_recipe(values)
    assert recipe.steps == (ReduceTokens(r=(1, 2), at=(0, 2)),)
    assert parse_recipe(recipe.to_json()) == recipe


def test_restored_tokens_of_a_dropped_one_are_those_it_had() -> None:
    rows = torch.arange(6.0).view(1, 6, 1)
    tokens = Tokens(
        rows[:, :2], prefix=1, source=torch.tensor([[0, 4, 0, 3]]), aside=(torch.tensor([[[7.0], [8.0]]]),)
    )
    # n0 = 4: 4 is the first set aside; 3 is no live token of the one left, so it is not asked for here.
    tokens = tokens._replace(source=torch.tensor([[0, 4, 0, 5]]))
    assert tokens.restored()[0, :, 0].tolist() == [0.0, 1.0, 7.0, 1.0, 8.0]


def test_near_ties_do_not_fail_an_export(tmp_path: Path) -> None:
    """With random weights patches are all but equal, and rounding decides between them."""
    torch.manual_seed(0)
    model = cveff.create(
        "vit_tiny_patch16_224", num_classes=3, image_size=32, patch_size=4, embed_dim=32, num_heads=2, depth=2
    )
    step = ReduceTokens(at=(0, 1), r=20)
    reduced = Model(replace(model.spec, edits=(step.plan(model.module),)), step.attach(model.module))
    path = cveff.export(reduced, tmp_path / "model.onnx")
    assert [item.name for item in onnx.load(path).graph.output] == ["logits"]
