"""Asks an OpenAI-compatible server for JSON, many requests at once, each until it is answered and never after that."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from examples.echovlm.journal import Journal
from moe_adapter.errors import MoEAdapterError

FRAME_TOKENS = 4096  # reserved for a frame until the server has said what it cost
FAILURES = 5  # requests in a row that the server leaves unanswered before it is left alone
LONG = 100  # the same, of requests too long for the model, for each may be so by itself
UNANSWERED, INVALID = "unanswered", "no valid answer"
FORMS = ("json_schema", "json_object")  # OpenAI's, and llama-cpp-python's, with the schema in it
TOO_LONG = (
    "context_length_exceeded",  # OpenAI, llama-cpp-python
    "maximum context length",  # the same, vLLM, SGLang
    "exceed_context_size_error",  # llama-server
    "exceeds the available context size",  # the same
    "longer than the maximum model length",  # vLLM
    "longer than the model's context length",  # SGLang
)


class ServerError(MoEAdapterError):
    """A server that cannot be asked, or leaves requests unanswered."""


class BadAnswer(ValueError):
    """An answer that is not what the schema asks for."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """An OpenAI-compatible server and how it is asked.

    The API key comes from OPENAI_API_KEY. 429, 5xx and lost connections are tried again up to `retries` times, as late
    as Retry-After says; `timeout` in seconds. An answer that is not valid is asked for with another seed, `attempts`
    times in all. No more than `max_requests` and `max_total_tokens` are spent, all runs of a journal together.
    """

    base_url: str
    model: str
    temperature: float = 0.7
    max_tokens: int = 2048
    concurrency: int = 8
    retries: int = 8
    timeout: float = 300.0
    attempts: int = 3
    response_format: str = FORMS[0]
    max_requests: int | None = None
    max_total_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ServerError(f"base_url: got {self.base_url!r}, expected a URL such as http://localhost:8000/v1")
        for name in ("max_tokens", "concurrency", "attempts", "timeout"):
            if getattr(self, name) <= 0:
                raise ServerError(f"{name}: got {getattr(self, name)}, expected more than 0")
        if self.response_format not in FORMS:
            raise ServerError(f"response_format: got {self.response_format!r}, expected one of {', '.join(FORMS)}")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: chat messages, the JSON schema of the answer, a seed, and the names of the messages' frames."""

    messages: list[dict[str, Any]]
    schema: dict[str, Any]
    seed: int
    frames: tuple[str, ...] = ()

    def body(self, server: Server) -> dict[str, Any]:
        """What is sent."""
        form: dict[str, Any] = {"type": server.response_format}
        if server.response_format == "json_schema":
            form["json_schema"] = {"name": "answer", "strict": True, "schema": self.schema}
        else:
            form["schema"] = self.schema
        return {
            "model": server.model,
            "messages": self.messages,
            "response_format": form,
            "seed": self.seed,
            "temperature": server.temperature,
            "max_tokens": server.max_tokens,
        }

    def key(self, server: Server) -> str:
        """A hash of what is sent: 32 hexadecimal digits."""
        return digest(json.dumps(self.body(server), sort_keys=True))[:32]

    def text(self) -> list[dict[str, Any]]:
        """The messages as the journal keeps them: a frame is its name and the SHA-256 of its file."""
        names = iter(self.frames)
        return [
            {**message, "content": content if isinstance(content, str) else [_kept(part, names) for part in content]}
            for message in self.messages
            for content in [message["content"]]
        ]


class Job(Protocol):
    """Something to ask for: a request for each attempt, and what is read from an answer, or BadAnswer."""

    def request(self, attempt: int) -> Request: ...
    def read(self, text: str) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the journal holds for a job: `value` or the `problem`, and who wrote the last answer to which request.

    `next` is to be asked.
    """

    value: Any = None
    model: str = ""
    key: str = ""
    seed: int = 0
    problem: str = ""
    detail: str = ""
    next: Request | None = None


@dataclass(kw_only=True)
class Client:
    """Asks a server on behalf of jobs, and answers them out of the journal."""

    server: Server
    journal: Journal
    stopped: str = ""  # why no more is asked
    failures: list[str] = field(default_factory=list)
    _row: int = 0
    _requests: int = 0
    _tokens: int = 0
    _reserved: int = 0
    _too_long: int = 0

    def __post_init__(self) -> None:
        self._requests = len(self.journal)
        self._tokens = sum(record["tokens"] for record in self.journal.records())

    def ask(self, jobs: Iterable[Job]) -> None:
        """Ask for what the journal does not hold yet, as far as the budget and the server go.

        Raises: ServerError where the server refuses the key or does not know the model.
        """
        asyncio.run(self._ask(iter(jobs)))

    def reply(self, job: Job) -> Reply:
        """The first valid answer to a job in the journal, or what is wrong."""
        written: dict[str, Any] = {}
        for attempt in range(self.server.attempts):
            request = job.request(attempt)
            key = request.key(self.server)
            record = self.journal.get(key)
            if record is None:
                return Reply(problem=UNANSWERED, next=request)
            written = {"model": record["model"], "key": key, "seed": request.seed}
            try:
                return Reply(value=job.read(record["text"]), **written)
            except BadAnswer as error:
                written["detail"] = f"{error} (finish_reason: {record['finish']})"
        return Reply(problem=INVALID, **written)

    async def _ask(self, jobs: Iterator[Job]) -> None:
        openai = _library()
        options = dict(base_url=self.server.base_url, timeout=self.server.timeout, max_retries=self.server.retries)
        self._room = asyncio.Condition()
        async with openai.AsyncOpenAI(api_key=os.environ.get("OPENAI_API_KEY", "none"), **options) as client:
            await asyncio.gather(*(self._work(client, jobs) for _ in range(self.server.concurrency)))

    async def _work(self, client: Any, jobs: Iterator[Job]) -> None:
        for job in jobs:
            while (request := self.reply(job).next) and await self._send(client, request):
                pass
            if self.stopped:
                return

    async def _send(self, client: Any, request: Request) -> bool:
        """Ask, and write down the answer; False if there is none."""
        need = self.server.max_tokens + _size(request)
        if not await self._reserve(need):
            return False
        openai, answered = _library(), False
        try:
            completion = await client.chat.completions.create(**request.body(self.server))
            record = _record(completion, need) | {"seed": request.seed, "messages": request.text()}
            self.journal.append(request.key(self.server), record)
            self._tokens += record["tokens"]
            self._row = self._too_long = 0
            answered = True
            return True
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ServerError(f"{self.server.base_url}: {_told(error)}; check the URL, the model, the key") from None
        except (openai.APIError, ValueError) as error:  # ValueError: a body that is no JSON
            self.failures.append(_told(error))
            if _is_too_long(error):
                self._too_long += 1
            else:
                self._row += 1
            if self._row >= FAILURES or self._too_long >= LONG:
                self.stopped = f"{max(self._row, self._too_long)} requests in a row were left unanswered"
            return False
        finally:
            async with self._room:
                self._reserved -= need
                self._requests -= not answered
                self._room.notify_all()

    async def _reserve(self, need: int) -> bool:
        """Whether a request that may cost so many tokens is in the budget; waits for others to say their cost."""

        def fits() -> bool:
            requests, tokens = self.server.max_requests, self.server.max_total_tokens
            within = tokens is None or self._tokens + self._reserved + need <= tokens
            return within and (requests is None or self._requests < requests)

        async with self._room:
            await self._room.wait_for(lambda: self.stopped or fits() or not self._reserved)
            if not self.stopped and not fits():
                self.stopped = "the budget is spent"
            if self.stopped:
                return False
            self._reserved += need
            self._requests += 1
            return True


def digest(text: str) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def seed_of(*parts: object) -> int:
    """A seed in [0, 2³¹) for what is named, the same on every machine."""
    return int(digest(json.dumps([str(part) for part in parts]))[:8], 16) >> 1


def _record(completion: Any, need: int) -> dict[str, Any]:
    if not getattr(completion, "choices", None):
        raise ValueError("got no chat completion")
    choice, usage = completion.choices[0], completion.usage
    return {
        "text": choice.message.content or "",
        "finish": choice.finish_reason,
        "model": completion.model,
        "tokens": usage.total_tokens if usage else need,
    }


def _kept(part: dict[str, Any], names: Iterator[str]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    content = base64.b64decode(part["image_url"]["url"].partition(",")[2])
    return {"type": "frame", "name": next(names, ""), "sha256": hashlib.sha256(content).hexdigest()}


def _size(request: Request) -> int:
    """No fewer tokens than the messages have: the bytes of their text, and FRAME_TOKENS a frame."""
    total = 0
    for message in request.messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            total += len(part["text"].encode()) if part["type"] == "text" else FRAME_TOKENS
    return total


def _is_too_long(error: Exception) -> bool:
    """Whether a request exceeds the model's context."""
    return getattr(error, "status_code", None) == 400 and any(words in _whole(error) for words in TOO_LONG)


def _whole(error: Exception) -> str:
    """All that a server said; of a body with a message the library's text has that alone, of others nothing."""
    return f"{error} {getattr(error, 'body', None) or ''}"


def _told(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    words = _whole(error) if str(error) == f"Error code: {status}" else error
    said = f"HTTP {status}: {words}" if status else f"{type(error).__name__}: {error} {error.__cause__ or ''}"
    hint = f" (response_format may be {' or '.join(FORMS)})" if "response_format" in _whole(error) else ""
    return " ".join(said.split())[:200].rstrip(".") + hint


def _library() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ServerError('a language model is asked by openai: pip install "moe-adapter[echovlm]".') from error
    return openai
