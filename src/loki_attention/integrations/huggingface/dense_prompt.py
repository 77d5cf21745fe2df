"""A prompt computed densely once, continued any number of times: by dense attention or with a method attached."""

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loki_attention.cache import Watched
from loki_attention.core.attention import Softmax
from loki_attention.integrations.huggingface.attached import Attached
from loki_attention.integrations.huggingface.loading import new_cache
from loki_attention.integrations.huggingface.observe import Observation, observe
from loki_attention.integrations.huggingface.report import Report
from loki_attention.integrations.huggingface.sparse_rows import Tensors
from loki_attention.integrations.huggingface.watching import notes_of_prompt, take_over
from loki_attention.methods import WatchingMethod


@runtime_checkable
class Attachable(Protocol):
    """Anything that attaches a method to a model for the time of a block."""

    @property
    def watches_prompt(self) -> bool:
        """Whether the method must see the prompt's queries."""
        ...

    def attach(self, model: Any) -> AbstractContextManager[Attached]:
        """The model with the method attached, until the block ends."""
        ...


class DensePrompt:
    """A prompt of one sequence, possibly empty, whose cache any number of methods continue from.

    For methods that must see the prompt it is computed a second time, once for all of them: the queries are kept then.
    """

    def __init__(self, model: Any, prompt: Int[Tensor, "1 s"]) -> None:
        self.model, self.length = model, prompt.shape[1]
        self._prompt = prompt.to(model.device)
        self.cache = self._computed()
        self._queries: dict[int, tuple[Tensor, float, Softmax]] = {}
        self._noted: dict[tuple[int, str], Watched] = {}

    def logits(self, rows: Int[Tensor, "1 t"], method: Attachable | None) -> tuple[Float[Tensor, "t v"], float, float]:
        """Logits of ``rows`` after the prompt, bytes read and bytes dense; the cache is left as it was.

        ``None`` is dense attention.
        """
        rows = rows.to(self.model.device)
        try:
            if method is None:
                return self.model(rows, past_key_values=self.cache).logits[0], 0.0, 0.0
            self._observe_for(method)
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
            self._observe_for(method)
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

    def _observe_for(self, method: Attachable) -> None:
        """Compute the prompt again for its queries, unless they are known or the method needs none."""
        if method.watches_prompt and self.length and not self._queries:

            def note(seen: Observation) -> None:
                self._queries[seen.layer] = seen.query, seen.scale, seen.softmax

            with observe(self.model, note):
                self._computed()

    def _cache_for(self, attached: Attached) -> Any:
        """The shared cache, with the notes of methods that must see the prompt."""
        methods = {layer: x for layer, x in attached.methods.items() if isinstance(x, WatchingMethod)}
        if methods and self.length:
            take_over(self.cache, {layer: self._notes(layer, method) for layer, method in methods.items()}, methods)
        return self.cache

    def _notes(self, layer: int, method: WatchingMethod) -> Watched:
        """What a layer's method notes of the prompt; methods that note the same share it."""
        key = (layer, method.noted_of_dense)
        if key not in self._noted:
            (query, scale, softmax), held = self._queries[layer], self.cache.layers[layer]
            tensors = Tensors(query, held.keys, held.values, None, scale, None, softmax)
            self._noted[key] = notes_of_prompt(tensors, method)
        return self._noted[key]

    def _computed(self) -> Any:
        cache = new_cache(self.model)
        if self.length:
            self.model(self._prompt, past_key_values=cache, logits_to_keep=1)
        return cache
