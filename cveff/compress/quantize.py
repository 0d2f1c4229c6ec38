"""`Quantize`: round a network's weights and activations to 8-bit integers, as the target's engine computes them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, fx

from cveff.backbones.reparameterize import Reparameterize, has_branches
from cveff.compress.quant.capture import capture, constant, identify
from cveff.compress.quant.network import QuantizedGraph, Roundings, insert, is_quantized
from cveff.compress.quant.placement import Placement, Scheme, place
from cveff.compress.quant.ranges import Method, Watch, find_range, weight_range
from cveff.compress.quant.round_weights import round_weights
from cveff.compress.quant.weight_choice import is_packed
from cveff.compress.quant.weight_only import WeightOnly
from cveff.compress.quant.weight_step import WEIGHT_BITS, round_model_weights
from cveff.compress.samples import samples
from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.steps import Run

Precision = Literal["int8", "int8-weights", "int4-weights"]
WeightRounding = Literal["nearest", "compensated"]


@dataclass(frozen=True)
class Quantize:
    """Post-training quantization; followed by a `distill` or `train` step it becomes quantization-aware training.

    The model that comes out computes in PyTorch what its exported file says: rounding included.

    Attributes:
        precision: "int8": weights and activations; "int8-weights", "int4-weights": weights of large linear layers alone
            (`cveff.compress.quant.weight_only`), which ignores `scheme`, `method` and `weight_method`.
        scheme: where and how tensors are rounded (`cveff.compress.quant.placement`).
        method: how ranges of activations are found.
        weight_method: how those of weights are: "minmax", or "mse" for the least error.
        weights: "nearest", or "compensated": errors of a layer's weights make up for each other (GPTQ).
        images: most calibration images.
        exclude: operators that stay in floats, by the names in the report; of weights alone: layers' or modules' paths.
        group_size: of weights alone: inputs that share a scale, 32, 64 or 128.
        symmetric: of weights alone: no zero points.

    Raises:
        StepError: at construction, for a value out of range.
    """

    precision: Precision = "int8"
    scheme: Scheme = "cpu"
    method: Method = "percentile"
    weight_method: Literal["minmax", "mse"] = "minmax"
    weights: WeightRounding = "compensated"
    images: int = 256
    exclude: tuple[str, ...] = ()
    group_size: int = 64
    symmetric: bool = False

    kind: ClassVar[str] = "quantize"
    requires: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        for name, allowed in (
            ("precision", Precision),
            ("scheme", Scheme),
            ("method", Method),
            ("weights", WeightRounding),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise StepError(
                    f"quantize.{name} is {getattr(self, name)!r}; give one of {', '.join(get_args(allowed))}"
                )
        if self.images < 1:
            raise StepError(f"quantize.images is {self.images}; give 1 or more")
        if self.precision in WEIGHT_BITS:
            _ = self.weights_alone

    @property
    def weights_alone(self) -> WeightOnly:
        """The settings of "int8-weights" and "int4-weights"."""
        bits = WEIGHT_BITS[self.precision]
        return WeightOnly(bits, self.group_size, self.symmetric, self.weights, self.exclude)

    def __call__(self, model: Model, run: Run) -> Model:
        """Merge branches, fold batch norms, place the roundings, find their steps and round the weights.

        Raises:
            StepError: the model is quantized already, cannot be captured, or overflows on the calibration images.
        """
        if self.precision in WEIGHT_BITS:
            return round_model_weights(model, run, self.weights_alone, self.images)
        if is_quantized(model.module) or is_packed(model.module):
            raise StepError(f"{model.spec.architecture} is quantized already; start from the float model")
        assert run.data is not None and run.data.train is not None
        batches = [
            images for images, _ in samples(run.data.train, model.spec.input, self.images, seed=run.seed)
        ]
        if has_branches(model.module):
            model = Reparameterize()(model, run)
        graph = capture(model.module, model.spec.input)
        placement = place(graph, self.scheme, self.exclude)
        roundings = insert(graph, placement)
        self.calibrate(graph, placement, roundings, batches, run)
        return with_module(model, graph, edit_of(model, placement))

    def calibrate(
        self,
        graph: fx.GraphModule,
        placement: Placement,
        roundings: Roundings,
        batches: list[Tensor],
        run: Run,
    ) -> None:
        """Set every step from the images, then round the weights."""
        watch = Watch(graph, roundings.tensors)
        histograms = watch.histograms(
            batches, lambda items: run.progress.track(items, "calibrating", len(batches))
        )
        for name, rounding in roundings.tensors.items():
            low, high = find_range(histograms[name], rounding.grid, self.method)
            rounding.set_range(torch.tensor(low), torch.tensor(high))
        nodes = identify(graph)
        for site in placement.weights:
            rounded: Any = nodes[site.reader].args[1]
            weight = constant(graph, rounded.args[0])
            assert weight is not None
            rounding = roundings.weights[site.reader]
            rounding.set_range(*weight_range(weight, site.axis, rounding.grid, self.weight_method))
        if self.weights == "compensated":
            round_weights(graph, batches, seed=run.seed)


def edit_of(model: Model, placement: Placement) -> QuantizedGraph:
    """The edit that rebuilds a quantized network."""
    return QuantizedGraph(
        input=model.spec.input.to_json(),
        sites=tuple(_json(site) for site in placement.sites),
        weights=tuple(_json(site) for site in placement.weights),
    )


def _json(site: object) -> dict[str, object]:
    values = dataclasses.asdict(site)  # type: ignore[call-overload]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
