"""A judge behind an endpoint that misbehaves and a run that is killed: what of its verdicts is
lost, bought twice or taken for a tie.

    python -m bench.misbehaving

Answers of the embedded world are put to a server on this machine that finds the longer of two the
better, so the right verdicts are known. Some of its replies are late, HTTP 429 (with Retry-After),
500 or 503, nonsense, a page, half an answer, prose or a refusal, each when its question comes for
the first time; a few questions it refuses always. The first run of the judge is killed, the second
goes on where it was, the third finds all answered."""

from __future__ import annotations

import json
import multiprocessing
import sqlite3
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from bench import options
from bench.chat_server import ChatServer
from dualign.core.errors import DualignError, one_line
from dualign.core.schema import prompt_id, user
from dualign.data import world
from dualign.judging.asking import REFERENCE, judge_preference
from dualign.judging.cache import Cache
from dualign.judging.endpoint import Endpoint
from dualign.judging.verdicts import Verdict
from dualign.params.judging import Budget, OpenaiJudge, Price

Row = dict[str, Any]

PROGRAM = "python -m bench.misbehaving"
DEEDS = (
    "late",
    "429",
    "500",
    "503",
    "nonsense",
    "page",
    "half",
    "half unsaid",
    "chatty",
    "refusal",
)
_TIMEOUT = 0.5
#: How long the first run may take until it has the replies after which it is killed, in seconds.
_PATIENCE = 600


@dataclass(frozen=True)
class Settings:
    """What is asked, and how it goes wrong."""

    prompts: int = options.knob(300, "questions of the world")
    policies: int = options.knob(3, "policies beside the reference")
    amiss: float = options.knob(0.05, "share of questions whose first reply is none")
    hopeless: float = options.knob(0.005, "share of questions that are always refused")
    kill_after: int = options.knob(500, "replies that the first run has when it is killed")
    parallel: int = options.knob(8, "calls at once")
    seed: int = options.knob(0, "seed of the answers")


def answers(settings: Settings) -> pd.DataFrame:
    """One answer of every policy to every question, drawn from the grammatical ones."""
    generator = np.random.default_rng(settings.seed)
    asked = world.prompts()
    chosen = [asked[i * len(asked) // settings.prompts] for i in range(settings.prompts)]
    names = [REFERENCE, *(f"policy-{i}" for i in range(settings.policies))]
    rows = [
        {
            "suite": "world",
            "policy": policy,
            "prompt_id": prompt_id(user(question)),
            "prompt": user(question),
            "sample": 0,
            "response": _drawn(generator, question),
        }
        for policy in names
        for question in chosen
    ]
    return pd.DataFrame(rows)


def _drawn(generator: np.random.Generator, question: str) -> str:
    given = world.answers(question)
    return given[int(generator.integers(len(given)))].text


def longer(text: str) -> str:
    """The server's verdict: the longer answer wins."""
    data = json.loads(text.splitlines()[-1])
    first, second = len(data["answer_A"]), len(data["answer_B"])
    return json.dumps({"winner": "tie" if first == second else "AB"[second > first]})


def right(table: pd.DataFrame) -> dict[tuple[str, str], float]:
    """What each verdict must be, by policy and prompt."""
    reference = table[table["policy"] == REFERENCE].set_index("prompt_id")["response"].to_dict()
    others = table[table["policy"] != REFERENCE]
    return {
        (row.policy, row.prompt_id): (
            np.sign(len(row.response) - len(reference[row.prompt_id])) / 2 + 0.5
        )
        for row in others.itertuples()
    }


@dataclass(frozen=True)
class Plan:
    """What the server does with a call, by the hash of its text."""

    amiss: float
    hopeless: float

    def __call__(self, text: str, before: int) -> str:
        """Its deed."""
        place = zlib.crc32(text.encode()) / 2**32
        if place < self.hopeless:
            return "refusal"
        if before == 0 and place < self.hopeless + self.amiss:
            return DEEDS[zlib.crc32(text[::-1].encode()) % len(DEEDS)]
        return "well"


# --- the three runs -------------------------------------------------------------------------------


def judge(url: str, cache: Path, settings: Settings) -> tuple[list[Verdict], Endpoint]:
    """One run of the judge."""
    spec = OpenaiJudge(
        kind="openai", question="preference", base_url=url, model="m", key_variable=None,
        price=Price(input=0, output=0), budget=Budget(calls=10**6, money=0), timeout=_TIMEOUT,
        parallel=settings.parallel,
    )  # fmt: skip
    with closing(Cache(cache)) as kept:
        endpoint = Endpoint("it", spec, kept)
        return judge_preference("it", answers(settings), 1, endpoint), endpoint


def killed(url: str, cache: Path, settings: Settings) -> None:
    """A run that is killed when so many replies are kept."""
    process = multiprocessing.get_context("spawn").Process(
        target=judge, args=(url, cache, settings)
    )
    process.start()
    deadline = time.monotonic() + _PATIENCE
    while kept(cache) < settings.kill_after:
        if not process.is_alive() or time.monotonic() > deadline:
            process.kill()
            raise DualignError(f"{kept(cache)} replies came; set --kill-after below what is asked")
        time.sleep(0.01)
    process.kill()
    process.join()


def kept(cache: Path) -> int:
    """How many replies are there."""
    if not cache.is_file():
        return 0
    with closing(sqlite3.connect(f"file:{cache}?mode=ro", uri=True)) as db:
        try:
            return int(db.execute("SELECT count(*) FROM replies").fetchone()[0])
        except sqlite3.OperationalError:  # the table is not made yet
            return 0


def runs(settings: Settings) -> Iterator[Row]:
    """A row for each of the three runs."""
    truth = right(answers(settings))
    plan = Plan(settings.amiss, settings.hopeless)
    with TemporaryDirectory() as folder, ChatServer(plan, longer) as server:
        cache = Path(folder) / "replies.sqlite"
        killed(server.url, cache, settings)
        came = len(server.calls)
        yield {"run": "killed", "came": came, "kept": kept(cache)}
        for name in ("goes on", "once more"):
            before = len(server.calls)
            started = time.monotonic()
            verdicts, endpoint = judge(server.url, cache, settings)
            seconds = time.monotonic() - started
            yield {
                "run": name, "came": len(server.calls) - before, "kept": kept(cache),
                "saved": endpoint.saved, "seconds": round(seconds, 1),
                "verdicts_a_second": round(len(verdicts) / seconds, 1),
                **counted(verdicts, truth),
            }  # fmt: skip


def counted(verdicts: Sequence[Verdict], truth: dict[tuple[str, str], float]) -> Row:
    """How many verdicts there are, and how many of them are no good."""
    good = [verdict for verdict in verdicts if verdict.failure is None]
    found = {(verdict.policy, verdict.prompt_id): verdict.win for verdict in good}
    failed = [verdict for verdict in verdicts if verdict.failure is not None]
    return {
        "verdicts": len(good),
        "failed": len(failed),
        "lost": len(truth) - len(verdicts),
        "failures_counted_as_ties": sum(verdict.win is not None for verdict in failed),
        "wrong": sum(truth[key] != win for key, win in found.items()),
    }


# --- the page -------------------------------------------------------------------------------------


def page(settings: Settings, rows: list[Row]) -> str:
    """The page in markdown."""
    titles = [key.replace("_", " ") for key in rows[-1]]
    lines = [_line(row, rows[-1]) for row in rows]
    return options.page(
        "Verdicts of an endpoint that misbehaves",
        options.command(PROGRAM, settings),
        "\n".join([*options.head(titles), *lines]),
        _NOTES,
    )


def _line(row: Row, keys: Iterable[str]) -> str:
    return options.line(str(row.get(key, "")) for key in keys)


_NOTES = """\
Each verdict compares two answers in both orders; equal answers are a tie that is not asked about.
`came` are the calls that reached the server, `kept` the replies on the disk after the run, `saved`
the questions that needed no call: answered before, or equal to another. `failed` are verdicts on
questions that the server always refuses: they hold no score. `lost` are answers without a row,
`wrong` are verdicts that are not the server's. Seconds are mostly those that the server is late or
asks to wait."""


@one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Run it; write misbehaving.json and misbehaving.md, and the page to stdout."""
    settings, out = options.parse(Settings, PROGRAM, __doc__, argv)
    rows = list(runs(settings))
    options.tell(out, "misbehaving", PROGRAM, settings, page(settings, rows), runs=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
