"""The commands of ``loki`` in one place, and what is the same for all: errors and warnings in one line each."""

import sys
import warnings
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from loki_attention import __version__
from loki_attention.cli.bench import bench
from loki_attention.cli.calibrate import CALIBRATE_EXAMPLES, calibrate_command
from loki_attention.cli.compare import COMPARE_EXAMPLES, compare_command
from loki_attention.cli.demo import DEMO_EXAMPLES, demo_command
from loki_attention.cli.evaluate import EVALUATE_EXAMPLES, evaluate_command
from loki_attention.cli.generate import GENERATE_EXAMPLES, generate_command
from loki_attention.cli.info import INFO_EXAMPLES, info_command
from loki_attention.cli.inspect import INSPECT_EXAMPLES, inspect_command
from loki_attention.errors import LokiError, LokiWarning


class _OneLineGroup(TyperGroup):
    """Runs a command; what a user did wrong becomes one line on standard error and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always", LokiWarning)
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except BrokenPipeError:
                raise
            except (LokiError, OSError) as error:
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                raise typer.Exit(1) from None


app = typer.Typer(
    name="loki",
    cls=_OneLineGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"loki-attention {__version__}")
        raise typer.Exit
    return wanted


@app.callback(epilog="Start with `loki demo`: it needs no download.")
def loki(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Sparse attention for pretrained decoders, from calibration alone."""


app.command("demo", epilog=DEMO_EXAMPLES)(demo_command)
app.command("info", epilog=INFO_EXAMPLES)(info_command)
app.command("calibrate", epilog=CALIBRATE_EXAMPLES)(calibrate_command)
app.command("inspect", epilog=INSPECT_EXAMPLES)(inspect_command)
app.command("generate", epilog=GENERATE_EXAMPLES)(generate_command)
app.command("evaluate", epilog=EVALUATE_EXAMPLES)(evaluate_command)
app.command("compare", epilog=COMPARE_EXAMPLES)(compare_command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line."""
    app()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line for a warning of ours; others as Python shows them."""
    if issubclass(category, LokiWarning):
        text = f"warning: {' '.join(str(message).split())}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)
