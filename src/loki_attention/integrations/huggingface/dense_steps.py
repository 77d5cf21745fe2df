"""What a forward's layers share while it runs: the rows that its mask shows, and dense decode on native kernels."""

import torch
from torch import Tensor

from loki_attention.integrations.huggingface.masks import rows_of
from loki_attention.integrations.huggingface.sparse_rows import Tensors
from loki_attention.kernels import native
from loki_attention.kernels.rows import Rows


class ForwardRows:
    """The rows of a forward, worked out once for all layers that get the same mask."""

    def __init__(self) -> None:
        self._known: tuple[Tensor | None, torch.Size, int, Rows] | None = None

    def __call__(self, tensors: Tensors) -> Rows:
        """What each query row of a layer sees."""
        query, slots = tensors.query, tensors.keys.shape[2]
        if self._known is not None:
            mask, shape, held, rows = self._known
            if mask is tensors.mask and shape == query.shape and held == slots:
                return rows
        rows = rows_of(tensors.mask, len(query), query.shape[2], slots, query.device)
        self._known = (tensors.mask, query.shape, slots, rows)
        return rows

    def forget(self) -> None:
        """Start another forward."""
        self._known = None


def dense_native_step(tensors: Tensors, rows: Rows) -> Tensor:
    """Dense attention of one new token a sequence, (B, 1, H, D) as transformers wants it."""
    output = native.dense_decode(
        tensors.query,
        tensors.keys,
        tensors.values,
        rows.span or rows,
        tensors.scale,
        soft_cap=tensors.softmax.softcap,
        learned_sinks=tensors.softmax.sink_logits,
    )
    return output.transpose(1, 2)
