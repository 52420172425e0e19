"""Environments are built when a function is deployed, before anybody calls it."""

import asyncio

from agent.runtime.environments import Environments
from tierwise.domain.function import Catalogue, FunctionSpec
from tierwise.domain.topology import Node
from tierwise.errors import TierwiseError
from tierwise.placement.feasibility import hard_limit


class Preparation:
    """Follows the catalogue. What cannot be built is noted by `environments`, for all to see."""

    def __init__(self, environments: Environments, node: Node, group: asyncio.TaskGroup) -> None:
        self._environments = environments
        self._node = node
        self._group = group
        self._begun: set[str] = set()

    def follow(self, catalogue: Catalogue) -> None:
        """Begin to build what functions that may run here require, each set of it once.

        A set that could not be built is tried again when its function is called.
        """
        wanted = [
            spec
            for spec in catalogue.functions.values()
            if spec.requirements
            and self._node.tier in spec.tiers
            and hard_limit(self._node, spec, 0) is None
        ]
        self._begun &= {spec.requirements_digest for spec in wanted}
        for spec in wanted:
            if spec.requirements_digest not in self._begun:
                self._begun.add(spec.requirements_digest)
                self._group.create_task(self._prepare(spec))

    async def _prepare(self, spec: FunctionSpec) -> None:
        try:
            await self._environments.get(spec.requirements)
        except (TierwiseError, OSError):
            return  # its reading says so
