"""Counts operations that hand a tensor's content to Python, and so would wait for a GPU."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero"}


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU; indexing by booleans is among it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        by_booleans = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        if name in WAITING or by_booleans:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))
