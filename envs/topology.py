"""Simulated nodes and links, drawn around measured figures."""

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from tierwise.domain.ids import NodeId
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Link, LinkTable, Node, Tier

MBIT = 125_000.0  # bytes per second


class Classes(Enum):
    """How much the nodes of a tier differ."""

    UNIFORM = 1
    VARIED = 2
    DEVICES = 3


# (CPUs, memory in MiB, speed relative to a cloud CPU). Memory is scarce: not all stays warm.
BASE = {
    Tier.CLOUD: (4.0, 2048, 1.0),
    Tier.FOG: (2.0, 1024, 0.7),
    Tier.EDGE: (1.0, 512, 0.4),
}
# Device classes at the edge and on site. The ratios between them loosely follow container starts
# measured on devices by faas-sim (Raspberry Pi 2.6–31 s, NUC 1.4–2.6 s): a Pi is some 5 to 10
# times slower than a server core.
DEVICES = {
    Tier.CLOUD: ((4.0, 2048, 1.0), (8.0, 4096, 1.2)),
    Tier.FOG: ((2.0, 1024, 0.7), (4.0, 2048, 0.9), (2.0, 768, 0.5)),
    Tier.EDGE: ((1.0, 512, 0.12), (2.0, 512, 0.25), (1.0, 768, 0.6), (4.0, 1024, 0.5)),
}
ACROSS_MS = 10.0  # of round trip, one side of the region to the other
NEW_DEVICE = (6.0, 512, 0.08)  # of no preset: slow, with many CPUs and little memory


@dataclass(frozen=True, slots=True)
class Access:
    """How edges reach the rest, in ms: medians and 95th percentiles of round trips."""

    name: str
    fog_ms: tuple[float, float]
    cloud_ms: tuple[float, float]


# DETERMINISTIC6G's measured paths. Where a pair was not measured, the other column's ratio is used.
ACCESS = (
    Access("mmWave", (11.0, 14.0), (12.0, 27.0)),
    Access("cmWave", (14.4, 17.2), (15.7, 78.4)),
    Access("O-RAN", (29.0, 48.0), (40.0, 90.0)),
)


def draw_nodes(
    rng: np.random.Generator,
    counts: tuple[int, int, int],
    classes: Classes,
    *,
    has_new: bool = False,
) -> tuple[Node, ...]:
    """Draw cloud, fog and edge nodes; with `has_new` every second edge is of a new kind."""
    nodes = []
    for tier, count in zip((Tier.CLOUD, Tier.FOG, Tier.EDGE), counts, strict=True):
        for index in range(count):
            cpus, memory_mib, speed = BASE[tier]
            match classes:
                case Classes.VARIED:
                    speed *= float(rng.uniform(0.35, 1.8))
                    memory_mib = int(memory_mib * float(rng.choice((1.0, 1.5, 2.0))))
                    cpus *= float(rng.choice((1.0, 1.0, 2.0)))
                case Classes.DEVICES:
                    cpus, memory_mib, speed = DEVICES[tier][int(rng.integers(len(DEVICES[tier])))]
                case Classes.UNIFORM:
                    pass
            if has_new and tier is Tier.EDGE and index % 2:
                cpus, memory_mib, speed = NEW_DEVICE
            nodes.append(
                Node(
                    node_id=NodeId(f"{tier.label}-{index + 1}"),
                    tier=tier,
                    capacity=Resources(cpus=cpus, memory_mib=memory_mib),
                    speed=speed,
                    address="simulated",
                )
            )
    return tuple(nodes)


def draw_zones(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Return the nodes with edges and fogs in zones, one zone a fog."""
    fog_count = max(1, sum(node.tier is Tier.FOG for node in nodes))
    zoned = []
    seen = {Tier.CLOUD: 0, Tier.FOG: 0, Tier.EDGE: 0}
    for node in nodes:
        number = seen[node.tier] % fog_count
        seen[node.tier] += 1
        zoned.append(node if node.tier is Tier.CLOUD else replace(node, zone=f"zone-{number + 1}"))
    return tuple(zoned)


def draw_positions(rng: np.random.Generator, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Return the nodes with edges and fogs in a square region of side 1, each in a fog's zone.

    A position is in the labels `x` and `y`. An edge stands for the users around it; its zone is
    that of the nearest fog.
    """
    places = {node.node_id: rng.random(2) for node in nodes if node.tier is not Tier.CLOUD}
    fogs = [node for node in nodes if node.tier is Tier.FOG]
    zones = {fog.node_id: f"zone-{number + 1}" for number, fog in enumerate(fogs)}
    placed = []
    for node in nodes:
        if node.tier is Tier.CLOUD or not fogs:
            placed.append(node)
            continue
        here = places[node.node_id]
        near = min(fogs, key=lambda fog: float(np.hypot(*(here - places[fog.node_id]))))
        labels = (("x", f"{here[0]:.4f}"), ("y", f"{here[1]:.4f}"))
        placed.append(replace(node, zone=zones[near.node_id], labels=labels))
    return tuple(placed)


def distance(one: Node, other: Node) -> float | None:
    """Return how far two nodes are apart, in sides of the region; None if one has no position."""
    if not one.labels or not other.labels:
        return None
    here, there = dict(one.labels), dict(other.labels)
    if "x" not in here or "x" not in there:
        return None
    return float(
        np.hypot(float(here["x"]) - float(there["x"]), float(here["y"]) - float(there["y"]))
    )


def tier_links(cloud_rtt_ms: float, uplink_mbit: float, *, scale: float = 1.0) -> LinkTable:
    """Return symmetric links; uplinks are medians of LTE (31) and 5G (72–77 Mbit/s), SIGCOMM'21.

    Args:
        cloud_rtt_ms: From an edge to the cloud.
        uplink_mbit: Of an edge.
        scale: Times the round trips that are not to the cloud.
    """
    figures = {
        (Tier.EDGE, Tier.EDGE): (12.0 * scale, uplink_mbit, 2.0),
        (Tier.EDGE, Tier.FOG): (8.0 * scale, uplink_mbit, 1.5),
        (Tier.EDGE, Tier.CLOUD): (cloud_rtt_ms, uplink_mbit, 0.2 * cloud_rtt_ms),
        (Tier.FOG, Tier.FOG): (4.0 * scale, 1000.0, 0.5),
        (Tier.FOG, Tier.CLOUD): (0.8 * cloud_rtt_ms, 500.0, 0.1 * cloud_rtt_ms),
        (Tier.CLOUD, Tier.CLOUD): (1.0 * scale, 10_000.0, 0.1),
    }
    by_tier: dict[tuple[Tier, Tier], Link] = {}
    for (source, target), (rtt_ms, mbit, jitter_ms) in figures.items():
        link = Link(rtt_s=rtt_ms / 1e3, bandwidth_bytes_per_s=mbit * MBIT, jitter_s=jitter_ms / 1e3)
        by_tier[source, target] = by_tier[target, source] = link
    return LinkTable(by_tier=by_tier)


def access_links(
    rng: np.random.Generator,
    nodes: tuple[Node, ...],
    access: Access,
    uplink_mbit: float,
    scale: float,
) -> dict[tuple[NodeId, NodeId], Link]:
    """Return links of edges to fogs and clouds by pair: near fogs are nearer.

    The own zone's fog is at the access network's figure, another zone's 2 to 10 ms further. If
    nodes have positions, a fog is further by 10 ms times its distance.
    """
    links: dict[tuple[NodeId, NodeId], Link] = {}
    for edge in nodes:
        if edge.tier is not Tier.EDGE:
            continue
        for other in nodes:
            if other.tier is Tier.EDGE:
                continue
            median, tail = access.cloud_ms if other.tier is Tier.CLOUD else access.fog_ms
            apart = distance(edge, other)
            if apart is not None:
                median, tail = median + ACROSS_MS * apart, tail + ACROSS_MS * apart
            elif other.tier is Tier.FOG and other.zone != edge.zone:
                further = float(rng.uniform(2.0, 10.0))
                median, tail = median + further, tail + further
            link = _link(median * scale, tail * scale, uplink_mbit)
            links[edge.node_id, other.node_id] = links[other.node_id, edge.node_id] = link
    return links


def _link(median_ms: float, tail_ms: float, mbit: float) -> Link:
    """Return a link whose round trip has about that median and 95th percentile.

    Each way adds a uniform draw up to the jitter j: the sum of two has median j and 95 % point
    1.68 j. A tail that would need more jitter than the median holds is cut short.
    """
    jitter_ms = min((tail_ms - median_ms) / 0.68, 0.8 * median_ms)
    return Link(
        rtt_s=(median_ms - jitter_ms) / 1e3,
        bandwidth_bytes_per_s=mbit * MBIT,
        jitter_s=jitter_ms / 1e3,
    )
