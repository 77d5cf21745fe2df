"""Shows a method that watches every row those that it does not answer: of prompts, and where its budget covers all."""

import torch

from loki_attention.cache import Watched
from loki_attention.integrations.huggingface.forward import Forward
from loki_attention.integrations.huggingface.masks import own_slots
from loki_attention.integrations.huggingface.sparse_rows import SparseRows, Tensors, view_of
from loki_attention.kernels.ops import rows_at_once
from loki_attention.kernels.rows import Rows
from loki_attention.methods import Step, WatchingMethod


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
    stop = rows.tokens.shape[1] if isinstance(found, str) else found.start
    batch, heads, _, dim = tensors.query.shape
    own = own_slots(rows)
    layer = view_of(tensors, method)
    at_once = rows_at_once(batch * heads, tensors.keys.shape[2], 0, dim)
    for start in range(0, stop, at_once):
        part = slice(start, min(start + at_once, stop))
        some = rows.chunk(part.start, part.stop)
        k = torch.where(own[:, part], some.tokens, 0)
        method.watch(Step(tensors.query[:, :, part], layer, some, k, tensors.scale, None, tensors.softmax))
