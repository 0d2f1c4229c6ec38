"""Where modules are incubated: in turn, in processes of this machine, or as Ray tasks. They need not talk."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import torch

from cveff.errors import MissingDependencyError
from cveff.progress import Progress
from cveff.train.incubation.task import Outcome, Phase, do

Executor = Literal["turn", "processes", "ray"]


def do_all(phases: Sequence[Phase], executor: Executor, workers: int, progress: Progress) -> list[Outcome]:
    """Do phases that do not depend on each other, and return what they gave in their order.

    Args:
        workers: processes at a time, which share this machine's cores; ignored for the others.

    Raises:
        MissingDependencyError: "ray", which is not installed.
        CveffError: whatever a phase refuses; of several, the first.
    """
    if executor == "turn":
        return [do(phase, progress) for phase in phases]
    if executor == "ray":
        return _as_ray_tasks(phases)
    workers = min(workers or len(phases), len(phases))
    threads = max(1, (os.cpu_count() or 1) // workers)
    given = [
        replace(phase, threads=threads, device=_device(phase.device, index))
        for index, phase in enumerate(phases)
    ]
    # Not forked: torch's threads and CUDA do not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(do, given))


def _device(device: torch.device, index: int) -> torch.device:
    """GPUs in turn, where there are several."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", index % torch.cuda.device_count())


def _as_ray_tasks(phases: Sequence[Phase]) -> list[Outcome]:
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "Ray is not installed; pip install 'cveff[ray]', or use executor = 'processes'"
        ) from error
    ray.init(ignore_reinit_error=True)
    gpus = 1 if phases[0].device.type == "cuda" else 0
    task: Any = ray.remote(num_gpus=gpus)(do)
    found: list[Outcome] = ray.get([task.remote(phase) for phase in phases])
    return found
