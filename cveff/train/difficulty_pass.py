"""A metric over a whole data set, once: in parts that a killed pass need not repeat, by several processes, kept in one
file that says which data and which metric it belongs to."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cveff.data.dataset import Split
from cveff.errors import CheckpointError, StepError
from cveff.files import write_tensors
from cveff.progress import Progress, Silent
from cveff.runtime.input_spec import InputSpec
from cveff.train.difficulty import BY_PROXY, Scorer, require_metric

PART = 2048
"""Images of a part."""

Range = tuple[int, int]

_VERSION = 1
_DIGEST_BYTES = 12


def measure_difficulty(
    split: Split,
    metric: str,
    spec: InputSpec,
    *,
    proxy: nn.Module | None = None,
    folder: str | Path | None = None,
    processes: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Difficulty of every image of a labelled split, (N,) float32; higher is harder.

    Args:
        metric: one of `cveff.train.difficulty.METRICS`.
        spec: how a network takes the images.
        proxy: the network that metrics about labels ask.
        folder: where the result is kept, as `METRIC-KEY.safetensors`, and parts of an unfinished pass beside it. A
            result that is there is read, not measured. None: nothing is kept.
        processes: how many share the work; the result is the same.
        seed: of "random".

    Raises:
        TrainingError: an unknown metric.
        StepError: the metric needs a proxy, or a process of the pass failed.
        CheckpointError: what is in `folder` is damaged or belongs to something else.
    """
    name = require_metric(metric, "metric")
    if processes < 1:
        raise StepError(f"processes is {processes!r}; give 1 or more")
    scorer = Scorer(name, split, spec, proxy, seed)
    identity = _identity(scorer, proxy)
    if folder is None:
        with TemporaryDirectory() as temporary:
            return _measured(scorer, identity, Path(temporary), processes, progress or Silent())
    return _measured(scorer, identity, Path(folder), processes, progress or Silent())


def load_difficulty(path: str | Path, split: Split) -> np.ndarray:
    """What `measure_difficulty` kept in a file, checked to be of these very images, (N,) float32.

    Raises:
        CheckpointError: the file is damaged, no such file, or of another data set.
    """
    values, identity = _read(Path(path))
    if identity.get("data") != data_digest(split):
        raise CheckpointError(
            f"{path} holds the {identity.get('metric')} of another data set ({identity.get('images')} images, not "
            f"these {len(split)}); measure it on this one"
        )
    if values.shape != (len(split),):
        raise CheckpointError(f"{path} is damaged: {values.shape} values for {len(split)} images; delete it")
    return values


def data_digest(split: Split) -> str:
    """A hash of a split's images and labels: of pixels in memory, of place, size and time of change of files."""
    digest = blake2b(str(len(split)).encode(), digest_size=_DIGEST_BYTES)
    digest.update(split.class_indices().tobytes())
    for index in range(len(split)):
        stamp = split.stamp(index)
        source = split.source(index) if stamp is None else stamp
        content = source.tobytes() if isinstance(source, np.ndarray) else str(source).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _identity(scorer: Scorer, proxy: nn.Module | None) -> dict[str, str]:
    """All that the values depend on."""
    weights = blake2b(digest_size=_DIGEST_BYTES)
    if proxy is not None and scorer.metric in BY_PROXY:
        for name, value in proxy.state_dict().items():
            weights.update(name.encode())
            weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "version": str(_VERSION),
        "metric": scorer.metric,
        "images": str(len(scorer.split)),
        "data": data_digest(scorer.split),
        "input": json.dumps(scorer.spec.to_json(), sort_keys=True),
        "proxy": weights.hexdigest(),
        "seed": str(scorer.seed if scorer.metric == "random" else 0),
    }


def _measured(
    scorer: Scorer, identity: dict[str, str], folder: Path, processes: int, progress: Progress
) -> np.ndarray:
    key = blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=_DIGEST_BYTES).hexdigest()
    path = folder / f"{scorer.metric}-{key}.safetensors"
    if path.is_file():
        return _checked(path, identity, len(scorer.split))
    parts = path.with_suffix(".parts")
    ranges = [(begin, min(begin + PART, len(scorer.split))) for begin in range(0, len(scorer.split), PART)]
    missing = [item for item in ranges if not _part(parts, item).is_file()]
    if len(missing) < len(ranges):
        progress.message(
            f"{scorer.metric}: going on after {len(ranges) - len(missing)} of {len(ranges)} parts"
        )
    if processes == 1 or len(missing) < 2:
        for item in progress.track(missing, f"measuring {scorer.metric}", len(missing)):
            _measure_part(scorer, identity, parts, item)
    else:
        _in_parallel(scorer, identity, parts, missing, min(processes, len(missing)))
    values = np.concatenate([_checked(_part(parts, item), identity, item[1] - item[0]) for item in ranges])
    write_tensors(path, {"difficulty": torch.from_numpy(values)}, identity)
    shutil.rmtree(parts)
    return values


def _part(parts: Path, item: Range) -> Path:
    return parts / f"{item[0]:09d}-{item[1]:09d}.safetensors"


def _measure_part(scorer: Scorer, identity: dict[str, str], parts: Path, item: Range) -> None:
    indices = np.arange(*item)
    write_tensors(_part(parts, item), {"difficulty": torch.from_numpy(scorer(indices))}, identity)


def _in_parallel(
    scorer: Scorer, identity: dict[str, str], parts: Path, missing: list[Range], processes: int
) -> None:
    # Forked processes would inherit torch's thread pools in an unusable state.
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // processes)
    workers = [
        context.Process(target=_work, args=(scorer, identity, parts, missing[first::processes], threads))
        for first in range(processes)
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed:
        raise StepError(
            f"{len(failed)} of {processes} processes that measured {scorer.metric} ended with code {failed[0]}; what "
            "they finished is kept: run it again, or with processes = 1 for the reason"
        )


def _work(scorer: Scorer, identity: dict[str, str], parts: Path, items: list[Range], threads: int) -> None:
    torch.set_num_threads(threads)
    for item in items:
        if os.getppid() == 1:  # whoever wanted the result is gone
            return
        _measure_part(scorer, identity, parts, item)


def _read(path: Path) -> tuple[np.ndarray, dict[str, str]]:
    try:
        with safe_open(str(path), framework="np") as handle:
            metadata = handle.metadata() or {}
            values = handle.get_tensor("difficulty")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or missing ({error}); delete it and measure again"
        ) from error
    if (
        metadata.get("version") != str(_VERSION)
        or values.dtype != np.float32
        or not np.isfinite(values).all()
    ):
        raise CheckpointError(f"{path} does not hold difficulties of images; delete it and measure again")
    return values, metadata


def _checked(path: Path, identity: dict[str, str], count: int) -> np.ndarray:
    """The values of a file that must be of `identity`."""
    values, found = _read(path)
    if found != identity:
        different = sorted(key for key in identity if found.get(key) != identity[key])
        raise CheckpointError(
            f"{path} belongs to something else (another {', '.join(different)}); delete it and measure again"
        )
    if values.shape != (count,):
        raise CheckpointError(
            f"{path} has {values.shape} values for {count} images; delete it and measure again"
        )
    return values
