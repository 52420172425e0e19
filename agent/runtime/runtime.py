"""Workers as the agent sees them: start, run, stop. One loop, no thread, no task per call."""

import asyncio
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from agent.runtime.environments import Environment
from agent.runtime.instance import ItemKind, ItemResult, RunReport, StartFailure, Worker
from agent.runtime.parent import ZygoteProcess

log = structlog.get_logger()

START_TIMEOUT_S = 60.0
MEMORY_CHECK_S = 0.1
RESULT_BYTES_MAX = 60 << 20

__all__ = ["InstanceStartError", "ItemKind", "ItemResult", "RunReport", "Runtime"]


class InstanceStartError(Exception):
    """An instance did not come up; `remote_traceback` is set if the function's code is to blame."""

    def __init__(self, message: str, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback


class Runtime:
    """All workers of one agent."""

    def __init__(self, *, state_dir: Path, result_bytes_max: int = RESULT_BYTES_MAX) -> None:
        self._folder = state_dir
        self._result_bytes_max = result_bytes_max
        self._zygotes: dict[str, ZygoteProcess] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._workers: dict[str, Worker] = {}
        self._memory_check: asyncio.TimerHandle | None = None
        self.on_died: Callable[[str], None] = lambda instance_id: None

    async def open(self) -> None:
        """Make a clean folder and start watching memory."""
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._watch_memory()

    async def close(self) -> None:
        """Kill every worker and zygote; no process and no file remains."""
        if self._memory_check is not None:
            self._memory_check.cancel()
        for instance_id in list(self._workers):
            await self.stop(instance_id)
        for zygote in self._zygotes.values():
            await zygote.close()
        self._zygotes.clear()
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    async def start(
        self,
        instance_id: str,
        *,
        code_digest: str,
        code_path: Path,
        environment: Environment,
        memory_mib: int,
    ) -> None:
        """Fork an instance and load its function.

        Raises:
            InstanceStartError: The zygote or the function's code could not be loaded in time.
        """
        folder = self._folder / "work" / instance_id
        folder.mkdir(parents=True)
        worker = Worker(instance_id, memory_mib, folder)
        worker.on_idle_death = self._died
        self._workers[instance_id] = worker
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                zygote = await self._zygote(environment)
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

    def run(
        self,
        instance_id: str,
        arguments: Sequence[bytes],
        *,
        timeout_s: float,
        on_done: Callable[[RunReport], None],
        memory_mib: int | None = None,
    ) -> None:
        """Run one batch on an idle instance; `on_done` is called once, from the loop.

        `memory_mib` is what it may use, if less than the instance was started with.
        """
        worker = self._workers.get(instance_id)
        if worker is None:
            asyncio.get_running_loop().call_soon(on_done, RunReport.never_ran(len(arguments)))
        else:
            worker.run(arguments, timeout_s, on_done, memory_mib)

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

    async def _zygote(self, environment: Environment) -> ZygoteProcess:
        name = environment.environment_id
        async with self._locks.setdefault(name, asyncio.Lock()):
            zygote = self._zygotes.get(name)
            if zygote is None or not zygote.is_alive:
                if zygote is not None:
                    log.warning("zygote.restarted", environment_id=name)
                    await zygote.close()
                zygote = ZygoteProcess(environment)
                try:
                    await zygote.open()
                except OSError as error:
                    raise StartFailure(f"{environment.python} did not start: {error}") from None
                self._zygotes[name] = zygote
            return zygote

    def _died(self, instance_id: str) -> None:
        self.on_died(instance_id)

    def _watch_memory(self) -> None:
        for worker in self._workers.values():
            worker.check_memory()
        loop = asyncio.get_running_loop()
        self._memory_check = loop.call_later(MEMORY_CHECK_S, self._watch_memory)
