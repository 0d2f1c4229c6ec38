"""What `kv_cache_peer.py` runs in the environment that has kvpress: perplexity behind a compressed prompt.

python kvpress_child.py model-folder windows.pt prompt share press    # prints one JSON line
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

PACKAGES = ("kvpress", "transformers", "torch")


def presses() -> dict[str, Callable[[float], Any]]:
    """Name -> the press that removes a share of the prompt, with its defaults."""
    import kvpress

    return {
        "snapkv": lambda ratio: kvpress.SnapKVPress(compression_ratio=ratio),
        "pyramidkv": lambda ratio: kvpress.PyramidKVPress(compression_ratio=ratio),
        "adakv": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=ratio)),
        # Its documentation: the paper's method is the press within a rotation of the keys that stay.
        "streaming-llm": lambda ratio: kvpress.KeyRerotationPress(
            kvpress.StreamingLLMPress(compression_ratio=ratio)
        ),
        "random": lambda ratio: kvpress.RandomPress(compression_ratio=ratio),
        "expected-attention": lambda ratio: kvpress.ExpectedAttentionPress(compression_ratio=ratio),
        "tova": lambda ratio: kvpress.TOVAPress(compression_ratio=ratio),
        "keydiff": lambda ratio: kvpress.KeyDiffPress(compression_ratio=ratio),
    }


@torch.no_grad()
def main() -> None:
    """Measure one press; errors end the process with their trace."""
    folder, file, prompt, share, name = sys.argv[1:]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    windows = torch.load(file, weights_only=True)
    press = presses()[name](1 - float(share))
    losses: list[float] = []
    kept: list[float] = []
    positions: list[list[list[list[int]]]] = []
    for window in windows:
        found, left, where = one_window(model, press, window[None], int(prompt), name)
        losses += found
        kept.append(left)
        positions.append(where)
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    answer = {
        "perplexity": math.exp(math.fsum(losses) / len(losses)),
        "num_tokens": len(losses),
        "kept": math.fsum(kept) / len(kept),
        "positions": positions,
        "versions": versions,
    }
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


def one_window(
    model: Any, press: Any, ids: Tensor, prompt: int, name: str
) -> tuple[list[float], float, list[list[list[int]]]]:
    """Losses of the tokens behind the prompt, the share of it that is kept, and what each layer's heads keep."""
    whole = transformers.DynamicCache()
    model(ids[:, :prompt], past_key_values=whole)
    cache = transformers.DynamicCache()
    with press(model):
        model(ids[:, :prompt], past_key_values=cache)
    where = [] if name == "streaming-llm" else kept_positions(model, whole, cache)
    lengths = [length for layer in where for length in map(len, layer)]
    share = sum(lengths) / len(lengths) / prompt if lengths else cache.get_seq_length() / prompt
    # Rotated keys are numbered anew, and the paper numbers what follows from there; others keep their positions.
    first = cache.get_seq_length() if name == "streaming-llm" else prompt
    losses = []
    for index, at in enumerate(range(prompt, ids.shape[1] - 1)):
        places = torch.tensor([[first + index]])
        out = model(ids[:, at : at + 1], past_key_values=cache, position_ids=places)
        losses.append(float(F.cross_entropy(out.logits[0, -1:].float(), ids[0, at + 1 : at + 2])))
    return losses, share, where


def kept_positions(model: Any, whole: Any, cache: Any) -> list[list[list[int]]]:
    """Layer -> head -> positions of the prompt that are kept, found by their keys."""
    found = []
    for index, layer in enumerate(model.model.layers):
        keys, all_keys = cache.layers[index].keys[0], whole.layers[index].keys[0]
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        heads = []
        for head in range(len(keys)):
            if masked is not None:  # kept in memory, and hidden from attention
                hidden = set(masked[2][masked[1] == head].tolist())
                heads.append([at for at in range(all_keys.shape[1]) if at not in hidden])
                continue
            nearest = torch.cdist(keys[head][None], all_keys[head][None])[0].argmin(1)
            heads.append(sorted(nearest.tolist()))
        found.append(heads)
    return found


if __name__ == "__main__":
    main()
