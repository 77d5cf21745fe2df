"""Which tokens one decode row attends, for one sequence and key/value head. The specification, not the fast path.

Works on the n *valid* tokens of the sequence in order; ``slots`` are their places in the cache. Every function is a
few lines of float64-ready torch that a backend is tested against. Rules and reasons: ``docs/concepts.md``.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TEMPER = 0.75
"""How much of a head's log-mass its scores give up before the group's maximum is taken."""
TILE = 16
"""Slots in one tile of the sample."""
SAMPLED_TOKENS = 512
"""Sequences up to this length are sampled whole; longer ones about this much, at most twice."""
CODES_PER_DEVIATION = 2048
"""Steps of the 16-bit code in one standard deviation of the query's widest head."""
LARGEST_CODE = 32767


def forced(count: int, sinks: int, recent: int) -> Bool[Tensor, " n"]:
    """The first ``sinks`` and the last ``recent`` of ``count`` valid tokens: always attended.

    >>> forced(5, 1, 2).tolist()
    [True, False, False, True, True]
    """
    order = torch.arange(count)
    return (order < sinks) | (order >= count - recent)


def sampled(slots: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    """The sample: of tiles of 16 slots, counted from that of the first valid slot, those numbered n mod stride.

    The stride is max(1, n // 512), so that up to 1023 tokens every one is in the sample.
    """
    tiles = slots // TILE - slots[0] // TILE
    stride = max(1, len(slots) // SAMPLED_TOKENS)
    return tiles % stride == len(slots) % stride


def log_mass(
    scores: Float[Tensor, "g n"], is_forced: Bool[Tensor, " n"], in_sample: Bool[Tensor, " n"]
) -> Float[Tensor, " g"]:
    """L: the log-sum-exp of each head's scores, forced tokens counted as they are and the rest by the sample.

    >>> log_mass(torch.zeros(1, 4), forced(4, 1, 1), torch.tensor([True, True, False, True])).exp()
    tensor([4.])
    """
    drawn = in_sample & ~is_forced
    weight = (~is_forced).sum() / drawn.sum() if drawn.any() else torch.tensor(0.0)
    log_weight = torch.where(is_forced, 0.0, torch.where(drawn, weight.to(scores.dtype).log(), -torch.inf))
    return torch.logsumexp(scores + log_weight, dim=-1)


def combine(scores: Float[Tensor, "g n"], mass: Float[Tensor, " g"]) -> Float[Tensor, " n"]:
    """The tempered maximum over the group, max_h (s_h - 3/4 L_h), shifted so that one head alone keeps its scores.

    A head that rests on its sinks has a large L and asks for little.
    """
    return (scores - TEMPER * mass[:, None]).amax(0) + TEMPER * mass.min()


def code(combined: Float[Tensor, " n"], deviations: Float[Tensor, " g"]) -> Int[Tensor, " n"]:
    """The 16-bit code of combined scores: 1/2048 of the widest head's standard deviation a step, clamped.

    >>> code(torch.tensor([0.5, -100.0]), torch.tensor([0.5, 0.25])).tolist()
    [2048, -32768]
    """
    widest = deviations.max()
    if widest == 0:
        return torch.zeros_like(combined, dtype=torch.long)
    return (combined * (CODES_PER_DEVIATION / widest)).round().clamp(-LARGEST_CODE - 1, LARGEST_CODE).long()


def top_k(ranking: Tensor, is_forced: Bool[Tensor, " n"], k: int) -> Int[Tensor, " k"]:
    """Positions of the forced tokens and the highest of the rest, k in all, ascending; ties go to the lower one.

    >>> top_k(torch.tensor([0, 7, 7, 9, 0]), forced(5, 0, 1), 3).tolist()
    [1, 3, 4]
    """
    key = torch.where(is_forced, torch.inf, ranking.double())
    return torch.sort(key, descending=True, stable=True).indices[:k].sort().values
