"""Classifies images with a bundle from the command line: what a bundle's `run.py` and `cveff run` call."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import open as open_bundle
from .engine import Engine
from .errors import CveffError, ImageError, InputSizeError
from .preprocess import IMAGE_SUFFIXES, decode, fit
from .processor import processor_notes

_EPILOG = "Exit codes: 0 all images classified; 2 a wrong option, bundle or image (named on stderr); 1 a bug."


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


def classify(
    engine: Engine, paths: Sequence[Path], *, batch_size: int = 8, top_k: int = 5, resize: bool = False
) -> Iterator[dict[str, Any]]:
    """Classify image files, one result each, in order; one that cannot be read does not stop the others.

    Yields:
        `{"path", "predictions": [{"label", "index", "probability"}]}`, most probable first, or
        `{"path", "error"}`.
    """
    results: list[dict[str, Any]] = []
    pixels: list[np.ndarray] = []
    for path in paths:
        try:
            pixels.append(fit(decode(path, engine.spec.channels), engine.spec, resize, str(path)))
            results.append({"path": str(path)})
        except (ImageError, InputSizeError) as error:
            results.append({"path": str(path), "error": str(error)})
        if len(pixels) == batch_size:
            yield from _predicted(engine, results, pixels, top_k)
            results, pixels = [], []
    yield from _predicted(engine, results, pixels, top_k)


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
        description=f"Classify images. Example: {example} cat.jpg photos/ --top-k 3",
        epilog=_EPILOG,
    )
    if names_bundle:
        parser.add_argument("bundle", help="folder written by `cveff deploy`")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE_OR_FOLDER", help="image files, or folders of them"
    )
    parser.add_argument(
        "--engine", help="use this engine's file, e.g. onnxruntime, openvino, openvino:int8; tensorrt"
    )
    parser.add_argument("--threads", type=_positive, help="threads of the engine (default: as measured)")
    parser.add_argument("--top-k", type=_positive, default=5, help="classes to show an image (default 5)")
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


def _run(options: argparse.Namespace, bundle: Path) -> int:
    paths = image_paths(options.images)
    with open_bundle(bundle, options.engine, options.threads, verify=not options.no_verify) as engine:
        for note in processor_notes(engine.manifest, engine.file):
            print(f"warning: {note}", file=sys.stderr)
        results = classify(
            engine, paths, batch_size=options.batch_size, top_k=options.top_k, resize=options.resize
        )
        return _print_json(engine, list(results)) if options.json else _print_lines(results, paths)


def _predicted(
    engine: Engine, results: list[dict[str, Any]], pixels: list[np.ndarray], top_k: int
) -> Iterator[dict[str, Any]]:
    """Fill in the predictions of the results that have pixels."""
    probabilities = iter(engine(np.stack(pixels)) if pixels else ())
    for result in results:
        if "error" not in result:
            row = next(probabilities)
            best = np.argsort(-row, kind="stable")[:top_k]
            result["predictions"] = [
                {"label": engine.labels[index], "index": int(index), "probability": float(row[index])}
                for index in best
            ]
        yield result


def _print_lines(results: Iterator[dict[str, Any]], paths: Sequence[Path]) -> int:
    width = min(48, max(len(str(path)) for path in paths))
    num_failed = 0
    for result in results:
        if "error" in result:
            num_failed += 1
            print(f"error: {result['error']}", file=sys.stderr)
            continue
        words = [
            f"{' '.join(item['label'].split())} {100 * item['probability']:.1f}%"
            for item in result["predictions"]
        ]
        print(f"{result['path']:<{width}}  {'   '.join(words)}")
    if num_failed:
        print(f"{num_failed} of {len(paths)} images could not be classified", file=sys.stderr)
    return 2 if num_failed else 0


def _print_json(engine: Engine, results: list[dict[str, Any]]) -> int:
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
    print(json.dumps(document, indent=2))
    for result in failed:
        print(f"error: {result['error']}", file=sys.stderr)
    return 2 if failed else 0
