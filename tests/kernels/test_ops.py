"""The choice of a backend, and how many rows go through at once."""

import pytest
import torch

from loki_attention.errors import ArgumentError
from loki_attention.kernels import native, native_extension
from loki_attention.kernels.ops import Work, choose_backend, rows_at_once
from loki_attention.kernels.triton import availability


def work(**changes: object) -> Work:
    return Work(torch.float32, "cpu", 64, 4)._replace(**changes)


def test_torch_is_chosen_where_asked_for() -> None:
    assert choose_backend("torch") == ("torch", "asked for")


@pytest.mark.parametrize("name", ["auto", "native"])
def test_native_is_chosen_where_it_can_run(name: str) -> None:
    backend = choose_backend(name, work())
    assert backend.name == "native"
    assert native.isa() in backend.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "meta"}, "the model is on meta"),
        ({"dtype": torch.float64}, "the model is in float64"),
        ({"head_dim": 512}, "head dim 512"),
        ({"missing": "method 'streaming' has no kernels"}, "method 'streaming' has no"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_not_replaced(changes: dict[str, object], reason: str) -> None:
    assert choose_backend("auto", work(**changes)).name == "torch"
    assert reason in choose_backend("auto", work(**changes)).reason
    with pytest.raises(ArgumentError, match=f"backend 'native' cannot run here: {reason}"):
        choose_backend("native", work(**changes))


def test_an_extension_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_extension, "problem", lambda: "no such file")
    assert choose_backend("auto") == ("torch", "no native kernels here: no such file")


def test_triton_is_chosen_on_a_gpu_and_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = work(device="cuda")
    monkeypatch.setattr(availability, "problem", lambda device=None: None)
    monkeypatch.setattr(availability, "description", lambda: "Triton kernels")
    assert choose_backend("auto", on_gpu) == ("triton", "Triton kernels")
    assert choose_backend("triton", on_gpu) == ("triton", "asked for, Triton kernels")
    assert choose_backend("auto", work()).name == "native"
    assert choose_backend("auto", on_gpu._replace(head_dim=512)).reason.startswith(
        "no triton kernels here: head dim 512"
    )
    monkeypatch.setattr(availability, "problem", lambda device=None: "torch sees no GPU")
    assert choose_backend("auto", on_gpu) == ("torch", "no triton kernels here: torch sees no GPU")
    with pytest.raises(ArgumentError, match="backend 'triton' cannot run here: torch sees no GPU"):
        choose_backend("triton", on_gpu)


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(
        ArgumentError, match=r"unknown backend 'troch'; known: auto, native, triton, torch \(did you mean 'torch'"
    ):
        choose_backend("troch")


@pytest.mark.parametrize(("heads", "slots", "tokens"), [(1, 1, 1), (32, 4096, 512), (64, 1 << 20, 1 << 17)])
def test_rows_at_once_bound_the_memory_and_make_progress(heads: int, slots: int, tokens: int) -> None:
    rows = rows_at_once(heads, slots, tokens, 128)
    assert rows >= 1
    assert rows == 1 or rows * heads * (slots + 2 * tokens * 128) <= 1 << 24
