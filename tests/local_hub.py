"""A Hugging Face Hub in a local directory: what huggingface_hub asks of one to push and fetch small files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

from huggingface_hub import constants


@contextmanager
def local_hub(root: Path) -> Iterator[Path]:
    """Serve `root`, one folder a repository, and let huggingface_hub know no other hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"root": root}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    settings = dict(
        ENDPOINT=endpoint,
        HUGGINGFACE_CO_URL_TEMPLATE=endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        HF_HUB_OFFLINE=False,
    )
    try:
        with mock.patch.multiple(constants, **settings):
            yield root
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    root: Path

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            payload = json.loads(body)
            name = "/".join(filter(None, (payload.get("organization"), payload["name"])))
            folder, there = self.root / name, (self.root / name).is_dir()
            folder.mkdir(parents=True, exist_ok=True)
            self.answer({"url": f"{constants.ENDPOINT}/{name}", "id": name}, 409 if there else 200)
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/branch/" in self.path:
            with open(self.root / "branches", "a") as file:
                file.write(self.path.removeprefix("/api/models/").replace("/branch/", "/") + "\n")
            self.answer({})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        else:
            self.commit(self.path.split("/api/models/")[1].partition("/commit/")[0], body)

    def commit(self, repo: str, body: bytes) -> None:
        for line in map(json.loads, body.decode().splitlines()):
            file = self.root / repo / line["value"].get("path", "")
            if line["key"] == "deletedFile":
                file.unlink()
            elif line["key"] == "file":
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        sha = self.sha(repo)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{constants.ENDPOINT}/{repo}/commit/{sha}"})

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/"):
            repo = "/".join(self.path.split("/")[3:5])
            if not (self.root / repo).is_dir():
                self.answer({}, 404, {"X-Error-Code": "RepoNotFound"})
            elif "/tree/" in self.path:
                self.answer([{"type": "file", "path": p, "size": len(b), "oid": _sha(b)} for p, b in self.files(repo)])
            elif "/revision/" in self.path and not self.has_branch(repo, self.path.rpartition("/")[2]):
                self.answer({}, 404, {"X-Error-Code": "RevisionNotFound"})
            else:
                self.answer({"id": repo, "sha": self.sha(repo)})
            return
        repo, _, rest = self.path[1:].partition("/resolve/")
        file = self.root / repo / rest.partition("/")[2]
        if not file.is_file():
            self.answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.sha(repo)})
            return
        content = file.read_bytes()
        self.answer(content, headers={"ETag": _sha(content), "X-Repo-Commit": self.sha(repo)})

    do_HEAD = do_GET

    def has_branch(self, repo: str, name: str) -> bool:
        made = self.root / "branches"
        return name in ("main", self.sha(repo)) or (made.is_file() and f"{repo}/{name}" in made.read_text().split())

    def files(self, repo: str) -> list[tuple[str, bytes]]:
        folder = self.root / repo
        return [(str(f.relative_to(folder)), f.read_bytes()) for f in sorted(folder.rglob("*")) if f.is_file()]

    def sha(self, repo: str) -> str:
        return _sha(b"".join(path.encode() + content for path, content in self.files(repo)))

    def answer(self, body, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Quiet."""


def _sha(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
