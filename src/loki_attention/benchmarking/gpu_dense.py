"""Dense decode attention on a GPU: torch's forms, FlashInfer's and ours. A rival that cannot be timed says why.

It must run, be captured in a CUDA graph and be right; what this GPU, shape or version of torch lacks is no failure of ours.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from loki_attention.benchmarking.flashinfer_decode import FlashInferDecode
from loki_attention.benchmarking.gpu_layers import GpuLayer
from loki_attention.benchmarking.gpu_reference import dense_reference, error_of, line_of
from loki_attention.benchmarking.layers import Case
from loki_attention.benchmarking.providers import LeftOut
from loki_attention.kernels.gpu_clock import prepared
from loki_attention.kernels.triton import launch
from loki_attention.kernels.triton.workspace import Needs, Workspace
from loki_attention.results import Setting

OUR_DENSE = "dense (ours)"
_Attempt = Callable[[GpuLayer], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A provider: a call for each copy of the layer, the cache bytes that it reads, and its first output's error."""

    name: str
    kind: str
    calls: Sequence[Callable[[], Tensor]]
    read_bytes: int
    error: float | None = None
    kept_mass: float | None = None
    config: dict[str, Setting] = field(default_factory=dict)


def dense_providers(case: Case, copies: Sequence[GpuLayer], *, flex: bool) -> tuple[list[Timed], list[LeftOut]]:
    """Ours, which raises where it fails, and every rival that can be timed."""
    expected, space = dense_reference(copies[0], case.scale), space_for(case, copies[0])
    made: list[Timed] = []
    attempts, left_out = _rivals(case, flex=flex)

    def ours(layer: GpuLayer) -> Tensor:
        out = torch.empty_like(layer.query)
        return launch.dense_decode(*layer[:3], layer.visible, case.scale, workspace=space, out=out)

    for name, attempt in {**attempts, OUR_DENSE: ours}.items():
        calls = [partial(attempt, layer) for layer in copies]
        try:
            found = attempt(copies[0])
            prepared(calls, found.device)
        except Exception as error:
            if name == OUR_DENSE:
                raise
            left_out.append(LeftOut(name, line_of(error)))
            continue
        made.append(Timed(name=name, kind="dense", calls=calls, read_bytes=case.kv_bytes,
                          error=error_of(found, expected), kept_mass=1.0))  # fmt: skip
    return made, left_out


def space_for(case: Case, layer: GpuLayer, rank: int = 4) -> Workspace:
    """Where our kernels work on a case."""
    rows, slots = case.batch * case.heads.kv_heads, max(4096, 1 << (case.tokens - 1).bit_length())
    needs = Needs(rows=rows, group=case.heads.group, dim=case.heads.head_dim, rank=rank, slots=slots,
                  chunks=slots // 512, splits=64)  # fmt: skip
    return Workspace(needs, layer.keys.device)


def _rivals(case: Case, *, flex: bool) -> tuple[dict[str, _Attempt], list[LeftOut]]:
    group, kv_heads = case.heads.group, case.heads.kv_heads

    def packed(layer: GpuLayer) -> Tensor:
        query = layer.query.view(case.batch, kv_heads, group, -1)
        return scaled_dot_product_attention(query, layer.keys, layer.values, scale=case.scale).view_as(layer.query)

    def plain(layer: GpuLayer) -> Tensor:
        return scaled_dot_product_attention(*layer[:3], scale=case.scale, enable_gqa=group > 1)

    attempts: dict[str, _Attempt] = {"sdpa": plain}
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    for name, backend in backends.items():
        attempts[f"sdpa, {name}"] = partial(_within, backend, plain)
        attempts[f"sdpa, {name}, packed"] = partial(_within, backend, packed)
    left_out = list[LeftOut]()
    if flex:
        attempts["flex attention"] = partial(_flex, case)
    else:
        left_out.append(LeftOut("flex attention", "not compiled in this turn"))
    if importlib.util.find_spec("flashinfer") is None:
        return attempts, [*left_out, LeftOut("flashinfer", "not installed")]
    attempts["flashinfer"] = FlashInferDecode(case, tensor_cores=False)
    attempts["flashinfer, tensor cores"] = FlashInferDecode(case, tensor_cores=True)
    return attempts, left_out


def _within(backend: SDPBackend, attempt: _Attempt, layer: GpuLayer) -> Tensor:
    with sdpa_kernel(backend):
        return attempt(layer)


def _flex(case: Case, layer: GpuLayer) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return compiled(*layer[:3], scale=case.scale, enable_gqa=case.heads.group > 1)
