"""Medians of several calls timed in turn on a GPU, each as a CUDA graph over several buffers; wall clock elsewhere.

A call is a list of callables that do the same on other buffers, so that none finds what the one before it read. Before each
replay the L2 is emptied outside of the timed stretch, which also keeps the GPU busy while the host launches the graph.
Without a GPU the same code runs eagerly, so that it can be tried out; its times say nothing then.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from loki_attention.errors import check_tokens
from loki_attention.kernels.stopwatch import Timing

Calls = Mapping[str, Sequence[Callable[[], object]]]
_SCRATCH_BYTES = 512 << 20


def interleaved(calls: Calls, device: torch.device, *, rounds: int, captured: bool = True) -> dict[str, Timing]:
    """Seconds of one callable of every call: ``rounds`` rounds in which each call's graph is replayed once.

    Calls that are not ``captured`` are launched one by one, by an idle host to an idle GPU, so that launching counts. Raises
    ``ArgumentError`` for fewer than one round, and whatever capturing a call raises.
    """
    check_tokens("rounds", rounds, least=1, unit="rounds")
    replays = {name: prepared(some, device, captured=captured) for name, some in calls.items()}
    scratch = torch.zeros(_SCRATCH_BYTES // 4 if device.type == "cuda" else 0, device=device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, replay in replays.items():
            seconds[name].append(_seconds(replay, device, scratch, wait=not captured) / len(calls[name]))
    return {name: Timing.of(each) for name, each in seconds.items()}


def prepared(
    some: Sequence[Callable[[], object]], device: torch.device, *, captured: bool = True
) -> Callable[[], object]:
    """One callable that runs all of them; on a GPU a captured graph, once they ran for the first time.

    Raises what running or capturing them raises: so it tells what can be timed.
    """

    def run() -> None:
        for call in some:
            call()

    run()
    if device.type != "cuda" or not captured:
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def _seconds(replay: Callable[[], object], device: torch.device, scratch: Tensor, *, wait: bool) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Written and then read: lines that are only written go back to memory within the timed stretch.
    scratch.zero_()
    scratch.sum()
    if wait:
        torch.cuda.synchronize(device)
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
