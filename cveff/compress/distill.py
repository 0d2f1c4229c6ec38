"""`Distill`: training in which a larger network, by default the dense parent, shows what to answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from cveff.compress.distill_losses import hard_targets, relations, soft_targets
from cveff.compress.features import FeatureMatching
from cveff.compress.teacher import Teacher, check_teacher, find_teacher, fingerprint
from cveff.compress.teacher_cache import LogitsCache
from cveff.errors import StepError
from cveff.model import Model
from cveff.steps import Run
from cveff.train import Train
from cveff.train.loop import fit
from cveff.train.objective import CrossEntropy, Objective

Method = Literal["logits", "dist", "features", "hard", "function-matching"]

DIST_BETA, DIST_GAMMA = 1.0, 1.0
CACHE_FILE = "teacher-logits.bin"


def _default_training() -> Train:
    return Train(
        epochs=10,
        batch_size=64,
        optimizer="adamw",
        learning_rate=1e-3,
        weight_decay=0.05,
        label_smoothing=0.0,
    )


@dataclass(frozen=True)
class Distill:
    """Fine-tune with a teacher: the loss is `(1 - alpha) · cross-entropy + alpha · imitation`.

    Attributes:
        method: what is imitated. "logits": soft class probabilities, `T² KL(teacher ‖ student)` (Hinton et al.,
            arXiv:1503.02531). "dist": their correlations, over classes and over images (DIST, Huang et al.,
            arXiv:2205.10536). "features": outputs of layers of equal resolution, through linear adapters that are
            thrown away (FitNets, Romero et al., arXiv:1412.6550). "hard": the teacher's class (DeiT, Touvron et
            al., arXiv:2012.12877). "function-matching": "logits" alone, on mixed-up images, for a long time (Beyer
            et al., arXiv:2106.05237).
        alpha: weight of the imitation, 0 to 1; by default 0.5, and 1 for function matching. 0 is plain fine-tuning.
        temperature: T of "logits", "dist" and "function-matching".
        teacher: a saved model's or a run's folder, or a timm name; by default the run's teacher, which after any
            compression is the dense parent.
        teacher_weights: a state dict for a timm teacher, trained on the student's classes; by default timm
            downloads its own.
        cache_teacher: keep the teacher's logits by image, in the run's folder if it has one; for images that come
            back (no random resized crops, erasing or mixing), and not for "features".
        train: how to train; by default 10 epochs of AdamW at 1e-3 without label smoothing.

    Raises:
        StepError: at construction, for a value out of range or settings that contradict each other.
    """

    method: Method = "logits"
    alpha: float | None = None
    temperature: float = 4.0
    teacher: str | None = None
    teacher_weights: Path | None = None
    cache_teacher: bool = False
    train: Train = field(default_factory=_default_training)

    kind: ClassVar[str] = "distill"
    requires: ClassVar[tuple[str, ...]] = ("data",)

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise StepError(f"distill.method is {self.method!r}; give one of {', '.join(get_args(Method))}")
        if not 0 <= self.weight <= 1:
            raise StepError(f"distill.alpha is {self.alpha!r}; give a number from 0 to 1")
        if not 0 < self.temperature < float("inf"):
            raise StepError(f"distill.temperature is {self.temperature!r}; give a positive number")
        if self.teacher == "":
            raise StepError("distill.teacher is empty; give a folder or a timm name, or leave it out")
        if self.teacher_weights is not None and self.teacher is None:
            raise StepError("distill.teacher_weights needs distill.teacher, the name of their architecture")
        augmentation = self.train.augmentation
        if self.method == "function-matching":
            if self.weight != 1:
                raise StepError(
                    f"distill.alpha is {self.alpha}; function matching uses no labels: set it to 1 or leave it out"
                )
            if augmentation.mixup == 0:
                raise StepError(
                    "distill.train.augmentation.mixup is 0; function matching needs mixed images: set it to 1"
                )
        if self.cache_teacher and self.method == "features":
            raise StepError("distill.cache_teacher keeps logits, and 'features' uses none; set it to false")
        if self.cache_teacher and (
            augmentation.mixes or augmentation.erasing > 0 or augmentation.min_scale < 1
        ):
            raise StepError(
                "distill.cache_teacher: with mixup, cutmix, erasing or min_scale no image comes back, so no "
                "logits could be reused; turn it or them off"
            )

    def __call__(self, model: Model, run: Run) -> Model:
        """Train with the teacher and return the kept weights, in evaluation mode.

        Raises:
            StepError: no teacher, or one of other classes or without layers that match.
            TrainingError, CheckpointError: as `Train`.
        """
        return fit(model, self.train, run, self.objective(model, run))

    def check_run(self, run: Run) -> None:
        """Refuse a teacher of other classes before anything is trained.

        Raises:
            StepError, UnknownModelError: the teacher does not fit, or does not exist.
        """
        if self.weight > 0 and self.teacher is not None and run.data is not None:
            check_teacher(self.teacher, run.data.num_classes)

    @property
    def weight(self) -> float:
        """`alpha`, or the method's default."""
        if self.alpha is not None:
            return self.alpha
        return 1.0 if self.method == "function-matching" else 0.5

    def objective(self, model: Model, run: Run) -> Objective:
        """What `fit` is to minimise for `model`; at alpha 0 plain cross-entropy, without any teacher."""
        if self.weight == 0:
            return CrossEntropy(self.train.label_smoothing)
        return Imitation(
            self, model, find_teacher(self.teacher, self.teacher_weights, run.teacher, model.spec), run
        )


class Imitation(CrossEntropy):
    """The objective of `Distill`.

    Raises:
        StepError: "features", and no layers of the two networks match.
    """

    def __init__(self, settings: Distill, student: Model, teacher: Model, run: Run) -> None:
        super().__init__(settings.train.label_smoothing)
        self._settings, self._alpha = settings, settings.weight
        self._teacher = Teacher(teacher, student.spec.input, run.device)
        self._fingerprint = fingerprint(teacher)
        self._cache: LogitsCache | None = None
        self._matching: FeatureMatching | None = None
        if settings.method == "features":
            self._matching = FeatureMatching(
                student.module.to(run.device), student.spec.input, self._teacher, teacher.spec.input, run.seed
            )
            self.extra = self._matching
        if settings.cache_teacher:
            path = None if run.folder is None else run.folder / CACHE_FILE
            self._cache = LogitsCache(path, self._cache_identity(student, run), self._teacher.num_classes)

    @property
    def teacher(self) -> nn.Module:
        """The network that is imitated."""
        return self._teacher.module

    def loss(self, module: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """`(1 - alpha) · cross-entropy + alpha · imitation`, summed over the images."""
        if self._matching is not None:
            logits, imitation = self._matching(module, images)
        else:
            logits = module(images)
            imitation = self._imitation(logits.float(), self._teacher(images, self._cache))
        if self._alpha == 1:
            return imitation  # type: ignore[no-any-return]
        return (1 - self._alpha) * self.of_logits(logits, targets) + self._alpha * imitation

    def identity(self) -> Mapping[str, Any]:
        """The settings that shape the loss, and which teacher."""
        settings = self._settings
        return {
            "method": settings.method,
            "alpha": self._alpha,
            "temperature": settings.temperature,
            "teacher": self._fingerprint,
        }

    def _imitation(self, student: Tensor, teacher: Tensor) -> Tensor:
        method, temperature = self._settings.method, self._settings.temperature
        if method == "hard":
            return hard_targets(student, teacher)
        if method == "dist":
            return relations(student, teacher, temperature, DIST_BETA, DIST_GAMMA)
        return soft_targets(student, teacher, temperature)

    def _cache_identity(self, student: Model, run: Run) -> str:
        """What decides the batches, and so the last bits of logits, besides the images themselves."""
        train = self._settings.train
        return json.dumps(
            {
                "teacher": self._fingerprint,
                "input": student.spec.input.to_json(),
                "device": run.device.type,
                "precision": train.precision,
                "batch": [train.batch_size, train.accumulation],
                "augmentation": repr(train.augmentation),
                "seed": run.seed,
            }
        )
