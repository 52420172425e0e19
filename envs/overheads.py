"""What a real platform adds to a simulated world: measured spreads, all nought by default."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEPS = 40  # of a spread's table


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution by its quantiles at equal steps from 0 to 1; without any it is always 0.

    A table makes no claim about a shape: what was measured is what is drawn.
    """

    quantiles: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[np.float64]) -> "Spread":
        """Return the spread of what was measured; nothing measured is the empty one."""
        if len(values) == 0:
            return cls()
        return cls(tuple(np.quantile(values, np.linspace(0.0, 1.0, STEPS + 1)).tolist()))

    @property
    def mean(self) -> float:
        """Return the mean of the draws."""
        if not self.quantiles:
            return 0.0
        table = np.array(self.quantiles)
        return float(np.mean((table[1:] + table[:-1]) / 2.0))

    def draw(self, rng: np.random.Generator) -> float:
        """Return one draw, between two neighbouring quantiles; an empty spread draws nothing."""
        if not self.quantiles:
            return 0.0
        place = float(rng.random()) * (len(self.quantiles) - 1)
        index = int(place)
        low, high = self.quantiles[index : index + 2]
        return low + (place - index) * (high - low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What the platform itself takes, as `envs.calibrate` finds it on live agents.

    Worlds that are drawn have none, and train policies as before.

    Attributes:
        call_s: Between agent and worker, per run, whatever the node's speed.
        run_s: On top of a run at speed 1.0: what the host's other work costs a function. May be
            negative, for it is measured around the median.
        message_s: Of a message between nodes, on top of the link: serialising, sending, waking.
        cold: Factors on a cold start's median; without any, lognormal noise with a sigma of 0.25.
        view_interval_s: How soon after a heartbeat all nodes know of it, at most; 0 is with their
            own next heartbeat.
        reports_late: Whether calls teach profiles only with the heartbeat of the node that owned
            them, as live agents report.
    """

    call_s: float = 0.0
    run_s: Spread = Spread()
    message_s: Spread = Spread()
    cold: Spread = Spread()
    view_interval_s: float = 0.0
    reports_late: bool = False


NO_OVERHEADS = Overheads()
