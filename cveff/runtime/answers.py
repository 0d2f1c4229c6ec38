"""What `run.py` says about a batch of images, by task, in JSON values and in a line for people."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .engine import Engine
from .errors import CveffError
from .placement import UNSEEN, place
from .reuse import FeatureReuse

Size = tuple[int, int]
"""(height, width) of a photograph."""


@dataclass(frozen=True)
class Settings:
    """What to say.

    Attributes:
        top_k: classes of an image; of a detector, detections.
        min_score: detections below it are left out.
        masks: folder for the masks of a segmentation network, PNG files whose pixels are class indices.
        reuse: the images are a video's frames, in order, through a staged bundle.
    """

    top_k: int = 5
    min_score: float = 0.5
    masks: Path | None = None
    reuse: FeatureReuse | None = None


def answers(
    engine: Engine, pixels: np.ndarray, sizes: Sequence[Size], names: Sequence[str], settings: Settings
) -> list[dict[str, Any]]:
    """One dict an image: `{"predictions"}`, `{"detections"}` or `{"classes"}`, most probable first; of a staged bundle
    also `"stage"`, the name of the one it left at.

    Args:
        pixels: (N, H, W, C) uint8, such as `preprocess` returns.
        sizes: of the photographs that they were made from.
        names: of the photographs, for the masks' file names.

    Raises:
        CveffError: a mask cannot be written.
    """
    if engine.task == "detection":
        found = engine.detect(pixels)
        return [
            {"detections": _detections(engine, image, size, settings)}
            for image, size in zip(found, sizes, strict=True)
        ]
    if engine.task == "segmentation":
        return [
            _segmentation(engine, mask, size, name, settings)
            for mask, size, name in zip(engine.segment(pixels), sizes, names, strict=True)
        ]
    if engine.cascade is not None:
        probabilities, left = engine.staged(pixels, settings.reuse)
        return [
            {
                "predictions": _predictions(engine, row, settings.top_k),
                "stage": engine.cascade.stages[stage].name,
            }
            for row, stage in zip(probabilities, left, strict=True)
        ]
    return [
        {"predictions": _predictions(engine, row, settings.top_k)} for row in engine.probabilities(pixels)
    ]


def line(result: Mapping[str, Any]) -> str:
    """An image's answer in words, without its path."""
    if "predictions" in result:
        words = [f"{_word(item)} {100 * item['probability']:.1f}%" for item in result["predictions"]]
    elif "detections" in result:
        words = [
            f"{_word(item)} {100 * item['score']:.1f}% at {' '.join(f'{side:.0f}' for side in item['box'])}"
            for item in result["detections"]
        ] or ["nothing"]
    else:
        words = [f"{_word(item)} {100 * item['share']:.1f}% of the pixels" for item in result["classes"]]
        words += [f"mask {result['mask']}"] if result["mask"] else []
    return "   ".join(words)


def _word(item: Mapping[str, Any]) -> str:
    return " ".join(item["label"].split())


def _predictions(engine: Engine, row: np.ndarray, top_k: int) -> list[dict[str, Any]]:
    best = np.argsort(-row, kind="stable")[:top_k]
    return [
        {"label": engine.labels[index], "index": int(index), "probability": float(row[index])}
        for index in best
    ]


def _detections(
    engine: Engine, found: Mapping[str, np.ndarray], size: Size, settings: Settings
) -> list[dict[str, Any]]:
    """Boxes are of the photograph: left, top, right, bottom in its pixels."""
    boxes = place(*size, engine.spec).boxes(found["boxes"])
    return [
        {
            "label": engine.labels[label],
            "index": int(label),
            "score": float(score),
            "box": [round(float(side), 2) for side in box],
        }
        for box, score, label in zip(boxes, found["scores"], found["labels"], strict=True)
        if score >= settings.min_score
    ][: settings.top_k]


def _segmentation(
    engine: Engine, mask: np.ndarray, size: Size, name: str, settings: Settings
) -> dict[str, Any]:
    mask = place(*size, engine.spec).mask(mask)
    counts = np.bincount(mask[mask != UNSEEN], minlength=1)
    largest = [index for index in np.argsort(-counts, kind="stable") if counts[index]][: settings.top_k]
    path = None if settings.masks is None else _write_mask(mask, settings.masks, Path(name).stem)
    return {
        "classes": [
            {
                "label": engine.labels[index],
                "index": int(index),
                "share": float(counts[index] / counts.sum()),
            }
            for index in largest
        ],
        "mask": None if path is None else str(path),
    }


def _write_mask(mask: np.ndarray, folder: Path, stem: str) -> Path:
    """`folder/stem.png`, or with a number where that exists: class indices with a colour each, atomically."""
    image = Image.fromarray(mask)
    image.putpalette(_palette())
    path, number = folder / f"{stem}.png", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".mask-") as temporary:
            whole = Path(temporary) / path.name
            image.save(whole)
            whole.replace(path)
    except OSError as error:
        raise CveffError(
            f"cannot write {path}: {error.strerror or error}; give another --masks folder"
        ) from error
    return path


def _palette() -> list[int]:
    """Pascal VOC's colours: the bits of a class index, spread over red, green and blue from the highest down."""
    colours = []
    for index in range(256):
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        colours += channels
    return colours
