"""Devices to train on, by name."""

import os
import re
from dataclasses import dataclass

from ._core import ArgumentError

GB = 10**9
MEMORY = {
    "A10G": 24, "A100": 80, "B200": 180, "H100": 80, "H200": 141, "L4": 24, "L40S": 48, "MI300X": 192,
    "RTX3090": 24, "RTX4090": 24, "RTX5090": 32, "T4": 16, "V100": 32,
}  # fmt: skip
"""Devices by name, with their memory in GB."""


@dataclass(frozen=True)
class Devices:
    """`count` devices of one kind."""

    count: int
    name: str
    bytes: int
    """Memory of one."""
    fused: bool
    """It runs libqat's row kernels."""


def parse_devices(text: str) -> Devices:
    """Of "8xH200", "H100", "2x48GB" (any GPU), "cpu" (this machine) or "cpu:64GB"; else ArgumentError."""
    match = re.fullmatch(r"(?:(\d+)x)?(cpu(?::(?=\d))?|)(?:([A-Za-z]\w*)|(\d+(?:\.\d+)?)\s*GB)?", text)
    if match:
        count, cpu, name, size = int(match[1] or 1), match[2].startswith("cpu"), match[3], match[4]
        if size:
            return _checked(Devices(count, text.split("x")[-1], int(float(size) * GB), cpu), text)
        if cpu and not name:
            here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return _checked(Devices(count, "cpu", here, True), text)
        known = {each.lower(): each for each in MEMORY}
        if not cpu and name and name.lower() in known:
            exact = known[name.lower()]
            return _checked(Devices(count, exact, MEMORY[exact] * GB, False), text)
    raise ArgumentError(
        "plan_memory: devices: expected COUNTxNAME with a name of "
        f'{", ".join(MEMORY)}, cpu, cpu:64GB or 48GB, got "{text}"'
    )


def _checked(devices: Devices, text: str) -> Devices:
    if devices.count >= 1 and devices.bytes > 0:
        return devices
    raise ArgumentError(f'plan_memory: devices: expected at least one with memory, got "{text}"')


__all__ = ["GB", "MEMORY", "Devices", "parse_devices"]
