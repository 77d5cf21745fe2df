"""What an attachment is told to do: a plan for every full-attention layer, and what holds for all of them."""

from dataclasses import dataclass

from loki_attention.integrations.huggingface.monitor import MonitorSettings
from loki_attention.kernels.ops import Backend
from loki_attention.methods import Method


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What attachment does with a layer: a method, or none and the reason why it stays dense."""

    method: Method | None
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the report says of an attachment as a whole."""

    method: str
    backend: Backend
    budget: str = "all tokens"
    planes: str | None = None
    tail: str = "none"
    simulated: str | None = None
    dense_below: int = 0
    dense_below_static: int = 0
    """The same for steps over a static cache."""
    calibrated_length: int | None = None
    monitor: MonitorSettings | None = None
