"""One phase of incubation as a task that any process or machine can do: files in, a file out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cveff.data.dataset import Data
from cveff.errors import CheckpointError, StepError
from cveff.log import FileLog
from cveff.model import Model, load, with_module
from cveff.progress import Progress, Silent
from cveff.steps import Run
from cveff.train.flops import training_flops
from cveff.train.incubation.parts import Part, reduced
from cveff.train.loop import fit
from cveff.train.objective import CrossEntropy
from cveff.train.state import differences, load_state, save_state, since_added

if TYPE_CHECKING:
    from cveff.train.train import Train


@dataclass(frozen=True)
class Phase:
    """Training the meta model, or one module within it.

    Attributes:
        name: "meta", "module-0", …; also its folder's.
        folder: of the whole incubation; `start/` there is the network as it was given.
        parts: the network's modules.
        index: of the module that is whole and trained; None: none is whole, and all is trained.
        train: how.
        data, seed, device: as a `Run`'s.
        resume: continue from what the folder holds.
        threads: torch's, in a process of its own; 0: as they are.
    """

    name: str
    folder: Path
    parts: tuple[Part, ...]
    index: int | None
    train: Train
    data: Data
    seed: int
    device: torch.device
    resume: bool
    threads: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a phase gave.

    Attributes:
        tensors: the trained tensors, by name in the state dict: of the module, or of the meta model.
        figures: "seconds" on the clock, of the last go of a phase that was resumed; "flops" of all its training;
            "resumed".
    """

    tensors: Mapping[str, Tensor]
    figures: Mapping[str, float]


class Incubation(CrossEntropy):
    """Cross-entropy under which all but one module is frozen: in evaluation mode, so that its batch norms keep their
    statistics and no path is dropped; that it has no gradients is `Phase`'s doing.

    Args:
        label_smoothing: share of the target spread over all classes.
        frozen: the other modules.
    """

    def __init__(self, label_smoothing: float, frozen: tuple[Part, ...]) -> None:
        super().__init__(label_smoothing)
        self._paths = [path for part in frozen for path in (*part.blocks, *part.layers)]

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of `module`'s logits, summed over the images."""
        for path in self._paths:
            module.get_submodule(path).eval()
        return super().loss(module, images, targets)


def do(phase: Phase, progress: Progress | None = None) -> Outcome:
    """Do a phase, or read what an earlier go at it left, and write `outcome.safetensors` into its folder.

    Raises:
        CheckpointError: `resume`, and the folder holds a phase with other settings.
        StepError: training changed something that was frozen.
        TrainingError: as `Train`.
    """
    if phase.threads:
        torch.set_num_threads(phase.threads)
    folder = phase.folder / phase.name
    path = folder / "outcome.safetensors"
    start = load(phase.folder / "start")
    identity = {
        "train": asdict(phase.train),
        "model": start.spec.to_json(),
        "modules": len(phase.parts),
        "seed": phase.seed,
    }
    if phase.resume and path.is_file():
        state = load_state(path)
        before = since_added(state.get("identity", {}), {"train": asdict(type(phase.train)())})
        if changed := differences(before, identity):
            raise CheckpointError(
                f"{path} was written with other settings ({changed}); resume with the same ones, or train into "
                "another folder"
            )
        return Outcome(state["tensors"], state["figures"])
    outcome = _train(phase, _within_meta(phase, start), folder, progress or Silent())
    save_state(
        path, {"identity": identity, "tensors": dict(outcome.tensors), "figures": dict(outcome.figures)}
    )
    return outcome


def _within_meta(phase: Phase, model: Model) -> Model:
    """What is trained: the module's own blocks as they were given, all else from the trained meta model."""
    if phase.index is not None and len(phase.parts) > 1:
        mine = phase.parts[phase.index]
        meta = load_state(phase.folder / "meta" / "outcome.safetensors")["tensors"]
        weights = {name: value for name, value in meta.items() if not mine.is_in_blocks(name)}
        model.module.load_state_dict(weights, strict=False)
    edit = reduced(phase.parts, phase.index)
    return with_module(model, edit.apply(model.module), edit) if edit.modules else model


def _train(phase: Phase, model: Model, folder: Path, progress: Progress) -> Outcome:
    module, frozen = (
        model.module,
        tuple(part for index, part in enumerate(phase.parts) if index != phase.index),
    )
    names = {name for part in frozen for name in part.tensors} if phase.index is not None else set()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in names)
    before = {name: value.clone() for name, value in module.state_dict().items() if name in names}
    flops = training_flops(module, model.spec.input)
    objective = Incubation(phase.train.label_smoothing, frozen) if names else None
    with FileLog(folder) as log:
        run = Run(
            data=phase.data,
            device=phase.device,
            seed=phase.seed,
            progress=progress,
            log=log,
            folder=folder,
            resume=phase.resume,
        )
        resumed = phase.resume and (folder / "state.safetensors").is_file()
        started = time.monotonic()
        module = fit(model, phase.train, run, objective).module
        seconds = time.monotonic() - started
    after = module.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    if changed:
        raise StepError(
            f"{phase.name}: training changed {changed[0]}, which was frozen; the module does not fit"
        )
    mine = {name for name in after if name not in names}
    return Outcome(
        {name: value for name, value in after.items() if name in mine},
        {
            "seconds": seconds,
            "flops": flops * images_of(phase.train, phase.data),
            "resumed": float(resumed),
        },
    )


def images_of(train: Train, data: Data) -> int:
    """Images that training sees, each as often as it does."""
    assert data.train is not None
    return train.epochs * data.train.num_training_batches(train.batch_size) * train.batch_size
