"""Flower over tierwise: an unmodified ServerApp, whose ClientApp runs in workers of the cluster.

    project = flower.load_project("my-flower-project")
    with project.grid(flower.participants(10, nodes=["edge-1", "edge-2"])) as grid:
        context = flower.run(project.server_app, grid, project.run_config)

A message is an invocation of a function that holds the ClientApp, in an environment that has
Flower, pinned to the node where the participant's data lies, or placed by the policy. Replies are
waited for, not polled, and given back in the order of the messages, so that sums of floating-point
numbers come out alike each time. Needs `flwr` (made for and tested with 1.41.0), which asks for an
environment of its own: typer < 0.21, protobuf < 7.

A project that keeps Flower's own transport can still have its rounds in the cache, with one line:

    grid = flower.capture(grid, tierwise.Rounds(client, "my-job"))
"""

from tierwise.sdk.flower.capture import capture
from tierwise.sdk.flower.grid import Participant, TierwiseGrid, participants
from tierwise.sdk.flower.project import Project, load_project, run
from tierwise.sdk.flower.recorder import arrays

__all__ = [
    "Participant",
    "Project",
    "TierwiseGrid",
    "arrays",
    "capture",
    "load_project",
    "participants",
    "run",
]
