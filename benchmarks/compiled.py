"""What the Triton kernels compile to: registers, spills, instructions a token. The figures that tests compare with.

Needs no GPU, and times nothing.

    python benchmarks/compiled.py -o benchmarks/results/triton-compiled.json
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import track

from loki_attention.kernels.triton.compiled import ARCHITECTURES, compiled, result, variants
from loki_attention.results import environment, save_results


def main() -> None:
    """Compile and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--only", action="append", help="a variant and architecture, such as 'compact@90' (default: all)"
    )
    arguments = parser.parse_args()
    every = [(variant, architecture) for architecture in ARCHITECTURES for variant in variants()]
    chosen = [one for one in every if arguments.only is None or f"{one[0].name}@{one[1]}" in arguments.only]
    progress = track(chosen, description="compile", console=Console(stderr=True))
    results = [result(variant, number, compiled(variant, number)) for variant, number in progress]
    save_results(arguments.output, results, environment(dtype=None))


if __name__ == "__main__":
    main()
