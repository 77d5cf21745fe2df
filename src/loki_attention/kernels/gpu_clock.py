"""Medians of several calls timed in turn on a GPU, each as a CUDA graph over rotating buffers; wall clock elsewhere.

A call is a list of callables that do the same on other buffers: together they touch more than the L2 holds, so that none
finds its keys there. Without a GPU the same code runs eagerly, so that it can be tried out; its times say nothing then.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from loki_attention.errors import check_tokens
from loki_attention.kernels.stopwatch import Timing

Calls = Mapping[str, Sequence[Callable[[], object]]]


def interleaved(
    calls: Calls, device: torch.device, *, rounds: int, eager: frozenset[str] = frozenset()
) -> dict[str, Timing]:
    """Seconds of one callable of every call: ``rounds`` rounds in which each call's graph is replayed once.

    Those named in ``eager`` are launched one by one. Raises ``ArgumentError`` for fewer than one round.
    """
    check_tokens("rounds", rounds, least=1, unit="rounds")
    replays = {name: _prepared(some, device, graph=name not in eager) for name, some in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, replay in replays.items():
            seconds[name].append(_seconds(replay, device) / len(calls[name]))
    return {name: Timing.of(each) for name, each in seconds.items()}


def _prepared(some: Sequence[Callable[[], object]], device: torch.device, *, graph: bool) -> Callable[[], object]:
    """One callable that runs all of them; on a GPU a captured graph, once they ran for the first time."""

    def run() -> None:
        for call in some:
            call()

    run()
    if device.type != "cuda" or not graph:
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    captured.replay()
    return captured.replay


def _seconds(replay: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
