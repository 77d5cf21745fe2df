"""What a long measurement has found so far, item by item on disk: a killed run goes on where it was."""

import json
from pathlib import Path
from typing import Any

from loki_attention.errors import ArgumentError


class Ledger:
    """The outcomes of items (plain JSON types) by unit and number, each kept as a line of a file; None keeps nothing.

    A unit's name says everything its outcomes depend on, so that outcomes of other units do no harm. A line that was cut
    short by a kill is dropped, and its item found again. Raises ``ArgumentError`` for a file that is no ledger.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known = {} if path is None else _read(path)

    def get(self, unit: str, item: int) -> Any:
        """The outcome of an item, None where it has none."""
        return self._known.get((unit, item))

    def add(self, unit: str, item: int, outcome: Any) -> None:
        """Keep an outcome, on disk before this returns."""
        self._known[unit, item] = outcome
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([unit, item, outcome]) + "\n")

    def discard(self) -> None:
        """Remove the file: everything in it has gone into results."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _read(path: Path) -> dict[tuple[str, int], Any]:
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    try:
        known = {(str(unit), int(item)): outcome for unit, item, outcome in map(json.loads, whole.splitlines())}
    except (ValueError, TypeError):
        raise ArgumentError(
            f"{path} is no record of a measurement in progress; remove it, or name another output"
        ) from None
    if len(whole) < len(text):
        path.write_text(whole, encoding="utf-8")
    return known
