"""Intervals and p-values against sacrebleu on drawn corpora, all exchanges, and cases that can be worked by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from examples.echovlm.metrics import TextMetrics
from examples.echovlm.significance import Strata, differences, estimates
from moe_adapter.analysis.resampling import DEFAULT, Resampling

ORGANS = ["liver"] * 6 + ["heart"] * 4
PATIENTS = ["a", "b", "b", "c", "d", "e", "f", "g", "h", "a"]


def _ratio(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones(len(values))], axis=1)


def _texts(seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["cyst", "left", "no", "seen", "mm", "囊", "肿", "左"]
    return [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in ORGANS]


def test_the_average_is_the_unweighted_mean_of_the_organs_and_findings_are_of_all() -> None:
    values = np.array([1.0] * 6 + [0.0] * 4)
    found = estimates(Strata(ORGANS, PATIENTS), {"ROUGE-1": _ratio(values), "attributes": _ratio(values)})
    assert found["ROUGE-1"].value == pytest.approx(50)
    assert found["attributes"].value == pytest.approx(60)


def test_the_interval_is_that_of_corpora_drawn_by_patient_within_the_organ() -> None:
    answers, references = _texts(0), _texts(1)
    resampling = Resampling(resamples=200)
    strata = Strata(ORGANS, PATIENTS)
    sums = {"BLEU-1": TextMetrics().sums(answers, references)["BLEU-1"]}
    found = estimates(strata, sums, resampling)["BLEU-1"]

    bleu, of_organs = BLEU(tokenize="zh", max_ngram_order=1), []
    for i, organ in enumerate(["heart", "liver"]):
        patients = sorted({p for o, p in zip(ORGANS, PATIENTS, strict=True) if o == organ})
        rng = np.random.default_rng(i)
        scores = []
        for drawn in rng.integers(len(patients), size=(200, len(patients))):
            rows = [
                row
                for patient in drawn
                for row in range(10)
                if (ORGANS[row], PATIENTS[row]) == (organ, patients[patient])
            ]
            scores.append(bleu.corpus_score([answers[r] for r in rows], [[references[r] for r in rows]]).score)
        of_organs.append(scores)
    samples = np.mean(of_organs, axis=0)
    expected = resampling.interval(found.value, samples, 4)
    assert found.low == pytest.approx(expected.low) and found.high == pytest.approx(expected.high)
    assert found.low < found.value < found.high


def test_an_organ_with_one_patient_leaves_no_interval() -> None:
    found = estimates(Strata(["liver", "liver", "heart"], ["a", "b", "c"]), {"ROUGE-1": _ratio(np.arange(3) / 3)})
    assert found["ROUGE-1"].value == pytest.approx(100 * (1 / 6 + 2 / 3) / 2)
    assert np.isnan(found["ROUGE-1"].low) and np.isnan(found["ROUGE-1"].high)


def test_p_is_the_share_of_all_exchanges() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random(10), rng.random(10) * 0.8
    strata = Strata(ORGANS, PATIENTS)
    found = differences(strata, {"ROUGE-1": _ratio(a)}, {"ROUGE-1": _ratio(b)}, replace(DEFAULT, permutations=20000))
    pairs = sorted(set(zip(ORGANS, PATIENTS, strict=True)))
    exchanged = []
    for coins in product([1, -1], repeat=len(pairs)):
        sign = dict(zip(pairs, coins, strict=True))
        signs = np.array([sign[pair] for pair in zip(ORGANS, PATIENTS, strict=True)])
        difference = signs * (a - b)
        exchanged.append((difference[:6].mean() + difference[6:].mean()) / 2)
    expected = np.mean(np.abs(exchanged) >= abs(exchanged[0]) - 1e-12)
    assert found["ROUGE-1"].estimate.value == pytest.approx(100 * exchanged[0])
    assert found["ROUGE-1"].p == pytest.approx(expected, abs=0.01) and 0.02 < expected < 0.9


def test_p_of_a_corpus_score_takes_the_corpus_anew() -> None:
    # BLEU of the whole is not the mean of the answers', so neither is its null
    metrics, strata = TextMetrics(), Strata(["liver"] * 3, ["a", "b", "c"])
    references = ["a cyst is seen on the left side of the lobe", "no cyst", "a stone"]
    models = [["a cyst", "no cyst", "a"], ["a cyst is seen on the left", "cyst", "stone stone stone"]]
    a, b = ({"BLEU-1": metrics.sums(answers, references)["BLEU-1"]} for answers in models)
    found = differences(strata, a, b, replace(DEFAULT, permutations=20000))["BLEU-1"]
    bleu = BLEU(tokenize="zh", max_ngram_order=1)
    null = [
        bleu.corpus_score([models[c][i] for i, c in enumerate(coins)], [references]).score
        - bleu.corpus_score([models[1 - c][i] for i, c in enumerate(coins)], [references]).score
        for coins in product([0, 1], repeat=3)
    ]
    assert found.estimate.value == pytest.approx(null[0])
    assert found.p == pytest.approx(np.mean(np.abs(null) >= abs(null[0]) - 1e-9), abs=0.01)
    assert 0.1 < found.p < 0.9


def test_equal_models_do_not_differ_and_a_constant_gain_is_certain() -> None:
    strata, values = Strata(ORGANS, PATIENTS), np.linspace(0, 0.5, 10)
    same = differences(strata, {"ROUGE-1": _ratio(values)}, {"ROUGE-1": _ratio(values)})["ROUGE-1"]
    assert (same.estimate.value, same.estimate.low, same.estimate.high, same.p) == (0, 0, 0, 1)
    better = differences(strata, {"ROUGE-1": _ratio(values + 0.1)}, {"ROUGE-1": _ratio(values)})["ROUGE-1"]
    assert [better.estimate.low, better.estimate.high] == [pytest.approx(10)] * 2  # paired: the same draws for both
    assert better.p < 0.02


def test_what_was_never_counted_has_neither() -> None:
    nothing = {"size": np.zeros((10, 2))}
    strata = Strata(ORGANS, PATIENTS)
    assert np.isnan(estimates(strata, nothing)["size"]).all()
    assert np.isnan(differences(strata, nothing, nothing)["size"].p)
