"""Random shapes, lengths, strides, masks and budgets at the native kernels, in buffers that are NaN wherever nothing
should be read. ``make fuzz`` runs this file; a few seeds run by default (``kernels/test_native_fuzz.py``).

    python tests/native_fuzz.py 10000
"""

import argparse
import itertools
import random
import time
from typing import NamedTuple

import torch
from torch import Tensor

from helpers import Layer
from loki_attention.core.encoder import Encoder
from loki_attention.core.planes import STEP_IN_DEVIATIONS, Planes
from loki_attention.core.tail import TAILS, TailSums, covered_tokens, tail_value
from loki_attention.kernels import native, torch_backend
from loki_attention.kernels.native import NativeEncoder, Spans, Visible
from loki_attention.kernels.rows import Rows

_ATTENTION_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


class Draw(NamedTuple):
    """One random step: its layer in strided, poisoned buffers, and what the step is asked for."""

    layer: Layer
    encoder: Encoder
    visible: Visible
    k: Tensor
    scale: float
    forced: torch_backend.Forced
    tail: str
    soft_cap: float | None
    sinks: Tensor | None
    isa: str
    threads: int


def random_planes(rng: random.Random, dim: int) -> Planes:
    """Planes of any grammar that fit a head dim of at least 32."""
    kind = rng.choice(("8", "4", "2", "4+2", "4+2"))
    if kind == "4+2":
        four = 8 * rng.randint(1, (dim - 16) // 8)
        return Planes.parse(f"{four}@4+{16 * rng.randint(1, (dim - four) // 16)}@2")
    unit = 32 // int(kind)
    return Planes.parse(f"{unit * rng.randint(1, dim // unit)}@{kind}")


def random_encoder(rng: random.Random, heads: int, dim: int, generator: torch.Generator) -> Encoder:
    """An encoder of no model: any maps will do."""
    planes = random_planes(rng, dim)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    maps = [draw(heads, dim, planes.rank) / dim**0.5 for _ in range(2)]
    deviations = draw(heads, planes.rank).abs() + 0.2
    steps = deviations * torch.tensor([STEP_IN_DEVIATIONS[bits] for bits in planes.bits])
    return Encoder("fuzz", planes, draw(heads, dim), *maps, deviations, steps, draw(heads).abs())


def strided_rows(rng: random.Random, tensor: Tensor, read: Tensor) -> Tensor:
    """A view with the tensor's values where read, NaN elsewhere and all around, its dims laid out in a random order."""
    order = rng.sample((0, 1, 2), 3)
    room = [tensor.shape[axis] + rng.randint(0, 2) for axis in order]
    buffer = torch.full((*room, tensor.shape[3] + rng.randint(0, 3)), torch.nan, dtype=tensor.dtype)
    for place, axis in enumerate(order):
        buffer = buffer.narrow(place, rng.randint(0, room[place] - tensor.shape[axis]), tensor.shape[axis])
    buffer = buffer[..., buffer.shape[3] - tensor.shape[3] :]
    view = buffer.permute(*(order.index(axis) for axis in range(3)), 3)
    view.copy_(tensor.masked_fill(~read[:, None, :, None], torch.nan))
    return view


def random_valid(rng: random.Random, batch: int, slots: int, generator: torch.Generator) -> tuple[Tensor, Visible]:
    """Valid slots and how a caller says so: spans, or ranks of slots with holes."""
    places = torch.arange(slots)
    if rng.random() < 0.6:
        start = torch.tensor([rng.randint(0, slots) if rng.random() < 0.7 else 0 for _ in range(batch)])
        stop = torch.tensor([rng.randint(int(first), slots) if rng.random() < 0.5 else slots for first in start])
        valid = (places >= start[:, None]) & (places < stop[:, None])
        return valid, Spans(start if start.any() or rng.random() < 0.5 else None, stop)
    valid = torch.rand(batch, slots, generator=generator) < rng.choice((0.05, 0.5, 0.95))
    return valid, Rows.of(valid, valid.sum(-1, keepdim=True))


def draw_step(seed: int, isas: tuple[str, ...]) -> Draw:
    """The random step of a seed."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, heads, group = rng.randint(1, 3), rng.randint(1, 3), rng.choice((1, 1, 2, 3, 4, 4, 5, 7, 8))
    dim = rng.choice((32, 64, 64, 80, 96, 128, 128, 256, rng.randint(32, 140)))
    slots = rng.choice((1, rng.randint(1, 40), rng.randint(1, 300), rng.randint(500, 1200), rng.randint(1200, 2600)))
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    valid, visible = random_valid(rng, batch, slots, generator)
    encoder = random_encoder(rng, heads, dim, generator)
    keys = torch.randn(batch, heads, slots, dim, generator=generator).to(dtype)
    values = torch.randn(batch, heads, slots, dim, generator=generator).to(dtype)
    query = (torch.randn(batch, heads * group, 1, dim, generator=generator) * rng.choice((0.1, 1.0, 3.0))).to(dtype)
    counts = valid.sum(-1)
    forced = torch_backend.Forced(rng.choice((0, 1, 4, 30)), rng.choice((0, 1, 16, 100)))
    least = counts.clamp(max=sum(forced))
    k = torch.tensor([rng.randint(int(low), int(high)) for low, high in zip(least, counts, strict=True)])
    sinks = torch.randn(heads * group, generator=generator) if rng.random() < 0.3 else None
    layer = Layer(query, strided_rows(rng, keys, valid), strided_rows(rng, values, valid), valid)
    return Draw(
        layer, encoder, visible, k, dim**-0.5, forced, rng.choice(TAILS), rng.choice((None, None, 1.0, 20.0)), sinks,
        rng.choice(isas), rng.choice((1, 1, 2, 3)),
    )  # fmt: skip


def packed_keys(draw: Draw, ours: NativeEncoder) -> Tensor:
    """Low-rank keys of the layer, appended in pieces to a poisoned buffer."""
    keys = draw.layer.keys
    slots = keys.shape[2]
    packed = ours.buffer(len(keys), slots + 20).fill_(0xA5)
    cuts = sorted({0, slots, *(slots * i // 3 for i in range(3))})
    for start, stop in itertools.pairwise(cuts):
        native.encode_keys(ours, keys, packed, start, stop, isa=draw.isa, threads=draw.threads)
    return packed


def absorbed(draw: Draw, ours: NativeEncoder) -> TailSums:
    """The tail's sums over what the sequences cover, taken up in two goes, some of it twice and taken back."""
    layer, rank = draw.layer, ours.tail_rank
    batch, heads, _, dim = layer.keys.shape
    shapes = ((batch, 1), (batch, heads, dim), (batch, heads, rank), (batch, heads, rank, dim))
    sums = TailSums(*(torch.zeros(shape) for shape in shapes))
    rows = layer.rows
    covered = (rows.rank >= 0) & (rows.rank < covered_tokens(rows.tokens))
    half = covered & (rows.rank % 2 == 0)
    for sign in (covered.char(), half.char(), -half.char()):
        native.absorb(ours, layer.keys, layer.values, sign, sums, isa=draw.isa, threads=draw.threads)
    return sums


def expected_output(draw: Draw, indices: Tensor, mass: Tensor, sums: TailSums) -> Tensor:
    """Float64 attention over these indices, with the tail and sinks of the draw."""
    layer, kv_heads = draw.layer, draw.layer.keys.shape[1]
    encoded = draw.encoder.encode_query(layer.query, draw.scale)
    group = layer.query.shape[1] // kv_heads
    read = ~torch_backend.unselected(indices.long(), layer.keys.shape[2])[:, :, 0].repeat_interleave(group, 1)
    keys, values = (t.double().nan_to_num().repeat_interleave(group, 1) for t in (layer.keys, layer.values))
    scores = draw.scale * layer.query.double() @ keys.mT
    if draw.soft_cap is not None:
        scores = draw.soft_cap * (scores / draw.soft_cap).tanh()
    columns = [scores.masked_fill(~read[:, :, None], -torch.inf)]
    if draw.tail != "none":
        grouped = (t[:, :, 0].unflatten(1, (kv_heads, -1)).double() for t in (encoded.leading, encoded.deviation))
        wide = TailSums(*(t.double().unsqueeze(2) for t in (sums.tokens, *sums[1:])))
        answer = tail_value(draw.tail, wide, *grouped, draw.scale).flatten(1, 2)[:, :, None]
        empty = (sums.tokens == 0)[:, :, None, None]
        columns.append(mass.double()[..., None].masked_fill(empty, -torch.inf))
        values = torch.cat([values, answer.masked_fill(empty, 0.0)], 2)
    if draw.sinks is not None:
        columns.append(draw.sinks.double()[None, :, None, None].expand(len(scores), -1, 1, 1))
    weights = torch.cat(columns, -1).softmax(-1)[..., : values.shape[2]]
    return weights.nan_to_num() @ values


def check_selection(draw: Draw, packed: Tensor, ours: native.NativeStep) -> None:
    """K ascending valid slots with the forced ones, and codes no worse than 1/1000 deviation below any left out."""
    layer, slots = draw.layer, draw.layer.keys.shape[2]
    assert ours.indices is not None
    codes = native.encode_query(NativeEncoder(draw.encoder), layer.query, draw.scale, isa=draw.isa)
    flat = packed.unflatten(2, (-1, 16)).reshape(*packed.shape[:2], -1, packed.shape[3] // 4, 16, 4)
    offset = torch.cat([torch.full((d * b // 8,), {8: 0x80, 4: 0x88, 2: 0}[b]) for d, b in draw.encoder.planes.planes])
    plain = flat.transpose(-3, -2).reshape(packed.shape)[:, :, :slots] ^ offset.to(torch.uint8)
    scores = torch_backend.score_low_rank(codes, plain, draw.encoder.planes, packed.shape[1])
    rows = layer.rows
    mass = None if scores.shape[2] == 1 else torch_backend.group_log_mass(scores, rows, draw.forced)
    ranking = torch_backend.code(torch_backend.combine_group(scores, mass), codes.deviation)[:, :, 0].int()
    is_forced = rows.forced(*draw.forced)[:, 0]
    for b, count in enumerate(draw.k.tolist()):
        for kv in range(packed.shape[1]):
            row = ours.indices[b, kv, 0]
            chosen = row[:count].long()
            assert (row[count:] == -1).all()
            assert count == 0 or (chosen.diff() > 0).all()
            picked = torch.zeros(slots, dtype=torch.bool).index_fill(0, chosen, True)
            assert not (picked & ~layer.valid[b]).any()
            assert not (is_forced[b] & ~picked).any()
            free, left = ranking[b, kv, picked & ~is_forced[b]], ranking[b, kv, layer.valid[b] & ~picked]
            assert not len(free) or not len(left) or int(left.max() - free.min()) <= 3


def check_step(seed: int, isas: tuple[str, ...]) -> None:
    """Draw a step, run every operation on it, hold the results to the reference."""
    draw = draw_step(seed, isas)
    layer, where = draw.layer, {"isa": draw.isa, "threads": draw.threads}
    ours = NativeEncoder(draw.encoder)
    packed, sums = packed_keys(draw, ours), absorbed(draw, ours)
    step = native.decode_step(
        ours, layer.query, layer.keys, layer.values, packed, draw.visible, draw.k, draw.scale, sinks=draw.forced.sinks,
        recent=draw.forced.recent, tail=draw.tail, sums=sums, soft_cap=draw.soft_cap, learned_sinks=draw.sinks,
        wants_indices=True, wants_mass=True, **where,
    )  # fmt: skip
    check_selection(draw, packed, step)
    assert step.indices is not None and step.log_mass is not None
    tolerance = _ATTENTION_TOLERANCE[layer.query.dtype]
    exact = expected_output(draw, step.indices, step.log_mass, sums)
    assert float((step.output.double() - exact).norm()) <= tolerance * max(1.0, float(exact.norm()))
    again = native.attend(
        layer.query, layer.keys, layer.values, step.indices, draw.scale, soft_cap=draw.soft_cap,
        learned_sinks=draw.sinks, **where,
    )  # fmt: skip
    alone = expected_output(draw._replace(tail="none"), step.indices, step.log_mass, sums)
    assert float((again.double() - alone).norm()) <= tolerance * max(1.0, float(alone.norm()))
    dense = native.dense_decode(layer.query, layer.keys, layer.values, draw.visible, draw.scale, **where)
    every = torch.where(layer.valid, torch.arange(layer.valid.shape[1]), -1)[:, None, None]
    every = every.expand(-1, layer.keys.shape[1], -1, -1)
    full = expected_output(draw._replace(tail="none", soft_cap=None, sinks=None), every, step.log_mass, sums)
    assert float((dense.double() - full).norm()) <= tolerance * max(1.0, float(full.norm()))


def main() -> None:
    """Run many seeds; says which one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    for i in range(options.count):
        try:
            check_step(options.first + i, native.usable_isas())
        except BaseException:
            print(f"seed {options.first + i} fails")
            raise
        if (i + 1) % 500 == 0:
            print(f"{i + 1} of {options.count} steps, {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
