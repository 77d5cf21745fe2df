"""Pictures: which are written for which basis, that they are whole PNGs, and what they show."""

import sys
from dataclasses import replace

import pytest

from loki_attention.analysis import figures
from loki_attention.errors import ArgumentError, LokiError
from loki_attention.evaluation.answers import Score
from models import tiny_basis

pytest.importorskip("matplotlib", reason="pictures need matplotlib (extra 'plots')")

BY_MOMENTS = ["rank_by_layer", "rank_heat_map", "spectra"]
BY_FIGURES = ["kept_mass", "expected_loss"]


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    """Fewer dots are drawn faster; nothing here looks at them."""
    monkeypatch.setattr(figures, "_DOTS_PER_INCH", 40)


def loss(kl):
    return {"kl": kl, "agreement": 0.9, "perplexity": 21.0, "dense_perplexity": 20.0, "read_fraction": 0.1 + kl}


def measured_basis(**changes):
    record = {
        "figures": {
            "mass": {str(i): {"balanced": [0.7, 0.8], "exact-topk": [0.8, 0.9]} for i in range(3)},
            "budgets": {
                "1/8": {"loki": loss(0.001), "exact-topk": loss(0.01)},
                "1/16": {"loki": loss(0.0), "exact-topk": loss(0.02)},
                "asked": {"loki": loss(0.002), "exact-topk": loss(0.03)},
            },
        }
    }
    return replace(tiny_basis(), record=record, **changes)


def drawn(basis):
    return dict(figures._figures_of(basis))


def test_every_picture_is_a_png_and_nothing_else_is_touched(tmp_path):
    import matplotlib

    settings = dict(matplotlib.rcParams)
    files = figures.write_figures(measured_basis(), tmp_path / "new" / "plots")
    assert [file.stem for file in files] == BY_MOMENTS + BY_FIGURES
    assert sorted(files) == sorted((tmp_path / "new" / "plots").iterdir())
    for file in files:
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert data.endswith(b"IEND\xaeB`\x82")
    assert dict(matplotlib.rcParams) == settings
    assert "matplotlib.pyplot" not in sys.modules


def test_only_what_has_numbers_is_drawn():
    assert list(drawn(tiny_basis())) == BY_MOMENTS
    assert list(drawn(measured_basis(moments=None))) == BY_FIGURES


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ArgumentError, match="nothing to draw"):
        figures.write_figures(replace(tiny_basis(), moments=None), tmp_path)
    assert not list(tmp_path.iterdir())


def test_pictures_have_their_panels_titles_and_labels():
    panels = {"rank_by_layer": 1, "rank_heat_map": 2, "spectra": 3, "kept_mass": 2, "expected_loss": 1}
    for name, figure in drawn(measured_basis()).items():
        axes = [one for one in figure.axes if one.get_label() != "<colorbar>"]
        assert len(axes) == panels[name], name
        assert all(one.get_title() and one.get_xlabel() for one in axes), name
        assert axes[0].get_ylabel(), name


def test_the_heat_map_names_every_head():
    basis = measured_basis()
    figure = drawn(basis)["rank_heat_map"]
    table = figures.rank_table(basis)
    for axes, ranks in zip(figure.axes[:2], ([h.pre for h in table.heads], [h.post for h in table.heads]), strict=True):
        assert [int(text.get_text()) for text in axes.texts] == ranks


def test_lines_carry_the_numbers():
    basis = measured_basis()
    (axes,) = drawn(basis)["expected_loss"].axes
    exact, ours = (list(line.get_ydata()) for line in axes.get_lines())
    assert exact == [0.03, 0.01, 0.02]
    assert ours == [0.002, 0.001, figures._SMALLEST_KL]
    assert axes.get_yscale() == "log"
    left, right = drawn(basis)["kept_mass"].axes
    assert list(left.get_lines()[1].get_ydata()) == pytest.approx([0.75] * 3)
    assert list(right.get_lines()[0].get_ydata()) == pytest.approx([0.75 / 0.85] * 3)


def test_the_answers_picture_counts_answers_and_bytes(tmp_path):
    scores = [
        Score(variant=name, right=right, asked=6, tokens_read=10.0, bytes_read=read, bytes_dense=100.0)
        for name, right, read in (("dense", 6, 100.0), ("loki", 5, 10.0), ("streaming", 0, 6.0))
    ]
    file = figures.write_answers_figure(scores, tmp_path)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["answers.png"]


def test_a_failed_picture_leaves_the_old_one(tmp_path, monkeypatch):
    basis = measured_basis(moments=None)
    (first, _) = figures.write_figures(basis, tmp_path)
    before = first.read_bytes()
    figure = drawn(basis)["kept_mass"]

    def fail(path, **settings):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        figures.write_figure(figure, first)
    assert first.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_without_matplotlib_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LokiError, match=r"pip install 'loki-attention\[plots\]'"):
        figures.write_figures(measured_basis(), tmp_path)
