"""A forward over a static cache that the host has a part in: a prompt, or the first step of an attachment over a filled cache.

Prompts are dense. Each leaves every layer up to date for the decode steps of ``static_step``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache

from loki_attention.errors import ModelError
from loki_attention.integrations.huggingface.masks import seen_by
from loki_attention.integrations.huggingface.report import Memory
from loki_attention.integrations.huggingface.settings import LayerPlan, Settings
from loki_attention.integrations.huggingface.static_layer import static_length
from loki_attention.integrations.huggingface.static_step import StaticForward, StaticSteps
from loki_attention.methods import Method
from loki_attention.methods.loki import Loki

_INSTEAD = "pass a DynamicCache, or leave cache_implementation out"


class StaticPrompt:
    """One forward of ``rows`` new tokens a sequence, the last of which is a decode step if ``decodes``."""

    def __init__(self, cache: Cache, steps: StaticSteps, rows: int, *, decodes: bool) -> None:
        before = static_length(cache, steps.last)
        self.called: set[int] = set()
        self._cache, self._steps, self._length = cache, steps, before + rows
        # Until this forward is through, nobody may go on from what it leaves behind.
        self._known = before if steps.serve(cache) else 0
        steps.disown(cache)
        self._step = StaticForward(cache, steps) if decodes else None
        self._start: tuple[Tensor | None, Int[Tensor, " b"]] | None = None

    def settle(self, module: Any, query: Tensor, mask: Tensor | None, method: Method | None) -> StaticForward | None:
        """Bring a layer up to date; then the decode step that attends, None where it is a prompt's, which is dense."""
        index: int = module.layer_idx
        start = self._start_by(mask, query)
        self._steps.settle(self._cache.layers[index], index, method, query, start, self._known, self._length)
        return self._step

    @property
    def length(self) -> int:
        """Slots in use after this forward."""
        return self._length

    def finish(self) -> None:
        """Count the step, and leave the layers to those that follow."""
        if self._step is not None:
            self._step.finish()
        self._steps.own(self._cache, self._length)

    def memory(self, layers: Iterable[int]) -> Memory:
        """What these layers of the cache hold."""
        ours = [self._cache.layers[layer] for layer in layers]
        held = [layer.twins for layer in ours if layer.twins is not None]
        capacity = max((twins.capacity for twins in held), default=0)
        return Memory.summed((twins.bytes for twins in held), capacity, self._length)

    def _start_by(self, mask: Tensor | None, query: Tensor) -> Int[Tensor, " b"]:
        """Each sequence's first slot; raises ``ModelError`` unless it sees every slot from there to the newest."""
        if self._start is None or self._start[0] is not mask:
            self._start = mask, _first_slots(mask, query, self._length)
        return self._start[1].to(query.device)


def check_served(
    plans: Mapping[int, LayerPlan], settings: Settings, *, monitored: bool, traced: bool, ruled: bool
) -> None:
    """Raise ``ModelError`` for what decode steps over a static cache cannot do: they leave no decision to the host."""
    for wanted, what in ((monitored, "monitor_every"), (traced, "trace()"), (ruled, "continuation() or paper_rows()")):
        if wanted:
            raise ModelError(
                f"decode steps over a static cache tell the host nothing, so that graphs can hold them, and {what} has "
                f"nothing to go by; {_INSTEAD}"
            )
    if settings.backend.name == "torch" and any(plan.method is not None for plan in plans.values()):
        raise ModelError(
            f"decode steps over a static cache run on the native or Triton kernels, and this attachment runs on torch "
            f"({settings.backend.reason}); {_INSTEAD}"
        )
    assert all(plan.method is None or isinstance(plan.method, Loki) for plan in plans.values())


def _first_slots(mask: Tensor | None, query: Tensor, length: int) -> Int[Tensor, " b"]:
    batch = len(query)
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64, device=query.device)
    seen = seen_by(mask, mask.shape[-1])[:, -1].expand(batch, -1)
    slots = torch.arange(seen.shape[-1], device=seen.device)
    start = torch.where(seen, slots, length).amin(-1)
    expected = (slots >= start[:, None]) & (slots < length)
    if bool((seen != expected).any()) or bool((start >= length).any()):
        raise ModelError(
            "this attention mask hides tokens behind a sequence's first one (padding on the right, holes between turns), "
            f"and decode steps over a static cache attend all of them; pad on the left, or {_INSTEAD}"
        )
    return start
