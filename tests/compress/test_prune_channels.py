"""The edit: data that comes back from JSON, rebuilds the same network, and refuses another one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cveff
from cveff.compress.analysis import analyze, check
from cveff.compress.prune_channels import PruneChannels
from cveff.edits import edit_from_json, edit_to_json
from cveff.errors import CheckpointError, StepError
from cveff.model import Model


def pruned(name: str, size: int = 64, times: int = 1, **options: str) -> Model:
    """`name` with a random half of every group gone, `times` over."""
    torch.manual_seed(0)
    model = cveff.create(name, 10, image_size=size)
    random = np.random.default_rng(0)
    for _ in range(times):
        analysis = analyze(model.module, model.spec.input, **options)
        keep = {g.name: random.permutation(g.size) < max(1, g.size // 2) for g in analysis.groups}
        edit = analysis.edit(keep, model.module)
        spec = replace(model.spec, edits=(*model.spec.edits, edit))
        model = replace(model, spec=spec, module=edit.apply(model.module).eval())
    return model


@pytest.mark.parametrize(
    ("name", "times", "options"),
    [
        ("test_resnet", 1, {}),
        ("test_vit", 1, {"attention": "head_dims"}),
        ("levit_128s", 1, {}),
        ("test_efficientnet", 2, {}),
        ("test_vit", 2, {}),
    ],
)
def test_saved_and_loaded_it_computes_the_same_bits(
    name: str, times: int, options: dict[str, str], tmp_path: Path
) -> None:
    model = pruned(name, times=times, **options)
    cveff.save(model, tmp_path / "model")
    loaded = cveff.load(tmp_path / "model")
    images = torch.randn(2, 3, *model.spec.input.size)
    with torch.no_grad():
        assert torch.equal(loaded.module.eval()(images), model.module(images))
    assert json.loads(json.dumps([edit_to_json(edit) for edit in loaded.spec.edits])) == json.loads(
        json.dumps([edit_to_json(edit) for edit in model.spec.edits])
    )


def test_json_brings_back_an_equal_edit() -> None:
    edit = PruneChannels(
        {"a.weight": {"0": [0, 2]}},
        {"a": {"groups": 2, "split": [1, 2]}},
        {"b": {"attention 3": {"scale": 0.5}}},
    )
    assert edit_from_json(json.loads(json.dumps(edit_to_json(edit)))) == edit


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "levit_128s"])
def test_a_pruned_network_exports_and_agrees(name: str, tmp_path: Path) -> None:
    model = pruned(name)
    assert cveff.export(model, tmp_path / "model.onnx").is_file()  # refuses a file that does not agree


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "levit_128s"])
def test_a_training_step_reaches_every_parameter(name: str) -> None:
    model = pruned(name)
    module = model.module.train()
    logits = module(torch.randn(2, 3, *model.spec.input.size))
    logits = logits[0] if isinstance(logits, tuple) else logits
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_sizes_that_layers_keep_beside_their_weights_follow() -> None:
    model = pruned("test_resnet")
    for module in model.module.modules():
        if isinstance(module, torch.nn.Conv2d):
            assert (module.out_channels, module.in_channels // module.groups) == tuple(
                module.weight.shape[:2]
            )
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_mean)


def test_what_an_attention_layer_cached_does_not_outlive_the_cut() -> None:
    torch.manual_seed(0)
    model = cveff.create("levit_128s", 10, image_size=64)
    images = torch.randn(1, 3, 64, 64)
    model.module.eval()(images)  # with gradients: what is cached hangs on the graph
    analysis = analyze(model.module, model.spec.input)
    keep = {group.name: np.arange(group.size) < max(1, group.size // 2) for group in analysis.groups}
    model.module(images)
    assert check(model.module, analysis, keep, images) < 1e-5
    analysis.edit(keep, model.module).apply(model.module)(images)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (PruneChannels({"fc.weight": {"0": [0]}}), "no fc.weight|no parameter fc.weight"),
        (PruneChannels({"conv1.running_mean": {"0": [0]}}), "no parameter conv1.running_mean"),
        (PruneChannels({"conv1.weight": {"0": [99]}}), "does not hold what the edit keeps"),
        (PruneChannels({"conv1.weight": {"7": [0]}}), "does not hold what the edit keeps"),
        (PruneChannels({}, {"conv1": {"colour": 1}}), "no attribute colour"),
        (PruneChannels({}, {"nowhere": {"groups": 1}}), "no nowhere"),
        (PruneChannels({}, {}, {"nowhere": {"reshape 0": {"0": 1}}}), "no nowhere"),
    ],
)
def test_another_networks_edit_is_refused(edit: PruneChannels, words: str) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = torch.nn.Conv2d(3, 8, 3)

    with pytest.raises(CheckpointError, match=words):
        edit.apply(Net())


def test_masks_that_do_not_fit_are_refused() -> None:
    model = cveff.create("test_resnet", 10, image_size=32)
    analysis = analyze(model.module, model.spec.input)
    group = analysis.groups[0]
    for keep, words in (
        ({"nowhere": np.ones(3, bool)}, "no group of channels is called 'nowhere'"),
        ({group.name: np.ones(group.size + 1, bool)}, "units and the mask"),
        ({group.name: np.zeros(group.size, bool)}, "nothing of .* would be left"),
    ):
        with pytest.raises(StepError, match=words):
            analysis.edit(keep, model.module)


def test_shapes_after_pruning_are_those_of_the_pruned_network() -> None:
    model = cveff.create("test_resnet", 10, image_size=32)
    analysis = analyze(model.module, model.spec.input)
    keep = {group.name: np.arange(group.size) < group.size // 2 for group in analysis.groups}
    shapes = analysis.shapes(keep)
    seen: dict[str, tuple[int, ...]] = {}
    small = analysis.edit(keep, model.module).apply(model.module).eval()
    for name, module in small.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda *a, name=name: seen.__setitem__(name, tuple(a[2].shape)))
    small(torch.zeros(1, 3, *model.spec.input.size))
    for node in analysis.trace.nodes:
        if node.op == "call_function" and "conv2d" in str(node.target):
            assert shapes[node.name] == seen[analysis.trace.modules[node.name]]
