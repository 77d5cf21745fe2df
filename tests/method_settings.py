"""The settings in which every method is held to the contract of all methods (``integrations/test_exactness.py``)."""

from transformers import PreTrainedModel

from loki_attention import Attached, attach
from models import tiny_basis

SETTINGS: dict[str, dict[str, str]] = {
    "loki-none": {"tail": "none"},
    "loki-mean": {"tail": "mean"},
    "loki-linear": {"tail": "linear"},
    "loki-two-planes": {"planes": "8@4", "tail": "linear"},
    "loki-float": {"planes": "8@32", "tail": "linear"},
    "loki-query-head": {"per": "query-head", "tail": "linear"},
    "exact-topk": {"method": "exact-topk"},
    "exact-topk-mean": {"method": "exact-topk", "tail": "mean"},
    "exact-topk-linear": {"method": "exact-topk", "tail": "linear"},
    "exact-topk-query-head": {"method": "exact-topk", "per": "query-head"},
    "streaming": {"method": "streaming"},
    "pca-attn": {"method": "pca-attn"},
    "paper-loki": {"method": "paper-loki"},
}
BASELINES: dict[str, dict[str, str]] = {
    "random-mean": {"method": "random", "tail": "mean"},
    "h2o": {"method": "h2o"},
    "snapkv": {"method": "snapkv"},
    "sparq": {"method": "sparq", "planes": "8@16"},
    "quest": {"method": "quest"},
    "double-sparsity": {"method": "double-sparsity"},
}
"""Methods of other papers: tested in one layout and for fewer steps."""


def attached(model: PreTrainedModel, name: str, family: str = "llama", layout: str = "gqa") -> Attached:
    return attach(model, tiny_basis(family, layout), **{**SETTINGS, **BASELINES}[name])
