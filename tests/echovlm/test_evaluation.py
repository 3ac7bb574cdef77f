"""The controls of the evaluation: the baseline that sees nothing, images exchanged, tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from examples.echovlm.cases import Case, Question
from examples.echovlm.evaluation import Scored, most_common_reports, shuffle_images
from examples.echovlm.tables import findings_table, score_table
from examples.echovlm.tasks import examples_of


def _case(number: int, organ: str = "liver", language: str = "en", findings: str = "Normal.") -> Case:
    return Case(
        id=str(number),
        patient=str(number),
        hospital="",
        organ=organ,
        language=language,
        images=(f"{number}-a.png", f"{number}-b.png"),
        findings=findings,
        impression="Fine.",
        split="test",
        questions=(Question(question="Side?", answer="Left."), Question(question="Size?", answer="9 mm.")),
    )


def test_a_case_gives_its_report_its_diagnosis_and_its_questions() -> None:
    examples = examples_of([_case(1, language="zh")], Path("folder"))
    assert [example.answer for example in examples] == ["Normal.", "Fine.", "Left.", "9 mm."]
    assert examples[2].prompt == "Side?"
    assert examples[0].prompt == "请描述超声所见。"
    assert all(example.images == (Path("folder/1-a.png"), Path("folder/1-b.png")) for example in examples)


def test_a_task_without_an_answer_is_left_out() -> None:
    case = replace(_case(1), impression="", questions=())
    assert [example.answer for example in examples_of([case], Path())] == ["Normal."]


def test_the_baseline_is_the_most_common_report_of_organ_and_language() -> None:
    train = [
        _case(1, findings="A cyst."),
        _case(2, findings="Normal."),
        _case(3, findings="Normal."),
        _case(4, organ="kidney", findings="A stone."),
        _case(5, language="zh", findings="囊肿。"),
    ]
    test = [_case(6), _case(7, language="zh"), _case(8, organ="kidney"), _case(9, organ="heart")]
    assert most_common_reports(train, test) == ["Normal.", "囊肿。", "A stone.", ""]


def test_shuffled_images_come_whole_from_another_case_of_the_organ() -> None:
    cases = [_case(number, organ=("liver", "kidney")[number % 2]) for number in range(20)]
    examples = examples_of([*cases, _case(99, organ="heart")], Path(), ("report",))
    shuffled = shuffle_images(examples, seed=0)
    organ_of = {example.images: example.organ for example in examples}
    for before, after in zip(examples[:-1], shuffled[:-1], strict=True):
        assert after.images != before.images
        assert organ_of[after.images] == before.organ
        assert replace(after, images=before.images) == before
    assert sorted(e.images for e in shuffled) == sorted(e.images for e in examples)
    assert shuffled[-1] == examples[-1], "an organ with one case has nothing to exchange"


def _scored(name: str, liver: float, heart: float) -> Scored:
    values = {"liver": liver, "heart": heart}
    by_organ = {organ: dict.fromkeys(("BLEU-1", "ROUGE-1", "ROUGE-L"), value) for organ, value in values.items()}
    return Scored(name=name, answers=(), by_organ=by_organ, findings={**values, "all": (liver + heart) / 2})


def test_the_average_is_the_unweighted_mean_of_the_organs() -> None:
    assert _scored("base", 10, 40).average()["ROUGE-L"] == pytest.approx(25)


def test_tables_have_organs_as_rows_and_metrics_by_model_as_columns() -> None:
    scored = [_scored("base", 10, 40), _scored("stage I", 20, 30)]
    head, _, liver, heart, average = score_table(scored).splitlines()
    assert head.split(" | ")[1:3] == ["BLEU-1 base", "BLEU-1 stage I"]
    assert liver.split(" | ")[1:3] == ["10.0", "**20.0**"]
    assert heart.split(" | ")[1:3] == ["**40.0**", "30.0"]
    assert average.split(" | ")[1:3] == ["**25.0**", "**25.0**"]
    assert findings_table(scored).splitlines()[-1] == "| **all** | 25.0 | 25.0 |"
