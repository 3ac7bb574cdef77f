"""The review page's server, on this machine alone: the drawn instances with their frames, and what is decided."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from examples.echovlm.corpus.prompts import MEDIA
from examples.echovlm.corpus.review import Review, ReviewError

PAGE = Path(__file__).with_name("review.html")
LARGEST = 1 << 20  # bytes of a decision
FIELDS = {"id", "decision", "question", "answer", "note"}


def make_server(review: Review, reviewer: str, port: int = 0) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 for one reviewer; its `server_port` says where, `serve_forever` runs it."""

    class Handler(_Handler):
        pass

    Handler.review, Handler.reviewer = review, reviewer
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ReviewError(f"port {port}: {reason}; take another by --port, or 0 for any") from None


class _Handler(BaseHTTPRequestHandler):
    review: Review
    reviewer: str

    def do_GET(self) -> None:
        if not self._is_own():
            return
        frame = re.fullmatch(r"/frames/(\d+)/(\d+)", self.path)
        if self.path == "/":
            page = PAGE.read_text(encoding="utf-8")
            self._send(page.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": _policy(page)})
        elif self.path == "/items":
            self._send(json.dumps(self._items()).encode(), "application/json")
        elif frame and (path := self._frame(*map(int, frame.groups()))):
            self._send(path.read_bytes(), MEDIA.get(path.suffix.lower(), "application/octet-stream"))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if not self._is_own() or self.path != "/decide":
            return
        length = int(self.headers.get("Content-Length", 0))
        try:
            said = json.loads(self.rfile.read(min(length, LARGEST)))
            if not isinstance(said, dict) or set(said) != FIELDS or not all(isinstance(v, str) for v in said.values()):
                raise ReviewError(f"got {str(said)[:80]}, expected texts for {', '.join(sorted(FIELDS))}")
            self.review.decide(reviewer=self.reviewer, **said)
        except (ValueError, ReviewError) as error:
            self._send(str(error).encode(), "text/plain; charset=utf-8", status=HTTPStatus.BAD_REQUEST)
            return
        self._send(json.dumps(self._decision(said["id"])).encode(), "application/json")

    def _is_own(self) -> bool:
        """Whether the page itself asks: another site's would name its own host, or itself as the origin."""
        own = {f"{host}:{self.server.server_address[1]}" for host in ("127.0.0.1", "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in own and (origin is None or origin.removeprefix("http://") in own):
            return True
        self.send_error(HTTPStatus.FORBIDDEN)
        return False

    def _items(self) -> dict[str, Any]:
        items = []
        for item in self.review.drawn:
            case = self.review.cases[item.case]
            shown = {name: getattr(item, name) for name in SHOWN}
            shown |= {"batch": self.review.batch_of[item.id], "frames": len(case.images)}
            shown |= {"findings": case.findings, "impression": case.impression, "decided": self._decision(item.id)}
            items.append(shown)
        return {"reviewer": self.reviewer, "items": items}

    def _decision(self, id: str) -> dict[str, Any] | None:
        return self.review.journal.get(id)

    def _frame(self, item: int, frame: int) -> Path | None:
        if item >= len(self.review.drawn):
            return None
        images = self.review.cases[self.review.drawn[item].case].images
        return self.review.folder / images[frame] if frame < len(images) else None

    def _send(
        self, content: bytes, kind: str, headers: dict[str, str] | None = None, status: HTTPStatus = HTTPStatus.OK
    ) -> None:
        self.send_response(status)
        more = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store"}
        for name, value in (more | {"X-Content-Type-Options": "nosniff"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a case's id may be in the path."""


SHOWN = ("id", "case", "organ", "language", "component", "dimension", "kind", "question", "answer", "model", "judge")


def _policy(page: str) -> str:
    """Only the page's own script and style, and nothing from anywhere else."""
    script, style = (_hash(page, name) for name in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(page: str, element: str) -> str:
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
