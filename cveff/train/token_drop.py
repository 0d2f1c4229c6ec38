"""Random layer-wise token dropping (random-LTD: Yao et al., arXiv:2211.11586): between its first and last block a
vision transformer is trained on a random part of the tokens, drawn anew in every block; the others skip the block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cveff.errors import StepError, TrainingError


@dataclass(frozen=True)
class TokenDrop:
    """How many tokens each middle block sees: `start`, growing linearly to all of them.

    Attributes:
        start: tokens at first, those of a class or of registers counted; by default a third of them, rounded up to
            a multiple of `increment`.
        until: share of the run in which the number grows to all tokens.
        increment: the number grows by multiples of this, which suits matrix units.
        keep_prefix: never drop class and register tokens; in the paper they are dropped like others.
        layer_token_schedule: let the learning rate follow the tokens that blocks have seen, not the steps
            (LayerToken): early steps, which see fewer, count for less. Without effect under a budget, whose schedule
            follows time.
    """

    start: int | None = None
    until: float = 0.9
    increment: int = 16
    keep_prefix: bool = False
    layer_token_schedule: bool = True

    def __post_init__(self) -> None:
        if self.start is not None and self.start < 1:
            raise TrainingError(f"token_drop.start is {self.start!r}; give 1 or more tokens, or leave it out")
        if not 0 < self.until <= 1:
            raise TrainingError(f"token_drop.until is {self.until!r}; give a share of the run in (0, 1]")
        if self.increment < 1:
            raise TrainingError(f"token_drop.increment is {self.increment!r}; give 1 or more tokens")

    def first(self, tokens: int) -> int:
        """`start`, or its default for a network of so many tokens."""
        if self.start is not None:
            return self.start
        return min(tokens, -(-tokens // (3 * self.increment)) * self.increment)

    def kept(self, share: float, tokens: int) -> int:
        """Tokens that a middle block sees once `share` of the run is over: the paper's linear schedule."""
        if share >= self.until:
            return tokens
        start = self.first(tokens)
        grown = int((tokens - start) * share / self.until)
        return min(tokens, start + grown // self.increment * self.increment)

    def consumed_share(self, total_steps: int, tokens: int, blocks: int) -> np.ndarray:
        """(total_steps + 1,) float64: of all the tokens that blocks see in the run, how many before each step."""
        kept = np.array([self.kept(step / total_steps, tokens) for step in range(total_steps)], np.float64)
        seen = 2 * tokens + (blocks - 2) * kept
        return np.concatenate([[0.0], np.cumsum(seen)]) / seen.sum()


class TokenDropper:
    """Makes the middle blocks of a network see a part of the tokens, in training mode only, until `remove`.

    Args:
        module: a transformer with `blocks`, each taking and giving tokens (B, N, C) whose order it does not use.
        images: (B, C, H, W) float, on the module's device, to try it on.

    Attributes:
        tokens: N.
        blocks: how many blocks there are.
        kept: tokens that middle blocks see; set it before a step.

    Raises:
        StepError: no such network, or `settings.start` is more than its tokens.
    """

    def __init__(self, module: nn.Module, settings: TokenDrop, images: Tensor, name: str) -> None:
        blocks = _blocks(module, name)
        self.blocks = len(blocks)
        self._prefix = int(getattr(module, "num_prefix_tokens", 1)) if settings.keep_prefix else 0
        self._skipping: dict[int, tuple[Tensor, Tensor]] = {}
        self.tokens = self.kept = _count_tokens(module, blocks, images, name)
        start = settings.first(self.tokens)
        if start > self.tokens or start <= self._prefix:
            raise StepError(
                f"token_drop.start is {start}, and {name} has {self.tokens} tokens, {self._prefix} of them always "
                f"kept; give {self._prefix + 1} to {self.tokens}"
            )
        self._handles = [
            handle
            for index, block in enumerate(blocks[1:-1])
            for handle in (
                block.register_forward_pre_hook(self._take(index)),
                block.register_forward_hook(self._put_back(index)),
            )
        ]
        self._try(module, images, max(start - 1, self._prefix + 1), name)

    def remove(self) -> None:
        """Leave the network as it was."""
        for handle in self._handles:
            handle.remove()

    def layer_tokens(self) -> int:
        """Tokens that the blocks see of one image, summed over blocks."""
        return 2 * self.tokens + (self.blocks - 2) * self.kept

    def _take(self, index: int) -> Any:
        def take(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x: Tensor = inputs[0]
            if not block.training or self.kept >= x.shape[1]:
                self._skipping.pop(index, None)
                return None
            chosen = choose(len(x), x.shape[1], self.kept, self._prefix, x.device)
            self._skipping[index] = (x, chosen)
            return (gather(x, chosen), *inputs[1:])

        return take

    def _put_back(self, index: int) -> Any:
        def put_back(block: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if index not in self._skipping:
                return None
            x, chosen = self._skipping.pop(index)
            return scatter(x, chosen, output)

        return put_back

    def _try(self, module: nn.Module, images: Tensor, kept: int, name: str) -> None:
        """Run a batch with fewer tokens: positions inside attention (biases, rotations) do not take it."""
        was_training, kept_before = module.training, self.kept
        buffers = {key: value.clone() for key, value in module.named_buffers()}
        self.kept = kept
        try:
            devices = [images.device] if images.device.type == "cuda" else []
            with torch.random.fork_rng(devices), torch.no_grad():
                module.train()(images)
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            self.remove()
            raise StepError(
                f"token_drop: {name} does not run with a part of its tokens ({str(error).splitlines()[0][:100]}); its "
                "blocks depend on where tokens are. Use a ViT with absolute position embeddings, or leave it out"
            ) from error
        finally:
            self._skipping.clear()
            self.kept = kept_before
            module.train(was_training)
            for key, value in module.named_buffers():
                value.copy_(buffers[key])


def choose(batch: int, tokens: int, kept: int, prefix: int, device: torch.device) -> Tensor:
    """Tokens drawn without replacement, in order and for each image anew; the first `prefix` are always among them.

    Returns:
        (batch, kept) int64, each row ascending.
    """
    scores = torch.rand(batch, tokens, device=device)
    scores[:, :prefix] = -1
    return scores.argsort(dim=1)[:, :kept].sort(dim=1).values


def gather(x: Tensor, chosen: Tensor) -> Tensor:
    """(B, N, C) and (B, K) to (B, K, C)."""
    return x.gather(1, chosen[:, :, None].expand(-1, -1, x.shape[2]))


def scatter(x: Tensor, chosen: Tensor, values: Tensor) -> Tensor:
    """`x` (B, N, C) with `values` (B, K, C) at the places of `gather`; the other tokens are those of `x`."""
    return x.scatter(1, chosen[:, :, None].expand(-1, -1, x.shape[2]), values.to(x.dtype))


def _blocks(module: nn.Module, name: str) -> Sequence[nn.Module]:
    blocks = getattr(module, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) < 3:
        raise StepError(
            f"token_drop: {name} is no vision transformer of three or more blocks; use one such as "
            "vit_tiny_patch16_224, or leave it out"
        )
    return list(blocks)


def _count_tokens(module: nn.Module, blocks: Sequence[nn.Module], images: Tensor, name: str) -> int:
    """N of the tokens (B, N, C) that every block takes and gives."""
    shapes: list[tuple[Any, Any]] = []

    def note(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        shapes.append((getattr(inputs[0], "shape", None), getattr(output, "shape", None)))

    handles = [block.register_forward_hook(note) for block in blocks]
    was_training = module.training
    try:
        with torch.no_grad():
            module.eval()(images)
    finally:
        module.train(was_training)
        for handle in handles:
            handle.remove()
    first = shapes[0][0] if shapes else None
    if first is None or len(first) != 3 or any(shape != first for pair in shapes for shape in pair):
        raise StepError(
            f"token_drop: the blocks of {name} do not all take and give the same tokens (B, N, C), so none can skip "
            "one; use a ViT, or leave it out"
        )
    return int(first[1])
