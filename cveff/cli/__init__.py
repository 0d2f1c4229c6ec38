"""The command `cveff VERB SUBJECT --option value`. One short function a verb; the work is in the library.

Results go to stdout (`--json`: nothing but JSON), progress and errors to stderr. Exit codes: 0; 2 a user's mistake,
said in one line; 1 ours, with a traceback; 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import cveff
from cveff.cli import (
    cascade,
    check,
    compress,
    deploy,
    elastic,
    generate,
    measure,
    models,
    quantize,
    recipe,
    targets,
    train,
)
from cveff.cli.options import examples
from cveff.errors import CveffError

INTERRUPTED = 130
BROKEN_PIPE = 141

_ClickError: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)
"""Base of the parser's own errors; where it lives differs between releases of typer."""

app = typer.Typer(
    name="cveff",
    help="Small, fast vision models with measured proof: train, compress, export, verify, measure and ship.",
    epilog=examples(
        "cveff train digits --out runs/digits",
        "cveff compress runs/digits --prune latency=0.5 --distill",
        "cveff quantize runs/digits --calibration photos/",
        "cveff deploy runs/digits --data digits --out digits.bundle",
        "cveff run digits.bundle photo.png",
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for verbs in (train, compress, quantize, deploy, cascade, check, measure, models, generate):
    verbs.register(app)
app.add_typer(elastic.app, name="elastic")
app.add_typer(recipe.app, name="recipe")
app.add_typer(targets.app, name="targets")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cveff {cveff.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and every library's messages. Works anywhere.")
    ] = False,
) -> None:
    """Options of every verb. `main` takes --debug out of the command line wherever it stands."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = compress.with_values([word for word in words if word != "--debug"])
    from cveff.console import configure_logging

    configure_logging(debug)
    # A polite kill ends like Ctrl-C: the blocks that remove half-written files run.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return _run(words, debug)


def _run(words: list[str], debug: bool) -> int:
    try:
        result: Any = typer.main.get_command(app).main(words, prog_name="cveff", standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:  # newer typer turns Ctrl-C into a return value, older into Abort
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except CveffError as error:
        if debug:
            traceback.print_exc()
        _say(f"error: {error}")
        return error.exit_code
    except _ClickError as error:
        error.show()  # type: ignore[attr-defined]
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted; nothing is half-written")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (`cveff models | head`). Python would complain once more on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer's own way of handling the same
            return BROKEN_PIPE
        raise
    except Exception:  # noqa: BLE001  (the last place that can tell a bug from a user's mistake)
        traceback.print_exc()
        _say(f"this is a bug in cveff {cveff.__version__}; please report it with the lines above")
        return 1


def _say(text: str) -> None:
    print(text, file=sys.stderr)
