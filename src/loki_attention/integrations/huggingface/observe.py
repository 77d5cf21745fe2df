"""Watch a model's queries, keys and values on their way into attention, before and after RoPE. Changes nothing."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from loki_attention.integrations.huggingface.families import attention_modules, family_of
from loki_attention.integrations.huggingface.interception import Redirection, original_attention


class Observation(NamedTuple):
    """One layer's tensors in one forward: queries and keys after RoPE, keys before it, values, attention scale."""

    layer: int
    query: Tensor  # (B, H, T, D)
    keys: Tensor  # (B, Hkv, S, D)
    pre_keys: Tensor  # (B, Hkv, T, D)
    values: Tensor  # (B, Hkv, S, D)
    scale: float


@contextmanager
def observe(model: PreTrainedModel, callback: Callable[[Observation], None]) -> Iterator[None]:
    """Call ``callback`` for every full-attention layer of every forward within the block; attention stays dense."""
    modules = attention_modules(model)
    pre_keys: list[Tensor] = []

    def watch(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        before = pre_keys.pop() if pre_keys else key
        callback(Observation(module.layer_idx, query, key, before, value, float(kwargs["scaling"])))
        dense = original_attention(module, redirection.original)
        return dense(module, query, key, value, attention_mask, **kwargs)

    with _rotary_watched(model, modules[min(modules)], pre_keys):
        redirection = Redirection(model, modules, watch)
        try:
            yield
        finally:
            redirection.undo()


@contextmanager
def _rotary_watched(model: PreTrainedModel, module: nn.Module, pre_keys: list[Tensor]) -> Iterator[None]:
    """Note the key that enters the modelling file's RoPE function, which attention follows at once."""
    name, modelling = family_of(model).rotary_function, sys.modules[type(module).__module__]
    original = getattr(modelling, name)

    def rotary(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        pre_keys[:] = [key]
        return original(query, key, *args, **kwargs)

    setattr(modelling, name, rotary)
    try:
        yield
    finally:
        setattr(modelling, name, original)
