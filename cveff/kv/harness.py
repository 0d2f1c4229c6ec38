"""What a policy costs and saves: perplexity after eviction, needles found again, bytes and tokens a second."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cveff.errors import CacheError
from cveff.kv.compress import compress
from cveff.kv.kivi import KIVI
from cveff.kv.marks import Marks
from cveff.kv.prompt import Policy


@dataclass(frozen=True)
class Quality:
    """Perplexity of tokens that were predicted from a compressed cache.

    Attributes:
        perplexity: exp of the mean negative log-likelihood.
        num_tokens: tokens scored.
        nbytes: allocated at the end, mean over windows; sliding layers included.
        live_nbytes: in use.
        full_nbytes: what an uncompressed cache would use.
        kept: share of the tokens of full-attention layers that is kept when the prompt ends, mean over windows.
        kept_at_end: the same after the last token.
        removed: share of the bytes of full-attention layers that is gone at the end.
        labels: how often the policy chose what, over windows, layers and heads.
    """

    perplexity: float
    num_tokens: int
    nbytes: float
    live_nbytes: float
    full_nbytes: float
    kept: float
    kept_at_end: float
    removed: float
    labels: dict[str, int]


@torch.no_grad()
def perplexity(
    model: Any,
    windows: Sequence[Tensor],
    policy: Policy,
    *,
    prompt: int,
    marks: Marks | None = None,
    storage: KIVI | None = None,
    slack: int = 64,
) -> Quality:
    """Compress after `prompt` tokens of each window, then feed the others one by one and score what they predict.

    The token right after the prompt is predicted before anything is evicted and not scored.

    Args:
        model: as for `compress`.
        windows: 1-d token ids, each longer than the prompt by 2 or more.
        policy: what is kept.
        prompt: tokens of the prompt.
        marks, storage, slack: as for `compress`.

    Raises:
        CacheError: a window is too short, or as `compress`.
    """
    if not windows or min(len(window) for window in windows) < prompt + 2:
        raise CacheError(f"every window needs {prompt} tokens of prompt and 2 more; give longer ones")
    losses: list[float] = []
    figures: dict[str, list[float]] = {}
    labels: dict[str, int] = {}
    for window in windows:
        ids = window[None]
        with compress(model, policy, marks=marks, storage=storage, slack=slack) as cache:
            model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
            share = kept_share(cache)
            for at in range(prompt, len(window) - 1):
                positions = torch.tensor([[at]], device=ids.device)
                out = model(
                    input_ids=ids[:, at : at + 1],
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                )
                losses.append(float(F.cross_entropy(out.logits[0, -1:].float(), ids[0, at + 1 : at + 2])))
        sliding = cache.sliding_nbytes
        found = {
            "nbytes": cache.nbytes,
            "live_nbytes": cache.live_nbytes,
            "full_nbytes": cache.full_nbytes,
            "kept": share,
            "kept_at_end": kept_share(cache),
            "removed": 1 - (cache.live_nbytes - sliding) / (cache.full_nbytes - sliding),
        }
        for name, figure in found.items():
            figures.setdefault(name, []).append(figure)
        for rows in cache.labels().values():
            for label in (label for row in rows for label in row):
                labels[label] = labels.get(label, 0) + 1
    means = {name: math.fsum(values) / len(values) for name, values in figures.items()}
    return Quality(
        perplexity=math.exp(math.fsum(losses) / len(losses)), num_tokens=len(losses), labels=labels, **means
    )


def kept_share(cache: Any) -> float:
    """Share of the tokens of full-attention layers that a cache keeps now."""
    kept = [length for rows in cache.kept().values() for row in rows for length in row]
    seen = [
        count for layer in cache.compressed.values() for count in layer.kv.seen for _ in layer.kv.kept()[0]
    ]
    return sum(kept) / sum(seen)


@dataclass(frozen=True)
class Needle:
    """A prompt that ends in a question about something said in it.

    Attributes:
        prompt: 1-d token ids.
        answer: 1-d token ids that should follow.
    """

    prompt: Tensor
    answer: Tensor


def needles(tokenizer: Any, filler: str, length: int, count: int, seed: int = 0) -> Iterator[Needle]:
    """Prompts in which a five-figure number is said once, at a random place in running text, and asked for at the end.

    Args:
        tokenizer: of the model.
        filler: text around it; it has to be longer than `length` tokens.
        length: tokens of a prompt, about.
        count: how many.
        seed: of numbers and places.

    Raises:
        CacheError: the filler is too short.
    """
    generator = torch.Generator().manual_seed(seed)
    words = tokenizer(filler, add_special_tokens=False).input_ids
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    for _ in range(count):
        number = str(int(torch.randint(10_000, 100_000, (), generator=generator)))
        said = tokenizer(f"\nThe secret number is {number}.\n", add_special_tokens=False).input_ids
        asked = tokenizer("\nThe secret number is", add_special_tokens=False).input_ids
        answered = tokenizer(f"\nThe secret number is {number}", add_special_tokens=False).input_ids[
            len(asked) :
        ]
        room = length - len(begin) - len(said) - len(asked)
        if not 0 < room <= len(words):
            raise CacheError(
                f"{length} tokens leave room for {room} of the filler's {len(words)}; give more text"
            )
        start = int(torch.randint(0, len(words) - room + 1, (), generator=generator))
        place = int(torch.randint(0, room, (), generator=generator))
        text = words[start : start + room]
        yield Needle(
            torch.tensor([*begin, *text[:place], *said, *text[place:], *asked]), torch.tensor(answered)
        )


@torch.no_grad()
def recall(
    model: Any,
    asked: Sequence[Needle],
    policy: Policy,
    *,
    marks: Marks | None = None,
    storage: KIVI | None = None,
) -> float:
    """Share of needles whose whole answer is the most likely one, token after token.

    The answer's first token is predicted from the whole prompt by any policy, so the question's last token is fed
    again after eviction: it is taken off the prompt.
    """
    found = 0
    for needle in asked:
        with compress(model, policy, marks=marks, storage=storage) as cache:
            model(input_ids=needle.prompt[None, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            at, token = len(needle.prompt) - 1, needle.prompt[-1:]
            right = True
            for expected in needle.answer:
                positions = torch.tensor([[at]], device=token.device)
                out = model(
                    input_ids=token[None], position_ids=positions, past_key_values=cache, use_cache=True
                )
                right = right and int(out.logits[0, -1].argmax()) == int(expected)
                at, token = at + 1, expected[None]
            found += right
    return found / len(asked)


@dataclass(frozen=True)
class Growth:
    """One context length.

    Attributes:
        context: tokens of the prompt, of each sequence.
        nbytes, live_nbytes, full_nbytes: of the cache after generating.
        tokens_per_second: generated, over all sequences.
        prefill_seconds: the prompt, profiling included.
    """

    context: int
    nbytes: int
    live_nbytes: int
    full_nbytes: int
    tokens_per_second: float
    prefill_seconds: float


@torch.no_grad()
def growth(
    model: Any,
    policy: Policy,
    contexts: Sequence[int],
    *,
    text: Tensor,
    new_tokens: int = 32,
    batch: int = 1,
    marks: Marks | None = None,
    storage: KIVI | None = None,
) -> list[Growth]:
    """Bytes and tokens a second against context length, greedily, from the beginning of `text` (1-d token ids).

    Raises:
        CacheError: the text is shorter than a context.
    """
    rows = []
    for context in contexts:
        if len(text) < context:
            raise CacheError(f"the text has {len(text)} tokens and a context {context}; give more text")
        ids = text[:context].repeat(batch, 1)
        with compress(model, policy, marks=marks, storage=storage) as cache:
            start = time.perf_counter()
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
            middle = time.perf_counter()
            for at in range(context, context + new_tokens):
                positions = torch.full((batch, 1), at, device=ids.device)
                out = model(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            int(token[0, 0])  # waits for a GPU
            seconds = time.perf_counter() - middle
        rate = batch * new_tokens / seconds
        rows.append(Growth(context, cache.nbytes, cache.live_nbytes, cache.full_nbytes, rate, middle - start))
    return rows
