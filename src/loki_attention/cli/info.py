"""``loki info``: what would happen to a model, layer by layer, what that costs, and what this machine offers."""

from itertools import groupby
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from loki_attention.cli.output import AsJson, Model, examples, print_json, results

if TYPE_CHECKING:
    from loki_attention.integrations.huggingface.info import LayerInfo, MachineInfo, ModelInfo

INFO_EXAMPLES = examples(
    "loki info Qwen/Qwen3-0.6B",
    "loki info path/to/model --context 131072 --planes 16@4+32@2",
    "loki info path/to/model --basis my-basis --json",
)

PlanesOption = Annotated[
    str | None,
    typer.Option(help="Layout of the low-rank keys, such as 16@4+32@2.", show_default="the basis's, or by head dim"),
]
Context = Annotated[int | None, typer.Option(help="Tokens to count bytes for.", show_default="the model's maximum")]
Basis = Annotated[
    Path | None, typer.Option("--basis", help="A basis folder: which layers calibration left dense, planes and tail.")
]


def info_command(
    model: Model, planes: PlanesOption = None, context: Context = None, basis: Basis = None, as_json: AsJson = False
) -> None:
    """Show what would happen to MODEL, layer by layer and why, what the twins cost, and what this machine offers.

    Reads the configuration alone, no weights. A model that cannot be served is refused with the reason.
    """
    from loki_attention import KeyBasis
    from loki_attention.integrations.huggingface.info import machine_info, model_info
    from loki_attention.integrations.huggingface.loading import load_config

    loaded = None if basis is None else KeyBasis.load(basis)
    found = model_info(load_config(model), planes=planes, context_tokens=context, basis=loaded)
    machine = machine_info()
    if as_json:
        print_json({"model": found.to_dict(), "machine": machine.to_dict()})
        return
    out = results()
    print(_headline(found))
    for table in (_layer_table(found), _byte_table(found, context=context, calibrated=loaded is not None)):
        out.print(table)
        out.print()
    _print_machine(machine)


def _headline(info: "ModelInfo") -> str:
    return (
        f"{info.architecture} ({info.model_type}): {info.heads} query heads, {info.kv_heads} key heads of "
        f"{info.head_dim} dims, {info.dtype or 'dtype not named'}\n"
        f"attention implementations it works with: {', '.join(info.implementations)}\n"
    )


def _layer_table(info: "ModelInfo") -> Table:
    table = Table(title="What would happen")
    for name in ("layers", "attention", "mode", "why"):
        table.add_column(name)
    for (kind, action, reason), run in groupby(info.layers, key=lambda one: (one.kind, one.action, one.reason)):
        table.add_row(_span(list(run)), kind, action, reason)
    return table


def _span(run: "list[LayerInfo]") -> str:
    first, last = run[0].layer, run[-1].layer
    return f"{first}" if first == last else f"{first}-{last}"


def _byte_table(info: "ModelInfo", *, context: int | None, calibrated: bool) -> Table:
    sparse, tokens = len(info.sparse_layers), info.context_tokens
    longest = "" if context is not None else " (the model's maximum)"
    notes = [] if calibrated else ["Planes and tail are defaults: calibration may choose a lighter tail."]
    notes += [] if info.dtype else ["K/V are counted in float32: the configuration names no dtype."]
    table = Table(
        title=f"Bytes of the sparse layers, planes {info.planes}, tail {info.tail}", caption="\n".join(notes) or None
    )
    table.add_column("for")
    for name in ("K/V", "twins beside", "of K/V"):
        table.add_column(name, justify="right")
    share = f"{info.twin_bytes / info.kv_bytes:.2%}"
    rows = {
        "a token, one layer": 1,
        f"a token, {sparse} sparse layers": sparse,
        f"{tokens:,} tokens{longest}": sparse * tokens,
    }
    for name, count in rows.items():
        table.add_row(name, _size(count * info.kv_bytes), _size(count * info.twin_bytes), share)
    table.add_row("the tail's sums, a sequence", "", _size(sparse * info.sum_bytes), "")
    return table


def _print_machine(machine: "MachineInfo") -> None:
    print(f"backend {machine.backend.name}: {machine.backend.reason}")
    print(", ".join(f"{name} {version}" for name, version in machine.versions.items()))
    print(f"native kernels: {', '.join(machine.isas) or 'not built'}")
    print(f"Triton kernels: {machine.triton}")
    print(fill(f"CPU features: {', '.join(machine.cpu_features) or 'unknown'}", 80))
    print(f"{machine.threads} threads; GPUs: {', '.join(machine.gpus) or 'none'}")


def _size(count: int) -> str:
    """Whole bytes below 64 KiB, else in the largest unit of which there is one."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= max(1 << power, 1 << 16):
            return f"{count / 2**power:,.2f} {unit}"
    return f"{count:,} B"
