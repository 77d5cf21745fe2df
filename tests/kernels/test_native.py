"""Encoding, selection and the fused step of the native kernels against core's reference, on every instruction set."""

import pytest
import torch
from torch import Tensor

from helpers import Layer, Shape, chosen_slots, random_encoder
from loki_attention.core import selection
from loki_attention.core.attention import Softmax
from loki_attention.core.encoder import Encoder
from loki_attention.core.tail import TailSums
from loki_attention.kernels import native, torch_backend
from loki_attention.kernels.native import NativeEncoder, Spans
from native_cases import (
    CASES,
    FRACTION,
    Case,
    assert_alike,
    cases,
    dtypes,
    isas,
    native_step,
    poisoned,
    random_sinks,
    reference,
    slots_read,
    sums_of,
    untiled,
    visible_of,
)


def unrounded_keys(encoder: Encoder, keys: Tensor) -> Tensor:
    """Encoded keys in steps before rounding, shifted so that every rounding boundary is at a half."""
    bits = torch.tensor(encoder.planes.bits)
    return encoder.project_keys(keys) / encoder.steps[:, None] + torch.where(bits == 2, 1.5, 0.0)


@isas
@cases
@dtypes
def test_key_codes_are_the_references(case: Case, isa: str, dtype: torch.dtype) -> None:
    """But for values within 1e-3 of a rounding boundary; written in pieces that end inside tiles."""
    layer, exact = case.layer(dtype), case.encoder(torch.float64)
    ours, slots = NativeEncoder(case.encoder()), layer.keys.shape[2]
    packed = ours.buffer(len(layer.keys), slots).fill_(0xEE)
    for start, stop in ((0, slots // 3), (slots // 3, slots // 3 + 1), (slots // 3 + 1, slots)):
        native.encode_keys(ours, layer.keys, packed, min(start, slots), min(stop, slots), isa=isa)
    expected = native.to_tiles(exact.encode_keys(layer.keys), exact.planes)
    unrounded = unrounded_keys(exact, layer.keys.double())
    unsure = ((unrounded - unrounded.floor() - 0.5).abs() < 1e-3).any(-1)
    differs = (untiled(packed, slots) != untiled(expected, slots)).any(-1)
    assert not (differs & ~unsure).any()


@isas
def test_appending_leaves_other_slots_alone(isa: str) -> None:
    case = CASES[5]
    layer, ours = case.layer(), NativeEncoder(case.encoder())
    packed = ours.buffer(2, 3000).fill_(0xEE)
    before = untiled(packed.clone(), 3000)
    native.encode_keys(ours, layer.keys, packed, 100, 101, isa=isa)
    after = untiled(packed, 3000)
    assert (after[:, :, 100] != before[:, :, 100]).any()
    others = torch.arange(3000) != 100
    assert torch.equal(after[:, :, others], before[:, :, others])


@isas
@cases
@dtypes
def test_query_codes_are_the_references(case: Case, isa: str, dtype: torch.dtype) -> None:
    layer, exact = case.layer(dtype), case.encoder(torch.float64)
    ours = native.encode_query(NativeEncoder(case.encoder()), layer.query, case.shape.scale, isa=isa)
    expected = exact.encode_query(layer.query.double(), case.shape.scale)
    group = case.shape.group
    encoded = layer.query.double() @ exact.query_map.repeat_interleave(group, 0)
    unrounded = (
        encoded * exact.steps.repeat_interleave(group, 0)[:, None] / (expected.step / case.shape.scale)[..., None]
    )
    unsure = (unrounded - unrounded.floor() - 0.5).abs() < 1e-3
    assert not ((ours.codes != expected.codes) & ~unsure).any()
    for name in ("step", "deviation", "offset", "leading"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-5)


class TorchSelection:
    """The torch backend's ranking, indices and log-mass, from the very codes that the kernels are given."""

    def __init__(self, case: Case, layer: Layer) -> None:
        self.encoder = encoder = case.encoder()
        self.query, self.packed = encoder.encode_query(layer.query, case.shape.scale), encoder.encode_keys(layer.keys)
        rows, forced = layer.rows, torch_backend.Forced(case.budget.sinks, case.budget.recent)
        scores = torch_backend.score_low_rank(self.query, self.packed, encoder.planes, case.shape.kv_heads)
        mass = None if scores.shape[2] == 1 else torch_backend.group_log_mass(scores, rows, forced)
        self.combined = torch_backend.combine_group(scores, mass)[:, :, 0]
        self.ranking = torch_backend.code(self.combined[:, :, None], self.query.deviation)
        k = case.k(layer)[:, None]
        self.indices = torch_backend.top_k(self.ranking, rows, k, forced)
        sample = rows.sampled
        self.log_mass = torch_backend.tail_log_mass(
            torch_backend.estimates(scores, self.query), self.indices, rows, k, sample
        )

    def codes(self, b: int, kv: int, slots: set[int]) -> Tensor:
        """The unclamped codes of some slots."""
        widest = self.query.deviation[b].unflatten(0, (self.combined.shape[1], -1))[kv].max()
        return self.combined[b, kv, sorted(slots)] * (selection.CODES_PER_DEVIATION / widest)


def assert_same_but_at_the_threshold(ours: Tensor, expected: TorchSelection) -> None:
    """Sets differ only in tokens whose code lies within 1/1000 deviation (2.05 steps) of each other."""
    for b in range(len(ours)):
        for kv in range(ours.shape[1]):
            (mine,), (theirs,) = chosen_slots(ours[b, kv]), chosen_slots(expected.indices[b, kv])
            assert len(mine) == len(theirs)
            assert mine == sorted(set(mine))
            odd = expected.codes(b, kv, set(mine) ^ set(theirs))
            assert not len(odd) or float(odd.max() - odd.min()) <= 3.05


@isas
@cases
def test_selection_is_the_torch_backends(case: Case, isa: str) -> None:
    layer = case.layer()
    expected, ours = TorchSelection(case, layer), NativeEncoder(case.encoder())
    packed = native.to_tiles(expected.packed, expected.encoder.planes)
    chosen = [
        native.select(
            ours, expected.query, packed, visible_of(layer, case.holes), case.k(layer), slots=layer.keys.shape[2],
            sinks=case.budget.sinks, recent=case.budget.recent, isa=isa, threads=threads,
        )
        for threads in (1, 2, 3)
    ]  # fmt: skip
    assert_same_but_at_the_threshold(chosen[0].indices, expected)
    torch.testing.assert_close(chosen[0].log_mass, expected.log_mass, rtol=0, atol=1e-3)
    for other in chosen[1:]:
        assert torch.equal(other.indices, chosen[0].indices)
        assert torch.equal(other.log_mass, chosen[0].log_mass)


@isas
@pytest.mark.parametrize("kind", ["equal", "clamped", "two", "late"])
def test_selection_of_codes_that_tie(kind: str, isa: str) -> None:
    """All equal: the lowest slots. Codes far out, of two values alone, or high only at the end, where no sample looks."""
    shape = Shape(1, 1, 64)
    encoder, slots = random_encoder(shape, "16@8", dtype=torch.float32), 6000
    levels = torch.zeros(1, 1, slots, 16)
    if kind == "clamped":
        levels[..., 0] = 127 * (torch.arange(slots) % 3 - 1)
    if kind == "two":
        levels[..., 0] = (torch.arange(slots) % 7 == 0).float()
    if kind == "late":
        levels[..., 5500:, 0] = torch.arange(500.0) % 128
    query = encoder.encode_query(torch.ones(1, 1, 1, 64), 0.1)
    codes = torch.zeros_like(query.codes)
    codes[..., 0] = 127
    query = query._replace(codes=codes, step=query.step * (1e6 if kind == "clamped" else 1e-3))
    packed = native.to_tiles(encoder.planes.pack(levels), encoder.planes)
    ranking = torch_backend.code(127 * query.step[..., None] * levels[..., 0][:, :, None], query.deviation)
    rows = torch_backend.Rows.of(torch.ones(1, slots, dtype=torch.bool), torch.tensor([[slots]]))
    for k in (40, 700, 3000, 5999, 6000):
        expected = torch_backend.top_k(ranking, rows, torch.tensor([[k]]), torch_backend.Forced(4, 16))
        spans = Spans(None, torch.tensor([slots]))
        ours = native.select(
            NativeEncoder(encoder), query, packed, spans, torch.tensor([k]), slots=slots, sinks=4, recent=16, isa=isa
        )
        assert torch.equal(ours.indices.long(), expected)


@isas
@cases
def test_the_fused_step_is_the_references(case: Case, isa: str) -> None:
    """In float32: the same sets (codes at a rounding boundary aside), log-mass to 1e-3, output to 1e-4 where sets agree."""
    layer = case.layer()
    ours, expected = native_step(case, layer, isa), reference(case, layer)
    assert ours.indices is not None and ours.log_mass is not None
    group = case.shape.group
    for b, step in enumerate(expected):
        torch.testing.assert_close(ours.log_mass[b, :, 0].double(), step.log_mass, rtol=0, atol=1e-2)
        for kv in range(case.shape.kv_heads):
            (mine,) = chosen_slots(ours.indices[b, kv])
            swapped = set(mine) ^ set(step.indices[kv].tolist())
            assert len(swapped) <= 2
            if not swapped:
                heads = slice(kv * group, (kv + 1) * group)
                torch.testing.assert_close(ours.output[b, heads, 0].double(), step.output[heads], rtol=1e-3, atol=1e-3)


@isas
@cases
@pytest.mark.parametrize("threads", [1, 2])
def test_mass_kept_is_the_torch_backends(case: Case, isa: str, threads: int) -> None:
    """From the same slots and log-mass, soft-capped, sinks left out; no number where there is no tail."""
    layer, encoder = case.layer(), case.encoder()
    for soft_cap, sinks in ((None, None), (2.5, random_sinks(case)), (None, 200 + random_sinks(case))):
        options = {"soft_cap": soft_cap, "learned_sinks": sinks, "threads": threads}
        ours = native_step(case, layer, isa, wants_kept=True, **options)
        assert ours.indices is not None and ours.log_mass is not None and ours.kept is not None
        empty = (sums_of(layer, encoder).tokens == 0)[:, :, None] | (case.tail == "none")
        mass = ours.log_mass.double().masked_fill(empty, -torch.inf)
        wide = [tensor.double() for tensor in layer[:3]]
        softmax = Softmax(softcap=soft_cap)
        tail = (mass, torch.zeros_like(wide[0]))
        kept = torch_backend.attend(*wide, ours.indices.long(), case.shape.scale, *tail, softmax).kept
        assert kept is not None and ours.kept.dtype == torch.float32
        expected = kept.masked_fill(mass == -torch.inf, torch.nan)
        torch.testing.assert_close(ours.kept.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert native_step(case, layer, isa).kept is None


@isas
@cases
@dtypes
def test_threads_change_nothing_but_rounding(case: Case, isa: str, dtype: torch.dtype) -> None:
    layer = case.layer(dtype)
    one, *others = (native_step(case, layer, isa, threads=threads) for threads in (1, 2, 3))
    for other in others:
        assert other.indices is not None and one.indices is not None
        assert torch.equal(other.indices, one.indices)
        torch.testing.assert_close(other.log_mass, one.log_mass)
        assert_alike(other.output, one.output)


@isas
@dtypes
@pytest.mark.parametrize("case", [CASES[5], CASES[6], CASES[7]], ids=str)
def test_the_step_reads_no_row_that_is_not_selected(case: Case, isa: str, dtype: torch.dtype) -> None:
    """Unselected rows of K and V are NaN once the keys are encoded: indices and output stay, to the bit."""
    layer, encoder = case.layer(dtype), case.encoder()
    ours, slots = NativeEncoder(encoder), layer.keys.shape[2]
    packed, sums = ours.buffer(len(layer.keys), slots), sums_of(layer, encoder)
    native.encode_keys(ours, layer.keys, packed, 0, slots, isa=isa)

    def step(layer: Layer) -> native.NativeStep:
        return native.decode_step(
            ours, layer.query, layer.keys, layer.values, packed, visible_of(layer, case.holes), case.k(layer),
            case.shape.scale, sinks=case.budget.sinks, recent=case.budget.recent, tail=case.tail, sums=sums,
            wants_indices=True, isa=isa,
        )  # fmt: skip

    plain = step(layer)
    assert plain.indices is not None
    blind = step(poisoned(layer, slots_read(plain.indices, slots)))
    assert blind.indices is not None
    assert torch.equal(blind.indices, plain.indices)
    assert torch.equal(blind.output, plain.output)
    assert plain.output.isfinite().all()


@isas
@dtypes
@pytest.mark.parametrize("case", [CASES[2], CASES[6], CASES[9]], ids=str)
def test_absorb_adds_and_takes_away(case: Case, isa: str, dtype: torch.dtype) -> None:
    layer, encoder = case.layer(dtype), case.encoder()
    ours, (batch, heads, slots, dim) = NativeEncoder(encoder), layer.keys.shape
    sign = torch.randint(-1, 2, (batch, slots), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    read = (sign != 0)[:, None].expand(-1, heads, -1)
    layer = poisoned(layer, read)
    start = [1.0 + torch.rand(*shape) for shape in ((batch, heads, dim), (batch, heads, ours.tail_rank))]
    sums = TailSums(torch.zeros(batch, 1), *start, torch.rand(batch, heads, ours.tail_rank, dim))
    weight = sign[:, None, :, None].double()
    values = weight * layer.values.double().nan_to_num()
    encoded = torch.where(weight != 0, case.encoder(torch.float64).project_keys(layer.keys.double()), 0.0)
    encoded = encoded[..., : ours.tail_rank]
    change = (values.sum(2), (weight * encoded).sum(2), encoded.mT @ values)
    expected = [old.double() + new for old, new in zip(sums[1:], change, strict=True)]
    native.absorb(ours, layer.keys, layer.values, sign, sums, isa=isa)
    assert torch.equal(sums.tokens[:, 0], sign.sum(-1).float())
    for mine, theirs in zip(sums[1:], expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-3)


@isas
def test_absorb_without_an_encoder_sums_values(isa: str) -> None:
    layer = CASES[3].layer(torch.float16)
    batch, heads, slots, dim = layer.keys.shape
    shapes = ((batch, 1), (batch, heads, dim), (batch, heads, 0), (batch, heads, 0, dim))
    sums = TailSums(*(torch.zeros(shape) for shape in shapes))
    native.absorb(None, layer.keys, layer.values, torch.ones(batch, slots, dtype=torch.int8), sums, isa=isa)
    torch.testing.assert_close(sums.values, layer.values.float().sum(2), rtol=1e-5, atol=1e-4)


@isas
def test_own_threads_serve_where_there_is_no_openmp(isa: str) -> None:
    extension, case = native.extension(), CASES[5]._replace(budget=FRACTION)
    layer = case.layer()
    shared = native_step(case, layer, isa, threads=2)
    extension.use_own_threads(True)
    try:
        assert not extension.shares_openmp()
        own = [native_step(case, layer, isa, threads=threads) for threads in (2, 3, 2)]
    finally:
        extension.use_own_threads(False)
    assert torch.equal(own[0].output, shared.output)
    assert torch.equal(own[2].output, shared.output)
