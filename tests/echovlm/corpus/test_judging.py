"""The judge: who is asked, who passes, and what the audit trail says of it."""

from __future__ import annotations

import json

import pytest
from echovlm.corpus.llm_server import REPORTS, answer_of, language_model, write_case_file

from examples.echovlm.corpus.__main__ import main
from examples.echovlm.corpus.generation import generate
from examples.echovlm.corpus.instances import INSTANCES, InstanceError, read_instances
from examples.echovlm.corpus.judging import CRITERIA, judge
from examples.echovlm.corpus.manifest import DROPPED, MANIFEST
from examples.echovlm.corpus.prompts import read_template


@pytest.fixture
def model():
    with language_model() as served:
        yield served


@pytest.fixture
def generated(model, tmp_path):
    """Two cases, 14 open-ended and 12 closed-ended instances."""
    cases = write_case_file(tmp_path / "c", ["liver", "heart"])
    generate(cases, tmp_path / "generated", model.server())
    return tmp_path / "generated" / INSTANCES, cases


def scores(**low: int):
    return lambda body: json.dumps(json.loads(answer_of(body)) | low)


def test_open_ended_instances_that_pass_are_kept_with_their_verdict(model, generated, tmp_path):
    instances, cases = generated
    before = len(model.asked)
    model.behave = lambda body, asked: scores(safety=3, clarity=1)(body) if ".diagnosis" in str(body) else "answer"
    manifest = judge([instances], cases, tmp_path / "judged", model.server(model="judge", temperature=0.0))
    assert (manifest.given, manifest.kept, manifest.dropped) == (26, 24, {"low safety": 2})
    assert manifest.more["judged"] == 14 == len(model.asked) - before
    kept = read_instances(tmp_path / "judged" / INSTANCES)
    for item in kept:
        if item.kind == "closed":
            assert item.judge == {}
        else:
            assert [item.judge[name] for name in CRITERIA] == [5, 5, 5, 5]
            assert item.judge["model"] == "judge-as-served" and item.judge["reason"] and item.model == "m-as-served"
            assert len(item.judge["prompt"]) == 32 and item.judge["seed"] != item.seed
    drops = [json.loads(line) for line in (tmp_path / "judged" / DROPPED).read_text().splitlines()]
    assert [drop["judge"]["safety"] for drop in drops] == [3, 3]
    written = json.loads((tmp_path / "judged" / MANIFEST).read_text())
    assert (written["kept"], written["settings"]["server"]["model"]) == (24, "judge")


def test_the_judge_sees_rubric_report_question_and_answer(model, generated, tmp_path):
    instances, cases = generated
    judge([instances], cases, tmp_path / "judged", model.server(model="judge"))
    bodies = [body for body in model.bodies if body["model"] == "judge"]
    opens = [item for item in read_instances(instances) if item.kind == "open"]
    for item in opens:
        (body,) = [body for body in bodies if item.answer in body["messages"][1]["content"]]
        system, user = (message["content"] for message in body["messages"])
        assert system == read_template("judge")[item.language]["system"].strip()
        assert item.question in user and all(text in user for text in REPORTS[item.language]) and "{" not in user
    for language in ("en", "zh"):
        assert all(name in read_template("judge")[language]["system"] for name in CRITERIA)


@pytest.mark.parametrize(("threshold", "kept"), [(4, 12), (3, 26)])
def test_the_threshold(model, generated, tmp_path, threshold, kept):
    instances, cases = generated
    model.behave = lambda body, asked: scores(relevance=3)(body)
    assert judge([instances], cases, tmp_path / "judged", model.server(), threshold=threshold).kept == kept


def test_a_score_out_of_range_is_no_verdict_and_answers_are_kept_for_the_next_run(model, generated, tmp_path, capsys):
    instances, cases = generated
    model.behave = lambda body, asked: scores(clarity=6)(body)
    command = ["judge", str(instances), "--cases", str(cases), "--out", str(tmp_path / "judged"), "--model", "j"]
    command += ["--base-url", model.server().base_url, "--attempts", "2", "--max-requests", "27"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "26 given, 12 kept" in told and "13 no valid answer, 1 unanswered" in told and "budget is spent" in told
    asked = len(model.asked)
    assert main(command) == 0 and len(model.asked) == asked


def test_an_instance_without_its_case(model, generated, tmp_path):
    instances, _ = generated
    other = write_case_file(tmp_path / "other", ["liver"])
    with pytest.raises(InstanceError, match=r"case 'c1' is not in .*other"):
        judge([instances], other, tmp_path / "judged", model.server())
