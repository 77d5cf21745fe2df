"""The memory that a decode step works in, allocated once, so that a step allocates nothing and can be captured."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from loki_attention.errors import ArgumentError

_BINS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a workspace must have room for: rows (sequences times key heads), a group of heads, and lengths."""

    rows: int
    group: int
    dim: int
    rank: int
    slots: int
    chunks: int
    splits: int

    def fits(self, other: "Needs") -> bool:
        """Whether a workspace made for this serves ``other``."""
        return all(getattr(self, field.name) >= getattr(other, field.name) for field in fields(Needs))

    def joined(self, other: "Needs") -> "Needs":
        """The least that fits both."""
        names = [field.name for field in fields(Needs)]
        return Needs(**{name: max(getattr(self, name), getattr(other, name)) for name in names})


class Workspace:
    """A decode step's buffers on one device. A step writes before it reads, but for ``done``, which is 0 between steps.

    One step at a time: give steps of different streams, and captured ones, workspaces of their own, and keep them alive.
    """

    def __init__(self, needs: Needs, device: torch.device) -> None:
        self.needs, self.device = needs, placed(device)
        rows, group = needs.rows, needs.group

        def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        self.codes = room(rows, group, needs.rank // 4, dtype=torch.int32)
        self.encoded = room(rows, group, needs.rank)
        self.numbers = room(rows, group, 4)
        self.line = room(rows, group, 2)
        self.keys = room(rows, needs.slots, dtype=torch.uint16)
        self.indices = room(rows, needs.slots, dtype=torch.int32)
        self.threshold = room(rows, 2, dtype=torch.int32)
        self.bounds = room(rows, 2, dtype=torch.int32)
        self.histogram = room(rows, needs.chunks, _BINS, dtype=torch.int32)
        self.refined = room(rows, needs.chunks, _BINS, dtype=torch.int32)
        self.above = room(rows, needs.chunks, dtype=torch.int32)
        self.peaks = room(rows, needs.splits + 1, 2, group)
        self.sums = room(rows, needs.splits + 1, group, needs.dim)
        self.mass = room(rows, group)
        self.kept = room(rows, group)
        self.done = torch.zeros(rows, dtype=torch.int32, device=self.device)

    def buffers(self) -> Iterator[Tensor]:
        """Every buffer that a step writes before it reads."""
        yield from (tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor) and name != "done")

    @property
    def bytes(self) -> int:
        """Resident bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.buffers(), self.done))


def placed(device: torch.device) -> torch.device:
    """``device`` as tensors on it name it: ``cuda`` is the GPU that is current, which theirs call ``cuda:0`` or another."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


_held: dict[tuple[torch.device, int], Workspace] = {}
_reserved: dict[torch.device, list[Workspace]] = {}


def reserve(needs: Needs, device: torch.device) -> None:
    """Set memory aside for the steps that graphs of this device hold, which run one after another, on any stream.

    To be called before they are captured, or run to be captured: what is allocated then belongs to a graph's memory. It is
    never given back, since a graph keeps no reference to it.
    """
    device = placed(device)
    held = _reserved.setdefault(device, [])
    if not any(space.needs.fits(needs) for space in held):
        held.append(Workspace(held[-1].needs.joined(needs) if held else needs, device))


def workspace_for(
    needs: Needs, device: torch.device, given: Workspace | None = None, reserved: bool = False
) -> Workspace:
    """``given``, which must fit, else the one that eager steps of this device share, made anew where it is too small.

    ``reserved``: before that, one that :func:`reserve` set aside, or else any of the device that is large enough.
    """
    device = placed(device)
    if given is not None:
        if given.device != device or not given.needs.fits(needs):
            raise ArgumentError(
                f"the workspace is for {given.needs} on {given.device}; this step needs {needs} on {device}"
            )
        return given
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if reserved or capturing:
        # What is allocated now might belong to a graph's memory.
        for space in (*_reserved.get(device, ()), *(held for (place, _), held in _held.items() if place == device)):
            if space.needs.fits(needs):
                return space
    if capturing:
        raise ArgumentError(
            "a step is captured before one ran; run it once, or give a workspace that outlives the graph"
        )
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key, known = (device, stream), _held.get((device, stream))
    if known is None or not known.needs.fits(needs):
        known = _held[key] = Workspace(needs if known is None else known.needs.joined(needs), device)
    return known
