"""How often a dense sequence of tests errs along a path of policies, and how near to the limit it
comes.

    python -m bench.coverage dense                # a minute on one core
    python -m bench.coverage dense --repeats 500

A path of policies whose mean cost grows step by step, one of them exactly at the limit: a
certificate for that one or a later one is false. Answers to a prompt are alike, and all policies
answer the same prompts. Sequences: a coarse grid on which every policy draws its own answers; a
dense one of the same kind; and dense ones with one draw for all, weighed by the ratio of
probabilities: of the two policies at its ends, which is the default, and of a single policy
(`dualign.certify.screening`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bench import options, shares
from bench.options import knob
from bench.rates import measured, percent
from dualign.certify.screening import WORTH
from dualign.certify.sequence import LEAST_ESS
from dualign.math.bounds import t_bound

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.coverage dense"

Array = np.ndarray
_PROMPTS = (100, 400)
_ICC = (0.1, 0.5)
# steps of the path in standard errors; 0.05 of a weight is 1.6 on the shipped path
_COARSE = 1.6
_FINE = 0.2
_REACH = 8.0  # the path starts so many standard errors below the limit, and goes half as far beyond
_DRAWN = -1.6  # the middle of the policies that one draw serves
_AT_ONCE = 50  # data sets side by side, which keeps them in the processor's cache
_SCREENED = 400  # answers that tell which policies one draw can serve
TITLES = {
    "coarse": "coarse, own answers",
    "dense": "dense, own answers",
    "ends": "dense, one draw of both ends (the default)",
    "middle": "dense, one draw of the middle",
    "far": "dense, one draw from 8 standard errors below",
    "unguarded": "*the same, however little it is worth*",
}


@dataclass(frozen=True)
class Settings(shares.Settings):
    """The same that `bench.shares` can change, with fewer repeats."""

    repeats: int = knob(1000, "data sets for each row")
    samples: int = knob(16, "answers to a prompt of the draw that serves all")


@dataclass(frozen=True)
class World:
    """Answers of a policy whose own part has mean `shift`, and the log-ratio of two such policies'
    probabilities.

    `draw(rng, shape, shift)` gives parts of standard deviation near 1, `ratio(parts, to, at)` log
    pi_to / pi_at."""

    title: str
    draw: Callable[[np.random.Generator, tuple[int, ...], float | Array], Array]
    ratio: Callable[[Array, float, float], Array]


def _normal(rng: np.random.Generator, shape: tuple[int, ...], shift: float | Array) -> Array:
    return rng.standard_normal(shape) + shift


def _normal_ratio(parts: Array, to: float, at: float) -> Array:
    """ln N(x; a, 1) / N(x; b, 1) = (a - b) x - (a^2 - b^2) / 2."""
    return (to - at) * parts - (to**2 - at**2) / 2


_SHAPE = 1.0  # of the gamma: skewness 2 / sqrt(shape)
_MEAN = math.sqrt(_SHAPE)  # of the gamma of variance 1


def _gamma(rng: np.random.Generator, shape: tuple[int, ...], shift: float | Array) -> Array:
    return rng.gamma(_SHAPE, (_MEAN + shift) / _SHAPE, shape) - _MEAN


def _gamma_ratio(parts: Array, to: float, at: float) -> Array:
    """Gammas of one shape k and means a, b: ln p_a / p_b = k (x / b - x / a - ln(a / b)), each a
    tilt of the other.
    """
    a = _MEAN + to
    b = _MEAN + at
    found: Array = _SHAPE * ((parts + _MEAN) * (1 / b - 1 / a) - math.log(a / b))
    return found


WORLDS = (
    World("normal", _normal, _normal_ratio),
    World("exponential", _gamma, _gamma_ratio),
)


class Outcome(NamedTuple):
    """Of each repeat: where the returned policy stands, in standard errors above the limit, and
    answers to a prompt.
    """

    stands: Array
    answers: Array


def means_of(
    world: World, icc: float, common: Array, at: float, count: int, rng: np.random.Generator
) -> Array:
    """Means [repeats, prompts] of `count` own answers of the policy of mean `at`; `common` is what
    a prompt adds.
    """
    own = world.draw(rng, (*common.shape, count), at / math.sqrt(1 - icc))
    found: Array = math.sqrt(icc) * common + math.sqrt(1 - icc) * own.mean(-1)
    return found


def drawn(
    world: World, icc: float, shape: tuple[int, ...], at: Array, rng: np.random.Generator
) -> Array:
    """Own parts of answers, each of one of the policies of means `at`, taken by chance."""
    return world.draw(rng, shape, rng.choice(at, shape) / math.sqrt(1 - icc))


def weighed(
    world: World, icc: float, common: Array, parts: Array, at: Array, to: Array
) -> Iterator[tuple[Array, Array]]:
    """For each policy of mean in `to`, by the own parts that those of means `at` drew in equal
    parts: means [repeats, prompts] of w c, and the share of answers [repeats] that these are
    worth."""
    scale = math.sqrt(1 - icc)
    costs = math.sqrt(icc) * common[..., None] + scale * parts
    for mean in to:
        inverse = [np.exp(world.ratio(parts, one / scale, mean / scale)) for one in at]
        weight = 1 / np.mean(inverse, axis=0)
        yield (weight * costs).mean(-1), weight.mean((-2, -1)) ** 2 / (weight**2).mean((-2, -1))


def returned(bounds: Iterator[Array], count: int) -> Array:
    """Of each repeat, the position of the last policy certified in sequence at limit 0; -1 for
    none.
    """
    going = np.array(True)
    last = np.array(-1)
    for index, bound in zip(range(count), bounds, strict=False):
        going = going & (bound <= 0)
        last = np.where(going, index, last)
        if not going.any():
            break
    return last


def sequences(
    world: World, icc: float, prompts: int, rng: np.random.Generator, settings: Settings
) -> Iterator[dict[str, Any]]:
    """A row for each sequence: its false certificates, and what it returns, in standard errors of
    `answers` answers.
    """
    error = math.sqrt((icc + (1 - icc) / settings.answers) / prompts)
    parts = [
        min(_AT_ONCE, settings.repeats - start) for start in range(0, settings.repeats, _AT_ONCE)
    ]
    found: list[dict[str, Outcome]] = []
    for repeats in parts:
        common = world.draw(rng, (repeats, prompts), 0.0)
        found.append(
            _own(world, icc, error, common, rng, settings)
            | _shared(world, icc, error, common, rng, settings)
        )
    for name in TITLES:
        stands, answers = zip(*(part[name] for part in found), strict=True)
        whole = (np.concatenate(stands), np.concatenate(answers))
        yield {"sequence": name, **_measured(*whole, settings.delta)}


def _own(
    world: World,
    icc: float,
    error: float,
    common: Array,
    rng: np.random.Generator,
    settings: Settings,
) -> dict[str, Outcome]:
    """The sequences in which each policy draws its own answers."""
    found = {}
    for name, step in {"coarse": _COARSE, "dense": _FINE}.items():
        path = _path(step)
        means = (means_of(world, icc, common, at * error, settings.answers, rng) for at in path)
        last = returned((t_bound(mean, settings.delta) for mean in means), len(path))
        tests = np.minimum(last + 2, len(path))
        found[name] = Outcome(path[np.maximum(last, 0)], settings.answers * tests)
    return found


def _shared(
    world: World,
    icc: float,
    error: float,
    common: Array,
    rng: np.random.Generator,
    settings: Settings,
) -> dict[str, Outcome]:
    """The sequences with one draw for all."""
    whole = _path(_FINE)
    middle = np.array([_DRAWN])
    far = np.array([-_REACH])
    near = whole[_worth(world, icc, middle * error, whole * error, rng) >= WORTH]
    plans = {
        "ends": (near, near[[0, -1]]),
        "middle": (near, middle),
        "far": (whole, far),
        "unguarded": (whole, far),
    }
    found = {}
    for name, (path, places) in plans.items():
        at = places * error
        parts = drawn(world, icc, (*common.shape, settings.samples), at, rng)
        tests = weighed(world, icc, common, parts, at, path * error)
        least = 0.0 if name == "unguarded" else LEAST_ESS
        last = returned(_guarded(tests, least, settings.delta), len(path))
        found[name] = Outcome(path[np.maximum(last, 0)], np.full(len(common), settings.samples))
    return found


def _worth(world: World, icc: float, at: Array, path: Array, rng: np.random.Generator) -> Array:
    """The share of answers that those of one policy are worth along a path, as a screen of its own
    finds it.
    """
    parts = drawn(world, icc, (1, 1, _SCREENED), at, rng)
    found = [worth for _, worth in weighed(world, icc, np.zeros((1, 1)), parts, at, path)]
    return np.concatenate(found)


def _guarded(tests: Iterator[tuple[Array, Array]], least: float, delta: float) -> Iterator[Array]:
    """Bounds [repeats], infinite where the answers are worth less than a share `least` of their
    number.
    """
    for means, worth in tests:
        yield np.where(worth >= least, t_bound(means, delta), np.inf)


def _path(step: float) -> Array:
    """Means in standard errors, with 0 among them."""
    return np.arange(-round(_REACH / step), round(_REACH / 2 / step) + 1) * step


def _measured(stands: Array, answers: Array, delta: float) -> dict[str, Any]:
    """`below`: how far the returned policy stands below the limit on average (the path's start, if
    there is none).
    """
    return {
        **measured(stands >= -1e-9, delta),
        "below": float(-stands.mean()),
        "answers": float(answers.mean()),
    }


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row for each world, correlation, number of prompts and sequence."""
    rows: list[dict[str, Any]] = []
    for index, world in enumerate(WORLDS):
        for icc in _ICC:
            for prompts in _PROMPTS:
                rng = np.random.default_rng([settings.seed, 5, index, int(100 * icc), prompts])
                where = {"world": world.title, "icc": icc, "prompts": prompts}
                rows += [{**where, **row} for row in sequences(world, icc, prompts, rng, settings)]
        log.info("%s", world.title)
    return rows


# --- report ---------------------------------------------------------------------------------------

_NOTES = """\
How to read it: *false* is the share of repeats in which a policy at or above the limit is
certified, ± its Monte-Carlo
standard error; in bold where it is more than delta + 1 %. *Below* is how far the returned policy
stands below the limit on average, in standard errors of the mean of one policy's answers on the
coarse grid: what certainty costs. *Answers* are those drawn to each prompt, all tests together.

- Every sequence keeps its level: one candidate at the limit is the first that can be certified
  falsely, however many come before.
- Density alone gains little where each policy draws its own answers: with each a new chance to
  fail, the sequence stops early, and every test costs answers.
- With one draw the tests stand and fall together, their number costs nothing, and the answers that
  it saves go into that draw. What is left is the error of the prompts.
- Those that draw should stand near where the bound meets the limit, where weights are next to 1.
  From far away the weights are uneven, and the largest may not have been drawn: then no bound of
  what was drawn holds. So a test on weighted answers passes only if they are worth 80 % of their
  number; the last row shows why.
- Where both ends draw, no answer weighs more than twice at either, whatever the policies are: one
  rare answer that the middle hardly gives can not stop the sequence at its first test."""


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line a row."""
    lines = options.head(["costs", "ICC", "prompts", "sequence", "false", "below", "answers"])
    for row in rows:
        cells = [
            row["world"], f"{row['icc']:g}", str(row["prompts"]), TITLES[row["sequence"]],
            percent(row), f"{row['below']:.2f}", f"{row['answers']:.0f}",
        ]  # fmt: skip
        lines.append(options.line(cells))
    return lines


def findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each sequence the worst rate, and the means of what it loses and draws."""
    lines = []
    for name, title in TITLES.items():
        own = options.where(rows, sequence=name)
        worst = max(own, key=lambda row: row["rate"])
        below = options.mean(own, "below")
        answers = options.mean(own, "answers")
        lines.append(
            f"- {title}: false in {worst['rate']:.2%} ± {worst['error']:.2%} at worst"
            f" ({worst['world']}, ICC {worst['icc']:g}, {worst['prompts']} prompts); {below:.2f}"
            f" standard errors below the limit, with {answers:.0f} answers a prompt."
        )
    return lines


def report(settings: Settings, rows: Sequence[dict[str, Any]]) -> str:
    """The page in markdown."""
    return options.page(
        "How often a dense sequence errs, and how near it comes",
        options.command(PROGRAM, settings),
        (
            f"{settings.repeats} repeats, {settings.answers} answers a prompt of each policy or"
            f" {settings.samples} of one, delta {settings.delta:g}."
        ),
        "\n".join(findings(rows)),
        _NOTES,
        "\n".join(table(rows)),
    )
