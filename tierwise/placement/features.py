"""What a placement network sees of each candidate. One row per candidate, in candidate order."""

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
FEATURES = (
    "transfer",  # predicted terms ÷ deadline, log-compressed …
    "wait",
    "cold_start",
    "run",
    "return",
    "displaced",
    "latency",  # their sum without `displaced`
    "score_gap",  # base score minus the best one, likewise
    "pending",  # run time sent there since its reading, likewise
    "queued",  # log of requests waiting per CPU
    "warm",  # log of idle instances of this function
    "age",  # log of the reading's age in seconds
    "cpu_free",  # share of the node's CPUs
    "memory_free",  # share of the node's memory
    "is_edge",
    "is_cloud",
    "is_origin",  # the node that takes the decision
    "speed",  # log2
    "money",  # log10 of USD per call, shifted
    "is_late",  # predicted to miss the deadline
    "priority",  # request: 0 … 1
    "deadline",  # request: log10 of seconds
    "bytes",  # request: log10
    "rate",  # function: log of calls per second in the cluster
)


def encode(
    view: ClusterView, request: Request, estimates: Estimates, scores: Float
) -> NDArray[np.float32]:
    """Encode one decision for a policy network.

    Returns:
        Shape `(k, 24)`, float32, every entry within ±BOUND. Row order is the candidates'. Column
        meanings: FEATURES. Schema 1.

    Raises:
        ValueError: There is no candidate.
    """
    candidates = estimates.candidates
    k = len(candidates)
    if k == 0:
        raise ValueError("there is no candidate to encode")
    deadline_s = max(request.deadline_s, 1e-3)
    profile = view.profile(request.spec.function_id)
    function = request.spec.function_id
    out = np.empty((k, len(FEATURES)), dtype=np.float64)
    terms = estimates.terms
    latency_s = estimates.latency_s
    origin_id = view.origin.node_id if view.origin is not None else None
    now_s = view.now_s
    rows = []
    for row in candidates:
        node, reading = row.node, row.reading
        capacity, free, age_s = node.capacity, reading.free, now_s - row.received_at_s
        rows.append(
            (
                row.pending_s,
                reading.queued / (capacity.cpus or 1.0),
                reading.warm.get(function, 0),
                age_s if age_s > 0.0 else 0.0,
                free.cpus / (capacity.cpus or 1.0),
                free.memory_mib / (capacity.memory_mib or 1),
                node.tier is Tier.EDGE,
                node.tier is Tier.CLOUD,
                node.node_id == origin_id,
                node.speed,
            )
        )
    out[:, 0:6] = terms[:, 0:6]
    out[:, 6] = latency_s
    out[:, 7] = scores - scores.min()
    out[:, 8:18] = rows
    out[:, 0:9] *= 4.0 / deadline_s
    np.log1p(out[:, 0:12], out=out[:, 0:12])
    out[:, 17] = np.log2(out[:, 17])
    out[:, 18] = np.log10(terms[:, 6] + 1e-12) + 7.0
    out[:, 19] = latency_s > request.deadline_s
    out[:, 20:24] = (
        (int(request.priority) - 1) / 3.0,
        math.log10(deadline_s),
        math.log10(request.request_bytes + 1.0) - 3.0,
        math.log1p(profile.rate_per_s),
    )
    return np.minimum(np.maximum(out, -BOUND), BOUND).astype(np.float32)
