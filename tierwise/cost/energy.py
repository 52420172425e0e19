"""Energy of a call. Device figures are nominal classes, not readings of this machine."""

from tierwise.domain.topology import Tier

# Active watts per busy CPU: Raspberry-Pi-class board, small server, cloud server core.
WATTS_PER_CPU: dict[Tier, float] = {Tier.EDGE: 1.5, Tier.FOG: 6.0, Tier.CLOUD: 9.0}
# Joules per byte moved over an access network (order of magnitude, 0.05 µJ/byte).
JOULES_PER_BYTE = 5e-8


def call_j(tier: Tier, *, cpus: float, run_s: float, moved_bytes: int) -> float:
    """Return joules: busy CPUs × seconds × watts, plus transport."""
    return WATTS_PER_CPU[tier] * cpus * run_s + JOULES_PER_BYTE * moved_bytes
