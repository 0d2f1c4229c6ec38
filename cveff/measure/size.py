"""Bytes on disk and bytes of weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cveff.errors import CveffError

if TYPE_CHECKING:
    from torch import nn


def size_bytes(path: str | Path) -> int:
    """Bytes of everything an engine reads to open `path`.

    A `.xml` (OpenVINO IR) counts its `.bin`, a `.onnx` the external data files it names, a folder all its
    files.

    Raises:
        CveffError: the path, or a file it refers to, does not exist; or a `.onnx` is not readable.
    """
    path = Path(path)
    if path.is_dir():
        return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
    if not path.is_file():
        raise CveffError(f"{path} does not exist; check the path")
    files = {path}
    if path.suffix == ".xml":
        files.add(path.with_suffix(".bin"))
    elif path.suffix == ".onnx":
        files |= _external_data(path)
    missing = sorted(str(item) for item in files if not item.is_file())
    if missing:
        raise CveffError(
            f"{path} refers to {', '.join(missing)}, which does not exist; keep the files together"
        )
    return sum(item.stat().st_size for item in files)


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, those shared counted once."""
    tensors = {(t.data_ptr(), t.dtype): t for t in module.state_dict().values() if t.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _external_data(path: Path) -> set[Path]:
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:
        if type(error).__name__ != "DecodeError":  # protobuf's, whose module has no types
            raise
        raise CveffError(f"{path} is not a readable ONNX file ({error}); export it again") from error
    return {
        path.parent / entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if tensor.data_location == onnx.TensorProto.EXTERNAL and entry.key == "location"
    }
