"""Zygotes as a tree: one root per environment, and branches that have imported what functions do.

A worker tells which installed modules its function made it import. They are remembered per code
digest, and a branch of the environment's root imports them in the background: the next instance of
the function is forked from it, and finds them there. Functions that import the same share a branch.
Only names travel, and a branch can import only what its interpreter has installed: no code of a
user enters a zygote.
"""

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import structlog

from agent.runtime.environments import Environment
from agent.runtime.parent import ZygoteProcess
from agent.runtime.sandbox import STANDARD
from tierwise.files import write_atomically

log = structlog.get_logger()

BRANCHES_MAX = 16
BRANCH_MEMORY_MIB_MAX = 1024.0  # what all branches together may hold for themselves
DIGESTS_MAX = 1000
MODULES_MAX = 400  # per function
NAME_LENGTH_MAX = 100
BRANCH_TIMEOUT_S = 60.0
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*", re.ASCII)
# Importing these does something, or is of no use to a function.
UNWANTED = frozenset({"__main__", "antigravity", "ensurepip", "idlelib", "lib2to3", "pip"}) | {
    *("test", "this", "tkinter", "turtle", "turtledemo")
}


@dataclass(slots=True)
class _Branch:
    """One branch, used most recently last; `zygote` is None until it is ready, or if it failed."""

    modules: tuple[str, ...]
    zygote: ZygoteProcess | None = None
    making: asyncio.Task[None] | None = None
    is_bad: bool = False


@dataclass(slots=True)
class _Tree:
    root: ZygoteProcess
    branches: OrderedDict[str, _Branch] = field(default_factory=OrderedDict)


class Nursery:
    """Every zygote of one agent."""

    def __init__(
        self, memory: Path | None = None, isolation: str = STANDARD, data: Sequence[str] = ()
    ) -> None:
        """Make an empty nursery.

        Args:
            memory: File in which imports are remembered over a restart.
            isolation: strict, standard or off.
            data: Folders of this node that functions may read.
        """
        self._data = data
        self._isolation = isolation
        self._memory = memory
        self._trees: dict[str, _Tree] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._retired: set[ZygoteProcess] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._imports: OrderedDict[str, tuple[str, ...]] = OrderedDict()
        if memory is not None:
            self._imports = _remembered(memory)

    async def zygote(self, environment: Environment, code_digest: str) -> ZygoteProcess:
        """Return the best zygote that is ready for this function: its branch, else the root.

        Raises:
            OSError: The environment's interpreter did not start.
        """
        tree = await self._tree(environment)
        modules = self._imports.get(code_digest)
        if not modules:
            return tree.root
        self._imports.move_to_end(code_digest)
        branch = self._branch(tree, modules)
        zygote = branch.zygote
        return zygote if zygote is not None and zygote.is_alive else tree.root

    def learn(self, environment: Environment, code_digest: str, names: Iterable[str]) -> None:
        """Take in what an instance has imported, and let a branch grow that has it too."""
        tree = self._trees.get(environment.environment_id)
        if tree is None:
            return
        known = self._imports.get(code_digest, ())
        found = [name for name in names if _is_wanted(name) and name not in known]
        merged = (*known, *dict.fromkeys(found))[:MODULES_MAX]
        if merged == known:
            return
        self._imports[code_digest] = merged
        self._imports.move_to_end(code_digest)
        while len(self._imports) > DIGESTS_MAX:
            self._imports.popitem(last=False)
        self._branch(tree, merged)
        if self._memory is not None:
            write_atomically(self._memory, msgspec.json.encode(dict(self._imports)))

    async def settled(self) -> None:
        """Wait until no branch is being made."""
        making = [
            branch.making
            for tree in self._trees.values()
            for branch in tree.branches.values()
            if branch.making is not None
        ]
        await asyncio.gather(*making, return_exceptions=True)

    async def close(self) -> None:
        """End every zygote, and with them their instances."""
        for tree in self._trees.values():
            for branch in tree.branches.values():
                await self._drop(branch)
        for zygote in [*self._retired, *(tree.root for tree in self._trees.values())]:
            await zygote.close()
        self._retired.clear()
        self._trees.clear()
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _tree(self, environment: Environment) -> _Tree:
        name = environment.environment_id
        async with self._locks.setdefault(name, asyncio.Lock()):
            tree = self._trees.get(name)
            if tree is not None and not tree.root.is_alive:  # its branches died with it
                log.warning("zygote.restarted", environment_id=name)
                for branch in tree.branches.values():
                    await self._drop(branch)
                await tree.root.close()
                tree = None
            if tree is None:
                root = ZygoteProcess(environment, self._isolation, self._data)
                await root.open()
                tree = self._trees[name] = _Tree(root)
            return tree

    def _branch(self, tree: _Tree, modules: tuple[str, ...]) -> _Branch:
        """Return the branch for `modules`; if there is none, or it died, one begins to grow."""
        key = hashlib.sha256(" ".join(sorted(modules)).encode()).hexdigest()[:16]
        branch = tree.branches.get(key)
        if branch is None:
            branch = tree.branches[key] = _Branch(modules)
        tree.branches.move_to_end(key)
        is_there = branch.zygote is not None and branch.zygote.is_alive
        is_growing = branch.making is not None and not branch.making.done()
        if not (is_there or is_growing or branch.is_bad):
            making = self._grow(tree, key, branch)
            branch.making = asyncio.get_running_loop().create_task(making, name="zygote-branch")
        return branch

    async def _grow(self, tree: _Tree, key: str, branch: _Branch) -> None:
        try:
            async with asyncio.timeout(BRANCH_TIMEOUT_S):
                zygote = await tree.root.branch(f"branch-{key}", branch.modules)
        except (OSError, TimeoutError) as error:
            log.warning("zygote.not_branched", cause=str(error) or "it took too long")
            branch.is_bad = True
            return
        if zygote.thread_count > 1 or zygote.private_mib > BRANCH_MEMORY_MIB_MAX:
            log.warning(
                "zygote.not_branched",
                cause="its imports start threads, or are too large",
                thread_count=zygote.thread_count,
                private_mib=round(zygote.private_mib),
            )
            branch.is_bad = True
            await zygote.close()
            return
        branch.zygote = zygote
        log.info(
            "zygote.branched",
            environment_id=tree.root.environment.environment_id,
            module_count=len(branch.modules),
            private_mib=round(zygote.private_mib, 1),
        )
        self._make_room(branch)

    def _make_room(self, newest: _Branch) -> None:
        """Retire the branches that were used longest ago until the bounds hold."""
        while True:
            ready = [
                (tree, key, branch)
                for tree in self._trees.values()
                for key, branch in tree.branches.items()
                if branch.zygote is not None
            ]
            used_mib = sum(b.zygote.private_mib for _, _, b in ready if b.zygote is not None)
            if len(ready) <= BRANCHES_MAX and used_mib <= BRANCH_MEMORY_MIB_MAX:
                break
            tree, key, oldest = next(row for row in ready if row[2] is not newest)
            del tree.branches[key]
            if oldest.zygote is not None:
                self._retire(oldest.zygote)
        for tree in self._trees.values():  # notes of branches that failed are kept, but not all
            while len(tree.branches) > 4 * BRANCHES_MAX:
                key = next(k for k, b in tree.branches.items() if b.zygote is None)
                del tree.branches[key]

    def _retire(self, zygote: ZygoteProcess) -> None:
        """Close a zygote as soon as its instances, which would end with it, have ended."""
        self._retired.add(zygote)

        def close() -> None:
            if zygote in self._retired:
                self._retired.discard(zygote)
                task = asyncio.get_running_loop().create_task(zygote.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

        zygote.on_idle = close
        if not zygote.instance_count:
            close()

    async def _drop(self, branch: _Branch) -> None:
        if branch.making is not None:
            branch.making.cancel()
            await asyncio.gather(branch.making, return_exceptions=True)
        if branch.zygote is not None:
            await branch.zygote.close()


def _is_wanted(name: str) -> bool:
    return (
        len(name) <= NAME_LENGTH_MAX
        and _NAME.fullmatch(name) is not None
        and name.partition(".")[0] not in UNWANTED
    )


def _remembered(path: Path) -> OrderedDict[str, tuple[str, ...]]:
    """Return what an earlier life of the agent has learnt; a damaged file counts as none."""
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[str, ...]])
    except (OSError, msgspec.DecodeError):
        return OrderedDict()
    return OrderedDict(
        (digest, tuple(filter(_is_wanted, names))[:MODULES_MAX])
        for digest, names in list(stored.items())[-DIGESTS_MAX:]
    )
