"""What a calibration run has done so far, on disk, so that a killed run goes on to the identical result."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file

from loki_attention.calibration.ranks import ALONE, Ranks
from loki_attention.core.artifact import moments_from, save_moments
from loki_attention.core.moments import LayerMoments
from loki_attention.errors import ArgumentError
from loki_attention.files import written_whole

Item = TypeVar("Item")


class Checkpoint:
    """A folder of partial results that belong to one ``key`` (model, windows and settings); another key starts afresh.

    ``None`` as folder keeps nothing. Of several processes the first alone reads and writes it and tells the others.
    Raises ``ArgumentError`` for a folder that holds something else.
    """

    def __init__(self, folder: Path | None, key: str, ranks: Ranks = ALONE) -> None:
        self.ranks = ranks
        self._folder = folder = folder if ranks.first else None
        if folder is None:
            return
        stamp = folder / "key.txt"
        if folder.exists() and not stamp.is_file() and any(folder.iterdir()):
            raise ArgumentError(f"{folder} holds something that is not a calibration in progress; name another folder")
        if stamp.is_file() and stamp.read_text(encoding="utf-8") != key:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(stamp, key)

    def moments(self) -> tuple[int, dict[int, LayerMoments]] | None:
        """Windows done and their moments, or None."""
        file = self._latest()
        return self.ranks.from_first(None if file is None else (_windows_of(file), moments_from(load_file(file))))

    def save_moments(self, windows_done: int, moments: Mapping[int, LayerMoments]) -> None:
        """Keep the moments of the first ``windows_done`` windows."""
        if self._folder is None:
            return
        old, file = self._latest(), self._folder / f"moments-{windows_done}.safetensors"
        with written_whole(file) as draft:
            save_moments(draft, moments)
        if old is not None and old != file:
            old.unlink()

    def once_each(
        self, name: str, settings: object, compute: Callable[[Item], Any], items: Sequence[Item]
    ) -> Iterator[Any]:
        """``compute`` of every item (plain JSON types), in order, shared out over processes and computed only once.

        Results are kept under ``name``, the item's number and ``settings``.
        """
        digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        files = [f"{name}-{i}-{digest}.json" for i in range(len(items))]
        kept = self.ranks.from_first([self._kept(file) for file in files])

        def computed(i: int) -> Any:
            return compute(items[i]) if kept[i] is None else kept[i]

        for i, result in enumerate(self.ranks.each(computed, range(len(items)))):
            if self._folder is not None and kept[i] is None:
                _write(self._folder / files[i], json.dumps(result))
            yield result

    def remove(self) -> None:
        """Delete the folder: the run is done."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _kept(self, file: str) -> Any:
        path = None if self._folder is None else self._folder / file
        return json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None

    def _latest(self) -> Path | None:
        files = [] if self._folder is None else sorted(self._folder.glob("moments-*.safetensors"), key=_windows_of)
        return files[-1] if files else None


def _windows_of(file: Path) -> int:
    return int(file.stem.split("-")[1])


def _write(file: Path, text: str) -> None:
    with written_whole(file) as draft:
        draft.write_text(text, encoding="utf-8")
