"""How good a selection is, layer by layer and head by head, against exact attention on the same tensors."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loki_attention.core.shapes import Indices, Queries
from loki_attention.integrations.huggingface.observe import Observation
from loki_attention.integrations.huggingface.sparse_rows import Tensors, view_of
from loki_attention.kernels import torch_backend
from loki_attention.kernels.ops import rows_at_once
from loki_attention.kernels.rows import Rows
from loki_attention.methods import Method, Step
from loki_attention.methods.exact_topk import ExactTopK

MEASURES = ("kept_mass", "relative_mass", "set_recall", "jaccard", "output_error")
"""Attention mass kept, over exact top-k's, the share of exact top-k's set that was found, intersection over union with
that set, and the norm of the output's error over the output's. Exact top-k: the same K, sets and forced tokens."""


class _Dense(NamedTuple):
    """Dense attention of some rows: the mass of every slot (B, Hkv, G, T, S), learned sinks left out, and the output."""

    share: Float[Tensor, "b kv g t s"]
    output: Queries


def measure_layer(seen: Observation, methods: Mapping[str, Method], first: int) -> dict[str, dict[str, list[float]]]:
    """Every measure of every method, one mean a KV head, over rows from ``first`` on whose budget is not all tokens.

    A method that selects nothing has an output error alone. Empty for a method whose budget covers all tokens.
    """
    placed = {name: method.on(seen.keys.device, seen.keys.dtype) for name, method in methods.items()}
    totals: dict[str, dict[str, Tensor]] = {name: {} for name in methods}
    counts = dict.fromkeys(methods, 0)
    slots = seen.keys.shape[2]
    at_once = rows_at_once(seen.query.shape[1], slots, 0, 0)
    every = torch.ones(1, slots, dtype=torch.bool, device=seen.keys.device)
    for start in range(first, slots, at_once):
        stop = min(start + at_once, slots)
        rows = Rows.of(every, torch.arange(start + 1, stop + 1, device=every.device)[None])
        query = seen.query[:, :, start:stop]
        dense, bounds = _dense(seen, query, rows), _Bounds(seen, query, rows)
        for name, method in placed.items():
            sparse = method.budgets(rows) < rows.tokens
            counts[name] += int(sparse.sum())
            for measure, each in _measures(seen, query, rows, method, dense, bounds).items():
                kept = each.masked_fill(~sparse[:, None], 0.0).sum((0, 2)).double().cpu()
                totals[name][measure] = totals[name].get(measure, 0.0) + kept
    return {
        name: {measure: (total / counts[name]).tolist() for measure, total in found.items()} if counts[name] else {}
        for name, found in totals.items()
    }


def _dense(seen: Observation, query: Queries, rows: Rows) -> _Dense:
    kv_heads = seen.keys.shape[1]
    scores = torch_backend.score_exact(query, seen.keys, seen.scale, kv_heads, seen.softmax)
    scores = scores.masked_fill(~rows.visible[:, None, None], -torch.inf)
    weights = share = scores.softmax(-1)
    if seen.softmax.sink_logits is not None:
        logits = seen.softmax.sink_logits.to(scores.dtype).reshape(1, kv_heads, -1, 1, 1)
        weights = torch.cat([scores, logits.expand(*scores.shape[:-1], 1)], dim=-1).softmax(-1)[..., :-1]
    return _Dense(share, (weights @ seen.values[:, :, None].to(weights.dtype)).flatten(1, 2))


class _Bounds:
    """Exact top-k's slots of some rows at a method's own K, sets and forced tokens; found once for methods that share them."""

    def __init__(self, seen: Observation, query: Queries, rows: Rows) -> None:
        self._seen, self._query, self._rows = seen, query, rows
        self._found: dict[tuple[object, ...], Indices] = {}

    def of(self, method: Method) -> Indices:
        """The slots that exact top-k takes in the method's place."""
        # The paper's method forces no tokens.
        forced = getattr(method, "forced", torch_backend.Forced(method.budget.sinks, method.budget.recent))
        k = method.budgets(self._rows)
        key = (forced, method.per, *k.flatten().tolist())
        if key not in self._found:
            budget = replace(method.budget, sinks=forced.sinks, recent=forced.recent)
            exact = ExactTopK(budget=budget, head_dim=method.head_dim, per=method.per)
            self._found[key] = exact.choose(_step(self._seen, self._query, self._rows, exact, k)).indices
        return self._found[key]


def _measures(
    seen: Observation, query: Queries, rows: Rows, method: Method, dense: _Dense, bounds: _Bounds
) -> dict[str, Float[Tensor, "b kv t"]]:
    """Every measure of every row and KV head, means over what a KV head serves."""
    answer = method.attend(_step(seen, query, rows, method, method.budgets(rows)))
    kv_heads = seen.keys.shape[1]
    error = (answer.output - dense.output).norm(dim=-1) / dense.output.norm(dim=-1)
    found = {"output_error": _by_kv_head(error, kv_heads)}
    if answer.indices is None:
        return found
    ours, theirs = (
        ~torch_backend.unselected(indices, rows.rank.shape[1]) for indices in (answer.indices, bounds.of(method))
    )
    both = (ours & theirs).sum(-1)
    kept, most = (_mass(dense.share, chosen) for chosen in (ours, theirs))
    sets = {
        "kept_mass": kept,
        "relative_mass": kept / most,
        "set_recall": both / theirs.sum(-1),
        "jaccard": both / (ours | theirs).sum(-1),
    }
    return {name: _by_kv_head(each, kv_heads) for name, each in sets.items()} | found


def _step(seen: Observation, query: Queries, rows: Rows, method: Method, k: Int[Tensor, "b t"]) -> Step:
    """The rows as the method attends them."""
    tensors = Tensors(seen.query, seen.keys, seen.values, None, seen.scale, None, seen.softmax)
    encoded = method.encode(query, seen.scale)
    return Step(query, view_of(tensors, method), rows, k, seen.scale, encoded, seen.softmax)


def _mass(share: Float[Tensor, "b kv g t s"], chosen: Bool[Tensor, "b sets t s"]) -> Float[Tensor, "b sets t"]:
    """Mass on the chosen slots, mean over the query heads that share a set."""
    by_set = share.flatten(1, 2).unflatten(1, (chosen.shape[1], -1))
    return (by_set * chosen[:, :, None]).sum(-1).mean(2)


def _by_kv_head(each: Float[Tensor, "b heads t"], kv_heads: int) -> Float[Tensor, "b kv t"]:
    return each.unflatten(1, (kv_heads, -1)).mean(2)
