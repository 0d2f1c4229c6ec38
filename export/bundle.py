"""Writes a bundle: one folder with the model files, `run.py`, the torch-free runtime, figures and hashes.

The format is documented in `docs/bundle.md` and by `manifest.schema.json`. The folder appears whole or not at
all, and what was written is read and verified before it takes its name.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cveff.runtime
from cveff.errors import BundleError, EngineError, MissingDependencyError
from cveff.export.triton import write_triton
from cveff.export.trt_commands import write_commands
from cveff.files import atomic_folder
from cveff.runtime.manifest import (
    FILE_NAME,
    SCHEMA_VERSION,
    check_path,
    model_files,
    read_manifest,
    sha256,
    verify_files,
)
from cveff.runtime.onnx_providers import PROVIDERS
from cveff.runtime.stages import read_stages

SCHEMA_PATH = Path(__file__).with_name("manifest.schema.json")

_RUNTIME = Path(cveff.runtime.__file__).parent
_RESERVED = (FILE_NAME, "run.py", "requirements.txt", "report.html", "runtime", "tensorrt", "triton")
_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-qnn"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "aot-inductor": ("torch",),
    **{name: (provider.wheel,) for name, provider in PROVIDERS.items()},
}
_RUN_PY = '''\
"""Run this bundle on images: python run.py IMAGE_OR_FOLDER... (--help lists the options)."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if sys.version_info < (3, 11):
    sys.exit("this bundle needs Python 3.11 or newer")
sys.dont_write_bytecode = True  # the bundle stays as it was hashed, and may lie on a read-only disk

# By its path, so that it is this folder's `runtime` under any setting of Python's search path.
folder = Path(__file__).resolve().parent / "runtime"
spec = spec_from_file_location("runtime", folder / "__init__.py", submodule_search_locations=[str(folder)])
sys.modules["runtime"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["runtime"])

from runtime.run import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], bundle=folder.parent))
'''


def write_bundle(
    out: str | Path, *, manifest: Mapping[str, Any], files: Mapping[str, Path], report_html: str
) -> Path:
    """Write a bundle and verify it.

    Args:
        out: the bundle's folder. An existing bundle there is replaced; any other folder that is not empty
            is refused.
        manifest: every key of `manifest.schema.json` but `schema_version` and `files`.
        files: path inside the bundle -> file to copy; must hold what `engine.file` and `alternatives[].file`
            name, and the `.bin` beside an `.xml`.
        report_html: the report's page.

    Returns:
        `out`.

    Raises:
        BundleError: the manifest does not fit the schema (names the key), a file is missing or has a reserved
            name, or `out` is something else's folder.
        EngineError: the chosen engine is not installed, so that its version cannot be written down.
        CveffError: the disk is full or may not be written; nothing is left behind.
    """
    out = Path(out)
    _check_destination(out)
    _check_sources(manifest, files)
    complete = {"schema_version": SCHEMA_VERSION, **manifest, "files": []}
    validate(complete)
    with atomic_folder(out) as folder:
        copies = {name: _copy(source, folder / name) for name, source in files.items()}
        _write_runtime(folder)
        (folder / "requirements.txt").write_text(requirements(complete), encoding="utf-8")
        (folder / "report.html").write_text(report_html, encoding="utf-8")
        if complete["task"] == "classification":
            write_triton(folder / "triton", complete, copies)
            plans = {file.file for file in model_files(complete) if file.engine == "tensorrt"}
            write_commands(folder / "tensorrt", complete, sorted(plans))
        complete["files"] = [
            {
                "path": path.relative_to(folder).as_posix(),
                "sha256": sha256(path),
                "bytes": path.stat().st_size,
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        text = json.dumps(complete, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")
        validate(complete)
        written = read_manifest(folder)
        read_stages(written, FILE_NAME)
        verify_files(folder, written)
    return out


def validate(manifest: Mapping[str, Any]) -> None:
    """Check a complete manifest against `manifest.schema.json`.

    Raises:
        BundleError: names the first key that does not fit.
        MissingDependencyError: jsonschema is not installed.
    """
    try:
        import jsonschema  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingDependencyError("writing a bundle needs jsonschema; pip install jsonschema") from error
    try:
        plain = json.loads(json.dumps(manifest, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest holds a value JSON does not have: {error}") from error
    validator = jsonschema.Draft202012Validator(schema())
    problem = jsonschema.exceptions.best_match(validator.iter_errors(plain))
    if problem is not None:
        raise BundleError(f"manifest{problem.json_path[1:] or ''}: {problem.message:.300}")


def schema() -> dict[str, Any]:
    """The published JSON Schema of `manifest.json` (draft 2020-12)."""
    values: dict[str, Any] = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
    return values


def requirements(manifest: Mapping[str, Any]) -> str:
    """The text of `requirements.txt`: exact versions for `run.py`, the other engines commented out."""
    staged = [entry["name"] for entry in manifest.get("stages", {}).get("files", ())]
    engines = list(dict.fromkeys([*staged, *(file.engine for file in model_files(manifest))]))
    needed = set(staged) or {engines[0]}
    lines = [
        "# What run.py needs, in the versions this bundle was measured with (Python 3.11 or newer).",
        _pin("numpy"),
        _pin("pillow"),
        *dict.fromkeys(_pin(*_DISTRIBUTIONS[engine]) for engine in engines if engine in needed),
    ]
    if "tensorrt" in needed:
        lines.append(_pin("cuda-bindings"))
    for engine in engines:
        if engine in needed:
            continue
        if (
            engine == "tensorrt"
        ):  # prepared where it may not be installed: the device's release builds the plan
            lines += [
                "# tensorrt     # for run.py --engine tensorrt, on a machine with an NVIDIA GPU",
                "# cuda-python",
            ]
        else:
            lines.append(f"# {_pin(*_DISTRIBUTIONS[engine])}  # for run.py --engine {engine}")
    return "\n".join(lines) + "\n"


def _pin(*distributions: str) -> str:
    for name in distributions:
        try:
            return f"{name}=={importlib.metadata.version(name).partition('+')[0]}"
        except importlib.metadata.PackageNotFoundError:
            continue
    name = distributions[0]
    raise EngineError(f"{name} is not installed, so its version is unknown; pip install {name}")


def _check_destination(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not (out / FILE_NAME).is_file():
        raise BundleError(
            f"{out} is a folder that is not empty and no bundle, and would be replaced; give another name"
        )


def _check_sources(manifest: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    for name, source in files.items():
        check_path(name)
        if name.split("/")[0] in _RESERVED:
            raise BundleError(f"{name!r} is a name the bundle uses itself; call the model file otherwise")
        if not Path(source).is_file():
            raise BundleError(f"{source}, to be {name} in the bundle, does not exist")
    for file in (manifest.get("engine"), *(manifest.get("alternatives") or ())):
        model = file.get("file") if isinstance(file, Mapping) else None
        if not isinstance(model, str):
            continue  # the schema names what is wrong
        for needed in (model, f"{model[:-4]}.bin") if model.endswith(".xml") else (model,):
            if needed not in files:
                raise BundleError(
                    f"the manifest names {needed}, which is not among the files {sorted(files)}"
                )


def _copy(source: Path, destination: Path) -> Path:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
    return destination


def _write_runtime(folder: Path) -> None:
    (folder / "run.py").write_text(_RUN_PY, encoding="utf-8")
    (folder / "runtime").mkdir()
    for source in sorted(_RUNTIME.glob("*.py")):
        shutil.copyfile(source, folder / "runtime" / source.name)
