"""Predict what a request would cost on each candidate node, before it is placed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierwise.domain.function import Priority
from tierwise.domain.prices import CallPrice
from tierwise.domain.request import Request
from tierwise.domain.topology import Tier
from tierwise.domain.view import ClusterView, NodeReading, NodeView

Float = NDArray[np.float64]

TERMS = (
    "transfer_s",
    "wait_s",
    "cold_start_s",
    "run_s",
    "return_s",
    "displaced_s",
    "money_usd",
)


@dataclass(frozen=True, slots=True)
class Estimates:
    """Predicted terms, one row per candidate.

    `terms` has shape (k, 7), float64; columns are TERMS. Row order is that of `candidates`.
    """

    candidates: tuple[NodeView, ...]
    terms: Float

    def column(self, name: str) -> Float:
        """Return one term, shape (k,)."""
        return self.terms[:, TERMS.index(name)]

    @property
    def latency_s(self) -> Float:
        """Return predicted end-to-end seconds, shape (k,)."""
        seconds: Float = np.add.reduce(self.terms[:, :5], axis=1)
        return seconds


# Of a cold start, where instances of the function run but none is idle: one of them may come free
# first. Tuned on validation worlds of the simulator.
ENGAGED_SHARE = 0.5


def estimate(view: ClusterView, request: Request, candidates: Sequence[NodeView]) -> Estimates:
    """Predict latency and money of `request` on each of `candidates`: `predict`, as a matrix.

    Returns:
        Estimates with k = len(candidates) rows; k may be 0.
    """
    rows = predict(view, request, candidates)
    terms = np.array(rows, dtype=np.float64).reshape(len(rows), len(TERMS))
    return Estimates(tuple(candidates), terms)


def wait_of(reading: NodeReading, priority: Priority) -> float:
    """Return the seconds that a request waits for a CPU of a node when its reading is taken."""
    overtaken_s = reading.overtaken_s
    if not overtaken_s:
        return reading.backlog_s
    return max(0.0, reading.backlog_s - overtaken_s[int(priority) - 1])


def predict_wait_s(row: NodeView, now_s: float, priority: Priority) -> float:
    """Return the seconds that a request should wait for a CPU of a node.

    That is the reading's backlog for its priority, drained since it was taken, plus what the viewer
    itself has sent there since.
    """
    backlog_s = wait_of(row.reading, priority)
    if backlog_s > 0.0:
        backlog_s = max(0.0, backlog_s - (now_s - row.received_at_s))
    return backlog_s + row.pending_s


def predict(
    view: ClusterView, request: Request, candidates: Sequence[NodeView]
) -> list[tuple[float, ...]]:
    """Return one row of TERMS per candidate, as plain floats.

    A node with an idle warm instance of the function starts nothing, one with running instances
    perhaps. Data that lies elsewhere must be moved first.
    """
    spec = request.spec
    function = spec.function_id
    profile = view.profile(function)
    run_s = profile.run_s * request.item_count
    cold_s = profile.cold_start_s
    response_bytes = profile.response_bytes * request.item_count
    memory_mib = spec.memory_mib
    priority = request.priority
    origin = view.origin
    origin_id = None if origin is None else origin.node_id
    now_s = view.now_s
    links = view.links
    data_nodes = request.data_nodes
    # Nodes of one tier have much in common: unless links are known by pair, also the way there.
    ways: dict[Tier, tuple[float, float, float]] = {}
    prices = view.prices
    prices_of: dict[tuple[Tier, float], CallPrice] = {}
    rows: list[tuple[float, ...]] = []
    for row in candidates:
        node = row.node
        tier = node.tier
        reading = row.reading
        speed = node.speed
        if origin is None or origin_id == node.node_id:
            transfer_s = return_s = 0.0
            moved_usd = 0.0
        else:
            way = ways.get(tier)
            if way is None:
                there, back = links.between(origin, node), links.between(node, origin)
                way = (
                    there.transfer_s(request.request_bytes),
                    back.transfer_s(response_bytes),
                    prices.round_trip_usd(origin.tier, tier, request.request_bytes, response_bytes),
                )
                if not links.by_pair:
                    ways[tier] = way
            transfer_s, return_s, moved_usd = way
        if data_nodes and node.node_id not in data_nodes:
            transfer_s += links.default.transfer_s(request.data_bytes)
            moved_usd += _data_usd(view, request, tier)
        here_cold_s = displaced_s = 0.0
        if reading.warm.get(function, 0) <= 0:
            here_cold_s = cold_s / speed
            if reading.engaged.get(function, 0) > 0:
                here_cold_s *= ENGAGED_SHARE
            missing_mib = memory_mib - reading.free.memory_mib
            if missing_mib > 0:
                displaced_s = missing_mib * reading.eviction_price_s_per_mib
        here_run_s = run_s / speed
        price = prices_of.get((tier, moved_usd))
        if price is None:
            price = prices_of[tier, moved_usd] = prices.of_call(
                tier,
                memory_mib=memory_mib,
                moved_usd=moved_usd,
                gpu_slots=spec.gpu_slots,
                item_count=request.item_count,
            )
        rows.append(
            (
                transfer_s,
                predict_wait_s(row, now_s, priority),
                here_cold_s,
                here_run_s,
                return_s,
                displaced_s,
                price.usd(here_run_s + here_cold_s if prices.is_startup_billed else here_run_s),
            )
        )
    return rows


def _data_usd(view: ClusterView, request: Request, tier: Tier) -> float:
    """Return the price of bringing the data to a node of a tier, from where that is cheapest."""
    holders = {row.node.tier for row in view.nodes if row.node.node_id in request.data_nodes}
    return min(
        view.prices.moved_usd(source, tier, request.data_bytes) for source in holders or {tier}
    )
