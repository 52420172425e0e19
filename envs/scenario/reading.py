"""From a scenario's files to a world. Nothing is taken on trust: names, stages, bounds."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec

from envs.scenario.tables import (
    ArrivalRow,
    FunctionRow,
    LinkFigures,
    TableFile,
    read_arrivals,
    toml_path,
)
from envs.traces import Arrival, Behaviour, Stage, Trace
from envs.world import Faults, World
from tierwise.domain.function import FunctionProfile, FunctionSpec, Priority
from tierwise.domain.ids import FunctionId, NodeId, is_name, split_function_id
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Link, LinkTable, Node, Tier, parse_tier
from tierwise.errors import InvalidArgument

TIER_NAMES = tuple(tier.label for tier in Tier)
NAME_HELP = "use a-z, 0-9, '-', '.', '_', at most 63"
Functions = Mapping[FunctionId, FunctionRow]


def read(path: Path) -> World:
    """Return the world that a scenario describes.

    Args:
        path: The TOML file, or a folder that holds it as `scenario.toml`.

    Raises:
        NotFound: A file is missing.
        InvalidArgument: A file is too large, or a field is wrong; the message names file, line
            and field.
    """
    path = toml_path(path)
    file = TableFile(path)
    table = file.table
    nodes = _nodes(file)
    names = frozenset(node.node_id for node in nodes)
    functions = _functions(file)
    if Path(table.arrivals).name != table.arrivals:
        raise file.wrong("arrivals", "name a file in the scenario's own folder")
    arrivals, stages = _Arrivals(path.with_name(table.arrivals), names, functions).read()
    called = Counter(a.function for a in arrivals)
    called.update(a.function for stage in stages.values() for a in stage.then)
    return World(
        nodes=nodes,
        links=_links(file, names),
        trace=Trace(
            behaviours={
                name: _behaviour(name, row, called[name]) for name, row in functions.items()
            },
            arrivals=arrivals,
            stages=stages,
        ),
        heartbeat_interval_s=table.heartbeat_interval_s,
        faults=Faults(**msgspec.structs.asdict(table.faults)),
    )


def _nodes(file: TableFile) -> tuple[Node, ...]:
    nodes: dict[str, Node] = {}
    for index, row in enumerate(file.table.nodes):
        field = f"nodes[{index}].name"
        if not is_name(row.name) or row.name in TIER_NAMES:
            raise file.wrong(field, f"{row.name!r} names no node: {NAME_HELP}, and no tier's name")
        if row.name in nodes:
            raise file.wrong(field, f"there is another {row.name!r}")
        nodes[row.name] = Node(
            node_id=NodeId(row.name),
            tier=parse_tier(row.tier),
            capacity=Resources(cpus=row.cpus, memory_mib=row.memory_mib, gpu_slots=row.gpu_slots),
            speed=row.speed,
            address="simulated",
            zone=row.zone,
            labels=tuple(row.labels.items()),
        )
    return tuple(nodes.values())


def _links(file: TableFile, names: frozenset[NodeId]) -> LinkTable:
    by_tier: dict[tuple[Tier, Tier], Link] = {}
    by_pair: dict[tuple[NodeId, NodeId], Link] = {}
    for index, row in enumerate(file.table.links):
        link = _link(row)
        ends = row.between
        ways = [ends] if row.one_way else [ends, ends[::-1]]
        for source, target in ways:
            if source in TIER_NAMES and target in TIER_NAMES:
                by_tier[parse_tier(source), parse_tier(target)] = link
            elif source in names and target in names:
                by_pair[NodeId(source), NodeId(target)] = link
            else:
                raise file.wrong(
                    f"links[{index}].between", f"{list(ends)}: name two tiers or two nodes"
                )
    default = file.table.default_link
    return LinkTable(
        by_tier=by_tier,
        by_pair=by_pair,
        default=LinkTable().default if default is None else _link(default),
    )


def _link(row: LinkFigures) -> Link:
    return Link(
        rtt_s=row.rtt_s, bandwidth_bytes_per_s=row.bandwidth_bytes_per_s, jitter_s=row.jitter_s
    )


def _functions(file: TableFile) -> dict[FunctionId, FunctionRow]:
    found: dict[FunctionId, FunctionRow] = {}
    for index, row in enumerate(file.table.functions):
        try:
            name = _function_id(row.name)
        except ValueError as error:
            raise file.wrong(f"functions[{index}].name", str(error)) from None
        if name in found:
            raise file.wrong(f"functions[{index}].name", f"there is another {name!r}")
        found[name] = row
    return found


def _function_id(text: str) -> FunctionId:
    """Return the full id of a function; without a version it is the first."""
    namespace, name, version = split_function_id(text)
    return FunctionId(f"{namespace}/{name}@{version or 1}")


def _behaviour(name: FunctionId, row: FunctionRow, call_count: int) -> Behaviour:
    namespace, short, version = split_function_id(name)
    assert version is not None
    return Behaviour(
        spec=FunctionSpec(
            namespace=namespace,
            name=short,
            version=version,
            code_digest="simulated",
            memory_mib=row.memory_mib,
            cpus=row.cpus,
            gpu_slots=row.gpu_slots,
            timeout_s=row.timeout_s,
            deadline_s=row.deadline_s,
            priority=Priority[row.priority.upper()],
            tiers=frozenset(parse_tier(tier) for tier in row.tiers),
            instances_max=row.instances_max,
            keep_alive_s=row.keep_alive_s,
            budget_usd=row.budget_usd,
            retries_max=row.retries_max,
        ),
        profile=FunctionProfile(
            run_s=row.run_s, cold_start_s=row.cold_start_s, response_bytes=row.response_bytes
        ),
        request_bytes=row.request_bytes,
        run_sigma=row.run_sigma,
        popularity=float(call_count),
    )


class _Arrivals:
    """Reads the arrivals of one file, and checks that their stages can come about."""

    def __init__(self, path: Path, nodes: frozenset[NodeId], functions: Functions) -> None:
        self._path = path
        self._nodes = nodes
        self._functions = functions
        self._ids: dict[str, FunctionId] = {}  # each spelling of a function is looked up once

    def read(self) -> tuple[tuple[Arrival, ...], dict[int, Stage]]:
        """Return arrivals in order of time, and the stages."""
        arrivals: list[Arrival] = []
        then: dict[int, list[Arrival]] = {}
        sizes: Counter[int] = Counter()
        first_lines: dict[int, int] = {}
        for line, row in read_arrivals(self._path):
            arrival = self._arrival(line, row)
            if row.after is None:
                arrivals.append(arrival)
            else:
                then.setdefault(row.after, []).append(arrival)
                first_lines.setdefault(row.after, line)
            if arrival.stage:
                sizes[arrival.stage] += 1
                first_lines.setdefault(arrival.stage, line)
        if not arrivals:
            raise InvalidArgument(f"{self._path}: no line has an at_s: nothing would ever arrive")
        for number in sorted({*then, *sizes}):
            if not sizes[number]:
                raise self._wrong(first_lines[number], "after", f"no line has stage = {number}")
            if number not in then:
                raise self._wrong(first_lines[number], "stage", f"no line has after = {number}")
        self._check_order(arrivals, then, sizes, first_lines)
        arrivals.sort(key=lambda arrival: arrival.at_s)
        stages = {number: Stage(sizes[number], tuple(then[number])) for number in sorted(then)}
        return tuple(arrivals), stages

    def _arrival(self, line: int, row: ArrivalRow) -> Arrival:
        if (row.at_s is None) == (row.after is None):
            raise self._wrong(line, "at_s", "give either at_s or after")
        name = self._ids.get(row.function)
        if name is None:
            try:
                name = self._ids[row.function] = _function_id(row.function)
            except ValueError as error:
                raise self._wrong(line, "function", str(error)) from None
        function = self._functions.get(name)
        if function is None:
            raise self._wrong(line, "function", f"the scenario has no function {name!r}")
        for field, node in (("origin", row.origin), ("data_node", row.data_node)):
            if node not in self._nodes and (node or field == "origin"):
                raise self._wrong(line, field, f"the scenario has no node {node!r}")
        if row.pinned and not row.data_node:
            raise self._wrong(line, "pinned", "needs a data_node to pin the request to")
        if row.run_s is not None and function.run_sigma <= 0.0:
            raise self._wrong(line, "run_s", f"needs a run_sigma above 0 of {name!r}")
        return Arrival(
            0.0 if row.at_s is None else row.at_s,
            NodeId(row.origin),
            name,
            function.request_bytes * row.items if row.bytes is None else row.bytes,
            Priority[(row.priority or function.priority).upper()],
            row.durable,
            row.items,
            NodeId(row.data_node) if row.data_node else None,
            row.data_bytes,
            row.stage,
            row.pinned,
            row.run_s or 0.0,
            row.deadline_s or 0.0,
        )

    def _check_order(
        self,
        arrivals: list[Arrival],
        then: dict[int, list[Arrival]],
        sizes: Counter[int],
        lines: dict[int, int],
    ) -> None:
        """Let every request end in mind: a stage that waits for itself never does."""
        left = Counter(sizes)
        ending = [arrival.stage for arrival in arrivals if arrival.stage]
        while ending:
            number = ending.pop()
            left[number] -= 1
            if not left[number]:
                ending += [arrival.stage for arrival in then[number] if arrival.stage]
        stuck = min((lines[number] for number in sizes if left[number]), default=0)
        if stuck:
            raise self._wrong(stuck, "stage", "waits for itself, over the lines that follow it")

    def _wrong(self, line: int, field: str, message: str) -> InvalidArgument:
        return InvalidArgument(f"{self._path} line {line}: {field}: {message}")
