"""The cluster ⇄ protobuf: resources, nodes, readings, links and the view of peers."""

import math
from collections.abc import Mapping

from tierwise.domain.event import PeerSeen, ViewReceived
from tierwise.domain.function import Priority
from tierwise.domain.ids import FunctionId, NodeId
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Link, LinkTable, Node, NodeState, Tier
from tierwise.domain.view import NodeReading
from tierwise.errors import InvalidArgument
from tierwise.v1 import node_pb2, types_pb2
from tierwise.wire import checks
from tierwise.wire.convert_cache import held_from_pb, held_to_pb
from tierwise.wire.convert_function import (
    INT32_MAX,
    INT64_MAX,
    profile_to_pb,
    profiles_from_pb,
)

LABELS_MAX = 64
LABEL_LENGTH_MAX = 256
PEERS_MAX = 10_000
WARM_MAX = 10_000
CPUS_MAX = 10_000.0
MEMORY_MIB_MAX = 1_000_000_000
TIMES_MAX_S = 1e9
ROUNDING_CPUS = 1e-6  # what sums of fractions of CPUs may leave below zero


def resources_to_pb(value: Resources) -> types_pb2.Resources:
    """Return the message of an amount."""
    return types_pb2.Resources(
        cpus=value.cpus, memory_mib=value.memory_mib, gpu_slots=value.gpu_slots
    )


def resources_from_pb(pb: types_pb2.Resources, field: str = "resources") -> Resources:
    """Return the amount of a message.

    Raises:
        InvalidArgument: A part is negative or beyond any machine.
    """
    cpus = checks.number(pb.cpus, f"{field}.cpus", -ROUNDING_CPUS, CPUS_MAX)
    return Resources(
        cpus=max(0.0, cpus),
        memory_mib=checks.integer(pb.memory_mib, f"{field}.memory_mib", 0, MEMORY_MIB_MAX),
        gpu_slots=checks.integer(pb.gpu_slots, f"{field}.gpu_slots", 0, 10_000),
    )


def node_to_pb(node: Node) -> types_pb2.Node:
    """Return the message of a node."""
    return types_pb2.Node(
        node_id=node.node_id,
        tier=types_pb2.Tier.ValueType(node.tier),
        capacity=resources_to_pb(node.capacity),
        speed=node.speed,
        address=node.address,
        zone=node.zone,
        labels=dict(node.labels),
    )


def node_from_pb(pb: types_pb2.Node) -> Node:
    """Return the node of a message; labels come sorted.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    checks.at_most(pb.labels, "labels", LABELS_MAX)
    labels = tuple(sorted(pb.labels.items()))
    for key, value in labels:
        checks.text(key, "labels", LABEL_LENGTH_MAX)
        checks.text(value, f"labels.{key}", LABEL_LENGTH_MAX)
    return Node(
        node_id=NodeId(checks.name(pb.node_id, "node_id")),
        tier=checks.member(Tier, pb.tier, "tier"),
        capacity=resources_from_pb(pb.capacity, "capacity"),
        speed=checks.number(pb.speed, "speed", 1e-3, 1e3),
        address=checks.address(pb.address, "address"),
        zone=checks.text(pb.zone, "zone", LABEL_LENGTH_MAX),
        labels=labels,
    )


def reading_to_pb(reading: NodeReading) -> types_pb2.NodeReading:
    """Return the message of a reading."""
    return types_pb2.NodeReading(
        sequence=reading.sequence,
        free=resources_to_pb(reading.free),
        running=reading.running,
        queued=reading.queued,
        backlog_s=reading.backlog_s,
        warm={str(key): count for key, count in reading.warm.items()},
        eviction_price_s_per_mib=reading.eviction_price_s_per_mib,
        reserved_mib=reading.reserved_mib,
        overtaken_s=reading.overtaken_s,
        engaged={str(key): count for key, count in reading.engaged.items()},
    )


def reading_from_pb(pb: types_pb2.NodeReading) -> NodeReading:
    """Return the reading of a message.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    if len(pb.overtaken_s) not in (0, len(Priority)):
        raise InvalidArgument(
            f"overtaken_s has {len(pb.overtaken_s)} entries; one per priority is needed, or none"
        )
    return NodeReading(
        sequence=checks.integer(pb.sequence, "sequence", 0, INT64_MAX),
        free=resources_from_pb(pb.free, "free"),
        running=checks.integer(pb.running, "running", 0, INT32_MAX),
        queued=checks.integer(pb.queued, "queued", 0, INT32_MAX),
        backlog_s=checks.number(pb.backlog_s, "backlog_s", 0, TIMES_MAX_S),
        overtaken_s=tuple(
            [checks.number(each, "overtaken_s", 0, TIMES_MAX_S) for each in pb.overtaken_s]
        ),
        warm=_counts_from_pb(pb.warm, "warm"),
        engaged=_counts_from_pb(pb.engaged, "engaged"),
        eviction_price_s_per_mib=checks.number(
            pb.eviction_price_s_per_mib, "eviction_price_s_per_mib", 0, TIMES_MAX_S
        ),
        reserved_mib=checks.integer(pb.reserved_mib, "reserved_mib", 0, INT64_MAX),
    )


def _counts_from_pb(counts: Mapping[str, int], name: str) -> dict[FunctionId, int]:
    checks.at_most(counts, name, WARM_MAX)
    return {
        FunctionId(checks.function_id(key, name)): checks.integer(
            count, f"{name}.{key}", 0, INT32_MAX
        )
        for key, count in counts.items()
    }


def link_to_pb(link: Link) -> types_pb2.Link:
    """Return the message of a link."""
    return types_pb2.Link(
        rtt_s=link.rtt_s,
        bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
        jitter_s=link.jitter_s,
    )


def link_from_pb(pb: types_pb2.Link) -> Link:
    """Return the link of a message; only the bandwidth may be infinite.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    return Link(
        rtt_s=checks.number(pb.rtt_s, "rtt_s", 0, 1e4),
        bandwidth_bytes_per_s=checks.number(
            pb.bandwidth_bytes_per_s, "bandwidth_bytes_per_s", 1, math.inf
        ),
        jitter_s=checks.number(pb.jitter_s, "jitter_s", 0, 1e4),
    )


def links_to_pb(table: LinkTable) -> types_pb2.LinkTable:
    """Return the message of the links between tiers; pairs of nodes are not sent."""
    return types_pb2.LinkTable(
        by_tier=[
            types_pb2.TierLink(
                source=types_pb2.Tier.ValueType(source),
                target=types_pb2.Tier.ValueType(target),
                link=link_to_pb(link),
            )
            for (source, target), link in table.by_tier.items()
        ],
        default=link_to_pb(table.default),
    )


def links_from_pb(pb: types_pb2.LinkTable) -> LinkTable:
    """Return the table of a message; the last of two rows for one pair of tiers holds.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    checks.at_most(pb.by_tier, "links.by_tier", 2 * len(Tier) ** 2)
    return LinkTable(
        by_tier={
            (
                checks.member(Tier, row.source, "links.source"),
                checks.member(Tier, row.target, "links.target"),
            ): link_from_pb(row.link)
            for row in pb.by_tier
        },
        default=link_from_pb(pb.default),
    )


def peer_to_pb(peer: PeerSeen) -> node_pb2.PeerView:
    """Return the message of one node of a view."""
    return node_pb2.PeerView(
        node=node_to_pb(peer.node),
        state=types_pb2.NodeState.ValueType(peer.state),
        reading=reading_to_pb(peer.reading),
        age_s=peer.age_s,
        held=map(held_to_pb, peer.held or ()),
        is_held_known=peer.held is not None,
    )


def peer_from_pb(pb: node_pb2.PeerView) -> PeerSeen:
    """Return one node of a view.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    return PeerSeen(
        node=node_from_pb(pb.node),
        state=checks.member(NodeState, pb.state, "state"),
        reading=reading_from_pb(pb.reading),
        age_s=checks.number(pb.age_s, "age_s", 0, TIMES_MAX_S),
        held=held_from_pb(pb.held) if pb.is_held_known else None,
    )


def view_to_pb(view: ViewReceived) -> node_pb2.View:
    """Return the message of a view."""
    return node_pb2.View(
        peers=[peer_to_pb(peer) for peer in view.peers],
        links=None if view.links is None else links_to_pb(view.links),
        profiles={str(k): profile_to_pb(v) for k, v in (view.profiles or {}).items()},
        is_full=view.is_full,
    )


def view_from_pb(pb: node_pb2.View) -> ViewReceived:
    """Return the view of a message; no profiles and an empty set of them are the same.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    checks.at_most(pb.peers, "peers", PEERS_MAX)
    return ViewReceived(
        peers=tuple(peer_from_pb(peer) for peer in pb.peers),
        links=links_from_pb(pb.links) if pb.HasField("links") else None,
        profiles=profiles_from_pb(pb.profiles) or None,
        is_full=pb.is_full,
    )
