"""The handle of an attached model: hooks in, row rules, traces, report, hooks out."""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from loki_attention.core.spec import layer_kinds
from loki_attention.errors import ArgumentError, LokiWarning, ModelError
from loki_attention.integrations.huggingface.cache_layer import own_layers, store_of
from loki_attention.integrations.huggingface.families import attention_modules, decoder_of, text_config
from loki_attention.integrations.huggingface.forward import Forward, dense_step
from loki_attention.integrations.huggingface.generate_watch import GenerateWatch
from loki_attention.integrations.huggingface.interception import (
    WEIGHTS_WANTED,
    Redirection,
    original_attention,
    softmax_of,
)
from loki_attention.integrations.huggingface.monitor import Monitor
from loki_attention.integrations.huggingface.parallel import local_heads
from loki_attention.integrations.huggingface.report import LayerReport, Memory, Report, Tally
from loki_attention.integrations.huggingface.settings import LayerPlan, Settings
from loki_attention.integrations.huggingface.sparse_rows import (
    RowRule,
    SparseRows,
    Tensors,
    attend_sparse_rows,
)
from loki_attention.integrations.huggingface.watching import follow, show_dense_rows
from loki_attention.methods import Method, WatchingMethod

_LENGTH_MARGIN = 1.5
Trace = list[dict[int, Tensor]]
_CACHE: ContextVar[Cache | None] = ContextVar("loki_attention_cache", default=None)


class Attached:
    """A model whose decode steps run a sparse method. Made by :func:`attach`; a context manager that detaches.

    Calls of the model and of ``generate`` need no further argument. Not for training.
    """

    def __init__(self, model: PreTrainedModel, plans: Mapping[int, LayerPlan], settings: Settings) -> None:
        self._model, self._plans, self._settings = model, dict(plans), settings
        self._rule: RowRule | None = None
        self._trace: Trace | None = None
        self._warned_of_length = False
        self._tallies = {layer: Tally() for layer in plans}
        self._memory, self._peak_bytes = Memory(), 0
        sparse = sorted(layer for layer, plan in plans.items() if plan.method is not None)
        self._monitor = Monitor(settings.monitor, sparse) if settings.monitor is not None and sparse else None
        self._forward = Forward(None, 0)
        self._methods: dict[tuple[int, torch.device, torch.dtype], Method] = {}
        outside = torch.compiler.disable
        self._redirection: Redirection | None = Redirection(model, attention_modules(model), self._attention)
        decoder = decoder_of(model)
        self._hooks = [
            decoder.register_forward_pre_hook(outside(self._before_forward), with_kwargs=True),
            decoder.register_forward_hook(outside(self._after_forward), always_call=True),
        ]
        self._generate = GenerateWatch(model, lambda cache, tokens: own_layers(cache, self._running, tokens))

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @property
    def active(self) -> bool:
        """Whether the model is still attached."""
        return self._redirection is not None

    def detach(self) -> None:
        """Give the model back as it was; caches go on as plain ones. Detaching twice does nothing.

        Warns where forwards ran and every one of them was dense (unless an error is on its way).
        """
        if self._redirection is None:
            return
        self._redirection.undo()
        self._redirection = None
        for hook in self._hooks:
            hook.remove()
        self._generate.undo()
        if sys.exc_info()[0] is None:
            self._warn_if_idle()

    @contextmanager
    def continuation(self, prompt_tokens: int | Tensor) -> Iterator[None]:
        """Within the block, rows of many-row forwards from position ``prompt_tokens`` on select as decode would.

        Positions count a sequence's own valid tokens, cached ones included; an int, or a LongTensor (B,).
        """
        lengths = torch.as_tensor(prompt_tokens)
        if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.dim() > 1 or bool((lengths < 0).any()):
            raise ArgumentError(f"prompt_tokens must be an int or a LongTensor (B,), at least 0; got {prompt_tokens!r}")
        with self._ruled(RowRule(prompt_tokens=prompt_tokens)):
            yield

    @contextmanager
    def paper_rows(self) -> Iterator[None]:
        """Within the block, every row of a many-row forward is sparse with one K, that of the whole window.

        The protocol of the paper's perplexity tables: early rows, up to K tokens, are dense. Raises ``ArgumentError``
        for a method that needs a prompt.
        """
        methods = [plan.method for plan in self._plans.values()]
        if any(isinstance(method, WatchingMethod) and not method.serves_paper_rows for method in methods):
            raise ArgumentError(
                f"method {self._settings.method!r} selects by the end of a prompt, and under paper_rows() there is none; use "
                "continuation(prompt_tokens)"
            )
        with self._ruled(RowRule(whole_window=True)):
            yield

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Within the block, record what every forward attends: one dict a forward, layer to (B, sets, rows, K).

        Entries are cache slots, ascending, -1 padded; a dense row is all -1, a dense layer absent.
        """
        before, self._trace = self._trace, []
        try:
            yield self._trace
        finally:
            self._trace = before

    @property
    def methods(self) -> dict[int, Method]:
        """The methods of the layers that may be sparse, by layer."""
        return {layer: plan.method for layer, plan in sorted(self._plans.items()) if plan.method is not None}

    def report(self) -> Report:
        """What the attached model did so far."""
        settings, kinds = self._settings, layer_kinds(text_config(self._model))
        layers = tuple(
            LayerReport.of(i, self._tallies[i], sparse=plan.method is not None, reason=plan.reason)
            for i, plan in sorted(self._plans.items())
        )
        return Report(
            method=settings.method,
            budget=settings.budget,
            planes=settings.planes,
            tail=settings.tail,
            simulated=settings.simulated,
            dense_below=settings.dense_below,
            backend=settings.backend,
            layers=layers,
            other_layers={i: kind for i, kind in enumerate(kinds) if i not in self._plans},
            monitor=self._monitor.report() if self._monitor is not None else None,
            memory=self._memory,
            peak_bytes=self._peak_bytes,
        )

    @property
    def _running(self) -> list[int]:
        """Our layers that a forward goes through: drafts by early exit end before the last."""
        depth = text_config(self._model).num_hidden_layers
        return [layer for layer in self._plans if layer < depth]

    @contextmanager
    def _ruled(self, rule: RowRule) -> Iterator[None]:
        before, self._rule = self._rule, rule
        try:
            yield
        finally:
            self._rule = before

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        config = text_config(self._model)
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if kwargs.get("output_attentions"):
            raise ModelError(WEIGHTS_WANTED)
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self._model.parameters()):
            raise ModelError(
                "an attached model has no gradients; call it under torch.inference_mode() (generate does), or detach to train"
            )
        if cache is None and (config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=config)
        if cache is not None:
            own_layers(cache, self._running)
            kwargs["past_key_values"] = cache
        _CACHE.set(cache)
        self._forward = Forward(self._rule, self._settings.dense_below)
        if self._trace is not None:
            self._trace.append({})
        return args, kwargs

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        stores = (store_of(_CACHE.get(), layer) for layer in self._plans)
        self._memory = Memory.of(store for store in stores if store is not None)
        self._peak_bytes = max(self._peak_bytes, self._memory.total)
        _CACHE.set(None)
        missed = sorted(set(self._running) - self._forward.called)
        if output is not None and missed:
            raise ModelError(
                f"attention of layers {missed} did not go through the attached method; detach and report it"
            )

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer: int = module.layer_idx
        self._forward.called.add(layer)
        store = store_of(_CACHE.get(), layer)
        self._warn_if_too_long(key.shape[2])
        tensors = Tensors(query, key, value, attention_mask, float(kwargs["scaling"]), store, softmax_of(kwargs))
        method = self._method(module, query, key)
        if isinstance(method, WatchingMethod):
            tensors = follow(tensors, method, self._forward, in_prompt=self._generate.in_prompt)
        found = self._sparse_rows(layer, tensors, method)
        if isinstance(method, WatchingMethod):
            show_dense_rows(tensors, method, self._forward.rows(tensors), found)

        def dense() -> Tensor:
            if self._settings.backend.name != "torch" and query.shape[2] == 1:
                return dense_step(tensors, self._forward.rows(tensors), self._settings.backend.name)
            assert self._redirection is not None
            original = original_attention(module, self._redirection.original)
            return original(module, query, key, value, attention_mask, **kwargs)[0]

        if method is None or isinstance(found, str):
            self._tallies[layer].dense_steps[str(found)] += 1
            return dense(), None
        checked = self._monitor is not None and query.shape[2] == 1 and self._monitor.is_due(layer)
        answer = attend_sparse_rows(tensors, method, found, wants_indices=checked or self._trace is not None)
        self._tallies[layer].add_step(method, tensors, found, answer)
        self._note(layer, found, answer.indices, query.shape[2])
        if self._monitor is not None and checked:
            self._monitor.check(layer, tensors, found, answer, dense().transpose(1, 2))
        sparse = answer.output.transpose(1, 2)
        if found.start == 0 and found.all_active:
            return sparse, None
        output = dense()
        chosen = torch.where(found.active[..., None, None], sparse, output[:, found.start :])
        return torch.cat([output[:, : found.start], chosen], dim=1), None

    def _sparse_rows(self, layer: int, tensors: Tensors, method: Method | None) -> SparseRows | str:
        """The forward's sparse rows at a layer, or the reason why it is dense."""
        if method is None:
            return self._plans[layer].reason
        if self._monitor is not None and self._monitor.gone_dense(layer):
            return "kept too little mass"
        if self._generate.in_prompt or (tensors.query.shape[2] > 1 and self._rule is None):
            return "prefill"
        return self._forward.sparse_rows(tensors, method)

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
        if self._trace is None or indices is None:
            return
        shown = torch.full((*indices.shape[:2], rows, indices.shape[3]), -1, device=indices.device)
        shown[:, :, found.start :] = torch.where(found.active[:, None, :, None], indices, -1)
        self._trace[-1][layer] = shown

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

    def _warn_if_idle(self) -> None:
        tallies = [self._tallies[layer] for layer, plan in self._plans.items() if plan.method is not None]
        reasons = sorted({reason for tally in tallies for reason in tally.dense_steps})
        if reasons and not any(tally.sparse_steps for tally in tallies):
            warnings.warn(f"every step stayed dense: {'; '.join(reasons)}", LokiWarning, stacklevel=3)
