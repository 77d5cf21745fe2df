"""Decode steps over a static cache: no decision of the host, so that graphs hold the whole of them.

Lengths, budgets and counts lie on the device. What ``StaticForward`` does ``torch.compile`` traces and CUDA graphs capture;
``StaticSteps`` is the host's part: before the first of such steps, after every prompt, and for a report.
"""

from collections.abc import Mapping
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from loki_attention.core.budget import Budget
from loki_attention.core.encoder import ENCODER_TENSORS
from loki_attention.errors import ModelError
from loki_attention.integrations.huggingface.interception import original_attention, softmax_of
from loki_attention.integrations.huggingface.masks import seen_by
from loki_attention.integrations.huggingface.report import Tally
from loki_attention.integrations.huggingface.settings import LayerPlan, Settings
from loki_attention.integrations.huggingface.static_counts import StaticCounts
from loki_attention.integrations.huggingface.static_layer import TwinnedStaticLayer
from loki_attention.kernels.newest import newest_operator
from loki_attention.kernels.triton import availability
from loki_attention.methods import Method
from loki_attention.methods.loki import Loki
from loki_attention.static_cache import KernelEncoder, fixed

_OWNERS = count(1)


class Selecting(NamedTuple):
    """What a sparse layer's step is given beside the cache, the budget as its place among the attachment's."""

    method: Method
    kernels: KernelEncoder
    tensors: tuple[Tensor, ...]
    planes: str
    sinks: int
    recent: int
    tail: str
    budget: int


class Kernels(NamedTuple):
    """The newest token's step and the dense one; of the torch backend, which has neither, None."""

    newest: Any
    dense: Any


class Lengths(NamedTuple):
    """Where each sequence's tokens lie, how many they are, and K by each of the attachment's budgets; all (B,)."""

    start: Tensor
    stop: Tensor
    tokens: Tensor
    k: tuple[Tensor, ...]


class StaticSteps:
    """What all decode steps of an attachment over static caches share. ``owner`` marks the layers they keep up to date."""

    def __init__(self, plans: Mapping[int, LayerPlan], settings: Settings, original: str) -> None:
        self.original = original
        self.owner, self.dense_below, self.last = next(_OWNERS), settings.dense_below_static, max(plans)
        self._plans, self._sizes = dict(plans), dict[int, tuple[int, int, int]]()
        self._methods = [plan.method for plan in plans.values() if plan.method is not None]
        self.budgets = tuple(dict.fromkeys(method.budget for method in self._methods))
        self.selecting: dict[int, Selecting] = {}
        self.kernels = _kernels_of(settings.backend.name)
        self.counts: StaticCounts | None = None

    def serve(self, cache: Cache) -> bool:
        """Whether every layer of a static cache is up to date, by these steps."""
        layer = cache.layers[self.last] if self.last < len(cache.layers) else None
        return isinstance(layer, TwinnedStaticLayer) and layer.owner == self.owner

    def own(self, cache: Cache, length: int) -> None:
        """Keep every layer of a static cache up to date from here on, where ``length`` slots are in use."""
        self._mark(cache, self.owner)
        if self.counts is not None:
            self.counts.begin_at(length)

    def disown(self, cache: Cache) -> None:
        """Say that nobody keeps its layers up to date."""
        self._mark(cache, 0)

    @property
    def used(self) -> int:
        """Slots in use after the last step or prompt; waits for the device."""
        return 0 if self.counts is None else self.counts.used

    def _mark(self, cache: Cache, owner: int) -> None:
        for index in self._plans:
            cache.layers[index].owner = owner

    def settle(
        self, layer: TwinnedStaticLayer, index: int, method: Method | None, query: Tensor, start: Tensor, known: int,
        length: int,
    ) -> None:  # fmt: skip
        """Make a layer ready for decode steps: everything up to date with ``length`` slots, ``known`` of which were."""
        if self.counts is None:
            self.counts = StaticCounts(len(self._methods), len(self.budgets), query.device)
        kernels = None if method is None else self._select_by(index, method).kernels
        layer.settle(kernels, start, tail=method is not None and method.tail != "none", known=known, length=length)
        kv_heads, dim = layer.keys.shape[1], layer.keys.shape[3]
        self._sizes[index] = (kv_heads, query.shape[1] // kv_heads, dim * layer.keys.element_size())
        _reserve(kernels, query, layer.keys, layer.values, self.kernels)

    def tell(self, tallies: Mapping[int, Tally]) -> None:
        """Move what steps counted on the device into the layers' tallies.

        Raises ``ModelError`` where a step's mask showed other tokens than those it attended: they cannot look at it.
        """
        if self.counts is None:
            return
        counts = self.counts.take()
        kept = iter(counts.kept)
        for layer, plan in sorted(self._plans.items()):
            tally = tallies[layer]
            if not counts.forwards:
                break
            if plan.method is None:
                tally.dense_steps[plan.reason] += counts.forwards
            else:
                how, estimates = self.selecting[layer], next(kept)
                tally.add_steps(how.method, counts.steps[how.budget], self._sizes[layer])
                tally.kept.add_sums(*estimates)
        if counts.unlike:
            raise ModelError(
                f"the attention mask of {counts.unlike} decode steps over a static cache did not show all tokens from each "
                "sequence's first one on, and such steps attend just those; pass a DynamicCache for masks with holes"
            )

    def _select_by(self, index: int, method: Method) -> Selecting:
        known = self.selecting.get(index)
        if known is None or known.method is not method:
            assert isinstance(method, Loki) and method.kernels is not None and method.encoder is not None
            with torch.inference_mode(False):
                tensors = tuple(fixed(getattr(method.encoder, name).contiguous().clone()) for name in ENCODER_TENSORS)
            budget = self.budgets.index(method.budget)
            self.selecting[index] = Selecting(
                method, method.kernels, tensors, str(method.encoder.planes), *method.forced, method.tail, budget
            )
        return self.selecting[index]


class StaticForward:
    """One forward of one new token a sequence over layers that are up to date."""

    def __init__(self, cache: Cache, steps: StaticSteps) -> None:
        self._cache, self._steps = cache, steps
        self._lengths: Lengths | None = None
        self._unlike: Tensor | None = None
        self._kept: list[Tensor] = []

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """A layer's attention (B, 1, H, D), as transformers wants it."""
        steps, index, softmax, scale = self._steps, module.layer_idx, softmax_of(kwargs), kwargs["scaling"]
        lengths, how = self._lengths_at(index, attention_mask), steps.selecting.get(index)
        if how is None and steps.kernels.dense is None:
            original = original_attention(module, steps.original)
            return original(module, query, key, value, attention_mask, **kwargs)
        if how is None:
            spans = (lengths.start, lengths.stop, None, None)
            output = steps.kernels.dense(query, key, value, *spans, scale, softmax.softcap, softmax.sink_logits)
            return output.transpose(1, 2), None
        twins = self._cache.layers[index].twins
        output, kept = steps.kernels.newest(
            how.tensors, how.planes, query, key, value, twins.packed, lengths.start, lengths.stop, lengths.k[how.budget],
            scale, how.sinks, how.recent, how.tail, *twins.sums, softmax.softcap, softmax.sink_logits,
        )  # fmt: skip
        if how.tail != "none":
            self._kept.append(kept)
        return output.transpose(1, 2), None

    def finish(self) -> None:
        """Count the step."""
        lengths, counts = self._lengths, self._steps.counts
        if lengths is None or counts is None:
            return
        counts.add_forward(lengths.stop, self._unlike)
        if lengths.k:
            counts.add_steps(lengths.tokens, lengths.k, self._steps.dense_below)
        if self._kept:
            counts.add_kept(self._kept)

    def _lengths_at(self, index: int, mask: Tensor | None) -> Lengths:
        """The lengths on a layer's device, worked out by the first layer that asks."""
        layer = self._cache.layers[index]
        if self._lengths is None:
            start: Tensor = layer.twins.start
            stop = torch.zeros_like(start) + layer.cumulative_length
            tokens = stop - start
            self._lengths = Lengths(
                start, stop, tokens, tuple(self._k(budget, tokens) for budget in self._steps.budgets)
            )
            if mask is not None:
                self._unlike = (seen_by(mask, layer.max_cache_len)[:, -1].sum(-1) != tokens).any()
        held, device = self._lengths, layer.keys.device
        if held.start.device == device:
            return held
        start, stop, tokens, *k = (tensor.to(device) for tensor in (*held[:3], *held.k))
        return Lengths(start, stop, tokens, tuple(k))

    def _k(self, budget: Budget, tokens: Tensor) -> Tensor:
        return torch.where(tokens < self._steps.dense_below, tokens, budget.of_each(tokens))


def _kernels_of(backend: str) -> Kernels:
    """The operators of a backend, registered by now."""
    if backend == "torch":
        return Kernels(None, None)
    if backend == "triton":
        from loki_attention.kernels.triton import operators

        if availability.interpreted():
            # The dispatcher has the native kernels for tensors of the CPU.
            return Kernels(operators.decode_newest, operators.dense_decode)
    return Kernels(newest_operator(), torch.ops.loki_attention.dense_decode)


def _reserve(kernels: KernelEncoder | None, query: Tensor, keys: Tensor, values: Tensor, used: Kernels) -> None:
    """Set aside what a GPU's steps work in, before one is captured."""
    if query.is_cuda and used.dense is not None:
        from loki_attention.kernels.triton.encoder import TritonEncoder
        from loki_attention.kernels.triton.launch import reserve_for

        reserve_for(kernels if isinstance(kernels, TritonEncoder) else None, query[:, :, -1:], keys, values)
