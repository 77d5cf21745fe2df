"""One small decode step by the Triton kernels, for tools that watch a process: compute-sanitizer."""

import torch

from helpers import Shape
from kernel_cases import FRACTION, Case
from loki_attention.kernels.triton import launch
from triton_cases import LONG, SHORT, prepared


def main() -> None:
    """Run the step with one program a row and with several, and dense attention."""
    ready = prepared(Case("16@4+32@2", Shape(1, 4, 64), (700, 300), "linear", FRACTION), torch.bfloat16)
    for cut in (SHORT, LONG):
        ready.step(cut, newest=True)
        launch.dense_decode(
            *ready.layer[:3], ready.visible, ready.case.shape.scale, tuning=cut.tuning(ready.layer.keys)
        )
    print("done")


if __name__ == "__main__":
    main()
