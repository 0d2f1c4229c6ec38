"""Where figures of a run go: JSON lines, and TensorBoard where it is installed and asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from cveff.errors import MissingDependencyError
from cveff.files import write_text
from cveff.runtime.files import writable


class Log(Protocol):
    """Something that keeps figures by step."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Keep `figures` of `step`."""
        ...

    def rewind(self, step: int) -> None:
        """Forget what was written after `step`: a resumed run repeats those steps."""
        ...


class NoLog:
    """A `Log` that keeps nothing: the default of library calls."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Ignore `figures`."""

    def rewind(self, step: int) -> None:
        """Do nothing."""


class FileLog:
    """`metrics.jsonl` in a folder, one JSON object a line, and TensorBoard events beside it.

    Args:
        folder: created if needed.
        tensorboard: also write TensorBoard events.

    Raises:
        MissingDependencyError: `tensorboard` is asked for and not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._writer: Any = None
        self._folder = folder / "tensorboard"
        if tensorboard:
            self._writer = _tensorboard_writer(self._folder, None)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one line; it is on disk when this returns.

        Raises:
            CveffError: the file cannot be written, or the disk is full.
        """
        with writable(self.path), self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **figures}) + "\n")
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def rewind(self, step: int) -> None:
        """Drop lines after `step`, and a last line that a kill cut short."""
        if self._writer is not None:
            self._writer.close()
            self._writer = _tensorboard_writer(self._folder, step + 1)
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
        write_text(self.path, "".join(kept))

    def close(self) -> None:
        """Close the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> FileLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _tensorboard_writer(folder: Path, purge_step: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError(
            "TensorBoard is not installed; pip install 'cveff[tensorboard]', or turn tensorboard off"
        ) from error
    return SummaryWriter(str(folder), purge_step=purge_step)
