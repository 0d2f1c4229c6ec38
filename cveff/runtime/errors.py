"""Exceptions that every room shares. They live below torch so that a bundle can raise them too.

An error says what was wrong, with which value, and what to do. `exit_code` is what the command line
returns: 2 for a user's mistake, 1 for ours.
"""

from __future__ import annotations


class CveffError(Exception):
    """Base of every error cveff raises on purpose."""

    exit_code = 2


class InputSizeError(CveffError):
    """An image or a batch does not have a size the model takes."""


class ImageError(CveffError):
    """A file or an array is not an image that can be read safely."""


class BundleError(CveffError):
    """A bundle is missing, tampered with, incomplete or newer than this program."""


class EngineError(CveffError):
    """An inference engine is not installed, cannot open the file, or failed while running."""


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, or its type: what is worth repeating of a library's message."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
