"""`attach`: a network computes, while it writes token by token, only what a fitted method chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from cveff.errors import StepError
from cveff.sparsity.fitted import Fitted
from cveff.sparsity.head_hook import HeadHook
from cveff.sparsity.heads import HeadPredictor
from cveff.sparsity.layers import InputHook, NeuronHook, PairHook, Shared, SparseHook
from cveff.sparsity.structure import find_mlps
from cveff.sparsity.teal import TEAL

Tokens = Literal["decode", "all"]
_SEQUENCES = ("input_ids", "inputs_embeds", "decoder_input_ids")


@dataclass(frozen=True)
class Usage:
    """What one layer did with the tokens it was made sparse for.

    Attributes:
        calls: how often it was asked.
        dense: how often it was computed whole, because too much was wanted at once.
        chosen: share of its neurons (or inputs) that a token chose, the mean.
        union: share that any token of a call chose, the mean.
    """

    calls: int
    dense: int
    chosen: float
    union: float


@dataclass
class Sparse:
    """An attached method.

    Attributes:
        fitted: the method.
        hooks: what stands in for each layer, by path.
    """

    fitted: Fitted
    hooks: Mapping[str, SparseHook] = field(repr=False)

    def usage(self) -> dict[str, Usage]:
        """By layer that was asked at all."""
        return {
            path: Usage(
                hook.calls, hook.dense, float(hook.chosen) / hook.calls, float(hook.union) / hook.calls
            )
            for path, hook in self.hooks.items()
            if hook.calls
        }


@contextmanager
def attach(
    model: nn.Module, fitted: Fitted, *, tokens: Tokens = "decode", dense_above: float | None = None
) -> Iterator[Sparse]:
    """Make the network sparse until the block ends; then it is what it was, bit by bit.

    Weights that are read input by input are laid out transposed meanwhile; no second copy is kept.

    Args:
        model: what `fitted` was fitted to.
        tokens: "decode": calls with one token a text are sparse, longer ones (the prompt) dense. "all": every token
            of every call is as if decoded alone, computed whole and then set to zero: for measuring perplexity, not
            for speed.
        dense_above: a call whose texts together choose more than this share of a layer computes it whole; None:
            measured on this machine, for each size and number of texts when it is first met.

    Yields:
        What is attached, which counts what it does.

    Raises:
        StepError: `fitted` belongs to another network, a value is out of range, or something is attached already.
    """
    if tokens not in ("decode", "all"):
        raise StepError(f"tokens is {tokens!r}; give 'decode' or 'all'")
    if dense_above is not None and not 0 <= dense_above <= 1:
        raise StepError(f"dense_above is {dense_above!r}; give a share from 0 to 1, or None to measure it")
    for path, module in model.named_modules():
        if isinstance(getattr(module.__dict__.get("forward"), "__self__", None), SparseHook):
            raise StepError(f"{path} is sparse already; leave the other attach first")
    fitted.check(model)
    shared = Shared(everything=tokens == "all", dense_above=dense_above)
    hooks = _hooks(model, fitted, shared)
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(_watch_length(shared), with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(_forget_length(shared), always_call=True).remove)
        for hook in hooks.values():
            stack.enter_context(hook.installed())
        yield Sparse(fitted, hooks)


def _hooks(model: nn.Module, fitted: Fitted, shared: Shared) -> dict[str, SparseHook]:
    hooks: dict[str, SparseHook] = {}
    method = fitted.method
    if isinstance(method, TEAL):
        for (path, layer), tensors in zip(method.layers(model).items(), fitted.tensors, strict=True):
            hooks[path] = InputHook(layer, tensors["threshold"].to(layer.weight.device), shared)
        return hooks
    if isinstance(method, HeadPredictor):
        for attention, tensors in zip(method.attentions(model), fitted.tensors, strict=True):
            moved = {name: tensor.to(attention.query.weight.device) for name, tensor in tensors.items()}
            hooks[attention.path] = HeadHook(attention, method, moved, shared)
        return hooks
    before: NeuronHook | None = None
    for mlp, tensors in zip(find_mlps(model), fitted.tensors, strict=True):
        moved = {name: tensor.to(mlp.down.weight.device) for name, tensor in tensors.items()}
        kind = NeuronHook if mlp.whole else PairHook
        before = hooks[mlp.path] = kind(mlp, method, moved, shared, before)
    return hooks


def _watch_length(shared: Shared) -> Any:
    """A hook that notes whether the network is called with one token a text."""

    def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = [keywords[name] for name in _SEQUENCES if isinstance(keywords.get(name), Tensor)]
        given += [argument for argument in arguments if isinstance(argument, Tensor)]
        # Token ids (B, 1) or their embeddings (B, 1, inputs); four dimensions are images.
        shared.decoding = bool(given) and given[0].dim() in (2, 3) and given[0].shape[1] == 1

    return before


def _forget_length(shared: Shared) -> Any:
    """A hook that ends what the other began: a part of the network called by itself is dense."""

    def after(*_: Any) -> None:
        shared.decoding = False

    return after
