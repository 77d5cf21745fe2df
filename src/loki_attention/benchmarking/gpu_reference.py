"""What a provider's output on a GPU must equal: attention in float32, whole, over chosen slots, and with Loki's tail."""

from collections.abc import Sequence

from torch import Tensor

from loki_attention.benchmarking.gpu_layers import GpuLayer, GpuTwins
from loki_attention.core.tail import TailSums, tail_value
from loki_attention.kernels import torch_backend
from loki_attention.kernels.rows import Rows


def exact_scores(layer: GpuLayer, scale: float) -> Tensor:
    """Exact scores (B, Hkv, G, S)."""
    kv_heads = layer.keys.shape[1]
    return scale * (layer.query.unflatten(1, (kv_heads, -1))[:, :, :, 0].float() @ layer.keys.float().mT)


def attention(scores: Tensor, layer: GpuLayer) -> Tensor:
    """The output (B, H, 1, D) that scores (B, Hkv, G, S) give."""
    return (scores.softmax(-1) @ layer.values.float()).flatten(1, 2)[:, :, None]


def dense_reference(layer: GpuLayer, scale: float) -> Tensor:
    """Attention over all slots."""
    return attention(exact_scores(layer, scale), layer)


def tail_reference(layer: GpuLayer, twins: GpuTwins, indices: Tensor, scale: float, tail: str) -> Tensor:
    """Attention of the first sequence over the slots that a step took, and over the tail as the torch backend has it."""
    query, keys, values, source = layer.query[:1].float(), layer.keys[:1], layer.values[:1], twins.encoder.source
    (kv_heads, slots), indices = keys.shape[1:3], indices[:1].long()
    rows = Rows.of_whole_prompts(1, slots, 1, keys.device)
    encoded = source.encode_query(query, scale)
    low = torch_backend.score_low_rank(encoded, source.encode_keys(keys), source.planes, kv_heads)
    k = (indices[:, 0] >= 0).sum(-1)
    mass = torch_backend.tail_log_mass(torch_backend.estimates(low, encoded), indices, rows, k, rows.sampled)
    tokens, *sums = (one[:1] for one in twins.sums)
    wide = TailSums(tokens[..., None], *(one[:, :, None] for one in sums))
    leading, deviation = (one[:, :, 0].unflatten(1, (kv_heads, -1)) for one in (encoded.leading, encoded.deviation))
    answer = tail_value(tail, wide, leading, deviation, scale).reshape(query.shape)
    return torch_backend.attend(query, keys, values, indices, scale, mass, answer).output


def error_of(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of what was expected."""
    return float((found.float() - expected).norm() / expected.norm())


def line_of(error: BaseException) -> str:
    """The first line of what an exception says."""
    lines: Sequence[str] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
