"""Fill the zoo's cards from the committed results: values, commands, and the hashes of weights trained here.

python tools/update_cards.py            # rewrite the cards that changed
python tools/update_cards.py --check    # exit with 1 if a card is out of date
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path

from cveff.files import write_text
from cveff.model_zoo import catalogue

_FIGURE = re.compile(r"(?m)^\[\[figures\]\]\n(?:(?!\[).*\n?)*")


def update(path: Path, check: bool = False) -> bool:
    """Bring one card up to date; returns whether anything had to change (`check`: without writing it)."""
    card = catalogue.read(path)
    old = path.read_text(encoding="utf-8")
    figures = iter(card.figures)
    new = _FIGURE.sub(lambda block: _filled(block[0], next(figures)), old)
    if card.weights.kind == "checkpoint" and card.weights.available:
        digest = hashlib.sha256((card.weights.checkpoint / "weights.safetensors").read_bytes()).hexdigest()
        new = re.sub(r"(?m)^sha256 = .*\n", "", new)
        new = new.replace('kind = "checkpoint"\n', f'kind = "checkpoint"\nsha256 = "{digest}"\n', 1)
    if new != old and not check:
        write_text(path, new)
        catalogue.read(path)
    return new != old


def _filled(block: str, figure: catalogue.Figure) -> str:
    lines = [line for line in block.rstrip("\n").split("\n") if not re.match(r"(value|command) = ", line)]
    proof = figure.proof()
    if proof is not None:
        # JSON's escapes are TOML's, and repr keeps every digit, so the card equals its proof exactly.
        lines += [f"value = {proof[0]!r}", f"command = {json.dumps(proof[1], ensure_ascii=False)}"]
    return "\n".join(lines) + "\n" * (len(block) - len(block.rstrip("\n")))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a card is out of date"
    )
    arguments = parser.parse_args()
    changed = [
        path.stem
        for path in sorted((catalogue.HERE / "cards").glob("*.toml"))
        if update(path, check=arguments.check)
    ]
    state = "are out of date" if arguments.check else "updated"
    print(f"{len(changed)} cards {state}: {', '.join(changed) or '—'}")
    return 1 if arguments.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
