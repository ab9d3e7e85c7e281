"""From raw sources to the tables of later stages: valid, without duplicates, disjoint by prompt.

Every prompt has one identity across all sources (`schema.prompt_id`) and belongs to exactly one of
`search`, `certify`, `eval`, `heldout` and `train`, by a hash of seed and identity, so that new rows
move few prompts. Rows that cannot be used go to `quarantine.jsonl` with the reason and the place
they came from."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from dualign.core import schema
from dualign.core.artifacts import replacing, write_parquet
from dualign.core.errors import DataError
from dualign.data.formats import Kind, Rejected, Skipped, Usable, label
from dualign.data.rows import excerpt
from dualign.data.sources import read
from dualign.params.data import PrepareParams

logger = logging.getLogger(__name__)

KINDS: tuple[Kind, ...] = ("sft", "helpful", "safety")
PAIRS: tuple[Kind, ...] = ("helpful", "safety")
TABLES: dict[Kind, tuple[str, pa.Schema]] = {
    "sft": ("sft", schema.SFT),
    "helpful": ("helpful_pairs", schema.HELPFUL_PAIRS),
    "safety": ("safety_pairs", schema.SAFETY_PAIRS),
}
RESERVED = ("search", "certify", "eval")
SET_SIZES = "prepare.search_prompts, prepare.certify_prompts or prepare.eval_prompts"
SPLITS = ("train", "heldout")
FAILED = "quarantine-failed.jsonl"
#: Rejected rows of one kind and source that are listed: a small file may unpack to any number of
#: them.
QUARANTINE_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class Row:
    """A record that passed, with the identity of its prompt and of the whole row.

    `family` is the identity of the prompt's first user turn alone: dialogues are released at
    several lengths, and a longer one holds the answers of the shorter."""

    record: Usable
    prompt_id: str
    key: str
    family: str


class Ledger:
    """What became of every record: counts by kind, source and outcome, and the quarantine."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[Kind, str, str]] = Counter()
        self.reasons: Counter[tuple[Kind, str, str]] = Counter()
        self.quarantine: list[dict[str, Any]] = []

    def count(self, kind: Kind, source: str, outcome: str) -> None:
        """Note a record as `records` (each is), `skipped`, `duplicates`, `reserved` or `kept`."""
        self.counts[kind, source, outcome] += 1

    def reject(self, kind: Kind, bad: Rejected) -> None:
        """Note one record as rejected, in quarantine unless too many of its source are there."""
        self.counts[kind, bad.where.source, "rejected"] += 1
        self.reasons[kind, bad.where.source, bad.reason] += 1
        beyond = self.counts[kind, bad.where.source, "rejected"] - QUARANTINE_LIMIT
        if beyond == 1:
            logger.warning(
                "%s: more than %d rows are rejected; the others are counted, but not listed in the"
                " quarantine",
                bad.where.source,
                QUARANTINE_LIMIT,
            )
        if beyond > 0:
            return
        entry = {
            "kind": kind,
            "reason": bad.reason,
            "detail": bad.detail,
            **asdict(bad.where),
            "row": bad.row,
        }
        self.quarantine.append(entry)

    def of(self, kind: Kind, source: str, outcome: str) -> int:
        """How many records of a source had this outcome."""
        return self.counts[kind, source, outcome]

    def by_reason(self) -> dict[str, int]:
        """Rejected records of all sources by reason."""
        total: Counter[str] = Counter()
        for (_, _, reason), count in self.reasons.items():
            total[reason] += count
        return dict(total)

    def why(self, kind: Kind, source: str) -> dict[str, int]:
        """Rejected records of a source by reason, the commonest first."""
        return {
            name: n for (k, s, name), n in self.reasons.most_common() if (k, s) == (kind, source)
        }


def prepare(params: PrepareParams, folder_out: Path, failed: Path | None = None) -> dict[str, Any]:
    """Write tables, prompt sets and quarantine into `folder_out`; return counts as metrics.

    Raises:
        DataError: a source cannot be read or has too many bad rows (these are then found in the
            file `failed`, by default `quarantine-failed.jsonl` beside `folder_out`), there are too
            few prompts for the sets, or a split stays empty.
    """
    ledger = Ledger()
    failed = failed or folder_out.with_name(FAILED)
    failed.unlink(missing_ok=True)
    rows = {kind: _settled(_gathered(kind, params, ledger), kind, ledger) for kind in KINDS}
    _check_sources(params, ledger, failed)
    family = _families(rows)
    reserved = _reserved(params, rows, family)
    taken = {family[prompt] for drawn in reserved.values() for prompt in drawn}
    tables = {kind: _table(rows[kind], kind, params, taken, ledger) for kind in KINDS}
    _check_splits(tables)
    train = {kind: _train_prompts(tables[kind]) for kind in PAIRS}
    sets = {
        **reserved,
        "pool": _draw("pool", params.pool_prompts, train, params.seed, "prepare.pool_prompts", {}),
    }
    _write(
        folder_out, tables, {name: _prompts(drawn, rows) for name, drawn in sets.items()}, ledger
    )
    return _metrics(params, tables, sets, ledger)


# --- rows: read, checked, settled -----------------------------------------------------------------


def _gathered(kind: Kind, params: PrepareParams, ledger: Ledger) -> Iterator[Row]:
    """The records of one kind that pass the checks of content."""
    for spec in getattr(params, kind):
        for item in read(spec, kind, Path(params.folder), params.world, params.seed):
            ledger.count(kind, item.where.source, "records")
            if isinstance(item, Usable):
                item = _examined(item, kind, params)
            if isinstance(item, Usable):
                yield _identified(item)
            elif isinstance(item, Rejected):
                ledger.reject(kind, item)
            else:
                ledger.count(kind, item.where.source, "skipped")


def _examined(record: Usable, kind: Kind, params: PrepareParams) -> Usable | Rejected | Skipped:
    """The record, or why it is rejected."""
    answers = [answer for answer in (record.chosen, record.rejected) if answer is not None]
    prompt = sum(len(turn["content"]) for turn in record.prompt)
    longest = max(map(len, answers))
    if not all(turn["content"] for turn in record.prompt):
        return _rejected(record, "empty_prompt", "a turn of the prompt is empty")
    if not all(answers):
        return _rejected(record, "empty_answer", "an answer is empty")
    if record.chosen == record.rejected:
        return _rejected(record, "identical_answers", "both answers are the same")
    if prompt > params.max_prompt_chars:
        return _rejected(
            record,
            "prompt_too_long",
            f"{prompt} characters; max_prompt_chars {params.max_prompt_chars}",
        )
    if longest > params.max_response_chars:
        detail = f"{longest} characters; max_response_chars {params.max_response_chars}"
        return _rejected(record, "response_too_long", detail)
    # The annotators of the world draw flags and preferences independently; to drop their noise
    # would bias both.
    judged = kind == "safety" and record.where.source != "world"
    if judged and record.chosen_is_safe is False and record.rejected_is_safe:
        return _rejected(
            record, "contradictory_flags", "the safer answer is flagged unsafe, the other one safe"
        )
    return record


def _rejected(record: Usable, reason: str, detail: str) -> Rejected:
    row: dict[str, Any] = asdict(record)
    row |= {"prompt": schema.last_user_text(record.prompt)}
    row = {name: value for name, value in row.items() if name != "where" and value is not None}
    return Rejected(record.where, reason, detail, excerpt(row))


def _identified(record: Usable) -> Row:
    prompt = schema.prompt_id(record.prompt)
    family = prompt if len(record.prompt) == 1 else _family(record)
    if record.rejected is None:
        return Row(record, prompt, f"{prompt}\x1e{record.chosen}", family)
    return Row(
        record, prompt, schema.pair_id(record.prompt, record.chosen, record.rejected), family
    )


def _family(record: Usable) -> str:
    first = next(turn["content"] for turn in record.prompt if turn["role"] == "user")
    return schema.prompt_id(schema.user(first))


def _settled(rows: Iterable[Row], kind: Kind, ledger: Ledger) -> list[Row]:
    """One row per identity, in order of appearance; contradicting rows are voted on."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key, []).append(row)
    settled = (
        _elected(group, kind, ledger) if len(group) > 1 else group[0] for group in groups.values()
    )
    return [row for row in settled if row is not None]


def _elected(group: list[Row], kind: Kind, ledger: Ledger) -> Row | None:
    """The row that most of a group agree on; the outvoted are rejected, in a tie all of them.

    Helpful pairs rank by helpfulness: a tie of their flags leaves the flags unknown and keeps the
    pair.
    """
    chosen = _majority([row.record.chosen for row in group])
    agreeing = [row for row in group if row.record.chosen == chosen]
    flags = [(row.record.chosen_is_safe, row.record.rejected_is_safe) for row in agreeing]
    known = [pair for pair in flags if pair != (None, None)] or flags[:1]
    pair = _majority(known)
    if pair is None and kind == "helpful" and agreeing:
        pair = (None, None)
    if pair is None:
        agreeing = []
    for row in group:
        if row not in agreeing:
            detail = f"the same answers are labelled differently in {len(group)} rows"
            ledger.reject(kind, _rejected(row.record, "contradictory_labels", detail))
    for row in agreeing[1:]:
        ledger.count(kind, row.record.where.source, "duplicates")
    if not agreeing or pair is None:
        return None
    return replace(
        agreeing[0],
        record=replace(agreeing[0].record, chosen_is_safe=pair[0], rejected_is_safe=pair[1]),
    )


T = TypeVar("T")


def _majority(votes: Sequence[T]) -> T | None:
    """The commonest vote, or None if there is none or if it is tied."""
    ranked = Counter(votes).most_common(2)
    tied = len(ranked) == 2 and ranked[0][1] == ranked[1][1]
    return ranked[0][0] if ranked and not tied else None


def _check_sources(params: PrepareParams, ledger: Ledger, failed: Path) -> None:
    """Refuse a source with too many rejected records, or with none to use."""
    for kind in KINDS:
        for source in _sources(params, kind):
            records = ledger.of(kind, source, "records")
            rejected = ledger.of(kind, source, "rejected")
            if rejected > params.max_rejected_share * records:
                _write_quarantine(failed, ledger)
                raise DataError(_too_many(params, kind, source, ledger, failed))
            if records == rejected + ledger.of(kind, source, "skipped"):
                raise DataError(
                    f"prepare.{kind}: {source} gives nothing: of {records} records {rejected} are"
                    " rejected and the others have no preference, or no safe answer, of this kind;"
                    f" remove it from prepare.{kind}"
                )
            logger.info("%s: %s: %d records, %d rejected", kind, source, records, rejected)


def _too_many(params: PrepareParams, kind: Kind, source: str, ledger: Ledger, failed: Path) -> str:
    records = ledger.of(kind, source, "records")
    rejected = ledger.of(kind, source, "rejected")
    common = ", ".join(
        f"{reason} {count}" for reason, count in list(ledger.why(kind, source).items())[:3]
    )
    first = next(
        entry for entry in ledger.quarantine if (entry["kind"], entry["source"]) == (kind, source)
    )
    return (
        f"prepare.{kind}: {source}: {rejected} of {records} records rejected ({common}), more than"
        f" prepare.max_rejected_share {params.max_rejected_share:g}; the first is"
        f" {first['file']}:{first['line']} ({first['detail']}); see {failed}, then mend the rows or"
        " raise the share"
    )


def _sources(params: PrepareParams, kind: Kind) -> list[str]:
    return list(dict.fromkeys(label(spec) for spec in getattr(params, kind)))


# --- prompts: which set each belongs to -----------------------------------------------------------


def _train_prompts(table: list[dict[str, Any]]) -> set[str]:
    return {row["prompt_id"] for row in table if row["split"] == "train"}


def _reserved(
    params: PrepareParams, rows: dict[Kind, list[Row]], family: dict[str, str]
) -> dict[str, dict[str, Kind]]:
    """The prompts of search, certify and eval, each with the kind of pair that it was drawn from.

    Of what shares its first question a set holds one prompt, and no other set any.
    """
    free: dict[Kind, set[str]] = {}
    for kind in PAIRS:
        free[kind] = {row.prompt_id for row in rows[kind]}
    sets: dict[str, dict[str, Kind]] = {}
    for name in RESERVED:
        count = getattr(params, f"{name}_prompts")
        sets[name] = _draw(name, count, free, params.seed, SET_SIZES, family)
        taken = {family[prompt] for prompt in sets[name]}
        for kind, ids in free.items():
            free[kind] = {prompt for prompt in ids if family[prompt] not in taken}
    return sets


def _families(rows: dict[Kind, list[Row]]) -> dict[str, str]:
    """The family of every prompt of a pair."""
    return {row.prompt_id: row.family for kind in PAIRS for row in rows[kind]}


def _draw(
    name: str,
    count: int,
    free: dict[Kind, set[str]],
    seed: int,
    remedy: str,
    family: dict[str, str],
) -> dict[str, Kind]:
    """`count` prompts of the lowest hash, half of each kind of pair, in the order of the hash.

    Of the prompts of one family that with the lowest hash is drawn; a prompt that `family` does not
    know is its own."""

    def place(prompt_id: str) -> tuple[float, str]:
        return _place(seed, name, prompt_id), prompt_id

    drawn: dict[str, Kind] = {}
    met: set[str] = set()
    for kind, wanted in zip(PAIRS, (count - count // 2, count // 2), strict=True):
        left: dict[str, str] = {}
        for prompt in sorted(free[kind], key=place):
            left.setdefault(family.get(prompt, prompt), prompt)
        first = [prompt for group, prompt in left.items() if group not in met]
        if len(first) < wanted:
            raise DataError(
                f"prepare: the set {name!r} takes {wanted} prompts from the {kind} pairs, but"
                f" {len(first)} are left; lower {remedy}, or add {kind} pairs with other prompts"
            )
        drawn |= dict.fromkeys(first[:wanted], kind)
        met |= {family.get(prompt, prompt) for prompt in first[:wanted]}
    return dict(sorted(drawn.items(), key=lambda item: place(item[0])))


def _place(seed: int, name: str, prompt_id: str) -> float:
    """Where in [0, 1) a prompt stands in the draw of `name`, by its arguments alone."""
    return int.from_bytes(sha256(f"{seed}:{name}:{prompt_id}".encode()).digest()[:6]) / 2**48


def _table(
    rows: list[Row], kind: Kind, params: PrepareParams, taken: set[str], ledger: Ledger
) -> list[dict[str, Any]]:
    """The rows of one table, without those whose first question is that of a reserved prompt."""
    table = []
    for row in rows:
        ledger.count(kind, row.record.where.source, "reserved" if row.family in taken else "kept")
        if row.family not in taken:
            heldout = _place(params.seed, "heldout", row.family) < params.heldout_share
            table.append(_as_dict(row, "heldout" if heldout else "train"))
    return table


def _as_dict(row: Row, split: str) -> dict[str, Any]:
    record = row.record
    common = {
        "prompt_id": row.prompt_id,
        "prompt": record.prompt,
        "source": record.where.source,
        "split": split,
    }
    if record.rejected is None:
        return {**common, "response": record.chosen}
    return {
        **common,
        "pair_id": row.key,
        "chosen": record.chosen,
        "rejected": record.rejected,
        "chosen_is_safe": record.chosen_is_safe,
        "rejected_is_safe": record.rejected_is_safe,
    }


def _check_splits(tables: dict[Kind, list[dict[str, Any]]]) -> None:
    for kind, table in tables.items():
        for split in SPLITS:
            if not any(row["split"] == split for row in table):
                raise DataError(
                    f"prepare.{kind}: {TABLES[kind][0]} has no row in split {split!r}: outside the"
                    f" sets {len(table)} rows are left; add rows, raise prepare.heldout_share, or"
                    f" lower {SET_SIZES}"
                )


def _prompts(drawn: dict[str, Kind], rows: dict[Kind, list[Row]]) -> list[dict[str, Any]]:
    """The rows of a prompt set: text and source of the first pair that asks each prompt."""
    first: dict[tuple[Kind, str], Usable] = {}
    for kind in PAIRS:
        for row in rows[kind]:
            first.setdefault((kind, row.prompt_id), row.record)
    records = ((prompt, first[kind, prompt]) for prompt, kind in drawn.items())
    return [
        {"prompt_id": prompt, "prompt": rec.prompt, "source": rec.where.source}
        for prompt, rec in records
    ]


# --- what is written ------------------------------------------------------------------------------


def _write(
    folder: Path,
    tables: dict[Kind, list[dict[str, Any]]],
    sets: dict[str, list[dict[str, Any]]],
    ledger: Ledger,
) -> None:
    for kind, table in tables.items():
        name, columns = TABLES[kind]
        write_parquet(folder / f"{name}.parquet", table, columns)
    for name, prompts in sets.items():
        write_parquet(folder / f"{name}.parquet", prompts, schema.PROMPTS)
    _write_quarantine(folder / "quarantine.jsonl", ledger)


def _write_quarantine(path: Path, ledger: Ledger) -> None:
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in ledger.quarantine)
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.writelines(lines)


def _metrics(
    params: PrepareParams,
    tables: dict[Kind, list[dict[str, Any]]],
    sets: dict[str, dict[str, Kind]],
    ledger: Ledger,
) -> dict[str, Any]:
    """Counts per table and split, set, source and outcome, reason; the flags' balance."""
    return {
        "tables": {TABLES[kind][0]: _splits(table) for kind, table in tables.items()},
        "prompts": {name: len(drawn) for name, drawn in sets.items()},
        "rejected": ledger.by_reason(),
        "safety_flags": _flags(tables["safety"]),
        "sources": {kind: _by_source(kind, params, ledger) for kind in KINDS},
    }


def _splits(table: list[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["split"] for row in table))


def _by_source(kind: Kind, params: PrepareParams, ledger: Ledger) -> dict[str, Any]:
    return {source: _outcomes(kind, source, ledger) for source in _sources(params, kind)}


def _flags(table: list[dict[str, Any]]) -> dict[str, int]:
    """Safety pairs by the flags of chosen and rejected answer; `unflagged` where one is unknown."""
    names = {True: "safe", False: "unsafe"}
    pairs = [(row["chosen_is_safe"], row["rejected_is_safe"]) for row in table]
    return dict(
        Counter(
            "unflagged" if None in pair else f"{names[pair[0]]}_{names[pair[1]]}" for pair in pairs
        )
    )


def _outcomes(kind: Kind, source: str, ledger: Ledger) -> dict[str, Any]:
    names = ("records", "kept", "reserved", "duplicates", "skipped", "rejected")
    counts = {name: ledger.of(kind, source, name) for name in names}
    share = counts["rejected"] / counts["records"]
    return {**counts, "rejected_share": share, "rejected_by_reason": ledger.why(kind, source)}
