"""Models that are split over processes: which heads a process sees. Knows no method; talks to no other process."""

from typing import Any

from torch import nn

from loki_attention.errors import ModelError


def local_heads(module: nn.Module, kv_heads: int, *, seen: int) -> slice:
    """Which of a layer's ``kv_heads`` key heads this process's attention sees, given that it sees ``seen``.

    Processes of a tensor-parallel plan see equal consecutive shares in the order of their ranks: of 8 heads on 4
    processes, rank 1 sees heads 2 and 3. A plan that gathers before attention (OLMo 2, Phi-3) shows all to each.
    Raises ``ModelError`` for any other share.
    """
    if seen == kv_heads:
        return slice(0, kv_heads)
    ranks = _tensor_parallel_mesh(module)
    if ranks is None or seen * ranks.size() != kv_heads:
        raise ModelError(
            f"attention sees {seen} key heads of {kv_heads}, and no tensor-parallel plan of transformers tells which; "
            "load the model with distributed_config=DistributedConfig(tp_plan='auto'), or in one process"
        )
    first = seen * ranks.get_local_rank()
    return slice(first, first + seen)


def check_whole(model: nn.Module) -> None:
    """Raise ``ModelError`` for a model that is split over processes."""
    if any(hasattr(weight, "full_tensor") for weight in model.parameters()):
        raise ModelError(
            "this model is split over processes, calibration needs all of it in each: load it without "
            "distributed_config (torchrun then shares out the text instead), or calibrate in one process, with "
            "device_map='auto' if it fits on no single device"
        )


def _tensor_parallel_mesh(module: nn.Module) -> Any:
    """The mesh that a module's weights are split over, its tensor-parallel axis alone; None where they are not."""
    meshes = (getattr(weight, "device_mesh", None) for weight in module.parameters())
    mesh: Any = next((mesh for mesh in meshes if mesh is not None), None)
    # transformers 5.17 does not name the axis of a mesh that has one.
    return mesh["tp"] if mesh is not None and mesh.ndim > 1 else mesh
