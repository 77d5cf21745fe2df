"""What a forward's layers share while it runs, and dense decode on the backend's kernels."""

from collections.abc import Callable

import torch
from torch import Tensor

from loki_attention.core.budget import Budget
from loki_attention.integrations.huggingface.masks import own_slots, rows_of
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
    """What the layers of one forward have in common, worked out for the first of them that asks."""

    def __init__(self, rule: RowRule | None, dense_below: int) -> None:
        self.called: set[int] = set()
        self._rule, self._dense_below = rule, dense_below
        self._seen: tuple[Tensor | None, torch.Size, int, torch.device] | None = None
        self._rows: Rows | None = None
        self._found: dict[Budget, SparseRows | str] = {}

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
