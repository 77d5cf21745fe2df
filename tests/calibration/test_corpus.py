import gzip
import itertools
import json
import random

import pytest
import torch

from loki_attention.calibration.corpus import windows_from_files, windows_from_texts
from loki_attention.errors import ArgumentError, CorpusError


class WordTokenizer:
    """One token a word: word "w17" is token 17. Counts the characters it is given."""

    def __init__(self):
        self.characters = 0

    def __call__(self, text, *, add_special_tokens, verbose):
        assert not add_special_tokens
        assert not verbose
        self.characters += len(text)
        return {"input_ids": [int("".join(filter(str.isdigit, word)) or 0) for word in text.split()]}


def words(count, start=0):
    """Words that are all different, so that a token tells where it came from."""
    return " ".join(f"w{i:05d}" for i in range(start, start + count))


def ids_of(windows):
    return [window[0].tolist() for window in windows]


def all_ids(windows):
    return sorted(itertools.chain(*ids_of(windows.fit), *ids_of(windows.held_out)))


def from_files(paths, *, length=64, fit_tokens=256, held_out_tokens=64, **options):
    return windows_from_files(
        paths,
        options.pop("tokenizer", WordTokenizer()),
        length=length,
        fit_tokens=fit_tokens,
        held_out_tokens=held_out_tokens,
        **options,
    )


def from_texts(texts, *, length=64, fit_tokens=256, held_out_tokens=64, **options):
    tokenizer = options.pop("tokenizer", WordTokenizer())
    return windows_from_texts(
        texts, tokenizer, length=length, fit_tokens=fit_tokens, held_out_tokens=held_out_tokens, **options
    )


@pytest.fixture
def folder(tmp_path):
    """Four files of 500 words each at different depths; words of file i are i * 10000 and on."""
    for i, name in enumerate(("a.txt", "b.md", "deep/c.txt", "deep/er/d.txt")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(words(500, i * 10000))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("no text of this")
    (tmp_path / "empty.txt").write_text("")
    return tmp_path


def test_windows_have_the_asked_length_and_number_and_do_not_overlap(folder):
    windows = from_files([folder], fit_tokens=400, held_out_tokens=100)
    assert [window.shape for window in windows.fit] == [(1, 64)] * 7
    assert [window.shape for window in windows.held_out] == [(1, 64)] * 2
    assert {window.dtype for window in windows.fit} == {torch.int64}
    assert (windows.fit_tokens, windows.held_out_tokens, windows.length) == (448, 128, 64)
    assert len(set(all_ids(windows))) == 9 * 64
    assert windows.notes == ()


def test_windows_are_spread_evenly_over_the_files(folder):
    windows = from_files(folder, fit_tokens=6 * 64, held_out_tokens=2 * 64)
    assert [source.tokens for source in windows.sources] == [128] * 4
    assert [source.name for source in windows.sources] == [
        f"{folder.name}/{name}" for name in ("a.txt", "b.md", "deep/c.txt", "deep/er/d.txt")
    ]
    held_out_files = {ids[0] // 10000 for ids in ids_of(windows.held_out)}
    assert len(held_out_files) == 2


def test_other_files_make_up_for_a_short_one(folder):
    (folder / "a.txt").write_text(words(70))
    windows = from_files(folder, fit_tokens=10 * 64, held_out_tokens=64)
    assert windows.sources[0].tokens == 64
    assert windows.fit_tokens == 640
    assert windows.notes == ()


def test_the_seed_decides(folder):
    first, again, other = (from_files(folder, seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint
    assert ids_of(first.fit) == ids_of(again.fit)
    assert first.fingerprint != other.fingerprint


def test_a_file_named_twice_counts_once(folder):
    windows = from_files([folder, folder / "a.txt", str(folder / "deep")], fit_tokens=10**6)
    assert len(set(all_ids(windows))) == len(all_ids(windows))


def test_files_that_are_not_needed_are_not_read(folder):
    (folder / "b.md").write_bytes(b"\xff\xfe not UTF-8")
    tokenizer = WordTokenizer()
    for seed in range(20):
        try:
            from_files(folder, fit_tokens=64, seed=seed, tokenizer=tokenizer)
        except CorpusError:
            continue
        break
    else:
        pytest.fail("every seed read every file")


def test_a_big_file_is_sampled_not_tokenised_whole(tmp_path):
    file = tmp_path / "big.txt"
    file.write_text(words(90000))
    tokenizer = WordTokenizer()
    windows = from_files(file, tokenizer=tokenizer, fit_tokens=512, held_out_tokens=128)
    assert tokenizer.characters < file.stat().st_size / 20
    assert len(set(all_ids(windows))) == 640
    tenths = {ids[0] // 9000 for ids in ids_of((*windows.fit, *windows.held_out))}
    assert tenths == set(range(10))
    for ids in ids_of(windows.fit):
        assert ids == list(range(ids[0], ids[0] + 64))


def test_a_big_and_a_small_file_give_enough_together(tmp_path):
    (tmp_path / "big.txt").write_text(words(16 * 64))
    (tmp_path / "small.txt").write_text(words(20, 50000))
    windows = from_files(tmp_path, fit_tokens=14 * 64, held_out_tokens=64)
    assert (windows.fit_tokens, windows.held_out_tokens, windows.notes) == (14 * 64, 64, ())


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_jsonl_records_and_gz(tmp_path, suffix):
    lines = "\n".join(json.dumps({"id": i, "body": words(50, 50 * i)}) for i in range(20)) + "\n\n"
    data = lines.encode()
    (tmp_path / f"records.jsonl{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    windows = from_files(tmp_path, field="body")
    assert set(all_ids(windows)) <= set(range(1000))
    assert windows.fit_tokens == 256


def test_a_remainder_counts_where_text_is_scarce(tmp_path):
    (tmp_path / "a.txt").write_text(words(3 * 128 + 70))
    (tmp_path / "b.txt").write_text(words(128 + 63, 10000))
    windows = from_files(tmp_path, length=128, fit_tokens=10000, held_out_tokens=1000)
    lengths = sorted(window.shape[1] for window in (*windows.fit, *windows.held_out))
    assert lengths == [70, 128, 128, 128, 128]
    assert len(windows.held_out) == 1
    assert "asked for 10000 tokens to fit on and 1000 held out; the text has 582" in windows.notes[0]
    assert "1 of 5 windows are shorter than 128 tokens (the longest has 128)" in windows.notes[1]


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (4, 1), (8, 2), (11, 2), (12, 3)])
def test_scarce_text_holds_out_a_quarter(count, held_out):
    windows = from_texts([words(64 * count)], fit_tokens=10**5, held_out_tokens=10**4)
    assert (len(windows.fit), len(windows.held_out)) == (count - held_out, held_out)


def test_scarce_text_holds_out_no_more_than_asked():
    windows = from_texts([words(64 * 20)], fit_tokens=64 * 20, held_out_tokens=128)
    assert len(windows.held_out) == 2
    assert windows.fit_tokens == 64 * 18


@pytest.mark.parametrize("texts", [[words(200)], [words(50, 100 * i) for i in range(4)]])
def test_text_for_less_than_two_windows_is_halved(tmp_path, texts):
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    for windows in (from_files(tmp_path, length=2048), from_texts(texts, length=2048)):
        assert [w.shape for w in (*windows.fit, *windows.held_out)] == [(1, 100)] * 2
        assert windows.length == 100
        assert len(set(all_ids(windows))) == 200
        assert sum(source.tokens for source in windows.sources) == 200


@pytest.mark.parametrize("count", [0, 1, 63, 64, 127])
def test_too_little_text_is_refused(tmp_path, count):
    file = tmp_path / "short.txt"
    file.write_text(words(count) + " ")
    for read in (lambda: from_files(file), lambda: from_texts([words(count)], length=256)):
        with pytest.raises(CorpusError, match=r"too little"):
            read()


def test_what_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "page.html").write_text("<p>")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(500))[:100])
    (tmp_path / "field.jsonl").write_text('{"text": "a"}\n\n{"body": "b"}\n')
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    for name, message in {
        "absent.txt": r"absent.txt is not there",
        "folder": r"folder .*folder has no text files",
        "page.html": r"page.html is not a text file .* \.jsonl",
        "empty.txt": r"empty.txt is empty",
        "latin.txt": r"latin.txt is not UTF-8 text \(byte 3\)",
        "cut.txt.gz": r"cut.txt.gz cannot be read",
        "field.jsonl": r"field.jsonl, line 3, has no text in field 'text' \(it has: 'body'\)",
        "number.jsonl": r"number.jsonl, line 1, has no text",
        "list.jsonl": r"list.jsonl, line 1, has no text in field 'text' \(it has: list\)",
        "broken.jsonl": r"broken.jsonl, line 2, is no JSON",
    }.items():
        with pytest.raises(CorpusError, match=message):
            from_files([tmp_path / name])
    with pytest.raises(ArgumentError, match="no paths"):
        from_files([])


def test_short_strings_are_packed_with_blank_lines():
    seen = []

    class Recording(WordTokenizer):
        def __call__(self, text, **options):
            seen.append(text)
            return super().__call__(text, **options)

    windows = from_texts([words(10, 10 * i) for i in range(100)], tokenizer=Recording())
    assert windows.fit_tokens == 256
    assert seen[0].startswith("w00000 ")
    assert "w00009\n\nw00010" in seen[0]


def test_an_endless_iterable_is_read_as_far_as_needed():
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield words(10, 10 * read)

    windows = from_texts(endless())
    assert (windows.fit_tokens, windows.held_out_tokens, windows.notes) == (256, 64, ())
    assert read < 100


def test_more_is_read_where_tokens_are_long():
    texts = (f"w{i:05d}" + "x" * 40 for i in itertools.count())
    windows = from_texts(texts)
    assert (windows.fit_tokens, windows.notes) == (256, ())


@pytest.mark.parametrize("texts", ["one string", [b"bytes"], ["text", 5], [["nested"]]])
def test_what_are_no_texts_is_refused(texts):
    with pytest.raises(ArgumentError, match=r"string"):
        from_texts(texts)


def test_no_texts_are_refused():
    with pytest.raises(CorpusError, match="empty"):
        from_texts(iter([]))


@pytest.mark.parametrize("wrong", [{"length": 1}, {"fit_tokens": 0}, {"held_out_tokens": -5}])
def test_counts_are_checked(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        from_texts(["text"], **wrong)


def test_texts_longer_than_the_model_takes_are_tokenised_in_silence(reference_tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(reference_tokenizer, "model_max_length", 128)
    windows = from_texts(["The river runs past the castle. " * 200], tokenizer=reference_tokenizer)
    assert windows.fit_tokens == 256
    assert not caplog.records
