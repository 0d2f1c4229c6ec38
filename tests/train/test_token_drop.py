"""Laws of random layer-wise token dropping: keeping all changes nothing, order is restored, evaluation never drops."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import cveff
from cveff.data import Data
from cveff.data import load as load_data
from cveff.errors import StepError, TrainingError
from cveff.train import Train
from cveff.train.loop import SUMMARY
from cveff.train.token_drop import TokenDrop, TokenDropper, choose, gather, scatter

SMALL = {"img_size": 16, "patch_size": 2, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
SETTINGS = Train(epochs=2, batch_size=64, optimizer="adamw", precision="fp32", keep="last")


def vit(name: str = "vit_tiny_patch16_224", **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL, **arguments})


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, train=data.train.subset(np.arange(192)), val=data.val.subset(np.arange(64)))


def model_for(data: Data) -> cveff.Model:
    torch.manual_seed(0)
    return cveff.create(
        "vit_tiny_patch16_224",
        labels=data.labels,
        image_size=8,
        channels=1,
        timm_arguments={"patch_size": 1, "embed_dim": 24, "depth": 4, "num_heads": 2, "drop_path_rate": 0.1},
    )


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_gathering_and_scattering_restore_every_token() -> None:
    x = torch.randn(4, 9, 5)
    chosen = choose(4, 9, 6, 0, x.device)
    assert torch.equal(scatter(x, chosen, gather(x, chosen)), x)
    changed = scatter(x, chosen, gather(x, chosen) + 1)
    moved = (changed - x).round().bool().all(dim=2)
    assert moved.sum(dim=1).tolist() == [6] * 4
    assert all(torch.equal(row.nonzero()[:, 0], kept) for row, kept in zip(moved, chosen, strict=True))


def test_tokens_are_drawn_evenly_in_order_and_prefixes_always() -> None:
    torch.manual_seed(0)
    chosen = choose(4000, 10, 4, 0, torch.device("cpu"))
    assert (chosen.diff(dim=1) > 0).all()
    counts = torch.bincount(chosen.flatten(), minlength=10) / 4000
    # Five standard deviations of a share of 0.4 over 4000 draws.
    assert (counts - 0.4).abs().max() < 5 * (0.24 / 4000) ** 0.5
    kept = choose(50, 10, 4, 2, torch.device("cpu"))
    assert (kept[:, :2] == torch.tensor([0, 1])).all()


def test_keeping_all_is_bit_equal_and_evaluation_never_drops() -> None:
    plain, dropped = vit(), vit()
    dropper = TokenDropper(dropped, TokenDrop(start=8, increment=8), IMAGES, "vit")
    assert (dropper.tokens, dropper.blocks, dropper.kept) == (65, 4, 65)
    for module in (plain, dropped):
        module.train()
        module(IMAGES).square().sum().backward()
    for (name, one), two in zip(plain.named_parameters(), dropped.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name
    dropper.kept = 8
    with torch.no_grad():
        assert not torch.equal(plain(IMAGES), dropped(IMAGES))
        assert torch.equal(plain.eval()(IMAGES), dropped.eval()(IMAGES))
    dropper.remove()
    with torch.no_grad():
        assert torch.equal(plain.train()(IMAGES), dropped.train()(IMAGES))
    assert dropped.state_dict().keys() == plain.state_dict().keys()


def test_each_middle_block_draws_for_itself_and_the_outer_ones_see_all() -> None:
    module = vit()
    dropper = TokenDropper(module, TokenDrop(start=8, increment=8), IMAGES, "vit")
    seen: list[torch.Tensor] = []
    for block in module.blocks:
        block.attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    dropper.kept = 8
    module.train()(IMAGES)
    assert [tuple(x.shape[:2]) for x in seen] == [(3, 65), (3, 8), (3, 8), (3, 65)]
    assert dropper.layer_tokens() == 2 * 65 + 2 * 8
    # What skips a block comes out as it went in.
    given, got = [], []
    module.blocks[1].register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]), prepend=True)
    module.blocks[1].register_forward_hook(lambda _, __, output: got.append(output))
    module(IMAGES)
    same = (given[0] == got[0]).all(dim=2)
    assert same.sum(dim=1).tolist() == [57, 57, 57]
    assert not torch.equal(same[0], same[1])


def test_a_dropped_block_equals_the_block_on_those_tokens() -> None:
    module = vit(drop_path_rate=0.0)
    plain = copy.deepcopy(module)
    dropper = TokenDropper(module, TokenDrop(start=8, increment=8), IMAGES, "vit")
    dropper.kept = 16
    x = torch.randn(3, 65, 24)
    torch.manual_seed(7)
    got = module.train().blocks[1](x)
    torch.manual_seed(7)
    chosen = choose(3, 65, 16, 0, x.device)
    expected = scatter(x, chosen, plain.train().blocks[1](gather(x, chosen)))
    assert torch.equal(got, expected)


def test_the_schedule_grows_by_increments_to_all() -> None:
    settings = TokenDrop(start=64, until=0.5, increment=16)
    kept = [settings.kept(share, 197) for share in np.linspace(0, 1, 201)]
    assert kept[0] == 64 and kept == sorted(kept)
    assert {value % 16 for value in kept} == {0, 197 % 16}
    assert kept[100:] == [197] * 101 and kept[99] == 192
    assert TokenDrop().first(197) == 80 and TokenDrop().first(50) == 32 and TokenDrop().first(10) == 10


def test_the_learning_rate_follows_tokens() -> None:
    settings = TokenDrop(start=16, until=0.5, increment=16)
    share = settings.consumed_share(100, tokens=64, blocks=4)
    assert share[0] == 0 and share[-1] == pytest.approx(1) and (np.diff(share) > 0).all()
    kept = [settings.kept(step / 100, 64) for step in range(100)]
    seen = [2 * 64 + 2 * value for value in kept]
    assert share[30] == pytest.approx(sum(seen[:30]) / sum(seen))
    assert share[30] < 0.3  # early steps see less, so the rate has fallen less


def test_training_drops_and_counts_what_it_saw(digits: Data, tmp_path: Path) -> None:
    drop = TokenDrop(start=16, increment=16, until=1.0)
    trained = cveff.apply(model_for(digits), replace(SETTINGS, token_drop=drop), data=digits, folder=tmp_path)
    figures = json.loads((tmp_path / SUMMARY).read_text())
    kept = [drop.kept(step / 6, 65) for step in range(6)]
    assert figures["tokens"] == sum(64 * (2 * 65 + 2 * value) for value in kept)
    plain = tmp_path / "plain"
    cveff.apply(model_for(digits), SETTINGS, data=digits, folder=plain)
    whole = json.loads((plain / SUMMARY).read_text())
    assert "tokens" not in whole
    assert 0.5 < figures["flops"] / whole["flops"] < 0.95
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in trained.module.blocks)


def test_keeping_all_trains_to_the_same_weights(digits: Data) -> None:
    plain = cveff.apply(model_for(digits), SETTINGS, data=digits)
    settings = replace(SETTINGS, token_drop=TokenDrop(start=65))
    same = cveff.apply(model_for(digits), settings, data=digits)
    for name, value in plain.module.state_dict().items():
        assert torch.equal(value, same.module.state_dict()[name]), name


def test_a_run_that_drops_resumes_to_the_bit(digits: Data, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    class Killing:
        def write(self, step: int, figures: object) -> None:
            if step > 3:
                raise KilledError

        def rewind(self, step: int) -> None:
            pass

    settings = replace(SETTINGS, token_drop=TokenDrop(start=16))
    whole = cveff.apply(model_for(digits), settings, data=digits)
    with pytest.raises(KilledError):
        cveff.apply(model_for(digits), settings, data=digits, folder=tmp_path, log=Killing())
    resumed = cveff.apply(model_for(digits), settings, data=digits, folder=tmp_path, resume=True)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "vit_base_patch16_clip_224", "vit_tiny_r_s16_p8_224"]
)
def test_other_vits_can_be_thinned(name: str) -> None:
    arguments = {} if "_r_" in name else {"img_size": 16, "patch_size": 4}
    module = timm.create_model(name, embed_dim=24, depth=3, num_heads=2, num_classes=5, **arguments)
    images = torch.randn(2, 3, 224, 224) if "_r_" in name else IMAGES[:2]
    dropper = TokenDropper(module, TokenDrop(start=8, increment=8, keep_prefix=True), images, name)
    dropper.kept = 8
    logits = module.train()(images)
    assert logits.shape == (2, 5) and torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("resnet18", {}, "no vision transformer"),
        ("convnext_atto", {}, "no vision transformer"),
        ("efficientnet_lite0", {}, "do not all take and give the same tokens"),
        ("mixer_s32_224", {}, "where tokens are"),
        ("eva02_tiny_patch14_224", {}, "where tokens are"),
        ("beit_base_patch16_224", {"depth": 3, "embed_dim": 24, "num_heads": 2}, "where tokens are"),
    ],
)
def test_networks_that_cannot_do_without_tokens_are_named(name: str, arguments: dict, words: str) -> None:
    module = timm.create_model(name, **arguments)
    with pytest.raises(StepError, match=f"{name}.*{words}|{words}.*{name}|{words}"):
        TokenDropper(module, TokenDrop(start=8), torch.randn(2, 3, 224, 224), name)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_more_tokens_than_there_are(digits: Data) -> None:
    with pytest.raises(StepError, match=r"start is 66, and vit_tiny_patch16_224 has 65 tokens"):
        cveff.apply(model_for(digits), replace(SETTINGS, token_drop=TokenDrop(start=66)), data=digits)


@pytest.mark.parametrize("change", [{"start": 0}, {"until": 1.5}, {"until": 0.0}, {"increment": 0}])
def test_settings_out_of_range(change: dict) -> None:
    with pytest.raises(TrainingError, match=f"token_drop.{next(iter(change))}"):
        TokenDrop(**change)
