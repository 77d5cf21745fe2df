"""The choice of a backend, and how many rows go through at once."""

import pytest

from loki_attention.errors import ArgumentError
from loki_attention.kernels.ops import choose_backend, rows_at_once


@pytest.mark.parametrize(("name", "reason"), [("torch", "asked for"), ("auto", "runs everywhere")])
def test_torch_is_chosen_and_says_why(name: str, reason: str) -> None:
    backend = choose_backend(name)
    assert backend.name == "torch"
    assert reason in backend.reason


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_backend_that_cannot_run_is_refused_not_replaced(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"backend '{name}' is not part of this version"):
        choose_backend(name)


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match=r"unknown backend 'troch'; known: auto, torch \(did you mean 'torch'"):
        choose_backend("troch")


@pytest.mark.parametrize(("heads", "slots", "tokens"), [(1, 1, 1), (32, 4096, 512), (64, 1 << 20, 1 << 17)])
def test_rows_at_once_bound_the_memory_and_make_progress(heads: int, slots: int, tokens: int) -> None:
    rows = rows_at_once(heads, slots, tokens, 128)
    assert rows >= 1
    assert rows == 1 or rows * heads * (slots + 2 * tokens * 128) <= 1 << 24
