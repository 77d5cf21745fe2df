"""Which rows of a forward are sparse, and their attention. The one place that knows decode from prefill."""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loki_attention.cache import KeyEncoder, LayerCache, Watched
from loki_attention.core.attention import Softmax
from loki_attention.core.shapes import PackedKeys
from loki_attention.core.tail import TailSums, covered_tokens
from loki_attention.errors import ArgumentError
from loki_attention.integrations.huggingface.masks import check_nested, own_slots
from loki_attention.kernels import torch_backend
from loki_attention.kernels.ops import rows_at_once
from loki_attention.kernels.rows import Rows
from loki_attention.methods import Answer, LayerView, Method, Step, WatchingMethod

COVERED, BELOW = "budget covers all tokens", "below dense_below"
"""Why decode steps stay dense in layers that may be sparse."""


@dataclass(frozen=True, slots=True)
class RowRule:
    """Which rows of a many-row forward are sparse: those from ``prompt_tokens`` on, or all with one K for the window.

    Without a rule only single new tokens are: many rows at once are prefill.
    """

    prompt_tokens: int | Int[Tensor, " b"] = 0
    whole_window: bool = False


@dataclass(frozen=True)
class SparseRows:
    """The rows of a forward from ``start`` on, each row's budget, and which of them really are sparse.

    All layers of a forward share one: what follows from its tensors is worked out once.
    """

    start: int
    rows: Rows
    k: Int[Tensor, "b t"]
    active: Bool[Tensor, "b t"]

    @cached_property
    def all_active(self) -> bool:
        """Whether every one of these rows is sparse."""
        return bool(self.active.all())

    @cached_property
    def widest(self) -> int:
        """The largest K."""
        return int(self.k.max())

    @cached_property
    def tokens_cached(self) -> Int[Tensor, " n"]:
        """The tokens that each sparse row could see."""
        return self.rows.tokens.flatten() if self.all_active else self.rows.tokens[self.active]

    @cached_property
    def tokens_read(self) -> Int[Tensor, " n"]:
        """K of each sparse row."""
        return self.k.flatten() if self.all_active else self.k[self.active]

    @cached_property
    def totals(self) -> tuple[int, int]:
        """Tokens seen and read over all sparse rows."""
        cached, read = torch.stack([self.tokens_cached.sum(), self.tokens_read.sum()]).tolist()
        return cached, read


class Tensors(NamedTuple):
    """One layer's tensors in one forward, as attention received them, and the layer's store if it has one."""

    query: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None
    scale: float
    store: LayerCache | None
    softmax: Softmax
    watched: Watched | None = None


def decode_rows(rows: Rows, rule: RowRule | None) -> Bool[Tensor, "b t"]:
    """The rows that may be sparse: single new tokens and those that the rule says; all others are of a prompt."""
    batch, count = rows.tokens.shape
    if count == 1 or rule is None:
        return torch.full_like(rows.tokens, count == 1, dtype=torch.bool)
    prompt = torch.as_tensor(rule.prompt_tokens, device=rows.tokens.device).reshape(-1, 1)
    if len(prompt) not in (1, batch):
        raise ArgumentError(
            f"prompt_tokens has {len(prompt)} entries for {batch} sequences; give one for each, or an int"
        )
    return own_slots(rows) & (rows.tokens > prompt)


def find_sparse_rows(
    tensors: Tensors, rows: Rows, method: Method, rule: RowRule | None, dense_below: int
) -> SparseRows | str:
    """The forward's sparse rows, or the reason why it is dense throughout."""
    mask, count = tensors.mask, rows.tokens.shape[1]
    active = decode_rows(rows, rule)
    k = method.budgets(rows, None if tensors.watched is None else tensors.watched.prompt_tokens)
    if count > 1 and rule is not None:
        if rule.whole_window:
            k = torch.minimum(method.budget.of_each(rows.tokens[:, -1:]).expand_as(k), rows.tokens)
        check_nested(mask, rows, active)
    if count > 1 and not bool(active.any()):
        return "prompt rows"
    k = torch.where(rows.tokens < dense_below, rows.tokens, k)
    sparse = active & (k < rows.tokens)
    if not bool(sparse.any()):
        return COVERED if bool((rows.tokens[active] >= dense_below).any()) else BELOW
    if count == 1:
        # A decode batch goes through as one: sequences that the budget covers are attended whole, without a tail.
        found = SparseRows(0, rows, k, active)
        found.__dict__["all_active"] = True
        return found
    start = int(sparse.any(0).int().argmax())
    return SparseRows(start, rows.chunk(start, count), k[:, start:], sparse[:, start:])


def attend_sparse_rows(tensors: Tensors, method: Method, found: SparseRows, *, wants_indices: bool) -> Answer:
    """The method's answer for the rows from ``found.start`` on."""
    query = tensors.query[:, :, found.start :]
    batch, heads, count, dim = query.shape
    layer, budgets, widest = view_of(tensors, method), found.k, found.widest
    at_once = rows_at_once(batch * heads, tensors.keys.shape[2], widest, dim)
    if isinstance(method, WatchingMethod):
        # It sees the other sequences' rows too: dense ones, and none where there is but padding.
        dense = torch.where(own_slots(found.rows), found.rows.tokens, 0)
        budgets = torch.where(found.active, budgets, dense)
        widest = int(budgets.max())
        at_once = 1 if method.row_by_row else at_once
    outputs, indices, kept = [], [], []
    for start in range(0, count, at_once):
        part = slice(start, min(start + at_once, count))
        rows = found.rows.chunk(part.start, part.stop)
        encoded = method.encode(query[:, :, part], tensors.scale)
        step = Step(
            query[:, :, part], layer, rows, budgets[:, part], tensors.scale, encoded, tensors.softmax, wants_indices
        )
        answer = method.attend(step)
        outputs.append(answer.output)
        if answer.kept is not None:
            kept.append(answer.kept)
        if answer.indices is not None:
            missing = widest - answer.indices.shape[-1]
            indices.append(torch.nn.functional.pad(answer.indices, (0, missing), value=-1))
    masses, slots = (torch.cat(parts, dim=2) if parts else None for parts in (kept, indices))
    return Answer(torch.cat(outputs, dim=2), slots, masses)


def view_of(tensors: Tensors, method: Method) -> LayerView:
    """The layer as a method sees it: twins and sums from the store, or made on the spot, once, where there is none."""
    store, decoding = tensors.store, tensors.query.shape[2] == 1

    @cache
    def twins(encoder: KeyEncoder) -> PackedKeys:
        # Rows of one forward leave a decode step's tiles alone: they would all be encoded anew, and again after.
        if store is not None and (decoding or store.twins is None or not store.twins.encoder.tiled):
            return store.encode(encoder)
        slots = tensors.keys.shape[2]
        packed = encoder.buffer(len(tensors.keys), slots)
        encoder.write(tensors.keys, packed, 0, slots)
        return packed

    @cache
    def leading() -> Tensor:
        return torch_backend.leading_dims(tensors.keys, method.encoder)

    latest: list[tuple[Tensor, TailSums]] = []

    def sums(encoder: KeyEncoder | None, rows: Rows) -> TailSums:
        if store is not None and decoding:
            held = store.absorb(encoder, rows)
            return TailSums(held.tokens[:, None], *(tensor.unsqueeze(2) for tensor in held[1:]))
        covered = covered_tokens(rows.tokens)
        # Rows that come one by one mostly cover what the row before did.
        if not latest or not torch.equal(latest[0][0], covered):
            latest.clear()
            latest.append((covered, torch_backend.sums_of_blocks(leading(), tensors.values, rows)))
        return latest[0][1]

    return LayerView(tensors.keys, tensors.values, twins, sums, tensors.watched)
