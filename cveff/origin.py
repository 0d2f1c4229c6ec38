"""What a checkpoint was trained with, where its run recorded it: the images, their split, the seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cveff import model_zoo
from cveff.data.dataset import OnBadImage
from cveff.errors import RecipeError
from cveff.recipe import DataSettings, Recipe, read_recipe
from cveff.subject import is_architecture, saved_folder


def check_checkpoint(checkpoint: str) -> None:
    """
    Raises:
        RecipeError: this is neither a saved model nor a zoo card.
    """
    if is_architecture(checkpoint):
        raise RecipeError(
            f"{checkpoint} is neither a saved model nor a zoo card; give a folder that `cveff train` or cveff.save "
            "wrote (`cveff models` lists the cards)"
        )


def origin_of(checkpoint: str) -> Recipe | None:
    """The recipe that made a checkpoint, where it is known."""
    folder = saved_folder(checkpoint)
    if folder is None:
        training = model_zoo.card(checkpoint).training if checkpoint in model_zoo.names() else None
        if training is None or training.recipe is None:
            return None
        return read_recipe(Path(training.recipe).stem)
    records = (path / "recipe.json" for path in (folder, folder.parent))
    record = next((path for path in records if path.is_file()), None)
    return None if record is None else read_recipe(record)


def images_for(
    checkpoint: str, data: str | None, on_bad_image: OnBadImage | None, origin: Recipe | None
) -> DataSettings:
    """The images to work with: those that are named, or the checkpoint's own.

    Raises:
        RecipeError: none are named, and the checkpoint does not record its own.
    """
    if origin is not None and data in (None, origin.data.source):
        images = origin.data
    elif data is not None:
        images = DataSettings(data)
    else:
        raise RecipeError(f"{checkpoint} does not record the images it was trained on; give --data")
    return images if on_bad_image is None else replace(images, on_bad_image=on_bad_image)


def name_of(checkpoint: str) -> str:
    """What to call what is made of a checkpoint: its run's name."""
    path = Path(checkpoint)
    name = path.parent.name if path.name == "model" and path.parent.name else path.name
    return name or "model"
