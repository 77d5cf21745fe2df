"""Token windows, some to fit on and some held out.

Knows tokens, counts and how many windows are asked for; knows nothing of texts: ``cutting.py`` makes windows of them.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Int64
from torch import Tensor

from loki_attention.errors import CorpusError, check_tokens

LEAST_TOKENS = 64
"""The fewest tokens worth calibrating on, and the shortest remainder of a text that counts as a window."""


class Source(NamedTuple):
    """Where text came from and how many of its tokens stand in the windows; ``name`` holds no folder of the machine."""

    name: str
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What text is cut into: windows of ``length`` tokens, and how many tokens to fit on and to hold out.

    Both are rounded up to whole windows. Raises ``ArgumentError`` for a length below 2 or a token count below 1.

    >>> request = Request(length=512, fit_tokens=1000, held_out_tokens=100)
    >>> request.fit_windows, request.held_out_windows
    (2, 1)
    """

    length: int
    fit_tokens: int
    held_out_tokens: int

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("fit_tokens", 1), ("held_out_tokens", 1)):
            check_tokens(name, getattr(self, name), least=least)

    @property
    def fit_windows(self) -> int:
        """Windows to fit on where there is text enough."""
        return math.ceil(self.fit_tokens / self.length)

    @property
    def held_out_windows(self) -> int:
        """Windows held out where there is text enough."""
        return math.ceil(self.held_out_tokens / self.length)

    @property
    def windows(self) -> int:
        """Windows in all."""
        return self.fit_windows + self.held_out_windows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Windows:
    """Token windows for calibration: int64 tensors (1, S) on the CPU, S <= ``length``.

    ``fit`` gives the moments, ``held_out``, which shares no token with it, the comparisons. ``length`` is that of the
    longest window. ``notes`` are sentences a user must be told. Raises ``CorpusError`` where either side has no
    window, or both together have fewer than 64 tokens.
    """

    fit: tuple[Int64[Tensor, "1 _"], ...]
    held_out: tuple[Int64[Tensor, "1 _"], ...]
    length: int
    sources: tuple[Source, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        count, tokens = len(self.fit) + len(self.held_out), self.fit_tokens + self.held_out_tokens
        if not self.fit or not self.held_out or tokens < LEAST_TOKENS:
            raise CorpusError(
                f"{tokens} tokens in {count} window{'s' * (count != 1)} are too little to calibrate on; at least two windows"
                f" (one to fit on, one held out) and {LEAST_TOKENS} tokens are needed: give more text"
            )

    @property
    def fit_tokens(self) -> int:
        """Tokens in the windows to fit on."""
        return sum(window.shape[1] for window in self.fit)

    @property
    def held_out_tokens(self) -> int:
        """Tokens in the held-out windows."""
        return sum(window.shape[1] for window in self.held_out)

    @property
    def fingerprint(self) -> str:
        """The sha256, in hex, of every token id, the windows' lengths and order, and which are held out."""
        digest = hashlib.sha256()
        for windows in (self.fit, self.held_out):
            digest.update(len(windows).to_bytes(8, "little"))
            for window in windows:
                digest.update(window.shape[1].to_bytes(8, "little"))
                digest.update(window.numpy().astype("<i8").tobytes())
        return digest.hexdigest()
