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


class Softmax(NamedTuple):
    """What a model adds to the softmax over its attention scores.

    ``softcap`` bounds them to softcap * tanh(score / softcap) (Gemma 2). ``sink_logits`` (H) join the denominator with
    no value, one a query head (gpt-oss).
    """

    softcap: float | None = None
    sink_logits: Tensor | None = None

    def cap(self, scores: Tensor) -> Tensor:
        """The scores, soft-capped where the model does that.

        >>> Softmax(softcap=2.0).cap(torch.tensor([0.0, 2.0, 100.0]))
        tensor([0.0000, 1.5232, 2.0000])
        """
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def of_heads(self, rows: slice) -> "Softmax":
        """The same for some of the query heads."""
        return self if self.sink_logits is None else self._replace(sink_logits=self.sink_logits[rows])


PLAIN = Softmax()


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
    softmax: Softmax = PLAIN,
) -> Float[Tensor, "g d"]:
    """Softmax attention over the given tokens and, where given, one virtual token of score t and value u a head.

    output = (sum exp(s_j) v_j + exp(t) u) / (sum exp(s_j) + exp(t) + exp(sink logit))
    """
    count = len(keys)
    scores = softmax.cap(scale * query @ keys.mT)
    if tail_mass is not None and tail_values is not None:
        scores = torch.cat([scores, tail_mass[:, None]], dim=-1)
    if softmax.sink_logits is not None:
        scores = torch.cat([scores, softmax.sink_logits[:, None].to(scores.dtype)], dim=-1)
    weights = scores.softmax(-1)
    output = weights[:, :count] @ values
    return output if tail_values is None else output + weights[:, count : count + 1] * tail_values


def decode_step(
    query: Float[Tensor, "h d"],
    keys: Float[Tensor, "kv s d"],
    values: Float[Tensor, "kv s d"],
    valid: Bool[Tensor, " s"],
    encoder: Encoder,
    budget: Budget,
    scale: float,
    tail_kind: str = "none",
    softmax: Softmax = PLAIN,
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
        tail_mass = tail.tail_log_mass(scores, encoded.offset[0, rows, 0], selected, in_sample, softmax.cap)
        tail_values = None
        if tail_kind != "none" and covered:
            leading = projected[head, :covered, : encoder.tail_rank]
            sums = tail.TailSums.of(leading, values[head, slots[:covered]])
            query_leading, deviation = encoded.leading[0, rows, 0], encoded.deviation[0, rows, 0]
            tail_values = tail.tail_value(tail_kind, sums, query_leading, deviation, scale)
        picked = slots[chosen]
        step = (query[rows], keys[head, picked], values[head, picked], scale, tail_mass, tail_values)
        outputs.append(attend(*step, softmax.of_heads(rows)))
        indices.append(picked)
        masses.append(tail_mass)
    return ReferenceStep(torch.cat(outputs), torch.stack(indices), torch.cat(masses))
