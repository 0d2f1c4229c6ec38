"""Post-training quantization of a network to 8-bit integers, from a few hundred images without labels.

What is to be chosen (how ranges are found, whether channels are equalized) is chosen by what it does to the logits of
images that the ranges were not taken from.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from cveff.compress.quant.adaround import reconstruct
from cveff.compress.quant.calibration_images import CalibrationImages, odd_images
from cveff.compress.quant.capture import capture, constant, identify
from cveff.compress.quant.channel_groups import ChannelGroup, channel_groups
from cveff.compress.quant.checks import check_images, check_parameters, first_not_finite
from cveff.compress.quant.equalize import ALPHA, equalize
from cveff.compress.quant.error import logits
from cveff.compress.quant.fake_quant import Grid
from cveff.compress.quant.layers import find_layers
from cveff.compress.quant.network import QuantizedGraph, Roundings, insert
from cveff.compress.quant.placement import Placement, place
from cveff.compress.quant.ranges import Method, Watch, rounding_off, weight_range
from cveff.compress.quant.reestimate import Correction, reestimate
from cveff.compress.quant.round_weights import round_weights
from cveff.compress.quant.saturation import narrow, predict_saturation
from cveff.compress.quant.settle import Seen, divided, not_finite, watch_until_settled
from cveff.model import Model, with_module
from cveff.progress import Progress, Silent
from cveff.runtime.input_spec import InputSpec
from cveff.target import Scheme

WeightRounding = Literal["nearest", "compensated", "learned"]

_METHODS: tuple[Method, ...] = ("mse", "percentile", "minmax")


@dataclass
class PostTraining:
    """Settings, as `Quantize` describes them.

    Attributes:
        narrow: give wider steps to weights of channels that clip on x86 without VNNI.
    """

    scheme: Scheme = "cpu"
    method: Method | Literal["auto"] = "auto"
    weight_method: Literal["minmax", "mse"] = "minmax"
    weights: WeightRounding = "compensated"
    equalize: bool | Literal["auto"] = "auto"
    alpha: float = ALPHA
    correction: Correction | Literal["auto"] = "auto"
    narrow: bool = False
    exclude: tuple[str, ...] = ()
    seed: int = 0
    progress: Progress = field(default_factory=Silent)

    def quantize(self, module: nn.Module, spec: InputSpec, batches: Sequence[Tensor]) -> Quantized:
        """The rounded graph of `module`, which is left as it is.

        Args:
            batches: images (B, C, H, W), normalised, in mixed order. The last quarter is what choices are made by;
                nothing is calibrated on it, unless there is one image only.

        Raises:
            StepError: no images or such as do not fit, the network cannot be captured, or it overflows on them.
        """
        batches = divided(check_images(batches, spec))
        given = sum(map(len, batches))
        exact = capture(module, spec)
        check_parameters(exact)
        held = batches[-max(1, len(batches) // 4) :]
        seen = batches[: -len(held)] or held
        everything = CalibrationImages(seen, held, _logits(exact, held))
        odd = odd_images(exact, [*seen, *held])
        usual = everything.without(odd) if bool(odd.any()) else everything
        best = self._best_of_equalized(exact, usual)
        if usual is not everything:
            with_odd = self._with_odd_images(best, usual, everything)
            if with_odd is not None:
                best, usual = with_odd, everything
        if self.weights == "learned":
            self._learn(best, usual.seen)
            best.error = usual.error(best.graph)
        self._correct(best, usual)
        best.error = everything.error(best.graph)
        for warning in best.seen.warnings(given):
            self.progress.message(warning)
        return best

    def _best_of_equalized(self, exact: fx.GraphModule, images: CalibrationImages) -> Quantized:
        tried = self._groups(exact)
        best: Quantized | None = None
        for is_equalized in (False, True) if self.equalize == "auto" else (bool(self.equalize),):
            if is_equalized and not tried:
                if best is not None:
                    continue
                is_equalized = False
            source = copy.deepcopy(exact)
            if is_equalized:
                equalize(source, self._groups(source), images.seen, self.alpha)
            found = self._attempt(source, images)
            found.equalized = len(tried) if is_equalized else 0
            if self.equalize == "auto" and tried:
                how = "with" if is_equalized else "without"
                self.progress.message(
                    f"{how} equalization: the logits' error is {found.error:.4f} of their energy"
                )
            if best is None or found.error < best.error:
                best = found
        assert best is not None
        return best

    def _groups(self, graph: fx.GraphModule) -> list[ChannelGroup]:
        """What is equalized: of itself only what layer norms make, whose channels differ most."""
        if not self.equalize:
            return []
        return [group for group in channel_groups(graph) if group.is_norm or self.equalize is True]

    def _with_odd_images(
        self, best: Quantized, usual: CalibrationImages, everything: CalibrationImages
    ) -> Quantized | None:
        """The same made from all images, odd ones too, if that changes the logits of all less.

        `best` learns how many it was made without.
        """
        best.left_out = everything.count - usual.count
        found = self._attempt(best.exact, everything)
        found.equalized = best.equalized
        without = everything.error(best.graph)
        self.progress.message(
            f"{best.left_out} of {everything.count} calibration images reach far larger values than the others: the "
            f"logits' error is {without:.4f} of their energy without them, {found.error:.4f} with"
        )
        return found if found.error < without else None

    def _attempt(self, exact: fx.GraphModule, images: CalibrationImages) -> Quantized:
        graph = copy.deepcopy(exact)
        placement = place(graph, self.scheme, self.exclude)
        roundings = insert(graph, placement)
        watch = Watch(graph, roundings.tensors)
        seen = watch_until_settled(watch, exact, images.seen, self.progress)
        if self.scheme == "openvino":
            placement = _signed_where_negative(placement, roundings, watch)
        method = self._set_ranges(graph, watch, roundings, images)
        nodes = identify(graph)
        for site in placement.weights:
            rounded: Any = nodes[site.reader].args[1]
            weight = constant(graph, rounded.args[0])
            assert weight is not None
            rounding = roundings.weights[site.reader]
            rounding.set_range(*weight_range(weight, site.axis, rounding.grid, self.weight_method))
        used = images.seen[: -(-seen.images // len(images.seen[0]))]
        narrowed: dict[str, int] = {}
        if self.narrow:
            # A sum that clips is no matter of taste: every image that is at hand may tell of one.
            narrowed = narrow(graph, predict_saturation(graph, [*used, *images.held], seed=self.seed))
        if self.weights != "nearest":
            round_weights(graph, used, seed=self.seed)
        error = images.error(graph)
        extremes = {name: (histogram.low, histogram.high) for name, histogram in watch.histograms.items()}
        return Quantized(graph, exact, placement, roundings, method, seen, error, narrowed, extremes)

    def _set_ranges(
        self,
        graph: fx.GraphModule,
        watch: Watch,
        roundings: Roundings,
        images: CalibrationImages,
    ) -> Method:
        methods = _METHODS if self.method == "auto" else (self.method,)
        errors: dict[Method, float] = {}
        for method in methods:
            _put(roundings, watch, method)
            if len(methods) > 1:
                with rounding_off(graph, roundings.weights.values()):
                    errors[method] = images.error(graph)
        chosen = min(errors, key=lambda method: errors[method]) if errors else methods[0]
        _put(roundings, watch, chosen)
        return chosen

    def _correct(self, found: Quantized, images: CalibrationImages) -> None:
        """Bring the channels' statistics back, as `correction` says or where that changes the logits less."""
        tried: tuple[Correction, ...] = (
            ("mean", "statistics") if self.correction == "auto" else (self.correction,)
        )
        before = {name: value.clone() for name, value in found.graph.state_dict().items()}
        best = before
        for correction in tried:
            if correction == "none":
                continue
            found.graph.load_state_dict(before)
            reestimate(found.graph, found.exact, images.seen, deviations=correction == "statistics")
            error = images.error(found.graph)
            if error < found.error or self.correction != "auto":
                found.error, found.correction, found.before_correction = error, correction, before
                best = {name: value.clone() for name, value in found.graph.state_dict().items()}
        found.graph.load_state_dict(best)

    def _learn(self, found: Quantized, batches: Sequence[Tensor]) -> None:
        """Put the float weights back and learn how each is rounded."""
        others = {layer.name: layer for layer in find_layers(found.exact)}
        for layer in find_layers(found.graph):
            layer.put(found.graph, others[layer.name].matrix(found.exact))
        reconstruct(found.graph, found.exact, batches, seed=self.seed, progress=self.progress)


@dataclass
class Quantized:
    """A rounded network.

    Attributes:
        graph: it; `exact`: the same without roundings, channels equalized where they were.
        placement, roundings: what is rounded.
        method: how its ranges were found.
        seen: what they were made from.
        error: energy of the change of the logits over that of their differences between classes, on held-out images.
        narrowed: layer -> channels whose steps are wider so that 16-bit sums do not clip.
        extremes: tensor -> the least and greatest value on calibration images.
        equalized: tensors whose channels were equalized.
        left_out: calibration images that nothing was made from, because they are unlike the others.
        correction: of the channels' statistics.
        before_correction: the graph's state without it; {} where there is none.
    """

    graph: fx.GraphModule
    exact: fx.GraphModule
    placement: Placement
    roundings: Roundings
    method: Method
    seen: Seen
    error: float
    narrowed: dict[str, int]
    extremes: dict[str, tuple[float, float]]
    equalized: int = 0
    left_out: int = 0
    correction: Correction = "none"
    before_correction: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def uncorrected(self) -> Iterator[fx.GraphModule]:
        """The graph with the statistics that rounding gave it: for a tool that rounds and corrects once more."""
        corrected = {name: value.clone() for name, value in self.graph.state_dict().items()}
        self.graph.load_state_dict(self.before_correction or corrected)
        try:
            yield self.graph
        finally:
            self.graph.load_state_dict(corrected)

    def of(self, model: Model) -> Model:
        """The rounded network as a model: `model`, in floats, that it was made from, with the edit that rounds it."""
        return with_module(model, self.graph, QuantizedGraph.of(model.spec.input, self.placement))


def _logits(exact: fx.GraphModule, held: Sequence[Tensor]) -> Tensor:
    """The unrounded network's answers.

    Raises:
        StepError: one is no number; the operator where that begins is named.
    """
    found = logits(exact, held)
    if not bool(torch.isfinite(found).all()):
        names = (first_not_finite(exact, images) for images in held)
        raise not_finite(next((name for name in names if name), "the last operator"))
    return found


def _signed_where_negative(placement: Placement, roundings: Roundings, watch: Watch) -> Placement:
    """Tensors with negative values get a symmetric signed grid; the others keep all of an unsigned one."""
    signed = {name for name, histogram in watch.histograms.items() if histogram.low < 0}
    for name in signed:
        roundings.tensors[name].grid = Grid(8, signed=True, symmetric=True)
    sites = tuple(
        replace(site, signed=True, symmetric=True) if (site.like or site.tensor) in signed else site
        for site in placement.sites
    )
    return replace(placement, sites=sites)


def _put(roundings: Roundings, watch: Watch, method: Method) -> None:
    for name, (low, high) in watch.ranges(method).items():
        roundings.tensors[name].set_range(torch.tensor(low), torch.tensor(high))
