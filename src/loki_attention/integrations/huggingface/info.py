"""What attaching would do to a model and what its twins would cost, from its configuration alone; what runs here.

Knows no weights and no text: what calibration finds out is known only where a basis is given.
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

from loki_attention.core.basis import KeyBasis
from loki_attention.core.planes import Planes
from loki_attention.core.spec import HeadLayout, ModelSpec, layer_kinds
from loki_attention.core.tail import tail_rank
from loki_attention.errors import ArgumentError, check_tokens
from loki_attention.integrations.huggingface.families import causal_model_class, family_of_config
from loki_attention.kernels import native
from loki_attention.kernels.ops import Backend, Work, choose_backend
from loki_attention.kernels.triton import availability
from loki_attention.methods.loki import Loki
from loki_attention.results import installed_version

SPARSE, DENSE, LEFT_ALONE = "sparse", "dense", "left alone"
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInfo:
    """One layer: its kind by the configuration, what would happen (sparse, dense, left alone) and why."""

    layer: int
    kind: str
    action: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What ``attach(model, basis)`` would do, layer by layer, and bytes of what it stores.

    ``dtype`` is None where the configuration names none: bytes of K and V are then float32's. ``tail`` is the basis's,
    without one the costliest that calibration may choose.
    """

    model_type: str
    architecture: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str | None
    implementations: tuple[str, ...]
    planes: str
    tail: str
    context_tokens: int
    layers: tuple[LayerInfo, ...]
    kv_bytes: int
    """K and V of one token in one layer."""
    twin_bytes: int
    """Twins of one token in one sparse layer."""
    sum_bytes: int
    """The tail's sums of one sequence in one sparse layer, whatever its length."""

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the layers that would be sparse."""
        return tuple(layer.layer for layer in self.layers if layer.action == SPARSE)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the bytes of all sparse layers for a token and for a sequence of the context."""
        sparse = len(self.sparse_layers)
        per_token = {"kv": sparse * self.kv_bytes, "twins": sparse * self.twin_bytes}
        context = {name: self.context_tokens * size for name, size in per_token.items()}
        totals = {"per_token": per_token, "context": {**context, "sums": sparse * self.sum_bytes}}
        return asdict(self) | {"sparse_layers": list(self.sparse_layers), "sparse_layer_bytes": totals}


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineInfo:
    """The backend that would run here and why, versions, GPUs, and what the native kernels find on the CPU.

    ``isas`` are the instruction sets that they can run with, the best first; empty where they were not built.
    """

    backend: Backend
    versions: Mapping[str, str]
    cpu_features: tuple[str, ...]
    isas: tuple[str, ...]
    threads: int
    gpus: tuple[str, ...]
    triton: str
    """The version of triton, and why its kernels cannot run here where they cannot."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"backend": self.backend._asdict()}


def model_info(
    config: Any, *, planes: str | None = None, context_tokens: int | None = None, basis: KeyBasis | None = None
) -> ModelInfo:
    """What attaching loki would do to a model of this transformers configuration.

    ``planes``, dense layers and tail are the basis's where one is given, else the defaults of calibration;
    ``context_tokens`` defaults to the model's maximum. Raises ``ModelError`` for a model that is not supported, with the
    reason, ``MismatchError`` for another model's basis and ``ArgumentError`` for planes or a context that cannot be.
    """
    family = family_of_config(config)
    text, kind = config.get_text_config(decoder=True), causal_model_class(config)
    architecture = type(config).__name__ if kind is None else kind.__name__
    if basis is not None:
        spec = ModelSpec.of_config(config, architecture=architecture)
        basis.spec.check_serves(spec, other_weights=True)
    heads, kv_heads, head_dim = HeadLayout.of(text)
    chosen = _planes(planes, basis, head_dim)
    tail = "linear" if basis is None else basis.tail
    if context_tokens is not None:
        check_tokens("context", context_tokens, least=1)
    dtype = _dtype(config, text)
    held = torch.float32 if dtype is None else dtype
    return ModelInfo(
        model_type=text.model_type,
        architecture=architecture,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        implementations=family.implementations,
        planes=str(chosen),
        tail=tail,
        context_tokens=context_tokens or text.max_position_embeddings,
        layers=_layers(text, () if basis is None else basis.dense_layers),
        kv_bytes=2 * kv_heads * head_dim * held.itemsize,
        twin_bytes=kv_heads * chosen.bytes_per_token,
        sum_bytes=0 if tail == "none" else _sum_bytes(kv_heads, head_dim, chosen.rank),
    )


def machine_info() -> MachineInfo:
    """What this machine offers."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    built, missing, found = native.available(), availability.problem(), availability.version()
    on_gpu = Work(torch.bfloat16, "cuda", head_dim=128, group_size=1) if gpus else None
    return MachineInfo(
        backend=choose_backend("auto", on_gpu),
        versions={
            "loki-attention": installed_version("loki-attention"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        cpu_features=native.cpu_features() if built else (),
        isas=native.usable_isas() if built else (),
        threads=torch.get_num_threads(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in gpus),
        triton=", ".join(part for part in (found, missing and f"cannot run: {missing}") if part),
    )


def _layers(text: Any, marked: tuple[int, ...]) -> tuple[LayerInfo, ...]:
    layers = []
    for index, kind in enumerate(layer_kinds(text)):
        reason = Loki.reason_dense(index, marked)
        if kind != "full_attention":
            layers.append(LayerInfo(layer=index, kind=kind, action=LEFT_ALONE, reason="does not see the whole context"))
        elif reason is not None:
            layers.append(LayerInfo(layer=index, kind=kind, action=DENSE, reason=reason))
        else:
            layers.append(LayerInfo(layer=index, kind=kind, action=SPARSE, reason="sees the whole context"))
    return tuple(layers)


def _planes(wanted: str | None, basis: KeyBasis | None, head_dim: int) -> Planes:
    if wanted is None:
        return Planes.default(head_dim) if basis is None else basis.planes
    planes = Planes.parse(wanted)
    planes.check_fits(head_dim)
    return planes


def _sum_bytes(kv_heads: int, head_dim: int, rank: int) -> int:
    """Float32 sums of v, e and e v^T for every key head, and one count of tokens."""
    leading = tail_rank(head_dim, rank)
    return _FLOAT_BYTES * (1 + kv_heads * (head_dim + leading + leading * head_dim))


def _dtype(config: Any, text: Any) -> torch.dtype | None:
    named = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    if named is None or isinstance(named, torch.dtype):
        return named
    dtype = getattr(torch, str(named), None)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"the configuration's dtype is {named!r}, which torch does not know; correct config.json")
    return dtype
