"""Does `deploy` choose something slower once AOTInductor is among its candidates? Seven models, batch 1 and 8.

Every candidate of the server-cpu profile is built and timed, all of one model interleaved in one process; then
`deploy`'s rule chooses twice from those times, without AOTInductor's candidates and with them. The two choices are
timed against each other once more, because the times that chose flatter the chosen. "with / without" is the median
over rounds of that second comparison; the choice got slower where it is above 1.03, or its 95% interval lies above 1.

Weights are random (times do not depend on them) with settled batch-norm statistics, and accuracy is left out of the
choice: this is about speed alone. What a compilation takes is measured too.

python tools/benchmarks/aot_engines.py            # about an hour on 2 quiet cores; continues where it stopped
python tools/benchmarks/aot_engines.py --quick    # one small model, few rounds, without the int8 candidates
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import engines
import numpy as np
import photos

from cveff.data.loading import load_images
from cveff.errors import CveffError
from cveff.export.aot_inductor import compile_package
from cveff.export.build_candidates import ONNX, Built, build_candidates
from cveff.export.candidates import TIE_RATIO, Candidate, Limits, choose
from cveff.export.int8 import Int8
from cveff.export.onnx import export
from cveff.measure import compare, pinned_threads
from cveff.measure.latency import Ratio
from cveff.model import Model
from cveff.runtime.machine import saturates
from cveff.runtime.preprocess import preprocess
from cveff.target import Target, load_target

AOT = "aot-inductor"


def main() -> None:
    arguments = engines.command_line(
        __doc__, "aot_engines.json", "mobilenetv3_small_100 only, short, without int8"
    )
    settings = {
        "threads": arguments.threads,
        "batches": arguments.batches,
        "calibration_crops": engines.CALIBRATION,
        "weights": "random, batch-norm statistics settled",
        "seconds": arguments.seconds,
    }
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    cells = results.values.setdefault("cells", {})
    compilations = results.values.setdefault("compilation", {})
    for name in arguments.models:
        missing = [batch for batch in arguments.batches if str(batch) not in cells.get(name, {})]
        if not missing:
            continue
        with one_model(name, arguments) as (seconds, measure):
            compilations[name] = seconds
            for batch in missing:
                cells.setdefault(name, {})[str(batch)] = measure(batch)
                results.values["summary"] = summary(cells)
                results.save()
    results.values["summary"] = summary(cells)
    results.save()
    show(results.values)


@contextmanager
def one_model(
    name: str, arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], Callable[[int], dict[str, Any]]]]:
    """Export and compile one model; yields what compiling took, and what measures a batch size."""
    model = engines.settled_model(name)
    spec, threads = model.spec.input, arguments.threads
    crops = photos.crops(photos.photographs(), engines.CALIBRATION, spec, seed=0)
    calibration = preprocess(crops, spec)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        # Engines' threads are kept to as many cores as they are told to use, on machines with more.
        stack.enter_context(pinned_threads(threads))
        folder = Path(temporary)
        photos.write_folder(crops, folder / "images")
        selection = load_images(folder / "images")
        export(model, folder / ONNX)
        profile = target(1, arguments)
        seconds = compiled(model, profile, folder)
        common.console.print(f"{name}: compiled in {seconds}")
        int8 = Int8(model, calibration, folder, selection, 100, clips=saturates(profile.instruction_sets))

        def measure(batch: int) -> dict[str, Any]:
            built = build_candidates(
                folder / ONNX, target(batch, arguments), int8, folder, common.Lines(f"{name} {batch}")
            )
            images = np.ascontiguousarray(np.resize(calibration, (batch, *calibration.shape[1:])))
            try:
                cell = choices(built, images, arguments.seconds)
            finally:
                built.close()
            show_cell(name, batch, cell)
            return cell

        yield seconds, measure
    gc.collect()


def compiled(model: Model, profile: Target, folder: Path) -> dict[str, Any]:
    """Seconds for each of AOTInductor's candidates, or why there is none; `build_candidates` finds the files."""
    seconds: dict[str, Any] = {}
    for engine, precision in profile.candidates:
        if engine != AOT:
            continue
        start = time.perf_counter()
        try:
            kind = "bf16" if precision == "bf16" else "fp32"
            compile_package(model, folder / f"model.{precision}.pt2", precision=kind)
            seconds[precision] = round(time.perf_counter() - start, 1)
        except CveffError as error:
            seconds[precision] = str(error)
    return seconds


def target(batch: int, arguments: argparse.Namespace) -> Target:
    """The server-cpu profile's candidates, chosen for one batch size."""
    profile = load_target("server-cpu")
    pairs = [pair for pair in profile.candidates if not arguments.quick or "int8" not in pair[1]]
    return replace(profile, candidates=tuple(pairs), threads=arguments.threads, batch_sizes=(batch,))


def choices(built: Built, images: np.ndarray, seconds: float) -> dict[str, Any]:
    """Time all candidates, choose without and with AOTInductor's, and time the two choices again."""
    batch = len(images)
    result = compare(built.sessions, images, budget_seconds=seconds, min_rounds=7, precision=0.0)
    # Accuracy is not the question here: all count as equal.
    timed = [
        replace(candidate, agreement=1.0, timings={batch: result[candidate.name]})
        for candidate in built.candidates
        if candidate.name in built.sessions
    ]
    before, after = (chosen(timed, batch, with_aot) for with_aot in (False, True))
    ratio = Ratio(1.0, 1.0, 1.0, 1.0, 0.0, result.rounds)
    if before.name != after.name:
        again = compare(
            {name: built.sessions[name] for name in (before.name, after.name)},
            images,
            budget_seconds=seconds,
            min_rounds=9,
            precision=0.0,
        )
        ratio = again.ratio(after.name, before.name)
    return {
        "latency_ms": {
            name: {"median": item.median_ms, "spread": item.spread} for name, item in result.items()
        },
        "not_built": {item.name: item.error for item in built.candidates if item.error},
        "without": before.name,
        "with": after.name,
        "ratio": ratio.to_json(),
        "slower": ratio.median > TIE_RATIO or ratio.low > 1,
        "rounds": result.rounds,
        "load_average": result.load,
    }


def chosen(candidates: list[Candidate], batch: int, with_aot: bool) -> Candidate:
    """What `deploy`'s rule takes."""
    kept = [candidate for candidate in candidates if with_aot or candidate.engine != AOT]
    return next(candidate for candidate in choose(kept, Limits(100.0), batch) if candidate.chosen)


def summary(cells: Mapping[str, Any]) -> dict[str, Any]:
    """How often AOTInductor was chosen, and whether a choice got slower."""
    values = [cell for by_batch in cells.values() for cell in by_batch.values()]
    return {
        "cells": len(values),
        "aot_chosen": sum(cell["with"].startswith(AOT) for cell in values),
        "slower": sum(cell["slower"] for cell in values),
        "largest_ratio": max((cell["ratio"]["median"] for cell in values), default=None),
        "smallest_ratio": min((cell["ratio"]["median"] for cell in values), default=None),
    }


def show_cell(name: str, batch: int, cell: Mapping[str, Any]) -> None:
    """One line as soon as a cell is measured."""
    common.console.print(
        f"{name} batch {batch}: without {cell['without']}, with {cell['with']}, "
        f"ratio {cell['ratio']['median']:.3f}{' SLOWER' if cell['slower'] else ''}"
    )


def show(values: Mapping[str, Any]) -> None:
    """Print the table."""
    rows = []
    for name, by_batch in values["cells"].items():
        for batch, cell in by_batch.items():
            times = {key: item["median"] for key, item in cell["latency_ms"].items()}
            rows.append(
                [
                    f"{name} / {batch}",
                    times.get(f"{AOT} fp32"),
                    times.get(f"{AOT} bf16"),
                    f"{cell['without']} {times[cell['without']]:.2f}",
                    f"{cell['with']} {times[cell['with']]:.2f}",
                    cell["ratio"]["median"],
                    "yes" if cell["slower"] else "no",
                    values["compilation"][name].get("fp32"),
                ]
            )
    total = values["summary"]
    common.table(
        "Milliseconds a call, medians, interleaved",
        (
            "model / batch",
            "AOT fp32",
            "AOT bf16",
            "chosen without",
            "chosen with",
            "with / without",
            "slower",
            "s",
        ),
        rows,
        note=f"{values['machine'].get('cpu', '')}, {values['settings']['threads']} threads. The last column is what "
        f"compiling in float32 takes. AOTInductor is chosen in {total['aot_chosen']} of {total['cells']}, and "
        f"{total['slower']} choices got slower.",
    )


if __name__ == "__main__":
    main()
