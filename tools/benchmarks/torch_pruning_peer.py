"""torch-pruning as its documentation uses it, at a ratio or at the smallest ratio that meets a measured latency."""

from __future__ import annotations

import copy

from torch import nn

from cveff.compress.samples import samples
from cveff.data import Data
from cveff.export.timer import EngineTimer
from cveff.model import Model
from cveff.progress import Progress

CRITERIA = ("magnitude", "taylor")
_STEPS = 7


def to_latency(
    model: Model,
    criterion: str,
    data: Data,
    timer: EngineTimer,
    seed: int,
    latency: float,
    progress: Progress,
) -> tuple[float, Model]:
    """The smallest ratio whose exported file takes `latency` of the dense one's time, and the pruned network.

    Bisected, each candidate exported and timed. Where no ratio gets there it is the fastest that was tried.
    """
    low, high = 0.1, 0.95
    best: tuple[float, Model] | None = None
    fastest: tuple[float, float, Model] | None = None
    for _ in range(_STEPS):
        ratio = (low + high) / 2
        try:
            small = prune(model, criterion, ratio, data, seed)
        except ZeroDivisionError:  # it took the last head of a layer
            high = ratio
            continue
        times = timer.milliseconds({"dense": model, "small": small})
        share = times["small"] / times["dense"]
        progress.message(f"torch-pruning {criterion} ratio {ratio:.3f}: {share:.3f} of the latency")
        if fastest is None or share < fastest[0]:
            fastest = (share, ratio, small)
        if share <= latency * 1.01:
            high, best = ratio, (ratio, small)
        else:
            low = ratio
    if best is None and fastest is not None:
        progress.message(f"torch-pruning {criterion} does not reach {latency}: {fastest[0]:.3f} is its least")
        best = fastest[1:]
    if best is None:
        raise SystemExit(f"torch-pruning {criterion} cannot prune {model.spec.architecture} at any ratio")
    return best


def prune(model: Model, criterion: str, ratio: float, data: Data, seed: int) -> Model:
    """Its documented way: group importance, rounded to 8, the classifier left alone, attention by heads."""
    import torch_pruning as tp
    from timm.models.vision_transformer import Attention

    assert data.train is not None
    batches = samples(data.train, model.spec.input, 512, seed=seed)
    module = copy.deepcopy(model.module).eval()
    example = batches[0][0][:1]
    heads = {}
    for inner in module.modules():
        if isinstance(inner, Attention):
            inner.fused_attn = False
            heads[inner.qkv] = inner.num_heads
    importance = (
        tp.importance.GroupTaylorImportance()
        if criterion == "taylor"
        else tp.importance.GroupMagnitudeImportance(p=2)
    )
    ignored = [
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Linear) and layer.out_features == len(model.spec.labels)
    ]
    pruner = tp.pruner.BasePruner(
        module,
        example,
        importance=importance,
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads=heads,
        prune_num_heads=bool(heads),
        head_pruning_ratio=ratio,
        round_to=8,
    )
    if criterion == "taylor":
        module.zero_grad()
        for images, targets in batches:
            nn.functional.cross_entropy(module(images), targets).backward()
    pruner.step()
    for inner in module.modules():
        if isinstance(inner, Attention):
            inner.num_heads = pruner.num_heads[inner.qkv]
            inner.head_dim = inner.qkv.out_features // (3 * inner.num_heads)
            inner.attn_dim = inner.num_heads * inner.head_dim
            inner.fused_attn = True
    module.zero_grad(set_to_none=True)
    return Model(model.spec, module.requires_grad_(True))
