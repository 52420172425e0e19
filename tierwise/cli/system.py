"""Processes of a real cluster: agent, scheduler; and version."""

from importlib.metadata import version as installed_version

import typer

from tierwise.cli.common import become

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def add_to(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(context_settings=_PASS_ON)(agent)
    app.command(context_settings=_PASS_ON)(scheduler)
    app.command()(version)


def agent(context: typer.Context) -> None:
    """Run the agent daemon on this machine: tierwise agent --config agent.toml [--token T]."""
    become("agent.daemon", context.args)


def scheduler(context: typer.Context) -> None:
    """Run the scheduler daemon: tierwise scheduler --config scheduler.toml."""
    become("scheduler.daemon", context.args)


def version() -> None:
    """Print the version."""
    print(installed_version("tierwise"))
