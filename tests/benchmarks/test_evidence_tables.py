"""The tables at equal bytes say which method is best, what is only noise, and what is missing; from rows made by hand."""

from pathlib import Path

import pytest

from evaluation_rows import MADE_BY, answers, losses
from evidence_study import KL, PERPLEXITY, Study, is_no_bound, runs_as_counted, study_of
from evidence_tables import (
    FILE,
    TAILS,
    alone_and_not,
    control,
    equal_bytes_parts,
    line,
    point_tables,
    sentences,
    short_parts,
    verdict,
)
from loki_attention.results import Result, save_results

LOW, NEAR, HIGH = [0.02, 0.03, 0.02, 0.04], [0.04, 0.02, 0.03, 0.03], [0.2, 0.3, 0.4, 0.3]
ALL, HALF, NONE = "1" * 12, "111111" + "0" * 6, "0" * 12
PLAIN = [
    *losses("dense", [0.0] * 4),
    *losses("loki @ bytes=1/8", LOW, planes="16@4+32@2"),
    *losses("loki:tail=none @ bytes=1/8", HIGH, 0.1),
    *losses("double-sparsity @ bytes=1/8", NEAR, 0.2, planes="32@4"),
    *losses("random @ bytes=1/8", HIGH, 0.5),
    *losses("random @ bytes=1/16", [2 * kl for kl in HIGH], 0.9),
    *losses("quest @ bytes=1/8", [kl / 2 for kl in LOW], 0.1),
    *losses("exact-topk @ 1/8", [kl / 4 for kl in LOW]),
    answers("dense", ALL),
    answers("loki @ bytes=1/8", ALL, planes="8@4"),
    answers("double-sparsity @ bytes=1/8", ALL, planes="32@4"),
    answers("random @ bytes=1/8", HALF),
    answers("loki @ bytes=1/16", HALF),
    answers("random @ bytes=1/16", NONE),
    answers("double-sparsity @ bytes=1/16", ALL),
]


def tailed(variant: str, kl: list[float]) -> list[Result]:
    name, _, budget = variant.partition(" @ ")
    return losses(f"{name}:tail=mean @ {budget}", kl)


MEAN = [
    *losses("dense", [0.0] * 4),
    *tailed("loki @ bytes=1/8", [0.01, 0.02, 0.01, 0.02]),
    *tailed("double-sparsity @ bytes=1/8", LOW),
    *tailed("exact-topk @ 1/8", [0.001, 0.002, 0.001, 0.002]),
]


def plain(*more: Result) -> Study:
    return study_of([*PLAIN, *more], runs_as_counted)


def cells(name: str, point: str) -> list[str]:
    return line(plain(), point, name)


def stand(study: Study, name: str, column: str) -> str | None:
    return study.stands["1/8"][name][study.columns.index(column)]


def test_points_and_columns_are_those_of_the_file() -> None:
    study = study_of(list(reversed(PLAIN)), runs_as_counted)
    assert list(study.points) == ["1/8", "1/16"]
    assert set(study.columns) == {KL, PERPLEXITY, "single 2K"}


@pytest.mark.parametrize(
    ("name", "column", "expected"),
    [
        ("loki", KL, "best"),
        ("double-sparsity", KL, "noise"),
        ("random", KL, "worse"),
        ("quest", KL, "better"),
        ("exact-topk", KL, "better"),
        ("double-sparsity", PERPLEXITY, "worse"),
        ("exact-topk", PERPLEXITY, "noise"),
        ("loki", "single 2K", "best"),
        ("random", "single 2K", "worse"),
        ("quest", "single 2K", None),
    ],
)
def test_standings_are_to_the_best_that_runs_as_it_counts(name: str, column: str, expected: str | None) -> None:
    assert stand(plain(), name, column) == expected


def test_equals_are_best_together_and_simulated_ones_never() -> None:
    study = plain(answers("quest @ bytes=1/8", ALL))
    assert [stand(study, name, "single 2K") for name in ("loki", "double-sparsity", "quest")] == [
        "best",
        "best",
        "noise",
    ]


def test_a_line_has_every_value_its_mark_and_the_planes_of_every_task() -> None:
    assert cells("loki", "1/8") == [
        "**loki**", "16@4+32@2, 8@4", "12.5%", "**27.50 [20.00, 35.00]**", "**+0.00% [-1.00, +1.00]**", "**100.0% (0 / 0)**", "best",
    ]  # fmt: skip
    assert cells("double-sparsity", "1/8")[2:] == [
        "12.5%", "30.00 [22.50, 37.50] ≈", "+22.14% [+21.14, +23.14]", "**100.0% (0 / 0)**", "1 best, 1 within noise, 1 worse",
    ]  # fmt: skip


def test_what_cannot_read_so_little_says_so() -> None:
    assert cells("loki", "1/16")[3:] == ["cannot", "cannot", "50.0% (6 / 0)", "1 worse, 2 cannot"]
    assert cells("quest", "1/16") == ["quest (simulated)", "", "", "cannot", "cannot", "cannot", ""]
    assert cells("quest", "1/8")[3:] == [
        "13.75 [10.00, 17.50] ▲",
        "+10.52% [+9.52, +11.52]",
        "cannot",
        "1 better, 1 worse, 1 cannot",
    ]


def test_methods_that_compete_come_first_and_the_bound_last() -> None:
    table = point_tables(plain())[1]
    names = [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()[2:]]
    assert names == [
        "dense", "**loki**", "loki:tail=none", "double-sparsity", "random", "quest (simulated)", "exact-topk (bound)",
    ]  # fmt: skip


def test_the_summary_counts_and_names_what_is_missed() -> None:
    (text,) = sentences(plain())
    assert " ".join(text.split()) == (
        "loki is best or within noise of the best in 3 of 6 comparisons: KL 1 of 2, perplexity 1 of 2 and retrieval 1 of "
        "2. Not in KL from dense, x 1000 at 1/16 (best: random), perplexity over dense at 1/16 (best: random) and single "
        "2K at 1/16 (best: double-sparsity)."
    )


def test_the_broken_control_is_described_at_the_least_bytes() -> None:
    assert " ".join(control(plain()).split()) == (
        "Random selection, which an evaluation must see as broken, at 1/16: KL x 1000 600, perplexity +146%, answers 0.0% to "
        "0.0% where dense has 100.0% to 100.0%, told from dense in 1 of 1."
    )
    assert control(study_of([row for row in PLAIN if row.config["method"] != "random"], runs_as_counted)) == ""


def test_families_that_dense_attention_fails_are_named_and_left_out() -> None:
    failed = [
        answers(name, NONE, family="words", of_record=0, dense_value=0.25) for name in ("dense", "loki @ bytes=1/8")
    ]
    study = plain(*failed)
    assert "words 2K" not in study.columns
    assert "words 2K, where dense attention is right in 25% alone" in sentences(study)[-1]


def test_the_tail_is_told_from_the_selection() -> None:
    text = alone_and_not(plain(), study_of(MEAN, is_no_bound, suffix=":tail=mean"))
    assert "| **loki** | 300.00 → 15.00 (20.0x) |" in text
    assert "| exact-topk | 6.88 → 1.50 (4.6x) |" in text
    assert (
        "At 1/8 the best selection alone is double-sparsity (30.00), with a tail loki (15.00); the tail divides KL by "
        "1.1 to 20.0, median 10.5." in " ".join(text.split())
    )


def test_with_tails_all_but_the_bound_compete() -> None:
    study = study_of(MEAN, is_no_bound, suffix=":tail=mean")
    assert [stand(study, name, KL) for name in ("loki", "double-sparsity", "exact-topk")] == ["best", "worse", "better"]


def test_a_word_where_all_columns_agree() -> None:
    assert (verdict(["noise", "noise"]), verdict(["worse"]), verdict([None])) == ("within noise", "worse", "cannot")
    assert verdict(["worse", "best", "noise", "best"]) == "2 best, 1 within noise, 1 worse"


def test_the_short_table_has_the_hardest_family_and_those_that_run_as_they_count(tmp_path: Path) -> None:
    assert short_parts(tmp_path) == []
    harder = [answers(name, HALF, family="multi-key", length=4096) for name in ("dense", "loki @ bytes=1/8")]
    save_results(tmp_path / FILE, [*PLAIN, *harder], MADE_BY)
    table, source = short_parts(tmp_path)
    assert table.splitlines()[0] == "| KL from dense x 1000 · multi-key 4K found | 1/8 | 1/16 |"
    assert "| **loki** | 27.50 · 50.0% | cannot · cannot |" in table
    assert "| dense | 0.00 · 50.0% | 0.00 · 50.0% |" in table
    assert "quest" not in table and "exact-topk" not in table
    assert MADE_BY.command in source


def test_a_study_without_its_file_is_left_out(tmp_path: Path) -> None:
    assert equal_bytes_parts(tmp_path, tmp_path) == []
    save_results(tmp_path / TAILS, MEAN, MADE_BY)
    text = "\n".join(equal_bytes_parts(tmp_path, tmp_path))
    assert "Is it the tail" in text and "At equal bytes" not in text and "alone" not in text
    save_results(tmp_path / FILE, PLAIN, MADE_BY)
    text = "\n".join(equal_bytes_parts(tmp_path, tmp_path / "pictures"))
    assert text.index("## At equal bytes") < text.index("## Is it the tail") < text.index("### Selections alone")
    drawn = sorted(path.name for path in (tmp_path / "pictures" / "equal-bytes").iterdir())
    assert drawn == ["quality_perplexity.png", "quality_retrieval-single.png"]
    assert all(f"(pictures/equal-bytes/{name})" in text for name in drawn)
