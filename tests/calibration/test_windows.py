import pytest
import torch

from loki_attention.calibration.corpus import windows_from_ids
from loki_attention.calibration.windows import Request
from loki_attention.errors import ArgumentError, LokiError


def test_fingerprint_tells_tokens_lengths_and_the_split_apart():
    def fingerprint(*rows, length=64):
        return windows_from_ids(rows, length=length, vocab_size=1000).fingerprint

    row = list(range(64))
    same = fingerprint(row, row, row)
    assert same == fingerprint(torch.tensor([row, row]), torch.tensor(row))
    different = {
        same,
        fingerprint(row, row, [*row[:-1], 900]),
        fingerprint(row, [*row[:-1], 900], row),
        fingerprint(row, row, row, row),
        fingerprint(row * 3, length=96),
    }
    assert len(different) == 5


def test_id_rows_are_windows_as_given():
    rows = torch.arange(320).view(5, 64)
    windows = windows_from_ids([rows[:2], rows[2].tolist(), rows[3:].int()], length=64, vocab_size=320)
    assert torch.equal(torch.cat(windows.fit), rows[:4])
    assert torch.equal(torch.cat(windows.held_out), rows[4:])
    assert windows.sources == (("token ids", 320),)
    rows.zero_()
    assert int(windows.fit[0][0, 1]) == 1


def test_long_rows_are_split_and_single_tokens_left_out():
    windows = windows_from_ids([list(range(129)), list(range(100))], length=64, vocab_size=129)
    assert [window.shape[1] for window in (*windows.fit, *windows.held_out)] == [64, 64, 64, 36]
    assert windows.notes == ("left out 1 windows of a single token",)


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (5, 1), (8, 2), (9, 2)])
def test_the_last_quarter_of_id_rows_is_held_out(count, held_out):
    windows = windows_from_ids(torch.zeros(count, 40, dtype=torch.long), length=64, vocab_size=10)
    assert (len(windows.fit), len(windows.held_out)) == (count - held_out, held_out)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([[1] * 64, [2, 3, 100]], r"row 1 of token_ids has id 100, outside the vocabulary of 100"),
        ([torch.full((2, 64), -100)], r"row 0 of token_ids has id -100"),
        ([torch.ones(2, 64)], r"item 0 of token_ids is no row of integers"),
        ([[1] * 64, [1.5, 2.0]], r"item 1 of token_ids is no row of integers"),
        ([torch.ones(2, 64, dtype=torch.bool)], r"no row of integers"),
        ([1, 2, 3], r"item 0 of token_ids is no row of integers but int"),
        (["text"], r"no row of integers but str"),
        ("text", r"iterable of rows"),
        ([[1] * 64, []], r"row 1 of token_ids is empty"),
        ([torch.zeros(2, 2, 64, dtype=torch.long)], r"no row of integers"),
        ([], r"token_ids is empty"),
        ([[1] * 64], r"64 tokens in 1 window are too little"),
        ([[1] * 31, [1] * 32], r"63 tokens in 2 windows are too little"),
    ],
)
def test_ids_that_cannot_be_used_are_refused(token_ids, message):
    with pytest.raises(LokiError, match=message):
        windows_from_ids(token_ids, length=64, vocab_size=100)


def test_a_request_rounds_up_to_whole_windows():
    request = Request(length=64, fit_tokens=65, held_out_tokens=1)
    assert (request.fit_windows, request.held_out_windows, request.windows) == (2, 1, 3)
    with pytest.raises(ArgumentError, match="length must be a whole number of tokens, at least 2; got True"):
        Request(length=True, fit_tokens=65, held_out_tokens=1)
