"""Write images of a data set as PNG files: some of its evaluation split, or class folders to train on.

python tools/sample_images.py digits some/ --count 12        # some/000_3.png, …
python tools/sample_images.py digits photos/ --folders       # photos/train/3/00000.png, photos/val/…
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from cveff.data import load
from cveff.data.dataset import Split


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a named data set, a folder or shards")
    parser.add_argument("out", type=Path, help="folder for the images")
    parser.add_argument(
        "--count", type=int, help="at most this many images (of each split); default 12, or all"
    )
    parser.add_argument("--folders", action="store_true", help="every split, one folder a class")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    arguments = parser.parse_args()

    data = load(arguments.data, seed=arguments.seed)
    if not arguments.folders:
        write(data.evaluation, data.labels, arguments.out, arguments.count or 12)
        return
    for split in (data.train, data.val, data.test):
        if split is not None:
            write(split, data.labels, arguments.out / split.name, arguments.count, by_class=True)


def write(
    split: Split, labels: tuple[str, ...], folder: Path, count: int | None, by_class: bool = False
) -> None:
    """Save the first `count` images (all of them for None), named or sorted into folders by label."""
    for index in range(min(count or len(split), len(split))):
        label = "unlabelled" if split.targets is None else labels[split.targets[index]]
        name = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-").lower()
        path = folder / name / f"{index:05d}.png" if by_class else folder / f"{index:03d}_{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        split.image(index).save(path)


if __name__ == "__main__":
    main()
