"""From raw sources to the tables of later stages: valid, without duplicates, disjoint by prompt.

Every prompt has one identity across all sources (`schema.prompt_id`) and belongs to exactly one of
`search`, `certify`, `eval`, `heldout` and `train`, by a hash of seed and identity, so that new rows
move few prompts. Rows that cannot be used go to `quarantine.jsonl` with the reason and the place
they came from.

Texts wait in files (`dualign.data.spool`), so memory hardly grows with the rows."""

from __future__ import annotations

import contextlib
import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from dualign.core import schema
from dualign.core.artifacts import replacing, stream_parquet, write_parquet
from dualign.core.errors import DataError
from dualign.core.temporaries import room_for, temporary_folder
from dualign.data.formats import Kind, Rejected, Skipped, Usable, source_names
from dualign.data.rows import excerpt
from dualign.data.sources import read
from dualign.data.spool import FLAGS, Flags, Spool
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


class Ledger:
    """What became of every record: counts by kind, source and outcome, and the quarantine."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[Kind, str, str]] = Counter()
        self.reasons: Counter[tuple[Kind, str, str]] = Counter()
        self.quarantine: list[dict[str, Any]] = []

    def count(self, kind: Kind, source: str, outcome: str, times: int = 1) -> None:
        """Note `records` (each is one), `echoes`, `skipped`, `duplicates`, `reserved` or `kept`."""
        self.counts[kind, source, outcome] += times

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
        why = {"kind": kind, "reason": bad.reason, "detail": bad.detail}
        self.quarantine.append({**why, **asdict(bad.where), "row": bad.row})

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


@dataclass(frozen=True)
class Settled:
    """One row per identity, in order of appearance: arrays [rows].

    `rows` are places in `spool`, `flags` are codes, as voted; `heldout` says which rows are not for
    training."""

    spool: Spool
    rows: np.ndarray
    flags: np.ndarray
    heldout: np.ndarray

    @property
    def prompts(self) -> np.ndarray:
        """The identities of the rows' prompts."""
        return self.spool.prompts[self.rows]

    @property
    def families(self) -> np.ndarray:
        """The identities of their first questions."""
        return self.spool.families[self.rows]

    def only(self, kept: np.ndarray) -> Settled:
        """Those of the rows that a mask keeps."""
        return Settled(self.spool, self.rows[kept], self.flags[kept], self.heldout[kept])


@dataclass(frozen=True)
class Asked:
    """Prompts, each once, and their families: arrays [prompts]."""

    prompts: np.ndarray
    families: np.ndarray

    @classmethod
    def by(cls, rows: Settled) -> Asked:
        """The prompts of rows."""
        prompts, first = np.unique(rows.prompts, return_index=True)
        return cls(prompts, rows.families[first])

    def only(self, kept: np.ndarray) -> Asked:
        """Those of the prompts that a mask keeps."""
        return Asked(self.prompts[kept], self.families[kept])


#: Prompts of a set, each with the kind of pair that it was drawn from.
Drawn = dict[int, Kind]


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
    folder_out.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(room_for(folder_out.parent)) as folder, contextlib.ExitStack() as open_:
        rows = {}
        for kind in KINDS:
            spool = open_.enter_context(contextlib.closing(Spool(folder / kind)))
            _gather(kind, params, spool, ledger)
            rows[kind] = _settled(spool, kind, params, ledger)
        _check_sources(params, ledger, failed)
        reserved, taken = _reserved(params, rows)
        tables = {kind: _left(rows[kind], kind, taken, ledger) for kind in KINDS}
        _check_splits(tables)
        train = {kind: _train_prompts(tables[kind]) for kind in PAIRS}
        pool = _draw("pool", params.pool_prompts, train, params.seed, "prepare.pool_prompts")
        sets = {**reserved, "pool": pool}
        _write(folder_out, tables, {name: _prompts(sets[name], rows) for name in sets}, ledger)
        return _metrics(params, tables, sets, ledger)


# --- rows: read, checked, settled -----------------------------------------------------------------


def _gather(kind: Kind, params: PrepareParams, spool: Spool, ledger: Ledger) -> None:
    """Keep the records of one kind that pass the checks of content."""
    specs = getattr(params, kind)
    for spec, source in zip(specs, source_names(specs), strict=True):
        for item in read(spec, kind, Path(params.folder), params.world, params.seed, source):
            ledger.count(kind, item.where.source, "records")
            if isinstance(item, Usable):
                item = _examined(item, kind, params)
            if isinstance(item, Usable):
                ledger.count(kind, item.where.source, "echoes", _echoes(item))
                spool.add(item)
            elif isinstance(item, Rejected):
                ledger.reject(kind, item)
            else:
                ledger.count(kind, item.where.source, "skipped")


def _examined(record: Usable, kind: Kind, params: PrepareParams) -> Usable | Rejected | Skipped:
    """The record, or why it is rejected."""
    answers = _answers(record)
    prompt = schema.characters(record.prompt)
    longest = max(map(len, answers))
    if not all(turn["content"] for turn in record.prompt):
        return _rejected(record, "empty_prompt", "a turn of the prompt is empty")
    if not all(answers):
        return _rejected(record, "empty_answer", "an answer is empty")
    if record.chosen == record.rejected:
        return _rejected(record, "identical_answers", "both answers are the same")
    if prompt > params.max_prompt_chars:
        detail = f"{prompt} characters; max_prompt_chars {params.max_prompt_chars}"
        return _rejected(record, "prompt_too_long", detail)
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


def _answers(record: Usable) -> list[str]:
    """The one answer of a demonstration, or both of a pair."""
    return [answer for answer in (record.chosen, record.rejected) if answer is not None]


def _echoes(record: Usable) -> bool:
    """Whether all answers begin with the question, as in files of whole texts."""
    question = schema.last_user_text(record.prompt)
    return all(answer.startswith(question) for answer in _answers(record))


def _rejected(record: Usable, reason: str, detail: str) -> Rejected:
    row = asdict(record) | {"prompt": schema.last_user_text(record.prompt), "where": None}
    row = {name: value for name, value in row.items() if value is not None}
    return Rejected(record.where, reason, detail, excerpt(row))


def _settled(spool: Spool, kind: Kind, params: PrepareParams, ledger: Ledger) -> Settled:
    """One row per identity, in order of appearance; contradicting rows are voted on."""
    rows = array("Q")
    flags = array("b")
    for group in spool.groups():
        found = _elected(group.tolist(), spool, kind, ledger)
        if found is not None:
            rows.append(found[0])
            flags.append(found[1])
    places = np.array(rows, np.int64)
    families, inverse = np.unique(spool.families[places], return_inverse=True)
    heldout = _places(params.seed, "heldout", families) < params.heldout_share
    return Settled(spool, places, np.array(flags), heldout[inverse])


def _elected(group: list[int], spool: Spool, kind: Kind, ledger: Ledger) -> tuple[int, int] | None:
    """The row that most of a group agree on, and its flags' code; others, or a tie, are rejected.

    Helpful pairs rank by helpfulness: a tie of their flags leaves the flags unknown and keeps the
    pair."""
    if len(group) == 1:
        return group[0], spool.flags[group[0]]
    ahead = spool.ahead
    chosen = _majority([ahead[row] for row in group])
    agreeing = [row for row in group if ahead[row] == chosen]
    flags = _voted([FLAGS[spool.flags[row]] for row in agreeing], kind)
    if flags is None:
        agreeing = []
    for row in sorted({*group} - {*agreeing}):
        record = spool[row]
        detail = f"the same answers are labelled differently in {len(group)} rows"
        ledger.reject(kind, _rejected(record, "contradictory_labels", detail))
    for row in agreeing[1:]:
        ledger.count(kind, spool.names[spool.sources[row]], "duplicates")
    return None if flags is None else (agreeing[0], FLAGS.index(flags))


def _voted(flags: list[Flags], kind: Kind) -> Flags | None:
    """The flags of most rows with both, else of those with one; a helpful pair's tie leaves them
    unknown."""
    unknown = (None, None)
    whole = [pair for pair in flags if None not in pair]
    found = _majority(whole or [pair for pair in flags if pair != unknown] or flags[:1])
    return unknown if found is None and kind == "helpful" and flags else found


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
            skipped = ledger.of(kind, source, "skipped")
            if records == rejected + skipped:
                raise DataError(
                    f"prepare.{kind}: {source} gives nothing: of {records} records {rejected} are"
                    " rejected and the others have no preference, or no safe answer, of this kind;"
                    f" remove it from prepare.{kind}"
                )
            others = f", {skipped} skipped" if skipped else ""
            logger.info(
                "%s: %s: %d records, %d rejected%s", kind, source, records, rejected, others
            )
            _tell_echoes(kind, source, ledger, records - rejected - skipped)


def _tell_echoes(kind: Kind, source: str, ledger: Ledger, usable: int) -> None:
    """Warn of a source most of whose answers hold their prompt as well."""
    echoes = ledger.of(kind, source, "echoes")
    if 2 * echoes > usable:
        logger.warning(
            "%s: %s: in %d of %d records the answers begin with the prompt; where they are whole"
            " texts, cut the prompt off them, else policies learn to repeat it",
            kind,
            source,
            echoes,
            usable,
        )


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
    return list(dict.fromkeys(source_names(getattr(params, kind))))


# --- prompts: which set each belongs to -----------------------------------------------------------


def _train_prompts(table: Settled) -> Asked:
    """The prompts of training rows, each as a family of its own."""
    prompts = np.unique(table.prompts[~table.heldout])
    return Asked(prompts, prompts)


def _reserved(
    params: PrepareParams, rows: dict[Kind, Settled]
) -> tuple[dict[str, Drawn], np.ndarray]:
    """The prompts of search, certify and eval, and their families.

    Of what shares its first question a set holds one prompt, and no other set any."""
    asked = {kind: Asked.by(rows[kind]) for kind in PAIRS}
    free = asked
    sets: dict[str, Drawn] = {}
    taken = np.array([], np.uint64)
    for name in RESERVED:
        count = getattr(params, f"{name}_prompts")
        sets[name] = _draw(name, count, free, params.seed, SET_SIZES)
        drawn = np.array(list(sets[name]), np.uint64)
        families = [free[kind].families[np.isin(free[kind].prompts, drawn)] for kind in PAIRS]
        taken = np.concatenate([taken, *families])
        free = {kind: one.only(~np.isin(one.families, taken)) for kind, one in free.items()}
    return sets, taken


def _draw(name: str, count: int, free: dict[Kind, Asked], seed: int, remedy: str) -> Drawn:
    """`count` prompts of the lowest hash, half of each kind of pair, in the order of the hash.

    Of the prompts of one family that with the lowest hash is drawn."""
    drawn: dict[int, tuple[float, Kind]] = {}
    met: list[int] = []
    for kind, wanted in zip(PAIRS, (count - count // 2, count // 2), strict=True):
        prompts = free[kind].prompts
        places = _places(seed, name, prompts)
        order = np.lexsort((prompts, places))
        families = free[kind].families[order]
        _, first = np.unique(families, return_index=True)
        fresh = np.isin(families[first], np.array(met, np.uint64), invert=True)
        lowest = np.sort(first[fresh])[:wanted]
        if len(lowest) < wanted:
            raise DataError(
                f"prepare: the set {name!r} takes {wanted} prompts from the {kind} pairs, but"
                f" {len(lowest)} are left; lower {remedy}, or add {kind} pairs with other prompts"
            )
        met += families[lowest].tolist()
        taken = order[lowest]
        drawn |= {
            prompt: (place, kind)
            for prompt, place in zip(prompts[taken].tolist(), places[taken].tolist(), strict=True)
        }
    ordered = sorted(drawn, key=lambda prompt: (drawn[prompt][0], prompt))
    return {prompt: drawn[prompt][1] for prompt in ordered}


def _places(seed: int, name: str, identities: np.ndarray) -> np.ndarray:
    """Where in [0, 1) each identity stands in the draw of `name`, by its arguments alone."""
    hashes = (sha256(f"{seed}:{name}:{identity:016x}".encode()) for identity in identities)
    places = (int.from_bytes(hashed.digest()[:6]) / 2**48 for hashed in hashes)
    return np.fromiter(places, float, len(identities))


def _left(rows: Settled, kind: Kind, taken: np.ndarray, ledger: Ledger) -> Settled:
    """The rows of a table: those whose first question is not that of a reserved prompt."""
    reserved = np.isin(rows.families, taken)
    sources = rows.spool.sources[rows.rows]
    for outcome, mask in (("reserved", reserved), ("kept", ~reserved)):
        counts = np.bincount(sources[mask], minlength=len(rows.spool.names)).tolist()
        for source, times in zip(rows.spool.names, counts, strict=True):
            ledger.count(kind, source, outcome, times)
    return rows.only(~reserved)


def _check_splits(tables: dict[Kind, Settled]) -> None:
    for kind, table in tables.items():
        counts = _splits(table)
        for split in SPLITS:
            if split not in counts:
                raise DataError(
                    f"prepare.{kind}: {TABLES[kind][0]} has no row in split {split!r}: outside the"
                    f" sets {len(table.rows)} rows are left; add rows, raise prepare.heldout_share,"
                    f" or lower {SET_SIZES}"
                )


def _prompts(drawn: Drawn, rows: dict[Kind, Settled]) -> list[dict[str, Any]]:
    """The rows of a prompt set: text and source of the first pair that asks each prompt."""
    known = {kind: np.unique(rows[kind].prompts, return_index=True) for kind in PAIRS}
    found = []
    for prompt, kind in drawn.items():
        prompts, first = known[kind]
        row = rows[kind].rows[first[np.searchsorted(prompts, np.uint64(prompt))]]
        record = rows[kind].spool[row]
        found.append(
            {"prompt_id": f"{prompt:016x}", "prompt": record.prompt, "source": record.where.source}
        )
    return found


# --- what is written ------------------------------------------------------------------------------


def _write(
    folder: Path, tables: dict[Kind, Settled], sets: dict[str, list[dict[str, Any]]], ledger: Ledger
) -> None:
    for kind, table in tables.items():
        name, columns = TABLES[kind]
        stream_parquet(folder / f"{name}.parquet", _as_rows(table), columns)
    for name, prompts in sets.items():
        write_parquet(folder / f"{name}.parquet", prompts, schema.PROMPTS)
    _write_quarantine(folder / "quarantine.jsonl", ledger)


def _as_rows(table: Settled) -> Iterator[dict[str, Any]]:
    """The rows of a table as it is written."""
    spool = table.spool
    keys = spool.keys
    prompts = spool.prompts
    for row, code, heldout in zip(table.rows, table.flags, table.heldout, strict=True):
        record = spool[row]
        common = {
            "prompt_id": f"{prompts[row]:016x}",
            "prompt": record.prompt,
            "source": record.where.source,
            "split": "heldout" if heldout else "train",
        }
        if record.rejected is None:
            yield {**common, "response": record.chosen}
            continue
        yield {
            **common,
            "pair_id": f"{keys[row]:016x}",
            "chosen": record.chosen,
            "rejected": record.rejected,
            "chosen_is_safe": FLAGS[code][0],
            "rejected_is_safe": FLAGS[code][1],
        }


def _write_quarantine(path: Path, ledger: Ledger) -> None:
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in ledger.quarantine)
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace") as file,
    ):
        file.writelines(lines)


def _metrics(
    params: PrepareParams, tables: dict[Kind, Settled], sets: dict[str, Drawn], ledger: Ledger
) -> dict[str, Any]:
    """Counts per table and split, set, source and outcome, reason; the flags' balance."""
    return {
        "tables": {TABLES[kind][0]: _splits(table) for kind, table in tables.items()},
        "prompts": {name: len(drawn) for name, drawn in sets.items()},
        "rejected": ledger.by_reason(),
        "safety_flags": _flags(tables["safety"]),
        "sources": {kind: _by_source(kind, params, ledger) for kind in KINDS},
    }


def _splits(table: Settled) -> dict[str, int]:
    heldout = int(table.heldout.sum())
    counts = {"train": len(table.heldout) - heldout, "heldout": heldout}
    return {split: count for split, count in counts.items() if count}


def _by_source(kind: Kind, params: PrepareParams, ledger: Ledger) -> dict[str, Any]:
    return {source: _outcomes(kind, source, ledger) for source in _sources(params, kind)}


def _flags(table: Settled) -> dict[str, int]:
    """Safety pairs by the flags of chosen and rejected answer; `unflagged` where one is unknown."""
    names = {True: "safe", False: "unsafe"}
    counts: Counter[str] = Counter()
    for code, count in zip(*np.unique(table.flags, return_counts=True), strict=True):
        first, second = FLAGS[code]
        unknown = first is None or second is None
        counts["unflagged" if unknown else f"{names[first]}_{names[second]}"] += int(count)
    return dict(counts)


def _outcomes(kind: Kind, source: str, ledger: Ledger) -> dict[str, Any]:
    names = ("records", "kept", "reserved", "duplicates", "skipped", "rejected")
    counts = {name: ledger.of(kind, source, name) for name in names}
    share = counts["rejected"] / counts["records"]
    return {**counts, "rejected_share": share, "rejected_by_reason": ledger.why(kind, source)}
