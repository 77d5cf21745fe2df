"""Loki: sparse attention for any pretrained decoder, from calibration alone (arXiv:2406.02542).

>>> from loki_attention import Budget, KeyBasis, attach, calibrate
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loki_attention.errors import LokiError, LokiWarning

if TYPE_CHECKING:
    from loki_attention.calibration.calibrate import calibrate
    from loki_attention.core.basis import KeyBasis
    from loki_attention.core.budget import Budget
    from loki_attention.core.planes import Planes
    from loki_attention.integrations.huggingface.attach import attach
    from loki_attention.integrations.huggingface.attached import Attached

__version__ = "0.1.0"
__all__ = ["Attached", "Budget", "KeyBasis", "LokiError", "LokiWarning", "Planes", "attach", "calibrate"]

# torch and transformers take seconds to import: only what needs them pays, and `loki --help` does not.
_LAZY = {
    "Attached": "loki_attention.integrations.huggingface",
    "Budget": "loki_attention.core.budget",
    "KeyBasis": "loki_attention.core.basis",
    "Planes": "loki_attention.core.planes",
    "attach": "loki_attention.integrations.huggingface",
    "calibrate": "loki_attention.calibration.calibrate",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
