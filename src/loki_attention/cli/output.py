"""What commands share: options that mean the same everywhere, and where output goes.

Results go to standard output, progress and messages to standard error; with ``--json`` one JSON document is all there
is on standard output.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from loki_attention.core.basis import KeyBasis

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A local folder or a name on the Hugging Face hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output instead of tables.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1 ...")]


def examples(*commands: str) -> str:
    """The examples that ``--help`` shows at its end, a line each."""
    return "\n\n".join(("Examples:", *(f"$ {command}" for command in commands)))


def results() -> Console:
    """Standard output."""
    return Console()


def messages() -> Console:
    """Standard error."""
    return Console(stderr=True)


def print_json(document: Any) -> None:
    """Print a JSON document on standard output."""
    print(json.dumps(document, indent=1))


def describe(basis: "KeyBasis", path: Path) -> dict[str, Any]:
    """A basis in plain JSON types: what was chosen, for which model, and every held-out figure."""
    spec = basis.spec
    return {
        "basis": str(path),
        "model": {
            "id": spec.model_id,
            "architecture": spec.architecture,
            "layers": list(spec.layers),
            "heads": spec.heads,
            "kv_heads": spec.kv_heads,
            "head_dim": spec.head_dim,
        },
        "candidate": basis.candidate,
        "candidates": {str(i): list(layer.candidates) for i, layer in basis.layers.items()},
        "planes": str(basis.planes),
        "tail": basis.tail,
        "budget": {name: getattr(basis.budget, name) for name in ("tokens", "fraction", "minimum", "sinks", "recent")},
        "dense_layers": list(basis.dense_layers),
        "record": dict(basis.record),
    }
