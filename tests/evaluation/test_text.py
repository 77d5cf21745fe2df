import pytest
import torch

from loki_attention.data import haystack_text
from loki_attention.errors import ArgumentError
from loki_attention.evaluation.text import detokenize_wikitext, text_windows, tokenize


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("a well @-@ known song", "a well-known song"),
        ("1 @,@ 200 @.@ 5 m", "1,200.5 m"),
        ("first , second ; third : fourth . Fifth ! Sixth ?", "first, second; third: fourth. Fifth! Sixth?"),
        ("by 5 % ( or [ so ] )", "by 5% (or [so])"),
        ("Boulter 's films do n't say they 've", "Boulter's films don't say they've"),
        ("the <unk> of <unk> , that is", "the of, that is"),
        ('as " Craig " in', 'as " Craig " in'),
        (" = Title = \n \n Text . \n", " = Title = \n \n Text. \n"),
        ("", ""),
    ],
)
def test_wikitext_as_plain_text(raw, plain):
    assert detokenize_wikitext(raw) == plain
    assert detokenize_wikitext(plain) == plain


def test_windows_are_consecutive(reference_tokenizer):
    text = haystack_text().read_text(encoding="utf-8")[:5000]
    ids = tokenize(reference_tokenizer, text)
    windows = text_windows(reference_tokenizer, text, length=100)
    assert len(windows) == len(ids) // 100
    assert all(window.shape == (1, 100) and window.dtype == torch.int64 for window in windows)
    assert torch.cat(windows, dim=1)[0].tolist() == ids[: 100 * len(windows)]
    assert torch.equal(text_windows(reference_tokenizer, text, length=100, count=1)[0], windows[0])


def test_windows_may_overlap(reference_tokenizer):
    text = haystack_text().read_text(encoding="utf-8")[:5000]
    ids = tokenize(reference_tokenizer, text)
    windows = text_windows(reference_tokenizer, text, length=100, stride=40)
    assert len(windows) == (len(ids) - 100) // 40 + 1
    assert all(window[0].tolist() == ids[40 * i : 40 * i + 100] for i, window in enumerate(windows))


def test_too_few_windows_are_refused(reference_tokenizer):
    with pytest.raises(ArgumentError, match=r"0 windows of 100; 1 asked for"):
        text_windows(reference_tokenizer, "Too short.", length=100)
    with pytest.raises(ArgumentError, match=r"windows of 1; 1000 asked for"):
        text_windows(reference_tokenizer, "Too short.", length=1, count=1000)
    for wrong in ({"length": 0}, {"length": 10, "count": 0}, {"length": 10, "stride": 0}):
        with pytest.raises(ArgumentError, match="at least 1"):
            text_windows(reference_tokenizer, "Some text.", **wrong)
