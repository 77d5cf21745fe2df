import pytest

from loki_attention.errors import ArgumentError
from loki_attention.ledger import Ledger


def test_a_killed_run_finds_what_it_had(tmp_path):
    path = tmp_path / "new" / "r.json.partial"
    ledger = Ledger(path)
    assert not path.parent.exists()
    ledger.add("one", 0, [1, 2.5])
    ledger.add("two", 7, {"right": 1})
    with path.open("a") as stream:
        stream.write('["one", 1, [3')
    again = Ledger(path)
    assert (again.get("one", 0), again.get("two", 7), again.get("one", 1)) == ([1, 2.5], {"right": 1}, None)
    again.add("one", 1, [3])
    assert Ledger(path).get("one", 1) == [3]
    again.discard()
    assert not path.exists()


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = Ledger(None)
    ledger.add("one", 0, 1)
    ledger.discard()
    assert ledger.get("one", 0) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["notes\n", '{"a": 1}\n', "[1, 2]\n"])
def test_other_files_are_left_alone(tmp_path, content):
    path = tmp_path / "notes.partial"
    path.write_text(content)
    with pytest.raises(ArgumentError, match="no record of a measurement"):
        Ledger(path)
    assert path.read_text() == content
