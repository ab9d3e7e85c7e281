"""HTTP servers on free ports of this machine, for what asks a server."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Handler(BaseHTTPRequestHandler):
    """Answers in JSON, and says nothing of it."""

    protocol_version = "HTTP/1.1"

    def say(self, body: bytes, status: int = 200, *headers: tuple[str, str]) -> None:
        """A whole answer."""
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), *headers):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class _Listening(ThreadingHTTPServer):
    """A client that was killed is no news."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell what went wrong."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Server:
    """Serves by a handler while the context lasts."""

    def __init__(self, handler: type[Handler]) -> None:
        self._server = _Listening(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
