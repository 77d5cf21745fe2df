"""Attached models over transformers' static cache: what a step does there and over a cache that grows."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from loki_attention import KeyBasis, attach
from loki_attention.core.budget import Budget
from loki_attention.integrations.huggingface.report import Report
from loki_attention.integrations.huggingface.static_step import StaticForward
from loki_attention.kernels import native
from loki_attention.kernels.triton import availability
from models import random_ids, tiny_basis

BUDGET = Budget(fraction=1 / 8, minimum=24, sinks=2, recent=8)
CAPACITY = 320
MISSING = {
    "native": None if native.available() else "the native extension is not built",
    "triton": None if availability.problem() is None else f"no Triton kernels: {availability.problem()}",
}


def skip_without(backend: str) -> None:
    """Skip a test whose kernels cannot run here."""
    if MISSING[backend] is not None:
        pytest.skip(str(MISSING[backend]))


@contextmanager
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the block ``torch.compile`` starts afresh, and can see through functions whose argument types tests check."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    # An object of this class is made within graphs, where the checks themselves have no place.
    for name, method in list(vars(StaticForward).items()):
        if inspect.isfunction(method):
            monkeypatch.setattr(StaticForward, name, inspect.unwrap(method))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Ran(NamedTuple):
    """The last row's logits of every forward (forwards, B, V), what the attachment reports, and the cache."""

    logits: Tensor
    report: Report
    cache: Cache


def padded_ids(length: int, padding: int, batch: int = 2, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids and their mask, the first sequence padded on the left."""
    ids = random_ids(batch, length)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids.to(device), mask.to(device)


def static_cache(model: PreTrainedModel, capacity: int = CAPACITY) -> StaticCache:
    """An empty static cache."""
    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=capacity)


def whole_mask(mask: Tensor, capacity: int = CAPACITY) -> Tensor:
    """The mask of a decode step over a static cache, as ``generate`` hands it to the model: (B, 1, 1, capacity)."""
    return torch.nn.functional.pad(mask, (0, capacity - mask.shape[1])).bool()[:, None, None]


def ran(
    model: PreTrainedModel,
    cache: Cache,
    *,
    basis: KeyBasis | None = None,
    prompt: int = 186,
    steps: int = 9,
    padding: int = 0,
    **settings: object,
) -> Ran:
    """A prompt and so many decode steps of an attached Llama, two sequences; a block joins the tail's sums at 192 tokens."""
    ids, mask = padded_ids(prompt + steps, padding, device=model.device.type)
    settings = {"budget": BUDGET, "tail": "linear", "backend": "native"} | settings
    ends = [prompt, *range(prompt + 1, prompt + steps + 1)]
    with torch.inference_mode(), attach(model, basis or tiny_basis(), **settings) as handle:
        logits, start = [], 0
        for stop in ends:
            given = {"attention_mask": mask[:, :stop], "past_key_values": cache}
            logits.append(model(ids[:, start:stop], **given).logits[:, -1].float().cpu())
            start = stop
        return Ran(torch.stack(logits), handle.report(), cache)


def both(model: PreTrainedModel, **settings: object) -> tuple[Ran, Ran]:
    """The same over a static cache and over one that grows."""
    return ran(model, static_cache(model), **settings), ran(model, DynamicCache(config=model.config), **settings)
