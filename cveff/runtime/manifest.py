"""`manifest.json`: reading it, checking it, and checking every file it lists. Nothing is trusted before.

The JSON Schema published as `export/manifest.schema.json` documents the keys. Unknown keys are ignored, so
additions need no new version; a change of meaning raises `SCHEMA_VERSION`, which older programs refuse.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .detections import Suppression
from .errors import BundleError, CveffError
from .input_spec import InputSpec

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"
TASKS = ("classification", "detection", "segmentation")

_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "schema_version": int,
    "model": dict,
    "task": str,
    "input": dict,
    "labels": list,
    "engine": dict,
    "alternatives": list,
    "files": list,
    "metrics": dict,
    "candidates": list,
    "recipe": (dict, type(None)),
    "versions": dict,
    "machine": dict,
}
_WORDS = {
    int: "an integer",
    dict: "an object",
    str: "a string",
    list: "a list",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


@dataclass(frozen=True)
class ModelFile:
    """One way to run the bundle: a file, the engine for it and the settings it was measured with.

    Attributes:
        engine: one of `engines.ENGINES`.
        file: path inside the bundle.
        threads: threads it was measured with.
        options: the engine's options, as `open_file` takes them.
        precision: "fp32", "bf16" or one of int8's kinds; "" where the manifest does not say.
        saturation: of an int8 file made for x86 without VNNI, whose integer kernels clip: what was done about it.
    """

    engine: str
    file: str
    threads: int
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: str = ""
    saturation: Mapping[str, Any] | None = None

    @property
    def is_guarded(self) -> bool:
        """Whether the file was made for kernels that clip, and no channel was predicted to lose much by them."""
        return self.saturation is not None and not self.saturation["severe"]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check a bundle's manifest. The files it lists are checked by `verify_files`.

    Raises:
        BundleError: no bundle there, damaged JSON, a newer schema, or a missing or wrong key (named).
    """
    folder = Path(folder)
    path = folder / FILE_NAME
    if not folder.is_dir():
        raise BundleError(
            f"{folder} is not a folder; give a bundle's folder (an archive must be unpacked first)"
        )
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a bundle: it has no {FILE_NAME}; give a folder written by `cveff deploy`"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(
            f"{path} is not valid JSON ({error}); the bundle is damaged, copy it again"
        ) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error
    check_manifest(manifest, str(path))
    return manifest


def check_manifest(manifest: Any, name: str = FILE_NAME) -> None:
    """Check what the runtime relies on: version, keys, types, paths.

    Args:
        name: what to call the manifest in an error.

    Raises:
        BundleError: names the key.
    """
    if not isinstance(manifest, dict):
        raise BundleError(f"{name} holds a {type(manifest).__name__}, not an object; the bundle is damaged")
    version = manifest.get("schema_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise BundleError(
            f"{name} has schema version {version}, this program reads up to {SCHEMA_VERSION}; upgrade cveff, "
            "or use the bundle's own run.py"
        )
    for key, kind in _KEYS.items():
        entry_value(manifest, key, kind, name)
    if version != SCHEMA_VERSION:
        raise BundleError(f"{name}: schema_version is {version!r}; it must be {SCHEMA_VERSION}")
    check_task(manifest, name)
    if "instructions" in manifest:
        _check_instructions(entry_value(manifest, "instructions", list, name), name)
    listed = _check_files(manifest["files"], name)
    for model_file in model_files(manifest, name):
        needed = [model_file.file]
        if model_file.file.endswith(".xml"):
            needed.append(model_file.file.removesuffix(".xml") + ".bin")
        for file in needed:
            if file not in listed:
                raise BundleError(f"{name}: files does not list {file!r}, which {model_file.engine} opens")


def check_task(values: Mapping[str, Any], name: str) -> None:
    """Check `task`, `labels`, `input` and, of a detector, `suppression`.

    Raises:
        BundleError: names the key.
    """
    if values["task"] not in TASKS:
        raise BundleError(f"{name}: task is {values['task']!r}; this program runs {', '.join(TASKS)} bundles")
    if not values["labels"] or not all(isinstance(label, str) for label in values["labels"]):
        raise BundleError(f"{name}: labels must be a list of strings, one a class")
    try:
        InputSpec.from_json(values["input"])
        if values["task"] == "detection":
            Suppression.from_json(values.get("suppression"))
    except (CveffError, TypeError) as error:
        raise BundleError(f"{name}: {error}") from None


def model_files(manifest: Mapping[str, Any], name: str = FILE_NAME) -> list[ModelFile]:
    """The chosen model file, then the alternatives."""
    entries = [("engine", manifest["engine"])]
    entries += [(f"alternatives[{index}]", entry) for index, entry in enumerate(manifest["alternatives"])]
    return [model_entry(entry, f"{name}: {key}") for key, entry in entries]


def verify_files(folder: str | Path, manifest: Mapping[str, Any], hashes: bool = True) -> None:
    """Check that every listed file is there, inside the folder, with its size and, if `hashes`, its SHA-256.

    Raises:
        BundleError: names the file.
    """
    for entry in manifest["files"]:
        path = locate(folder, entry["path"])
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise BundleError(
                f"{path} has {size} bytes, the manifest says {entry['bytes']}; it was changed or cut short, "
                "copy the bundle again"
            )
        if hashes and sha256(path) != entry["sha256"]:
            raise BundleError(
                f"{path} does not match its SHA-256 in the manifest; it was changed, copy the bundle again"
            )


def locate(folder: str | Path, name: str) -> Path:
    """The path of a listed file, refused where it would leave the folder.

    Raises:
        BundleError: absolute, with `..`, through a link that leads out, or missing.
    """
    check_path(name)
    folder = Path(folder)
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise BundleError(f"{path} is a link that leads out of the bundle; it is refused")
    if not path.is_file():
        raise BundleError(f"{path} is missing from the bundle; copy the bundle again")
    return path


def check_path(name: Any) -> None:
    """Refuse anything but a plain relative path with forward slashes.

    Raises:
        BundleError: names the path.
    """
    if not isinstance(name, str) or not name:
        raise BundleError(f"path {name!r} in the manifest is not a file name")
    parts = name.split("/")
    if (
        PurePosixPath(name).is_absolute()
        or re.search(r"[\\:\x00-\x1f]", name)
        or {"", ".", ".."} & set(parts)
    ):
        raise BundleError(
            f"path {name!r} in the manifest is refused; paths are relative, use / and stay inside the bundle"
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        BundleError: the file cannot be read.
    """
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error


def _check_files(entries: list[Any], name: str) -> set[str]:
    listed: set[str] = set()
    for index, entry in enumerate(entries):
        where = f"{name}: files[{index}]"
        if not isinstance(entry, dict):
            raise BundleError(f"{where} is {entry!r}; it must be an object with path, sha256 and bytes")
        path = entry_value(entry, "path", str, where)
        check_path(path)
        if path in listed:
            raise BundleError(f"{where}: {path!r} is listed twice")
        if not re.fullmatch("[0-9a-f]{64}", entry_value(entry, "sha256", str, where)):
            raise BundleError(f"{where}.sha256 is {entry['sha256']!r}; it must be 64 hexadecimal digits")
        if entry_value(entry, "bytes", int, where) < 0:
            raise BundleError(f"{where}.bytes is {entry['bytes']}; it must not be negative")
        listed.add(path)
    return listed


def _check_instructions(names: list[Any], name: str) -> None:
    if not all(isinstance(item, str) for item in names):
        raise BundleError(f"{name}: instructions is {names!r:.80}; it must be a list of strings")


def model_entry(entry: Any, where: str) -> ModelFile:
    """`engine`, one of `alternatives`, or what else names a model file.

    Raises:
        BundleError: names the key.
    """
    if not isinstance(entry, dict):
        raise BundleError(f"{where} is {entry!r}; it must be an object with name, file, threads and options")
    threads = entry_value(entry, "threads", int, where)
    if threads < 0:
        raise BundleError(f"{where}.threads is {threads}; it must not be negative")
    return ModelFile(
        engine=entry_value(entry, "name", str, where),
        file=entry_value(entry, "file", str, where),
        threads=threads,
        options=entry_value(entry, "options", dict, where),
        precision=entry_value(entry, "precision", str, where) if "precision" in entry else "",
        saturation=_saturation(entry, where) if "saturation" in entry else None,
    )


def _saturation(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    values: dict[str, Any] = entry_value(entry, "saturation", dict, where)
    entry_value(values, "severe", int, f"{where}.saturation")
    return values


def entry_value(values: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`values[key]`, which is of that kind; true and false are no integers.

    Raises:
        BundleError: the key is missing, or its value of another kind.
    """
    if key not in values:
        raise BundleError(f"{where} lacks the key {key!r}; the bundle is damaged or was not written by cveff")
    value = values[key]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(_WORDS[item] for item in kinds)
        raise BundleError(f"{where}: {key} is {value!r:.80}; it must be {expected}")
    return value
