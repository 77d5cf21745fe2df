"""The torch backend's operations on scores one by one: combination, codes and top-k."""

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import Shape, chosen_slots, noise, random_encoder, random_layer
from loki_attention.core import selection
from loki_attention.core.budget import Budget
from loki_attention.core.encoder import EncodedQuery
from loki_attention.kernels import torch_backend as backend
from loki_attention.kernels.rows import Rows


@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1, 3, 32767])
def test_top_k_equals_a_stable_sort(dtype: torch.dtype, spread: int) -> None:
    """Ties go to the lower slot, in integer codes and in floats."""
    generator = torch.Generator().manual_seed(spread)
    ranking = torch.randint(-spread - 1, spread + 1, (2, 3, 4, 200), generator=generator).to(dtype)
    valid = torch.rand(2, 200, generator=generator) < 0.8
    tokens = torch.tensor([[1, 40, 100, 140]]).expand(2, -1)
    rows, k = Rows.of(valid, tokens), torch.tensor([[1, 17, 64, 140]]).expand(2, -1)
    indices = backend.top_k(ranking, rows, k, backend.Forced(2, 3))
    for b in range(2):
        for s in range(3):
            for t in range(4):
                key = np.where(rows.visible[b, t], ranking[b, s, t].double(), -np.inf)
                key = np.where(rows.forced(2, 3)[b, t], np.inf, key)
                expected = np.sort(np.argsort(-key, kind="stable")[: int(k[b, t])])
                assert chosen_slots(indices[b, s, t])[0] == expected.tolist()


def test_the_lowest_code_is_still_chosen_before_padding() -> None:
    valid = torch.tensor([[False, True, True, False, True]])
    ranking = torch.full((1, 1, 1, 5), -32768, dtype=torch.int16)
    indices = backend.top_k(ranking, Rows.of(valid, torch.tensor([[3]])), torch.tensor([[2]]), backend.Forced(0, 0))
    assert indices.tolist() == [[[[1, 2]]]]


def test_the_highest_code_still_yields_to_what_is_forced() -> None:
    ranking = torch.tensor([[[[32767, 32767, -32768, 32767]]]], dtype=torch.int16)
    rows = Rows.of(torch.ones(1, 4, dtype=torch.bool), torch.tensor([[4]]))
    assert backend.top_k(ranking, rows, torch.tensor([[2]]), backend.Forced(0, 2)).tolist() == [[[[2, 3]]]]


def test_unselected() -> None:
    indices = torch.tensor([[[[0, 3]], [[2, -1]]]])
    rest = backend.unselected(indices, 4)
    assert rest[0, :, 0].tolist() == [[False, True, True, False], [True, True, False, True]]


def test_exact_scores() -> None:
    layer = random_layer(Shape(2, 4, 64), (50, 50), dtype=torch.float16)
    for sets in (2, 8):
        scores = backend.score_exact(layer.query, layer.keys, 0.2, sets)
        grouped = layer.keys.double().repeat_interleave(4, 1)
        expected = 0.2 * (layer.query.double() @ grouped.mT)[:, :, 0].unflatten(1, (sets, -1))
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores[:, :, :, 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_group_of_one_keeps_its_scores() -> None:
    scores = noise(2, 3, 1, 4, 50, seed=0)
    assert torch.equal(backend.combine_group(scores, None), scores[:, :, 0])


def test_combination_and_codes_of_several_rows_equal_core() -> None:
    scores, deviation = 3 * noise(2, 3, 4, 5, 50, seed=0), noise(2, 12, 5, seed=1).abs()
    deviation[0, :4, 0] = 0
    mass = scores.logsumexp(-1)
    combined = backend.combine_group(scores, mass)
    codes = backend.code(combined, deviation)
    assert codes.dtype == torch.int16
    for b, s, t in np.ndindex(2, 3, 5):
        expected = selection.combine(scores[b, s, :, t], mass[b, s, :, t])
        torch.testing.assert_close(combined[b, s, t], expected)
        assert codes[b, s, t].tolist() == selection.code(expected, deviation[b, 4 * s : 4 * s + 4, t]).tolist()
    assert codes[0, 0, 0].count_nonzero() == 0


def test_weighted_log_sum() -> None:
    scores, weight = noise(2, 3, 4, 5, 50, seed=0), noise(2, 5, 50, seed=1).abs()
    weight[:, 0] = 0
    with np.errstate(divide="ignore"):
        expected = np.log(np.einsum("bhgts,bts->bhgt", np.exp(scores.numpy()), weight.numpy()))
    np.testing.assert_allclose(backend.weighted_log_sum(scores, weight.log()), expected, rtol=1e-12, atol=1e-12)


def test_rows_equal_each_row_alone() -> None:
    """Many rows at once, each with its own length, as in ``continuation``."""
    shape, budget, forced = Shape(2, 4, 64), Budget(fraction=1 / 8, minimum=16, sinks=2, recent=8), backend.Forced(2, 8)
    ours, layer = random_encoder(shape, "16@4+32@2"), random_layer(shape, (1500, 1400), holes=True)
    query = noise(2, 8, 3, 64, seed=9)
    tokens = torch.tensor([[700, 1100, 1500], [20, 1024, 1400]])
    encoded, packed = ours.encode_query(query, 0.2), ours.encode_keys(layer.keys)

    def choose(part: slice) -> tuple[Tensor, Tensor]:
        rows = Rows.of(layer.valid, tokens).chunk(part.start, part.stop)
        some = EncodedQuery(*(tensor[:, :, part] for tensor in encoded))
        scores = backend.score_low_rank(some, packed, ours.planes, 2)
        ranking = backend.code(
            backend.combine_group(scores, backend.group_log_mass(scores, rows, forced)), some.deviation
        )
        k = budget.of_each(rows.tokens)
        indices = backend.top_k(ranking, rows, k, forced)
        return indices, backend.tail_log_mass(backend.estimates(scores, some), indices, rows, k, rows.sampled)

    indices, mass = choose(slice(0, 3))
    for t in range(3):
        alone, its_mass = choose(slice(t, t + 1))
        assert chosen_slots(indices[:, :, t]) == chosen_slots(alone)
        torch.testing.assert_close(mass[:, :, t : t + 1], its_mass)
