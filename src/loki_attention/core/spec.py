"""What a basis must match: heads, layers, RoPE and weights of a model, read by duck typing."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from loki_attention.errors import MismatchError

_SAMPLES = 1000
_ALLOWED_STRAYS = 5


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """About 1000 weights sampled evenly over a model's tensors, and the coarsest float type they were held in."""

    values: tuple[float, ...]
    epsilon: float

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, Tensor]]) -> "Fingerprint":
        """The fingerprint of named parameters (matrices only; tensors without data are left out)."""
        matrices = [(n, p) for n, p in parameters if p.dim() == 2 and p.is_floating_point() and not p.is_meta]
        matrices.sort(key=lambda pair: pair[0])
        each = max(1, _SAMPLES // max(1, len(matrices)))
        chosen = matrices[:: max(1, len(matrices) // _SAMPLES)]
        values: list[float] = []
        for _, weight in chosen:
            flat = weight.detach().reshape(-1)
            # Whole numbers: float32 cannot tell the last slots of a large vocabulary apart, and steps past the end.
            slots = torch.arange(each, device=flat.device) * (flat.numel() - 1) // max(1, each - 1)
            values += flat[slots].float().tolist()
        epsilon = max((torch.finfo(p.dtype).eps for _, p in chosen), default=0.0)
        return cls(tuple(values), max(epsilon, torch.finfo(torch.float32).eps))

    def matches(self, other: "Fingerprint") -> bool:
        """Whether both are the same weights up to a change of dtype.

        Held in the same type they must agree; in different types they may differ by one rounding of the coarser. More
        than 5 in 1000 beyond that is another model.
        """
        if len(self.values) != len(other.values):
            return False
        same_type = self.epsilon == other.epsilon
        tolerance = 1e-6 if same_type else 0.51 * max(self.epsilon, other.epsilon)
        strays = sum(
            not math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-7)
            for a, b in zip(self.values, other.values, strict=True)
        )
        return strays <= _ALLOWED_STRAYS * len(self.values) / _SAMPLES


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The traits of a model that a basis depends on. ``layers`` are the full-attention layers' indices."""

    model_id: str
    architecture: str
    depth: int
    layers: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    rope: Mapping[str, Any]
    max_length: int
    vocabulary: int
    fingerprint: Fingerprint

    @classmethod
    def of(cls, model: Any) -> "ModelSpec":
        """The spec of a model with a transformers-style ``config`` and ``named_parameters()``."""
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        heads = config.num_attention_heads
        return cls(
            model_id=str(getattr(config, "name_or_path", "") or config.model_type).rstrip("/").split("/")[-1],
            architecture=type(model).__name__,
            depth=config.num_hidden_layers,
            layers=full_attention_layers(config),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            rope=_plain(getattr(config, "rope_parameters", None) or {}),
            max_length=config.max_position_embeddings,
            vocabulary=config.vocab_size,
            fingerprint=Fingerprint.of(model.named_parameters()),
        )

    @property
    def group_size(self) -> int:
        """Query heads that share a key head, G."""
        return self.heads // self.kv_heads

    def check_serves(self, model: "ModelSpec", *, other_weights: bool = False) -> None:
        """Raise ``MismatchError`` where a basis of this spec cannot serve ``model``.

        ``other_weights=True`` lets other weights pass (a fine-tune, say); layout and RoPE must always agree.
        """
        for what in ("architecture", "depth", "layers", "heads", "kv_heads", "head_dim"):
            ours, theirs = getattr(self, what), getattr(model, what)
            if ours != theirs:
                raise MismatchError(
                    f"this basis was calibrated for another model: its {what.replace('_', ' ')} is {ours}, the "
                    f"model's is {theirs}; calibrate this model"
                )
        if dict(self.rope) != dict(model.rope):
            raise MismatchError(
                f"this basis was calibrated with other RoPE parameters: {dict(self.rope)}, the model has "
                f"{dict(model.rope)}; calibrate this model"
            )
        if not other_weights and not self.fingerprint.matches(model.fingerprint):
            raise MismatchError(
                "this basis was calibrated on other weights of the same architecture (a fine-tune?); calibrate this "
                "model, or pass other_weights=True to use the basis all the same"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ModelSpec":
        """The spec that :meth:`to_dict` wrote."""
        fingerprint = Fingerprint(tuple(fields["fingerprint"]["values"]), fields["fingerprint"]["epsilon"])
        return cls(**{**fields, "layers": tuple(fields["layers"]), "fingerprint": fingerprint})


def full_attention_layers(config: Any) -> tuple[int, ...]:
    """Indices of the layers whose attention sees the whole context: named so, or all of them without a sliding window."""
    types = getattr(config, "layer_types", None)
    if types is None:
        sliding = getattr(config, "sliding_window", None) is not None
        types = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    return tuple(i for i, name in enumerate(types) if name == "full_attention")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
