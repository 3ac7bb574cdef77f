"""Scores against golden values: rouge-score and sacrebleu as they are, and worked by hand where they are not enough."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from examples.echovlm.cases import Case
from examples.echovlm.metrics import finding_accuracy, text_scores

ENGLISH = (
    ["A 14 mm cyst is seen in the left lobe.", "No mass is seen."],
    ["A 20 mm cyst is seen in the right lobe, round.", "No nodule or cyst is seen."],
)
CHINESE = (["左叶见低回声结节。"], ["右叶见高回声结节。"])


def _case(**attributes: str) -> Case:
    return Case(
        id="1",
        patient="1",
        hospital="",
        organ="thyroid",
        language="en",
        images=("a.png",),
        findings="x",
        split="test",
        attributes=attributes,
    )


def test_english_scores_equal_the_reference_implementations() -> None:
    answers, references = ENGLISH
    scorer = RougeScorer(["rouge1", "rougeL"])
    pairs = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    scores = text_scores(answers, references)
    assert scores["ROUGE-1"] == pytest.approx(50 * sum(pair["rouge1"].fmeasure for pair in pairs))
    assert scores["ROUGE-L"] == pytest.approx(50 * sum(pair["rougeL"].fmeasure for pair in pairs))
    bleu = BLEU(tokenize="13a", max_ngram_order=1).corpus_score(answers, [references])
    assert scores["BLEU-1"] == pytest.approx(bleu.score)


def test_chinese_is_scored_by_character() -> None:
    # 8 characters and a full stop a side; 2 of 8 differ; equal lengths, so no brevity penalty
    scores = text_scores(*CHINESE)
    assert scores["ROUGE-1"] == pytest.approx(75.0)
    assert scores["ROUGE-L"] == pytest.approx(75.0)
    assert scores["BLEU-1"] == pytest.approx(100 * 7 / 9)


def test_rouge_l_sees_order_and_never_exceeds_rouge_1() -> None:
    scores = text_scores(["结节左叶"], ["左叶结节"])
    assert scores["ROUGE-1"] == pytest.approx(100.0)
    assert scores["ROUGE-L"] == pytest.approx(50.0)


@pytest.mark.parametrize("texts", [ENGLISH, CHINESE])
def test_a_perfect_answer_scores_a_hundred_and_silence_nothing(texts: tuple[list[str], list[str]]) -> None:
    references = texts[1]
    assert all(value == pytest.approx(100) for value in text_scores(references, references).values())
    assert all(value == 0 for value in text_scores([""] * len(references), references).values())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A 14 mm round anechoic cyst is seen in the left thyroid lobe.", 100.0),
        ("A 10 mm round anechoic cyst is seen in the left thyroid lobe.", 80.0),
        ("A 14 mm round anechoic cyst is seen.", 80.0),
        ("No nodule or cyst is seen.", 0.0),
        ("", 0.0),
    ],
)
def test_findings_count_right_values_only(answer: str, expected: float) -> None:
    truth = _case(lesion="cyst", side="left", size_mm="14", shape="round", echogenicity="anechoic")
    assert finding_accuracy([answer], [truth]) == pytest.approx(expected)


def test_findings_of_cases_without_attributes_are_not_scored() -> None:
    assert finding_accuracy(["A cyst."], [_case()]) is None
    assert finding_accuracy(["A cyst.", "No nodule."], [_case(), _case(lesion="none")]) == 100
