"""The tables of a recipe that say which network, which images and what to make of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from cveff.errors import RecipeError


@dataclass(frozen=True)
class ModelSettings:
    """The network.

    Attributes:
        architecture: a timm name, or one of cveff's own; by default small_resnet_s for images up to 64 pixels
            and mobilenetv4_conv_small for larger ones.
        image_size: side in pixels, or [height, width]; by default the images' own size up to 64 pixels, and
            what the architecture was designed for above.
        channels: 1 (grey) or 3 (RGB); by default what the images have.
        enlarge: whether images smaller than image_size are enlarged; by default only where all images share
            a smaller size. Off, such an image is an error, because a model of large images is silently wrong on it.
        arguments: keyword arguments of timm.create_model, such as drop_path_rate.
        weights: a .safetensors or .pth file to start from; its classes must be the data's.
        pretrained: let timm download its weights (needs a network); the classifier is replaced to fit the data.
        checkpoint: a trained model to start from, which brings its own architecture, input and weights: a saved
            model's or a run's folder, or a zoo card's name. Its classes must be the data's; excludes every other key.
    """

    architecture: str | None = None
    image_size: int | tuple[int, int] | None = None
    channels: Literal[1, 3] | None = None
    enlarge: bool | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None
    pretrained: bool = False
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        self._check_checkpoint()
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        if any(side is not None and side < 1 for side in sides):
            raise RecipeError(f"image_size: {self.image_size!r} is not a positive number of pixels")
        if self.pretrained and self.weights is not None:
            raise RecipeError("pretrained: cannot be combined with weights; remove one of the two")
        for name in ("num_classes", "in_chans", "img_size"):
            if name in self.arguments:
                raise RecipeError(
                    f"arguments.{name}: is set from the data, image_size and channels; remove it"
                )

    @property
    def has_weights(self) -> bool:
        """Whether the network starts trained."""
        return self.weights is not None or self.pretrained or self.checkpoint is not None

    def _check_checkpoint(self) -> None:
        if self.checkpoint is None:
            return
        if not self.checkpoint:
            raise RecipeError("checkpoint: is empty; give a saved model's folder, or a zoo card's name")
        for item in fields(self):
            if item.name != "checkpoint" and getattr(self, item.name) not in (None, False, {}):
                raise RecipeError(f"{item.name}: comes from the checkpoint; remove one of the two")


@dataclass(frozen=True)
class DataSettings:
    """The images.

    Attributes:
        source: a known name (digits, fashion-mnist, cifar10, cifar100), an image folder, or WebDataset shards.
            A relative path starts at the folder the command runs in.
        on_bad_image: "error" stops at the first file that is not a readable image; "skip" counts and reports them.
        val_fraction: share of the training images held out where the data have no validation split.
    """

    source: str
    on_bad_image: Literal["error", "skip"] = "error"
    val_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not self.source:
            raise RecipeError("source: is empty; give a data set's name or a folder")
        if not 0 < self.val_fraction < 1:
            raise RecipeError(f"val_fraction: {self.val_fraction!r} does not lie between 0 and 1")


@dataclass(frozen=True)
class DeploySettings:
    """What the model is made into.

    Attributes:
        target: a device profile's name (cveff targets), or a profile's .toml file.
        max_accuracy_drop: points of accuracy (of top-1 disagreement where there are no labels) that the shipped
            file may lose against the trained model.
        calibration: a folder of unlabelled images for int8; by default images of the training split.
        num_calibration: how many images int8 is calibrated on.
        out: the bundle's folder; by default model.bundle in the run's folder.
    """

    target: str = "edge-cpu"
    max_accuracy_drop: float = 1.0
    calibration: Path | None = None
    num_calibration: int = 256
    out: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.max_accuracy_drop <= 100:
            raise RecipeError(
                f"max_accuracy_drop: {self.max_accuracy_drop!r} is not a number of points, 0 to 100"
            )
        if self.num_calibration < 1:
            raise RecipeError(f"num_calibration: {self.num_calibration!r} is not a positive number of images")
