"""From a world to a scenario's files: numbers keep every digit."""

import csv
import io
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from envs.scenario.tables import (
    FORMAT,
    ArrivalRow,
    FaultRow,
    FunctionRow,
    LinkFigures,
    LinkRow,
    NodeRow,
    ScenarioFile,
    toml_path,
)
from envs.traces import Arrival, Behaviour, Trace
from envs.world import World
from tierwise.domain.topology import Link, LinkTable, Node
from tierwise.errors import InvalidArgument
from tierwise.files import write_atomically


def write(world: World, path: Path) -> None:
    """Write a world as a scenario; `read` gives a world that simulates alike, to the last digit.

    Args:
        world: Its arrivals are in order of time.
        path: A folder, or a `.toml` file beside which the arrivals go.

    Raises:
        InvalidArgument: A stage does not end with the requests that carry it.
    """
    path = toml_path(path, is_new=True)
    rows = _arrival_rows(world.trace)
    arrivals_path = path.with_suffix(".csv") if path.name != "scenario.toml" else None
    arrivals_path = arrivals_path or path.with_name("arrivals.csv")
    default = world.links.default
    table = ScenarioFile(
        format=FORMAT,
        arrivals=arrivals_path.name,
        heartbeat_interval_s=world.heartbeat_interval_s,
        faults=FaultRow(**asdict(world.faults)),
        default_link=None if default == LinkTable().default else _figures(default),
        nodes=tuple(_node_row(node) for node in world.nodes),
        links=tuple(_link_rows(world.links)),
        functions=tuple(_function_row(each) for each in world.trace.behaviours.values()),
    )
    write_atomically(arrivals_path, _csv(rows))
    write_atomically(path, msgspec.toml.encode(_sparse(table)))


def _node_row(node: Node) -> NodeRow:
    return NodeRow(
        name=node.node_id,
        tier=node.tier.label,  # type: ignore[arg-type]  # one of the three
        cpus=node.capacity.cpus,
        memory_mib=node.capacity.memory_mib,
        gpu_slots=node.capacity.gpu_slots,
        speed=node.speed,
        zone=node.zone,
        labels=dict(node.labels),
    )


def _figures(link: Link) -> LinkFigures:
    return LinkFigures(**asdict(link))


def _link_rows(links: LinkTable) -> list[LinkRow]:
    """Return each path once where both directions are alike."""
    paths: dict[tuple[str, str], Link] = {
        (a.label, b.label): li for (a, b), li in links.by_tier.items()
    }
    paths |= {(str(source), str(target)): link for (source, target), link in links.by_pair.items()}
    rows = []
    for ends, link in paths.items():
        is_alike = paths.get(ends[::-1]) == link
        if not is_alike or ends <= ends[::-1]:
            rows.append(LinkRow(between=ends, one_way=not is_alike, **asdict(link)))
    return rows


def _function_row(behaviour: Behaviour) -> FunctionRow:
    spec, profile = behaviour.spec, behaviour.profile
    return FunctionRow(
        name=spec.function_id,
        run_s=profile.run_s,
        run_sigma=behaviour.run_sigma,
        cold_start_s=profile.cold_start_s,
        request_bytes=behaviour.request_bytes,
        response_bytes=profile.response_bytes,
        deadline_s=spec.deadline_s,
        timeout_s=spec.timeout_s,
        priority=spec.priority.name.lower(),  # type: ignore[arg-type]  # one of the four
        memory_mib=spec.memory_mib,
        cpus=spec.cpus,
        gpu_slots=spec.gpu_slots,
        tiers=tuple(t.label for t in sorted(spec.tiers)),  # type: ignore[misc]
        instances_max=spec.instances_max,
        keep_alive_s=spec.keep_alive_s,
        budget_usd=spec.budget_usd,
        retries_max=spec.retries_max,
    )


def _arrival_rows(trace: Trace) -> list[dict[str, Any]]:
    carried = Counter(a.stage for a in trace.arrivals)
    carried.update(a.stage for stage in trace.stages.values() for a in stage.then)
    for number, stage in trace.stages.items():
        if carried[number] != stage.size:
            raise InvalidArgument(
                f"stage {number} ends with {stage.size} requests, but {carried[number]} carry it"
            )
    rows = [{"at_s": arrival.at_s, **_fields(arrival)} for arrival in trace.arrivals]
    for number, stage in sorted(trace.stages.items()):
        rows += [{"after": number, **_fields(arrival)} for arrival in stage.then]
    return rows


def _fields(arrival: Arrival) -> dict[str, Any]:
    return {
        "function": arrival.function,
        "origin": arrival.origin,
        "priority": arrival.priority.name.lower(),
        "bytes": arrival.request_bytes,
        "items": arrival.item_count if arrival.item_count != 1 else "",
        "run_s": arrival.run_s or "",
        "deadline_s": arrival.deadline_s or "",
        "data_node": arrival.data_node or "",
        "data_bytes": arrival.data_bytes or "",
        "pinned": "true" if arrival.is_pinned else "",
        "durable": "true" if arrival.is_durable else "",
        "stage": arrival.stage or "",
    }


def _csv(rows: list[dict[str, Any]]) -> bytes:
    """Return the rows under the columns that are used."""
    names = [n for n in ArrivalRow.__struct_fields__ if any(row.get(n, "") != "" for row in rows)]
    names = sorted(names, key=lambda n: n not in ("at_s", "after"))
    file = io.StringIO()
    lines = csv.DictWriter(
        file, names or ["at_s", "function", "origin"], extrasaction="ignore", lineterminator="\n"
    )
    lines.writeheader()
    lines.writerows(rows)
    return file.getvalue().encode()


def _sparse(struct: msgspec.Struct) -> dict[str, Any]:
    """Return a table without the fields that have their default."""
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        if value is None or (not field.required and value == _default(field)):
            continue
        if isinstance(value, msgspec.Struct):
            found[field.name] = _sparse(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], msgspec.Struct):
            found[field.name] = [_sparse(each) for each in value]
        else:
            found[field.name] = value
    return found


def _default(field: msgspec.structs.FieldInfo) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default
