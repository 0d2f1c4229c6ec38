"""Zoo models trained here: small checkpoints written by `cveff.save`, committed beside their cards."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cveff.errors import CheckpointError
from cveff.model import Model
from cveff.model import load as load_model
from cveff.model_zoo.catalogue import Card


def load_checkpoint(card: Card) -> Model:
    """The saved model a card of kind "checkpoint" names.

    Raises:
        CheckpointError: missing, damaged, or not the weights the card names.
    """
    folder = card.weights.checkpoint
    path = folder / "weights.safetensors"
    if not path.is_file():
        raise CheckpointError(
            f"the weights of {card.name} are not part of this installation ({card.weights.source}); "
            f"train them with `cveff train` and the recipe {card.training.recipe}"
        )
    check_hash(path, card)
    return load_model(folder)


def check_hash(path: Path, card: Card) -> None:
    """Refuse a file that is not the one the card's figures were measured on.

    Raises:
        CheckpointError: the SHA-256 differs.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if card.weights.sha256 is not None and found != card.weights.sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {found[:12]}…, the card of {card.name} names {card.weights.sha256[:12]}…; "
            "the file is damaged or another version: install it again"
        )
