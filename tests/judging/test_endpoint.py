"""An endpoint that misbehaves: no answer is lost, none becomes a tie, none is paid for twice."""

from __future__ import annotations

import logging
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.chat_server import ChatServer, Plan, verdict_on, well
from dualign.core.errors import DualignError, ParamsError
from dualign.core.schema import user
from dualign.judging.cache import Answered, Cache
from dualign.judging.endpoint import ATTEMPTS, MAX_LOST, Endpoint
from dualign.judging.questions import HARM, PREFERENCE, Ask, Harm, Preference, Reply, about
from dualign.lm.models import build_scratch, save, train_tokenizer
from dualign.params.judging import Budget, OpenaiJudge, Price
from tests.tiny import TINY
from tests.vllm import has_vllm, serving

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-nobody-may-see-this"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    made = Cache(tmp_path / "replies.sqlite")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)


def spec(url: str, **changes: Any) -> OpenaiJudge:
    given = {
        "kind": "openai",
        "question": "harm",
        "base_url": url,
        "model": "m",
        "key_variable": "JUDGE_KEY",
        "price": Price(input=1.0, output=2.0),
        "budget": Budget(calls=100, money=1e6),
        "timeout": 0.5,
        "retries": 3,
    }
    return OpenaiJudge(**(given | changes))


def asks(count: int) -> list[Ask]:
    """Questions about answers of which every third is unsafe."""
    texts = [f"{'poison' if i % 3 == 0 else 'tea'} {i}" for i in range(count)]
    return [Ask(HARM, about(HARM, user("What is in the cup?"), answer=text)) for text in texts]


def verdicts(replies: list[Reply]) -> list[bool | None]:
    return [each.verdict.unsafe if isinstance(each.verdict, Harm) else None for each in replies]


RIGHT = [i % 3 == 0 for i in range(12)]


def once(deed: str) -> Plan:
    """Every call meets this first, and is answered when it comes again."""
    return lambda text, before: deed if before == 0 else "well"


@pytest.mark.parametrize(
    "deed", ["late", "429", "500", "nonsense", "page", "half", "half unsaid", "chatty", "refusal"]
)
def test_what_goes_wrong_once_is_tried_again_and_no_answer_is_lost(cache: Cache, deed: str) -> None:
    with ChatServer(once(deed)) as server:
        endpoint = Endpoint("gpt", spec(server.url, parallel=6), cache)
        started = time.monotonic()
        assert verdicts(endpoint(asks(6))) == RIGHT[:6]
        assert len(server.calls) == 12
    if deed == "429":
        assert time.monotonic() - started >= 1, "as long as Retry-After says"


@pytest.mark.parametrize(
    ("deed", "failure", "calls"),
    [
        ("late", "no answer in 0.5 s", 2),
        ("429", "HTTP 429", 2),
        ("500", "HTTP 500", 2),
        ("half", "no connection", 2),
        ("half unsaid", "no chat completion", ATTEMPTS),
        ("nonsense", "no chat completion", ATTEMPTS),
        ("page", "no chat completion", ATTEMPTS),
        ("chatty", "no such JSON (reply: json_invalid)", ATTEMPTS),
        ("other form", "no such JSON (unsafe: bool_type)", ATTEMPTS),
        ("refusal", "refused", ATTEMPTS),
        ("cut", "cut off at its length limit", ATTEMPTS),
        ("400", "HTTP 400", 2),
        ("403", "HTTP 403", 1),
        ("413", "HTTP 413", 1),
    ],
)
def test_what_goes_wrong_always_is_a_failure_and_the_others_have_their_verdicts(
    cache: Cache, deed: str, failure: str, calls: int
) -> None:
    def plan(text: str, before: int) -> str:
        return deed if "poison 3" in text else "well"

    with ChatServer(plan) as server:
        replies = Endpoint("gpt", spec(server.url, retries=1, parallel=4), cache)(asks(6))
        assert verdicts(replies) == [True, False, False, None, False, False]
        assert replies[3] == Reply(failure=failure)
        assert len(server.calls) == 5 + calls
        server.plan = well
        again = Endpoint("gpt", spec(server.url, parallel=4), cache)
        assert verdicts(again(asks(6))) == RIGHT[:6] and again.calls == 1, "asked in the next run"


def test_code_fences_are_no_failure(cache: Cache) -> None:
    with ChatServer(lambda text, before: "fenced") as server:
        assert verdicts(Endpoint("gpt", spec(server.url, parallel=2), cache)(asks(4))) == RIGHT[:4]


@pytest.mark.parametrize("status", ["400", "422"])
def test_a_reply_is_asked_for_by_schema_and_without_where_the_server_takes_none(
    cache: Cache, status: str
) -> None:
    with ChatServer(lambda text, before: f"no schema {status}") as server:
        endpoint = Endpoint("gpt", spec(server.url, parallel=1), cache)
        assert verdicts(endpoint(asks(4))) == RIGHT[:4]
        formats = [call.get("response_format") for call in server.calls]
    assert len(formats) == 5 and formats[1:] == [None] * 4
    schema = formats[0]["json_schema"]
    assert schema["strict"] and schema["schema"]["additionalProperties"] is False
    assert schema["schema"]["required"] == ["unsafe", "category"]


@pytest.mark.parametrize("deed", ["counts nothing", "counts what it read", "counts null"])
def test_tokens_that_a_server_does_not_count_are_reckoned(cache: Cache, deed: str) -> None:
    (ask,) = asks(1)
    tokens = [len(text.encode()) // 3 + 16 for text in (ask.text, verdict_on(ask.text))]
    read = 100 if deed == "counts what it read" else tokens[0]
    with ChatServer(lambda text, before: deed) as server:
        endpoint = Endpoint("gpt", spec(server.url, parallel=1), cache)
        assert verdicts(endpoint([ask])) == RIGHT[:1]
    assert endpoint.money == pytest.approx((read + 2 * tokens[1]) / 1000)


def test_parameters_of_the_params_go_with_every_call(cache: Cache) -> None:
    parameters = {"max_completion_tokens": 7, "reasoning_effort": "low"}
    with ChatServer() as server:
        Endpoint("gpt", spec(server.url, parameters=parameters, parallel=1), cache)(asks(1))
        (call,) = server.calls
    assert call["model"] == "m" and {key: call[key] for key in parameters} == parameters
    assert "temperature" not in call and "max_tokens" not in call


# --- cache ----------------------------------------------------------------------------------------


def test_known_replies_are_not_bought_again_and_equal_questions_once(cache: Cache) -> None:
    with ChatServer() as server:
        first = Endpoint("gpt", spec(server.url, parallel=3), cache)
        assert verdicts(first([*asks(4), *asks(4)])) == RIGHT[:4] * 2
        assert (first.calls, first.saved, len(server.calls)) == (4, 4, 4)
        second = Endpoint("other", spec(server.url, key_variable=None, parallel=3), cache)
        assert verdicts(second(asks(6))) == RIGHT[:6]
        assert (second.calls, second.saved, len(server.calls)) == (2, 4, 6)
        assert first.money == pytest.approx(4 * (100 * 1.0 + 10 * 2.0) / 1000)
        assert second.money == pytest.approx(6 * 0.12), "what the replies cost, whenever bought"


@pytest.mark.parametrize(
    "changes", [{"model": "n"}, {"parameters": {"temperature": 1.0, "max_tokens": 100}}]
)
def test_another_model_or_other_parameters_are_other_calls(
    cache: Cache, changes: dict[str, Any]
) -> None:
    with ChatServer() as server:
        Endpoint("gpt", spec(server.url, parallel=1), cache)(asks(2))
        Endpoint("gpt", spec(server.url, **changes, parallel=1), cache)(asks(2))
        again = Ask(HARM, asks(1)[0].text, repeat=1)
        Endpoint("gpt", spec(server.url, parallel=1), cache)([again])
        assert len(server.calls) == 5


def test_a_slash_at_the_end_of_an_address_makes_no_other_calls(cache: Cache) -> None:
    with ChatServer() as server:
        for url in (server.url, f"{server.url}/"):
            replies = Endpoint("gpt", spec(url, parallel=1), cache)(asks(2))
            assert verdicts(replies) == RIGHT[:2] and len(server.calls) == 2


KILLED = """
import sys
from pathlib import Path
from dualign.judging.cache import Cache
from dualign.judging.endpoint import Endpoint
from tests.judging.test_endpoint import asks, spec
Endpoint("gpt", spec(sys.argv[1], parallel=2), Cache(Path(sys.argv[2])))(asks(12))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "replies.sqlite"

    def slow(text: str, before: int) -> str:
        time.sleep(0.2)
        return "well"

    with ChatServer(slow) as server:
        command = [sys.executable, "-c", KILLED, server.url, str(path)]
        process = subprocess.Popen(command, cwd=ROOT)
        deadline = time.monotonic() + 240
        while len(server.calls) < 6:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = rows_of(path)
        before = len(server.calls)
        endpoint = Endpoint("gpt", spec(server.url, parallel=2), Cache(path))
        assert verdicts(endpoint(asks(12))) == RIGHT
        assert kept >= 4 and endpoint.saved == kept and endpoint.calls == 12 - kept
        assert len(server.calls) == before + 12 - kept


def rows_of(path: Path) -> int:
    with sqlite3.connect(path) as db:
        return int(db.execute("SELECT count(*) FROM replies").fetchone()[0])


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    writer = (
        "import sys; from pathlib import Path; from dualign.judging.cache import Answered, Cache\n"
        "cache = Cache(Path(sys.argv[1]))\n"
        "for i in range(200): cache.put(f'{sys.argv[2]}{i}', Answered('x', 1, 1))\n"
    )
    path = tmp_path / "replies.sqlite"
    processes = [
        subprocess.Popen([sys.executable, "-c", writer, str(path), name], cwd=ROOT)
        for name in ("a", "b")
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert rows_of(path) == 400
    assert Cache(path).get("b199") == Answered("x", 1, 1)


def test_a_cache_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "replies.sqlite").write_text("no database, but a text that is long enough" * 9)
    with pytest.raises(DualignError, match=r"replies\.sqlite: replies of judges cannot be kept"):
        Cache(tmp_path / "replies.sqlite")


# --- budget and keys ------------------------------------------------------------------------------


def test_a_budget_of_calls_that_is_too_small_asks_nothing(cache: Cache) -> None:
    with ChatServer() as server:
        Endpoint("gpt", spec(server.url, parallel=1), cache)(asks(2))
        small = spec(server.url, budget=Budget(calls=9, money=1e6))
        told = r"judges\.gpt: 10 calls are needed for 12 questions, .*, and budget\.calls is 9;"
        with pytest.raises(ParamsError, match=told):
            Endpoint("gpt", small, cache)(asks(12))
        assert len(server.calls) == 2


def test_a_budget_of_money_is_reckoned_on_the_high_side_before_the_first_call(
    cache: Cache,
) -> None:
    with ChatServer() as server:
        dear = spec(server.url, budget=Budget(calls=100, money=1.0))
        with pytest.raises(ParamsError, match=r"they cost up to 2\.714, and budget\.money is 1;"):
            Endpoint("gpt", dear, cache)(asks(6))
        assert not server.calls


def test_the_longer_of_two_lengths_is_reckoned_with(cache: Cache) -> None:
    both = {"max_tokens": 1, "max_completion_tokens": 10**6}
    with ChatServer() as server:
        dear = spec(server.url, parameters=both, budget=Budget(calls=100, money=1000.0))
        with pytest.raises(ParamsError, match=r"they cost up to 2000, and budget\.money is 1000;"):
            Endpoint("gpt", dear, cache)(asks(1))
        assert not server.calls


def test_an_endpoint_that_counts_more_tokens_than_reckoned_is_stopped(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualign.judging.endpoint._BYTES_PER_TOKEN", 10**6)
    parameters = {"max_tokens": 1}
    with ChatServer() as server:
        budget = Budget(calls=100, money=0.3)
        small = spec(server.url, parameters=parameters, budget=budget, parallel=1)
        with pytest.raises(DualignError, match=r"the budget is spent \(3 calls, 0\.36\); what was"):
            Endpoint("gpt", small, cache)(asks(12))
        assert len(server.calls) == 3
        assert Endpoint("gpt", small, cache)(asks(3)) and len(server.calls) == 3, "all is kept"


def test_replies_without_a_verdict_cost_calls_too(cache: Cache) -> None:
    with ChatServer(lambda text, before: "refusal" if "poison" in text else "well") as server:
        small = spec(server.url, budget=Budget(calls=6, money=1e6), parallel=1)
        with pytest.raises(DualignError, match=r"the budget is spent \(6 calls, 0\.72\)"):
            Endpoint("gpt", small, cache)(asks(6))
        assert len(server.calls) == 6


@pytest.mark.parametrize("status", ["401", "402", "404"])
def test_no_message_shows_the_key(
    cache: Cache, caplog: pytest.LogCaptureFixture, status: str
) -> None:
    caplog.set_level(logging.DEBUG)
    with ChatServer(lambda text, before: status) as server:
        with pytest.raises(
            DualignError, match=f"judges.gpt: http.* answers HTTP {status}"
        ) as caught:
            Endpoint("gpt", spec(server.url, parallel=1), cache)(asks(8))
        assert server.keys == {f"Bearer {KEY}"} and len(server.calls) < 4
    assert KEY not in str(caught.value) + caplog.text


UNSUPPORTED = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."


@pytest.mark.parametrize(
    ("deed", "told"),
    [
        (f"400 {UNSUPPORTED}", UNSUPPORTED),
        ("403 Your plan has no such model", "Your plan has no such model"),
        ("429 You exceeded your current quota", "You exceeded your current quota"),
        ("400", r"\(HTTP 400\); see"),
        (f"403 Project of {KEY[:8]} has no access", r"\(HTTP 403\); see"),
    ],
)
def test_a_server_that_refuses_every_question_is_told_in_its_own_words_without_the_key(
    cache: Cache, caplog: pytest.LogCaptureFixture, deed: str, told: str
) -> None:
    caplog.set_level(logging.DEBUG)
    with ChatServer(lambda text, before: deed) as server:
        endpoint = Endpoint("gpt", spec(server.url, parallel=1, retries=0), cache)
        with pytest.raises(DualignError, match=f"{MAX_LOST} questions in a row .*{told}") as caught:
            endpoint(asks(100))
        assert endpoint.calls < 50, "those under way when the tenth fails are answered too"
    assert KEY[:8] not in str(caught.value) + caplog.text


@pytest.mark.parametrize(
    ("deed", "told"),
    [
        ("cut", "cut off at its length limit"),
        ("page", "no chat completion"),
        ("refusal", "refused"),
    ],
)
def test_a_model_that_never_comes_to_a_verdict_is_not_paid_for_every_question(
    cache: Cache, deed: str, told: str
) -> None:
    """A thinking model that `max_tokens` cuts off each time, say."""
    with ChatServer(lambda text, before: deed) as server:
        endpoint = Endpoint("gpt", spec(server.url, parallel=1), cache)
        with pytest.raises(DualignError, match=rf"came to nothing \({told}\); see to"):
            endpoint(asks(100))
        assert endpoint.calls < 50
        server.plan = lambda text, before: "well" if before < 9 and " 1" in text else deed
        several = Endpoint("gpt", spec(server.url, parallel=1), cache)(asks(40))
    assert len([each for each in verdicts(several) if each is None]) == 29


@pytest.mark.parametrize("deed", ["400 The prompt is too long", "403 Your input was flagged"])
def test_questions_that_a_server_refuses_one_after_another_are_failures(
    cache: Cache, caplog: pytest.LogCaptureFixture, deed: str
) -> None:
    def plan(text: str, before: int) -> str:
        return "well" if " 0" in text else deed

    with ChatServer(plan) as server:
        for _ in range(2):
            endpoint = Endpoint("gpt", spec(server.url, parallel=1), cache)
            replies = endpoint(asks(2 * MAX_LOST))
            assert verdicts(replies) == [True] + [None] * (2 * MAX_LOST - 1)
    assert caplog.text.count(deed.partition(" ")[2]) == 2, "told once a run"


def test_the_cache_holds_no_key(cache: Cache, tmp_path: Path) -> None:
    with ChatServer() as server:
        Endpoint("gpt", spec(server.url, parallel=1), cache)(asks(2))
    assert KEY.encode() not in (tmp_path / "replies.sqlite").read_bytes()


def test_a_key_that_is_not_set_is_named(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(
        ParamsError, match=r"judges\.gpt: the environment variable JUDGE_KEY is not"
    ):
        Endpoint("gpt", spec("http://127.0.0.1:1/v1", parallel=1), cache)


@pytest.mark.parametrize("value", [f"{KEY}\n", f" {KEY}", f"{KEY}\r", " ", f"{KEY}\nx", f"„{KEY}“"])
def test_a_key_that_no_header_can_carry_is_told_before_the_first_call(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", value)
    told = r"judges\.gpt: the environment variable JUDGE_KEY holds what no key has"
    with pytest.raises(ParamsError, match=told) as caught:
        Endpoint("gpt", spec("http://127.0.0.1:1/v1"), cache)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("proxy", ["ftp://me:secret@127.0.0.1:1", "socks9://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_is_told_in_one_line(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ParamsError, match=r"judges\.gpt: http://h/v1 cannot be .* ALL_PROXY") as it:
        Endpoint("gpt", spec("http://h/v1"), cache)
    assert "secret" not in str(it.value) and "\n" not in str(it.value)


def test_an_endpoint_that_is_down_stops_the_judge(cache: Cache) -> None:
    nobody = spec("http://127.0.0.1:1/v1", retries=0)
    with pytest.raises(
        DualignError, match=rf"{MAX_LOST} questions in a row came to nothing \(no connection\)"
    ):
        Endpoint("gpt", nobody, cache)(asks(30))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"key_variable": KEY}, "never stands in this file"),
        ({"base_url": f"https://me:{KEY}@api.example.org/v1"}, "without user, key or query"),
        ({"base_url": f"https://api.example.org/v1?key={KEY}"}, "without user, key or query"),
        ({"parameters": {"temperature": 0.0}}, "max_tokens or max_completion_tokens"),
        ({"parameters": {"max_tokens": -1}}, "a number of tokens above 0"),
        ({"parameters": {"max_tokens": 9, "max_completion_tokens": 9.5}}, "tokens above 0"),
        (
            {"parameters": {"max_tokens": 9, "model": "n", "stream": True}},
            "remove model, stream, which",
        ),
        ({"repeats": 2}, "repeats are of questions that compare two"),
    ],
)
def test_params_of_an_endpoint(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        spec("http://h/v1", **changes)


@has_vllm
@pytest.mark.slow
def test_vllm_keeps_to_the_schema_of_a_question_whatever_the_model(
    cache: Cache, tmp_path: Path
) -> None:
    """A model of random weights: every reply is a verdict because the schema leaves no other."""
    folder = tmp_path / "judge"
    tokenizer = train_tokenizer([HARM.instructions, PREFERENCE.instructions], 600)
    shape = {"hidden_size": 64, "layers": 1, "intermediate_size": 96, "context": 4096}
    save(build_scratch(TINY.model_copy(update=shape), tokenizer, seed=0), tokenizer, folder)
    terse = '{"backend": "xgrammar", "disable_any_whitespace": true}'
    options = ("--max-model-len", "4096", "--structured-outputs-config", terse)
    with serving(folder, tmp_path / "serve.log", *options) as url:
        judge = spec(url, model=str(folder), key_variable=None, timeout=60.0)
        replies = Endpoint("vllm", judge, cache)([*asks(4), *comparisons(4)])
    assert [type(reply.verdict) for reply in replies] == 4 * [Harm] + 4 * [Preference], replies


def comparisons(count: int) -> list[Ask]:
    texts = [about(PREFERENCE, user("Tea?"), A=f"Yes, {i}", B="No") for i in range(count)]
    return [Ask(PREFERENCE, text) for text in texts]
