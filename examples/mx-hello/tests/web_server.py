"""A web server for the tests that answers as nginx does with ``autoindex on; autoindex_format json;``."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class WebServer:
    """Serves files by path on 127.0.0.1 during the ``with`` block."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.stopping = threading.Event()

    def __enter__(self) -> WebServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.site = self  # type: ignore[attr-defined]
        self.authority = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def put(self, path: str, content: bytes) -> None:
        """Serve ``content`` at ``path``."""
        self.files = {**self.files, path: content}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        site: WebServer = self.server.site  # type: ignore[attr-defined]
        path = unquote(self.path.partition("?")[0])[1:]
        content = site.files.get(path)
        if path == "silent":
            site.stopping.wait()
        elif content is not None:
            self._send_file(content)
        elif not path or path.endswith("/"):
            self._send_listing(site, path)
        else:
            self._send(404, b"no such file")

    do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

    def _send_file(self, content: bytes) -> None:
        digest = hashlib.sha256(content)
        headers = {"ETag": f'"{digest.hexdigest()}"'}
        headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
        first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        if not last:
            self._send(200, content, headers)
        elif int(first) >= len(content):
            self._send(416, b"", headers)
        else:
            self._send(206, content[int(first) : int(last) + 1], headers)

    def _send_listing(self, site: WebServer, folder: str) -> None:
        below = [path[len(folder) :] for path in site.files if path.startswith(folder)]
        names = dict.fromkeys((name.partition("/")[0], "/" in name) for name in below)
        entries = [{"name": name, "type": "directory" if deeper else "file"} for name, deeper in names]
        self._send(200 if entries or not folder else 404, json.dumps(entries).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""
