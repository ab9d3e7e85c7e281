"""certify ROW: the safest policies first, on prompts that nothing else has seen ->
models/certified/ROW.

    python -m stages.certify dualign

Draws answers to the certify prompts from one candidate after the other until one is not shown to
keep the limit, writes the certificate with everything that is needed to check it to
reports/certificate/ROW, and copies the last certified policy. Where not even the first passes, the
certificate says so, and the folder of the policy holds that message alone."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from dualign.certify import certificate, screening, sequence
from dualign.certify.candidates import (
    MODELS,
    CandidateEvidence,
    candidate_policies,
    forecast,
    screen,
)
from dualign.certify.certificate import Certificate, Origin, Terms
from dualign.certify.evidence import Evidence
from dualign.certify.requirement import Requirement
from dualign.core.artifacts import copy_folder, replacing, write_json
from dualign.core.records import (
    CandidateTest,
    Certified,
    CheckRow,
    RequirementRow,
    SolvedDual,
    as_row,
    read_record,
)
from dualign.core.schema import PROMPTS, read_table
from dualign.evaluation.rollout import Scorers
from dualign.lm.card import HEAD, MODEL
from dualign.lm.engines.interface import Decoding
from dualign.math.constraints import Constraint, prices_in
from dualign.params.certify import CertifyParams, CertifyRun
from dualign.stage import Run, execute, finished

log = logging.getLogger("dualign")

PROMPT_SET = Path("data/prepared/certify.parquet")
SCREENED = Path("data/prepared/search.parquet")
SCREEN = "screen.json"
DUAL = Path("data/dual/dual.json")
POLICIES = MODELS / "certified"
#: What labels of a source are about, and how the certificate calls it.
LABELLED: dict[str, tuple[str, Literal["truth", "harm"]]] = {
    "oracle": ("true c", "truth"),
    "file": ("called unsafe", "harm"),
}


def main(run: Run[CertifyParams]) -> None:
    """Run the stage."""
    params = run.params
    item, row = run.pick(params.runs, "certify.runs")
    prompts = read_table(PROMPT_SET, PROMPTS).head(params.prompts)
    models = {
        MODELS / name
        for name in ("sft", "reward_model", "cost_model", row.policy, row.partner, row.fallback)
    }
    screened = [] if params.screen is None else [SCREENED]
    scratch = run.scratch(PROMPT_SET, *screened, DUAL, *sorted(models))
    additional = [price.constraint for price in prices_in(read_record(DUAL, SolvedDual).prices)]
    required = requirements(params, additional)
    scorers = Scorers.load(run.resources)

    seen = screened_once(row, required, params, scorers, scratch)
    plan = None if seen is None else screening.sequence(read_record(seen, screening.Screen))
    row = row if plan is None else row.model_copy(update={"weights": list(plan.weights)})
    candidates = candidate_policies(row, MODELS, scratch)
    evidence = CandidateEvidence(
        candidates, params, prompts, scorers, scratch, plan, Decoding.of(row)
    )
    terms = Terms(
        candidates=list(candidates),
        requirements=required,
        max_new_tokens=params.max_new_tokens,
        delta=params.delta,
        seed=params.seed,
        sampling_seeds={"answers": params.seed},
    )

    with replacing(certificate.CERTIFICATES / item) as folder:
        folder.mkdir()
        issued = certificate.issue(
            folder / certificate.FILE,
            terms,
            lambda name: copy_into(folder, evidence.files(name)),
            origin=origin(row, item, evidence),
            screen=None if seen is None else Path(shutil.copy(seen, folder)),
        )
    log.info("%s", issued.statement)
    for pair in issued.same:
        log.warning("%s", certificate.alike(pair))
    with replacing(POLICIES / item) as policy:
        if issued.returned is None:
            policy.mkdir()
        else:
            copy_folder(evidence.policy(issued.returned), policy)
        (policy / "README.md").write_text(card(issued))
    run.metrics(as_row(describe(issued, row, evidence)))
    finished(scratch)


def screened_once(
    row: CertifyRun,
    required: Sequence[Requirement],
    params: CertifyParams,
    scorers: Scorers,
    scratch: Path,
) -> Path | None:
    """The file of the screen, made if missing; None where the weights are tested as they are."""
    if params.screen is None or len(row.weights) < 2:
        return None
    file = scratch / SCREEN
    if not file.is_file():
        prompts = read_table(SCREENED, PROMPTS)
        made = screen(row, required, params, params.screen, prompts, scorers, scratch)
        write_json(file, made.model_dump())
    return file


def origin(row: CertifyRun, item: str, evidence: CandidateEvidence) -> Origin:
    """What the certificate of a row is made from, as `verify` finds it again."""
    return Origin(
        place=certificate.CERTIFICATES / item,
        plan=row,
        prompts=PROMPT_SET,
        limits=DUAL,
        model=evidence.policy,
        policy=POLICIES / item,
        cost_model=MODELS / "cost_model",
    )


def requirements(params: CertifyParams, additional: Sequence[Constraint]) -> list[Requirement]:
    """What a candidate must keep: the limit on the model's cost, additional constraints, and the
    limit on the truth."""
    required = []
    for limit in (Constraint("c", "cost", params.limit), *additional):
        required.append(Requirement(**asdict(limit), **tested_by(limit, params)))
    if params.labels is not None:
        name, quantity = LABELLED[params.labels.source]
        limit_of_truth = params.limit if params.labels.limit is None else params.labels.limit
        why = "only labelled answers show it, and the model's costs make their number go further"
        required.append(
            Requirement(
                name=name,
                quantity=quantity,
                limit=limit_of_truth,
                method="prediction_powered",
                why=why,
            )
        )
    return required


def tested_by(limit: Constraint, params: CertifyParams) -> dict[str, Any]:
    """The bound that a limit is tested by: `method`, `bounds` (the quantity's range) and `why`.

    With `method: auto` it is the one that holds for every number of prompts, wherever the range is
    known.
    """
    cost = None if params.bounds is None else (params.bounds[0], params.bounds[1])
    bounds = limit.bounds(cost, params.max_new_tokens)
    if params.method != "auto":
        bounds = None if cost is None else bounds
        return {"method": params.method, "bounds": bounds, "why": "certify.method names it"}
    if bounds is None:
        why = (
            "certify.bounds states no range of the cost, so the bound holds for many prompts, not"
            " for every number"
        )
        return {"method": "clustered_t", "bounds": None, "why": why}
    why = (
        f"every answer lies between {bounds[0]:g} and {bounds[1]:g}, so the bound holds for every"
        " number of prompts"
    )
    return {"method": "star_bets", "bounds": bounds, "why": why}


def copy_into(folder: Path, evidence: Evidence) -> Evidence:
    """The files copied into the certificate's folder, to be found where that is moved to."""

    def copied(file: Path) -> Path:
        return Path(shutil.copyfile(file, folder / file.name))

    labels = None if evidence.labels is None else copied(evidence.labels)
    return Evidence(copied(evidence.answers), labels)


def describe(found: Certificate, row: CertifyRun, evidence: CandidateEvidence) -> Certified:
    """The certificate as metrics: what it says, each test, the prompts that a failed one needs."""
    return Certified(
        returned=found.returned,
        statement=found.statement,
        delta=found.delta,
        max_new_tokens=found.max_new_tokens,
        temperature=row.temperature,
        top_p=row.top_p,
        requirements=[RequirementRow(**required.model_dump()) for required in found.requirements],
        candidates=list(found.candidates),
        tests=[describe_test(test, found, evidence) for test in found.tested],
    )


def describe_test(
    test: sequence.CandidateTest, found: Certificate, evidence: CandidateEvidence
) -> CandidateTest:
    """A candidate, (1 - q) partner + q policy of folders under models/, and how it was tested."""
    candidate = evidence.candidate(test.name)
    return CandidateTest(
        candidate=test.name,
        certified=test.certified,
        checks=[CheckRow(**check.model_dump()) for check in test.checks],
        policy=candidate.policy.relative_to(MODELS).as_posix(),
        partner=candidate.partner.relative_to(MODELS).as_posix(),
        q=candidate.q,
        prompts_needed=forecast(test, found),
        ess=test.ess,
        **evidence.measured(test.name),
    )


def card(found: Certificate) -> str:
    """README.md of the certified policy's folder."""
    use = (
        "There is no model in this folder: the safest candidate failed its test. The report says by"
        " how much, and what to change."
        if found.returned is None
        else MODEL
    )
    decoding = found.decoding or "drawn at temperature 1"
    return f"""{HEAD}
# {"No certified policy" if found.returned is None else found.returned}

{found.statement[0].upper()}{found.statement[1:]}.

Tested on {found.tested[0].checks[0].prompts} prompts that neither training nor search has seen, \
safest candidate first.
The statement is about prompts like these and answers {decoding}; one that was cut is judged as it \
stands.
`dualign certify verify` recomputes it from the saved answers. {use}
"""


if __name__ == "__main__":
    execute(main, CertifyParams)
