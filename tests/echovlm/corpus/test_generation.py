"""Templates, grounding and generation: what is asked, what becomes of it, and a run that is killed on the way."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from echovlm.corpus.llm_server import REPORTS, answer_of, language_model, write_case_file

from examples.echovlm.cases import Case, read_cases
from examples.echovlm.corpus import grounding
from examples.echovlm.corpus.__main__ import main
from examples.echovlm.corpus.client import ServerError
from examples.echovlm.corpus.generation import ANSWERS, Choice, generate
from examples.echovlm.corpus.instances import (
    DIMENSIONS,
    INSTANCES,
    InstanceError,
    attach,
    read_instances,
    write_instances,
)
from examples.echovlm.corpus.manifest import DROPPED, MANIFEST
from examples.echovlm.corpus.prompts import (
    PARTS,
    STYLES,
    answer_model,
    example_answer,
    messages,
    organs,
    parse,
    read_template,
)
from examples.echovlm.phantom.attributes import ORGANS
from examples.echovlm.tasks import examples_of

TEMPLATES = [(organ, style, language) for organ in ORGANS for style in STYLES for language in ("en", "zh")]
OPEN, CLOSED = Choice(kinds=("open",)), Choice(kinds=("closed",))


@pytest.fixture
def model():
    with language_model() as served:
        yield served


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_there_are_21_templates():
    assert organs() == ORGANS and len(TEMPLATES) == 42
    texts = [read_template(organ)[style]["guide"][language] for organ, style, language in TEMPLATES]
    assert len(set(texts)) == 42


@pytest.mark.parametrize(("organ", "style", "language"), TEMPLATES)
def test_a_template_holds_all_and_its_example_passes_our_own_checks(organ, style, language):
    example = read_template(organ)[style]["examples"][language]
    assert tuple(example["open"]) == PARTS and set(example["closed"]) < set(DIMENSIONS) and example["closed"]
    for kind in ("open", "closed"):
        parse(answer_model(kind, PARTS), json.dumps(example_answer(example, kind, PARTS)))
    report = f"{example['findings']}\n{example['impression']}"
    for question, quote in example["closed"].values():
        answer, fault = grounding.quoted(report, quote, language)
        assert (answer, fault, grounding.question_fault(question, answer, report)) == (quote, "", "")
    for text in [report, *(text for pair in example["open"].values() for text in pair)]:
        assert bool(re.search("[\u4e00-\u9fff]", text)) == (language == "zh")


@pytest.mark.parametrize("kind", ["open", "closed"])
@pytest.mark.parametrize(("organ", "style", "language"), TEMPLATES[::5])
def test_the_messages_hold_guide_example_and_report(organ, style, language, kind):
    findings, impression = REPORTS[language]
    case = Case(
        id="a", patient="p", hospital="", organ=organ, language=language, images=("a.png",), findings=findings,
        impression=impression, split="train",
    )  # fmt: skip
    system, report, answer, asked = messages(case, f"{organ}/{style}", kind, notes=["too long"])
    template = read_template(organ)[style]
    assert [message["role"] for message in (system, report, answer, asked)] == ["system", "user", "assistant", "user"]
    assert template["guide"][language] in system["content"] and "too long" in system["content"]
    assert "{" not in system["content"] and template["examples"][language]["findings"] in report["content"]
    assert findings in asked["content"] and impression in asked["content"]
    parse(answer_model(kind, PARTS), answer["content"])


REPORT = "No cyst is seen in the right lobe; flow is absent. A 14 mm nodule, 1.5 cm deep. Plaque is not seen."
REPORT_ZH = "右叶未见囊肿\uff0c左叶见14mm圆形结节。血流信号消失。"


@pytest.mark.parametrize(
    ("quote", "expected"),
    [
        ("A 14 mm nodule", "A 14 mm nodule"),
        ("a  14 MM\nnodule", "A 14 mm nodule"),  # the report's own letters and spaces
        ("No cyst is seen in the right lobe", "No cyst is seen in the right lobe"),
        ("cyst is seen in the right lobe", grounding.DENIAL_LOST),
        ("flow", grounding.DENIAL_LOST),
        ("flow is absent", "flow is absent"),
        ("Plaque", grounding.DENIAL_LOST),
        ("4 mm nodule", grounding.NOT_QUOTED),
        ("5 cm deep", grounding.NOT_QUOTED),
        (".5 cm deep", grounding.NOT_QUOTED),
        ("A 14 mm nod", grounding.NOT_QUOTED),
        ("A 15 mm nodule", grounding.NOT_QUOTED),
        (" ", grounding.NOT_SAID),
    ],
)
def test_a_quote_is_the_reports_or_nothing(quote, expected):
    answer, fault = grounding.quoted(REPORT, quote, "en")
    assert expected == (answer or fault) and bool(answer) != bool(fault)


@pytest.mark.parametrize(
    ("quote", "expected"),
    [
        ("左叶见14mm圆形结节", "左叶见14mm圆形结节"),
        ("右叶未见囊肿", "右叶未见囊肿"),
        ("圆形结节", "圆形结节"),
        ("囊肿", grounding.DENIAL_LOST),
        ("血流信号", grounding.DENIAL_LOST),
        ("4mm圆形结节", grounding.NOT_QUOTED),
        ("右叶囊肿", grounding.NOT_QUOTED),
    ],
)
def test_a_chinese_quote(quote, expected):
    assert expected in grounding.quoted(REPORT_ZH, quote, "zh")


@pytest.mark.parametrize(
    ("question", "fault"),
    [
        ("How large is the nodule?", ""),
        ("What is 14 MM large?", ""),
        ("What is 16 mm large?", grounding.INVENTED),
        ("Is it a 14 mm  Nodule?", grounding.GIVEN_AWAY),
        ("", grounding.EMPTY),
    ],
)
def test_a_closed_question(question, fault):
    assert grounding.question_fault(question, "14 mm nodule.", REPORT) == fault


def test_open_and_closed_instances_and_a_manifest_that_adds_up(model, tmp_path):
    cases = write_case_file(tmp_path / "cases", [*ORGANS, "spleen", "liver"])
    rows = lines(cases)
    rows[-1] |= {"findings": "", "impression": "", "split": "show"}
    rows[1]["impression"] = ""
    cases.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    generate(cases, out, model.server())
    instances, manifest = read_instances(out / INSTANCES), json.loads((out / MANIFEST).read_text())
    # 7 cases of 7 parts, one of them without its diagnosis, open and closed; a closed one says nothing of surveillance
    assert Counter(item.kind for item in instances) == {"open": 7 * 7 - 1, "closed": 6 * 7 - 1}
    dropped = {"no template for the organ": 1, "no report": 1, grounding.NOT_SAID: 7}
    assert manifest["dropped"] == dropped and manifest["given"] == 98 == manifest["kept"] + 9
    assert len(lines(out / DROPPED)) == 9
    by_id = {case.id: case for case in read_cases(cases)}
    for item in instances:
        case = by_id[item.case]
        organ, style = item.template.split("/")
        assert (organ, item.organ, item.language) == (case.organ, case.organ, case.language) and style in STYLES
        assert item.model == "m-as-served" and len(item.prompt) == 32 and item.id.startswith(f"{case.id}:")
        assert (item.component == "question answering") == bool(item.dimension)
        if item.kind == "closed":
            source = {"description": case.findings, "diagnosis": case.impression}.get(item.component)
            assert item.answer == source or (source is None and item.answer in f"{case.findings}\n{case.impression}")
    asked = {body["seed"] for body in model.bodies}
    assert {item.seed for item in instances} == asked and len(asked) == len(model.bodies) == 14
    assert {item.dimension for item in instances if item.kind == "open"} == {"", *DIMENSIONS}


def test_a_model_that_makes_up_its_quotes_gets_none_into_the_corpus(model, tmp_path):
    def invents(body, asked):
        answer = json.loads(answer_of(body))
        for part in DIMENSIONS:
            answer[part.replace(" ", "_")]["quote"] = "a cyst is seen in the right lobe"
        return json.dumps(answer)

    model.behave = invents
    manifest = generate(write_case_file(tmp_path / "c", ["liver"]), tmp_path / "out", model.server(), CLOSED)
    assert manifest.kept == 2 and manifest.dropped == {grounding.NOT_QUOTED: 5}
    drop = lines(tmp_path / "out" / DROPPED)[0]
    assert drop["model"] == "m-as-served" and drop["template"].startswith("liver/") and drop["prompt"] and drop["seed"]


def test_nonsense_is_asked_for_with_another_seed_and_the_instance_says_which(model, tmp_path):
    model.behave = lambda body, asked: "nonsense" if len(model.bodies) == 1 else "answer"
    assert generate(write_case_file(tmp_path / "c", ["liver"]), tmp_path / "out", model.server(), OPEN).kept == 7
    first, second = (body["seed"] for body in model.bodies)
    assert {item.seed for item in read_instances(tmp_path / "out" / INSTANCES)} == {second} != {first}


def test_templates_are_drawn_evenly_and_by_the_seed(model, tmp_path):
    cases = write_case_file(tmp_path / "c", ["vessel"] * 18)
    generate(cases, tmp_path / "a", model.server(), OPEN)
    generate(cases, tmp_path / "b", model.server(), Choice(kinds=("open",), seed=1))
    two = write_case_file(tmp_path / "two", ["vessel"] * 2)
    generate(two, tmp_path / "all", model.server(), Choice(kinds=("open",), templates=3))
    styles = Counter(item.template for item in read_instances(tmp_path / "a" / INSTANCES))
    assert len(styles) == 3 and min(styles.values()) >= 3 * 7
    assert (tmp_path / "a" / INSTANCES).read_bytes() != (tmp_path / "b" / INSTANCES).read_bytes()
    assert len(read_instances(tmp_path / "all" / INSTANCES)) == 2 * 3 * 7


def test_frames_are_sent_when_asked_for(model, tmp_path):
    cases = write_case_file(tmp_path / "c", ["liver"])
    generate(cases, tmp_path / "out", model.server(), Choice(kinds=("open",), frames=1))
    picture, text = model.bodies[0]["messages"][-1]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR") and REPORTS["en"][0] in text["text"]


def test_again_is_another_round_with_the_experts_notes(model, tmp_path):
    cases = write_case_file(tmp_path / "c", ["liver", "heart"])
    source = dict(case="c0", template="liver/report", kind="open", round=0, notes=["wrong side"])
    (tmp_path / "again.jsonl").write_text(json.dumps(source) + "\n")
    generate(cases, tmp_path / "out", model.server(), again=tmp_path / "again.jsonl")
    instances = read_instances(tmp_path / "out" / INSTANCES)
    assert {(item.case, item.template, item.kind, item.round) for item in instances} == {
        ("c0", "liver/report", "open", 1)
    }
    assert "wrong side" in model.bodies[0]["messages"][0]["content"] and len(model.bodies) == 1
    with pytest.raises(InstanceError, match="no such file"):
        generate(cases, tmp_path / "out", model.server(), again=tmp_path / "none.jsonl")
    (tmp_path / "again.jsonl").write_text("{}\n")
    with pytest.raises(InstanceError, match=r"again\.jsonl:1"):
        generate(cases, tmp_path / "out", model.server(), again=tmp_path / "again.jsonl")


def test_a_failing_server_is_told_and_what_it_answered_is_kept(model, tmp_path):
    cases = write_case_file(tmp_path / "c", ["liver", "heart"])
    model.behave = lambda body, asked: "answer" if "心脏" in str(body) else (500, {"retry-after-ms": "1"})
    with pytest.raises(ServerError, match=r"1 requests were left unanswered.*HTTP 500.*the same command"):
        generate(cases, tmp_path / "out", model.server(retries=1), OPEN)
    assert {item.case for item in read_instances(tmp_path / "out" / INSTANCES)} == {"c1"}
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["dropped"] == {"unanswered": 7}
    model.behave = lambda body, asked: "answer"
    assert generate(cases, tmp_path / "out", model.server(), OPEN).kept == 14


def test_a_context_too_small_for_every_prompt_ends_the_command_with_the_servers_words(model, tmp_path, capsys):
    said = "request (1009 tokens) exceeds the available context size (512 tokens), try increasing it"
    model.behave = lambda body, asked: (400, {}, said)
    cases = write_case_file(tmp_path / "c", list(ORGANS) * 3)
    command = ["generate", str(cases), "--out", str(tmp_path / "out"), "--base-url", model.server().base_url]
    for run in range(1, 3):
        assert main([*command, "--model", "m", "--concurrency", "1"]) == 2
        assert said in capsys.readouterr().err and len(model.asked) == 42 * run
    model.behave = lambda body, asked: "answer"
    assert main([*command, "--model", "m"]) == 0 and len(model.asked) == 84 + 42


def test_killed_and_resumed_nothing_answered_is_asked_twice(model, tmp_path, capsys):
    """kill -9 with answers on the disk and others on the way; then the same command, to the end."""
    cases, out = write_case_file(tmp_path / "c", list(ORGANS) * 2), tmp_path / "out"
    command = [
        "generate",
        str(cases.parent),
        "--base-url",
        model.server().base_url,
        "--model",
        "m",
        "--concurrency",
        "4",
    ]
    order = itertools.count()
    model.behave = lambda body, asked: "answer" if next(order) < 9 else "stall"
    process = subprocess.Popen(
        [sys.executable, "-m", "examples.echovlm.corpus", *command, "--out", str(out)],
        cwd=Path(__file__).parents[3], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while (len(model.answered), len(model.asked)) != (9, 13) or (out / ANSWERS).read_bytes().count(b"\n") < 9:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    answered, before = set(model.answered), len(model.asked)
    assert not (out / INSTANCES).exists()
    with (out / ANSWERS).open("ab") as file:
        file.write(b'{"key": "0123", "te')  # as a kill within a write leaves it
    model.behave = lambda body, asked: "answer"
    assert main([*command, "--out", str(out)]) == 0
    assert not answered & set(model.asked[before:]) and len(set(model.asked)) == 28
    assert Counter(model.answered) == dict.fromkeys(model.asked, 1)
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert (out / INSTANCES).read_bytes() == (tmp_path / "whole" / INSTANCES).read_bytes()
    assert "kept" in capsys.readouterr().out


def test_the_instances_become_the_recipes_questions(model, tmp_path, capsys):
    cases = write_case_file(tmp_path / "c", ["liver", "heart"])
    generate(cases, tmp_path / "out", model.server())
    target = tmp_path / "c" / "with-questions.jsonl"
    command = ["attach", str(tmp_path / "out"), "--cases", str(cases.parent)]
    assert main([*command, "--out", str(target)]) == 0
    instances = read_instances(tmp_path / "out" / INSTANCES)
    assert f"{len(instances)} questions added to 2 cases" in capsys.readouterr().out
    examples = examples_of(read_cases(target), target.parent, ["vqa"])
    assert [(e.case_id, e.prompt, e.answer) for e in examples] == [(i.case, i.question, i.answer) for i in instances]
    once = attach(attach(read_cases(cases), instances), instances)
    assert once == read_cases(target)
    assert main([*command, "--out", str(tmp_path / "elsewhere.jsonl")]) == 2
    assert "where the images' paths begin" in capsys.readouterr().err


def test_a_file_of_instances_is_read_with_suspicion(model, tmp_path):
    generate(write_case_file(tmp_path / "c", ["liver"]), tmp_path, model.server(), OPEN)
    path = tmp_path / INSTANCES
    instances = read_instances(path)
    assert read_instances(write_instances(tmp_path / "copy.jsonl", instances)) == instances
    with pytest.raises(InstanceError, match=r"copy\.jsonl:1.*again"):
        read_instances(path, tmp_path / "copy.jsonl")
    rows = lines(path)
    for change, said in [({"kind": "shut"}, "'kind'"), ({"seed": "1"}, "'seed'"), ({"colour": "red"}, "'colour'")]:
        path.write_text("\n" + json.dumps(rows[0] | change) + "\n")
        with pytest.raises(InstanceError, match=rf"instances\.jsonl:2: field {said}"):
            read_instances(path)
    with pytest.raises(InstanceError, match="case 'c0' is not in the case file"):
        attach([], instances)
