"""A device's measured blocks on disk: one JSON file for each engine, its version, processor and number of threads.

Files lie in `$XDG_CACHE_HOME/cveff/latency` (by default `~/.cache/cveff/latency`) and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cveff.errors import CveffError
from cveff.files import write_json
from cveff.runtime.machine import describe

SCHEMA = 2
"""Raised whenever blocks are measured differently: older files are then not found."""

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where tables lie by default."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cveff" / "latency"


class BlockTable:
    """Block's key -> milliseconds, read when made and written by `save`.

    Attributes:
        device: what the figures depend on: engine, its version, processor, threads.
        path: the file.
        milliseconds: the figures.
    """

    def __init__(self, engine: str, version: str, threads: int, folder: Path | None = None) -> None:
        machine = describe()
        self.device: dict[str, Any] = {
            "engine": engine,
            "version": version,
            "cpu": machine["cpu"],
            "isa": machine["isa"],
            "threads": threads,
        }
        digest = hashlib.sha256(json.dumps([SCHEMA, self.device], sort_keys=True).encode()).hexdigest()[:12]
        cpu = re.sub(r"[^a-z0-9]+", "-", str(machine["cpu"]).lower()).strip("-")
        name = f"{engine}-{version}-{cpu}-{threads}threads-{digest}.json"
        self.path = (cache_folder() if folder is None else Path(folder)) / name
        self.milliseconds: dict[str, float] = self._read()

    def save(self) -> None:
        """Write the file atomically, with what other processes have added meanwhile."""
        self.milliseconds = {**self._read(), **self.milliseconds}
        values = dict(sorted(self.milliseconds.items()))
        write_json(self.path, {"schema": SCHEMA, "device": self.device, "milliseconds": values})

    def _read(self) -> dict[str, float]:
        if not self.path.is_file():
            return {}
        try:
            return _checked(json.loads(self.path.read_text(encoding="utf-8")), self.device)
        except (OSError, ValueError, CveffError) as error:
            # Nothing is lost but time: a measurement can be made again, a wrong one must not be believed.
            _log.warning("%s is not used, blocks are measured again: %s", self.path, error)
            return {}


def _checked(values: Any, device: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a file's JSON.

    Raises:
        CveffError: it is damaged, of another schema or of another device.
    """
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        raise CveffError(f"its schema is not {SCHEMA}")
    if values.get("device") != device:
        raise CveffError(f"it was measured on {values.get('device')!r}, this is {device!r}")
    found = values.get("milliseconds")
    if not isinstance(found, dict):
        raise CveffError("it holds no table")
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CveffError(f"{key!r} has the value {value!r}, which is no number")
        if not math.isfinite(value) or value < 0:
            raise CveffError(f"{key!r} has the value {value!r}, which is no time")
    return {key: float(value) for key, value in found.items()}
