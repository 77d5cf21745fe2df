"""The decode step in vectorised torch, for any number of rows at once: runs anywhere, fast nowhere.

Sets are the heads that select: Hkv, or H where every query head selects for itself. Scores of a chunk of rows are
(B, sets, G, T, S). The rules are those of ``core``; tests hold every function to it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loki_attention.core.attention import PLAIN, Softmax
from loki_attention.core.encoder import EncodedQuery, Encoder
from loki_attention.core.planes import Planes
from loki_attention.core.selection import CODES_PER_DEVIATION, LARGEST_CODE, TEMPER
from loki_attention.core.shapes import Indices, Keys, PackedKeys, PerHeadRow, Queries, Values
from loki_attention.core.tail import BLOCK, TailSums, covered_tokens
from loki_attention.kernels.rows import Rows

GroupScores = Float[Tensor, "b sets g t s"]
Ranking = Tensor  # (B, sets, T, S), integer codes or floats


class Forced(NamedTuple):
    """How many leading and trailing valid tokens are always attended."""

    sinks: int
    recent: int


def score_low_rank(query: EncodedQuery, packed: PackedKeys, planes: Planes, sets: int) -> GroupScores:
    """Approximate attention scores of every slot, mean subtracted, scale included. Sums of codes are exact."""
    levels = planes.unpack(packed, query.step.dtype)
    kv_heads = packed.shape[1]
    codes = query.codes.to(levels.dtype).unflatten(1, (kv_heads, -1))
    products = codes @ levels[:, :, None].mT
    return (products * query.step.unflatten(1, (kv_heads, -1))[..., None]).flatten(1, 2).unflatten(1, (sets, -1))


def estimates(scores: GroupScores, query: EncodedQuery) -> GroupScores:
    """Estimates of the exact attention scores: what the mean and the low rank took away is added."""
    return scores + query.offset.unflatten(1, (scores.shape[1], -1))[..., None]


class Attended(NamedTuple):
    """Attention output (B, H, T, D) and the tail's estimate of the mass kept, 1 - its share; None without a tail."""

    output: Queries
    kept: PerHeadRow | None


def score_exact(query: Queries, keys: Keys, scale: float, sets: int, softmax: Softmax = PLAIN) -> GroupScores:
    """Exact attention scores of every slot, scale and soft-cap included, in float32 (float64 for float64)."""
    compute = torch.promote_types(query.dtype, torch.float32)
    # A group's rows in one matrix: keys that are broadcast over the group would be copied for each head.
    rows = query.to(compute).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    scores = softmax.cap(scale * (rows @ keys.to(compute).mT))
    return scores.unflatten(2, (-1, query.shape[2])).flatten(1, 2).unflatten(1, (sets, -1))


def weighted_log_sum(scores: GroupScores, log_weight: Float[Tensor, "b t s"]) -> Float[Tensor, "b sets g t"]:
    """log sum_j w_j exp(s_j) for every head and row; -inf where every weight is 0."""
    return torch.logsumexp(scores + log_weight[:, None, None], dim=-1)


def group_log_mass(scores: GroupScores, rows: Rows, forced: Forced) -> Float[Tensor, "b sets g t"]:
    """L of each head: forced tokens as they are, the others by the sample."""
    is_forced = rows.forced(*forced)
    drawn = rows.sampled & ~is_forced
    unforced = rows.tokens - is_forced.sum(-1)
    ratio = (unforced / drawn.sum(-1)).nan_to_num(posinf=0.0).log()[..., None]
    log_weight = torch.where(is_forced, 0.0, torch.where(drawn, ratio, -torch.inf))
    return weighted_log_sum(scores, log_weight.to(scores.dtype))


def combine_group(scores: GroupScores, mass: Float[Tensor, "b sets g t"] | None) -> Float[Tensor, "b sets t s"]:
    """The tempered maximum over the group; a group of one keeps its scores and needs no ``mass``."""
    if mass is None:
        return scores.squeeze(2)
    tempered = (scores - TEMPER * mass[..., None]).amax(2)
    return tempered + TEMPER * mass.amin(2)[..., None]


def code(combined: Float[Tensor, "b sets t s"], deviation: PerHeadRow) -> Int[Tensor, "b sets t s"]:
    """16-bit codes of combined scores, 1/2048 of the widest head's deviation a step."""
    widest = deviation.unflatten(1, (combined.shape[1], -1)).amax(2)[..., None]
    scaled = torch.where(widest > 0, combined * (CODES_PER_DEVIATION / widest), 0.0)
    return scaled.round().clamp(-LARGEST_CODE - 1, LARGEST_CODE).to(torch.int16)


def top_k(ranking: Ranking, rows: Rows, k: Int[Tensor, "b t"], forced: Forced) -> Indices:
    """Slots of the forced tokens and the highest of the rest, K of each row in all; ascending, -1 padded.

    Ties go to the lower slot. Padding and later tokens are never chosen.
    """
    widest = int(k.max())
    visible, is_forced = rows.visible[:, None], rows.forced(*forced)[:, None]
    slots = ranking.shape[-1]
    if ranking.is_floating_point():
        key = torch.where(is_forced, torch.inf, torch.where(visible, ranking, -torch.inf))
        best = torch.sort(key, dim=-1, descending=True, stable=True).indices[..., :widest]
    else:
        raised = torch.where(is_forced, LARGEST_CODE + 1, torch.where(visible, ranking.long(), -LARGEST_CODE - 2))
        lower_first = torch.arange(slots - 1, -1, -1, device=ranking.device)
        best = torch.topk(raised * slots + lower_first, widest, dim=-1).indices
    spare = torch.arange(widest, device=k.device) >= k[:, None, :, None]
    ascending = best.masked_fill(spare, slots).sort(-1).values
    return torch.where(ascending == slots, -1, ascending)


def unselected(indices: Indices, slots: int) -> Bool[Tensor, "b sets t s"]:
    """Which slots a row did not select."""
    rest = torch.ones(*indices.shape[:-1], slots + 1, dtype=torch.bool, device=indices.device)
    rest.scatter_(-1, indices.where(indices >= 0, slots), False)
    return rest[..., :slots]


def tail_log_mass(
    scores: GroupScores, indices: Indices, rows: Rows, k: Int[Tensor, "b t"], among: Tensor
) -> PerHeadRow:
    """t: the log-mass of what is not selected, from the unselected tokens ``among`` (B, T, S) some; else -inf.

    ``scores`` are estimates of the true ones: mean and kappa added, soft-capped.
    """
    drawn = unselected(indices, scores.shape[-1]) & among[:, None]
    ratio = ((rows.tokens - k)[:, None] / drawn.sum(-1)).nan_to_num(nan=0.0, posinf=0.0).log()[..., None]
    log_weight = torch.where(drawn, ratio, -torch.inf).to(scores.dtype)
    return torch.logsumexp(scores + log_weight[:, :, None], dim=-1).flatten(1, 2)


def attend(
    query: Queries,
    keys: Keys,
    values: Values,
    indices: Indices,
    scale: float,
    tail_mass: PerHeadRow | None = None,
    tail_values: Float[Tensor, "b h t d"] | None = None,
    softmax: Softmax = PLAIN,
) -> Attended:
    """Exact softmax attention over the indexed slots, and over the tail's virtual token where one is given.

    Only indexed rows of ``keys`` and ``values`` are read. Accumulates in float32 (float64 for float64) and returns
    the query's dtype.
    """
    batch, sets = indices.shape[:2]
    compute = torch.promote_types(query.dtype, torch.float32)
    # Padding repeats the row's first slot under a weight of 0, so that no unselected slot is ever read.
    slots = indices.where(indices >= 0, indices[..., :1])
    picked_keys = _gather(keys, slots).to(compute)
    grouped = query.to(compute).unflatten(1, (sets, -1)).transpose(2, 3)
    scores = softmax.cap(scale * grouped @ picked_keys.mT).masked_fill((indices < 0)[..., None, :], -torch.inf)
    k = scores.shape[-1]
    if tail_mass is not None:
        mass = tail_mass.to(compute).unflatten(1, (sets, -1)).transpose(2, 3)
        scores = torch.cat([scores, mass[..., None]], dim=-1)
    if softmax.sink_logits is not None:
        logits = softmax.sink_logits.to(compute).reshape(sets, 1, -1, 1)
        scores = torch.cat([scores, logits.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = scores.softmax(-1)
    output, kept = weights[..., :k] @ _gather(values, slots).to(compute), None
    if tail_mass is not None and tail_values is not None:
        answer = tail_values.to(compute).unflatten(1, (sets, -1)).transpose(2, 3)
        output = output + weights[..., k : k + 1] * answer
        exact = weights[..., :k].sum(-1)
        kept = (exact / (exact + weights[..., k])).transpose(2, 3).flatten(1, 2)
    return Attended(output.transpose(2, 3).reshape(batch, -1, *query.shape[2:]).to(query.dtype), kept)


def leading_dims(keys: Keys, encoder: Encoder | None) -> Tensor:
    """The encoded dims that the linear tail regresses on, before quantisation (B, Hkv, S, R1); R1 = 0 without encoder."""
    if encoder is None:
        return keys.new_zeros(*keys.shape[:3], 0, dtype=torch.promote_types(keys.dtype, torch.float32))
    return encoder.project_keys(keys)[..., : encoder.tail_rank]


def sums_of_blocks(encoded: Tensor, values: Values, rows: Rows) -> TailSums:
    """The tail's sums for every row, over the prefix of whole blocks at the row's own length: (B, Hkv, T, ...)."""
    covered = covered_tokens(rows.tokens)
    longest = int(covered.max())
    slots = rows.slots_in_order(longest)[:, None, :, None]
    blocks = [
        tensor.take_along_dim(slots, dim=2).to(encoded.dtype).unflatten(2, (-1, BLOCK)) for tensor in (encoded, values)
    ]
    sums = (blocks[1].sum(3), blocks[0].sum(3), blocks[0].mT @ blocks[1])
    which = covered // BLOCK
    prefixes = []
    for block_sums in sums:
        nothing = block_sums.new_zeros(*block_sums.shape[:2], 1, *block_sums.shape[3:])
        running = torch.cat([nothing, block_sums.cumsum(2)], dim=2)
        shape = (which.shape[0], 1, which.shape[1], *([1] * (running.dim() - 3)))
        prefixes.append(running.take_along_dim(which.reshape(shape), dim=2))
    return TailSums(covered[:, None].to(encoded.dtype), *prefixes)


def _gather(tensor: Keys, slots: Tensor) -> Tensor:
    """Rows of (B, Hkv, S, D) at (B, sets, T, K): (B, sets, T, K, D); sets share their KV head."""
    batch, heads = tensor.shape[:2]
    sets = slots.shape[1]
    of_batch = torch.arange(batch, device=slots.device)[:, None, None, None]
    of_head = (torch.arange(sets, device=slots.device) // (sets // heads))[:, None, None]
    return tensor[of_batch, of_head, slots]
