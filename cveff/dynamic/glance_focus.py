"""`GlanceFocus`: a look at the whole image made small, then crops at full resolution where it matters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch

from cveff.dynamic.early_exit import default_training
from cveff.dynamic.exit_objective import Method, check_settings
from cveff.dynamic.exits import NetworkWithExits
from cveff.dynamic.views import Views
from cveff.errors import StepError
from cveff.model import Model, with_module
from cveff.runtime.errors import first_line
from cveff.steps import Run
from cveff.train import Train
from cveff.train.loop import fit

Where = Literal["activation", "learned"]


@dataclass(frozen=True)
class GlanceFocus:
    """Look at the whole image made small, and at crops of full resolution only while the answer is not certain.

    One network sees every view; an exit's logits are the mean over the views so far (Glance and Focus: Wang et al.,
    NeurIPS 2020, arXiv:2010.05300, which has a second network for crops and a recurrent classifier instead).
    `cveff.deploy` makes a staged bundle of it, in which images leave where they are certain.

    Attributes:
        view: side of the small copy and the crops in pixels, or (height, width); by default half the image's, rounded
            up.
        crops: how many crops there are at most; each is one more run of the network.
        policy: "activation": crops lie where the glance's classifier is most active for the class it found (class
            activation: Zhou et al., CVPR 2016, equation 2). "learned": where two layers on the glance's features
            expect the network to be right. Each crop lies away from those before it.
        method: "joint": the sum of the exits' cross-entropies. "distill": early exits also imitate the last.
        alpha, temperature: of "distill": weight of the imitation, and what logits are divided by.
        train: how to train; None keeps the weights, which have seen neither small copies nor crops, and leaves a
            learned policy random.

    Unsupported: networks without timm's `forward_features` and `forward_head`, those whose features are neither one map
    nor tokens of a grid, and those that take images of one size only and have no `set_input_size`.

    Raises:
        StepError: at construction, for a value out of range.
    """

    view: int | tuple[int, int] | None = None
    crops: int = 1
    policy: Where = "activation"
    method: Method = "joint"
    alpha: float = 0.5
    temperature: float = 4.0
    train: Train | None = field(default_factory=default_training)

    kind: ClassVar[str] = "glance_focus"
    requires: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        sides = self.view if isinstance(self.view, tuple) else (1 if self.view is None else self.view,)
        if min(sides) < 1:
            raise StepError(f"glance_focus.view is {self.view!r}; give a positive number of pixels")
        if self.crops < 1:
            raise StepError(f"glance_focus.crops is {self.crops!r}; give 1 or more")
        if self.policy not in get_args(Where):
            raise StepError(
                f"glance_focus.policy is {self.policy!r}; give one of {', '.join(get_args(Where))}"
            )
        check_settings(self.kind, self)

    def check_run(self, run: Run) -> None:
        """Refuse to train without images.

        Raises:
            StepError: there are none.
        """
        if self.train is not None and self.train.epochs and (run.data is None or run.data.train is None):
            raise StepError(
                "GlanceFocus trains, which needs data; pass data=… with a training split, or train=None"
            )

    def __call__(self, model: Model, run: Run) -> Model:
        """Put the network behind its views, and train.

        Raises:
            StepError: the view is larger than the image, the network has exits already, or cannot look at views.
            TrainingError, CheckpointError: as `Train`.
        """
        self.check_run(run)
        spec = model.spec
        if isinstance(model.module, NetworkWithExits):
            raise StepError(f"{spec.architecture} has exits already; start from the model without them")
        edit = Views(
            size=spec.input.size,
            view=self._view(spec.input.size),
            crops=self.crops,
            policy=self.policy,
            method=self.method,
            alpha=self.alpha,
            temperature=self.temperature,
        )
        made = _made(model, edit, run.seed)
        run.progress.message(
            f"{edit.crops + 1} views of {edit.view[0]}×{edit.view[1]}, of images of "
            f"{edit.size[0]}×{edit.size[1]}"
        )
        return made if self.train is None else fit(made, self.train, run)

    def _view(self, size: tuple[int, int]) -> tuple[int, int]:
        view = ((size[0] + 1) // 2, (size[1] + 1) // 2) if self.view is None else self.view
        view = (view, view) if isinstance(view, int) else view
        if view[0] > size[0] or view[1] > size[1]:
            raise StepError(f"glance_focus.view is {view}, larger than the model's images {size}; give less")
        return view


def _made(model: Model, edit: Views, seed: int) -> Model:
    """`model` with `edit`, tried on two blank images.

    Raises:
        StepError: the network cannot be given views, or has no features that belong to places.
    """
    spec, was_training = model.spec.input, model.module.training
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = with_module(model, edit.apply(model.module), edit)
        like = next(made.module.parameters())
        with torch.no_grad():
            made.module.eval()(
                torch.zeros(2, spec.channels, *spec.size, device=like.device, dtype=like.dtype)
            )
    except Exception as error:  # whatever the network's own code raises
        raise StepError(
            f"{model.spec.architecture} cannot look at views of {edit.view}: {first_line(error)}; use another view, or "
            "a network that takes images of any size"
        ) from error
    made.module.train(was_training)
    return made
