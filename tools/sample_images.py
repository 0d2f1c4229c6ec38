"""Write some images of a data set's evaluation split as PNG files, named by their label.

python tools/sample_images.py digits out/ --count 12
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from cveff.data import load


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a named data set, a folder or shards")
    parser.add_argument("out", type=Path, help="folder for the images")
    parser.add_argument("--count", type=int, default=12, help="how many images")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split")
    arguments = parser.parse_args()

    data = load(arguments.data, seed=arguments.seed)
    split = data.evaluation
    arguments.out.mkdir(parents=True, exist_ok=True)
    for index in range(min(arguments.count, len(split))):
        label = "unlabelled" if split.targets is None else data.labels[split.targets[index]]
        name = re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-").lower()
        split.image(index).save(arguments.out / f"{index:03d}_{name}.png")


if __name__ == "__main__":
    main()
