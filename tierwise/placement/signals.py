"""What a learned policy may price beside the base score: signals, linear and in deadlines.

The base score asks what a request costs by itself. Signals also tell what it takes from others (CPU
time on a busy node, a place before those who wait) and how far a reading can be trusted.
"""

import numpy as np

from tierwise.cost.estimate import Estimates, Float
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView

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
USD_S = 20_000.0  # seconds per US dollar, as in `cost.objective`
MISS_WIDTH = 0.06  # of a deadline: how far latencies scatter around what is predicted
AGE_S_MAX = 5.0
OVERTAKEN_S_MAX = 2.0
BOUND = 50.0  # deadlines; beyond it a candidate is hopeless anyway
_POWER_MAX = 30.0


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
        flat += (
            1.0 - reading.free.cpus / cpus,
            reading.queued / max(1.0, cpus),
            row.pending_s,
            min(now_s - row.received_at_s, AGE_S_MAX),
            min(overtaken_s[level], OVERTAKEN_S_MAX) if overtaken_s else 0.0,
        )
    k = len(estimates.candidates)
    busy, queued, pending_s, age_s, before_s = (
        np.fromiter(flat, np.float64, len(flat)).reshape(k, 5).T
    )
    terms = estimates.terms
    wait_s, cold_s, run_s = terms[:, 1], terms[:, 2], terms[:, 3]
    late_s = estimates.latency_s - deadline_s
    out = np.empty((k, len(SIGNALS)))
    np.add(terms[:, 0], terms[:, 4], out=out[:, 0])
    out[:, 1:4] = terms[:, 1:4]
    out[:, 4:6] = terms[:, 5:7]
    out[:, 5] *= USD_S
    np.multiply(np.maximum(late_s, 0.0), urgency, out=out[:, 6])
    power = np.minimum(late_s * (-1.0 / (MISS_WIDTH * deadline_s)), _POWER_MAX)
    np.divide(urgency, 1.0 + np.exp(power), out=out[:, 7])
    np.multiply(busy, run_s, out=out[:, 8])
    np.multiply(busy, cold_s, out=out[:, 9])
    np.multiply(queued, run_s, out=out[:, 10])
    np.multiply(queued, cold_s, out=out[:, 11])
    out[:, 12] = pending_s
    np.multiply(age_s, wait_s, out=out[:, 13])
    np.multiply(before_s, run_s, out=out[:, 14])
    out *= 1.0 / deadline_s
    # fmin and fmax, unlike clip, also turn NaN into a bound.
    return np.fmin(np.fmax(out, 0.0, out=out), BOUND, out=out)
