"""Runs a bundle on images from the command line: what a bundle's `run.py` and `cveff run` call."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import open as open_bundle
from .answers import Settings, answers, line
from .engine import Engine
from .errors import CveffError, ImageError, InputSizeError
from .frames import SimilarFrames, natural
from .preprocess import IMAGE_SUFFIXES, decode, fit
from .processor import processor_notes
from .reuse import FeatureReuse
from .run_frames import calibrate_features, calibrate_frames, check_features, check_frames

_EPILOG = "Exit codes: 0 all images answered; 2 a wrong option, bundle or image (named on stderr); 1 a bug."


def main(argv: Sequence[str], bundle: str | Path | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; they start with the bundle where `bundle` is None.

    Returns:
        The exit code: 0, or 2 where an option, the bundle or an image is wrong.
    """
    try:
        options = _parser(bundle is None).parse_args(argv)
    except SystemExit as stop:  # argparse has printed its help or its error
        return int(stop.code or 0)
    logging.getLogger(__package__).addHandler(logging.NullHandler())  # drift is said once, at the end
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters about an image is an error of ours
    for stream in (sys.stdout, sys.stderr):  # names and labels in any alphabet, on any terminal
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(options, Path(bundle if bundle is not None else options.bundle))
        sys.stdout.flush()
        return code
    except CveffError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does; nothing is left to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def answer_images(
    engine: Engine,
    paths: Sequence[Path],
    settings: Settings,
    *,
    batch_size: int = 8,
    resize: bool = False,
    gate: SimilarFrames | None = None,
) -> Iterator[dict[str, Any]]:
    """Run on image files, one result each, in order; one that cannot be read does not stop the others.

    Args:
        gate: passes over frames that look like the last computed one, whose answer they get, and its path as
            `"answer_of"`.

    Yields:
        `{"path"}` with what `answers` says: `"predictions": [{"label", "index", "probability"}]`,
        `"detections": [{"label", "index", "score", "box"}]`, or `"classes": [{"label", "index", "share"}]` and
        `"mask"`; or `{"path", "error"}`.
    """
    batch = _Batch(engine, settings)
    for path in paths:
        try:
            image = decode(path, engine.spec.channels)
            pixels = fit(image, engine.spec, resize, str(path))
            if gate is not None and gate(pixels):
                batch.repeat(path)
            else:
                batch.add(path, pixels, (image.height, image.width))
        except (ImageError, InputSizeError) as error:
            batch.results.append({"path": str(path), "error": str(error)})
        if len(batch.pixels) in (
            0,
            batch_size,
        ):  # results without an image of theirs to wait for go out at once
            yield from batch.flush()
    yield from batch.flush()


class _Batch:
    """Images that wait to be run together, and results in order, those of unreadable files among them."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        self._last: dict[str, Any] = {}  # the answer to the last image that was run
        self._clear()

    def add(self, path: Path, pixels: np.ndarray, size: tuple[int, int]) -> None:
        self.results.append({"path": str(path)})
        self.pixels.append(pixels)
        self.sizes.append(size)

    def repeat(self, path: Path) -> None:
        """The answer to the last image before this one, which may be waiting itself."""
        self.results.append({"path": str(path), "answer_of": None})

    def flush(self) -> list[dict[str, Any]]:
        results = self.results
        waiting = [result for result in results if not {"error", "answer_of"} & set(result)]
        if waiting:
            names = [result["path"] for result in waiting]
            found = answers(self._engine, np.stack(self.pixels), self.sizes, names, self._settings)
            for result, answer in zip(waiting, found, strict=True):
                result |= answer
        for result in results:
            if "answer_of" in result:
                result |= {**self._last, "path": result["path"], "answer_of": self._last["path"]}
            elif "error" not in result:
                self._last = result
        self._clear()
        return results

    def _clear(self) -> None:
        self.results: list[dict[str, Any]] = []
        self.pixels: list[np.ndarray] = []
        self.sizes: list[tuple[int, int]] = []


def image_paths(sources: Sequence[str | Path]) -> list[Path]:
    """The image files named, and those in the folders named (recursively, by suffix, hidden ones left out).

    Raises:
        ImageError: a path does not exist, or a folder holds no images.
    """
    paths: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            found = sorted(
                path
                for path in source.rglob("*")
                if path.suffix.lower() in IMAGE_SUFFIXES
                and not any(part.startswith(".") for part in path.relative_to(source).parts)
                and not path.is_dir()
            )
            if not found:
                raise ImageError(f"folder {source} holds no images ({' '.join(IMAGE_SUFFIXES)})")
            paths += found
        elif source.exists():
            paths.append(source)
        else:
            raise ImageError(f"{source} does not exist; check the path")
    return paths


def _parser(names_bundle: bool) -> argparse.ArgumentParser:
    example = "cveff run my.bundle" if names_bundle else "python run.py"
    parser = argparse.ArgumentParser(
        prog="cveff run" if names_bundle else "run.py",
        description=f"Run the model on images. Example: {example} cat.jpg photos/ --top-k 3",
        epilog=_EPILOG,
    )
    if names_bundle:
        parser.add_argument(
            "bundle", help="folder written by `cveff deploy`, or file written by `cveff export`"
        )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, or folders of them"
    )
    parser.add_argument(
        "--engine", help="use this engine's file, e.g. onnxruntime, openvino, openvino:int8; tensorrt"
    )
    parser.add_argument("--threads", type=_positive, help="threads of the engine (default: as measured)")
    parser.add_argument("--top-k", type=_positive, help="classes (default 5) or detections (100) of an image")
    parser.add_argument(
        "--min-score", type=_share, default=0.5, help="leave out detections less certain (default 0.5)"
    )
    parser.add_argument(
        "--masks", type=Path, metavar="FOLDER", help="write segmentation masks there, PNG of class indices"
    )
    similar = parser.add_mutually_exclusive_group()
    similar.add_argument(
        "--skip-similar",
        type=_levels,
        metavar="LEVELS",
        help="of a video's frames, those that differ less from the last computed one take over its answer: "
        "mean difference in grey levels, 0 to 255",
    )
    similar.add_argument(
        "--calibrate-similar",
        type=_share,
        metavar="SHARE",
        help="choose LEVELS on the first half of the frames, so that this share of answers stays the same, and "
        "measure it on the rest",
    )
    features = parser.add_mutually_exclusive_group()
    features.add_argument(
        "--reuse-features",
        type=_percent,
        metavar="PERCENT",
        help="of a video's frames through a staged bundle, those whose features after the first stage differ less from "
        "an earlier one's take over its answer: mean difference in percent of their size",
    )
    features.add_argument(
        "--calibrate-features",
        type=_share,
        metavar="SHARE",
        help="choose PERCENT as --calibrate-similar chooses LEVELS",
    )
    parser.add_argument("--batch-size", type=_positive, default=8, help="images a call (default 8)")
    parser.add_argument("--resize", action="store_true", help="enlarge images smaller than the model's input")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files' hashes")
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def _share(text: str) -> float:
    return _up_to(1, text)


def _levels(text: str) -> float:
    return _up_to(255, text)


def _percent(text: str) -> float:
    return _up_to(100, text)


def _up_to(largest: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= largest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and {largest}")
    return value


def _run(options: argparse.Namespace, bundle: Path) -> int:
    paths = image_paths(options.images)
    with open_bundle(bundle, options.engine, options.threads, verify=not options.no_verify) as engine:
        for note in processor_notes(engine.manifest, engine.file):
            print(f"warning: {note}", file=sys.stderr)
        if options.masks is not None and engine.task != "segmentation":
            raise CveffError(f"--masks is for segmentation; {bundle} is a {engine.task} model: leave it out")
        top_k = options.top_k or (100 if engine.task == "detection" else 5)
        similar, features = options.calibrate_similar, options.calibrate_features
        frames = (options.skip_similar, similar, options.reuse_features, features)
        if any(value is not None for value in frames):
            check_frames(engine)
            paths = sorted(paths, key=natural)
        if similar is not None or features is not None:
            if similar is not None and features is not None:
                raise CveffError("--calibrate-similar and --calibrate-features are both given; one at a time")
            how = calibrate_frames if features is None else calibrate_features
            found = how(engine, paths, similar if features is None else features, resize=options.resize)
            print(json.dumps(found.to_json(), indent=2) if options.json else found)
            return 0
        gate, reuse = None, None
        if options.reuse_features is not None:
            check_features(engine)
            reuse = FeatureReuse(options.reuse_features)
        settings = Settings(top_k, options.min_score, options.masks, reuse)
        if options.skip_similar is not None:
            gate = SimilarFrames(options.skip_similar)
        results = answer_images(
            engine, paths, settings, batch_size=options.batch_size, resize=options.resize, gate=gate
        )
        code = _print_json(engine, results, gate, reuse) if options.json else _print_lines(results, paths)
        if gate is not None:
            print(f"{gate.skipped} of {gate.frames} frames took over the answer before them", file=sys.stderr)
        if reuse is not None:
            print(
                f"{reuse.reused} of {reuse.frames} computed frames took over what later stages had found",
                file=sys.stderr,
            )
        for alarm in () if engine.cascade is None else engine.cascade.alarms[:1]:
            print(f"warning: {alarm}", file=sys.stderr)
        return code


def _print_lines(results: Iterator[dict[str, Any]], paths: Sequence[Path]) -> int:
    width = min(48, max(len(str(path)) for path in paths))
    num_failed = 0
    for result in results:
        if "error" in result:
            num_failed += 1
            print(f"error: {result['error']}", file=sys.stderr)
            continue
        print(f"{result['path']:<{width}}  {line(result)}{'   (as before)' if 'answer_of' in result else ''}")
    if num_failed:
        print(f"{num_failed} of {len(paths)} images could not be read", file=sys.stderr)
    return 2 if num_failed else 0


def _print_json(
    engine: Engine,
    found: Iterator[dict[str, Any]],
    gate: SimilarFrames | None,
    reuse: FeatureReuse | None,
) -> int:
    results = list(found)
    failed = [result for result in results if "error" in result]
    document = {
        "bundle": str(engine.path),
        "model": engine.manifest["model"].get("name", ""),
        "engine": engine.name,
        "precision": engine.precision,
        "threads": engine.threads,
        "images": [result for result in results if "error" not in result],
        "errors": failed,
    }
    if engine.cascade is not None:
        document["stages"] = [
            {"stage": item.name, "images": item.images, "share": item.share}
            for item in engine.cascade.statistics()
        ]
        document["drift"] = [alarm.to_json() for alarm in engine.cascade.alarms]
    if gate is not None:
        document["similar"] = {"levels": gate.threshold, "frames": gate.frames, "skipped": gate.skipped}
    if reuse is not None:
        document["features"] = {
            "percent": reuse.threshold,
            "frames": reuse.frames,
            "reused": reuse.reused,
        }
    print(json.dumps(document, indent=2))
    for result in failed:
        print(f"error: {result['error']}", file=sys.stderr)
    return 2 if failed else 0
