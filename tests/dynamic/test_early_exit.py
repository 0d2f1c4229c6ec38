"""Exits as an edit and their training: the network's answer stays, save and load are bit-equal, heads learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cveff
from cveff.compress import Prune
from cveff.data import load
from cveff.dynamic import EarlyExit, Exits
from cveff.dynamic.exit_points import choose, exit_points
from cveff.dynamic.exits import NetworkWithExits
from cveff.edits import edit_from_json, edit_to_json
from cveff.errors import CheckpointError, RecipeError, StepError
from cveff.model import Model
from cveff.recipe import parse_recipe
from cveff.train import Train

ARCHITECTURES = (
    ("small_resnet_s", {"image_size": 16, "channels": 1}),
    ("resnet10t", {"image_size": 32}),
    ("vit_tiny_patch16_224", {"image_size": (32, 48), "depth": 4, "embed_dim": 24, "num_heads": 2}),
    ("vit_base_patch16_reg4_gap_256", {"image_size": 32, "depth": 4, "embed_dim": 24, "num_heads": 2}),
    ("convnext_atto", {"image_size": 32, "depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}),
)


def create(name: str, arguments: dict) -> Model:
    torch.manual_seed(0)
    return cveff.create(name, num_classes=5, **arguments)


def images(model: Model, count: int = 3) -> torch.Tensor:
    spec = model.spec.input
    return torch.randn(count, spec.channels, *spec.size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "arguments"), ARCHITECTURES)
def test_exits_leave_the_answer_and_come_back_from_disk(name: str, arguments: dict, tmp_path: Path) -> None:
    model = create(name, arguments)
    made = cveff.apply(model, EarlyExit(train=None), seed=3)
    assert isinstance(made.module, NetworkWithExits)
    made.module.eval()
    batch = images(model)
    with torch.no_grad():
        answers = made.module.answers(batch)
        assert torch.equal(made.module(batch), model.module.eval()(batch))
        assert torch.equal(answers[-1], made.module(batch))
    assert all(answer.shape == (3, 5) and answer.isfinite().all() for answer in answers)
    assert 2 <= len(answers) <= 4
    cveff.save(made, tmp_path / "model")
    again = cveff.load(tmp_path / "model")
    assert isinstance(again.module, NetworkWithExits)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again.module.answers(batch), answers, strict=True))
    edit = made.spec.edits[-1]
    assert edit_from_json(edit_to_json(edit)) == edit


def test_blocks_are_left_at_their_share_of_the_operations() -> None:
    model = create(*ARCHITECTURES[2])
    points = {point.path: point for point in exit_points(model.module, model.spec.input)}
    # Four equal blocks, and behind the last nothing but the head.
    blocks = [points[f"blocks.{index}"] for index in range(3)]
    step = blocks[1].share - blocks[0].share
    assert blocks[2].share - blocks[1].share == pytest.approx(step)
    assert 1 - blocks[2].share == pytest.approx(step, rel=0.02)
    assert {point.pool for point in blocks} == {"class-token"}
    nearest = [
        point.path for point in choose(list(points.values()), (blocks[0].share, blocks[2].share + 0.01))
    ]
    assert nearest == ["blocks.0", "blocks.2"]


def test_the_pool_is_the_networks_own() -> None:
    gap = create(*ARCHITECTURES[3])
    made = cveff.apply(gap, EarlyExit(exits=("blocks.1",), train=None))
    edit = made.spec.edits[-1]
    assert (
        isinstance(edit, Exits) and edit.pools == ("tokens",) and edit.prefix == gap.module.num_prefix_tokens
    )
    head = made.module.heads[0]
    features = torch.randn(2, 9, 24)
    expected = head.linear(head.norm(features[:, edit.prefix :].mean(1)))
    assert torch.equal(head(features), expected)


@pytest.mark.parametrize("method", ["joint", "distill"])
def test_training_teaches_every_exit_and_so_do_later_steps(method: str) -> None:
    torch.set_num_threads(1)
    data = load("digits")
    torch.manual_seed(0)
    model = cveff.create("small_resnet_s", labels=data.labels, image_size=8, channels=1)
    train = Train(epochs=3, batch_size=64, optimizer="adamw", learning_rate=3e-3, warmup_epochs=0)
    made = cveff.apply(model, EarlyExit(method=method, train=train), data=data, device="cpu")
    heads = [head.linear.weight.clone() for head in made.module.heads]
    pixels = data.val.pixels(made.spec.input)
    batch = (torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        answers = made.module.answers(batch)
    targets = torch.from_numpy(data.val.targets)
    accuracies = [float((answer.argmax(1) == targets).float().mean()) for answer in answers]
    assert min(accuracies) > 0.3  # chance is 0.1
    further = cveff.apply(made, train, data=data, device="cpu")  # an ordinary step trains the heads, too
    assert all(not torch.equal(a, b.linear.weight) for a, b in zip(heads, further.module.heads, strict=True))


def test_joint_loss_is_the_sum_over_exits() -> None:
    from cveff.dynamic.exit_objective import ExitObjective
    from cveff.train.objective import CrossEntropy

    made = cveff.apply(create(*ARCHITECTURES[0]), EarlyExit(train=None))
    edit = made.spec.edits[-1]
    assert isinstance(edit, Exits)
    batch, targets = images(made), torch.tensor([0, 1, 2])
    objective = ExitObjective(CrossEntropy(), edit)
    made.module.eval()
    loss = objective.loss(made.module, batch, targets)
    expected = sum(
        torch.nn.functional.cross_entropy(a, targets, reduction="sum") for a in made.module.answers(batch)
    )
    assert torch.allclose(loss, expected)  # summed in another order


def test_bad_input_is_named() -> None:
    model = create(*ARCHITECTURES[0])
    with pytest.raises(
        StepError, match=r"'stages\.9' is no block of the network; it can be left at .*stages\.0"
    ):
        cveff.apply(model, EarlyExit(exits=("stages.9",), train=None))
    with pytest.raises(StepError, match="gives neither a map of features"):
        cveff.apply(create(*ARCHITECTURES[1]), EarlyExit(exits=("fc",), train=None))
    with pytest.raises(StepError, match="needs data"):
        cveff.apply(model, EarlyExit())
    made = cveff.apply(model, EarlyExit(train=None))
    with pytest.raises(StepError, match="has early exits already"):
        cveff.apply(made, EarlyExit(train=None))
    with pytest.raises(StepError, match="prune comes after early_exit, whose heads read the blocks"):
        cveff.apply(made, Prune(ratio=0.5))
    with pytest.raises(StepError, match="prune comes after early_exit"):
        prune = Prune(ratio=0.5, importance="magnitude", sensitivity=False, compensate=False)
        cveff.apply(model, [EarlyExit(train=None), prune])
    for wrong, message in (
        ({"method": "luck"}, "joint, distill"),
        ({"alpha": 2}, "0 to 1"),
        ({"temperature": 0}, "positive"),
        ({"exits": ("a", "a")}, "names a block twice"),
    ):
        with pytest.raises(StepError, match=message):
            EarlyExit(**wrong)
    with pytest.raises(CheckpointError, match="'layer9', and the network has no such module"):
        cveff.apply(model, Exits(("layer9",), ("planes",), (8,), 5))
    with pytest.raises(CheckpointError, match="there must be one of each"):
        Exits(("layer9",), (), (8,), 5)
    tokens = create("vit_base_patch16_reg4_gap_256", dict(ARCHITECTURES)["vit_base_patch16_reg4_gap_256"])
    with pytest.raises(StepError, match="'patch_embed' comes before the network's class and register tokens"):
        cveff.apply(tokens, EarlyExit(exits=("patch_embed",), train=None))


def test_steps_that_change_blocks_come_first_in_a_recipe() -> None:
    values = {"data": {"source": "digits"}, "train": {"epochs": 1, "warmup_epochs": 0}}
    steps = [{"kind": "early_exit", "exits": ["stages.0"]}, {"kind": "prune", "macs": 0.5}]
    with pytest.raises(RecipeError, match=r"steps\[1\]: prune comes after early_exit"):
        parse_recipe({**values, "steps": steps})
    found = parse_recipe({**values, "steps": steps[:1]})
    assert found.steps[0] == EarlyExit(exits=("stages.0",))
