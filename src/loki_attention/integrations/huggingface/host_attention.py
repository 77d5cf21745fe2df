"""Attention of an attached model's layers where the host decides: all over caches that grow, and prompts over static ones."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loki_attention.errors import LokiWarning
from loki_attention.integrations.huggingface.forward import Forward, dense_step
from loki_attention.integrations.huggingface.interception import original_attention, softmax_of
from loki_attention.integrations.huggingface.monitor import Monitor
from loki_attention.integrations.huggingface.parallel import local_heads
from loki_attention.integrations.huggingface.report import Tally
from loki_attention.integrations.huggingface.settings import LayerPlan, Settings
from loki_attention.integrations.huggingface.sparse_rows import SparseRows, Tensors, attend_sparse_rows
from loki_attention.integrations.huggingface.static_prompt import StaticPrompt
from loki_attention.integrations.huggingface.static_step import StaticForward
from loki_attention.integrations.huggingface.watching import follow, show_dense_rows
from loki_attention.methods import Method, WatchingMethod

_LENGTH_MARGIN = 1.5
Trace = list[dict[int, Tensor]]


class HostAttention:
    """What answers for the layers of an attachment, and what it noted: tallies, a trace, a monitor's checks.

    ``forward`` is the one that runs, None between forwards; or else ``step``, of which graphs hold all.
    """

    def __init__(self, plans: Mapping[int, LayerPlan], settings: Settings, original: str) -> None:
        self.tallies = {layer: Tally() for layer in plans}
        self.trace: Trace | None = None
        self.forward: Forward | StaticPrompt | None = None
        self.step: StaticForward | None = None
        self._warned_of_length = False
        sparse = sorted(layer for layer, plan in plans.items() if plan.method is not None)
        self.monitor = Monitor(settings.monitor, sparse) if settings.monitor is not None and sparse else None
        self._plans, self._settings, self._name = dict(plans), settings, original
        self._methods: dict[tuple[int, torch.device, torch.dtype], Method] = {}

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """A layer's attention (B, T, H, D) and no weights, as transformers wants it."""
        assert self.forward is not None
        self.forward.called.add(module.layer_idx)
        tensors = (query, key, value, attention_mask)
        if isinstance(self.forward, StaticPrompt):
            return self._over_static(self.forward, module, *tensors, **kwargs), None
        return self._over_growing(self.forward, module, *tensors, **kwargs), None

    def _over_static(
        self, forward: StaticPrompt, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Tensor:
        """Over a static cache: a dense prompt, or a first decode step."""
        self._warn_if_too_long(forward.length)
        step = forward.settle(module, query, mask, self._method(module, query, key))
        if step is not None:
            return step(module, query, key, value, mask, **kwargs)[0]
        layer: int = module.layer_idx
        self.tallies[layer].dense_steps[self._plans[layer].reason or "prefill"] += 1
        return self._original(module, query, key, value, mask, **kwargs)

    def _over_growing(
        self, forward: Forward, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> Tensor:
        """Over a cache that grows, or over none."""
        layer: int = module.layer_idx
        self._warn_if_too_long(key.shape[2])
        scale, softmax = float(kwargs["scaling"]), softmax_of(kwargs)
        tensors = Tensors(query, key, value, mask, scale, forward.store(layer), softmax)
        method = self._method(module, query, key)
        if isinstance(method, WatchingMethod):
            tensors = follow(tensors, method, forward, in_prompt=forward.in_prompt)
        found = self._sparse_rows(forward, layer, tensors, method)
        if isinstance(method, WatchingMethod):
            show_dense_rows(tensors, method, forward.rows(tensors), found)

        def dense() -> Tensor:
            if self._settings.backend.name != "torch" and query.shape[2] == 1:
                return dense_step(tensors, forward.rows(tensors), self._settings.backend.name)
            return self._original(module, query, key, value, mask, **kwargs)

        if method is None or isinstance(found, str):
            self.tallies[layer].dense_steps[str(found)] += 1
            return dense()
        checked = self.monitor is not None and query.shape[2] == 1 and self.monitor.is_due(layer)
        answer = attend_sparse_rows(tensors, method, found, wants_indices=checked or self.trace is not None)
        self.tallies[layer].add_step(method, tensors, found, answer)
        self._note(layer, found, answer.indices, query.shape[2])
        if self.monitor is not None and checked:
            self.monitor.check(layer, tensors, found, answer, dense().transpose(1, 2))
        sparse = answer.output.transpose(1, 2)
        if found.start == 0 and found.all_active:
            return sparse
        output = dense()
        chosen = torch.where(found.active[..., None, None], sparse, output[:, found.start :])
        return torch.cat([output[:, : found.start], chosen], dim=1)

    def _original(self, module: Any, *tensors: Any, **kwargs: Any) -> Tensor:
        """The dense attention that the module would have used, (B, T, H, D)."""
        return original_attention(module, self._name)(module, *tensors, **kwargs)[0]

    def _sparse_rows(self, forward: Forward, layer: int, tensors: Tensors, method: Method | None) -> SparseRows | str:
        """The forward's sparse rows at a layer, or the reason why it is dense."""
        if method is None:
            return self._plans[layer].reason
        if self.monitor is not None and self.monitor.gone_dense(layer):
            return "kept too little mass"
        if forward.in_prompt or (tensors.query.shape[2] > 1 and not forward.ruled):
            return "prefill"
        return forward.sparse_rows(tensors, method)

    def _method(self, module: Any, query: Tensor, keys: Tensor) -> Method | None:
        """The layer's method with its encoder on the query's device, for the heads that this process sees."""
        method = self._plans[module.layer_idx].method
        if method is None or method.encoder is None:
            return method
        key = (module.layer_idx, query.device, query.dtype)
        if key not in self._methods:
            heads = local_heads(module, len(method.encoder.mean), seen=keys.shape[1])
            self._methods[key] = method.on(query.device, query.dtype, heads, backend=self._settings.backend.name)
        return self._methods[key]

    def _note(self, layer: int, found: SparseRows, indices: Tensor | None, rows: int) -> None:
        if self.trace is None or indices is None:
            return
        shown = torch.full((*indices.shape[:2], rows, indices.shape[3]), -1, device=indices.device)
        shown[:, :, found.start :] = torch.where(found.active[:, None, :, None], indices, -1)
        self.trace[-1][layer] = shown

    def _warn_if_too_long(self, tokens: int) -> None:
        calibrated = self._settings.calibrated_length
        if calibrated is None or self._warned_of_length or tokens <= _LENGTH_MARGIN * calibrated:
            return
        self._warned_of_length = True
        warnings.warn(
            f"the context has {tokens} tokens, the basis was calibrated on windows of {calibrated}; beyond "
            f"{_LENGTH_MARGIN}x a basis loses accuracy: calibrate at the length you serve",
            LokiWarning,
            stacklevel=2,
        )
