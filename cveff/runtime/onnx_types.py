"""Which number types an ONNX file's tensors have, without the onnx package, as bundles run where that is not
installed; and what ONNX Runtime gets wrong with some of them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Set
from pathlib import Path

FLOAT8 = frozenset({17, 18, 19, 20})
"""E4M3FN, E4M3FNUZ, E5M2 and E5M2FNUZ in onnx.proto's TensorProto.DataType."""

# Numbers of fields in onnx.proto, and wire types in protobuf's encoding.
_GRAPH, _INITIALIZER, _DATA_TYPE = 7, 5, 2
_VARINT, _EIGHT_BYTES, _COUNTED, _FOUR_BYTES = 0, 1, 2, 5


def stored_types(path: Path) -> frozenset[int]:
    """The types of the main graph's initializers, as TensorProto.DataType has them.

    Empty where the file is no protobuf message: the engine that opens it says so.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return frozenset(_types(data))
    except (ValueError, IndexError):  # an empty file cannot be mapped; a message that ends early
        return frozenset()


def harmful_rewrites(types: Set[int]) -> list[str]:
    """Graph optimisations that change what a file with tensors of `types` computes.

    ONNX Runtime 1.32 takes a Relu before a QuantizeLinear to float8 for one that rounding to unsigned integers makes
    superfluous, and drops it.
    """
    return ["ReluQuantRewrite"] if FLOAT8 & types else []


def _types(data: mmap.mmap) -> Iterator[int]:
    for number, start, stop in _fields(data, 0, len(data)):
        if number != _GRAPH:
            continue
        for inner, first, last in _fields(data, start, stop):
            if inner == _INITIALIZER:
                yield from (
                    _varint(data, at)[0] for field, at, _ in _fields(data, first, last) if field == _DATA_TYPE
                )


def _fields(data: mmap.mmap, position: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(number, where its value begins, where it ends) of each field of a message."""
    while position < stop:
        key, start = _varint(data, position)
        wire = key & 7
        if wire == _VARINT:
            position = _varint(data, start)[1]
        elif wire == _COUNTED:
            count, start = _varint(data, start)
            position = start + count
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            position = start + (8 if wire == _EIGHT_BYTES else 4)
        else:
            raise ValueError(f"no field begins at byte {start}")
        yield key >> 3, start, position


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
