"""Tables and pictures of evaluations, from rows with known items."""

import json
from dataclasses import replace
from typing import Any

import pytest

from loki_attention.analysis.comparing import Table, difference, tables, to_dict
from loki_attention.analysis.comparison_report import cells, headings, markdown_table, terminal_tables
from loki_attention.analysis.quality_figures import by_depth, write_heat_maps, write_quality_figures
from loki_attention.errors import ArgumentError
from loki_attention.intervals import bootstrap_interval, wilson_interval
from loki_attention.results import Result


def row(metric: str, variant: str, items: list[float], read: float, **config: Any) -> Result:
    name, _, budget = variant.partition(" @ ")
    answers = metric == "retrieval_accuracy"
    interval = wilson_interval(int(sum(items)), len(items)) if answers else bootstrap_interval(items, seed=0)
    common = {"task": "perplexity", "items": "abc", "variant": variant, "method": name, "budget": budget or None}
    return Result(
        metric=metric,
        value=sum(items) / len(items),
        unit="fraction" if answers else "nats a token",
        n=len(items),
        interval=interval,
        config={**common, "read_fraction": read, **config},
        items=tuple(items),
    )


LOSSES = [
    row("kl_from_dense", "dense", [0.0] * 4, 1.0),
    row("kl_from_dense", "exact-topk @ 1/8", [0.01, 0.02, 0.01, 0.02], 0.56),
    row("kl_from_dense", "loki @ 1/8", [0.02, 0.03, 0.02, 0.04], 0.18),
    row("kl_from_dense", "quest @ 1/8", [0.03, 0.02, 0.03, 0.03], 0.19),
    row("kl_from_dense", "streaming @ 1/8", [0.2, 0.3, 0.4, 0.3], 0.125),
    row("kl_from_dense", "streaming @ 1/16", [0.4, 0.5, 0.6, 0.5], 0.0625),
]


def answers(variant: str, right: str, read: float, length: int = 2048, **config: Any) -> Result:
    config = {"family": "single", "length": length, "depths": 2, "task": f"retrieval:single:{length}", **config}
    return row("retrieval_accuracy", variant, [int(one) for one in right], read, of_record=1, dense_value=1.0, **config)


ANSWERS = [
    answers("dense", "11111111", 1.0),
    answers("loki @ 1/8", "11111111", 0.18),
    answers("quest @ 1/8", "11101111", 0.19),
    answers("streaming @ 1/8", "00000010", 0.125),
]


def table_of(rows: list[Result]) -> Table:
    (table,) = tables(rows)
    return table


def test_the_best_is_named_and_noise_is_told_from_difference() -> None:
    table = table_of(LOSSES)
    assert (table.task, table.first, table.note) == ("perplexity", "kl_from_dense", None)
    standing = {line[0]: line[-1] for line in (cells(table, one) for one in table.rows)}
    assert standing == {
        "dense": "",
        "exact-topk @ 1/8": "better",
        "loki @ 1/8": "noise",
        "quest @ 1/8": "best",
        "streaming @ 1/8": "worse",
        "streaming @ 1/16": "",
    }


def test_answers_are_compared_by_the_sign_test() -> None:
    table = table_of(ANSWERS)
    behind = {one.variant: one.behind for one in table.rows}
    assert behind["loki @ 1/8"] is None
    quest, streaming = behind["quest @ 1/8"], behind["streaming @ 1/8"]
    assert quest is not None and streaming is not None
    assert (quest.p, quest.value, quest.is_noise) == (1.0, -0.125, True)
    assert (streaming.p, streaming.is_noise) == (pytest.approx(2 / 2**7), False)


def test_only_the_same_items_are_paired() -> None:
    ours, theirs = LOSSES[2], LOSSES[3]
    found = difference(ours, theirs)
    assert found is not None
    assert found.value == pytest.approx(0.0)
    assert found.interval == pytest.approx(bootstrap_interval([-0.01, 0.01, -0.01, 0.01], seed=0))
    other = replace(theirs, config={**theirs.config, "items": "def"})
    shorter = row("kl_from_dense", "quest @ 1/8", [0.03, 0.02], 0.19)
    assert difference(ours, other) is None
    assert difference(ours, shorter) is None
    assert len(tables([ours, other])) == 2


def test_lengths_of_a_family_stand_side_by_side() -> None:
    table = table_of([*ANSWERS, answers("dense", "11111110", 1.0, 4096), answers("loki @ 1/8", "11111111", 0.17, 4096)])
    assert table.columns == ("retrieval_accuracy at 2048", "retrieval_accuracy at 4096")
    assert headings(table) == ["variant", "bytes", "accuracy at 2048", "accuracy at 4096", "to the best"]
    assert cells(table, table.rows[0])[:4] == ["dense", "100.0%", "100.0%", "87.5% [52.9%, 97.8%]"]
    assert cells(table, table.rows[-1])[3] == "-"


def test_families_and_tasks_that_say_nothing_are_marked() -> None:
    failed = replace(ANSWERS[0], config={**ANSWERS[0].config, "of_record": 0, "dense_value": 0.25})
    note = table_of([failed]).note
    assert note is not None and "right in 25% alone: this says nothing" in note
    near = row("acc", "dense", [1, 0, 0, 0], 1.0, task="lm-eval:piqa", near_chance=1, chance=0.5)
    note = table_of([near]).note
    assert note is not None and "near chance (50%)" in note


def test_a_wide_table_comes_in_parts_that_fit_a_terminal() -> None:
    metrics = ("kl_from_dense", "next_token_agreement", "kept_mass", "set_recall", "jaccard")
    table = table_of([row(metric, "loki @ 1/8", [0.1, 0.2], 0.2, task="fidelity") for metric in metrics])
    first, second = ([column.header for column in part.columns] for part in terminal_tables(table))
    assert first == ["variant", "bytes", "KL x 1000", "same token", "to the best"]
    assert second == ["variant", "kept mass", "set recall", "jaccard"]


def test_markdown_and_json_have_what_the_terminal_has() -> None:
    table = table_of(LOSSES)
    shown = markdown_table(table)
    assert "### perplexity" in shown
    assert "| loki @ 1/8 | 18.0% | 27.50 [20.00, 35.00] | noise |" in shown
    (alone,) = terminal_tables(table)
    assert alone.row_count == len(table.rows) == shown.count(" @ ") + 1
    said = json.loads(json.dumps(to_dict(table)))
    loki = next(one for one in said["rows"] if one["variant"] == "loki @ 1/8")
    assert loki["values"]["kl_from_dense"]["value"] == pytest.approx(0.0275)
    assert (loki["behind"]["other"], loki["behind"]["noise"]) == ("quest @ 1/8", True)


def test_layers_stay_out_of_the_table() -> None:
    layer = row("jaccard", "loki @ 1/8", [0.5] * 4, 0.18, layer=1)
    assert "jaccard" not in table_of([*LOSSES, layer]).columns
    whole = row("jaccard", "loki @ 1/8", [0.5] * 4, 0.18, layer="all")
    assert "jaccard" in table_of([*LOSSES, whole]).columns


def test_rows_of_other_commands_are_refused() -> None:
    with pytest.raises(ArgumentError, match="compare reads what `loki evaluate` wrote"):
        tables([Result(metric="decode_step_time", value=1.0, unit="s", n=1)])


def test_depths_are_those_that_were_asked_in_turn() -> None:
    assert by_depth(answers("loki", "10101110", 0.1)) == [1.0, 0.25]
    uneven = by_depth(answers("loki", "1", 0.1))
    assert uneven[0] == 1.0 and uneven[1] != uneven[1]


def test_pictures_are_written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib (extra 'plots')")
    monkeypatch.setattr("loki_attention.analysis.figures._DOTS_PER_INCH", 30)
    pictures = write_quality_figures(tables([*LOSSES, *ANSWERS]), tmp_path) + write_heat_maps(ANSWERS, tmp_path)
    assert [picture.name for picture in pictures] == [
        "quality_perplexity.png",
        "quality_retrieval-single.png",
        "retrieval_single.png",
    ]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert write_quality_figures(tables(LOSSES[:1]), tmp_path) == []
