"""Time how the Triton kernels may be cut into programs, and print rows for `kernels/triton/tuning.py`. Needs a GPU.

Nothing is tuned while a model runs: the table is read. Every candidate runs the whole step on a long and a short cache; the
one with the lowest product of both times wins.

    python benchmarks/tune_triton.py
"""

import argparse
import itertools
import os
from collections.abc import Iterator
from typing import Any


def main() -> None:
    """Print the best tuning of every head dim and type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="two candidates on tiny shapes, interpreted")
    arguments = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1" if arguments.dry_run else "0"
    import torch

    device = torch.device("cpu" if arguments.dry_run else "cuda")
    capability = (0, 0) if arguments.dry_run else torch.cuda.get_device_capability()
    dims = (64,) if arguments.dry_run else (64, 128, 256)
    for dim, dtype in itertools.product(dims, (torch.bfloat16,)):
        seconds, tuning = min(tried(device, dim, dtype, dry=arguments.dry_run), key=lambda pair: pair[0])
        key = (10 * capability[0] + capability[1], dim, dtype.itemsize)
        print(f"    {key}: {tuning},  # product of both times {seconds:.3g}")


def candidates(*, dry: bool) -> Iterator[Any]:
    """Tunings that differ in what is worth trying."""
    from loki_attention.kernels.triton.tuning import Tuning

    if dry:
        yield from (Tuning(attend_block=block) for block in (32, 64))
        return
    choices = itertools.product((512, 1024, 2048), (32, 64), (1, 2, 4), (3, 5), (2, 4, 8), (2048, 8192))
    for score, block, warps, stages, programs, slots in choices:
        yield Tuning(
            score_block=score, attend_block=block, attend_warps=warps, attend_stages=stages, programs_per_processor=programs,
            one_program_slots=slots,
        )  # fmt: skip


def tried(device: Any, dim: int, dtype: Any, *, dry: bool) -> Iterator[tuple[float, Any]]:
    """The product of both times of every candidate that compiles."""
    from loki_attention.benchmarking.gpu_layers import draw_copies, encoder_of, twins_of
    from loki_attention.benchmarking.layers import Case, Heads
    from loki_attention.core.budget import Budget
    from loki_attention.core.planes import Planes
    from loki_attention.kernels import gpu_clock
    from loki_attention.kernels.triton import launch

    lengths = ((1, 200), (1, 300)) if dry else ((1, 32768), (32, 8192))
    cases = [
        Case(heads=Heads(4, 1, dim) if dry else Heads(32, 8, dim), batch=b, tokens=n, dtype=dtype) for b, n in lengths
    ]
    budget, planes = Budget(fraction=1 / 8), str(Planes.default(dim))
    prepared = []
    for case in cases:
        copies = draw_copies(case, device, rotated_bytes=1 if dry else 300_000_000)
        source = encoder_of(case, planes, device)
        prepared.append((case, [(layer, twins_of(layer, source)) for layer in copies]))
    for tuning in candidates(dry=dry):
        product = 1.0
        try:
            for case, copies_and_twins in prepared:
                calls = [
                    lambda layer=layer, twins=twins, case=case, tuning=tuning: launch.decode_step(
                        twins.encoder, *layer[:3], twins.packed, layer.visible, budget.of_each(layer.stop), case.scale,
                        sinks=4, recent=32, tail="linear", sums=twins.sums, tuning=tuning,
                    )
                    for layer, twins in copies_and_twins
                ]  # fmt: skip
                product *= gpu_clock.interleaved({"step": calls}, device, rounds=1 if dry else 10)["step"].median
        except RuntimeError as error:
            # Too much shared memory, or too many registers, for this GPU.
            print(f"# left out: {tuning}: {str(error).splitlines()[0]}")
            continue
        yield product, tuning


if __name__ == "__main__":
    main()
