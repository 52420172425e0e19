"""The cost of one federated round: who sends to whom, what arrives when, what it costs.

    received = first-in-first-out over the aggregator's ingress, no sooner than the own path allows
    merged   = max(last received, wait + cold start) + updates × run ÷ speed
    ended    = the same once more at the root, over what the aggregators send it
    cost     = ended + usd × per_usd_s

Paths, waits, cold starts and prices are those of every other decision (`cost.estimate`). An
aggregator's ingress is its fastest incoming path from a client: uploads share it, as messages share
a `Channel`. Several clients on one node do not share its uplink. With a single aggregator there is
no second merge: the root is sent the result.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from tierwise.cost.estimate import predict_wait_s
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.domain.decision import NotPlaced, Reason
from tierwise.domain.function import FunctionSpec, Priority
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.request import Request
from tierwise.domain.topology import Tier
from tierwise.domain.view import ClusterView, NodeView
from tierwise.placement.feasibility import feasible

LATEST_MAX = 6  # clients of an aggregator that are tried elsewhere, the last to arrive
CANDIDATES_MAX = 32

Float = NDArray[np.float64]
Association = NDArray[np.intp]  # the row of each client's aggregator


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One client of a round: its update is ready on its node in `ready_s` seconds from now."""

    node_id: NodeId
    update_bytes: int
    ready_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What is to be placed.

    Attributes:
        clients: At least one.
        aggregate: The function that merges; its learnt `run_s` is per update, at speed 1.0.
        root: Where the round's result must be.
        aggregate_bytes: What an aggregator sends to the root.
        aggregators_max: At most so many aggregators, ≥ 1.
    """

    clients: tuple[Client, ...]
    aggregate: FunctionSpec
    root: NodeId
    aggregate_bytes: int
    aggregators_max: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregator:
    """One chosen node, who sends to it, and when (seconds from now) it has what."""

    node_id: NodeId
    clients: tuple[NodeId, ...]
    received_s: float
    merged_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """What a round would cost with one candidate as the only aggregator: why it was (not) taken."""

    node_id: NodeId
    ended_s: float
    money_usd: float
    cost_s: float
    is_chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The choice, what it should cost, and what else there was.

    `candidates` are by rising cost; `masked` names the nodes that may not aggregate, and why.
    `nearest_cost_s` is the cost if each client took its nearest candidate.
    """

    aggregators: tuple[Aggregator, ...]
    ended_s: float
    money_usd: float
    cost_s: float
    candidates: tuple[Alone, ...]
    masked: tuple[tuple[NodeId, Reason], ...]
    nearest_cost_s: float


class Problem:
    """A round in arrays: n clients, m candidates (rows), the root among them."""

    @classmethod
    def of(
        cls, view: ClusterView, wanted: Round, *, are_warm: bool = False
    ) -> "Problem | NotPlaced":
        """Return the problem, or why nothing may aggregate.

        Args:
            view: The cluster.
            wanted: The round.
            are_warm: Reckon as if every candidate had a warm instance, as in every later round.

        Raises:
            ValueError: There is no client, or the view does not know the node of one.
        """
        if not wanted.clients or wanted.aggregators_max < 1:
            raise ValueError("a round has at least one client, and one aggregator")
        request = Request(
            request_id=RequestId("round"),
            spec=wanted.aggregate,
            origin=view.origin.node_id if view.origin is not None else wanted.root,
            item_count=len(wanted.clients),
        )
        candidates, masked = feasible(view, request)
        if all(row.node.node_id != wanted.root for row in candidates):
            return NotPlaced(reasons=tuple(masked) or ((wanted.root, Reason.NODE_UNREACHABLE),))
        return cls(view, wanted, candidates, masked, are_warm)

    def __init__(
        self,
        view: ClusterView,
        wanted: Round,
        candidates: Sequence[NodeView],
        masked: Sequence[tuple[NodeId, Reason]],
        are_warm: bool,
    ) -> None:
        self._wanted = wanted
        prices = self._prices = view.prices
        self._masked = tuple(masked)
        known = {row.node.node_id: row.node for row in view.nodes}
        unknown = [c.node_id for c in wanted.clients if c.node_id not in known]
        if unknown:
            raise ValueError(f"the view knows no node {unknown[0]!r} of a client")
        senders = [known[client.node_id] for client in wanted.clients]
        between = view.links.between
        if len(candidates) > CANDIDATES_MAX:
            # The nearest to the clients, and the root.
            far_s = {
                row.node.node_id: sum(between(s, row.node).transfer_s(0) for s in senders)
                for row in candidates
            }
            far_s[wanted.root] = -1.0
            candidates = sorted(candidates, key=lambda row: far_s[row.node.node_id])
            candidates = candidates[:CANDIDATES_MAX]
        self._rows = tuple(candidates)
        nodes = [row.node for row in candidates]
        self._root = next(i for i, node in enumerate(nodes) if node.node_id == wanted.root)
        profile = view.profile(wanted.aggregate.function_id)
        warm = [row.reading.warm.get(wanted.aggregate.function_id, 0) > 0 for row in candidates]
        self._cold_s = np.array(
            [
                0.0 if is_warm else profile.cold_start_s / row.node.speed
                for row, is_warm in zip(candidates, warm, strict=True)
            ]
        )
        waits_s = [predict_wait_s(row, view.now_s, Priority.NORMAL) for row in candidates]
        self._available_s = np.array(waits_s) + (0.0 if are_warm else self._cold_s)
        self._run_s = np.array([profile.run_s / node.speed for node in nodes])  # of one update
        self._ready_s = np.array([client.ready_s for client in wanted.clients])
        self._bytes = np.array([float(client.update_bytes) for client in wanted.clients])
        paths = [[between(sender, node) for node in nodes] for sender in senders]
        self._half_s = np.array([[path.rtt_s / 2 for path in row] for row in paths])
        bandwidth = np.array([[path.bandwidth_bytes_per_s for path in row] for row in paths])
        self._own_s = self._half_s + self._bytes[:, None] / bandwidth
        self._is_here = np.array([[s.node_id == node.node_id for node in nodes] for s in senders])
        outside = np.where(self._is_here, 0.0, bandwidth)
        self._ingress = np.where(outside.max(axis=0) > 0.0, outside.max(axis=0), np.inf)
        up = [between(node, nodes[self._root]) for node in nodes]
        self._up_half_s = np.array([path.rtt_s / 2 for path in up])
        up_bandwidth = np.array([path.bandwidth_bytes_per_s for path in up])
        self._up_s = self._up_half_s + wanted.aggregate_bytes / up_bandwidth
        # USD per byte from each client, and from each candidate to the root.
        self._gate_usd = np.array(
            [[prices.moved_usd(s.tier, node.tier, 1.0) for node in nodes] for s in senders]
        )
        root_tier = nodes[self._root].tier
        self._up_gate_usd = np.array([prices.moved_usd(n.tier, root_tier, 1.0) for n in nodes])
        finite = up_bandwidth[np.isfinite(up_bandwidth)]
        self._up_ingress = float(finite.max()) if len(finite) else np.inf

    @property
    def count(self) -> int:
        """Return how many candidates there are."""
        return len(self._rows)

    @property
    def root(self) -> int:
        """Return the candidate where the result must be."""
        return self._root

    @property
    def aggregators_max(self) -> int:
        """Return how many of them may aggregate."""
        return min(self._wanted.aggregators_max, self.count)

    def rows_of(self, tier: Tier) -> list[int]:
        """Return the candidates of a tier."""
        return [i for i, row in enumerate(self._rows) if row.node.tier is tier]

    def association(self, aggregators: Sequence[NodeId]) -> Association | None:
        """Return the association of each client with a node; None if one is no candidate."""
        known = {row.node.node_id: i for i, row in enumerate(self._rows)}
        if not all(node_id in known for node_id in aggregators):
            return None
        return np.array([known[node_id] for node_id in aggregators], dtype=np.intp)

    def nodes(self, association: Association) -> tuple[NodeId, ...]:
        """Return the aggregator of each client by name."""
        return tuple(self._rows[row].node.node_id for row in association.tolist())

    def arrival_s(self, row: int) -> float:
        """Return what it takes to bring the model from the root to a candidate that may be cold."""
        if row == self._root:
            return 0.0
        usd = self._wanted.aggregate_bytes * float(self._up_gate_usd[row])
        return float(self._up_s[row] + self._cold_s[row]) + DEFAULT_OBJECTIVE.per_usd_s * usd

    def all_to(self, row: int) -> Association:
        """Return the association of every client with one candidate."""
        return np.full(len(self._ready_s), row, dtype=np.intp)

    def nearest(self, among: Sequence[int] | None = None) -> Association:
        """Return each client with the candidate that its update reaches first.

        If those are too many, the ones with the fewest clients give theirs to the others.
        """
        rows = list(range(self.count)) if among is None else list(among)
        while True:
            found: Association = np.array(rows, dtype=np.intp)[self._own_s[:, rows].argmin(axis=1)]
            used, sizes = np.unique(found, return_counts=True)
            if len(used) <= self.aggregators_max:
                return found
            rows = [int(row) for row in used if row != used[sizes.argmin()]]

    def cost_s(self, association: Association) -> float:
        """Return what a round costs, in second-equivalents."""
        ended_s, money_usd = self.outlook(association)
        return ended_s + DEFAULT_OBJECTIVE.per_usd_s * money_usd

    def outlook(self, association: Association) -> tuple[float, float]:
        """Return when a round ends, in seconds from now, and its price in USD."""
        used = np.unique(association)
        merged_s = np.array([self.merged(association, int(row))[1] for row in used])
        usd = sum(self._usd(int(row), association == row) for row in used)
        if len(used) == 1:  # nothing is left to merge: the root is sent the result
            up_s = 0.0 if used[0] == self._root else float(self._up_s[used[0]])
            return float(merged_s[0]) + up_s, usd
        size = float(self._wanted.aggregate_bytes)
        is_there = used == self._root
        received_s = _received(
            merged_s,
            np.where(is_there, 0.0, self._up_half_s[used]),
            np.where(is_there, 0.0, self._up_s[used]),
            np.where(is_there, 0.0, size / self._up_ingress),
        )
        work_s = len(used) * self._run_s[self._root]
        start_s = max(float(received_s.max()), float(self._available_s[self._root]))
        usd += self._prices.call_usd(
            self._rows[self._root].node.tier,
            memory_mib=self._wanted.aggregate.memory_mib,
            billed_s=work_s,
            moved_usd=size * float(self._up_gate_usd[used[~is_there]].sum()),
        )
        return start_s + float(work_s), usd

    def merged(self, association: Association, row: int) -> tuple[float, float, Float]:
        """Return when an aggregator has its last update, when it has merged, and each arrival."""
        mine = np.flatnonzero(association == row)
        is_here = self._is_here[mine, row]
        received_s = _received(
            self._ready_s[mine],
            self._half_s[mine, row],
            self._own_s[mine, row],
            np.where(is_here, 0.0, self._bytes[mine] / self._ingress[row]),
        )
        last_s = float(received_s.max())
        start_s = max(last_s, float(self._available_s[row]))
        return last_s, start_s + len(mine) * float(self._run_s[row]), received_s

    def neighbours(self, association: Association) -> Iterator[Association]:
        """Yield associations that differ by one step, those that keep the aggregators first."""
        used = [int(row) for row in np.unique(association)]
        latest = {row: self._latest(association, row) for row in used}
        for row, other in product(used, used):
            if row == other:
                continue
            for client in latest[row]:
                yield _moved(association, [client], other)
                if row < other:
                    for partner in latest[other]:
                        exchanged = _moved(association, [client], other)
                        exchanged[partner] = row
                        yield exchanged
        unused = [row for row in range(self.count) if row not in used]
        for row in unused if len(used) < self.aggregators_max else ():
            nearer = self._own_s[:, row] < self._own_s[np.arange(len(association)), association]
            yield _moved(association, np.flatnonzero(nearer).tolist(), row)
            for other in used:  # takes half of another's, those that are nearest to itself
                mine = np.flatnonzero(association == other)
                by_gain = mine[np.argsort(self._own_s[mine, row] - self._own_s[mine, other])]
                yield _moved(association, by_gain[: (len(mine) + 1) // 2].tolist(), row)
                yield _moved(association, latest[other][:1], row)
        for row in used:
            mine = np.flatnonzero(association == row)
            rest = [other for other in used if other != row]
            if rest:
                dropped = association.copy()
                dropped[mine] = np.array(rest)[self._own_s[mine][:, rest].argmin(axis=1)]
                yield dropped
            for other in unused:
                yield _moved(association, mine.tolist(), other)
                yield self.nearest([*rest, other])

    def plan(self, association: Association) -> Plan:
        """Return an association for people and for whoever carries it out."""
        ended_s, money_usd = self.outlook(association)
        used = [int(row) for row in np.unique(association)]
        aggregators = []
        for row in used:
            last_s, merged_s, _ = self.merged(association, row)
            mine = np.flatnonzero(association == row).tolist()
            aggregators.append(
                Aggregator(
                    node_id=self._rows[row].node.node_id,
                    clients=tuple(self._wanted.clients[i].node_id for i in mine),
                    received_s=last_s,
                    merged_s=merged_s,
                )
            )
        alone = []
        for row, candidate in enumerate(self._rows):
            ended, usd = self.outlook(self.all_to(row))
            alone.append(
                Alone(
                    node_id=candidate.node.node_id,
                    ended_s=ended,
                    money_usd=usd,
                    cost_s=ended + DEFAULT_OBJECTIVE.per_usd_s * usd,
                    is_chosen=row in used,
                )
            )
        return Plan(
            aggregators=tuple(aggregators),
            ended_s=ended_s,
            money_usd=money_usd,
            cost_s=ended_s + DEFAULT_OBJECTIVE.per_usd_s * money_usd,
            candidates=tuple(sorted(alone, key=lambda each: each.cost_s)),
            masked=self._masked,
            nearest_cost_s=self.cost_s(self.nearest()),
        )

    def _latest(self, association: Association, row: int) -> list[int]:
        """Return the clients whose updates an aggregator has last, the last one first."""
        mine = np.flatnonzero(association == row)
        received_s = self.merged(association, row)[2]
        return [int(i) for i in mine[np.argsort(-received_s, kind="stable")][:LATEST_MAX]]

    def _usd(self, row: int, is_mine: NDArray[np.bool_]) -> float:
        sent = is_mine & ~self._is_here[:, row]
        moved_usd = float((self._bytes[sent] * self._gate_usd[sent, row]).sum())
        return self._prices.call_usd(
            self._rows[row].node.tier,
            memory_mib=self._wanted.aggregate.memory_mib,
            billed_s=int(is_mine.sum()) * float(self._run_s[row]),
            moved_usd=moved_usd,
        )


def _moved(association: Association, clients: Sequence[int], row: int) -> Association:
    changed = association.copy()
    changed[clients] = row
    return changed


def _received(ready_s: Float, half_s: Float, own_s: Float, service_s: Float) -> Float:
    """Return when each message has arrived through one shared ingress, shape (n,).

    Messages are served in the order in which their first byte comes (`ready_s + half_s`), each for
    `service_s`; none is there before its own path allows (`ready_s + own_s`).
    """
    first_s = ready_s + half_s
    order = np.argsort(first_s, kind="stable")
    service = service_s[order]
    done = np.cumsum(service)
    free_s = done + np.maximum.accumulate(first_s[order] - (done - service))
    received_s = np.empty_like(free_s)
    received_s[order] = free_s
    return np.maximum(received_s, ready_s + own_s)
