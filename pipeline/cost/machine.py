"""Machines: what they compute, read and hold, and what they cost an hour.

Peaks and bandwidths are those of NVIDIA's data sheets: dense products (no sparsity), bf16 on tensor
cores, fp32 outside them. Prices are round figures of what clouds ask on demand for one card; they
differ by more than two, so give your own.
"""

from __future__ import annotations

import difflib
import shutil
import subprocess
from dataclasses import dataclass, replace

from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Machine:
    """One card (or processor), and how much of it is assumed to be used.

    `bf16` (0: it has none) and `fp32` are peaks in TFLOP/s, `bandwidth` is in GB/s, `memory` in
    GiB, `price` in dollars an hour. `mfu` is the assumed share of the peak in training and reading,
    `of_bandwidth` that of the bandwidth in drawing; `launch` the seconds that one operation takes
    however small it is, `step` those of an optimiser's step beside its operations (the loop, the
    loader, the log), `start` those until a stage has imported and loaded what it needs."""

    name: str
    bf16: float
    fp32: float
    bandwidth: float
    memory: float
    price: float
    mfu: float = 0.4
    of_bandwidth: float = 0.6
    launch: float = 1e-5
    step: float = 8e-3
    start: float = 15.0

    def peak(self, bytes_each: int) -> float:
        """FLOP/s of products of numbers of so many bytes."""
        return (self.bf16 if bytes_each == 2 and self.bf16 else self.fp32) * 1e12

    def with_given(self, price: float | None, mfu: float | None) -> Machine:
        """The machine with the user's own price and share of the peak, where given. Raises
        PipelineError for one that is none.
        """
        if price is not None and not 0 <= price < 1e6:
            raise PipelineError(f"--price {price:g}: give dollars an hour, 0 or more")
        if mfu is not None and not 0 < mfu <= 1:
            raise PipelineError(f"--mfu {mfu:g}: give a share of the peak, above 0 and at most 1")
        return replace(
            self,
            price=self.price if price is None else price,
            mfu=self.mfu if mfu is None else mfu,
        )


MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine("t4", 0, 8.1, 320, 16, 0.4),
        Machine("l4", 121, 30.3, 300, 24, 0.8),
        Machine("a10", 125, 31.2, 600, 24, 0.8),
        Machine("rtx4090", 165, 82.6, 1008, 24, 0.5),
        Machine("l40s", 362, 91.6, 864, 48, 1.2),
        Machine("a100-40", 312, 19.5, 1555, 40, 1.3),
        Machine("a100", 312, 19.5, 2039, 80, 1.8),
        Machine("h100-pcie", 756, 51, 2000, 80, 2.4),
        Machine("h100", 989, 67, 3350, 80, 3.0),
        Machine("h200", 989, 67, 4800, 141, 3.8),
        Machine("b200", 2250, 75, 8000, 180, 5.0),
    )
}
#: What is reckoned with where no card is named and none is here.
USUAL = "h100"


def machine(name: str | None) -> Machine:
    """The card of that name; None takes the one that is here, else `USUAL`. Raises PipelineError
    for a name that is not in the table.
    """
    if name is None:
        return MACHINES[_here() or USUAL]
    if name not in MACHINES:
        near = difflib.get_close_matches(name.lower(), MACHINES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(MACHINES)}"
        raise PipelineError(f"--gpu {name}: no such card in the table; {hint}")
    return MACHINES[name]


def _here() -> str | None:
    """The card of this machine, where nvidia-smi names one of the table."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return card_of(answer.stdout.partition("\n")[0])


def card_of(told: str) -> str | None:
    """The card that nvidia-smi calls so, None for one that is not in the table.

    >>> card_of("NVIDIA H100 80GB HBM3"), card_of("NVIDIA A100-SXM4-40GB")
    ('h100', 'a100-40')
    """
    words = told.lower().replace("-", " ").replace("geforce rtx 4090", "rtx4090").split()
    found = next((name for name in MACHINES if name in words), None)
    if found == "a100" and "40gb" in words:
        return "a100-40"
    return "h100-pcie" if found == "h100" and "pcie" in words else found
