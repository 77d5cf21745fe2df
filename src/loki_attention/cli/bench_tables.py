"""What a terminal shows of ``loki bench``: returns things that rich prints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from loki_attention.kernels.break_even import BreakEven, BreakEvenShape
    from loki_attention.results import Environment, Result


def attention_table(case: str, rows: "Sequence[Result]", left_out: Sequence[Any]) -> Table:
    """One case: time, bytes read, share of what reading them costs, and how many times faster than both baselines."""
    from loki_attention.benchmarking.comparison import compared, named

    config = rows[0].config
    notes = [f"load {_number(config['load_before'], '.2f')} before, {_number(config['load_after'], '.2f')} after"]
    if config["others_cpu"] is not None:
        notes.append(f"others took {_number(config['others_cpu'], '.0%')} of the CPU time")
    notes.append(f"{config['isa']}, {config['threads']} threads")
    columns = (
        "probe: what reading alone takes, of this time; sdpa, dense: times faster than torch's and the fastest dense"
    )
    lines = [", ".join(notes), columns, *(f"without {one.name}: {one.reason}" for one in left_out)]
    table = Table(title=case, caption="\n".join(lines), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("provider", no_wrap=True)
    for name in ("ms", "p20-p80", "MB", "probe", "sdpa", "dense"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in compared(rows):
        row = one.result
        spread = "-".join(_short(1e3 * float(row.config[name] or 0)) for name in ("p20", "p80"))
        table.add_row(
            named(row),
            _short(1e3 * row.value),
            spread,
            f"{float(row.read_bytes or 0) / 1e6:.2f}",
            _number(row.config["share_of_probe"], ".0%"),
            _number(one.over_sdpa, ".2f"),
            _number(one.over_dense, ".2f"),
            style="bold" if row.config["provider"] == "loki" else "dim" if row.config["kind"] == "probe" else None,
        )
    return table


def break_even_table(found: "BreakEven", shape: "BreakEvenShape") -> Table:
    """Dense and sparse time by length, and from where on sparse is faster."""
    from loki_attention.kernels.break_even import NEVER

    answer = "no length measured" if found.tokens >= NEVER else f"{found.tokens:,} tokens on"
    table = Table(
        title=f"{shape.heads}/{shape.kv_heads}/{shape.head_dim}, batch {shape.bucket}, {shape.planes}, {shape.budget}",
        caption=f"loki's step is faster from {answer}",
    )
    for name in ("tokens", "dense ms", "loki ms", "dense over loki"):
        table.add_column(name, justify="right")
    for point in found.points:
        faster = point.dense / point.sparse
        cells = (f"{point.tokens:,}", f"{1e3 * point.dense:.3f}", f"{1e3 * point.sparse:.3f}", f"{faster:.2f}")
        table.add_row(*cells, style="bold" if faster > 1 else None)
    return table


def generate_table(rows: "Sequence[Result]") -> Table:
    """Tokens/s by length and variant, and the gain over transformers as it is."""
    config = rows[0].config
    table = Table(
        title=f"generate() on a random model: {config['model']}, vocabulary {config['vocabulary']}",
        caption=f"{config['new_tokens']} tokens a round over a cache filled beforehand, weights and cache random; gain over transformers",
    )
    table.add_column("tokens", justify="right")
    table.add_column("variant", no_wrap=True)
    for name in ("backend", "tokens/s", "p20-p80", "gain"):
        table.add_column(name, justify="right", no_wrap=True)
    baseline = {row.config["tokens"]: row.value for row in rows if row.config["variant"] == "transformers"}
    for row in rows:
        low, high = float(row.config["p20"] or 0), float(row.config["p80"] or 0)
        first = baseline.get(row.config["tokens"])
        table.add_row(
            f"{row.config['tokens']:,}",
            str(row.config["variant"]),
            str(row.config["backend"] or ""),
            f"{row.value:.2f}",
            f"{low:.2f}-{high:.2f}",
            "" if first is None else f"{row.value / first:.2f}",
        )
    return table


def machine_line(environment: "Environment") -> str:
    """Command, hardware and versions in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return f"{environment.hardware}, {environment.threads} threads, {versions}, commit {environment.commit}"


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.{3 if milliseconds < 1 else 2 if milliseconds < 10 else 1}f}"


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
