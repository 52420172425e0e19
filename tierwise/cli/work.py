"""Work: deploy, invoke, submit."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tierwise.cli.common import complete_functions, complete_nodes
from tierwise.cli.files import load_module
from tierwise.cli.output import Format, Output, say, show_value
from tierwise.clock import monotonic_s, pause
from tierwise.errors import InvalidArgument, NotFound, StartFailed

if TYPE_CHECKING:
    from tierwise.sdk.operator import Operator

PREPARE_TIMEOUT_S = 300.0  # they go on building; only the command stops waiting
PREPARE_SEEN_S = 5.0
PREPARE_POLL_S = 0.3

Arguments = Annotated[list[str] | None, typer.Argument(help="JSON values, or plain text")]
Name = Annotated[str, typer.Argument(help="function", autocompletion=complete_functions)]
Node = Annotated[str, typer.Option(help="run on this node", autocompletion=complete_nodes)]
Data = Annotated[
    Path | None,
    typer.Option(
        "--data", "-f", help="last argument: the bytes of this file, - for standard input"
    ),
]
Deadline = Annotated[str | None, typer.Option(help="how soon it should be there, say 200ms")]
Timeout = Annotated[str | None, typer.Option(help="when to give up, for example 30s")]
WorkTimeout = Annotated[
    str | None, typer.Option(help="give up if it has not ended by then; default: never")
]
Tier = Annotated[list[str] | None, typer.Option(help="edge, fog or cloud; may be repeated")]
Priority = Annotated[str | None, typer.Option(help="low, normal, high or critical")]
Budget = Annotated[float | None, typer.Option(help="US$ that the call may cost", min=0.0)]


def add_to(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(deploy)
    app.command()(invoke)
    app.command()(submit)


def deploy(
    target: Annotated[
        str,
        typer.Argument(help="FILE.py, or FILE.py:app if there are several; FILE.wasm:export"),
    ],
    wait: Annotated[
        bool, typer.Option(help="until the nodes have built what the functions require")
    ] = True,
    output: Output = Format.TABLE,
) -> None:
    """Deploy every function of the app in a Python file, or one of a WebAssembly module."""
    from tierwise.cli.output import show
    from tierwise.sdk.client import Client
    from tierwise.sdk.operator import Operator

    with Client() as client:
        specs = []
        for app in _apps(target):
            app.use(client)
            specs += app.deploy()
        names = [spec.function_id for spec in specs if spec.requirements]
        failed = _prepared(Operator(client), names) if wait and names else []
    records = [{"function": s.function_id, "code_digest": s.code_digest} for s in specs]
    show(
        records,
        output,
        [("function", lambda r: r["function"]), ("code", lambda r: r["code_digest"][:12])],
        name=lambda r: str(r["function"]),
        empty="the app declares no function",
    )
    if failed:
        raise StartFailed("\n".join(failed))


def _prepared(ask: "Operator", names: list[str]) -> list[str]:
    """Wait until no node builds an environment any more; return what went wrong where."""
    ends_s = monotonic_s() + PREPARE_TIMEOUT_S
    seen_s = monotonic_s() + PREPARE_SEEN_S
    while True:
        found = {name: ask.function(name)["environments"] for name in names}
        states = [env["state"] for envs in found.values() for env in envs]
        is_unseen = not all(found.values()) and monotonic_s() < seen_s  # heartbeats bring it
        if not (is_unseen or "building" in states) or monotonic_s() > ends_s:
            break
        pause(PREPARE_POLL_S)
    return [
        f"{name} on {env['node_id']}: {env['message']}"
        for name, envs in found.items()
        for env in envs
        if env["state"] == "failed"
    ]


def invoke(
    function: Name,
    arguments: Arguments = None,
    data: Data = None,
    node: Node = "",
    deadline: Deadline = None,
    timeout: Timeout = None,
    tier: Tier = None,
    priority: Priority = None,
    budget: Budget = None,
    output: Output = Format.JSON,
) -> None:
    """Call a function and print its result."""
    from tierwise.sdk.client import Client

    with Client() as client:
        remote = client.function(function).options(
            node=node,
            deadline=deadline,
            timeout=timeout,
            tier=tier,
            priority=priority,
            budget_usd=budget,
        )
        result = remote.remote(*_values(arguments, data))
    show_value(_plain(result), output)


def submit(
    function: Name,
    arguments: Arguments = None,
    data: Data = None,
    node: Node = "",
    deadline: Deadline = None,
    timeout: WorkTimeout = None,
    tier: Tier = None,
    priority: Priority = None,
    budget: Budget = None,
    key: Annotated[str, typer.Option(help="idempotency key: work is accepted once per key")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="wait for the result and print it")] = False,
    output: Output = Format.JSON,
) -> None:
    """Hand in durable work: it survives crashes of every process. Prints its id."""
    from tierwise.sdk.client import Client

    with Client() as client:
        remote = client.function(function).options(
            node=node,
            deadline=deadline,
            timeout=timeout,
            tier=tier,
            priority=priority,
            budget_usd=budget,
            idempotency_key=key,
        )
        handle = remote.spawn(*_values(arguments, data))
        if wait:
            say(f"accepted as {handle.request_id}; waiting")
            show_value(_plain(handle.result()), output)
        else:
            print(handle.request_id)


def _values(arguments: list[str] | None, data: Path | None) -> list[Any]:
    """Return arguments as values: JSON where it is JSON, text otherwise; then the file's bytes."""
    values: list[Any] = []
    for argument in arguments or []:
        try:
            values.append(json.loads(argument))
        except json.JSONDecodeError:
            values.append(argument)
    if data is not None:
        try:
            is_stdin = str(data) == "-"
            values.append(sys.stdin.buffer.read() if is_stdin else data.read_bytes())
        except OSError as error:
            raise InvalidArgument(f"--data {data}: {error.strerror}") from None
    return values


def _plain(value: Any) -> Any:
    """Return a result as JSON can show it."""
    if isinstance(value, bytes):
        return {"bytes": len(value), "hex": value[:64].hex()}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _apps(target: str) -> list[Any]:
    """Import the file and return the one app, or the named one."""
    from tierwise.sdk.app import App

    file, _, name = target.partition(":")
    path = Path(file)
    if not path.exists():
        raise NotFound(f"there is no file {file}")
    if path.suffix == ".wasm":
        made = App(path.stem.lower().replace("_", "-"))
        made.wasm(path, name)
        return [made]
    module = load_module(path)
    if name:
        app = getattr(module, name, None)
        if not isinstance(app, App):
            raise NotFound(f"{file} has no tierwise.App named {name}")
        return [app]
    apps = {id(value): value for value in vars(module).values() if isinstance(value, App)}
    if not apps:
        raise NotFound(f"{file} makes no tierwise.App")
    return list(apps.values())
