"""A training state whose tensors every rank writes its part of, by torch.distributed.checkpoint in safetensors files.

Two folders take turns: `state.safetensors`, written last, names the one that is whole.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, distributed

from cveff.data.share import Share
from cveff.errors import CheckpointError, CveffError
from cveff.files import write_tensors
from cveff.runtime.errors import first_line
from cveff.runtime.files import writable
from cveff.train.distributed import decided

SHARDS = ("state-shards-a", "state-shards-b")


def save_shards(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], share: Share) -> None:
    """Write `tensors` beside `path`, each rank its own parts, then `path` with `metadata` and what was written.

    All ranks call it together, and see one file system.

    Raises:
        CveffError: a file cannot be written, or the disk is full; an earlier state is left as it was.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    name = SHARDS[decided(_named(path) == SHARDS[0], share)]
    folder = path.parent / name
    with writable(folder):
        if share.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        distributed.barrier()
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            save(dict(tensors), storage_writer=writer)
        except CheckpointException as error:
            ranks = ", ".join(map(str, sorted(error.failures)))
            reason = first_line(next(iter(error.failures.values()))[0])
            raise CveffError(
                f"rank {ranks} cannot write its part of {path} ({reason}); the state before it is left as it was; "
                "free space there"
            ) from error
        distributed.barrier()
    if share.rank == 0:
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        write_tensors(path, {}, {**metadata, "shards": name, "shapes": json.dumps(shapes)})
    distributed.barrier()


def load_shards(path: Path, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Whole tensors from the parts that `path`, whose metadata is given, names; on any number of ranks.

    Raises:
        CheckpointError: a part is missing or damaged.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    if metadata["shards"] not in SHARDS:
        raise CheckpointError(f"{path} names the parts {metadata['shards']!r}; delete it and train again")
    folder, shapes = path.parent / metadata["shards"], json.loads(metadata["shapes"])
    try:
        reader = HuggingFaceStorageReader(str(folder))
        found = reader.read_metadata().state_dict_metadata
        tensors = {}
        for name, shape in shapes.items():
            entry = found.get(name)
            held = (
                sum(math.prod(chunk.sizes) for chunk in entry.chunks)
                if isinstance(entry, TensorStorageMetadata)
                else -1
            )
            if held != math.prod(shape):  # torch would leave what no part holds as it was
                raise CheckpointError(
                    f"{folder} lacks a part of {name}; ranks must write to one file system; delete {path.name} there "
                    "and train again"
                )
            assert isinstance(entry, TensorStorageMetadata)
            tensors[name] = torch.empty(shape, dtype=entry.properties.dtype)
        load(tensors, storage_reader=reader, no_dist=True)
    except (
        CheckpointException,
        SafetensorError,
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
    ) as error:
        raise CheckpointError(f"{folder} is damaged ({first_line(error)}); train again") from error
    return tensors


def _named(path: Path) -> str:
    """The folder that the state at `path` is in; empty where there is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as handle:
            return str((handle.metadata() or {}).get("shards", ""))
    except (SafetensorError, OSError):
        return ""
