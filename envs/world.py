"""Simulated clusters: nodes, links, and what goes wrong."""

from dataclasses import dataclass, field, replace

import numpy as np

from envs.traces import Trace, make_trace
from tierwise.domain.ids import NodeId
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Link, LinkTable, Node, Tier

MBIT = 125_000.0  # bytes per second


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong, all drawn from the stream `faults`.

    Probabilities are per message between nodes. Until `until_s` nodes crash and links are cut at
    the given mean intervals; after that everything works again.
    """

    drop: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.0
    delay_s: float = 2.0
    crash_interval_s: float = 0.0
    down_s: float = 1.0
    partition_interval_s: float = 0.0
    partition_s: float = 3.0
    until_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Everything that is fixed before a simulation starts."""

    nodes: tuple[Node, ...]
    links: LinkTable
    trace: Trace
    heartbeat_interval_s: float = 0.5
    faults: Faults = field(default_factory=Faults)


NAMED = ("small", "campus", "factory")
PRESETS = (*NAMED, "random")
PRESET_SHARE = 0.4  # of random worlds that are one of the named ones


def make_world(preset: str, seed: int, *, request_count: int = 400) -> World:
    """Return the world of a preset; the same seed gives the same world.

    `small` is what `tierwise up` starts; `campus` has many light edges around one fog, `factory`
    strong fogs and a slow uplink; `random` is for training: mostly it draws everything (domain
    randomisation), sometimes it is one of the others.

    Raises:
        ValueError: There is no such preset.
    """
    topology, workload = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2)
    )
    if preset == "random" and topology.random() < PRESET_SHARE:
        preset = NAMED[int(topology.integers(len(NAMED)))]
    load = float(topology.uniform(0.08, 0.5))
    burst = float(topology.choice((1.0, 2.0, 4.0)))
    heartbeat_s = 0.5
    match preset:
        case "small":
            counts, cloud_rtt_ms, uplink_mbit, functions = (1, 1, 2), 50.0, 70.0, 5
        case "campus":
            counts, cloud_rtt_ms, uplink_mbit, functions = (1, 1, 6), 35.0, 72.0, 10
        case "factory":
            counts, cloud_rtt_ms, uplink_mbit, functions = (1, 3, 4), 60.0, 31.0, 8
        case "random":
            counts = (
                int(topology.integers(1, 3)),
                int(topology.integers(1, 4)),
                int(topology.integers(1, 8)),
            )
            cloud_rtt_ms = float(topology.uniform(10.0, 120.0))
            uplink_mbit = float(topology.choice((31.0, 72.0, 77.0, 200.0)))
            functions = int(topology.integers(3, 14))
            heartbeat_s = float(topology.choice((0.25, 0.5, 1.0, 2.0)))
        case _:
            raise ValueError(f"there is no preset {preset!r}; known: {', '.join(PRESETS)}")
    nodes = _nodes(topology, counts, is_varied=preset == "random")
    trace = make_trace(
        workload,
        list(nodes),
        load=load,
        function_count=functions,
        request_count=request_count,
        burstiness=burst,
    )
    return World(
        nodes=nodes,
        links=_links(cloud_rtt_ms, uplink_mbit),
        trace=trace,
        heartbeat_interval_s=heartbeat_s,
    )


def with_faults(world: World, faults: Faults) -> World:
    """Return the same world with faults."""
    return replace(world, faults=faults)


def _nodes(
    rng: np.random.Generator, counts: tuple[int, int, int], *, is_varied: bool
) -> tuple[Node, ...]:
    """Draw nodes; speeds are relative to a cloud CPU. Memory is scarce: not all stays warm."""
    base = {
        Tier.CLOUD: (4.0, 2048, 1.0),
        Tier.FOG: (2.0, 1024, 0.7),
        Tier.EDGE: (1.0, 512, 0.4),
    }
    nodes = []
    for tier, count in zip((Tier.CLOUD, Tier.FOG, Tier.EDGE), counts, strict=True):
        cpus, memory_mib, speed = base[tier]
        for index in range(count):
            if is_varied:
                speed = base[tier][2] * float(rng.uniform(0.35, 1.8))
                memory_mib = int(base[tier][1] * float(rng.choice((1.0, 1.5, 2.0))))
                cpus = base[tier][0] * float(rng.choice((1.0, 1.0, 2.0)))
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


def _links(cloud_rtt_ms: float, uplink_mbit: float) -> LinkTable:
    """Return symmetric links; uplinks are medians of LTE (31) and 5G (72–77 Mbit/s), SIGCOMM'21."""
    figures = {
        (Tier.EDGE, Tier.EDGE): (12.0, uplink_mbit, 2.0),
        (Tier.EDGE, Tier.FOG): (8.0, uplink_mbit, 1.5),
        (Tier.EDGE, Tier.CLOUD): (cloud_rtt_ms, uplink_mbit, 0.2 * cloud_rtt_ms),
        (Tier.FOG, Tier.FOG): (4.0, 1000.0, 0.5),
        (Tier.FOG, Tier.CLOUD): (0.8 * cloud_rtt_ms, 500.0, 0.1 * cloud_rtt_ms),
        (Tier.CLOUD, Tier.CLOUD): (1.0, 10_000.0, 0.1),
    }
    by_tier: dict[tuple[Tier, Tier], Link] = {}
    for (source, target), (rtt_ms, mbit, jitter_ms) in figures.items():
        link = Link(rtt_s=rtt_ms / 1e3, bandwidth_bytes_per_s=mbit * MBIT, jitter_s=jitter_ms / 1e3)
        by_tier[source, target] = by_tier[target, source] = link
    return LinkTable(by_tier=by_tier)
