"""Who takes part in a round, and where its updates are merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tierwise.domain.decision import NotPlaced, summary
from tierwise.domain.federated import AggregatorRecord, FederatedClient, JobProgress, JobSpec
from tierwise.domain.function import FunctionSpec
from tierwise.domain.ids import NodeId
from tierwise.domain.topology import NodeState
from tierwise.domain.view import ClusterView
from tierwise.placement.federated import place
from tierwise.placement.federated_moves import revise
from tierwise.placement.federated_round import Client, Problem, Round

ROOTS_MAX = 8  # candidates that are compared
REST_MAX = 8  # rounds that a client which fails again and again is left out
READY_S = 1.0  # assumed of a client that has not been heard of yet


@dataclass(slots=True)
class Attendance:
    """What has been seen of clients: how long they take, and whom to leave alone for a while.

    It begins anew with the scheduler: a client that fails is found out again.
    """

    elapsed_s: dict[str, float] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    rests_until: dict[str, int] = field(default_factory=dict)  # a round

    def answered(self, client: str, elapsed_s: float) -> None:
        """Take note of a good update."""
        before_s = self.elapsed_s.get(client, elapsed_s)
        self.elapsed_s[client] = 0.7 * before_s + 0.3 * elapsed_s
        self.failures.pop(client, None)
        self.rests_until.pop(client, None)

    def failed(self, client: str, round_number: int) -> None:
        """Take note of a failure: after n in a row the client rests 2^(n−1) − 1 rounds."""
        count = self.failures[client] = self.failures.get(client, 0) + 1
        rest = min(REST_MAX, 2 ** (count - 1) - 1)
        self.rests_until[client] = round_number + 1 + rest

    def rested(self, clients: Sequence[FederatedClient], number: int) -> list[FederatedClient]:
        """Return those that do not rest in a round."""
        return [each for each in clients if self.rests_until.get(each.client, 0) <= number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sites:
    """Where a round is merged; the root is the last of `aggregators`."""

    root: NodeId
    aggregators: tuple[AggregatorRecord, ...]
    association: Mapping[NodeId, NodeId] = field(default_factory=dict)
    cost_s: float = 0.0  # second-equivalents; 0: not reckoned
    is_moved: bool = False  # others than before


def states_of(view: ClusterView) -> dict[NodeId, NodeState]:
    """Return the state of each node; one that is not there is lost."""
    return {row.node.node_id: row.state for row in view.nodes}


def sampled(
    clients: Sequence[FederatedClient], count: int, seed: int, round_number: int
) -> list[FederatedClient]:
    """Draw at most `count` clients, in the order of their names; the same ones each time."""
    by_name = sorted(clients, key=lambda each: each.client)
    if count >= len(by_name):
        return by_name
    order = np.random.default_rng((seed, round_number)).permutation(len(by_name))[:count]
    return [by_name[i] for i in sorted(order.tolist())]


def find_sites(
    spec: JobSpec,
    merge: FunctionSpec,
    progress: JobProgress,
    clients: Sequence[FederatedClient],
    view: ClusterView,
    attendance: Attendance,
    *,
    may_move: bool = True,
) -> Sites | str:
    """Return where a round of these clients is merged, or why it cannot be now.

    Args:
        spec: The job.
        merge: Its aggregate function.
        progress: Where its root and aggregators were.
        clients: Who takes part.
        view: The cluster.
        attendance: How long clients take.
        may_move: Look for better aggregators; otherwise those of before stay if they can, and the
            cost is not reckoned.
    """
    known = states_of(view)
    there = [each for each in clients if each.node_id in known]
    if not there:
        return "no client's node has joined"
    wanted = _round(spec, merge, there, attendance)
    root = progress.root or spec.topology.root or _best_root(view, wanted)
    if isinstance(root, NotPlaced):
        return f"no node may aggregate: {summary(root.reasons)}"
    wanted = replace(wanted, root=root)
    if not spec.topology.is_hierarchical:
        problem = Problem.of(view, wanted)
        if isinstance(problem, NotPlaced):
            return f"{root} may not aggregate: {summary(problem.reasons)}"
        only = AggregatorRecord(node_id=root, clients=tuple(each.client for each in clients))
        cost_s = problem.cost_s(problem.all_to(problem.root))
        return Sites(root=root, aggregators=(only,), cost_s=cost_s)
    senders = [client.node_id for client in wanted.clients]
    before = progress.association
    current = [before.get(node, root) for node in senders] if before else []
    is_able = all(known.get(node) is NodeState.READY for node in (root, *current))
    if not may_move and is_able and all(node in before for node in senders):
        return Sites(root=root, aggregators=_grouped(there, before, root), association=before)
    rounds_left = progress.round_count - progress.done_count
    revised = revise(view, wanted, current, rounds_left)
    if isinstance(revised, NotPlaced):
        return f"{root} may not aggregate: {summary(revised.reasons)}"
    association = dict(zip(senders, revised.aggregators, strict=True))
    return Sites(
        root=root,
        aggregators=_grouped(there, association, root),
        association={**before, **association},
        cost_s=revised.cost_s,
        is_moved=bool(before) and set(revised.aggregators) != set(current),
    )


def _round(
    spec: JobSpec,
    merge: FunctionSpec,
    clients: Sequence[FederatedClient],
    attendance: Attendance,
) -> Round:
    """Return the round as the placement sees it: the clients of one node are one sender."""
    size = 4 * spec.parameter_count
    counts: dict[NodeId, int] = {}
    ready_s: dict[NodeId, float] = {}
    for each in clients:
        counts[each.node_id] = counts.get(each.node_id, 0) + 1
        elapsed_s = attendance.elapsed_s.get(each.client, READY_S)
        ready_s[each.node_id] = max(elapsed_s, ready_s.get(each.node_id, 0.0))
    return Round(
        clients=tuple(
            Client(node_id=node_id, update_bytes=size * count, ready_s=ready_s[node_id])
            for node_id, count in counts.items()
        ),
        aggregate=merge,
        root=NodeId(""),
        aggregate_bytes=size,
        aggregators_max=spec.topology.aggregators_max,
    )


def _best_root(view: ClusterView, wanted: Round) -> NodeId | NotPlaced:
    """Return the node of the highest tier there is at which a round ends best."""
    ready = [row.node for row in view.nodes if row.state is NodeState.READY]
    tiers = wanted.aggregate.tiers
    top = max((node.tier for node in ready if node.tier in tiers), default=None)
    names = [node.node_id for node in ready if node.tier == top][:ROOTS_MAX]
    best: tuple[float, NodeId] | None = None
    refused: NotPlaced | None = None
    for name in names:
        found = place(view, replace(wanted, root=name))
        if isinstance(found, NotPlaced):
            refused = found
        elif best is None or (found.cost_s, name) < best:
            best = (found.cost_s, name)
    if best is not None:
        return best[1]
    return refused or NotPlaced(reasons=())


def _grouped(
    clients: Sequence[FederatedClient], association: Mapping[NodeId, NodeId], root: NodeId
) -> tuple[AggregatorRecord, ...]:
    """Return each aggregator with its clients, the root as the last even if it has none."""
    groups: dict[NodeId, list[str]] = {}
    for each in clients:
        groups.setdefault(association[each.node_id], []).append(each.client)
    own = groups.pop(root, [])
    sites = [AggregatorRecord(node_id=n, clients=tuple(groups[n])) for n in sorted(groups)]
    return (*sites, AggregatorRecord(node_id=root, clients=tuple(own)))
