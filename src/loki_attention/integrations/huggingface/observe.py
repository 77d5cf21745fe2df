"""Watch a model's queries, keys and values on their way into attention, before and after RoPE. Changes nothing."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loki_attention.core.attention import Softmax
from loki_attention.integrations.huggingface.families import attention_modules, family_of
from loki_attention.integrations.huggingface.interception import Redirection, original_attention, softmax_of


class Observation(NamedTuple):
    """One layer's tensors in one forward: queries and keys after RoPE, keys before it, values; its attention rule."""

    layer: int
    query: Tensor  # (B, H, T, D)
    keys: Tensor  # (B, Hkv, S, D)
    pre_keys: Tensor  # (B, Hkv, T, D)
    values: Tensor  # (B, Hkv, S, D)
    scale: float
    softmax: Softmax


@contextmanager
def observe(model: PreTrainedModel, callback: Callable[[Observation], None]) -> Iterator[None]:
    """Call ``callback`` for every full-attention layer of every forward within the block; attention stays dense."""
    modules = attention_modules(model)
    pre_keys: list[Tensor] = []

    def watch(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        newest = key[:, :, -query.shape[2] :]
        before = pre_keys.pop() if pre_keys else newest
        # Partial rotary: some families hand the RoPE function only the dims it turns.
        before = torch.cat([before, newest[..., before.shape[-1] :]], dim=-1)
        callback(Observation(module.layer_idx, query, key, before, value, float(kwargs["scaling"]), softmax_of(kwargs)))
        dense = original_attention(module, redirection.original)
        return dense(module, query, key, value, attention_mask, **kwargs)

    with _rotary_watched(model, modules, pre_keys):
        redirection = Redirection(model, modules, watch)
        try:
            yield
        finally:
            redirection.undo()


@contextmanager
def _rotary_watched(model: PreTrainedModel, modules: Mapping[int, nn.Module], pre_keys: list[Tensor]) -> Iterator[None]:
    """Note the key that enters the modelling file's RoPE function within one of ``modules``."""
    name = family_of(model).rotary_function
    if name is None:
        yield
        return
    modelling = sys.modules[type(modules[min(modules)]).__module__]
    original = getattr(modelling, name)
    # A layer that is not ours leaves its key behind, and one of ours may have no RoPE.
    hooks = [module.register_forward_pre_hook(lambda *_: pre_keys.clear()) for module in modules.values()]

    def rotary(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        pre_keys[:] = [key]
        return original(query, key, *args, **kwargs)

    setattr(modelling, name, rotary)
    try:
        yield
    finally:
        setattr(modelling, name, original)
        for hook in hooks:
            hook.remove()
