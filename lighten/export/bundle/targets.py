"""Devices for bundles: published memory and memory bandwidth, and the publications."""

from __future__ import annotations

from dataclasses import dataclass

from lighten.errors import RequestError

GIB = 2**30


@dataclass(frozen=True)
class Target:
    """A device. `memory_bytes` and `bandwidth` are published; `system_bytes` is our assumption for the system."""

    name: str
    title: str
    memory_bytes: int
    bandwidth: float
    """Maximum number of bytes per second from memory to what multiplies."""
    system_bytes: int
    architecture: str
    source: str
    gpu: bool = False

    @property
    def free_bytes(self) -> int:
        """Bytes of memory that are left for a model."""
        return self.memory_bytes - self.system_bytes


_PI4 = (
    "Raspberry Pi 4 Model B product brief, https://datasheets.raspberrypi.com/rpi4/raspberry-pi-4-product-brief.pdf: "
    "LPDDR4-3200, 32 bits wide"
)
_PI5 = (
    "Raspberry Pi 5 product brief, https://datasheets.raspberrypi.com/rpi5/raspberry-pi-5-product-brief.pdf: "
    "LPDDR4X-4267, 32 bits wide (https://www.raspberrypi.com/news/introducing-raspberry-pi-5/)"
)
_ORIN = (
    "NVIDIA Jetson Orin Nano series data sheet DS-11105-001: 8 GB of 128-bit LPDDR5, 68 GB/s "
    "(102 GB/s with the clocks of the Super developer kit)"
)
_LAPTOP = "two channels of DDR4-3200 (JEDEC JESD79-4): 2 × 8 bytes × 3,200 million transfers a second"
_RTX4060 = (
    "the slowest of the common cards, GeForce RTX 4060: 128-bit GDDR6 at 17 Gbit/s a pin, "
    "https://www.nvidia.com/en-us/geforce/graphics-cards/40-series/rtx-4060-4060ti/"
)
_RTX3090 = (
    "the slowest of the common cards, GeForce RTX 3090: 384-bit GDDR6X at 19.5 Gbit/s a pin, "
    "NVIDIA Ampere GA102 GPU Architecture, version 2"
)


def _pi(generation: int, gigabytes: int) -> Target:
    bandwidth, source = {4: (12.8e9, _PI4), 5: (17.068e9, _PI5)}[generation]
    system = 300_000_000 if gigabytes == 1 else 500_000_000
    name, title = f"rpi{generation}-{gigabytes}gb", f"Raspberry Pi {generation}, {gigabytes} GB"
    return Target(name, title, gigabytes * GIB, bandwidth, system, "aarch64", source)


TARGETS = {
    target.name: target
    for target in (
        *(_pi(4, gigabytes) for gigabytes in (1, 2, 4, 8)),
        *(_pi(5, gigabytes) for gigabytes in (4, 8, 16)),
        Target("jetson-orin-nano", "Jetson Orin Nano, 8 GB", 8 * GIB, 68e9, 1_500_000_000, "aarch64", _ORIN, gpu=True),
        Target("laptop-cpu", "laptop without a GPU, 16 GB", 16 * GIB, 51.2e9, 4_000_000_000, "x86_64", _LAPTOP),
        Target("desktop-8gb-gpu", "desktop GPU, 8 GB", 8 * GIB, 272e9, 700_000_000, "x86_64", _RTX4060, gpu=True),
        Target("desktop-24gb-gpu", "desktop GPU, 24 GB", 24 * GIB, 936e9, 700_000_000, "x86_64", _RTX3090, gpu=True),
    )
}
"""Devices by name."""

SHORT = {"rpi4": "rpi4-4gb", "rpi5": "rpi5-8gb"}
"""Shorter names of some devices."""


def find_target(name: str) -> Target:
    """Returns a device by its name or short name.

    Raises:
        RequestError: the device does not exist; the message lists all devices.
    """
    low = name.casefold()
    if found := TARGETS.get(SHORT.get(low, low)):
        return found
    raise RequestError(f"there is no target {name!r}; there is {', '.join([*SHORT, *TARGETS])}")
