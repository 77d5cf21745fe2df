"""What ``generate`` knows and a forward does not: how long the cache will become, and when it is still at the prompt."""

import inspect
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import Cache


class GenerateWatch:
    """Wraps two methods of one model's ``generate`` until :meth:`undo`, where this transformers version has them.

    ``on_cache(cache, tokens)`` is told the cache to be used and the slots it will need; ``in_prompt`` is true while a
    chunked prefill runs, whose last chunk may be one token and yet no decode step.
    """

    def __init__(self, model: PreTrainedModel, on_cache: Callable[[Cache, int], None]) -> None:
        self._model, self._on_cache = model, on_cache
        self.in_prompt = False
        self._wrap("_prepare_cache_for_generation", self._prepare)
        self._wrap("_prefill", self._prefill)

    def undo(self) -> None:
        """Give the model its methods back."""
        for name in ("_prepare_cache_for_generation", "_prefill"):
            self._model.__dict__.pop(name, None)

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        original = getattr(self._model, name, None)
        if original is not None:
            self._model.__dict__[name] = lambda *args, **kwargs: around(original, args, kwargs)

    def _prepare(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        known = inspect.signature(original).bind(*args, **kwargs).arguments
        cache = known.get("model_kwargs", {}).get("past_key_values")
        if isinstance(cache, Cache):
            self._on_cache(cache, known.get("max_cache_length", 0))
        return result

    def _prefill(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        known = inspect.signature(original).bind(*args, **kwargs).arguments
        self.in_prompt = getattr(known.get("generation_config"), "prefill_chunk_size", None) is not None
        try:
            return original(*args, **kwargs)
        finally:
            self.in_prompt = False
