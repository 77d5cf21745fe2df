"""One decode step of a batch by a backend's operations, and the cases that cover what a step depends on."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from helpers import Layer, Shape, noise, random_encoder, random_layer
from loki_attention.core import tail
from loki_attention.core.attention import Softmax
from loki_attention.core.budget import Budget
from loki_attention.core.encoder import EncodedQuery, Encoder
from loki_attention.core.tail import TailSums
from loki_attention.kernels import torch_backend as backend

SMALL = Budget(tokens=48, sinks=4, recent=16)
NOTHING_FORCED = Budget(tokens=20, sinks=0, recent=0)
FRACTION = Budget(fraction=1 / 8, minimum=16, sinks=2, recent=8)


class Case(NamedTuple):
    """One combination of what a step depends on."""

    planes: str
    slots: int
    shape: Shape
    tail: str = "none"
    budget: Budget = SMALL
    per: str = "kv-head"
    holes: bool = False
    softcap: float | None = None
    sink_logits: bool = False

    def __str__(self) -> str:
        kind = f"S{self.slots}-G{self.shape.group}-D{self.shape.dim}-{self.tail}-{self.per}"
        marks = {"holes": self.holes, "softcap": self.softcap, "sinks": self.sink_logits}
        return "-".join([self.planes, kind, *(name for name, on in marks.items() if on)])

    @property
    def softmax(self) -> Softmax:
        """What the case's model adds to the softmax."""
        heads = self.shape.kv_heads * self.shape.group
        return Softmax(self.softcap, 2 + noise(heads, seed=7) if self.sink_logits else None)

    @property
    def sets(self) -> int:
        """Index sets of a row."""
        return self.shape.kv_heads * (self.shape.group if self.per == "query-head" else 1)

    def encoder(self, dtype: torch.dtype = torch.float64) -> Encoder:
        """The encoder of the case."""
        return random_encoder(self.shape, self.planes, dtype=dtype)

    def layer(self, dtype: torch.dtype = torch.float64) -> Layer:
        """A batch of three lengths: all slots, two thirds, and at most 30, which every budget here may cover."""
        lengths = (self.slots, max(1, 2 * self.slots // 3), min(30, self.slots))
        return random_layer(self.shape, lengths, dtype=dtype, holes=self.holes)


CASES = [
    Case("64@4", 1, Shape(2, 1, 64), "linear"),
    Case("16@4+32@2", 33, Shape(2, 4, 64), "mean", NOTHING_FORCED),
    Case("32@4", 100, Shape(1, 7, 80), "linear"),
    Case("16@8", 257, Shape(2, 4, 96), "linear"),
    Case("16@2", 1000, Shape(2, 1, 128), "mean", FRACTION),
    Case("16@32", 1500, Shape(2, 4, 64), "linear", FRACTION),
    Case("16@16", 2100, Shape(1, 7, 64), "linear"),
    Case("16@4+32@2", 1500, Shape(1, 7, 128), "linear", FRACTION, "query-head"),
    Case("16@4+32@2", 2100, Shape(2, 4, 64), "linear", FRACTION, holes=True),
    Case("64@4", 2100, Shape(2, 1, 128), "linear", NOTHING_FORCED),
    Case("64@4", 257, Shape(1, 7, 80), "mean", FRACTION, "query-head", holes=True),
    Case("32@4", 1, Shape(1, 4, 96), "linear"),
    Case("16@8", 2100, Shape(1, 4, 80), "none", FRACTION, "query-head"),
    Case("16@2", 1500, Shape(1, 4, 96), "linear", SMALL, holes=True),
    Case("16@16", 100, Shape(2, 1, 64), "none", NOTHING_FORCED),
    Case("16@32", 1000, Shape(1, 4, 128), "mean", SMALL, "query-head"),
    Case("32@4", 33, Shape(2, 7, 64), "none", NOTHING_FORCED, holes=True),
    Case("32@4", 1500, Shape(2, 4, 64), "linear", FRACTION, softcap=1.5),
    Case("16@4+32@2", 1000, Shape(2, 1, 64), "mean", sink_logits=True),
    Case("32@4", 300, Shape(1, 4, 64), "none", per="query-head", softcap=2.0, sink_logits=True),
]
INTEGER_CASES = [case for case in CASES if "@16" not in case.planes and "@32" not in case.planes]
cases = pytest.mark.parametrize("case", CASES, ids=str)
integer_cases = pytest.mark.parametrize("case", INTEGER_CASES, ids=str)


class BackendStep(NamedTuple):
    """Everything the backend makes on its way through a step."""

    encoded: EncodedQuery
    packed: Tensor
    scores: Tensor
    mass: Tensor | None
    ranking: Tensor
    indices: Tensor
    log_mass: Tensor
    output: Tensor


def tail_values(case: Case, sums: TailSums, encoded: EncodedQuery, scale: float) -> Tensor:
    """u (B, H, 1, D) of sums with a rows axis; not a number where they cover nothing."""
    sums = TailSums(*(tensor.unsqueeze(2) for tensor in sums))
    grouped = (tensor.unflatten(1, (case.shape.kv_heads, -1)) for tensor in (encoded.leading, encoded.deviation))
    return tail.tail_value(case.tail, sums, *grouped, scale).flatten(1, 2)


def backend_step(case: Case, layer: Layer, ours: Encoder) -> BackendStep:
    """One decode step of a batch by the backend's operations."""
    rows, scale, forced = layer.rows, case.shape.scale, backend.Forced(case.budget.sinks, case.budget.recent)
    encoded, packed = ours.encode_query(layer.query, scale), ours.encode_keys(layer.keys)
    scores = backend.score_low_rank(encoded, packed, ours.planes, case.sets)
    mass = None if scores.shape[2] == 1 else backend.group_log_mass(scores, rows, forced)
    ranking = backend.combine_group(scores, mass)
    if not ours.planes.is_float:
        ranking = backend.code(ranking, encoded.deviation)
    k = case.budget.of_each(rows.tokens)
    indices = backend.top_k(ranking, rows, k, forced)
    log_mass = backend.tail_log_mass(
        case.softmax.cap(backend.estimates(scores, encoded)), indices, rows, k, rows.sampled
    )
    answer: tuple[Tensor, Tensor] | tuple[()] = ()
    if case.tail != "none":
        sums = backend.sums_of_blocks(backend.leading_dims(layer.keys, ours), layer.values, rows)
        empty = sums.tokens == 0
        values = tail_values(case, sums, encoded, scale)
        answer = (log_mass.masked_fill(empty, -torch.inf), values.masked_fill(empty[..., None], 0.0))
    output = backend.attend(layer.query, layer.keys, layer.values, indices, scale, *answer, softmax=case.softmax).output
    return BackendStep(encoded, packed, scores, mass, ranking, indices, log_mass, output)
