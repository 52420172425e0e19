"""Objects of federated jobs as the metadata cache names them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from tierwise.domain.ids import NodeId

DATA_NODES_MAX = 8  # that a call names


class ObjectKind(StrEnum):
    """What an object is."""

    UPDATE = "update"
    AGGREGATE = "aggregate"
    METADATA = "metadata"
    MATRIX = "matrix"


class Durability(IntEnum):
    """How far an object is from being lost, ascending."""

    MEMORY = 1
    DISK = 2
    REPLICATED = 3
    STORED = 4


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ObjectKey:
    """Names one object: `client` is empty for what belongs to a whole round."""

    namespace: str
    job: str
    round: int
    kind: ObjectKind
    client: str = ""

    def __str__(self) -> str:
        """Return `namespace/job/round/kind[/client]`, as people and object stores read it."""
        parts = [self.namespace, self.job, f"{self.round:06d}", self.kind.value]
        return "/".join([*parts, self.client] if self.client else parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundClient:
    """One client of a round, and the identity that may put its update; empty: the owner."""

    client: str
    writer: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundManifest:
    """One round as it is announced. Rows of its matrix are in the order of `clients`.

    Attributes:
        parameter_count: Elements of every vector, float32.
        distance_max: Euclidean distance from `base` beyond which an update is quarantined; 0: any.
        base: What deltas are taken from; without it statistics are of the vectors themselves.
        replica_nodes: Nodes that get a copy of every object.
        owner: Identity (URI) that opened it.
        home: Node that opened it, whose copies the others have.
    """

    namespace: str
    job: str
    round: int
    clients: tuple[RoundClient, ...]
    parameter_count: int
    distance_max: float = 0.0
    base: ObjectKey | None = None
    replica_nodes: tuple[str, ...] = ()
    owner: str = ""
    home: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldRounds:
    """The rounds of one job that a node holds, as heartbeats tell.

    Attributes:
        rounds: Ascending, at most the newest 64.
        owner: Identity (URI) that opened them.
        is_copy: All are copies of what another node took.
        newest_done: The newest of them that has ended, or has every update; −1: none has.
    """

    namespace: str
    job: str
    rounds: tuple[int, ...]
    size_bytes: int = 0
    owner: str = ""
    is_copy: bool = False
    newest_done: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """One object as lists show it.

    Attributes:
        quarantined: Why it does not count; empty if it does.
        metadata: Small facts that came with it: example_count, loss, metrics.
    """

    key: ObjectKey
    size_bytes: int
    digest: str
    durability: Durability
    node_ids: tuple[str, ...] = ()
    is_in_memory: bool = False
    quarantined: str = ""
    metadata: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingHead:
    """What is said of an object before its bytes come.

    Attributes:
        size_bytes: Of the object as it is held: uncompressed.
        digest: BLAKE2b-256, hex; empty: not checked.
        durability: The commit returns when the object is at least so durable.
        is_replica: A copy from the node that took it: not written to the object store from here.
    """

    key: ObjectKey
    size_bytes: int
    digest: str = ""
    metadata: Mapping[str, object] | None = None
    durability: Durability = Durability.DISK
    is_replica: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReading:
    """How one node's cache is doing. `policies` says by "namespace/job" what governs it."""

    memory_bytes: int
    memory_bytes_max: int
    disk_bytes: int
    hit_count: int
    miss_count: int
    policies: Mapping[str, str] = field(default_factory=dict)


def most_bytes(holders: Iterable[tuple[Sequence[NodeId], int]]) -> tuple[NodeId, ...]:
    """Return the nodes that hold the most bytes of several objects, at most DATA_NODES_MAX.

    Args:
        holders: Per object, who holds it, and its bytes.
    """
    bytes_by_node: dict[NodeId, int] = {}
    for nodes, size_bytes in holders:
        for node_id in nodes:
            bytes_by_node[node_id] = bytes_by_node.get(node_id, 0) + size_bytes
    most = max(bytes_by_node.values(), default=0)
    found = sorted(node_id for node_id, held in bytes_by_node.items() if held == most)
    return tuple(found[:DATA_NODES_MAX])
