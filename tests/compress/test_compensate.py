"""Kept channels stand in for dropped ones: exactly where they can, better than nothing on images never seen."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cveff.compress.analysis import light_copy
from cveff.compress.batch_norm import BATCH, recalibrate_batch_norm
from cveff.compress.compensate import Compensator, compensate, moment_bytes
from cveff.compress.groups import Group, Member
from cveff.compress.trace import trace
from cveff.errors import StepError
from cveff.runtime.input_spec import InputSpec


def dropped(size: int, *units: int) -> np.ndarray:
    keep = np.ones(size, bool)
    keep[list(units)] = False
    return keep


def with_state(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    changed = copy.deepcopy(module)
    changed.load_state_dict({**module.state_dict(), **state})
    return changed


def without(module: nn.Module, groups: tuple[Group, ...], keep: dict[str, np.ndarray]) -> nn.Module:
    """The network with consumers deaf to dropped units."""
    changed = copy.deepcopy(module)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for group in groups:
            for member in group.members:
                if member.role == "in" and group.name in keep:
                    parameters[member.parameter][:, torch.from_numpy(~keep[group.name])] = 0
    return changed


def difference(a: nn.Module, b: nn.Module, batches: list[tuple[Tensor, Tensor | None]]) -> float:
    with torch.no_grad():
        pairs = [(a(images), b(images)) for images, _ in batches]
    x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
    return float((x - y).square().sum() / y.square().sum())


@pytest.mark.parametrize("kernel", [1, 3])
def test_linear_combinations_of_kept_channels_are_replaced_exactly(convnet, images, kernel: int) -> None:
    """The first layer's channels reach the second through a batch norm only: 6 and 7 are sums of others."""
    known = convnet(kernel)
    module = nn.Sequential(known.module.conv1, known.module.bn, known.module.conv2)
    with torch.no_grad():
        module[0].weight[6] = 2 * module[0].weight[0] - module[0].weight[1]
        module[0].weight[7] = module[0].weight[2]
    group = Group(
        "0", 8, (Member("0.weight", 0, "out", np.arange(8)), Member("2.weight", 1, "in", np.arange(8))), ""
    )
    keep = {"0": dropped(8, 6, 7)}
    found = compensate(module, [group], keep, images, damping=0.0)
    assert difference(with_state(module, found.state), module, images) < 1e-10
    assert difference(without(module, (group,), keep), module, images) > 1e-2
    before, after = found.errors["2"]
    assert after < 1e-10 < before
    assert not found.state["2.weight"][:, 6:].any()


def test_one_pass_serves_many_masks(convnet, images) -> None:
    known = convnet()
    shared = Compensator(known.module, known.groups, images, trace=None)
    for units in ((0,), (1, 5), (2, 3, 4)):
        keep = {"conv1": dropped(8, *units)}
        alone = compensate(known.module, known.groups, keep, images)
        found = shared(keep)
        assert found.errors == alone.errors
        assert found.state.keys() == alone.state.keys()
        assert all(torch.equal(found.state[path], value) for path, value in alone.state.items())
    assert moment_bytes(known.module, known.groups) == 8 * (8**2 + 6**2), "of conv2 and fc"
    with pytest.raises(StepError, match="no groups of this network"):
        shared({"conv9": dropped(8, 0)})


def test_constant_channels_go_into_the_bias(convnet, images) -> None:
    known = convnet(1)
    with torch.no_grad():
        known.module.bn.weight[4] = 0
        known.module.bn.bias[4] = 3.0
    keep = {"conv1": dropped(8, 4)}
    found = compensate(known.module, known.groups, keep, images, damping=0.0)
    assert set(found.state) == {"conv2.weight", "conv2.bias"}
    assert difference(with_state(known.module, found.state), known.module, images) < 1e-10


def test_nothing_dropped_changes_nothing(convnet, images) -> None:
    known = convnet()
    found = compensate(known.module, known.groups, {"conv1": np.ones(8, bool)}, images)
    assert not found.state and not found.errors and not found.skipped


def test_groups_that_share_a_consumer_are_repaired_together(images) -> None:
    """A layer behind a concatenation loses inputs of two groups."""

    class Concatenated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([self.a(x), self.b(x)], 1))

    torch.manual_seed(0)
    module = Concatenated()
    nothing = np.full(4, -1)
    first = Group("a", 4, (Member("last.weight", 1, "in", np.r_[np.arange(4), nothing]),), "")
    second = Group("b", 4, (Member("last.weight", 1, "in", np.r_[nothing, np.arange(4)]),), "")
    # Four linear functions of three pixels' channels are left: they span what was dropped.
    keep = {"a": dropped(4, 0, 1), "b": dropped(4, 2, 3)}
    found = compensate(module, [first, second], keep, images, damping=0.0)
    assert found.state["last.weight"].any((0, 2, 3)).tolist() == [
        False,
        False,
        True,
        True,
        True,
        True,
        False,
        False,
    ]
    assert difference(with_state(module, found.state), module, images) < 1e-8


@pytest.mark.parametrize("has_trace", [False, True])
def test_on_real_images_the_error_is_smaller_than_without(
    digits_model, digits_groups, digits_batches, has_trace: bool
) -> None:
    """Calibrated on training images, judged on others, half the channels of every block gone."""
    random = np.random.default_rng(0)
    keep = {group.name: dropped(group.size, *random.permutation(group.size)[::2]) for group in digits_groups}
    module = digits_model.module
    program = trace(module, digits_model.spec.input) if has_trace else None
    found = compensate(module, digits_groups, keep, digits_batches["train"], trace=program)
    plain = difference(without(module, digits_groups, keep), module, digits_batches["val"])
    repaired = difference(with_state(module, found.state), module, digits_batches["val"])
    assert repaired < 0.7 * plain
    assert all(after < before for before, after in found.errors.values())
    # These convolutions have no bias: only with a trace are the batch norms behind them found.
    assert any(name.endswith("running_mean") for name in found.state) == has_trace


def test_a_linear_layer_behind_which_a_batch_norm_sees_tokens_as_rows() -> None:
    """LeViT's projections: linear, flatten, batch norm. Their mean errors go into the norm."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Linear(4, 5, bias=False)
            self.bn = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x).flatten(2).transpose(1, 2))
            return self.bn(x.flatten(0, 1)).reshape_as(x).mean(1)

    module = Tokens().eval()
    with torch.no_grad():
        module.first.weight[2] = 0
        module.first.bias[2] = 2.0
    spec = InputSpec((4, 4), 3, (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)
    group = Group(
        "first",
        4,
        (Member("first.weight", 0, "out", np.arange(4)), Member("second.weight", 1, "in", np.arange(4))),
        "",
    )
    pixels = [(torch.randn(8, 3, 4, 4), None)]
    found = compensate(
        module, [group], {"first": dropped(4, 2)}, pixels, damping=0.0, trace=trace(module, spec)
    )
    assert set(found.state) == {"second.weight", "bn.running_mean"}
    assert difference(with_state(module, found.state), module, pixels) < 1e-10


def test_the_network_is_left_as_it_was(convnet, images) -> None:
    known = convnet()
    before = copy.deepcopy(known.module.state_dict())
    known.module.train()
    compensate(known.module, known.groups, {"conv1": dropped(8, 1)}, images)
    assert known.module.training
    assert all(torch.equal(value, before[name]) for name, value in known.module.state_dict().items())
    assert not any(part._forward_pre_hooks for part in known.module.modules())


def test_wide_layers_are_left_and_named(convnet, images, monkeypatch) -> None:
    monkeypatch.setattr("cveff.compress.compensate.MAX_CHANNELS", 7)
    known = convnet()
    found = compensate(known.module, known.groups, {"conv1": dropped(8, 1), "conv2": dropped(6, 1)}, images)
    assert set(found.skipped) == {"conv2"} and "8 inputs" in found.skipped["conv2"]
    assert "fc.weight" in found.state


@pytest.mark.parametrize(
    ("keep", "batches", "settings", "message"),
    [
        ({"conv9": np.ones(8, bool)}, True, {}, "no groups"),
        ({"conv1": np.ones(7, bool)}, True, {}, r"shape \(7,\)"),
        ({"conv1": np.zeros(8, bool)}, True, {}, "keeps 0 units"),
        ({}, False, {}, "no images"),
        ({}, True, {"damping": -1.0}, "damping -1.0"),
    ],
)
def test_bad_input_says_what_is_wrong(convnet, images, keep, batches, settings, message: str) -> None:
    known = convnet()
    with pytest.raises(StepError, match=message):
        compensate(known.module, known.groups, keep, images if batches else [], **settings)


def test_recalibrated_statistics_are_those_of_the_images(convnet, images) -> None:
    module = convnet().module
    pixels = torch.cat([batch for batch, _ in images])
    with torch.no_grad():
        seen = module.conv1(pixels).transpose(0, 1).flatten(1)
    assert recalibrate_batch_norm(module, images) == 1
    torch.testing.assert_close(module.bn.running_mean, seen.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.bn.running_var, seen.var(1), rtol=1e-5, atol=1e-6)
    assert module.bn.momentum == 0.1 and not module.bn.training


def test_statistics_are_of_large_batches_however_images_come(convnet) -> None:
    """Where a norm sees one position an image, batches of 8 would normalise otherwise than their averages do."""
    pixels = torch.randn(300, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, found = convnet().module, convnet().module
    recalibrate_batch_norm(expected, [(part, None) for part in pixels.tensor_split(300 // BATCH)])
    recalibrate_batch_norm(found, [(part, None) for part in pixels.split(8)])
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_statistics_of_a_shallow_copy_are_its_own(convnet, images) -> None:
    module = convnet().module
    before = copy.deepcopy(module.state_dict())
    small = light_copy(module)
    recalibrate_batch_norm(small, images)
    assert not torch.equal(small.bn.running_mean, before["bn.running_mean"])
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_recalibration_repairs_a_pruned_network(digits_model, digits_groups, digits_batches) -> None:
    keep = {group.name: dropped(group.size, *range(group.size // 2)) for group in digits_groups}
    cut = without(digits_model.module, digits_groups, keep)

    def accuracy() -> float:
        with torch.no_grad():
            hits = [(cut(batch).argmax(1) == targets).float() for batch, targets in digits_batches["val"]]
        return float(torch.cat(hits).mean())

    before = accuracy()
    recalibrate_batch_norm(cut, digits_batches["train"])
    assert accuracy() > before + 0.1


def test_recalibration_of_a_network_without_batch_norms_does_nothing(images) -> None:
    assert recalibrate_batch_norm(nn.Conv2d(3, 4, 1), images) == 0


def test_recalibration_that_fails_keeps_the_old_statistics(convnet, images) -> None:
    module = convnet().module
    module.bn.running_mean.fill_(0.25)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(StepError, match="no images"):
        recalibrate_batch_norm(module, [])
    with pytest.raises(StepError, match=r"1 image\(s\) are too few"):
        recalibrate_batch_norm(module, [(torch.randn(1, 3, 1, 1), None)])
    with torch.no_grad():
        module.conv1.weight[0] = float("inf")
    with pytest.raises(StepError, match="batch norm bn sees values"):
        recalibrate_batch_norm(module, images)
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("bn"))
