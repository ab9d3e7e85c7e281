"""What each stage has models do, reckoned from params: sequences that are trained on, read, or
drawn.

Searches and certificates end when they are done, so theirs is the most that their params allow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.cost.tables import Table, Tables
from pipeline.errors import PipelineError

#: Samples of every pool prompt on which a policy's tilt is measured, and held-out pairs that show
#: the support of the scorers; those of `dualign.evaluation.effective_tilt` and `stages.score`.
TILT_SAMPLES = 4
SUPPORT_PAIRS = 2000
#: Weights that are screened for one merge, about.
SCREENINGS = 3
#: The rules of methods whose rows name none; of `dualign.methods`.
RULES = {
    "sacpo": "grid",
    "p_sacpo": "merge",
    "c_dpo": "dual_gradient",
    "pd_dpo": "projected_subgradient",
    "o_pd_dpo": "projected_subgradient",
    "mocan": "one_shot",
    "pecan": "one_shot",
    "caid": "dual_gradient",
    "safe_rlhf": "ascent",
    "dualign": "newton",
}
#: What the methods train on: the pool, scored pairs, or safety pairs.
_ON_POOL = ("dualign",)
_ON_PAIRS = ("c_dpo", "mocan", "pecan", "caid")


@dataclass(frozen=True)
class Piece:
    """Sequences of one shape: `train` (`steps` of the optimiser), `read` by a policy, `score` by a
    scorer, whose head has one output, or `draw`.

    `prompt` and `answer` are mean tokens, `batch` the rows of a forward pass of one process; `lora`
    is the rank and the targets of what is trained, rank 0 being all weights."""

    kind: Literal["train", "read", "score", "draw"]
    rows: float
    prompt: float
    answer: float
    batch: int
    steps: int = 0
    scorer: bool = False
    rank: int = 0
    targets: object = "all-linear"
    max_tokens: int = 0

    @property
    def tokens(self) -> float:
        """Tokens of all sequences; of drawn ones those of the answers alone."""
        return self.rows * (self.answer if self.kind == "draw" else self.prompt + self.answer)


@dataclass(frozen=True)
class Work:
    """What a stage does.

    `held` is how many models with weights of their own it holds beside the one at work: adapters on
    one base have none, scorers among them. `trains_alone` says whether they are gone while it
    trains, `at_most` that it may end earlier."""

    pieces: tuple[Piece, ...]
    held: int = 0
    trains_alone: bool = False
    at_most: bool = False


def processes_of(resources: Mapping[str, Any]) -> int:
    """How many processes share a stage's work; `auto` is taken for one on each machine."""
    several = resources.get("processes", 1)
    return (several if isinstance(several, int) else 1) * int(resources.get("nodes", 1))


class Reckoner:
    """Work of stages by their names in the graph."""

    def __init__(self, params: Mapping[str, Any], tables: Tables) -> None:
        self._params = params
        self._tables = tables
        self._resources = params["resources"]

    def work(self, stage: str) -> Work | None:
        """The work of a stage such as `sft` or `dual_search@dualign`; None for one that holds no
        model, or whose work params do not tell (`answer`, `judge`).

        Raises PipelineError where rows are not known."""
        name, _, item = stage.partition("@")
        stages: dict[str, Callable[[str], Work]] = {
            "sft": self._sft,
            "reward_model": lambda _: self._scorer("reward_model", self._tables.helpful),
            "cost_model": lambda _: self._scorer("cost_model", self._tables.safety),
            "score": self._score,
            "reward_dpo": self._reward_dpo,
            "safety_dpo": lambda run: self._safety("safety_dpo", run),
            "safety_path": lambda run: self._safety("safety_path", run),
            "lagrangian_dpo": self._lagrangian,
            "lambda_path": self._lambda_path,
            "dual_search": self._search,
            "certify": self._certify,
            "evaluate": self._evaluate,
        }
        return stages[name](item) if name in stages else None

    # --- stages -----------------------------------------------------------------------------------

    def _sft(self, _: str) -> Work:
        table = self._tables.sft
        heldout = self._read(_known(table.heldout, "sft"), table.prompt, table.answer)
        if not self._params["sft"]["train"]:
            return Work((heldout,))
        return Work((self._training("sft", table, sides=1), heldout))

    def _scorer(self, name: str, table: Table) -> Work:
        section = self._params[name]
        scored = 2.0 * _known(table.heldout, name)  # whole, and as if they had been cut
        scored += min(section.get("zero_pairs", 0), _known(table.rows, name))
        read = self._read(2.0 * scored, table.prompt, table.answer, scorer=True)
        if section["given"] is not None:
            return Work((read,), held=len(section["given"]) - 1)
        return Work((self._training(name, table, scorer=True), read))

    def _score(self, _: str) -> Work:
        section = self._params["score"]
        helpful, safety = self._tables.helpful, self._tables.safety
        both = _known(helpful.rows, "score") + _known(safety.rows, "score")
        pairs = 2.0 * min(section["pairs"] or both, both)
        held_out = _known(helpful.heldout, "score") + _known(safety.heldout, "score")
        support = 2.0 * min(SUPPORT_PAIRS, held_out)
        prompts = self._params["prepare"]["pool_prompts"]
        read = [
            self._read(pairs + support, helpful.prompt, helpful.answer),
            *[self._read(pairs, helpful.prompt, helpful.answer, scorer=True)] * 2,
        ]
        drawn = self._drawn(prompts, section["samples_per_prompt"], reads=1)
        return Work((*drawn, *read), held=self._scorers)

    def _reward_dpo(self, run: str) -> Work:
        row = self._params["reward_dpo"]["runs"][run]
        passes = 1 if row["margin"] == "sft" else 3
        return self._on_preferences("reward_dpo", row, self._tables.helpful, passes)

    def _safety(self, section: str, run: str) -> Work:
        row = self._params[section]["runs"][run]
        return self._on_preferences(section, row, self._tables.safety, 1)

    def _on_preferences(
        self, section: str, row: Mapping[str, Any], table: Table, passes: int
    ) -> Work:
        """Reference columns of the rows that are trained on, and the training."""
        trained = self._training(section, table)
        sides = 1.5 if row["loss_type"] == "kto" else 1.0
        distinct = min(trained.rows, 2.0 * (table.rows or trained.rows))
        read = self._read(passes * sides * distinct, table.prompt, table.answer)
        return Work((trained, read))

    def _lagrangian(self, run: str) -> Work:
        section = self._params["lagrangian_dpo"]
        row = section["runs"][run]
        table = self._pool() if row["data"] == "pool" else self._scored_pairs()
        trained = self._training("lagrangian_dpo", table, steps=row.get("max_steps"))
        soup = row.get("soup", 1)
        refresh = row.get("refresh")
        if refresh is None:
            implicit = [
                name for name in (row["reward"], row["cost"]) if not name.endswith("_model")
            ]
            read = self._read(2.0 * _known(table.rows, run), table.prompt, table.answer)
            return Work((*[trained] * soup, *[read] * len(implicit)))
        again = self._training("lagrangian_dpo", table, steps=refresh["max_steps"])
        drawn = self._drawn(refresh["prompts"], refresh["samples_per_prompt"], reads=2)
        held = self._beside("lagrangian_dpo")
        return Work((trained, *drawn, again) * soup, held=held, trains_alone=True)

    def _lambda_path(self, run: str) -> Work:
        row = self._params["lambda_path"]["runs"][run]
        trained = self._training("lambda_path", self._pool(), steps=row.get("max_steps"))
        return Work((trained,) * row.get("soup", 1))

    def _search(self, run: str) -> Work:
        """Every policy is measured on its own answers, and read on the pool: on all of it where its
        cost there has a say."""
        section = self._params["dual_search"]
        row = self._params["methods"][run]
        method = row.get("method") or run
        rule = row.get("rule") or RULES[method]
        trainings, merges = steps_of(rule, section)
        measures = 1 + trainings + merges
        pool = self._pool()
        prompts = self._params["prepare"]["pool_prompts"]
        own = self._drawn(section["prompts"], section["samples_per_prompt"], reads=2)
        asks_pool = rule in ("newton", "merge") and row.get("cost") != "feedback"
        samples = self._params["score"]["samples_per_prompt"] if asks_pool else TILT_SAMPLES
        seen = self._read(prompts * samples, pool.prompt, pool.answer)
        pieces = [*own, seen] * measures
        if merges and method in ("p_sacpo", "dualign"):
            screened = SCREENINGS * merges * 2.0 * _known(pool.rows, run)
            pieces.append(self._read(screened, pool.prompt, pool.answer))
        gradient = row.get("policy_gradient")
        if gradient is not None:
            pieces += self._ascent(gradient)
        else:
            pieces += self._trainings(method) * trainings
        return Work(tuple(pieces), held=self._beside("dual_search"), at_most=True)

    def _trainings(self, method: str) -> list[Piece]:
        """One training of a search, with the answers or reference columns that it takes."""
        section = self._params["dual_search"]
        if method in _ON_POOL:
            fresh = self._drawn(section["refresh_prompts"], section["refresh_samples"], reads=2)
            return [*fresh, self._training("dual_search", self._pool())]
        if method in _ON_PAIRS:
            return [self._training("dual_search", self._scored_pairs())]
        safety = self._tables.safety
        trained = self._training("dual_search", safety)
        return [trained, self._read(trained.rows, safety.prompt, safety.answer)]

    def _ascent(self, options: Mapping[str, Any]) -> list[Piece]:
        answers = options["steps"] * options["batch_size"]
        prompts = answers // options["samples"]
        trained = self._training("dual_search", self._pool(), steps=options["steps"])
        return [*self._drawn(prompts, options["samples"], reads=2), trained]

    def _certify(self, run: str) -> Work:
        """The fallback and two ends of the path draw; candidates between them are read. All are as
        they would leave, in weights of their own.
        """
        held = self._scorers + 1
        section = self._params["certify"]
        weights = len(section["runs"][run]["weights"])
        own = self._drawn(section["prompts"], section["samples_per_prompt"], reads=2)
        screen = section["screen"]
        if screen is None or weights < 2:
            return Work(tuple(own * (1 + weights)), held=held, at_most=True)
        seen = self._drawn(screen["prompts"], screen["samples_per_prompt"], reads=3)
        if not screen["reweigh"]:
            return Work((*seen * (1 + weights), *own * screen["tests"]), held=held, at_most=True)
        answers = section["prompts"] * section["samples_per_prompt"]
        read = self._read(answers * screen["tests"], self._asked, self._tables.drawn)
        return Work((*seen * (1 + weights), *own * 3, read), held=held, at_most=True)

    def _evaluate(self, policy: str) -> Work:
        section = self._params["evaluate"]
        own = section["policies"][policy] != "sft"
        pool = self._pool()
        tilt = self._params["prepare"]["pool_prompts"] * TILT_SAMPLES
        drawn = self._drawn(
            section["prompts"], section["samples_per_prompt"], reads=2 if own else 1
        )
        stage = section["policies"][policy].partition("/")[0]
        apart = stage in ("aligned", "certified") or (own and not self._rank(stage))
        held = self._scorers + (1 if apart else 0)
        return Work((*drawn, self._read(tilt, pool.prompt, pool.answer)), held=held)

    # --- models -----------------------------------------------------------------------------------

    def _rank(self, section: str) -> int:
        """The rank of a section's adapters, 0 where it trains all weights."""
        lora = {**self._params["lora"], **self._params[section].get("lora", {})}
        return int(lora["rank"])

    @property
    def _scorers(self) -> int:
        """Scorers that are no adapters on models/sft."""
        return sum(not self._is_adapter(name) for name in ("reward_model", "cost_model"))

    def _is_adapter(self, scorer: str) -> bool:
        section = self._params[scorer]
        trained = section["given"] is None and section["backbone"] == "sft"
        return trained and self._rank(scorer) > 0

    def _beside(self, section: str) -> int:
        """Models beside a policy that a section trains: scorers and reference."""
        return self._scorers + (0 if self._rank(section) else 1)

    # --- pieces -----------------------------------------------------------------------------------

    @property
    def _asked(self) -> float:
        """Mean tokens of a prompt that answers are drawn to."""
        return (self._tables.helpful.prompt + self._tables.safety.prompt) / 2

    def _pool(self) -> Table:
        """The pool as pairs of its answers."""
        samples = self._params["score"]["samples_per_prompt"]
        rows = self._params["prepare"]["pool_prompts"] * samples // 2
        return Table(rows, 0, self._asked, self._tables.drawn)

    def _scored_pairs(self) -> Table:
        helpful, safety = self._tables.helpful, self._tables.safety
        rows = self._params["score"]["pairs"]
        if rows is None and helpful.rows is not None and safety.rows is not None:
            rows = helpful.rows + safety.rows
        return Table(rows, 0, self._asked, (helpful.answer + safety.answer) / 2)

    def _training(
        self,
        section: str,
        table: Table,
        *,
        sides: int = 2,
        steps: int | None = None,
        scorer: bool = False,
    ) -> Piece:
        """A training of `sides` sequences a row; `steps` in place of those of the section."""
        own = self._params[section]
        training = {**self._params["training"], **own.get("training", {})}
        targets = {**self._params["lora"], **own.get("lora", {})}["target_modules"]
        steps = steps or training["max_steps"] or _steps(section, table, training)
        share = max(training["batch_size"] // processes_of(self._resources), 1)
        batch = min(self._resources["micro_batch_size"] or share, share)
        return Piece(
            "train",
            float(sides * steps * training["batch_size"]),
            table.prompt,
            table.answer,
            sides * batch,
            steps,
            scorer,
            self._rank(section),
            targets,
            training["max_length"],
        )

    def _read(self, rows: float, prompt: float, answer: float, *, scorer: bool = False) -> Piece:
        kind: Literal["score", "read"] = "score" if scorer else "read"
        batch = self._resources["scoring_batch_size"]
        longest = int(self._params["training"]["max_length"])
        return Piece(kind, rows, prompt, answer, batch, max_tokens=longest)

    def _drawn(self, prompts: float, count: int, *, reads: int) -> list[Piece]:
        """Answers to prompts, read by so many policies and scored for reward and cost."""
        rows = float(prompts * count)
        length = self._tables.drawn
        batch = self._resources["sampling_batch_size"]
        most = self._params["generation"]["max_new_tokens"]
        drawn = Piece("draw", rows, self._asked, length, batch, max_tokens=most)
        policies = [self._read(rows, self._asked, length)] * reads
        return [drawn, *policies, *[self._read(rows, self._asked, length, scorer=True)] * 2]


def steps_of(rule: str, section: Mapping[str, Any]) -> tuple[int, int]:
    """Trainings and merges that a search by a rule takes at most.

    >>> steps_of("newton", {"max_trainings": 2, "merge_steps": 3, "grid": [1.0]})
    (2, 3)
    >>> steps_of("merge", {"max_trainings": 2, "merge_steps": 3, "grid": [1.0]})
    (0, 3)
    """
    trainings = {"one_shot": 0, "merge": 0, "ascent": 1, "grid": len(section["grid"])}
    merges = section["merge_steps"] if rule in ("merge", "newton") else 0
    return trainings.get(rule, section["max_trainings"]), merges


def _steps(section: str, table: Table, training: Mapping[str, Any]) -> int:
    rows = _known(table.rows, section, "or set its training.max_steps")
    return math.ceil(rows * training["epochs"] / training["batch_size"])


def _known(rows: int | None, section: str, otherwise: str = "") -> int:
    """Rows that are known. Raises PipelineError."""
    if rows is None:
        hint = f", {otherwise}" if otherwise else ""
        raise PipelineError(
            f"{section}: how many rows there are is not known before they are prepared; run python"
            f" -m pipeline run --stage prepare first{hint}"
        )
    return rows
