"""What goes wrong in a simulation, and when: drawn here, carried out by the simulator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from envs.world import Faults

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Mishap:
    """What happens to one message between nodes."""

    is_lost: bool = False
    is_doubled: bool = False
    late_s: float = 0.0


NONE = Mishap()
LOST = Mishap(is_lost=True)


class Hazards:
    """Draws faults from one stream, so that they are the same whatever else is drawn."""

    def __init__(self, faults: Faults, rng: np.random.Generator) -> None:
        self._faults = faults
        self._rng = rng
        self._spoils_messages = bool(faults.drop or faults.duplicate or faults.delay)

    def offset_s(self, interval_s: float) -> float:
        """Return when in the first interval a node sends its first heartbeat."""
        return float(self._rng.random()) * interval_s

    def next_crash_s(self) -> float | None:
        """Return seconds until the next crash, None if nodes never crash."""
        return self._wait_s(self._faults.crash_interval_s)

    def next_cut_s(self) -> float | None:
        """Return seconds until a node is cut off next, None if none ever is."""
        return self._wait_s(self._faults.partition_interval_s)

    def is_over(self, now_s: float) -> bool:
        """Return whether everything works from now on."""
        return now_s > self._faults.until_s

    def pick(self, some: Sequence[T]) -> T:
        """Return whom it hits; `some` is not empty."""
        return some[int(self._rng.integers(len(some)))]

    def mishap(self, now_s: float) -> Mishap:
        """Return what happens to a message that is sent now."""
        if not self._spoils_messages:
            return NONE
        faults = self._faults
        drop, duplicate, delay = self._rng.random(3)
        if drop < faults.drop and now_s < faults.until_s:
            return LOST
        late_s = float(self._rng.exponential(faults.delay_s)) if delay < faults.delay else 0.0
        return Mishap(is_doubled=bool(duplicate < faults.duplicate), late_s=late_s)

    def _wait_s(self, interval_s: float) -> float | None:
        return float(self._rng.exponential(interval_s)) if interval_s else None
