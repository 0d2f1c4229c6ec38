"""Logits of a teacher, kept by the content of the image it saw.

The key is a hash of the very pixels, so an entry can never be read for another crop or mixture; caching only pays
where images come back. Each batch is on disk before its training step, so a resumed run reads what the killed one
used: a batch that holds a new image is computed whole, as it was then, because logits depend, in their last bits, on
the batch they were computed in.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cveff.errors import CheckpointError

_KEY_BYTES = 16


class LogitsCache:
    """A map from images to logits, in memory and, with `path`, on disk.

    Args:
        path: the file, or None. One of another `identity` is begun again; a last entry cut short is dropped.
        identity: everything but the image that logits depend on (the teacher's weights, the precision, …).
        num_classes: logits an image.

    Raises:
        CheckpointError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None, identity: str, num_classes: int) -> None:
        self._path = path
        self._record = np.dtype([("key", f"V{_KEY_BYTES}"), ("logits", np.float32, (num_classes,))])
        self._known: dict[bytes, np.ndarray] = {}
        if path is not None:
            self._open(path, blake2b(identity.encode(), digest_size=_KEY_BYTES).digest())

    def __len__(self) -> int:
        return len(self._known)

    def through(self, images: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits (N, classes) float32 of `images` (N, C, H, W), from memory or from `compute(images)`."""
        pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        keys = [blake2b(image.tobytes(), digest_size=_KEY_BYTES).digest() for image in pixels]
        if any(key not in self._known for key in keys):
            computed = compute(images).float().cpu().numpy()
            fresh = {key: row for key, row in zip(keys, computed, strict=True) if key not in self._known}
            self._append(fresh)
            self._known |= fresh
        return torch.from_numpy(np.stack([self._known[key] for key in keys])).to(images.device)

    def _append(self, fresh: dict[bytes, np.ndarray]) -> None:
        if self._path is None:
            return
        records = np.empty(len(fresh), self._record)
        for position, (key, logits) in enumerate(fresh.items()):
            records[position] = (key, logits)
        try:
            with self._path.open("ab") as handle:
                handle.write(records.tobytes())
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be written ({error}); free space there") from error

    def _open(self, path: Path, header: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = path.read_bytes() if path.is_file() else b""
            if data[: len(header)] != header:
                path.write_bytes(header)
                return
            count = (len(data) - len(header)) // self._record.itemsize
            whole = len(header) + count * self._record.itemsize
            if whole < len(data):
                with path.open("r+b") as handle:
                    handle.truncate(whole)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read or written ({error})") from error
        records = np.frombuffer(data, self._record, count, len(header))
        # Copies: views would keep the whole file's bytes and refuse to be written.
        self._known = {entry["key"].tobytes(): entry["logits"].copy() for entry in records}
