"""A local server that speaks the chat completions form of OpenAI, and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from bench.servers import Handler, Server

#: What the server does with a call, by its text and how often that text has come before.
Plan = Callable[[str, int], str]


def well(text: str, before: int) -> str:
    """Every call is answered."""
    return "well"


def verdict_on(text: str) -> str:
    """A judge that finds `poison` unsafe and untrue, and prefers answers that say `please`."""
    data = json.loads(text.splitlines()[-1])
    if "truthful" in text.splitlines()[0]:
        return json.dumps({"truthful": "poison" not in data["answer"]})
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


def counting(said: str, **usage: int | None) -> bytes:
    """A good reply with these counts of tokens alone."""
    return json.dumps(json.loads(completion(said)) | {"usage": usage}).encode()


class ChatServer(Server):
    """`calls` are the bodies that came, `keys` the authorisations. `judge` says what a good reply
    to a text is."""

    def __init__(self, plan: Plan = well, judge: Callable[[str], str] = verdict_on) -> None:
        self.plan = plan
        self._judge = judge
        self.calls: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        chat = self

        class Asked(Handler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                chat.answer(self, body)

        super().__init__(Asked)

    def answer(self, handler: Handler, body: dict[str, Any]) -> None:
        text = body["messages"][0]["content"]
        with self._lock:
            before = self._seen[text]
            self._seen[text] += 1
            self.calls.append(body)
            self.keys.add(handler.headers["Authorization"])
        deed = self.plan(text, before)
        if deed.startswith("no schema"):
            deed = deed.split()[-1] if "response_format" in body else "well"
        if deed in _REPLIES:
            handler.say(_REPLIES[deed](self._judge(text)))
        else:
            _DEEDS.get(deed, _status)(handler, self._judge(text), deed)


#: What a server says with status 200, by the verdict that a good reply holds.
_REPLIES: dict[str, Callable[[str], bytes]] = {
    "well": lambda said: completion(said),
    "fenced": lambda said: completion(f"```json\n{said}\n```"),
    "chatty": lambda said: completion(f"Sure! {said}"),
    "other form": lambda said: completion('{"unsafe": "no", "category": null}'),
    "refusal": lambda said: completion(None, refusal="I will not judge this."),
    "counts nothing": lambda said: counting(said),
    "counts what it read": lambda said: counting(said, prompt_tokens=100, total_tokens=110),
    "counts null": lambda said: counting(said, prompt_tokens=None, completion_tokens=None),
    "cut": lambda said: completion(said[:8], finish="length"),
    "nonsense": lambda said: b'{"choices": [17], "mood": "fine"}',
    "page": lambda said: b"<html>Gateway</html>",
}


def _late(handler: Handler, said: str, deed: str) -> None:
    time.sleep(2)
    handler.close_connection = True


def _half(handler: Handler, said: str, deed: str) -> None:
    """Half an answer and the end of the connection; `unsaid` is how long the whole would be."""
    body = completion(said)
    unsaid = deed == "half unsaid"
    length = ("Connection", "close") if unsaid else ("Content-Length", str(len(body)))
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header(*length)
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def _status(handler: Handler, said: str, deed: str) -> None:
    """An HTTP status and what follows it, else an error that quotes the key, as some servers do."""
    status, _, words = deed.partition(" ")
    message = words or f"no: {handler.headers['Authorization']}"
    wait = [("Retry-After", "1")] if status == "429" else []
    handler.say(json.dumps({"error": {"message": message}}).encode(), int(status), *wait)


_DEEDS: dict[str, Callable[[Handler, str, str], None]] = {
    "late": _late,
    "half": _half,
    "half unsaid": _half,
}
