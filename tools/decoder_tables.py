"""Tables of docs/ about decoders, made from the committed results of the benchmarks of the same names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from choices_tables import markdown

Values = dict[str, Any]


def gather_mlp(values: Values) -> str:
    """A row for each way and share of neurons, a column for each size: times as fast as the dense one."""
    cells = values["cells"]
    ways = [way for way in next(iter(cells.values())) if way != "dense"]
    dense = [f"{cell['dense']['ms']:.2f} ms" for cell in cells.values()]
    rows = [["dense", *dense]]
    for way in ways:
        rows.append(
            [
                way,
                *(
                    f"{cell[way]['times_as_fast']:.2f} ({cell[way]['low']:.2f}–{cell[way]['high']:.2f})"
                    for cell in cells.values()
                ),
            ]
        )
    return markdown(["", *cells], rows)


def decode_attention(values: Values) -> str:
    """A row for each shape and context, a column for each share of tokens kept."""
    rows, ways = [], []
    for shape, contexts in values["cells"].items():
        for context, cell in contexts.items():
            ways = [way for way in cell if way != "PyTorch"]
            times = [f"{cell[way]['ms']:.2f} ms, {cell[way]['times_as_fast']:.2f}×" for way in ways]
            rows.append([shape, context, f"{cell['PyTorch']['ms']:.2f} ms", *times])
    return markdown(["", "context", "PyTorch", *ways], rows)


def kv_memory(values: Values) -> str:
    """A row a policy: the peak of a process above the model, and the cache's bytes."""
    return markdown(
        ["policy", "peak above the model", "allocated", "in use", "by the formula"],
        [
            [name, *(f"{row[key] / 1e6:.1f} MB" for key in ("peak", "nbytes", "live_nbytes", "formula"))]
            for name, row in values["memory"].items()
        ],
    )


def kv_attention(values: Values) -> str:
    """A row for each share of tokens kept: time of a layer's attention to one new token."""
    return markdown(
        ["kept", "time", "over full", "95% of rounds"],
        [
            [
                name,
                f"{row['milliseconds']:.2f} ms",
                f"{row['ratio']:.2f}",
                f"{row['low']:.2f}–{row['high']:.2f}",
            ]
            for name, row in values["attention"].items()
        ],
    )


def kv_quality(values: Values) -> str:
    """A row for each model, text and policy: perplexity over the full cache's, and what was removed."""
    rows = []
    for key, policies in values["quality"].items():
        full = policies["full"]["perplexity"]
        for name, row in policies.items():
            rows.append(
                [
                    key,
                    name,
                    f"{row['perplexity']:.4g}",
                    f"{row['perplexity'] / full:.4f}",
                    f"{row['kept_at_end']:.1%}",
                    f"{row['removed']:.1%}",
                ]
            )
    return markdown(
        ["text", "policy", "perplexity", "over full", "tokens kept at the end", "bytes removed"], rows
    )


def kv_peer(values: Values) -> str:
    """A row for each text and policy: perplexity over the full cache's, ours and kvpress's."""
    rows = []
    for text, policies in values["rows"].items():
        full = policies["full"]["cveff"]["perplexity"]
        for name, row in policies.items():
            cells = []
            for who in ("cveff", "kvpress"):
                found = row.get(who)
                cells += [f"{found['perplexity'] / full:.4f}", f"{found['kept']:.1%}"] if found else ["", ""]
            same = row.get("same_tokens")
            rows.append([text, name, *cells, "" if same is None else f"{same:.1%}"])
    return markdown(
        ["text", "policy", "cveff", "of the prompt kept", "kvpress", "of the prompt kept", "same tokens"],
        rows,
    )


TABLES: dict[str, tuple[str, Callable[[Values], str]]] = {
    "gather_mlp": ("gather_mlp", gather_mlp),
    "decode_attention": ("decode_attention", decode_attention),
    "kv_memory": ("kv_cache", kv_memory),
    "kv_attention": ("kv_cache", kv_attention),
    "kv_quality": ("kv_cache", kv_quality),
    "kv_peer": ("kv_cache_peer", kv_peer),
}
