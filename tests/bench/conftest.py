"""Laboratories are commands of their own and quieten a whole process: what they set is put back
after each test.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Levels of loggers and torch's threads."""
    loggers = [logging.getLogger(name) for name in ("dualign", "dvc")]
    levels = [logger.level for logger in loggers]
    threads = torch.get_num_threads()
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(threads)
