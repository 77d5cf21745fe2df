"""Random sequences of cache operations against a plain-Python cache: a list of tokens for each sequence."""

import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import Shape, random_encoder, random_layer
from layer_caches import rows_of
from loki_attention.cache import LayerCache
from loki_attention.core.encoder import Encoder
from loki_attention.core.tail import BLOCK, TailSums, covered_tokens
from loki_attention.integrations.huggingface.cache_layer import PreallocatedLayer

SHAPE = Shape(2, 1, 16)
MOST_SEQUENCES, MOST_SLOTS = 6, 600
# Every slot holds a row of this pool. Padding holds row 0, whose values may spoil no sum.
POOL = random_layer(SHAPE, (1999,))
KEYS, VALUES = POOL.keys[0], POOL.values[0].index_fill(1, torch.tensor([0]), torch.nan)


class Token(NamedTuple):
    """What a slot holds: its key and value, as the number of a row of the pool, and whether the mask shows it."""

    number: int
    valid: bool


Sequence = list[Token]
PADDING = Token(0, False)


class Method(NamedTuple):
    """What a method asks of the cache at a sparse step."""

    encoder: Encoder | None
    twins: bool = True
    sums: bool = True


METHODS = {
    "loki": Method(random_encoder(SHAPE, "8@4")),
    "loki, other planes": Method(random_encoder(SHAPE, "16@2")),
    "loki, other basis": Method(random_encoder(SHAPE, "8@4", "pca-pre")),
    "loki, tail none": Method(random_encoder(SHAPE, "8@4"), sums=False),
    "exact-topk, tail linear": Method(random_encoder(SHAPE, "8@4"), twins=False),
    "exact-topk, tail mean": Method(None, twins=False),
}


class Pair:
    """A cache layer and, by list operations alone, what it must hold; every public method is an operation on both."""

    def __init__(self, batch: int, capacity: int, prompt: int, paddings: list[int]) -> None:
        self._layer, self._sequences = PreallocatedLayer(capacity), [[] for _ in range(batch)]
        self._method, self._numbers = METHODS["loki"], itertools.count(1)
        self._capacity, self._longest = capacity, 0
        self._left_behind: list[tuple[PreallocatedLayer, list[Sequence]]] = []
        self.turn(prompt, paddings)

    def turn(self, new: int, paddings: list[int]) -> None:
        """Many tokens at once: left-padded, and so with holes where it is not the first turn."""
        if self._length > MOST_SLOTS:
            return
        turn = [
            [PADDING] * min(padding, new) + [self._token() for _ in range(new - padding)]
            for _, padding in zip(self._sequences, paddings, strict=False)
        ]
        self._layer.update(rows_in(turn, KEYS), rows_in(turn, VALUES))
        self._sequences = [old + more for old, more in zip(self._sequences, turn, strict=True)]
        self._longest = max(self._longest, self._length)

    def decode(self, tokens: int) -> None:
        """One token at a time, a sparse step at each."""
        for _ in range(tokens):
            self.turn(1, [0] * MOST_SEQUENCES)
            self._step()

    def attach_another(self, method: str) -> None:
        """A step by another method."""
        self._method = METHODS[method]
        self._step()

    def mask_a_token(self, sequence: int, slot: int) -> None:
        """A step whose mask shows one token less."""
        if self._length and self._method.sums:
            masked, slot = self._sequences[sequence % len(self._sequences)], slot % self._length
            masked[slot] = Token(masked[slot].number, False)
            self._step()

    def crop(self, tokens: int, counted_in_a_tensor: bool) -> None:
        """The last tokens go; assisted decoding in older versions of transformers counts them in a tensor."""
        self._layer.crop(torch.tensor(-tokens) if counted_in_a_tensor else -tokens)
        assert type(self._layer.get_seq_length()) is int
        self._sequences = [sequence[: max(self._length - tokens, 0)] for sequence in self._sequences]

    def crop_to(self, tokens: int) -> None:
        """The same as older versions of transformers ask for it: by the tokens that stay, and maybe by more than are there."""
        stay = max(self._length - tokens, 1)
        self._layer.crop(stay)
        self._sequences = [sequence[:stay] for sequence in self._sequences]

    def reorder(self, places: list[int]) -> None:
        """Beams."""
        self._pick(self._layer.reorder_cache, places[: len(self._sequences)])

    def select(self, places: list[int]) -> None:
        """Some of the sequences, or one several times."""
        self._pick(self._layer.batch_select_indices, places)

    def repeat(self, times: int) -> None:
        """As for several answers to one prompt."""
        times = min(times, MOST_SEQUENCES // len(self._sequences))
        self._layer.batch_repeat_interleave(times)
        self._sequences = [list(sequence) for sequence in self._sequences for _ in range(times)]

    def copy(self) -> None:
        """The copy goes on; what is left behind must stay as it is."""
        self._left_behind.append((self._layer, [list(sequence) for sequence in self._sequences]))
        self._layer = copy.deepcopy(self._layer)

    def reset(self, batch: int, prompt: int, paddings: list[int]) -> None:
        """Another conversation in the same cache."""
        self._layer.reset()
        self._sequences, self._longest = [[] for _ in range(batch)], 0
        self.check()
        assert self._layer.keys is None and sum(self._layer.store.bytes.values()) == 0
        self.turn(prompt, paddings)

    def check(self) -> None:
        """The layer holds what the lists do, in buffers that never grow by more than a quarter or what was asked for."""
        check(self._layer, self._sequences)
        assert self._length <= self._layer.store.capacity <= max(self._capacity, self._longest + self._longest // 4)

    def check_what_was_left_behind(self) -> None:
        for layer, sequences in self._left_behind:
            check(layer, sequences)

    @property
    def _length(self) -> int:
        return len(self._sequences[0])

    def _token(self) -> Token:
        return Token(next(self._numbers) % KEYS.shape[1] or 1, True)

    def _pick(self, operation: Callable[[Tensor], None], places: list[int]) -> None:
        places = [place % len(self._sequences) for place in places]
        operation(torch.tensor(places))
        self._sequences = [list(self._sequences[place]) for place in places]

    def _step(self) -> None:
        """What a sparse step asks of the cache, and that it gets it."""
        store, encoder, rows = self._layer.store, self._method.encoder, rows_of(valid_in(self._sequences))
        if not self._length:
            return
        if self._method.twins:
            assert torch.equal(store.encode(encoder), encoder.encode_keys(rows_in(self._sequences, KEYS)))
        if self._method.sums:
            sums = store.absorb(encoder, rows)
            assert torch.equal(sums.tokens[:, 0].long(), covered_tokens(rows.tokens[:, 0]))
            assert digest(store.tail.encoder) == digest(encoder)


def check(layer: PreallocatedLayer, sequences: list[Sequence]) -> None:
    """Keys, values and length are those of the sequences, twins and sums what their tokens give."""
    store, length = layer.store, len(sequences[0])
    assert (layer.get_seq_length(), layer.get_mask_sizes(1), store.length) == (length, (length + 1, 0), length)
    for shown, held, pool in ((layer.keys, store.keys, KEYS), (layer.values, store.values, VALUES)):
        if held is None:
            assert shown is None and length == 0
            continue
        assert shown.data_ptr() == held.data_ptr()
        assert torch.allclose(shown, rows_in(sequences, pool), rtol=0, atol=0, equal_nan=True)
    check_twins(store, sequences)
    check_sums(store, sequences)


def check_twins(store: LayerCache, sequences: list[Sequence]) -> None:
    if store.twins is None:
        return
    encoder, packed, encoded = store.twins.encoder, store.twins.packed, store.twins.encoded
    assert encoded <= store.length and packed.shape[2] <= store.capacity
    assert torch.equal(packed[:, :, :encoded], encoder.encode_keys(rows_in(sequences, KEYS)[:, :, :encoded]))


def check_sums(store: LayerCache, sequences: list[Sequence]) -> None:
    """Sums are over each sequence's first valid tokens, whole blocks and never more than a step there would cover."""
    if store.tail is None:
        return
    encoder, rank, covered = store.tail.encoder, store.tail.rank, store.tail.covered.tolist()
    assert torch.equal(rank, rows_of(valid_in(sequences)[:, : rank.shape[1]]).rank)
    for b, sequence in enumerate(sequences):
        numbers = [token.number for token in sequence if token.valid]
        assert covered[b] % BLOCK == 0 and covered[b] <= covered_tokens(torch.tensor(len(numbers)))
        keys, values = KEYS[:, numbers[: covered[b]]], VALUES[:, numbers[: covered[b]]]
        encoded = keys[..., :0] if encoder is None else encoder.project_keys(keys[None])[0, ..., : encoder.tail_rank]
        expected = TailSums(store.tail.sums.tokens[b], values.sum(1), encoded.sum(1), encoded.mT @ values)
        for ours, fresh in zip(store.tail.sums, expected, strict=True):
            assert torch.allclose(ours[b], fresh, rtol=1e-9, atol=1e-9)


def digest(encoder: Encoder | None) -> str | None:
    return None if encoder is None else encoder.digest


def rows_in(sequences: list[Sequence], pool: Tensor) -> Tensor:
    """The rows of the pool that the sequences hold: (B, Hkv, S, D)."""
    numbers = torch.tensor([[token.number for token in sequence] for sequence in sequences], dtype=torch.long)
    return pool[:, numbers].transpose(0, 1)


def valid_in(sequences: list[Sequence]) -> Tensor:
    """Which slots hold valid tokens: (B, S)."""
    return torch.tensor([[token.valid for token in sequence] for sequence in sequences], dtype=torch.bool)


lengths = st.sampled_from([200, 2 * BLOCK + 1, 300, 3 * BLOCK - 1, BLOCK, 5, 1])
# One entry for each sequence that there may be; those there are take the first ones, modulo their number.
places = st.lists(st.integers(0, 11), min_size=MOST_SEQUENCES, max_size=MOST_SEQUENCES)
paddings = st.lists(st.sampled_from([0, 0, 0, 1, 5, 20, BLOCK, 999]), min_size=MOST_SEQUENCES, max_size=MOST_SEQUENCES)

Operation = tuple[str, dict[str, object]]


def operation(name: str, **arguments: st.SearchStrategy[object]) -> st.SearchStrategy[Operation]:
    return st.tuples(st.just(name), st.fixed_dictionaries(arguments))


operations = st.one_of(
    operation("turn", new=lengths, paddings=paddings),
    operation("decode", tokens=st.integers(1, 3)),
    operation("attach_another", method=st.sampled_from(list(METHODS))),
    operation("mask_a_token", sequence=st.integers(0, 11), slot=st.integers(0, MOST_SLOTS)),
    operation("crop", tokens=st.sampled_from([1, 3, BLOCK, 100, 150, 0, 999]), counted_in_a_tensor=st.booleans()),
    operation("crop_to", tokens=st.sampled_from([1, 3, BLOCK, 100, 150, -5])),
    operation("reorder", places=places),
    operation("select", places=st.lists(st.integers(0, 11), min_size=1, max_size=4)),
    operation("repeat", times=st.integers(2, 3)),
    operation("copy"),
    operation("reset", batch=st.integers(1, 3), prompt=lengths, paddings=paddings),
)
HISTORY = {
    "pair": st.builds(
        Pair, batch=st.integers(1, 3), capacity=st.sampled_from([0, 100, 500]), prompt=lengths, paddings=paddings
    ),
    "operations": st.lists(operations, min_size=12, max_size=24),
}


def run(pair: Pair, operations: list[Operation]) -> None:
    for name, arguments in operations:
        getattr(pair, name)(**arguments)
        pair.check()
    pair.check_what_was_left_behind()


@given(**HISTORY)
@settings(max_examples=200)
def test_any_operations_in_any_order(pair: Pair, operations: list[Operation]) -> None:
    run(pair, operations)


@pytest.mark.fuzz
@given(**HISTORY)
@settings(max_examples=20_000)
def test_any_operations_in_any_order_thousands_of_times(pair: Pair, operations: list[Operation]) -> None:
    run(pair, operations)
