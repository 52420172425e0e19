"""From recorded calls to a scenario: what a live cluster was asked, to evaluate policies on.

    tierwise policy record --out FOLDER
    python -m training.dataset --calls calls.json --nodes nodes.json --out FOLDER

The files are what `tierwise get calls -o json`, `get nodes -o json` and `get functions -o json`
print. A call arrives in the scenario when it came to its first node: when it ended, less what its
caller waited. It runs as long as it did, times the declared speed of the node where it ran; a call
that never ran (expired, unplaceable, its node died) gets a drawn run time, one that was cancelled
is left out. What records do not hold: where a call's data lay, and which calls followed from
others: followers of a chain and clients of a federated round arrive when they did, not when their
predecessors end in the simulation.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from envs import scenario
from envs.traces import Arrival, Behaviour, Trace
from envs.world import World
from tierwise.domain.function import PRIOR, FunctionProfile, FunctionSpec, Priority
from tierwise.domain.ids import FunctionId, NodeId, is_name, split_function_id
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Link, LinkTable, Node, parse_tier
from tierwise.errors import InvalidArgument, TierwiseError
from training.records import (
    RUN_S_MIN,
    CallRecord,
    FunctionRecord,
    LinksRecord,
    NodeInfoRecord,
    OutcomeRecord,
    PathRecord,
    ProfileRecord,
    Records,
    load,
)

SIGMA = (0.01, 2.0)  # of a function's run times, as found in its calls
SIGMA_UNKNOWN = 0.2  # of a function with fewer than three calls


@dataclass(slots=True)
class Summary:
    """What became of the records."""

    call_count: int = 0
    drawn_count: int = 0  # calls whose run time is not known
    left_out: Counter[str] = field(default_factory=Counter)


def to_world(records: Records, *, heartbeat_interval_s: float = 1.0) -> tuple[World, Summary]:
    """Return the world that was recorded, and what of the records it holds.

    Raises:
        InvalidArgument: A record is wrong, or no call is left.
    """
    nodes = _nodes(records.nodes)
    summary = Summary()
    kept = [call for call in records.calls if _is_kept(call, nodes, summary)]
    if not kept:
        raise InvalidArgument(f"no call is left of {len(records.calls)}: {dict(summary.left_out)}")
    declared = {f"{f.spec.namespace}/{f.spec.name}": f for f in records.functions}
    behaviours: dict[FunctionId, Behaviour] = {}
    for name in dict.fromkeys(call.outcome.function_id for call in kept):
        mine = [call.outcome for call in kept if call.outcome.function_id == name]
        behaviour = _behaviour(name, mine, nodes, declared)
        behaviours[behaviour.spec.function_id] = behaviour
    starts = [call.ended_unix_s - max(0.0, call.outcome.latency.total_s) for call in kept]
    first = min(starts)
    arrivals = sorted(
        (_arrival(c.outcome, at - first, nodes) for c, at in zip(kept, starts, strict=True)),
        key=lambda arrival: arrival.at_s,
    )
    summary.call_count = len(kept)
    summary.drawn_count = sum(arrival.run_s == 0.0 for arrival in arrivals)
    return World(
        nodes=tuple(nodes.values()),
        links=_links(records.links),
        trace=Trace(behaviours=behaviours, arrivals=tuple(arrivals)),
        heartbeat_interval_s=heartbeat_interval_s,
    ), summary


def _nodes(rows: Iterable[NodeInfoRecord]) -> dict[str, Node]:
    nodes: dict[str, Node] = {}
    for info in rows:
        row, name = info.node, str(info.node.node_id)
        if not is_name(name):
            raise InvalidArgument(f"nodes: {name!r} names no node")
        try:
            tier = parse_tier(row.tier)
        except ValueError as error:
            raise InvalidArgument(f"node {name}: {error}") from None
        nodes[name] = Node(
            node_id=NodeId(name),
            tier=tier,
            capacity=Resources(
                cpus=row.capacity.cpus,
                memory_mib=row.capacity.memory_mib,
                gpu_slots=row.capacity.gpu_slots,
            ),
            speed=row.speed,
            address="simulated",
            zone=str(row.zone),
        )
    return nodes


def _is_kept(call: CallRecord, nodes: dict[str, Node], summary: Summary) -> bool:
    """Return whether a call becomes an arrival; count it if it does not."""
    outcome = call.outcome
    if outcome.state == "cancelled":
        summary.left_out["cancelled"] += 1
    elif str(outcome.origin) in nodes or (outcome.lease and nodes):
        return True
    else:
        summary.left_out["of a node that is no longer listed"] += 1
    return False


def _work_s(outcome: OutcomeRecord, nodes: dict[str, Node]) -> float:
    """Return the run time at speed 1.0 of all items, 0 if it is not known."""
    node = nodes.get(str(outcome.node_id))
    if outcome.state != "ok" or node is None:
        return 0.0
    return max(RUN_S_MIN, outcome.latency.run_s * node.speed)


def _behaviour(
    name: str,
    calls: Sequence[OutcomeRecord],
    nodes: dict[str, Node],
    declared: dict[str, FunctionRecord],
) -> Behaviour:
    """Return one function, from its calls and from what is declared of it."""
    try:
        namespace, short, version = split_function_id(name)
    except ValueError as error:
        raise InvalidArgument(f"calls: {error}") from None
    function = declared.get(f"{namespace}/{short}")
    work = [_work_s(o, nodes) / o.item_count for o in calls]
    known = np.array([work_s for work_s in work if work_s > 0.0])
    cold = [
        o.latency.cold_start_s * nodes[str(o.node_id)].speed
        for o in calls
        if o.is_cold and str(o.node_id) in nodes and o.latency.cold_start_s > 0.0
    ]
    answered = [o.response_bytes / o.item_count for o in calls if o.state == "ok"]
    profile = function.profile if function is not None else ProfileRecord()
    sigma = float(np.log(known).std()) if len(known) > 2 else SIGMA_UNKNOWN
    return Behaviour(
        spec=_spec(namespace, short, version or 1, calls, function),
        profile=FunctionProfile(
            run_s=float(np.median(known)) if len(known) else max(RUN_S_MIN, profile.run_s),
            cold_start_s=float(np.median(cold)) if cold else profile.cold_start_s,
            response_bytes=int(np.median(answered)) if answered else PRIOR.response_bytes,
        ),
        request_bytes=int(np.median([o.request_bytes / o.item_count for o in calls])),
        run_sigma=float(np.clip(sigma, *SIGMA)),
        popularity=float(len(calls)),
    )


def _spec(
    namespace: str,
    name: str,
    version: int,
    calls: Sequence[OutcomeRecord],
    function: FunctionRecord | None,
) -> FunctionSpec:
    """Return the declaration; without one, what the calls were billed and asked for."""
    spec = FunctionSpec(
        namespace=namespace,
        name=name,
        version=version,
        code_digest="simulated",
        memory_mib=max((o.memory_mib for o in calls), default=0) or 256,
        deadline_s=float(np.median([max(0.001, o.deadline_s) / o.item_count for o in calls])),
        priority=_priority(Counter(o.priority for o in calls).most_common(1)[0][0]),
    )
    if function is None:
        return spec
    known = function.spec
    return replace(
        spec,
        memory_mib=known.memory_mib,
        cpus=known.cpus,
        gpu_slots=known.gpu_slots,
        timeout_s=known.timeout_s,
        deadline_s=known.deadline_s,
        priority=_priority(known.priority),
        tiers=frozenset(parse_tier(tier) for tier in known.tiers) or spec.tiers,
        instances_max=known.instances_max,
        keep_alive_s=known.keep_alive_s,
        budget_usd=known.budget_usd,
        retries_max=known.retries_max,
    )


def _priority(text: str) -> Priority:
    try:
        return Priority[text.upper()]
    except KeyError:
        raise InvalidArgument(f"{text!r} is no priority") from None


def _arrival(outcome: OutcomeRecord, at_s: float, nodes: dict[str, Node]) -> Arrival:
    namespace, name, version = split_function_id(outcome.function_id)
    origin = str(outcome.origin)
    if origin not in nodes:  # durable work comes from the scheduler: any node will do
        origin = str(outcome.node_id) if str(outcome.node_id) in nodes else next(iter(nodes))
    return Arrival(
        at_s,
        NodeId(origin),
        FunctionId(f"{namespace}/{name}@{version or 1}"),
        outcome.request_bytes,
        _priority(outcome.priority),
        is_durable=outcome.lease > 0,
        item_count=outcome.item_count,
        run_s=_work_s(outcome, nodes),
        deadline_s=max(0.0, outcome.deadline_s),
    )


def _links(rows: LinksRecord) -> LinkTable:
    default = LinkTable().default if rows.default is None else _link(rows.default)
    try:
        by_tier = {
            (parse_tier(row.source), parse_tier(row.target)): _link(row.link)
            for row in rows.by_tier
        }
    except ValueError as error:
        raise InvalidArgument(f"links: {error}") from None
    return LinkTable(by_tier=by_tier, default=default)


def _link(row: PathRecord) -> Link:
    return Link(
        rtt_s=row.rtt_s, bandwidth_bytes_per_s=row.bandwidth_bytes_per_s, jitter_s=row.jitter_s
    )


def main() -> int:
    """Read the records, write the scenario, say what was left out; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training.dataset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--calls", type=Path, required=True, help="`get calls -o json`")
    parser.add_argument("--nodes", type=Path, required=True, help="`get nodes -o json`")
    parser.add_argument("--functions", type=Path, help="`get functions -o json`")
    parser.add_argument("--links", type=Path, help="the links of the cluster's view")
    parser.add_argument("--heartbeat", type=float, default=1.0, help="the cluster's interval, s")
    parser.add_argument("--out", type=Path, required=True, help="a folder, or a .toml file")
    flags = parser.parse_args()
    if not 0.01 <= flags.heartbeat <= 3600.0:
        parser.error("--heartbeat is from 0.01 to 3600 s")
    try:
        records = load(flags.calls, flags.nodes, flags.functions, flags.links)
        world, summary = to_world(records, heartbeat_interval_s=flags.heartbeat)
        scenario.write(world, flags.out)
    except (TierwiseError, OSError) as error:
        parser.error(str(error))
    say = [f"{summary.call_count} calls of {len(world.trace.behaviours)} functions"]
    say += [f"{summary.drawn_count} without a run time of their own"] * (summary.drawn_count > 0)
    say += [f"left out: {count} {why}" for why, count in summary.left_out.items()]
    if flags.links is None:
        say.append("no --links: every path takes 20 ms and 100 Mbit/s")
    print("; ".join(say), file=sys.stderr)
    print(flags.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
