"""Text from a transformers model on disk, with a compressed cache, and what that saved."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cveff.errors import CacheError, MissingDependencyError
from cveff.kv.compress import compress
from cveff.kv.harness import kept_share
from cveff.kv.kivi import KIVI
from cveff.kv.prompt import Policy
from cveff.progress import Progress, Silent

if TYPE_CHECKING:
    from cveff.kv.cache import RaggedCache


@dataclass(frozen=True)
class Generated:
    """Text and figures.

    Attributes:
        text: what was generated, without the prompt.
        policy: the policy's settings.
        prompt_tokens, new_tokens: numbers of tokens.
        nbytes, live_nbytes, full_nbytes: of the cache at the end: allocated, in use, and without compression.
        kept: share of the tokens that full-attention layers keep at the end.
        heads: how many key-value heads the policy gave which word.
        tokens_per_second: after the first one.
        prefill_seconds: until the first token, profiling included.
        notes: what a reader of the figures should know.
    """

    text: str
    policy: str
    prompt_tokens: int
    new_tokens: int
    nbytes: int
    live_nbytes: int
    full_nbytes: int
    kept: float
    heads: dict[str, int]
    tokens_per_second: float
    prefill_seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)


def generate_text(
    name: str,
    prompt: str,
    policy: Policy,
    *,
    storage: KIVI | None = None,
    max_new_tokens: int = 64,
    sample: bool = False,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> tuple[Generated, RaggedCache]:
    """Load a model and its tokenizer, both from this disk, and generate.

    Args:
        name: a folder, or a name in the local cache of the hub; nothing is downloaded.
        prompt: text.
        policy: what the cache keeps.
        storage: how it packs older tokens.
        max_new_tokens: length of the answer at most.
        sample: temperature 0.6 and top-p 0.9, the FastGen paper's, rather than greedy.
        seed: of sampling.
        device: "cpu", "cuda", …; by default a GPU if there is one.
        progress: told what is being done.

    Returns:
        The text with its figures, and the cache.

    Raises:
        CacheError: no such model on this disk, an empty prompt, or as `compress`.
        MissingDependencyError: transformers is not installed.
    """
    progress = progress or Silent()
    model, tokenizer = _load(name, device, progress)
    ids = torch.tensor(tokenizer(prompt).input_ids, dtype=torch.long, device=model.device)[None]
    if not ids.shape[1]:
        raise CacheError("the prompt has no tokens; give some text")
    torch.manual_seed(seed)
    clock = _Clock()
    drawn = (
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0} if sample else {"do_sample": False}
    )
    progress.message("generating")
    with compress(model, policy, tokenizer=tokenizer, storage=storage) as cache:
        start = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            past_key_values=cache,
            stopping_criteria=[clock],
            **drawn,
        )
    prompt_tokens = ids.shape[1]
    new = out[0, prompt_tokens:]
    seconds = clock.last - clock.first
    heads = Counter(label for rows in cache.labels().values() for row in rows for label in row)
    return Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        policy=repr(policy),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new),
        nbytes=cache.nbytes,
        live_nbytes=cache.live_nbytes,
        full_nbytes=cache.full_nbytes,
        kept=kept_share(cache),
        heads=dict(heads),
        tokens_per_second=(len(new) - 1) / seconds if seconds else 0.0,
        prefill_seconds=clock.first - start,
        notes=cache.notes,
    ), cache


class _Clock:
    """Asked after every token whether to stop: the time of the first and of the last."""

    def __init__(self) -> None:
        self.first = self.last = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _load(name: str, device: str | None, progress: Progress) -> tuple[Any, Any]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise MissingDependencyError(
            f"{error}; pip install 'cveff[transformers]' brings transformers"
        ) from error
    progress.message(f"loading {name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=True, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CacheError(
            f"{name} is no causal language model with a tokenizer on this disk: {reason}"
        ) from error
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(target).eval(), tokenizer
