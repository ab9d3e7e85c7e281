"""How often each bound errs for quantities whose range is known, P(unsafe) before all, and what it
can show.

    python -m bench.coverage shares               # minutes on one core
    python -m bench.coverage shares --repeats 500

Answers that are unsafe at a given rate, and answer lengths as a share of the longest, are drawn
with the limit exactly at the truth: a bound at or below it is a false certificate. Answers to a
prompt are alike: each repeats the prompt's draw with probability sqrt(ICC). Power is the share of
repeats that certify when the limit lies some standard errors above. The bounds are those of a
certificate: `clustered_t` takes the exact bound where no prompt has any unsafe answer. Two
Clopper-Pearson bounds stand beside: on prompts with any unsafe answer, whose share is the larger,
and on one answer to each prompt, which leaves the others out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench import options
from bench.options import knob
from bench.rates import measured, percent
from dualign.core.errors import DualignError
from dualign.math.bounds import bernstein_bound, betting_bound, binomial_bound, star_bound, t_bound

log = logging.getLogger(__name__)

PROGRAM = "python -m bench.coverage shares"

Array = np.ndarray

_ICC = (0.0, 0.5)
_PROMPTS = (100, 400)
_MARGINS = (2.5, 5.0, 10.0)  # in standard errors of the mean; 2.5 is 80 % power for a normal mean
_UNIT = (0.0, 1.0)
_AT_ONCE = (
    50  # data sets that star bets take side by side, which keeps them in the processor's cache
)
_TRIED = (
    1000  # means that star bets try: a fourth of what the library does, which only raises the bound
)
#: Bounds in the order of the table; the first is what `certify.method: auto` takes, the second was
#: the default before.
TITLES = {
    "star_bets": "star bets (the default)",
    "clustered_t": "clustered t",
    "betting": "betting",
    "empirical_bernstein": "empirical Bernstein",
    "any": "Clopper–Pearson, prompts with any",
    "one": "*Clopper–Pearson, one answer a prompt*",
}


@dataclass(frozen=True)
class Settings:
    """What a run can change; every field is an option of the command."""

    repeats: int = knob(2000, "data sets for each row")
    answers: int = knob(4, "answers to a prompt")
    delta: float = knob(0.05, "nominal rate of false certificates")
    seed: int = knob(0, "seed of all draws")

    def __post_init__(self) -> None:
        if min(self.repeats, self.answers) < 1 or not 0 < self.delta < 0.5:
            raise DualignError("repeats and answers must be at least 1, delta between 0 and 0.5")


@dataclass(frozen=True)
class World:
    """Values in [0, 1] of a known mean and standard deviation; `share` if they are 0 and 1."""

    title: str
    mean: float
    deviation: float
    draw: Callable[[np.random.Generator, tuple[int, ...]], Array]
    share: bool = True

    def answers(self, rng: np.random.Generator, shape: tuple[int, ...], icc: float) -> Array:
        """Answers [..., prompts, answers]: each the prompt's own draw with probability sqrt(icc),
        else a new one.
        """
        repeats = rng.random(shape) < math.sqrt(icc)
        return np.where(repeats, self.draw(rng, (*shape[:-1], 1)), self.draw(rng, shape))

    def error(self, icc: float, prompts: int, answers: int) -> float:
        """The standard error of the mean of such answers."""
        return self.deviation * math.sqrt((icc + (1 - icc) / answers) / prompts)


def _rate(rate: float) -> World:
    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        return (rng.random(shape) < rate).astype(float)

    return World(f"{rate:.1%} unsafe", rate, math.sqrt(rate * (1 - rate)), draw)


#: Beta(2, 6) has mean 1/4 and variance 12 / (64 * 9) = 1/48.
LENGTH = World(
    "length", 0.25, math.sqrt(1 / 48), lambda rng, shape: rng.beta(2, 6, shape), share=False
)
WORLDS = (*(_rate(rate) for rate in (0.003, 0.01, 0.05, 0.3)), LENGTH)


def all_bounds(answers: Array, delta: float, share: bool) -> dict[str, Array]:
    """Each method's bounds [...] of the mean of answers [..., prompts, answers] in [0, 1]."""
    means = answers.mean(-1)
    prompts = answers.shape[-2]
    found = {
        "star_bets": star_bets(means, delta),
        "clustered_t": t_bound(means, delta),
        "betting": betting_bound(means, delta, _UNIT),
        "empirical_bernstein": bernstein_bound(means, delta, _UNIT),
    }
    if not share:
        return found
    found["any"] = binomial_bound((means > 0).sum(-1), prompts, delta)
    found["one"] = binomial_bound(answers[..., 0].sum(-1), prompts, delta)
    found["clustered_t"] = np.where(np.ptp(means, -1) > 0, found["clustered_t"], found["any"])
    return found


def star_bets(means: Array, delta: float) -> Array:
    """`star_bound` of data sets [R, N], a few at a time."""
    parts = [
        star_bound(means[i : i + _AT_ONCE], delta, _UNIT, _TRIED)
        for i in range(0, len(means), _AT_ONCE)
    ]
    return np.concatenate(parts)


def run(settings: Settings) -> list[dict[str, Any]]:
    """A row for each world, correlation, number of prompts and bound."""
    rows: list[dict[str, Any]] = []
    for index, world in enumerate(WORLDS):
        for icc in _ICC:
            for prompts in _PROMPTS:
                rng = np.random.default_rng([settings.seed, index, int(100 * icc), prompts])
                rows += _rows(world, icc, prompts, rng, settings)
        log.info("%s", world.title)
    return rows


def _rows(
    world: World, icc: float, prompts: int, rng: np.random.Generator, settings: Settings
) -> Iterator[dict[str, Any]]:
    answers = world.answers(rng, (settings.repeats, prompts, settings.answers), icc)
    error = world.error(icc, prompts, settings.answers)
    for method, bound in all_bounds(answers, settings.delta, world.share).items():
        yield {
            "world": world.title,
            "icc": icc,
            "prompts": prompts,
            "method": method,
            **measured(bound <= world.mean, settings.delta),
            "bound": float(np.median(bound)),
            **{
                f"power_{margin:g}": float((bound <= world.mean + margin * error).mean())
                for margin in _MARGINS
            },
        }


# --- report ---------------------------------------------------------------------------------------

_NOTES = """\
How to read it: *false* is the share of repeats whose bound is at or below the truth, ± its
Monte-Carlo standard error;
in bold where it is more than delta + 1 %. *Bound* is the median one. *Power at k* is the share that
certify when the limit lies k standard errors of the mean above the truth. ICC is the correlation of
two answers to one prompt.

- Clustered t errs where hardly any prompt of the sample shows the harm: no term in the skewness can
  tell. It has the most power for the same reason.
- Star bets, betting and empirical Bernstein hold for every number of prompts and every distribution
  in the range. Of these star bets show the most: at a rate of 30 % nearly what t shows, less of
  rare harm, since a bound that holds cannot be below 3 / N where nothing was seen, and less of
  lengths, which fill little of their range.
- Clopper–Pearson on prompts with any unsafe answer holds too, but bounds a larger share: up to four
times as large. On
  one answer a prompt it is exact, and leaves three quarters of the answers out."""


def findings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each bound the worst rate, in how many rows it fails, and its mean power."""
    lines = []
    for method, title in TITLES.items():
        own = options.where(rows, method=method)
        worst = max(own, key=lambda row: row["rate"])
        failing = sum(not row["holds"] for row in own)
        verdict = (
            f"more than delta + 1 % in {failing} of {len(own)} rows"
            if failing
            else f"holds in all {len(own)}"
        )
        where = f"{worst['world']}, ICC {worst['icc']}, {worst['prompts']} prompts"
        powers = [options.mean(own, f"power_{margin:g}") for margin in _MARGINS]
        power = " / ".join(map("{:.0%}".format, powers))
        lines.append(
            f"- {title}: at worst {percent(worst)} ({where}); {verdict}; mean power {power}."
        )
    return lines


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line a row."""
    heads = [
        "quantity",
        "ICC",
        "prompts",
        "bound by",
        "false",
        "bound",
        *(f"power at {margin:g}" for margin in _MARGINS),
    ]
    lines = options.head(heads)
    for row in rows:
        power = [f"{row[f'power_{margin:g}']:.1%}" for margin in _MARGINS]
        place = [row["world"], f"{row['icc']:g}", str(row["prompts"])]
        cells = [*place, TITLES[row["method"]], percent(row), f"{row['bound']:.4f}", *power]
        lines.append(options.line(cells))
    return lines


def report(settings: Settings, rows: Sequence[dict[str, Any]]) -> str:
    """The page in markdown."""
    return options.page(
        "How often a bound errs where the range is known",
        options.command(PROGRAM, settings),
        (
            f"{settings.repeats} repeats, {settings.answers} answers a prompt, delta"
            f" {settings.delta:g}."
        ),
        "\n".join(findings(rows)),
        _NOTES,
        "\n".join(table(rows)),
    )
