"""The grammar of planes, their defaults, the quantiser and the packed bytes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from helpers import PLANES, noise
from loki_attention.core.planes import DISTORTION, STEP_IN_DEVIATIONS, Planes
from loki_attention.errors import ArgumentError


@pytest.mark.parametrize(
    ("text", "rank", "size"),
    [
        ("8@4", 8, 4),
        ("64@4", 64, 32),
        ("16@4+32@2", 48, 16),
        ("8@4+16@2", 24, 8),
        ("32@4", 32, 16),
        ("16@8", 16, 16),
        ("4@8", 4, 4),
        ("16@2", 16, 4),
        ("16@16", 16, 32),
        ("2@16", 2, 4),
        ("16@32", 16, 64),
        ("1@32", 1, 4),
        ("64@4+128@2", 192, 64),
    ],
)
def test_grammar(text: str, rank: int, size: int) -> None:
    planes = Planes.parse(text)
    assert str(planes) == text
    assert (planes.rank, len(planes.bits), planes.bytes_per_token) == (rank, rank, size)
    assert sum(planes.bits) == 8 * size
    assert planes.is_float == ("@16" in text or "@32" in text)


def test_bits_of_each_dim() -> None:
    assert Planes.parse("8@4+16@2").bits == (4,) * 8 + (2,) * 16


@pytest.mark.parametrize(
    "text",
    [
        *("", "lots", "0@4", "16@5", "16@0", "-8@4", "+8@4", "08@4", "16@4+", "+32@2", "16.0@4", "16@4\n"),
        *("16@2+32@4", "16@8+16@2", "16@4+0@2", "16@4+32@2+32@2", "16@4 + 32@2", "16@4+32@4", "16@16+16@2"),
    ],
)
def test_outside_the_grammar(text: str) -> None:
    with pytest.raises(ArgumentError, match="outside the grammar"):
        Planes.parse(text)


@pytest.mark.parametrize("text", [16, None, ("16@4",)])
def test_only_text_is_planes(text: object) -> None:
    """Refused by the planes themselves, or in a run with beartype by that, which comes first."""
    with pytest.raises((ArgumentError, TypeCheckError)):
        Planes.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "multiple"), [("4@4", 8), ("12@4", 8), ("8@2", 16), ("2@8", 4), ("1@16", 2), ("16@4+8@2", 16)]
)
def test_whole_words_only(text: str, multiple: int) -> None:
    with pytest.raises(ArgumentError, match=f"multiple of {multiple}"):
        Planes.parse(text)


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [
        (8, "8@4"),
        (16, "8@4"),
        (32, "8@4+16@2"),
        (40, "16@4+16@2"),
        (64, "16@4+32@2"),
        (80, "24@4+48@2"),
        (96, "24@4+48@2"),
        (128, "32@4+64@2"),
        (256, "64@4+128@2"),
    ],
)
def test_defaults(head_dim: int, expected: str) -> None:
    planes = Planes.default(head_dim)
    assert str(planes) == expected
    assert Planes.parse(str(planes)) == planes
    planes.check_fits(head_dim)


@pytest.mark.parametrize("head_dim", range(8, 300, 4))
def test_default_always_fits_and_reparses(head_dim: int) -> None:
    planes = Planes.default(head_dim)
    assert planes.rank <= head_dim
    assert Planes.parse(str(planes)) == planes


@pytest.mark.parametrize("head_dim", [0, 4, 7])
def test_head_too_small_for_a_default(head_dim: int) -> None:
    with pytest.raises(ArgumentError, match="at least 8"):
        Planes.default(head_dim)


def test_more_dims_than_the_head() -> None:
    Planes.parse("64@4").check_fits(64)
    with pytest.raises(ArgumentError, match="'64@4' have 64 dims but the head dim is 48"):
        Planes.parse("64@4").check_fits(48)


def quantize(text: str, values: list[float]) -> list[float]:
    planes = Planes.parse(text)
    padded = torch.tensor(values + [0.0] * (planes.rank - len(values)), dtype=torch.float64)
    return planes.quantize(padded[None], torch.ones(1, planes.rank, dtype=torch.float64))[0, : len(values)].tolist()


@pytest.mark.parametrize(
    ("text", "values", "levels"),
    [
        ("8@4", [0.0, 0.49, 0.51, -0.51, 6.6, 7.4, 8.0, -1e9], [0, 0, 1, -1, 7, 7, 7, -7]),
        ("8@4", [0.5, 1.5, 2.5, -0.5, -1.5, 6.5, 7.5, -7.5], [0, 2, 2, 0, -2, 6, 7, -7]),
        ("8@8", [126.4, 126.6, 127.6, -1e9, 0.5, 1.5, -0.5, -2.5], [126, 127, 127, -127, 0, 2, 0, -2]),
        ("16@2", [-9.0, -1.01, -0.99, -0.01, 0.01, 0.99, 1.01, 9.0], [-1.5, -1.5, -0.5, -0.5, 0.5, 0.5, 1.5, 1.5]),
        # u = x + 1.5 in 0..3; halves of u round to even.
        ("16@2", [-2.0, -1.0, 0.0, 1.0, 2.0], [-1.5, -1.5, 0.5, 0.5, 1.5]),
    ],
)
def test_levels_halves_and_clamping(text: str, values: list[float], levels: list[float]) -> None:
    assert quantize(text, values) == levels


def test_steps_divide_and_planes_differ() -> None:
    planes = Planes.parse("8@4+16@2")
    steps = torch.cat([torch.full((8,), 0.5), torch.full((16,), 2.0)])[None]
    levels = planes.quantize(torch.full((1, 24), 1.1), steps)[0]
    assert levels.tolist() == [2.0] * 8 + [0.5] * 16


@pytest.mark.parametrize(("text", "dtype"), [("16@16", torch.bfloat16), ("16@32", torch.float32)])
def test_float_planes_round_to_their_type_and_ignore_steps(text: str, dtype: torch.dtype) -> None:
    encoded = noise(5, 16, seed=0)
    kept = Planes.parse(text).quantize(encoded, torch.full((1, 16), 7.0, dtype=torch.float64))
    assert kept.dtype == torch.float64
    assert torch.equal(kept, encoded.to(dtype).double())


def random_levels(planes: Planes, *shape: int, seed: int) -> Tensor:
    steps = torch.ones(1, planes.rank, dtype=torch.float64)
    spread = torch.tensor([{2: 1.5, 4: 4.0, 8: 60.0}.get(bits, 1.0) for bits in planes.bits], dtype=torch.float64)
    return planes.quantize(spread * noise(*shape, planes.rank, seed=seed), steps)


@pytest.mark.parametrize("text", [*PLANES, "8@4", "1@32", "32@4+64@2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pack_and_unpack_round_trip(text: str, dtype: torch.dtype) -> None:
    planes = Planes.parse(text)
    levels = random_levels(planes, 2, 3, 37, seed=1).to(dtype)
    packed = planes.pack(levels)
    assert packed.shape == (2, 3, 37, planes.bytes_per_token)
    assert packed.dtype == torch.uint8
    back = planes.unpack(packed, dtype)
    assert back.dtype == dtype
    assert torch.equal(back, levels)


@pytest.mark.parametrize("text", PLANES)
def test_unpack_reads_views_of_a_larger_buffer(text: str) -> None:
    planes = Planes.parse(text)
    levels = random_levels(planes, 2, 3, 37, seed=1).float()
    buffer = torch.full((2, 3, 50, planes.bytes_per_token), 255, dtype=torch.uint8)
    buffer[:, :, 5:42] = planes.pack(levels)
    assert torch.equal(planes.unpack(buffer[:, :, 5:42]), levels)


def packed_by_hand(planes: Planes, levels: list[float]) -> bytes:
    """A token's low-rank key as one little-endian bit string: dim after dim, the lower first."""
    bits, place = 0, 0
    for level, width in zip(levels, planes.bits, strict=True):
        code = int(level + 1.5) if width == 2 else int(level) % (1 << width)
        bits |= code << place
        place += width
    return bits.to_bytes(planes.bytes_per_token, "little")


@pytest.mark.parametrize("text", ["64@4", "16@4+32@2", "16@8", "16@2", "8@4+16@2"])
def test_bytes_are_a_little_endian_bit_string(text: str) -> None:
    planes = Planes.parse(text)
    levels = random_levels(planes, 5, seed=2)
    packed = planes.pack(levels)
    for row, level in zip(packed, levels, strict=True):
        assert bytes(row.tolist()) == packed_by_hand(planes, level.tolist())


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_mixed_planes_round_trip(four: int, two: int, seed: int) -> None:
    planes = Planes.parse(f"{8 * four}@4+{16 * two}@2")
    levels = random_levels(planes, 3, seed=seed)
    assert torch.equal(planes.unpack(planes.pack(levels), torch.float64), levels)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_distortion_is_that_of_a_unit_gaussian(bits: int) -> None:
    """The mean squared error over the quantiles of a normal distribution, with the step that the encoder uses."""
    planes = Planes.parse(f"16@{bits}")
    step = STEP_IN_DEVIATIONS[bits]
    grid = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    weight = np.exp(-(grid.numpy() ** 2) / 2) / math.sqrt(2 * math.pi) * 1e-4
    levels = planes.quantize(grid[:, None].expand(-1, 16), torch.full((1, 16), step, dtype=torch.float64))[:, 0]
    error = float((weight * (grid - step * levels).square().numpy()).sum())
    assert error == pytest.approx(DISTORTION[bits], rel=0.06)
