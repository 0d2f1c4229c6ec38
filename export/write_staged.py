"""Measures a staged bundle's parts and writes it: manifest, report, files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cveff.data.dataset import Split
from cveff.dynamic.thresholds import Goal
from cveff.errors import CveffError, TargetError
from cveff.export.bundle import write_bundle
from cveff.export.deploy_manifest import PACKAGES, installed_versions
from cveff.export.report import render
from cveff.export.report_sections import Evidence
from cveff.export.report_stages import pictures
from cveff.export.scoring import first_images
from cveff.export.staged import Parts, measure_stages, staged_manifest
from cveff.measure.accuracy import confusion
from cveff.measure.memory import Memory, peak_memory_of_stages
from cveff.progress import Progress
from cveff.runtime.gates import GATES
from cveff.runtime.machine import describe
from cveff.runtime.stages import Stages

MIB = 2**20


def write_staged(
    parts: Parts,
    selection: Split,
    evaluation: Split,
    *,
    goal: Goal,
    gate: str,
    threads: int,
    batch_sizes: Sequence[int],
    seed: int,
    out: Path,
    extra: Mapping[str, Any],
    warnings: Sequence[str],
    progress: Progress,
    memory_mb: int = 0,
) -> Path:
    """Solve for thresholds and write the bundle.

    Args:
        memory_mb: MiB of peak resident memory that the stages may need at the first batch size; 0: no limit.
        extra: the manifest's keys that were not measured, `recipe` among them.
        warnings: what a reader of the report must know.

    Raises:
        TargetError: the stages need more memory.
        CveffError: an unknown gate, or as `measure_stages` and `write_bundle`.
    """
    if gate not in GATES:
        raise CveffError(f"gate {gate!r} is unknown; use one of {', '.join(GATES)}")
    memory = _memory(parts, selection, gate, threads, batch_sizes[0], memory_mb)
    staged = measure_stages(
        parts,
        selection,
        evaluation,
        goal=goal,
        gate=gate,
        threads=threads,
        batch_sizes=batch_sizes,
        seed=seed,
        progress=progress,
    )
    first = staged.streams[min(staged.streams)]
    if first["stages"].median_ms >= first["full"].median_ms:
        slower = (
            f"The stages take longer than {parts.full_name}: the network is so small that what the gates cost is not "
            "saved. Ship it without stages."
        )
        warnings = [*warnings, slower]
        progress.message(slower)
    manifest = {
        **staged_manifest(parts, staged, memory, selection, evaluation, goal, threads),
        "versions": installed_versions(PACKAGES),
        "machine": describe(),
        **extra,
    }
    progress.message("writing the report and the bundle")
    evidence = Evidence(
        confusion=None if staged.targets is None else confusion(staged.logits, staged.targets),
        samples=pictures(evaluation, parts.labels, staged),
        warnings=list(warnings),
    )
    files = {file: parts.folder / file for file in parts.files}
    return write_bundle(out, manifest=manifest, files=files, report_html=render(manifest, evidence))


def _memory(parts: Parts, selection: Split, gate: str, threads: int, batch: int, memory_mb: int) -> Memory:
    images = first_images(selection, parts.input, batch)
    memory = peak_memory_of_stages(
        parts.folder,
        Stages(gate, parts.stages),
        parts.input,
        parts.labels,
        np.resize(images, (batch, *images.shape[1:])),
        threads=threads,
    )
    used = memory.peak_rss_bytes / MIB
    if memory_mb and used > memory_mb:
        raise TargetError(
            f"{len(parts.stages)} stages, all of them open, need {used:.0f} MiB of memory at batch {batch}; the target "
            f"has {memory_mb}. Take a smaller network, or deploy it without stages if that needs less"
        )
    return memory
