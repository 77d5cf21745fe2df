"""``KeyBasis``: what calibration yields and ``attach`` deploys. Saving and loading are in ``core.artifact``."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loki_attention.core import artifact, candidates
from loki_attention.core.budget import Budget
from loki_attention.core.candidates import CANDIDATES, LayerBasis
from loki_attention.core.encoder import Encoder, encoder
from loki_attention.core.moments import LayerMoments
from loki_attention.core.planes import Planes
from loki_attention.core.spec import ModelSpec
from loki_attention.errors import ArgumentError, unknown_name

PER_HEAD = "per-head"
"""The candidate's name where heads differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyBasis:
    """A model's low-rank key basis: per full-attention layer and KV head, with what it was chosen for.

    ``record`` tells how it was calibrated (text, length, every held-out figure) in plain JSON types; ``moments`` allow
    it to be fitted again and may be absent.
    """

    spec: ModelSpec
    layers: Mapping[int, LayerBasis]
    planes: Planes
    budget: Budget
    tail: str
    dense_layers: tuple[int, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    moments: Mapping[int, LayerMoments] | None = None

    @property
    def candidate(self) -> str:
        """The one candidate of all heads, or ``PER_HEAD`` where they differ."""
        names = {name for layer in self.layers.values() for name in layer.candidates}
        return names.pop() if len(names) == 1 else PER_HEAD

    def encoder(self, layer: int, planes: Planes | None = None) -> Encoder:
        """The encoder of a layer (its index in the model), for these planes or others."""
        return encoder(self.layers[layer], planes or self.planes, self.spec.group_size)

    def refit(self, *, candidate: str | None = None, planes: Any = None, budget: Any = None) -> "KeyBasis":
        """The basis of another candidate, planes (text or ``Planes``) or ``Budget``, from the same moments: no text.

        What is not given stays. Held-out figures do not carry over: they were measured for what this basis was.
        Raises ``ArgumentError`` without moments or for an unknown candidate or planes.
        """
        changed = self.with_candidate(candidate) if candidate is not None else self
        planes = self.planes if planes is None else Planes.of(planes)
        planes.check_fits(self.spec.head_dim)
        budget = self.budget if budget is None else Budget.checked(budget)
        record = {key: value for key, value in self.record.items() if key != "figures"}
        return replace(changed, planes=planes, budget=budget, record=record)

    def with_candidate(self, candidate: str) -> "KeyBasis":
        """This basis with ``candidate`` in every layer and head; itself where it already is."""
        if candidate not in CANDIDATES:
            raise unknown_name("candidate", candidate, CANDIDATES)
        if candidate == self.candidate:
            return self
        if self.moments is None:
            raise ArgumentError(
                f"this basis holds {self.candidate} and has no moments beside it to fit {candidate} from; calibrate "
                "again, or keep moments.safetensors in the basis folder"
            )
        return replace(self, layers={i: candidates.build(candidate, m) for i, m in self.moments.items()})

    def principal(self) -> "KeyBasis":
        """This basis with PCA throughout, as the paper's methods need: the variant of lower held-out KL."""
        if self.candidate in ("pca-pre", "pca-post"):
            return self
        figures = self.record.get("figures", {}).get("candidates", {})
        measured = {name: figures[name]["kl"] for name in ("pca-pre", "pca-post") if name in figures}
        return self.with_candidate(min(measured, key=lambda name: measured[name]) if measured else "pca-pre")

    def channels(self) -> "KeyBasis":
        """This basis with the keys' own channels for axes, the heaviest first: what Double Sparsity ranks by."""
        return replace(self, layers={i: candidates.channels(layer) for i, layer in self.layers.items()})

    def save(self, path: str | Path) -> Path:
        """Write the basis folder, all of it or nothing; an older basis at ``path`` is replaced."""
        tensors = {(i, name): getattr(b, name) for i, b in self.layers.items() for name in candidates.TENSOR_FIELDS}
        manifest = {
            "spec": self.spec.to_dict(),
            "candidates": {str(i): list(layer.candidates) for i, layer in self.layers.items()},
            "planes": str(self.planes),
            "budget": {name: getattr(self.budget, name) for name in artifact.BUDGET_FIELDS},
            "tail": self.tail,
            "dense_layers": list(self.dense_layers),
            "record": dict(self.record),
        }
        return artifact.save(Path(path), manifest, tensors, self.moments)

    @classmethod
    def load(cls, path: str | Path, model: Any = None, *, other_weights: bool = False) -> "KeyBasis":
        """Read a basis folder and, where ``model`` is given, check that it belongs to that model.

        Raises ``ArtifactError`` for a path that is no basis, a newer format, a truncated or changed file or
        non-finite values, and ``MismatchError`` for another architecture, head layout, RoPE or, unless
        ``other_weights``, other weights.
        """
        manifest, tensors, moments = artifact.load(Path(path))
        basis = cls(
            spec=ModelSpec.from_dict(manifest["spec"]),
            layers={
                int(i): LayerBasis(tuple(names), *(tensors[int(i), name] for name in candidates.TENSOR_FIELDS))
                for i, names in manifest["candidates"].items()
            },
            planes=Planes.parse(manifest["planes"]),
            budget=Budget(**manifest["budget"]),
            tail=manifest["tail"],
            dense_layers=tuple(manifest["dense_layers"]),
            record=manifest["record"],
            moments=moments,
        )
        if model is not None:
            basis.spec.check_serves(ModelSpec.of(model), other_weights=other_weights)
        return basis
