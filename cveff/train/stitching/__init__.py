"""A network assembled from stages of several trained ones, joined by light adapters."""

from __future__ import annotations

from cveff.train.stitching.assemble import Assemble
from cveff.train.stitching.assembly import Assembly

__all__ = ["Assemble", "Assembly"]
