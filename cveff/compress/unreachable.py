"""A goal that what may be cut cannot reach."""

from __future__ import annotations

from cveff.errors import StepError


class UnreachableError(StepError):
    """With every group at its least the network is still above its goal; the message says what is left."""
