"""What the Triton kernels become when they are compiled for a GPU, which needs none: registers, spills, instructions.

A regression alarm and a count against the issue rate of a multiprocessor; it is no time. Instructions a token are those of
one warp in the kernel's loop over tokens, times its warps, over the tokens of one turn.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from loki_attention.errors import ArgumentError
from loki_attention.kernels.triton import availability
from loki_attention.kernels.triton.tuning import tuning_for
from loki_attention.results import Result, Setting

ARCHITECTURES = (80, 90, 100)
_INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_JUMP = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_PREDICATE = re.compile(r"^@!?U?P\w+ ")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)")
_WHOLE_NUMBERS = {"start_ptr", "stop_ptr", "tokens_ptr", "rank_ptr", "k_ptr"}
_WORDS = {
    "packed_ptr", "codes_ptr", "indices_ptr", "threshold_ptr", "bounds_ptr", "done_ptr", "histogram_ptr", "refined_ptr",
    "count_ptr",
}  # fmt: skip
_OF_THE_MODEL = {"query_ptr", "keys_ptr", "values_ptr", "output_ptr"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One kernel with its constants. ``marker`` is an instruction that only its loop over tokens has.

    ``tokens`` are those of one turn of the loop, 0 where none are counted; ``once`` those that a program goes over besides,
    outside of the loop.
    ``budget``: the most instructions a token that the design allows, None where it says nothing.
    """

    name: str
    kernel: str
    planes: str = "32@4+64@2"
    group: int = 4
    head_dim: int = 128
    dtype: str = "bf16"
    warps: int = 4
    stages: int = 3
    tokens: int = 0
    once: int = 0
    marker: str = ""
    budget: float | None = None
    constants: dict[str, int] = field(default_factory=dict)


class Statistics(NamedTuple):
    """What the compiler made of a variant for an architecture.

    Bytes spilled to local memory, bytes of shared memory, tensor-core instructions. ``load_bytes``: how wide the narrowest
    load is of those, widest first, that it takes to bring what the loop over tokens streams: low-rank keys, 16-bit keys, or
    K and V. None, as ``per_token``, where no tokens are counted.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core: int
    instructions: int
    per_token: float | None
    load_bytes: int | None


def variants() -> tuple[Variant, ...]:
    """The variants of record: group 4, head dim 128, bfloat16, spans; cut as the tuning says for those."""
    tuning = tuning_for(90, 128, 2)
    block, planes = tuning.score_block, {"32@8": 5.0, "64@4": 8.0, "32@4+64@2": 10.0}
    common = {"HEADS": 8, "VISIBLE": 1}
    chunked = {**common, "CHUNK": 4 * block, "BLOCK": block}
    score = {**chunked, "ABSORB": 0}
    made = [
        Variant(
            name=f"score, {text}{', histogram' if histogram else ''}", kernel="score", planes=text, tokens=block, marker="IDP",
            warps=tuning.score_warps, budget=most + (3 if histogram else 0), constants={**score, "HISTOGRAM": histogram},
        )
        for text, most in planes.items()
        for histogram in (0, 1)
    ]  # fmt: skip
    made.append(
        Variant(name="score, 32@4+64@2, group 8", kernel="score", group=8, tokens=block, marker="IDP",
                warps=tuning.score_warps, constants={**score, "HISTOGRAM": 0})
    )  # fmt: skip
    for slots in (4096, 8192, 16384):
        warps, listed = tuning.select_warps(slots), tuning.select_block(slots)
        made.append(Variant(name=f"select, {slots} slots", kernel="select", tokens=listed, once=slots, marker="STG",
                            warps=warps, constants={**common, "SLOTS": slots, "BLOCK": listed}))  # fmt: skip
    made += [
        Variant(name="refine", kernel="refine", tokens=block, marker="VOTE", constants=chunked),
        Variant(name="compact", kernel="compact", tokens=block, marker="STG", budget=3.0,
                constants={name: value for name, value in chunked.items() if name != "VISIBLE"}),
    ]  # fmt: skip
    whole = {**common, "CAPPED": 0, "SINKS": 0, "SPLITS": 64}
    for head_dim, dtype in ((128, "bf16"), (64, "bf16"), (80, "fp16"), (256, "bf16"), (128, "fp32"), (256, "fp32")):
        cut = tuning_for(90, 1 << (head_dim - 1).bit_length(), 4 if dtype == "fp32" else 2)
        shape: dict[str, Any] = {
            "head_dim": head_dim, "dtype": dtype, "tokens": cut.attend_block, "marker": "HMMA", "warps": cut.attend_warps,
            "stages": cut.attend_stages, "planes": "16@4+32@2",
        }  # fmt: skip
        sizes = {**whole, "BLOCK": cut.attend_block}
        tail = {"TAIL": 2, "MASS": 1, "SAMPLE_BLOCK": 128}
        budget = 30.0 if (head_dim, dtype) == (128, "bf16") else None
        made.append(Variant(name=f"attend, {dtype}, D {head_dim}", kernel="attend", budget=budget,
                            constants={**sizes, **tail}, **shape))  # fmt: skip
        shape["stages"] = cut.dense_stages
        made.append(Variant(name=f"dense, {dtype}, D {head_dim}", kernel="dense", constants=sizes, **shape))
    for text in planes:
        opening = {**common, "APPEND": 1, "ABSORB": 1, "BLOCK": 256}
        made.append(
            Variant(name=f"open, {text}", kernel="open", planes=text, warps=tuning.open_warps, constants=opening)
        )
        made.append(
            Variant(name=f"encode keys, {text}", kernel="encode", planes=text, constants={"HEADS": 8, "BLOCK": 32})
        )
    return tuple(made)


def compiled(variant: Variant, architecture: int) -> Statistics:
    """The statistics of a variant for compute capability ``architecture`` / 10.

    Raises ``ArgumentError`` where Triton interprets in this process, or is missing.
    """
    if availability.interpreted() or availability.version() is None:
        raise ArgumentError(
            "kernels are compiled where triton is installed and TRITON_INTERPRET is not set; got neither"
        )
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from loki_attention.kernels.triton.jit import CHANGING

    kernel, constants = _kernel(variant.kernel), _constants(variant)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else _type(name, variant.dtype) for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind not in ("constexpr", "fp32") and name not in CHANGING
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    made: Any = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return _statistics(variant, made)


def result(variant: Variant, architecture: int, found: Statistics) -> Result:
    """The statistics as a result: instructions a token where there are any, else all of them."""
    config: dict[str, Setting] = {
        "kernel": variant.name, "architecture": architecture, "warps": variant.warps, "stages": variant.stages,
        "registers": found.registers, "spilled_bytes": found.spilled_bytes, "shared_bytes": found.shared_bytes,
        "load_bytes": found.load_bytes, "tensor_core": found.tensor_core, "instructions": found.instructions,
        "budget": variant.budget, "triton": availability.version(),
    }  # fmt: skip
    if found.per_token is None:
        return Result(metric="instructions", value=found.instructions, unit="instructions", n=1, config=config)
    per_token = round(found.per_token, 2)
    return Result(metric="instructions_per_token", value=per_token, unit="warp instructions", n=1, config=config)


def _kernel(name: str) -> Any:
    from loki_attention.kernels.triton import append, attend, dense, opening, score, select

    kernels: dict[str, Any] = {
        "score": score.score_kernel,
        "select": select.select_kernel,
        "refine": select.refine_kernel,
        "compact": select.compact_kernel,
        "attend": attend.attend_kernel,
        "dense": dense.dense_kernel,
        "open": opening.open_step_kernel,
        "encode": append.encode_keys_kernel,
    }
    return kernels[name]


def _constants(variant: Variant) -> dict[str, int | bool]:
    from loki_attention.core.planes import Planes
    from loki_attention.core.tail import tail_rank

    planes, dim = Planes.parse(variant.planes), variant.head_dim
    held = {bits: dims for dims, bits in planes.planes}
    (dims, bits), *others = planes.planes
    two = others[0].dims if others else 0
    leading = tail_rank(dim, planes.rank)
    sizes = {
        "G": variant.group, "GROUP": 16, "DIM": dim, "PADDED": _padded(dim), "RANK": planes.rank, "DIMS": dims,
        "PAD": _padded(dims), "BITS": bits, "DIMS2": two, "PAD2": _padded(two), "D8": held.get(8, 0), "D4": held.get(4, 0),
        "D2": held.get(2, 0), "R1": leading, "R1_PAD": _padded(leading),
    }  # fmt: skip
    truths = {"CAPPED", "SINKS", "MASS", "HISTOGRAM", "APPEND", "ABSORB"}
    return {**sizes, **{name: bool(value) if name in truths else value for name, value in variant.constants.items()}}


def _padded(size: int) -> int:
    return max(16, 1 << max(size - 1, 0).bit_length())


def _type(name: str, dtype: str) -> str:
    if not name.endswith("_ptr"):
        return "fp32" if name in ("scale", "soft_cap") else "i32"
    if name in _WHOLE_NUMBERS:
        return "*i64"
    if name in _WORDS:
        return "*i32"
    if name == "key_ptr":
        return "*u16"
    return f"*{dtype}" if name in _OF_THE_MODEL else "*fp32"


def _statistics(variant: Variant, made: Any) -> Statistics:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        listing, usage = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    registers, stack, local = map(int, _USAGE.findall(usage)[0])
    found = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(listing)]
    operations = Counter(_operation(text) for _, text in found)
    tensor_core = sum(count for name, count in operations.items() if name in ("HMMA", "IMMA", "HGMMA", "UTCHMMA"))
    counted = _over_tokens(variant, found) if variant.tokens else (None, None)
    return Statistics(registers, stack + local, made.metadata.shared, tensor_core, len(found), *counted)


def _over_tokens(variant: Variant, found: list[tuple[int, str]]) -> tuple[float, int]:
    """Warp instructions a token, and the width of the loads that stream."""
    jumps = [(int(target.group(1), 16), at) for at, text in found if (target := _JUMP.search(text))]
    loops = [[(at, text) for at, text in found if first <= at <= last] for first, last in jumps if first < last]
    marked = [loop for loop in loops if any(_operation(text) == variant.marker for _, text in loop)]
    # The innermost one; kernels that score a sample besides have the larger loop elsewhere.
    inside = min(marked, key=len)
    parts = [(inside, variant.tokens)]
    if variant.once:
        parts.append((sorted(set(found) - set(inside)), variant.once))
    each, warps = _streamed_bytes(variant), variant.warps
    widths = [narrowest_load([text for _, text in part], each * tokens / (32 * warps)) for part, tokens in parts]
    return sum(len(part) * warps / tokens for part, tokens in parts), min(widths)


def narrowest_load(instructions: Sequence[str], needed: float | int) -> int:
    """Bytes of the narrowest of the widest loads from global memory that bring ``needed`` bytes to a thread; 0: none do.

    >>> narrowest_load(["LDG.E.128 R4, desc[UR4][R2.64]", "@P0 LDG.E R8, desc[UR4][R6.64]", "STG.E.128 [R2], R4"], 20)
    4
    """
    brought = 0
    for width in sorted(map(_loaded_bytes, instructions), reverse=True):
        brought += width
        if brought >= needed:
            return width
    return 0


def _loaded_bytes(text: str) -> int:
    name, *modifiers = _PREDICATE.sub("", text).split()[0].split(".")
    if name not in ("LDG", "LDGSTS"):
        return 0
    return next((_WIDTHS[one] for one in modifiers if one in _WIDTHS), 4)


def _streamed_bytes(variant: Variant) -> int:
    """Bytes that the loop over tokens reads of each: its low-rank key, its 16-bit key, or its padded rows of K and V."""
    from loki_attention.core.planes import Planes

    if variant.kernel in ("attend", "dense"):
        return 2 * _padded(variant.head_dim) * (4 if variant.dtype == "fp32" else 2)
    return Planes.parse(variant.planes).bytes_per_token if variant.kernel == "score" else 2


def _operation(text: str) -> str:
    return _PREDICATE.sub("", text).split()[0].split(".")[0]
