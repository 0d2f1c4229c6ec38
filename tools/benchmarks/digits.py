"""The embedded digits: the zoo's smallest model, trained in about a minute, and its deployed int8 file's accuracy.

python tools/benchmarks/digits.py --publish
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import trained


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--publish", action="store_true", help="put the first seed's model in the zoo")
    parser.add_argument("--threads", type=int, default=trained.default_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="time of one latency comparison")
    parser.add_argument("--quick", action="store_true", help="one epoch, one seed")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/digits.json")
    arguments = parser.parse_args()
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    epochs = 1 if arguments.quick else None
    settings = {"threads": arguments.threads, "seconds": arguments.seconds, "epochs": epochs}
    out = arguments.out or common.output("digits.json", arguments.quick)
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    found = results.values.get("seeds", {})
    for seed in seeds:
        if str(seed) in found:
            continue
        folder = common.ROOT / "runs" / ("quick" if arguments.quick else "") / "digits" / str(seed)
        model, values = trained.one_run(
            "digits", seed, folder, threads=arguments.threads, seconds=arguments.seconds, epochs=epochs
        )
        found[str(seed)] = values
        results.values |= trained.summary(found)
        results.save()
        if arguments.publish and seed == seeds[0]:
            trained.publish(model, "digits")
    results.save()
    common.table(
        f"digits, deployed int8 file, {results.values['images']} held-out images",
        trained.COLUMNS,
        [trained.row("digits", results.values)],
        note="Choices were made on the validation split. The test split is the same for every seed.",
    )


if __name__ == "__main__":
    main()
