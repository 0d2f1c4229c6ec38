"""Checks of settings that policies share."""

from __future__ import annotations

from cveff.errors import CacheError
from cveff.kv.rule import Amount


def check_amount(name: str, value: Amount, least: int = 0) -> None:
    """Raise unless `value` is an int of `least` or more, or a float in [0, 1]; in (0, 1] where `least` is above 0.

    Raises:
        CacheError: naming the setting, what it is and what it may be.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CacheError(f"{name} is {value!r}; give tokens (an int) or a share (a float)")
    if isinstance(value, int) and value < least:
        raise CacheError(f"{name} is {value}; give {least} tokens or more, or a share such as 0.5")
    if isinstance(value, float) and not (0 <= value <= 1 and (value > 0 or least == 0)):
        raise CacheError(f"{name} is {value}; give a share of the tokens up to 1.0, or a number of tokens")


def check_share(name: str, value: float, allow_zero: bool = False) -> None:
    """Raise unless `value` lies in (0, 1], or [0, 1].

    Raises:
        CacheError: naming the setting and its value.
    """
    if not (0 <= value <= 1 if allow_zero else 0 < value <= 1):
        raise CacheError(f"{name} is {value!r}; give a share {'from' if allow_zero else 'above'} 0 up to 1")


def check_count(name: str, value: int, least: int = 0) -> None:
    """Raise unless `value` is an int of `least` or more.

    Raises:
        CacheError: naming the setting and its value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CacheError(f"{name} is {value!r}; give a whole number from {least}")
