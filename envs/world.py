"""Simulated clusters: nodes, links, workload, and what goes wrong. Presets and their shifts."""

from dataclasses import dataclass, field, replace

import numpy as np

from envs.overheads import NO_OVERHEADS, Overheads
from envs.topology import (
    ACCESS,
    Classes,
    access_links,
    draw_nodes,
    draw_positions,
    draw_zones,
    tier_links,
)
from envs.traces import Mix, Trace, make_trace
from tierwise.domain.topology import LinkTable, Node


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
    overheads: Overheads = NO_OVERHEADS


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """How a world departs from its preset: what a policy was not trained for.

    Attributes:
        node_factor: Times as many nodes (and users) of each tier.
        load_factor: Times the load.
        load: The load itself, if not None: mean CPU demand ÷ capacity.
        has_new_device: A class of device that no preset has: very slow, with many CPUs.
        crash_interval_s: Mean time between crashes of nodes, which are down for 2 s; 0 is never.
        heartbeat_interval_s: Between readings, if not None.
        rtt_factor: Times the round trips.
        spike: Share of messages that take 0.5 s longer on average.
    """

    node_factor: int = 1
    load_factor: float = 1.0
    load: float | None = None
    has_new_device: bool = False
    crash_interval_s: float = 0.0
    heartbeat_interval_s: float | None = None
    rtt_factor: float = 1.0
    spike: float = 0.0


NO_SHIFT = Shift()
NAMED = ("small", "campus", "factory", "city", "flash-crowd", "link-cut", "heterogeneous", "azure")
PRESETS = (*NAMED, "random")
PRESET_SHARE = 0.4  # of random worlds that are one of the named ones
LOADS = (0.08, 0.9)  # mean CPU demand ÷ capacity; bursts and crowds are several times that


def make_world(
    preset: str, seed: int, *, request_count: int = 400, shift: Shift = NO_SHIFT
) -> World:
    """Return the world of a preset; the same seed gives the same world.

    `small` is what `tierwise up` starts. `campus` has many light edges around one fog, `factory`
    strong fogs and a slow uplink, `city` 12 edges over 4 fogs by distance, with a daily rhythm
    and chains of functions. In `flash-crowd` a crowd asks one edge for one thing, in `link-cut`
    nodes lose their links for seconds, in `heterogeneous` devices differ tenfold. `azure` has
    functions and arrivals fitted on Azure Functions 2019 (`envs.azure`). `random` is for
    training: mostly it draws everything (domain randomisation), sometimes it is one of the others.

    Raises:
        ValueError: There is no such preset.
        FailedPrecondition: The workload is after Azure, and orcbench is not installed.
    """
    topology, workload = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2)
    )
    if preset == "random" and topology.random() < PRESET_SHARE:
        preset = NAMED[int(topology.integers(len(NAMED)))]
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; known: {', '.join(PRESETS)}")
    drawn_load = float(topology.uniform(*LOADS))
    load = (drawn_load if shift.load is None else shift.load) * shift.load_factor
    mix = Mix(
        load=load,
        burstiness=float(topology.choice((1.0, 2.0, 4.0))),
        request_count=request_count,
        function_count=FUNCTIONS.get(preset) or int(topology.integers(3, 14)),
    )
    counts, cloud_rtt_ms, uplink_mbit = SHAPES.get(preset) or (
        (
            int(topology.integers(1, 3)),
            int(topology.integers(1, 4)),
            int(topology.integers(1, 8)),
        ),
        float(topology.uniform(10.0, 120.0)),
        float(topology.choice((31.0, 72.0, 77.0, 200.0))),
    )
    heartbeat_s = 0.5
    classes = Classes.VARIED if preset == "random" else Classes.UNIFORM
    faults = Faults()
    is_zoned = preset == "city" or (preset == "random" and topology.random() < 0.3)
    match preset:
        case "city":
            mix = replace(mix, pattern="diurnal", chain_share=0.2)
        case "flash-crowd":
            mix = replace(mix, pattern="flash")
        case "link-cut":
            faults = Faults(partition_interval_s=6.0, partition_s=3.0, until_s=600.0)
        case "heterogeneous":
            classes = Classes.DEVICES
        case "azure":
            mix = replace(mix, pattern="azure")
        case "random":
            heartbeat_s = float(topology.choice((0.25, 0.5, 1.0, 2.0)))
            mix = replace(
                mix,
                pattern=str(topology.choice(("bursty", "bursty", "diurnal", "flash", "azure"))),
                chain_share=float(topology.choice((0.0, 0.0, 0.2))),
                join_share=0.3,
                time_scale=float(topology.choice((1.0, 1.0, 0.5, 0.2))),
                round_count=int(topology.choice((0, 0, 0, 2))),
            )
            classes = Classes.DEVICES if topology.random() < 0.25 else classes
        case _:
            pass
    cloud, fog, edge = (count * shift.node_factor for count in counts)
    nodes = draw_nodes(topology, (cloud, fog, edge), classes, has_new=shift.has_new_device)
    links = tier_links(cloud_rtt_ms * shift.rtt_factor, uplink_mbit, scale=shift.rtt_factor)
    if is_zoned:
        nodes = draw_positions(topology, nodes) if preset == "random" else draw_zones(nodes)
        access = ACCESS[int(topology.integers(len(ACCESS)))]
        links = replace(
            links, by_pair=access_links(topology, nodes, access, uplink_mbit, shift.rtt_factor)
        )
    if shift.crash_interval_s:
        faults = replace(faults, crash_interval_s=shift.crash_interval_s, down_s=2.0, until_s=600.0)
    if shift.spike:
        faults = replace(faults, delay=shift.spike, delay_s=0.5, until_s=600.0)
    return World(
        nodes=nodes,
        links=links,
        trace=make_trace(workload, list(nodes), mix),
        heartbeat_interval_s=shift.heartbeat_interval_s or heartbeat_s,
        faults=faults,
    )


# preset → ((cloud, fog, edge), round trip to the cloud in ms, uplink of the edges in Mbit/s)
SHAPES = {
    "small": ((1, 1, 2), 50.0, 70.0),
    "campus": ((1, 1, 6), 35.0, 72.0),
    "factory": ((1, 3, 4), 60.0, 31.0),
    "city": ((2, 4, 12), 45.0, 77.0),
    "flash-crowd": ((1, 2, 5), 45.0, 72.0),
    "link-cut": ((1, 2, 4), 50.0, 72.0),
    "heterogeneous": ((1, 2, 6), 50.0, 72.0),
    "azure": ((1, 2, 5), 45.0, 72.0),
}
FUNCTIONS = {
    "small": 5,
    "campus": 10,
    "factory": 8,
    "city": 12,
    "flash-crowd": 8,
    "link-cut": 8,
    "heterogeneous": 10,
    "azure": 10,
}


def with_faults(world: World, faults: Faults) -> World:
    """Return the same world with faults."""
    return replace(world, faults=faults)
