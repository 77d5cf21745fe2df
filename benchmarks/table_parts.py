"""What every table of a document is made of: Markdown rows, wrapped paragraphs, intervals, and the line that says how it was
measured. Knows nothing of what is measured."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from loki_attention.files import written_whole
from loki_attention.results import Environment, Result, SavedResults, load_results

_WIDTH = 118


def saved(path: Path) -> SavedResults | None:
    """A result file, None where it is not there yet."""
    return load_results(path) if path.exists() else None


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def paragraph(text: str) -> str:
    """The text in lines of at most 118 characters."""
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def joined(parts: Sequence[str]) -> str:
    """The parts as a sentence lists them: ``a, b and c``."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def interval(result: Result, scale: int, form: str) -> str:
    """The interval in brackets."""
    if result.interval is None:
        return ""
    low, high = result.interval
    return f"[{scale * low:{form}}, {scale * high:{form}}]"


def kl(result: Result) -> str:
    """KL from dense in thousandths of a nat, with its interval."""
    return f"{1000 * result.value:.2f} {interval(result, 1000, '.2f')}"


def made_by(environment: Environment) -> str:
    """Command, hardware, versions and commit in one paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return paragraph(
        f"`{environment.command}` · {environment.hardware} · {environment.dtype} · {versions} · commit "
        f"{environment.commit} · {environment.date[:10]}"
    )


def between(text: str, begin: str, end: str, content: str) -> str:
    """The text with ``content`` in place of what stands between two markers."""
    before, rest = text.split(begin)
    return f"{before}{begin}{content}{end}{rest.split(end, 1)[1]}"


def write(path: Path, text: str) -> None:
    """Replace a document."""
    with written_whole(path) as draft:
        draft.write_text(text, encoding="utf-8")
