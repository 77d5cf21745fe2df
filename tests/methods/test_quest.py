"""``quest`` against a few lines of numpy, and the bound that its paper promises."""

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import random_layer
from loki_attention.methods import Step
from loki_attention.methods.quest import PAGE, Quest, page_bounds
from method_steps import BUDGET, LENGTHS, SHAPE, attend, groups, make, per, slots_of, softmax, view_of


def numpy_bounds(query: Tensor, keys: Tensor) -> np.ndarray:
    """The upper bound of each token's page for every head: sum_i max(q_i m_i, q_i M_i)."""
    q, k = query.numpy()[:, None], keys.numpy()
    bounds = []
    for start in range(0, len(k), PAGE):
        page = k[start : start + PAGE]
        bound = np.maximum(q * page.min(0), q * page.max(0)).sum(-1)
        bounds.append(np.repeat(bound, len(page), axis=1))
    return SHAPE.scale * np.concatenate(bounds, axis=1)


def numpy_quest(query: Tensor, keys: Tensor, k: int) -> np.ndarray:
    """Chosen places: sinks, recent and the tokens of the best pages, by the largest bound of the group."""
    ranking, n = numpy_bounds(query, keys).max(0), len(keys)
    forced = (np.arange(n) < BUDGET.sinks) | (np.arange(n) >= n - BUDGET.recent)
    # Within a page the bounds are one number, which rounding must not rank.
    order = np.argsort(-np.where(forced, np.inf, ranking.round(9)), kind="stable")
    return np.sort(order[:k])


@per
def test_quest_equals_numpy(per: str) -> None:
    layer = random_layer(SHAPE, LENGTHS, holes=True)
    answer = attend(make(Quest, per=per), layer)
    sets = 8 if per == "query-head" else 2
    outputs = answer.output[:, :, 0].unflatten(1, (sets, -1)).flatten(0, 1)
    for part, picked, output in zip(groups(layer, sets), slots_of(answer), outputs, strict=True):
        query, keys, values, slots = part
        chosen = numpy_quest(query, keys, BUDGET.of(len(slots)))
        assert picked == slots[chosen].tolist()
        weights = softmax(SHAPE.scale * query.numpy() @ keys.numpy()[chosen].T)
        np.testing.assert_allclose(output, weights @ values.numpy()[chosen], rtol=0, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 16, 17, 200])
def test_no_score_of_a_page_is_above_its_bound(tokens: int) -> None:
    layer = random_layer(SHAPE, (tokens, tokens))
    method = make(Quest)
    step = Step(layer.query, view_of(layer, method), layer.rows, method.budgets(layer.rows), SHAPE.scale, None)
    bounds = page_bounds(step, 2)[:, :, :, 0]
    grouped = layer.query[:, :, 0].unflatten(1, (2, -1))
    exact = SHAPE.scale * grouped @ layer.keys.mT
    assert bool((exact <= bounds + 1e-9).all())
    of_pages = [part.amax(-1) for part in bounds.split(PAGE, dim=-1)]
    assert all(torch.equal(top, part.amin(-1)) for top, part in zip(of_pages, bounds.split(PAGE, -1), strict=True))


def test_quest_ignores_what_padding_holds() -> None:
    layer = random_layer(SHAPE, LENGTHS, holes=True)
    hidden = ~layer.valid[:, None, :, None]
    poisoned = layer._replace(keys=layer.keys.masked_fill(hidden, torch.nan))
    plain, other = (attend(make(Quest), tensors) for tensors in (layer, poisoned))
    assert slots_of(plain) == slots_of(other)
    assert torch.equal(plain.output, other.output)
