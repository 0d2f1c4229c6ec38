"""`cveff generate`: text from a language model on disk, with a compressed key-value cache."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cveff.cli import options
from cveff.cli.options import examples, print_json, print_table, size
from cveff.console import working

if TYPE_CHECKING:
    from cveff.kv import KIVI, Policy
    from cveff.kv.generate import Generated


class PolicyName(StrEnum):
    """Policies by the names of their classes' `kind`."""

    fastgen = "fastgen"
    h2o = "h2o"
    streaming_llm = "streaming-llm"
    snapkv = "snapkv"
    pyramidkv = "pyramidkv"
    adakv = "adakv"
    random = "random"
    full = "full"


class Bits(StrEnum):
    """Of packed storage."""

    two = "2"
    four = "4"


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        epilog=examples(
            "cveff generate models/gemma-3-270m 'The capital of France' --recovery 0.95",
            "cveff generate models/llama --prompt-file report.txt --policy snapkv --budget 0.25 --bits 4",
        )
    )(generate)


def generate(
    model: Annotated[
        str, typer.Argument(help="A transformers model: a folder, or a name that is on this disk.")
    ],
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="Read the text from a file instead.")
    ] = None,
    policy: Annotated[
        PolicyName, typer.Option("--policy", help="What the cache keeps.")
    ] = PolicyName.fastgen,
    recovery: Annotated[
        float, typer.Option("--recovery", help="Of fastgen: attention each head has to keep, up to 1.")
    ] = 0.95,
    budget: Annotated[
        float,
        typer.Option(
            "--budget", help="Of the others: share of the prompt that is kept, or tokens from 2 on."
        ),
    ] = 0.5,
    bits: Annotated[Bits | None, typer.Option("--bits", help="Pack older tokens into so many bits.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Length of the answer.")
    ] = 64,
    sample: Annotated[
        bool,
        typer.Option(
            "--sample", help="Draw tokens (temperature 0.6, top-p 0.9) rather than take the likeliest."
        ),
    ] = False,
    heat_map: Annotated[
        Path | None, typer.Option("--heat-map", help="Draw what every head keeps: .svg, .png or .pdf.")
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Generate with a cache that keeps what attention uses, and show its bytes beside a full one's."""
    with working(quiet) as progress:
        from cveff.kv.generate import generate_text
        from cveff.kv.harness_picture import heat_map as draw

        chosen = choose(policy.value, recovery, budget)
        found, cache = generate_text(
            model,
            read_prompt(prompt, prompt_file),
            chosen,
            storage=pack(bits),
            max_new_tokens=max_new_tokens,
            sample=sample,
            seed=seed,
            device=device,
            progress=progress,
        )
        if heat_map is not None:
            draw(cache, heat_map)
    if as_json:
        return print_json(found.to_json())
    return show(found)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The text, from one of the two."""
    from cveff.errors import CveffError

    if (prompt is None) == (file is None):
        raise CveffError("give either a prompt or --prompt-file")
    if file is None:
        return prompt or ""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CveffError(f"{file} cannot be read as text: {error}") from error


def choose(name: str, recovery: float, budget: float) -> Policy:
    """The policy; a budget above 1 counts tokens."""
    from cveff.kv.budgeted import policy_of

    return policy_of(name, int(budget) if budget > 1 else budget, recovery=recovery)


def pack(bits: Bits | None) -> KIVI | None:
    """Packed storage of so many bits."""
    from cveff.kv import KIVI

    return None if bits is None else KIVI(bits=4 if bits is Bits.four else 2)


def show(found: Generated) -> None:
    """The text, then its figures."""
    typer.echo(found.text)
    rows: list[tuple[str, Any]] = [
        ("policy", found.policy),
        ("tokens", f"{found.prompt_tokens} of prompt, {found.new_tokens} generated"),
        (
            "cache in use",
            f"{size(found.live_nbytes)}, {100 * found.live_nbytes / found.full_nbytes:.1f}% of full",
        ),
        ("cache allocated", size(found.nbytes)),
        ("full cache", size(found.full_nbytes)),
        ("tokens kept", f"{100 * found.kept:.1f}% in full-attention layers"),
        ("heads", ", ".join(f"{count} {label}" for label, count in sorted(found.heads.items()))),
        ("speed", f"{found.tokens_per_second:.3g} tokens/s after {found.prefill_seconds:.3g} s of prompt"),
    ]
    print_table("", ("figure", "found"), rows)
    for note in found.notes:
        typer.echo(f"note: {note}")
