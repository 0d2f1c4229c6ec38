"""PyTorch's table of operators for ONNX, read once a process.

`torch.onnx.export` reads the thousand functions of torchlib anew for every file, a second or more that is a third of a
small network's export. The table depends on nothing but the version of its operator set.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

try:
    from torch.onnx._internal.exporter._registration import ONNXRegistry
except ImportError:  # another release may keep it elsewhere: its exports take longer, and are the same
    ONNXRegistry = None  # type: ignore[assignment, misc]


@contextmanager
def read_once() -> Iterator[None]:
    """Within it, exports get copies of a table that was read by the first of them."""
    if ONNXRegistry is None:
        yield
        return
    with mock.patch.object(ONNXRegistry, "from_torchlib", staticmethod(_copied(ONNXRegistry.from_torchlib))):
        yield


def _copied(read: Any) -> Any:
    def from_torchlib(*arguments: Any, **options: Any) -> Any:
        table = _table(read.__func__, arguments, tuple(sorted(options.items())))
        copied = ONNXRegistry()
        vars(copied).update(vars(table))
        # An export adds its own translations to the lists.
        copied.functions = {target: list(found) for target, found in table.functions.items()}
        return copied

    return from_torchlib


@functools.cache
def _table(read: Any, arguments: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> Any:
    return read(ONNXRegistry, *arguments, **dict(options))
