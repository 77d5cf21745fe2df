"""One layer's decode step on the CPU: torch, ours, loki, and what reading alone costs. The table of record.

Every provider is checked against a reference before anything is timed. Resumable: run the same command again. Needs an idle
machine: load is recorded with every case, and a busy one is warned of.

    python benchmarks/attention.py -o benchmarks/results/cpu-attention.json
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from loki_attention.benchmarking.attention import Suite, measure
from loki_attention.benchmarking.timing import machine
from loki_attention.ledger import Ledger
from loki_attention.results import Result, environment, hardware, save_results


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--longest", type=int, default=131072, help="leave out longer caches (default 131072)")
    parser.add_argument("--largest-batch", type=int, default=8, help="leave out larger batches (default 8)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="timed rounds (default 15; fewer for the largest caches)"
    )
    arguments = parser.parse_args()
    made_by = environment(dtype="bfloat16")
    suite = Suite(rounds=arguments.rounds)
    cases = [c for c in suite.cases if c.tokens <= arguments.longest and c.batch <= arguments.largest_batch]

    def one(index: int) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        return [asdict(result) for result in measure(cases[index], suite).results]

    key = f"{suite.rounds} {hardware()} {machine()} {made_by.commit} {made_by.versions}"
    ledger = Ledger(arguments.output.with_suffix(".partial"))
    results: list[Result] = []
    for index, case in enumerate(track(cases, description="attention", console=Console(stderr=True))):
        rows = ledger.get(f"{case} {key}", 0)
        if rows is None:
            rows = one(index)
            ledger.add(f"{case} {key}", 0, rows)
        results += [Result(**row) for row in rows]
    save_results(arguments.output, results, made_by)
    ledger.discard()


if __name__ == "__main__":
    main()
