"""A hub on loopback, which can lie: what `huggingface_hub` asks for, birder's plain address; an
empty cache for those who use it.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_ELSEWHERE = "/elsewhere"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty `HF_HOME`, in this process and those that it starts."""
    home = tmp_path / "hf_home"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(home / "assets"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(home / "assets"))
    return home


class HubServer(ThreadingHTTPServer):
    """Serves `files` (URL path to content).

    Attributes:
        behaviour: "honest"; "tamper": one byte differs; "truncate": hangs up halfway, every time;
            "hiccup": halfway, once; "shorten": serves half, as if that were all; "stall": stops
            sending halfway; "redirect": sends to another place, which serves a tampered file; a
            number: that status instead of the file.
        requests: (method, path, Range header or None) of every request for a file.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.behaviour: str | int = "honest"
        self.requests: list[tuple[str, str, str | None]] = []
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        server: HubServer = self.server
        if not self.path.startswith("/api/"):  # the client's own affairs
            server.requests.append((self.command, self.path, self.headers.get("Range")))
        behaviour = server.behaviour
        if behaviour == "redirect" and not self.path.startswith(_ELSEWHERE):
            self.send_response(302)
            self.send_header("Location", _ELSEWHERE + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = server.files.get(self.path.removeprefix(_ELSEWHERE))
        if isinstance(behaviour, int) or content is None:
            self.send_response(404 if content is None else behaviour)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        etag = hashlib.sha256(content).hexdigest()
        if behaviour in ("tamper", "redirect"):
            content = content[:-1] + bytes([content[-1] ^ 1])
        if behaviour == "shorten":
            content = content[: len(content) // 2]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start > len(content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        rest = content[start:]
        if behaviour in ("truncate", "hiccup", "stall"):
            half = max(len(content) // 2 - start, 0)
            self.wfile.write(rest[:half])
            self.wfile.flush()
            if behaviour == "hiccup":
                server.behaviour = "honest"
            if behaviour == "stall":
                server.stopped.wait(30)
            self.close_connection = True
            return
        self.wfile.write(rest)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[HubServer]:
    """Runs a :class:`HubServer` in a thread."""
    server = HubServer(files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


def take_for_the_hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `huggingface_hub` ask this server."""
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    # Older ones have a copy in the second module.
    for module in ("constants", "file_download"):
        name = f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE"
        monkeypatch.setattr(name, template, raising=False)
