"""The tail's sums, by rows and held by a cache, against sums by hand."""

import numpy as np
import pytest
import torch

from backend_steps import CASES, Case, tail_values
from helpers import Layer, Shape, random_encoder, random_layer
from loki_attention.cache import LayerCache
from loki_attention.core.encoder import Encoder
from loki_attention.core.tail import TailSums
from loki_attention.kernels import torch_backend as backend
from loki_attention.kernels.rows import Rows


def sums_by_hand(layer: Layer, ours: Encoder, b: int, count: int) -> list[np.ndarray]:
    """Sums over the covered tokens of sequence ``b`` for a row that sees ``count`` tokens."""
    slots = layer.valid[b].nonzero().flatten()[: 64 * max(0, count // 64 - 1)]
    keys, values = layer.keys[b][:, slots].numpy(), layer.values[b][:, slots].numpy()
    encoded = ((keys - ours.mean[:, None].numpy()) @ ours.key_map.numpy())[..., : ours.tail_rank]
    return [values.sum(1), encoded.sum(1), encoded.swapaxes(1, 2) @ values]


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("slots", [33, 127, 128, 700])
def test_sums_of_blocks_by_hand_and_by_the_cache(slots: int, holes: bool) -> None:
    shape = Shape(2, 2, 64)
    layer, ours = random_layer(shape, (slots, slots // 2 + 1), holes=holes), random_encoder(shape, "16@4+32@2")
    rows, store = layer.rows, LayerCache()
    store.append(layer.keys, layer.values)
    held = store.absorb(ours, rows)
    sums = backend.sums_of_blocks(backend.leading_dims(layer.keys, ours), layer.values, rows)
    for b, count in enumerate(rows.tokens[:, 0].tolist()):
        assert float(sums.tokens[b, 0, 0]) == float(held.tokens[b, 0]) == 64 * max(0, count // 64 - 1)
        for name, expected in zip(("values", "encoded", "products"), sums_by_hand(layer, ours, b, count), strict=True):
            np.testing.assert_allclose(getattr(sums, name)[b, :, 0], expected, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(getattr(held, name)[b], expected, rtol=1e-9, atol=1e-9)


def test_every_row_has_the_sums_of_its_own_prefix() -> None:
    shape = Shape(2, 2, 64)
    layer, ours = random_layer(shape, (400, 390), holes=True), random_encoder(shape, "16@4+32@2")
    counts = torch.tensor([[1, 127, 128, 129, 300, 400], [1, 64, 191, 192, 193, 390]])
    encoded = backend.leading_dims(layer.keys, ours)
    sums = backend.sums_of_blocks(encoded, layer.values, Rows.of(layer.valid, counts))
    for b in range(2):
        for t, count in enumerate(counts[b].tolist()):
            for name, expected in zip(
                ("values", "encoded", "products"), sums_by_hand(layer, ours, b, count), strict=True
            ):
                np.testing.assert_allclose(getattr(sums, name)[b, :, t], expected, rtol=1e-9, atol=1e-9)


def test_sums_without_an_encoder_are_those_of_values() -> None:
    layer = random_layer(Shape(2, 2, 64), (200, 150), dtype=torch.float16)
    sums = backend.sums_of_blocks(backend.leading_dims(layer.keys, None), layer.values, layer.rows)
    assert (sums.encoded.shape[-1], sums.values.dtype) == (0, torch.float32)
    torch.testing.assert_close(sums.values[0, :, 0], layer.values[0, :, :128].float().sum(1))


def test_sums_do_not_read_what_they_do_not_cover() -> None:
    shape = Shape(2, 2, 64)
    layer, ours = random_layer(shape, (300, 200)), random_encoder(shape, "16@4+32@2")
    poisoned = layer._replace(keys=layer.keys.clone(), values=layer.values.clone())
    for b, count in enumerate((300, 200)):
        covered = torch.zeros(300, dtype=torch.bool)
        covered[layer.valid[b].nonzero().flatten()[: 64 * (count // 64 - 1)]] = True
        poisoned.keys[b, :, ~covered] = torch.nan
        poisoned.values[b, :, ~covered] = torch.nan
    plain, other = (
        backend.sums_of_blocks(backend.leading_dims(tensors.keys, ours), tensors.values, tensors.rows)
        for tensors in (layer, poisoned)
    )
    for ours_part, other_part in zip(plain, other, strict=True):
        torch.testing.assert_close(ours_part, other_part)


@pytest.mark.parametrize("case", [CASES[8], CASES[7]], ids=str)
def test_sums_held_by_the_cache_give_the_same_values(case: Case) -> None:
    layer, ours = case.layer(), case.encoder()
    store = LayerCache()
    store.append(layer.keys, layer.values)
    held = store.absorb(ours, layer.rows)
    held = TailSums(held.tokens[:, None], *(tensor.unsqueeze(2) for tensor in held[1:]))
    encoded = ours.encode_query(layer.query, case.shape.scale)
    fresh = backend.sums_of_blocks(backend.leading_dims(layer.keys, ours), layer.values, layer.rows)
    values = [tail_values(case, sums, encoded, case.shape.scale) for sums in (held, fresh)]
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert values[0][0].isfinite().all()
