"""Run a Flower project on a tierwise cluster.

    python -m tierwise.sdk.flower PROJECT --clients 20 --node edge-1 --node edge-2
    python -m tierwise.sdk.flower PROJECT -c 'num-server-rounds=10 alpha=0.1' --capture my-job

Exit codes: 0 done, 1 the project or the cluster failed, 2 wrong usage.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from flwr.common.config import parse_config_args

from tierwise.errors import InvalidArgument, TierwiseError
from tierwise.sdk import flower
from tierwise.sdk.client import Client
from tierwise.sdk.rounds import Rounds

PAIR = re.compile(r"""[^\s=]+=('[^']*'|"[^"]*"|\S+)""")


def main() -> int:
    """Run the project that the arguments name; errors end as one clear message."""
    parser = argparse.ArgumentParser(
        prog="python -m tierwise.sdk.flower",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("project", type=Path, help="folder with a Flower project's pyproject.toml")
    parser.add_argument("--clients", type=int, default=10, help="how many, default 10")
    parser.add_argument(
        "--node", action="append", default=[], help="deal clients out to these; else placed"
    )
    parser.add_argument(
        "-c", "--run-config", action="append", help="'KEY=VALUE …', as of `flwr run`"
    )
    parser.add_argument("--capture", metavar="JOB", help="write the rounds into the cache as JOB")
    parser.add_argument("--context", type=Path, help="folder that says how to reach the cluster")
    parser.add_argument("--memory", default="512MiB", help="what one client may use")
    parser.add_argument(
        "--host-environment",
        action="store_true",
        help="use what the nodes' own interpreter has, and install nothing",
    )
    try:
        run(parser.parse_args())
    except TierwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def settings_of(lines: list[str]) -> dict[str, Any]:
    """Return the settings that `--run-config` gives, as `flwr run` reads them.

    Raises:
        InvalidArgument: Flower cannot read them, or would pass over what is no pair.
    """
    for line in lines:
        if not line.endswith(".toml") and PAIR.sub("", line).strip():
            raise InvalidArgument(f"--run-config {line!r}: write KEY=VALUE, texts in quotes")
    try:
        return dict(parse_config_args(lines))
    except Exception as error:  # a typer.Exit after a message, a TOML error, a ValueError
        raise InvalidArgument(f"--run-config: {error or 'write KEY=VALUE'}") from None


def run(chosen: argparse.Namespace) -> None:
    """Run a project.

    Raises:
        TierwiseError: It cannot be run as it is, or the cluster not be reached.
    """
    project = flower.load_project(chosen.project, settings_of(chosen.run_config or []))
    options: dict[str, Any] = {"memory": chosen.memory}
    if chosen.host_environment:
        options["requirements"] = ()
    clients = flower.participants(chosen.clients, chosen.node)
    with Client(chosen.context) as client, project.grid(clients, client=client, **options) as grid:
        if chosen.capture is None:
            flower.run(project.server_app, grid, project.run_config)
            return
        captured = flower.capture(grid, Rounds(client, chosen.capture))
        flower.run(project.server_app, captured, project.run_config)
        captured.capture.flush()
        if captured.capture.failures:
            lost = "\n  ".join(captured.capture.failures)
            raise TierwiseError(f"the project ran, but not all of it is in the cache:\n  {lost}")


if __name__ == "__main__":
    sys.exit(main())
