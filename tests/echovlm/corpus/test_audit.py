"""The audit trail: the text found for an instance is what the server received, whatever became of the run."""

from __future__ import annotations

import hashlib
import json

import pytest
from echovlm.corpus.llm_server import answer_of, language_model, write_case_file

from examples.echovlm.corpus.__main__ import main
from examples.echovlm.corpus.audit import NOT_HERE, NOT_NAMED, TEXT_LOST, told, trail
from examples.echovlm.corpus.generation import ANSWERS, Choice, generate
from examples.echovlm.corpus.instances import INSTANCES, InstanceError, read_instances
from examples.echovlm.corpus.judging import VERDICTS, judge
from examples.echovlm.corpus.manifest import DROPPED
from examples.echovlm.corpus.review import Draw, Review


@pytest.fixture
def model():
    with language_model() as served:
        yield served


@pytest.fixture
def cases(tmp_path):
    return write_case_file(tmp_path / "c", ["liver", "heart", "vessel"])


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def received(model, seed):
    """The one request with this seed, as the server's log has it."""
    (body,) = [body for body in model.bodies if body["seed"] == seed]
    return body


def test_the_text_of_an_instance_is_what_the_server_received(model, cases, tmp_path):
    """Eight requests at once, each of which is answered well at its second attempt, with another seed."""
    seen = set()

    def behave(body, asked):
        text = json.dumps(body["messages"])
        known = text in seen or seen.add(text)
        return "answer" if known else "no JSON"

    model.behave = behave
    generate(cases, tmp_path / "out", model.server())
    items = read_instances(tmp_path / "out" / INSTANCES)
    assert len({item.prompt for item in items}) == 6 and len(model.bodies) == 12
    for item in items:
        found, body = trail([tmp_path / "out"], item.id)["asked"]["generate"], received(model, item.seed)
        assert found["messages"] == body["messages"] and found["seed"] == item.seed
        assert (found["model"], found["key"], found["text"]) == (item.model, item.prompt, answer_of(body))
    assert {row["seed"] for row in rows(tmp_path / "out" / ANSWERS)} == {body["seed"] for body in model.bodies}


def test_of_a_frame_its_name_and_hash_are_kept(model, cases, tmp_path):
    generate(cases, tmp_path / "out", model.server(), Choice(kinds=("open",), frames=2))
    assert b"base64" not in (tmp_path / "out" / ANSWERS).read_bytes()
    for item in read_instances(tmp_path / "out" / INSTANCES):
        *others, asked = trail([tmp_path / "out"], item.id)["asked"]["generate"]["messages"]
        *others_sent, sent = received(model, item.seed)["messages"]
        names = [f"{item.case[1:]}-{frame}.png" for frame in range(2)]
        hashes = [hashlib.sha256((cases.parent / name).read_bytes()).hexdigest() for name in names]
        frames = [{"type": "frame", "name": n, "sha256": h} for n, h in zip(names, hashes, strict=True)]
        assert asked == {"role": "user", "content": [*frames, sent["content"][-1]]} and others == others_sent


def test_a_run_that_goes_on_has_the_texts_of_both_runs(model, cases, tmp_path):
    generate(cases, tmp_path / "out", model.server(max_requests=2))
    generate(cases, tmp_path / "out", model.server())
    assert len(model.bodies) == 6
    for item in read_instances(tmp_path / "out" / INSTANCES):
        found = trail([tmp_path / "out"], item.id)["asked"]["generate"]
        assert found["messages"] == received(model, item.seed)["messages"]


def test_a_journal_without_texts_is_read_as_before(model, cases, tmp_path):
    out = tmp_path / "out"
    generate(cases, out, model.server())
    before, asked = (out / INSTANCES).read_bytes(), len(model.asked)
    old = [{n: v for n, v in row.items() if n not in ("messages", "seed")} for row in rows(out / ANSWERS)]
    (out / ANSWERS).write_text("".join(json.dumps(row) + "\n" for row in old))
    generate(cases, out, model.server())
    assert (out / INSTANCES).read_bytes() == before and len(model.asked) == asked
    known = trail([out], read_instances(out / INSTANCES)[0].id)
    answer = known["asked"]["generate"]
    assert "messages" not in answer and TEXT_LOST in told(known) and answer["text"] in told(known)


def test_of_what_was_dropped_as_not_valid_the_last_attempt_is_shown(model, cases, tmp_path):
    model.behave = lambda body, asked: f"no JSON by {body['seed']}"
    generate(cases, tmp_path / "out", model.server())
    drops = rows(tmp_path / "out" / DROPPED)
    assert {drop["reason"] for drop in drops} == {"no valid answer"} and len(model.bodies) == 3 * 6
    assert len({drop["prompt"] for drop in drops}) == 6
    for drop in drops:
        known, body = trail([tmp_path / "out"], drop["id"]), received(model, drop["seed"])
        sources = [seed for seed in (b["seed"] for b in model.bodies if b["messages"] == body["messages"])]
        assert known["asked"]["generate"]["messages"] == body["messages"] and sources[-1] == drop["seed"]
        assert body["messages"][-1]["content"] in told(known)
        assert told(known).endswith(f"what m-as-served answered\nno JSON by {drop['seed']}")
    assert (drops[0]["model"], drops[0]["template"].split("/")[0]) == ("m-as-served", "liver")


def test_of_what_was_dropped_without_a_verdict_the_judges_last_answer_is_shown(model, cases, tmp_path):
    folders = [tmp_path / name for name in ("generated", "judged")]
    generate(cases, folders[0], model.server(), Choice(kinds=("open",)))
    model.behave = lambda body, asked: f"well, by {body['seed']}"
    judge([folders[0] / INSTANCES], cases, folders[1], model.server(model="j", attempts=2))
    drops = rows(folders[1] / DROPPED)
    assert len(drops) == 3 * 7 and "Invalid JSON" in drops[0]["detail"]
    for drop in drops:
        known, seed = trail(folders, drop["id"]), drop["judge"]["seed"]
        assert known["asked"]["judge"]["messages"] == received(model, seed)["messages"]
        assert known["asked"]["generate"]["messages"] == received(model, known["seed"])["messages"]
        assert told(known).endswith(f"what j-as-served answered\nwell, by {seed}")


def test_a_drop_from_before_says_that_its_text_was_not_kept_until_the_step_is_run_again(model, cases, tmp_path):
    folders = [tmp_path / name for name in ("generated", "judged")]
    model.behave = lambda body, asked: "no JSON" if '"quote"' in answer_of(body) or body["model"] == "j" else "answer"

    def both():
        generate(cases, folders[0], model.server())
        judge([folders[0] / INSTANCES], cases, folders[1], model.server(model="j"))

    both()
    files = [folder / name for folder in folders for name in (DROPPED, INSTANCES)]
    before, asked = [file.read_bytes() for file in files], len(model.asked)
    ids = {}
    for folder, step in zip(folders, ("generate", "judge"), strict=True):
        ids[step] = next(row["id"] for row in rows(folder / DROPPED) if row["reason"] == "no valid answer")
        old = [{name: row[name] for name in ("id", "reason")} for row in rows(folder / DROPPED)]
        (folder / DROPPED).write_text("".join(json.dumps(row) + "\n" for row in old))
    for step, id in ids.items():
        known = trail(folders, id)
        assert f"--- {step}: what was sent is {NOT_NAMED}" in told(known) and known["asked"][step] is None
    assert trail(folders, ids["judge"])["asked"]["generate"]["messages"]
    both()
    assert [file.read_bytes() for file in files] == before and len(model.asked) == asked
    assert all("no JSON" in told(trail(folders, id)) for id in ids.values())


def test_the_judges_text_and_what_experts_decided(model, cases, tmp_path, capsys):
    folders = [tmp_path / name for name in ("generated", "judged", "reviewed")]
    generate(cases, folders[0], model.server())
    low = {"reason": "r", "faithfulness": 5, "relevance": 5, "safety": 1, "clarity": 5}
    model.behave = lambda body, asked: json.dumps(low) if ".diagnosis" in str(body) else "answer"
    judge([folders[0] / INSTANCES], cases, folders[1], model.server(model="j"))
    items = read_instances(folders[1] / INSTANCES)
    opened, closed = (next(item for item in items if item.kind == kind) for kind in ("open", "closed"))
    with Review([folders[1] / INSTANCES], cases, folders[2], Draw(share=1)) as review:
        review.decide(opened.id, "correct", "r2", question="better?", answer="better")
        assert trail(folders, opened.id)["review"]["reviewer"] == "r2"  # while the review goes on
        for item in items:
            if item.id != opened.id:
                review.decide(item.id, "reject" if item.id == closed.id else "accept", "r1", note="side")
        review.close(allowed=1)
    assert main(["audit", *map(str, folders), "--id", opened.id, closed.id]) == 0
    first, second = capsys.readouterr().out.split("\n\nid: ")
    asked = [received(model, seed)["messages"] for seed in (opened.seed, opened.judge["seed"], closed.seed)]
    for text, messages in [(first, asked[0]), (first, asked[1]), (second, asked[2])]:
        assert all(f"[{message['role']}]\n{message['content']}\n" in text for message in messages)
    for said in ("model: m-as-served", opened.prompt, f"seed: {opened.seed}", '"reviewer": "r2"', "answer: better"):
        assert said in first
    assert f"dropped: rejected ({folders[2]})" in second and '"reviewer": "r1"' in second and "judge:" not in second
    dropped = rows(folders[1] / DROPPED)[0]
    found = trail(folders, dropped["id"])
    assert found["dropped"].startswith("low safety")
    assert found["asked"]["judge"]["messages"] == received(model, dropped["judge"]["seed"])["messages"]


def test_what_is_not_there_is_said(model, cases, tmp_path, capsys):
    generate(cases, tmp_path / "out", model.server())
    (tmp_path / "out" / ANSWERS).rename(tmp_path / VERDICTS)
    id = read_instances(tmp_path / "out" / INSTANCES)[0].id
    assert NOT_HERE in told(trail([tmp_path / "out"], id))
    with pytest.raises(InstanceError, match="'x': in none of"):
        trail([tmp_path / "out"], "x")
    assert main(["audit", str(tmp_path / "out"), "--id", "x"]) == 2 and "expected the steps'" in capsys.readouterr().err
