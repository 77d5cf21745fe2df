"""The newest token's step on the native kernels: what the step gives after append and absorb, opcheck, graphs, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import Layer, Shape
from kernel_cases import FRACTION, Case, visible_of
from loki_attention.core.encoder import ENCODER_TENSORS
from loki_attention.core.tail import TailSums, covered_tokens
from loki_attention.errors import ArgumentError
from loki_attention.kernels import native, torch_backend
from loki_attention.kernels.native import NativeEncoder
from loki_attention.kernels.newest import newest_operator
from loki_attention.kernels.rows import Rows, Spans

if not native.available():
    pytest.skip("the native extension is not built", allow_module_level=True)

PADDED = Case("16@4+32@2", Shape(2, 4, 64), (200, 150), "linear", FRACTION)
CASES = [PADDED, Case("32@4", Shape(1, 7, 80), (130,), "mean"), Case("16@8", Shape(2, 1, 64), (90, 70), "none")]


class Growing:
    """A case's layer, of which ``held`` slots have low-rank keys and sums."""

    def __init__(self, case: Case, held: int) -> None:
        self.case, self.layer, self.encoder = case, case.layer(), case.encoder()
        self.native = NativeEncoder(self.encoder)
        self.packed = self.native.buffer(len(self.layer.keys), self.layer.keys.shape[2]).fill_(0x7F)
        native.encode_keys(self.native, self.layer.keys, self.packed, 0, held)
        spans = visible_of(self.layer, False)
        assert isinstance(spans, Spans) and spans.start is not None
        self.start = spans.start
        self.sums = self.sums_at(held)

    def sums_at(self, stop: int) -> TailSums:
        """Fresh sums for a row of so many slots; empty without a tail."""
        if self.case.tail == "none":
            return TailSums(*(torch.empty(0) for _ in range(4)))
        valid = self.layer.valid[:, :stop]
        rows = Rows.of(valid, valid.sum(-1, keepdim=True))
        leading = torch_backend.leading_dims(self.layer.keys[:, :, :stop], self.encoder)
        sums = torch_backend.sums_of_blocks(leading, self.layer.values[:, :, :stop], rows)
        return TailSums(*(tensor.squeeze(2).contiguous() for tensor in sums))

    def arguments(self, stop: int) -> tuple[Any, ...]:
        """The flat arguments of the step whose newest token is in slot ``stop`` - 1."""
        ends, budget = torch.full_like(self.start, stop), self.case.budget
        tensors = [getattr(self.encoder, name) for name in ENCODER_TENSORS]
        k = budget.of_each(ends - self.start)
        return (
            tensors, self.case.planes, *self.layer[:3], self.packed, self.start, ends, k, self.case.shape.scale,
            budget.sinks, budget.recent, self.case.tail, *self.sums,
        )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_joins_its_token_and_equals_the_step_over_all(case: Case) -> None:
    """Over the length at which a block joins the sums; the buffer beyond is garbage."""
    slots = max(case.lengths)
    growing = Growing(case, 60)
    for stop in range(61, slots + 1):
        output, kept = newest_operator()(*growing.arguments(stop))
        if stop % 32 and stop != slots:
            continue
        seen = Layer(growing.layer.query, *(tensor[:, :, :stop] for tensor in growing.layer[1:3]), growing.layer.valid)
        fresh = growing.native.buffer(len(seen.keys), slots)
        native.encode_keys(growing.native, seen.keys, fresh, 0, stop)
        sums = growing.sums_at(stop)
        expected = native.decode_step(
            growing.native, seen.query, seen.keys, seen.values, fresh, Spans(growing.start, growing.arguments(stop)[7]),
            growing.arguments(stop)[8], case.shape.scale, sinks=case.budget.sinks, recent=case.budget.recent,
            tail=case.tail, sums=sums, wants_kept=True,
        )  # fmt: skip
        torch.testing.assert_close(output, expected.output, rtol=1e-5, atol=1e-5)
        if case.tail == "none":
            assert kept.shape == (*output.shape[:2], 0)
            continue
        torch.testing.assert_close(kept, expected.kept, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert torch.equal(growing.sums.tokens[:, 0], covered_tokens(stop - growing.start).float())
        for ours, theirs in zip(growing.sums, sums, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_sequences_of_several_lengths_join_theirs() -> None:
    growing, alone = Growing(PADDED, 140), Growing(PADDED, 140)
    native.encode_keys(growing.native, growing.layer.keys, growing.packed, 140, 149)
    expected = [newest_operator()(*alone.arguments(stop))[0] for stop in range(141, 151)]
    arguments = list(growing.arguments(150))
    arguments[7] = torch.tensor([150, 141])
    arguments[8][1] = growing.arguments(141)[8][1]
    output, _ = newest_operator()(*arguments)
    torch.testing.assert_close(output[0], expected[-1][0])
    torch.testing.assert_close(output[1], expected[0][1])


@pytest.mark.slow
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.loki_attention.decode_newest.default, Growing(PADDED, 180).arguments(181))


@pytest.mark.slow
def test_a_compiled_step_is_one_graph() -> None:
    plain, given = Growing(PADDED, 180), Growing(PADDED, 180)

    def step(query: Tensor, *rest: Any) -> Tensor:
        tensors, planes, _, *others = rest
        output, kept = torch.ops.loki_attention.decode_newest(tensors, planes, query * 1.0, *others)
        return output + 0.0 * kept.nan_to_num()[..., None]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for stop in range(181, 200):
        output = compiled(given.layer.query, *given.arguments(stop))
        assert torch.equal(output, newest_operator()(*plain.arguments(stop))[0])
    assert torch.equal(given.packed, plain.packed)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(given.sums, plain.sums, strict=True))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, [], "encoder is"),
        (5, torch.zeros(2, 2, 192, 20, dtype=torch.uint8), "packed"),
        (7, torch.tensor([0, 0]), "start must be"),
        (12, "all", "tail"),
        (13, torch.zeros(2, 2), "sums.tokens"),
    ],
)
def test_wrong_inputs_raise(place: int, value: Any, message: str) -> None:
    arguments = list(Growing(PADDED, 180).arguments(181))
    arguments[place] = value
    with pytest.raises(ArgumentError, match=message):
        newest_operator()(*arguments)
