"""The certificates: what is promised, the tests in order, what more prompts would buy."""

from __future__ import annotations

from dataclasses import dataclass

from dualign.core.records import CandidateTest, Certified, SolvedDual
from dualign.report.diagnosis import Promise, PromptsGain, prompts_gain, required_in_words
from dualign.report.sections.base import FinishedRun, Section

#: Methods whose level holds for many prompts.
_FOR_MANY = ("clustered_t", "prediction_powered")


@dataclass(frozen=True)
class Card:
    """A certificate: the test of the returned candidate, or of the first, is the `last`.

    `exact`: its level holds for every number of prompts. `uneven` failed with every bound within
    its limit: the answers of others, by which they were judged, are worth too little to them."""

    name: str
    found: Certified
    promises: list[Promise]
    exact: bool
    last: CandidateTest
    failed: list[Promise]
    uneven: list[CandidateTest]
    untested: list[str]
    gain: PromptsGain | None


def section(run: FinishedRun) -> Section | None:
    """None where nothing was tested."""
    certificates = cards(run)
    values = {"certificates": certificates}
    return Section("certificate", "Certificate", values) if certificates else None


def cards(run: FinishedRun) -> list[Card]:
    """A card for each row of `certify`."""
    certificates = run.comparison.certificates
    return [_card(name, found, run.dual) for name, found in certificates.items()]


def _card(name: str, found: Certified, dual: SolvedDual | None) -> Card:
    last = found.passed or found.tests[0]
    promises = [required_in_words(required) for required in found.requirements]
    checked = zip(promises, last.checks, strict=True)
    return Card(
        name=name,
        found=found,
        promises=promises,
        exact=not any(required.method in _FOR_MANY for required in found.requirements),
        last=last,
        failed=[promise for promise, check in checked if not check.kept],
        uneven=[test for test in found.tests if not test.certified and _bounded(test, found)],
        untested=found.candidates[len(found.tests) :],
        gain=prompts_gain(last, found.requirements, dual),
    )


def _bounded(test: CandidateTest, found: Certified) -> bool:
    """Whether every bound is within its limit."""
    checked = zip(test.checks, found.requirements, strict=True)
    return all(check.bound <= required.limit for check, required in checked)
