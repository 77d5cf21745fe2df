"""What only a GPU can show: steps that are captured and replayed, compiled steps, memory errors and races."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import Shape
from kernel_cases import FRACTION, Case
from loki_attention.core.budget import Budget
from loki_attention.core.encoder import ENCODER_TENSORS
from loki_attention.kernels import break_even
from loki_attention.kernels.rows import Spans
from loki_attention.kernels.triton import launch, operators
from triton_cases import DEVICE, prepared, workspace

if DEVICE.type != "cuda":
    pytest.skip("needs a GPU", allow_module_level=True)

CASE = Case("32@4+64@2", Shape(2, 4, 128), (3000, 1500), "linear", FRACTION)
SANITIZER = shutil.which("compute-sanitizer")
TESTS = Path(__file__).parents[1]


def test_a_captured_step_follows_the_lengths_on_the_device() -> None:
    """One graph, replayed as sequences grow, equals steps launched one by one, to the bit; nothing is allocated."""
    ready, space = prepared(CASE, torch.bfloat16), workspace(CASE, prepared(CASE).layer)
    stop = torch.tensor([2900, 2950], device=DEVICE)
    start = torch.tensor([0, 1500], device=DEVICE)
    k, out = torch.full((2,), 200, device=DEVICE), torch.empty_like(ready.layer.query)
    replayed = [type(ready.sums)(*(torch.zeros_like(one) for one in ready.sums)) for _ in range(2)]
    packed = [ready.packed.clone() for _ in range(2)]

    def step(i: int) -> None:
        launch.decode_step(
            ready.encoder, *ready.layer[:3], packed[i], Spans(start, stop), k, CASE.shape.scale, sinks=2, recent=8,
            tail="linear", sums=replayed[i], newest=True, workspace=space, out=out,
        )  # fmt: skip

    step(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(0)
    for _ in range(100):
        stop += 1
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        graph.replay()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        captured = out.clone()
        step(1)
        assert torch.equal(captured, out)
    assert torch.equal(packed[0], packed[1])


def test_a_hundred_runs_are_equal_to_the_bit() -> None:
    ready = prepared(CASE, torch.bfloat16)
    first = ready.step()
    assert first.indices is not None
    for _ in range(100):
        again = ready.step()
        assert again.indices is not None
        assert torch.equal(again.indices, first.indices) and torch.equal(again.output, first.output)


def test_a_compiled_decode_step_with_reduced_overhead() -> None:
    ready = prepared(CASE, torch.bfloat16)
    tensors = [getattr(ready.encoder.source, name) for name in ENCODER_TENSORS]
    packed, sums = ready.packed.clone(), [one.clone() for one in ready.sums]
    assert operators.decode_newest is not None
    launch.reserve_for(ready.encoder, *ready.layer[:3])

    def step(query: torch.Tensor) -> torch.Tensor:
        output, kept = torch.ops.loki_attention.decode_newest(
            tensors, CASE.planes, query * 1.0, *ready.layer[1:3], packed, *ready.visible, ready.k, CASE.shape.scale, 2, 8,
            "linear", *sums,
        )  # fmt: skip
        return output + 0.0 * kept.nan_to_num()[..., None].to(output.dtype)

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    expected = step(ready.layer.query)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(compiled(ready.layer.query), expected, rtol=2e-2, atol=2e-2)


def test_the_break_even_of_captured_steps_is_apart_from_that_of_launched_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense and sparse of two lengths are a graph each, replayed once to try it out and once a round."""
    replayed = list[torch.cuda.CUDAGraph]()

    class Graph(torch.cuda.CUDAGraph):
        def replay(self) -> None:
            replayed.append(self)
            super().replay()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(break_even, "_LONGEST", 512)
    shape = break_even.BreakEvenShape(
        heads=8, kv_heads=2, head_dim=64, dtype=torch.bfloat16, planes="16@4+32@2", budget=Budget(tokens=64), batch=2,
        backend="triton",
    )  # fmt: skip
    for captured, replays in ((False, []), (True, [4] * 4)):
        found = break_even.measure(replace(shape, captured=captured), whole=True, rounds=3)
        assert [point.tokens for point in found.points] == [256, 512]
        assert all(point.dense > 0 and point.sparse > 0 for point in found.points)
        assert sorted(replayed.count(graph) for graph in set(replayed)) == replays


def run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """A process that finds the package and the tests; it has at most 150 s, as a whole run may have only minutes."""
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not on the PATH")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_memory_error_and_no_race(tool: str) -> None:
    assert SANITIZER is not None
    step = [sys.executable, str(TESTS / "triton_step.py")]
    # Once without the tool: under it kernels come from Triton's cache, and the compiler is not watched.
    plain = run(step)
    assert plain.returncode == 0, plain.stderr[-2000:]
    # Accesses beyond a tensor hit another one in torch's pool; memory of its own for each shows them.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    done = run([SANITIZER, "--tool", tool, "--error-exitcode", "3", *step], **apart)
    report = done.stdout + done.stderr
    if "Device not supported" in report:
        pytest.skip("compute-sanitizer does not support this device here")
    assert done.returncode == 0, report[-2000:]
