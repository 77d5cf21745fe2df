"""Every wrong input of ``docs/errors.md`` gets the sentence that stands there, and leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest

from bad_input_setting import answer, make_folders, namespace
from bad_inputs import SECTIONS, BadInput, page
from loki_attention import attach

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
BAD_INPUTS = [one for section in SECTIONS for one in section.inputs]
LEAST = 34


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory in which the inputs are right but for one thing."""
    path = tmp_path_factory.mktemp("bad-inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        make_folders()
    return path


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return namespace()


@pytest.mark.parametrize("wrong", BAD_INPUTS, ids=lambda wrong: wrong.shown)
def test_a_wrong_input_gets_its_sentence(
    wrong: BadInput, folder: Path, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert answer(wrong.shown, names) == (wrong.kind, wrong.sentence)
    assert sorted(folder.rglob("*")) == before
    attach(names["model"], method="dense").detach()


def test_there_are_many_and_no_input_twice() -> None:
    assert len({one.shown for one in BAD_INPUTS}) == len(BAD_INPUTS)
    assert len({one.sentence for one in BAD_INPUTS}) >= LEAST
    commands = [one for one in BAD_INPUTS if one.kind == "error"]
    assert 0 < len(commands) < len(BAD_INPUTS)
    assert all(("loki " in one.shown) == (one.kind == "error") for one in BAD_INPUTS)


def test_the_page_is_made_of_the_inputs() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(), "write it again: .venv/bin/python tests/bad_inputs.py > docs/errors.md"
    assert all(f"`{one.shown}`" in written and one.sentence in written for one in BAD_INPUTS)
    assert not any("|" in one.shown + one.sentence for one in BAD_INPUTS), "it would end a cell of the table"
