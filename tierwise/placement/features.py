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
    "money",  # log10 of USD per call, shifted
    "is_late",  # predicted to miss the deadline
    "score_gap",  # base score minus the best one ÷ deadline, log-compressed
    "cpu_free",  # share of the node's CPUs
    "memory_free",  # share of the node's memory
    "queued",  # log of requests waiting per CPU
    "warm",  # log of idle instances of this function
    "age",  # log of the reading's age in seconds
    "pending",  # what was sent there since the reading ÷ deadline, log-compressed
    "speed",  # log2
    "is_edge",
    "is_cloud",
    "is_origin",  # the node that takes the decision
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
    latency_s = estimates.latency_s
    out[:, 0:6] = estimates.terms[:, 0:6]
    out[:, 6] = latency_s
    out[:, 9] = scores - scores.min()
    origin_id = view.origin.node_id if view.origin is not None else None
    now_s = view.now_s
    rows = []
    for row in candidates:
        node, reading = row.node, row.reading
        capacity, free = node.capacity, reading.free
        cpus = max(capacity.cpus, 1e-9)
        rows.append(
            (
                free.cpus / cpus,
                free.memory_mib / max(capacity.memory_mib, 1),
                reading.queued / cpus,
                float(reading.warm.get(function, 0)),
                max(0.0, now_s - row.received_at_s),
                row.pending_s,
                node.speed,
                float(node.tier is Tier.EDGE),
                float(node.tier is Tier.CLOUD),
                float(node.node_id == origin_id),
            )
        )
    out[:, 10:20] = rows
    scaled = (0, 1, 2, 3, 4, 5, 6, 9, 15)
    out[:, scaled] = np.log1p(out[:, scaled] * (4.0 / deadline_s))
    out[:, 7] = np.log10(np.maximum(estimates.terms[:, 6], 1e-12)) + 7.0
    out[:, 8] = latency_s > request.deadline_s
    out[:, 12:15] = np.log1p(out[:, 12:15])
    out[:, 16] = np.log2(np.maximum(out[:, 16], 1e-6))
    out[:, 20] = (int(request.priority) - 1) / 3.0
    out[:, 21] = math.log10(deadline_s)
    out[:, 22] = math.log10(request.request_bytes + 1.0) - 3.0
    out[:, 23] = math.log1p(max(0.0, profile.rate_per_s))
    np.clip(out, -BOUND, BOUND, out=out)
    return out.astype(np.float32)
