"""What is timed on a GPU is the replay of a captured graph; here CUDA is a stand-in that records what it is asked."""

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch

from loki_attention.errors import ArgumentError
from loki_attention.kernels import gpu_clock


class Graph:
    """A graph in which calls are kept instead of made."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


class Stream:
    """A stream of no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: "Stream") -> None:
        assert other.device == self.device


def test_a_call_runs_then_is_captured_then_only_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    where, made = ["eager"], list[tuple[str, str]]()

    @contextmanager
    def capturing(graph: Graph) -> Any:
        where.append("captured")
        yield
        where.pop()

    def elsewhere(stream: Stream) -> AbstractContextManager[None]:
        assert stream.device == device
        return nullcontext()

    device = torch.device("cuda", 0)
    streams = {"Stream": Stream, "current_stream": Stream, "stream": elsewhere}
    for name, stand_in in {**streams, "CUDAGraph": Graph, "graph": capturing}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    calls = [lambda name=name: made.append((name, where[-1])) for name in "ab"]
    replay = gpu_clock.prepared(calls, device)
    eager, captured = [("a", "eager"), ("b", "eager")], [("a", "captured"), ("b", "captured")]
    assert made == [*eager, *eager, *captured]
    replay()
    assert made == [*eager, *eager, *captured] and replay.__self__.replays == 2  # type: ignore[attr-defined]
    gpu_clock.prepared(calls, device, captured=False)()
    assert made == [*eager, *eager, *captured, *eager, *eager]


def test_without_a_gpu_calls_run_as_they_are() -> None:
    made = list[str]()
    timed = gpu_clock.interleaved({"a": [lambda: made.append("a")] * 2}, torch.device("cpu"), rounds=3)
    assert timed["a"].rounds == 3 and timed["a"].p20 >= 0 and made == ["a"] * 2 * 4
    with pytest.raises(ArgumentError, match="rounds must be"):
        gpu_clock.interleaved({}, torch.device("cpu"), rounds=0)
