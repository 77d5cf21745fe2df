"""FlashInfer's decode attention over a benchmark's layers, where it is installed; no page table is shared with anything."""

import importlib
from typing import Any

import torch
from torch import Tensor

from loki_attention.benchmarking.gpu_layers import GpuLayer
from loki_attention.benchmarking.layers import Case
from loki_attention.errors import ArgumentError

_WORKSPACE_BYTES = 128 << 20
_PAGE = 16


class FlashInferDecode:
    """Its batch decode over layers of a case in pages of 16 tokens, as servers have them, so that it may split sequences.

    A key head of a sequence counts as a sequence of its own with one key head: contiguous keys (B, Hkv, S, D) are pages
    (B Hkv S / 16, 1, 16, D) then, its layout "HND", and nothing is copied. Planned at the first call, on the host: lengths
    do not change, and what follows can be captured. Raises ``ArgumentError`` for tokens that do not fill their pages.
    """

    def __init__(self, case: Case, *, tensor_cores: bool) -> None:
        self._case, self._tensor_cores = case, tensor_cores
        self._planned: Any = None

    def __call__(self, layer: GpuLayer) -> Tensor:
        """The layer's attention output (B, H, 1, D)."""
        if self._planned is None:
            self._planned = self._plan(layer)
        dim = self._case.heads.head_dim
        query = layer.query.view(-1, self._case.heads.group, dim)
        pages = tuple(tensor.view(-1, 1, _PAGE, dim) for tensor in (layer.keys, layer.values))
        output: Tensor = self._planned.run(query, pages)
        return output.view_as(layer.query)

    def _plan(self, layer: GpuLayer) -> Any:
        case, device, dtype = self._case, layer.keys.device, layer.keys.dtype
        if case.tokens % _PAGE:
            raise ArgumentError(f"{case.tokens} tokens do not fill pages of {_PAGE}; give a multiple")
        space = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        kind: Any = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
        wrapper = kind(space, "HND", use_tensor_cores=self._tensor_cores)
        rows, pages = case.batch * case.heads.kv_heads, case.tokens // _PAGE
        ends = pages * torch.arange(rows + 1, dtype=torch.int32, device=device)
        table = torch.arange(rows * pages, dtype=torch.int32, device=device)
        last = torch.full((rows,), _PAGE, dtype=torch.int32, device=device)
        wrapper.plan(
            ends, table, last, case.heads.group, 1, case.heads.head_dim, _PAGE, q_data_type=dtype, kv_data_type=dtype,
            sm_scale=case.scale,
        )  # fmt: skip
        return wrapper
