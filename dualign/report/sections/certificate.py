"""The certificates: what is promised, the tests in order, what more prompts would buy."""

from __future__ import annotations

from dualign.report.diagnosis import prompts_gain, required_in_words
from dualign.report.sections.base import FinishedRun, Row, Section


def section(run: FinishedRun) -> Section | None:
    """None where nothing was tested."""
    certificates = cards(run)
    return (
        Section("certificate", "Certificate", {"certificates": certificates})
        if certificates
        else None
    )


def cards(run: FinishedRun) -> list[Row]:
    """A card for each row of `certify`."""
    certificates = run.comparison["certificates"]
    return [_card(name, metrics, run.dual) for name, metrics in certificates.items()]


def _card(name: str, metrics: Row, dual: Row) -> Row:
    tests = metrics["tests"]
    last = next((test for test in tests if test["candidate"] == metrics["returned"]), tests[0])
    required = [{**one, **required_in_words(one)} for one in metrics["requirements"]]
    checked = zip(required, last["checks"], strict=True)
    return {
        "name": name,
        **metrics,
        "requirements": required,
        "last": last,
        "failed": [one for one, check in checked if not check["kept"]],
        "untested": metrics["candidates"][len(tests) :],
        "gain": prompts_gain(last, metrics["requirements"], dual),
    }
