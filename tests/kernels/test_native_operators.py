"""The kernels as torch.library operators: what opcheck wants, native's own results, graphs that compile, refusals."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import Shape
from loki_attention.core.encoder import ENCODER_TENSORS
from loki_attention.core.tail import TailSums
from loki_attention.errors import ArgumentError
from loki_attention.kernels import native, native_operators
from loki_attention.kernels.native import NativeEncoder
from loki_attention.kernels.rows import Spans
from native_cases import FRACTION, Case, native_step, random_sinks, sums_of, visible_of

OPERATORS = torch.ops.loki_attention
# Long enough for a tail in every sequence: opcheck compares outputs, and no number equals no number.
SPANS = Case("32@4", Shape(1, 7, 80), (200, 190, 180), "linear")
HOLES = Case("16@4+32@2", Shape(2, 4, 64), (257, 200), "mean", FRACTION, holes=True)
both = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(SPANS, torch.float32, id="spans-float32"),
        pytest.param(HOLES, torch.bfloat16, id="holes-bfloat16", marks=pytest.mark.slow),
    ],
)


class Arguments:
    """The flat arguments of every operator for one layer."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float32) -> None:
        self.case, self.layer, encoder = case, case.layer(dtype), case.encoder()
        self.tensors, self.planes = [getattr(encoder, name) for name in ENCODER_TENSORS], case.planes
        self.native = NativeEncoder(encoder)
        self.slots = self.layer.keys.shape[2]
        self.packed = self.native.buffer(len(self.layer.keys), self.slots).zero_()
        native.encode_keys(self.native, self.layer.keys, self.packed, 0, self.slots)
        visible = visible_of(self.layer, case.holes)
        spans = isinstance(visible, Spans)
        self.visible = (
            (visible.start, visible.stop, None, None) if spans else (None, None, visible.rank, visible.tokens)
        )
        self.k, self.sums = case.k(self.layer), sums_of(self.layer, encoder)
        self.width, self.forced = int(self.k.max()) + 3, (case.budget.sinks, case.budget.recent)
        self.softmax = (2.5, random_sinks(case))

    def encode_keys(self) -> tuple[Any, ...]:
        return self.tensors, self.planes, self.layer.keys, self.packed.clone(), 3, self.slots

    def absorb(self) -> tuple[Any, ...]:
        sign = torch.ones(len(self.layer.keys), self.slots, dtype=torch.int8)
        return self.tensors, self.planes, *self.layer[1:3], sign, *(tensor.clone() for tensor in self.sums)

    def select(self) -> tuple[Any, ...]:
        codes, *numbers, _ = native.encode_query(self.native, self.layer.query, self.case.shape.scale)
        sizes = (self.width, self.slots, *self.forced, 2.5)
        numbers = [tensor.contiguous() for tensor in numbers]
        return self.tensors, self.planes, codes, *numbers, self.packed, *self.visible, self.k, *sizes

    def attend(self) -> tuple[Any, ...]:
        heads, dim = self.layer.query.shape[1::2]
        step = native_step(self.case, self.layer, native.isa())
        tail = (step.log_mass, torch.ones(len(self.layer.keys), heads, 1, dim))
        return *self.layer[:3], step.indices, self.case.shape.scale, *tail, *self.softmax

    def dense_decode(self) -> tuple[Any, ...]:
        return *self.layer[:3], *self.visible, self.case.shape.scale, *self.softmax

    def decode_step(self) -> tuple[Any, ...]:
        budget = (self.k, self.width, self.case.shape.scale, *self.forced, self.case.tail, list(self.sums))
        return self.tensors, self.planes, *self.layer[:3], self.packed, *self.visible, *budget, *self.softmax


@both
@pytest.mark.parametrize("name", ["encode_keys", "absorb", "select", "attend", "dense_decode", "decode_step"])
def test_opcheck(name: str, case: Case, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(OPERATORS, name).default, getattr(Arguments(case, dtype), name)())


@both
def test_results_are_natives(case: Case, dtype: torch.dtype) -> None:
    given = Arguments(case, dtype)
    layer, visible = given.layer, visible_of(given.layer, case.holes)
    soft = {"soft_cap": 2.5, "learned_sinks": given.softmax[1]}
    forced = {"sinks": case.budget.sinks, "recent": case.budget.recent}

    *_, packed, _, _ = arguments = given.encode_keys()
    packed.zero_()
    OPERATORS.encode_keys(*arguments)
    assert torch.equal(packed[:, :, 16:], given.packed[:, :, 16:])

    arguments = given.absorb()
    expected = TailSums(*(tensor.clone() for tensor in given.sums))
    OPERATORS.absorb(*arguments)
    native.absorb(given.native, layer.keys, layer.values, arguments[4], expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(arguments[5:], expected, strict=True))

    indices, mass = OPERATORS.select(*given.select())
    encoded = native.encode_query(given.native, layer.query, case.shape.scale)
    selected = native.select(
        given.native, encoded, given.packed, visible, given.k, slots=given.slots, **forced, soft_cap=2.5
    )
    assert torch.equal(indices[..., :-3], selected.indices) and (indices[..., -3:] == -1).all()
    assert torch.equal(mass, selected.log_mass)

    query, keys, values, slots, scale, tail_mass, tail_values, *_ = arguments = given.attend()
    attended = native.attend(query, keys, values, slots, scale, tail_mass=tail_mass, tail_values=tail_values, **soft)
    assert torch.equal(OPERATORS.attend(*arguments), attended)
    dense = native.dense_decode(query, keys, values, visible, scale, **soft)
    assert torch.equal(OPERATORS.dense_decode(*given.dense_decode()), dense)

    output, indices, kept = OPERATORS.decode_step(*given.decode_step())
    step = native.decode_step(
        given.native, query, keys, values, given.packed, visible, given.k, scale, **forced, tail=case.tail,
        sums=given.sums, wants_indices=True, wants_kept=True, **soft,
    )  # fmt: skip
    assert step.indices is not None and step.kept is not None
    assert torch.equal(output, step.output) and torch.equal(indices[..., :-3], step.indices)
    torch.testing.assert_close(kept, step.kept, rtol=0, atol=0, equal_nan=True)
    blind = list(given.decode_step())
    blind[11] = 0
    bare, none, _ = OPERATORS.decode_step(*blind)
    assert torch.equal(bare, output) and none.shape[-1] == 0


def one_token(given: Arguments, keys: Tensor, packed: Tensor, query: Tensor) -> Tensor:
    """Append and decode, with torch's own operations around."""
    keys = keys.clone()
    keys[:, :, -1] += 1
    OPERATORS.encode_keys(given.tensors, given.planes, keys, packed, given.slots - 1, given.slots)
    arguments = list(given.decode_step())
    arguments[2:4], arguments[5] = (2 * query, keys), packed
    output, indices, kept = OPERATORS.decode_step(*arguments)
    dense = OPERATORS.dense_decode(2 * query, keys, *given.dense_decode()[2:])
    again = OPERATORS.attend(2 * query, keys, given.layer.values, indices, given.case.shape.scale)
    return output + dense + again * kept.nan_to_num()[..., None].to(query.dtype)


@both
def test_a_graph_holds_them(case: Case, dtype: torch.dtype) -> None:
    """One graph without breaks, and the packed keys that it was given are written."""
    given = Arguments(case, dtype)
    parts = (given.layer.keys, given.packed.clone(), given.layer.query)
    expected = one_token(given, given.layer.keys, given.packed, given.layer.query)
    compiled: Callable[..., Tensor] = torch.compile(one_token, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given, *parts), expected)
    assert torch.equal(parts[1], given.packed)


def test_encoders_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In compiled graphs too; anew where a tensor is written to, and none outlives its tensors."""
    made, plain = [], native.NativeEncoder
    monkeypatch.setattr(native, "NativeEncoder", lambda encoder: made.append(1) or plain(encoder))
    given = Arguments(SPANS)
    given.tensors = [tensor.clone() for tensor in given.tensors]
    known = len(native_operators._prepared_by_key_map)
    compiled = torch.compile(one_token, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        compiled(given, given.layer.keys, given.packed, given.layer.query)
        OPERATORS.decode_step(*given.decode_step())
    assert len(made) == 1
    before = OPERATORS.decode_step(*given.decode_step())[1]
    given.tensors[1].neg_()
    assert not torch.equal(OPERATORS.decode_step(*given.decode_step())[1], before)
    assert len(made) == 2
    other = list(given.encode_keys())
    other[1] = "16@4"
    with pytest.raises(ArgumentError, match="query_map"):
        OPERATORS.encode_keys(*other)
    del given, other, compiled
    torch.compiler.reset()
    gc.collect()
    assert len(native_operators._prepared_by_key_map) <= known


WRONG: list[tuple[str, int, Any, str]] = [
    ("encode_keys", 0, [], "encoder is"),
    ("encode_keys", 1, "32@9", "grammar"),
    ("encode_keys", 3, torch.zeros(3, 1, 192, 16, dtype=torch.uint8), "packed"),
    ("encode_keys", 5, 1 << 40, "stop is"),
    ("absorb", 1, "16@32", "no native kernel"),
    ("absorb", 6, torch.zeros(3, 1, 81)[..., :80], "contiguous"),
    ("select", 8, None, "visible slots"),
    ("select", 12, 5, "width is 5"),
    ("select", 11, torch.tensor([10, 1000, 10]), "k of sequence"),
    ("select", 13, 150, "valid slots"),
    ("attend", 3, torch.full((3, 1, 1, 4), 200), "slots from 0 to 199"),
    ("attend", 1, torch.zeros(3, 1, 200, 80).double(), "float64"),
    ("dense_decode", 4, torch.tensor([200, 201, 200]), "valid slots"),
    ("dense_decode", 5, torch.zeros(3, 200, dtype=torch.int64), "visible slots"),
    ("decode_step", 15, "all", "tail"),
    ("decode_step", 16, [], "needs the tail's sums"),
    ("decode_step", 16, [torch.zeros(3, 1)], "sums are 1 tensors"),
    ("decode_step", 17, -1.0, "soft_cap"),
    ("decode_step", 13, -1, "sinks"),
]


@pytest.mark.parametrize(("name", "place", "value", "message"), WRONG)
def test_wrong_inputs_raise(name: str, place: int, value: Any, message: str) -> None:
    arguments = list(getattr(Arguments(SPANS), name)())
    arguments[place] = value
    with pytest.raises(ArgumentError, match=message):
        getattr(OPERATORS, name)(*arguments)


def test_meta_tensors_give_shapes_alone() -> None:
    arguments = list(Arguments(SPANS).dense_decode())
    nowhere = [value.to("meta") if isinstance(value, Tensor) else value for value in arguments]
    for given in (nowhere, [arguments[0], *nowhere[1:]], [nowhere[0], *arguments[1:]]):
        output = OPERATORS.dense_decode(*given)
        assert output.shape == arguments[0].shape
        assert output.device == given[0].device or output.is_meta


def test_encoders_under_inference_mode() -> None:
    with torch.inference_mode():
        given = Arguments(SPANS)
        first, second = (OPERATORS.decode_step(*given.decode_step())[0] for _ in range(2))
    assert torch.equal(first, second)


def test_defaults_of_torch_change_nothing() -> None:
    """What the kernels write is in memory of the CPU and float32, whatever type and device torch would choose."""
    given = Arguments(SPANS)
    arguments = given.decode_step()
    expected, selected = OPERATORS.decode_step(*arguments), OPERATORS.select(*given.select())
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = (*OPERATORS.decode_step(*arguments), *OPERATORS.select(*given.select()))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, (*expected, *selected), strict=True))
