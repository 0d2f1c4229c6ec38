"""Each criterion finds what is known by construction, leaves the network as it was, and says what it lacks."""

from __future__ import annotations

import copy
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cveff.compress.batch_norm import recalibrate_batch_norm
from cveff.compress.groups import Group, Member
from cveff.compress.importance import DATA_CRITERIA, Criterion, score
from cveff.compress.samples import evaluation, samples
from cveff.errors import StepError

CRITERIA = get_args(Criterion)


def zero_channel(module: nn.Module, channel: int) -> None:
    """Make a channel of the first group always 0."""
    with torch.no_grad():
        module.bn.weight[channel] = 0
        module.bn.bias[channel] = -1


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_finite_one_a_unit_and_leave_the_network_as_it_was(convnet, images, criterion) -> None:
    known = convnet()
    known.module.train()
    known.module.bn.eval()
    known.module.conv1.weight.requires_grad_(False)
    state = copy.deepcopy(known.module.state_dict())
    scores = score(known.module, known.groups, criterion, batches=images)
    assert {name: values.shape for name, values in scores.items()} == {"conv1": (8,), "conv2": (6,)}
    assert all((values >= 0).all() and np.isfinite(values).all() for values in scores.values())
    assert known.module.training and not known.module.bn.training
    assert not known.module.conv1.weight.requires_grad and known.module.conv2.weight.requires_grad
    assert all(parameter.grad is None for parameter in known.module.parameters())
    assert all(torch.equal(value, state[name]) for name, value in known.module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in known.module.modules())


@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_a_dead_channel_scores_zero(convnet, images, criterion) -> None:
    known = convnet()
    zero_channel(known.module, 3)
    values = score(known.module, known.groups, criterion, batches=images)["conv1"]
    assert values[3] == 0
    assert (np.delete(values, 3) > 0).all()


@pytest.mark.parametrize("criterion", ["magnitude", *DATA_CRITERIA])
def test_a_channel_whose_effect_is_small_ranks_last(convnet, images, criterion) -> None:
    known = convnet()
    with torch.no_grad():
        for weight in (known.module.conv1.weight, known.module.bn.weight):
            weight[2] *= 0.1
        known.module.conv2.weight[:, 2] *= 0.1
    values = score(known.module, known.groups, criterion, batches=images)["conv1"]
    assert values.argmin() == 2


def test_magnitude_is_the_mean_of_each_members_norm_over_its_mean(convnet) -> None:
    known = convnet()
    module = known.module
    expected = np.zeros(8)
    for weight, dim in ((module.conv1.weight, 0), (module.bn.weight, 0), (module.conv2.weight, 1)):
        squares = weight.detach().double().movedim(dim, 0).reshape(8, -1).square().sum(1).numpy()
        expected += squares / squares.mean() / 3
    np.testing.assert_allclose(score(module, known.groups, "magnitude")["conv1"], expected, rtol=1e-6)


def test_magnitude_does_not_depend_on_a_members_scale(convnet) -> None:
    known = convnet()
    before = score(known.module, known.groups, "magnitude")
    with torch.no_grad():
        known.module.conv2.weight *= 100
    after = score(known.module, known.groups, "magnitude")
    np.testing.assert_allclose(after["conv1"], before["conv1"], rtol=1e-6)


def test_units_of_several_indices_are_judged_whole(convnet) -> None:
    known = convnet()
    members = tuple(
        Member(member.parameter, member.dim, member.role, member.units // 2)
        for member in known.groups[0].members
    )
    single = score(known.module, known.groups, "magnitude")["conv1"]
    pairs = score(known.module, [Group("pairs", 4, members, "")], "magnitude")["pairs"]
    np.testing.assert_allclose(pairs, single.reshape(4, 2).mean(1), rtol=1e-6)


def test_taylor_is_the_first_order_change_of_the_loss(convnet, images) -> None:
    """With nothing but the last layer's inputs in a group, Σ g·w is the derivative along shrinking its producers."""
    known = convnet()
    group = Group("conv2", 6, tuple(member for member in known.groups[1].members if member.role == "out"), "")
    batch = images[0]
    found = score(known.module, [group], "taylor", batches=[batch])["conv2"]
    for unit in range(6):
        step = 1e-3
        losses = []
        for sign in (1, -1):
            scaled = copy.deepcopy(known.module).double()
            with torch.no_grad():
                scaled.conv2.weight[unit] *= 1 + sign * step
                scaled.conv2.bias[unit] *= 1 + sign * step
                losses.append(float(F.cross_entropy(scaled(batch[0].double()), batch[1])))
        assert found[unit] == pytest.approx(abs(losses[0] - losses[1]) / (2 * step), rel=1e-3, abs=1e-7)


def test_activation_is_the_energy_that_the_next_layer_loses(convnet, images) -> None:
    """The classifier sees the pooled channel: dropping it changes the logits by exactly that energy."""
    known = convnet()
    found = score(known.module, known.groups, "activation", batches=images)["conv2"]
    pixels = torch.cat([batch for batch, _ in images])
    with torch.no_grad():
        before = known.module(pixels)
        for unit in range(6):
            cut = copy.deepcopy(known.module)
            cut.fc.weight[:, unit] = 0
            lost = (cut(pixels) - before).square().sum(1).mean()
            assert found[unit] == pytest.approx(float(lost), rel=1e-4)


def test_activation_of_units_without_consumers_is_their_own_energy(convnet, images) -> None:
    known = convnet()
    group = Group("conv1", 8, tuple(m for m in known.groups[0].members if m.role == "out"), "")
    found = score(known.module, [group], "activation", batches=images)["conv1"]
    with torch.no_grad():
        made = known.module.conv1(torch.cat([batch for batch, _ in images]))
    np.testing.assert_allclose(found, made.square().mean((0, 2, 3)).numpy(), rtol=1e-5)


def test_activation_reads_grouped_kernels_group_by_group(images) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1, groups=2, bias=False))
    # Index j of the kernel's second dimension: channel j of either group.
    units = np.arange(4)
    group = Group("0", 4, (Member("1.weight", 1, "in", units),), "")
    found = score(layer, [group], "activation", batches=images)["0"]
    with torch.no_grad():
        x = layer[0](torch.cat([batch for batch, _ in images]))
        for unit in units:
            cut = copy.deepcopy(layer[1])
            cut.weight[:, unit] = 0
            alone = torch.zeros_like(x)
            alone[:, [unit, unit + 4]] = x[:, [unit, unit + 4]]
            assert found[unit] == pytest.approx(float(layer[1](alone).square().sum(1).mean()), rel=1e-4)


def test_random_is_a_function_of_seed_and_name(convnet) -> None:
    known = convnet()
    first = score(known.module, known.groups, "random", seed=1)
    again = score(known.module, known.groups[::-1], "random", seed=1)
    other = score(known.module, known.groups, "random", seed=2)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["conv1"], other["conv1"])


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_images_without_classes_get_the_networks_own(convnet, images, criterion) -> None:
    known = convnet()
    unlabelled = [(batch, None) for batch, _ in images]
    marked = [(batch, torch.full_like(targets, -1)) for batch, targets in images]
    first = score(known.module, known.groups, criterion, batches=unlabelled, seed=3)
    second = score(known.module, known.groups, criterion, batches=marked, seed=3)
    for name, values in first.items():
        assert (values > 0).any()
        assert np.array_equal(values, second[name])


@pytest.mark.parametrize("criterion", ["magnitude", *DATA_CRITERIA])
def test_on_a_trained_network_every_criterion_beats_random(
    digits_model, digits_groups, digits_batches, criterion
) -> None:
    """Half of every block's channels are cut and batch norms settle; what counts are images no criterion saw."""

    def loss_without_half(scores: dict[str, np.ndarray]) -> float:
        module = copy.deepcopy(digits_model.module)
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for group in digits_groups:
                dropped = np.argsort(scores[group.name])[: group.size // 2]
                parameters[group.members[-1].parameter][:, dropped] = 0
        recalibrate_batch_norm(module, digits_batches["train"])
        with torch.no_grad():
            pairs = digits_batches["val"]
            return float(np.mean([float(F.cross_entropy(module(x), y)) for x, y in pairs]))

    module = digits_model.module
    informed = loss_without_half(score(module, digits_groups, criterion, batches=digits_batches["train"]))
    chance = [loss_without_half(score(module, digits_groups, "random", seed=seed)) for seed in range(8)]
    assert informed < np.median(chance)


def test_agrees_with_torch_pruning(convnet) -> None:
    """Where all members have the same mean norm, dividing by it changes nothing and the peer's mean is ours."""
    peer = pytest.importorskip("torch_pruning")
    known = convnet()
    module = known.module
    with torch.no_grad():
        for weight in (module.conv1.weight, module.bn.weight, module.conv2.weight):
            weight.mul_(torch.rand(1)).div_((weight.square().sum() / 8).sqrt())
    graph = peer.DependencyGraph().build_dependency(module, torch.randn(1, 3, 8, 8))
    group = graph.get_pruning_group(module.conv1, peer.prune_conv_out_channels, idxs=list(range(8)))
    theirs = peer.importance.GroupMagnitudeImportance(p=2, group_reduction="mean", normalizer="mean")(group)
    ours = score(module, known.groups, "magnitude")["conv1"]
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4)


@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_criteria_on_data_need_images(convnet, criterion) -> None:
    known = convnet()
    for batches, message in (
        (None, "pass data"),
        ([], "got no images"),
        ([(torch.zeros(0, 3, 8, 8), None)], "B ≥ 1"),
    ):
        with pytest.raises(StepError, match=message):
            score(known.module, known.groups, criterion, batches=batches)


def test_images_that_are_not_finite_are_refused(convnet, images) -> None:
    known = convnet()
    images[1][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(StepError, match="batch 1 holds NaN"):
        score(known.module, known.groups, "taylor", batches=images)


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_gradients_that_are_not_finite_name_the_parameter(convnet, images, criterion) -> None:
    known = convnet()
    with torch.no_grad():
        known.module.fc.weight[0, 0] = float("inf")
    with pytest.raises(StepError, match=r"gradient of (conv|bn|fc)\S* is not finite"):
        score(known.module, known.groups, criterion, batches=images)


def test_activations_that_are_not_finite_name_the_layer(convnet, images) -> None:
    known = convnet()
    with torch.no_grad():
        known.module.bn.weight[0] = float("inf")
    with pytest.raises(StepError, match="input of conv2 is not finite"):
        score(known.module, known.groups, "activation", batches=images)


def test_weights_that_are_not_finite_name_the_group(convnet) -> None:
    known = convnet()
    with torch.no_grad():
        known.module.conv2.weight[0, 0] = float("nan")
    with pytest.raises(StepError, match=r"conv1 \(conv2.weight\)"):
        score(known.module, known.groups, "magnitude")


def test_classes_beyond_the_logits_are_refused(convnet, images) -> None:
    known = convnet()
    with pytest.raises(StepError, match="class 7 in the calibration images, but the network has 5 logits"):
        score(known.module, known.groups, "taylor", batches=[(images[0][0], torch.full((8,), 7))])


def test_an_unknown_criterion_lists_the_known(convnet) -> None:
    known = convnet()
    with pytest.raises(StepError, match="magnitude, taylor"):
        score(known.module, known.groups, "size")


def test_groups_of_another_network_are_refused(convnet) -> None:
    known = convnet()
    with pytest.raises(StepError, match=r"no conv9.weight"):
        score(known.module, [Group("x", 2, (Member("conv9.weight", 0, "out", np.arange(2)),), "")])
    with pytest.raises(StepError, match="2 units along 0"):
        score(known.module, [Group("x", 2, (Member("conv1.weight", 0, "out", np.arange(2)),), "")])


def test_evaluation_puts_each_parts_mode_back() -> None:
    module = nn.Sequential(nn.Dropout(), nn.BatchNorm2d(2)).train()
    module[1].eval()
    with evaluation(module):
        assert not module[0].training
    assert module[0].training and not module[1].training


class Caching(nn.Module):
    """Caches a function of a parameter in evaluation mode until told to train, as LeViT's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 0.5, 0.25]))
        self.last = nn.Conv2d(3, 4, 1)
        self.cache: list[torch.Tensor] = []

    def train(self, mode: bool = True) -> Caching:
        if mode:
            self.cache = []
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.cache:
            self.cache = [self.scale.square()]
        return self.last(x * self.cache[0][:, None, None]).mean((2, 3))


@pytest.mark.parametrize("criterion", ["taylor", "hessian"])
def test_cached_biases_neither_hide_gradients_nor_stay(images, criterion) -> None:
    module = Caching().eval()
    with torch.no_grad():
        module(images[0][0])
    batches = [(batch, targets.clamp_max(3)) for batch, targets in images]
    group = Group("scale", 3, (Member("scale", 0, "scale", np.arange(3)),), "")
    assert (score(module, [group], criterion, batches=batches)["scale"] > 0).all()
    assert not module.cache  # its graph could be neither copied nor run backwards


def test_samples_are_real_images_with_their_classes(digits_batches) -> None:
    pairs = digits_batches["train"]
    assert sum(len(batch) for batch, _ in pairs) == 128
    classes = torch.cat([targets for _, targets in pairs])
    assert set(classes.tolist()) == set(range(10))
    with pytest.raises(StepError, match="positive"):
        samples(None, None, 0)
