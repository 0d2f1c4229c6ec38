"""Train by a recipe in a few lines of Python: the same job as `cveff train`.

python tools/train.py digits --out runs/digits
python tools/train.py recipe.toml --set train.epochs=5 --set seed=1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cveff.console import configure_logging, working
from cveff.errors import CveffError
from cveff.pipeline import run
from cveff.recipe import parse_assignment, recipe_for


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe_or_data", help="a recipe (file or name), or a data set to train on by defaults"
    )
    parser.add_argument("--out", type=Path, help="folder of the run (default runs/NAME)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key")
    parser.add_argument("--resume", action="store_true", help="continue a run that stopped")
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier run and begin again")
    options = parser.parse_args()
    configure_logging()
    try:
        recipe = recipe_for(options.recipe_or_data, dict(parse_assignment(text) for text in options.set))
        out = options.out or Path("runs") / Path(options.recipe_or_data).stem
        with working() as progress:
            result = run(
                recipe, out=out, resume=options.resume, overwrite=options.overwrite, progress=progress
            )
    except CveffError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; --resume goes on", file=sys.stderr)
        return 130
    print(f"{result.model}: {100 * result.accuracy:.2f}% of {result.count} images ({result.split})")
    if result.deployment is not None:
        print(f"{result.deployment.path}: see {result.deployment.path / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
