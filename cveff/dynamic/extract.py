"""`ExtractSubNet`: the sub-net of an elastic network that a limit in milliseconds allows, or one by its settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cveff.compress.batch_norm import recalibrate_batch_norm
from cveff.compress.samples import Batches, samples
from cveff.data.dataset import Data, Split
from cveff.data.sampling import calibration_indices
from cveff.dynamic.choose import choose
from cveff.dynamic.elastic_space import SubNet
from cveff.dynamic.search import Evolution
from cveff.dynamic.supernet import Supernet
from cveff.errors import StepError
from cveff.files import write_json
from cveff.model import Model
from cveff.runtime.input_spec import InputSpec
from cveff.steps import Run
from cveff.train.evaluate import evaluate

RECORD = "subnet.json"


@dataclass(frozen=True)
class ExtractSubNet:
    """Make one sub-net of a network that `Elastic` trained a plain model, its batch norms re-estimated.

    With `latency_ms` it is searched for: among the sub-nets that the device's table of blocks predicts to be fast
    enough, the one that is right most often on held-out images; several of the best are exported and measured, and the
    most accurate whose file keeps to the limit is taken. Otherwise `width`, `depth`, `kernel` and `resolution` name it.

    Attributes:
        latency_ms: the most milliseconds a call may take on the target, at its first batch size.
        width: share of its units that every group keeps.
        depth: blocks that every stage does without.
        kernel: largest side of depthwise kernels.
        resolution: height of images, in pixels.
        search: "evolution", or "random" with as many evaluations.
        evolution: settings of the search.
        images: validation images that sub-nets are compared on.
        calibration: training images that batch norms are re-estimated on, without labels.

    Raises:
        StepError: at construction, for a value out of range or settings that contradict each other.
    """

    latency_ms: float | None = None
    width: float | None = None
    depth: int | None = None
    kernel: int | None = None
    resolution: int | None = None
    search: Literal["evolution", "random"] = "evolution"
    evolution: Evolution = field(default_factory=Evolution)
    images: int = 2048
    calibration: int = 1024

    kind: ClassVar[str] = "extract_subnet"
    requires: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        named = [
            name for name in ("width", "depth", "kernel", "resolution") if getattr(self, name) is not None
        ]
        if self.latency_ms is not None and named:
            raise StepError(
                f"extract_subnet.{named[0]} names a sub-net, and latency_ms searches for one; give one or the other"
            )
        if self.latency_ms is None and not named:
            raise StepError(
                "extract_subnet takes latency_ms, or some of width, depth, kernel and resolution, and got none"
            )
        latency = self.latency_ms
        self._check(
            "latency_ms", latency is None or 0 < latency < float("inf"), "a positive number of milliseconds"
        )
        self._check("search", self.search in ("evolution", "random"), "'evolution' or 'random'")
        self._check("images", self.images >= 1, "1 or more")
        self._check("calibration", self.calibration >= 16, "16 or more images")
        # As Prune: what this instance needs depends on its goal.
        object.__setattr__(self, "requires", ("data",) if latency is None else ("data", "timer"))

    def __call__(self, model: Model, run: Run) -> Model:
        """The sub-net as a plain model, in evaluation mode on the CPU.

        Raises:
            StepError: the model is not elastic, or holds no such sub-net.
            UnreachableError: the fastest sub-net is slower than `latency_ms`; the message says how fast it is.
        """
        assert run.data is not None
        supernet = Supernet.of(model, run.device)
        candidates = Candidates(model, supernet, run.data, self.images, self.calibration, run.seed)
        figures: dict[str, float] = {}
        subnet = self._named(supernet)
        if subnet is None:
            subnet, figures = choose(self, supernet, candidates, run)
        figures["extract/accuracy"] = candidates.accuracy(subnet)
        shown = f", {figures['extract/latency_ms']:.3g} ms" if "extract/latency_ms" in figures else ""
        run.progress.message(
            f"sub-net: {100 * figures['extract/accuracy']:.2f}% of held-out images{shown}, "
            f"{len(subnet.dropped)} blocks less, images of {subnet.size[0]}×{subnet.size[1]}"
        )
        run.log.write(0, figures)
        if run.folder is not None:
            write_json(run.folder / RECORD, {"subnet": subnet.to_json(), "figures": figures})
        found = candidates.calibrated(subnet)
        found.module.cpu()
        return found

    def _named(self, supernet: Supernet) -> SubNet | None:
        """The sub-net that the settings name; None: it is to be searched for."""
        if self.latency_ms is not None:
            return None
        sizes = [(int(height), int(width)) for height, width in supernet.space.sizes]
        size = next((size for size in sizes if size[0] == self.resolution), None)
        if size is None and self.resolution is not None:
            shown = ", ".join(str(height) for height, _ in sizes)
            raise StepError(f"resolution {self.resolution} was not trained; trained are {shown}")
        width = 1.0 if self.width is None else self.width
        return supernet.space.uniform(width, self.depth or 0, self.kernel, size)

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise StepError(f"extract_subnet.{name} is {getattr(self, name)!r}; give {wanted}")


class Candidates:
    """Sub-nets with statistics of their own, and how often they are right on images that nothing was trained on.

    Args:
        images: how many validation images; of all classes alike.
        calibration: how many training images.
    """

    def __init__(
        self, model: Model, supernet: Supernet, data: Data, images: int, calibration: int, seed: int
    ) -> None:
        self._supernet, self._data, self._seed = supernet, data, seed
        self._state = model.module.to(supernet.device).state_dict()
        self._num_images, self._num_calibration = images, calibration
        self._batches: dict[tuple[int, int], Batches] = {}
        self._held_out: dict[tuple[int, int], Split] = {}
        self._accuracies: dict[SubNet, float] = {}

    def calibrated(self, subnet: SubNet) -> Model:
        """The sub-net, its batch norms' statistics averaged over training images."""
        found = self._supernet.model(self._state, subnet)
        recalibrate_batch_norm(found.module, self._calibration_of(found.spec.input))
        return found

    def accuracy(self, subnet: SubNet) -> float:
        """Top-1 (0 to 1) after calibration; measured once."""
        if subnet not in self._accuracies:
            found = self.calibrated(subnet)
            figures = evaluate(found.module, self._held_out_of(found.spec.input), found.spec.input)
            self._accuracies[subnet] = figures["accuracy"]
        return self._accuracies[subnet]

    def _calibration_of(self, spec: InputSpec) -> Batches:
        if spec.size not in self._batches:
            split = self._data.train if self._data.train is not None else self._data.val
            self._batches[spec.size] = samples(split, spec, self._num_calibration, seed=self._seed)
        return self._batches[spec.size]

    def _held_out_of(self, spec: InputSpec) -> Split:
        # A split remembers its pixels at one size, so that each size gets its own.
        if spec.size not in self._held_out:
            val = self._data.val
            self._held_out[spec.size] = val.subset(calibration_indices(val, self._num_images, self._seed))
        return self._held_out[spec.size]
