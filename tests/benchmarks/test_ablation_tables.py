"""The tables of single changes group them, measure them against loki's own row, and hide no unknown one."""

from pathlib import Path
from typing import Any

import pytest

from ablation_tables import (
    BUNDLED,
    OTHERS,
    Place,
    Rows,
    ablation_parts,
    add_rows,
    calibration_parts,
    changes_table,
    grouped,
    planes_part,
    standing_of_default,
)
from evaluation_rows import MADE_BY, losses
from loki_attention.results import Result, SavedResults, save_results

OWN = [0.02, 0.03, 0.02, 0.04]
TAIL, NO_TAIL = Place(BUNDLED, "1/8", "linear"), Place(BUNDLED, "1/8", "none")


def change(name: str, tail: str, factor: float, task: str = "perplexity") -> list[Result]:
    """A row as the ablation names it."""
    variant = f"{name}, tail {tail} @ 1/8"
    settings: dict[str, Any] = {"method": "loki", "tail": tail, "planes": "16@4+32@2", "task": task}
    return losses(variant, [factor * kl for kl in OWN], **settings)


ROWS = [
    *losses("dense", [0.0] * 4),
    *change("loki", "none", 10),
    *change("16@2", "none", 20),
    *change("32@2", "none", 14),
    *change("8@4+16@2", "none", 12),
    *change("16@4+32@2", "none", 10),
    *change("0.75 L, exact", "none", 11),
    *change("something new", "none", 11),
    *change("loki", "linear", 1),
    *change("8@4+16@2", "linear", 3),
    *change("32@2", "linear", 2),
    *change("32@4", "linear", 0.5),
    *change("16@4+32@2", "linear", 1),
    *change("cap 2", "linear", 1.5),
    *change("per query head", "linear", 0.5),
    # As the study names it: a comma is left where the others have their tail.
    *losses("tail mean, @ 1/8", [2 * kl for kl in OWN], method="loki", tail="mean"),
]


@pytest.fixture
def rows() -> Rows:
    found: Rows = {}
    add_rows(found, BUNDLED, SavedResults(tuple(ROWS), MADE_BY))
    return found


def test_changes_are_grouped_and_unknown_ones_are_shown(rows: Rows) -> None:
    assert grouped(rows) == {
        "The tail": ["tail none", "tail mean"],
        "The tail: its sample, its cap, kappa": ["cap 2"],
        "One set a KV head against one a query head": ["per query head"],
        "How a group's heads agree": ["0.75 L, exact"],
        OTHERS: ["something new"],
    }


def test_loki_without_a_tail_is_its_columns_own_row_and_a_change_of_the_other(rows: Rows) -> None:
    assert list(rows) == [NO_TAIL, TAIL]
    assert rows[TAIL]["tail none"] is rows[NO_TAIL]["loki"]


def test_a_change_is_in_percent_of_its_own_column_and_columns_without_any_are_left_out(rows: Rows) -> None:
    assert changes_table(rows, ["cap 2"]).splitlines() == [
        "|  | 1/8, tail |",
        "| --- | --- |",
        "| **loki** | 27.50 [20.00, 35.00] |",
        "| cap 2 | 41.25 [30.00, 52.50] +50.0% |",
    ]
    both = changes_table(rows, ["cap 2", "0.75 L, exact"]).splitlines()
    assert both[0] == "|  | 1/8, no tail | 1/8, tail |"
    assert both[3] == "| cap 2 |  | 41.25 [30.00, 52.50] +50.0% |"
    assert both[4] == "| 0.75 L, exact | 302.50 [220.00, 385.00] +10.0% |  |"


def test_a_change_that_is_noise_is_marked() -> None:
    found: Rows = {}
    noisy = losses("cap 2, tail linear @ 1/8", [kl + d for kl, d in zip(OWN, (1, -1, 1, -0.5), strict=True)],
                   method="loki", tail="linear")  # fmt: skip
    add_rows(found, BUNDLED, SavedResults((*change("loki", "linear", 1), *noisy), MADE_BY))
    assert changes_table(found, ["cap 2"]).splitlines()[-1].endswith("% ≈ |")


def test_the_best_planes_of_every_size_and_column(rows: Rows) -> None:
    table = planes_part(rows).splitlines()
    assert "Of 5 layouts from 4 to 16 bytes" in table[2]
    assert table[-4:] == [
        "| **loki** | 275.00 [200.00, 350.00] | 27.50 [20.00, 35.00] |",
        "| 4 bytes | 16@2: 550.00 [400.00, 700.00] +100.0% |  |",
        "| 8 bytes | 8@4+16@2: 330.00 [240.00, 420.00] +20.0% | 32@2: 55.00 [40.00, 70.00] +100.0% |",
        "| 16 bytes | 16@4+32@2: 275.00 [200.00, 350.00] +0.0% ≈ | 32@4: 13.75 [10.00, 17.50] -50.0% |",
    ]
    sizes = {16: ["16@4+32@2", "32@4"]}
    assert standing_of_default(rows, list(rows), sizes).endswith("in 1 of 2 columns.")
    assert planes_part({TAIL: {"loki": rows[TAIL]["loki"]}}) == ""


def test_another_models_file_stands_beside_the_bundled_ones(tmp_path: Path) -> None:
    assert ablation_parts(tmp_path) == []
    save_results(tmp_path / "evidence-ablation-g4.json", ROWS, MADE_BY)
    assert ablation_parts(tmp_path) == []
    save_results(tmp_path / "evidence-ablation.json", ROWS, MADE_BY)
    text = "\n".join(ablation_parts(tmp_path))
    assert "| G = 2: 1/8, tail | g4: 1/8, tail |" in text
    assert "4 for the bundled model (G = 2) and 4 for g4." in text
    assert text.count("commit abc") == 2


def test_calibration_is_told_by_length_and_by_text(tmp_path: Path) -> None:
    assert calibration_parts(tmp_path) == []
    by_length = [*change("calibrated at 512", "linear", 2, "perplexity at 4096"),
                 *change("calibrated at 4096", "linear", 1, "perplexity at 4096")]  # fmt: skip
    save_results(tmp_path / "evidence-calibration.json", by_length, MADE_BY)
    text = "\n".join(calibration_parts(tmp_path))
    assert (
        "| **calibrated at 4096** | 27.50 [20.00, 35.00] |\n| calibrated at 512 | 55.00 [40.00, 70.00] +100.0% |"
        in text
    )
    assert "novels" not in text
    by_text = [*change("calibrated on wikitext", "linear", 1, "perplexity of source code"),
               *change("calibrated on novels", "linear", 1, "perplexity of source code")]  # fmt: skip
    save_results(tmp_path / "evidence-calibration.json", [*by_length, *by_text], MADE_BY)
    assert "| calibrated on novels | 27.50 [20.00, 35.00] +0.0% ≈ |" in "\n".join(calibration_parts(tmp_path))
