"""Loki with quantised low-rank keys, one index set per KV head and a virtual token for what is not selected."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loki_attention.core.encoder import EncodedQuery
from loki_attention.core.planes import Planes
from loki_attention.core.shapes import Queries
from loki_attention.core.tail import TAILS, TailSums
from loki_attention.kernels import native, torch_backend
from loki_attention.kernels.native import NativeEncoder, NativeStep
from loki_attention.kernels.triton.encoder import TritonEncoder
from loki_attention.methods.base import Answer, Chosen, Method, SelectionMethod, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Loki(SelectionMethod):
    """Rank all tokens by their low-rank twins, attend the best K exactly (Loki, algorithm 1; ``docs/concepts.md``)."""

    name: ClassVar[str] = "loki"
    needs_basis: ClassVar[bool] = True
    tails: ClassVar[tuple[str, ...]] = TAILS
    knows_mass: ClassVar[bool] = True

    kernels: NativeEncoder | TritonEncoder | None = None
    """The encoder of the kernels that decode steps run on, None where that is torch."""

    @classmethod
    def problem_with_native(cls, planes: Planes | None, per: str) -> str | None:
        """Float planes and one set per query head have no kernels."""
        if per != "kv-head":
            return f"per={per!r} has no kernels"
        return f"planes '{planes}' have no kernels" if planes is not None and planes.is_float else None

    @classmethod
    def planes_by_size(cls, head_dim: int) -> tuple[Planes | None, ...]:
        """The default planes, then about half and a quarter of their bytes."""
        sizes = (Planes.default(head_dim), *(_smaller(head_dim, divisor) for divisor in (2, 4)))
        return tuple(dict.fromkeys(sizes))

    def on(
        self, device: torch.device, dtype: torch.dtype, heads: slice = slice(None), *, backend: str = "torch"
    ) -> Method:
        """This method with its encoder on ``device``; that of the kernels beside it, for rows that come singly."""
        placed = SelectionMethod.on(self, device, dtype, heads)
        kinds: dict[str, type[NativeEncoder] | type[TritonEncoder]] = {"native": NativeEncoder, "triton": TritonEncoder}
        kind = kinds.get(backend)
        if kind is not None and isinstance(placed, Loki) and placed.encoder is not None:
            return replace(placed, kernels=kind(placed.encoder))
        return placed

    def encode(self, query: Queries, scale: float) -> EncodedQuery | None:
        """The encoded rows; None where a kernel encodes them itself."""
        return None if self._runs_in_kernels(query) else SelectionMethod.encode(self, query, scale)

    def attend(self, step: Step) -> Answer:
        """Select and attend, in one call of the kernels where rows come singly."""
        if not self._runs_in_kernels(step.query):
            return SelectionMethod.attend(self, step)
        assert self.kernels is not None
        layer, rows, encoder = step.layer, step.rows, self.kernels
        sums = None
        if self.tail != "none":
            tokens, *others = layer.sums(encoder, rows)
            sums = TailSums(tokens.squeeze(1), *(tensor.squeeze(2) for tensor in others))
        output, indices, _, kept = _decode_step(encoder)(
            encoder,
            step.query,
            layer.keys,
            layer.values,
            layer.twins(encoder),
            rows.span or rows,
            step.k[:, 0],
            step.scale,
            sinks=self.forced.sinks,
            recent=self.forced.recent,
            tail=self.tail,
            sums=sums,
            soft_cap=step.softmax.softcap,
            learned_sinks=step.softmax.sink_logits,
            wants_indices=step.wants_indices,
            wants_kept=self.tail != "none",
        )
        return Answer(output, None if indices is None else indices.long(), kept)

    def _runs_in_kernels(self, query: Queries) -> bool:
        return self.kernels is not None and query.shape[2] == 1

    def choose(self, step: Step) -> Chosen:
        """The K highest codes, sinks and the recent window among them."""
        assert self.encoder is not None and step.encoded is not None
        query, planes = step.encoded, self.encoder.planes
        scores = torch_backend.score_low_rank(query, step.layer.twins(self.encoder), planes, step.sets(self.per))
        mass = None if scores.shape[2] == 1 else torch_backend.group_log_mass(scores, step.rows, self.forced)
        ranking = torch_backend.combine_group(scores, mass)
        if not planes.is_float:
            ranking = torch_backend.code(ranking, query.deviation)
        indices = torch_backend.top_k(ranking, step.rows, step.k, self.forced)
        if self.tail == "none" or not self.knows_mass:
            return Chosen(indices)
        estimates, sample = step.softmax.cap(torch_backend.estimates(scores, query)), step.rows.sampled
        return Chosen(indices, torch_backend.tail_log_mass(estimates, indices, step.rows, step.k, sample))

    def read_bytes(self, tokens: Tensor, k: Tensor, group_size: int, row_bytes: int) -> Tensor:
        """Every twin, K keys and values for every set, and the tail's sums."""
        selected = SelectionMethod.read_bytes(self, tokens, k, group_size, row_bytes)
        return tokens.double() * self.ranking_bytes + selected


def _smaller(head_dim: int, divisor: int) -> Planes:
    """The default planes of a head ``divisor`` times smaller, in whole words.

    >>> [str(_smaller(dim, divisor)) for dim, divisor in ((64, 2), (64, 4), (128, 2))]
    ['8@4+16@2', '8@4', '16@4+32@2']
    """
    return Planes.default(max(8, head_dim // divisor))


def _decode_step(encoder: NativeEncoder | TritonEncoder) -> Callable[..., NativeStep]:
    """The step of the kernels that an encoder belongs to."""
    if isinstance(encoder, NativeEncoder):
        return native.decode_step
    from loki_attention.kernels.triton.launch import decode_step

    return decode_step
