"""What was found when a data set was loaded: counts, bad images, duplicates, warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BadImage:
    """A file that was left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class DataReport:
    """Facts about a loaded data set, for the user and for the bundle's report.

    Attributes:
        counts: images of each class, by split: `counts["train"]["cat"]`.
        bad_images: files left out under `on_bad_image="skip"`.
        duplicates: pairs of names, one image of each split, whose decoded pixels are equal.
        conflicts: pairs as in `duplicates` whose labels differ.
        warnings: sentences a user should read.
    """

    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    bad_images: tuple[BadImage, ...] = ()
    duplicates: tuple[tuple[str, str], ...] = ()
    conflicts: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; lists are cut to 100 entries beside their full counts."""
        return {
            "counts": {split: dict(classes) for split, classes in self.counts.items()},
            "num_bad_images": len(self.bad_images),
            "bad_images": [{"name": bad.name, "reason": bad.reason} for bad in self.bad_images[:100]],
            "num_duplicates": len(self.duplicates),
            "duplicates": [list(pair) for pair in self.duplicates[:100]],
            "num_conflicts": len(self.conflicts),
            "conflicts": [list(pair) for pair in self.conflicts[:100]],
            "warnings": list(self.warnings),
        }
