"""Is this processor one that a bundle was made for? What it lacks, and what that does to answers and times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import machine
from .manifest import ModelFile


def processor_notes(manifest: Mapping[str, Any], file: ModelFile) -> list[str]:
    """Sentences on how this processor differs, answers first; none where the system does not tell what it has.

    Args:
        manifest: checked.
        file: which of its model files runs.
    """
    measured = _names(manifest["machine"].get("isa"))
    notes = []
    if may_clip(file, measured):
        notes.append(
            f"this processor has no VNNI: its integer kernels may clip sums, which {file.file} was not made for, so "
            "answers may be wrong; run `cveff verify` on this machine, and if accuracy is lost, deploy again with a "
            "target of these instructions, such as edge-cpu-avx2" + _way_out(manifest, file)
        )
    for expected, what in ((_names(manifest.get("instructions")), "made for"), (measured, "measured with")):
        if missing := machine.missing_isa(expected):
            notes.append(
                f"this processor lacks {', '.join(missing)}, which the bundle was {what}: times will differ from those "
                "in its manifest"
            )
            break
    return notes


def may_clip(file: ModelFile, measured: list[str]) -> bool:
    """Whether integer kernels may answer otherwise here than they were made and measured to.

    Args:
        measured: instruction sets of the machine that measured; a file that kept its accuracy on one whose kernels
            clip keeps it here.
    """
    is_of_gpu = file.engine == "tensorrt"
    if is_of_gpu or not file.precision.startswith("int8") or not machine.saturates(machine.isa()):
        return False
    return not file.is_guarded and not machine.saturates(measured)


def _way_out(manifest: Mapping[str, Any], file: ModelFile) -> str:
    floats = [
        entry
        for entry in manifest["alternatives"]
        if entry.get("precision") == "fp32" and entry["file"] != file.file
    ]
    return f"; --engine {floats[0]['name']}:fp32 computes in floats" if floats else ""


def _names(values: Any) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
