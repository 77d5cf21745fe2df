"""What every method is: given rows of queries over a cached layer, which tokens they attend and what comes out.

A method decides; ``kernels`` compute; ``integrations`` find the rows. A selection method only says which slots to read
and, where it has a tail, what answers for the rest.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from loki_attention.cache import KeyEncoder, Watched
from loki_attention.core.attention import PLAIN, Softmax
from loki_attention.core.basis import KeyBasis
from loki_attention.core.budget import Budget
from loki_attention.core.encoder import EncodedQuery, Encoder
from loki_attention.core.planes import Plane, Planes
from loki_attention.core.shapes import Indices, Keys, PackedKeys, PerHeadRow, Queries, Values
from loki_attention.core.tail import TailSums, tail_rank, tail_value
from loki_attention.kernels import torch_backend
from loki_attention.kernels.rows import Rows

PER = ("kv-head", "query-head")


class LayerView(NamedTuple):
    """A cached layer as a method sees it.

    ``twins(encoder)`` are the packed low-rank keys of all slots, ``sums(encoder, rows)`` the tail's sums with one entry a
    row, (B, 1 or Hkv, T, ...). Both are brought up to date first. ``watched`` is there for a method that watches.
    """

    keys: Keys
    values: Values
    twins: Callable[[KeyEncoder], PackedKeys]
    sums: Callable[[KeyEncoder | None, Rows], TailSums]
    watched: Watched | None = None


class Step(NamedTuple):
    """Some query rows over one layer.

    The rows' slots and budgets, the attention scale, the encoded rows if any, what the model adds to the softmax, and
    whether anyone will look at the slots attended.
    """

    query: Queries
    layer: LayerView
    rows: Rows
    k: Int[Tensor, "b t"]
    scale: float
    encoded: EncodedQuery | None
    softmax: Softmax = PLAIN
    wants_indices: bool = True

    def sets(self, per: str) -> int:
        """How many index sets a row has: one per KV head, or one per query head."""
        return self.query.shape[1] if per == "query-head" else self.layer.keys.shape[1]


class Answer(NamedTuple):
    """Attention output (B, H, T, D) of the rows and the slots they attended; None where all were, or nobody looks.

    ``kept`` is the tail's estimate of the attention mass on those slots, not a number where there is no tail.
    """

    output: Queries
    indices: Indices | None
    kept: PerHeadRow | None = None


class Chosen(NamedTuple):
    """The slots to attend and, with a tail, the unselected tokens' log-mass per query head."""

    indices: Indices
    tail_mass: PerHeadRow | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(ABC):
    """One method on one layer. Subclasses are small files; ``docs/methods.md`` shows how to add one."""

    name: ClassVar[str]
    needs_basis: ClassVar[bool] = False
    principal_components: ClassVar[bool] = False
    """Whether the method wants a PCA basis in float planes, as the paper has it."""
    simulation: ClassVar[str | None] = None
    """What of the method is simulated, so that its time says nothing; None where it reads what it says it reads."""
    tails: ClassVar[tuple[str, ...]] = ("none",)
    knows_mass: ClassVar[bool] = False
    """Whether the tail's log-mass follows from what the method reads anyway; else it is exact, from every key."""
    default_dense_layers: ClassVar[tuple[int, ...]] = (0,)
    """Layers that stay dense unless asked otherwise: the first attends diffusely."""
    watches_prompt: ClassVar[bool] = False
    """Whether the method must see the prompt's queries: it cannot go on from a prompt computed without it."""

    budget: Budget
    head_dim: int
    encoder: Encoder | None = None
    tail: str = "none"
    per: str = "kv-head"
    planes: Planes | None = None
    """What is read of every key to rank it where no encoder says so; None where nothing is."""

    @classmethod
    def why_simulated(cls, tail: str) -> str | None:
        """Why time spent in this method with this tail says nothing, None where it can be timed."""
        reasons = [cls.simulation] if cls.simulation is not None else []
        if tail != "none" and not cls.knows_mass:
            reasons.append("the tail's mass is exact, which reads every key")
        return "; ".join(reasons) or None

    @classmethod
    def basis_for(cls, basis: KeyBasis) -> KeyBasis:
        """The basis the method wants, made of the one given."""
        return basis.principal() if cls.principal_components else basis

    @classmethod
    def default_planes(cls, head_dim: int, calibrated: Planes | None) -> Planes | None:
        """The planes where none are asked for, ``calibrated`` being the basis's; None for a method without planes."""
        if cls.principal_components:
            return Planes((Plane(max(1, head_dim // 4), 32),))
        return calibrated if cls.needs_basis else None

    @classmethod
    def problem_with_planes(cls, planes: Planes) -> str | None:
        """Why the method cannot take these planes and what to give instead, None where it can."""
        if cls.principal_components and not planes.is_float:
            return f"keeps float keys; got planes '{planes}', give R@32 or R@16"
        return None

    @classmethod
    def planes_by_size(cls, head_dim: int) -> tuple[Planes | None, ...]:
        """The planes to choose from for a given number of bytes, the largest first; ``(None,)`` without planes."""
        return (None,)

    @classmethod
    def reason_dense(cls, layer: int, marked: Collection[int] = ()) -> str | None:
        """Why a layer stays dense unless asked otherwise, None where it does not; ``marked`` are calibration's."""
        if layer in cls.default_dense_layers:
            return "attends diffusely"
        if cls.default_dense_layers and layer in marked:
            return "marked by calibration"
        return None

    def budgets(self, rows: Rows, prompt_tokens: Int[Tensor, " b"] | None = None) -> Int[Tensor, "b t"]:
        """K of every row; a method that watches is told where each sequence's prompt ended, if it is known."""
        return self.budget.of_each(rows.tokens)

    @classmethod
    def problem_with_native(cls, planes: Planes | None, per: str) -> str | None:
        """Why decode steps of this method cannot run on the native or the Triton kernels, None where they can."""
        return f"method {cls.name!r} has no kernels"

    def on(
        self, device: torch.device, dtype: torch.dtype, heads: slice = slice(None), *, backend: str = "torch"
    ) -> "Method":
        """This method with its encoder on ``device``, for a model of ``dtype`` and these of the layer's KV heads.

        ``backend``: where decode steps run; kernels other than torch's are only asked for where the method has them.
        """
        return self if self.encoder is None else replace(self, encoder=self.encoder.to(device, dtype).of_heads(heads))

    @property
    def ranking_bytes(self) -> int:
        """Bytes of one token's low-rank key per KV head, 0 for a method that keeps none."""
        planes = self.planes if self.encoder is None else self.encoder.planes
        return 0 if planes is None else planes.bytes_per_token

    @abstractmethod
    def attend(self, step: Step) -> Answer:
        """The attention output of the step's rows."""

    def encode(self, query: Queries, scale: float) -> EncodedQuery | None:
        """The encoded rows, or None for a method without an encoder."""
        return None if self.encoder is None else self.encoder.encode_query(query, scale)

    @abstractmethod
    def read_bytes(self, tokens: Tensor, k: Tensor, group_size: int, row_bytes: int) -> Tensor:
        """Bytes each decode row reads per KV head with ``tokens`` cached: twins, keys, values and sums.

        ``tokens`` and ``k`` hold one entry a row; ``row_bytes`` is the size of one key (or value) row.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionMethod(Method):
    """A method that picks K tokens a row and attends them exactly."""

    @abstractmethod
    def choose(self, step: Step) -> Chosen:
        """The slots each row attends."""

    def attend(self, step: Step) -> Answer:
        """Gather and attend what :meth:`choose` picked."""
        indices, mass = self.choose(step)
        answer = None
        if mass is None and self.tail != "none":
            mass = _exact_mass(step, indices)
        if mass is not None:
            mass, answer = self._tail_answer(step, mass)
        tensors = (step.query, step.layer.keys, step.layer.values, indices)
        output, kept = torch_backend.attend(*tensors, step.scale, mass, answer, step.softmax)
        if kept is not None and mass is not None:
            kept = kept.masked_fill(mass == -torch.inf, torch.nan)
        return Answer(output, indices, kept)

    def read_bytes(self, tokens: Tensor, k: Tensor, group_size: int, row_bytes: int) -> Tensor:
        """K keys and values for every set, and the tail's sums.

        A mass that is exact although the method does not read every key counts nothing: it is not to be had.
        """
        return 2.0 * row_bytes * self.sets_per_kv_head(group_size) * k.double() + self.tail_bytes()

    def sets_per_kv_head(self, group_size: int) -> int:
        """Index sets that share a KV head."""
        return group_size if self.per == "query-head" else 1

    def tail_bytes(self) -> float:
        """Bytes of the tail's float32 sums per KV head."""
        if self.tail == "none":
            return 0.0
        planes = self.planes if self.encoder is None else self.encoder.planes
        rank = tail_rank(self.head_dim, planes.rank) if planes is not None and self.tail == "linear" else 0
        return 4.0 * (self.head_dim + rank + rank * self.head_dim)

    @property
    def forced(self) -> torch_backend.Forced:
        """The sinks and recent tokens that are always attended."""
        return torch_backend.Forced(self.budget.sinks, self.budget.recent)

    def _tail_answer(self, step: Step, mass: PerHeadRow) -> tuple[PerHeadRow, Queries]:
        """The tail's log-mass and value; rows whose sums cover nothing have no tail."""
        sums = TailSums(*(tensor.unsqueeze(2) for tensor in step.layer.sums(self.encoder, step.rows)))
        kv_heads = step.layer.keys.shape[1]
        if step.encoded is None:
            leading, deviation = mass.new_zeros(*mass.shape, 0), mass
        else:
            leading, deviation = step.encoded.leading, step.encoded.deviation
        leading, deviation = (tensor.unflatten(1, (kv_heads, -1)) for tensor in (leading, deviation))
        value = tail_value(self.tail, sums, leading, deviation, step.scale).flatten(1, 2)
        empty = (sums.tokens == 0).squeeze(1)
        return mass.masked_fill(empty, -torch.inf), torch.where(empty[..., None], 0.0, value)


def _exact_mass(step: Step, indices: Indices) -> PerHeadRow:
    """The exact log-mass of what is not selected."""
    visible = step.rows.visible
    scores = torch_backend.score_exact(step.query, step.layer.keys, step.scale, indices.shape[1], step.softmax)
    scores = torch.where(visible[:, None, None], scores, 0.0)
    return torch_backend.tail_log_mass(scores, indices, step.rows, step.k, visible)


def sixteen_bit_planes(head_dim: int) -> tuple[Planes, ...]:
    """A quarter, an eighth and a sixteenth of the dims in 16 bits, in whole words.

    >>> [str(planes) for planes in sixteen_bit_planes(64)]
    ['16@16', '8@16', '4@16']
    """
    return tuple(Planes((Plane(max(2, head_dim // part // 2 * 2), 16),)) for part in (4, 8, 16))
