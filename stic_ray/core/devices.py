"""What accelerators can do at most, by their makers' data sheets: for estimates and model FLOP utilisation."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator as it is sold."""

    name: str
    """As clouds and makers write it."""
    peak_flops: float
    """Operations per second on dense matrices (no 2:4 sparsity): bfloat16, or float16 where there is no bfloat16."""
    memory_bandwidth_gb_s: float
    """10^9 bytes per second between the chip and its memory."""
    memory_gib: float
    """What the driver leaves to programs, in 2^30 bytes."""


_DEVICES = (
    # The first pattern found in a name decides.
    (r"\bB200\b", Device("B200", 2250e12, 7700, 179)),
    (r"\bH200\b.*\bNVL\b", Device("H200 NVL", 835e12, 4800, 140)),
    (r"\bH200\b", Device("H200", 989e12, 4800, 140)),
    (r"\bH100\b.*\bNVL\b", Device("H100 NVL", 835e12, 3900, 93)),
    (r"\bH100\b.*\bPCIE\b", Device("H100 PCIe", 756e12, 2000, 79)),
    (r"\bH100\b", Device("H100", 989e12, 3350, 79)),
    (r"\bH20\b", Device("H20", 148e12, 4000, 95)),
    (r"\bA100\b.*\b80GB?\b", Device("A100 80GB", 312e12, 2039, 79)),
    (r"\bA100\b", Device("A100", 312e12, 1555, 39)),
    (r"\bL40S\b", Device("L40S", 362e12, 864, 44)),
    (r"\bL40\b", Device("L40", 181e12, 864, 44)),
    (r"\bL4\b", Device("L4", 121e12, 300, 22)),
    (r"\bA40\b", Device("A40", 150e12, 696, 44)),
    (r"\bA30\b", Device("A30", 165e12, 933, 23)),
    (r"\bA10G\b", Device("A10G", 70e12, 600, 22)),
    (r"\bA10\b", Device("A10", 125e12, 600, 22)),
    (r"\bRTX A6000\b", Device("RTX A6000", 155e12, 768, 47)),
    (r"\bRTX 4090\b", Device("RTX 4090", 165e12, 1008, 23)),
    (r"\bRTX 3090\b", Device("RTX 3090", 71e12, 936, 23)),
    (r"\bV100\b.*\b32GB?\b", Device("V100 32GB", 125e12, 900, 31)),
    (r"\bV100\b", Device("V100", 125e12, 900, 15)),
    (r"\bT4\b", Device("T4", 65e12, 320, 14)),
    (r"\bMI300X\b", Device("MI300X", 1307e12, 5300, 191)),
)


def find_device(name: str) -> Device | None:
    """Return what is known of a device by torch's name ("NVIDIA H100 80GB HBM3") or Ray's accelerator type ("H100").

    None for one that is not in the table, and for a part of one (MIG): no figure is guessed. An A100 or V100 of
    unknown size counts as the smaller.
    """
    spoken = re.sub(r"[-_]", " ", name.upper())
    if re.search(r"\bMIG\b", spoken):
        return None
    return next((device for pattern, device in _DEVICES if re.search(pattern, spoken)), None)
