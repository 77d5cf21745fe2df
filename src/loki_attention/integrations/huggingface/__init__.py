"""transformers: which models are served, how their attention is redirected, and what their caches store."""

from loki_attention.integrations.huggingface.attach import attach
from loki_attention.integrations.huggingface.attached import Attached

__all__ = ["Attached", "attach"]
