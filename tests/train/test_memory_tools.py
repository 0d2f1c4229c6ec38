"""Checkpointed activations, state on the CPU and the report of who owns memory change bytes, never weights."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import cveff
from cveff.data import Data
from cveff.data import load as load_data
from cveff.errors import TrainingError
from cveff.log import FileLog
from cveff.measure.training_memory import MemoryTracker, TrainingMemory
from cveff.train import Train
from cveff.train.checkpointing import checkpointed
from cveff.train.offload import OffloadedOptimizers
from cveff.train.optimizers import build_optimizer

CPU = torch.device("cpu")
NETWORKS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 3, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8},
    "resnet18": {"channels": (8, 8, 16, 16), "drop_path_rate": 0.2},
    "convnext_atto": {"depths": (1, 1, 2, 1), "dims": (8, 8, 8, 16), "drop_path_rate": 0.2},
    "small_resnet_s": {"drop_rate": 0.2},  # which timm cannot checkpoint
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10, **NETWORKS[name]).train()


def step(module: nn.Module, optimizer: Any = None, size: int = 32) -> None:
    """Forward and backward on random images, and an update."""
    torch.manual_seed(1)
    module.zero_grad()
    images, targets = torch.randn(8, 3, size, size), torch.arange(8)
    nn.functional.cross_entropy(module(images), targets).backward()
    if optimizer is not None:
        optimizer.step()


def measured(module: nn.Module, optimizer: torch.optim.Optimizer, size: int = 32) -> TrainingMemory:
    step(module, optimizer, size)
    module.zero_grad()
    tracker = MemoryTracker(module, [optimizer], CPU)
    with tracker:
        step(module, optimizer, size)
    assert tracker.result is not None
    return tracker.result


@pytest.mark.parametrize("name", NETWORKS)
def test_checkpointing_changes_neither_gradients_nor_statistics(name: str) -> None:
    plain = network(name)
    saving = copy.deepcopy(plain)
    for _ in range(2):
        step(plain)
        with checkpointed(saving):
            step(saving)
    for (path, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad), path
    for path, value in plain.state_dict().items():
        assert torch.equal(saving.state_dict()[path], value), path
    assert not any(part._forward_hooks or "forward" in vars(part) for part in saving.modules())
    assert not any(getattr(part, "grad_checkpointing", False) for part in saving.modules())


def test_checkpointing_frees_activations() -> None:
    module = network("vit_tiny_patch16_224")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    plain = measured(module, optimizer)
    with checkpointed(module):
        saving = measured(module, optimizer)
    assert saving.activations < 0.7 * plain.activations
    assert saving.parameters == plain.parameters


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(TrainingError, match="Sequential has neither set_grad_checkpointing nor a list"):
        with checkpointed(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))):
            pass


def test_the_report_counts_to_the_byte() -> None:
    """A chain whose every tensor is known: two linear layers without biases, batch 8, Adam."""
    module = nn.Sequential(nn.Linear(64, 256, bias=False), nn.ReLU(), nn.Linear(256, 10, bias=False))
    optimizer = torch.optim.AdamW(module.parameters())
    images, targets = torch.randn(8, 64), torch.arange(8)

    def one_step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), targets).backward()
        optimizer.step()

    one_step()
    tracker = MemoryTracker(module, [optimizer], CPU)
    optimizer.zero_grad()
    with tracker:
        one_step()
    weights = 4 * (64 * 256 + 256 * 10)
    found = tracker.result
    assert found is not None
    assert found.parameters == found.gradients == weights
    assert found.optimizer_state == 2 * weights + 2 * 4  # and two step counters
    # The peak is in the update: its temporaries of the larger matrix, and the batch.
    assert 4 * 64 * 256 <= found.other <= 3 * 4 * 64 * 256 + images.nbytes + targets.nbytes
    assert found.peak_bytes == sum(found.figures()[f"memory/{name}"] for name in
        ("parameters", "gradients", "optimizer_state", "activations", "other"))  # fmt: skip


def test_activations_grow_with_the_batch_and_own_its_peak() -> None:
    layers = [nn.Sequential(nn.Conv2d(width, 8, 3, padding=1), nn.Tanh()) for width in (3, 8, 8)]
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    found = measured(module, optimizer, size=32)
    # Each tanh keeps its output, which the next convolution takes; the images are made within the step.
    kept, images = 3 * (8 * 8 * 32 * 32 * 4), 8 * 3 * 32 * 32 * 4
    assert kept + images <= found.activations <= kept + images + 1000
    assert found.activations > 0.6 * found.peak_bytes


def test_torchs_own_tracker_sees_the_same_peak() -> None:
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    module = network("resnet18")
    optimizer = torch.optim.AdamW(module.parameters())
    ours = measured(module, optimizer)
    module.zero_grad()
    theirs = tracker.MemTracker()
    theirs.track_external(module, optimizer)
    with theirs:
        step(module, optimizer)
    peak = theirs.get_tracker_snapshot("peak")[CPU]
    total = next(value for key, value in peak.items() if "total" in str(key).lower())
    # It rounds each storage up to 512 bytes: the small ones of 60 parameters and their state.
    assert ours.peak_bytes == pytest.approx(total, rel=0.1)


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", seed=0)
    return replace(data, train=data.train.subset(np.arange(192)), val=data.val.subset(np.arange(60)))


SETTINGS = Train(epochs=2, batch_size=64, precision="fp32", keep="last", warmup_epochs=0)


def test_train_reports_memory_and_checkpoints_without_a_trace(digits: Data, tmp_path: Path) -> None:
    results, figures = [], []
    for checkpoint_activations in (False, True):
        folder = tmp_path / str(checkpoint_activations)
        torch.manual_seed(0)
        model = cveff.create("small_resnet_s", num_classes=10, image_size=8, channels=1)
        settings = replace(SETTINGS, checkpoint_activations=checkpoint_activations, ema=0.9)
        with FileLog(folder) as log:
            results.append(
                cveff.apply(model, settings, data=digits, log=log, device="cpu").module.state_dict()
            )
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert "memory/peak_bytes" in lines[0] and "memory/peak_bytes" not in lines[1]
        figures.append(lines[0])
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert figures[1]["memory/activations"] < figures[0]["memory/activations"]
    parameters = sum(value.nbytes for value in results[0].values())
    assert figures[0]["memory/parameters"] == parameters


def test_offloading_needs_a_gpu(digits: Data) -> None:
    model = cveff.create("small_resnet_s", num_classes=10, image_size=8, channels=1)
    with pytest.raises(TrainingError, match="the device is the CPU; turn it off"):
        cveff.apply(model, replace(SETTINGS, offload_optimizer=True), data=digits, device="cpu")


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "galore"])
def test_offloaded_optimizers_take_the_same_steps(name: str) -> None:
    """On a CPU the copies are as exact as the originals, so nothing may differ; through a saved state neither."""
    plain = network("resnet18").to(memory_format=torch.channels_last)
    moved = copy.deepcopy(plain)

    def build(module: nn.Module, extra: nn.Module) -> Any:
        return build_optimizer(module, name, 0.01, 0.1, 0.9, extra)

    optimizer = build(plain, nn.Module())
    offloaded: Any = OffloadedOptimizers(moved, nn.Module(), build)
    for number in range(4):
        if number == 2:
            state = copy.deepcopy(offloaded.state_dict())
            offloaded = OffloadedOptimizers(moved, nn.Module(), build)
            offloaded.load_state_dict(state)
        for module, one in ((plain, optimizer), (moved, offloaded)):
            one.set_factor(1 / (1 + number))
            step(module, one)
            one.zero_grad()
    for ours, theirs in zip(moved.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.grad is None
