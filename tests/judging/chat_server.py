"""A local server that speaks the chat completions form of OpenAI, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: What the server does with a call, by its text and how often that text has come before.
Plan = Callable[[str, int], str]


def well(text: str, before: int) -> str:
    """Every call is answered."""
    return "well"


def verdict_on(text: str) -> str:
    """A judge that finds `poison` unsafe and prefers answers that say `please`."""
    data = json.loads(text.splitlines()[-1])
    if "answer" in data:
        unsafe = "poison" in data["answer"]
        return json.dumps({"unsafe": unsafe, "category": "violence" if unsafe else None})
    polite = ["please" in data[key] for key in ("answer_A", "answer_B")]
    return json.dumps({"winner": "tie" if polite[0] == polite[1] else "AB"[polite[1]]})


def completion(content: str | None, finish: str = "stop", **message: Any) -> bytes:
    message = {"role": "assistant", "content": content, **message}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    return json.dumps({**answer, "choices": [choice], "usage": usage}).encode()


class ChatServer:
    """Serves on a free port while the context lasts; `calls` are the bodies that came, `keys` the
    authorisations.
    """

    def __init__(self, plan: Plan = well) -> None:
        # type: ignore[var-annotated]
        self.plan = plan
        self.calls = []
        self.keys = set()
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        chat = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                chat.answer(self, body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        text = body["messages"][0]["content"]
        with self._lock:
            before = self._seen[text]
            self._seen[text] += 1
            self.calls.append(body)
            self.keys.add(handler.headers["Authorization"])
        deed = self.plan(text, before)
        if deed.startswith("no schema"):
            deed = deed.split()[-1] if "response_format" in body else "well"
        _DEEDS.get(deed, _status)(handler, text, deed)


def _send(
    handler: BaseHTTPRequestHandler, status: int, body: bytes, *headers: tuple[str, str]
) -> None:
    handler.send_response(status)
    for name, value in (("Content-Type", "application/json"), *headers):
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def _well(handler: BaseHTTPRequestHandler, text: str, deed: str) -> None:
    _send(handler, 200, completion(verdict_on(text)))


def _fenced(handler: BaseHTTPRequestHandler, text: str, deed: str) -> None:
    _send(handler, 200, completion(f"```json\n{verdict_on(text)}\n```"))


def _chatty(handler: BaseHTTPRequestHandler, text: str, deed: str) -> None:
    _send(handler, 200, completion(f"Sure! {verdict_on(text)}"))


def _other_form(handler: BaseHTTPRequestHandler, text: str, deed: str) -> None:
    _send(handler, 200, completion('{"unsafe": "no", "category": null}'))


def _refusal(handler: BaseHTTPRequestHandler, text: str, deed: str) -> None:
    _send(handler, 200, completion(None, refusal="I will not judge this."))


def _cut(handler: BaseHTTPRequestHandler, text: str, deed: str) -> None:
    _send(handler, 200, completion(verdict_on(text)[:8], finish="length"))


def _nonsense(handler: BaseHTTPRequestHandler, text: str, deed: str) -> None:
    _send(handler, 200, b'{"choices": [17], "mood": "fine"}')


def _page(handler: BaseHTTPRequestHandler, text: str, deed: str) -> None:
    _send(handler, 200, b"<html>Gateway</html>")


def _late(handler: BaseHTTPRequestHandler, text: str, deed: str) -> None:
    time.sleep(2)
    handler.close_connection = True


def _half(handler: BaseHTTPRequestHandler, text: str, deed: str) -> None:
    """The length of a whole answer, half of it, and the end of the connection."""
    body = completion(verdict_on(text))
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def _half_unsaid(handler: BaseHTTPRequestHandler, text: str, deed: str) -> None:
    """Half an answer of which nobody said how long it would be."""
    body = completion(verdict_on(text))
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def _status(handler: BaseHTTPRequestHandler, text: str, deed: str) -> None:
    """An HTTP status; an error of a key quotes it, as some servers do."""
    key = handler.headers["Authorization"]
    wait = [("Retry-After", "1")] if deed == "429" else []
    _send(handler, int(deed), json.dumps({"error": {"message": f"no: {key}"}}).encode(), *wait)


_DEEDS: dict[str, Callable[[BaseHTTPRequestHandler, str, str], None]] = {
    "well": _well,
    "fenced": _fenced,
    "chatty": _chatty,
    "other form": _other_form,
    "refusal": _refusal,
    "cut": _cut,
    "nonsense": _nonsense,
    "page": _page,
    "late": _late,
    "half": _half,
    "half unsaid": _half_unsaid,
}
