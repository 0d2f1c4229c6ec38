"""What reaches layers while a network reads documents: inputs kept for training, without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cveff.errors import StepError

Document = Tensor | Mapping[str, Any]
"""What the network is called with: token ids (B, T), images, or keyword arguments; its `attention_mask` (B, T), where
there is one, says which tokens are padding."""


def run(model: nn.Module, document: Document) -> Any:
    """Call the network as it would be called with this document alone."""
    return model(**document) if isinstance(document, Mapping) else model(document)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode until the block ends, then each in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def watch(
    model: nn.Module,
    documents: Sequence[Document],
    layers: Mapping[str, nn.Module],
    see: Callable[[str, int, Tensor], None],
) -> None:
    """Show `see` what each layer reads: its name, the document's place, and the input of every token, (N, inputs).

    Raises:
        StepError: there are no documents.
    """
    if not documents:
        raise StepError("there are no documents; give at least one")
    place, kept = 0, None

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            see(name, place, rows if kept is None or len(kept) != len(rows) else rows[kept])

        return before

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        for place, document in enumerate(documents):  # noqa: B007, the hooks read it
            mask = document.get("attention_mask") if isinstance(document, Mapping) else None
            kept = None if mask is None else mask.reshape(-1).bool()
            run(model, document)


def split_documents(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Documents to train on and to hold out, at least one each, drawn without replacement.

    Raises:
        StepError: there are fewer than two.
    """
    if count < 2:
        raise StepError(f"{count} document cannot be split; give two or more, so that one is held out")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held = min(count - 1, max(1, round(share * count)))
    return sorted(order[held:]), sorted(order[:held])
