"""Long measurements item by item: what is done is kept on disk, and a killed run goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track


def run_items(path: Path, key: str, count: int, compute: Callable[[int], Any]) -> list[Any]:
    """``[compute(0), ..., compute(count - 1)]``, each result (plain JSON types) kept as a line of ``path``.

    The first line is ``key``, which names everything the results depend on; a file with another key starts afresh.
    A line that was cut short by a kill is computed again.
    """
    done = _read(path, key)
    mode = "a" if done else "w"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, encoding="utf-8") as stream:
        if not done:
            stream.write(json.dumps(key) + "\n")
        for i in track(range(len(done), count), description=path.stem, console=Console(stderr=True)):
            done.append(compute(i))
            stream.write(json.dumps(done[-1]) + "\n")
            stream.flush()
    return done[:count]


def _read(path: Path, key: str) -> list[Any]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if not whole or json.loads(whole[0]) != key:
        return []
    if len(whole) < len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    return [json.loads(line) for line in whole[1:]]
