"""Layers to be timed on a GPU: random keys, values and queries on the device, in as many copies as outgrow the L2."""

from typing import NamedTuple

import torch
from torch import Tensor

from loki_attention.benchmarking.layers import Case
from loki_attention.core.candidates import build
from loki_attention.core.encoder import Encoder, encoder
from loki_attention.core.moments import LayerMoments
from loki_attention.core.planes import Planes
from loki_attention.core.tail import TailSums
from loki_attention.kernels.rows import Spans
from loki_attention.kernels.triton.encoder import TritonEncoder
from loki_attention.static_cache import StaticTwins

ROTATED_BYTES = 300_000_000
"""Bytes of K and V that the copies of a layer hold together at least: five times the L2 of a large GPU."""
_SAMPLED_KEYS = 2048


class GpuLayer(NamedTuple):
    """One copy: query (B, H, 1, D), keys and values (B, Hkv, S, D), and where every sequence ends."""

    query: Tensor
    keys: Tensor
    values: Tensor
    stop: Tensor

    @property
    def visible(self) -> Spans:
        """The valid slots as kernels take them."""
        return Spans(None, self.stop)


class GpuTwins(NamedTuple):
    """The low-rank keys of one copy, and the tail's sums."""

    encoder: TritonEncoder
    packed: Tensor
    sums: TailSums


def draw_copies(case: Case, device: torch.device, *, rotated_bytes: int = ROTATED_BYTES) -> list[GpuLayer]:
    """Copies of a layer with random content, no two alike, at least two and ``rotated_bytes`` together."""
    generator = torch.Generator(device).manual_seed(0)
    (heads, kv_heads, dim), batch = case.heads, case.batch
    spectrum = _spectrum(dim).to(device)
    rows = (batch, kv_heads, case.tokens, dim)
    copies = []
    for _ in range(max(2, -(-rotated_bytes // case.kv_bytes))):
        keys, values = (torch.randn(rows, generator=generator, device=device, dtype=case.dtype) for _ in "kv")
        query = torch.randn(batch, heads, 1, dim, generator=generator, device=device) * spectrum
        stop = torch.full((batch,), case.tokens, device=device)
        copies.append(GpuLayer(query.to(case.dtype), keys.mul_(spectrum.to(case.dtype)), values, stop))
    return copies


def encoder_of(case: Case, planes: str, device: torch.device) -> Encoder:
    """The balanced basis's encoder of such keys and queries."""
    (heads, kv_heads, dim), spectrum = case.heads, _spectrum(case.heads.head_dim)
    generator, moments = torch.Generator().manual_seed(1), LayerMoments.empty(kv_heads, dim)
    sampled = torch.randn(kv_heads, _SAMPLED_KEYS, dim, generator=generator) * spectrum
    moments.pre_keys.add(sampled)
    moments.post_keys.add(sampled)
    moments.queries.add(torch.randn(kv_heads, heads // kv_heads * _SAMPLED_KEYS, dim, generator=generator) * spectrum)
    return encoder(build("balanced", moments), Planes.parse(planes), heads // kv_heads).to(device, torch.float32)


def twins_of(layer: GpuLayer, source: Encoder) -> GpuTwins:
    """A copy's low-rank keys and sums, as a static cache has them."""
    ours, start = TritonEncoder(source), torch.zeros_like(layer.stop)
    made = StaticTwins(layer.keys, layer.values)
    made.settle(ours, start, tail=True, known=0, length=layer.keys.shape[2])
    return GpuTwins(ours, made.packed, made.sums)


def _spectrum(dim: int) -> Tensor:
    spectrum = torch.exp(-3.0 * torch.arange(dim) / dim)
    return spectrum * (dim / spectrum.square().sum()).sqrt()
