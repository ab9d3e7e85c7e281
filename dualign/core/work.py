"""What the trainings and samplings of a stage took, by name: tokens, operations and seconds.

Seconds differ from run to run, so this goes into the provenance, beside the stage's own seconds,
and into no other output."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass

from dualign.core import ranks
from dualign.core.units import flop_rate


@dataclass(frozen=True)
class Work:
    """Real tokens and model FLOP of all processes in `seconds`."""

    tokens: float
    flop: float
    seconds: float

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens, self.flop + other.flop, self.seconds + other.seconds
        )

    def rates(self, peak: float | None) -> dict[str, float]:
        """Tokens and TFLOP a second, and of a known peak in FLOP/s the share that this is, MFU.

        >>> Work(tokens=200, flop=4e12, seconds=2).rates(1e13)
        {'tokens_per_second': 100.0, 'tflop_per_second': 2.0, 'mfu': 0.2}
        """
        rate = self.flop / self.seconds
        found = {"tokens_per_second": self.tokens / self.seconds, "tflop_per_second": rate / 1e12}
        return found | ({"mfu": rate / peak} if peak else {})

    def told(self, peak: float | None) -> str:
        """The rates as a log has them.

        >>> Work(tokens=200, flop=4e12, seconds=2).told(1e13)
        '100 tokens/s, 2.0 TFLOP/s, MFU 20 %'
        """
        rates = self.rates(peak)
        words = [f"{rates['tokens_per_second']:.0f} tokens/s", flop_rate(self.flop / self.seconds)]
        return ", ".join([*words, *([f"MFU {100 * rates['mfu']:.0f} %"] if peak else [])])


_done: dict[str, Work] = {}
_peak: float | None = None


def begin(peak: float | None) -> None:
    """A stage begins, on devices that reach `peak` FLOP/s each."""
    global _peak
    _peak = peak
    _done.clear()


def peak() -> float | None:
    """FLOP/s of the devices of all processes together; None where it is not known."""
    return None if _peak is None else _peak * ranks.world()


def record(what: str, work: Work) -> None:
    """Add to what this stage has done under a name."""
    _done[what] = _done[what] + work if what in _done else work


def recorded() -> dict[str, dict[str, float]]:
    """What this stage has done, by name: tokens, TFLOP, seconds and the rates."""
    return {what: _row(work) for what, work in _done.items()}


def _row(work: Work) -> dict[str, float]:
    row = {"tokens": work.tokens, "tflop": work.flop / 1e12, "seconds": work.seconds}
    return {key: float(f"{value:.6g}") for key, value in (row | work.rates(peak())).items()}


def peak_memory() -> float:
    """The most memory that this process has held, in GiB: of its GPU, as torch counts it, where it
    uses one, else of the host.
    """
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available() and torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated() / 2**30
    return host_peak()


def host_peak() -> float:
    """The most memory of the host that this process has held, in GiB."""
    told = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return told / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on a Mac, else kibibytes
