"""What one node or the scheduler believes of the cluster, and how old each belief is."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from tierwise.domain.function import PRIOR, FunctionProfile
from tierwise.domain.ids import FunctionId, NodeId
from tierwise.domain.prices import DEFAULT_PRICES, PriceTable
from tierwise.domain.resources import NOTHING, Resources
from tierwise.domain.topology import LinkTable, Node, NodeState

_NONE_WARM: Mapping[FunctionId, int] = MappingProxyType({})


def _none_warm() -> Mapping[FunctionId, int]:
    return _NONE_WARM


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReading:
    """What one heartbeat says.

    `backlog_s` is the estimated seconds until a CPU comes free for a new request of the lowest
    priority; `overtaken_s` is how much of it a request of priority 1, 2, 3 or 4 overtakes.
    `warm` counts idle instances, `engaged` those that start or run, both per function.
    `eviction_price_s_per_mib` is what a new instance displaces if memory must be freed:
    request rate × cold start of the cheapest idle instance, per MiB.
    """

    sequence: int = 0
    free: Resources = NOTHING
    running: int = 0
    queued: int = 0
    backlog_s: float = 0.0
    overtaken_s: tuple[float, ...] = ()
    warm: Mapping[FunctionId, int] = field(default_factory=_none_warm)
    engaged: Mapping[FunctionId, int] = field(default_factory=_none_warm)
    eviction_price_s_per_mib: float = 0.0
    reserved_mib: int = 0  # held by floors (`instances_min`), whoever else wants it

    def standing_still(self) -> "NodeReading":
        """Return the same with counts of its own, where they may be a pool's that goes on."""
        return replace(self, warm=dict(self.warm), engaged=dict(self.engaged))


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """One node as its viewer knows it.

    `received_at_s` is on the viewer's clock. `pending_s` is the run time, divided by CPUs, of
    what the viewer itself has sent there since that reading and has not heard of again.
    """

    node: Node
    reading: NodeReading
    state: NodeState = NodeState.READY
    received_at_s: float = 0.0
    pending_s: float = 0.0
    reachable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """An immutable snapshot for one decision. Row order is the order of candidates."""

    now_s: float
    origin: Node | None  # where the decision is taken, if that is a node
    nodes: tuple[NodeView, ...]
    links: LinkTable = field(default_factory=LinkTable)
    profiles: Mapping[FunctionId, FunctionProfile] = field(default_factory=dict)
    prices: PriceTable = DEFAULT_PRICES

    def profile(self, function: FunctionId) -> FunctionProfile:
        """Return what is known of `function`, the prior if nothing is."""
        return self.profiles.get(function, PRIOR)


class ViewTable:
    """The mutable table behind the snapshots of one viewer. Pure: every change carries its time."""

    def __init__(self, origin: Node | None = None) -> None:
        self.origin = origin
        self.links = LinkTable()
        self.prices = DEFAULT_PRICES
        self.profiles: Mapping[FunctionId, FunctionProfile] = {}
        self._rows: dict[NodeId, NodeView] = {}
        self._snapshot: tuple[NodeView, ...] | None = None

    def __contains__(self, node_id: NodeId) -> bool:
        return node_id in self._rows

    def get(self, node_id: NodeId) -> NodeView | None:
        """Return the row of `node_id`, or None."""
        return self._rows.get(node_id)

    def rows(self) -> tuple[NodeView, ...]:
        """Return all rows, ordered by node id, so that equal histories give equal orders."""
        if self._snapshot is None:
            self._snapshot = tuple(self._rows[key] for key in sorted(self._rows))
        return self._snapshot

    def put(self, row: NodeView) -> None:
        """Insert or replace a row."""
        self._rows[row.node.node_id] = row
        self._snapshot = None

    def remove(self, node_id: NodeId) -> None:
        """Forget a node; unknown ids are ignored."""
        if self._rows.pop(node_id, None) is not None:
            self._snapshot = None

    def heard(
        self,
        node_id: NodeId,
        reading: NodeReading,
        now_s: float,
        age_s: float = 0.0,
        *,
        state: NodeState | None = None,
    ) -> bool:
        """Store a reading if it is newer than the one held; return whether it was.

        A newer reading resets `pending_s`: the node has counted that work itself. The state is
        taken over in any case, None leaves it.
        """
        row = self._rows.get(node_id)
        if row is None:
            return False
        if reading.sequence <= row.reading.sequence:
            if state is not None and state is not row.state:
                self.change(node_id, state=state)
            return False
        self.put(
            NodeView(
                node=row.node,
                reading=reading,
                state=row.state if state is None else state,
                received_at_s=now_s - age_s,
            )
        )
        return True

    def change(
        self,
        node_id: NodeId,
        *,
        state: NodeState | None = None,
        pending_s: float | None = None,
        reachable: bool | None = None,
    ) -> None:
        """Change fields of a row; None leaves a field, unknown ids are ignored."""
        row = self._rows.get(node_id)
        if row is None:
            return
        self.put(
            NodeView(
                node=row.node,
                reading=row.reading,
                state=row.state if state is None else state,
                received_at_s=row.received_at_s,
                pending_s=row.pending_s if pending_s is None else pending_s,
                reachable=row.reachable if reachable is None else reachable,
            )
        )

    def view(self, now_s: float) -> ClusterView:
        """Return a snapshot at `now_s`."""
        return ClusterView(
            now_s=now_s,
            origin=self.origin,
            nodes=self.rows(),
            links=self.links,
            profiles=self.profiles,
            prices=self.prices,
        )
