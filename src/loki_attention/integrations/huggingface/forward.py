"""What a forward's layers share while it runs, and dense decode on the backend's kernels."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from loki_attention.cache import LayerCache
from loki_attention.core.budget import Budget
from loki_attention.integrations.huggingface.cache_layer import store_of
from loki_attention.integrations.huggingface.masks import own_slots, rows_of
from loki_attention.integrations.huggingface.report import Memory
from loki_attention.integrations.huggingface.sparse_rows import (
    RowRule,
    SparseRows,
    Tensors,
    decode_rows,
    find_sparse_rows,
)
from loki_attention.kernels import native
from loki_attention.kernels.rows import Rows
from loki_attention.methods import Method


class Forward:
    """What the layers of one forward have in common, worked out for the first of them that asks.

    ``in_prompt``: every row is of a prompt; its last chunk may be one row and yet no decode row.
    """

    def __init__(self, cache: Cache | None, rule: RowRule | None, dense_below: int, *, in_prompt: bool = False) -> None:
        self.called: set[int] = set()
        self.in_prompt = in_prompt
        self._cache = cache
        self._rule, self._dense_below = rule, dense_below
        self._seen: tuple[Tensor | None, torch.Size, int, torch.device] | None = None
        self._rows: Rows | None = None
        self._found: dict[Budget, SparseRows | str] = {}

    @property
    def ruled(self) -> bool:
        """Whether rows of a forward of many may be sparse."""
        return self._rule is not None

    def store(self, layer: int) -> LayerCache | None:
        """A layer's store in the forward's cache, None where it has none."""
        return store_of(self._cache, layer)

    def memory(self, layers: Iterable[int]) -> Memory:
        """What these layers of the forward's cache hold."""
        stores = (self.store(layer) for layer in layers)
        return Memory.of(store for store in stores if store is not None)

    def rows(self, tensors: Tensors) -> Rows:
        """What each query row of a layer sees."""
        query, slots = tensors.query, tensors.keys.shape[2]
        seen = (tensors.mask, query.shape, slots, query.device)
        known = self._seen is not None and self._seen[0] is seen[0] and self._seen[1:] == seen[1:]
        if self._rows is None or not known:
            self._rows = rows_of(tensors.mask, len(query), query.shape[2], slots, query.device)
            self._seen, self._found = seen, {}
        return self._rows

    def sparse_rows(self, tensors: Tensors, method: Method) -> SparseRows | str:
        """A layer's sparse rows, or the reason why it is dense throughout."""
        rows = self.rows(tensors)
        if method.budget not in self._found:
            self._found[method.budget] = find_sparse_rows(tensors, rows, method, self._rule, self._dense_below)
        return self._found[method.budget]

    def prompt_rows(self, tensors: Tensors) -> Tensor:
        """Which rows are of a prompt (B, T), padding apart."""
        rows = self.rows(tensors)
        return own_slots(rows) & ~decode_rows(rows, self._rule)


def dense_step(tensors: Tensors, rows: Rows, backend: str) -> Tensor:
    """Dense attention of one new token a sequence by the kernels of ``backend``, (B, 1, H, D) as transformers wants it."""
    output = _dense_decode(backend)(
        tensors.query,
        tensors.keys,
        tensors.values,
        rows.span or rows,
        tensors.scale,
        soft_cap=tensors.softmax.softcap,
        learned_sinks=tensors.softmax.sink_logits,
    )
    return output.transpose(1, 2)


def _dense_decode(backend: str) -> Callable[..., Tensor]:
    if backend == "native":
        return native.dense_decode
    from loki_attention.kernels.triton.launch import dense_decode

    return dense_decode
