"""Deep Incubation (Ni et al., arXiv:2212.04129): a network's modules are trained apart, assembled and tuned."""

from __future__ import annotations

from cveff.train.incubation.incubate import Incubate

__all__ = ["Incubate"]
