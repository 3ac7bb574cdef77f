"""The client against a server that answers, stalls, errs, talks nonsense and cuts connections; and its journal."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from echovlm.corpus.llm_server import TOKENS, language_model

from examples.echovlm.corpus import client as client_module
from examples.echovlm.corpus.client import INVALID, UNANSWERED, BadAnswer, Client, Request, ServerError
from examples.echovlm.journal import Journal, JournalError

SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
SOON = {"retry-after-ms": "5"}


@dataclass(frozen=True)
class Word:
    """A job whose valid answer is an object with a text."""

    number: int

    def request(self, attempt: int) -> Request:
        messages = [{"role": "user", "content": f"word {self.number}"}]
        return Request(messages=messages, schema=SCHEMA, seed=10 * self.number + attempt)

    def read(self, text: str) -> str:
        try:
            return json.loads(text)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadAnswer(str(error)) from None


WORDS = [Word(number) for number in range(12)]


@pytest.fixture
def model():
    with language_model() as served:
        yield served


@pytest.fixture
def ask(model, tmp_path):
    """ask(jobs, **options): the replies of one run on the journal, and the client."""

    def run(jobs=WORDS, **options):
        with Journal(tmp_path / "answers.jsonl") as journal:
            client = Client(server=model.server(**options), journal=journal)
            client.ask(jobs)
            return [client.reply(job) for job in jobs], client

    return run


def test_every_job_is_answered_once_and_several_at_once(model, ask):
    model.behave = lambda body, asked: model.release.wait(0.02) or "answer"
    replies, _ = ask(concurrency=4)
    assert [reply.value for reply in replies] == [f".text by seed {10 * n}" for n in range(12)]
    assert {reply.model for reply in replies} == {"m-as-served"}
    assert 1 < model.most_at_once <= 4
    again, client = ask(concurrency=4)
    assert again == replies and len(model.asked) == 12 and not client.failures
    body = model.bodies[0]
    assert body["response_format"]["json_schema"] == {"name": "answer", "strict": True, "schema": SCHEMA}


def test_the_same_request_to_another_address_is_the_same(model):
    request = Word(1).request(0)
    here, there = model.server(), model.server(base_url="https://elsewhere/v1", concurrency=2, max_requests=9)
    assert request.key(here) == request.key(there)
    others = [model.server(model="n"), model.server(temperature=0.1), model.server(max_tokens=9)]
    assert len({request.key(server) for server in [here, *others]}) == 4


def test_429_is_asked_again_when_it_says(model, ask):
    model.behave = lambda body, asked: "answer" if asked else (429, {"Retry-After": "1"})
    (reply,), _ = ask(WORDS[:1])
    assert reply.value and len(model.asked) == 2
    assert 1.0 <= model.times[1] - model.times[0] < 3


@pytest.mark.parametrize("fault", [(500, SOON), (503, SOON), "cut", "stall"])
def test_a_fault_is_overcome(model, ask, fault):
    model.behave = lambda body, asked: "answer" if asked else fault
    replies, client = ask(WORDS[:3], timeout=0.5)
    assert all(reply.value for reply in replies) and not client.failures
    assert set(model.times_asked.values()) == {2}
    assert model.times[-1] - model.times[0] < 10  # what stalls, does so for 30 s


@pytest.mark.parametrize("content", ["no JSON", '{"text": ', "[]", ""])
def test_an_answer_that_is_not_valid_is_asked_for_with_another_seed(model, ask, content):
    model.behave = lambda body, asked: content if body["seed"] % 10 < 2 else "answer"
    replies, _ = ask(WORDS[:2])
    assert [reply.value for reply in replies] == [".text by seed 2", ".text by seed 12"]
    assert [reply.seed for reply in replies] == [2, 12]
    assert set(model.times_asked.values()) == {1} and len(model.asked) == 6
    replies, _ = ask(WORDS[:3], attempts=2)
    assert [reply.problem for reply in replies[:2]] == [INVALID, INVALID] and len(model.asked) == 8


def test_what_is_no_completion_is_asked_again_by_the_next_run(model, ask):
    model.behave = lambda body, asked: "not a completion" if body["seed"] == 0 else "answer"
    replies, client = ask(WORDS[:3])
    assert [reply.problem for reply in replies] == [UNANSWERED, "", ""] and len(client.failures) == 1
    model.behave = lambda body, asked: "answer"
    replies, _ = ask(WORDS[:3])
    assert all(reply.value for reply in replies) and len(model.asked) == 4


def test_what_a_server_says_is_told_whatever_its_form(model, ask):
    model.behave = lambda body, asked: (422, {}, {"detail": [{"loc": ["body", "seed"], "msg": "no seed"}]})
    _, client = ask(concurrency=1)
    assert client.failures[0].startswith("HTTP 422") and "no seed" in client.failures[0]


def test_a_server_that_answers_nothing_is_left_alone(model, ask):
    model.behave = lambda body, asked: (500, SOON)
    replies, client = ask(concurrency=1, retries=1)
    assert len(client.failures) == 5 and len(model.asked) == 10
    assert "5 requests in a row" in client.stopped and all(reply.problem == UNANSWERED for reply in replies)
    assert "HTTP 500" in client.failures[0]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_ends_the_run(model, ask, status):
    model.behave = lambda body, asked: (status, {})
    with pytest.raises(ServerError, match=f"HTTP {status}.*check the URL, the model, the key"):
        ask(concurrency=1)
    assert len(model.asked) == 1


def test_no_server_at_all(model, ask):
    _, client = ask(base_url="http://127.0.0.1:9/v1", retries=0, concurrency=1)
    assert client.failures[0] == "APIConnectionError: Connection error. All connection attempts failed"
    assert client.stopped


def test_a_form_that_the_server_refuses_is_named_and_another_can_be_sent(model, ask):
    """What llama-cpp-python's server says, with the status that it gives."""
    said = "1 validation error: {'loc': ('body', 'response_format', 'type'), 'msg': \"should be 'json_object'\"}"
    model.behave = lambda body, asked: (
        (500, SOON, said) if body["response_format"]["type"] == "json_schema" else "answer"
    )
    _, client = ask(concurrency=1, retries=0)
    assert client.stopped and client.failures[-1].endswith("(response_format may be json_schema or json_object)")
    replies, _ = ask(response_format="json_object")
    assert all(reply.value for reply in replies)
    assert model.bodies[-1]["response_format"] == {"type": "json_object", "schema": SCHEMA}
    with pytest.raises(ServerError, match="response_format: got 'text', expected one of json_schema, json_object"):
        model.server(response_format="text")


@pytest.mark.parametrize(
    "said",
    [
        {"message": "not with this model", "param": "response_format"},
        {"message": "This model does not support response_format"},
        {"detail": [{"loc": ["body", "response_format", "type"], "msg": "Input should be 'text'"}]},  # FastAPI
    ],
)
def test_other_servers_words_for_a_form_that_is_refused(model, ask, said):
    model.behave = lambda body, asked: (422, {}, said)
    _, client = ask(concurrency=1)
    assert "response_format may be" in client.failures[0] and "5 requests in a row" in client.stopped


def test_an_error_that_repeats_the_request_is_that_requests_alone(model, ask):
    said = "Invalid request body: "
    model.behave = lambda body, asked: (400, {}, said + json.dumps(body)) if body["seed"] == 0 else "answer"
    replies, client = ask(concurrency=1, retries=0)
    assert [reply.problem for reply in replies] == [UNANSWERED] + [""] * 11 and not client.stopped


TOO_LONG = [
    "request (6009 tokens) exceeds the available context size (4096 tokens), try increasing it",  # llama-server
    "This model's maximum context length is 4096 tokens. However, you requested 6214 tokens",  # llama-cpp-python
]
TOO_LONG_CODES = [
    {"message": "Too many tokens", "code": "context_length_exceeded", "param": "messages"},  # OpenAI
    {"message": "Too many tokens", "code": 400, "type": "exceed_context_size_error", "n_ctx": 4096},  # llama-server
]


@pytest.mark.parametrize("said", TOO_LONG + TOO_LONG_CODES)
def test_requests_too_long_for_the_model_do_not_keep_others_from_being_asked(model, ask, said):
    """Six in a row, more than end a run at faults of the server; a resumed run would meet the same six first."""
    model.behave = lambda body, asked: (400, {}, said) if body["seed"] < 60 else "answer"
    for _ in range(2):
        replies, client = ask(concurrency=1)
        assert [reply.problem for reply in replies] == [UNANSWERED] * 6 + [""] * 6
        assert not client.stopped and len(client.failures) == 6
        assert (said if isinstance(said, str) else said["message"])[:60] in client.failures[0]
    model.behave = lambda body, asked: (400, {}, "the context holds no such thing as a seed")
    assert "5 requests in a row" in ask(concurrency=1)[1].stopped


@dataclass(frozen=True)
class Text(Word):
    """A job that sends so many words."""

    length: int = 1

    def request(self, attempt: int) -> Request:
        messages = [{"role": "user", "content": "word " * self.length}]
        return Request(messages=messages, schema=SCHEMA, seed=10 * self.number + attempt)


def words_of(body):
    return len(body["messages"][0]["content"].split())


def test_where_many_in_a_row_are_too_long_no_more_is_asked(model, ask, monkeypatch):
    """As with a context that is smaller than any prompt, or than max_tokens."""
    monkeypatch.setattr(client_module, "LONG", 20)
    model.behave = lambda body, asked: (400, {}, TOO_LONG[1])
    jobs = [Word(number) for number in range(40)]
    for run in range(1, 3):
        replies, client = ask(jobs, concurrency=1)
        assert "20 requests in a row" in client.stopped and all(reply.problem == UNANSWERED for reply in replies)
        assert len(model.asked) == 20 * run and TOO_LONG[1][:60] in client.failures[-1]
    model.behave = lambda body, asked: "answer" if body["seed"] == 150 else (400, {}, TOO_LONG[0])
    replies, client = ask(jobs[:35], concurrency=1)
    assert replies[15].value and not client.stopped, "an answer among them shows that others may fit"


@pytest.mark.parametrize("concurrency", [1, 8])
def test_many_long_ones_in_front_do_not_keep_the_short_from_being_asked(model, ask, concurrency):
    """Twenty that are too long, and behind them five that are not; resumed, there are the twenty alone."""
    model.behave = lambda body, asked: (400, {}, TOO_LONG[0]) if words_of(body) > 100 else "answer"
    jobs = [Text(number, length=101 + number) for number in range(20)]
    jobs += [Text(20 + number, length=91 + number) for number in range(5)]
    replies, client = ask(jobs, concurrency=concurrency)
    assert [bool(reply.value) for reply in replies] == [False] * 20 + [True] * 5
    assert not client.stopped and len(client.failures) == 20 and len(model.asked) == 25
    again, client = ask(jobs, concurrency=concurrency)
    assert again == replies and not client.stopped and len(model.asked) == 45


def test_the_budget_of_requests_holds_over_runs(model, ask):
    replies, client = ask(max_requests=5, concurrency=3)
    assert sum(bool(reply.value) for reply in replies) == 5 == len(model.asked)
    assert client.stopped == "the budget is spent"
    ask(max_requests=5)
    assert len(model.asked) == 5
    replies, client = ask(max_requests=12)
    assert all(reply.value for reply in replies) and not client.stopped and len(model.asked) == 12


@pytest.mark.parametrize("fault", [(400, {}, TOO_LONG[0]), (500, {}), "not a completion"])
@pytest.mark.parametrize("concurrency", [1, 4])
def test_what_is_not_answered_is_not_in_the_budget_of_requests(model, ask, fault, concurrency):
    """Four that fail among others: a run with a budget of six answers six all the same, and another six more."""
    model.behave = lambda body, asked: fault if body["seed"] in (0, 20, 40, 60) else "answer"
    words = [Word(number) for number in range(24)]
    for run in range(1, 3):
        replies, client = ask(words, max_requests=6 * run, concurrency=concurrency, retries=0)
        assert sum(bool(reply.value) for reply in replies) == 6 * run
        assert client.stopped == "the budget is spent"


def test_a_run_advances_where_what_fails_comes_first(model, ask):
    model.behave = lambda body, asked: (400, {}, TOO_LONG[0]) if body["seed"] < 60 else "answer"
    replies, client = ask(max_requests=6, concurrency=1)
    assert sum(bool(reply.value) for reply in replies) == 6 and len(model.asked) == 12 and not client.stopped


def test_the_budget_of_tokens_is_never_passed(model, ask):
    """Eight at once, each of which may cost 88: what they may cost is held back until they have said."""
    model.behave = lambda body, asked: model.release.wait(0.02) or "answer"
    budget = 5 * TOKENS + 20
    replies, client = ask(max_total_tokens=budget, max_tokens=TOKENS - 7, concurrency=8)  # 6 or 7 for the message
    spent = sum(bool(reply.value) for reply in replies) * TOKENS
    assert 4 * TOKENS <= spent == len(model.asked) * TOKENS <= budget
    assert client.stopped == "the budget is spent" and not client.failures


def test_options_are_checked(model):
    with pytest.raises(ServerError, match=r"base_url: got 'localhost:1'.*http://localhost"):
        model.server(base_url="localhost:1")
    with pytest.raises(ServerError, match="concurrency: got 0"):
        model.server(concurrency=0)


def test_a_journal_survives_a_line_cut_short(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path) as journal:
        for value in (1, 2):
            journal.append("a", {"value": value})
        journal.append("b", {"value": "血"})
    whole = path.read_bytes()
    for cut in (1, 5, len(whole.splitlines(keepends=True)[-1]) - 1):
        path.write_bytes(whole[:-cut])
        with Journal(path) as journal:
            assert "b" not in journal and journal.get("a") == {"key": "a", "value": 2}
            journal.append("b", {"value": "血"})
            assert [record["value"] for record in journal.records()] == [2, "血"]
        assert path.read_bytes() == whole


def test_a_journal_refuses_what_is_none_and_a_second_writer(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(JournalError, match=r"j\.jsonl:2: got no record"):
        Journal(path)
    assert path.read_text().count("\n") == 3
    code = f"import sys, fcntl; f = open({str(path)!r}); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(JournalError, match="another process is writing"):
            Journal(path)
        other.communicate(b"\n")
