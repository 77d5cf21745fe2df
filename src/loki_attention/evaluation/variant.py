"""A named way to attach a method: what every evaluation compares."""

from dataclasses import dataclass
from typing import Any

from loki_attention.core.basis import KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.integrations.huggingface import Attached, attach


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One method with its settings, as :func:`attach` takes them. ``name`` labels its row in tables."""

    name: str
    method: str
    budget: Budget
    basis: KeyBasis | None = None
    planes: str | None = None
    tail: str | None = None
    per: str = "kv-head"

    def attach(self, model: Any) -> Attached:
        """The model with this variant attached."""
        return attach(
            model,
            self.basis,
            method=self.method,
            budget=self.budget,
            planes=self.planes,
            tail=self.tail,
            per=self.per,
        )

    @property
    def config(self) -> dict[str, str | int | float | None]:
        """The settings as plain values, for a result file."""
        budget = self.budget
        return {
            "variant": self.name,
            "method": self.method,
            "candidate": self.basis.candidate if self.basis is not None else None,
            "planes": self.planes or (str(self.basis.planes) if self.basis is not None else None),
            "tail": self.tail,
            "per": self.per,
            "fraction": budget.fraction,
            "tokens": budget.tokens,
            "minimum": budget.minimum,
            "sinks": budget.sinks,
            "recent": budget.recent,
        }
