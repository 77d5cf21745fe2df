"""Lists as options take them: 2K,8K or 1/8,1/16; each entry read by its own rule."""

from collections.abc import Callable
from typing import TypeVar

from loki_attention.errors import ArgumentError

Found = TypeVar("Found")


def listed(text: str | None, parse: Callable[[str], Found]) -> list[Found] | None:
    """The entries of a list, None where the option was not given."""
    return None if text is None else [parse(part.strip()) for part in text.split(",")]


def length(text: str) -> int:
    """A count of tokens: 32768 or 32K."""
    number, unit = (text[:-1], 1024) if text.upper().endswith("K") else (text, 1)
    return whole(number) * unit


def whole(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise ArgumentError(f"{text!r} is no whole number above 0; write 8192 or 8K for a length, 8 for a batch")
    return int(text)


def fraction(text: str) -> str:
    """A budget as a fraction, as it is written: 1/8."""
    numerator, _, denominator = text.partition("/")
    if not (numerator.isdecimal() and denominator.isdecimal() and 0 < int(numerator) <= int(denominator)):
        raise ArgumentError(f"a budget of {text!r} is no fraction of the tokens; write 1/8")
    return text
