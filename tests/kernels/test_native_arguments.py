"""Nothing that Python can hand over reaches a kernel unchecked, and every refusal says what it wants."""

import inspect
from typing import Any

import pytest
import torch

from helpers import Shape, random_encoder
from loki_attention.core.tail import TailSums
from loki_attention.errors import ArgumentError
from loki_attention.kernels import native
from loki_attention.kernels.native import NativeEncoder, Spans
from loki_attention.kernels.rows import Rows
from native_cases import isas

SHAPE = Shape(2, 4, 64)
SLOTS = 100
ENCODER = random_encoder(SHAPE, "16@4+32@2", dtype=torch.float32)


def plain(function: Any) -> Any:
    """The function without the shape checks that pytest adds: what a user calls."""
    return inspect.unwrap(function)


def step(**changes: Any) -> Any:
    """A decode step of a good layer, changed."""
    encoder = NativeEncoder(ENCODER)
    values: dict[str, Any] = {
        "query": torch.randn(1, 8, 1, 64),
        "keys": torch.randn(1, 2, SLOTS, 64),
        "values": torch.randn(1, 2, SLOTS, 64),
        "packed": torch.zeros(1, 2, 112, 16, dtype=torch.uint8),
        "visible": Spans(None, torch.tensor([SLOTS])),
        "k": torch.tensor([50]),
        "scale": 0.1,
        "sinks": 4,
        "recent": 16,
        "tail": "linear",
        "sums": TailSums(
            torch.full((1, 1), 64.0), torch.ones(1, 2, 64), torch.ones(1, 2, 16), torch.ones(1, 2, 16, 64)
        ),
        **changes,
    }
    return plain(native.decode_step)(encoder, wants_indices=True, **values)


def test_the_good_step_is_good() -> None:
    assert step().output.isfinite().all()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"query": torch.randn(1, 8, 2, 64)}, "rows a sequence"),
    ({"query": torch.randn(1, 7, 1, 64)}, "heads over"),
    ({"query": torch.randn(1, 8, 1, 32)}, "keys"),
    ({"query": torch.randn(8, 64)}, "query"),
    ({"query": torch.randn(1, 8, 1, 64).bfloat16()}, "query is"),
    ({"query": torch.randn(1, 8, 1, 64, device="meta")}, "meta"),
    ({"keys": torch.randn(1, 2, SLOTS, 64).double()}, "float64"),
    ({"keys": torch.randn(1, 2, SLOTS, 128)[..., ::2]}, "contiguous"),
    ({"keys": torch.randn(1, 2, SLOTS, 64, device="meta")}, "meta"),
    ({"values": torch.randn(1, 2, SLOTS + 1, 64)}, "values"),
    ({"values": torch.randn(1, 2, SLOTS, 64).half()}, "values"),
    ({"packed": torch.zeros(1, 2, 96, 16, dtype=torch.uint8)}, "tiles"),
    ({"packed": torch.zeros(1, 2, 110, 16, dtype=torch.uint8)}, "tiles"),
    ({"packed": torch.zeros(1, 2, 112, 12, dtype=torch.uint8)}, "packed"),
    ({"packed": torch.zeros(1, 2, 112, 16, dtype=torch.int8)}, "packed"),
    ({"packed": torch.zeros(1, 2, 112, 32, dtype=torch.uint8)[..., ::2]}, "packed"),
    ({"visible": Spans(None, torch.tensor([SLOTS + 1]))}, "valid slots"),
    ({"visible": Spans(torch.tensor([-1]), torch.tensor([SLOTS]))}, "valid slots"),
    ({"visible": Spans(torch.tensor([60]), torch.tensor([50]))}, "valid slots"),
    ({"visible": Spans(None, torch.tensor([SLOTS], dtype=torch.int32))}, "stop"),
    ({"visible": Spans(None, torch.tensor([SLOTS, SLOTS]))}, "stop"),
    ({"visible": Rows(torch.arange(SLOTS)[None], torch.tensor([[SLOTS + 5]]))}, "said to see"),
    ({"visible": Rows(torch.arange(SLOTS + 1)[None], torch.tensor([[SLOTS]]))}, "rank"),
    ({"visible": Rows(torch.zeros(1, SLOTS, dtype=torch.int64), torch.tensor([[5]]))}, "said to see"),
    ({"k": torch.tensor([101])}, "k of sequence 0"),
    ({"k": torch.tensor([19])}, "k of sequence 0"),
    ({"k": torch.tensor([-1])}, "k of sequence 0"),
    ({"k": torch.tensor([1 << 40])}, "k of sequence 0"),
    ({"k": torch.tensor([50.0])}, "k is"),
    ({"sinks": -1}, "sinks"),
    ({"recent": -3}, "recent"),
    ({"tail": "all"}, "tail"),
    ({"sums": None}, "sums"),
    ({"sums": TailSums(torch.ones(1, 1), torch.ones(1, 2, 64), torch.ones(1, 2, 8), torch.ones(1, 2, 8, 64))}, "sums"),
    ({"soft_cap": 0.0}, "soft_cap"),
    ({"learned_sinks": torch.zeros(7)}, "learned_sinks"),
    ({"isa": "neon"}, "cannot run"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_steps_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        step(**changes)


@isas
@pytest.mark.parametrize(
    "indices",
    [[3, 100], [3, -1, 4], [-2, 3], [1 << 40, 3], [3, -(1 << 40)]],
)
def test_wrong_indices_raise(indices: list[int], isa: str) -> None:
    rows = torch.randn(1, 2, SLOTS, 64)
    table = torch.tensor(indices).expand(1, 2, 1, -1)
    with pytest.raises(ArgumentError, match="slots from 0 to 99"):
        plain(native.attend)(torch.randn(1, 8, 1, 64), rows, rows, table, 0.1, isa=isa)


def test_wrong_encoders_raise() -> None:
    with pytest.raises(ArgumentError, match="no native kernel"):
        NativeEncoder(random_encoder(SHAPE, "16@32", dtype=torch.float32))
    with pytest.raises(ArgumentError, match="no native kernel"):
        NativeEncoder(random_encoder(SHAPE, "16@4", dtype=torch.float64))
    with pytest.raises(ArgumentError, match="for this encoder"):
        plain(native.decode_step)(
            NativeEncoder(random_encoder(Shape(1, 4, 64), "16@4", dtype=torch.float32)),
            torch.randn(1, 8, 1, 64), torch.randn(1, 2, SLOTS, 64), torch.randn(1, 2, SLOTS, 64),
            torch.zeros(1, 2, 112, 16, dtype=torch.uint8), Spans(None, torch.tensor([SLOTS])), torch.tensor([50]), 0.1,
            sinks=4, recent=16,
        )  # fmt: skip


def test_wrong_spans_of_keys_raise() -> None:
    encoder, keys = NativeEncoder(ENCODER), torch.randn(1, 2, SLOTS, 64)
    packed = encoder.buffer(1, SLOTS)
    for start, stop in ((-1, 5), (6, 5), (0, SLOTS + 1), (0, 1 << 50)):
        with pytest.raises(ArgumentError):
            plain(native.encode_keys)(encoder, keys, packed, start, stop)
    with pytest.raises(ArgumentError, match="tiles"):
        plain(native.encode_keys)(encoder, keys, packed[:, :, :64], 0, SLOTS)


def test_wrong_sums_raise() -> None:
    encoder, keys = NativeEncoder(ENCODER), torch.randn(1, 2, SLOTS, 64)
    sign = torch.ones(1, SLOTS, dtype=torch.int8)
    good = TailSums(torch.zeros(1, 1), torch.zeros(1, 2, 64), torch.zeros(1, 2, 16), torch.zeros(1, 2, 16, 64))
    bad = [
        good._replace(tokens=torch.zeros(1)),
        good._replace(values=torch.zeros(1, 2, 64).double()),
        good._replace(products=torch.zeros(1, 2, 64, 16).mT),
        good._replace(encoded=torch.zeros(1, 2, 15)),
    ]
    for sums in bad:
        with pytest.raises(ArgumentError, match="sums"):
            plain(native.absorb)(encoder, keys, keys, sign, sums)
    with pytest.raises(ArgumentError, match="sign"):
        plain(native.absorb)(encoder, keys, keys, sign[:, :50], good)


def test_the_variable_forces_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ISA_VARIABLE, "portable")
    assert native.isa() == "portable"
    monkeypatch.setenv(native.ISA_VARIABLE, "sse9")
    with pytest.raises(ArgumentError, match="LOKI_NATIVE_ISA"):
        native.isa()
    monkeypatch.delenv(native.ISA_VARIABLE)
    assert native.isa() == native.usable_isas()[0]


def test_what_the_machine_has() -> None:
    assert native.available()
    assert native.usable_isas()[-1] == "portable"
    assert "avx2" not in native.usable_isas() or "fma" in native.cpu_features()
