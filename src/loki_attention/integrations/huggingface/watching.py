"""Shows a method that watches every row those that it does not answer: of prompts, and where its budget covers all."""

from collections.abc import Mapping

import torch
from transformers.cache_utils import Cache

from loki_attention.cache import Watched
from loki_attention.integrations.huggingface.cache_layer import own_layers, store_of
from loki_attention.integrations.huggingface.forward import Forward
from loki_attention.integrations.huggingface.masks import own_slots
from loki_attention.integrations.huggingface.sparse_rows import SparseRows, Tensors, view_of
from loki_attention.kernels.ops import rows_at_once
from loki_attention.kernels.rows import Rows
from loki_attention.methods import Step, WatchingMethod

_ROWS_AT_ONCE = 64
"""Dense rows that a method is shown together: so few that their scores stay in a processor's cache."""


def follow(tensors: Tensors, method: WatchingMethod, forward: Forward, *, in_prompt: bool) -> Tensors:
    """The layer's tensors with its notes, which know of this forward and of the prompts that end in it.

    ``in_prompt``: every row is of a prompt; its last chunk may be one row and yet no decode row.
    """
    rows = forward.rows(tensors)
    watched = Watched() if tensors.store is None else tensors.store.watched
    count, slots = tensors.query.shape[2], tensors.keys.shape[2]
    watched.follow(method.owner, slots - count, slots)
    of_prompt = own_slots(rows) if in_prompt else forward.prompt_rows(tensors)
    if bool(of_prompt.any()):
        ends = torch.where(of_prompt, rows.tokens, 0).amax(-1)
        before = torch.zeros_like(ends) if watched.prompt_tokens is None else watched.prompt_tokens
        watched.prompt_tokens = torch.where(of_prompt.any(-1), ends, before)
    return tensors._replace(watched=watched)


def show_dense_rows(tensors: Tensors, method: WatchingMethod, rows: Rows, found: SparseRows | str) -> None:
    """Let the method note the forward's rows before the first sparse one; all of them where there is none."""
    if isinstance(found, str) and tensors.store is None:
        return
    _show(tensors, method, rows, rows.tokens.shape[1] if isinstance(found, str) else found.start)


def _show(tensors: Tensors, method: WatchingMethod, rows: Rows, stop: int) -> None:
    """Let the method note the first ``stop`` rows, a few at a time."""
    batch, heads, count, dim = tensors.query.shape
    slots = tensors.keys.shape[2]
    own = own_slots(rows)
    layer = view_of(tensors, method)
    at_once = min(_ROWS_AT_ONCE, rows_at_once(batch * heads, slots, 0, dim))
    for start in range(0, stop, at_once):
        part = slice(start, min(start + at_once, stop))
        # Rows see no slot after their own.
        seen = slots - count + part.stop
        some = Rows(rows.rank[:, :seen], rows.tokens[:, part])
        k = torch.where(own[:, part], some.tokens, 0)
        before = layer._replace(keys=layer.keys[:, :, :seen], values=layer.values[:, :, :seen])
        method.watch(Step(tensors.query[:, :, part], before, some, k, tensors.scale, None, tensors.softmax))


def notes_of_prompt(tensors: Tensors, method: WatchingMethod) -> Watched:
    """What a layer's method notes of a dense prompt of one sequence."""
    count, device = tensors.query.shape[2], tensors.query.device
    watched = Watched(method.owner, count, prompt_tokens=torch.tensor([count], device=device))
    _show(tensors._replace(watched=watched), method, Rows.of_whole_prompts(1, count, count, device), count)
    return watched


def take_over(cache: Cache, notes: Mapping[int, Watched], methods: Mapping[int, WatchingMethod]) -> None:
    """Let the layers' methods go on from ``notes`` of the tokens in ``cache``, taken on another cache of the same tokens."""
    own_layers(cache, notes)
    for layer, watched in notes.items():
        store = store_of(cache, layer)
        assert store is not None
        store.watched = watched.copy_for(methods[layer].owner)
