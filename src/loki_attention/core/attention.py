"""Dense and sparse attention of one decode row: the reference that every kernel is held to.

One sequence, plain loops over heads, in the dtype of its inputs; give it float64.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loki_attention.core import selection, tail
from loki_attention.core.budget import Budget
from loki_attention.core.encoder import Encoder


class ReferenceStep(NamedTuple):
    """Output (H, D), selected slots per KV head, ascending (Hkv, K), and the tail's log-mass (H)."""

    output: Float[Tensor, "h d"]
    indices: Int[Tensor, "kv k"]
    log_mass: Float[Tensor, " h"]


def attend(
    query: Float[Tensor, "g d"],
    keys: Float[Tensor, "n d"],
    values: Float[Tensor, "n d"],
    scale: float,
    tail_mass: Float[Tensor, " g"] | None = None,
    tail_values: Float[Tensor, "g d"] | None = None,
) -> Float[Tensor, "g d"]:
    """Softmax attention over the given tokens and, where given, one virtual token of score t and value u a head.

    output = (sum exp(s_j) v_j + exp(t) u) / (sum exp(s_j) + exp(t))
    """
    scores = scale * query @ keys.mT
    if tail_mass is None or tail_values is None:
        return scores.softmax(-1) @ values
    weights = torch.cat([scores, tail_mass[:, None]], dim=-1).softmax(-1)
    return weights[:, :-1] @ values + weights[:, -1:] * tail_values


def decode_step(
    query: Float[Tensor, "h d"],
    keys: Float[Tensor, "kv s d"],
    values: Float[Tensor, "kv s d"],
    valid: Bool[Tensor, " s"],
    encoder: Encoder,
    budget: Budget,
    scale: float,
    tail_kind: str = "none",
) -> ReferenceStep:
    """One decode step of Loki with quantised planes: encode, score, select, attend (Algorithm 1 and the tail).

    ``valid`` marks the slots that hold tokens, the new one included. K >= S attends everything, without a tail.
    """
    slots = valid.nonzero().squeeze(-1)
    count = len(slots)
    k, covered = budget.of(count), int(tail.covered_tokens(torch.tensor(count)))
    projected = encoder.project_keys(keys[None, :, slots])[0]
    levels = encoder.planes.quantize(projected, encoder.steps[:, None])
    encoded = encoder.encode_query(query[None, :, None], scale)
    group = query.shape[0] // keys.shape[0]
    is_forced, in_sample = selection.forced(count, budget.sinks, budget.recent), selection.sampled(slots)
    outputs, indices, masses = [], [], []
    for head in range(keys.shape[0]):
        rows = slice(head * group, (head + 1) * group)
        scores = encoded.step[0, rows] * (encoded.codes[0, rows, 0].to(levels.dtype) @ levels[head].mT)
        mass = selection.log_mass(scores, is_forced, in_sample)
        combined = selection.combine(scores, mass) if group > 1 else scores[0]
        ranking = combined if encoder.planes.is_float else selection.code(combined, encoded.deviation[0, rows, 0])
        chosen = selection.top_k(ranking, is_forced, k)
        selected = torch.zeros(count, dtype=torch.bool).index_fill(0, chosen, True)
        tail_mass = tail.tail_log_mass(scores, encoded.offset[0, rows, 0], selected, in_sample)
        tail_values = None
        if tail_kind != "none" and covered:
            leading = projected[head, :covered, : encoder.tail_rank]
            sums = tail.TailSums.of(leading, values[head, slots[:covered]])
            query_leading, deviation = encoded.leading[0, rows, 0], encoded.deviation[0, rows, 0]
            tail_values = tail.tail_value(tail_kind, sums, query_leading, deviation, scale)
        picked = slots[chosen]
        outputs.append(attend(query[rows], keys[head, picked], values[head, picked], scale, tail_mass, tail_values))
        indices.append(picked)
        masses.append(tail_mass)
    return ReferenceStep(torch.cat(outputs), torch.stack(indices), torch.cat(masses))
