"""Simulated workloads: functions, and the requests that users at the edges make of them."""

from dataclasses import dataclass

import numpy as np

from tierwise.domain.function import FunctionProfile, FunctionSpec, Priority
from tierwise.domain.ids import FunctionId, NodeId
from tierwise.domain.topology import Node, Tier

MEMORY_STEPS_MIB = (64, 96, 128, 192, 256)
PRIORITY_SHARE = (0.25, 0.5, 0.2, 0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How a function really behaves in the simulated world; policies see learnt profiles only."""

    spec: FunctionSpec
    profile: FunctionProfile  # true means, at speed 1.0
    request_bytes: int
    run_sigma: float  # of the lognormal noise of one run
    popularity: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a user."""

    at_s: float
    origin: NodeId
    function: FunctionId
    request_bytes: int
    priority: Priority
    is_durable: bool = False
    item_count: int = 1
    data_node: NodeId | None = None
    data_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A workload: arrivals in order of time."""

    behaviours: dict[FunctionId, Behaviour]
    arrivals: tuple[Arrival, ...]


def make_functions(rng: np.random.Generator, count: int) -> list[Behaviour]:
    """Draw functions.

    Run times are lognormal with a median of 100 ms and cold starts with a median of 0.25 s: within
    what AWS Lambda shows for scripted languages and Java (95–260 ms, lambda-perf 2026-06).
    Popularity is Zipf with exponent 1.
    """
    behaviours = []
    for index in range(count):
        run_s = float(np.clip(rng.lognormal(np.log(0.1), 0.8), 0.01, 1.0))
        cold_s = float(np.clip(rng.lognormal(np.log(0.25), 0.5), 0.08, 1.5))
        request_bytes = int(np.clip(rng.lognormal(np.log(20_000), 1.5), 200, 2_000_000))
        deadline_s = 0.1 + run_s * float(rng.uniform(2.0, 6.0))
        spec = FunctionSpec(
            namespace="sim",
            name=f"f{index}",
            version=1,
            code_digest="simulated",
            memory_mib=int(rng.choice(MEMORY_STEPS_MIB)),
            deadline_s=deadline_s,
            timeout_s=20.0,
            priority=Priority(1 + int(rng.choice(4, p=PRIORITY_SHARE))),
            keep_alive_s=float(rng.choice((30.0, 120.0, 600.0))),
        )
        profile = FunctionProfile(
            run_s=run_s,
            cold_start_s=cold_s,
            response_bytes=int(np.clip(rng.lognormal(np.log(2_000), 1.0), 100, 200_000)),
        )
        behaviours.append(
            Behaviour(
                spec=spec,
                profile=profile,
                request_bytes=request_bytes,
                run_sigma=float(rng.uniform(0.05, 0.4)),
                popularity=1.0 / (index + 1),
            )
        )
    return behaviours


def make_trace(
    rng: np.random.Generator,
    nodes: list[Node],
    *,
    load: float,
    function_count: int,
    request_count: int,
    burstiness: float,
    durable_share: float = 0.0,
) -> Trace:
    """Draw a workload whose mean CPU demand is `load` times the cluster's capacity.

    Arrivals at each edge are a Markov-modulated Poisson process: with `burstiness` b > 1 the rate
    is b times the mean in bursts that take a share of 1/(2b) of the time, and lower otherwise;
    b = 1 is plain Poisson.

    Args:
        rng: Source of everything random here.
        nodes: The cluster; users are at its edges (at all nodes if there are none).
        load: Mean CPU seconds asked per CPU second there is, both at speed 1.0.
        function_count: How many functions.
        request_count: How many requests, in all.
        burstiness: ≥ 1.
        durable_share: Share of requests that go to the durable queue.
    """
    behaviours = make_functions(rng, function_count)
    weights = np.array([b.popularity for b in behaviours])
    weights /= weights.sum()
    mean_run_s = float(sum(w * b.profile.run_s for w, b in zip(weights, behaviours, strict=True)))
    capacity = sum(node.capacity.cpus * node.speed for node in nodes)
    rate = load * capacity / mean_run_s
    origins = [node.node_id for node in nodes if node.tier is Tier.EDGE] or [
        node.node_id for node in nodes
    ]
    times = _bursty_times(rng, rate, request_count, burstiness)
    # Each edge has its own taste: the same functions in another order of popularity.
    tastes = [rng.permutation(weights) * 0.5 + weights * 0.5 for _ in origins]
    shares = rng.dirichlet(np.full(len(origins), 3.0))
    places = rng.choice(len(origins), size=request_count, p=shares)
    arrivals = []
    for at_s, place in zip(times, places, strict=True):
        behaviour = behaviours[int(rng.choice(len(behaviours), p=tastes[place]))]
        size = behaviour.request_bytes * float(rng.lognormal(0.0, 0.3))
        items, data_node, data_bytes = _shape(rng, nodes)
        arrivals.append(
            Arrival(
                float(at_s),
                origins[place],
                behaviour.spec.function_id,
                int(size) * items,
                behaviour.spec.priority,
                bool(rng.random() < durable_share),
                items,
                data_node,
                data_bytes,
            )
        )
    return Trace(behaviours={b.spec.function_id: b for b in behaviours}, arrivals=tuple(arrivals))


def _shape(rng: np.random.Generator, nodes: list[Node]) -> tuple[int, NodeId | None, int]:
    """Draw how many items a request has, and where the data is that it reads.

    Most are single calls without data; 3 % are `.map` chunks of up to 16 items and 5 % read up to
    20 MB that lie on one node.
    """
    draw = float(rng.random())
    if draw < 0.03:
        return int(rng.integers(2, 17)), None, 0
    if draw < 0.08:
        where = nodes[int(rng.integers(len(nodes)))].node_id
        return 1, where, int(rng.lognormal(np.log(1e6), 1.0)) % 20_000_000
    return 1, None, 0


def _bursty_times(
    rng: np.random.Generator, rate: float, count: int, burstiness: float
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if burstiness <= 1.0:
        return np.cumsum(rng.exponential(1.0 / rate, size=count))
    share = 1.0 / (2.0 * burstiness)
    slow = (1.0 - share * burstiness) / (1.0 - share)
    burst_s = 2.0
    times: list[float] = []
    now_s = 0.0
    is_burst = False
    while len(times) < count:
        mean_s = burst_s if is_burst else burst_s * (1.0 - share) / share
        end_s = now_s + float(rng.exponential(mean_s))
        here = rate * (burstiness if is_burst else slow)
        arrivals = now_s + np.cumsum(rng.exponential(1.0 / here, size=int(here * mean_s * 4) + 8))
        times.extend(arrivals[arrivals < end_s].tolist())
        now_s = end_s
        is_burst = not is_burst
    return np.array(times[:count])
