"""What stands beside one layer's K and V of a fixed capacity: low-rank keys and the tail's sums, at fixed addresses.

Plain torch; knows no model and no method. Decode steps that were captured or compiled write here by themselves
(``kernels.newest``). What this module does the host does between them, and waits for the device.
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from loki_attention.cache import changed_sums, no_sums
from loki_attention.core.shapes import Keys, Values
from loki_attention.core.tail import TailSums, covered_tokens
from loki_attention.kernels.native import NativeEncoder
from loki_attention.kernels.triton.encoder import TritonEncoder

KernelEncoder = NativeEncoder | TritonEncoder
_ABSORBED_AT_ONCE = 4096


def fixed(tensor: Tensor) -> Tensor:
    """``tensor``, which graphs may take to stay where it is."""
    mark: Any = torch._dynamo.mark_static_address
    mark(tensor)
    return tensor


class StaticTwins:
    """The low-rank keys and sums of a layer whose ``keys`` and ``values`` (B, Hkv, capacity, D) never move.

    ``start`` (B,) is each sequence's first valid slot; from there its tokens lie side by side. ``packed`` and ``sums`` are
    empty without an encoder, ``sums`` without a tail too.
    """

    def __init__(self, keys: Keys, values: Values) -> None:
        self.keys, self.values = keys, values
        self.encoder: KernelEncoder | None = None
        # Tensors of inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.start = fixed(torch.zeros(len(keys), dtype=torch.int64, device=keys.device))
            self.packed = torch.empty(0, dtype=torch.uint8, device=keys.device)
            self.sums = self._without_tail()

    @property
    def bytes(self) -> dict[str, int]:
        """Resident bytes of the K/V buffers, the low-rank keys and the tail's sums."""
        parts = {"cache": (self.keys, self.values), "twins": (self.packed,), "sums": self.sums}
        return {name: sum(t.numel() * t.element_size() for t in tensors) for name, tensors in parts.items()}

    @property
    def capacity(self) -> int:
        """Slots."""
        return self.keys.shape[2]

    def settle(
        self, encoder: KernelEncoder | None, start: Int[Tensor, " b"], *, tail: bool, known: int, length: int
    ) -> None:
        """Bring everything up to date with ``length`` slots, of which the first ``known`` were, for this start."""
        held = None if self.encoder is None else self.encoder.digest
        if encoder is not None and (held != encoder.digest or tail != bool(self.sums.tokens.numel())):
            self._allocate(encoder, tail)
            known = 0
        if known == 0 or not torch.equal(start, self.start):
            self.start.copy_(start)
            self._forget_sums()
        if encoder is None:
            return
        if known < length:
            encoder.write(self.keys, self.packed, known, length)
        self._cover(covered_tokens(length - self.start))

    def crop(self, tokens: int) -> None:
        """Keep the first ``tokens`` slots: what the sums hold of the others is subtracted."""
        self._cover(covered_tokens((tokens - self.start).clamp(min=0)))

    def reorder(self, order: Int[Tensor, " b"]) -> None:
        """Put sequence ``order[i]`` at place i, K and V included."""
        for tensor in (self.keys, self.values, self.start, self.packed, *self.sums):
            if tensor.numel():
                tensor.copy_(tensor.index_select(0, order))

    def reset(self) -> None:
        """Forget every token; the first valid slots are 0 again."""
        self.start.zero_()
        self._forget_sums()

    def _allocate(self, encoder: KernelEncoder, tail: bool) -> None:
        self.encoder = encoder
        with torch.inference_mode(False):
            self.packed = fixed(encoder.buffer(len(self.keys), self.capacity))
            sums = no_sums(self.keys, encoder) if tail else self._without_tail()
            self.sums = TailSums(*(fixed(tensor) for tensor in sums))

    def _without_tail(self) -> TailSums:
        return TailSums(*(torch.empty(0, device=self.keys.device) for _ in TailSums._fields))

    def _forget_sums(self) -> None:
        for tensor in self.sums:
            tensor.zero_()

    def _cover(self, target: Int[Tensor, " b"]) -> None:
        """Bring the sums to the first ``target`` tokens of each sequence, adding or subtracting what is between."""
        if not self.sums.tokens.numel():
            return
        held, wanted = self.start + self.sums.tokens[:, 0].long(), self.start + target
        first, last = int(torch.minimum(held, wanted).min()), int(torch.maximum(held, wanted).max())
        for begin in range(first, last, _ABSORBED_AT_ONCE):
            span = slice(begin, min(begin + _ABSORBED_AT_ONCE, last))
            slots = torch.arange(span.start, span.stop, device=self.keys.device)
            added = (slots >= held[:, None]) & (slots < wanted[:, None])
            change = added.int() - ((slots >= wanted[:, None]) & (slots < held[:, None])).int()
            sums = changed_sums(self.encoder, self.keys[:, :, span], self.values[:, :, span], change, self.sums)
            for ours, new in zip(self.sums, sums, strict=True):
                if ours is not new:
                    ours.copy_(new)
