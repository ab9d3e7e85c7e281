"""Which instances of stages params name: files of a row that was removed lie beside theirs."""

from __future__ import annotations

from dualign.params.report import ReportParams


def named(params: ReportParams, stage: str, item: str | None) -> bool:
    """Whether an instance of a stage is one of these params, as the only one (None) is."""
    rows = {
        "dual_search": params.methods,
        "certify": params.certificates,
        "evaluate": params.policies,
        "answer": params.suites,
        "judge": params.judges,
    }
    return item is None or item in rows.get(stage, getattr(params, stage, ()))
