"""Decode steps for the native kernels, on every instruction set of this machine."""

import pytest

from helpers import Layer
from kernel_cases import (
    CASES,
    DTYPES,
    FRACTION,
    NOTHING_FORCED,
    SMALL,
    Case,
    assert_alike,
    assert_as_exact_as_torch,
    attention,
    cases,
    dtypes,
    poisoned,
    random_sinks,
    reference,
    slots_read,
    sums_of,
    untiled,
    visible_of,
)
from loki_attention.kernels import native
from loki_attention.kernels.native import NativeEncoder, NativeStep

__all__ = [
    "CASES",
    "DTYPES",
    "FRACTION",
    "ISAS",
    "NOTHING_FORCED",
    "SMALL",
    "Case",
    "assert_alike",
    "assert_as_exact_as_torch",
    "attention",
    "cases",
    "dtypes",
    "isas",
    "native_step",
    "poisoned",
    "random_sinks",
    "reference",
    "slots_read",
    "sums_of",
    "untiled",
    "visible_of",
]

if not native.available():
    pytest.skip("the native extension is not built", allow_module_level=True)

ISAS = native.usable_isas()
isas = pytest.mark.parametrize("isa", ISAS)


def native_step(case: Case, layer: Layer, isa: str, **options: object) -> NativeStep:
    """The fused step of a layer, from freshly encoded keys."""
    encoder = case.encoder()
    ours, slots = NativeEncoder(encoder), layer.keys.shape[2]
    packed = ours.buffer(len(layer.keys), slots)
    native.encode_keys(ours, layer.keys, packed, 0, slots, isa=isa)
    budget = case.budget
    return native.decode_step(
        ours, layer.query, layer.keys, layer.values, packed, visible_of(layer, case.holes), case.k(layer),
        case.shape.scale, sinks=budget.sinks, recent=budget.recent, tail=case.tail, sums=sums_of(layer, encoder),
        wants_indices=True, wants_mass=True, isa=isa, **options,
    )  # fmt: skip
