"""Time how the Triton kernels may be cut into programs, and print rows for `kernels/triton/tuning.py`. Needs a GPU.

Nothing is tuned while a model runs: the table is read. Every candidate runs the whole step on a long and a short cache; the
one with the lowest product of both times wins; every better one is printed when it is found, so that a run may be cut short.

    python benchmarks/tune_triton.py --dim 128 --minutes 8
"""

import argparse
import itertools
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any


def main() -> None:
    """Print ever better tunings of every head dim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="two candidates on tiny shapes, interpreted")
    parser.add_argument(
        "--dim", type=int, action="append", help="a head dim (default 64, 128 and 256; may be repeated)"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="in all, shared by the head dims (default 8)")
    arguments = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1" if arguments.dry_run else "0"
    import torch

    device = torch.device("cpu" if arguments.dry_run else "cuda")
    capability = (0, 0) if arguments.dry_run else torch.cuda.get_device_capability()
    dims = [64] if arguments.dry_run else arguments.dim or [128, 64, 256]
    start, dtype = time.monotonic(), torch.bfloat16
    for i, dim in enumerate(dims, 1):
        best, key = float("inf"), (10 * capability[0] + capability[1], dim, dtype.itemsize)
        for seconds, tuning in tried(device, dim, dtype, dry=arguments.dry_run):
            if seconds < best:
                best = seconds
                print(f"    {key}: {tuning},  # product of both times {seconds:.3g}", flush=True)
            if time.monotonic() - start > 60 * arguments.minutes * i / len(dims):
                print(f"# head dim {dim}: no time for the other candidates", flush=True)
                break


def candidates(*, dry: bool) -> Iterator[Any]:
    """Tunings that differ in what is worth trying."""
    from loki_attention.kernels.triton.tuning import Tuning

    if dry:
        yield from (Tuning(attend_block=block) for block in (32, 64))
        return
    choices = itertools.product((512, 1024, 2048), (32, 64), (1, 2, 4), (3, 5), (2, 4, 8), (4096, 16384))
    for score, block, warps, stages, programs, slots in choices:
        yield Tuning(
            score_block=score, attend_block=block, attend_warps=warps, attend_stages=stages, programs_per_processor=programs,
            one_program_slots=slots,
        )  # fmt: skip


def tried(device: Any, dim: int, dtype: Any, *, dry: bool) -> Iterator[tuple[float, Any]]:
    """The product of both times of every candidate that compiles."""
    from triton.errors import TritonError

    from loki_attention.benchmarking.gpu_layers import draw_copies, encoder_of, twins_of
    from loki_attention.benchmarking.gpu_reference import line_of
    from loki_attention.benchmarking.layers import Case, Heads
    from loki_attention.core.planes import Planes
    from loki_attention.kernels import gpu_clock

    lengths = ((1, 200), (1, 300)) if dry else ((1, 32768), (32, 8192))
    cases = [
        Case(heads=Heads(4, 1, dim) if dry else Heads(32, 8, dim), batch=b, tokens=n, dtype=dtype) for b, n in lengths
    ]
    planes = str(Planes.default(dim))
    prepared = []
    for case in cases:
        copies = draw_copies(case, device, rotated_bytes=1 if dry else 300_000_000)
        source = encoder_of(case, planes, device)
        prepared.append((case, [(layer, twins_of(layer, source)) for layer in copies]))
    for tuning in candidates(dry=dry):
        product = 1.0
        try:
            for case, copies_and_twins in prepared:
                calls = steps_of(case, copies_and_twins, tuning)
                product *= gpu_clock.interleaved({"step": calls}, device, rounds=1 if dry else 10)["step"].median
        except (RuntimeError, TritonError) as error:
            # Too much shared memory, or too many registers, for this GPU.
            print(f"# left out: {tuning}: {line_of(error)}", flush=True)
            continue
        yield product, tuning


def steps_of(case: Any, copies_and_twins: list[Any], tuning: Any) -> list[partial[Any]]:
    """A step on every copy, as a decoding model runs it: the newest key encoded, nothing allocated."""
    import torch

    from loki_attention.core.budget import Budget
    from loki_attention.kernels.triton import launch

    budget, (first, twins) = Budget(fraction=1 / 8), copies_and_twins[0]
    space = launch.workspace_of(twins.encoder, *first[:3], tuning)
    k, out = budget.of_each(first.stop), torch.empty_like(first.query)
    return [
        partial(
            launch.decode_step, twins.encoder, *layer[:3], twins.packed, layer.visible, k, case.scale, sinks=budget.sinks,
            recent=budget.recent, tail="linear", sums=twins.sums, newest=True, workspace=space, out=out, tuning=tuning,
        )
        for layer, twins in copies_and_twins
    ]  # fmt: skip


if __name__ == "__main__":
    main()
