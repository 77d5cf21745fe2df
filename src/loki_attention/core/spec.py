"""What a basis must match: heads, layers, RoPE and weights of a model, read by duck typing."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loki_attention.errors import MismatchError, ModelError

_SAMPLES = 1000
_ALLOWED_STRAYS = 5


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """About 1000 weights sampled evenly over a model's tensors, and the coarsest float type they were held in."""

    values: tuple[float, ...]
    epsilon: float

    @classmethod
    def of(
        cls, parameters: Iterable[tuple[str, Tensor]], whole: Callable[[str, Tensor], Tensor] = lambda _, weight: weight
    ) -> "Fingerprint":
        """The fingerprint of named parameters (matrices only); empty where one that is sampled has no data.

        ``whole`` is asked for the values of each matrix in turn, so that one is held at a time.
        """
        matrices = [(n, p) for n, p in parameters if p.dim() == 2 and p.is_floating_point()]
        matrices.sort(key=lambda pair: pair[0])
        each = max(1, _SAMPLES // max(1, len(matrices)))
        chosen = matrices[:: max(1, len(matrices) // _SAMPLES)]
        values: list[float] = []
        for name, weight in chosen:
            flat = whole(name, weight.detach()).reshape(-1)
            if flat.is_meta:
                return NO_WEIGHTS
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


NO_WEIGHTS = Fingerprint((), torch.finfo(torch.float32).eps)
"""The fingerprint of weights that are not looked at."""


class HeadLayout(NamedTuple):
    """A decoder's query heads, key heads and head dim, by its configuration."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> "HeadLayout":
        """The layout of a transformers-style text configuration."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads)


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
    def of(cls, model: Any, *, weights: bool = True) -> "ModelSpec":
        """The spec of a model with a transformers-style ``config`` and ``named_parameters()``.

        A model split over processes has the spec of the whole: its processes must ask together, since its weights are
        gathered, one at a time. ``weights=False`` leaves the fingerprint empty. Raises ``ModelError`` for what is no
        model, and where the configuration lacks something that decoders with attention have.
        """
        if not hasattr(model, "config"):
            raise ModelError(
                f"expected a transformers model, got {type(model).__name__}; load one with from_pretrained"
            )
        weighed = model.named_parameters() if weights else ()
        fingerprint = Fingerprint.of(weighed, partial(_whole, model))
        return cls.of_config(model.config, architecture=type(model).__name__, fingerprint=fingerprint)

    @classmethod
    def of_config(cls, config: Any, *, architecture: str, fingerprint: Fingerprint = NO_WEIGHTS) -> "ModelSpec":
        """The spec of a transformers-style configuration and the name of the class it is for."""
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        try:
            layout = HeadLayout.of(config)
            return cls(
                model_id=str(getattr(config, "name_or_path", "") or config.model_type).rstrip("/").split("/")[-1],
                architecture=architecture,
                depth=config.num_hidden_layers,
                layers=full_attention_layers(config),
                heads=layout.heads,
                kv_heads=layout.kv_heads,
                head_dim=layout.head_dim,
                rope=_plain(getattr(config, "rope_parameters", None) or {}),
                max_length=config.max_position_embeddings,
                vocabulary=config.vocab_size,
                fingerprint=fingerprint,
            )
        except AttributeError as error:
            raise ModelError(
                f"{architecture} has no {error.name!r} in its configuration, as decoders with attention have; see "
                "`loki info MODEL` for what is supported"
            ) from None

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
                    f"this basis was calibrated for another model, with {what.replace('_', ' ')} {ours} where this "
                    f"model has {theirs}; calibrate this model"
                )
        if dict(self.rope) != dict(model.rope):
            raise MismatchError(
                f"this basis was calibrated with other RoPE parameters, {dict(self.rope)} where this model has "
                f"{dict(model.rope)}; calibrate this model"
            )
        if not other_weights and self.fingerprint.values and not model.fingerprint.values:
            raise MismatchError(
                "this model's weights are not in memory and cannot be compared with those the basis was calibrated on; "
                "load them, or pass other_weights=True if you know that they are the same"
            )
        if not other_weights and not self.fingerprint.matches(model.fingerprint):
            raise MismatchError(
                "this basis was calibrated on other weights of the same architecture (a fine-tune?); calibrate this "
                "model, or pass other_weights=True (--other-weights) to use the basis all the same"
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
    """Indices of the layers whose attention sees the whole context."""
    return tuple(i for i, name in enumerate(layer_kinds(config)) if name == "full_attention")


def layer_kinds(config: Any) -> tuple[str, ...]:
    """Every layer's kind by its name in ``config.layer_types``; without names, a sliding window is every layer's."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        sliding = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers
    return tuple(kinds)


def _whole(model: Any, name: str, weight: Tensor) -> Tensor:
    """A weight's values: gathered where processes share it, from accelerate's keeping where it is offloaded."""
    if weight.is_meta:
        owner, _, own_name = name.rpartition(".")
        kept = getattr(getattr(model.get_submodule(owner), "_hf_hook", None), "weights_map", None)
        return weight if kept is None else kept[own_name]
    gather: Callable[[], Tensor] | None = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
