"""Functions that a node does not run for a while, for they keep killing their workers. Pure."""

from collections import OrderedDict
from dataclasses import dataclass

from tierwise.domain.ids import FunctionId

DEATHS_MAX = 2  # within the window; then the function is out
WINDOW_S = 60.0
FIRST_S = 10.0  # doubles each time
LONGEST_S = 600.0
FORGET_S = 1800.0  # without a death, how often it was out before is forgotten
FUNCTIONS_MAX = 1000


@dataclass(slots=True)
class _Record:
    died_at_s: float
    death_count: int = 0
    times_out: int = 0
    ends_at_s: float = 0.0


class Quarantine:
    """Counts deaths per function version. A new version begins with a clean sheet.

    Two deaths within a minute put a function out for 10 s. When it is back, one death puts it out
    for twice as long as the last time, up to 10 minutes.
    """

    def __init__(self) -> None:
        self._records: OrderedDict[FunctionId, _Record] = OrderedDict()

    def died(self, function: FunctionId, now_s: float) -> bool:
        """Take in a death; return whether the function is put out by it."""
        record = self._records.get(function)
        if record is None or now_s - record.died_at_s > FORGET_S:
            record = self._records[function] = _Record(now_s)
        self._records.move_to_end(function)
        if len(self._records) > FUNCTIONS_MAX:
            self._records.popitem(last=False)
        if now_s - record.died_at_s > WINDOW_S and not record.times_out:
            record.death_count = 0
        record.died_at_s = now_s
        record.death_count += 1
        if now_s < record.ends_at_s or record.death_count < DEATHS_MAX:
            return False
        record.ends_at_s = now_s + min(LONGEST_S, FIRST_S * 2**record.times_out)
        record.times_out += 1
        record.death_count = DEATHS_MAX - 1
        return True

    def left_s(self, function: FunctionId, now_s: float) -> float:
        """Return how long the function stays out; 0 if it is not."""
        record = self._records.get(function)
        return 0.0 if record is None else max(0.0, record.ends_at_s - now_s)
