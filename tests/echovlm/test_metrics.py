"""Text scores against their reference implementations, called as they are, and by hand where they are not enough."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from examples.echovlm.metrics import TextMetrics, corpus_score

ENGLISH = (
    ["A 14 mm cyst is seen in the left lobe.", "No mass is seen."],
    ["A 20 mm cyst is seen in the right lobe, round.", "No nodule or cyst is seen."],
)
CHINESE = (["左叶见低回声结节。"], ["右叶见高回声结节。"])
WORDS = [
    "cyst",
    "nodule",
    "14",
    "mm",
    "left",
    "is",
    "seen",
    "no",
    ",",
    ".",
    "囊",
    "肿",
    "结",
    "节",
    "左",
    "叶",
    "，",
    "。",
]


@pytest.fixture(scope="module")
def metrics() -> TextMetrics:
    return TextMetrics()


def _scores(metrics: TextMetrics, answers: list[str], references: list[str]) -> dict[str, float]:
    return {name: float(corpus_score(name, sums.sum(0))) for name, sums in metrics.sums(answers, references).items()}


def _random_texts(rng: np.random.Generator, number: int) -> list[str]:
    return [" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(number)]


def test_english_scores_equal_the_reference_implementations(metrics: TextMetrics) -> None:
    answers, references = ENGLISH
    scorer = RougeScorer(["rouge1", "rougeL"])
    pairs = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    scores = _scores(metrics, answers, references)
    assert scores["ROUGE-1"] == pytest.approx(50 * sum(pair["rouge1"].fmeasure for pair in pairs))
    assert scores["ROUGE-L"] == pytest.approx(50 * sum(pair["rougeL"].fmeasure for pair in pairs))
    bleu = BLEU(tokenize="13a", max_ngram_order=1).corpus_score(answers, [references])
    assert scores["BLEU-1"] == pytest.approx(bleu.score)


@pytest.mark.parametrize("seed", range(5))
def test_bleu_of_summed_up_counts_is_sacrebleus_of_the_corpus(metrics: TextMetrics, seed: int) -> None:
    rng = np.random.default_rng(seed)
    answers, references = _random_texts(rng, 30), _random_texts(rng, 30)
    answers[3] = ""
    drawn = rng.integers(30, size=40)  # a bootstrap resample
    found = corpus_score("BLEU-1", metrics.sums(answers, references)["BLEU-1"][drawn].sum(0))
    bleu = BLEU(tokenize="zh", max_ngram_order=1)
    expected = bleu.corpus_score([answers[i] for i in drawn], [[references[i] for i in drawn]])
    assert found == pytest.approx(expected.score)


def test_chinese_is_scored_by_character(metrics: TextMetrics) -> None:
    # 8 characters and a full stop a side; 2 of 8 differ; equal lengths, so no brevity penalty
    scores = _scores(metrics, *CHINESE)
    assert scores["ROUGE-1"] == pytest.approx(75.0)
    assert scores["ROUGE-L"] == pytest.approx(75.0)
    assert scores["BLEU-1"] == pytest.approx(100 * 7 / 9)


def test_full_width_characters_count_as_plain_ones(metrics: TextMetrics) -> None:
    scores = _scores(metrics, ["大小约１４ｍｍ"], ["大小约14mm"])
    assert scores["ROUGE-L"] == pytest.approx(100)


def test_rouge_l_sees_order(metrics: TextMetrics) -> None:
    scores = _scores(metrics, ["结节左叶"], ["左叶结节"])
    assert scores["ROUGE-1"] == pytest.approx(100.0)
    assert scores["ROUGE-L"] == pytest.approx(50.0)


def test_rouge_l_never_exceeds_rouge_1(metrics: TextMetrics) -> None:
    rng = np.random.default_rng(0)
    sums = metrics.sums(_random_texts(rng, 500), _random_texts(rng, 500))
    words, longest = sums["ROUGE-1"][:, 0], sums["ROUGE-L"][:, 0]
    assert (longest <= words + 1e-12).all() and (longest < words).any() and longest.max() > 0


@pytest.mark.parametrize("texts", [ENGLISH, CHINESE])
def test_a_perfect_answer_scores_a_hundred_and_silence_nothing(
    metrics: TextMetrics, texts: tuple[list[str], list[str]]
) -> None:
    references = texts[1]
    perfect = _scores(metrics, references, references)
    meteor = perfect.pop("METEOR", 100)  # its penalty of one chunk remains
    assert all(value == pytest.approx(100) for value in perfect.values()) and meteor > 99
    assert all(value == 0 for value in _scores(metrics, [""] * len(references), references).values())


def test_every_metric_says_how_or_why_not(metrics: TextMetrics) -> None:
    assert {*metrics.described, *metrics.missing} == {"BLEU-1", "ROUGE-1", "ROUGE-L", "METEOR", "BERTScore"}
    assert set(metrics.sums(*ENGLISH)) == set(metrics.described)
    assert "sacrebleu 2" in metrics.described["BLEU-1"] and "tokenize='zh'" in metrics.described["BLEU-1"]
    assert "evaluation: {bertscore" in metrics.missing["BERTScore"]
