"""Simulated workloads: functions, and the requests that users at the edges make of them."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from envs.arrivals import Times, bursty, diurnal, flash
from tierwise.domain.function import FunctionProfile, FunctionSpec, Priority
from tierwise.domain.ids import FunctionId, NodeId
from tierwise.domain.topology import Node, Tier

MEMORY_STEPS_MIB = (64, 96, 128, 192, 256)
APPLICATION_SHARE = (0.25, 0.5, 0.2, 0.05)  # of functions, by priority from LOW to CRITICAL
USER_SHARE = (0.1, 0.7, 0.15, 0.05)  # of requests, by the priority of who makes them
PATTERNS = ("bursty", "diurnal", "flash", "azure")
CROWD_SHARE = 0.7  # of a flash crowd's requests that are for the same thing at the same place


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
    """One request of a user. If it belongs to a stage, the stage ends with the last of its own."""

    at_s: float
    origin: NodeId
    function: FunctionId
    request_bytes: int
    priority: Priority
    is_durable: bool = False
    item_count: int = 1
    data_node: NodeId | None = None
    data_bytes: int = 0
    stage: int = 0  # 0: none
    is_pinned: bool = False  # to its data: a federated client
    run_s: float = 0.0  # at speed 1.0, all items together; 0: drawn
    deadline_s: float = 0.0  # 0: the function's, for each item


@dataclass(frozen=True, slots=True)
class Stage:
    """A barrier: when `size` requests of this stage have ended, `then` arrive at once.

    A chain of functions is a row of stages of size 1; a federated round is a stage of clients
    followed by one of the aggregator.
    """

    size: int
    then: tuple[Arrival, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A workload: arrivals in order of time, and what follows from them."""

    behaviours: dict[FunctionId, Behaviour]
    arrivals: tuple[Arrival, ...]
    stages: dict[int, Stage] = field(default_factory=dict)

    @property
    def request_count(self) -> int:
        """Return how many requests there will be, those of later stages included."""
        return len(self.arrivals) + sum(len(stage.then) for stage in self.stages.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What kind of workload to draw.

    Attributes:
        load: Mean CPU seconds asked per CPU second there is, both at speed 1.0.
        function_count: How many functions.
        request_count: How many requests, in all.
        pattern: One of PATTERNS. "azure" brings its own functions (see `envs.azure`).
        burstiness: ≥ 1, of the pattern "bursty".
        durable_share: Share of requests that go to the durable queue.
        chain_share: Share of requests that are followed by others.
        join_share: Share of those whose followers fan out and join again (a diamond); the others
            are chains of one or two steps, the last perhaps twice side by side.
        time_scale: Of the run times; the shorter they are, the more often functions are called.
        round_count: Federated rounds of one job, spread over the trace.
    """

    load: float
    function_count: int
    request_count: int
    pattern: str = "bursty"
    burstiness: float = 1.0
    durable_share: float = 0.0
    chain_share: float = 0.0
    join_share: float = 0.0
    time_scale: float = 1.0
    round_count: int = 0


def make_functions(
    rng: np.random.Generator, count: int, time_scale: float = 1.0
) -> list[Behaviour]:
    """Draw functions.

    Run times are lognormal with a median of 100 ms × `time_scale` and cold starts with a median of
    0.25 s: within what AWS Lambda shows for scripted languages and Java (95–260 ms, lambda-perf
    2026-06).
    Popularity is Zipf with exponent 1.
    """
    behaviours = []
    for index in range(count):
        run_s = time_scale * float(np.clip(rng.lognormal(np.log(0.1), 0.8), 0.01, 1.0))
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
            priority=Priority(1 + int(rng.choice(4, p=APPLICATION_SHARE))),
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
    mix: Mix,
    behaviours: list[Behaviour] | None = None,
) -> Trace:
    """Draw a workload whose users are at the cluster's edges (at all nodes if there are none).

    Args:
        rng: Source of everything random here.
        nodes: The cluster.
        mix: What kind.
        behaviours: The functions; drawn if there are none. Those of "azure" are always drawn.

    Raises:
        FailedPrecondition: The pattern is "azure", and orcbench is not installed.
    """
    capacity = sum(node.capacity.cpus * node.speed for node in nodes)
    count = mix.request_count
    times: Times = np.zeros(0)
    called: NDArray[np.int64] | None = None  # the function of each call, where the pattern says it
    if mix.pattern == "azure":
        from envs import azure  # it needs an extra, and what stands above

        behaviours, times, called = azure.draw_workload(
            rng, mix.function_count, count, mix.load * capacity
        )
    elif behaviours is None:
        behaviours = make_functions(rng, mix.function_count, mix.time_scale)
    weights = np.array([b.popularity for b in behaviours])
    weights /= weights.sum()
    mean_run_s = float(sum(w * b.profile.run_s for w, b in zip(weights, behaviours, strict=True)))
    rate = mix.load * capacity / mean_run_s
    origins = [node.node_id for node in nodes if node.tier is Tier.EDGE] or [
        node.node_id for node in nodes
    ]
    in_crowd = np.zeros(count, dtype=np.bool_)
    match mix.pattern:
        case "bursty":
            times = bursty(rng, rate, count, mix.burstiness)
        case "diurnal":
            times = diurnal(rng, rate, count)
        case "flash":
            times, in_crowd = flash(rng, rate, count)
            in_crowd &= rng.random(count) < CROWD_SHARE
        case "azure":
            pass  # drawn above, with its functions
        case _:
            raise ValueError(f"there is no pattern {mix.pattern!r}; known: {', '.join(PATTERNS)}")
    # Each edge has its own taste: the same functions in another order of popularity.
    tastes = [rng.permutation(weights) * 0.5 + weights * 0.5 for _ in origins]
    shares = rng.dirichlet(np.full(len(origins), 3.0))
    places = rng.choice(len(origins), size=count, p=shares)
    if called is not None:
        places = _at_home(rng, called, shares, tastes)
    users = 1 + rng.choice(4, size=count, p=USER_SHARE)
    crowd_place = int(rng.integers(len(origins)))
    crowd_function = int(rng.integers(len(behaviours)))
    stages: dict[int, Stage] = {}
    arrivals: list[Arrival] = []
    for index, (at_s, place, user, is_crowd) in enumerate(
        zip(times, places, users, in_crowd, strict=True)
    ):
        drawn = int(rng.choice(len(behaviours), p=tastes[place]))
        if called is not None:
            drawn = int(called[index])
        behaviour = behaviours[crowd_function if is_crowd else drawn]
        size = behaviour.request_bytes * float(rng.lognormal(0.0, 0.3))
        items, data_node, data_bytes = _shape(rng, nodes)
        stage = 0
        if rng.random() < mix.chain_share:
            is_joined = mix.join_share > 0.0 and rng.random() < mix.join_share
            follow = _diamond if is_joined else _chain
            stage = follow(rng, stages, behaviours, origins[place], int(user))
        arrivals.append(
            Arrival(
                float(at_s),
                origins[crowd_place if is_crowd else place],
                behaviour.spec.function_id,
                int(size) * items,
                _priority(behaviour, int(user)),
                bool(rng.random() < mix.durable_share),
                items,
                data_node,
                data_bytes,
                stage,
            )
        )
    if mix.round_count:
        arrivals += _rounds(rng, stages, behaviours, origins, float(times[-1]), mix.round_count)
        arrivals.sort(key=lambda arrival: arrival.at_s)
    return Trace(
        behaviours={b.spec.function_id: b for b in behaviours},
        arrivals=tuple(arrivals),
        stages=stages,
    )


def _at_home(
    rng: np.random.Generator,
    called: NDArray[np.int64],
    shares: NDArray[np.float64],
    tastes: list[NDArray[np.float64]],
) -> NDArray[np.int64]:
    """Draw the edge of each call, by the edges' shares and their taste for its function."""
    by_function = shares[:, None] * np.array(tastes)
    by_function /= by_function.sum(axis=0)
    places = [rng.choice(len(shares), p=by_function[:, function]) for function in called]
    return np.array(places, dtype=np.int64)


def _priority(behaviour: Behaviour, user: int) -> Priority:
    """Return the priority of a request: between its application's and its user's, rounded up."""
    return Priority((int(behaviour.spec.priority) + user + 1) // 2)


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


def _chain(
    rng: np.random.Generator,
    stages: dict[int, Stage],
    behaviours: list[Behaviour],
    origin: NodeId,
    user: int,
) -> int:
    """Add one or two functions that follow a request, the last perhaps twice side by side.

    Returns:
        The stage that the request must carry.
    """
    number = 0
    for depth in range(int(rng.integers(1, 3))):
        width = 2 if depth == 0 and rng.random() < 0.3 else 1
        then = _followers(rng, behaviours, origin, user, width, number)
        number = len(stages) + 1
        stages[number] = Stage(1, then)
    return number


def _diamond(
    rng: np.random.Generator,
    stages: dict[int, Stage],
    behaviours: list[Behaviour],
    origin: NodeId,
    user: int,
) -> int:
    """Add two or three functions side by side that follow a request, and one that joins them.

    Returns:
        The stage that the request must carry.
    """
    width = int(rng.integers(2, 4))
    join = len(stages) + 1
    stages[join] = Stage(width, _followers(rng, behaviours, origin, user, 1, 0))
    stages[join + 1] = Stage(1, _followers(rng, behaviours, origin, user, width, join))
    return join + 1


def _followers(
    rng: np.random.Generator,
    behaviours: list[Behaviour],
    origin: NodeId,
    user: int,
    width: int,
    stage: int,
) -> tuple[Arrival, ...]:
    """Return so many requests of drawn functions that carry `stage`."""
    picks = [behaviours[int(rng.integers(len(behaviours)))] for _ in range(width)]
    return tuple(
        Arrival(
            0.0,
            origin,
            behaviour.spec.function_id,
            behaviour.request_bytes,
            _priority(behaviour, user),
            stage=stage,
        )
        for behaviour in picks
    )


def _rounds(
    rng: np.random.Generator,
    stages: dict[int, Stage],
    behaviours: list[Behaviour],
    origins: list[NodeId],
    length_s: float,
    round_count: int,
) -> list[Arrival]:
    """Return the first requests of federated rounds: clients pinned to their data, then a barrier.

    The slowest function stands for a client's training, another for the aggregation.
    """
    slowest = max(behaviours, key=lambda b: b.profile.run_s)
    aggregate = behaviours[int(rng.integers(len(behaviours)))]
    first = []
    for index in range(round_count):
        number = len(stages) + 1
        after = Arrival(
            0.0,
            origins[0],
            aggregate.spec.function_id,
            len(origins) * 200_000,
            Priority.NORMAL,
        )
        stages[number] = Stage(len(origins), (after,))
        first += [
            Arrival(
                length_s * (index + 0.5) / round_count,
                origin,
                slowest.spec.function_id,
                200_000,
                Priority.LOW,
                data_node=origin,
                data_bytes=5_000_000,
                stage=number,
                is_pinned=True,
            )
            for origin in origins
        ]
    return first
