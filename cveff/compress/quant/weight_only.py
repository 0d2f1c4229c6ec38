"""Weight-only quantization: large linear layers keep 4 or 8 bits a weight; activations stay floats.

For networks that wait for their weights rather than compute (one image or token at a time), or that must be small.
Works on any `nn.Module`: the calibration data is whatever the network is called with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cveff.compress.low_rank_edit import replace
from cveff.compress.quant.group_rounding import (
    DAMPING,
    Rounded,
    output_error,
    round_compensated,
    round_nearest,
)
from cveff.compress.quant.packed_linear import PackedLinear, WeightGrid
from cveff.compress.quant.replay import MEMORY, Batch, Replay
from cveff.compress.quant.weight_choice import MIN_WEIGHTS, choose, nothing
from cveff.compress.quant.weight_edit import QuantizeWeights, packed_like
from cveff.errors import StepError
from cveff.progress import Progress, Silent

WeightMethod = Literal["nearest", "compensated"]


@dataclass(frozen=True)
class WeightOnly:
    """How weights are rounded, and which.

    Every plain `nn.Linear` with at least `min_weights` weights is rounded, except: the output head (what the network's
    `get_output_embeddings()` or `get_classifier()` names; without these, the last linear layer), layers that share
    their weight with another (tied embeddings), and `exclude`. Embeddings and convolutions stay as they are.

    Attributes:
        bits: 4 or 8.
        group_size: inputs that share a scale: 32, 64 or 128; the last group of a layer may be shorter.
        symmetric: one fixed zero point, instead of one a group.
        weights: "nearest" needs no data; "compensated" (GPTQ) makes errors of a layer's weights make up for each other
            on what reaches the layer in the network that is quantized up to there.
        exclude: paths of layers, or of modules, that stay floats.
        min_weights: the smallest layer that is rounded.
        damping: of "compensated", relative to the mean of the second moments' diagonal.
        ordered: of "compensated": inputs with most energy first.
        search: scales of least squared error instead of those that cover the range.

    Raises:
        StepError: at construction, for a value out of range.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    weights: WeightMethod = "compensated"
    exclude: tuple[str, ...] = ()
    min_weights: int = MIN_WEIGHTS
    damping: float = DAMPING
    ordered: bool = True
    search: bool = True

    def __post_init__(self) -> None:
        _ = self.grid
        if self.weights not in get_args(WeightMethod):
            raise StepError(f"weights is {self.weights!r}; give one of {', '.join(get_args(WeightMethod))}")
        if isinstance(self.exclude, str):
            raise StepError(f"exclude is the text {self.exclude!r}; give a list of paths")
        if not 0 < self.damping < 1:
            raise StepError(f"damping is {self.damping}; give a number between 0 and 1, such as {DAMPING}")

    @property
    def grid(self) -> WeightGrid:
        """The integers of every layer."""
        return WeightGrid(self.bits, self.group_size, self.symmetric)


@dataclass(frozen=True)
class WeightsRounded:
    """What `quantize_weights` did.

    Attributes:
        edit: rebuilds the network's structure.
        errors: layer -> E‖(W - Q) x‖² / E‖W x‖² on the calibration data; without data, ‖W - Q‖² / ‖W‖².
        skipped: layer -> why it was left as it is, a sentence about the layer.
        bytes_before, bytes_after: of the rounded layers' weights: parameters, then packed integers, scales and zero
            points.
    """

    edit: QuantizeWeights
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0


@torch.no_grad()
def quantize_weights(
    module: nn.Module,
    settings: WeightOnly,
    batches: Iterable[Batch] | None = None,
    *,
    progress: Progress | None = None,
    memory: int = MEMORY,
) -> WeightsRounded:
    """Round the weights of `module`'s large linear layers, in place.

    Args:
        batches: what the network is called with: a tensor each, a mapping of keyword arguments or a sequence of
            positional ones, on the network's device. A language model must be told not to keep a cache
            (`use_cache=False`). "nearest" does without them.
        memory: bytes of inner results kept, so that the network's front is not computed for every layer.

    Raises:
        StepError: the network is quantized already, has no layer to round, or a weight or what reaches a layer is not
            finite (the layer is named); `exclude` names no module; "compensated" without batches.
    """
    chosen, skipped = choose(module, exclude=settings.exclude, min_weights=settings.min_weights)
    given = list(batches) if batches is not None else []
    if settings.weights == "compensated" and not given:
        raise StepError(
            "compensated rounding looks at what reaches the layers; give calibration data, or weights='nearest'"
        )
    progress = progress or Silent()
    errors: dict[str, float] = {}
    before = after = 0
    replay = Replay(module, given, chosen, memory=memory) if given else None
    stages = replay.stages if replay else [(path,) for path in chosen]
    for path in replay.unused if replay else []:
        skipped[path] = (
            "is never called on the calibration data: the network reads its weight, or does not use it"
        )
    for stage in progress.track(stages, "rounding weights", len(stages)):
        moments = _moments(replay, stage) if replay else {}
        for path in stage:
            layer = module.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            packed, errors[path] = _rounded(layer, path, settings, moments.get(path))
            before += layer.weight.nbytes
            after += sum(buffer.nbytes for buffer in packed.buffers())
            replace(module, path, packed)
        if replay:
            replay.done(stage)
    if not errors:
        raise StepError(nothing(skipped))
    fields = asdict(settings.grid)
    return WeightsRounded(
        QuantizeWeights({path: dict(fields) for path in errors}), errors, skipped, before, after
    )


def _moments(replay: Replay, stage: tuple[str, ...]) -> dict[str, Tensor]:
    """E[x xᵀ] of what reaches each layer of a stage; one matrix for those that always get the same tensor."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(stage, 0)
    last: tuple[Any, Tensor | None] = (None, None)

    def take(path: str, x: Tensor) -> None:
        nonlocal last
        if last[0] is not x:
            rows = x.reshape(-1, x.shape[-1]).float()
            last = x, (rows.mT @ rows).double()
        product = last[1]
        assert product is not None
        if not bool(torch.isfinite(product).all()):
            raise StepError(
                f"what reaches layer {path!r} is not finite on the calibration data; check it and the weights before"
            )
        counts[path] += x.numel() // x.shape[-1]
        sums[path] = sums[path] + product if path in sums else product

    replay.inputs(stage, take)
    return {path: total / counts[path] for path, total in sums.items()}


def _rounded(
    layer: nn.Linear, path: str, settings: WeightOnly, moments: Tensor | None
) -> tuple[PackedLinear, float]:
    weight = layer.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise StepError(f"the weight of layer {path!r} is not finite; check the checkpoint")
    try:
        rounded = _round(weight, settings, moments)
    except StepError as error:
        raise StepError(f"layer {path!r}: {error}") from error
    packed = packed_like(layer, settings.grid)
    packed.put(rounded.integers, rounded.scales, rounded.zero_points)
    second = moments if moments is not None else torch.eye(layer.in_features, device=weight.device)
    return packed, output_error(weight, rounded.weight(settings.group_size), second)


def _round(weight: Tensor, settings: WeightOnly, moments: Tensor | None) -> Rounded:
    if settings.weights == "nearest":
        return round_nearest(weight, settings.grid, search=settings.search)
    assert moments is not None
    return round_compensated(
        weight,
        moments,
        settings.grid,
        damping=settings.damping,
        ordered=settings.ordered,
        search=settings.search,
    )
