"""The GPU benchmark: what the chip can do, one layer's decode step in a matrix of shapes, and whole generation.

Kernels are checked against a reference before anything is timed. Needs a GPU with nobody else on it; stops to start new
cases after so many minutes. Without a GPU `--dry-run` goes through the same code on tiny shapes in Triton's interpreter.

    python benchmarks/gpu.py -o benchmarks/results
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    """Measure and write gpu-hardware.json, gpu-attention.json and gpu-generate.json into the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder of the result files")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no new case after so long (default 9)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreted: its times mean nothing")
    arguments = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1" if arguments.dry_run else "0"
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("torch sees no GPU; benchmarks/gpu.py --dry-run tries the code out without one")
    arguments.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    for part in (_hardware, _attention, _generate):
        part(device, arguments.output, deadline)


def _hardware(device: object, folder: Path, deadline: float) -> None:
    from loki_attention.benchmarking.gpu_hardware import hardware_questions

    dry = str(device) == "cpu"
    _save(folder / "gpu-hardware.json", hardware_questions(device, size_bytes=1 << 20 if dry else 1 << 31))


def _attention(device: object, folder: Path, deadline: float) -> None:
    import torch
    from rich.console import Console
    from rich.progress import track

    from loki_attention.benchmarking.gpu_attention import GpuSuite, cases_of_record, measure
    from loki_attention.benchmarking.layers import Case, Heads

    if str(device) == "cpu":
        cases = [Case(heads=Heads.parse("4/2/64"), batch=1, tokens=200)]
        suite = GpuSuite(cases=cases, planes=("32@4",), fractions=("1/4",), rounds=1, rotated_bytes=1, flex=False)
    else:
        cases = cases_of_record(torch.cuda.mem_get_info()[0] // 3)
        suite = GpuSuite(cases=cases)
    results, left_out = [], []
    for case in track(cases, description="attention", console=Console(stderr=True)):
        if time.monotonic() > deadline:
            left_out.append(f"{case}: no time left")
            continue
        measured = measure(case, suite, device)
        results += measured.results
        left_out += [f"{case}: {name}: {reason}" for name, reason in measured.left_out]
        _save(folder / "gpu-attention.json", results)
    print("left out:", *left_out, sep="\n  ", file=sys.stderr)


def _generate(device: object, folder: Path, deadline: float) -> None:
    from loki_attention.benchmarking.generate import (
        DEFAULT,
        LOKI,
        LOKI_STATIC,
        OUR_CACHE,
        STATIC,
        Generation,
        Suite,
    )
    from loki_attention.benchmarking.random_model import SMALL_MODEL, ModelShape
    from loki_attention.core.budget import Budget

    shape = ModelShape(layers=32, head_dim=128, hidden=4096, intermediate=14336, vocabulary=128256)
    results: list[Any] = []
    if str(device) == "cpu":
        suites = [Suite(shape=SMALL_MODEL, lengths=(200,), new_tokens=2, rounds=1, budget=Budget(tokens=64), batch=batch,
                        variants=(DEFAULT, STATIC, OUR_CACHE, LOKI_STATIC), device="cpu", backend="triton")
                  for batch in (1, 2)]  # fmt: skip
    else:
        every, largest = (DEFAULT, STATIC, OUR_CACHE, LOKI, LOKI_STATIC), (DEFAULT, STATIC, LOKI_STATIC)
        suites = [Suite(shape=shape, lengths=lengths, variants=variants, rounds=3, batch=batch, device="cuda")
                  for batch, lengths, variants in ((1, (8192, 32768, 65536), every), (8, (8192, 32768), largest))]  # fmt: skip
    for suite in suites:
        generation = None
        for tokens in suite.lengths:
            reason = _why_not(suite.cache_bytes(tokens), deadline, device)
            if reason:
                print(f"left out: generation at batch {suite.batch}, {tokens} tokens: {reason}", file=sys.stderr)
                continue
            generation = generation or Generation(suite)
            results += generation.measure(tokens).results
            _save(folder / "gpu-generate.json", results)


def _why_not(cache_bytes: int, deadline: float, device: object) -> str:
    """Why a case is not started, empty if it is: the time, or caches with a fifth to spare that do not fit."""
    import torch

    if time.monotonic() > deadline:
        return "no time left"
    if str(device) != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
        if 1.2 * cache_bytes > torch.cuda.mem_get_info()[0]:
            return f"its caches need {cache_bytes / 1e9:.0f} GB"
    return ""


def _save(path: Path, results: Sequence[object]) -> None:
    from dataclasses import replace

    import torch

    from loki_attention.results import environment, save_results

    made_by = environment(dtype="bfloat16")
    if torch.cuda.is_available():
        made_by = replace(made_by, hardware=f"{torch.cuda.get_device_name()}; {made_by.hardware}")
    save_results(path, results, made_by)


if __name__ == "__main__":
    main()
