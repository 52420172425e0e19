"""Workers as the agent sees them: start, run, stop. One loop, no thread, no task per call."""

import asyncio
import functools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from agent.runtime import cgroups
from agent.runtime.environments import Environment
from agent.runtime.instance import ItemKind, ItemResult, RunReport, StartFailure, Worker
from agent.runtime.nursery import Nursery
from agent.runtime.relay import Relay
from agent.runtime.sandbox import OFF, STANDARD
from tierwise.wire.memfd import Memfd

log = structlog.get_logger()

START_TIMEOUT_S = 60.0
MEMORY_CHECK_S = 0.1
RESULT_BYTES_MAX = 120 << 20

__all__ = ["InstanceStartError", "ItemKind", "ItemResult", "RunReport", "Runtime"]


class InstanceStartError(Exception):
    """An instance did not come up; `remote_traceback` is set if the function's code is to blame."""

    def __init__(self, message: str, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback


class Runtime:
    """All workers of one agent."""

    def __init__(
        self,
        *,
        state_dir: Path,
        isolation: str = STANDARD,
        data: Sequence[str] = (),
        may_reach_node: bool = False,
        result_bytes_max: int = RESULT_BYTES_MAX,
        imports: Path | None = None,
    ) -> None:
        """Make a runtime that is not open yet.

        Args:
            state_dir: Its own folder, emptied at every start.
            isolation: strict, standard or off.
            data: Folders of this node that functions may read.
            may_reach_node: Whether a function's `network=` may name the node itself.
            result_bytes_max: Larger results are refused.
            imports: File that remembers what functions import.
        """
        self._folder = state_dir
        self._isolation = isolation
        self._may_reach_node = may_reach_node
        self._result_bytes_max = result_bytes_max
        self.nursery = Nursery(imports, isolation, data)
        self._workers: dict[str, Worker] = {}
        self._memory_check: asyncio.TimerHandle | None = None
        self.on_died: Callable[[str], None] = lambda instance_id: None

    async def open(self) -> None:
        """Make a clean folder and start watching memory."""
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        if self._isolation != OFF:
            await asyncio.to_thread(cgroups.sweep_dead)
        self._watch_memory()

    async def close(self) -> None:
        """Kill every worker and zygote; no process and no file remains."""
        if self._memory_check is not None:
            self._memory_check.cancel()
        await asyncio.gather(*(self.stop(instance_id) for instance_id in list(self._workers)))
        await self.nursery.close()
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def start(
        self,
        instance_id: str,
        *,
        code_digest: str,
        code_path: Path,
        environment: Environment,
        memory_mib: int,
        cpus: float = 0.0,
        network: tuple[str, ...] = (),
    ) -> None:
        """Fork an instance and load its function.

        Args:
            instance_id: A new name.
            code_digest: SHA-256 of the code, hex.
            code_path: The file with the code.
            environment: The interpreter.
            memory_mib: What the instance may use.
            cpus: What it may use; 0 for as many as there are.
            network: Targets, "host:port", that it may reach through this process.

        Raises:
            InstanceStartError: The zygote or the function's code could not be loaded in time.
        """
        folder = self._folder / "work" / instance_id
        folder.mkdir(parents=True)
        relay = None
        if network and self._isolation != OFF:  # without the seal it has the node's own network
            relay = Relay(frozenset(network), may_reach_node=self._may_reach_node)
        worker = Worker(instance_id, memory_mib, folder, cpus, relay)
        worker.on_idle_death = self._died
        worker.on_imports = functools.partial(self.nursery.learn, environment, code_digest)
        self._workers[instance_id] = worker
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                try:
                    zygote = await self.nursery.zygote(environment, code_digest)
                except OSError as error:
                    raise StartFailure(f"{environment.python} did not start: {error}") from None
                await worker.fork(
                    zygote,
                    code_path=code_path,
                    code_digest=code_digest,
                    result_bytes_max=self._result_bytes_max,
                )
        except TimeoutError:
            await self.stop(instance_id)
            raise InstanceStartError(
                f"the function did not load within {START_TIMEOUT_S:.0f} s"
            ) from None
        except StartFailure as failure:
            await self.stop(instance_id)
            raise InstanceStartError(str(failure), failure.remote_traceback) from None
        except BaseException:
            await self.stop(instance_id)
            raise

    def workers(self) -> dict[str, Worker]:
        """Return every instance, whatever it does, in the order of their starts."""
        return dict(self._workers)

    def run(
        self,
        instance_id: str,
        arguments: Sequence[bytes],
        *,
        timeout_s: float,
        on_done: Callable[[RunReport], None],
        attachments: Sequence[Memfd] = (),
        memory_mib: int | None = None,
    ) -> None:
        """Run one batch on an idle instance; `on_done` is called once, from the loop.

        Attachments are the detached arrays of a batch of one item; `memory_mib` is what it may
        use, if less than the instance was started with.
        """
        worker = self._workers.get(instance_id)
        if worker is None:
            asyncio.get_running_loop().call_soon(on_done, RunReport.never_ran(len(arguments)))
        else:
            worker.run(arguments, timeout_s, on_done, attachments, memory_mib)

    def cancel(self, instance_id: str) -> None:
        """Kill an instance because its call is not wanted; its report says CANCELLED."""
        worker = self._workers.get(instance_id)
        if worker is not None:
            worker.kill(ItemKind.CANCELLED, "cancelled")

    async def stop(self, instance_id: str) -> None:
        """End an instance and remove its folder; unknown ids are ignored."""
        worker = self._workers.pop(instance_id, None)
        if worker is not None:
            await worker.close()
            await asyncio.to_thread(shutil.rmtree, worker.folder, ignore_errors=True)

    def _died(self, instance_id: str) -> None:
        self.on_died(instance_id)

    def _watch_memory(self) -> None:
        for worker in self._workers.values():
            worker.check_memory()
        loop = asyncio.get_running_loop()
        self._memory_check = loop.call_later(MEMORY_CHECK_S, self._watch_memory)
