"""How attention of a transformers model is redirected, and given back. Knows no method.

transformers looks attention up by name. One function per original implementation is registered under a name of ours,
once; which model is ours is known by its attention modules, so that a model that merely shares a configuration is
answered by its original implementation.
"""

import sys
import weakref
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from loki_attention.core.attention import Softmax
from loki_attention.errors import ModelError
from loki_attention.integrations.huggingface.families import family_of

WEIGHTS_WANTED = "output_attentions=True needs every attention weight; set it to False, or detach to get them"
_PREFIX = "loki_"


@runtime_checkable
class Attention(Protocol):
    """A transformers attention function: tensors (B, H, T, D), (B, Hkv, S, D) in, (B, T, H, D) and weights out."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]: ...


_HANDLERS: "weakref.WeakKeyDictionary[nn.Module, Attention]" = weakref.WeakKeyDictionary()


class Redirection:
    """Sends the attention of chosen modules of one model to ``handler`` until :meth:`undo`."""

    def __init__(self, model: PreTrainedModel, modules: Mapping[int, nn.Module], handler: Attention) -> None:
        if any(module in _HANDLERS for module in modules.values()):
            raise ModelError("something is attached to this model already; detach it first")
        original, usable = model.config._attn_implementation.removeprefix(_PREFIX), family_of(model).implementations
        if original not in usable:
            raise ModelError(
                f"this model uses attn_implementation={original!r}; load it with one of {', '.join(usable)}"
            )
        if model.config.output_attentions:
            raise ModelError(WEIGHTS_WANTED)
        if original == "eager" and getattr(model.config, "reorder_and_upcast_attn", False):
            raise ModelError("eager attention with reorder_and_upcast_attn=True is not supported; load it with sdpa")
        self._model, self._modules = model, modules
        self.original = original
        for module in modules.values():
            _HANDLERS[module] = handler
        model.set_attn_implementation(_register(original))

    def undo(self) -> None:
        """Give the modules back; the configuration too, unless another redirected model shares it."""
        for module in self._modules.values():
            _HANDLERS.pop(module, None)
        if not any(getattr(module, "config", None) is self._model.config for module in _HANDLERS):
            self._model.set_attn_implementation(self.original)


def original_attention(module: nn.Module, original: str) -> Attention:
    """The dense attention that ``module`` would have used."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)


def softmax_of(arguments: Mapping[str, Any]) -> Softmax:
    """What the model adds to the softmax, by the keyword arguments of its attention function."""
    return Softmax(arguments.get("softcap"), arguments.get("s_aux"))


def _register(original: str) -> str:
    name = _PREFIX + original
    if name not in ALL_ATTENTION_FUNCTIONS:
        # A compiled model runs its graphs up to here and goes on after: which handler is asked may change between calls.
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def redirected(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            handler = _HANDLERS.get(module) or original_attention(module, original)
            return handler(module, *args, **kwargs)

        AttentionInterface.register(name, redirected)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name
