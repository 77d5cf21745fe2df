"""The handle of an attached model: hooks in, which kind of forward runs, row rules, traces, report, hooks out."""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from loki_attention.core.spec import layer_kinds
from loki_attention.errors import ArgumentError, LokiWarning, ModelError
from loki_attention.integrations.huggingface.cache_layer import own_layers
from loki_attention.integrations.huggingface.families import attention_modules, decoder_of, text_config
from loki_attention.integrations.huggingface.forward import Forward
from loki_attention.integrations.huggingface.generate_watch import GenerateWatch
from loki_attention.integrations.huggingface.host_attention import HostAttention, Trace
from loki_attention.integrations.huggingface.interception import WEIGHTS_WANTED, Redirection, original_name
from loki_attention.integrations.huggingface.report import LayerReport, Memory, Report
from loki_attention.integrations.huggingface.settings import LayerPlan, Settings
from loki_attention.integrations.huggingface.sparse_rows import RowRule
from loki_attention.integrations.huggingface.static_prompt import StaticPrompt, check_served
from loki_attention.integrations.huggingface.static_step import StaticForward, StaticSteps
from loki_attention.methods import Method, WatchingMethod


class Attached:
    """A model whose decode steps run a sparse method. Made by :func:`attach`; a context manager that detaches.

    Calls of the model and of ``generate`` need no further argument. Not for training.
    """

    def __init__(self, model: PreTrainedModel, plans: Mapping[int, LayerPlan], settings: Settings) -> None:
        self._model, self._plans, self._settings = model, dict(plans), settings
        self._rule: RowRule | None = None
        self._memory, self._memory_is_static, self._peak_bytes = Memory(), False, 0
        self._static: StaticSteps | None = None
        self._host = HostAttention(plans, settings, original_name(model))
        self._redirection: Redirection | None = Redirection(model, attention_modules(model), self._host)
        self._generate = GenerateWatch(model, lambda cache, tokens: own_layers(cache, self._running, tokens))
        # Graphs end where the host decides something.
        outside: Any = torch.compiler.disable
        self._begin, self._end = outside(self._begin_on_host), outside(self._end_on_host)
        decoder = decoder_of(model)
        self._hooks = [
            decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            decoder.register_forward_hook(self._after_forward, always_call=True),
        ]

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
        before, self._host.trace = self._host.trace, []
        try:
            yield self._host.trace
        finally:
            self._host.trace = before

    @property
    def methods(self) -> dict[int, Method]:
        """The methods of the layers that may be sparse, by layer."""
        return {layer: plan.method for layer, plan in sorted(self._plans.items()) if plan.method is not None}

    def report(self) -> Report:
        """What the attached model did so far.

        Raises ``ModelError`` where the mask of a decode step over a static cache showed other tokens than it attended.
        """
        settings, kinds = self._settings, layer_kinds(text_config(self._model))
        self._count_static_steps()
        layers = tuple(
            LayerReport.of(i, self._host.tallies[i], sparse=plan.method is not None, reason=plan.reason)
            for i, plan in sorted(self._plans.items())
        )
        return Report(
            method=settings.method,
            budget=settings.budget,
            planes=settings.planes,
            tail=settings.tail,
            simulated=settings.simulated,
            dense_below=settings.dense_below if self._static is None else settings.dense_below_static,
            backend=settings.backend,
            layers=layers,
            other_layers={i: kind for i, kind in enumerate(kinds) if i not in self._plans},
            monitor=self._host.monitor.report() if self._host.monitor is not None else None,
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
        cache, static = kwargs.get("past_key_values"), self._static
        if static is not None and self._runs_in_graphs(static, cache, args, kwargs):
            self._host.step = StaticForward(cache, static)
            return None
        return self._begin(args, kwargs)

    def _runs_in_graphs(self, static: StaticSteps, cache: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this is a decode step that leaves no decision to the host."""
        wishes = self._host.trace is not None or kwargs.get("output_attentions") or self._generate.in_prompt
        if wishes or torch.is_grad_enabled() or not isinstance(cache, StaticCache):
            return False
        return _new_tokens(args, kwargs) == 1 and static.serve(cache)

    def _begin_on_host(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        if isinstance(cache, StaticCache):
            self._host.forward = self._static_prompt(cache, _new_tokens(args, kwargs))
        else:
            in_prompt = self._generate.in_prompt
            self._host.forward = Forward(cache, self._rule, self._settings.dense_below, in_prompt=in_prompt)
        if self._host.trace is not None:
            self._host.trace.append({})
        return args, kwargs

    def _static_prompt(self, cache: StaticCache, rows: int) -> StaticPrompt:
        monitored, traced = self._host.monitor is not None, self._host.trace is not None
        check_served(self._plans, self._settings, monitored=monitored, traced=traced, ruled=self._rule is not None)
        if self._static is None:
            self._static = StaticSteps(self._plans, self._settings, original_name(self._model))
        self._count_static_steps()
        return StaticPrompt(cache, self._static, rows, decodes=rows == 1 and not self._generate.in_prompt)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        step, self._host.step = self._host.step, None
        if step is None:
            self._end(output)
        elif output is not None:
            step.finish()

    def _end_on_host(self, output: Any) -> None:
        forward, self._host.forward = self._host.forward, None
        if forward is None or output is None:
            return
        self._memory, self._memory_is_static = forward.memory(self._plans), isinstance(forward, StaticPrompt)
        self._peak_bytes = max(self._peak_bytes, self._memory.total)
        missed = sorted(set(self._running) - forward.called)
        if missed:
            raise ModelError(
                f"attention of layers {missed} did not go through the attached method; detach and report it"
            )
        if isinstance(forward, StaticPrompt):
            forward.finish()

    def _count_static_steps(self) -> None:
        """Take what steps over static caches counted on the device, and how full that of the last prompt is."""
        if self._static is None:
            return
        if self._memory_is_static:
            self._memory = self._memory._replace(used=self._static.used)
        self._static.tell(self._host.tallies)

    def _warn_if_idle(self) -> None:
        self._count_static_steps()
        tallies = [self._host.tallies[layer] for layer, plan in self._plans.items() if plan.method is not None]
        reasons = sorted({reason for tally in tallies for reason in tally.dense_steps})
        if reasons and not any(tally.sparse_steps for tally in tallies):
            warnings.warn(f"every step stayed dense: {'; '.join(reasons)}", LokiWarning, stacklevel=3)


def _new_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many tokens a sequence a forward of the decoder is given."""
    given = kwargs.get("inputs_embeds")
    if given is None:
        given = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
    return int(given.shape[1])
