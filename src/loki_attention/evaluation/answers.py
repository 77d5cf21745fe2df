"""Answers to retrieval questions and their score: what a table or a picture shows. Pure data."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loki_attention.errors import ArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question's answer by one variant.

    ``tokens_read`` and ``bytes_read`` are means a decode step and sparse layer, ``tokens_cached`` and ``bytes_dense``
    what dense attention reads there; all four are 0 for a variant that was nowhere sparse.
    """

    variant: str
    text: str
    right: bool
    tokens_read: float = 0.0
    tokens_cached: float = 0.0
    bytes_read: float = 0.0
    bytes_dense: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A variant's answers together; reads are means a decode step and sparse layer, dense ones where it has none."""

    variant: str
    right: int
    asked: int
    tokens_read: float
    bytes_read: float
    bytes_dense: float

    @property
    def read_fraction(self) -> float:
        """Bytes read over dense attention's."""
        return self.bytes_read / self.bytes_dense if self.bytes_dense else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"read_fraction": self.read_fraction}


def score(answers: Sequence[Answer], *, dense: Answer) -> Score:
    """The score of one variant's answers; ``dense`` is any answer of a sparse variant, for what dense reads.

    Raises ``ArgumentError`` without answers.
    """
    if not answers:
        raise ArgumentError("a score needs at least one answer")
    count = len(answers)
    return Score(
        variant=answers[0].variant,
        right=sum(answer.right for answer in answers),
        asked=count,
        tokens_read=sum(answer.tokens_read or dense.tokens_cached for answer in answers) / count,
        bytes_read=sum(answer.bytes_read or dense.bytes_dense for answer in answers) / count,
        bytes_dense=sum(answer.bytes_dense or dense.bytes_dense for answer in answers) / count,
    )
