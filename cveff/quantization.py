"""`cveff quantize` as a library: from a checkpoint to a rounded one, its ONNX file, and what both are worth.

Figures are those of the exported file on the engine that opens it here, on images that nothing was calibrated on.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cveff.apply import device_of, timer_of
from cveff.backbones.reparameterize import Reparameterize, has_branches
from cveff.compress import Quantize
from cveff.compress.quant.report import Calibration
from cveff.compress.quantize import HEEDED
from cveff.data import Data
from cveff.data.dataset import OnBadImage, Split
from cveff.data.loading import load_images
from cveff.errors import CveffError, RecipeError, StepError
from cveff.export.deploy_checks import check_labels, halves
from cveff.export.onnx import export
from cveff.export.rounded_figures import Figures, measure
from cveff.files import atomic_folder, atomic_path, write_json
from cveff.measure.size import size_bytes
from cveff.model import Model, save
from cveff.origin import check_checkpoint, images_for, name_of, origin_of
from cveff.pipeline import check_device, images_of
from cveff.progress import Progress, Silent
from cveff.recipe import Recipe
from cveff.runtime.preprocess import preprocess
from cveff.schema import parse
from cveff.steps import Run
from cveff.subject import check_result_folder, open_model
from cveff.target import Target, load_target

ONNX = "model.onnx"
RECORD = "quantize.json"


@dataclass(frozen=True)
class Quantization:
    """What `quantize_checkpoint` made.

    Attributes:
        out: the saved model's folder; its settings and figures are in `quantize.json` there.
        onnx: the exported file.
        step: the settings.
        calibration: what ranges were made from.
        figures: what the file is worth beside the float32 network.
        bytes, float_bytes: of the file, and of the float32 network's.
        warnings: what a reader must know.
    """

    out: Path
    onnx: Path
    step: Quantize
    calibration: Calibration
    figures: Figures
    bytes: int
    float_bytes: int
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        settings = {key: _plain(value) for key, value in asdict(self.step).items() if value is not None}
        return {
            "out": str(self.out),
            "onnx": str(self.onnx),
            "settings": settings,
            "calibration": self.calibration.to_json(),
            "figures": self.figures.to_json(),
            "bytes": self.bytes,
            "float_bytes": self.float_bytes,
            "warnings": list(self.warnings),
        }


def quantize_step(settings: Mapping[str, Any], target: Target | None = None) -> Quantize:
    """`Quantize` from the settings that were given, as plain values.

    Args:
        settings: by `Quantize`'s names.
        target: gives the scheme of int8, unless `settings` has one; TensorRT's leaves the rest in fp16.

    Raises:
        RecipeError: a setting is unknown or out of range, or the precision takes no notice of it.
    """
    step = parse(Quantize, settings, "quantize")
    idle = sorted(set(settings) - {"precision", "images", "exclude", "calibration", *HEEDED[step.precision]})
    if idle:
        raise RecipeError(f"{idle[0]} has no effect on {step.precision}; remove it")
    if step.precision in ("int8", "auto") and "scheme" not in settings and target is not None:
        step = replace(step, scheme=target.int8_scheme)
        if step.precision == "int8" and step.scheme == "tensorrt" and "rest" not in settings:
            step = replace(step, rest="fp16")
    return step


def quantize_checkpoint(
    checkpoint: str,
    step: Quantize,
    *,
    out: Path | None = None,
    onnx: Path | None = None,
    data: str | None = None,
    on_bad_image: OnBadImage | None = None,
    target: Target | str | None = None,
    overwrite: bool = False,
    seed: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Quantization:
    """Quantize a saved model, export it, and measure the file.

    It is calibrated on the images of `step.calibration`, a folder without labels, or on the training images; it is
    measured on the test images (without any, on the validation images). With a folder and without data, one half
    calibrates and the other measures agreement.

    Args:
        checkpoint: a saved model's or a run's folder, or a zoo card's name.
        out: the new model's folder; by default `runs/NAME-PRECISION`.
        onnx: the exported file; by default `model.onnx` in `out`.
        data: labelled images; by default, unless there is a folder, those that the checkpoint was trained on.
        on_bad_image: "error" or "skip"; by default as in training.
        target: the device that the step may ask for.
        overwrite: replace what an earlier call left.
        seed: by default that of the training, for the same split.
        device: where weights alone are rounded; by default a GPU if there is one.

    Raises:
        RecipeError: it is not known which images to use.
        CveffError: `out` holds something else, or whatever quantizing and exporting refuse. Nothing is written then.
    """
    progress = progress or Silent()
    check_checkpoint(checkpoint)
    out = out or Path("runs") / f"{name_of(checkpoint)}-{step.precision}"
    onnx = onnx or out / ONNX
    check_result_folder(checkpoint, out, RECORD, "cveff quantize", overwrite)
    _check_onnx(onnx, overwrite)
    target = None if target is None else load_target(target)
    if device is not None:
        check_device(device)
    origin = origin_of(checkpoint)
    seed = seed if seed is not None else 0 if origin is None else origin.seed
    model = open_model(checkpoint)
    images = _gather(checkpoint, model, step, data, on_bad_image, origin, seed, progress)
    model = Model(replace(model.spec, labels=images.labels), model.module.eval())
    for split in (images.data.train, images.evaluation):
        if split is not None:  # an image that does not fit fails here, before the work
            preprocess([split.source(0)], model.spec.input)
    run = Run(data=images.data, target=target, device=device_of(device), seed=seed, progress=progress)
    free = replace(step, calibration=None)  # its images are the run's training images by now
    with ExitStack() as stack:
        if target is not None and step.precision == "auto":
            run.timer = stack.enter_context(timer_of(target))
        rounded, calibration = free.quantized(Model(model.spec, copy.deepcopy(model.module)), run)
    with tempfile.TemporaryDirectory(prefix="cveff-quantize-") as temporary:
        work = Path(temporary)
        save(rounded, work / "model")
        progress.message("exporting")
        file = export(rounded, work / ONNX)
        float_file = export(_merged(model), work / "float.onnx")
        figures, warnings = measure(model, rounded, file, images.evaluation, progress)
        made = Quantization(
            out,
            onnx,
            step,
            calibration,
            figures,
            size_bytes(file),
            size_bytes(float_file),
            (*images.warnings, *warnings),
        )
        is_inside = onnx.parent.resolve() == out.resolve()
        with atomic_folder(out) as folder:
            shutil.copytree(work / "model", folder, dirs_exist_ok=True)
            write_json(folder / RECORD, made.to_json())
            if is_inside:
                shutil.copyfile(file, folder / onnx.name)
        if not is_inside:
            with atomic_path(onnx) as path:
                shutil.copyfile(file, path)
    return made


@dataclass(frozen=True)
class _Images:
    """`data`: its training images calibrate. `evaluation`: measures."""

    data: Data
    evaluation: Split
    labels: tuple[str, ...]
    warnings: tuple[str, ...]


def _gather(
    checkpoint: str,
    model: Model,
    step: Quantize,
    data: str | None,
    on_bad_image: OnBadImage | None,
    origin: Recipe | None,
    seed: int,
    progress: Progress,
) -> _Images:
    folder = None
    if step.calibration is not None:
        folder = load_images(step.calibration, on_bad_image or "error", progress)
    if data is None and folder is not None:
        calibration, held = halves(folder, seed)
        labels = model.spec.labels
        return _Images(Data(str(step.calibration), labels, calibration, held), held, labels, ())
    if data is None and origin is None:
        raise RecipeError(
            f"{checkpoint} does not record the images it was trained on; give --data, or --calibration with a folder "
            "of images (no labels needed)"
        )
    found = images_of(images_for(checkpoint, data, on_bad_image, origin), seed, progress)
    labels, warnings = check_labels(model, found)
    if folder is not None:
        found = replace(found, train=folder)
    if found.train is None and step.needs_images:
        raise StepError(
            f"{found.name} has no training images to calibrate with; give --calibration with a folder"
        )
    return _Images(found, found.evaluation, labels, (*found.report.warnings, *warnings))


def _check_onnx(onnx: Path, overwrite: bool) -> None:
    if onnx.is_dir() or onnx.suffix != ".onnx":
        raise CveffError(f"{onnx} is no name for an ONNX file; give one that ends in .onnx")
    if onnx.exists() and not overwrite:
        raise CveffError(f"{onnx} exists; --overwrite replaces it")


def _merged(model: Model) -> Model:
    """What a float32 file would be made from."""
    if not has_branches(model.module):
        return model
    return Reparameterize()(Model(model.spec, copy.deepcopy(model.module)), Run())


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
