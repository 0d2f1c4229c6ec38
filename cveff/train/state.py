"""The state of an interrupted run in one file: tensors and the JSON that holds them together, as safetensors.

One file renamed into place is either the old state or the new one, whenever the process dies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cveff.data.share import Share
from cveff.errors import CheckpointError
from cveff.files import write_tensors
from cveff.train.sharded import is_sharded
from cveff.train.sharded_state import load_shards, save_shards

STATE_VERSION = 1
_TENSOR = "__tensor__"
_INTEGER_KEYS = "__integer_keys__"


def save_state(path: Path, state: Mapping[str, Any], share: Share | None = None) -> None:
    """Write nested dicts and lists of tensors and JSON values, atomically.

    Args:
        share: of this process in a group whose ranks hold parts of the tensors; all ranks call it together.

    Raises:
        CveffError: the file cannot be written, or the disk is full; an earlier state is left as it was.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _flatten(state, "state", tensors)
    metadata = {"version": str(STATE_VERSION), "tree": json.dumps(tree)}
    if share is None:
        write_tensors(path, tensors, metadata)
    else:
        save_shards(path, tensors, metadata, share)


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        CheckpointError: the file is damaged or was written by a newer cveff.
    """
    try:
        with safe_open(str(path), framework="pt") as handle:
            metadata = handle.metadata() or {}
            if int(metadata.get("version", -1)) != STATE_VERSION:
                raise CheckpointError(
                    f"{path} has state version {metadata.get('version')!r}, this cveff reads {STATE_VERSION}; "
                    "delete it and train again, or use the cveff that wrote it"
                )
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        if "shards" in metadata:
            tensors = load_shards(path, metadata)
        state = _restore(json.loads(metadata["tree"]), tensors)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it and train again") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} does not hold a training state; delete it and train again")
    return state


def identity(settings: Mapping[str, Any], objective: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """What must be equal for a state to fit a run: the settings, the model, the data and the seed."""
    # These change how fast the work goes, not what comes out.
    speed = (
        "num_workers",
        "checkpoint_minutes",
        "checkpoint_activations",
        "offload_optimizer",
        "distributed",
    )
    without = speed if settings["optimizer"] == "galore" else (*speed, "galore")
    kept = {key: value for key, value in settings.items() if key not in without}
    kept["difficulty"] = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in settings["difficulty"].items()
        if key != "processes"
    }
    return {**({"objective": dict(objective)} if objective else {}), "train": kept, **others}


def since_added(before: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings of a state that an older release wrote: those it did not have yet were as `defaults` are."""
    found = dict(before)
    for key, default in defaults.items():
        old = found.setdefault(key, default)
        if isinstance(old, Mapping) and isinstance(default, Mapping):
            found[key] = since_added(old, default)
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    """The first few keys that differ between two nested settings, as "train.epochs: 5 then, 6 now"; "" if none."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            deeper = differences(old, new, f"{prefix}{key}.")
            found += [deeper] if deeper else []
        elif _as_lists(old) != _as_lists(new):
            found.append(f"{prefix}{key}: {old!r} then, {new!r} now")
    return "; ".join(found[:3])


def _as_lists(value: Any) -> Any:
    """Tuples as JSON gives them back, however deep."""
    if isinstance(value, Mapping):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def _flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if is_sharded(value):
            tensors[name] = value.detach()
            return {_TENSOR: name}
        # safetensors keeps no memory format: strides are restored by copying into the live tensors.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        items = {str(key): _flatten(item, f"{name}.{key}", tensors) for key, item in value.items()}
        if value and all(isinstance(key, int) for key in value):
            return {_INTEGER_KEYS: items}
        return items
    if isinstance(value, (list, tuple)):
        return [_flatten(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"{name} is a {type(value).__name__}, which a training state cannot hold")


def _restore(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_restore(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if set(tree) == {_TENSOR}:
        return tensors[tree[_TENSOR]]
    if set(tree) == {_INTEGER_KEYS}:
        return {int(key): _restore(item, tensors) for key, item in tree[_INTEGER_KEYS].items()}
    return {key: _restore(item, tensors) for key, item in tree.items()}
