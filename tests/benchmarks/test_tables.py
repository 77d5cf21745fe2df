"""docs/results.md is written from the files that are there."""

import shutil
from pathlib import Path

import pytest

import tables
from evaluation_rows import MADE_BY, losses
from loki_attention.results import save_results
from table_parts import joined, paragraph
from tables import RESULTS, SHORT, results_document


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the file that the document always has."""
    shares = ("1/8", "1/16", "1/32")
    rows = [*losses("dense", [0.0] * 4, rule="continuation", unit="key")]
    rows += [
        row
        for name in SHORT
        for share in shares
        for row in losses(f"{name} @ {share}", [0.02, 0.03, 0.02, 0.04], rule="continuation", unit="key")
    ]
    save_results(tmp_path / "wikitext2.json", rows, MADE_BY)
    return tmp_path


def test_files_of_the_harness(folder: Path) -> None:
    text = results_document(folder, folder / "pictures")
    assert "4 windows of 2048 tokens" in text
    assert "| **loki** | 6.2% | 27.50 [20.00, 35.00] | 90.0% | +0.00% [-1.00, +1.00] |" in text
    assert not (folder / "pictures").exists()


@pytest.mark.slow
def test_files_of_record_give_the_document_that_is_committed(tmp_path: Path) -> None:
    for file in RESULTS.glob("*.json"):
        shutil.copy(file, tmp_path)
    assert results_document(tmp_path, tmp_path / "pictures") == (tables.ROOT / "docs" / "results.md").read_text("utf-8")


def test_lines_are_short_but_for_tables(folder: Path) -> None:
    long = [line for line in results_document(folder, folder).splitlines() if len(line) > 120 and line[0] != "|"]
    assert long == []


def test_sentences_and_paragraphs() -> None:
    assert [joined(parts) for parts in (["a", "b", "c"], ["a", "b"], ["a"], [])] == ["a, b and c", "a and b", "a", ""]
    assert max(map(len, paragraph("pca-pre " * 60).splitlines())) <= 118
    assert "-\n" not in paragraph("pca-pre " * 60)
