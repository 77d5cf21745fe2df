"""The methods: one small file each, listed once, here."""

from loki_attention.errors import unknown_name
from loki_attention.methods.base import PER, Answer, LayerView, Method, SelectionMethod, Step
from loki_attention.methods.double_sparsity import DoubleSparsity
from loki_attention.methods.exact_topk import ExactTopK
from loki_attention.methods.h2o import H2O
from loki_attention.methods.loki import Loki
from loki_attention.methods.paper_loki import PaperLoki
from loki_attention.methods.pca_attn import PcaAttention
from loki_attention.methods.quest import Quest
from loki_attention.methods.random_tokens import Random
from loki_attention.methods.snapkv import SnapKV
from loki_attention.methods.sparq import SparQ
from loki_attention.methods.streaming import Streaming
from loki_attention.methods.watching import WatchingMethod

SPARSE_METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        ExactTopK,
        Loki,
        Streaming,
        PcaAttention,
        PaperLoki,
        Random,
        H2O,
        SnapKV,
        SparQ,
        Quest,
        DoubleSparsity,
    )
}
METHOD_NAMES = ("dense", *SPARSE_METHODS)
"""Every name ``attach`` takes; ``dense`` is the model's own attention on the preallocated cache."""


def method_class(name: object) -> type[Method] | None:
    """The class of a method, None for ``dense``; raises ``ArgumentError`` for an unknown name."""
    if name not in METHOD_NAMES:
        raise unknown_name("method", name, METHOD_NAMES)
    return SPARSE_METHODS.get(str(name))


__all__ = [
    "METHOD_NAMES",
    "PER",
    "Answer",
    "LayerView",
    "Method",
    "SelectionMethod",
    "Step",
    "WatchingMethod",
    "method_class",
]
