"""FlashInfer's decode attention over a benchmark's layers, where it is installed; no page table is shared with anything."""

import importlib
from typing import Any

import torch
from torch import Tensor

from loki_attention.benchmarking.gpu_layers import GpuLayer
from loki_attention.benchmarking.layers import Case

_WORKSPACE_BYTES = 128 << 20


class FlashInferDecode:
    """Its batch decode over layers of a case, each sequence one page of all its slots, so that nothing is copied.

    Planned at the first call, on the host: lengths do not change, and what follows can be captured.
    """

    def __init__(self, case: Case, *, tensor_cores: bool) -> None:
        self._case, self._tensor_cores = case, tensor_cores
        self._planned: Any = None

    def __call__(self, layer: GpuLayer) -> Tensor:
        """The layer's attention output (B, H, 1, D)."""
        if self._planned is None:
            self._planned = self._plan(layer)
        output: Tensor = self._planned.run(layer.query[:, :, 0], (layer.keys, layer.values))
        return output[:, :, None]

    def _plan(self, layer: GpuLayer) -> Any:
        case, device, dtype = self._case, layer.keys.device, layer.keys.dtype
        heads, kv_heads, dim = case.heads
        space = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        kind: Any = importlib.import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
        wrapper = kind(space, "HND", use_tensor_cores=self._tensor_cores)
        ends = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
        lengths = torch.full((case.batch,), case.tokens, dtype=torch.int32, device=device)
        wrapper.plan(
            ends, ends[:-1], lengths, heads, kv_heads, dim, case.tokens, q_data_type=dtype, kv_data_type=dtype,
            sm_scale=case.scale,
        )  # fmt: skip
        return wrapper
