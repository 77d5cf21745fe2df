"""A prompt computed densely once, continued any number of times: by dense attention or with a method attached."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loki_attention.cache import Watched
from loki_attention.integrations.huggingface.attached import Attached
from loki_attention.integrations.huggingface.loading import new_cache
from loki_attention.integrations.huggingface.report import Report
from loki_attention.integrations.huggingface.watching import notes_in, take_over
from loki_attention.methods import WatchingMethod


@runtime_checkable
class Attachable(Protocol):
    """Anything that attaches a method to a model for the time of a block."""

    def attach(self, model: Any) -> AbstractContextManager[Attached]:
        """The model with the method attached, until the block ends."""
        ...


class DensePrompt:
    """A prompt of one sequence, possibly empty, whose cache any number of methods continue from.

    Methods that must see the prompt are shown it once for all that note the same of it.
    """

    def __init__(self, model: Any, prompt: Int[Tensor, "1 s"]) -> None:
        self.model, self.length = model, prompt.shape[1]
        self._prompt = prompt.to(model.device)
        self.cache = self._computed()
        self._noted: dict[tuple[tuple[int, str], ...], dict[int, Watched]] = {}

    def logits(self, rows: Int[Tensor, "1 t"], method: Attachable | None) -> tuple[Float[Tensor, "t v"], float, float]:
        """Logits of ``rows`` after the prompt, bytes read and bytes dense; the cache is left as it was.

        ``None`` is dense attention.
        """
        rows = rows.to(self.model.device)
        try:
            if method is None:
                return self.model(rows, past_key_values=self.cache).logits[0], 0.0, 0.0
            with method.attach(self.model) as attached, attached.continuation(self.length):
                logits = self.model(rows, past_key_values=self._cache_for(attached)).logits[0]
            layers = attached.report().layers
            return logits, sum(x.bytes_read for x in layers), sum(x.bytes_dense for x in layers)
        finally:
            self.rewind()

    def generate(
        self, last: Int[Tensor, "1 1"], method: Attachable, **options: Any
    ) -> tuple[Int[Tensor, " n"], Report]:
        """The new tokens after the prompt and one ``last`` token, and what was read; the cache is left as it was.

        Every new token comes from a decode step, the first included. ``options`` are those of ``generate``.
        """
        ids = torch.cat([self._prompt, last.to(self.model.device)], dim=1)
        try:
            with method.attach(self.model) as attached:
                output = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=self._cache_for(attached),
                    **options,
                )
            return output[0, ids.shape[1] :].cpu(), attached.report()
        finally:
            self.rewind()

    def rewind(self) -> None:
        """Forget everything behind the prompt."""
        self.cache.crop(self.length - self.cache.get_seq_length())

    def _cache_for(self, attached: Attached) -> Any:
        """The shared cache, with the notes of methods that must see the prompt."""
        methods = {layer: x for layer, x in attached.methods.items() if isinstance(x, WatchingMethod)}
        if methods and self.length:
            kind = tuple((layer, method.noted_of_dense) for layer, method in methods.items())
            if kind not in self._noted:
                with attached.continuation(self.length):
                    self._noted[kind] = notes_in(self._computed(), methods)
            take_over(self.cache, self._noted[kind], methods)
        return self.cache

    def _computed(self) -> Any:
        cache = new_cache(self.model)
        if self.length:
            self.model(self._prompt, past_key_values=cache, logits_to_keep=1)
        return cache
