"""Training curves: a panel a metric and method, a line a run, the same colour everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from vitprobe import plots
from vitprobe.plots.style import COLORS

Row = tuple[str, str, str, list[float]]


@pytest.fixture(autouse=True)
def _closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def table(*series: Row) -> pd.DataFrame:
    """Runs from (run, method, metric, value of every epoch from 1)."""
    rows = [
        (run, method, float(epoch), 10 * epoch, metric, value)
        for run, method, metric, values in series
        for epoch, value in enumerate(values, start=1)
    ]
    return pd.DataFrame(rows, columns=["run", "method", "epoch", "step", "metric", "value"])


MIXED = table(
    ("a", "mae", "loss", [0.9, 0.5]),
    ("b", "mae", "loss", [0.8, 0.4, 0.3]),
    ("c", "mae, distilled", "loss", [1.5]),
    ("d", "dino", "loss", [8.0, 5.0]),
    ("a", "mae", "knn_accuracy", [0.3, 0.6]),
    ("d", "dino", "knn_accuracy", [0.4, 0.7]),
    ("d", "dino", "images_per_s", [900.0, 1100.0]),
)


def panels(runs: pd.DataFrame) -> dict[str, Any]:
    figure = plots.training_curves(runs)
    return {ax.get_title(loc="left"): ax for ax in figure.axes if ax.axison}


def test_losses_of_different_methods_have_panels_of_their_own() -> None:
    found = panels(MIXED)
    assert list(found) == [
        "Loss, DINO", "Loss, MAE", "Loss, MAE, distilled", "k-NN accuracy", "Speed",
    ]  # fmt: skip
    assert [len(ax.lines) for ax in found.values()] == [1, 2, 1, 2, 1]


def test_lines_are_the_values_over_the_epochs_and_axes_say_their_units() -> None:
    found = panels(MIXED)
    a, b = found["Loss, MAE"].lines
    np.testing.assert_array_equal(a.get_xydata(), [[1, 0.9], [2, 0.5]])
    np.testing.assert_array_equal(b.get_xydata(), [[1, 0.8], [2, 0.4], [3, 0.3]])
    assert {ax.get_xlabel() for ax in found.values()} == {"Epoch"}
    units = [ax.get_ylabel() for ax in found.values()]
    # What a distilled method minimises is a sum of different units.
    assert units == ["Nats", "Mean squared error", "", "Share of images", "Images/s"]
    low, high = found["Speed"].get_ylim()
    assert low == 0
    assert high > 1100


def test_terms_keep_their_names() -> None:
    runs = table(
        ("a", "dino", "kl", [1.0]), ("b", "supervised", "accuracy", [0.5]), ("a", "dino", "lr", [0])
    )
    found = panels(runs)
    assert list(found) == ["kl, DINO", "accuracy, supervised", "Learning rate"]
    assert [ax.get_ylabel() for ax in found.values()] == ["Nats", "Share of images", ""]


def test_a_run_has_one_colour_and_one_entry_in_the_one_legend() -> None:
    figure = plots.training_curves(MIXED)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c", "d"]
    assert not any(ax.get_legend() for ax in figure.axes)
    found = {ax.get_title(loc="left"): ax for ax in figure.axes}
    assert found["Loss, DINO"].lines[0].get_color() == COLORS[3]
    assert found["k-NN accuracy"].lines[1].get_color() == COLORS[3]


def test_beyond_the_colours_runs_differ_in_their_dashes() -> None:
    runs = table(*((f"run{i:02}", "mae", "loss", [1.0, 0.5]) for i in range(24)))
    (ax,) = plots.training_curves(runs).axes
    assert len({(line.get_color(), str(line._dash_pattern)) for line in ax.lines}) == 24


def test_single_values_are_seen_and_long_curves_are_no_strings_of_beads() -> None:
    runs = table(("a", "mae", "loss", [1.0]), ("b", "mae", "loss", [1.0] * 100))
    (ax,) = plots.training_curves(runs).axes
    assert [line.get_marker() for line in ax.lines] == ["o", "None"]


def test_the_text_fits_and_global_style_stays(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    names = [f"a/rather/long/path/of/a/run/number/{i}" for i in range(9)]
    figure = plots.training_curves(
        table(*((name, "moco_v3", "loss", [2.0, 1.0]) for name in names))
    )
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= max(ax.get_tightbbox().y1 for ax in figure.axes) - 1
    paths = plots.save(figure, tmp_path / "curves")
    assert all(path.stat().st_size for path in paths)
    assert dict(mpl.rcParams) == before
