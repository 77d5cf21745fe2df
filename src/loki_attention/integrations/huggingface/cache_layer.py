"""``LayerCache`` in the clothes of a transformers cache layer, and the swap of a cache's layers for ours, in place."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache

from loki_attention.cache import LayerCache
from loki_attention.errors import ModelError
from loki_attention.integrations.huggingface.static_layer import own_static_layers


class PreallocatedLayer(DynamicLayer):
    """A ``DynamicLayer`` that writes into preallocated buffers instead of concatenating.

    ``store`` holds K, V and what methods derive from them. Detached, it goes on as a plain cache layer.
    """

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.store = LayerCache(capacity)

    @classmethod
    def adopt(cls, layer: DynamicLayer, capacity: int = 0) -> "PreallocatedLayer":
        """A layer of ours with the tokens of ``layer``."""
        ours = cls(capacity)
        if layer.get_seq_length():
            ours.update(layer.keys, layer.values)
        return ours

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note dtype and device; buffers come with the first update."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # Lengths change at every call: within a graph each would be a reason to compile anew.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens; returns views of all cached keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.store.append(key_states, value_states)
        self._show()
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens cached."""
        return self.store.length

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last ``-tokens_to_remove`` tokens; a positive count is the length to keep (older transformers)."""
        count = int(tokens_to_remove)
        keep = count if count > 0 else self.store.length + count
        if keep < self.store.length:
            self.store.crop(max(keep, 0))
            self._show()

    def reset(self) -> None:
        """Forget every token."""
        self.store.reset()
        self.keys = self.values = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search: K, V, twins and sums."""
        self._select(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        self._select(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the sequences at ``indices``."""
        self._select(lambda tensor: tensor[indices, ...])

    def _select(self, pick: Callable[[Tensor], Tensor]) -> None:
        self.store.select_batch(pick)
        self._show()

    def _show(self) -> None:
        """Show the views under the names that transformers reads."""
        self.__dict__.update(keys=self.store.keys, values=self.store.values)


def own_layers(cache: Cache, wanted: Collection[int], capacity: int = 0) -> None:
    """Make the ``wanted`` layers of ``cache`` ours, in place; ``capacity`` tokens are reserved. Others stay theirs.

    Only a ``DynamicCache`` or ``StaticCache`` that keeps its layers on the device can carry low-rank keys; others raise
    ``ModelError``.
    """
    if isinstance(cache, StaticCache):
        own_static_layers(cache, wanted)
        return
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        kind = f"an offloaded {type(cache).__name__}" if isinstance(cache, DynamicCache) else type(cache).__name__
        raise ModelError(f"{kind} cannot carry low-rank keys; pass a plain DynamicCache, or none")
    while len(cache.layers) <= max(wanted) and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.append(DynamicLayer())
    for i in wanted:
        layer = cache.layers[i] if i < len(cache.layers) else None
        if type(layer) is DynamicLayer:
            cache.layers[i] = PreallocatedLayer.adopt(layer, capacity)
        elif isinstance(layer, PreallocatedLayer):
            layer.store.wanted_capacity = max(layer.store.wanted_capacity, capacity)
        else:
            raise ModelError(
                f"layer {i} has full attention, the cache keeps it as {type(layer).__name__}; pass a cache made for "
                "this model: DynamicCache(config=model.config)"
            )


def store_of(cache: Cache | None, layer: int) -> LayerCache | None:
    """The layer's store in a cache of ours, None without a cache or where the layer is not ours."""
    if cache is None or layer >= len(cache.layers):
        return None
    ours = cache.layers[layer]
    return ours.store if isinstance(ours, PreallocatedLayer) else None
