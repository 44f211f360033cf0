"""Rules of the findings, on numbers with a known outcome."""

from __future__ import annotations

import numpy as np
import pytest

from analyses.fashion.findings import (
    FAILS,
    FINDINGS,
    HOLDS,
    UNDECIDED,
    Effect,
    Finding,
    crossed,
    crossed_difference,
    difference,
    findings,
    findings_table,
    half_gains,
    judge,
    over_seeds,
    summary,
)
from analyses.fashion.reading import Study
from vitprobe.scores import Score, Scores
from vitprobe.statistics import t_interval, welch

SEEDS = {
    "MAE": 3,
    "MoCo-v3": 3,
    "DINO": 1,
    "D-MAE": 3,
    "Supervised": 3,
    "Random": 3,
    "Teacher": 1,
}


class Made(Study):
    """A study with chosen numbers.

    cka, distance, entropy: of a method, in all layers, with a little spread between seeds.
    """

    def __init__(self, *, upper=None, seeds=SEEDS, rows=()):
        super().__init__()
        self.counts, self.upper = seeds, upper or {}
        self.scores = Scores(rows).to_dataframe()

    @property
    def methods(self):
        return tuple(self.counts)

    def seeds(self, method):
        return tuple(f"{method} {i}" for i in range(self.counts.get(method, 0)))

    def cka(self, a, b):
        shape = (len(self.seeds(a)), len(self.seeds(b)))
        cells = np.full((*shape, 13, 13), 0.9)
        cells[..., 9:, 9:] = self.upper.get((a, b), 0.5)
        noise = np.add.outer(0.001 * np.arange(shape[0]), 0.002 * np.arange(shape[1]))
        cells[..., 5:, 5:] += noise[..., None, None]
        return cells

    def attention(self, measure, method, *, relative=False):
        level = self.upper.get((measure, method), 0.8)
        seeds = np.arange(len(self.seeds(method)))
        return level + np.zeros((len(seeds), 12, 6)) + 0.001 * seeds[:, None, None]


def score(model, value, *, labels=1.0, kept=None):
    return Score(model, "", "finetune", "data", 10, "top1", value, labels=labels, seed=0, kept=kept)


def same(found, expected):
    assert found.low == pytest.approx(float(expected.low))
    assert found.high == pytest.approx(float(expected.high))
    assert found.p == pytest.approx(float(expected.p))


def test_one_side_is_the_t_interval_and_two_are_welch():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 3), rng.normal(0, 3, 5)
    one, expected = over_seeds(Effect(a.mean(), [a])), t_interval(a)
    assert (one.low, one.high, one.p) == pytest.approx(
        tuple(map(float, (expected.low, expected.high, expected.p)))
    )
    two, expected = over_seeds(difference(a, b)), welch(a, b)
    assert two.value == pytest.approx(expected.value)
    assert (two.low, two.high, two.p) == pytest.approx(
        tuple(map(float, (expected.low, expected.high, expected.p)))
    )


def test_cells_of_two_methods_have_the_seeds_of_both_as_units():
    rows, columns = np.array([0.1, 0.2, 0.4]), np.array([0.0, 0.3])
    effect = crossed(np.add.outer(rows, columns), "B")
    found = over_seeds(effect)
    expected = welch(rows, -columns)
    assert found.value == pytest.approx(rows.mean() + columns.mean())
    assert found.high - found.low == pytest.approx(expected.high - expected.low)
    assert effect.given == ()


def test_what_two_methods_share_with_a_reference_cancels():
    shared = np.array([0.0, 0.5, 0.9])
    a, b = np.add.outer([0.6, 0.62, 0.64], shared), np.add.outer([0.1, 0.12, 0.11], shared)
    found = over_seeds(crossed_difference(a, b, "Supervised"))
    expected = welch([0.6, 0.62, 0.64], [0.1, 0.12, 0.11])
    assert found.value == pytest.approx(expected.value)
    # The reference adds a side without spread.
    assert found.low == pytest.approx(expected.low)


def test_one_reference_is_what_the_conclusion_is_confined_to():
    effect = crossed_difference(np.array([[0.5], [0.6]]), np.array([[0.1], [0.2]]), "Teacher")
    assert effect.given == ("Teacher",)
    assert np.isfinite(over_seeds(effect).low)


def _judged(*effects, sign=1):
    made = [Finding("a claim", "a number", lambda study: None, sign) for _ in effects]
    return list(judge(made, effects)["verdict"])


def test_verdicts_follow_sign_and_interval():
    high = Effect(1.0, [[0.99, 1.0, 1.01]])
    low = Effect(-1.0, [[-0.99, -1.0, -1.01]])
    wide = Effect(1.0, [[-3.0, 1.0, 5.0]])
    assert _judged(high, low, wide) == [HOLDS, FAILS, UNDECIDED]
    assert _judged(high, low, sign=-1) == [FAILS, HOLDS]


def test_a_method_with_one_seed_is_no_evidence_whatever_its_number():
    assert _judged(Effect(9.0, [[9.0]])) == [f"{UNDECIDED}: one seed"]
    assert _judged(Effect(9.0, [[9.0, 9.1, 9.05], [0.0]])) == [f"{UNDECIDED}: one seed"]
    assert _judged(None) == [f"{UNDECIDED}: not measured"]


def test_the_list_is_corrected_for_its_length_without_those_that_have_no_p():
    near = Effect(1.0, [[0.7, 1.0, 1.3]])
    assert over_seeds(near).p == pytest.approx(0.0285, abs=1e-3)
    assert _judged(near) == [HOLDS]
    assert _judged(near, None, Effect(1.0, [[1.0]]))[0] == HOLDS
    assert _judged(near, near) == [UNDECIDED, UNDECIDED]


def test_the_findings_are_read_off_the_layers_they_name():
    claimed = {
        ("MAE", "Supervised"): 0.2,
        ("MoCo-v3", "Supervised"): 0.7,
        ("D-MAE", "Teacher"): 0.9,
        ("MAE", "Teacher"): 0.4,
        ("attention_distance", "MAE"): 0.5,
        ("attention_distance", "MoCo-v3"): 0.95,
        ("attention_entropy", "MoCo-v3"): 0.99,
    }
    judged = findings(Made(upper=claimed))
    verdict = {f.measured: v for f, v in zip(FINDINGS, judged["verdict"], strict=True)}
    assert verdict["CKA with the same layer of Supervised, layers 9–12: MAE minus MoCo-v3"] == HOLDS
    assert verdict["CKA with the same layer of Teacher, layers 9–12: D-MAE minus MAE"] == HOLDS
    for measured, found in verdict.items():
        if measured.startswith("Attention"):
            assert found == HOLDS
    by_claim = {f.claim: (f, row) for f, (_, row) in zip(FINDINGS, judged.iterrows(), strict=True)}
    assert by_claim["Lower layers of DINO resemble the supervised ones"][1]["verdict"].endswith(
        "one seed"
    )
    _, lower = by_claim["Lower layers of MAE resemble the supervised ones"]
    assert lower["value"] == pytest.approx(0.9 - 0.2 - 0.003)
    # The same numbers the other way round are no evidence for the paper.
    swapped = {**claimed, ("MAE", "Supervised"): 0.7, ("MoCo-v3", "Supervised"): 0.2}
    assert FAILS in set(findings(Made(upper=swapped))["verdict"])


def test_accuracy_counts_in_points_and_only_the_labels_that_were_asked_for():
    rows = [score(f"MAE {i}", 0.5 + 0.001 * i, labels=0.01) for i in range(3)]
    rows += [score(f"D-MAE {i}", 0.6 + 0.001 * i, labels=0.01) for i in range(3)]
    rows += [score(f"D-MAE {i}", 0.1, labels=1.0) for i in range(3)]
    judged = findings(Made(rows=rows))
    index = [f.claim for f in FINDINGS].index("Distillation helps transfer with few labels")
    assert judged["value"][index] == pytest.approx(10.0)
    assert judged["verdict"][index] == HOLDS


def test_gains_of_blocks_want_all_methods_at_a_seed():
    rows = [
        score(f"{method} 0", value, labels=labels, kept=kept)
        for method in ("MAE", "MoCo-v3", "D-MAE")
        for labels in (1.0, 0.01)
        for kept, value in ((0, 0.5), (6, 0.7), (None, 0.75 if labels == 1 else 0.9))
    ]
    rows += [score("MAE 1", value, kept=kept) for kept, value in ((0, 0.1), (6, 0.1), (None, 0.1))]
    study = Made(rows=rows)
    assert half_gains(study, 1.0) == {"0": pytest.approx((20.0, 5.0))}
    judged = findings(study)
    assert list(judged["value"][-2:]) == pytest.approx([15.0, 15.0])
    assert set(judged["verdict"][-2:]) == {f"{UNDECIDED}: one seed"}


def test_methods_that_were_not_trained_are_said_to_be_missing():
    judged = findings(Made(seeds={"MAE": 3, "Supervised": 3}))
    assert judged["verdict"].str.endswith("not measured").sum() >= 10
    text = findings_table(judged)
    assert text.count("\n") == len(FINDINGS) + 1
    assert "not measured" in text
    assert "nan" not in text
    assert summary(judged).endswith(UNDECIDED)
