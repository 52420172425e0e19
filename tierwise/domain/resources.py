"""Amounts that nodes have and instances take."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """CPUs (fractions allowed), memory in MiB and whole GPU slots."""

    cpus: float = 0.0
    memory_mib: int = 0
    gpu_slots: int = 0

    def fits(self, other: "Resources") -> bool:
        """Return whether `other` fits into this amount."""
        return (
            other.cpus <= self.cpus + 1e-9
            and other.memory_mib <= self.memory_mib
            and other.gpu_slots <= self.gpu_slots
        )

    def __add__(self, other: "Resources") -> "Resources":
        return Resources(
            cpus=self.cpus + other.cpus,
            memory_mib=self.memory_mib + other.memory_mib,
            gpu_slots=self.gpu_slots + other.gpu_slots,
        )

    def __sub__(self, other: "Resources") -> "Resources":
        return Resources(
            cpus=self.cpus - other.cpus,
            memory_mib=self.memory_mib - other.memory_mib,
            gpu_slots=self.gpu_slots - other.gpu_slots,
        )


NOTHING = Resources()
