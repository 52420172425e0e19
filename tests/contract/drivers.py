"""The same calls through two drivers: the simulator, and real daemons on loopback."""

import asyncio
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import tierwise
from envs.simulator import Simulator
from envs.traces import Arrival, Behaviour, Trace
from envs.world import World
from tierwise.config import link_table
from tierwise.domain.function import FunctionProfile, FunctionSpec, Priority
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Node, Tier
from tierwise.placement.policy import create
from tierwise.sdk.local import CPUS, LINKS, MEMORY_MIB, SPEED
from tierwise.sdk.operator import Operator, Record

EDGE, FOG, CLOUD = NodeId("edge-1"), NodeId("fog-1"), NodeId("cloud-1")
RUN_S = 0.03
KINDS = {"anywhere": None, "cloud-bound": Tier.CLOUD}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of kind `anywhere` or `cloud-bound` that a user at the edge makes."""

    at_s: float
    kind: str = "anywhere"


class Driver(Protocol):
    """Runs calls under a policy and returns their outcomes in the order of the calls."""

    def run(self, policy: str, calls: list[Call]) -> list[Outcome]:
        """Run the calls from a cold start."""
        ...


class Simulated:
    """The event-heap simulator."""

    def run(self, policy: str, calls: list[Call]) -> list[Outcome]:
        nodes = tuple(
            Node(
                node_id=NodeId(f"{tier.label}-1"),
                tier=tier,
                capacity=Resources(cpus=CPUS[tier], memory_mib=MEMORY_MIB[tier]),
                speed=SPEED[tier],
                address="simulated",
            )
            for tier in Tier
        )
        behaviours = {}
        for kind, tier in KINDS.items():
            spec = FunctionSpec(
                namespace="default", name=kind, version=1, code_digest="", memory_mib=64
            )
            if tier is not None:
                spec = replace(spec, tiers=frozenset({tier}))
            behaviours[spec.function_id] = Behaviour(
                spec=spec,
                profile=FunctionProfile(run_s=RUN_S, cold_start_s=0.02, response_bytes=10),
                request_bytes=100,
                run_sigma=0.0,
                popularity=1.0,
            )
        arrivals = tuple(
            Arrival(0.2 + c.at_s, EDGE, RequestId(f"default/{c.kind}@1"), 100, Priority.NORMAL)
            for c in calls
        )
        world = World(
            nodes=nodes,
            links=link_table(LINKS),
            trace=Trace(behaviours=behaviours, arrivals=arrivals),
        )
        outcomes = Simulator(world, 0).run(create(policy))
        return sorted(outcomes, key=lambda outcome: outcome.request_id)


class Live:
    """Real scheduler and agents, with emulated links and speeds."""

    def __init__(self, cluster: tierwise.LocalCluster) -> None:
        self._cluster = cluster

    def run(self, policy: str, calls: list[Call]) -> list[Outcome]:
        with tierwise.Client(self._cluster.context, entry=EDGE) as client:
            ask = Operator(client)
            ask.promote(policy)
            names = _deploy(client)
            while {node["policy_id"] for node in ask.nodes()} != {f"{policy}@1"}:
                time.sleep(0.05)
            asyncio.run(_shoot(client, names, calls))
            return self._outcomes(ask, names, len(calls))

    def _outcomes(self, ask: Operator, names: dict[str, str], count: int) -> list[Outcome]:
        for _ in range(200):
            records = [
                call["outcome"]
                for call in ask.calls(limit=1000)
                if call["outcome"]["function_id"] in names.values()
            ]
            if len(records) >= count:
                # Calls are reported in the order in which they end; these all take equally long.
                return [_outcome(record) for record in reversed(records)]
            time.sleep(0.05)
        raise AssertionError(f"{len(records)} of {count} calls were recorded")


async def _shoot(client: tierwise.Client, names: dict[str, str], calls: list[Call]) -> None:
    start_s = asyncio.get_running_loop().time() + 0.05

    async def shoot(call: Call) -> None:
        await asyncio.sleep(start_s + call.at_s - asyncio.get_running_loop().time())
        await client.function(names[call.kind]).remote.aio(RUN_S)

    await asyncio.gather(*(shoot(call) for call in calls))
    await client.aclose()


def _deploy(client: tierwise.Client) -> dict[str, str]:
    """Deploy both kinds as new versions, so that nothing is warm."""
    app = tierwise.App("contract", client=client)
    stamp = time.monotonic_ns()

    def make(tier: str | None):  # type: ignore[no-untyped-def]
        def nap(seconds: float) -> int:
            import time

            time.sleep(seconds)
            return stamp

        return nap

    names = {}
    for kind, tier in KINDS.items():
        label = tier.label if tier is not None else None
        function = app.function(name=kind, memory="64MiB", tier=label)(make(label))
        names[kind] = function.deploy().function_id
    return names


def _outcome(record: Record) -> Outcome:
    return Outcome(
        request_id=record["request_id"],
        function_id=record["function_id"],
        state=OutcomeState[record["state"].upper()],
        origin=record["origin"],
        node_id=record["node_id"] or None,
        latency=LatencySplit(**record["latency"]),
        is_cold=record["is_cold"],
        money_usd=record["money_usd"],
        deadline_s=record["deadline_s"],
    )


def start(folder: Path) -> tierwise.LocalCluster:
    """Return a running cluster of one node per tier."""
    cluster = tierwise.LocalCluster(folder, "1c,1f,1e", policy="ect", seed=1)
    cluster.start()
    return cluster
