"""Operating: drain, remove, token, login, redrive."""

import asyncio
import getpass
import os
from pathlib import Path
from typing import Annotated

import typer

from tierwise.cli.common import complete_nodes, operator
from tierwise.cli.output import Format, Output, say, show_value
from tierwise.config import ClientConfig, dump, parse_duration_s
from tierwise.errors import InvalidArgument, NotFound
from tierwise.files import write_atomically

Node = Annotated[str, typer.Argument(help="node", autocompletion=complete_nodes)]
tokens = typer.Typer(help="One-time tokens with which nodes and people join.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(drain)
    app.command()(remove)
    app.command()(login)
    app.command()(redrive)
    app.add_typer(tokens, name="token")


def drain(
    node: Node,
    undo: Annotated[bool, typer.Option("--undo", help="take work again")] = False,
) -> None:
    """Let a node finish what it has and take nothing new."""
    with operator() as ask:
        ask.drain(node, is_on=not undo)
    say(f"{node} takes work again" if undo else f"{node} is draining; --undo takes it back")


def remove(
    node: Node,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
) -> None:
    """Take a node out of the cluster and revoke its certificate."""
    with operator() as ask:
        if not yes:
            if node not in [record["node"]["node_id"] for record in ask.nodes()]:
                raise NotFound(
                    f"there is no node {node!r}; `tierwise get nodes` lists those there are "
                    "(--yes revokes the certificate of one that never connected)"
                )
            typer.confirm(f"remove {node} and revoke its certificate?", abort=True, err=True)
        ask.remove(node)
    say(f"{node} is removed; it can come back with a new token only")


def redrive(work: Annotated[str, typer.Argument(help="id of dead-lettered work")]) -> None:
    """Queue dead-lettered work again."""
    with operator() as ask:
        ask.redrive(work)
    say(f"{work} is queued again")


@tokens.command()
def create(
    role: Annotated[str, typer.Option(help="node, user or admin")] = "node",
    name: Annotated[str, typer.Option(help="who may use it; default: anyone")] = "",
    ttl: Annotated[str, typer.Option(help="how long it lives")] = "1h",
    output: Output = Format.NAME,
) -> None:
    """Print a token that works once."""
    if role not in ("node", "user", "admin"):
        raise InvalidArgument(f"--role {role!r}: node, user or admin")
    with operator() as ask:
        made = ask.create_token(role, name, parse_duration_s(ttl))
    if output is Format.NAME or output is Format.TABLE:
        print(made["token"])
    else:
        show_value(made, output)


@tokens.command(name="list")
def list_tokens(output: Output = Format.TABLE) -> None:
    """List tokens, without their secrets."""
    from tierwise.cli.get import get

    get("tokens", output=output)


def login(
    join_address: Annotated[str, typer.Argument(help="host:port of the scheduler's join port")],
    name: Annotated[str, typer.Option(help="your name in the cluster")] = "",
    token: Annotated[
        str, typer.Option(help="default: $TIERWISE_TOKEN, or asked for", envvar="TIERWISE_TOKEN")
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option(help="where the context is written; default: --context, ~/.tierwise/client"),
    ] = None,
) -> None:
    """Trade a user token for credentials on this machine."""
    from tierwise.wire.identity import join

    name = name or os.environ.get("USER", "") or getpass.getuser()
    token = token or typer.prompt("token", hide_input=True, err=True)
    credentials, scheduler, identity = asyncio.run(join(join_address, token, name))
    named = os.environ.get("TIERWISE_CONTEXT")  # also of `tierwise --context`
    folder = folder or (Path(named) if named else Path.home() / ".tierwise/client")
    credentials.save(folder)
    write_atomically(folder / "client.toml", dump(ClientConfig(scheduler=scheduler)))
    say(f"you are {identity.uri}; the context is in {folder}")
