"""The Triton kernels' encoding, selection and steps against core's float64 reference."""

import pytest
import torch
from torch import Tensor

from helpers import Shape, chosen_slots
from kernel_cases import (
    CASES,
    DTYPES,
    FRACTION,
    NOTHING_FORCED,
    SMALL,
    Case,
    poisoned,
    random_sinks,
    reference,
    slots_read,
    untiled,
)
from loki_attention.core import selection
from loki_attention.core.budget import Budget
from loki_attention.core.encoder import Encoder
from loki_attention.kernels import torch_backend
from loki_attention.kernels.native_encoder import to_tiles
from triton_cases import AGREEMENT, DEVICE, GARBAGE, LONG, SHORT, TUNINGS, Cut, assert_exact, cuts, prepared, workspace

LARGER = [
    Case("64@4+128@2", Shape(1, 4, 256), (600, 90), "linear", FRACTION),
    Case("24@4+48@2", Shape(2, 4, 80), (1100,), "linear", FRACTION),
    Case("24@4+48@2", Shape(1, 7, 96), (300, 260), "mean", FRACTION),
    Case("32@8", Shape(1, 4, 128), (1029, 1), "linear", FRACTION),
    Case("48@8", Shape(1, 2, 64), (130,), "linear", NOTHING_FORCED),
    Case("8@4", Shape(1, 1, 64), (200, 128), "linear", SMALL),
    Case("128@4", Shape(1, 4, 128), (257,), "none", FRACTION),
    Case("192@2", Shape(1, 4, 256), (257,), "linear", FRACTION),
]
# Small enough for the interpreter, a second or so each, and every branch once: they run by default.
QUICK = [
    (CASES[0], "chunks"),
    (Case("16@8", Shape(1, 1, 80), (257, 40), "mean", FRACTION), "one-program"),
    (Case("16@4+32@2", Shape(1, 4, 64), (600,), "linear", FRACTION, holes=True), "chunks"),
    (Case("32@4+64@2", Shape(1, 2, 128), (600,), "linear", FRACTION), "chunks"),
    (Case("16@2", Shape(1, 7, 96), (150,), "linear", NOTHING_FORCED), "one-program"),
    (Case("64@4+128@2", Shape(1, 2, 256), (200,), "linear", FRACTION), "one-program"),
]
ALL = QUICK + [(case, name) for case in CASES + LARGER for name in TUNINGS]
matrix = pytest.mark.parametrize(
    ("case", "cut", "dtype"),
    [
        pytest.param(
            case,
            TUNINGS[name],
            dtype,
            id=f"{case}-{name}-{str(dtype)[6:]}",
            marks=() if i < len(QUICK) else pytest.mark.slow,
        )
        for i, (case, name) in enumerate(ALL)
        for j, dtype in enumerate(DTYPES)
        # On a GPU all of them; the interpreter takes each type in turn.
        if DEVICE.type == "cuda" or (i + i // 3) % 3 == j
    ],
)


def codes_of(case: Case, layer: object, b: int, kv: int, slots: set[int]) -> Tensor:
    """The reference's unclamped codes of some slots of a sequence, in float64."""
    encoder, rows = case.encoder(torch.float64), layer.rows
    query = encoder.encode_query(layer.query.double(), case.shape.scale)
    packed = encoder.encode_keys(layer.keys.double())
    scores = torch_backend.score_low_rank(query, packed, encoder.planes, case.shape.kv_heads)
    forced = torch_backend.Forced(case.budget.sinks, case.budget.recent)
    mass = None if scores.shape[2] == 1 else torch_backend.group_log_mass(scores, rows, forced)
    combined = torch_backend.combine_group(scores, mass)[:, :, 0]
    widest = query.deviation[b].unflatten(0, (case.shape.kv_heads, -1))[kv].max()
    return combined[b, kv, sorted(slots)] * (selection.CODES_PER_DEVIATION / widest)


def assert_selects_as_the_reference(case: Case, layer: object, indices: Tensor) -> None:
    """Ascending, K of each, and other than the reference's only within a thousandth of a deviation of the threshold."""
    references = reference(case, layer)
    for b, step in enumerate(references):
        for kv in range(case.shape.kv_heads):
            (ours,), theirs = chosen_slots(indices[b, kv]), set(step.indices[kv].tolist())
            assert ours == sorted(set(ours)) and len(ours) == len(theirs)
            differing = set(ours) ^ theirs
            if differing:
                codes = codes_of(case, layer, b, kv, differing)
                assert codes.max() - codes.min() <= 2.048


@matrix
def test_a_step_equals_the_reference(case: Case, cut: Cut, dtype: torch.dtype) -> None:
    """Selection, log-mass and, given the same slots, outputs; whatever memory held before."""
    layer = case.layer(dtype)
    ready = prepared(case, dtype, layer)
    found = ready.step(cut, workspace=workspace(case, ready.layer))
    assert found.indices is not None and found.log_mass is not None
    assert_selects_as_the_reference(case, layer, found.indices)
    references = reference(case, layer)
    same = [
        found.indices[b, :, 0, : step.indices.shape[1]].equal(step.indices.int()) for b, step in enumerate(references)
    ]
    for b, step in enumerate(references):
        if not same[b]:
            continue
        torch.testing.assert_close(found.log_mass[b, :, 0].double(), step.log_mass, rtol=1e-3, atol=1e-3)
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        error = (found.output[b, :, 0].double() - step.output).norm() / step.output.norm()
        assert error <= tolerance
    plain = found
    if case.tail != "none":
        without_tail = ready._replace(case=case._replace(tail="none"))
        plain = without_tail.step(cut, wants_mass=False, wants_kept=False)
    assert plain.indices is not None
    seen = slots_read(plain.indices, layer.keys.shape[2])
    assert_exact(plain.output, layer, case.shape.scale, seen=seen)


# Every plane and head dim, by default every width of codes; lengths that end inside a tile.
QUICK_PLANES = {"16@4+32@2", "32@8", "192@2"}
KEY_CASES = [
    pytest.param(
        case._replace(lengths=(100, 77)[: len(case.lengths)]),
        dtype,
        marks=() if case.planes in QUICK_PLANES else pytest.mark.slow,
        id=f"{case}-{str(dtype)[6:]}",
    )
    for case, dtype in zip([*CASES[1:5], *LARGER], [torch.float32, torch.bfloat16, torch.float16] * 4, strict=True)
]


def unrounded_keys(encoder: Encoder, keys: Tensor) -> Tensor:
    """Encoded keys in steps before rounding, shifted so that every rounding boundary is at a half."""
    bits = torch.tensor(encoder.planes.bits)
    return encoder.project_keys(keys) / encoder.steps[:, None] + torch.where(bits == 2, 1.5, 0.0)


@pytest.mark.parametrize(("case", "dtype"), KEY_CASES)
def test_key_codes_are_the_references(case: Case, dtype: torch.dtype) -> None:
    """But for values within 1e-3 of a rounding boundary; written in pieces that end inside tiles, others left alone."""
    layer, exact = case.layer(dtype), case.encoder(torch.float64)
    ready, slots = prepared(case, dtype, layer), layer.keys.shape[2]
    packed = ready.encoder.buffer(len(layer.keys), slots + 20).fill_(GARBAGE)
    for start, stop in ((0, slots // 3), (slots // 3, slots // 3 + 1), (slots // 3 + 1, slots)):
        ready.encoder.write(ready.layer.keys, packed, start, stop)
    ours = untiled(packed.cpu(), slots + 20)
    expected = untiled(to_tiles(exact.encode_keys(layer.keys), exact.planes), slots)
    unrounded = unrounded_keys(exact, layer.keys.double())
    unsure = ((unrounded - unrounded.floor() - 0.5).abs() < 1e-3).any(-1)
    assert not ((ours[:, :, :slots] != expected).any(-1) & ~unsure).any()
    assert (ours[:, :, slots:] == GARBAGE).all()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case._replace(lengths=(60,), shape=case.shape._replace(kv_heads=1), tail="none"),
            marks=() if case.planes in {*QUICK_PLANES, "24@4+48@2"} else pytest.mark.slow,
        )
        for case in (CASES[2], *LARGER)
    ],
    ids=str,
)
def test_query_codes_and_numbers_are_the_references(case: Case) -> None:
    layer, exact, group = case.layer(), case.encoder(torch.float64), case.shape.group
    ready = prepared(case, layer=layer)
    space = workspace(case, ready.layer)
    ready.step(workspace=space)
    expected = exact.encode_query(layer.query.double(), case.shape.scale)
    rows = len(layer.keys) * case.shape.kv_heads
    numbers = space.numbers.cpu().view(*layer.query.shape[:2], 4)
    for i, name in enumerate(("step", "deviation", "offset")):
        theirs = getattr(expected, name)[..., 0]
        torch.testing.assert_close(numbers[..., i].double(), theirs, rtol=1e-5, atol=1e-5)
    codes = space.codes.cpu().view(torch.int8).view(rows * group, -1)
    encoded = space.encoded.cpu().view(*layer.query.shape[:2], -1).double()
    wanted = layer.query[:, :, 0].double()[:, :, None] @ exact.query_map.repeat_interleave(group, 0)
    torch.testing.assert_close(encoded, wanted[:, :, 0], rtol=1e-5, atol=1e-5)
    theirs = expected.codes.view(rows * group, -1)
    shifts = torch.zeros(rows * group)
    start = 0
    for dims, bits in exact.planes.planes:
        # Words of the dims that lie at the same place in their bytes.
        per = 8 // bits
        ours = codes[:, start : start + dims].unflatten(1, (-1, per, 4)).mT.flatten(1)
        part = theirs[:, start : start + dims]
        assert ((ours.int() - part.int()).abs() <= 1).all() and (ours == part).float().mean() > 0.99
        shifts += {8: 128.0, 4: 8.0, 2: 1.5}[bits] * ours.float().sum(1)
        start += dims
    assert torch.equal(numbers[..., 3].flatten(), shifts)


@pytest.mark.parametrize(
    ("case", "name"), [QUICK[1], *(pytest.param(*one, marks=pytest.mark.slow) for one in QUICK[2:4])], ids=str
)
def test_the_step_reads_no_row_that_is_not_selected(case: Case, name: str) -> None:
    """Unselected rows of K and V are NaN once the keys are encoded: nothing changes, to the bit. Again and again."""
    ready = prepared(case, torch.bfloat16)
    plain = ready.step(TUNINGS[name])
    assert plain.indices is not None
    read = slots_read(plain.indices, ready.layer.keys.shape[2]).to(DEVICE)
    blind = ready._replace(layer=poisoned(ready.layer, read))
    for _ in range(2 if DEVICE.type == "cpu" else 100):
        again = blind.step(TUNINGS[name])
        assert again.indices is not None and torch.equal(again.indices, plain.indices)
        assert torch.equal(again.output, plain.output)
    assert plain.output.isfinite().all()


@cuts
def test_ties_go_to_the_lower_slot(cut: Cut) -> None:
    """Keys of a few values alone: every threshold is a tie."""
    case = Case("16@8", Shape(1, 2, 64), (300, 200), "none", FRACTION)
    layer = case.layer()
    few = layer.keys[:, :, :3].repeat(1, 1, 100, 1)
    layer = layer._replace(keys=few.contiguous())
    found = prepared(case, layer=layer).step(cut)
    assert found.indices is not None
    assert_selects_as_the_reference(case, layer, found.indices)
    for b, step in enumerate(reference(case, layer)):
        assert torch.equal(found.indices[b, :, 0, : step.indices.shape[1]], step.indices.int())


@cuts
def test_every_sequence_has_its_own_k(cut: Cut) -> None:
    case = Case("32@4", Shape(1, 4, 64), (300, 40, 1), "none", Budget(fraction=1 / 4, minimum=16, sinks=2, recent=8))
    layer = case.layer()
    found = prepared(case, layer=layer).step(cut)
    assert found.indices is not None
    counts = (found.indices >= 0).sum(-1).flatten().tolist()
    assert counts == case.k(layer).tolist() == [75, 16, 1]
    assert_selects_as_the_reference(case, layer, found.indices)


def test_a_k_beyond_the_tokens_attends_all_of_them() -> None:
    case = Case("32@4", Shape(1, 4, 64), (90, 50), "none")
    ready = prepared(case)._replace(k=torch.full((2,), 1000, device=DEVICE))
    found = ready.step()
    assert found.indices is not None
    assert (found.indices >= 0).sum(-1).flatten().tolist() == [90, 50]
    assert_exact(found.output, case.layer(), case.shape.scale)


@pytest.mark.parametrize(
    "case", [QUICK[4][0]._replace(lengths=(200,)), pytest.param(CASES[3], marks=pytest.mark.slow)], ids=str
)
def test_soft_caps_learned_sinks_and_the_mass_kept(case: Case) -> None:
    layer = case.layer()
    ready = prepared(case, layer=layer)
    for soft_cap, sinks in ((1.5, None), (None, random_sinks(case))):
        options = {"soft_cap": soft_cap, "learned_sinks": None if sinks is None else sinks.to(DEVICE)}
        plain = ready._replace(case=case._replace(tail="none")).step(SHORT, **options)
        assert plain.indices is not None and plain.kept is not None and plain.kept.isnan().all()
        seen = slots_read(plain.indices, layer.keys.shape[2])
        assert_exact(plain.output, layer, case.shape.scale, soft_cap=soft_cap, sinks=sinks, seen=seen)
        ours = ready.step(LONG, **options)
        assert ours.indices is not None and ours.log_mass is not None and ours.kept is not None
        softmax = torch_backend.Softmax(softcap=soft_cap)
        mass = ours.log_mass.double().masked_fill((ready.sums.tokens == 0).cpu()[:, :, None], -torch.inf)
        wide = [tensor.double() for tensor in layer[:3]]
        tail = (mass, torch.zeros_like(wide[0]))
        kept = torch_backend.attend(*wide, ours.indices.long(), case.shape.scale, *tail, softmax).kept
        expected = kept.masked_fill(mass == -torch.inf, torch.nan)
        torch.testing.assert_close(ours.kept.double(), expected, rtol=1e-4, atol=AGREEMENT, equal_nan=True)


@pytest.mark.parametrize(
    "case",
    [
        Case("16@4+32@2", Shape(1, 2, 64), (200,), "linear", FRACTION),
        pytest.param(CASES[9], marks=pytest.mark.slow),
        pytest.param(LARGER[3]._replace(lengths=(1029, 200)), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_newest_token_joins_on_the_device(case: Case) -> None:
    """``newest``: key and sums are brought up to date by the step itself, as if by the cache."""
    ready = prepared(case)
    expected = ready.step()
    keys, last = ready.layer.keys, ready.layer.keys.shape[2] - 1
    stale = ready.encoder.buffer(len(keys), last + 1).fill_(GARBAGE)
    ready.encoder.write(keys, stale, 0, last)
    # One block back where there is one, as it is in every 64th step; from nothing for the shortest.
    sums = type(ready.sums)(*(torch.zeros_like(tensor) for tensor in ready.sums))
    found = ready._replace(packed=stale, sums=sums).step(newest=True)
    slots = keys.shape[2]
    assert torch.equal(untiled(stale.cpu(), slots), untiled(ready.packed.cpu(), slots))
    for ours, theirs in zip(sums, ready.sums, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert found.indices is not None and expected.indices is not None
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.output, expected.output, rtol=1e-4, atol=1e-4)
