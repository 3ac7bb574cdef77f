"""The expert review: which batches are drawn, what a decision does, and the page in a real browser."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections import Counter
from pathlib import Path

import pytest
from echovlm.corpus.llm_server import REPORTS, language_model, write_case_file

from examples.echovlm.corpus.__main__ import main
from examples.echovlm.corpus.generation import generate
from examples.echovlm.corpus.instances import INSTANCES, Instance, InstanceError, read_instances, write_instances
from examples.echovlm.corpus.manifest import DROPPED
from examples.echovlm.corpus.review import AGAIN, DECIDED, Draw, Review, ReviewError
from examples.echovlm.corpus.review_server import make_server

EVIL = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"


def instance(number: int, **fields: object) -> Instance:
    """The open-ended instance of this number: seven to a case, one source a case."""
    case = number // 7
    known = dict(id=f"i{number}", case=f"c{case}", organ="liver", language=("en", "zh")[case % 2], kind="open")
    known |= dict(component="description", question=f"q{number}", answer=f"a{number}", model="m", seed=number)
    return Instance(**(known | dict(template="liver/report", prompt=f"h{case}") | fields))


@pytest.fixture
def files(tmp_path):
    """60 instances of nine cases, and the case file."""
    cases = write_case_file(tmp_path / "c", ["liver"] * 9)
    return [write_instances(tmp_path / "instances.jsonl", map(instance, range(60)))], cases


@pytest.fixture
def review(files, tmp_path):
    """Two of six batches drawn."""
    with Review(*files, tmp_path / "review", Draw(share=1 / 3, seed=5)) as begun:
        yield begun


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("instances", "drawn"), [(1, 1), (200, 1), (201, 2), (400, 2), (10_000, 50)])
def test_five_per_cent_of_the_batches_are_drawn(instances, drawn):
    got = Draw().batches(instances)
    assert len(set(got)) == drawn and got == sorted(got) and max(got) < -(-instances // 10)
    assert got == Draw().batches(instances)


def test_batches_are_drawn_evenly_by_the_seed():
    times = Counter(batch for seed in range(2000) for batch in Draw(seed=seed).batches(400))
    assert len(times) == 40 and min(times.values()) > 60 and max(times.values()) < 145  # 100 ± 4.5 sigma


def test_a_batch_is_ten_in_a_row(review, files):
    instances = read_instances(*files[0])
    batches = Draw(share=1 / 3, seed=5).batches(60)
    assert review.drawn == [instances[10 * batch + n] for batch in batches for n in range(10)]
    assert {review.batch_of[item.id] for item in review.drawn} == set(batches)


def test_a_review_that_passes(review, tmp_path):
    first, second, *others = review.drawn
    for item in [first, *others]:
        review.decide(item.id, "accept", "r1")
    review.decide(second.id, "correct", "r2", question="better?", answer="better", note="style")
    manifest = review.close()
    assert (manifest.given, manifest.kept, manifest.more["failed"]) == (60, 60, [])
    assert manifest.more["decisions"] == {"accept": 19, "correct": 1}
    after = {item.id: item for item in read_instances(tmp_path / "review" / INSTANCES)}
    corrected = after[second.id]
    assert (corrected.question, corrected.answer) == ("better?", "better")
    assert corrected.review["before"] == {"question": second.question, "answer": second.answer}
    assert corrected.review["reviewer"] == "r2" and corrected.review["note"] == "style" and corrected.review["time"]
    assert after[first.id].review["decision"] == "accept" and after[first.id].answer == first.answer
    unread = [item for item in after.values() if not item.review["drawn"]]
    assert len(unread) == 40 and all("reviewer" not in item.review for item in unread)
    assert (tmp_path / "review" / AGAIN).read_text() == ""


def test_a_failed_batch_takes_its_sources_with_it(review, files, tmp_path):
    """One rejection fails its batch of ten: all instances of the cases in it go, and come again with the note."""
    bad, *others = review.drawn
    for item in others:
        review.decide(item.id, "accept", "r1")
    with pytest.raises(ReviewError, match="1 of 20 drawn instances are undecided"):
        review.close()
    review.decide(bad.id, "reject", "r1", note="the cyst is on the right")
    manifest = review.close()
    batch = review.batch_of[bad.id]
    assert manifest.more["failed"] == [batch] and manifest.more["rejected"]["template"] == {"liver/report": 1}
    cases = {f"c{number // 7}" for number in range(10 * batch, 10 * batch + 10)}
    gone = {item.id for item in read_instances(*files[0]) if item.case in cases}
    assert len(gone) > 10 and {drop["id"] for drop in rows(tmp_path / "review" / DROPPED)} == gone
    assert manifest.dropped == {"its batch failed the review": len(gone) - 1, "rejected": 1}
    assert {item.id for item in read_instances(tmp_path / "review" / INSTANCES)}.isdisjoint(gone)
    again = rows(tmp_path / "review" / AGAIN)
    assert {row["case"] for row in again} == cases
    notes = {row["case"]: (row["notes"], row["rejected"]) for row in again}
    assert notes.pop(bad.case) == (["the cyst is on the right"], [bad.id])
    assert set(map(str, notes.values())) == {"([], [])"}
    drop = next(drop for drop in rows(tmp_path / "review" / DROPPED) if drop["id"] == bad.id)
    assert (drop["model"], drop["prompt"], drop["seed"], drop["review"]["reviewer"]) == (
        "m",
        bad.prompt,
        bad.seed,
        "r1",
    )
    assert review.close(allowed=1).dropped == {"rejected": 1}
    with language_model() as model:
        kept = generate(files[1], tmp_path / "anew", model.server(), again=tmp_path / "review" / AGAIN).kept
    assert kept == 0  # the close above has left nothing to do again


def test_what_failed_is_generated_again(review, files, tmp_path):
    for item in review.drawn:
        review.decide(item.id, "reject", "r1", note="no")
    review.close()
    with language_model() as model:
        generate(files[1], tmp_path / "anew", model.server(), again=tmp_path / "review" / AGAIN)
        asked = [body["messages"][0]["content"] for body in model.bodies]
    anew = read_instances(tmp_path / "anew" / INSTANCES)
    assert {item.case for item in anew} == {row["case"] for row in rows(tmp_path / "review" / AGAIN)}
    assert {item.round for item in anew} == {1} and all("- no" in text for text in asked)
    assert {item.id for item in anew}.isdisjoint(item.id for item in read_instances(tmp_path / "review" / INSTANCES))


def test_decisions_outlive_the_process_and_the_last_counts(review, files, tmp_path):
    item = review.drawn[0]
    review.decide(item.id, "reject", "r1")
    review.decide(item.id, "accept", "r2")
    review.journal.__exit__()
    with Review(*files, tmp_path / "review", Draw(share=1 / 3, seed=5)) as later:
        assert later.journal.get(item.id)["reviewer"] == "r2"
    assert [row["decision"] for row in rows(tmp_path / "review" / DECIDED)] == ["reject", "accept"]
    with pytest.raises(ReviewError, match=r"begun otherwise \(seed\)"):
        Review(*files, tmp_path / "review", Draw(share=1 / 3, seed=6))
    write_instances(files[0][0], map(instance, range(59)))
    with pytest.raises(ReviewError, match=r"begun otherwise \(instances\)"):
        Review(*files, tmp_path / "review", Draw(share=1 / 3, seed=5))


def test_decisions_that_cannot_be_taken(review):
    item = review.drawn[0]
    drawn = {each.id for each in review.drawn}
    other = next(f"i{n}" for n in range(60) if f"i{n}" not in drawn)
    for id, decision, reviewer in [(other, "accept", "r"), (item.id, "maybe", "r"), (item.id, "accept", " ")]:
        with pytest.raises(ReviewError, match="expected one of accept, correct, reject"):
            review.decide(id, decision, reviewer)
    for question, answer in [("", "x"), ("x", " "), (item.question, item.answer)]:
        with pytest.raises(ReviewError, match="a correction needs"):
            review.decide(item.id, "correct", "r", question=question, answer=answer)
    assert len(review.journal) == 0


def test_a_review_of_nothing_or_of_other_cases(files, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ReviewError, match="got no instances"):
        Review([tmp_path / "none.jsonl"], files[1], tmp_path / "r")
    with pytest.raises(InstanceError, match="case 'c1' is not in"):
        Review(files[0], write_case_file(tmp_path / "other", ["liver"]), tmp_path / "r")
    with pytest.raises(ReviewError, match="got share 0"):
        Draw(share=0)


@pytest.fixture
def served(review):
    """The port of the page of `review`, with texts that would like to be HTML."""
    evil = {
        "question": EVIL,
        "judge": {"model": EVIL, "faithfulness": 5, "relevance": 4, "safety": 5, "clarity": 5, "reason": "r"},
    }
    review.drawn[1] = instance(int(review.drawn[1].id[1:]), **(evil | {"answer": f"a {EVIL}"}))
    server = make_server(review, "r1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def asked(port: int, method: str, path: str, body: str = "", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body or None, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_the_server_answers_its_own_page_only(served, review):
    said = dict(id=review.drawn[0].id, decision="accept", question="", answer="", note="")
    body = json.dumps(said)
    assert asked(served, "GET", "/items", Host="evil.example")[0] == 403
    assert asked(served, "POST", "/decide", body, Origin="http://evil.example")[0] == 403
    assert asked(served, "POST", "/decide", body, Host=f"evil.example:{served}")[0] == 403
    for path in ("/frames/0/2", "/frames/99/0", "/frames/0/../../cases.jsonl", "/cases.jsonl", "/frames/-1/0"):
        assert asked(served, "GET", path)[0] == 404
    for wrong in ("", "[]", "{}", json.dumps(said | {"note": 1}), json.dumps(said | {"id": "i999"})):
        assert asked(served, "POST", "/decide", wrong)[0] == 400
    assert len(review.journal) == 0
    assert asked(served, "POST", "/decide", body, Origin=f"http://127.0.0.1:{served}")[0] == 200
    assert review.journal.get(review.drawn[0].id)["reviewer"] == "r1"
    assert asked(served, "GET", "/frames/0/1")[1].startswith(b"\x89PNG")
    with pytest.raises(ReviewError, match=rf"port {served}: Address already in use"):
        make_server(review, "r1", served)


def test_the_step_closes_a_review(files, tmp_path, capsys):
    out = tmp_path / "review"
    command = ["review", str(files[0][0]), "--cases", str(files[1]), "--out", str(out)]
    assert main([*command, "--close"]) == 2
    assert "10 of 10 drawn instances are undecided" in capsys.readouterr().err
    with Review(*files, out) as begun:
        for item in begun.drawn:
            begun.decide(item.id, "reject", "r1")
    assert main([*command, "--close"]) == 0
    assert re.search(r"1 batches failed: generate --again .*again\.jsonl", capsys.readouterr().out)


@pytest.fixture
def page(served, browser):
    """The page, ready; whatever it logs, or asks of another server, fails the test."""
    complaints = []
    context = browser.new_context()
    opened = context.new_page()
    opened.set_default_timeout(10_000)
    opened.on("console", lambda message: "status of 400" in message.text or complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    own = f"http://127.0.0.1:{served}/"
    opened.on("request", lambda request: request.url.startswith((own, "data:")) or complaints.append(request.url))
    opened.goto(own)
    opened.locator("main").wait_for()
    yield opened
    context.close()
    assert complaints == []


def status(page, text: str) -> None:
    page.locator("#status", has_text=text).wait_for()


def test_by_keyboard_accept_correct_reject(page, review):
    first, second, third, *_ = review.drawn
    status(page, f"Instance 1 of 20, batch {review.batch_of[first.id]}: undecided. 0 decided.")
    assert page.get_by_label("Question", exact=True).input_value() == first.question
    page.keyboard.press("a")
    status(page, "Accepted. Instance 2 of 20")
    page.keyboard.press("c")  # nothing is changed yet: it leads into the answer
    assert page.evaluate("document.activeElement.id") == "answer"
    page.keyboard.press("Control+A")
    page.keyboard.type("a right answer, caught")  # its a, c and r are letters here
    assert page.get_by_role("button", name="Accept").is_disabled()
    page.keyboard.press("Control+Enter")
    status(page, "Corrected. Instance 3 of 20")
    page.get_by_label("Note").fill("wrong side")
    page.keyboard.press("Escape")
    page.keyboard.press("r")
    status(page, "Rejected. Instance 4 of 20")
    decided = [review.journal.get(item.id) for item in (first, second, third)]
    assert [record["decision"] for record in decided] == ["accept", "correct", "reject"]
    assert decided[1]["answer"] == "a right answer, caught" and decided[1]["question"] == second.question
    assert decided[2]["note"] == "wrong side" and {record["reviewer"] for record in decided} == {"r1"}
    for _ in range(3):
        page.keyboard.press("k")
    status(page, "Instance 1 of 20")
    assert page.get_by_role("button", name="Accept").get_attribute("aria-pressed") == "true"
    page.keyboard.press("r")  # one may think again
    status(page, "Rejected. Instance 4 of 20")
    assert review.journal.get(first.id)["decision"] == "reject"


def test_frames_report_and_drafts(page, review):
    images = page.locator("#frames img")
    assert images.count() == 2
    for image in images.all():
        assert image.evaluate("image => image.decode().then(() => [image.naturalWidth, image.naturalHeight])") == [
            48,
            32,
        ]
    language = review.drawn[0].language
    assert page.inner_text("#findings") == REPORTS[language][0]
    assert page.get_by_label("Answer", exact=True).get_attribute("lang") == language
    page.get_by_label("Answer", exact=True).fill("half a thought")
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    status(page, "Instance 2 of 20")
    page.keyboard.press("k")
    status(page, "Instance 1 of 20")
    assert page.get_by_label("Answer", exact=True).input_value() == "half a thought" and len(review.journal) == 0


def test_text_of_the_data_stays_text(page):
    page.keyboard.press("j")
    status(page, "Instance 2 of 20")
    assert page.get_by_label("Question", exact=True).input_value() == EVIL and EVIL in page.inner_text("#facts")
    assert page.evaluate("window.evil") is None and page.locator("img[src=x]").count() == 0
    policy = page.evaluate("fetch('/').then(reply => reply.headers.get('content-security-policy'))")
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_every_control_has_a_name_and_shows_its_focus(page):
    for control in page.locator("button, textarea").all():
        assert control.evaluate("c => c.labels?.length || c.textContent.trim().length")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
    assert page.locator("#status").get_attribute("aria-live") == "polite"


def test_a_decision_that_is_not_saved_is_told(page, review):
    def refuse(**_):
        raise ReviewError("no room")

    review.decide = refuse
    page.keyboard.press("a")
    status(page, "Not saved: no room")
    page.keyboard.press("k")
    assert page.inner_text("#status").startswith("Not saved")  # still on the same instance
    assert len(review.journal) == 0
