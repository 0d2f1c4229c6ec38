"""An exported `.onnx` file opened by itself: what it says about itself, in the words of a manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import BundleError
from .manifest import check_task


def file_manifest(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The keys of a manifest that an engine needs; no figures, since none were measured.

    Args:
        metadata: the file's `metadata_props`.

    Raises:
        BundleError: the file was not written by cveff.export, or its description is damaged.
    """
    missing = [key for key in ("architecture", "task", "input", "labels") if key not in metadata]
    if missing:
        raise BundleError(
            f"{path} does not say what it is (no {missing[0]}); give a file written by cveff.export"
        )
    try:
        values = {
            key: json.loads(metadata[key]) for key in ("input", "labels", "suppression") if key in metadata
        }
    except json.JSONDecodeError as error:
        raise BundleError(f"{path}: its description is damaged ({error}); export the model again") from None
    if not isinstance(values["labels"], list) or not isinstance(values["input"], dict):
        raise BundleError(f"{path}: its description is damaged; export the model again")
    manifest = {
        "model": {"name": path.stem, "architecture": metadata["architecture"]},
        "task": metadata["task"],
        **values,
        "engine": {"name": "onnxruntime", "file": path.name, "threads": 0, "options": {}},
        "alternatives": [],
        "machine": {},
    }
    check_task(manifest, str(path))
    return manifest
