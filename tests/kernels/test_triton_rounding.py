"""What tests let pass on a GPU: a slot that flips, and no more than that."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import triton_rounding
from helpers import noise


class Generated(NamedTuple):
    sequences: Tensor
    logits: Tensor


@pytest.fixture(autouse=True)
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_rounding, "ON_A_GPU", True)


def fails(check: object, *arguments: object, **options: object) -> bool:
    try:
        check(*arguments, **options)
    except AssertionError:
        return True
    return False


def generated(logits: Tensor) -> Generated:
    """Greedy tokens of logits (steps, B, V)."""
    return Generated(logits.argmax(-1).T, logits)


def test_logits_of_a_flipped_step_pass_and_wrong_ones_do_not() -> None:
    logits = noise(40, 2, 50, seed=1).float()
    flipped, wrong, far = logits.clone(), logits + 0.01, logits.clone()
    flipped[7] += 0.1
    far[7, 0, 0] += 1.0
    triton_rounding.assert_same_logits(flipped, logits)
    assert fails(triton_rounding.assert_same_logits, flipped, logits, steady=True)
    assert fails(triton_rounding.assert_same_logits, wrong, logits)
    assert fails(triton_rounding.assert_same_logits, far, logits)


def test_one_slot_in_a_hundred_may_differ() -> None:
    chosen = torch.arange(100).view(1, 1, 1, 100)
    one, three, fewer = chosen.clone(), chosen.clone(), chosen.clone()
    one[..., -1] = 500
    three[..., -3:] += 500
    fewer[..., -1] = -1
    assert triton_rounding.assert_same_slots([{1: chosen}], [{1: chosen}])
    assert not triton_rounding.assert_same_slots([{1: one}], [{1: chosen}])
    assert fails(triton_rounding.assert_same_slots, [{1: three}], [{1: chosen}])
    assert fails(triton_rounding.assert_same_slots, [{1: fewer}], [{1: chosen}])
    assert fails(triton_rounding.assert_same_slots, [{}], [{}])


def test_tokens_may_part_at_a_near_tie_alone() -> None:
    logits = noise(40, 2, 50, seed=2).float()
    first, second = logits[30, 0].topk(2).indices
    logits[30, 0, second] = logits[30, 0, first] - 1e-3
    tied, after = logits.clone(), logits.clone()
    tied[30, 0, second] += 1.5e-3
    tied[31:, 0] = 0.0
    after[5:] = after[5:].roll(1, -1)
    assert not torch.equal(generated(tied).sequences, generated(logits).sequences)
    triton_rounding.assert_same_tokens(generated(tied), generated(logits))
    assert fails(triton_rounding.assert_same_tokens, generated(after), generated(logits))
