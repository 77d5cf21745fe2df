"""Decode steps for fused kernels: random shapes, planes, masks and budgets, and what the reference makes of them."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from helpers import Layer, Shape, noise, random_encoder, random_layer, reference_steps
from loki_attention.core.attention import ReferenceStep
from loki_attention.core.budget import Budget
from loki_attention.core.encoder import Encoder
from loki_attention.core.tail import TailSums
from loki_attention.kernels import torch_backend
from loki_attention.kernels.native_arguments import Visible
from loki_attention.kernels.rows import Spans

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

SMALL = Budget(tokens=48, sinks=4, recent=16)
NOTHING_FORCED = Budget(tokens=20, sinks=0, recent=0)
FRACTION = Budget(fraction=1 / 8, minimum=16, sinks=2, recent=8)


class Case(NamedTuple):
    """What one decode step depends on."""

    planes: str
    shape: Shape
    lengths: tuple[int, ...]
    tail: str = "none"
    budget: Budget = SMALL
    holes: bool = False
    seed: int = 0

    def __str__(self) -> str:
        kind = f"{self.planes}-S{max(self.lengths)}-G{self.shape.group}-D{self.shape.dim}-{self.tail}"
        return f"{kind}{'-holes' if self.holes else ''}"

    def encoder(self, dtype: torch.dtype = torch.float32) -> Encoder:
        """The encoder of the case."""
        return random_encoder(self.shape, self.planes, dtype=dtype)

    def layer(self, dtype: torch.dtype = torch.float32) -> Layer:
        """A batch of the case's lengths."""
        return random_layer(self.shape, self.lengths, dtype=dtype, holes=self.holes, seed=self.seed)

    def k(self, layer: Layer) -> Tensor:
        """K of each sequence."""
        return self.budget.of_each(layer.valid.sum(-1))


CASES = [
    Case("64@4", Shape(2, 1, 64), (1,), "linear"),
    Case("16@4+32@2", Shape(2, 4, 64), (33, 20), "mean", NOTHING_FORCED),
    Case("32@4", Shape(1, 7, 80), (100, 66, 30), "linear"),
    Case("16@8", Shape(2, 4, 96), (257, 100), "linear", FRACTION),
    Case("16@2", Shape(2, 1, 128), (1000, 700), "mean", FRACTION),
    Case("32@4+64@2", Shape(2, 4, 128), (3000, 1500), "linear", FRACTION),
    Case("16@4+32@2", Shape(2, 4, 64), (2100, 1400), "linear", FRACTION, holes=True),
    Case("64@4", Shape(1, 4, 80), (257, 30), "mean", FRACTION, holes=True),
    Case("32@8", Shape(3, 2, 48), (1000,), "linear", NOTHING_FORCED),
    Case("16@4", Shape(1, 5, 34), (600, 77), "linear"),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def visible_of(layer: Layer, holes: bool) -> Visible:
    """Spans for left-padded sequences, ranks for sequences with holes."""
    if holes:
        return layer.rows
    return Spans(layer.valid.int().argmax(-1), torch.full((len(layer.valid),), layer.valid.shape[1]))


def untiled(packed: Tensor, slots: int) -> Tensor:
    """Tiled low-rank keys token by token: (B, Hkv, S, bytes)."""
    tiles = packed.unflatten(2, (-1, 16)).reshape(*packed.shape[:2], -1, packed.shape[3] // 4, 16, 4)
    return tiles.transpose(-3, -2).reshape(packed.shape)[:, :, :slots]


def sums_of(layer: Layer, encoder: Encoder) -> TailSums:
    """The tail's sums for the new row, from the torch backend."""
    sums = torch_backend.sums_of_blocks(torch_backend.leading_dims(layer.keys, encoder), layer.values, layer.rows)
    return TailSums(*(tensor.squeeze(2).contiguous() for tensor in sums))


def reference(case: Case, layer: Layer) -> list[ReferenceStep]:
    """The float64 reference of every sequence, on the same keys, values and query."""
    wide = Layer(*(tensor.double() for tensor in layer[:3]), layer.valid)
    return reference_steps(wide, case.encoder(torch.float64), case.budget, case.shape.scale, case.tail)


def attention(
    layer: Layer, scale: float, soft_cap: float | None = None, sinks: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """Attention over ``seen`` (B, Hkv, S; default: valid slots), plain torch in the layer's dtype: (B, H, 1, D)."""
    group = layer.query.shape[1] // layer.keys.shape[1]
    keys, values = (tensor.repeat_interleave(group, 1) for tensor in layer[1:3])
    scores = (layer.query @ keys.mT) * scale
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    mask = layer.valid[:, None].expand(-1, layer.keys.shape[1], -1) if seen is None else seen
    scores = scores.masked_fill(~mask.repeat_interleave(group, 1)[:, :, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(len(scores), -1, 1, 1)], -1)
    return scores.softmax(-1)[..., : keys.shape[2]].nan_to_num() @ values.nan_to_num()


def assert_as_exact_as_torch(
    ours: Tensor, layer: Layer, scale: float, rounding: float = 1e-6, **options: Tensor | float | None
) -> None:
    """Within twice torch's own error in the layer's dtype plus ``rounding``, of the batch, in mean square."""
    wide = Layer(*(tensor.double() for tensor in layer[:3]), layer.valid)
    exact = attention(wide, scale, **options)  # type: ignore[arg-type]
    own = float((attention(layer, scale, **options).double() - exact).norm())  # type: ignore[arg-type]
    assert float((ours.double() - exact).norm()) <= 2 * own + rounding * float(exact.norm())


def poisoned(layer: Layer, read: Tensor) -> Layer:
    """The layer with every row of K and V that is not in ``read`` (B, Hkv, S) made no number."""
    keys, values = (tensor.masked_fill(~read[..., None], torch.nan) for tensor in (layer.keys, layer.values))
    return layer._replace(keys=keys, values=values)


def slots_read(indices: Tensor, slots: int) -> Tensor:
    """Which slots are among indices (B, Hkv, 1, K): (B, Hkv, S)."""
    return ~torch_backend.unselected(indices.long(), slots)[:, :, 0]


def random_sinks(case: Case) -> Tensor:
    """Learned sinks that matter."""
    return 2.0 + noise(case.shape.kv_heads * case.shape.group, seed=3).float()


def assert_alike(ours: Tensor, expected: Tensor) -> None:
    """Equal up to rounding in their dtype, in mean square."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[ours.dtype]
    assert float((ours.double() - expected.double()).norm()) <= tolerance * float(expected.double().norm())
