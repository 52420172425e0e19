"""What a placement network sees of each candidate. One row per candidate, in candidate order.

Times are divided by the request's deadline and log-compressed: log(1 + 4·t/deadline). So one
network serves functions of milliseconds and of minutes. What the candidates have in common
(context) is not encoded here: the network pools it from their rows.
"""

import math

import numpy as np
from numpy.typing import NDArray

from tierwise.cost.estimate import Estimates, Float
from tierwise.domain.request import Request
from tierwise.domain.topology import Tier
from tierwise.domain.view import ClusterView

SCHEMA = 1
CANDIDATES_MAX = 16
BOUND = 8.0
GAP_MAX = 50.0  # in deadlines; beyond it a candidate is hopeless anyway
FEATURES = (
    "path",  # transfer there and back ÷ deadline, log-compressed; so are the next six
    "wait",
    "cold_start",
    "run",
    "displaced",
    "score_gap",  # base score minus the best one
    "pending",  # run time sent there since its reading (also part of `wait`)
    "queued",  # log of requests waiting per CPU
    "warm",  # log of idle instances of this function
    "age",  # log of the reading's age in seconds
    "cpu_free",  # share of the node's CPUs
    "memory_free",  # share of the node's memory
    "is_edge",
    "is_cloud",
    "is_origin",  # the node that takes the decision
    "holds_data",  # one of the nodes that the request names for its data
    "speed",  # log2
    "lateness",  # (latency − deadline) ÷ deadline, signed and log-compressed: late if positive
    "money",  # log10 of USD per call, shifted
    "priority",  # request: 0 … 1
    "deadline",  # request: log10 of seconds
    "bytes",  # request: log10, shifted
    "rate",  # function: log of calls per second in the cluster
    "items",  # request: log of argument sets in it
)

_EDGE, _CLOUD = Tier.EDGE, Tier.CLOUD  # an enum's attributes are slow to look up
_SCALED = slice(0, 7)
_LOGGED = slice(0, 10)
_ROW = slice(6, 17)
_LATENESS = FEATURES.index("lateness")
_MONEY = FEATURES.index("money")
_REQUEST = slice(19, 24)
COMMON = _REQUEST  # columns that are equal for all candidates: they say what is asked, not where


def gaps(scores: Float, deadline_s: float) -> Float:
    """Return how much worse than the best each base score is, in deadlines, at most GAP_MAX."""
    gap: Float = (scores - np.minimum.reduce(scores)) / max(deadline_s, 1e-3)
    return np.minimum(gap, GAP_MAX)


def encode(
    view: ClusterView, request: Request, estimates: Estimates, scores: Float
) -> NDArray[np.float32]:
    """Encode one decision for a policy network.

    Returns:
        Shape `(k, 24)`, float32, every entry within ±BOUND (also where a sum overflowed or a
        reading is not a number). Row order is the candidates'. Column meanings: FEATURES.
        Schema 1.

    Raises:
        ValueError: There is no candidate.
    """
    candidates = estimates.candidates
    if not candidates:
        raise ValueError("there is no candidate to encode")
    deadline_s = max(request.deadline_s, 1e-3)
    function = request.spec.function_id
    data_nodes = request.data_nodes
    origin_id = view.origin.node_id if view.origin is not None else None
    now_s = view.now_s
    k = len(candidates)
    flat: list[float] = []
    log2 = math.log2
    for row in candidates:
        node = row.node
        reading = row.reading
        capacity = node.capacity
        free = reading.free
        tier = node.tier
        node_id = node.node_id
        cpus = capacity.cpus or 1.0
        flat += (
            row.pending_s,
            reading.queued / cpus,
            reading.warm.get(function, 0),
            now_s - row.received_at_s,
            free.cpus / cpus,
            free.memory_mib / (capacity.memory_mib or 1),
            tier is _EDGE,
            tier is _CLOUD,
            node_id == origin_id,
            node_id in data_nodes,
            log2(node.speed),
        )
    terms = estimates.terms
    out = np.empty((k, len(FEATURES)), dtype=np.float64)
    out[:, 0:4] = terms[:, 0:4]
    out[:, 0] += terms[:, 4]
    out[:, 4] = terms[:, 5]
    out[:, 5] = scores - np.minimum.reduce(scores)
    out[:, _ROW] = np.fromiter(flat, np.float64, len(flat)).reshape(k, -1)
    out[:, _SCALED] *= 4.0 / deadline_s
    logged = out[:, _LOGGED]
    np.log1p(np.fmax(logged, 0.0, out=logged), out=logged)
    lateness = (estimates.latency_s - deadline_s) * (4.0 / deadline_s)
    out[:, _LATENESS] = np.copysign(np.log1p(np.abs(lateness)), lateness)
    out[:, _MONEY] = np.log10(terms[:, 6] + 1e-12) + 7.0
    out[:, _REQUEST] = (
        (int(request.priority) - 1) / 3.0,
        math.log10(deadline_s),
        math.log10(max(request.request_bytes, 0) + 1.0) - 3.0,
        math.log1p(max(view.profile(function).rate_per_s, 0.0)),
        math.log(max(request.item_count, 1)),
    )
    # fmin and fmax, unlike clip, also turn NaN into a bound.
    return np.fmin(np.fmax(out, -BOUND), BOUND).astype(np.float32)
