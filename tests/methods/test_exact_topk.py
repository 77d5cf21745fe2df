"""``exact-topk`` against a numpy version of its rule, with and without a tail."""

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import random_encoder, random_layer
from loki_attention.core.budget import Budget
from loki_attention.core.encoder import Encoder
from loki_attention.methods import Step
from loki_attention.methods.exact_topk import ExactTopK
from method_steps import BUDGET, LENGTHS, SHAPE, attend, groups, make, per, slots_of, softmax, view_of


def numpy_exact_topk(query: Tensor, keys: Tensor, k: int, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chosen places among n tokens by the tempered maximum of centred scores, the scores and the rest's log-mass."""
    s = scale * query.numpy() @ keys.numpy().T
    n, centred = s.shape[1], s - s.mean(1, keepdims=True)
    mass = np.log(np.exp(centred).sum(1))
    combined = (centred - 0.75 * mass[:, None]).max(0)
    forced = (np.arange(n) < BUDGET.sinks) | (np.arange(n) >= n - BUDGET.recent)
    chosen = np.sort(np.argsort(-np.where(forced, np.inf, combined), kind="stable")[:k])
    with np.errstate(divide="ignore"):
        rest = np.log(np.exp(np.delete(s, chosen, axis=1)).sum(1))
    return chosen, s, rest


@per
@pytest.mark.parametrize("tail", ["none", "mean", "linear"])
def test_exact_topk_equals_numpy(tail: str, per: str) -> None:
    layer, basis = random_layer(SHAPE, LENGTHS, holes=True), random_encoder(SHAPE, "16@4+32@2")
    method = make(ExactTopK, tail=tail, per=per, encoder=basis if tail == "linear" else None)
    answer = attend(method, layer)
    sets = 8 if per == "query-head" else 2
    outputs = answer.output[:, :, 0].unflatten(1, (sets, -1)).flatten(0, 1)
    heads = [(i * 2 // sets) for i in range(sets)] * len(LENGTHS)
    for part, picked, output, head in zip(groups(layer, sets), slots_of(answer), outputs, heads, strict=True):
        query, keys, values, slots = part
        chosen, s, t = numpy_exact_topk(query, keys, BUDGET.of(len(slots)), SHAPE.scale)
        assert picked == slots[chosen].tolist()
        v, u = values.numpy(), numpy_tail_value(tail, query, keys, values, basis, head)
        if u is None:
            expected = softmax(s[:, chosen]) @ v[chosen]
        else:
            weights = softmax(np.concatenate([s[:, chosen], t[:, None]], 1))
            expected = weights[:, :-1] @ v[chosen] + weights[:, -1:] * u
        np.testing.assert_allclose(output, expected, rtol=1e-8, atol=1e-8)


def numpy_tail_value(
    tail: str, query: Tensor, keys: Tensor, values: Tensor, basis: Encoder, head: int
) -> np.ndarray | None:
    """u of method.md, from its own sums; None where there is no tail."""
    cover = 64 * max(0, len(keys) // 64 - 1)
    if tail == "none" or not cover:
        return None
    v = values.numpy()[:cover]
    if tail == "mean":
        return np.tile(v.mean(0), (len(query), 1))
    q = query.numpy() @ basis.query_map[head].numpy()
    e = ((keys.numpy() - basis.mean[head].numpy()) @ basis.key_map[head].numpy())[:cover, :16]
    deviation = SHAPE.scale * np.sqrt(((q * basis.deviations[head].numpy()) ** 2).sum(1))
    covariance = (e - e.mean(0)).T @ (v - v.mean(0)) / cover
    return v.mean(0) + SHAPE.scale * np.minimum(1, 1 / deviation)[:, None] * q[:, :16] @ covariance


def test_exact_topk_log_mass_is_exact_beyond_the_sample() -> None:
    """At 2100 tokens a sample would be a quarter of them; exact scores use all."""
    layer = random_layer(SHAPE, (2100,))
    method = make(ExactTopK, tail="mean")
    rows = layer.rows
    step = Step(layer.query, view_of(layer, method), rows, method.budgets(rows), SHAPE.scale, None)
    mass = method.choose(step).tail_mass
    for i, (query, keys, _, _) in enumerate(groups(layer, 2)):
        expected = numpy_exact_topk(query, keys, 48, SHAPE.scale)[2]
        np.testing.assert_allclose(mass[0, 4 * i : 4 * i + 4, 0], expected, rtol=1e-10)


def test_exact_topk_ignores_what_padding_holds() -> None:
    layer = random_layer(SHAPE, LENGTHS, holes=True)
    hidden = ~layer.valid[:, None, :, None]
    poisoned = layer._replace(
        keys=layer.keys.masked_fill(hidden, torch.nan), values=layer.values.masked_fill(hidden, 1e9)
    )
    plain, other = (attend(make(ExactTopK), tensors) for tensors in (layer, poisoned))
    assert slots_of(plain) == slots_of(other)
    assert torch.equal(plain.output, other.output)


def test_exact_topk_per_query_head_keeps_the_most_mass_of_any_set() -> None:
    layer = random_layer(SHAPE, (300,))
    budget = Budget(tokens=48, sinks=0, recent=0)
    answer = attend(make(ExactTopK, per="query-head", budget=budget), layer)
    for (query, keys, _, _), picked in zip(groups(layer, 8), slots_of(answer), strict=True):
        scores = (query @ keys.mT)[0]
        assert set(picked) == set(scores.topk(48).indices.tolist())
