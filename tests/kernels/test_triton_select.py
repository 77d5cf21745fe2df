"""Selection by the Triton kernels alone, on keys of our own: rows as long as one program takes, ties, and a K of each."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loki_attention.kernels.triton.select import compact_kernel, refine_kernel, select_kernel
from loki_attention.kernels.triton.tuning import Tuning
from triton_cases import DEVICE

SLOTS, CHUNK, BLOCK = Tuning().one_program_slots, 4096, 1024
SPREAD, FEW = 65535, 3
# Slots, K, and how many different keys there are.
ROWS = [
    (SLOTS, 2048, SPREAD),
    (SLOTS, 5000, FEW),
    (SLOTS - 7, SLOTS, SPREAD),
    (9001, 1, FEW),
    (2049, 2048, 1),
    (1, 1, SPREAD),
]


def keys_of_rows(written: int) -> Tensor:
    """A row of keys of each: 0 behind its last slot up to a multiple of ``written``, the highest key, not written, after."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.full((len(ROWS), SLOTS), 65535)
    for row, (stop, _, different) in enumerate(ROWS):
        keys[row, :stop] = 65535 - torch.randint(different, (stop,), generator=generator)
        keys[row, stop : -(-stop // written) * written] = 0
    return keys


def in_one_program(keys: Tensor, stop: Tensor, k: Tensor, indices: Tensor, threshold: Tensor) -> None:
    tuning = Tuning()
    select_kernel[(len(ROWS),)](
        keys, stop, stop, stop, k, indices, threshold, SLOTS, SLOTS, 1, 0, SLOTS, tuning.select_block(SLOTS),
        num_warps=tuning.select_warps(SLOTS),
    )  # fmt: skip


def in_chunks(keys: Tensor, stop: Tensor, k: Tensor, indices: Tensor, threshold: Tensor) -> None:
    rows, chunks = len(ROWS), SLOTS // CHUNK
    histogram, refined = (torch.zeros(rows, chunks, 256, dtype=torch.int32, device=DEVICE) for _ in range(2))
    above, bounds = (torch.zeros(rows, n, dtype=torch.int32, device=DEVICE) for n in (chunks, 2))
    for row, (end, _, _) in enumerate(ROWS):
        places = torch.arange(end) // CHUNK * 256 + keys[row, :end].cpu().long() // 256
        histogram[row] = torch.bincount(places, minlength=256 * chunks).view(chunks, 256)
    refine_kernel[(rows, chunks)](
        keys, stop, stop, stop, k, histogram, refined, above, bounds, SLOTS, 1, 0, CHUNK, BLOCK, num_warps=4
    )  # fmt: skip
    compact_kernel[(rows, chunks)](
        keys, stop, refined, above, bounds, indices, threshold, SLOTS, SLOTS, 1, CHUNK, BLOCK, num_warps=4
    )  # fmt: skip


@pytest.mark.parametrize(("way", "written"), [(in_one_program, 16), (in_chunks, BLOCK)])
def test_the_highest_keys_are_listed_in_order(way: Callable[..., None], written: int) -> None:
    """Ties go to the lower slot; the threshold and the last slot taken at it are what the tail's sample needs."""
    keys = keys_of_rows(written)
    stop, k = (torch.tensor([row[i] for row in ROWS], device=DEVICE) for i in (0, 1))
    indices = torch.full((len(ROWS), SLOTS), -1, dtype=torch.int32, device=DEVICE)
    threshold = torch.full((len(ROWS), 2), -1, dtype=torch.int32, device=DEVICE)
    way(keys.to(torch.uint16).to(DEVICE), stop, k, indices, threshold)
    for row, (end, wanted, _) in enumerate(ROWS):
        taken = keys[row, :end].sort(stable=True, descending=True).indices[:wanted].sort().values
        assert torch.equal(indices[row, : len(taken)].cpu().long(), taken)
        assert (indices[row, len(taken) :] == -1).all()
        lowest = keys[row, taken].min()
        assert threshold[row].tolist() == [lowest, taken[keys[row, taken] == lowest].max()]
