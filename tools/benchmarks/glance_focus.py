"""Glance and focus on scenes: a Fashion-MNIST garment somewhere in 64×64 pixels, among pieces of others.

A small CNN and a ViT with views of 32×32, crops by class activation and by a learned policy, against the same network
at 64×64, all trained alike; deployed files in turns on the 10,000 test images. Bars: at most 0.3 points lost to all
views, and the plain network is not both as fast and as accurate. A run that was stopped goes on where it was.

python tools/benchmarks/glance_focus.py                # both, trained for hours on two cores
python tools/benchmarks/glance_focus.py --only cnn
python tools/benchmarks/glance_focus.py --quick        # one epoch on few images: that it works, not what it reaches
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from early_exit import INPUT, MODELS, MOST_POINTS, figures, first, parsed, target, training

import cveff
from cveff.data import Data
from cveff.data import load as load_data
from cveff.data.dataset import Split
from cveff.data.memory import MemorySplit
from cveff.dynamic import GlanceFocus, Goal
from cveff.export import staged
from cveff.export.bench import bench
from cveff.model import Model

NETWORKS: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "cnn": ("small_resnet_m", {}, "sgd", 0.1),
    "vit": MODELS["vit"],
}
POLICIES = ("activation", "learned")
PIECES, PIECE = 8, 8
"""Pieces of other garments in a scene, and their side (cluttered MNIST: Mnih et al., NeurIPS 2014, section 4.1)."""


def main() -> None:
    arguments = parsed(__doc__, "glance_focus", NETWORKS)
    settings = {"threads": arguments.threads, "epochs": arguments.epochs, "seed": arguments.seed}
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    found = results.values.setdefault("networks", {})
    data = load_data("fashion-mnist", seed=arguments.seed)
    if arguments.quick:
        data = first(data, 512)
        staged.STAGE_SECONDS = staged.STREAM_SECONDS = 0.5
    data = with_scenes(data)
    for name in arguments.only:
        if name not in found:
            found[name] = one_network(name, data, arguments)
            results.save()
    for values in found.values():
        values.update(verdict(values))
    results.save()
    common.table(
        "Scenes of 64×64, deployed files; times are means over streams of real images, in turns",
        ("network", "batch", "accuracy %", "ms", "times as fast as plain", "leave at each view %"),
        [row(name, item, values) for name, values in found.items() for item in values["subjects"]],
        note="; ".join(
            f"{name}: {'PASS' if v['passes'] else ', '.join(v['missed'])}" for name, v in found.items()
        ),
    )


def with_scenes(data: Data) -> Data:
    """`data` with a scene in place of each image; every split has its own garments and pieces."""
    spec = replace(INPUT, size=(28, 28))

    def changed(split: Split | None, seed: int) -> Split | None:
        if split is None:
            return None
        return MemorySplit(split.name, scenes(split.pixels(spec), INPUT.size[0], seed)[0], split.targets)

    return replace(data, train=changed(data.train, 0), val=changed(data.val, 1), test=changed(data.test, 2))


def scenes(garments: np.ndarray, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Each garment as it is at a random place of a dark square, over pieces of others.

    Args:
        garments: (N, h, w, C) uint8.

    Returns:
        (N, side, side, C) uint8, and where the garments lie: top and left (N, 2).
    """
    random = np.random.default_rng(seed)
    count, height, width, channels = garments.shape
    made = np.zeros((count, side, side, channels), np.uint8)
    corners = np.stack([random.integers(0, side - part + 1, count) for part in (height, width)], axis=1)
    for scene, garment, (top, left) in zip(made, garments, corners, strict=True):
        for other in random.integers(0, count, PIECES):
            y, x = random.integers(0, height - PIECE + 1), random.integers(0, width - PIECE + 1)
            down, across = random.integers(0, side - PIECE + 1, 2)
            scene[down : down + PIECE, across : across + PIECE] = garments[
                other, y : y + PIECE, x : x + PIECE
            ]
        scene[top : top + height, left : left + width] = garment
    return made, corners


def one_network(name: str, data: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train the plain network and one for each policy, deploy them, and run the files in turns."""
    made = {}
    for kind in ("plain", *POLICIES):
        folder = arguments.models / f"{name}-{kind}"
        made[kind] = folder / "it.bundle"
        if not (made[kind] / "manifest.json").is_file() or arguments.quick:
            goal = Goal(accuracy_drop=100 if arguments.quick else MOST_POINTS)
            cveff.deploy(
                trained(name, kind, data, folder, arguments),
                data=data,
                target=target(arguments.threads),
                out=made[kind],
                exits=None if kind == "plain" else goal,
                progress=common.Lines(f"{name}, {kind}"),
            )
    found = {kind: figures(cveff.runtime.open(made[kind]).manifest) for kind in POLICIES}
    subjects = bench(made, batch=(1, 8), threads=arguments.threads, data=data, memory=False)
    return {
        "subjects": [item.to_json() for item in subjects],
        "staged": found,
        "points_lost": {
            kind: 100 * (values["full_accuracy"] - values["accuracy"]) for kind, values in found.items()
        },
    }


def trained(name: str, kind: str, data: Data, folder: Path, arguments: argparse.Namespace) -> Model:
    """The plain network, or one with views, or the finished one of an earlier run."""
    if (folder / "model" / "model.json").is_file() and not arguments.quick:
        return cveff.load(folder / "model")
    architecture, settings, optimizer, rate = NETWORKS[name]
    torch.manual_seed(arguments.seed)
    model = cveff.create(architecture, labels=data.labels, input=INPUT, timm_arguments=settings)
    train = training(optimizer, rate, arguments)
    step = train if kind == "plain" else GlanceFocus(view=32, policy=kind, train=train)  # type: ignore[arg-type]
    made = cveff.apply(
        model,
        step,
        data=data,
        seed=arguments.seed,
        folder=folder / "training",
        resume=not arguments.quick,
        progress=common.Lines(f"{name}, {kind}"),
    )
    cveff.save(made, folder / "model")
    return made


def verdict(values: dict[str, Any]) -> dict[str, Any]:
    """Whether every bar is met, and which are not."""
    missed = []
    for batch in sorted({item["batch"] for item in values["subjects"]}):
        items = {item["name"]: item for item in values["subjects"] if item["batch"] == batch}
        plain = items.pop("plain")
        missed += [
            f"{name}: the plain network is as fast and as accurate at batch {batch}"
            for name, item in items.items()
            if plain["median_ms"] <= item["median_ms"] and plain["accuracy"] >= item["accuracy"]
        ]
    missed += [
        f"{name}: {lost:.2f} points lost > {MOST_POINTS}"
        for name, lost in values["points_lost"].items()
        if lost > MOST_POINTS + 1e-9
    ]
    return {"missed": missed, "passes": not missed}


def row(name: str, item: dict[str, Any], values: dict[str, Any]) -> tuple[object, ...]:
    plain = next(
        other["median_ms"]
        for other in values["subjects"]
        if (other["name"], other["batch"]) == ("plain", item["batch"])
    )
    exits = values["staged"].get(item["name"], {}).get("exits", [])
    return (
        f"{name}, {item['name']}",
        item["batch"],
        100 * item["accuracy"],
        item["median_ms"],
        plain / item["median_ms"],
        " ".join(f"{100 * count / sum(exits):.0f}" for count in exits) or None,
    )


if __name__ == "__main__":
    main()
