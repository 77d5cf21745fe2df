"""``snapkv`` against its votes in numpy."""

import numpy as np
import pytest
import torch

from helpers import chosen_slots
from loki_attention.cache import Watched
from loki_attention.core.budget import Budget
from loki_attention.methods.snapkv import SnapKV
from method_steps import make, per, softmax
from watched_layers import SCALE, Sequence, answer_row, run, sequence, show

PROMPT, TOKENS = 60, 75


def numpy_snapkv(layer: Sequence, heads: slice, kv: int, budget: Budget) -> list[int]:
    """The tokens of the prompt that one set keeps."""
    q, keys, window = layer.query[0, heads].numpy(), layer.keys[0, kv].numpy(), budget.recent
    votes = np.zeros(PROMPT)
    for t in range(PROMPT - max(1, window), PROMPT):
        votes[: t + 1] += softmax(SCALE * q[:, t] @ keys[: t + 1].T).sum(0)
    votes = votes[: PROMPT - window]
    padded = np.pad(votes, 3, constant_values=0)
    pooled = np.lib.stride_tricks.sliding_window_view(padded, 7).max(1)
    stays = [*range(budget.sinks), *range(PROMPT - window, PROMPT)]
    pooled[: budget.sinks] = -1
    best = np.argsort(-pooled, kind="stable")[: budget.of(PROMPT) - len(stays)]
    return sorted([*stays, *best.tolist()])


BUDGETS = [
    Budget(tokens=24, sinks=0, recent=8),
    Budget(tokens=24, sinks=2, recent=1),
    Budget(fraction=1 / 4, minimum=4, sinks=1, recent=4),
]


@per
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_snapkv_keeps_what_the_window_votes_for_and_all_that_is_new(budget: Budget, per: str) -> None:
    layer = sequence(TOKENS)
    answers = run(make(SnapKV, budget=budget, head_dim=16, per=per), layer, PROMPT)
    sets = 4 if per == "query-head" else 2
    for i in range(sets):
        heads, kv = slice(i * 4 // sets, (i + 1) * 4 // sets), i * 2 // sets
        kept = numpy_snapkv(layer, heads, kv, budget)
        assert len(kept) == budget.of(PROMPT)
        for t, answer in enumerate(answers, start=PROMPT):
            picked = [*kept, *range(PROMPT, t + 1)]
            assert chosen_slots(answer.indices[0, i])[0] == picked
            share = softmax(SCALE * layer.query[0, heads, t].numpy() @ layer.keys[0, kv, picked].numpy().T)
            np.testing.assert_allclose(
                answer.output[0, heads, 0], share @ layer.values[0, kv, picked].numpy(), atol=1e-9
            )


def test_a_crop_after_the_prompt_keeps_the_votes_and_one_into_it_does_not() -> None:
    method, held = make(SnapKV, budget=BUDGETS[0], head_dim=16), Watched()
    run(method, sequence(TOKENS), PROMPT, held)
    held.crop(PROMPT)
    assert held.notes["votes"].abs().sum() > 0
    held.crop(PROMPT - 1)
    assert not held.notes
    assert held.prompt_tokens is None


def test_a_second_prompt_votes_anew() -> None:
    """A cache of two prompts is judged as one prompt of all their tokens would be."""
    method, held, layer = make(SnapKV, budget=BUDGETS[0], head_dim=16), Watched(), sequence(TOKENS)
    first = Sequence(*(tensor[:, :, :PROMPT] for tensor in layer))
    run(method, first, PROMPT // 2, held)
    show(method, layer, held, PROMPT, TOKENS - 1)
    once = run(method, layer, TOKENS - 1)[-1]
    again = answer_row(method, layer, held, TOKENS - 1)
    assert torch.equal(again.indices, once.indices)
    assert torch.equal(again.output, once.output)
