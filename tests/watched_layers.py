"""A layer whose rows come one after the other, as a method that watches them all sees it."""

from typing import NamedTuple

import torch
from torch import Tensor

from helpers import noise
from loki_attention.cache import Watched
from loki_attention.kernels.rows import Rows
from loki_attention.methods import Answer, LayerView, Step, WatchingMethod

SCALE = 0.25


class Sequence(NamedTuple):
    """Queries (1, H, S, D), keys and values (1, Hkv, S, D) of S tokens."""

    query: Tensor
    keys: Tensor
    values: Tensor


def sequence(tokens: int, seed: int = 0) -> Sequence:
    query, keys, values = (noise(1, heads, tokens, 16, seed=seed + heads) for heads in (4, 2, 2))
    # Some tokens draw attention whatever the query, as those of real models do.
    keys[:, :, ::9] += query.mean((1, 2)) * 40
    return Sequence(2 * query, keys, values)


def show(method: WatchingMethod, layer: Sequence, held: Watched, start: int, stop: int) -> None:
    """Let the method see a prompt's rows, which are dense."""
    held.follow(method.owner, start, stop)
    held.prompt_tokens = torch.tensor([stop])
    method.watch(step_of(layer, held, start, stop))


def answer_row(method: WatchingMethod, layer: Sequence, held: Watched, row: int) -> Answer:
    """The method's answer for a decode row."""
    held.follow(method.owner, row, row + 1)
    step = step_of(layer, held, row, row + 1)
    return method.attend(step._replace(k=method.budgets(step.rows, held.prompt_tokens)))


def run(method: WatchingMethod, layer: Sequence, prompt: int, held: Watched | None = None) -> list[Answer]:
    """The method's answers for the rows after the prompt, one at a time; the prompt's are shown to it first."""
    held = Watched() if held is None else held
    show(method, layer, held, 0, prompt)
    return [answer_row(method, layer, held, row) for row in range(prompt, layer.keys.shape[2])]


def step_of(layer: Sequence, held: Watched | None, start: int, stop: int) -> Step:
    """Rows ``start`` to ``stop`` - 1, with a budget of all tokens."""
    rows = Rows.of_whole_prompts(1, stop, stop - start, layer.keys.device)
    view = LayerView(layer.keys[:, :, :stop], layer.values[:, :, :stop], None, None, held)
    return Step(layer.query[:, :, start:stop], view, rows, rows.tokens, SCALE, None)
