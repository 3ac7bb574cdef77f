"""A real HTTP server of OpenAI's chat completions: answers by the schema, and misbehaves when it is told to."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from examples.echovlm.cases import Case, write_cases
from examples.echovlm.corpus.client import Server

TOKENS = 100  # that an answer costs, prompt included
REPORTS = {
    "en": ("No cyst is seen in the right lobe. A 14 mm round nodule lies in the left lobe.", "Benign nodule."),
    "zh": ("右叶未见囊肿。左叶见14mm圆形结节。", "良性结节。"),
}


class LanguageModel:
    """The server's state: `behave(body, asked)` says what to do with a request that was asked so often before."""

    def __init__(self) -> None:
        self.behave: Callable[[dict[str, Any], int], Any] = lambda body, asked: "answer"
        self.asked: list[str] = []  # the requests' hashes, as they came
        self.answered: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.release = threading.Event()  # lets go of what stalls
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self.port = 0

    def server(self, **options: Any) -> Server:
        defaults = dict(base_url=f"http://127.0.0.1:{self.port}/v1", model="m", timeout=20.0)
        return Server(**(defaults | options))

    @property
    def times_asked(self) -> Counter[str]:
        return Counter(self.asked)

    @contextmanager
    def entered(self, body: dict[str, Any]) -> Iterator[tuple[str, int]]:
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with self._lock:
            before = self.asked.count(key)
            self.asked.append(key)
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield key, before
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def language_model() -> Iterator[LanguageModel]:
    model = LanguageModel()

    class Handler(_Handler):
        state = model

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    model.port = http.server_port
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield model
    finally:
        model.release.set()
        http.shutdown()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: LanguageModel
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.state.entered(body) as (key, asked):
            action = self.state.behave(body, asked)
            if action == "stall":
                self.state.release.wait(30)
                action = "cut"
            if isinstance(action, tuple):
                status, headers, *message = action
                said = message[0] if message else f"status {status}"
                error = said if isinstance(said, dict) else {"message": said}
                self._send(status, json.dumps({"error": error}), headers)
                return
            content = answer_of(body) if action in ("answer", "cut") else action
            reply = content if action == "not a completion" else json.dumps(completion(body, content))
            self._send(200, reply, cut=action == "cut")
            if action != "cut":
                self.state.answered.append(key)

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": len(content)} | (headers or {})
        ).items():
            self.send_header(name, str(value))
        self.end_headers()
        try:
            self.wfile.write(content[: len(content) // 2] if cut else content)
            self.wfile.flush()
        except OSError:  # the client is gone
            cut = True
        if cut:
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass


def completion(body: dict[str, Any], content: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": f"{body['model']}-as-served",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": TOKENS - 10, "completion_tokens": 10, "total_tokens": TOKENS},
    }


def answer_of(body: dict[str, Any]) -> str:
    """An answer by the request's own JSON schema; what is quoted is the reports' nodule."""
    schema = body["response_format"].get("json_schema", body["response_format"])["schema"]
    return json.dumps(_filled(schema, schema.get("$defs", {}), body), ensure_ascii=False)


def _filled(schema: dict[str, Any], types: dict[str, Any], body: dict[str, Any], name: str = "") -> Any:
    if "$ref" in schema:
        return _filled(types[schema["$ref"].removeprefix("#/$defs/")], types, body, name)
    if schema["type"] == "object":
        return {key: _filled(value, types, body, f"{name}.{key}") for key, value in schema["properties"].items()}
    if "enum" in schema:
        return max(schema["enum"])
    content = body["messages"][-1]["content"]
    report = content if isinstance(content, str) else content[-1]["text"]
    if name.endswith(".quote"):
        said = re.search(r"14 mm round nodule|14mm圆形结节", report)
        return said[0] if said and "surveillance" not in name else ""
    return f"{name} by seed {body['seed']}"


def write_case_file(folder: Path, organs: list[str], **fields: Any) -> Path:
    """A case of each organ named, English and Chinese in turn, with two frames each."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for number, organ in enumerate(organs):
        frames = [f"{number}-{frame}.png" for frame in range(2)]
        for frame, name in enumerate(frames):
            Image.new("RGB", (48, 32), (40 * frame + 60, 30 * number % 255, 90)).save(folder / name)
        language = ("en", "zh")[number % 2]
        findings, impression = REPORTS[language]
        known = dict(organ=organ, language=language, images=tuple(frames), findings=findings, impression=impression)
        known |= dict(id=f"c{number}", patient=f"p{number}", hospital="h", split="train")
        cases.append(Case(**(known | fields)))
    return write_cases(folder / "cases.jsonl", cases)
