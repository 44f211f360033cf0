"""Tables of a Comparison: one measure in full, differences between models, and groups of seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from vitprobe.errors import ResultError
from vitprobe.measures.registry import MEASURES
from vitprobe.statistics import holm, quantile, t_interval, welch

if TYPE_CHECKING:
    from vitprobe.results import Comparison

UNDECIDED = "cannot be told apart"
ONE_SEED = "one seed: no interval"


def tidy(result: Comparison, measure: str) -> pd.DataFrame:
    """Every number of one measure, one a row, with its interval at 95 %.

    Similarity: model_a, layer_a, model_b, layer_b, the value, standard_error, low, high, floor;
    every pair of layers once, or both ways round where the measure is not symmetric.
    Attention, of models that have some: model, layer, head, the mean over images, standard_error,
    low, high, the relative value where there is one, images, undefined_rows. Tokens: model, layer,
    the value, standard_error, low, high, and images where there is a number of each.

    Raises:
        ResultError: a measure that is not in this result.
    """
    group = result.group_of(measure)
    if group == "similarity":
        return _similarity(result, measure)
    names = result.models
    if group == "attention":
        names = tuple(name for name in names if result.attention_layers(name))
    parts = [_of_model(result, measure, name) for name in names]
    return pd.concat(parts, ignore_index=True)


def _similarity(result: Comparison, measure: str) -> pd.DataFrame:
    dataset = result.tree["similarity"].to_dataset()
    parts = []
    for i, a in enumerate(result.models):
        for b in result.models[i if dataset[measure].attrs["symmetric"] else 0 :]:
            low, high = result.interval(measure, a, b)
            columns = {
                measure: result.similarity(measure, a, b),
                "standard_error": result.standard_error(measure, a, b),
                "low": low,
                "high": high,
                "floor": result.floor(measure, a, b),
            }
            part = _long(columns)
            if a == b and dataset[measure].attrs["symmetric"]:
                part = part[part["layer_a"] <= part["layer_b"]]
            part.insert(0, "model_a", a)
            part.insert(2, "model_b", b)
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _of_model(result: Comparison, measure: str, name: str) -> pd.DataFrame:
    low, high = result.interval(measure, name)
    columns = {"low": low, "high": high}
    if result.is_per_image(measure):
        images = result.per_image(measure, name).astype(float)
        count = images.notnull().sum("image")
        spread = images.std("image", ddof=1)
        columns = {
            measure: images.mean("image"),
            "standard_error": spread / np.sqrt(count.where(count > 0)),
            **columns,
        }
        if f"{measure}_uniform" in result.tree[result.group_of(measure)]:
            columns["relative"] = result.attention(measure, name, relative=True)
        columns["images"] = count
        if result.group_of(measure) == "attention":
            columns["undefined_rows"] = result.undefined_rows(measure, name)
    else:
        error = result.standard_error(measure, name)
        columns = {measure: result.tokens(measure, name), "standard_error": error, **columns}
    part = _long(columns)
    if "undefined_rows" in part:
        # Layers may differ in heads: a head that is not there has no count, not even 0.
        part = part.dropna(subset="undefined_rows").astype({"undefined_rows": int})
    part.insert(0, "model", name)
    return part


def differences(result: Comparison, measures: Sequence[str] | None, level: float) -> pd.DataFrame:
    """Paired differences of models over the same images, one row a measure and pair.

    The pairs are all of trained models, and each model with its own untrained twin. Heads and
    layers are averaged within each image first. Units are relative to uniform attention where the
    uniform values of the two differ. A measure that two models have on no common image makes no
    row: such a pair is no finding that the two cannot be told apart. Nor does one whose values do
    not compare because the models differ in grid or width (`Info.alike`).

    Args:
        result: a Comparison.
        measures: names; all that are kept for every image, unless given.
        level: of the pointwise intervals; the verdicts hold together at this level (Holm).

    Returns:
        measure, model_a, model_b, difference (a - b), low, high, units, images, p, p_holm, verdict:
        "higher", "lower" or "cannot be told apart".

    Raises:
        ResultError: an unknown measure, or one that is no number of an image.
    """
    rows = []
    for measure in _chosen(result, measures, paired=True):
        measured = result.measured(measure)
        for a, b in pairs(result):
            if not {a, b} <= set(measured) or not _comparable(result, measure, (a, b)):
                continue
            found = result.difference(measure, a, b, level=level).attrs
            if found["images"] == 0:
                continue
            rows.append(
                {
                    "measure": measure,
                    "model_a": a,
                    "model_b": b,
                    "difference": found["overall_value"],
                    "low": found["overall_low"],
                    "high": found["overall_high"],
                    "units": found["units"],
                    "images": found["images"],
                    "p": found["overall_p"],
                }
            )
    columns = ["measure", "model_a", "model_b", "difference", "low", "high", "units", "images", "p"]
    return _judged(pd.DataFrame(rows, columns=columns), level)


def pairs(result: Comparison) -> list[tuple[str, str]]:
    """All pairs of the models that were asked for, and each of them with its untrained twin."""
    twins = set(result.references.values())
    given = [name for name in result.models if name not in twins]
    return [*combinations(given, 2), *result.references.items()]


def group_means(result: Comparison, measures: Sequence[str] | None, level: float) -> pd.DataFrame:
    """Means of groups, with seeds as the unit: one row a measure and group.

    A seed's number is the mean over images, heads and layers; seeds where it is undefined do not
    count. The interval is Student's t with seeds - 1 degrees of freedom; one seed alone has none
    (nan).

    Args:
        result: a Comparison.
        measures: names of attention and token measures; all of them unless given.
        level: of the intervals.

    Returns:
        group, measure, units, seeds, mean, low, high, between_seeds (standard deviation).

    Raises:
        ResultError: an unknown measure, or one of two layers.
    """
    rows = []
    for measure in _chosen(result, measures, companion=True):
        units, seeds = _seeds(result, measure)
        least, most = _ends(result, measure, units)
        for group, values in seeds.items():
            mean, low, high = t_interval(values, level)[:3]
            low, high = np.maximum(low, least), np.minimum(high, most)
            between = values.std(ddof=1) if len(values) > 1 else np.nan
            rows.append((group, measure, units, len(values), mean, low, high, between))
    columns = ["group", "measure", "units", "seeds", "mean", "low", "high", "between_seeds"]
    return pd.DataFrame(rows, columns=columns)


def group_differences(
    result: Comparison, measures: Sequence[str] | None, level: float
) -> pd.DataFrame:
    """Differences between groups, with seeds as the unit (Welch): one row a measure and pair.

    Seeds where a measure is undefined do not count; a group without any makes no row, and neither
    do groups whose models differ in what the measure's values depend on (`Info.alike`).

    Args:
        result: a Comparison.
        measures: names of attention and token measures; all of them unless given.
        level: of the pointwise intervals; the verdicts hold together at this level (Holm).

    Returns:
        measure, group_a, group_b, difference (a - b), low, high, units, between_seeds (standard
        deviation between seeds, pooled over the two groups), df, p, p_holm, verdict: "higher",
        "lower", "cannot be told apart", or "one seed: no interval".

    Raises:
        ResultError: an unknown measure, or one of two layers.
    """
    rows = []
    for measure in _chosen(result, measures):
        units, seeds = _seeds(result, measure)
        for (a, of_a), (b, of_b) in combinations(seeds.items(), 2):
            members = (*result.groups[a], *result.groups[b])
            if not (len(of_a) and len(of_b) and _comparable(result, measure, members)):
                continue
            difference, low, high, p, df, fewest = (x.item() for x in welch(of_a, of_b, level))
            spread = np.nan
            if fewest > 1:
                squares = sum(len(v) * v.var() for v in (of_a, of_b))
                spread = np.sqrt(squares / (len(of_a) + len(of_b) - 2))
            rows.append((measure, a, b, difference, low, high, units, spread, df, p, fewest > 1))
    columns = [
        "measure",
        "group_a",
        "group_b",
        "difference",
        "low",
        "high",
        "units",
        "between_seeds",
        "df",
        "p",
        "judged",
    ]
    table = _judged(pd.DataFrame(rows, columns=columns), level)
    table.loc[~table["judged"].astype(bool), "verdict"] = ONE_SEED
    return table.drop(columns="judged")


def group_similarity(result: Comparison, measure: str, level: float) -> pd.DataFrame:
    """Similarity within and between groups: one row a pair of groups, a group with itself first.

    The similarity of two models is the mean over their layer pairs of equal depth share (the
    diagonal where they are equally deep), in both directions where the measure is not symmetric.
    Within a group the mean is over pairs of different seeds, between groups over all pairs.

    Intervals take seeds as the unit. Between groups: each seed's mean over the other group's seeds,
    the variances of the two sides added, Student's t with one degree of freedom less than the
    smaller group has seeds. Within a group: the jackknife that leaves one seed out, Student's t
    with seeds - 1 degrees; nan where there are fewer than 3 seeds.

    Args:
        result: a Comparison.
        measure: name of a similarity measure.
        level: of the intervals.

    Returns:
        group_a, group_b, mean, low, high, pairs (of models).

    Raises:
        ResultError: no similarity measure of that name.
    """
    rows: list[tuple[Any, ...]] = []
    groups = list(_groups(result).items())
    least, most = _ends(result, measure)
    for i, (a, of_a) in enumerate(groups):
        for b, of_b in groups[i:]:
            table = np.array([[_alike(result, measure, x, y) for y in of_b] for x in of_a])
            mean, error, degrees, count = _within(table) if a == b else _between(table)
            margin = quantile(level, degrees) * error
            low, high = np.maximum(mean - margin, least), np.minimum(mean + margin, most)
            rows.append((a, b, mean, float(low), float(high), count))
    return pd.DataFrame(rows, columns=["group_a", "group_b", "mean", "low", "high", "pairs"])


def between_models(
    result: Comparison, names: Sequence[str] | None = None, level: float = 0.95
) -> pd.DataFrame:
    """CKA and distance of models as wholes: one row a pair.

    Both are means over the layer pairs of equal depth share (the diagonal where two models are
    equally deep). `similarity` is of CKA, with the interval of `mean_similarity`. `distance` is of
    the angle arccos(CKA) in radians, which for the biased CKA of two layers is a metric (Williams
    et al. 2021, "Generalized Shape Metrics on Neural Representations", section 2); debiased CKA,
    which may lie outside of [-1, 1], is cut there for the angle alone.

    Args:
        result: a Comparison with CKA.
        names: of the models; all but untrained twins unless given.
        level: of the intervals.

    Returns:
        model_a, model_b, similarity, low, high, distance (nan where nothing is defined).

    Raises:
        ResultError: no such model, or CKA is not in the result.
    """
    twins = set(result.references.values())
    given = [name for name in result.models if name not in twins] if names is None else names
    rows = []
    for a, b in combinations(given, 2):
        cells = result.cka(a, b)
        chosen = equal_depth(cells)
        mean, low, high = mean_similarity(result, "cka", a, b, chosen, level)
        angles = np.arccos(np.clip(cells.values[chosen], -1, 1))
        angles = angles[np.isfinite(angles)]
        rows.append((a, b, mean, low, high, float(angles.mean()) if len(angles) else np.nan))
    columns = ["model_a", "model_b", "similarity", "low", "high", "distance"]
    return pd.DataFrame(rows, columns=columns)


def mean_similarity(
    result: Comparison,
    measure: str,
    a: str,
    b: str,
    chosen: np.ndarray | None = None,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """The mean of a similarity measure over layer pairs of two models, with its interval.

    The standard error is the mean of those of the cells, as though all their errors went together.
    They are of the same images and mostly do; where they do not, the interval is too wide, and
    never too narrow. It is cut where the measure ends, and nan where no cell has a standard error.

    Args:
        result: a Comparison.
        measure: name of a similarity measure.
        a: name of a model.
        b: name of another.
        chosen: (layers of a, layers of b), which cells; all of them unless given.
        level: of the interval.

    Returns:
        mean, low, high; nan where nothing is defined.

    Raises:
        ResultError: no such model, or no similarity measure of that name.
    """
    value = result.similarity(measure, a, b)
    error = result.standard_error(measure, a, b).values
    kept = np.isfinite(value.values)
    kept &= True if chosen is None else chosen
    if not kept.any():
        return np.nan, np.nan, np.nan
    mean = float(value.values[kept].mean())
    known = kept & np.isfinite(error)
    if not known.any():
        return mean, np.nan, np.nan
    margin = float(quantile(level, value.attrs["degrees"]) * error[known].mean())
    least, most = _ends(result, measure)
    return mean, float(max(mean - margin, least)), float(min(mean + margin, most))


def equal_depth(cells: xr.DataArray) -> np.ndarray:
    """Which cells (layer_a, layer_b) are of two layers at equal shares of their models' depths."""
    return of_equal_depth(cells["layer_a"].values, cells["layer_b"].values)


def _alike(result: Comparison, measure: str, a: str, b: str) -> float:
    """Mean similarity of two models over layer pairs of equal depth share."""
    value = (result.similarity(measure, a, b) + result.similarity(measure, b, a).values.T) / 2
    cells = value.values[equal_depth(value)]
    defined = cells[~np.isnan(cells)]
    return float(defined.mean()) if len(defined) else np.nan


def of_equal_depth(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Which layers of two models, numbered from 0 to their last, lie at the same share of depth:
    (rows, columns) bool."""
    last_a, last_b = max(rows[-1], 1), max(columns[-1], 1)
    return np.asarray(rows[:, None] * last_b == columns[None, :] * last_a)


def _within(table: np.ndarray) -> tuple[float, float, float, int]:
    """Mean over pairs of different seeds, jackknife standard error, degrees, pairs."""
    seeds = len(table)
    rows, columns = np.triu_indices(seeds, 1)
    if seeds < 2:
        return np.nan, np.nan, np.nan, 0
    mean = float(table[rows, columns].mean())
    if seeds < 3:
        return mean, np.nan, np.nan, len(rows)
    without = np.array(
        [table[rows, columns][(rows != k) & (columns != k)].mean() for k in range(seeds)]
    )
    error = np.sqrt((seeds - 1) / seeds * ((without - without.mean()) ** 2).sum())
    return mean, float(error), seeds - 1, len(rows)


def _between(table: np.ndarray) -> tuple[float, float, float, int]:
    """Mean over all pairs, standard error with seeds of both sides as units, degrees, pairs."""
    degrees = min(table.shape) - 1
    if degrees < 1:
        return float(table.mean()), np.nan, np.nan, table.size
    variances = (table.mean(1 - axis).var(ddof=1) / table.shape[axis] for axis in (0, 1))
    return float(table.mean()), float(np.sqrt(sum(variances))), degrees, table.size


def _seeds(result: Comparison, measure: str) -> tuple[str, dict[str, np.ndarray]]:
    """The units, and by group one number a seed, of those where it is defined."""
    groups = _groups(result)
    members = [name for names in groups.values() for name in names]
    relative = result.needs_relative(measure, members)
    values = {}
    units = result.tree[result.group_of(measure)][measure].attrs["units"]
    for name in members:
        if name not in result.measured(measure):
            values[name] = np.nan
            continue
        if result.is_per_image(measure):
            array = result.layer_images(measure, name, relative=relative, patches=True)
            # As in a difference of models: layers are averaged within each image, then images.
            mean = array.mean("layer", keep_attrs=True)
        else:
            array = mean = result.tokens(measure, name)
        values[name] = float(mean.mean())
        units = array.attrs["units"]
    found = {group: np.array([values[name] for name in names]) for group, names in groups.items()}
    return units, {group: numbers[~np.isnan(numbers)] for group, numbers in found.items()}


def _comparable(result: Comparison, measure: str, names: Iterable[str]) -> bool:
    """Whether models share what the values of a measure depend on."""
    facts = [
        {key: fact["value"] for key, fact in result.describe(name)["facts"].items()}
        for name in names
    ]
    return all(
        all(fact.get(key) == facts[0].get(key) for fact in facts) for key in MEASURES[measure].alike
    )


def _groups(result: Comparison) -> dict[str, tuple[str, ...]]:
    if not result.groups:
        raise ResultError("this result has no groups of seeds; compare with --group NAME=SPEC,SPEC")
    return result.groups


def _ends(result: Comparison, measure: str, units: str = "") -> tuple[float, float]:
    """Where the measure itself ends; in relative units that is known of 0 alone."""
    attrs = result.tree[result.group_of(measure)][measure].attrs
    return attrs["least"], np.inf if units.startswith("relative") else attrs["most"]


def _chosen(
    result: Comparison,
    measures: Sequence[str] | None,
    *,
    paired: bool = False,
    companion: bool = False,
) -> Iterator[str]:
    """The measures asked for, or all of models that a table can hold."""
    if isinstance(measures, str):
        raise ResultError(f"measures are a list of names: give ['{measures}']")
    every = [*result.measures]
    if companion and "cka" in result.measures:
        every.append("first_direction_share")
    for measure in dict.fromkeys(every if measures is None else measures):
        fits = result.group_of(measure) != "similarity"
        fits = fits and (result.is_per_image(measure) or not paired)
        if fits:
            yield measure
        elif measures is not None:
            what = "every image" if paired else "a layer or head"
            raise ResultError(
                f"'{measure}' is no number of {what}, so it has no place in this list"
            )


def _judged(table: pd.DataFrame, level: float) -> pd.DataFrame:
    """With Holm's p over the whole list, and what it says at 1 - level."""
    table["p_holm"] = holm(table["p"])
    decided = table["p_holm"] <= 1 - level
    sign = np.where(table["difference"] > 0, "higher", "lower")
    table["verdict"] = np.where(decided, sign, UNDECIDED)
    return table


def _long(columns: dict[str, xr.DataArray]) -> pd.DataFrame:
    series = [array.to_series().rename(name) for name, array in columns.items()]
    return pd.concat(series, axis=1).reset_index()
