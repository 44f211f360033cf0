"""Figures of scores: every score once, where it belongs, in the colours of its comparison."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from plots.synthetic import Subject, comparison

from vitprobe import plots
from vitprobe.errors import ResultError
from vitprobe.plots.style import COLORS
from vitprobe.scores import Score, Scores


@pytest.fixture(autouse=True)
def _closed_figures() -> Iterator[None]:
    yield
    plt.close("all")


def score(model: str, value: float, protocol: str = "knn", **more: object) -> Score:
    row = {"low": value - 0.02, "high": value + 0.02, **more}
    return Score(model, f"{model}.pth", protocol, "digits", 360, "top1", value, **row)


NAMES = ["A 1", "A 2", "B", "B (untrained)"]
ROWS = [score(name, 0.7 + 0.05 * i) for i, name in enumerate(NAMES)]
ROWS += [score(name, 0.8, "linear", labels=0.01) for name in NAMES[2:]]
ROWS += [
    score(name, 0.5 + 0.1 * layer, "linear", layer=layer) for name in NAMES for layer in range(3)
]


@pytest.fixture(scope="module")
def result():
    made = comparison(
        {name: Subject(depth=2) for name in NAMES},
        measures=("cka",),
        groups={"A": NAMES[:2]},
        references={"B": "B (untrained)"},
    )
    return made.with_scores(Scores(ROWS))


def points(ax):
    return [line for line in ax.lines if line.get_marker() not in ("", "None")]


def intervals(ax):
    return [line.get_xdata().tolist() for line in ax.lines if line.get_gid() == "interval"]


def test_a_row_a_protocol_and_seeds_are_one_point(result):
    ax = plots.accuracy(result)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["k-NN", "Linear, 1 % of labels"]
    found = [(float(line.get_xdata()[0]), line.get_color()) for line in points(ax)]
    assert found == [
        (pytest.approx(0.725), COLORS[0]),
        (pytest.approx(0.8), COLORS[1]),
        (pytest.approx(0.85), COLORS[1]),
        (0.8, COLORS[1]),
        (0.8, COLORS[1]),
    ]
    # Two seeds, 0.05 apart: Student's t with one degree of freedom.
    assert intervals(ax)[0] == pytest.approx([0.725 - 0.3177, 0.725 + 0.3177], abs=1e-3)
    assert intervals(ax)[1] == pytest.approx([0.78, 0.82])
    assert ax.get_xlabel() == "Accuracy (%)"
    filled = [line.get_markerfacecolor() != "white" for line in points(ax)]
    assert filled == [True, True, False, True, False]


def test_scores_alone_are_drawn_by_model_in_the_order_asked_for():
    ax = plots.accuracy(Scores(ROWS), ["linear", "knn"])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["Linear, 1 % of labels", "k-NN"]
    assert len(points(ax)) == 6
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["B", "B (untrained)", "A 1", "A 2"]


def test_settings_that_one_model_was_given_several_of_have_rows():
    rows = [score(m, 0.7, settings={"k": k, "t": m}) for m in "ab" for k in (1, 20)]
    rows.append(Score("a", "a", "knn", "flowers", 10, "top1", 0.5, settings={"k": 20}))
    ax = plots.accuracy(Scores(rows))
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "k-NN, digits, k = 1", "k-NN, digits, k = 20", "k-NN, flowers, k = 20",
    ]  # fmt: skip


def test_depth_has_a_line_a_model_with_its_band(result):
    ax = plots.probes_by_depth(result, "linear")
    lines = ax.lines
    assert [line.get_label() for line in lines] == NAMES
    assert lines[0].get_xdata().tolist() == [0, 1, 2]
    assert np.allclose(lines[0].get_ydata(), [0.5, 0.6, 0.7])
    assert lines[0].get_color() == lines[1].get_color() == COLORS[0]
    assert len(ax.collections) == 4
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Layer", "Linear: accuracy (%)")


def test_labels_of_the_view_along_depth_lie_beside_their_panels():
    """Those of long data sets once reached into the panel above."""
    rows = [
        Score("B", "B.pth", "linear", "fashion-mnist", 360, "top1", 0.8, layer=layer)
        for layer in range(3)
    ]
    scored = comparison({"A": Subject(2), "B": Subject(2)}).with_scores(Scores(rows))
    figure = plots.depth_view(scored)
    figure.draw_without_rendering()
    boxes = [ax.yaxis.label.get_window_extent() for ax in figure.axes]
    assert figure.axes[-1].get_ylabel() == "Linear on\nfashion-mnist, top-1\n(share)"
    assert all(below.y1 <= above.y0 for above, below in pairwise(boxes))


def test_kept_blocks_are_a_depth_too():
    rows = [score("a", 0.5 + 0.1 * k, "layers", kept=k) for k in (2, 0, 1)]
    ax = plots.probes_by_depth(Scores(rows), by="kept")
    assert ax.lines[0].get_xdata().tolist() == [0, 1, 2]
    assert ax.get_xlabel() == "Pre-trained blocks kept"
    with pytest.raises(ResultError, match="no scores of whole models"):
        plots.accuracy(Scores(rows))


def test_axes_of_the_callers_own_are_drawn_into(result):
    with mpl.rc_context({"font.size": 11}):
        own = plt.subplots()[1]
        assert plots.accuracy(result, ax=own) is own
        assert plots.probes_by_depth(result, ax=plt.subplots()[1]).xaxis.label.get_size() == 11


def test_what_is_not_there_is_refused(result):
    with pytest.raises(ResultError, match=r"no scores by 'liner'; .* Did you mean 'linear'"):
        plots.accuracy(result, ["liner"])
    with pytest.raises(ResultError, match="no scores by knn for each layer"):
        plots.probes_by_depth(result, "knn")
    with pytest.raises(ResultError, match="unknown depth 'depth'"):
        plots.probes_by_depth(result, by="depth")
    with pytest.raises(ResultError, match="no scores of whole models"):
        plots.accuracy(Scores([]))
