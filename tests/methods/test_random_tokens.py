"""``random``: K tokens whatever the query, the same ones wherever the sequence lies, all of them equally often."""

import torch

from helpers import noise
from loki_attention.core.budget import Budget
from loki_attention.kernels.rows import Rows
from loki_attention.methods import LayerView, Step
from loki_attention.methods.random_tokens import Random
from method_steps import SHAPE, make

BUDGET = Budget(tokens=40, sinks=4, recent=16)


def ranks_drawn(valid: torch.Tensor, tokens: torch.Tensor, budget: Budget = BUDGET, seed: int = 0) -> torch.Tensor:
    """The places within the sequence that each row draws: (B, sets, T, K)."""
    rows = Rows.of(valid, tokens)
    batch, slots = valid.shape
    keys, query = (noise(batch, h, n, 64, seed=seed) for h, n in ((2, slots), (8, tokens.shape[1])))
    method = make(Random, budget=budget)
    step = Step(query, LayerView(keys, keys, None, None), rows, method.budgets(rows), SHAPE.scale, None)
    indices = method.choose(step).indices
    return rows.rank[:, None, None].expand(*indices.shape[:3], -1).gather(-1, indices)


def test_sinks_and_recent_stay_and_the_query_does_not_matter() -> None:
    valid, tokens = torch.ones(1, 300, dtype=torch.bool), torch.tensor([[299, 300]])
    drawn = ranks_drawn(valid, tokens)
    assert torch.equal(drawn, ranks_drawn(valid, tokens, seed=9))
    for head in drawn[0, :, 1].tolist():
        assert {*range(4), *range(284, 300)} <= set(head)
        assert len(set(head)) == 40
    assert drawn[0, 0, 1].tolist() != drawn[0, 1, 1].tolist(), "heads draw alike"
    assert drawn[0, 0, 0].tolist() != drawn[0, 0, 1].tolist(), "steps draw alike"


def test_neither_the_batch_nor_padding_changes_the_draw() -> None:
    alone = ranks_drawn(torch.ones(1, 200, dtype=torch.bool), torch.tensor([[200]]))
    valid = torch.ones(3, 260, dtype=torch.bool)
    valid[1, :60] = False
    valid[2, 50:110] = False
    together = ranks_drawn(valid, torch.tensor([[260], [200], [200]]))
    assert torch.equal(together[1], alone[0])
    assert torch.equal(together[2], alone[0])


def test_every_token_is_drawn_equally_often() -> None:
    """400 draws of 16 from ever longer sequences: 100 in every 64th of the sequence, within five standard deviations."""
    tokens = torch.arange(64, 464)[None]
    valid = torch.ones(1, 464, dtype=torch.bool)
    drawn = ranks_drawn(valid, tokens, Budget(tokens=16, sinks=0, recent=0))[0, 0]
    counts = torch.histc(drawn / tokens[0, :, None], bins=64, min=0.0, max=1.0)
    assert int(counts.sum()) == 6400
    assert (counts - 100).abs().max() < 50
