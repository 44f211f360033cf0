"""Which findings of Wang et al. (2023) hold in the study, by rules that were written before its
results were there.

    python -m analyses.fashion.findings

fills the tables of `analyses/README.md` and `analyses/fashion/README.md` from results/
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from scipy import stats

from analyses.fashion.reading import RESULTS, Study, same_layers
from analyses.sections import fill, table, wrapped
from vitprobe.errors import VitprobeError
from vitprobe.statistics import holm, quantile

HERE = Path(__file__).parent
ALPHA: Final = 0.05
LOWER: Final = slice(1, 5)
"""Layers 1 to 4 of 0 … 12: the first is the embedded image, the same patches for everyone."""
UPPER: Final = slice(9, 13)
LAST_BLOCKS: Final = slice(8, 12)
KEPT: Final = ("MAE", "MoCo-v3", "D-MAE")

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "cannot be told apart"


@dataclass(frozen=True)
class Effect:
    """A number, and what varies in it.

    value: the number. sides: for each method that goes in, one number a seed, whose mean moves the
    value by as much as itself. given: methods of which there is one seed that stays what it is, and
    to which the conclusion is confined.
    """

    value: float
    sides: Sequence[Any]
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """An effect with its interval over seeds; nan where a method has one seed."""

    value: float
    low: float
    high: float
    p: float


def over_seeds(effect: Effect, level: float = 1 - ALPHA) -> Estimate:
    """Student's t with seeds as the unit.

    The variance of the value is the sum of variance / seeds of the sides, its degrees of freedom
    are Welch's and Satterthwaite's: of one side this is the t interval, of two Welch's.
    """
    sides = [np.asarray(side, dtype=float) for side in effect.sides]
    if not sides or any(len(side) < 2 for side in sides):
        return Estimate(effect.value, np.nan, np.nan, np.nan)
    squares = np.array([side.var(ddof=1) / len(side) for side in sides])
    free = np.array([len(side) - 1.0 for side in sides])
    if squares.sum() == 0:
        return Estimate(effect.value, effect.value, effect.value, float(effect.value == 0))
    degrees = squares.sum() ** 2 / (squares**2 / free).sum()
    error = np.sqrt(squares.sum())
    margin = float(quantile(level, degrees)) * error
    p = float(2 * stats.t.sf(abs(effect.value) / error, degrees))
    return Estimate(effect.value, effect.value - margin, effect.value + margin, p)


@dataclass(frozen=True)
class Finding:
    """A claim of the paper as a number that is to be positive, or negative.

    claim: in the paper's terms. measured: what the number is. effect: None where it was not
    measured. sign: of the number, if the claim holds.
    """

    claim: str
    measured: str
    effect: Callable[[Study], Effect | None]
    sign: int
    digits: int = 3


def judge(findings: Sequence[Finding], effects: Sequence[Effect | None]) -> pd.DataFrame:
    """The rule: Holm's p over all findings that have one, at 5 %, and the sign of the number.

    Returns:
        A row a finding: value, low, high, p, p_holm, seeds (as text), verdict and given.
    """
    estimates = [
        Estimate(np.nan, np.nan, np.nan, np.nan) if effect is None else over_seeds(effect)
        for effect in effects
    ]
    adjusted = holm([estimate.p for estimate in estimates])
    rows = []
    for finding, effect, estimate, p in zip(findings, effects, estimates, adjusted, strict=True):
        if effect is None:
            verdict = f"{UNDECIDED}: not measured"
        elif np.isnan(estimate.p):
            verdict = f"{UNDECIDED}: one seed"
        elif p > ALPHA:
            verdict = UNDECIDED
        else:
            verdict = HOLDS if estimate.value * finding.sign > 0 else FAILS
        seeds = "–" if effect is None else " + ".join(str(len(side)) for side in effect.sides)
        rows.append(
            {
                "value": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "p": estimate.p,
                "p_holm": p,
                "seeds": seeds,
                "given": () if effect is None else effect.given,
                "verdict": verdict,
            }
        )
    return pd.DataFrame(rows)


def crossed(cells: np.ndarray, reference: str) -> Effect | None:
    """A number of every seed of a method with every seed of a reference: (seeds, seeds)."""
    if not cells.size:
        return None
    if cells.shape[1] == 1:
        return Effect(float(cells.mean()), [cells[:, 0]], (reference,))
    return Effect(float(cells.mean()), [cells.mean(1), cells.mean(0)])


def crossed_difference(a: np.ndarray, b: np.ndarray, reference: str) -> Effect | None:
    """Mean of a minus mean of b, which share the seeds of a reference on their second axis."""
    if not (a.size and b.size):
        return None
    value = float(a.mean() - b.mean())
    sides = [a.mean(1), b.mean(1)]
    if a.shape[1] == 1:
        return Effect(value, sides, (reference,))
    return Effect(value, [*sides, a.mean(0) - b.mean(0)])


def difference(a: Any, b: Any) -> Effect | None:
    """Mean over the seeds of one method minus that of another."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if not (len(a) and len(b)):
        return None
    return Effect(float(a.mean() - b.mean()), [a, b])


def _layers(study: Study, method: str, reference: str, layers: slice) -> np.ndarray:
    """Mean CKA of some equal layers: (seeds of the method, seeds of the reference)."""
    return same_layers(study.cka(method, reference))[..., layers].mean(-1)


def _lower_over_upper(method: str) -> Callable[[Study], Effect | None]:
    def effect(study: Study) -> Effect | None:
        lower, upper = (_layers(study, method, "Supervised", part) for part in (LOWER, UPPER))
        return crossed(lower - upper, "Supervised")

    return effect


def _cka_difference(
    a: str, b: str, reference: str, layers: slice
) -> Callable[[Study], Effect | None]:
    def effect(study: Study) -> Effect | None:
        sides = (_layers(study, method, reference, layers) for method in (a, b))
        return crossed_difference(*sides, reference)

    return effect


def _attention(measure: str, a: str, b: str) -> Callable[[Study], Effect | None]:
    def effect(study: Study) -> Effect | None:
        sides = (
            study.attention(measure, method, relative=True)[:, LAST_BLOCKS].mean((1, 2))
            for method in (a, b)
        )
        return difference(*sides)

    return effect


def _accuracy(a: str, b: str, labels: float) -> Callable[[Study], Effect | None]:
    def effect(study: Study) -> Effect | None:
        sides = (study.accuracy(study.seeds(m), "finetune", labels=labels) for m in (a, b))
        return difference(*sides)

    return effect


def half_gains(study: Study, labels: float) -> dict[str, tuple[float, float]]:
    """What the first and the second six pre-trained blocks add to fine-tuned accuracy, in points,
    by seed: means over the methods, of seeds that have 0, 6 and 12 blocks kept of all of them."""
    gains: dict[str, list[tuple[float, float]]] = {}
    for method in KEPT:
        none, half, whole = (
            study.accuracy(study.seeds(method), "finetune", labels=labels, kept=kept)
            for kept in (0, 6, None)
        )
        for name in none.index.intersection(half.index).intersection(whole.index):
            seed = str(name).rsplit(" ", 1)[1]
            gains.setdefault(seed, []).append((half[name] - none[name], whole[name] - half[name]))
    return {
        seed: (float(np.mean([one for one, _ in found])), float(np.mean([two for _, two in found])))
        for seed, found in gains.items()
        if len(found) == len(KEPT)
    }


def _lower_blocks_matter(study: Study) -> Effect | None:
    gains = [first - second for first, second in half_gains(study, 1.0).values()]
    return Effect(float(np.mean(gains)), [gains]) if gains else None


def _upper_blocks_matter_with_few_labels(study: Study) -> Effect | None:
    few, many = half_gains(study, 0.01), half_gains(study, 1.0)
    gains = [few[seed][1] - many[seed][1] for seed in few if seed in many]
    return Effect(float(np.mean(gains)), [gains]) if gains else None


_SELF_SUPERVISED: Final = ("MAE", "MoCo-v3", "DINO")
FINDINGS: Final = (
    *(
        Finding(
            f"Lower layers of {method} resemble the supervised ones",
            "CKA with the same layer of Supervised: layers 1–4 minus layers 9–12",
            _lower_over_upper(method),
            +1,
        )
        for method in _SELF_SUPERVISED
    ),
    *(
        Finding(
            f"… and more than those of an untrained network ({method})",
            f"CKA with the same layer of Supervised, layers 1–4: {method} minus Random",
            _cka_difference(method, "Random", "Supervised", LOWER),
            +1,
        )
        for method in _SELF_SUPERVISED
    ),
    Finding(
        "MAE's upper layers differ from the supervised ones, more than MoCo-v3's do",
        "CKA with the same layer of Supervised, layers 9–12: MAE minus MoCo-v3",
        _cka_difference("MAE", "MoCo-v3", "Supervised", UPPER),
        -1,
    ),
    Finding(
        "MAE's upper layers attend locally",
        "Attention distance relative to uniform, blocks 8–11: MAE minus Supervised",
        _attention("attention_distance", "MAE", "Supervised"),
        -1,
    ),
    Finding(
        "MoCo-v3's upper layers attend more globally",
        "Attention distance relative to uniform, blocks 8–11: MoCo-v3 minus Supervised",
        _attention("attention_distance", "MoCo-v3", "Supervised"),
        +1,
    ),
    Finding(
        "MoCo-v3's upper layers attend more uniformly",
        "Attention entropy relative to uniform, blocks 8–11: MoCo-v3 minus Supervised",
        _attention("attention_entropy", "MoCo-v3", "Supervised"),
        +1,
    ),
    Finding(
        "Distillation makes the student's upper layers more like the teacher's",
        "CKA with the same layer of Teacher, layers 9–12: D-MAE minus MAE",
        _cka_difference("D-MAE", "MAE", "Teacher", UPPER),
        +1,
    ),
    Finding(
        "Distillation helps transfer with few labels",
        "Accuracy fine-tuned with 1 % of the labels, points: D-MAE minus MAE",
        _accuracy("D-MAE", "MAE", 0.01),
        +1,
        1,
    ),
    Finding(
        "Lower layers matter more with enough data",
        "Gain of fine-tuned accuracy by blocks 0–5 minus that by blocks 6–11, all labels, points",
        _lower_blocks_matter,
        +1,
        1,
    ),
    Finding(
        "Higher layers matter more with little data",
        "Gain of fine-tuned accuracy by blocks 6–11: 1 % of the labels minus all, points",
        _upper_blocks_matter_with_few_labels,
        +1,
        1,
    ),
)


def findings(study: Study) -> pd.DataFrame:
    """All findings judged on the results."""
    return judge(FINDINGS, [finding.effect(study) for finding in FINDINGS])


def findings_table(judged: pd.DataFrame) -> str:
    rows = []
    for finding, row in zip(FINDINGS, judged.to_dict("records"), strict=True):
        digits = finding.digits
        number = "–" if np.isnan(row["value"]) else f"{row['value']:+.{digits}f}"
        if not np.isnan(row["low"]):
            number += f" [{row['low']:+.{digits}f}, {row['high']:+.{digits}f}]"
        verdict = f"**{row['verdict']}**"
        if row["given"]:
            verdict += f" (for this one {', '.join(row['given'])})"
        rows.append(
            (
                finding.claim,
                finding.measured,
                "> 0" if finding.sign > 0 else "< 0",
                number,
                row["seeds"],
                _p(row["p_holm"]),
                verdict,
            )
        )
    header = ("finding", "number", "claimed", "value [95 %]", "seeds", "p (Holm)", "verdict")
    return table(header, rows)


def _p(value: float) -> str:
    if np.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def summary(judged: pd.DataFrame) -> str:
    """How many hold."""
    counts = judged["verdict"].str.partition(":")[0].value_counts()
    held, failed, open_ = (int(counts.get(verdict, 0)) for verdict in (HOLDS, FAILS, UNDECIDED))
    return (
        f"{held} hold{'s' * (held == 1)}, {failed} do{'es' * (failed == 1)} not hold, "
        f"{open_} {UNDECIDED}"
    )


def reading_them(study: Study) -> str:
    """What the first statements and those on blocks are made of, without which they mislead."""
    text = []
    effect = _lower_over_upper("Random")(study)
    if effect is not None:
        found = over_seeds(effect)
        text.append(
            "Untrained networks have lower layers that resemble the supervised ones too, by "
            f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}] of the first number: that "
            "it is above 0 says nothing of training."
        )
    gains = list(half_gains(study, 1.0).values())
    if gains:
        first, second = np.mean(gains, axis=0)
        text.append(
            "With all labels the first six pre-trained blocks add "
            f"{first:+.1f} points of fine-tuned accuracy and the last six {second:+.1f}."
        )
    return " ".join(text)


def main(results: Path = RESULTS) -> None:
    """results: that `make study` wrote."""
    from analyses.fashion.tables import (
        accuracies,
        made_by,
        not_above_random,
        paired_with_random,
        runs,
    )

    study = Study(results)
    judged = findings(study)
    page = HERE.parent / "README.md"
    text = f"Of {len(judged)} statements {summary(judged)}. {made_by(study)}"
    fill(page, "findings", f"{text}\n\n{findings_table(judged)}\n\n{wrapped(reading_them(study))}")
    own = HERE / "README.md"
    remarks = wrapped(f"{not_above_random(study)} {paired_with_random(study)}")
    numbers = f"{made_by(study)}\n\n{accuracies(study)}\n\n{remarks}"
    fill(own, "numbers", numbers)
    fill(own, "runs", runs(study))
    print(page, own, sep="\n")


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(main)
    except VitprobeError as error:
        print(f"findings: {error}", file=sys.stderr)
        sys.exit(2)
