"""A measured break-even as rows of the one result schema."""

from loki_attention.benchmarking.timing import machine
from loki_attention.kernels.break_even import NEVER, ROUNDS, BreakEven, BreakEvenShape
from loki_attention.results import Result, Setting


def results_of(found: BreakEven, shape: BreakEvenShape) -> list[Result]:
    """The break-even in tokens (-1: at no length measured), and the time of both steps at every length."""
    common: dict[str, Setting] = {
        "heads": f"{shape.heads}/{shape.kv_heads}/{shape.head_dim}",
        "batch": shape.bucket,
        "planes": shape.planes,
        "budget": str(shape.budget),
        "tail": shape.tail,
        **machine(),
    }
    tokens = -1 if found.tokens >= NEVER else found.tokens
    rows = [Result(metric="break_even", value=tokens, unit="tokens", n=len(found.points), config=common)]
    for point in found.points:
        for name in ("dense", "sparse"):
            config = {**common, "provider": name, "tokens": point.tokens}
            rows.append(
                Result(metric="decode_step_time", value=getattr(point, name), unit="s", n=ROUNDS, config=config)
            )
    return rows
