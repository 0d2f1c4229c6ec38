"""`Train`: the settings of a training run, as a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cveff.data.augment import Augmentation
from cveff.errors import TrainingError
from cveff.model import Model
from cveff.steps import Run
from cveff.train.growth.event import Growth, check_schedule
from cveff.train.loop import fit

DEFAULT_LEARNING_RATE = {"sgd": 0.1, "adamw": 1e-3, "muon": 0.02}


@dataclass(frozen=True)
class Train:
    """Train all weights on the run's data.

    Attributes:
        epochs: passes over the training images; 0 leaves the weights alone.
        batch_size: images an optimizer step sees.
        accumulation: parts a batch is computed in, to save memory; must divide `batch_size`.
        optimizer: "sgd" (Nesterov momentum), "adamw", or "muon" (Muon for hidden weight matrices and
            convolutions, AdamW for the rest).
        learning_rate: peak; by default 0.1 (sgd), 1e-3 (adamw), 0.02 (muon).
        weight_decay: on weights with two or more dimensions; never on biases, norms and scales.
        momentum: of sgd and muon.
        schedule: "cosine" to zero, "one-cycle" (cosine up for 30%, then down; Smith 2018), "triangular"
            (linear up for 20%, linear down), or "constant".
        warmup_epochs: linear warm-up before "cosine" and "constant"; the other two rise by themselves.
        label_smoothing: share of the target spread over all classes.
        ema: decay of the moving average of weights, which is then what is validated and kept; 0: none.
            Early on the decay is (1 + step) / (10 + step), so that the start is forgotten.
        clip_norm: limit on the norm of all gradients; 0: none.
        precision: "fp32", "bf16", "fp16" (GPU only, with loss scaling), or "auto": bf16 where the device computes in
            it, otherwise fp32.
        keep: "best" weights by validation accuracy, or "last".
        patience: stop after this many epochs without a better validation accuracy; 0: never.
        validate_every: epochs between validations; the last epoch is always validated.
        num_workers: processes that decode images of a streamed set.
        checkpoint_minutes: also keep the state within an epoch, this often.
        grow: begin with a small network and enlarge it on the way, without changing what it computes; see `Growth`.
            Only weights of the last network are kept, whatever `keep` says of earlier ones.
        mup_base_width: the width at which the learning rate was found (a ViT's embed_dim, or channels of each stage);
            initial weights and rates are then µP's, under which it suits every width. It scales the weights it is
            given, so it is for training from scratch.
        augmentation: what happens to training images.

    Raises:
        TrainingError: at construction, for a value out of range or settings that contradict each other.
    """

    epochs: int = 30
    batch_size: int = 128
    accumulation: int = 1
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    learning_rate: float | None = None
    weight_decay: float = 5e-4
    momentum: float = 0.9
    schedule: Literal["cosine", "one-cycle", "triangular", "constant"] = "cosine"
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.1
    ema: float = 0.0
    clip_norm: float = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    keep: Literal["best", "last"] = "best"
    patience: int = 0
    validate_every: int = 1
    num_workers: int = 0
    checkpoint_minutes: float = 5.0
    grow: tuple[Growth, ...] = ()
    mup_base_width: int | tuple[int, ...] | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)

    kind: ClassVar[str] = "train"
    requires: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        self._check("epochs", self.epochs >= 0, "0 or more")
        self._check("batch_size", self.batch_size >= 2, "2 or more (batch norm needs more than one image)")
        self._check("accumulation", self.accumulation >= 1, "1 or more")
        self._check("optimizer", self.optimizer in DEFAULT_LEARNING_RATE, "sgd, adamw or muon")
        self._check(
            "learning_rate", self.learning_rate is None or self.learning_rate > 0, "a positive number"
        )
        self._check("weight_decay", self.weight_decay >= 0, "0 or more")
        self._check("momentum", 0 <= self.momentum < 1, "a number in [0, 1)")
        self._check(
            "schedule", self.schedule in ("cosine", "one-cycle", "triangular", "constant"), "a known schedule"
        )
        self._check("warmup_epochs", self.warmup_epochs >= 0, "0 or more")
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "a number in [0, 1)")
        self._check("ema", 0 <= self.ema < 1, "a decay in [0, 1)")
        self._check("clip_norm", self.clip_norm >= 0, "0 or more")
        self._check(
            "precision", self.precision in ("auto", "fp32", "bf16", "fp16"), "auto, fp32, bf16 or fp16"
        )
        self._check("keep", self.keep in ("best", "last"), "best or last")
        self._check("patience", self.patience >= 0, "0 or more")
        self._check("validate_every", self.validate_every >= 1, "1 or more")
        self._check("num_workers", self.num_workers >= 0, "0 or more")
        self._check("checkpoint_minutes", self.checkpoint_minutes > 0, "a positive number")
        check_schedule(self.grow)
        if self.mup_base_width is not None and (self.grow or self.optimizer == "muon"):
            other = "train.grow" if self.grow else "muon, whose steps do not depend on the width"
            raise TrainingError(f"train.mup_base_width cannot be combined with {other}; leave one out")
        if self.batch_size % self.accumulation:
            raise TrainingError(
                f"train.accumulation {self.accumulation} does not divide train.batch_size {self.batch_size}; "
                "choose a divisor"
            )
        if self.warmup_epochs > self.epochs > 0:
            raise TrainingError(
                f"train.warmup_epochs {self.warmup_epochs} is longer than train.epochs {self.epochs}; shorten it"
            )

    def __call__(self, model: Model, run: Run) -> Model:
        """Train and return the kept weights, in evaluation mode.

        Raises:
            TrainingError: the loss is no longer finite, or a state to resume from does not fit these settings.
        """
        return fit(model, self, run)

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or the optimizer's default."""
        return DEFAULT_LEARNING_RATE[self.optimizer] if self.learning_rate is None else self.learning_rate

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise TrainingError(f"train.{name} is {getattr(self, name)!r}; give {wanted}")
