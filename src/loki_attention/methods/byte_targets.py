"""The settings at which each method reads a given share of what dense attention reads: for comparisons at equal bytes.

Every method counts for itself (``read_bytes``), K/V in 16 bits. Of its planes it takes the largest that are at most half
of the bytes, and then as many keys and values as fit beside them and what does not grow with the length.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loki_attention.core.budget import Budget
from loki_attention.core.planes import Planes
from loki_attention.errors import ArgumentError
from loki_attention.kernels.rows import Rows
from loki_attention.methods import Method, method_class

_UNIT = 65536
_KV_BYTES = 2


class Point(NamedTuple):
    """A budget and planes to attach with, and the share of dense attention's bytes that they read."""

    budget: Budget
    planes: Planes | None
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The decode step that a share is meant for: ``tokens`` cached, the new one included, and what the model gives.

    At more tokens the same settings read no larger share, up to the rounding of K: a row a set. Of ``budget`` only
    minimum, sinks and recent count.
    """

    tokens: int
    head_dim: int
    group_size: int
    budget: Budget
    tail: str = "none"
    per: str = "kv-head"


def point_at(method: object, share: float | int, shape: StepShape) -> Point | None:
    """The settings at which ``method`` reads at most ``share`` of dense attention's bytes, None where none are so low.

    A mean or linear tail's sums count. ``snapkv`` is taken at the prompt's end: tokens that come later add to it.
    Raises ``ArgumentError`` for an unknown method, a tail it does not have, and a share outside 0 to 1.

    >>> least = Budget(fraction=1 / 8, minimum=36)
    >>> shape = StepShape(tokens=2048, head_dim=64, group_size=2, budget=least, tail="linear")
    >>> [str(point_at("loki", share, shape).planes) for share in (1 / 8, 1 / 16)]
    ['16@4+32@2', '8@4+16@2']
    >>> point_at("exact-topk", 1 / 2, shape) is None
    True
    """
    kind = method_class(method)
    if not 0 < share <= 1:
        raise ArgumentError(f"share must be above 0 and at most 1, 1/8 say; got {share!r}")
    if kind is None:
        return None
    if shape.tail not in kind.tails:
        raise ArgumentError(f"method {kind.name!r} has no tail {shape.tail!r}; it has {', '.join(kind.tails)}")
    sizes = kind.planes_by_size(shape.head_dim)
    for planes in sizes:
        if _ranking_share(_method(kind, planes, shape, shape.budget), shape) > share / 2 and planes is not sizes[-1]:
            continue
        point = _largest(kind, planes, share, shape)
        if point is not None:
            return point
    return None


def step_bytes(
    method: object, point: Point, shape: StepShape, tokens: Int[Tensor, " n"], prompt_tokens: int | None = None
) -> Float[Tensor, " n"]:
    """Bytes that decode steps at each of ``tokens`` lengths read a layer and KV head, K/V in 16 bits; float64.

    Steps that the budget covers are dense. ``prompt_tokens`` is where the prompt ended, for methods that ask.
    """
    kind = method_class(method)
    dense = (2.0 * _KV_BYTES * shape.head_dim) * tokens.double()
    if kind is None:
        return dense
    made = _method(kind, point.planes, shape, point.budget)
    ends = None if prompt_tokens is None else torch.tensor([prompt_tokens])
    k = made.budgets(Rows(torch.zeros(1, 1, dtype=torch.long), tokens[None]), ends)[0]
    read = made.read_bytes(tokens, k, shape.group_size, _KV_BYTES * shape.head_dim)
    return torch.where(k < tokens, read.double(), dense)


def _largest(kind: type[Method], planes: Planes | None, share: float, shape: StepShape) -> Point | None:
    """The largest budget within ``share`` for these planes, None where the smallest reads more."""
    fits, too_much = 0, int(share * _UNIT) + 1
    while too_much - fits > 1:
        middle = (fits + too_much) // 2
        if _share_read(_method(kind, planes, shape, shape.budget.at_fraction(middle / _UNIT)), shape) <= share:
            fits = middle
        else:
            too_much = middle
    if not fits:
        return None
    method = _method(kind, planes, shape, shape.budget.at_fraction(fits / _UNIT))
    return Point(method.budget, planes, _share_read(method, shape))


def _method(kind: type[Method], planes: Planes | None, shape: StepShape, budget: Budget) -> Method:
    per = "query-head" if kind.principal_components else shape.per
    return kind(budget=budget, head_dim=shape.head_dim, tail=shape.tail, per=per, planes=planes)


def _share_read(method: Method, shape: StepShape) -> float:
    """What the method reads over what dense attention does."""
    return _read(method, shape, shape.tokens, method.budget.of(shape.tokens)) / _dense(shape)


def _ranking_share(method: Method, shape: StepShape) -> float:
    """What the method reads of every token to rank it, over what dense attention reads."""
    both, one = (_read(method, shape, times * shape.tokens, 0) for times in (2, 1))
    return (both - one) / _dense(shape)


def _read(method: Method, shape: StepShape, tokens: int, k: int) -> float:
    row_bytes = _KV_BYTES * shape.head_dim
    return float(method.read_bytes(torch.tensor([tokens]), torch.tensor([k]), shape.group_size, row_bytes))


def _dense(shape: StepShape) -> int:
    return 2 * _KV_BYTES * shape.head_dim * shape.tokens
