"""When a policy is taken off duty: the circuit breaker around it. Pure.

    CLOSED ──cause──► OPEN ──rest is over──► HALF_OPEN ──probes are good──► CLOSED
                       ▲                         │
                       └───────any cause─────────┘     each time the rest is twice as long

Closed, the policy decides. Open, the base score does. Half-open, the policy decides a few calls,
the probes, and the base score the others. The pattern is Nygard's (Release It!, 2007, ch. 5).

Four things open it. The policy raises. It is late: decisions may take `PACE_S` on average, and what
goes beyond is a debt that may not exceed `DEBT_MAX_S`, so that one pause of the machine is forgiven
and one decision that sleeps is not. Its inputs are out of the trained range in most decisions. Or
its calls miss more deadlines than were predicted for the nodes that the base score would have
chosen: so a policy that knowingly chooses late nodes is found out too.

Predictions may be wrong for every policy, as under overload. So while the breaker is open for
misses, the base score's own excess of misses is counted too; that much is then allowed.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

PACE_S = 0.002
DEBT_MAX_S = 0.1
RANGE_SHARE_MAX = 0.5
RANGE_SMOOTHING = 1.0 / 32  # weight of the newest decision in the share that is out of range
WINDOW_COUNT = 200  # calls over which misses are compared
WINDOW_S = 120.0
ENDED_MIN = 40  # calls that must have ended before they say anything
EXCESS_MAX = 0.15  # share of calls that may miss beyond the prediction
DEVIATIONS = 2.0  # and this many standard deviations of a share, so that chance opens nothing
PROBES_MAX = 40
REST_FIRST_S = 5.0
REST_MAX_S = 300.0
STEADY_S = 60.0  # closed for that long, it starts with the first rest again
REFERENCE_S = 900.0  # for how long the base score's own excess is believed


class BreakerState(Enum):
    """Who decides."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Cause(Enum):
    """Why the base score decided; the value is what people read and what is counted."""

    ERROR = "it raised"
    LATE = "it was late"
    RANGE = "its inputs were out of the trained range"
    MISSES = "it missed more deadlines than predicted"


@dataclass(slots=True)
class _Window:
    """Calls that ended lately: how many missed, and how many were predicted to."""

    calls: deque[tuple[float, bool, bool]] = field(default_factory=deque)
    missed: int = 0
    predicted: int = 0

    def put(self, now_s: float, is_missed: bool, was_predicted: bool) -> None:
        self.calls.append((now_s, is_missed, was_predicted))
        self.missed += is_missed
        self.predicted += was_predicted
        while len(self.calls) > WINDOW_COUNT or self.calls[0][0] < now_s - WINDOW_S:
            _, was_missed, predicted = self.calls.popleft()
            self.missed -= was_missed
            self.predicted -= predicted

    def clear(self) -> None:
        self.calls.clear()
        self.missed = self.predicted = 0

    @property
    def excess(self) -> float:
        """Return the share of calls that missed beyond the prediction; may be below 0."""
        return (self.missed - self.predicted) / max(1, len(self.calls))

    def allowed(self, reference: float) -> float:
        """Return the excess that a sound policy should not have, given the base score's own."""
        count = max(1, len(self.calls))
        share = min(0.95, max(0.05, self.predicted / count + reference))
        return reference + EXCESS_MAX + DEVIATIONS * math.sqrt(share * (1.0 - share) / count)


class CircuitBreaker:
    """Guards one policy on one node. All times are monotonic seconds, never falling."""

    __slots__ = (
        "_base", "_calls", "_closed_at_s", "_debt_s", "_ends_at_s", "_out_of_range", "_probes",
        "_reference", "_reference_until_s", "_rest_s", "_watches_misses", "cause", "opened_count",
        "state",
    )  # fmt: skip

    def __init__(self, *, watches_misses: bool = True) -> None:
        """Start closed.

        Args:
            watches_misses: Compare misses with the prediction. A heuristic that an operator chose
                knowing what it does (everything to the cloud, say) is not judged by its misses.
        """
        self.state = BreakerState.CLOSED
        self.cause: Cause | None = None  # of the latest opening
        self.opened_count = 0
        self._watches_misses = watches_misses
        self._calls = _Window()
        self._base = _Window()
        self._reference = 0.0
        self._reference_until_s = -math.inf
        self._debt_s = 0.0
        self._out_of_range = 0.0
        self._probes = 0
        self._closed_at_s = -math.inf
        self._rest_s = REST_FIRST_S
        self._ends_at_s = 0.0  # of the rest, or of waiting for the results of the probes

    def allows(self, now_s: float) -> bool:
        """Return whether the policy should be asked now."""
        if self.state is BreakerState.CLOSED:
            return True
        if now_s >= self._ends_at_s:
            self._try_again(now_s)
        if self.state is BreakerState.OPEN or self._probes >= PROBES_MAX:
            return False
        self._probes += 1
        return True

    def decided(self, took_s: float, now_s: float, *, is_out_of_range: bool = False) -> None:
        """Note that the policy has answered.

        Args:
            took_s: How long that took.
            now_s: When it answered.
            is_out_of_range: It fell back by itself, because of its inputs.
        """
        debt_s = self._debt_s + took_s - PACE_S
        self._debt_s = debt_s if debt_s > 0.0 else 0.0
        self._out_of_range += RANGE_SMOOTHING * (is_out_of_range - self._out_of_range)
        if debt_s > DEBT_MAX_S:
            self._open(Cause.LATE, now_s)
        elif self._out_of_range > RANGE_SHARE_MAX:
            self._open(Cause.RANGE, now_s)
        elif (
            self.state is BreakerState.HALF_OPEN
            and self._probes >= PROBES_MAX
            and self.cause is not Cause.MISSES
        ):
            self._close(now_s)

    def failed(self, now_s: float) -> None:
        """Note that the policy raised."""
        self._open(Cause.ERROR, now_s)

    def ended(self, now_s: float, *, is_missed: bool, was_predicted: bool, by_base: bool) -> None:
        """Note how a call ended.

        Args:
            now_s: When.
            is_missed: It was late, or expired.
            was_predicted: On the base score's choice, too, it was predicted to be late.
            by_base: The base score had decided it, not the policy.
        """
        if not self._watches_misses:
            return
        if by_base:
            if self.state is not BreakerState.CLOSED:
                self._base.put(now_s, is_missed, was_predicted)
            return
        if self.state is BreakerState.OPEN:
            return  # decided before it opened: known already
        calls = self._calls
        calls.put(now_s, is_missed, was_predicted)
        if len(calls.calls) < (ENDED_MIN if self.state is BreakerState.CLOSED else PROBES_MAX // 2):
            return
        reference = self._reference if now_s < self._reference_until_s else 0.0
        if calls.missed > calls.predicted and calls.excess > calls.allowed(reference):
            self._open(Cause.MISSES, now_s)
        elif self.state is BreakerState.HALF_OPEN and self.cause is Cause.MISSES:
            self._close(now_s)

    def _open(self, cause: Cause, now_s: float) -> None:
        if self.state is BreakerState.OPEN:
            return
        is_steady = self.state is BreakerState.CLOSED and now_s - self._closed_at_s > STEADY_S
        self._rest_s = REST_FIRST_S if is_steady else min(REST_MAX_S, 2.0 * self._rest_s)
        self.state, self.cause = BreakerState.OPEN, cause
        self.opened_count += 1
        self._ends_at_s = now_s + self._rest_s
        self._base.clear()

    def _try_again(self, now_s: float) -> None:
        """Hand out probes; also when those before have brought no verdict."""
        if len(self._base.calls) >= ENDED_MIN // 2:
            self._reference = max(0.0, self._base.excess)
            self._reference_until_s = now_s + REFERENCE_S
        self.state = BreakerState.HALF_OPEN
        self._ends_at_s = now_s + self._rest_s
        self._probes = 0
        self._reset()

    def _close(self, now_s: float) -> None:
        self.state = BreakerState.CLOSED
        self._closed_at_s = now_s
        self._reset()

    def _reset(self) -> None:
        self._calls.clear()
        self._debt_s = 0.0
        self._out_of_range = 0.0
