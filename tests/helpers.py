"""Random layers with structure: correlated keys and queries, the bases fitted to them, and batches of decode steps."""

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loki_attention.core.attention import PLAIN, ReferenceStep, Softmax, decode_step
from loki_attention.core.budget import Budget
from loki_attention.core.candidates import LayerBasis, build
from loki_attention.core.encoder import Encoder, encoder
from loki_attention.core.moments import LayerMoments
from loki_attention.core.planes import Planes
from loki_attention.kernels.rows import Rows

CPU = torch.device("cpu")
PLANES = ("64@4", "16@4+32@2", "32@4", "16@8", "16@2", "16@32", "16@16")


class Shape(NamedTuple):
    """Key/value heads, query heads for each, and head dim."""

    kv_heads: int = 2
    group: int = 2
    dim: int = 64

    @property
    def scale(self) -> float:
        """The usual attention scale, D^-1/2."""
        return self.dim**-0.5


class Sample(NamedTuple):
    """Keys before and after RoPE (Hkv, n, D) and queries after RoPE (Hkv, G n, D)."""

    pre_keys: Tensor
    keys: Tensor
    queries: Tensor


class Layer(NamedTuple):
    """One decode step of a batch: query (B, H, 1, D), keys and values (B, Hkv, S, D), valid slots (B, S)."""

    query: Tensor
    keys: Tensor
    values: Tensor
    valid: Tensor

    @property
    def rows(self) -> Rows:
        """The one new row of every sequence, which sees all valid slots."""
        return Rows.of(self.valid, self.valid.sum(-1, keepdim=True))


class _Source(NamedTuple):
    key_mix: Tensor
    key_mean: Tensor
    query_mix: Tensor
    query_mean: Tensor
    value_mix: Tensor


def noise(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64 (drawn in float32, which is several times as fast)."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@cache
def _source(shape: Shape, seed: int) -> _Source:
    kv, dim = shape.kv_heads, shape.dim
    spectrum = torch.exp(-4.0 * torch.arange(dim, dtype=torch.float64) / dim)
    spectrum = (spectrum * (dim / spectrum.square().sum()).sqrt())[:, None]

    def mix(number: int) -> Tensor:
        return spectrum * torch.linalg.qr(noise(kv, dim, dim, seed=100 * seed + number)).Q

    means = noise(2, kv, 1, dim, seed=100 * seed + 3)
    return _Source(mix(0), means[0], mix(1), 0.5 * means[1], mix(2) / 2)


def rotate(vectors: Tensor, positions: Tensor) -> Tensor:
    """RoPE of (..., n, D) at ``positions`` (n)."""
    half = vectors.shape[-1] // 2
    angle = positions[:, None].double() * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def draw(shape: Shape, count: int, seed: int = 0, source_seed: int = 0) -> Sample:
    """``count`` tokens of the random layer that ``source_seed`` names; float64."""
    source = _source(shape, source_seed)
    kv, group, dim = shape
    pre_keys = noise(kv, count, dim, seed=seed) @ source.key_mix + source.key_mean
    queries = noise(kv, group * count, dim, seed=seed + 7919) @ source.query_mix + source.query_mean
    positions = torch.arange(count)
    return Sample(pre_keys, rotate(pre_keys, positions), rotate(queries, positions.repeat(group)))


def moments_of(sample: Sample) -> LayerMoments:
    """The moments of a sample."""
    moments = LayerMoments.empty(sample.keys.shape[0], sample.keys.shape[2])
    moments.pre_keys.add(sample.pre_keys)
    moments.post_keys.add(sample.keys)
    moments.queries.add(sample.queries)
    return moments


@cache
def random_moments(shape: Shape, seed: int = 0) -> LayerMoments:
    """Moments of a random layer, from enough tokens to have full rank. Shared: do not change."""
    return moments_of(draw(shape, 4 * shape.dim, seed=seed + 1, source_seed=seed))


@cache
def random_basis(shape: Shape, candidate: str = "balanced", seed: int = 0) -> LayerBasis:
    """A basis of a random layer. Shared: do not change."""
    return build(candidate, random_moments(shape, seed))


@cache
def random_encoder(
    shape: Shape, planes: str, candidate: str = "balanced", dtype: torch.dtype = torch.float64
) -> Encoder:
    """The encoder of a random layer, for a model of ``dtype``. Shared: do not change."""
    return encoder(random_basis(shape, candidate), Planes.parse(planes), shape.group).to(CPU, dtype)


def random_layer(
    shape: Shape,
    lengths: tuple[int, ...],
    slots: int | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    holes: bool = False,
) -> Layer:
    """A decode step of sequences of these lengths in ``slots`` slots: left-padded, or with holes anywhere but last."""
    slots = max(lengths) if slots is None else slots
    source, batch, (kv, group, dim) = _source(shape, 0), len(lengths), shape
    keys = rotate(noise(batch, kv, slots, dim, seed=seed) @ source.key_mix + source.key_mean, torch.arange(slots))
    values = keys @ source.value_mix + noise(batch, kv, slots, dim, seed=seed + 5)
    query = noise(batch, kv, group, dim, seed=seed + 7919) @ source.query_mix + source.query_mean
    query = rotate(query, torch.full((group,), slots - 1)).flatten(1, 2)[:, :, None]
    order = torch.rand(batch, slots, generator=torch.Generator().manual_seed(seed))
    if not holes:
        order = torch.arange(slots, 0, -1).expand(batch, -1).double()
    order[:, -1] = -1
    valid = order.argsort(-1).argsort(-1) < torch.tensor(lengths)[:, None]
    return Layer(*(tensor.to(dtype) for tensor in (query, keys, values)), valid)


def per_query_head(encoder: Encoder, group: int) -> Encoder:
    """The encoder with every KV head's tensors repeated for its query heads."""
    names = ("mean", "query_map", "key_map", "deviations", "steps", "kappa")
    repeated = (getattr(encoder, name).repeat_interleave(group, dim=0) for name in names)
    return Encoder(encoder.digest, encoder.planes, *repeated)


def reference_steps(
    layer: Layer,
    encoder: Encoder,
    budget: Budget,
    scale: float,
    tail: str = "none",
    per: str = "kv-head",
    softmax: Softmax = PLAIN,
) -> list[ReferenceStep]:
    """``core.attention.decode_step`` of every sequence; ``per="query-head"`` gives each query head its own key head."""
    keys, values = layer.keys, layer.values
    if per == "query-head":
        group = layer.query.shape[1] // keys.shape[1]
        encoder = per_query_head(encoder, group)
        keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (keys, values))
    return [
        decode_step(query[:, 0], k, v, valid, encoder, budget, scale, tail, softmax)
        for query, k, v, valid in zip(layer.query, keys, values, layer.valid, strict=True)
    ]


def chosen_slots(indices: Tensor) -> list[list[int]]:
    """The slots of each row of (..., K), padding dropped."""
    return [[slot for slot in row if slot >= 0] for row in indices.reshape(-1, indices.shape[-1]).tolist()]


class FakeModel(nn.Module):
    """A model as ``ModelSpec.of`` sees it: a config and named parameters."""

    def __init__(self, *, seed: int = 0, width: int = 32, **config: object) -> None:
        super().__init__()
        defaults = {
            "name_or_path": "lab/tiny/",
            "model_type": "fake",
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "hidden_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "max_position_embeddings": 2048,
            "vocab_size": 211,
        }
        self.config = SimpleNamespace(**{**defaults, **config})
        weights = 0.02 * noise(self.config.num_hidden_layers, 2, width, width, seed=seed).float()
        for name, number in (("query", 0), ("value", 1)):
            layers = nn.ParameterList(nn.Parameter(layer) for layer in weights[:, number])
            self.add_module(name, layers)
        self.norm = nn.Parameter(torch.ones(width))
