"""Ranks and spectra against numpy, on a tiny model's moments and on moments whose rank is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from loki_attention.analysis.rank import HeadRank, rank_table, spectra
from loki_attention.core.moments import LayerMoments, Moments
from loki_attention.errors import ArgumentError
from models import tiny_basis


def moments_of(vectors):
    moments = Moments.empty(vectors.shape[0], vectors.shape[2])
    moments.add(vectors)
    return moments


def numpy_rank(vectors, variance):
    """The fewest principal axes of centred rows that explain ``variance``, by singular values."""
    singular = np.linalg.svd(vectors - vectors.mean(0), compute_uv=False)
    shares = singular**2 / (singular**2).sum()
    return int(np.searchsorted(shares.cumsum(), variance - 1e-12) + 1)


def basis_with(pre, post, queries):
    basis = tiny_basis(layout="mha")
    layer = LayerMoments(moments_of(pre), moments_of(post), moments_of(queries))
    return replace(basis, moments={1: layer})


@pytest.mark.parametrize("variance", [0.5, 0.9, 0.99, 1.0])
def test_ranks_equal_numpys(variance):
    scales = torch.logspace(0, -1.5, 16, dtype=torch.float64)
    pre, post, queries = (torch.randn(2, 400, 16, dtype=torch.float64) * scales + 3 for _ in range(3))
    table = rank_table(basis_with(pre, post, queries), variance)
    expected = [
        HeadRank(1, head, numpy_rank(pre[head].numpy(), variance), numpy_rank(post[head].numpy(), variance))
        for head in range(2)
    ]
    assert list(table.heads) == expected
    assert table.layers == {1: tuple(expected)}
    assert table.mean_pre == sum(head.pre for head in expected) / 2
    assert table.mean_post == sum(head.post for head in expected) / 2


def test_keys_on_a_plane_have_rank_two():
    plane = torch.randn(2, 16, dtype=torch.float64)
    keys = torch.randn(2, 300, 2, dtype=torch.float64) @ plane + 5
    full = torch.randn(2, 300, 16, dtype=torch.float64)
    (head, _) = rank_table(basis_with(keys, full, full), 0.999).heads
    assert head.pre == 2
    assert head.post > 10


def test_every_layer_and_head_of_a_model_is_there():
    basis = tiny_basis()
    table = rank_table(basis)
    assert [(head.layer, head.kv_head) for head in table.heads] == [(i, h) for i in range(3) for h in range(2)]
    assert all(1 <= rank <= basis.spec.head_dim for head in table.heads for rank in (head.pre, head.post))
    assert table.to_dict()["heads"][0] == table.heads[0]._asdict()


def test_spectra_ascend_to_one_and_agree_with_the_ranks():
    basis = tiny_basis(layout="mqa")
    table = rank_table(basis)
    for layer, curve in spectra(basis).items():
        for values in curve:
            assert values.shape == (16,)
            assert bool((values.diff() >= -1e-12).all())
            assert values[-1].item() == pytest.approx(1)
        (head,) = table.layers[layer]
        assert int((curve.pre < 0.9 - 1e-12).sum()) + 1 == head.pre
        assert int((curve.post < 0.9 - 1e-12).sum()) + 1 == head.post


def test_the_score_spectrum_is_what_truncated_scores_leave():
    """At R dims the balanced basis leaves 1 - score[R - 1] of the mean square of centred scores."""
    queries, keys = (torch.randn(1, n, 16, dtype=torch.float64) @ torch.randn(16, 16).double() for n in (400, 400))
    basis = basis_with(keys, keys, queries)
    score = spectra(basis)[1].score
    layer = basis.with_candidate("pca-post").with_candidate("balanced").layers[1]
    exact = queries[0] @ (keys[0] - keys[0].mean(0)).T
    for rank in (1, 5, 12):
        query, key = queries[0] @ layer.query_map[0].double(), (keys[0] - keys[0].mean(0)) @ layer.key_map[0].double()
        left = (exact - query[:, :rank] @ key[:, :rank].T).square().mean() / exact.square().mean()
        assert left.item() == pytest.approx(1 - score[rank - 1].item(), abs=1e-4)


def test_without_moments_it_says_what_is_missing():
    bare = replace(tiny_basis(), moments=None)
    for function in (rank_table, spectra):
        with pytest.raises(ArgumentError, match=r"moments\.safetensors"):
            function(bare)


@pytest.mark.parametrize("variance", [0.0, -0.1, 1.1, float("nan")])
def test_a_variance_outside_its_range_is_refused(variance):
    with pytest.raises(ArgumentError, match="variance"):
        rank_table(tiny_basis(), variance)
