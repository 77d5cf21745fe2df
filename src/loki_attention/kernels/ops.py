"""The backends of the decode step, the choice among them, and how many rows go through at once."""

from typing import NamedTuple

from loki_attention.errors import ArgumentError, unknown_name

BACKENDS = ("auto", "torch")
_ELEMENTS_AT_ONCE = 1 << 24


class Backend(NamedTuple):
    """The backend in use and why."""

    name: str
    reason: str


def choose_backend(name: str) -> Backend:
    """The backend for a wish; raises ``ArgumentError`` for one that is unknown or cannot run."""
    if name in ("native", "triton"):
        raise ArgumentError(f"backend {name!r} is not part of this version; use 'auto' or 'torch'")
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    return Backend("torch", "asked for" if name == "torch" else "runs everywhere; no faster backend in this version")


def rows_at_once(heads: int, slots: int, tokens: int, head_dim: int) -> int:
    """How many query rows of a sequence fit in a chunk: about 16M score and gathered elements."""
    return max(1, _ELEMENTS_AT_ONCE // (heads * (slots + 2 * tokens * head_dim)))
