"""The report page: every section rendered and put into one file.

The page needs no network, and none of it depends on its script: that sorts and filters what is
there. Everything that comes from data or models is escaped, and a Content-Security-Policy names the
one script by its hash, so that a browser runs no other. What a run did not write (no embedded
world, a policy without a search, a stage that did not run) is left out."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dualign.core.artifacts import replacing
from dualign.core.units import decoding_in_words
from dualign.report import formatting
from dualign.report.diagnosis import is_tilt
from dualign.report.sections import (
    additional,
    answers,
    betas,
    categories,
    certificate,
    differences,
    earlier,
    facts,
    frontier,
    harness,
    judges,
    methods,
    multipliers,
    ranking,
    refusals,
    rerun,
    searches,
    seeds,
    stopped,
    suites,
    verdict,
)
from dualign.report.sections.base import FinishedRun, Section

#: The sections in the order of the page.
SECTIONS: tuple[Callable[[FinishedRun], Section | None], ...] = (
    verdict.section,
    certificate.section,
    frontier.section,
    betas.section,
    searches.section,
    additional.section,
    methods.section,
    differences.section,
    seeds.section,
    earlier.section,
    suites.section,
    ranking.section,
    refusals.section,
    judges.section,
    categories.section,
    multipliers.section,
    stopped.section,
    harness.section,
    answers.section,
    facts.section,
    rerun.section,
)
_TEMPLATES = Path(__file__).parent / "sections"


def write(run: FinishedRun, out: Path) -> None:
    """Write the page to `out`, whole. Raises DualignError where an input is there but cannot be
    read, or `out` cannot be written.
    """
    html = _render(run)
    with replacing(out) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _render(run: FinishedRun) -> str:
    environment = _environment()
    shared = run.shared()
    sections = [section for make in SECTIONS if (section := make(run)) is not None]

    def part(section: Section) -> Markup:
        template = environment.get_template(f"{section.anchor}.html")
        return Markup(template.render({**shared, **section.values}))

    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    values: dict[str, Any] = {
        "script": Markup(script),
        "script_hash": f"sha256-{base64.b64encode(digest).decode()}",
        "parts": [part(section) for section in sections],
        "contents": [section for section in sections if section.contents],
        "versions": _versions(run),
    }
    return environment.get_template("page.html").render({**shared, **values})


def _versions(run: FinishedRun) -> dict[str, str | None]:
    """The versions that the last stage ran with."""
    return run.provenance[-1].versions if run.provenance else {}


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=formatting.visible,
    )
    named = (
        "number", "precise", "against", "beside", "stated", "percent", "signed",
        "plural", "compact", "duration", "memory",
    )  # fmt: skip
    environment.globals |= {name: getattr(formatting, name) for name in named}
    environment.globals["is_tilt"] = is_tilt
    environment.globals["decoding"] = decoding_in_words
    environment.filters["number"] = formatting.number
    return environment
