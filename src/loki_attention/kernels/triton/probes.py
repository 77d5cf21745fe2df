"""Reads rows, whole or their beginning, in order or gathered, and nothing else: what a memory gives, for benchmarks."""

import torch
import triton.language as tl
from torch import Tensor

from loki_attention.kernels.triton.jit import kernel

_ROWS = 64


@kernel
def _read_rows_kernel(
    rows, order, totals, count, SIZE: tl.constexpr, WIDTH: tl.constexpr, ORDERED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = place < count
    row = tl.load(order + place, mask=there, other=0) if ORDERED else place
    address = rows + row.to(tl.int64)[:, None] * SIZE + tl.arange(0, WIDTH)[None, :]
    read = tl.load(address, mask=there[:, None], other=0.0).to(tl.float32)
    tl.store(totals + tl.program_id(0), tl.sum(tl.sum(read, axis=1), axis=0))


def read_rows(rows: Tensor, width: int, totals: Tensor, order: Tensor | None = None) -> None:
    """Sum the first ``width`` elements of each row of ``rows`` (N, D), or of those in ``order``: a sum per 64 rows.

    ``rows`` contiguous, ``width`` a power of two, ``totals`` what :func:`room_for` makes.
    """
    count = len(rows) if order is None else len(order)
    _read_rows_kernel[(_programs(count),)](
        rows, rows if order is None else order, totals, count, rows.shape[1], width, order is not None, _ROWS
    )


def room_for(count: int, device: torch.device) -> Tensor:
    """Room for the sums of ``count`` rows."""
    return torch.empty(_programs(count), device=device)


def _programs(count: int) -> int:
    return -(-count // _ROWS)
