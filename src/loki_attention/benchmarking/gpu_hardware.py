"""What a GPU can do for a decode step: bandwidth, prefix reads, gathers, the cost of a graph's node, ``torch.topk``.

The first questions to a new chip: the step is judged by them. Dense providers and the stages are ``gpu_attention``'s.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from loki_attention.benchmarking.gpu_reference import line_of
from loki_attention.benchmarking.providers import LeftOut
from loki_attention.kernels.gpu_clock import interleaved, prepared
from loki_attention.kernels.triton.probes import read_rows, room_for
from loki_attention.results import Result, Setting

Probe = tuple[str, list[Callable[[], object]], int, dict[str, Setting]]
_ROW = 128
_NODES = 200


class Answers(NamedTuple):
    """The probes' results, and those that do not run here."""

    results: tuple[Result, ...]
    left_out: tuple[LeftOut, ...]


def hardware_questions(device: torch.device, *, size_bytes: int = 1 << 31, rounds: int = 20) -> Answers:
    """Copy, strided-prefix and gather bandwidth, a graph node and top-k, each with the bytes it reads.

    Buffers are of ``size_bytes``: many times the L2.
    """
    with torch.inference_mode():
        probes = [*_reads(device, size_bytes), *_gathers(device, size_bytes), _node(device), *_topk(device, size_bytes)]
        probes, left_out = _runnable(probes, device)
        timings = interleaved({name: calls for name, calls, _, _ in probes}, device, rounds=rounds)
    results = []
    for name, calls, read_bytes, config in probes:
        timing = timings[name]
        settings: dict[str, Setting] = {
            "question": name,
            **config,
            "p20": timing.p20,
            "p80": timing.p80,
            "calls": len(calls),
        }
        settings["bytes_a_second"] = read_bytes / timing.median if read_bytes else None
        results.append(
            Result(
                metric="probe_time",
                value=timing.median,
                unit="s",
                n=timing.rounds,
                read_bytes=read_bytes,
                config=settings,
            )
        )
    return Answers(tuple(results), tuple(left_out))


def _runnable(probes: list[Probe], device: torch.device) -> tuple[list[Probe], list[LeftOut]]:
    """The probes that run and can be captured, and the others."""
    runnable, left_out = list[Probe](), list[LeftOut]()
    for probe in probes:
        try:
            prepared(probe[1], device)
        except Exception as error:
            left_out.append(LeftOut(probe[0], line_of(error)))
        else:
            runnable.append(probe)
    return runnable, left_out


def _reads(device: torch.device, size_bytes: int) -> list[Probe]:
    """M1: a copy, counted twice; M2: the first quarter of every row, which whole sectors are read for."""
    rows = torch.randn(size_bytes // (2 * _ROW), _ROW, device=device).to(torch.bfloat16)
    target, totals = torch.empty_like(rows), room_for(len(rows), device)

    def copy() -> None:
        target.copy_(rows)

    def prefix(width: int) -> None:
        read_rows(rows, width, totals)

    size = rows.numel() * 2
    made: list[Probe] = [("M1 copy", [copy], 2 * size, {"size_bytes": size})]
    made += [
        (
            f"M2 prefix of {2 * width} of {2 * _ROW} bytes",
            [partial(prefix, width)],
            size * width // _ROW,
            {"width": width},
        )
        for width in (_ROW // 4, _ROW)
    ]
    return made


def _gathers(device: torch.device, size_bytes: int) -> list[Probe]:
    """M3: an eighth of the rows of 256 bytes: drawn at random, ascending, and in blocks of 16."""
    rows = torch.randn(size_bytes // (2 * _ROW), _ROW, device=device).to(torch.bfloat16)
    count = len(rows) // 8
    drawn = torch.randperm(len(rows), device=device)[:count]
    blocks = torch.randperm(len(rows) // 16, device=device)[: count // 16].sort().values
    orders = {
        "random": drawn,
        "ascending": drawn.sort().values,
        "blocks of 16": (16 * blocks[:, None] + torch.arange(16, device=device)).flatten(),
    }
    totals = room_for(count, device)

    def gather(order: Tensor) -> None:
        read_rows(rows, _ROW, totals, order)

    return [
        (f"M3 gather, {name}", [partial(gather, order)], 2 * _ROW * len(order), {"rows": len(order)})
        for name, order in orders.items()
    ]


def _node(device: torch.device) -> Probe:
    """M4: a kernel that does next to nothing, so that its time is a node's."""
    one = torch.zeros(1, device=device)
    return "M4 graph node", [lambda: one.add_(1)] * _NODES, 0, {"nodes": _NODES}


def _topk(device: torch.device, size_bytes: int) -> list[Probe]:
    """M6: an eighth of a row's scores, as torch picks them."""
    made: list[Probe] = []
    for rows, tokens in ((8, 32768), (256, 32768), (8, 131072), (256, 131072)):
        if 4 * rows * tokens > size_bytes:
            continue
        scores = torch.randn(rows, tokens, device=device)
        run = partial(torch.topk, scores, tokens // 8, dim=-1, sorted=False)
        made.append((f"M6 topk, {rows} rows of {tokens}", [run], 4 * rows * tokens, {"rows": rows, "tokens": tokens}))
    return made
