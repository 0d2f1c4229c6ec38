"""`Train`: the settings of a training run, as a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cveff.data.augment import Augmentation
from cveff.errors import TrainingError
from cveff.model import Model
from cveff.steps import Run
from cveff.train.budget import parse_duration
from cveff.train.curriculum import Curriculum
from cveff.train.distributed import Distributed
from cveff.train.feed import Difficulty
from cveff.train.galore_settings import GaLore
from cveff.train.growth.event import Growth, check_schedule
from cveff.train.importance import Importance
from cveff.train.loop import fit
from cveff.train.resolution import Resolution
from cveff.train.selection import Selection
from cveff.train.token_drop import TokenDrop

DEFAULT_LEARNING_RATE = {"sgd": 0.1, "adamw": 1e-3, "muon": 0.02, "galore": 1e-3}


@dataclass(frozen=True)
class Train:
    """Train all weights on the run's data.

    Attributes:
        epochs: passes over the training images; 0 leaves the weights alone.
        budget: wall-clock time such as "10m", in place of `epochs`: the schedule ends with it, validation, saving
            and what the run scores afterwards included. `epochs` then only says what share `warmup_epochs` is.
        batch_size: images an optimizer step sees.
        accumulation: parts a batch is computed in, to save memory; must divide `batch_size`.
        optimizer: "sgd" (Nesterov momentum), "adamw", "muon" (Muon for hidden weight matrices and
            convolutions, AdamW for the rest), or "galore" (AdamW with low-rank state for the same).
        learning_rate: peak; by default 0.1 (sgd), 1e-3 (adamw, galore), 0.02 (muon).
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
        difficulty: how difficulties are measured, for the next three.
        curriculum: draw easy images first.
        selection: train on a part of the images only.
        importance: draw images from which more is to be learned more often.
        resolution: train on smaller images first.
        token_drop: let the blocks of a vision transformer see a part of the tokens (random-LTD).
        galore: settings of the optimizer "galore".
        checkpoint_activations: keep each block's input alone and compute the rest again in the backward pass: less
            memory, about a third more time, the same weights.
        distributed: how several processes share the work that `torchrun` started.
        offload_optimizer: keep the optimizer's state in the CPU's memory and step there; for a GPU.

    Raises:
        TrainingError: at construction, for a value out of range or settings that contradict each other.
    """

    epochs: int = 30
    batch_size: int = 128
    accumulation: int = 1
    optimizer: Literal["sgd", "adamw", "muon", "galore"] = "sgd"
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
    budget: str | None = None
    difficulty: Difficulty = field(default_factory=Difficulty)
    curriculum: Curriculum | None = None
    selection: Selection | None = None
    importance: Importance | None = None
    resolution: Resolution | None = None
    token_drop: TokenDrop | None = None
    galore: GaLore = field(default_factory=GaLore)
    checkpoint_activations: bool = False
    offload_optimizer: bool = False
    distributed: Distributed = field(default_factory=Distributed)

    kind: ClassVar[str] = "train"
    requires: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        self._check("epochs", self.epochs >= 0, "0 or more")
        self._check("batch_size", self.batch_size >= 2, "2 or more (batch norm needs more than one image)")
        self._check("accumulation", self.accumulation >= 1, "1 or more")
        self._check("optimizer", self.optimizer in DEFAULT_LEARNING_RATE, "sgd, adamw, muon or galore")
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
        if self.budget is not None:
            parse_duration(self.budget)
            self._check("patience", self.patience == 0, "0 with a budget, which says itself when to stop")
            self._check("epochs", self.epochs > 0, "1 or more with a budget")
        self._check_together("curriculum", "importance", "both say which images are drawn")
        self._check_together("resolution", "token_drop", "both change the number of tokens")
        if self.importance is not None and self.augmentation.mixes:
            raise TrainingError("train.importance weighs single images; turn mixup and cutmix off")
        check_schedule(self.grow)
        self._check_growth()
        if self.mup_base_width is not None:
            others = {"grow": self.grow, "offload_optimizer": self.offload_optimizer}
            others[f"optimizer = {self.optimizer!r}"] = self.optimizer not in ("sgd", "adamw")
            for other in (name for name, is_set in others.items() if is_set):
                raise TrainingError(
                    f"train.mup_base_width cannot be combined with train.{other}; leave one out"
                )
        if self.batch_size % self.accumulation:
            raise TrainingError(
                f"train.accumulation {self.accumulation} does not divide train.batch_size {self.batch_size}; "
                "choose a divisor"
            )
        if self.offload_optimizer and (self.precision == "fp16" or self.galore.layerwise):
            raise TrainingError(
                "train.offload_optimizer steps on the CPU after the backward pass, which neither precision 'fp16' nor "
                "galore.layerwise can; turn one off"
            )
        self._check_galore(self.galore)
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

    def _check_together(self, first: str, second: str, reason: str) -> None:
        if getattr(self, first) is not None and getattr(self, second) is not None:
            raise TrainingError(f"train.{first} and train.{second}: {reason}; leave one out")

    def _check_growth(self) -> None:
        """What is fitted to the network as it is at the start, or to a known number of steps, cannot follow growth."""
        excluded = ("budget", "resolution", "token_drop", "checkpoint_activations", "offload_optimizer")
        fitted = [name for name in excluded if getattr(self, name)]
        fitted += ["optimizer = 'galore'"] if self.optimizer == "galore" else []
        if self.grow and fitted:
            raise TrainingError(f"train.grow cannot be combined with train.{fitted[0]}; leave one out")

    def _check_galore(self, galore: GaLore) -> None:
        if self.optimizer != "galore" and galore != GaLore():
            raise TrainingError(
                f"train.galore is set and train.optimizer is {self.optimizer!r}; use 'galore', or leave it out"
            )
        conflicts = {
            "accumulation": self.accumulation > 1,
            "clip_norm": self.clip_norm > 0,
            "precision": self.precision == "fp16",
        }
        for name, conflict in conflicts.items():
            if galore.layerwise and conflict:
                raise TrainingError(
                    f"train.{name} is {getattr(self, name)!r}, and train.galore.layerwise updates each weight before "
                    f"all gradients are there; set layerwise to false, or leave {name} out"
                )

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise TrainingError(f"train.{name} is {getattr(self, name)!r}; give {wanted}")
