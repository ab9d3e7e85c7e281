"""What a device can do in a second, against which MFU is told."""

from __future__ import annotations

import sys

#: Dense bf16 peaks by the name that CUDA gives a device, TFLOP/s, from NVIDIA's and AMD's data
#: sheets (half of what they print "with sparsity"). The longest name that a device's begins with
#: counts.
PEAKS = {
    "NVIDIA B200": 2250.0,
    "NVIDIA GH200": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA H100": 989.4,  # SXM5, "NVIDIA H100 80GB HBM3"
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA A100": 312.0,
    "NVIDIA A40": 149.7,
    "NVIDIA A10": 125.0,
    "NVIDIA A10G": 70.0,
    "NVIDIA L40": 181.0,
    "NVIDIA L40S": 362.1,
    "NVIDIA L4": 121.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
    "AMD Instinct MI300X": 1307.4,
}


def peak_of(stated: float | None, device: str, precision: str) -> float | None:
    """FLOP/s that one device is said to reach: the `stated` TFLOP/s, or by the GPU's name where it
    computes in bf16; None where nothing is known, as of a CPU.

    `device` and `precision` are those of `resources`."""
    if stated is not None:
        return stated * 1e12
    if device == "cpu" or precision == "fp32" or "torch" not in sys.modules:
        return None
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_bf16_supported(including_emulation=False):
        return None
    return named_peak(torch.cuda.get_device_name())


def named_peak(name: str) -> float | None:
    """The peak of a device in FLOP/s, by its name.

    >>> named_peak("NVIDIA H100 80GB HBM3"), named_peak("NVIDIA A100-SXM4-80GB"), named_peak("K80")
    (989400000000000.0, 312000000000000.0, None)
    """
    fitting = [known for known in PEAKS if _is_named(name, known)]
    return PEAKS[max(fitting, key=len)] * 1e12 if fitting else None


def _is_named(name: str, known: str) -> bool:
    """Whether a name is the known one, or goes on after it with another word."""
    return name == known or name.startswith((f"{known} ", f"{known}-"))
