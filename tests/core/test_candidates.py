"""PCA and balanced bases: what they promise about moments, and that no other basis of the same rank scores better."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import Shape, draw, moments_of, noise, random_basis, random_moments
from loki_attention.core.candidates import (
    CANDIDATES,
    TENSOR_FIELDS,
    LayerBasis,
    build,
    explained_variance,
    principal_axes,
    rank_at,
)
from loki_attention.core.moments import LayerMoments
from loki_attention.errors import ArgumentError

SHAPES = [Shape(2, 2, 64), Shape(1, 4, 80), Shape(2, 1, 128), Shape(1, 7, 16)]


def close(ours: Tensor, expected: Tensor, relative: float = 2e-5) -> None:
    """Within float32 rounding of the largest entry."""
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=relative * float(expected.abs().max()))


def identity(basis: LayerBasis) -> Tensor:
    return torch.eye(basis.head_dim, dtype=torch.float64).expand(basis.kv_heads, -1, -1)


def missed_energy(basis: LayerBasis, moments: LayerMoments, rank: int) -> Tensor:
    """E[(q . (k - mean) - score)^2] of the first ``rank`` dims, summed over the group's heads, per KV head."""
    product = basis.query_map.double()[:, :, :rank] @ basis.key_map.double()[:, :, :rank].mT
    missing = identity(basis) - product
    return torch.einsum(
        "kab,kbc,kcd,kad->k", moments.group_query_moment, missing, moments.post_keys.covariance, missing
    )


def singular_values(moments: LayerMoments) -> Tensor:
    """Of C_q^(1/2) C_k^(1/2), by another way: any root will do."""
    roots = (torch.linalg.cholesky(m) for m in (moments.group_query_moment, moments.post_keys.covariance))
    query_root, key_root = roots
    return torch.linalg.svdvals(query_root.mT @ key_root)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("candidate", ["pca-pre", "pca-post"])
def test_pca_maps_are_orthogonal_and_alike(shape: Shape, candidate: str) -> None:
    basis = random_basis(shape, candidate)
    assert torch.equal(basis.query_map, basis.key_map)
    close(basis.key_map.mT @ basis.key_map, identity(basis))


@pytest.mark.parametrize("candidate", ["pca-pre", "pca-post"])
def test_pca_directions_are_the_eigenvectors_of_its_own_covariance(candidate: str) -> None:
    shape = SHAPES[0]
    moments, basis = random_moments(shape), random_basis(shape, candidate)
    keys = moments.pre_keys if candidate == "pca-pre" else moments.post_keys
    axes = basis.key_map.double()
    seen = axes.mT @ keys.covariance @ axes
    expected = np.linalg.eigvalsh(keys.covariance.numpy())[:, ::-1]
    close(seen, torch.diag_embed(torch.from_numpy(expected.copy())))


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_mean_and_moments_come_from_the_keys_after_rope(candidate: str) -> None:
    shape = SHAPES[0]
    moments, basis = random_moments(shape), random_basis(shape, candidate)
    keys, queries = basis.key_map.double(), basis.query_map.double()
    close(basis.mean, moments.post_keys.mean, 1e-6)
    close(basis.key_moment, keys.mT @ moments.post_keys.covariance @ keys)
    close(basis.query_moment, queries.mT @ moments.group_query_moment @ queries)
    assert basis.candidates == (candidate, candidate)
    assert all(getattr(basis, name).dtype == torch.float32 for name in TENSOR_FIELDS)
    assert (basis.kv_heads, basis.head_dim) == (2, 64)


@pytest.mark.parametrize("shape", SHAPES)
def test_balanced_product_is_the_identity_at_full_rank(shape: Shape) -> None:
    basis = random_basis(shape)
    close(basis.query_map @ basis.key_map.mT, identity(basis))


@pytest.mark.parametrize("shape", SHAPES)
def test_balanced_moments_are_both_the_singular_values(shape: Shape) -> None:
    moments, basis = random_moments(shape), random_basis(shape)
    expected = torch.diag_embed(singular_values(moments))
    close(basis.key_moment, expected)
    close(basis.query_moment, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_balanced_truncation_is_the_best_score_of_its_rank(shape: Shape) -> None:
    """Eckart-Young: what rank R misses is the sum of the other squared singular values, and PCA misses no less."""
    moments = random_moments(shape)
    balanced, pca = random_basis(shape), [random_basis(shape, name) for name in ("pca-pre", "pca-post")]
    singular = singular_values(moments)
    for rank in (1, shape.dim // 4, shape.dim // 2, shape.dim - 1):
        missed = missed_energy(balanced, moments, rank)
        torch.testing.assert_close(missed, singular[:, rank:].square().sum(-1), rtol=1e-3, atol=1e-6)
        for other in pca:
            assert (missed <= missed_energy(other, moments, rank) * (1 + 1e-4)).all()


def test_balanced_is_clearly_better_where_queries_and_keys_differ() -> None:
    moments = random_moments(SHAPES[0])
    ours, theirs = (missed_energy(random_basis(SHAPES[0], name), moments, 16) for name in ("balanced", "pca-post"))
    assert (ours < 0.8 * theirs).all()


def degenerate_moments(shape: Shape) -> LayerMoments:
    """Keys and queries that live in a few dims only."""
    sample = draw(shape, 200)
    flat = noise(shape.kv_heads, 3, shape.dim, seed=4)
    sample = sample._replace(keys=sample.keys[:, :, :3] @ flat, queries=sample.queries[:, :, 3:5] @ flat[:, :2])
    return moments_of(sample)


def test_balanced_on_degenerate_moments_keeps_the_identity() -> None:
    basis = build("balanced", degenerate_moments(SHAPES[3]))
    close(basis.query_map @ basis.key_map.mT, identity(basis), 1e-3)
    assert all(getattr(basis, name).isfinite().all() for name in TENSOR_FIELDS)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_constant_keys_give_a_finite_basis(candidate: str) -> None:
    shape = Shape(1, 2, 16)
    sample = draw(shape, 10)
    constant = torch.ones_like(sample.keys)
    basis = build(candidate, moments_of(sample._replace(pre_keys=constant, keys=constant)))
    close(basis.query_map @ basis.key_map.mT, identity(basis), 1e-3)
    assert all(getattr(basis, name).isfinite().all() for name in TENSOR_FIELDS)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_same_moments_give_the_same_bytes(candidate: str) -> None:
    first, second = (build(candidate, moments_of(draw(Shape(2, 2, 16), 100))) for _ in range(2))
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in TENSOR_FIELDS)


def test_signs_are_fixed_by_the_largest_entry() -> None:
    axes = principal_axes(random_moments(SHAPES[0]).post_keys.covariance)
    largest = axes.gather(-2, axes.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()


def test_pick_takes_each_head_from_the_candidate_it_names() -> None:
    shape = Shape(3, 2, 16)
    by = {name: random_basis(shape, name) for name in CANDIDATES}
    names = ("balanced", "pca-pre", "pca-post")
    picked = by["balanced"].pick(by, names)
    assert picked.candidates == names
    for head, name in enumerate(names):
        for field in TENSOR_FIELDS:
            assert torch.equal(getattr(picked, field)[head], getattr(by[name], field)[head])


def test_unknown_candidate_names_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"known: pca-pre, pca-post, balanced.*did you mean 'balanced'"):
        build("ballanced", random_moments(SHAPES[3]))


def test_too_few_keys() -> None:
    with pytest.raises(ArgumentError, match="at least 2 keys, got 1"):
        build("pca-pre", moments_of(draw(Shape(1, 1, 16), 1)))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(0.01, 0.99))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_rank_at_is_the_smallest_that_reaches(eigenvalues: list[float], variance: float) -> None:
    eigenvalues[0] += 1.0
    axes = torch.linalg.qr(noise(len(eigenvalues), len(eigenvalues), seed=len(eigenvalues))).Q
    symmetric = axes @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ axes.mT
    reached = np.cumsum(np.sort(np.array(eigenvalues))[::-1]) / np.sum(eigenvalues)
    rank = int(rank_at(variance, symmetric))
    assert reached[rank - 1] >= variance - 1e-9
    assert rank == 1 or reached[rank - 2] < variance + 1e-9


@pytest.mark.parametrize(
    ("variance", "rank"), [(0.5, 1), (0.8, 1), (0.81, 2), (0.9, 2), (0.95, 2), (0.96, 3), (1.0, 3)]
)
def test_rank_at_worked(variance: float, rank: int) -> None:
    diagonal = torch.diag(torch.tensor([1.5, 8.0, 0.5, 0.0], dtype=torch.float64))
    assert rank_at(variance, torch.stack([diagonal, 10 * diagonal])).tolist() == [rank, rank]


def test_variance_of_nothing() -> None:
    nothing = torch.zeros(1, 4, 4, dtype=torch.float64)
    assert rank_at(0.9, nothing).tolist() == [4]
    assert explained_variance(nothing).tolist() == [[0.0] * 4]


def test_explained_variance_sums_to_one_in_descending_order() -> None:
    shares = explained_variance(random_moments(SHAPES[0]).post_keys.covariance)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, dtype=torch.float64))
    assert (shares.diff(dim=-1) <= 0).all()
    assert (shares >= 0).all()
