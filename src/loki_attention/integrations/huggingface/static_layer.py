"""``StaticTwins`` in the clothes of a transformers cache layer, and the swap of a static cache's layers for ours."""

from collections.abc import Collection

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from loki_attention.errors import ModelError
from loki_attention.static_cache import KernelEncoder, StaticTwins


class TwinnedStaticLayer(StaticLayer):
    """A ``StaticLayer`` with low-rank keys and the tail's sums beside its buffers, at addresses that never change.

    ``owner`` is the attachment that keeps them up to date, 0 for none. Detached, it goes on as a plain static layer.
    """

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.twins: StaticTwins | None = None
        self.owner = 0

    @classmethod
    def adopt(cls, layer: StaticLayer) -> "TwinnedStaticLayer":
        """A layer of ours in the very buffers of ``layer``."""
        ours = cls(layer.max_cache_len)
        ours.__dict__.update(layer.__dict__)
        return ours

    def settle(self, encoder: KernelEncoder | None, start: Tensor, *, tail: bool, known: int, length: int) -> None:
        """Bring low-rank keys and sums up to date with ``length`` slots, of which the first ``known`` were."""
        if self.twins is None or self.twins.keys is not self.keys:
            self.twins = StaticTwins(self.keys, self.values)
        self.twins.settle(encoder, start, tail=tail, known=known, length=length)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive count is the length to keep (older transformers)."""
        length, count = int(self.cumulative_length), int(tokens_to_remove)
        keep = count if count > 0 else length + count
        if keep < length:
            self.cumulative_length.fill_(max(keep, 0))
            if self.twins is not None:
                self.twins.crop(max(keep, 0))

    def reset(self) -> None:
        """Forget every token."""
        super().reset()
        if self.twins is not None:
            self.twins.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search, in place: K, V, low-rank keys and sums."""
        if self.twins is not None:
            self.twins.reorder(beam_idx.to(self.keys.device))
        else:
            super().reorder_cache(beam_idx)


def own_static_layers(cache: Cache, wanted: Collection[int]) -> None:
    """Make the ``wanted`` layers of a static cache ours, in place; others stay theirs.

    Raises ``ModelError`` for a cache that moves its layers off the device, or was made for another model.
    """
    if getattr(cache, "offloading", False):
        raise ModelError(
            "an offloaded StaticCache cannot carry low-rank keys; pass a plain StaticCache or DynamicCache"
        )
    for i in wanted:
        layer = cache.layers[i] if i < len(cache.layers) else None
        if type(layer) is StaticLayer:
            cache.layers[i] = TwinnedStaticLayer.adopt(layer)
        elif not isinstance(layer, TwinnedStaticLayer):
            raise ModelError(
                f"layer {i} has full attention, the cache keeps it as {type(layer).__name__}; pass a cache made for "
                "this model: StaticCache(config=model.config, max_cache_len=...)"
            )


def static_length(cache: StaticCache, layer: int) -> int:
    """How many slots of the cache are in use; waits for the device."""
    return int(torch.as_tensor(cache.layers[layer].get_seq_length()))
