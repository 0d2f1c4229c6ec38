"""Training all sub-nets at once: gradients are sums of the sub-nets' own, and runs resume to the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cveff
import cveff.data
from cveff.backbones.reparameterize import is_mergeable
from cveff.compress.drop_blocks import DropBlocks
from cveff.compress.importance import score
from cveff.compress.prune_channels import PruneChannels
from cveff.dynamic import Elastic, ElasticSpace, ExtractSubNet
from cveff.dynamic.elastic_space import SubNet, space_of
from cveff.dynamic.find_space import _kernels
from cveff.dynamic.sandwich import Sandwich
from cveff.dynamic.supernet import Supernet
from cveff.edits import edit_from_json, edit_to_json
from cveff.errors import CheckpointError, RecipeError, StepError
from cveff.model import Model
from cveff.pipeline import evaluate
from cveff.progress import Silent
from cveff.recipe import parse_recipe
from cveff.steps import Run
from cveff.train import Train

Net = Callable[[str], tuple[Model, Supernet]]
Images = Callable[..., Tensor]

TRAIN = Train(epochs=1, batch_size=64, keep="last", warmup_epochs=0.0)


def in_double(model: Model) -> nn.Module:
    """A copy in training mode, in which a sum's order shows in the 15th digit only, without randomness."""
    module = copy.deepcopy(model.module).double().train()
    for part in module.modules():
        if type(part).__name__ in ("Dropout", "DropPath"):
            part.eval()
    return module


def scattered(supernet: Supernet, subnet: SubNet, name: str, gradient: Tensor, like: Tensor) -> Tensor:
    """A sub-net's gradient of one parameter, where it belongs in the shared one."""
    result = np.zeros(like.shape)
    places = [np.arange(size) for size in like.shape]
    for edit in supernet.edits(subnet):
        if isinstance(edit, PruneChannels):
            for dim, indices in edit.keep.get(name, {}).items():
                places[int(dim)] = np.asarray(indices)
    for dim in (2, 3) if like.ndim == 4 else ():
        margin = (like.shape[dim] - gradient.shape[dim]) // 2
        places[dim] = places[dim][margin : margin + gradient.shape[dim]]
    result[np.ix_(*places)] = gradient.numpy()
    return torch.from_numpy(result)


@pytest.mark.parametrize("family", ["resnet", "mobilenetv3", "vit"])
def test_a_steps_gradient_is_the_sum_of_the_sub_nets_own(family: str, net: Net, images: Images) -> None:
    model, supernet = net(family)
    module = in_double(model)
    batch, targets = images((48, 48), 8).double(), torch.arange(8) % 5
    objective = Sandwich(supernet, num_random=2)
    torch.manual_seed(3)
    drawn = objective.draw()
    assert len(set(drawn)) == 3 and supernet.space.largest not in drawn
    whole = copy.deepcopy(module)
    logits = whole(batch)
    F.cross_entropy(logits, targets, reduction="sum").backward()
    expected = {name: parameter.grad.clone() for name, parameter in whole.named_parameters()}
    answers = F.log_softmax(logits.detach().float(), 1)
    for subnet in drawn:
        small = supernet.model(module.state_dict(), subnet).module.double().train()
        for part in small.modules():
            if type(part).__name__ in ("Dropout", "DropPath"):
                part.eval()
        small_batch = batch
        if subnet.size != (48, 48):
            small_batch = F.interpolate(batch, subnet.size, mode="bilinear", antialias=True)
        mine = F.log_softmax(small(small_batch).float(), 1)
        F.kl_div(mine, answers, reduction="sum", log_target=True).backward()
        for name, parameter in small.named_parameters():
            if name != "pos_embed" and parameter.grad is not None:
                place = scattered(supernet, subnet, name, parameter.grad, expected[name])
                expected[name] = expected[name] + place
    torch.manual_seed(3)
    objective.loss(module, batch, targets).backward()
    for name, parameter in module.named_parameters():
        if name != "pos_embed":  # interpolated where images are small; the next test has it
            # Logits are compared in float32, as under autocast: seven digits.
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-4, atol=1e-5), name


def test_position_embeddings_get_gradients_from_small_images(net: Net, images: Images) -> None:
    model, supernet = net("vit")
    module = in_double(model)
    subnet = supernet.space.uniform(width=0.5, size=(32, 32))
    supernet.run(module, subnet, images((32, 32)).double()).square().sum().backward()
    kept = dict(subnet.widths)
    gradient = module.pos_embed.grad
    moved = (gradient.abs().sum((0, 1)) > 0).sum()
    assert moved in kept.values() and moved < gradient.shape[-1]
    assert bool((gradient.abs().sum((0, 2)) > 0).all())


def test_no_gradient_flows_through_what_sub_nets_imitate(net: Net, images: Images) -> None:
    """Channels that no drawn sub-net has get the gradient of the labels alone, to the last bit."""
    model, supernet = net("resnet")
    batch, targets = images((48, 48), 4).double(), torch.arange(4) % 5
    alone, both = in_double(model), in_double(model)
    F.cross_entropy(alone(batch).float(), targets, reduction="sum").backward()
    Sandwich(supernet, num_random=0).loss(both, batch, targets).backward()
    name = "layer1.0.conv1.weight"
    edit = next(e for e in supernet.edits(supernet.space.smallest) if isinstance(e, PruneChannels))
    kept = set(edit.keep[name]["0"])
    gone = [index for index in range(16) if index not in kept]
    ours, labels = (dict(net.named_parameters())[name].grad for net in (both, alone))
    assert torch.equal(ours[gone], labels[gone]) and not torch.equal(ours, labels)


def test_running_a_sub_net_leaves_the_networks_statistics(net: Net, images: Images) -> None:
    model, supernet = net("mobilenetv3")
    module = copy.deepcopy(model.module).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for subnet in (supernet.space.smallest, supernet.space.uniform(kernel=3)):
        supernet.run(module, subnet, images(subnet.size, 4))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.fixture(scope="module")
def digits() -> Any:
    return cveff.data.load("digits", seed=0)


@pytest.fixture(scope="module")
def trained(digits: Any) -> Model:
    """A small residual network, three epochs."""
    torch.manual_seed(0)
    model = cveff.create("small_resnet_s", num_classes=10, image_size=8, channels=1)
    step = Elastic(widths=(0.5,), resolutions=(6,), num_random=1, train=replace(TRAIN, epochs=3))
    return cveff.apply(model, step, data=digits)


def test_every_sub_net_learns(trained: Model, digits: Any) -> None:
    assert trained.spec.edits[-1].kind == "elastic"
    for settings in ({"width": 0.5}, {"width": 0.5, "depth": 1, "resolution": 6}):
        small = cveff.apply(trained, ExtractSubNet(**settings), data=digits)
        assert evaluate(small, digits) > 0.8, settings  # chance is 0.1


def test_an_elastic_model_loads_with_its_sub_nets(trained: Model, tmp_path: Path, images: Images) -> None:
    cveff.save(trained, tmp_path / "elastic")
    loaded = cveff.load(tmp_path / "elastic")
    state = loaded.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in trained.module.state_dict().items())
    first, second = (Supernet.of(model) for model in (trained, loaded))
    subnet = first.space.smallest
    small, again = (net.model(trained.module.state_dict(), subnet) for net in (first, second))
    batch = images(subnet.size)[:, :1]
    assert torch.equal(small.module(batch), again.module(batch))
    assert small.spec == again.spec


def test_a_stopped_training_goes_on_to_the_same_weights(digits: Any, tmp_path: Path) -> None:
    class Stop(Silent):
        def message(self, text: str) -> None:
            if text.startswith("epoch 1/"):
                raise KeyboardInterrupt

    def run(folder: Path, **options: Any) -> Model:
        torch.manual_seed(0)
        model = cveff.create("small_resnet_s", num_classes=10, image_size=8, channels=1)
        train = Train(epochs=2, batch_size=256, keep="last", warmup_epochs=0.0, validate_every=1)
        return cveff.apply(model, Elastic(train=train), data=digits, folder=folder, **options)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", progress=Stop())
    resumed = run(tmp_path / "parts", resume=True)
    state = resumed.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.module.state_dict().items())


def test_the_most_important_channels_lead(digits: Any) -> None:
    model = cveff.load(Path(__file__).parents[3] / "model_zoo" / "weights" / "digits")
    found = Elastic(round_to=2).prepare(model, Run(data=digits))
    by_data = Elastic(round_to=2, importance="activation").prepare(model, Run(data=digits))
    scores = score(model.module, found.analysis.groups)
    for name, order in found.space.order.items():
        ranked = scores[name][list(order)]
        assert bool((np.diff(ranked) <= 0).all())
    assert found.space.order != by_data.space.order


def test_one_level_for_all_or_one_for_each(net: Net) -> None:
    apart = net("mobilenetv3")[1].space
    together = replace(apart, apart=False)
    assert together.alternatives == (3, 3, 2, 2)
    assert len(apart.alternatives) == len(apart.widths) + len(apart.stages) + len(apart.kernels) + 1
    assert together.smallest == apart.smallest and together.largest == apart.largest
    assert together.subnet((1, 1, 0, 1)) == apart.uniform(0.75, 1, None, (32, 32))


def test_a_space_is_json_both_ways_and_checked(net: Net) -> None:
    space = net("convnext")[1].space
    values = edit_to_json(space)
    again = edit_from_json(values)
    assert isinstance(again, ElasticSpace) and edit_to_json(again) == values
    assert again.smallest == space.smallest
    name = next(iter(values["widths"]))
    for damage in ({"widths": {name: [99, 1, 1]}}, {"order": {name: [0, 0]}}, {"sizes": []}, {"kernels": 3}):
        with pytest.raises(CheckpointError, match="damaged"):
            edit_from_json({**values, **damage})
    with pytest.raises(CheckpointError, match="another network's"):
        space.apply(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (1.5,)}, r"widths is \(1.5,\)"),
        ({"widths": (0.0,)}, "widths is"),
        ({"depth": -1}, "depth is -1"),
        ({"kernels": (0,)}, "kernels is"),
        ({"resolutions": (0,)}, "resolutions is"),
        ({"vary": "much"}, "vary is 'much'"),
        ({"num_random": -1}, "num_random is -1"),
        ({"importance": "magic"}, "importance is 'magic'"),
        ({"round_to": 0}, "round_to is 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StepError, match=message):
        Elastic(**settings)


def test_what_cannot_be_elastic_is_named(net: Net) -> None:
    model, _ = net("resnet")
    with pytest.raises(StepError, match=r"resolutions: 64 is larger than the model's images, 48×48"):
        Elastic(resolutions=(64,)).prepare(model, Run())
    with pytest.raises(StepError, match=r"nothing of resnet18 is elastic.*Kernels: no depthwise"):
        Elastic(widths=(1.0,), depth=0).prepare(model, Run())
    with pytest.raises(StepError, match="is not elastic: apply Elastic"):
        space_of(model.spec.edits, "resnet18")
    with pytest.raises(StepError, match="cannot take images of 3×3"):
        Elastic(resolutions=(3,)).prepare(net("vit")[0], Run())


def test_kernels_of_branches_that_are_merged_later_stay(net: Net) -> None:
    branched = cveff.create("fastvit_t8", num_classes=3, image_size=64).module
    outer = [path for path, part in branched.named_modules() if path and is_mergeable(part)]
    _, kernels = _kernels(branched, (3,))
    assert kernels and not any(path.startswith(f"{name}.") for path in kernels for name in outer)
    plain = net("mobilenetv3")[0].module
    assert _kernels(plain, (7, 3)) == _kernels(plain, (3,)) and len(_kernels(plain, (3,))[1]) == 8
    assert _kernels(plain, (7, 5)) == _kernels(plain, ()) == ((), {})


def test_an_elastic_network_is_not_made_elastic_again_nor_changed(trained: Model) -> None:
    with pytest.raises(StepError, match="is elastic already"):
        Elastic().prepare(trained, Run())
    changed = Model(replace(trained.spec, edits=(*trained.spec.edits, DropBlocks(("x",)))), trained.module)
    with pytest.raises(StepError, match=r"changed after Elastic \(drop_blocks\)"):
        Supernet.of(changed)


def test_training_that_would_spoil_sub_nets_is_refused(trained: Model, digits: Any) -> None:
    with pytest.raises(StepError, match=r"train comes after elastic, .* extract one first"):
        cveff.apply(trained, Train(epochs=1), data=digits)


def test_a_recipe_may_begin_with_it() -> None:
    steps = [{"kind": "elastic", "widths": [0.5]}, {"kind": "extract_subnet", "width": 0.5}]
    recipe = parse_recipe({"data": {"source": "digits"}, "steps": steps})
    assert recipe.phases == (Elastic(widths=(0.5,)), ExtractSubNet(width=0.5))
    assert parse_recipe(recipe.to_json()) == recipe
    with pytest.raises(RecipeError, match="train: is missing"):
        parse_recipe({"data": {"source": "digits"}, "steps": [steps[1]]})
    train = {"kind": "train", "epochs": 1, "warmup_epochs": 0}
    with pytest.raises(RecipeError, match=r"steps\[1\]: train comes after elastic"):
        parse_recipe({"data": {"source": "digits"}, "steps": [steps[0], train]})
    assert len(parse_recipe({"data": {"source": "digits"}, "steps": [*steps, train]}).steps) == 3
