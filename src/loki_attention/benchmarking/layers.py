"""One layer's decode step to be timed: keys and queries as a model's spread, and a selection that is asked for.

Keys are Gaussian with a decaying spectrum. Left like that, what a query selects is uniformly random over the slots. Or
chosen slots are planted: their keys are moved along the direction in which the queries' scores grow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loki_attention.benchmarking.selections import Forced, real_selection
from loki_attention.core.budget import Budget
from loki_attention.core.candidates import LayerBasis, build
from loki_attention.core.encoder import Encoder, encoder
from loki_attention.core.moments import LayerMoments
from loki_attention.core.planes import Planes
from loki_attention.core.shapes import Keys, Queries, Values
from loki_attention.core.tail import TailSums, covered_tokens
from loki_attention.errors import ArgumentError, check_tokens, unknown_name
from loki_attention.kernels import native
from loki_attention.kernels.native import NativeEncoder, Spans

SELECTIONS = ("random", "recorded")
_SAMPLED_KEYS = 2048
_PLANTED_DEVIATIONS = 4.0
_ENCODED_AT_ONCE = 16384


class Heads(NamedTuple):
    """Query heads, key heads and head dim, written 32/8/128."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def parse(cls, text: str) -> "Heads":
        """The shape that ``text`` names; raises ``ArgumentError`` for anything else.

        >>> Heads.parse("32/8/128").group
        4
        """
        parts = text.split("/")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise ArgumentError(f"a shape of {text!r} is not query heads/key heads/head dim; write it like 32/8/128")
        heads, kv_heads, head_dim = map(int, parts)
        if heads % kv_heads:
            raise ArgumentError(f"{text!r}: {heads} query heads do not share {kv_heads} key heads evenly")
        return cls(heads, kv_heads, head_dim)

    @property
    def group(self) -> int:
        """Query heads that share a key head, G."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return "/".join(map(str, self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is measured at once: heads, sequences, tokens, the type of K and V, and where selected tokens lie."""

    heads: Heads
    batch: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    selection: str = "random"

    def __post_init__(self) -> None:
        check_tokens("batch", self.batch, least=1, unit="sequences")
        check_tokens("tokens", self.tokens, least=128)
        if self.selection not in SELECTIONS:
            raise unknown_name("selection", self.selection, SELECTIONS)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V."""
        return 2 * self.batch * self.heads.kv_heads * self.tokens * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's key in one head."""
        return self.heads.head_dim * self.dtype.itemsize

    @property
    def scale(self) -> float:
        """The usual attention scale, D^-1/2."""
        return self.heads.head_dim**-0.5

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.heads}, batch {self.batch}, {self.tokens} tokens, {kind}, {self.selection} selection"


@dataclass(frozen=True, slots=True)
class Layer:
    """The tensors of a case and the basis of its keys."""

    case: Case
    query: Queries
    keys: Keys
    values: Values
    basis: LayerBasis

    @property
    def stop(self) -> Tensor:
        """Every sequence's count of valid slots: all of them."""
        return torch.full((self.case.batch,), self.case.tokens)

    @property
    def visible(self) -> Spans:
        """The valid slots as the kernels take them."""
        return Spans(None, self.stop)


class Twins(NamedTuple):
    """The low-rank keys of a layer in some planes, and the tail's sums."""

    reference: Encoder
    encoder: NativeEncoder
    packed: Tensor
    sums: TailSums


def draw_layer(case: Case, budgets: Sequence[Budget], *, seed: int = 0) -> Layer:
    """A random layer; where the selection is a recorded one, ``budgets`` say how many slots are planted."""
    generator = torch.Generator().manual_seed(seed)
    (heads, kv_heads, dim), batch = case.heads, case.batch
    spectrum = torch.exp(-3.0 * torch.arange(dim) / dim)
    spectrum = spectrum * (dim / spectrum.square().sum()).sqrt()
    common = torch.randn(batch, kv_heads, 1, dim, generator=generator)
    query = (common + 0.7 * torch.randn(batch, kv_heads, heads // kv_heads, dim, generator=generator)) * spectrum
    keys, values = (torch.empty(batch, kv_heads, case.tokens, dim, dtype=case.dtype) for _ in "kv")
    for b in range(batch):
        for h in range(kv_heads):
            noise = torch.randn(case.tokens, dim, generator=generator)
            values[b, h] = noise.flip(0)
            keys[b, h] = noise * spectrum
    if case.selection == "recorded":
        for budget in budgets:
            _plant(keys, common * spectrum, spectrum, budget, seed)
    basis = _basis(query, spectrum, generator)
    return Layer(case, query.flatten(1, 2)[:, :, None].to(case.dtype), keys, values, basis)


def twins_of(layer: Layer, planes: str) -> Twins:
    """The layer's low-rank keys and sums, by the native kernels."""
    case = layer.case
    reference = encoder(layer.basis, Planes.parse(planes), case.heads.group)
    ours = NativeEncoder(reference)
    packed = ours.buffer(case.batch, case.tokens)
    for start in range(0, case.tokens, _ENCODED_AT_ONCE):
        native.encode_keys(ours, layer.keys, packed, start, min(start + _ENCODED_AT_ONCE, case.tokens))
    sums = no_sums(layer, ours)
    sign = (torch.arange(case.tokens) < covered_tokens(layer.stop)[:, None]).to(torch.int8)
    native.absorb(ours, layer.keys, layer.values, sign, sums)
    return Twins(reference, ours, packed, sums)


def no_sums(layer: Layer, ours: NativeEncoder) -> TailSums:
    """The sums of nothing."""
    batch, (_, kv_heads, dim), rank = layer.case.batch, layer.case.heads, ours.tail_rank
    shapes = ((batch, 1), (batch, kv_heads, dim), (batch, kv_heads, rank), (batch, kv_heads, rank, dim))
    return TailSums(*(torch.zeros(shape) for shape in shapes))


def _plant(keys: Keys, direction: Tensor, spectrum: Tensor, budget: Budget, seed: int) -> None:
    """Move the keys of a recorded selection, in place, by some deviations of the score along Cov(k) q.

    Of smaller budgets a model selects mostly what it does of larger ones: those tokens are moved once more.
    """
    batch, kv_heads, tokens, _ = keys.shape
    spread = direction * spectrum.square()
    move = _PLANTED_DEVIATIONS * spread / (spread * direction).sum(-1, keepdim=True).sqrt()
    for b in range(batch):
        always = Forced(budget.sinks, budget.recent)
        slots = real_selection(tokens, budget.of(tokens), kv_heads, always, seed=seed + b)
        for h in range(kv_heads):
            keys[b, h, slots[h]] += move[b, h].to(keys.dtype)


def _basis(query: Tensor, spectrum: Tensor, generator: torch.Generator) -> LayerBasis:
    """The balanced basis of such keys and of queries around the layer's own."""
    _, kv_heads, group, dim = query.shape
    moments = LayerMoments.empty(kv_heads, dim)
    sampled = torch.randn(kv_heads, _SAMPLED_KEYS, dim, generator=generator) * spectrum
    moments.pre_keys.add(sampled)
    moments.post_keys.add(sampled)
    moments.queries.add(torch.randn(kv_heads, group * _SAMPLED_KEYS, dim, generator=generator) * spectrum)
    return build("balanced", moments)
