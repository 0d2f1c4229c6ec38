"""cveff's exceptions, all derived from `CveffError`; those of the torch-free runtime are re-exported."""

from __future__ import annotations

from cveff.runtime.errors import BundleError, CveffError, EngineError, ImageError, InputSizeError

__all__ = [
    "BundleError",
    "CacheError",
    "CheckpointError",
    "CveffError",
    "DataError",
    "EngineError",
    "ExportError",
    "ImageError",
    "InputSizeError",
    "KernelError",
    "MissingDependencyError",
    "RecipeError",
    "StepError",
    "TargetError",
    "TrainingError",
    "UnknownModelError",
]


class UnknownModelError(CveffError):
    """No architecture has this name; the message lists close matches."""


class CheckpointError(CveffError):
    """A saved model or training state is damaged, incomplete or belongs to another architecture."""


class CacheError(CveffError):
    """A key-value cache is asked for what its policy, its storage or the model does not allow."""


class DataError(CveffError):
    """A data set is missing, empty, mislabelled or cannot be read."""


class ExportError(CveffError):
    """A model could not be exported, or the exported file does not agree with it."""


class KernelError(CveffError):
    """Tensors that an operation has no meaning for, or an implementation of it that cannot run here."""


class RecipeError(CveffError):
    """A recipe has an unknown key, a wrong type or an impossible combination; the key's path is named."""


class TargetError(CveffError):
    """A target profile is unknown or invalid, or no candidate meets its limits."""


class StepError(CveffError):
    """A step lacks something it needs, or cannot be applied to this model."""


class TrainingError(CveffError):
    """Training cannot go on: a loss that is not finite, or a state that does not fit the recipe."""


class MissingDependencyError(CveffError):
    """An optional package is needed; the message says which extra installs it."""
