"""EfficientNet-Lite0 with ImageNet weights: how often int8 answers as float32 does, ours against the tools' own.

Each seed splits real photographs in two halves by scene: random crops of one half calibrate, random crops of the
other are held out. The peers get a plain `torch.onnx.export` file; cveff gets `cveff.deploy` with a target that
allows int8 only and an accuracy limit that only its most faithful candidate meets. Every int8 file answers the
same held-out crops on the engine it is made for. A run that was stopped goes on with the seeds that are missing.

python tools/benchmarks/lite0.py --foolbox-wheel foolbox-3.3.4-py3-none-any.whl    # about 12 minutes on 2 cores
python tools/benchmarks/lite0.py --quick                                           # about 2 minutes
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import peers
import photos

import cveff
from cveff import model_zoo
from cveff.export.deploy import Deployment
from cveff.measure import torch_predictor, wilson_interval
from cveff.model import Model
from cveff.runtime.preprocess import preprocess

OURS = "cveff deploy"
BATCH = 10
ONNXRUNTIME = {
    "ONNX Runtime int8, min-max (default)": "MinMax",
    "ONNX Runtime int8, entropy": "Entropy",
    "ONNX Runtime int8, percentile": "Percentile",
}
NNCF = {"NNCF int8, performance (default)": "performance", "NNCF int8, mixed": "mixed"}
INT8_ONLY = cveff.Target(
    name="int8-only",
    description="Whatever int8 file a CPU engine runs best; nothing else is allowed.",
    candidates=(("onnxruntime", "int8"), ("openvino", "int8")),
    batch_sizes=(1,),
)


def main() -> None:
    arguments = _arguments()
    settings = {
        "calibration_crops": arguments.calibration,
        "held_out_crops": arguments.held_out,
        "foolbox": arguments.foolbox_wheel is not None,
    }
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    everything = photos.photographs(arguments.foolbox_wheel)
    results.values["photographs"] = len(everything)
    model = model_zoo.load("efficientnet-lite0")
    by_seed = results.values.setdefault("by_seed", {})
    for seed in arguments.seeds:
        if str(seed) not in by_seed:
            by_seed[str(seed)] = one_seed(model, everything, seed, arguments)
            results.values |= summary(by_seed)
            results.save()
    results.values |= summary(by_seed)
    results.save()
    show(results.values)


def one_seed(
    model: Model, everything: list[photos.Photo], seed: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Calibrate on one half of the photographs, compare on the other."""
    spec = model.spec.input
    first, second = photos.split(everything, seed)
    calibration = photos.crops(first, arguments.calibration, spec, seed)
    held_out = preprocess(photos.crops(second, arguments.held_out, spec, seed + 1000), spec)
    reference = _run(torch_predictor(model, arguments.threads), held_out)
    found: dict[str, Any] = {
        "calibrated_on": [photo.name for photo in first],
        "held_out": [photo.name for photo in second],
        "median_top_probability": float(np.median(_top_probability(reference))),
        "rows": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, predictor in int8_files(model, calibration, Path(folder), seed, arguments, found):
            logits = _run(predictor, held_out)
            found["rows"][name] = compare(logits, reference)
            row = found["rows"][name]
            common.console.print(
                f"seed {seed}: {name}: {row['same']} of {row['crops']}, cosine {row['cosine']:.4f}"
            )
    return found


def int8_files(
    model: Model,
    calibration: list[np.ndarray],
    folder: Path,
    seed: int,
    arguments: argparse.Namespace,
    found: dict[str, Any],
) -> Iterator[tuple[str, Callable[[np.ndarray], np.ndarray]]]:
    """Each int8 file opened on its engine, as a predictor of uint8 batches."""
    spec, threads = model.spec.input, arguments.threads
    plain = peers.plain_export(model.module, spec, folder / "plain.onnx")
    floats = peers.normalised(preprocess(calibration, spec), spec)

    def of_uint8(predictor: peers.FloatPredictor) -> Callable[[np.ndarray], np.ndarray]:
        return lambda images: predictor(peers.normalised(images, spec))

    for name, method in ONNXRUNTIME.items():
        path = peers.onnxruntime_int8(plain, folder / f"{method}.onnx", floats, method)
        yield name, of_uint8(peers.open_onnxruntime(path, threads))
    for name, preset in NNCF.items():
        yield name, of_uint8(peers.open_openvino(peers.nncf_int8(plain, floats, preset), threads))
    bundle = folder / "lite0.bundle"

    def deploy(limit: float) -> Deployment:
        return cveff.deploy(
            model,
            calibration=photos.write_folder(calibration, folder / "calibration"),
            target=INT8_ONLY,
            max_accuracy_drop=limit,
            num_calibration=len(calibration),
            out=bundle,
            seed=seed,
        )

    # As a user who wants int8 at its most faithful: first see what the candidates lose on the calibration
    # photographs (the held-out ones are never looked at), then allow no more than the best of them.
    found["candidates"] = [
        {key: entry[key] for key in ("engine", "precision", "agreement")}
        for entry in deploy(100.0).manifest["candidates"]
    ]
    best = max(entry["agreement"] or 0.0 for entry in found["candidates"])
    deployment = deploy(100 * (1 - best) + 1e-6)
    found["max_accuracy_drop"] = 100 * (1 - best)
    found["chosen"] = {key: deployment.chosen[key] for key in ("engine", "precision", "why")}
    with cveff.runtime.open(bundle, threads=threads) as engine:
        yield OURS, engine.logits


def compare(logits: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Top-1 equal to float32's, and the mean cosine of the logits (crops, classes)."""
    same = int((logits.argmax(1) == reference.argmax(1)).sum())
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(reference, axis=1)
    return {"same": same, "crops": len(logits), "cosine": float(((logits * reference).sum(1) / norms).mean())}


def summary(by_seed: dict[str, Any]) -> dict[str, Any]:
    """All seeds together: agreement with its 95% interval, cosine, and the best peer."""
    rows: dict[str, Any] = {}
    for name in next(iter(by_seed.values()))["rows"]:
        parts = [values["rows"][name] for values in by_seed.values()]
        same, count = sum(part["same"] for part in parts), sum(part["crops"] for part in parts)
        low, high = wilson_interval(same / count, count)
        rows[name] = {
            "agreement": same / count,
            "interval": [low, high],
            "cosine": float(np.average([p["cosine"] for p in parts], weights=[p["crops"] for p in parts])),
            "same": same,
            "crops": count,
        }
    best = max((name for name in rows if name != OURS), key=lambda name: rows[name]["agreement"])
    ours = rows[OURS]["agreement"]
    return {
        "rows": rows,
        "best_peer": best,
        "best_peer_agreement": rows[best]["agreement"],
        "agreement": ours,
        "crops": rows[OURS]["crops"],
        "passes": ours >= rows[best]["agreement"],
    }


def show(values: dict[str, Any]) -> None:
    """Print the table."""
    rows = [
        [
            name,
            row["agreement"],
            f"{row['interval'][0]:.3f}–{row['interval'][1]:.3f}",
            row["cosine"],
            row["crops"],
        ]
        for name, row in values["rows"].items()
    ]
    chosen = ", ".join(f"seed {seed}: {item['chosen']['engine']}" for seed, item in values["by_seed"].items())
    common.table(
        "EfficientNet-Lite0, ImageNet weights: int8 against float32 on held-out crops of photographs",
        ("int8 file", "agreement", "95%", "cosine", "crops"),
        rows,
        note=f"{values['photographs']} photographs, split by scene. cveff shipped {chosen}. "
        f"Best peer: {values['best_peer']}. {'PASS' if values['passes'] else 'FAIL'}",
    )


def _run(predictor: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    return np.concatenate([predictor(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])


def _top_probability(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials.max(axis=1) / exponentials.sum(axis=1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=100, help="calibration crops a seed")
    parser.add_argument("--held-out", type=int, default=300, help="held-out crops a seed")
    parser.add_argument("--foolbox-wheel", type=Path, help="adds the wheel's 20 ImageNet photographs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one seed, few crops; writes beside the results")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run with the same settings")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/lite0.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.calibration, arguments.held_out = arguments.seeds[:1], 16, 40
    arguments.out = arguments.out or common.output("lite0.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    main()
