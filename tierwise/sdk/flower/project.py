"""Whole Flower projects as they lie on disk."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import get_fused_config_from_dir, get_project_config
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.object_ref import load_app

from tierwise.errors import InvalidArgument, NotFound
from tierwise.sdk.flower.grid import REQUIREMENT, Participant, Scalar, TierwiseGrid


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A Flower project as its pyproject.toml describes it.

    Attributes:
        server_app: Its ServerApp, imported from where it lies.
        client_app: Where its ClientApp is, "package.module:app".
        run_config: `[tool.flwr.app.config]`, flat, with what was asked for in its place.
        requirements: Its dependencies, with Flower as it is here in place of what it asks for.
    """

    folder: Path
    server_app: Any
    client_app: str
    run_config: Mapping[str, Scalar]
    requirements: tuple[str, ...]

    def bundle(self) -> bytes:
        """Return its files as `flwr build` bundles them: the same files always give the same bytes.

        Raises:
            InvalidArgument: Flower does not accept the project; the message is Flower's.
        """
        try:
            return bytes(build_fab_from_disk(self.folder))
        except ValueError as error:
            raise InvalidArgument(str(error)) from None

    def grid(self, clients: int | Sequence[Participant], **options: Any) -> TierwiseGrid:
        """Return a grid that runs its ClientApp; options are those of `TierwiseGrid`.

        The project travels as source, so that whatever its modules do at import or hold works as it
        does with Flower.
        """
        options = {"run_config": self.run_config, "requirements": self.requirements, **options}
        return TierwiseGrid(self.bundle(), clients, reference=self.client_app, **options)


def load_project(folder: str | Path, run_config: Mapping[str, Scalar] | None = None) -> Project:
    """Return a Flower project.

    Args:
        folder: Where its pyproject.toml lies.
        run_config: Takes the place of values of `[tool.flwr.app.config]`; other keys are refused.

    Raises:
        NotFound: There is no such project, or it names a ServerApp that is not there.
        InvalidArgument: Its pyproject.toml is none of Flower's; or a key is unknown.
    """
    folder = Path(folder).resolve()
    try:
        config = get_project_config(folder)
        fused = get_fused_config_from_dir(folder, dict(run_config or {}))
    except FileNotFoundError as error:
        raise NotFound(str(error)) from None
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
    names = config["tool"]["flwr"]["app"]["components"]
    wanted = config["project"].get("dependencies", [])
    others = [text for text in wanted if not re.match(r"flwr(?![\w.-])", text.strip())]
    return Project(
        folder=folder,
        server_app=load_app(names["serverapp"], NotFound, folder),
        client_app=names["clientapp"],
        run_config=fused,
        requirements=(REQUIREMENT, *others),
    )


def run(server_app: Any, grid: Any, run_config: Mapping[str, Scalar] | None = None) -> Context:
    """Run a ServerApp in this process, over a grid; return the context that it leaves."""
    context = Context(
        run_id=grid.run.run_id,
        node_id=SUPERLINK_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config or {}),
    )
    server_app(grid, context)
    return context
