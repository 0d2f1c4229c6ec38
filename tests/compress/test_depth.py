"""Residual blocks are found by what the graph computes; without one, the network is the dense one with f = 0."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import cveff
from cveff.compress.depth import block_importance, removable_blocks, skipped
from cveff.compress.drop_blocks import DropBlocks, Skip
from cveff.compress.trace import trace
from cveff.edits import edit_from_json, edit_to_json
from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.runtime.input_spec import InputSpec

# Architecture, its arguments, and the modules whose zeroing makes f contribute nothing.
NETWORKS = {
    "resnet18": (64, ("bn2",), 5),
    "vit_tiny_patch16_224": (32, ("attn.proj", "mlp.fc2"), 12),
    "convnext_atto": (64, ("mlp.fc2",), 12),
    "mobilenetv4_conv_small": (64, ("layer_scale", "pw_proj.bn", "dw_end.bn"), 10),
    "swin_tiny_patch4_window7_224": (56, ("attn.proj", "mlp.fc2"), 12),
    "regnety_002": (64, ("conv3.bn",), 9),
    "small_resnet_s": (32, ("conv2.bn",), 3),
}
_MADE: dict[str, tuple[Model, tuple[str, ...]]] = {}


def made(architecture: str) -> tuple[Model, tuple[str, ...]]:
    """The model, batch norms not trivial, and its removable blocks; built once."""
    if architecture not in _MADE:
        torch.manual_seed(0)
        model = cveff.create(architecture, num_classes=5, image_size=NETWORKS[architecture][0])
        for part in model.module.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, -0.5, 0.5)
        for name, parameter in model.module.named_parameters():
            if name.endswith("gamma"):
                nn.init.ones_(parameter)  # layer scales begin at 1e-6, where f hardly shows
        model.module.eval()
        _MADE[architecture] = model, removable_blocks(model.module, trace(model.module, model.spec.input))
    return _MADE[architecture]


def pictures(model: Model, count: int = 2) -> Tensor:
    spec = model.spec.input
    return torch.randn(count, spec.channels, *spec.size, generator=torch.Generator().manual_seed(3))


def silence(block: nn.Module, ends: tuple[str, ...]) -> None:
    """Zero the last layer of each residual branch."""
    found = 0
    for path, part in block.named_modules():
        if path in ends and list(part.parameters(recurse=False)):
            for parameter in part.parameters():
                nn.init.zeros_(parameter)
            found += 1
    assert found


@pytest.mark.parametrize("architecture", NETWORKS)
def test_without_a_block_the_network_is_the_dense_one_with_f_zeroed(architecture: str) -> None:
    model, blocks = made(architecture)
    _, ends, count = NETWORKS[architecture]
    assert len(blocks) == count
    for block in {blocks[0], blocks[len(blocks) // 2], blocks[-1]}:
        silenced = copy.deepcopy(model.module)
        silence(silenced.get_submodule(block), ends)
        cut = DropBlocks((block,)).apply(copy.deepcopy(model.module))
        with torch.no_grad():
            expected, whole = silenced(pictures(model)), model.module(pictures(model))
            torch.testing.assert_close(cut(pictures(model)), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", NETWORKS)
def test_all_blocks_can_go_at_once(architecture: str) -> None:
    model, blocks = made(architecture)
    cut = DropBlocks(blocks).apply(copy.deepcopy(model.module))
    with torch.no_grad():
        assert cut(pictures(model)).shape == (2, 5)
    left = sum(parameter.numel() for parameter in cut.parameters())
    assert left < model.num_parameters
    assert not removable_blocks(cut, trace(cut, model.spec.input))


def test_blocks_that_change_shape_stay() -> None:
    _, blocks = made("resnet18")
    assert blocks == ("layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1")


class Blocks(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        match self.kind:
            case "sum":
                return y + x
            case "in place":
                x += y
                return x
            case "moved and back":
                return (x.permute(0, 2, 3, 1) + y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            case "moved":
                return (x.transpose(2, 3) + y).contiguous()
            case "scaled":
                return 0.5 * x + y
            case "relu":
                return torch.relu(x + y)
            case "weighted":
                return torch.add(y, x, alpha=2)
        return y


@pytest.mark.parametrize(
    ("kind", "is_removable"),
    [
        ("sum", True),
        ("in place", True),
        ("moved and back", True),
        ("moved", False),
        ("scaled", False),
        ("weighted", False),
        ("relu", False),  # its input may be negative
        ("plain", False),
    ],
)
def test_what_counts_as_x_plus_f(kind: str, is_removable: bool) -> None:
    module = Blocks(nn.Conv2d(3, 3, 1), Block(kind)).eval()
    spec = InputSpec((8, 8), 3, (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)
    assert removable_blocks(module, trace(module, spec)) == (("blocks.1",) if is_removable else ())


def test_a_relu_behind_the_sum_needs_an_input_that_is_not_negative() -> None:
    module = Blocks(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.MaxPool2d(1), Block("relu"), Block("relu")).eval()
    spec = InputSpec((8, 8), 3, (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)
    assert removable_blocks(module, trace(module, spec)) == ("blocks.3", "blocks.4")


def test_the_edit_survives_saving_bit_for_bit(tmp_path) -> None:
    model, blocks = made("resnet18")
    edit = DropBlocks(blocks[:2])
    assert edit_from_json(edit_to_json(edit)) == edit
    cut = cveff.apply(model, edit)
    cveff.save(cut, tmp_path / "cut")
    loaded = cveff.load(tmp_path / "cut")
    assert loaded.spec == cut.spec
    with torch.no_grad():
        assert torch.equal(loaded.module.eval()(pictures(model)), cut.module.eval()(pictures(model)))


def test_bad_blocks_are_refused() -> None:
    model, blocks = made("small_resnet_s")
    with pytest.raises(StepError, match=r"no block 'stages\.9'"):
        DropBlocks(("stages.9",)).apply(copy.deepcopy(model.module))
    with pytest.raises(StepError, match="dropped already"):
        DropBlocks((blocks[0], blocks[0])).apply(copy.deepcopy(model.module))


def test_skip_ignores_what_else_it_is_given() -> None:
    x = torch.ones(2)
    assert Skip()(x, None, attn_mask=None) is x


@pytest.mark.parametrize("criterion", ["loss", "similarity"])
def test_a_block_that_does_nothing_matters_least(criterion: str) -> None:
    model, blocks = made("vit_tiny_patch16_224")
    module = copy.deepcopy(model.module)
    silence(module.get_submodule(blocks[4]), ("attn.proj", "mlp.fc2"))
    batches = [(pictures(model, 4), torch.tensor([0, 1, 2, 3]))]
    scores = block_importance(module, blocks, batches, criterion)
    assert list(scores) == list(blocks)
    assert scores[blocks[4]] == pytest.approx(0, abs=1e-6)
    if criterion == "similarity":
        assert min(scores, key=scores.__getitem__) == blocks[4]


def test_loss_is_what_skipping_costs_on_real_images(digits_model, digits_batches) -> None:
    module = digits_model.module
    blocks = removable_blocks(module, trace(module, digits_model.spec.input))
    batches = digits_batches["val"]
    scores = block_importance(module, blocks, batches)
    images, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    with torch.no_grad():
        whole = nn.functional.cross_entropy(module(images), targets)
        for block, score in scores.items():
            cut = DropBlocks((block,)).apply(copy.deepcopy(module))
            assert score == pytest.approx(
                float(nn.functional.cross_entropy(cut(images), targets) - whole), rel=1e-4, abs=1e-6
            )
    assert all(type(module.get_submodule(block)).__name__ == "BasicBlock" for block in blocks)


def test_without_classes_the_networks_own_predictions_are_the_truth(digits_model, digits_batches) -> None:
    module = digits_model.module
    blocks = removable_blocks(module, trace(module, digits_model.spec.input))
    scores = block_importance(module, blocks, [(images, None) for images, _ in digits_batches["val"]])
    assert all(value > 0 for value in scores.values())  # no other answer fits its own better


def test_skipping_is_undone_even_after_an_error(digits_model) -> None:
    module = copy.deepcopy(digits_model.module)
    blocks = removable_blocks(module, trace(module, digits_model.spec.input))
    with pytest.raises(RuntimeError):
        with skipped(module, blocks):
            raise RuntimeError
    assert not any(isinstance(part, Skip) for part in module.modules())


def test_bad_questions_are_refused(digits_model, digits_batches) -> None:
    module, batches = digits_model.module, digits_batches["val"]
    with pytest.raises(StepError, match="loss, similarity"):
        block_importance(module, (), batches, "size")
    with pytest.raises(StepError, match="no block 'x'"):
        block_importance(module, ("x",), batches)
    with pytest.raises(StepError, match="no images"):
        block_importance(module, (), [])


def test_a_dropped_model_keeps_its_spec() -> None:
    model, blocks = made("small_resnet_s")
    edit = DropBlocks(blocks[-1:])
    cut = with_module(model, edit.apply(copy.deepcopy(model.module)), edit)
    assert cut.spec.edits == (edit,)
