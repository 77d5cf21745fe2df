"""The GPU benchmark: what the chip can do, one layer's decode step in a matrix of shapes, and whole generation.

Kernels are checked against a reference before anything is timed. Needs a GPU with nobody else on it. What is asked for
shares the minutes: when a part's are over it starts no new case. Results are written after every case; what fails is named
and left out, and the exit status is 1 where something of ours did. Without a GPU `--dry-run` goes through the same code on
tiny shapes in Triton's interpreter.

    python benchmarks/gpu.py -o benchmarks/results
    python benchmarks/gpu.py --only generate -o benchmarks/results
"""

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure and write gpu-hardware.json, gpu-attention.json and gpu-generate.json into the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder of the result files")
    parser.add_argument("--only", default=",".join(PARTS), help="what to measure, separated by commas (default all)")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no new case after so long (default 7)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreted: its times mean nothing")
    arguments = parser.parse_args()
    asked = arguments.only.split(",")
    if unknown := set(asked) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}; got {', '.join(sorted(unknown))}")
    os.environ["TRITON_INTERPRET"] = "1" if arguments.dry_run else "0"
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("torch sees no GPU; benchmarks/gpu.py --dry-run tries the code out without one")
    arguments.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    report = Report()
    for i, name in enumerate(asked):
        deadline = time.monotonic() + max(0.0, end - time.monotonic()) / (len(asked) - i)
        report.attempt(
            name, lambda part=PARTS[name], deadline=deadline: part(device, arguments.output, deadline, report)
        )
    sys.exit(1 if report.failed else 0)


class Report:
    """What was left out and why, said at once, and whether something of ours failed."""

    def __init__(self) -> None:
        self.failed = False

    def leave_out(self, what: str, reason: str) -> None:
        """Say that something is not measured."""
        print(f"left out: {what}: {reason}", file=sys.stderr, flush=True)

    def attempt(self, what: str, run: Callable[[], Any], *, ours: bool = True) -> Any:
        """What ``run`` returns; None where it raises, which is said, and of ours a failure."""
        from loki_attention.benchmarking.gpu_reference import line_of

        try:
            return run()
        except Exception as error:
            self.failed |= ours
            traceback.print_exc()
            self.leave_out(what, f"{'FAILED: ' if ours else ''}{line_of(error)}")
            return None


def _hardware(device: Any, folder: Path, deadline: float, report: Report) -> None:
    from loki_attention.benchmarking.gpu_hardware import hardware_questions

    answers = hardware_questions(device, size_bytes=1 << 20 if device.type == "cpu" else 1 << 31)
    _save(folder / "gpu-hardware.json", answers.results)
    for name, reason in answers.left_out:
        report.leave_out(name, reason)


def _attention(device: Any, folder: Path, deadline: float, report: Report) -> None:
    from loki_attention.benchmarking.gpu_attention import GpuSuite, turns_of_record
    from loki_attention.benchmarking.layers import Case, Heads

    turns, suite = turns_of_record(), GpuSuite()
    if device.type == "cpu":
        turns = [(Case(heads=Heads.parse("4/2/64"), batch=1, tokens=200), False)]
        suite = GpuSuite(planes=("32@4",), fractions=("1/4",), rounds=1, rotated_bytes=1)
    for results in _steps(turns, suite, device, deadline, report):
        _save(folder / "gpu-attention.json", results)


def _steps(turns: Any, suite: Any, device: Any, deadline: float, report: Report) -> Iterator[list[Any]]:
    """All results so far, after every turn; a case's second turn takes the place of its first."""
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import track

    from loki_attention.benchmarking.gpu_attention import measure

    found: dict[str, Any] = {}
    for case, flex in track(turns, description="attention", console=Console(stderr=True)):
        what = f"{case}, with FlexAttention" if flex else str(case)
        # Two copies, and the reference's K and V in float32.
        if reason := _why_not(5 * case.kv_bytes, deadline, device):
            report.leave_out(what, reason)
            continue
        measured = report.attempt(what, partial(measure, case, replace(suite, flex=flex), device))
        # Of one function torch compiles but a few shapes, and then runs it uncompiled.
        _forget_graphs()
        if measured is not None:
            found[str(case)] = measured.results
            for name, reason in measured.left_out:
                report.leave_out(f"{what}: {name}", reason)
            yield [one for results in found.values() for one in results]


def _generate(device: Any, folder: Path, deadline: float, report: Report) -> None:
    results: list[Any] = []
    for suite in _suites(device):
        for measured in _generations(suite, device, deadline, report):
            results += measured.results
            _save(folder / "gpu-generate.json", results)


def _generations(suite: Any, device: Any, deadline: float, report: Report) -> Iterator[Any]:
    """What is measured of a suite: all variants in turn where their caches fit together, else each alone."""
    from loki_attention.benchmarking.generate import DEFAULT, STATIC, Generation

    generation: Any = None
    for tokens in suite.lengths:
        what = f"generation at batch {suite.batch}, {tokens} tokens"
        if reason := _why_not(suite.cache_bytes(tokens, suite.variants[:1]), deadline, device):
            report.leave_out(what, reason)
            continue
        generation = generation or report.attempt(what, lambda: Generation(suite))
        if generation is None:
            return
        alone = [(name,) for name in suite.variants]
        pending = alone if _why_not(suite.cache_bytes(tokens), deadline, device) else [tuple(suite.variants)]
        while pending:
            names = pending.pop(0)
            named = f"{what}, {', '.join(names)}"
            if reason := _why_not(suite.cache_bytes(tokens, names), deadline, device):
                report.leave_out(named, reason)
                continue
            ours = len(names) == 1 and names[0] not in (DEFAULT, STATIC)
            measured = report.attempt(named, partial(generation.measure, tokens, names), ours=ours)
            if measured is not None:
                yield measured
                continue
            _forget_graphs()
            # One of several failed: which one shows when each is alone.
            pending = alone if len(names) > 1 else pending


def _forget_graphs() -> None:
    """Free what compiled functions hold."""
    import torch

    torch.compiler.reset()


def _suites(device: Any) -> list[Any]:
    """What is generated: what matters most first."""
    from loki_attention.benchmarking.generate import DEFAULT, LOKI, LOKI_STATIC, OUR_CACHE, STATIC, Suite
    from loki_attention.benchmarking.random_model import SMALL_MODEL, ModelShape
    from loki_attention.core.budget import Budget

    if device.type == "cpu":
        return [Suite(shape=SMALL_MODEL, lengths=(200,), new_tokens=2, rounds=1, budget=Budget(tokens=64), batch=batch,
                      variants=(DEFAULT, STATIC, OUR_CACHE, LOKI_STATIC), device="cpu", backend="triton")
                for batch in (1, 2)]  # fmt: skip
    shape = ModelShape(layers=32, head_dim=128, hidden=4096, intermediate=14336, vocabulary=128256)
    variants = (LOKI_STATIC, STATIC, LOKI, DEFAULT)
    lengths = (32768, 65536, 8192)
    # The first token is decoded eagerly, as prefill is: 64 make it a small share.
    return [Suite(shape=shape, lengths=lengths, variants=names, rounds=3, new_tokens=64, batch=batch, device="cuda")
            for batch, names in ((8, variants), (1, (*variants, OUR_CACHE)))]  # fmt: skip


def _why_not(cache_bytes: int, deadline: float, device: Any) -> str:
    """Why a case is not started, empty if it is: the time, or caches with a fifth to spare that do not fit."""
    import torch

    if time.monotonic() > deadline:
        return "no time left"
    if device.type != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        if 1.2 * cache_bytes > torch.cuda.mem_get_info()[0]:
            return f"it needs {cache_bytes / 1e9:.0f} GB"
    return ""


def _save(path: Path, results: Sequence[object]) -> None:
    from dataclasses import replace

    import torch

    from loki_attention.results import environment, save_results

    made_by = environment(dtype="bfloat16")
    if torch.cuda.is_available():
        made_by = replace(made_by, hardware=f"{torch.cuda.get_device_name()}; {made_by.hardware}")
    save_results(path, results, made_by)


PARTS = {"hardware": _hardware, "attention": _attention, "generate": _generate}

if __name__ == "__main__":
    main()
