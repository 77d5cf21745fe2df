"""What a selection keeps of dense attention on any text, layer by layer and head by head, and what comes of it.

Needs no labels: what to look at first on one's own prompts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from loki_attention.errors import ArgumentError
from loki_attention.evaluation.continuation import Loss, compare_window
from loki_attention.evaluation.reading import DecodeStep
from loki_attention.evaluation.selection_quality import MEASURES, measure_layer
from loki_attention.evaluation.task import Score, digest_of, mean_score
from loki_attention.evaluation.variant import DENSE, Variant
from loki_attention.integrations.huggingface.observe import Observation, observe
from loki_attention.methods import Method

_MOST_STEPS = 64
_LEAST_TOKENS = 16


class Fidelity:
    """Windows of text whose second half is decoded sparsely; items are windows.

    Metrics: those of ``selection_quality`` for every sparse layer (config ``layer``, ``by_head`` one number a KV head) and
    over all of them (``layer`` "all"); ``kl_from_dense`` and ``next_token_agreement`` of the whole model. A method that
    must see the prompt has only the latter.
    """

    together = True
    name = "fidelity"

    def __init__(self, model: Any, windows: Sequence[Int[Tensor, "1 _"]], *, seed: int = 0) -> None:
        if not windows or min(window.shape[1] for window in windows) < _LEAST_TOKENS:
            raise ArgumentError(f"fidelity needs at least one text, and texts of at least {_LEAST_TOKENS} tokens")
        self._model, self._windows, self._seed = model, windows, seed
        self.items = len(windows)
        self.digest = digest_of(*(window.numpy().tobytes() for window in windows))
        halves = ((window.shape[1] // 2, window.shape[1]) for window in windows)
        steps = [DecodeStep(half, tokens) for half, length in halves for tokens in range(half + 1, length)]
        self.steps: Sequence[DecodeStep] = steps[:: max(1, len(steps) // _MOST_STEPS)]

    def measure(self, index: int, variants: Sequence[Variant]) -> dict[str, Any]:
        """Sums of the window's loss, and measures by layer, of every variant."""
        window = self._windows[index]
        losses = compare_window(self._model, window, variants)
        layers = self._layers(window, [variant for variant in variants if not variant.watches_prompt])
        return {
            variant.name: {"loss": list(losses[variant.name][:5]), "layers": layers.get(variant.name, {})}
            for variant in variants
        }

    def scores(self, outcomes: Sequence[Any], dense: Sequence[Any]) -> list[Score]:
        """Means over windows, and over heads but for ``by_head``."""
        losses = [Loss(*outcome["loss"]) for outcome in outcomes]
        found = [
            mean_score("kl_from_dense", [loss.kl for loss in losses], "nats a token", seed=self._seed),
            mean_score("next_token_agreement", [loss.agreement for loss in losses], "fraction", seed=self._seed),
        ]
        kept = [outcome["layers"] for outcome in outcomes if outcome["layers"]]
        layers = list(kept[0]) if kept else []
        for measure in (name for name in MEASURES if layers and name in kept[0][layers[0]]):
            means = [[sum(x[layer][measure]) / len(x[layer][measure]) for x in kept] for layer in layers]
            over_layers = [sum(column) / len(column) for column in zip(*means, strict=True)]
            found.append(self._score(measure, over_layers, {"layer": "all"}))
            for layer, items in zip(layers, means, strict=True):
                heads = zip(*(x[layer][measure] for x in kept), strict=True)
                by_head = " ".join(f"{sum(head) / len(head):.4f}" for head in heads)
                found.append(self._score(measure, items, {"layer": layer, "by_head": by_head}))
        return found

    def _score(self, measure: str, items: Sequence[float | int], config: dict[str, Any]) -> Score:
        return mean_score(measure, items, "fraction", seed=self._seed, config=config)

    def _layers(self, window: Tensor, variants: Sequence[Variant]) -> dict[str, dict[str, Any]]:
        """Measures by variant and layer, on a dense forward."""
        methods: dict[int, dict[str, Method]] = {}
        for variant in variants:
            if variant.method != DENSE:
                with variant.attach(self._model) as attached:
                    for layer, method in attached.methods.items():
                        methods.setdefault(layer, {})[variant.name] = method
        found: dict[str, dict[str, Any]] = {}

        def look(seen: Observation) -> None:
            for name, measures in measure_layer(seen, methods.get(seen.layer, {}), window.shape[1] // 2).items():
                if measures:
                    found.setdefault(name, {})[str(seen.layer)] = measures

        with torch.inference_mode(), observe(self._model, look):
            self._model(window.to(self._model.device), use_cache=False, logits_to_keep=1)
        return found
