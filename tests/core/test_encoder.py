"""The encoder: codes against numpy, and the closed forms (deviation, offset, kappa) against samples."""

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import CPU, PLANES, Shape, draw, moments_of, noise, random_basis, random_encoder, random_layer
from loki_attention.core.candidates import CANDIDATES, LayerBasis, build
from loki_attention.core.encoder import EncodedQuery, Encoder, encoder
from loki_attention.core.planes import DISTORTION, STEP_IN_DEVIATIONS, Planes
from loki_attention.errors import ArgumentError

INTEGER_PLANES = [text for text in PLANES if "@16" not in text and "@32" not in text]
SHAPE = Shape(2, 4, 64)
NEAR = 1e-3


def encoder_of(basis: LayerBasis, planes: str, group: int) -> Encoder:
    """The encoder in float64, for exact comparisons."""
    return encoder(basis, Planes.parse(planes), group).to(CPU, torch.float64)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def numpy_levels(ours: Encoder, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels of keys (B, Hkv, S, D) in float64, and how far each unrounded value is from a rounding boundary."""
    bits = np.array(ours.planes.bits)
    projected = (keys - wide(ours.mean)[:, None]) @ wide(ours.key_map)
    scaled = projected / wide(ours.steps)[:, None] + np.where(bits == 2, 1.5, 0.0)
    lowest, highest = (
        np.select([bits == 2, bits == 4], ends, sign * 127) for ends, sign in (((0, -7), -1), ((3, 7), 1))
    )
    codes = np.clip(np.rint(scaled), lowest, highest)
    return codes - np.where(bits == 2, 1.5, 0.0), np.abs(scaled - np.floor(scaled) - 0.5)


@pytest.mark.parametrize("planes", INTEGER_PLANES)
@pytest.mark.parametrize("candidate", ["pca-pre", "balanced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_key_codes_equal_numpy(planes: str, candidate: str, dtype: torch.dtype) -> None:
    ours = random_encoder(SHAPE, planes, candidate, dtype)
    assert ours.mean.dtype == torch.float32
    keys = random_layer(SHAPE, (200, 200), dtype=dtype).keys
    levels = wide(ours.planes.unpack(ours.encode_keys(keys)))
    expected, distance = numpy_levels(ours, wide(keys))
    differs = levels != expected
    assert (distance[differs] < NEAR).all()
    assert differs.mean() < NEAR
    assert len(np.unique(levels)) >= {"64@4": 15, "32@4": 15, "16@2": 4, "16@4+32@2": 19, "16@8": 150}[planes]


@pytest.mark.parametrize("planes", INTEGER_PLANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_query_codes_equal_numpy(planes: str, dtype: torch.dtype) -> None:
    ours = random_encoder(SHAPE, planes, "balanced", dtype)
    query = random_layer(SHAPE, (8, 8, 8), dtype=dtype).query
    encoded = ours.encode_query(query, 0.125)
    grouped = wide(query).reshape(3, 2, 4, 1, 64)
    folded = (grouped @ wide(ours.query_map)[:, None] * wide(ours.steps)[:, None, None]).reshape(3, 8, 1, -1)
    step = np.abs(folded).max(-1) / 127
    unrounded = folded / step[..., None]
    differs = wide(encoded.codes) != np.rint(unrounded)
    assert (np.abs(unrounded - np.floor(unrounded) - 0.5)[differs] < NEAR).all()
    assert encoded.codes.dtype == torch.int8
    assert (encoded.codes.abs().amax(-1) == 127).all()
    np.testing.assert_allclose(encoded.step, 0.125 * step, rtol=1e-5)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_computed_in_float32(planes: str, dtype: torch.dtype) -> None:
    ours, layer = random_encoder(SHAPE, planes, dtype=dtype), random_layer(SHAPE, (50, 50), dtype=dtype)
    assert torch.equal(ours.encode_keys(layer.keys), ours.encode_keys(layer.keys.float()))
    for narrow, full in zip(
        ours.encode_query(layer.query, 0.1), ours.encode_query(layer.query.float(), 0.1), strict=True
    ):
        assert torch.equal(narrow, full)
        assert narrow.dtype in (torch.int8, torch.float32)


def test_float64_models_are_computed_in_float64() -> None:
    ours = random_encoder(SHAPE, "16@32")
    keys = random_layer(SHAPE, (20,)).keys
    expected = (wide(keys) - wide(ours.mean)[:, None]) @ wide(ours.key_map)
    assert ours.project_keys(keys).dtype == torch.float64
    np.testing.assert_allclose(ours.project_keys(keys), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("planes", INTEGER_PLANES)
def test_steps_are_fixed_fractions_of_the_deviations(planes: str) -> None:
    ours = random_encoder(SHAPE, planes)
    width = torch.tensor([STEP_IN_DEVIATIONS[bits] for bits in ours.planes.bits], dtype=torch.float64)
    torch.testing.assert_close(ours.steps, ours.deviations * width, rtol=1e-6, atol=0)


def test_balanced_deviations_are_roots_of_the_singular_values() -> None:
    basis = random_basis(SHAPE)
    ours = encoder_of(basis, "32@4", SHAPE.group)
    singular = basis.key_moment.diagonal(dim1=1, dim2=2)[:, :32].double()
    torch.testing.assert_close(ours.deviations.square(), singular, rtol=1e-5, atol=0)


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_deviations_are_those_of_the_encoded_keys(candidate: str) -> None:
    sample = draw(SHAPE, 300, seed=1)
    ours = encoder_of(build(candidate, moments_of(sample)), "16@4+32@2", SHAPE.group)
    projected = ours.project_keys(sample.keys[None])[0]
    torch.testing.assert_close(projected.std(1, correction=0), ours.deviations, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("candidate", ["pca-post", "balanced"])
def test_only_pca_pre_is_rotated(candidate: str) -> None:
    basis = random_basis(SHAPE, candidate)
    ours = encoder_of(basis, "32@4", SHAPE.group)
    assert torch.equal(ours.key_map, basis.key_map.double()[..., :32])
    assert torch.equal(ours.query_map, basis.query_map.double()[..., :32])


@pytest.mark.parametrize("planes", ["16@32", "32@32", "64@32"])
def test_rotation_of_pca_pre_leaves_scores_and_makes_dims_uncorrelated(planes: str) -> None:
    basis = random_basis(SHAPE, "pca-pre")
    ours = encoder_of(basis, planes, SHAPE.group)
    axes = basis.key_map.double()[..., : ours.planes.rank]
    torch.testing.assert_close(ours.query_map @ ours.key_map.mT, axes @ axes.mT, rtol=0, atol=1e-6)
    block = basis.key_map.double().mT @ ours.key_map
    moment = block.mT @ basis.key_moment.double() @ block
    expected = torch.diag_embed(ours.deviations.square())
    torch.testing.assert_close(moment, expected, rtol=0, atol=2e-6 * float(expected.max()))
    assert (ours.deviations.diff(dim=-1) <= 0).all()


def test_a_mix_of_candidates_rotates_its_pca_pre_heads_alone() -> None:
    by = {name: random_basis(SHAPE, name) for name in CANDIDATES}
    mixed = encoder_of(by["balanced"].pick(by, ("pca-pre", "balanced")), "32@4", SHAPE.group)
    for head, name in enumerate(("pca-pre", "balanced")):
        whole = encoder_of(by[name], "32@4", SHAPE.group)
        for field in ("key_map", "query_map", "deviations", "steps"):
            torch.testing.assert_close(getattr(mixed, field)[head], getattr(whole, field)[head], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(mixed.kappa[head], whole.kappa[head], rtol=1e-6, atol=0)


def scores_of(encoded: EncodedQuery, levels: Tensor, kv_heads: int) -> Tensor:
    """Approximate scores (Hkv, rows, tokens) of one sequence."""
    codes = (encoded.step[..., None] * encoded.codes.double())[0].unflatten(0, (kv_heads, -1)).flatten(1, 2)
    return codes @ levels.mT


def sample_scores(ours: Encoder, keys: Tensor, queries: Tensor, group: int, scale: float) -> tuple[Tensor, Tensor]:
    """Approximate and true scores, mean subtracted, of every query (Hkv, G n, D) with every key (Hkv, m, D)."""
    rows = queries.unflatten(1, (group, -1)).flatten(0, 1)[None]
    encoded = ours.encode_query(rows, scale)
    levels = ours.planes.unpack(ours.encode_keys(keys[None]), torch.float64)[0]
    exact = scale * queries @ (keys - ours.mean[:, None]).mT
    return scores_of(encoded, levels, len(keys)), exact


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("planes", ["16@32", "48@32"])
def test_kappa_is_half_the_variance_of_what_is_missed(candidate: str, planes: str) -> None:
    """Exactly so on the sample that the moments come from, for dims that are kept as they are or dropped."""
    sample, scale = draw(SHAPE, 300, seed=1), 0.125
    ours = encoder_of(build(candidate, moments_of(sample)), planes, SHAPE.group)
    approximate, exact = sample_scores(ours, sample.keys, sample.queries, SHAPE.group, scale)
    half = (exact - approximate).square().mean((1, 2)) / 2
    torch.testing.assert_close(scale**2 * ours.kappa, half, rtol=1e-3, atol=0)


@pytest.mark.parametrize("planes", INTEGER_PLANES)
def test_kappa_with_quantised_dims(planes: str) -> None:
    """Close to it where keys are Gaussian (no RoPE here). The rounding of the query is not in kappa."""
    sample = draw(SHAPE, 1000, seed=1)
    keys, queries = sample.pre_keys, sample.queries[:, :500]
    ours = encoder_of(build("balanced", moments_of(sample._replace(keys=keys))), planes, SHAPE.group)
    levels = ours.planes.unpack(ours.encode_keys(keys[None]), torch.float64)[0]
    missed = queries @ (keys - ours.mean[:, None]).mT - (queries @ ours.query_map * ours.steps[:, None]) @ levels.mT
    torch.testing.assert_close(ours.kappa, missed.square().mean((1, 2)) / 2, rtol=0.15, atol=0)


def test_kappa_formula() -> None:
    basis, planes = random_basis(SHAPE), Planes.parse("16@4+32@2")
    variances = basis.key_moment.double().diagonal(dim1=1, dim2=2)
    energy = basis.query_moment.double().diagonal(dim1=1, dim2=2)
    distortion = torch.tensor([0.013] * 16 + [0.118] * 32 + [1.0] * 16, dtype=torch.float64)
    expected = (energy * variances * distortion).sum(-1) / (2 * SHAPE.group)
    torch.testing.assert_close(encoder_of(basis, str(planes), SHAPE.group).kappa, expected, rtol=1e-6, atol=0)
    assert DISTORTION == {0: 1.0, 2: 0.118, 4: 0.013, 8: 9e-5, 16: 0.0, 32: 0.0}


@pytest.mark.parametrize("candidate", CANDIDATES)
def test_deviation_is_that_of_the_scores(candidate: str) -> None:
    sample = draw(SHAPE, 300, seed=1)
    ours = encoder_of(build(candidate, moments_of(sample)), "48@32", SHAPE.group)
    query = random_layer(SHAPE, (4,)).query
    encoded = ours.encode_query(query, SHAPE.scale)
    scores = scores_of(encoded, ours.project_keys(sample.keys[None])[0], SHAPE.kv_heads)
    torch.testing.assert_close(encoded.deviation.flatten(), scores.std(-1, correction=0).flatten(), rtol=1e-4, atol=0)


def test_offset_is_the_mean_and_kappa() -> None:
    ours, query = random_encoder(SHAPE, "16@4+32@2"), random_layer(SHAPE, (4, 4)).query
    grouped = wide(query).reshape(2, 2, 4, 64)
    constant = np.einsum("bkgd,kd->bkg", grouped, wide(ours.mean)).reshape(2, 8, 1)
    expected = 0.3 * constant + 0.09 * np.repeat(wide(ours.kappa), 4)[:, None]
    np.testing.assert_allclose(ours.encode_query(query, 0.3).offset, expected, rtol=1e-10)


@pytest.mark.parametrize(("planes", "rank"), [("64@4", 16), ("16@4+32@2", 16), ("8@4", 8), ("16@2", 16), ("4@8", 4)])
def test_leading_dims(planes: str, rank: int) -> None:
    ours, query = random_encoder(SHAPE, planes), random_layer(SHAPE, (4, 4)).query
    leading = ours.encode_query(query, 0.3).leading
    assert (ours.tail_rank, leading.shape[-1]) == (rank, rank)
    expected = wide(query).reshape(2, 2, 4, 64) @ wide(ours.query_map)[..., :rank]
    np.testing.assert_allclose(leading.reshape(2, 2, 4, rank), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("planes", ["64@4", "48@32"])
def test_scores_come_near_the_true_ones(planes: str) -> None:
    sample = draw(SHAPE, 300, seed=1)
    ours = encoder_of(build("balanced", moments_of(sample)), planes, SHAPE.group)
    approximate, exact = sample_scores(ours, sample.keys, sample.queries[:, :80], SHAPE.group, SHAPE.scale)
    assert float((approximate - exact).square().mean() / exact.square().mean()) < 0.03


@pytest.mark.parametrize("planes", ["16@4+32@2", "16@32"])
def test_a_query_of_zeros(planes: str) -> None:
    encoded = random_encoder(SHAPE, planes).encode_query(torch.zeros(1, 8, 1, 64, dtype=torch.float64), 0.125)
    assert encoded.codes.count_nonzero() == encoded.deviation.count_nonzero() == 0
    assert encoded.step.isfinite().all()
    assert (encoded.offset > 0).all()


def test_several_rows_equal_each_row_alone() -> None:
    ours = random_encoder(SHAPE, "16@4+32@2")
    rows = noise(2, 8, 5, 64, seed=0)
    together = ours.encode_query(rows, 0.125)
    for row in range(5):
        for all_rows, alone in zip(together, ours.encode_query(rows[:, :, row : row + 1], 0.125), strict=True):
            torch.testing.assert_close(all_rows[:, :, row : row + 1], alone)


def test_a_dim_that_never_varied_gives_finite_codes() -> None:
    sample = draw(Shape(1, 2, 16), 50)
    flat = torch.ones_like(sample.keys)
    ours = encoder_of(build("pca-post", moments_of(sample._replace(keys=flat))), "8@4", 2)
    levels = ours.planes.unpack(ours.encode_keys(sample.keys[None]))
    assert (ours.steps > 0).all()
    assert (levels.abs() <= 7).all()
    assert ours.encode_query(sample.queries[None, :, :1].repeat(1, 2, 1, 1), 0.25).step.isfinite().all()


def test_digest_names_what_the_codes_depend_on() -> None:
    basis = random_basis(SHAPE)
    plain = encoder(basis, Planes.parse("32@4"), SHAPE.group)
    assert plain.digest == encoder(basis, Planes.parse("32@4"), SHAPE.group).digest
    others = {
        encoder(basis, Planes.parse("16@4+32@2"), SHAPE.group).digest,
        encoder(random_basis(SHAPE, "pca-pre"), Planes.parse("32@4"), SHAPE.group).digest,
        plain.to(CPU, torch.float32).digest,
        plain.to(CPU, torch.float64).digest,
    }
    assert plain.digest not in others
    assert len(others) == 4
    assert plain.to(CPU, torch.float16).digest == plain.to(CPU, torch.bfloat16).digest


def test_more_dims_than_the_head() -> None:
    with pytest.raises(ArgumentError, match="head dim is 64"):
        encoder(random_basis(SHAPE), Planes.parse("72@4"), SHAPE.group)
