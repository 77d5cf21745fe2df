"""Budgets to the integer, against fractions that do not round, and every refusal."""

import math
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from loki_attention.core.budget import Budget
from loki_attention.errors import ArgumentError, LokiError

FRACTIONS = st.floats(min_value=1 / 65536, max_value=1, allow_nan=False)
COUNTS = st.integers(min_value=0, max_value=100)
LENGTHS = st.integers(min_value=0, max_value=10_000_000)


def exact_k(budget: Budget, valid: int) -> int:
    if budget.tokens is not None:
        return min(valid, budget.tokens)
    assert budget.fraction is not None
    held = round(Fraction(budget.fraction) * 65536)
    wanted = math.ceil(Fraction(held, 65536) * valid)
    return min(valid, max(wanted, budget.minimum, budget.sinks + budget.recent))


@given(FRACTIONS, COUNTS, COUNTS, COUNTS, st.lists(LENGTHS, min_size=1, max_size=8))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_fraction_is_exact(fraction: float, minimum: int, sinks: int, recent: int, lengths: list[int]) -> None:
    budget = Budget(fraction=fraction, minimum=minimum, sinks=sinks, recent=recent)
    expected = [exact_k(budget, valid) for valid in lengths]
    assert [budget.of(valid) for valid in lengths] == expected
    each = budget.of_each(torch.tensor(lengths, dtype=torch.int32).reshape(1, -1))
    assert each.dtype == torch.int64
    assert each.tolist() == [expected]


@given(st.integers(min_value=36, max_value=10_000), LENGTHS)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_tokens_are_exact(tokens: int, valid: int) -> None:
    assert Budget(tokens=tokens).of(valid) == exact_k(Budget(tokens=tokens), valid)


@pytest.mark.parametrize(
    ("budget", "valid", "k"),
    [
        (Budget(fraction=1 / 8), 0, 0),
        (Budget(fraction=1 / 8), 1, 1),
        (Budget(fraction=1 / 8), 63, 63),
        (Budget(fraction=1 / 8), 65, 64),
        (Budget(fraction=1 / 8), 513, 65),
        (Budget(fraction=1 / 8), 1000, 125),
        (Budget(fraction=1 / 8), 1001, 126),
        (Budget(fraction=1.0), 1001, 1001),
        (Budget(fraction=1 / 65536, minimum=0, sinks=0, recent=0), 65536, 1),
        (Budget(fraction=1 / 65536, minimum=0, sinks=0, recent=0), 65537, 2),
        (Budget(fraction=1 / 64, minimum=8, sinks=4, recent=16), 100, 20),
        (Budget(tokens=512), 511, 511),
        (Budget(tokens=512), 513, 512),
        (Budget(tokens=36), 4096, 36),
    ],
)
def test_worked_examples(budget: Budget, valid: int, k: int) -> None:
    assert budget.of(valid) == k


@given(FRACTIONS, LENGTHS)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_never_more_than_there_is_and_never_less_for_more(fraction: float, valid: int) -> None:
    budget = Budget(fraction=fraction)
    assert min(valid, 64) <= budget.of(valid) <= valid
    assert budget.of(valid) <= budget.of(valid + 1) <= budget.of(valid) + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of tokens and fraction"),
        ({"tokens": 512, "fraction": 0.5}, "exactly one of tokens and fraction"),
        ({"tokens": 0}, "tokens must be a whole number"),
        ({"tokens": -5}, "tokens must be a whole number"),
        ({"tokens": True}, "tokens must be a whole number"),
        ({"fraction": 0.0}, "above 0 and at most 1"),
        ({"fraction": -0.25}, "above 0 and at most 1"),
        ({"fraction": math.nan}, "above 0 and at most 1"),
        ({"fraction": math.inf}, "above 0 and at most 1"),
        ({"fraction": 1.0001}, "above 0 and at most 1"),
        ({"fraction": 1 / 131072}, "above 0 and at most 1"),
        ({"tokens": 35}, "cannot hold 4 sinks and 32 recent tokens; give at least 36"),
        ({"tokens": 100, "sinks": 50, "recent": 51}, "give at least 101"),
        ({"tokens": 512, "sinks": -1}, "sinks must be a whole number"),
        ({"fraction": 0.5, "recent": -1}, "recent must be a whole number"),
        ({"fraction": 0.5, "minimum": -64}, "minimum must be a whole number"),
    ],
)
def test_refusals(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as raised:
        Budget(**fields)  # type: ignore[arg-type]
    assert isinstance(raised.value, LokiError)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": 12.5},
        {"tokens": math.nan},
        {"tokens": "512"},
        {"fraction": 0},
        {"fraction": 25},
        {"fraction": "25%"},
        {"fraction": True},
        {"fraction": 0.5, "recent": 1.5},
        {"fraction": 0.5, "minimum": None},
    ],
)
def test_wrong_types_are_refused(fields: dict[str, object]) -> None:
    """By the budget itself, or in a run with beartype by that, which comes first."""
    with pytest.raises((ArgumentError, TypeCheckError)):
        Budget(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25%", Budget(fraction=0.25)),
        (" 12.5% ", Budget(fraction=0.125)),
        ("100%", Budget(fraction=1.0)),
        ("512", Budget(tokens=512)),
        (" 36", Budget(tokens=36)),
    ],
)
def test_parse(text: str, expected: Budget) -> None:
    assert Budget.parse(text) == expected


def test_parse_hands_on_minimum_sinks_and_recent() -> None:
    parsed = Budget.parse("25%", minimum=10, sinks=1, recent=2)
    assert parsed == Budget(fraction=0.25, minimum=10, sinks=1, recent=2)


@pytest.mark.parametrize("text", ["", "%", "lots", "0.25", "0%", "150%", "nan%", "-5", "0", "35", "25 tokens"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ArgumentError):
        Budget.parse(text)


def test_at_fraction_keeps_what_is_forced() -> None:
    budget = Budget(tokens=512, minimum=10, sinks=1, recent=2)
    assert budget.at_fraction(1 / 16) == Budget(fraction=1 / 16, minimum=10, sinks=1, recent=2)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(tokens=512), "512 tokens (4 sinks, 32 recent)"),
        (Budget(fraction=1 / 8), "12.5 % of the tokens (at least 64, 4 sinks, 32 recent)"),
    ],
)
def test_str(budget: Budget, text: str) -> None:
    assert str(budget) == text


def test_is_frozen_and_by_keyword_only() -> None:
    budget = Budget(tokens=512)
    with pytest.raises(FrozenInstanceError):
        budget.tokens = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Budget(512)  # type: ignore[misc]
