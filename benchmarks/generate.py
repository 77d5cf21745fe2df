"""Whole generation on the CPU, on a random model as large as Llama 3.2 1B: transformers, our cache, loki. The table of record.

Sparse logits are compared with dense ones first. Needs an idle machine and 8 GB of memory.

    python benchmarks/generate.py -o benchmarks/results/cpu-generate.json
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import track

from loki_attention.benchmarking.generate import Generation, Suite
from loki_attention.results import environment, save_results


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of every variant (default 7)")
    arguments = parser.parse_args()
    made_by = environment(dtype="bfloat16")
    suite = Suite(rounds=arguments.rounds)
    generation = Generation(suite)
    lengths = track(suite.lengths, description="generate", console=Console(stderr=True))
    results = [row for tokens in lengths for row in generation.measure(tokens).results]
    save_results(arguments.output, results, made_by)


if __name__ == "__main__":
    main()
