"""The plot of the cosines: it shows the cosines of the rows."""

import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

import gradfilter as gf
from gradfilter import diagnostics

mpl.use("Agg")
ROWS = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def drawn(figure):
    """The matrix of the heat map, and the heights of the histogram."""
    heat, histogram = figure.axes[:2]
    return heat.images[0].get_array(), [bar.get_height() for bar in histogram.patches]


@pytest.mark.parametrize("form", ["stack", "dict", "gram"])
def test_the_picture_shows_the_cosines_of_all_rows(form):
    rows = {"a": ROWS[:, :2], "b": ROWS[:, 2:]}
    given = {"stack": gf.DenseStack(rows), "dict": rows, "gram": ROWS @ ROWS.T}[form]
    figure = diagnostics.plot_agreement(given)
    cosines = cosine_similarity(ROWS[:, None], ROWS[None], dim=-1)
    matrix, heights = drawn(figure)
    np.testing.assert_allclose(matrix, cosines, atol=1e-12)
    pairs = cosines[torch.triu_indices(6, 6, 1).unbind()]
    np.testing.assert_array_equal(heights, np.histogram(pairs, 40, (-1, 1))[0])
    mean = diagnostics.agreement(rows).item()
    assert figure.axes[1].get_title() == f"15 pairs, mean cosine {mean:.3f}"
    assert not figure.axes[1].lines


def test_the_threshold_is_drawn_at_its_cosine_and_counted():
    rows = {"w": torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]])}  # 0, 0.707, 0.707
    figure = diagnostics.plot_agreement(rows, threshold=0.3)
    (line,) = figure.axes[1].lines
    assert list(line.get_xdata()) == [0.7, 0.7]
    assert figure.axes[1].get_title().endswith("\n2 at most 0.3 apart (dashed line)")


def test_a_row_without_a_direction_has_no_cosine():
    rows = ROWS.clone()
    rows[1], rows[3, 0] = 0.0, torch.nan
    figure = diagnostics.plot_agreement({"w": rows})
    matrix, heights = drawn(figure)
    absent = np.ma.getmaskarray(matrix) | np.isnan(np.ma.getdata(matrix))
    usable = np.array([True, False, True, False, True, True])
    np.testing.assert_array_equal(absent, ~(usable[:, None] & usable))
    assert sum(heights) == 6
    assert figure.axes[1].get_title().startswith("6 pairs")
    assert diagnostics.plot_agreement({"w": ROWS * 0}).axes[1].get_title() == "0 pairs"


def test_the_picture_can_be_saved_and_is_unknown_to_pyplot(tmp_path):
    figure = diagnostics.plot_agreement({"w": ROWS}, threshold=0.97)
    figure.savefig(tmp_path / "agreement.png")
    assert (tmp_path / "agreement.png").stat().st_size > 5000
    from matplotlib import pyplot

    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("rows", "options", "error", "match"),
    [
        ({"w": ROWS}, {"threshold": 97}, ValueError, "0 <= threshold <= 2, found threshold=97"),
        (ROWS, {}, ValueError, r"expected the Gram \(M, M\) of the rows, found shape \(6, 5\)"),
        ({"w": ROWS[:1]}, {}, ValueError, "at least two rows, found 1"),
        ([1.0], {}, TypeError, "found list"),
    ],
)
def test_bad_input_is_refused(rows, options, error, match):
    with pytest.raises(error, match=match):
        diagnostics.plot_agreement(rows, **options)


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "gradfilter\[lab\]"'):
        diagnostics.plot_agreement({"w": ROWS})
