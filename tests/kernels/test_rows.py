"""Which slots each row sees, against masks made by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loki_attention.core import selection
from loki_attention.kernels.rows import Rows

MASKS = st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=3)
few = settings(max_examples=40, deadline=None, derandomize=True)


def valid_mask(slots: int, first: int, keep: float, seed: int = 0) -> Tensor:
    """Slots from ``first`` on, a share of them left out but never the first and the last."""
    valid = torch.rand(slots, generator=torch.Generator().manual_seed(seed)) < keep
    valid[first] = valid[-1] = True
    valid[:first] = False
    return valid


@given(MASKS)
@few
def test_rank_counts_valid_slots(masks: list[list[bool]]) -> None:
    valid = torch.tensor(masks)
    rank = Rows.of(valid, valid.sum(-1, keepdim=True)).rank
    for mask, ours in zip(masks, rank.tolist(), strict=True):
        assert ours == [sum(mask[: i + 1]) - 1 if here else -1 for i, here in enumerate(mask)]


@given(MASKS, st.integers(0, 4), st.integers(0, 4))
@few
def test_rows_see_the_first_tokens_and_force_their_own_ends(masks: list[list[bool]], sinks: int, recent: int) -> None:
    valid = torch.tensor(masks)
    counts = torch.minimum(torch.arange(13)[None], valid.sum(-1, keepdim=True))
    rows = Rows.of(valid, counts)
    for b, mask in enumerate(masks):
        slots = [i for i, here in enumerate(mask) if here]
        for t, count in enumerate(counts[b].tolist()):
            seen = slots[:count]
            assert rows.visible[b, t].nonzero().flatten().tolist() == seen
            expected = sorted({*seen[:sinks], *seen[max(0, count - recent) :]})
            assert rows.forced(sinks, recent)[b, t].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("first", [0, 3, 16, 41])
@pytest.mark.parametrize("keep", [1.0, 0.6])
def test_sample_is_that_of_core_for_every_length(first: int, keep: float) -> None:
    valid = valid_mask(4200, first, keep)
    slots = valid.nonzero().flatten()
    counts = torch.tensor([1, 33, 1000, 1023, 1024, 1500, len(slots)])
    sampled = Rows.of(valid[None], counts[None]).sampled[0]
    for row, count in zip(sampled, counts.tolist(), strict=True):
        seen = slots[:count]
        expected = torch.zeros(4200, dtype=torch.bool)
        expected[seen[selection.sampled(seen)]] = True
        assert torch.equal(row, expected)


def test_each_sequence_has_its_own_sample() -> None:
    valid = torch.stack([valid_mask(2100, 0, 1.0), valid_mask(2100, 500, 0.8)])
    both = Rows.of(valid, valid.sum(-1, keepdim=True)).sampled
    for b in range(2):
        alone = Rows.of(valid[b : b + 1], valid[b : b + 1].sum(-1, keepdim=True)).sampled
        assert torch.equal(both[b : b + 1], alone)


def test_chunks_are_the_rows_in_between() -> None:
    valid = torch.ones(2, 10, dtype=torch.bool)
    rows = Rows.of(valid, torch.arange(1, 11).expand(2, -1))
    part = rows.chunk(3, 7)
    assert part.tokens.tolist() == [[4, 5, 6, 7]] * 2
    assert torch.equal(part.visible, rows.visible[:, 3:7])


def test_slots_in_order_skip_padding_and_holes() -> None:
    valid = torch.tensor([[False, True, False, True, True], [True, True, True, True, True]])
    rows = Rows.of(valid, valid.sum(-1, keepdim=True))
    ordered = rows.slots_in_order(4)
    assert ordered.shape == (2, 4)
    assert ordered[0, :3].tolist() == [1, 3, 4]
    assert ordered[1].tolist() == [0, 1, 2, 3]
    assert rows.slots_in_order(0).shape == (2, 0)
