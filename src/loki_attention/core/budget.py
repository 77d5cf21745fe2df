"""How many tokens a decode step attends. The only place that rounds a fraction to a token count."""

import math
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from loki_attention.errors import ArgumentError, check_tokens

_UNIT = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Tokens attended by a decode step, per sequence and key/value head.

    Exactly one of ``tokens`` (an absolute count) and ``fraction`` (of the valid cached tokens, held as a whole
    number of 1/65536) is given. With S valid tokens, the new one included,

        tokens:    K = min(S, tokens)
        fraction:  K = min(S, max(ceil(f S / 65536), minimum, sinks + recent))

    The first ``sinks`` and the last ``recent`` valid tokens are always attended and count in K.
    Raises ``ArgumentError`` for anything that is not a positive, finite budget that holds sinks and recent.

    >>> Budget(fraction=1 / 8).of(1000)
    125
    >>> Budget(fraction=1 / 8).of(100), Budget(tokens=512).of(100)
    (64, 100)
    """

    tokens: int | None = None
    fraction: float | int | None = None
    minimum: int = 64
    sinks: int = 4
    recent: int = 32

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.fraction is None):
            raise ArgumentError(
                f"a budget needs exactly one of tokens and fraction, got tokens={self.tokens} and fraction="
                f"{self.fraction}; write Budget(tokens=512) or Budget(fraction=1/8)"
            )
        for name in ("minimum", "sinks", "recent"):
            check_tokens(name, getattr(self, name), least=0)
        if self.fraction is not None:
            _check_fraction(self.fraction)
        if self.tokens is not None:
            check_tokens("tokens", self.tokens, least=1)
            if self.tokens < self.sinks + self.recent:
                raise ArgumentError(
                    f"a budget of {self.tokens} tokens cannot hold {self.sinks} sinks and {self.recent} recent "
                    f"tokens; give at least {self.sinks + self.recent}, or fewer sinks and recent"
                )

    @classmethod
    def checked(cls, value: object) -> "Budget":
        """``value`` where it is a budget; raises ``ArgumentError`` for anything else, a bare number say."""
        if not isinstance(value, cls):
            raise ArgumentError(
                f"budget must be a Budget, got {value!r}; write Budget(tokens=512) or Budget(fraction=1/8)"
            )
        return value

    @classmethod
    def parse(cls, text: str, *, minimum: int = 64, sinks: int = 4, recent: int = 32) -> "Budget":
        """The budget a command line names: ``"25%"`` is a fraction, ``"512"`` a token count.

        >>> Budget.parse("25%").fraction, Budget.parse("512").tokens
        (0.25, 512)
        """
        number = text.strip().removesuffix("%")
        try:
            if text.strip().endswith("%"):
                share = float(number)
                if not 0 < share <= 100:
                    raise ArgumentError(f"a budget in percent must be above 0% and at most 100%; got {text!r}")
                return cls(fraction=share / 100, minimum=minimum, sinks=sinks, recent=recent)
            return cls(tokens=int(number), minimum=minimum, sinks=sinks, recent=recent)
        except ValueError as error:
            if isinstance(error, ArgumentError):
                raise
            raise ArgumentError(
                f"a budget of {text!r} is neither a percentage nor a token count; write 25% or 512"
            ) from None

    def of(self, valid_tokens: int) -> int:
        """K for a sequence of ``valid_tokens`` tokens (>= 0), the new one included."""
        return int(self.of_each(torch.tensor(valid_tokens)))

    def of_each(self, valid_tokens: Tensor) -> Tensor:
        """K for every entry of an integer tensor of valid token counts; same shape, int64."""
        counts = valid_tokens.long()
        if self.tokens is not None:
            return counts.clamp(max=self.tokens)
        wanted = -(-(counts * self.sixteen_bit_fraction) // _UNIT)
        return torch.minimum(wanted.clamp(min=max(self.minimum, self.sinks + self.recent)), counts)

    @property
    def sixteen_bit_fraction(self) -> int:
        """The fraction as a whole number of 1/65536, 0 for a budget in tokens."""
        return 0 if self.fraction is None else round(self.fraction * _UNIT)

    def at_fraction(self, fraction: float) -> "Budget":
        """This budget's minimum, sinks and recent at another fraction."""
        return replace(self, tokens=None, fraction=fraction)

    def __str__(self) -> str:
        if self.fraction is None:
            return f"{self.tokens} tokens ({self.sinks} sinks, {self.recent} recent)"
        least = f"at least {self.minimum}, {self.sinks} sinks, {self.recent} recent"
        return f"{100 * self.fraction:g} % of the tokens ({least})"


def _check_fraction(value: object) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not 1 / _UNIT <= value <= 1:  # type: ignore[operator,arg-type]
        raise ArgumentError(
            f"fraction must be a number above 0 and at most 1 (the smallest is 1/{_UNIT}); got {value!r}"
        )
