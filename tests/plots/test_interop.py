"""Figures and tables in the hands of others: axes of one's own, seaborn, a paper's style."""

from __future__ import annotations

import inspect

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import seaborn as sns
from matplotlib.figure import Figure
from plots.synthetic import ALL, TOKENS, Subject, comparison

from vitprobe import plots
from vitprobe.scores import Score, Scores

NAMES = ("A", "B")
ARGUMENTS = {
    "accuracy": (),
    "attention_distance": ("A",),
    "attention_entropy": ("A",),
    "attention_overlay": ("attention_distance",),
    "cka_heatmap": NAMES,
    "first_direction_share": (),
    "fourier_curves": ("A",),
    "group_spread": ("attention_distance",),
    "interval_width": ("cka", *NAMES),
    "probes_by_depth": (),
    "similarity_heatmap": ("cka", *NAMES),
    "sink_mass": ("A",),
    "token_curves": ("token_cosine",),
}
# Figures of several panels, each of which a function above draws alone.
WHOLE = {
    "accuracy_panels": (),
    "attention_maps": ("A",),
    "attention_panels": ("attention_distance",),
    "cka_grid": (),
    "depth_view": (),
    "differences": (["attention_distance"],),
    "head_maps": ("A",),
    "model_map": (),
    "similarity_grid": ("cka",),
}
OTHERS = {"paper_style", "save", "training_curves"}


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def result():
    subjects = {"A": Subject(2), "B": Subject(3), "C": Subject(2)}
    made = comparison(
        subjects, measures=(*ALL, *TOKENS), groups={"X": ["A"], "Y": ["B"]}, images=12, samples=2
    )
    rows = [Score(name, "", "knn", "digits", 360, "top1", 0.7, 0.6, 0.8) for name in NAMES]
    rows += [
        Score(name, "", "linear", "digits", 360, "top1", 0.5 + 0.1 * layer, layer=layer)
        for name in NAMES
        for layer in range(3)
    ]
    return made.with_scores(Scores(rows))


def test_every_figure_is_in_one_of_these_lists():
    assert {*ARGUMENTS, *WHOLE, *OTHERS} == set(plots.__all__)
    for name in (*ARGUMENTS, *WHOLE):
        takes = "ax" in inspect.signature(getattr(plots, name)).parameters
        assert takes == (name in ARGUMENTS), name


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_figure_draws_into_the_axes_it_is_given_and_returns_them(result, name):
    figure, (left, right) = plt.subplots(1, 2)
    assert getattr(plots, name)(result, *ARGUMENTS[name], ax=right) is right
    assert right.has_data()
    assert not left.has_data()
    assert plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("name", WHOLE)
def test_a_figure_of_several_panels_is_returned_whole(result, name):
    assert isinstance(getattr(plots, name)(result, *WHOLE[name]), Figure)


def test_paper_style_holds_inside_its_block_only():
    before = dict(mpl.rcParams)
    with plots.paper_style({"font.size": 9, "font.family": "serif"}):
        assert (mpl.rcParams["font.size"], mpl.rcParams["pdf.fonttype"]) == (9, 42)
        assert mpl.rcParams["font.family"] == ["serif"]
        assert mpl.rcParams["figure.figsize"] == [3.25, 2.2]
    assert dict(mpl.rcParams) == before


def test_tidy_tables_go_into_seaborn_as_they_are(result):
    """A heatmap by pivot; lines by model with seaborn's own column names."""
    table = result.to_dataframe("cka")
    pair = table[(table["model_a"] == "A") & (table["model_b"] == "B")]
    ax = sns.heatmap(pair.pivot(index="layer_a", columns="layer_b", values="cka"))
    drawn = ax.collections[0].get_array()
    np.testing.assert_allclose(drawn, result.cka("A", "B").values)

    heads = result.to_dataframe("attention_distance")
    grid = sns.relplot(
        heads, x="layer", y="attention_distance", hue="head", col="model", kind="line"
    )
    assert [ax.get_title() for ax in grid.axes.flat] == [
        f"model = {name}" for name in result.models
    ]
    (x, y) = grid.axes.flat[0].lines[0].get_data()
    np.testing.assert_allclose(y, result.attention_distance("A").sel(head=0).values, rtol=1e-6)
    assert list(x) == [0, 1]


@pytest.mark.parametrize("measure", [*ALL, *TOKENS, "first_direction_share"])
def test_tables_are_tidy(result, measure):
    """One number a row: nothing repeats, columns hold one kind, the index says nothing."""
    table = result.to_dataframe(measure)
    keys = [name for name in table if name.startswith(("model", "layer", "head"))]
    assert not table.duplicated(keys).any()
    assert list(table.index) == list(range(len(table)))
    assert table[measure].dtype.kind == "f"
    assert {"low", "high", "standard_error"} <= set(table)
    kinds = {name: table[name].dtype.kind for name in keys if not name.startswith("model")}
    assert set(kinds.values()) == {"i"}
