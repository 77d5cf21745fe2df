"""Text and records from files: .txt, .md, .jsonl and .csv, each also with .gz, alone or in folders."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loki_attention.errors import CorpusError

BLANK_LINE = "\n\n"
_SUFFIXES = (".txt", ".md", ".jsonl", ".txt.gz", ".md.gz", ".jsonl.gz")


def text_files(path: Path) -> list[tuple[Path, str]]:
    """The usable files of a path with their names: a file's own, or the folder's and the way from there."""
    if path.is_file():
        if not path.name.lower().endswith(_SUFFIXES):
            raise CorpusError(f"{path} is not a text file this reads; known suffixes: {', '.join(_SUFFIXES)}")
        if path.stat().st_size == 0:
            raise CorpusError(f"{path} is empty; give a file with text in it")
        return [(path, path.name)]
    if not path.is_dir():
        raise CorpusError(f"{path} is not there; give the path of a text file or of a folder of text files")
    inside = [(file, file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
    usable = [
        (file, (Path(path.resolve().name) / name).as_posix())
        for file, name in inside
        if name.name.lower().endswith(_SUFFIXES)
        and not any(part.startswith(".") for part in name.parts)
        and file.stat().st_size
    ]
    if not usable:
        raise CorpusError(f"the folder {path} has no text files; known suffixes: {', '.join(_SUFFIXES)}")
    return usable


def read_text(path: Path, field: str = "text") -> str:
    """The text of a file, a .jsonl file's records joined by blank lines; ``field`` is where a record has its text.

    Raises ``CorpusError`` for what cannot be read, is not UTF-8, or has a record without text in ``field``.
    """
    text = _decoded(path)
    if not path.name.lower().removesuffix(".gz").endswith(".jsonl"):
        return text
    return BLANK_LINE.join(_text_of(path, number, record, field) for number, record in _json_lines(path, text))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl or .csv file, either also with .gz; of a .csv file all values are text.

    Raises ``CorpusError`` for another suffix, what cannot be read, and a line that is no record.
    """
    text, name = _decoded(path), path.name.lower().removesuffix(".gz")
    if name.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text)))
    if not name.endswith(".jsonl"):
        raise CorpusError(f"{path} has no records this reads; give a .jsonl or .csv file")
    records = list(_json_lines(path, text))
    for number, record in records:
        if not isinstance(record, dict):
            raise CorpusError(f"{path}, line {number}, is no record of named fields but {type(record).__name__}")
    return [record for _, record in records]


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.name.lower().endswith(".gz") else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} cannot be read: {error}") from None
    return text.replace("\r\n", "\n")


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise CorpusError(
                f"{path}, line {number}, is no JSON ({error}); a .jsonl file has one record a line"
            ) from None


def _text_of(path: Path, number: int, record: object, field: str) -> str:
    value = record.get(field) if isinstance(record, dict) else None
    if isinstance(value, str):
        return value
    found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
    raise CorpusError(
        f"{path}, line {number}, has no text in field {field!r} (it has: {found or 'nothing'}); name the field"
        " that holds the text"
    )
