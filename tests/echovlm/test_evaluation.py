"""Held-out questions of each task, the controls (the baseline that sees nothing, images exchanged), tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from echovlm.recipe_parts import SIDE, collator, example, small_config, tokenizer
from PIL import Image

from examples.echovlm import evaluation
from examples.echovlm.account import Account
from examples.echovlm.answering import answer
from examples.echovlm.cases import Case, Question
from examples.echovlm.config import EvaluationConfig
from examples.echovlm.data import Data
from examples.echovlm.evaluation import Evaluator, Scored, most_common_answers, shuffle_images
from examples.echovlm.families import build_model
from examples.echovlm.metrics import TextMetrics
from examples.echovlm.scoring import HeldOut
from examples.echovlm.tables import difference_table, estimate_table, findings_table, score_table
from examples.echovlm.tasks import Example, examples_of


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


def test_the_baseline_is_the_most_common_answer_to_the_same_question_about_the_organ() -> None:
    train = [
        _case(1, findings="A cyst."),
        _case(2, findings="Normal."),
        _case(3, findings="Normal."),
        _case(4, organ="kidney", findings="A stone."),
        _case(5, language="zh", findings="囊肿。"),
    ]
    test = [_case(6), _case(7, language="zh"), _case(8, organ="kidney"), _case(9, organ="heart")]
    found = {
        task: most_common_answers(*(examples_of(cases, Path(), (task,)) for cases in (train, test)))
        for task in ("report", "vqa")
    }
    assert found["report"] == ["Normal.", "囊肿。", "A stone.", ""]
    assert found["vqa"] == [*["Left.", "9 mm."] * 3, "", ""]


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


def test_a_cases_questions_keep_together_when_images_are_exchanged() -> None:
    examples = examples_of([_case(number) for number in range(6)], Path(), ("vqa",))
    before = {example.case_id: example.images for example in examples}
    after = {(example.case_id, example.images) for example in shuffle_images(examples, seed=1)}
    assert len(after) == 6 and all(images != before[case] for case, images in after)


def _held_out(task: str, *cases: Case) -> HeldOut:
    return HeldOut(task, examples_of(cases, Path(), (task,)), cases)


@pytest.fixture(scope="module")
def metrics() -> TextMetrics:
    return TextMetrics()


def _evaluator(out: Path, **evaluation: object) -> Evaluator:
    config = small_config(evaluation=EvaluationConfig(tasks=("report", "vqa"), **evaluation))
    data = Data(folder=Path(), train=(), test=tuple(_case(number) for number in range(6)), shown=())
    return Evaluator(data, collator(), config, out, Account())


def test_finished_tasks_of_a_model_are_not_answered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(model: object, examples: list[Example], *args: object, label: str, kept: Path) -> list[str]:
        asked.append(label)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [example.answer for example in examples]

    monkeypatch.setattr(evaluation, "answer", answer)
    with pytest.raises(KeyboardInterrupt):
        _evaluator(tmp_path).evaluate_shuffled("mine", None)
    scored = _evaluator(tmp_path).evaluate_shuffled("mine", None)
    name = "mine, images shuffled"
    assert asked == [f"report, {name}", f"vqa, {name}", f"vqa, {name}"]
    kept = _evaluator(tmp_path).evaluate_shuffled("mine", None)
    assert len(asked) == 3 and list(kept.tasks) == ["report", "vqa"]
    for task, found in kept.tasks.items():
        assert found.values() == scored.tasks[task].values() and found.overall["ROUGE-1"].value == pytest.approx(100)


def test_batches_answered_before_a_kill_are_not_answered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(evaluation=EvaluationConfig(batch_size=2, max_new_tokens=6, tasks=("report",)))
    model = build_model(config, tokenizer())
    examples = [example(prompt=prompt) for prompt in ("Describe.", "Say more.", "And?", "What else?", "Why?")]
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "a.png")
    cases = [replace(_case(n), images=("a.png",), findings=f"{n} mm.") for n in range(5)]
    data = Data(folder=tmp_path, train=(), test=tuple(cases), shown=())
    generate, asked = model.generate, []

    def dying(limit: int | None):
        def generate_or_die(**batch):
            if limit is not None and len(asked) == limit:
                raise KeyboardInterrupt
            asked.append(len(batch["input_ids"]))
            return generate(**batch)

        return generate_or_die

    through = answer(model, examples, collator(), config.evaluation, label="")
    monkeypatch.setattr(model, "generate", dying(2))
    with pytest.raises(KeyboardInterrupt):
        answer(model, examples, collator(), config.evaluation, label="", kept=tmp_path / "kept.jsonl")
    monkeypatch.setattr(model, "generate", dying(None))
    assert answer(model, examples, collator(), config.evaluation, label="", kept=tmp_path / "kept.jsonl") == through
    assert asked == [2, 2, 1]

    asked.clear()
    monkeypatch.setattr(model, "generate", dying(1))
    with pytest.raises(KeyboardInterrupt):
        Evaluator(data, collator(), config, tmp_path / "out", Account()).evaluate_shuffled("mine", model)
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["report.0.jsonl"]
    monkeypatch.setattr(model, "generate", dying(None))
    Evaluator(data, collator(), config, tmp_path / "out", Account()).evaluate_shuffled("mine", model)
    assert asked == [2, 2, 1]
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["report.json"]


def test_a_task_that_no_case_has_is_left_out_and_named(tmp_path: Path) -> None:
    data = Data(folder=Path(), train=(_case(1),), test=(replace(_case(2), questions=()),), shown=())
    config = small_config(evaluation=EvaluationConfig(tasks=("report", "vqa")))
    account = Account(tmp_path / "account.json")
    evaluator = Evaluator(data, collator(), config, tmp_path, account)
    with account.step("Baseline"):
        scored = evaluator.evaluate_baseline()
    assert list(scored.tasks) == ["report"] and scored.tasks["report"].answers == ("Normal.",)
    assert account.lines["Baseline"][0] == "vqa: left out, for no held-out case has one"


def test_so_many_questions_of_a_case_are_drawn(tmp_path: Path) -> None:
    one, all_of_them, again = (_evaluator(tmp_path, questions_per_case=number).held_out["vqa"] for number in (1, 9, 1))
    assert [example.case_id for example in one.examples] == [str(number) for number in range(6)]
    assert len({example.prompt for example in one.examples}) == 2, "not the same question of each"
    assert len(all_of_them.examples) == 12 and again.examples == one.examples


def test_a_reports_truth_is_the_cases_attributes_or_else_the_references(metrics: TextMetrics) -> None:
    text = "A 14 mm cyst is seen."
    known = replace(_case(1, findings=text), attributes={"lesion": "cyst", "side": "left"})
    sums = _held_out("report", known, _case(2, findings=text)).sums([text, "A 15 mm cyst is seen."], metrics)
    assert sums["attributes"].tolist() == [[1, 2], [1, 2]]  # lesion of lesion, side; lesion of lesion, size
    assert sums["size"].tolist() == [[0, 0], [1, 1]]


def test_another_tasks_truth_is_what_its_answer_states(metrics: TextMetrics) -> None:
    case = replace(_case(1, organ="thyroid"), attributes={"lesion": "cyst", "side": "right"})
    sums = _held_out("vqa", case).sums(["On the left.", "9 mm"], metrics)
    assert sums["laterality"].tolist() == [[1, 1], [0, 0]] and sums["size"].tolist() == [[0, 0], [1, 1]]


def test_scores_are_by_organ_over_all_and_by_language(metrics: TextMetrics) -> None:
    cases = [_case(1), _case(2), _case(3, organ="heart"), _case(4, organ="heart", language="zh", findings="正常。")]
    held_out = _held_out("report", *cases)
    answers = ["Normal.", "A cyst.", "Normal.", "囊肿。"]
    found = held_out.scores(answers, held_out.sums(answers, metrics))
    of_organs = {organ: scores["ROUGE-1"] for organ, scores in found.by_organ.items()}
    assert of_organs == pytest.approx({"liver": 50, "heart": 50})
    assert found.overall["ROUGE-1"].value == pytest.approx(50)
    assert found.by_language["en"]["ROUGE-1"].value == pytest.approx(75)  # liver 50, heart 100
    assert found.by_language["zh"]["ROUGE-1"].value == 0
    values = found.values()
    assert values["by_organ"]["heart"]["laterality"] is None and values["answers"] == tuple(answers)


def test_tables_have_organs_as_rows_and_metrics_by_model_as_columns(metrics: TextMetrics) -> None:
    cases = [
        replace(_case(number, organ=organ, findings="A cyst of 9 mm is seen."), attributes={"lesion": "cyst"})
        for number, organ in enumerate(["liver", "liver", "breast", "breast"])
    ]
    cases.append(_case(9, language="zh", findings="囊肿"))
    held_out = _held_out("report", *cases)
    right, wrong = [case.findings for case in cases], ["A cyst of 9 mm is seen.", *["Normal."] * 4]
    scored = [
        Scored(name=name, tasks={"report": held_out.scores(answers, held_out.sums(answers, metrics))})
        for name, answers in (("base", wrong), ("stage I", right))
    ]
    head, _, breast, liver, average, *languages = score_table(scored, "report", ["ROUGE-L", "BLEU-1"]).splitlines()
    assert head.split(" | ")[1:] == ["ROUGE-L base", "ROUGE-L stage I", "BLEU-1 base", "BLEU-1 stage I |"]
    assert breast.split(" | ")[1:3] == ["0.0", "**100.0**"] and liver.startswith("| liver | ")
    assert average.split(" | ")[0] == "| **average**" and average.split(" | ")[1:3] == ["16.7", "**100.0**"]
    assert [row.split(" | ")[0] for row in languages] == ["| average, English", "| average, Chinese"]
    assert findings_table(scored, "report").splitlines()[-1] == "| **all** | 20.0 | 100.0 |"
    row = estimate_table(scored, "report", ["ROUGE-L", "laterality"]).splitlines()[-1]
    assert row == "| stage I | 100.0 [100.0, 100.0] | – |"
    differences = held_out.differences(*(scored[i].tasks["report"].sums for i in (1, 0)))
    row = difference_table({"base": differences}, ["ROUGE-L"]).splitlines()[-1]
    assert row.startswith("| against base | +83.3 [+") and " p=0." in row
