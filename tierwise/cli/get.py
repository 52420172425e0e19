"""Reading: get, describe, logs, usage."""

from typing import Annotated, Any

import typer

from tierwise.cli.common import operator
from tierwise.cli.output import Format, Output, Record, age, ms, print_table, show, show_value, usd
from tierwise.clock import wall_s
from tierwise.domain.cache import ObjectKey, ObjectKind
from tierwise.errors import InvalidArgument, NotFound

KINDS = ("nodes", "functions", "calls", "policies", "work", "objects", "tokens")
_SINGULAR = ("node", "function", "call", "policie", "policy", "work", "object", "token")
_DESCRIBED = ("node", "function", "call", "policie", "policy", "work")


def add_to(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(get)
    app.command()(describe)
    app.command()(logs)
    app.command()(usage)
    app.command()(delete)


def get(
    kind: Annotated[str, typer.Argument(help=", ".join(KINDS), autocompletion=lambda: list(KINDS))],
    function: Annotated[str, typer.Option(help="calls: of this function only")] = "",
    node: Annotated[str, typer.Option(help="calls, objects: on this node only")] = "",
    job: Annotated[str, typer.Option(help="objects: of this job only, [namespace/]name")] = "",
    state: Annotated[str, typer.Option(help="work: in this state only")] = "",
    limit: Annotated[int, typer.Option(help="calls, work: at most this many", min=1)] = 50,
    output: Output = Format.TABLE,
) -> None:
    """List what there is."""
    if kind.rstrip("s") not in _SINGULAR:
        raise InvalidArgument(f"get {kind!r}: choose one of {', '.join(KINDS)}")
    state = _work_state(state)
    with operator() as ask:
        match kind.rstrip("s"):
            case "node":
                show(ask.nodes(), output, NODE_COLUMNS, name=lambda r: str(r["node"]["node_id"]))
            case "function":
                show(
                    ask.functions(),
                    output,
                    FUNCTION_COLUMNS,
                    name=lambda r: _function(r["spec"]),
                    empty="no functions yet: `tierwise deploy FILE.py`",
                )
            case "call":
                show(
                    ask.calls(function, node, limit),
                    output,
                    CALL_COLUMNS,
                    name=lambda r: str(r["outcome"]["request_id"]),
                    empty="no calls yet (agents report them once per heartbeat)",
                )
            case "policie" | "policy":
                for policy in (found := ask.policies()):
                    policy["card"] = _card(policy["card"])
                show(found, output, POLICY_COLUMNS, name=lambda r: str(r["policy_id"]))
            case "work":
                show(
                    ask.work(state, limit),
                    output,
                    WORK_COLUMNS,
                    name=lambda r: str(r["request_id"]),
                    empty="no durable work yet: `tierwise submit FUNCTION …`",
                )
            case "object":
                namespace, _, name = job.rpartition("/")
                found = ask.objects(namespace, name)
                show(
                    [each for each in found if node in ("", *each["node_ids"])],
                    output,
                    OBJECT_COLUMNS,
                    name=object_name,
                    empty="no cached objects yet: `tierwise.Rounds` puts some",
                )
            case _:
                show(ask.tokens(), output, TOKEN_COLUMNS, name=lambda r: str(r["token_id"]))


def describe(
    kind: Annotated[str, typer.Argument(help="node, function, policy, work or call")],
    name: Annotated[str, typer.Argument(help="its name or id")],
    output: Output = Format.YAML,
) -> None:
    """Show everything about one thing."""
    if kind.rstrip("s") not in _DESCRIBED:
        raise InvalidArgument(f"describe {kind!r}: node, function, policy, work or call")
    with operator() as ask:
        match kind.rstrip("s"):
            case "function":
                found = ask.function(name)
            case "call":
                found = ask.call(name)
            case "node":
                found = _pick(ask.nodes(), lambda r: r["node"]["node_id"], name, "node")
            case "policy" | "policie":
                found = _pick(ask.policies(), lambda r: r["policy_id"], name, "policy")
                found["card"] = _card(found["card"])
            case _:
                found = _pick(ask.work(limit=1000), lambda r: r["request_id"], name, "work")
    show_value(found, output)


def logs(
    target: Annotated[str, typer.Argument(help="a call's id, or a function")],
    limit: Annotated[int, typer.Option(help="of a function: its newest calls", min=1)] = 20,
) -> None:
    """Print what calls have printed."""
    with operator() as ask:
        try:
            found = [ask.call(target)]
        except (NotFound, InvalidArgument):
            found = ask.calls(target, limit=limit)
            if not found:
                ask.function(target)  # says so if there is no such function at all
    for call in reversed(found):
        if call["log"]:
            outcome = call["outcome"]
            print(f"--- {outcome['request_id']} on {outcome.get('node_id')} ---")
            print(call["log"].rstrip("\n"))


def usage(
    namespace: Annotated[str, typer.Option(help="this namespace only")] = "",
    by: Annotated[str, typer.Option(help="function, or namespace for its totals")] = "function",
    output: Output = Format.TABLE,
) -> None:
    """Show what was used and what it cost, per function or per namespace."""
    if by not in ("function", "namespace"):
        raise InvalidArgument(f"--by {by!r}: function or namespace")
    empty = f"nothing used yet in {namespace}" if namespace else "nothing used yet"
    with operator() as ask:
        if by == "function":
            show(ask.usage(namespace), output, USAGE_COLUMNS, name=_function, empty=empty)
        else:
            found = ask.namespace_usage(namespace)
            name = NAMESPACE_COLUMNS[0][1]
            show(found, output, NAMESPACE_COLUMNS, name=name, empty=empty)


def delete(
    function: Annotated[str, typer.Argument(help="name, or name@version")],
) -> None:
    """Delete a function: one version, or all of a name."""
    with operator() as ask:
        count = ask.delete_function(function)
    if not count:
        raise NotFound(f"there is no function {function!r}")
    print_table(["deleted", "versions"], [[function, count]])


def object_name(record: Record) -> str:
    """Return the key of an object as one word."""
    kind = ObjectKind(record["kind"])
    named = {name: record[name] for name in ("namespace", "job", "round", "client")}
    return str(ObjectKey(kind=kind, **named))


def environment_words(environments: list[Record]) -> str:
    """Return on how many nodes the requirements are in which state: "1 building, 2 ready"."""
    states = [environment["state"] for environment in environments]
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))


def _function(record: Record) -> str:
    name = f"{record['namespace']}/{record.get('name', record.get('function'))}"
    return f"{name}@{record['version']}" if "version" in record else name


def _pick(records: list[Record], key: Any, name: str, kind: str) -> Record:
    for record in records:
        if key(record) == name:
            return record
    raise NotFound(f"there is no {kind} {name!r}")


def _card(encoded: str) -> Any:
    """Return the card inside a record: bytes travel as base64 in JSON."""
    import base64
    import json

    return json.loads(base64.b64decode(encoded)) if encoded else None


def _fallbacks(policies: list[Record]) -> str:
    """Return how often the base score decided instead on a node, and whose breaker is not closed.

    A shadow decides nothing: what was dropped of it is in `describe node`.
    """
    total: dict[str, int] = {}
    broken = []
    for health in policies:
        if health["duty"] != "shadow":
            for reason, count in health["fallbacks"].items():
                total[reason] = total.get(reason, 0) + int(count)
            if health["breaker"] not in ("", "closed"):
                broken.append(f"{health['policy_id']} {health['breaker']}")
    return " ".join(filter(None, (_counts(total), *broken)))


def _counts(counts: dict[str, int]) -> str:
    return ",".join(f"{reason}:{count}" for reason, count in sorted(counts.items()))


def _trial(record: Record) -> str:
    """Return the trials of a policy that go on, in a few words."""
    words = []
    shadow, canary = record.get("shadow"), record.get("canary")
    if shadow and not shadow["ended_unix_s"]:
        words.append(
            f"shadow: {shadow['decision_count']} decisions, {shadow['same_share']:.0%} the same, "
            f"estimated gain {shadow['mean_gain_s'] * 1e3:+.2f} ms"
        )
    if canary and not canary["ended_unix_s"]:
        words.append(
            f"canary: {canary['share']:.0%} of {canary['block_s']:g} s blocks, "
            f"{canary['canary']['call_count']} calls{_interval(canary['cost_s'])}"
        )
    return "; ".join(words)


def _interval(difference: Record) -> str:
    if difference.get("low") is None:
        return ""
    return ", cost {mean:+.4f} [{low:+.4f}, {high:+.4f}]".format(**difference)


def _work_state(state: str) -> str:
    states = ("queued", "leased", "succeeded", "failed", "cancelled", "dead")
    if state and state not in states:
        raise InvalidArgument(f"--state {state!r}: one of {', '.join(states)}")
    return state


def _total_s(latency: Record) -> float:
    return float(sum(latency.values()))


NODE_COLUMNS = [
    ("name", lambda r: r["node"]["node_id"]),
    ("tier", lambda r: r["node"]["tier"]),
    ("state", lambda r: r["state"]),
    ("cpus", lambda r: f"{r['reading']['free']['cpus']:g}/{r['node']['capacity']['cpus']:g}"),
    (
        "memory mib",
        lambda r: f"{r['reading']['free']['memory_mib']}/{r['node']['capacity']['memory_mib']}",
    ),
    ("speed", lambda r: r["node"]["speed"]),
    ("running", lambda r: r["reading"]["running"]),
    ("queued", lambda r: r["reading"]["queued"]),
    ("warm", lambda r: sum(r["reading"]["warm"].values())),
    ("policy", lambda r: r["policy_id"]),
    ("fallbacks", lambda r: _fallbacks(r.get("policies") or [])),
    ("age", lambda r: age(r["age_s"])),
    ("address", lambda r: r["node"]["address"]),
]
FUNCTION_COLUMNS = [
    ("function", lambda r: _function(r["spec"])),
    (
        "memory mib",
        lambda r: "auto" if r["spec"].get("is_memory_auto") else r["spec"]["memory_mib"],
    ),
    ("deadline", lambda r: ms(r["spec"]["deadline_s"])),
    ("priority", lambda r: r["spec"]["priority"]),
    ("tiers", lambda r: ",".join(r["spec"]["tiers"])),
    ("calls", lambda r: r["profile"]["call_count"]),
    ("run", lambda r: ms(r["profile"]["run_s"])),
    ("cold start", lambda r: ms(r["profile"]["cold_start_s"])),
    ("environment", lambda r: environment_words(r["environments"])),
    ("age", lambda r: age(wall_s() - r["created_unix_s"])),
]
CALL_COLUMNS = [
    ("call", lambda r: r["outcome"]["request_id"]),
    ("function", lambda r: r["outcome"]["function_id"]),
    ("node", lambda r: r["outcome"]["node_id"]),
    ("state", lambda r: r["outcome"]["error_code"] or r["outcome"]["state"]),
    ("total", lambda r: ms(_total_s(r["outcome"]["latency"]))),
    ("deadline", lambda r: ms(r["outcome"]["deadline_s"])),
    ("queue", lambda r: ms(r["outcome"]["latency"]["queue_s"])),
    (
        "net",
        lambda r: ms(r["outcome"]["latency"]["transfer_s"] + r["outcome"]["latency"]["return_s"]),
    ),
    ("cold", lambda r: ms(r["outcome"]["latency"]["cold_start_s"])),
    ("run", lambda r: ms(r["outcome"]["latency"]["run_s"])),
    ("cost", lambda r: usd(r["outcome"]["money_usd"])),
    ("age", lambda r: age(wall_s() - r["ended_unix_s"])),
]
POLICY_COLUMNS = [
    ("policy", lambda r: r["policy_id"]),
    ("active", lambda r: r["is_active"]),
    ("kind", lambda r: "built-in" if r["is_builtin"] else "published"),
    ("trial", lambda r: _trial(r)),
    ("fallbacks", lambda r: _counts(r.get("fallbacks") or {})),
    ("breaker open on", lambda r: ",".join(r.get("open_nodes") or ())),
    ("by", lambda r: r["published_by"]),
    ("trained", lambda r: (r["card"] or {}).get("command", "")),
]
WORK_COLUMNS = [
    ("work", lambda r: r["request_id"]),
    ("function", lambda r: r["function_id"]),
    ("state", lambda r: r["state"]),
    ("node", lambda r: r["node_id"]),
    ("attempts", lambda r: r["attempt_count"]),
    ("age", lambda r: age(wall_s() - r["submitted_unix_s"])),
    ("message", lambda r: r["message"][:60]),
]
OBJECT_COLUMNS = [
    ("object", object_name),
    ("size", lambda r: f"{r['size_bytes'] / 1e6:.3g} MB"),
    ("durability", lambda r: r["durability"]),
    ("memory", lambda r: r["is_in_memory"]),
    ("nodes", lambda r: ",".join(r["node_ids"])),
    ("examples", lambda r: r["metadata"].get("example_count", "")),
    ("loss", lambda r: r["metadata"].get("loss", "")),
    ("digest", lambda r: r["digest"][:12]),
    ("quarantined", lambda r: r["quarantined"]),
]
TOKEN_COLUMNS = [
    ("token", lambda r: r["token_id"]),
    ("role", lambda r: r["role"]),
    ("name", lambda r: r["name"]),
    ("used", lambda r: r["is_used"]),
    ("expires in", lambda r: age(max(0.0, r["expires_unix_s"] - wall_s()))),
]
_AMOUNTS = [
    ("calls", lambda r: r["call_count"]),
    ("items", lambda r: r["item_count"]),
    ("missed", lambda r: r["missed_count"]),
    ("failed", lambda r: r["failed_count"]),
    ("cold", lambda r: r["cold_count"]),
    ("gb-s", lambda r: r["gb_s"]),
    ("cost", lambda r: usd(r["money_usd"])),
]
USAGE_COLUMNS = [("function", _function), *_AMOUNTS]
NAMESPACE_COLUMNS = [
    ("namespace", lambda r: r["namespace"]),
    ("functions", lambda r: r["function_count"]),
    *_AMOUNTS,
]
