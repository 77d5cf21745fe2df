"""benchmarks/gpu.py goes on after what fails and says so at the end; gpu_tables.py gives times their share of the ideal."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gpu
import gpu_tables
from evaluation_rows import MADE_BY
from loki_attention.benchmarking import generate, gpu_attention
from loki_attention.benchmarking.generate import DEFAULT, LOKI, STATIC
from loki_attention.results import Result, SavedResults

CPU = torch.device("cpu")


class Generations:
    """A generation in which some variants fail, alone or with others; it records what it was asked for."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.asked = failing, list[tuple[str, ...]]()

    def measure(self, tokens: int, names: tuple[str, ...]) -> tuple[str, ...]:
        self.asked.append(names)
        if set(names) & set(self.failing):
            raise RuntimeError("no kernel")
        return names


def suite(*variants: str) -> SimpleNamespace:
    bytes_each = 10
    count = lambda tokens, names=None: bytes_each * len(variants if names is None else names)  # noqa: E731
    return SimpleNamespace(lengths=(64,), batch=1, variants=variants, cache_bytes=count)


def measured(monkeypatch: pytest.MonkeyPatch, fake: Generations, room: int) -> tuple[list[tuple[str, ...]], bool]:
    monkeypatch.setattr(generate, "Generation", lambda suite: fake)
    monkeypatch.setattr(gpu, "_why_not", lambda size, deadline, device: "too large" if size > room else "")
    report = gpu.Report()
    return list(gpu._generations(suite(DEFAULT, STATIC, LOKI), CPU, time.monotonic() + 60, report)), report.failed


def test_variants_are_measured_together_where_their_caches_fit(monkeypatch):
    assert measured(monkeypatch, Generations(), 30) == ([(DEFAULT, STATIC, LOKI)], False)
    assert measured(monkeypatch, Generations(), 20) == ([(DEFAULT,), (STATIC,), (LOKI,)], False)
    assert measured(monkeypatch, Generations(), 5) == ([], False)


def test_what_fails_is_found_alone_and_only_ours_is_a_failure(monkeypatch):
    assert measured(monkeypatch, Generations(STATIC), 30) == ([(DEFAULT,), (LOKI,)], False)
    assert measured(monkeypatch, Generations(LOKI), 30) == ([(DEFAULT,), (STATIC,)], True)


def test_a_second_turn_takes_the_place_of_the_first(monkeypatch, capsys):
    """Results stay in the order of the first turns; what fails or does not fit leaves those that there are."""

    def measure(case: SimpleNamespace, suite: gpu_attention.GpuSuite, device: torch.device) -> SimpleNamespace:
        if suite.flex and case.name == "b":
            raise RuntimeError("no compiler")
        return SimpleNamespace(
            results=(f"{case.name}, flex {suite.flex}",), left_out=[("sdpa, cudnn", "no such shape")]
        )

    class Named(SimpleNamespace):
        def __str__(self) -> str:
            return self.name

    monkeypatch.setattr(gpu_attention, "measure", measure)
    monkeypatch.setattr(gpu, "_why_not", lambda size, deadline, device: "too large" if size > 10 else "")
    a, b, large = (Named(name=name, kv_bytes=size) for name, size in (("a", 2), ("b", 2), ("large", 3)))
    turns = [(a, False), (large, False), (b, False), (a, True), (b, True)]
    report = gpu.Report()
    *_, last = gpu._steps(turns, gpu_attention.GpuSuite(), CPU, time.monotonic() + 60, report)
    assert last == ["a, flex True", "b, flex False"] and report.failed
    said = capsys.readouterr().err
    assert "left out: large: too large" in said and "left out: a: sdpa, cudnn: no such shape" in said


def test_a_part_that_fails_does_not_keep_the_others_from_running(monkeypatch, tmp_path: Path, capsys):
    ran = []

    def fails(*_: object) -> None:
        raise ValueError("no such chip")

    monkeypatch.setattr(gpu, "PARTS", {"hardware": fails, "attention": lambda *_: ran.append("attention")})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry-run", "-o", str(tmp_path)])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1 and ran == ["attention"]
    assert "left out: hardware: FAILED: ValueError: no such chip" in capsys.readouterr().err


def test_times_have_their_share_of_the_ideal():
    probe = Result(metric="probe_time", value=1.0, unit="s", n=1, config={"question": "M1 copy", "bytes_a_second": 1e9})
    config = {"heads": "8/2/64", "batch": 1, "tokens": 128, "provider": LOKI, "p20": 0.1, "p80": 0.1,
              "over_best_dense": 2.0, "byte_ideal": 4.0, "kept_mass": 0.5}  # fmt: skip
    step = Result(metric="decode_step_time", value=0.5, unit="s", n=1, read_bytes=1e8, config=config)
    rate = gpu_tables.bandwidth(SavedResults((probe,), MADE_BY))
    assert "| 2.00x | 4.00x | 20 % | 0.50 |" in gpu_tables.attention_table(SavedResults((step,), MADE_BY), rate)
    nothing_read = SavedResults((replace(step, read_bytes=0),), MADE_BY)
    assert "| 2.00x | 4.00x | - | 0.50 |" in gpu_tables.attention_table(nothing_read, rate)
    assert gpu_tables.bandwidth(None) is None
