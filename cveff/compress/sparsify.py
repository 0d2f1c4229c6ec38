"""`Sparsify`: set weights to zero, in NVIDIA's 2:4 pattern or anywhere, and fine-tune around them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cveff.backbones import has_branches
from cveff.compress.distill import Distill
from cveff.compress.sparsity import EFFECT, Masks, SparseObjective, Sparsity, weight, zeros_of
from cveff.compress.weight_calls import WeightCall, weight_calls
from cveff.data.augment import normalize
from cveff.data.sampling import calibration_images
from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.runtime.input_spec import InputSpec
from cveff.steps import Run
from cveff.train.loop import fit

_BATCH = 32


@dataclass(frozen=True)
class Sparsify:
    """Zero the least important weights of convolutions and linear layers, for good.

    It makes files smaller once they are compressed, and runs no faster on ONNX Runtime and OpenVINO.

    Attributes:
        pattern: "2:4" keeps two of every four neighbours along the input channels (Mishra et al.,
            arXiv:2104.08378); layers whose input channels are no multiple of 4 stay dense and are named.
            "unstructured" keeps weights anywhere.
        sparsity: share of zeros in each layer; 0.5 for "2:4".
        importance: "magnitude", |w|, compared within a layer; or "activation", |w| · ‖x‖₂ of the weight's input
            channel, compared within a row, that is one output (Wanda: Sun et al., arXiv:2306.11695).
        num_calibration: images that ‖x‖₂ is measured on.
        exclude: layers that stay dense: "first", "last", or patterns of names such as "blocks.0.*".
        recover: fine-tune around the zeros, by default not at all; without another teacher, with the dense model as
            the teacher. In an unstructured pattern sparsity then grows
            as `s (1 - (1 - t)³)` (Zhu & Gupta, arXiv:1710.01878), so the last weights are kept, whatever
            `train.keep` and `train.patience` say: earlier ones are denser.
        ramp: share of the fine-tuning in which it grows.

    Raises:
        StepError: at construction, for a value out of range or settings that contradict each other.
    """

    pattern: Literal["2:4", "unstructured"] = "2:4"
    sparsity: float = 0.5
    importance: Literal["magnitude", "activation"] = "magnitude"
    num_calibration: int = 128
    exclude: tuple[str, ...] = ("first", "last")
    recover: Distill | None = None
    ramp: float = 0.5

    kind: ClassVar[str] = "sparsify"
    requires: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.pattern not in ("2:4", "unstructured"):
            raise StepError(f"sparsify.pattern is {self.pattern!r}; give '2:4' or 'unstructured'")
        if self.importance not in ("magnitude", "activation"):
            raise StepError(f"sparsify.importance is {self.importance!r}; give 'magnitude' or 'activation'")
        if not 0 < self.sparsity < 1:
            raise StepError(f"sparsify.sparsity is {self.sparsity!r}; give a share between 0 and 1")
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise StepError(
                f"sparsify.sparsity is {self.sparsity}, and 2:4 is always 0.5; leave it out, or use 'unstructured'"
            )
        if not 0 < self.ramp <= 1:
            raise StepError(
                f"sparsify.ramp is {self.ramp!r}; give a share of the fine-tuning above 0, up to 1"
            )
        if self.num_calibration < 1:
            raise StepError(f"sparsify.num_calibration is {self.num_calibration!r}; give 1 or more images")
        if self.recover is not None and self.recover.train.epochs == 0:
            raise StepError("sparsify.recover.train.epochs is 0; train for some, or leave recover out")

    def __call__(self, model: Model, run: Run) -> Model:
        """Choose the zeros, fine-tune if asked to, and check that the kept weights have the pattern.

        Raises:
            StepError: images are needed and there are none, the network still has branches to merge, a name in
                `exclude` matches nothing, or no layer can be made sparse.
            TrainingError, CheckpointError: as `Train`.
        """
        if self.recover is not None and (run.data is None or run.data.train is None):
            raise StepError("Sparsify fine-tunes, which needs data; pass data=… with a training split")
        if has_branches(model.module):
            raise StepError(
                f"{model.spec.architecture} has branches that export adds up, and sums of zeros in different places "
                "are none; apply Reparameterize first"
            )
        if self.recover is not None and run.teacher is None:
            run = replace(run, teacher=Model(model.spec, copy.deepcopy(model.module)))  # dense as yet
        module: nn.Module = model.module.to(run.device)
        calls = weight_calls(module, self._images(model.spec.input, run))
        layers, dense = self._choose_layers(module, calls)
        norms = {path: calls[path].input_norms(weight(module, path)) for path in layers}
        masks = Masks(
            {path: torch.ones_like(weight(module, path), dtype=torch.bool) for path in layers},
            norms if self.importance == "activation" else {},
        ).to(run.device)
        if self.recover is None or self.pattern == "2:4":
            masks.choose(module, self.pattern, self.sparsity)
            masks.apply_to(module)
        if self.recover is not None:
            module = self._recover(Model(model.spec, module), run, self.recover, masks).module
        edit = Sparsity(self.pattern, self.sparsity, layers, EFFECT)
        broken = edit.broken(module)
        if broken:
            raise StepError(
                f"after fine-tuning {len(broken)} layers are not {self.pattern} ({', '.join(broken[:3])})"
            )
        self._report(module.cpu(), layers, dense, run)
        return with_module(model, module.eval(), edit)

    def _recover(self, model: Model, run: Run, recover: Distill, masks: Masks) -> Model:
        settings = {
            "pattern": self.pattern,
            "sparsity": self.sparsity,
            "importance": self.importance,
            "exclude": list(self.exclude),
        }
        objective = recover.objective(model, run)
        if self.pattern == "2:4":
            return fit(model, recover.train, run, SparseObjective(objective, masks, settings=settings))
        train = replace(recover.train, keep="last", patience=0)
        growing = SparseObjective(objective, masks, self.sparsity, self.ramp, {**settings, "ramp": self.ramp})
        return fit(model, train, run, growing)

    def _images(self, spec: InputSpec, run: Run) -> Iterator[Tensor]:
        """What the network is watched on: a blank image where only the order of its layers matters."""
        if self.importance == "magnitude":
            yield torch.zeros(1, spec.channels, *spec.size, device=run.device)
            return
        if run.data is None:
            raise StepError("importance 'activation' looks at images; pass data=…, or use 'magnitude'")
        split = run.data.train if run.data.train is not None else run.data.val
        images = calibration_images(split, spec, self.num_calibration, run.seed)
        for begin in range(0, len(images), _BATCH):
            yield normalize(images[begin : begin + _BATCH], spec).to(run.device)

    def _choose_layers(
        self, module: nn.Module, calls: Mapping[str, WeightCall]
    ) -> tuple[tuple[str, ...], dict[str, str]]:
        """Paths of the weights to make sparse, and why the others stay dense."""
        paths = list(calls)
        if not paths:
            raise StepError("the network has no convolution or linear layer with a weight of its own")
        ends = {"first": paths[0], "last": paths[-1]}
        dense: dict[str, str] = {}
        for pattern in self.exclude:
            matched = [ends[pattern]] if pattern in ends else [p for p in paths if _matches(p, pattern)]
            if not matched:
                raise StepError(
                    f"sparsify.exclude: {pattern!r} is no layer; there are {', '.join(map(_layer, paths[:5]))}, …"
                )
            dense |= dict.fromkeys(matched, pattern if pattern in ends else "excluded")
        for path in paths:
            channels = weight(module, path).shape[1]
            if self.pattern == "2:4" and path not in dense and channels % 4:
                dense[path] = f"{channels} input channels, no multiple of 4"
        layers = tuple(path for path in paths if path not in dense)
        if not layers:
            raise StepError(f"no layer can be {self.pattern}: {_list(dense)}")
        return layers, dense

    def _report(self, module: nn.Module, layers: tuple[str, ...], dense: Mapping[str, str], run: Run) -> None:
        share = zeros_of(module, layers)
        count = sum(weight(module, path).numel() for path in layers)
        total = sum(parameter.numel() for parameter in module.parameters())
        epochs = self.recover.train.epochs if self.recover is not None else 0
        run.progress.message(
            f"{self.pattern} sparsity: {100 * share:.1f}% of {count:,} weights in {len(layers)} layers are zero, "
            f"{100 * share * count / total:.1f}% of all ({EFFECT}); dense: {_list(dense)}"
        )
        steps = 0
        if run.data is not None and run.data.train is not None and self.recover is not None:
            steps = epochs * run.data.train.num_training_batches(self.recover.train.batch_size)
        run.log.write(steps, {"sparsity/zeros_in_layers": share, "sparsity/zeros": share * count / total})


def _layer(path: str) -> str:
    return path.removesuffix(".weight")


def _matches(path: str, pattern: str) -> bool:
    return fnmatch(_layer(path), pattern) or fnmatch(path, pattern)


def _list(dense: Mapping[str, str]) -> str:
    return ", ".join(f"{_layer(path)} ({reason})" for path, reason in dense.items()) or "none"
