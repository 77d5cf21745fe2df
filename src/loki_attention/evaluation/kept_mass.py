"""How much attention mass a selection keeps, layer by layer and head by head, on dense forwards."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loki_attention.core.budget import Budget
from loki_attention.core.encoder import Encoder
from loki_attention.evaluation.held_out import EXACT
from loki_attention.integrations.huggingface.observe import Observation, observe
from loki_attention.integrations.huggingface.sparse_rows import Tensors, view_of
from loki_attention.kernels import torch_backend
from loki_attention.kernels.ops import rows_at_once
from loki_attention.kernels.rows import Rows
from loki_attention.methods import SelectionMethod, Step
from loki_attention.methods.exact_topk import ExactTopK
from loki_attention.methods.loki import Loki

Mass = dict[str, Float[Tensor, " kv"]]


def kept_mass(
    model: Any,
    windows: Sequence[Int[Tensor, "1 s"]],
    encoders: Mapping[str, Mapping[int, Encoder]],
    budget: Budget,
) -> dict[int, Mass]:
    """Mean attention mass that each encoder's selection keeps, by layer, name and KV head; ``exact-topk`` beside them.

    Rows of each window's second half, one index set per KV head, mass averaged over rows and the group's query heads.
    """
    sums: dict[int, Mass] = {}
    rows_seen = 0

    def look(seen: Observation) -> None:
        methods: dict[str, SelectionMethod] = {EXACT: ExactTopK(budget=budget, head_dim=seen.keys.shape[-1])}
        for name, layers in encoders.items():
            encoder = layers[seen.layer].to(seen.keys.device, seen.keys.dtype)
            methods[name] = Loki(budget=budget, head_dim=seen.keys.shape[-1], encoder=encoder)
        for name, mass in _mass_of(seen, methods).items():
            layer = sums.setdefault(seen.layer, {})
            layer[name] = layer.get(name, torch.zeros_like(mass)) + mass

    with torch.inference_mode(), observe(model, look):
        for window in windows:
            model(window.to(model.device), use_cache=False, logits_to_keep=1)
            rows_seen += window.shape[1] - window.shape[1] // 2
    return {layer: {name: mass / rows_seen for name, mass in by.items()} for layer, by in sums.items()}


def _mass_of(seen: Observation, methods: Mapping[str, SelectionMethod]) -> Mass:
    """Mass kept by each method, summed over rows and averaged over the group: (Hkv) in float64."""
    heads, slots = seen.query.shape[1], seen.keys.shape[2]
    kv_heads, first = seen.keys.shape[1], slots // 2
    tensors = Tensors(seen.query, seen.keys, seen.values, None, seen.scale, None, seen.softmax)
    views = {name: view_of(tensors, method) for name, method in methods.items()}
    every = torch.ones(1, slots, dtype=torch.bool, device=seen.keys.device)
    at_once = rows_at_once(heads, slots, 0, 0)
    total = {name: torch.zeros(kv_heads, dtype=torch.float64) for name in methods}
    for start in range(first, slots, at_once):
        stop = min(start + at_once, slots)
        rows = Rows.of(every, torch.arange(start + 1, stop + 1, device=every.device)[None])
        query = seen.query[:, :, start:stop]
        scores = torch_backend.score_exact(query, seen.keys, seen.scale, kv_heads, seen.softmax)
        share = scores.masked_fill(~rows.visible[:, None, None], -torch.inf).softmax(-1).mean(2)
        for name, method in methods.items():
            k = method.budgets(rows)
            step = Step(query, views[name], rows, k, seen.scale, method.encode(query, seen.scale), seen.softmax)
            slots_kept = method.choose(step).indices
            kept = share.gather(-1, slots_kept.clamp(min=0)).masked_fill(slots_kept < 0, 0.0)
            total[name] += kept.sum((0, 2, 3)).double().cpu()
    return total
