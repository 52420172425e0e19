"""The live half of bench_sim2real: a seeded trace, sent to a local cluster of real processes.

Functions are real calls with a controlled weight: the argument says how many seconds this call
takes at speed 1.0, of which a tenth burns CPU and the rest sleeps, so that four emulated machines
fit on two real cores. Agents of slow tiers hold results back, as `tierwise up` has them do.
"""

import asyncio
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import psutil

import tierwise
from envs.schedule import Schedule
from envs.simulator import service_stream
from envs.traces import Arrival, Behaviour, Trace
from envs.world import World
from tierwise.clock import monotonic_s, pause
from tierwise.config import link_table
from tierwise.domain.function import FunctionProfile, FunctionSpec, Priority
from tierwise.domain.ids import FunctionId, NodeId, RequestId
from tierwise.domain.outcome import Outcome
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Node
from tierwise.errors import TierwiseError
from tierwise.sdk.connection import Options
from tierwise.sdk.local import CPUS, LINKS, MEMORY_MIB, SPEED, parse_nodes
from tierwise.sdk.mapping import encode
from tierwise.sdk.operator import Operator
from tierwise.wire import convert

NODES = "1c,1f,2e"
EDGES = (NodeId("edge-1"), NodeId("edge-2"))
BUSY_SHARE = 0.1  # of a call's time that burns CPU
BURST = (0.35, 0.5)  # shares of the trace's length in which edge-1 has a crowd
BURST_FACTOR = 2.5
TIMEOUT_S = 30.0
PRIMED = (NodeId("cloud-1"), NodeId("fog-1"))  # where each function is called once beforehand
PRIME_GAP_S = 0.12
PRIME_REST_S = 1.3  # until every node has heard of these calls: heartbeat, storing, view
WARM_UP_TRIES = 3
SETTLE_S = 1.0  # heartbeats are every 0.5 s: catalogue and readings are everywhere by then


@dataclass(frozen=True, slots=True)
class Kind:
    """One function of the workload, at speed 1.0."""

    name: str
    run_s: float  # median
    sigma: float
    request_bytes: int
    response_bytes: int
    memory_mib: int
    deadline_s: float
    share: float


KINDS = (
    Kind("filter", 0.005, 0.2, 2_000, 500, 64, 0.15, 0.34),
    Kind("score", 0.009, 0.3, 5_000, 500, 128, 0.2, 0.26),
    Kind("resize", 0.014, 0.3, 120_000, 30_000, 128, 0.3, 0.2),
    Kind("detect", 0.034, 0.25, 250_000, 2_000, 256, 0.6, 0.12),
    Kind("train", 0.067, 0.35, 20_000, 60_000, 256, 1.0, 0.08),
)


def replay_world(seed: int, *, duration_s: float, rate: float, is_primed: bool = True) -> World:
    """Return the cluster that `tierwise up` starts, with a trace of Poisson arrivals and a burst.

    Args:
        seed: Of the arrivals.
        duration_s: Length of the trace.
        rate: Calls per second on average, over both edges.
        is_primed: Whether pinned calls come before, one per function and upper tier, so that the
            platform knows the functions; `is_counted` tells them from the rest.
    """
    rng = np.random.default_rng(seed)
    behaviours = [_behaviour(kind) for kind in KINDS]
    shares = [kind.share for kind in KINDS]
    width = BURST[1] - BURST[0]
    calm = rate / (1.0 - width + width * BURST_FACTOR)
    arrivals = _priming(behaviours) if is_primed else []
    first_s = arrivals[-1].at_s + PRIME_REST_S if arrivals else 0.2
    now_s = 0.0
    while True:
        is_burst = BURST[0] < now_s / duration_s < BURST[1]
        now_s += float(rng.exponential(1.0 / (calm * (BURST_FACTOR if is_burst else 1.0))))
        if now_s > duration_s:
            break
        edge = EDGES[0] if rng.random() < (0.75 if is_burst else 0.5) else EDGES[1]
        behaviour = behaviours[int(rng.choice(len(KINDS), p=shares))]
        size = int(behaviour.request_bytes * rng.lognormal(0.0, 0.3))
        function = behaviour.spec.function_id
        arrivals.append(Arrival(first_s + now_s, edge, function, size, Priority.NORMAL))
    nodes = tuple(
        Node(
            node_id=NodeId(plan.name),
            tier=plan.tier,
            capacity=Resources(cpus=CPUS[plan.tier], memory_mib=MEMORY_MIB[plan.tier]),
            speed=SPEED[plan.tier],
        )
        for plan in parse_nodes(NODES)
    )
    trace = Trace(behaviours={b.spec.function_id: b for b in behaviours}, arrivals=tuple(arrivals))
    return World(nodes=nodes, links=link_table(LINKS), trace=trace, heartbeat_interval_s=0.5)


def is_counted(arrival: Arrival) -> bool:
    """Return whether a call is part of what is compared, and not of the priming."""
    return not arrival.is_pinned


def _priming(behaviours: list[Behaviour]) -> list[Arrival]:
    pairs = [(behaviour, node_id) for node_id in PRIMED for behaviour in behaviours]
    return [
        Arrival(
            0.2 + PRIME_GAP_S * index,
            EDGES[index % 2],
            behaviour.spec.function_id,
            behaviour.request_bytes,
            Priority.NORMAL,
            data_node=node_id,
            is_pinned=True,
        )
        for index, (behaviour, node_id) in enumerate(pairs)
    ]


def _behaviour(kind: Kind) -> Behaviour:
    spec = FunctionSpec(
        namespace="replay",
        name=kind.name,
        version=1,
        code_digest="",
        memory_mib=kind.memory_mib,
        deadline_s=kind.deadline_s,
        timeout_s=TIMEOUT_S,
    )
    profile = FunctionProfile(run_s=kind.run_s, response_bytes=kind.response_bytes)
    return Behaviour(
        spec=spec,
        profile=profile,
        request_bytes=kind.request_bytes,
        run_sigma=kind.sigma,
        popularity=kind.share,
    )


def work(run_s: float, busy_s: float, response_bytes: int, payload: bytes) -> bytes:
    """Burn `busy_s` of CPU, sleep for the rest of `run_s`, and return so many bytes."""
    import time

    ends_s = time.thread_time() + busy_s
    while time.thread_time() < ends_s:
        pass
    time.sleep(max(0.0, run_s - busy_s))
    return bytes(response_bytes)


@dataclass(frozen=True, slots=True)
class Shot:
    """One call of the trace, ready to be sent."""

    request_id: RequestId  # its name in the simulator
    at_s: float
    edge: NodeId
    function: str
    blob: bytes
    options: Options


@dataclass(slots=True)
class LiveRun:
    """What one live run showed.

    Attributes:
        outcomes: What the platform told of each call, named as in the simulator.
        client_s: What the client waited for each, by the same names.
        late_s: How late each call was sent.
        error_count: Calls that ended in an error of the transport, without an outcome.
        foreign_share: Share of the machine's CPU time that went to neither cluster nor client.
        own_share: Share that went to them.
    """

    outcomes: dict[RequestId, Outcome]
    client_s: dict[RequestId, float]
    late_s: list[float]
    error_count: int = 0
    foreign_share: float = 0.0
    own_share: float = 0.0


class LiveCluster:
    """A running local cluster that replays traces, each as if it was the first."""

    def __init__(self, cluster: tierwise.LocalCluster) -> None:
        self._cluster = cluster
        self._admin = tierwise.connect(cluster.context)
        self._operator = Operator(self._admin)
        self._run_count = 0

    def close(self) -> None:
        """Close the connections."""
        self._admin.close()

    def warm_up(self) -> None:
        """Start zygotes, fetch the code and open every stream: one pinned call per pair of nodes.

        Functions themselves stay cold: each run has functions of its own, with the same code.
        """
        names = self._deploy("warm-up")
        pinned = [
            (edge, Options(node=plan.name)) for edge in EDGES for plan in self._cluster.plan
        ] * 2
        blob = encode((0.001, 0.0, 10, b""), {})

        async def call() -> None:
            clients = self._clients()
            for edge, options in pinned:
                connection = clients[edge].connection()
                await connection.invoke(names[KINDS[0].name], [blob], options, TIMEOUT_S)
            await _close(clients)

        pause(SETTLE_S)
        for left in reversed(range(WARM_UP_TRIES)):
            try:
                asyncio.run(call())
                break
            except tierwise.TierwiseError:
                if not left:
                    raise
                pause(SETTLE_S)  # a crowded machine: a first connection may come too late
        self._delete("warm-up")

    def replay(self, world: World, seed: int, policy: str) -> LiveRun:
        """Send a world's trace to the cluster under a policy.

        Functions are deployed anew, so that nothing is warm and no profile is known, and deleted
        afterwards, which stops their instances.

        Args:
            world: Whose trace is sent.
            seed: Of the simulation: run times are drawn from its stream of service times.
            policy: Is promoted before.
        """
        self._run_count += 1
        namespace = f"replay-{self._run_count}"
        self._operator.promote(policy)
        names = self._deploy(namespace)
        pause(SETTLE_S)
        shots = _shots(world, seed, names)
        run = LiveRun({}, {}, [])
        with _cpu_shares(run):
            asyncio.run(self._send(shots, run))
        self._delete(namespace)
        for name, outcome in run.outcomes.items():
            _, _, function = outcome.function_id.partition("/")
            run.outcomes[name] = replace(
                outcome, request_id=name, function_id=_as_simulated(function)
            )
        return run

    async def _send(self, shots: list[Shot], run: LiveRun) -> None:
        """Send every call at its time, whether or not earlier ones have ended."""
        loop = asyncio.get_running_loop()
        clients = self._clients()
        for edge in EDGES:  # the stream is open before the first call
            await clients[edge].connection().agents()
        start_s = loop.time() + 0.2

        async def shoot(shot: Shot) -> None:
            await asyncio.sleep(max(0.0, start_s + shot.at_s - loop.time()))
            sent_s = loop.time()
            run.late_s.append(sent_s - start_s - shot.at_s)
            connection = clients[shot.edge].connection()
            try:
                result = await connection.invoke(
                    shot.function, [shot.blob], shot.options, TIMEOUT_S + 30.0
                )
                run.outcomes[shot.request_id] = convert.outcome_from_pb(result.outcome)
            except TierwiseError as error:
                run.error_count += 1
                print(f"a call failed: {error}", file=sys.stderr)
            else:
                run.client_s[shot.request_id] = loop.time() - sent_s

        await asyncio.gather(*(shoot(shot) for shot in shots))
        await _close(clients)

    def _clients(self) -> dict[NodeId, tierwise.Client]:
        return {edge: tierwise.Client(self._cluster.context, entry=edge) for edge in EDGES}

    def _deploy(self, namespace: str) -> dict[str, str]:
        """Deploy every function under a namespace of its own; return ids by name."""
        app = tierwise.App("replay", namespace=namespace, client=self._admin)
        for kind in KINDS:
            app.function(
                work,
                name=kind.name,
                memory=f"{kind.memory_mib}MiB",
                deadline=kind.deadline_s,
                timeout=TIMEOUT_S,
            )
        return {spec.name: str(spec.function_id) for spec in app.deploy()}

    def _delete(self, namespace: str) -> None:
        for kind in KINDS:
            self._operator.delete_function(f"{namespace}/{kind.name}")


def _as_simulated(function: str) -> FunctionId:
    name, _, _ = function.partition("@")
    return _behaviour(next(kind for kind in KINDS if kind.name == name)).spec.function_id


def _shots(world: World, seed: int, names: dict[str, str]) -> list[Shot]:
    """Return the calls of a trace, as heavy as the simulator draws them."""
    shots = []
    for request_id, arrival, noise in Schedule(world.trace, service_stream(seed)).planned():
        behaviour = world.trace.behaviours[arrival.function]
        run_s = behaviour.profile.run_s * math.exp(behaviour.run_sigma * noise)
        arguments = (
            run_s,
            BUSY_SHARE * run_s,
            behaviour.profile.response_bytes,
            bytes(arrival.request_bytes),
        )
        name = names[behaviour.spec.name]
        blob = encode(arguments, {})
        options = Options(node=arrival.data_node or "")
        shots.append(Shot(request_id, arrival.at_s, arrival.origin, name, blob, options))
    return shots


async def _close(clients: dict[NodeId, tierwise.Client]) -> None:
    for client in clients.values():
        await client.aclose()


@contextmanager
def _cpu_shares(run: LiveRun) -> Iterator[None]:
    """Note whose CPU time passes: that of this process and its descendants, and everybody's."""
    start_s, ours_s, all_s = monotonic_s(), _own_cpu_s(), _busy_cpu_s()
    yield
    capacity_s = (monotonic_s() - start_s) * (psutil.cpu_count() or 1)
    own_s = _own_cpu_s() - ours_s
    run.own_share = own_s / capacity_s
    run.foreign_share = max(0.0, _busy_cpu_s() - all_s - own_s) / capacity_s


def _busy_cpu_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _own_cpu_s() -> float:
    """Return the CPU seconds of this process and all its descendants, living and reaped."""
    total_s = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total_s += times.user + times.system + times.children_user + times.children_system
    return total_s
