"""Curves by layer and spectra: what they draw."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.collections import FillBetweenPolyCollection
from plots.drawn import assert_band
from plots.synthetic import TOKENS, Subject, comparison

from vitprobe import plots


@pytest.mark.parametrize("measure", TOKENS)
def test_token_curves_have_the_interval_as_their_band(measure):
    result = comparison({"A": Subject(3), "B": Subject(2)}, measures=TOKENS)
    ax = plots.token_curves(result, measure)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), result.tokens(measure, "B").values)
    assert_band(ax, result.by_layer(measure, "A"))
    assert ax.get_xlabel() == "Layer"


def test_spectra_run_to_the_highest_frequency_with_their_bands():
    result = comparison({"A": Subject(3)}, measures=("fourier_amplitude",))
    ax = plots.fourier_curves(result, "A")
    spectra = result.fourier_curves("A")
    assert len(ax.lines) == 4
    for line, value in zip(ax.lines, spectra["value"].values, strict=True):
        np.testing.assert_allclose(line.get_ydata(), value)
    assert ax.get_xlim() == (0, 1)
    assert "π rad per patch" in ax.get_xlabel()
    band = next(c for c in ax.collections if isinstance(c, FillBetweenPolyCollection))
    edges = band.get_paths()[0].vertices
    ends = edges[edges[:, 0] == 1, 1]
    expected = [spectra[key].values[0, -1] for key in ("low", "high")]
    np.testing.assert_allclose([ends.min(), ends.max()], expected)


def test_first_direction_share_of_every_model(unlike):
    ax = plots.first_direction_share(unlike)
    assert [len(line.get_ydata()) for line in ax.lines] == [5, 3]
    assert ax.get_ylim() == (0, 1)
