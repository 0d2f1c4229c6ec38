"""The least of SVG that the report's plots need; every text is escaped."""

from __future__ import annotations

from html import escape


def text(x: float, y: float, words: str, anchor: str) -> str:
    """`words` at a point, escaped; `anchor` is "start", "middle" or "end"."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def short(label: str, length: int = 16) -> str:
    """`label`, its end cut off where it is longer."""
    return label if len(label) <= length else label[: length - 1] + "…"


def svg(body: str, width: float, height: float, description: str) -> str:
    """The picture, as wide as the page at most; `description` is read out in its place."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(description)}" '
        f'style="max-width:{width:.0f}px">{body}</svg>'
    )
