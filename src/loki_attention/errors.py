"""Errors a user can cause. Each message says what was got, what was expected and what to do."""

import difflib


class LokiError(Exception):
    """Base class of every error this package raises on purpose; catch it to catch them all."""


class ArgumentError(LokiError, ValueError):
    """A value outside what a function accepts: an unknown name, a budget of zero, planes outside the grammar."""


class ModelError(LokiError):
    """A model this package cannot work with, and why."""


class ArtifactError(LokiError):
    """A basis folder that is missing, damaged, from a newer version, or not a basis at all."""


class MismatchError(ArtifactError):
    """A sound basis that belongs to another model: other architecture, layout, RoPE or weights."""


class CorpusError(LokiError):
    """Calibration text that cannot be read or is too little to calibrate on."""


class LokiWarning(UserWarning):
    """Something a user should know: a layer left dense, a context longer than calibrated, too little text."""


def unknown_name(kind: str, got: object, known: tuple[str, ...]) -> ArgumentError:
    """The error for a name that is not one of ``known``, with the nearest known name where there is one.

    >>> print(unknown_name("method", "locki", ("dense", "loki")))
    unknown method 'locki'; known: dense, loki (did you mean 'loki'?)
    """
    near = difflib.get_close_matches(str(got), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ArgumentError(f"unknown {kind} {got!r}; known: {', '.join(known)}{hint}")


def check_tokens(name: str, value: object, *, least: int, unit: str = "tokens") -> None:
    """Raise ``ArgumentError`` where ``value`` is not a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{name} must be a whole number of {unit}, at least {least}; got {value!r}")
