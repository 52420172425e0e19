"""What a learned policy may price beside the base score: signals, linear and in deadlines.

The base score asks what a request costs by itself. Signals also tell what it takes from others (CPU
time on a busy node, a place before those who wait) and how far a reading can be trusted.
"""

import numpy as np

from tierwise.cost.estimate import Estimates, Float
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.features import GAP_MAX

SIGNALS = (
    "path",  # transfer there and back
    "wait",
    "cold_start",
    "run",
    "displaced",
    "usd",  # at USD_S
    "late",  # beyond the deadline, times urgency
    "miss",  # chance of missing the deadline × 1 s, times urgency
    "busy_run",  # share of the node's CPUs in use × run
    "busy_start",  # … × cold start
    "queued_run",  # requests waiting per CPU × run
    "queued_start",  # … × cold start
    "pending",  # run time sent there since its reading (also part of `wait`)
    "old_wait",  # age of the reading in seconds, at most 5 × wait
    "overtaken_run",  # seconds of work that the request overtakes, at most 2 × run
)
USD_S = DEFAULT_OBJECTIVE.per_usd_s
MISS_WIDTH = 0.06  # of a deadline: how far latencies scatter around what is predicted
AGE_S_MAX = 5.0
OVERTAKEN_S_MAX = 2.0
BOUND = GAP_MAX
_POWER_MAX = 30.0
_RUN_START_TWICE = np.array([3, 2, 3, 2])  # columns of terms


def encode(view: ClusterView, request: Request, estimates: Estimates) -> Float:
    """Return the signals of each candidate.

    Returns:
        Shape (k, 15), float64, in deadlines, every entry within 0 … BOUND (also where a reading is
        not a number). Row order is the candidates'. Column meanings: SIGNALS.
    """
    deadline_s = max(request.deadline_s, 1e-3)
    level = int(request.priority) - 1
    urgency = int(request.priority) / 2.0
    now_s = view.now_s
    flat: list[float] = []
    for row in estimates.candidates:
        reading = row.reading
        cpus = row.node.capacity.cpus or 1.0
        overtaken_s = reading.overtaken_s
        busy = 1.0 - reading.free.cpus / cpus
        queued = reading.queued / max(1.0, cpus)
        flat += (
            busy,
            busy,
            queued,
            queued,
            row.pending_s,
            min(now_s - row.received_at_s, AGE_S_MAX),
            min(overtaken_s[level], OVERTAKEN_S_MAX) if overtaken_s else 0.0,
        )
    terms = estimates.terms
    late_s = estimates.latency_s - deadline_s
    out = np.empty((len(estimates.candidates), len(SIGNALS)))
    np.add(terms[:, 0], terms[:, 4], out=out[:, 0])
    out[:, 1:4] = terms[:, 1:4]
    out[:, 4:6] = terms[:, 5:7]
    out[:, 5] *= USD_S
    np.multiply(np.maximum(late_s, 0.0), urgency, out=out[:, 6])
    power = np.minimum(late_s * (-1.0 / (MISS_WIDTH * deadline_s)), _POWER_MAX)
    np.divide(urgency, 1.0 + np.exp(power), out=out[:, 7])
    out[:, 8:] = np.fromiter(flat, np.float64, len(flat)).reshape(-1, 7)
    out[:, 8:12] *= terms[:, _RUN_START_TWICE]
    out[:, 13:15] *= terms[:, 1:4:2]  # wait and run
    out *= 1.0 / deadline_s
    # fmin and fmax, unlike clip, also turn NaN into a bound.
    return np.fmin(np.fmax(out, 0.0, out=out), BOUND, out=out)
