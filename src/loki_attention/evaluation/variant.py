"""A named way to attach a method: what every evaluation compares."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from loki_attention.core.basis import KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.integrations.huggingface import Attached, attach
from loki_attention.methods import method_class
from loki_attention.results import Setting

DENSE = "dense"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One method with its settings, as :func:`attach` takes them. ``name`` labels its row in tables.

    ``layers`` are single layers' choices; ``budget`` is None for ``dense`` alone. ``label`` is the budget as it was asked
    for, where it was not given in tokens.
    """

    name: str
    method: str
    budget: Budget | None
    basis: KeyBasis | None = None
    planes: str | None = None
    tail: str | None = None
    per: str = "kv-head"
    layers: Mapping[int, str] = field(default_factory=dict)
    label: str | None = None
    backend: str = "auto"

    def attach(self, model: Any) -> AbstractContextManager[Attached]:
        """The model with this variant attached."""
        return attach(
            model,
            self.basis,
            method=self.method,
            budget=self.budget,
            planes=self.planes,
            tail=self.tail,
            per=self.per,
            layers=self.layers,
            backend=self.backend,
        )

    @property
    def watches_prompt(self) -> bool:
        """Whether the method must see the prompt's queries."""
        kind = method_class(self.method)
        return kind is not None and kind.watches_prompt

    @property
    def simulated(self) -> str | None:
        """Why its time would mean nothing, None where it would not."""
        kind = method_class(self.method)
        return None if kind is None else kind.why_simulated(self.tail or "none")

    @property
    def config(self) -> dict[str, Setting]:
        """The settings as plain values, for a result file."""
        budget = self.budget
        dense = [str(layer) for layer, choice in sorted(self.layers.items()) if choice == "dense"]
        sparse = [str(layer) for layer, choice in sorted(self.layers.items()) if choice == "sparse"]
        return {
            "variant": self.name,
            "method": self.method,
            "budget": self.label or (None if budget is None else str(budget)),
            "candidate": self.basis.candidate if self.basis is not None else None,
            "planes": self.planes or (str(self.basis.planes) if self.basis is not None else None),
            "tail": self.tail,
            "simulated": self.simulated,
            "per": self.per,
            "fraction": None if budget is None else budget.fraction,
            "tokens": None if budget is None else budget.tokens,
            "minimum": None if budget is None else budget.minimum,
            "sinks": None if budget is None else budget.sinks,
            "recent": None if budget is None else budget.recent,
            "dense_layers": "+".join(dense) or None,
            "sparse_layers": "+".join(sparse) or None,
        }
