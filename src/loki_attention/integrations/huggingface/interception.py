"""How attention of a transformers model is redirected, and given back. Knows no method.

transformers looks attention up by name. One function per original implementation is registered under a name of ours,
once; which model is ours is known by its attention modules, each of which holds its handler, so that a model that merely
shares a configuration is answered by its original implementation.
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
_HANDLER = "_loki_attention"


@runtime_checkable
class Attention(Protocol):
    """A transformers attention function: tensors (B, H, T, D), (B, Hkv, S, D) in, (B, T, H, D) and weights out."""

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]: ...


_REDIRECTED: "weakref.WeakSet[Redirection]" = weakref.WeakSet()


class Redirection:
    """Sends the attention of chosen modules of one model to ``handler`` until :meth:`undo`.

    Compiled models run their graphs up to it and go on after, unless it has a ``step``: an attention for graphs to hold.
    """

    def __init__(self, model: PreTrainedModel, modules: Mapping[int, nn.Module], handler: Attention) -> None:
        if any(hasattr(module, _HANDLER) for module in modules.values()):
            raise ModelError("something is attached to this model already; detach it first")
        original, usable = original_name(model), family_of(model).implementations
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
            setattr(module, _HANDLER, handler)
        _REDIRECTED.add(self)
        model.set_attn_implementation(_register(original))

    def undo(self) -> None:
        """Give the modules back; the configuration too, unless another redirected model shares it."""
        for module in self._modules.values():
            if hasattr(module, _HANDLER):
                delattr(module, _HANDLER)
        _REDIRECTED.discard(self)
        if not any(other._model.config is self._model.config for other in _REDIRECTED):
            self._model.set_attn_implementation(self.original)


def original_name(model: PreTrainedModel) -> str:
    """The attention implementation that a model was loaded with, attached or not."""
    name: str = model.config._attn_implementation
    return name.removeprefix(_PREFIX)


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

        def redirected(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            handler = getattr(module, _HANDLER, None)
            attend = original_attention(module, original) if handler is None else getattr(handler, "step", None)
            return _outside_graphs(module, *args, **kwargs) if attend is None else attend(module, *args, **kwargs)

        AttentionInterface.register(name, redirected)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_graphs(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """The handler's attention, which a graph ends before."""
    found: tuple[Tensor, Tensor | None] = getattr(module, _HANDLER)(module, *args, **kwargs)
    return found
