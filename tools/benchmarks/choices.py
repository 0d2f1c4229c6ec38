"""What the documentation says of design choices, measured: one section for each claim.

Times are CPU time of one thread, interleaved, so that neighbours on a shared machine disturb them little; those of
"waiting" are wall-clock times of two threads.
Weights are random with settled batch norms and images are crops of real photographs, except for "traps", which uses
EfficientNet-Lite0's ImageNet weights. A run that was stopped goes on with the sections that are missing; the tables
in docs/ are filled from the result by tools/readme_tables.py.

python tools/benchmarks/choices.py                      # about 15 minutes on 2 cores
python tools/benchmarks/choices.py --only traps merged  # measure these again
python tools/benchmarks/choices.py --quick              # one model a section, short comparisons
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import choices_onnxruntime
import choices_openvino
import choices_rest
import common
import numpy as np
import peers
import photos
import timm
import torch
from engines import settled_model
from workshop import CALIBRATION, HELD_OUT, THREADS, Workshop

import cveff
from cveff import model_zoo
from cveff.backbones import Reparameterize
from cveff.measure.parity import relative_difference
from cveff.runtime.preprocess import preprocess

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PADDINGS = {"TensorFlow's": "tf_efficientnet_lite0", "symmetric": "efficientnet_lite0"}


def merged(workshop: Workshop) -> dict[str, Any]:
    """Parameters before and after branches are merged, and how far the logits move."""
    found = {}
    for name in workshop.some(("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9")):
        before = settled_model(name, merge=False)
        after = cveff.apply(before, Reparameterize())
        spec = before.spec.input
        images = preprocess(photos.crops(photos.photographs(), 4, spec, seed=2), spec)
        x = torch.from_numpy(peers.normalised(images, spec))
        with torch.inference_mode():
            logits = [model.module.eval()(x).numpy() for model in (before, after)]
        found[name] = {
            "parameters_before": before.num_parameters,
            "parameters_after": after.num_parameters,
            "relative_difference": relative_difference(logits[1], logits[0]),
        }
    return {"models": found}


def traps(_: Workshop) -> dict[str, Any]:
    """Mean probability of the right classes on eight photographs: weights that load strictly may still be wrong."""
    model = model_zoo.load("efficientnet-lite0")
    paths, right = photos.recognised()
    images = preprocess(paths, model.spec.input)
    rows = []
    for padding, architecture in PADDINGS.items():
        module = timm.create_model(architecture)
        module.load_state_dict(model.module.state_dict(), strict=True)
        for normalisation, (mean, std) in (("0.5, 0.5", ((0.5,) * 3, (0.5,) * 3)), ("ImageNet's", IMAGENET)):
            x = (images.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
            with torch.inference_mode():
                logits = module.eval()(torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))))
            probabilities = logits.softmax(1).numpy()
            mass = [float(row[classes].sum()) for row, classes in zip(probabilities, right, strict=True)]
            rows.append(
                {
                    "padding": padding,
                    "architecture": architecture,
                    "normalisation": normalisation,
                    "is_ours": architecture == model.spec.architecture and model.spec.input.mean == mean,
                    "mean_probability": float(np.mean(mass)),
                }
            )
    return {"photographs": len(paths), "rows": rows}


SECTIONS: dict[str, Callable[[Workshop], dict[str, Any]]] = {
    "traps": traps,
    "merged": merged,
    "rows_of_three": choices_onnxruntime.rows_of_three,
    "uint8_input": choices_onnxruntime.uint8_input,
    "int8": choices_onnxruntime.int8,
    "presets": choices_openvino.presets,
    "static_batch": choices_openvino.static_batch,
    "smoothing": choices_openvino.smoothing,
    "waiting": choices_rest.waiting,
}


def main() -> None:
    arguments = _arguments()
    settings = {
        "weights": "random, batch-norm statistics settled",
        "calibration_crops": CALIBRATION,
        "held_out_crops": HELD_OUT,
        "seconds": arguments.seconds,
        "clock": "CPU time of the process",
        "threads": THREADS,
    }
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    sections = results.values.setdefault("sections", {})
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder), arguments.seconds, arguments.quick)
        for name in SECTIONS:
            if name not in (arguments.only or SECTIONS) or (name in sections and not arguments.only):
                continue
            start, load = time.perf_counter(), list(os.getloadavg())
            common.console.print(f"{name} …")
            found = SECTIONS[name](workshop)
            sections[name] = {
                "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
                "load_average": load,
                "took_seconds": round(time.perf_counter() - start, 1),
                **found,
            }
            results.save()
            gc.collect()
    results.save()
    show(sections)


def show(sections: dict[str, Any]) -> None:
    """Print every ratio and error."""
    for name, section in sections.items():
        rows = list(_numbers(section))
        common.table(
            f"{name}, {section['took_seconds']} s, load {section['load_average'][0]:.1f}", ("", "value"), rows
        )


def _numbers(value: Any, path: str = "") -> list[list[object]]:
    """The figures of a section, one a row; of a ratio its median and interval."""
    if isinstance(value, dict):
        if "median" in value and "low" in value:
            return [[path, f"{value['median']:.3f} ({value['low']:.3f}–{value['high']:.3f})"]]
        skipped = {"date", "load_average", "took_seconds", "rounds", "threads", "batch"}
        return [
            row
            for key, item in value.items()
            if key not in skipped
            for row in _numbers(item, f"{path} / {key}".removeprefix(" / "))
        ]
    if isinstance(value, list):
        return [row for index, item in enumerate(value) for row in _numbers(item, f"{path} {index}")]
    return [[path, value]]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), metavar="SECTION", help=", ".join(SECTIONS)
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="CPU time of one comparison")
    parser.add_argument("--quick", action="store_true", help="one model a section, short comparisons")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run with the same settings")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/choices.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds = 1.0
    arguments.out = arguments.out or common.output("choices.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    main()
