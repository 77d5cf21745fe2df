"""``h2o`` against its recursion in numpy."""

import numpy as np
import pytest

from helpers import chosen_slots
from loki_attention.cache import Watched
from loki_attention.core.budget import Budget
from loki_attention.errors import ArgumentError, ModelError
from loki_attention.methods.h2o import H2O
from method_steps import make, per, softmax
from watched_layers import SCALE, Sequence, answer_row, run, sequence, step_of

PROMPT, TOKENS = 40, 70


def numpy_h2o(layer: Sequence, heads: slice, kv: int, budget: Budget) -> tuple[list[list[int]], list[np.ndarray]]:
    """Kept tokens and outputs of every row after the prompt, for the query heads of one set."""
    q, keys, values = layer.query[0, heads].numpy(), layer.keys[0, kv].numpy(), layer.values[0, kv].numpy()
    mass, kept = np.zeros(TOKENS), list(range(PROMPT))
    for t in range(PROMPT):
        mass[: t + 1] += softmax(SCALE * q[:, t] @ keys[: t + 1].T).sum(0)
    sets, outputs = [], []
    for t in range(PROMPT, TOKENS):
        k, n = budget.of(t + 1), t + 1
        recent = range(n - max(k - k // 2, budget.recent), n)
        stays = sorted({*range(budget.sinks), *recent})
        others = sorted((j for j in kept if j not in stays), key=lambda j: (-mass[j], j))
        kept = sorted(stays + others[: k - len(stays)])
        share = softmax(SCALE * q[:, t] @ keys[kept].T)
        mass[kept] += share.sum(0)
        sets.append(kept)
        outputs.append(share @ values[kept])
    return sets, outputs


BUDGETS = [
    Budget(tokens=12, sinks=0, recent=0),
    Budget(tokens=20, sinks=2, recent=15),
    Budget(fraction=1 / 3, minimum=4, sinks=1, recent=2),
]


@per
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_h2o_is_the_papers_recursion(budget: Budget, per: str) -> None:
    layer = sequence(TOKENS)
    answers = run(make(H2O, budget=budget, head_dim=16, per=per), layer, PROMPT)
    sets = 4 if per == "query-head" else 2
    for i in range(sets):
        heads = slice(i * 4 // sets, (i + 1) * 4 // sets)
        kept, outputs = numpy_h2o(layer, heads, i * 2 // sets, budget)
        assert [chosen_slots(answer.indices[0, i])[0] for answer in answers] == kept
        for answer, expected in zip(answers, outputs, strict=True):
            np.testing.assert_allclose(answer.output[0, heads, 0], expected, rtol=0, atol=1e-9)


def test_what_was_given_up_does_not_come_back() -> None:
    answers = run(make(H2O, budget=BUDGETS[2], head_dim=16), sequence(TOKENS), PROMPT)
    for head in range(2):
        given_up: set[int] = set()
        for t, answer in enumerate(answers, start=PROMPT):
            kept = set(chosen_slots(answer.indices[0, head])[0])
            assert not kept & given_up
            given_up |= set(range(t + 1)) - kept


def test_rows_that_went_by_unseen_are_refused() -> None:
    method, layer, held = make(H2O, budget=BUDGETS[0], head_dim=16), sequence(TOKENS), Watched()
    run(method, layer, PROMPT, held)
    held.crop(TOKENS - 1)
    with pytest.raises(ModelError, match="rows of this cache went by unseen"):
        answer_row(method, layer, held, TOKENS - 1)
    with pytest.raises(ArgumentError, match="needs notes"):
        method.choose(step_of(layer, None, TOKENS - 1, TOKENS))
